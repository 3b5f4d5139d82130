"""Communication relaxations for data-parallel training in JAX.

``algorithms`` holds optax transforms, written in the ``primitives`` of BAGUA over
``compressors`` and ``topologies``; ``Workers`` runs them, simulated or on devices.
"""

import importlib

TYPE_CHECKING = False  # without typing, whose import takes longer than all of this
if TYPE_CHECKING:
    from typing import Any

    from bagua_jax import (
        algorithms,
        asynchrony,
        buckets,
        compressors,
        diagnostics,
        network,
        overlap,
        parts,
        planning,
        primitives,
        processes,
        schedules,
        testing,
        theory,
        topologies,
        wire,
    )
    from bagua_jax.gradients import nnx_value_and_grad, value_and_grad
    from bagua_jax.guards import skip_not_finite
    from bagua_jax.jitted import data_parallel
    from bagua_jax.loss_scale import dynamic_loss_scale, scale_gradient
    from bagua_jax.primitives import worker_key, worker_local
    from bagua_jax.resizing import resize
    from bagua_jax.sharding import sharded
    from bagua_jax.workers import Workers
    from bagua_jax.wrappers import accumulate, local, varying

__version__ = "0.2.0"

__all__ = [
    "Workers",
    "accumulate",
    "algorithms",
    "asynchrony",
    "buckets",
    "compressors",
    "data_parallel",
    "diagnostics",
    "dynamic_loss_scale",
    "local",
    "network",
    "nnx_value_and_grad",
    "overlap",
    "parts",
    "planning",
    "primitives",
    "processes",
    "scale_gradient",
    "schedules",
    "resize",
    "sharded",
    "skip_not_finite",
    "testing",
    "theory",
    "topologies",
    "value_and_grad",
    "varying",
    "wire",
    "worker_key",
    "worker_local",
]

_HOME = {
    "Workers": "workers",
    "accumulate": "wrappers",
    "dynamic_loss_scale": "loss_scale",
    "scale_gradient": "loss_scale",
    "data_parallel": "jitted",
    "local": "wrappers",
    "nnx_value_and_grad": "gradients",
    "resize": "resizing",
    "sharded": "sharding",
    "skip_not_finite": "guards",
    "value_and_grad": "gradients",
    "varying": "wrappers",
    "worker_key": "primitives",
    "worker_local": "primitives",
}


def __getattr__(name: str) -> "Any":
    """Import on first use: the command line shows its help before jax is imported."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOME.get(name, name)}")
    return getattr(module, name) if name in _HOME else module


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
