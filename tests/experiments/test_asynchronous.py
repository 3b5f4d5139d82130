"""``bagua-jax async`` through the command line: runs, their replay, refusals."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from bagua_jax.experiments import asynchronous
from bagua_jax.experiments.folders import RunError

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
    algorithm = {"name": "async_model_average", "period": 1, "label": "mean"}
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
    with asynchronous.Recorder(tmp_path, 3, every=1) as recorder:
        recorder.step(1, 0.5, {"x": np.ones(2)})
        with pytest.raises(RunError, match=why):
            recorder.step(2, math.nan, {"x": np.ones(2)})


@pytest.mark.parametrize(("policy", "expected"), [("stop", 1), ("drop", 0)])
def test_policy_for_a_worker_that_is_not_finite(
    run_async, monkeypatch, tmp_path, policy, expected
):
    # Workers are processes: worker 1's batch is spoiled where Python starts.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if '--worker 1' in ' '.join(sys.orig_argv):\n"
        "    import numpy as np\n"
        "    from bagua_jax.experiments.data import Shards\n"
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
    assert ("The others go on" in said) == (policy == "drop")


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
