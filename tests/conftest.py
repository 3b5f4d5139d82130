"""Eight host devices, fixed keys, strict rank promotion for every test."""

import os

# Twice the host devices: on few cores jax 0.10 can deadlock with two steps in flight.
os.environ.setdefault("NPROC", "16")
# Most of the time is compilation. LLVM's optimizations are a fifth of it and change no
# collective, which XLA places before; XLA_FLAGS= in the environment has them back.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def devices() -> list:
    """The eight host devices that stand for workers."""
    found = jax.devices()
    assert len(found) == 8, f"tests need 8 host devices, got {len(found)}"
    return found
