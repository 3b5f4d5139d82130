"""What a worker that waits for nobody saves: whole or not at all, and refused else."""

import errno
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bagua_jax.experiments import saves
from bagua_jax.experiments.folders import RunError


def state(seed=0, dtype=jnp.float32):
    params = {"a/b": jax.random.normal(jax.random.key(seed), (3, 2), dtype), "c": ()}
    return params, optax.adam(0.1).init(params), jax.random.key(seed)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, dtype):
    saves.save(tmp_path, 1, state(1, dtype), 10)
    saves.save(tmp_path, 1, state(2, dtype), 20)
    found, steps = saves.load(tmp_path, 1, state(0, dtype))
    expected = state(2, dtype)
    assert steps == 20
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    words = [jax.random.key_data(tree[2]) for tree in (found, expected)]
    np.testing.assert_array_equal(*words)
    for x, y in zip(*map(jax.tree.leaves, (found[:2], expected[:2])), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_a_run_goes_on_if_all_have_saved(tmp_path):
    saves.save(tmp_path, 0, state(), 10)
    assert saves.steps_of(tmp_path, 2) is None
    saves.save(tmp_path, 1, state(), 15)
    assert saves.steps_of(tmp_path, 2) == [10, 15]
    with pytest.raises(RunError, match="worker 2 has saved nothing"):
        saves.load(tmp_path, 2, state())


@pytest.mark.parametrize("harm", ["truncated", "altered", "empty"])
def test_what_was_harmed_is_refused_by_name(tmp_path, harm):
    saves.save(tmp_path, 0, state(), 10)
    path = tmp_path / "saved-0.npz"
    data = bytearray(path.read_bytes())
    if harm == "altered":
        values = np.asarray(state()[0]["a/b"]).tobytes()
        data[bytes(data).index(values) + 5] ^= 1
    path.write_bytes(data[: {"truncated": len(data) // 2, "empty": 0}.get(harm)])
    for read in (
        lambda: saves.load(tmp_path, 0, state()),
        lambda: saves.steps_of(tmp_path, 1),
    ):
        with pytest.raises(RunError, match=r"saved-0\.npz cannot be read.*--overwrite"):
            read()


def test_another_models_is_refused(tmp_path):
    saves.save(tmp_path, 0, state(), 10)
    params, *rest = state()
    others = [{**params, "d": jnp.ones(2)}, params | {"a/b": jnp.ones((2, 3))}]
    others += [params | {"a/b": params["a/b"].astype(t)} for t in ("bfloat16", "int32")]
    for like in (*((other, *rest) for other in others), (params,)):
        with pytest.raises(RunError, match="another model or optimizer"):
            saves.load(tmp_path, 0, like)


@pytest.mark.parametrize("at", [(np, "savez"), (os, "fsync")])
def test_where_there_is_no_room_the_last_one_stays(tmp_path, monkeypatch, at):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(*at, full)
        with pytest.raises(RunError, match=r"step 10 .*No space left.*start it again"):
            saves.save(tmp_path, 0, state(1), 10)
    saves.save(tmp_path, 0, state(1), 10)
    with monkeypatch.context() as patch:
        patch.setattr(*at, full)
        with pytest.raises(RunError, match=r"step 20 .*No space left.*is whole"):
            saves.save(tmp_path, 0, state(2), 20)
    assert [path.name for path in tmp_path.iterdir()] == ["saved-0.npz"]
    assert saves.load(tmp_path, 0, state())[1] == 10
