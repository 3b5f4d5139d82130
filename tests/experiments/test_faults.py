"""What goes wrong inside a run is reported where it happens, and loses nothing."""

import contextlib
import gc
import resource
import subprocess
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bagua_jax import Workers
from bagua_jax.experiments.runs import checkpoint, train
from bagua_jax.experiments.runs.folders import RunError
from bagua_jax.experiments.tasks import TASKS
from bagua_jax.experiments.tasks.data import Shards

BATCH = Shards.batch


def poison(monkeypatch, steps, workers=(2,), value=np.nan) -> None:
    """Spoil the batches of some workers in some steps, counted from 1."""

    def batch(self, step, own=slice(None)):
        found = BATCH(self, step, own)
        if step + 1 in steps:
            found["target"][list(workers)] = value
        return found

    monkeypatch.setattr(Shards, "batch", batch)


@pytest.mark.parametrize("where", ["simulate", "devices"])
def test_a_worker_that_is_not_finite_is_named(lab, monkeypatch, where):
    poison(monkeypatch, {6})
    status, _, err = lab.run("--where", where)
    assert status == 1
    assert "nan on step 6, that of worker 2 first" in err
    assert [line["step"] for line in lab.lines()] == list(range(6))


@pytest.mark.parametrize("label", ["gradient_allreduce", "low_precision_decentralized"])
def test_a_skipped_step_is_as_if_it_had_not_been(lab, monkeypatch, label):
    changes = {"algorithms": [label], "on_nan": "skip"}
    poison(monkeypatch, {6})
    status, out, _ = lab.run(output="skips", **changes)
    assert status == 0 and "step 6 is skipped: not finite at worker 2" in out
    skipped = lab.lines(label, "skips")[6]
    assert skipped["train/skipped_by"] == 1 and np.isfinite(skipped["train/loss"])

    # The same batches without that step.
    monkeypatch.setattr(
        Shards,
        "batch",
        lambda self, step, own=slice(None): BATCH(self, step + (step >= 5), own),
    )
    assert lab.run(output="without", steps=11, **changes)[0] == 0
    ours, theirs = lab.state(label, "skips"), lab.state(label, "without")
    counts = [
        np.frombuffer(x.pop(".opt_state.skipped")[2], np.int32) for x in (ours, theirs)
    ]
    assert ours == theirs and counts == [1, 0]


HUGE = 1e6  # of a target: nothing overflows, and everybody can tell


@jax.custom_jvp
def trap(x, kind):
    """0 where a gradient is spoilt, infinity where a loss is, with gradient 0."""
    return jnp.where(kind == 2, jnp.inf, 0.0) + 0.0 * x


trap.defjvps(lambda dx, out, x, kind: jnp.where(kind == 1, jnp.nan, 0.0) * dx, None)


@pytest.mark.parametrize("kind", [1, 2])
def test_gradients_and_losses_each_spoil_a_step_alone(lab, monkeypatch, kind):
    """One worker's gradient is NaN where its loss is finite, or the other way round."""
    task = TASKS["quadratic"]()

    def loss(params, batch):
        spoilt = kind * (jnp.max(jnp.abs(batch["target"])) >= HUGE)
        return task.loss(params, batch) + trap(jax.tree.leaves(params)[0].sum(), spoilt)

    monkeypatch.setitem(TASKS, "quadratic", lambda: task._replace(loss=loss))
    poison(monkeypatch, {6}, value=HUGE)
    status, out, _ = lab.run("--on-nan", "skip")
    assert status == 0 and "step 6 is skipped: not finite at worker 2" in out
    lines = lab.lines()
    assert lines[6]["train/skipped_by"] == 1 and np.isfinite(lines[6]["train/loss"])
    assert lines[7]["train/loss"] < 1e3 and "train/skipped_by" not in lines[7]


def test_an_update_that_is_not_finite_is_skipped(lab, monkeypatch):
    """Though every gradient is: the fault is nobody's."""
    made = train.catalog.transform

    def overflows(config, axis_name, turns=None):
        scale = lambda u: jnp.where(jnp.abs(u) > 1e3, u * 1e38, u)  # noqa: E731
        after = optax.stateless(lambda u, _: jax.tree.map(scale, u))
        return optax.chain(made(config, axis_name, turns), after)

    monkeypatch.setattr(train.catalog, "transform", overflows)
    poison(monkeypatch, {6}, value=HUGE)
    status, out, _ = lab.run("--on-nan", "skip")
    assert status == 0 and "step 6 is skipped: the update is not finite, though" in out
    assert lab.lines()[6]["train/skipped_by"] == 0
    assert lab.lines()[7]["train/loss"] < 1e3


@pytest.mark.parametrize("where", ["simulate", "devices"])
def test_a_step_that_is_bad_on_all_workers_is_skipped_too(lab, monkeypatch, where):
    """Then nobody has a loss to record."""
    poison(monkeypatch, {6, 12}, workers=range(4))
    status, out, _ = lab.run("--on-nan", "skip", "--where", where)
    assert status == 0 and "step 6 is skipped: not finite at worker 0, worker 1" in out
    lines = lab.lines()
    assert lines[6]["train/skipped_by"] == 4 and "train/loss" not in lines[6]
    assert np.isfinite(lines[7]["train/loss"]) and len(lines) == 13
    assert np.isfinite(lab.summary()["train/loss_last_10"])


def test_a_run_that_only_skips_is_stopped(lab, monkeypatch):
    poison(monkeypatch, set(range(3, 99)))
    status, _, err = lab.run("--on-nan", "skip", "--steps", "40")
    assert status == 1 and "11 steps in a row were skipped" in err


def test_synchronous_workers_are_not_dropped(lab):
    status, _, err = lab.run("--on-nan", "drop")
    assert status == 2 and "on_nan: drop is for workers that wait for nobody" in err


def test_a_replica_that_drifts_is_named():
    workers = Workers.devices(4)
    sharding = NamedSharding(workers.mesh, P())
    same, spoilt = np.arange(6.0, dtype=np.float32), np.arange(6.0, dtype=np.float32)
    spoilt[3] = np.nextafter(spoilt[3], 9)  # one bit
    copies = [
        jax.device_put(spoilt if i == 2 else same, device)
        for i, device in enumerate(workers.mesh.devices.flat)
    ]
    drifted = jax.make_array_from_single_device_arrays((6,), sharding, copies)
    own = workers.stack(np.arange(8.0, dtype=np.float32).reshape(4, 2))  # may differ
    check = train.replica_checksums(workers, {"shared": P(), "own": workers.spec})

    def program(state):
        return train.Program(workers, state, None, check, None, False)

    sound = {"shared": jax.device_put(same, sharding), "own": own}
    train._require_equal_replicas(5, program(sound), sound)
    state = {"shared": drifted, "own": own}
    with pytest.raises(RunError, match="by step 5: worker 2 differ from the other 3"):
        train._require_equal_replicas(5, program(state), state)


def test_replicas_are_compared_every_so_many_steps(lab, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "_require_equal_replicas", lambda s, *_: seen.append(s))
    lab.run("--check-replicas-every", "5")
    lab.run("--check-replicas-every", "5", "--where", "simulate")
    assert seen == [5, 10]


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# orbax's own writers, whose event loop is gone when they hear that the disk is full;
# they complain when they are collected, which is to be in the test that left them
on_full_disks = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@on_full_disks
def test_a_full_disk_stops_the_run_and_spoils_nothing(lab, monkeypatch):
    changes = {"task": "digits", "algorithms": ["decentralized"]}
    lab.run(output="whole", **changes)

    class Killed(BaseException):
        pass

    def save_and_die(*args, **kwargs):
        save(*args, **kwargs)
        raise Killed

    save = checkpoint.save
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_die)
        with pytest.raises(Killed):
            lab.run(output="full", **changes)

    with full_disk(room=4000):
        status, _, err = lab.run(output="full", **changes)
    assert status == 1
    assert "step 8 cannot be written to" in err and ": File too large. " in err, err
    assert "That of step 4 is whole: the same command continues from it" in err
    folder = lab.folder("decentralized", "full")
    assert (folder / "checkpoints/4/seal.json").exists()
    status, out, _ = lab.run(output="full", **changes)
    assert status == 0 and "continues after step 4" in out
    for look in (lab.metrics, lab.state):
        assert look("decentralized", "full") == look("decentralized", "whole")
    gc.collect()


def test_a_full_disk_is_told_in_one_line(lab):
    changes = {"task": "digits", "output": str(lab.root / "runs")}
    command = [sys.executable, "-m", "bagua_jax.experiments", "run"]
    with full_disk(room=4000):
        done = subprocess.run(
            [*command, lab.config(**changes)], capture_output=True, text=True
        )
    assert done.returncode == 1
    assert done.stderr.startswith("bagua-jax: gradient_allreduce: checkpoint: step 4")
    assert done.stderr.count("\n") == 1, done.stderr


@on_full_disks
@pytest.mark.parametrize("room", [100, 300, 1000])  # an array takes 1,350
def test_whoever_meets_the_full_disk_says_so_alike(tmp_path, room):
    """orbax's own files, the arrays' description, their numbers: in any order."""
    state = {f"leaf {i}": jax.numpy.arange(600.0) + i for i in range(12)}
    for step in range(1, 21):
        with full_disk(room), pytest.raises(OSError) as caught:
            checkpoint.save(tmp_path, step, state, {}, keep=1)
        assert str(caught.value) == (
            f"checkpoint: step {step} cannot be written to {tmp_path}: File too large. "
            "There is none before it: the same command starts anew once there is room."
        )
        del caught
    gc.collect()


def test_what_was_altered_is_named(lab):
    lab.run()
    place = lab.folder() / "checkpoints"
    (lab.folder() / "summary.json").unlink()
    for step in ("8", "12"):
        (file,) = (place / step / "default").glob("manifest.ocdbt")
        file.write_bytes(file.read_bytes()[:-1])
    status, _, err = lab.run()
    assert status == 1
    assert "checkpoints/8/default/manifest.ocdbt is not what was written" in err
