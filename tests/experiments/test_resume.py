"""A run that is stopped anywhere goes on bit for bit; what does not fit is refused."""

import gc
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

from bagua_jax import saving
from bagua_jax.experiments.runs import checkpoint, folders, integrity
from bagua_jax.experiments.runs.folders import RunError
from bagua_jax.experiments.spec import config

ALGORITHMS = {
    "gradient_allreduce": {},
    "bytegrad": {"error_feedback": "both"},
    "qadam": {"learning_rate": 0.05, "warmup_steps": 5, "error_feedback": "both"},
    "decentralized": {"topology": "one_peer_exponential", "local_steps": 3},
    "low_precision_decentralized": {},
    "async_model_average": {"local_steps": 3, "staleness": 2, "warmup_steps": 2},
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
    death = (integrity.Journal, "append", 8)
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
        (folders, "write_text", 1, False),  # the config as well
        (integrity.Journal, "append", 1, True),  # no metrics yet
        (integrity.Journal, "append", 2, False),  # metrics, no checkpoint
        (checkpoint, "save", 1, True),
        (checkpoint, "save", 1, False),
        (checkpoint, "write_document", 1, True),  # arrays, no seal
        (checkpoint, "write_document", 3, True),
        (checkpoint, "save", 3, True),  # all metrics, the last checkpoint missing
        (checkpoint, "save", 3, False),  # all but the summary
        (integrity, "write_document", 1, True),
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


def journals(folder, name: str = "metrics.jsonl") -> list:
    return [folder / name, folder / "copies" / name]


@pytest.mark.parametrize("cut", [1, 20, 10**9])
def test_a_torn_last_line_is_survived(lab, cut):
    """A checkpoint is written after its records: those of step 12 were lost later."""
    lab.run()
    whole, state = lab.metrics(), lab.state()
    folder = unfinish(lab)
    last = whole.splitlines(keepends=True)[-1]
    torn = whole[: -min(cut, len(last) - 1)]
    assert torn != whole
    for path in journals(folder):
        path.write_bytes(torn)
    status, out, _ = lab.run()
    assert status == 0
    assert "checkpoint 12 cannot be used" in out
    assert "metrics.jsonl ends after line 12, of 13" in out
    assert "continues after step 8" in out
    assert (lab.metrics(), lab.state()) == (whole, state)


def flip(text: bytes) -> bytes:
    """Change a digit of the loss of step 5."""
    lines = text.splitlines(keepends=True)
    at = lines[5].index(b"train/loss") + 15
    digit = b"%d" % ((int(lines[5][at : at + 1]) + 1) % 10)
    lines[5] = lines[5][:at] + digit + lines[5][at + 1 :]
    return b"".join(lines)


def without(text: bytes) -> bytes:
    lines = text.splitlines(keepends=True)
    return b"".join(lines[:5] + lines[6:])


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl"])
@pytest.mark.parametrize("harm", [flip, without, None])
def test_records_are_restored_from_their_copies(lab, harm, name, finished):
    if name == "timing.jsonl" and harm is not None:
        harm = lambda text: text[:9] + b"9" + text[10:]  # noqa: E731
    lab.run()
    folder = lab.folder()
    if not finished:
        unfinish(lab)
    before = [path.read_bytes() for path in journals(folder, name)]
    assert before[0] == before[1]
    for path in journals(folder, name):
        path.unlink() if harm is None else path.write_bytes(harm(before[0]))
        status, out, _ = lab.run()
        assert status == 0 and "Traceback" not in out
        assert ("finished before" in out) == (finished or path != folder / name)
        if harm is not None:
            number = 1 if name == "timing.jsonl" else 6
            assert f"{path}, line {number}, was altered" in out
        assert [p.read_bytes() for p in journals(folder, name)] == before


@pytest.mark.parametrize("finished", [True, False])
def test_records_lost_twice_are_computed_again_or_named(lab, finished):
    lab.run("--keep-checkpoints", "3")
    whole, state = lab.metrics(), lab.state()
    folder = lab.folder()
    for path in journals(folder):
        path.write_bytes(flip(whole))
    if not finished:
        unfinish(lab)
    status, out, _ = lab.run()
    assert status == 0 and "checkpoint 12 cannot be used" in out
    assert "line 6, was altered" in out and "continues after step 4" in out
    assert (lab.metrics(), lab.state()) == (whole, state)

    for path in journals(folder):
        path.write_bytes(flip(whole))
    status, _, err = lab.run()
    assert status == 1
    for word in ("no checkpoint", "metrics.jsonl, line 6, was altered", "--overwrite"):
        assert word in err
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    assert kept == {"8", "12"}  # nothing is removed


def test_records_of_another_run_are_refused(lab):
    lab.run()
    lab.run(output="other", seed=5)
    folder = unfinish(lab)
    for path in journals(folder):
        path.write_bytes(lab.metrics(output="other"))
    status, _, err = lab.run()
    assert status == 1
    assert "metrics.jsonl, line 1, is of another run" in err and "--overwrite" in err


def test_a_summary_that_was_altered_is_made_again(lab):
    lab.run()
    first = lab.summary()
    path = lab.folder() / "summary.json"
    text = path.read_text()
    path.write_text(text.replace('"steps": 12', '"steps": 13'))
    status, out, _ = lab.run()
    assert status == 0 and "summary.json was altered; it is made again" in out
    assert lab.summary() == first and path.read_text() == text
    assert "finished before" in lab.run()[1]


def test_a_folder_of_an_earlier_version_is_refused(lab):
    """It has no checksums, and what was lost cannot be told."""
    lab.run()
    path = lab.folder() / "config.yaml"
    path.write_text(path.read_text().partition("# sha256")[0])
    for _ in range(2):
        status, _, err = lab.run()
        assert status == 1
        assert "config.yaml carries no checksum: an earlier version" in err
        assert "Move the folder away, or start afresh with --overwrite" in err
        unfinish(lab) if (lab.folder() / "summary.json").exists() else None
    assert lab.run("--overwrite")[0] == 0


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
    assert "no checkpoint" in err and "is not what was written" in err
    assert "--overwrite" in err
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
            checkpoint.restore(tmp_path, like, {}, say=print)


def test_a_config_of_another_run_is_refused(lab):
    lab.run()
    lab.run(output="other", batch_size=8)
    path = unfinish(lab) / "config.yaml"
    shutil.copy(lab.folder(output="other") / "config.yaml", path)
    status, _, err = lab.run()
    assert status == 1
    assert "another run" in err and "config.yaml" in err and "--overwrite" in err
    assert lab.run("--overwrite")[0] == 0


@pytest.mark.parametrize("change", [("16", "8"), ("label", "lavel"), ("devices", "\0")])
def test_a_config_that_was_altered_is_written_anew(lab, change):
    """What else is in the folder says itself of which run it is."""
    lab.run()
    path = unfinish(lab) / "config.yaml"
    text = path.read_text()
    path.write_text(text.replace(*change))
    status, out, _ = lab.run()
    assert status == 0 and "continues after step 12" in out
    assert path.read_text() == text
    assert "config.yaml was altered" in (lab.folder() / "log.txt").read_text()


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
    marks = {"x.jsonl": (3, "c")}
    checkpoint.save(tmp_path, 1, state, {"a": 1}, marks, keep=1)
    like = jax.tree.map(lambda x: x, state) | {
        "key": jax.random.key(0),
        "half": jnp.zeros(3, jnp.bfloat16),
    }
    step, found, marks = checkpoint.restore(tmp_path, like, {"a": 1}, say=print)
    assert (step, marks) == (1, {"x.jsonl": (3, "c")})
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
    ours, theirs = saving.to_arrays(found), saving.to_arrays(state)
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


def test_nothing_is_left_in_memory_by_a_checkpoint(tmp_path):
    def saved(steps: range) -> int:
        for step in steps:
            checkpoint.save(tmp_path, step, {"x": jnp.zeros(5)}, {}, keep=2)
        gc.collect()
        return len(gc.get_objects())

    before = saved(range(1, 6))
    assert saved(range(6, 26)) - before < 20  # fewer objects than checkpoints


def test_checkpoints_do_not_change_the_run(lab):
    lab.run(output="often")
    lab.run("--checkpoint-every", "1", output="always")
    lab.run("--checkpoint-every", "1000", output="never")
    for output in ("always", "never"):
        require_equal(lab, "gradient_allreduce", output, "often")
    assert config.load(lab.folder(output="never") / "config.yaml")
