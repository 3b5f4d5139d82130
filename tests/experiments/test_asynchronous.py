"""``bagua-jax async`` through the command line: runs, their replay, refusals."""

import json
import math
import signal
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bagua_jax.experiments.runs import (
    asynchronous,
    folders,
    integrity,
    worker_checkpoint,
)
from bagua_jax.experiments.runs.folders import RunError
from bagua_jax.experiments.spec import config

PACE = ("--pace", "0.004", "0.008")


@pytest.fixture
def run_async(lab, monkeypatch):
    """Run the command on a small quadratic; status, output, complaints, folder."""
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", str(root))

    def run(*flags: str, **changes):
        small = {"workers": 2, "steps": 20, "eval_every": 5, "sharding": "iid"}
        small["optimizer"] = {"name": "sgd", "learning_rate": 0.1}
        config = lab.config(output=str(lab.root / "runs"), **small | changes)
        status, out, err = lab.main("async", config, *flags)
        return status, out, err, lab.root / "runs" / "small"

    return run


def test_rounds_are_recorded_and_replayed(run_async):
    algorithm = {"name": "async_model_average", "local_steps": 1, "label": "mean"}
    status, out, err, folder = run_async("--replay", *PACE, algorithms=[algorithm])
    assert status == 0, err
    run = folder / "async-mean-s0"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["replay/largest_difference"] < 1e-5, out
    assert summary["steps/mean"] == summary["steps/max"] == 20
    assert summary["consensus/distance_sq"] < 1e-9  # all have the last mean
    events = (run / "events-0.jsonl").read_text().splitlines()
    assert sum(summary["staleness"][0].values()) == len(events) > 1
    metrics = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    distance = [line["eval/distance_to_optimum"] for line in metrics]
    assert distance[-1] < distance[0]
    assert run_async(algorithms=[algorithm])[1].startswith("finished before")


@pytest.mark.parametrize(
    ("flags", "changes", "why"),
    [
        ((), {}, ["rounds exchange models", "gradient_allreduce", "local_sgd"]),
        (
            ("--compressor", "minmax_uint8"),
            {"algorithms": [{"name": "local_sgd", "local_steps": 1}]},
            ["--compressor", "is of pairs"],
        ),
        (
            ("--exchange", "pairs", "--compressor", "minmax"),
            {},
            ["--compressor", "minmax_uint8"],
        ),
        (("--exchange", "pairs", "--pace", "1"), {}, ["--pace", "2 workers", "got 1"]),
        (("--worker", "2"), {}, ["--worker", "from 0 to 1", "got 2"]),
        (("--worker", "0"), {}, ["--addresses", "all 2 workers"]),
        (
            ("--resume",),
            {"algorithms": [{"name": "local_sgd", "local_steps": 1}]},
            ["--resume", "belongs to --worker"],
        ),
        (
            ("--worker", "0", "--addresses", "8.8.8.8:5", "127.0.0.1:5"),
            {"algorithms": [{"name": "local_sgd", "local_steps": 1}]},
            ["only loopback and private", "8.8.8.8"],
        ),
    ],
)
def test_what_does_not_fit_is_refused(run_async, flags, changes, why):
    status, _, err, _ = run_async(*flags, **changes)
    assert status == 2
    assert all(word in err for word in why), err


def test_a_worker_whose_loss_is_not_finite_leaves(tmp_path):
    why = r"worker 3: the training loss is nan on step 2"
    like = {"x": np.ones(2)}
    with asynchronous.Recorder(tmp_path, 3, every=1, like=like) as recorder:
        recorder.step(1, 0.5, {"x": np.ones(2)})
        with pytest.raises(RunError, match=why):
            recorder.step(2, math.nan, {"x": np.ones(2)})


@pytest.mark.parametrize(
    ("lost", "left"),
    [
        ({"models-0.f32": b"half", "steps-0.jsonl": b'{"st'}, [1, 2]),
        ({"models-0.f32": b"a model" + bytes(5)}, [1, 2]),  # no line tells of it
        ({"models-0.f32": -12}, [1]),  # the machine lost power: its line is left
        ({"steps-0.jsonl": -2}, [1, 2]),  # its copy has it
        ({"steps-0.jsonl": -2, "copies/steps-0.jsonl": -9}, [1]),
    ],
)
def test_a_record_that_is_not_whole_is_cut_off(tmp_path, lost, left):
    def record(*steps):
        like = {"x": np.zeros(3)}
        with asynchronous.Recorder(tmp_path, 0, every=1, like=like) as recorder:
            recorder.start(steps[0] - 1)
            for step in steps:
                recorder.step(step, 0.5, {"x": np.full(3, step)})

    record(1, 2)
    for name, change in lost.items():
        data = (tmp_path / name).read_bytes()
        data = data[:change] if isinstance(change, int) else data + change
        (tmp_path / name).write_bytes(data)
    record(3)
    models = np.fromfile(tmp_path / "models-0.f32", np.float32).reshape(-1, 3)
    np.testing.assert_array_equal(models[:, 0], [*left, 3])
    np.testing.assert_array_equal(models, models[:, :1].repeat(3, 1))
    lines = integrity.peek(tmp_path / "steps-0.jsonl")
    assert [line["step"] for line in lines if "step" in line] == [*left, 3]
    assert [line["starts"] for line in lines if "starts" in line] == [0, 2]


INTERRUPTED = """
import sys
if '--worker' in sys.orig_argv and '--resume' not in sys.orig_argv:
    from bagua_jax.asynchrony import Replica
    step = Replica.step
    def interrupted(self, local_step):
        if self.steps == 12:
            raise RuntimeError('pulled the plug')
        return step(self, local_step)
    Replica.step = interrupted
"""


@pytest.fixture
def interrupted(run_async, monkeypatch, tmp_path):
    """Every worker of a run that is not resumed dies after twelve steps."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    return run_async


def saved_by(run) -> list[worker_checkpoint.About]:
    """What the workers of a run have saved."""
    name = folders.name_of(config.load(run / "config.yaml"))
    found = [worker_checkpoint.about(run, worker, run=name) for worker in range(2)]
    return [about for about in found if about is not None]


@pytest.mark.parametrize("exchange", ["rounds", "pairs"])
def test_an_interrupted_run_goes_on(interrupted, exchange):
    algorithm = {"name": "async_model_average", "local_steps": 1, "label": "mean"}
    small = {"algorithms": [algorithm], "checkpoint_every": 4}
    small["optimizer"] = {"name": "sgd", "learning_rate": 0.02, "momentum": 0.9}
    flags = ("--exchange", exchange, "--pace", "0.01", "0.01")

    status, out, err, folder = interrupted(*flags, "--restarts", "0", **small)
    assert status == 1 and "pulled the plug" in " ".join(err.split()), out + err
    (run,) = folder.glob("async-*")
    saved = [own.steps for own in saved_by(run)]
    assert set(saved) <= {4, 8, 12}

    status, out, err, _ = interrupted(*flags, "--replay", **small)
    assert status == 0, err
    said = " ".join(out.split())
    assert f"go on from steps {saved[0]}, {saved[1]}." in said
    assert "not replayed: worker 0 did not start once" in said
    for worker in range(2):
        lines = integrity.peek(run / f"steps-{worker}.jsonl")
        starts = [line["starts"] for line in lines if "starts" in line]
        assert starts == [0, saved[worker]]
        assert lines[-1]["step"] == 20
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps/max"] == 20
    metrics = integrity.peek(run / "metrics.jsonl")
    distance = [line["eval/distance_to_optimum"] for line in metrics]
    assert distance[-1] < distance[0]


KILL = "os.kill(os.getpid(), {})"
ONCE = """
import os, sys
from pathlib import Path
if '--worker' in sys.orig_argv:
    from bagua_jax.asynchrony import Replica
    worker = sys.orig_argv[sys.orig_argv.index('--worker') + 1]
    marker = Path({folder!r}, worker)
    step = Replica.step
    def struck(self, local_step):
        if self.steps == 14 and worker in {struck} and not marker.exists():
            marker.touch()
            {strike}
        return step(self, local_step)
    Replica.step = struck
"""


@pytest.mark.parametrize(
    ("exchange", "struck", "strike", "said"),
    [
        ("rounds", "1", KILL.format(9), "was killed by SIGKILL"),
        # as gloo says that it has lost a connection
        ("rounds", "1", "raise ValueError('lost')", "ended with exit status 3"),
        ("pairs", "1", KILL.format(int(signal.SIGSTOP)), "has not moved for"),
        ("pairs", "01", KILL.format(9), "was killed by SIGKILL"),
    ],
)
def test_a_worker_that_dies_or_hangs_is_started_again(
    run_async, monkeypatch, tmp_path, exchange, struck, strike, said
):
    """Alone in pairs; if all die at once, what each saved is what they go on from."""
    program = ONCE.format(folder=str(tmp_path), struck=tuple(struck), strike=strike)
    (tmp_path / "sitecustomize.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    algorithm = {"name": "async_model_average", "local_steps": 1, "label": "mean"}
    flags = ("--exchange", exchange, "--pace", "0.01", "0.01", "--stuck-after", "8")
    status, out, err, folder = run_async(
        *flags,
        *("--backoff", "0.1", "--timeout", "60"),  # the other one waits for it
        algorithms=[algorithm],
        checkpoint_every=4,
    )
    err = " ".join(err.split())
    assert status == 0, out + err
    assert f"(worker {struck[0]}, host" in err and said in err, err
    assert ("; the others go on." in err) == (exchange == "pairs")
    (run,) = folder.glob("async-*")
    assert json.loads((run / "summary.json").read_text())["steps/max"] == 20
    for worker in range(2):
        lines = integrity.peek(run / f"steps-{worker}.jsonl")
        starts = [line["starts"] for line in lines if "starts" in line]
        assert lines[-1]["step"] == 20
        begun_again = exchange == "rounds" or str(worker) in struck
        assert len(starts) == 1 + begun_again and starts[0] == 0
        assert all(start >= 4 for start in starts[1:]), starts


def test_a_worker_that_cannot_go_on_is_not_passed_over(
    run_async, monkeypatch, tmp_path
):
    """The others of pairs finish; the run has not, and the same command goes on."""
    program = ONCE.format(folder=str(tmp_path), struck=("1",), strike="sys.exit(1)")
    (tmp_path / "sitecustomize.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    flags = ("--exchange", "pairs", "--pace", "0.01", "0.01")
    status, out, err, folder = run_async(*flags, checkpoint_every=4)
    assert status == 1, out + err
    assert "worker 1 failed." in err and "The same command goes on" in err
    (run,) = folder.glob("async-*")
    assert not (run / "summary.json").exists()
    status, out, err, _ = run_async(*flags, checkpoint_every=4)
    assert status == 0, out + err
    assert "go on from steps 20, 12." in " ".join(out.split())
    lines = integrity.peek(run / "steps-1.jsonl")
    assert [line["starts"] for line in lines if "starts" in line] == [0, 12]
    assert lines[-1]["step"] == 20


def test_rounds_go_on_from_the_mean(interrupted):
    """Whose models are equal at the start: what algorithms assume."""
    algorithm = {"name": "async_model_average", "local_steps": 10**6, "label": "alone"}
    small = {"algorithms": [algorithm], "checkpoint_every": 4}
    status, _, err, folder = interrupted("--restarts", "0", **small)
    assert status == 1, err
    run = folder / "async-alone-s0"
    # All steps are taken: what is left of the run is to begin, and to end.
    for worker, value in enumerate((1.0, 4.0)):
        with np.load(run / f"saved-{worker}.npz") as file:
            size = file[file.files[-1]].size
        about = saved_by(run)[worker]
        state = jnp.full(size, value), optax.sgd(0.1).init(jnp.zeros(size))
        worker_checkpoint.save(run, worker, state, 20, run=about.run, marks=about.marks)
    status, out, err, _ = interrupted(**small)
    assert status == 0, err
    assert "go on from steps 20, 20" in " ".join(out.split())
    for worker in range(2):
        last = np.fromfile(run / f"models-{worker}.f32", np.float32)[-1]
        assert last == 2.5


def test_a_run_folder_is_of_one_run_at_a_time(run_async, lab):
    algorithm = {"name": "async_model_average", "local_steps": 1, "label": "mean"}
    folder = lab.root / "runs" / "small" / "async-mean-s0"
    with folders.locked(folder):
        status, _, err, _ = run_async(algorithms=[algorithm])
    assert status == 1 and "another process is working" in " ".join(err.split())
    assert run_async(algorithms=[algorithm], steps=5)[0] == 0
    status, _, err, _ = run_async(algorithms=[algorithm], steps=6)
    assert status == 1 and "is the config of another run" in " ".join(err.split())
    assert run_async("--overwrite", algorithms=[algorithm], steps=6)[0] == 0


@pytest.mark.parametrize(("policy", "expected"), [("stop", 1), ("drop", 0)])
def test_policy_for_a_worker_that_is_not_finite(
    run_async, monkeypatch, tmp_path, policy, expected
):
    # Workers are processes: worker 1's batch is spoiled where Python starts.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if '--worker 1' in ' '.join(sys.orig_argv):\n"
        "    import numpy as np\n"
        "    from bagua_jax.experiments.tasks.data import Shards\n"
        "    deal = Shards.deal.__func__\n"
        "    def spoiled(cls, data, *rest):\n"
        "        shards = deal(cls, data, *rest)\n"
        "        nan = {k: v * np.nan for k, v in shards.train.items()}\n"
        "        return shards._replace(train=nan)\n"
        "    Shards.deal = classmethod(spoiled)\n"
    )
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{root}")
    flags = ("--exchange", "pairs", "--pace", "0.004", "0.004")
    status, out, err, _ = run_async(*flags, on_nan=policy)
    said = " ".join((out + err).split())
    assert status == expected, said
    assert "worker 1: the training loss is nan on step 1" in said
    assert ("With on_nan: drop" in said) == (policy == "stop")
    assert ("; the others go on." in said) == (policy == "drop")


@pytest.mark.parametrize(
    ("policy", "flags", "why"),
    [
        ("skip", ("--exchange", "pairs"), "skip is for steps that all workers take"),
        ("drop", (), "drop needs --exchange pairs"),
    ],
)
def test_policies_that_do_not_fit_are_refused(run_async, policy, flags, why):
    algorithm = {"name": "local_sgd", "local_steps": 1}
    status, _, err, _ = run_async(*flags, algorithms=[algorithm], on_nan=policy)
    assert status == 2 and why in " ".join(err.split())
