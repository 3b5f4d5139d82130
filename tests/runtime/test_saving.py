"""A state with typed keys, through files that cannot hold them."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bagua_jax.algorithms import qadam
from bagua_jax.saving import from_arrays, to_arrays

PARAMS = {"w": jnp.linspace(-1, 1, 5000), "empty": jnp.zeros((0, 2)), "none": None}
TX = optax.chain(
    optax.add_noise(0.1, 0.5, jax.random.key(3, impl="rbg")),
    qadam(1e-3, axis_name="workers", warmup_steps=2, error_feedback="both"),
)


def trained():
    def steps(x):
        state = TX.init(PARAMS)
        for _ in range(3):
            grads = jax.tree.map(lambda p: x * p, PARAMS)
            _, state = TX.update(grads, state, PARAMS)
        return state

    state = jax.vmap(steps, axis_name="workers")(jnp.arange(2.0))
    return jax.tree.map(lambda x: x[1], state)


def through_savez(state, folder):
    np.savez(folder / "state.npz", **to_arrays(state))
    return dict(np.load(folder / "state.npz"))


def through_flax(state, folder):
    (folder / "state").write_bytes(flax.serialization.to_bytes(to_arrays(state)))
    return flax.serialization.msgpack_restore((folder / "state").read_bytes())


@pytest.mark.parametrize("through", [through_savez, through_flax])
def test_a_state_comes_back_bit_for_bit(tmp_path, through):
    state = trained()
    back = from_arrays(through(state, tmp_path), TX.init(PARAMS))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for a, b in zip(*map(jax.tree.leaves, (back, state)), strict=True):
        assert a.dtype == b.dtype and bool((a == b).all())


def test_what_does_not_fit_is_refused():
    state = TX.init(PARAMS)
    for change, words in (
        (lambda a: a.pop("[1].mu['w']"), r"mu\['w'\] is .* in like, and not there"),
        (lambda a: a.update(more=np.ones(1)), "more is not there in like"),
        (lambda a: a.update({"[1].count": np.float32(0)}), "float32"),
        (lambda a: a.update({"[1].mu['w']": np.ones(3, "f4")}), r"\(3,\)"),
    ):
        arrays = to_arrays(state)
        change(arrays)
        with pytest.raises(ValueError, match=f"^from_arrays: leaf (.*){words}"):
            from_arrays(arrays, state)


@pytest.mark.parametrize("through", [through_savez, through_flax])
@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "float8_e5m2", "int4", "bool"]
)
def test_every_dtype_comes_back(tmp_path, through, dtype):
    """NumPy's files know no bfloat16, and give two bytes of no type."""
    state = {"x": jnp.arange(-3, 4).astype(dtype), "scalar": jnp.ones([], dtype)}
    back = from_arrays(through(state, tmp_path), state)
    for name, x in state.items():
        assert back[name].dtype == x.dtype and bool((back[name] == x).all())
    if dtype == "bfloat16":
        with pytest.raises(ValueError, match="leaf .*'x'"):
            from_arrays(through(state, tmp_path), {**state, "x": jnp.zeros(7)})
