"""A run that is stopped anywhere goes on bit for bit; what does not fit is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bagua_jax.experiments import checkpoint, config, folders, trees
from bagua_jax.experiments.folders import RunError

ALGORITHMS = {
    "gradient_allreduce": {},
    "bytegrad": {"error_feedback": "both"},
    "qadam": {"learning_rate": 0.05, "warmup_steps": 5, "error_feedback": "both"},
    "decentralized": {"topology": "one_peer_exponential", "communication_interval": 3},
    "low_precision_decentralized": {},
    "async_model_average": {"period": 3, "staleness": 2, "warmup_steps": 2},
}


class Killed(BaseException):
    """Stands for a kill: nothing in the program may catch it."""


def kill_at(monkeypatch, module, name: str, nth: int, *, before: bool) -> None:
    """Die at the nth call of a function, before or after it has done its work."""
    original, calls = getattr(module, name), iter(range(1, 10**6))

    def deadly(*args, **kwargs):
        due = next(calls) == nth
        if due and before:
            raise Killed
        result = original(*args, **kwargs)
        if due:
            raise Killed
        return result

    monkeypatch.setattr(module, name, deadly)


def run_and_die(lab, monkeypatch, *death, before, **changes) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, *death, before=before)
        with pytest.raises(Killed):
            lab.run(**changes)


def require_equal(lab, label: str, output: str, reference: str) -> None:
    assert lab.metrics(label, output) == lab.metrics(label, reference)
    assert lab.state(label, output) == lab.state(label, reference)


@pytest.mark.parametrize("label", ALGORITHMS)
def test_an_interrupted_run_equals_an_uninterrupted_one(lab, monkeypatch, label):
    changes = {"algorithms": [{"name": label} | ALGORITHMS[label]]}
    assert lab.run(output="whole", **changes)[0] == 0
    # Die between two checkpoints, after metrics of step 10 were written.
    death = (folders, "append_lines", 8)
    run_and_die(lab, monkeypatch, *death, before=False, output="cut", **changes)
    assert not (lab.folder(label, "cut") / "summary.json").exists()
    status, out, _ = lab.run(output="cut", **changes)
    assert status == 0 and f"{label}: continues after step 8" in out
    require_equal(lab, label, "cut", "whole")


_UNCUT = []


@pytest.fixture
def uncut(lab) -> tuple:
    """Metrics and state of a run that nobody interrupts, made once."""
    if not _UNCUT:
        lab.run(output="whole", algorithms=["bytegrad"])
        _UNCUT.append(
            (lab.metrics("bytegrad", "whole"), lab.state("bytegrad", "whole"))
        )
    return _UNCUT[0]


@pytest.mark.parametrize(
    ("module", "name", "nth", "before"),
    [
        (folders, "write_json", 1, False),  # only the environment is there
        (folders, "_write", 2, False),  # the config as well
        (folders, "append_lines", 1, True),  # no metrics yet
        (folders, "append_lines", 2, False),  # metrics, no checkpoint
        (checkpoint, "save", 1, True),
        (checkpoint, "save", 1, False),
        (checkpoint, "write_json", 1, True),  # arrays, no seal
        (checkpoint, "write_json", 3, True),
        (checkpoint, "save", 3, True),  # all metrics, the last checkpoint missing
        (checkpoint, "save", 3, False),  # all but the summary
        (folders, "write_json", 2, True),
    ],
)
def test_any_moment_will_do(lab, monkeypatch, uncut, module, name, nth, before):
    death = (module, name, nth)
    run_and_die(
        lab, monkeypatch, *death, before=before, output="cut", algorithms=["bytegrad"]
    )
    assert lab.run(output="cut", algorithms=["bytegrad"])[0] == 0
    assert (lab.metrics("bytegrad", "cut"), lab.state("bytegrad", "cut")) == uncut


def test_dying_again_and_again_gets_there_as_well(lab, monkeypatch):
    lab.run(output="whole")
    for _ in range(3):
        death = (checkpoint, "save", 1)
        run_and_die(lab, monkeypatch, *death, before=False, output="cut")
    status, out, _ = lab.run(output="cut")
    assert status == 0 and "continues after step 12" in out
    require_equal(lab, "gradient_allreduce", "cut", "whole")


def test_kill_9_at_any_moment(tmp_path):
    """Real processes, really killed, over three algorithms with state."""
    labels = ["bytegrad", "low_precision_decentralized", "async_model_average"]
    entries = [{"name": label} | ALGORITHMS[label] for label in labels]
    flags = ["--algorithms", json.dumps(entries), "--workers", "3", "--steps", "240"]
    flags += ["--where", "devices", "--checkpoint-every", "7", "--eval-every", "50"]
    command = [sys.executable, "-m", "bagua_jax.experiments", "run", "quadratic"]
    env = {k: v for k, v in os.environ.items() if k != "NPROC"}

    def start(output):
        return subprocess.Popen(
            [*command, *flags, "--output", output],
            cwd=tmp_path,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def steps_done() -> int:
        paths = (tmp_path / "cut").glob("*/*/metrics.jsonl")
        return sum(path.read_bytes().count(b"\n") for path in paths)

    for goal in (60, 330, 600):  # one in each algorithm, if the machine is quick
        process = start("cut")
        while process.poll() is None and steps_done() < goal:
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate()
    killed = steps_done()
    for output in ("cut", "whole"):
        process = start(output)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
        if output == "cut":
            assert killed < 3 * 241 and "continues after step" in said

    for label in labels:
        (cut,) = (tmp_path / "cut").glob(f"*/{label}-*")
        (whole,) = (tmp_path / "whole").glob(f"*/{label}-*")
        assert cut.name == whole.name
        ours, theirs = (x / "metrics.jsonl" for x in (cut, whole))
        assert ours.read_bytes() == theirs.read_bytes()
        (step, a), (_, b) = (checkpoint.newest(x / "checkpoints") for x in (cut, whole))
        assert step == 240 and a.keys() == b.keys()
        for path in a:
            assert a[path].tobytes() == b[path].tobytes(), path


# --- damage ---


def unfinish(lab, label: str = "gradient_allreduce"):
    (lab.folder(label) / "summary.json").unlink()
    return lab.folder(label)


@pytest.mark.parametrize("cut", [1, 20, 10**9])
def test_a_torn_last_line_is_survived(lab, cut):
    lab.run()
    whole, state = lab.metrics(), lab.state()
    folder = unfinish(lab)
    last = whole.splitlines(keepends=True)[-1]
    torn = whole[: -min(cut, len(last) - 1)]
    assert torn != whole
    (folder / "metrics.jsonl").write_bytes(torn)
    status, out, _ = lab.run()
    assert status == 0
    assert "checkpoint 12 is newer than the metrics" in out
    assert "continues after step 8" in out
    assert (lab.metrics(), lab.state()) == (whole, state)


def test_lost_metrics_start_the_run_again(lab):
    lab.run()
    whole = lab.metrics()
    (unfinish(lab) / "metrics.jsonl").unlink()
    assert lab.run()[0] == 0
    assert lab.metrics() == whole


def damage(folder, how: str) -> None:
    """Spoil a checkpoint: cut its data short, flip bits, or lose a part."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    if how == "lost":
        shutil.rmtree(folder / "default")
    elif how == "seal":
        (folder / "seal.json").write_text('{"identity": ')
    for path in files:
        if how not in ("short", "flip") or path.parent.name != "d":
            continue
        raw = bytearray(path.read_bytes())
        if how == "short":
            raw = raw[: len(raw) // 2]
        else:
            raw[len(raw) // 2] ^= 1
        path.write_bytes(bytes(raw))


@pytest.fixture(params=["short", "flip", "lost", "seal"])
def how(request) -> str:
    return request.param


def test_a_damaged_checkpoint_falls_back_on_an_older_one(lab, how):
    lab.run()
    whole, state = lab.metrics(), lab.state()
    damage(unfinish(lab) / "checkpoints" / "12", how)
    status, out, _ = lab.run()
    assert status == 0
    assert "checkpoint 12 is damaged" in out and "continues after step 8" in out
    assert (lab.metrics(), lab.state()) == (whole, state)


def test_with_no_intact_checkpoint_the_run_is_refused(lab):
    lab.run()
    folder = unfinish(lab)
    for step in ("8", "12"):
        damage(folder / "checkpoints" / step, "short")
    status, _, err = lab.run()
    assert status == 1
    assert "no intact checkpoint" in err and "--overwrite" in err
    assert lab.run("--overwrite")[0] == 0


def test_a_checkpoint_without_its_seal_was_not_finished(lab):
    lab.run()
    whole = lab.metrics()
    folder = unfinish(lab)
    for step in ("8", "12"):
        (folder / "checkpoints" / step / "seal.json").unlink()
    status, out, _ = lab.run()
    assert status == 0
    assert "checkpoint 8 was not finished" in out
    assert lab.metrics() == whole


def test_the_newest_checkpoint_is_read_or_refused(lab):
    with pytest.raises(RunError, match="no folder"):
        checkpoint.newest(lab.root / "nothing")
    lab.run()
    place = lab.folder() / "checkpoints"
    step, arrays = checkpoint.newest(place)
    assert step == 12 and arrays[".params"].shape == (32,)
    damage(place / "12", "flip")
    with pytest.raises(RunError, match="damaged"):
        checkpoint.newest(place)


# --- another run's ---


def move_checkpoints(lab, source, target) -> None:
    shutil.rmtree(target / "checkpoints")
    shutil.copytree(source / "checkpoints", target / "checkpoints")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"workers": 2}, ["workers is 2 there and 4 here"]),
        ({"batch_size": 8}, ["batch_size is 8 there and 16 here"]),
        ({"seed": 5}, ["seed is 5 there and 0 here"]),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_config_is_refused(lab, change, words):
    lab.run()
    lab.run(output="other", **change)
    folder = unfinish(lab)
    move_checkpoints(lab, lab.folder(output="other"), folder)
    status, _, err = lab.run()
    assert status == 1
    for word in [*words, "another run", "--overwrite"]:
        assert word in err
    assert (folder / "checkpoints/12").exists()  # refused, not removed


def test_a_state_of_another_shape_is_refused(tmp_path):
    checkpoint.save(tmp_path, 3, {"x": jnp.ones(3), "y": jnp.ones(1)}, {}, keep=1)
    for like, word in [
        ({"x": jnp.ones(4), "y": jnp.ones(1)}, r"\['x'\]"),
        ({"x": jnp.ones(3)}, r"\['y'\]"),
    ]:
        with pytest.raises(RunError, match=f"does not fit.*{word}"):
            checkpoint.restore(tmp_path, like, {}, at_most=9, say=print)


@pytest.mark.parametrize(
    ("text", "word"),
    [("experiment: [", "damaged"), ("", "damaged"), (None, "another run")],
)
def test_a_config_that_is_not_the_runs_is_refused(lab, text, word):
    lab.run()
    path = unfinish(lab) / "config.yaml"
    path.write_text(path.read_text().replace("16", "8") if text is None else text)
    status, _, err = lab.run()
    assert status == 1
    assert word in err and "config.yaml" in err and "--overwrite" in err
    assert lab.run("--overwrite")[0] == 0


# --- what a checkpoint holds ---


def test_every_kind_of_leaf_survives(tmp_path):
    state = {
        "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(7, impl="rbg"), 3),
        "half": jnp.arange(3, dtype=jnp.bfloat16) / 3,
        "count": jnp.int32(5),
        "flag": jnp.array([True, False]),
        "code": jnp.arange(5, dtype=jnp.uint8),
        "nan": jnp.array([jnp.nan, -0.0, jnp.inf]),
        "empty": jnp.zeros((0, 3)),
        "none": None,
    }
    checkpoint.save(tmp_path, 1, state, {"a": 1}, keep=1)
    like = jax.tree.map(lambda x: x, state) | {
        "key": jax.random.key(0),
        "half": jnp.zeros(3, jnp.bfloat16),
    }
    step, found = checkpoint.restore(tmp_path, like, {"a": 1}, at_most=1, say=print)
    assert step == 1
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
    ours, theirs = trees.pack(found), trees.pack(state)
    assert {k: np.asarray(v).tobytes() for k, v in ours.items()} == {
        k: np.asarray(v).tobytes() for k, v in theirs.items()
    }
    draws = [jax.random.normal(tree["keys"][1]) for tree in (found, state)]
    assert draws[0] == draws[1]


def test_all_workers_own_state_is_in_the_checkpoint(lab):
    names = ["bytegrad", "low_precision_decentralized"]
    lab.run(algorithms=[{"name": n} | ALGORITHMS[n] for n in names])
    _, byte = checkpoint.newest(lab.folder("bytegrad") / "checkpoints")
    error = np.stack([x for path, x in byte.items() if path.endswith(".worker")])
    assert error.shape == (1, 4, 32)  # feedback of each of 4 workers
    assert len(np.unique(error[0], axis=0)) == 4
    _, gossip = checkpoint.newest(lab.folder(names[1]) / "checkpoints")
    replicas = [x for path, x in gossip.items() if ".replicas" in path]
    assert [x.shape for x in replicas] == [(4, 32)] * 3
    assert any(path.endswith(".key") for path in gossip)


def test_only_the_newest_are_kept(lab):
    lab.run("--keep-checkpoints", "1")
    assert [p.name for p in (lab.folder() / "checkpoints").iterdir()] == ["12"]


def test_checkpoints_do_not_change_the_run(lab):
    lab.run(output="often")
    lab.run("--checkpoint-every", "1", output="always")
    lab.run("--checkpoint-every", "1000", output="never")
    for output in ("always", "never"):
        require_equal(lab, "gradient_allreduce", output, "often")
    assert config.load(lab.folder(output="never") / "config.yaml")
