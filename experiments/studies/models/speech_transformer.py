"""A transformer that reads speech: filter banks in, characters out."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

__all__ = ["SpeechTransformer"]


class SpeechTransformer(nn.Module):
    """Two convolutions that halve time, an encoder, and a decoder of characters.

    **Every size is our choice**: the public material on BAGUA says a transformer on
    AISHELL-2 and no more. We take the usual shape of the field, twelve encoder layers
    and six decoder layers of width 512 over 80 mel filters, and 5,000 characters:
    68,873,288 parameters. Norms stand before each part; positions are sines, without
    parameters.

    Attributes:
        width: of the residual stream.
        encoders: layers of the encoder.
        decoders: layers of the decoder.
        heads: of attention.
        hidden: units of the perceptrons.
        vocabulary: characters.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> small = SpeechTransformer(8, 1, 1, heads=2, hidden=16, vocabulary=30)
        >>> sound, text = jnp.zeros((2, 16, 20)), jnp.zeros((2, 5), jnp.int32)
        >>> logits, params = jax.eval_shape(
        ...     small.init_with_output, jax.random.key(0), sound, text
        ... )
        >>> logits.shape
        (2, 5, 30)

    References:
        Dong et al., `Speech-Transformer: A No-Recurrence Sequence-to-Sequence Model for
        Speech Recognition`, 2018, for the form.
    """

    width: int = 512
    encoders: int = 12
    decoders: int = 6
    heads: int = 8
    hidden: int = 2048
    vocabulary: int = 5000

    @nn.compact
    def __call__(self, sound: jax.Array, text: jax.Array) -> jax.Array:
        """Return the logits of each next character.

        Args:
            sound: [B, frames, filters] float.
            text: [B, T] the characters before.

        Returns:
            [B, T, vocabulary].
        """

        def perceptron(x):
            inner = nn.relu(nn.Dense(self.hidden)(nn.LayerNorm()(x)))
            return x + nn.Dense(self.width)(inner)

        def attend(x, to=None, mask=None):
            y = nn.LayerNorm()(x)
            layer = nn.MultiHeadDotProductAttention(self.heads)
            return x + layer(y, y if to is None else to, mask=mask)

        x = sound[..., None]
        for _ in range(2):
            x = nn.relu(nn.Conv(64, (3, 3), strides=2)(x))
        x = nn.Dense(self.width)(x.reshape(*x.shape[:2], -1))
        x = x + _sines(x.shape[1], self.width)
        for _ in range(self.encoders):
            x = perceptron(attend(x))
        heard = nn.LayerNorm()(x)

        y = nn.Embed(self.vocabulary, self.width)(text)
        y = y + _sines(y.shape[1], self.width)
        past = nn.make_causal_mask(text)
        for _ in range(self.decoders):
            y = perceptron(attend(attend(y, mask=past), to=heard))
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(y))


def _sines(length: int, width: int) -> jax.Array:
    """Positions as sines and cosines of falling frequency, [1, length, width]."""
    rates = 10_000.0 ** (-np.arange(0, width, 2) / width)
    angles = np.arange(length)[:, None] * rates
    return jnp.asarray(np.hstack([np.sin(angles), np.cos(angles)])[None], jnp.float32)
