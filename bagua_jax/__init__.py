"""Communication relaxations for data-parallel training in JAX.

``algorithms`` holds optax transforms, written in the ``primitives`` of BAGUA over
``compressors`` and ``topologies``; ``Workers`` runs them, simulated or on devices.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bagua_jax import (
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
        theory,
        topologies,
        wire,
    )
    from bagua_jax.primitives import worker_local
    from bagua_jax.sharding import sharded
    from bagua_jax.workers import Workers
    from bagua_jax.wrappers import accumulate, varying

__version__ = "0.1.0"

__all__ = [
    "Workers",
    "accumulate",
    "asynchrony",
    "buckets",
    "compressors",
    "diagnostics",
    "network",
    "overlap",
    "parts",
    "planning",
    "primitives",
    "processes",
    "schedules",
    "sharded",
    "theory",
    "topologies",
    "varying",
    "wire",
    "worker_local",
]

_HOME = {
    "Workers": "workers",
    "accumulate": "wrappers",
    "sharded": "sharding",
    "varying": "wrappers",
    "worker_local": "primitives",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the command line shows its help before jax is imported."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOME.get(name, name)}")
    return getattr(module, name) if name in _HOME else module


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
