"""AlexNet for a picture and an LSTM for its words, joined in one classifier."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

__all__ = ["LSTMAlexNet"]


class LSTMAlexNet(nn.Module):
    """Classify pairs of a picture and a text.

    **Every size is our choice**: BAGUA's fifth task is known to be an LSTM with an
    AlexNet on data that are not public, and no more. The picture goes through AlexNet
    without its last layer (five convolutions, in one column, for 224x224 pixels), the
    text through an embedding of 30,000 words of width 512 and two LSTMs of 1,024 units,
    and what both end with through a dense layer: 92,173,096 parameters.

    Attributes:
        convolutions: (channels, size, stride) of each; the first, second and last end
            in a 3x3 maximum with stride 2.
        hidden: units of the two dense layers behind them.
        units: of each LSTM.
        vocabulary: kinds of words.
        embedding: width of a word.
        classes: of pairs.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> small = LSTMAlexNet(((4, 5, 2), (4, 3, 1)), 8, 6, 20, 5, classes=3)
        >>> image, words = jnp.zeros((2, 32, 32, 3)), jnp.zeros((2, 7), jnp.int32)
        >>> logits, params = jax.eval_shape(
        ...     small.init_with_output, jax.random.key(0), image, words
        ... )
        >>> logits.shape
        (2, 3)

    References:
        Krizhevsky et al., `ImageNet Classification with Deep Convolutional Neural
        Networks`, 2012, and `One weird trick for parallelizing convolutional neural
        networks`, 2014, for the column. Hochreiter and Schmidhuber, `Long Short-Term
        Memory`, 1997.
    """

    convolutions: Sequence[tuple[int, int, int]] = (
        (64, 11, 4),
        (192, 5, 1),
        (384, 3, 1),
        (256, 3, 1),
        (256, 3, 1),
    )
    hidden: int = 4096
    units: int = 1024
    vocabulary: int = 30_000
    embedding: int = 512
    classes: int = 1000

    @nn.compact
    def __call__(self, image: jax.Array, words: jax.Array) -> jax.Array:
        """Return the logits of each class, [B, H, W, 3] and [B, T] -> [B, classes]."""
        x = image
        for number, (channels, size, stride) in enumerate(self.convolutions):
            x = nn.relu(nn.Conv(channels, (size, size), stride, size // 2)(x))
            if number in (0, 1, len(self.convolutions) - 1):
                x = nn.max_pool(x, (3, 3), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(self.hidden)(x))

        y = nn.Embed(self.vocabulary, self.embedding)(words)
        for _ in range(2):  # without a loop: counts of operations see every word
            lstm = nn.RNN(nn.OptimizedLSTMCell(self.units), unroll=words.shape[1])
            y = jnp.asarray(lstm(y))
        return nn.Dense(self.classes)(jnp.concatenate([x, y[:, -1]], axis=-1))
