"""What the relatives of Adam share: a momentum over the root of a variance."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bagua_jax.compressors.numerics import is_finite

__all__ = ["precondition", "unbiased"]


def unbiased(moment: Any, decay: Any, step: jax.Array) -> Any:
    r"""Return :math:`m / (1 - \beta^t)`, of a moving average that starts from zero."""
    # As a float: strict promotion has none between a number and an integer array.
    count = step.astype(jnp.result_type(float))
    return optax.tree.bias_correction(moment, decay, count)


def precondition(mu: Any, nu: Any, eps: float) -> Any:
    r"""Return :math:`m / (\sqrt v + \epsilon)`, and 0 where v = 0.

    No gradient has reached an entry with v = 0, so that its m holds compression error
    only. What is not finite comes from a gradient all the same, and stays.
    """

    def quotient(m, v):
        return jnp.where((v == 0) & is_finite(m), 0, m / (jnp.sqrt(v) + eps))

    return jax.tree.map(quotient, mu, nu)
