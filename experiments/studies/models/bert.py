"""BERT, Large and Base, as it answers questions on SQuAD."""

import jax
import jax.numpy as jnp
from flax import linen as nn

__all__ = ["BERT", "bert_base", "bert_large"]


class BERT(nn.Module):
    """A transformer encoder with norms after each addition, and a span of an answer.

    The head marks where the answer starts and ends: one dense layer of two outputs,
    without a bias. Without pooling, which SQuAD does not use, without dropout, and
    without padding: what is compiled here is full.

    Attributes:
        width: of the residual stream.
        layers: of attention and a perceptron each.
        heads: of attention.
        hidden: units of the perceptrons.
        vocabulary: kinds of tokens.
        window: longest sequence.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> small = BERT(width=8, layers=1, heads=2, hidden=16, vocabulary=50, window=8)
        >>> tokens = jnp.zeros((2, 8), jnp.int32)
        >>> span, params = jax.eval_shape(
        ...     small.init_with_output, jax.random.key(0), tokens, tokens
        ... )
        >>> span.shape
        (2, 8, 2)

    References:
        Devlin et al., `BERT: Pre-training of Deep Bidirectional Transformers for
        Language Understanding`, 2018.
    """

    width: int
    layers: int
    heads: int
    hidden: int
    vocabulary: int = 30522
    window: int = 512

    @nn.compact
    def __call__(self, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        """Return each token's logits as start and end, [B, T] twice -> [B, T, 2]."""
        positions = jnp.arange(tokens.shape[1])[None]
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        x = x + nn.Embed(self.window, self.width)(positions)
        x = nn.LayerNorm()(x + nn.Embed(2, self.width)(segments))
        for _ in range(self.layers):
            heard = nn.MultiHeadDotProductAttention(self.heads)(x)
            x = nn.LayerNorm()(x + heard)
            inner = nn.gelu(nn.Dense(self.hidden)(x))
            x = nn.LayerNorm()(x + nn.Dense(self.width)(inner))
        return nn.Dense(2, use_bias=False)(x)


def bert_large() -> BERT:
    """Make BERT-Large with its SQuAD head: 334,094,336 parameters."""
    return BERT(width=1024, layers=24, heads=16, hidden=4096)


def bert_base() -> BERT:
    """Make BERT-Base with a SQuAD head: 108,893,184 parameters.

    The sizes are those of its paper. Which head BAGUA's own task has is not known to
    us; this one is our choice.
    """
    return BERT(width=768, layers=12, heads=12, hidden=3072)
