"""Checkpoints of asynchronous workers: whole or not at all, and refused else."""

import builtins
import errno
import os
import random
import resource
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bagua_jax.experiments.runs import worker_checkpoint
from bagua_jax.experiments.runs.folders import RunError


def state(seed=0, dtype=jnp.float32):
    params = {"a/b": jax.random.normal(jax.random.key(seed), (3, 2), dtype), "c": ()}
    return params, optax.adam(0.1).init(params), jax.random.key(seed)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, dtype):
    worker_checkpoint.save(tmp_path, 1, state(1, dtype), 10)
    worker_checkpoint.save(tmp_path, 1, state(2, dtype), 20)
    found, steps = worker_checkpoint.load(tmp_path, 1, state(0, dtype))
    expected = state(2, dtype)
    assert steps == 20
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    words = [jax.random.key_data(tree[2]) for tree in (found, expected)]
    np.testing.assert_array_equal(*words)
    for x, y in zip(*map(jax.tree.leaves, (found[:2], expected[:2])), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_a_save_says_whose_it_is(tmp_path):
    marks = {"steps-1.jsonl": (3, "abc")}
    worker_checkpoint.save(tmp_path, 1, state(), 10, run="a", marks=marks)
    about = worker_checkpoint.about(tmp_path, 1, run="a")
    assert about == ("a", 1, 10, {"steps-1.jsonl": [3, "abc"]})
    assert worker_checkpoint.about(tmp_path, 2, run="a") is None
    with pytest.raises(RunError, match="worker 2 has saved nothing"):
        worker_checkpoint.load(tmp_path, 2, state(), run="a")
    with pytest.raises(RunError, match="worker 1 of run 'a'; this is worker 1 of run"):
        worker_checkpoint.load(tmp_path, 1, state(), run="b")
    (tmp_path / "saved-1.npz").rename(tmp_path / "saved-2.npz")
    with pytest.raises(RunError, match="is of worker 1 of run 'a'; this is worker 2"):
        worker_checkpoint.about(tmp_path, 2, run="a")


def test_every_damage_is_refused_and_nothing_else_is_raised(tmp_path):
    """A flipped bit in a zip's directory used to be a KeyError or worse."""
    worker_checkpoint.save(tmp_path, 0, state(), 10)
    path = tmp_path / "saved-0.npz"
    whole, draw = path.read_bytes(), random.Random(0)
    for at in range(0, len(whole), 2):
        harmed = bytearray(whole)
        harmed[at] ^= 1 << draw.randrange(8)
        for data in (harmed, whole[:at], whole[:at] + whole[at + 4 :], whole + b"\0"):
            path.write_bytes(data)
            with pytest.raises(RunError, match=r"saved-0\.npz cannot be read"):
                worker_checkpoint.load(tmp_path, 0, state())
    path.write_bytes(whole)
    with np.load(path) as file:  # NumPy reads it, too
        assert "about" in file.files


@pytest.mark.parametrize("harm", ["truncated", "altered", "empty"])
def test_what_was_harmed_is_refused_by_name(tmp_path, harm):
    worker_checkpoint.save(tmp_path, 0, state(), 10)
    path = tmp_path / "saved-0.npz"
    data = bytearray(path.read_bytes())
    if harm == "altered":
        values = np.asarray(state()[0]["a/b"]).tobytes()
        data[bytes(data).index(values) + 5] ^= 1
    path.write_bytes(data[: {"truncated": len(data) // 2, "empty": 0}.get(harm)])
    for read in (
        lambda: worker_checkpoint.load(tmp_path, 0, state()),
        lambda: worker_checkpoint.about(tmp_path, 0),
    ):
        with pytest.raises(RunError, match=r"saved-0\.npz cannot be read.*--overwrite"):
            read()


def test_another_models_is_refused(tmp_path):
    worker_checkpoint.save(tmp_path, 0, state(), 10)
    params, *rest = state()
    others = [{**params, "d": jnp.ones(2)}, params | {"a/b": jnp.ones((2, 3))}]
    others += [params | {"a/b": params["a/b"].astype(t)} for t in ("bfloat16", "int32")]
    for like in (*((other, *rest) for other in others), (params,)):
        with pytest.raises(RunError, match="another model or optimizer"):
            worker_checkpoint.load(tmp_path, 0, like)


@pytest.mark.parametrize("at", [(np, "savez"), (os, "fsync")])
def test_where_there_is_no_room_the_last_one_stays(tmp_path, monkeypatch, at):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(*at, full)
        with pytest.raises(RunError, match=r"step 10 .*No space left.*start it again"):
            worker_checkpoint.save(tmp_path, 0, state(1), 10)
    worker_checkpoint.save(tmp_path, 0, state(1), 10)
    with monkeypatch.context() as patch:
        patch.setattr(*at, full)
        with pytest.raises(RunError, match=r"step 20 .*No space left.*is whole"):
            worker_checkpoint.save(tmp_path, 0, state(2), 20)
    assert [path.name for path in tmp_path.iterdir()] == ["saved-0.npz"]
    assert worker_checkpoint.load(tmp_path, 0, state())[1] == 10


@pytest.fixture
def no_descriptor():
    """Take every file descriptor of the process; calling it gives one back."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 50, limits[1]))
    taken = []
    try:
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        assert error.errno == errno.EMFILE
    yield lambda: os.close(taken.pop())
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    for descriptor in taken:
        os.close(descriptor)


def test_a_save_waits_for_a_descriptor(tmp_path, no_descriptor, monkeypatch):
    tried = []

    def counted(*arguments):
        tried.append(arguments)
        return builtins.open(*arguments)

    monkeypatch.setattr(worker_checkpoint, "open", counted, raising=False)
    arguments = tmp_path, 0, state(), 10
    saving = threading.Thread(target=worker_checkpoint.save, args=arguments)
    saving.start()
    while len(tried) < 3:
        assert saving.is_alive()
        saving.join(0.01)
    no_descriptor()
    saving.join(60)
    assert worker_checkpoint.load(tmp_path, 0, state())[1] == 10


def test_a_save_does_not_wait_forever(tmp_path, no_descriptor, monkeypatch):
    monkeypatch.setattr(worker_checkpoint, "PATIENCE_S", 0.2)
    with pytest.raises(RunError, match=r"cannot be saved .*: Too many open files"):
        worker_checkpoint.save(tmp_path, 0, state(), 10)
    no_descriptor()
