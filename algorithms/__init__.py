"""The algorithms: one idea, one file; each an optax transform written in primitives."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import optax

from bagua_jax.algorithms.adasum import adasum
from bagua_jax.algorithms.async_model_average import async_model_average
from bagua_jax.algorithms.bytegrad import bytegrad
from bagua_jax.algorithms.choco_sgd import choco_sgd
from bagua_jax.algorithms.cocktail_sgd import cocktail_sgd
from bagua_jax.algorithms.compressed_mean import compressed_mean
from bagua_jax.algorithms.d2 import d2
from bagua_jax.algorithms.decentralized import decentralized
from bagua_jax.algorithms.deep_squeeze import deep_squeeze
from bagua_jax.algorithms.delayed_choco import delayed_choco
from bagua_jax.algorithms.delayed_gradients import delayed_gradients
from bagua_jax.algorithms.demo import demo
from bagua_jax.algorithms.dgc import dgc
from bagua_jax.algorithms.diana import diana
from bagua_jax.algorithms.diloco import diloco
from bagua_jax.algorithms.ecd_psgd import ecd_psgd
from bagua_jax.algorithms.ef21 import ef21
from bagua_jax.algorithms.exact_diffusion import exact_diffusion
from bagua_jax.algorithms.gradient_allreduce import gradient_allreduce
from bagua_jax.algorithms.gradient_tracking import gradient_tracking
from bagua_jax.algorithms.hierarchical_averaging import hierarchical_averaging
from bagua_jax.algorithms.local_sgd import local_sgd
from bagua_jax.algorithms.low_precision_decentralized import low_precision_decentralized
from bagua_jax.algorithms.marina import marina
from bagua_jax.algorithms.moniqua import moniqua
from bagua_jax.algorithms.one_bit_adam import one_bit_adam
from bagua_jax.algorithms.one_bit_lamb import one_bit_lamb
from bagua_jax.algorithms.overlapped_push import overlapped_push
from bagua_jax.algorithms.powersgd import powersgd
from bagua_jax.algorithms.qadam import qadam
from bagua_jax.algorithms.quantized_gossip import quantized_gossip
from bagua_jax.algorithms.quasi_global_momentum import quasi_global_momentum
from bagua_jax.algorithms.relay_sgd import relay_sgd
from bagua_jax.algorithms.signum import signum
from bagua_jax.algorithms.slowmo import slowmo
from bagua_jax.algorithms.stochastic_gradient_push import stochastic_gradient_push
from bagua_jax.algorithms.streaming_diloco import streaming_diloco
from bagua_jax.algorithms.zero_one_adam import zero_one_adam

__all__ = [
    "REGISTRY",
    "Entry",
    "adasum",
    "async_model_average",
    "bytegrad",
    "choco_sgd",
    "cocktail_sgd",
    "compressed_mean",
    "d2",
    "decentralized",
    "deep_squeeze",
    "delayed_choco",
    "delayed_gradients",
    "demo",
    "dgc",
    "diana",
    "diloco",
    "ecd_psgd",
    "ef21",
    "exact_diffusion",
    "gradient_allreduce",
    "gradient_tracking",
    "hierarchical_averaging",
    "local_sgd",
    "low_precision_decentralized",
    "marina",
    "moniqua",
    "one_bit_adam",
    "one_bit_lamb",
    "overlapped_push",
    "powersgd",
    "qadam",
    "quantized_gossip",
    "quasi_global_momentum",
    "relay_sgd",
    "signum",
    "slowmo",
    "stochastic_gradient_push",
    "streaming_diloco",
    "zero_one_adam",
]


class Entry(NamedTuple):
    """An algorithm in the table that configs, lists and tests walk over."""

    factory: Callable[..., optax.GradientTransformationExtraArgs]
    placement: Literal["gradient", "weight", "optimizer", "local optimizer"]

    @property
    def is_optimizer(self) -> bool:
        """Whether it stands alone, with no optimizer beside it."""
        return self.placement.endswith("optimizer")

    @property
    def own_params(self) -> bool:
        """Whether each worker has parameters of its own (typed as varying)."""
        return self.placement in ("weight", "local optimizer")

    @property
    def summary(self) -> str:
        """One line on what it does: the first of the factory's docstring."""
        return (self.factory.__doc__ or "").strip().splitlines()[0]


REGISTRY: dict[str, Entry] = {
    "gradient_allreduce": Entry(gradient_allreduce, "gradient"),
    "bytegrad": Entry(bytegrad, "gradient"),
    "compressed_mean": Entry(compressed_mean, "gradient"),
    "diana": Entry(diana, "gradient"),
    "marina": Entry(marina, "gradient"),
    "ef21": Entry(ef21, "gradient"),
    "dgc": Entry(dgc, "gradient"),
    "powersgd": Entry(powersgd, "gradient"),
    "delayed_gradients": Entry(delayed_gradients, "gradient"),
    "adasum": Entry(adasum, "gradient"),
    "qadam": Entry(qadam, "optimizer"),
    "signum": Entry(signum, "optimizer"),
    "one_bit_adam": Entry(one_bit_adam, "optimizer"),
    "zero_one_adam": Entry(zero_one_adam, "local optimizer"),
    "one_bit_lamb": Entry(one_bit_lamb, "optimizer"),
    "demo": Entry(demo, "optimizer"),
    "gradient_tracking": Entry(gradient_tracking, "local optimizer"),
    "decentralized": Entry(decentralized, "weight"),
    "low_precision_decentralized": Entry(low_precision_decentralized, "weight"),
    "ecd_psgd": Entry(ecd_psgd, "weight"),
    "moniqua": Entry(moniqua, "weight"),
    "quantized_gossip": Entry(quantized_gossip, "weight"),
    "async_model_average": Entry(async_model_average, "weight"),
    "local_sgd": Entry(local_sgd, "weight"),
    "hierarchical_averaging": Entry(hierarchical_averaging, "weight"),
    "slowmo": Entry(slowmo, "weight"),
    "diloco": Entry(diloco, "weight"),
    "streaming_diloco": Entry(streaming_diloco, "weight"),
    "cocktail_sgd": Entry(cocktail_sgd, "weight"),
    "choco_sgd": Entry(choco_sgd, "weight"),
    "delayed_choco": Entry(delayed_choco, "weight"),
    "exact_diffusion": Entry(exact_diffusion, "weight"),
    "d2": Entry(d2, "weight"),
    "relay_sgd": Entry(relay_sgd, "weight"),
    "quasi_global_momentum": Entry(quasi_global_momentum, "weight"),
    "deep_squeeze": Entry(deep_squeeze, "weight"),
    "stochastic_gradient_push": Entry(stochastic_gradient_push, "weight"),
    "overlapped_push": Entry(overlapped_push, "weight"),
}
"""Every algorithm by name."""
