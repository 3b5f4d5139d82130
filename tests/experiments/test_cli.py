"""The command line: what it prints, what it refuses, and how it exits."""

import contextlib
import fcntl
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from bagua_jax.experiments import tasks
from bagua_jax.experiments.runs import integrity, train
from bagua_jax.experiments.spec import config
from bagua_jax.experiments.tables import lists


def python(*argv: str, cwd, **env: str) -> subprocess.CompletedProcess:
    """Run Python outside this process, on its own host devices."""
    drop = ("JAX_PLATFORMS", "XLA_FLAGS", "NPROC")
    clean = {k: v for k, v in os.environ.items() if k not in drop}
    return subprocess.run(
        [sys.executable, *argv],
        cwd=cwd,
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def bagua_jax(*argv: str, cwd, **env: str) -> subprocess.CompletedProcess:
    return python("-m", "bagua_jax.experiments", *argv, cwd=cwd, **env)


# --- old names ---


@pytest.mark.parametrize("words", [("--fruitless", "x"), ("--fruitless=x",)])
def test_an_old_flag_is_read_and_says_the_new_one(lab, words):
    status, _, complaint = lab.main("launch", "-n", "2", *words, "--", "run", "demo")
    assert status == 2 and "--give-up-after" in complaint.replace("\n", " ")
    assert "--fruitless is called --give-up-after; the old name works" in complaint


# --- help and lists ---


def test_help_needs_no_jax(tmp_path):
    program = (
        "import sys; from bagua_jax.experiments.cli import main; "
        "status = main(sys.argv[1:]); assert 'jax' not in sys.modules; sys.exit(status)"
    )
    for argv in (["--help"], ["run", "--help"], ["run", "demo", "--help"]):
        done = python("-c", program, *argv, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "usage: bagua-jax" in done.stdout


def test_help_shows_the_values_of_the_config(lab):
    status, out, _ = lab.main("run", lab.config(steps=123), "--help")
    assert status == 0
    assert "(default: 123)" in " ".join(out.split())


def test_list_shows_everything_with_a_line_on_each(lab):
    status, out, _ = lab.main("list")
    assert status == 0
    for kind in lists.LISTS:
        assert kind in out
        for name, summary, facts in lists.describe(kind):
            assert name in out
            assert len(summary) > 10 and summary[0].isupper()
            assert ":math:" not in summary
            assert len(facts) == len(lists.LISTS[kind].facts)
            assert all(fact in out for fact in facts)


def test_list_one_kind(lab):
    _, out, _ = lab.main("list", "topologies")
    assert "one_peer_exponential" in out and "bytegrad" not in out
    status, _, err = lab.main("list", "topologie")
    assert status == 2 and "topologies" in err


# --- bad usage: status 2, the field and the value, no traceback ---


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["run", "list"]),
        (["rum"], ["rum", "run"]),
        (["run"], ["CONFIG", "bagua-jax run demo"]),
        (["run", "--steps", "3"], ["CONFIG", "first"]),
        (["run", "dmo"], ["'dmo'", "'demo'"]),
        (["run", "demo", "--stepz", "3"], ["--stepz", "--steps"]),
        (["run", "demo", "--steps", "x"], ["--steps", "'x'"]),
        (["run", "demo", "--steps", "0"], ["steps", "0", "from 1"]),
        (["run", "demo", "--where", "simulat"], ["--where", "'simulat'", "simulate"]),
        (["run", "demo", "--optimizer.name", "adm"], ["adm", "adam"]),
        (["run", "demo", "--optimizer.b1", "0.9"], ["optimizer.b1", "0.9", "adam"]),
        (["run", "demo", "--algorithms", "bytgrad"], ["'bytgrad'", "'bytegrad'"]),
        (["run", "demo", "--algorithms", "qadam"] * 1, None),
        (
            ["run", "demo", "--algorithms", "[{name: qadam, label: a}]"],
            ["algorithms.a.learning_rate"],
        ),
        (["run", "demo", "--algorithms", "[{"], ["algorithms", "YAML"]),
        (["run", "demo", "--task", "mnist"], ["task", "'mnist'", "'mnist5k'"]),
        (["run", "quadratic", "--batch-size", "65"], ["batch_size", "64", "65"]),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_usage(lab, monkeypatch, argv, words):
    if words is None:  # the counterpart: a good one gets as far as the task

        def load(name):
            raise config.ConfigError(f"reached {name}")

        monkeypatch.setattr(tasks, "load", load)
        words = ["reached mnist5k"]
    if argv[:1] == ["run"]:
        argv = [*argv, "--output", str(lab.root)] if len(argv) > 2 else argv
    status, _, err = lab.main(*argv)
    assert status == 2
    for word in words:
        assert word in err


def test_bad_usage_through_the_installed_module(tmp_path):
    (tmp_path / "bad.yaml").write_text("experiment: e\nstepz: 3\n")
    done = bagua_jax("run", "bad.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "bad.yaml: stepz = 3" in done.stderr and "'steps'" in done.stderr
    assert "Traceback" not in done.stderr


def test_more_workers_than_devices_are_refused(lab):
    status, _, err = lab.run(workers=9)
    assert status == 2
    assert "9 workers" in err and "8" in err


# --- failures: status 1 ---


def test_an_output_that_is_a_file_is_refused(lab):
    (lab.root / "file").write_text("")
    status, _, err = lab.run(output="file/runs")
    assert status == 1
    assert "output" in err and "file" in err and "--output" in err


@pytest.mark.skipif(os.geteuid() == 0, reason="permission bits do not bind root")
def test_a_read_only_output_is_refused(lab):
    (lab.root / "locked").mkdir(mode=0o500)
    status, _, err = lab.run(output="locked/runs")
    assert status == 1
    assert "output" in err and "Permission denied" in err


def test_a_folder_that_turns_read_only_fails_the_run(lab, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(integrity.Journal, "sync", refuse)
    status, _, err = lab.run()
    assert status == 1
    assert "Permission denied" in err and "metrics.jsonl" in err


def test_a_diverging_run_fails_and_the_others_are_reported(lab):
    wild = {"name": "gradient_allreduce", "label": "wild"}
    wild["optimizer"] = {"name": "sgd", "learning_rate": 1e30}
    status, out, err = lab.run(algorithms=[wild, "bytegrad"])
    assert status == 1
    assert "wild: the training loss is" in err and "Lower the learning rate" in err
    assert "bytegrad" in out and "failed: wild" in out
    results = json.loads((lab.root / "runs/small/results.json").read_text())
    assert [r["label"] for r in results["results"]] == ["bytegrad"]
    assert len(results["failures"]) == 1
    assert not (lab.folder("wild") / "summary.json").exists()


def test_two_processes_do_not_share_a_folder(lab):
    assert lab.run()[0] == 0
    with open(lab.folder() / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, _, err = lab.run()
    assert status == 1 and "another process" in err


def test_an_interrupt_says_how_to_go_on(lab, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "build", interrupt)
    status, _, err = lab.run()
    assert status == 1 and "same command continues" in err


# --- runs ---


def test_a_run_leaves_its_folder_behind(lab):
    status, out, _ = lab.run()
    assert status == 0
    folder = lab.folder()
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "timing.jsonl",
        "copies",
        "checkpoints",
        "log.txt",
        "summary.json",
        ".lock",
    }
    lines = lab.lines()
    assert [line["step"] for line in lines] == [*range(13)]
    judged = [x["step"] for x in lines if "eval/distance_to_optimum" in x]
    assert judged == [0, 5, 10, 12]
    kept = sorted(int(p.name) for p in (folder / "checkpoints").iterdir())
    assert kept == [8, 12]
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["jax"] == jax.__version__
    assert environment["processor"] in " ".join(out.split())
    log = (folder / "log.txt").read_text()
    assert "starts" in log and log.rstrip().endswith("finished")
    # What it did can be repeated from what it wrote.
    again = config.load(folder / "config.yaml")
    assert config.run_name(again) == folder.name


def test_plain_lines_where_there_is_no_terminal(lab):
    _, out, _ = lab.run()
    assert "gradient_allreduce: step 12/12  loss" in out
    assert "steps/s" in out and "\x1b" not in out


def test_a_finished_run_is_skipped_unless_asked(lab):
    lab.run()
    first = lab.summary()
    status, out, _ = lab.run()
    assert status == 0 and "finished before" in out and "--overwrite" in out
    assert lab.summary() == first
    (lab.folder() / "log.txt").write_text("")
    status, out, _ = lab.run("--overwrite")
    assert status == 0 and "finished before" not in out
    assert "finished" in (lab.folder() / "log.txt").read_text()
    without_time = [x | {"time/steps_per_s": 0} for x in (first, lab.summary())]
    assert without_time[0] == without_time[1]


def test_flags_override_the_config(lab):
    status, _, _ = lab.run(
        "--steps",
        "6",
        "--optimizer.learning-rate",
        "0.2",
        "--seed",
        "3",
        "--algorithms",
        "bytegrad",
    )
    assert status == 0
    written = config.load(lab.folder("bytegrad") / "config.yaml")
    assert (written.steps, written.seed) == (6, 3)
    assert written.optimizer.learning_rate == 0.2
    assert lab.folder("bytegrad").name.endswith("-s3")


def test_the_report_compares_and_is_saved(lab):
    mean = {"name": "async_model_average", "local_steps": 3, "warmup_steps": 4}
    lab.draws = True
    status, out, _ = lab.run(
        algorithms=["gradient_allreduce", "bytegrad", mean], where="simulate"
    )
    assert status == 0
    folder = lab.root / "runs/small"
    for name in ("loss_vs_steps.png", "loss_vs_bytes.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert name in out
    results = json.loads((folder / "results.json").read_text())
    assert results["where"] == "simulate" and "simulation of 4" in results["title"]
    assert "simulation of 4 workers" in out and "would send" in " ".join(out.split())
    assert results["failures"] == []
    plain, byte, average = results["results"]
    d, n = 32, 4
    assert plain["wire"]["bytes_per_worker"] == 2 * 4 * d * (n - 1) / n
    assert plain["wire"]["messages_per_worker"] == 1
    # A quarter of the elements and 8 bytes of range for each part, there and back.
    assert byte["wire"]["bytes_per_worker"] == 2 * (d / n + 8) * (n - 1)
    assert average["wire"]["bytes_per_worker"] == 2 * 4 * d * (n - 1) / n / 3
    assert average["wire"]["warmup_bytes_per_worker"] == 2 * 4 * d * (n - 1) / n
    assert average["wire"]["warmup_steps"] == 4
    assert plain["consensus/distance_sq"] == 0 < average["consensus/distance_sq"]
    low, high = (average[f"eval/excess_loss_worker_{x}"] for x in ("min", "max"))
    assert average["eval/excess_loss"] < low < high


def test_simulation_and_devices_agree(lab):
    algorithms = [
        "gradient_allreduce",
        {"name": "async_model_average", "local_steps": 3, "staleness": 1},
        {"name": "bytegrad", "error_feedback": "both"},
    ]
    for where in ("simulate", "devices"):
        status, _, _ = lab.run(output=where, where=where, algorithms=algorithms)
        assert status == 0
    labels = [a if isinstance(a, str) else a["name"] for a in algorithms]
    for label in labels:
        # A rounding that falls the other way moves a code by one step of the grid.
        rtol = 1e-2 if label == "bytegrad" else 1e-5
        one, other = (lab.lines(label, where) for where in ("simulate", "devices"))
        for a, b in zip(one, other, strict=True):
            assert a.keys() == b.keys()
            np.testing.assert_allclose([*a.values()], [*b.values()], rtol, atol=1e-6)
        wires = [lab.summary(label, x)["wire"] for x in ("simulate", "devices")]
        assert wires[0] == wires[1]


def test_label_sharding_separates_workers_and_iid_does_not(lab):
    apart = {}
    for sharding in ("label", "iid"):
        lab.run(output=sharding, sharding=sharding, algorithms=["decentralized"])
        summary = lab.summary("decentralized", sharding)
        apart[sharding] = summary["consensus/distance_sq"]
    assert apart["label"] > 10 * apart["iid"]


USER_TASK = '''
"""A module of a user's own."""
import jax.numpy as jnp, numpy as np
from bagua_jax.experiments.tasks.data import Data
from bagua_jax.experiments.tasks import Task


def line():
    """Least squares on a line."""

    def init(key):
        return {"slope": jnp.zeros(()), "offset": jnp.zeros(())}

    def loss(params, batch):
        prediction = params["slope"] * batch["x"] + params["offset"]
        return jnp.mean((prediction - batch["y"]) ** 2)

    def data(seed, workers):
        x = np.random.default_rng(seed).normal(size=640).astype(np.float32)
        x, y = x, 3 * x + 1
        train, test = {"x": x[:512], "y": y[:512]}, {"x": x[512:], "y": y[512:]}
        return Data(train, labels=(x[:512] > 0).astype(int), test=test)

    def evaluate(params, test):
        return {"loss": loss(params, test)}

    return Task("a line", init, loss, data, evaluate)


ready = line()
broken_loss = ready._replace(loss=lambda params, batch: batch["nothing"])
broken_data = ready._replace(data=lambda seed, workers: 1 / 0)
silent = ready._replace(evaluate=lambda params, test: {})
'''


@pytest.fixture
def user_module(lab, monkeypatch):
    (lab.root / "my_package").mkdir()
    (lab.root / "my_package/tasks.py").write_text(USER_TASK)
    monkeypatch.chdir(lab.root)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "my_package.tasks"
    for name in ("my_package.tasks", "my_package"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("attribute", ["line", "ready"])
def test_a_task_by_import_path(lab, user_module, attribute):
    status, out, _ = lab.run(task=f"{user_module}:{attribute}", steps=60)
    assert status == 0
    assert "a line" in out and "test" in out
    assert lab.summary()["eval/loss"] < 1e-2 * lab.lines()[0]["eval/loss"]


@pytest.mark.parametrize(
    ("attribute", "words"),
    [
        ("broken_loss", ["KeyError", "nothing", "log.txt"]),
        ("broken_data", ["data failed", "ZeroDivisionError", "tasks.py"]),
        ("silent", ["evaluate", "at least one number"]),
    ],
)
def test_a_broken_task_fails_without_a_traceback(lab, user_module, attribute, words):
    status, _, err = lab.run(task=f"{user_module}:{attribute}")
    assert status == 1
    for word in words:
        assert word in err
    with contextlib.suppress(ValueError):  # broken data leaves no folder
        log = (lab.folder() / "log.txt").read_text()
        assert ("Traceback" in log) == (attribute == "broken_loss")


def test_a_process_makes_its_own_host_devices(tmp_path):
    # Nothing set from outside: 3 workers on a machine with any number of cores.
    flags = "--where devices --workers 3 --steps 4 --algorithms bytegrad".split()
    done = bagua_jax("run", "quadratic", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "3 workers on host devices" in done.stdout
    (folder,) = (tmp_path / "runs/quadratic").glob("bytegrad-*")
    environment = json.loads((folder / "environment.json").read_text())
    assert len(environment["devices"]) == 3


# --- the demo's promises ---


def test_the_demo_as_shipped(tmp_path):
    done = bagua_jax("run", "demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "MNIST-5k" in done.stdout and "8 workers on host devices" in done.stdout
    assert "MNIST" not in done.stdout.replace("MNIST-5k", "")
    saved = json.loads((tmp_path / "runs/demo/results.json").read_text())
    results = {r["label"]: r for r in saved["results"]}
    assert len(results) == 6
    for label, result in results.items():
        assert result["eval/accuracy"] >= 0.9, label
        assert label in done.stdout
    plain = results["gradient_allreduce"]["wire"]["bytes_per_worker"]
    assert plain == 2 * 4 * 52266 * 7 / 8
    for label in ("bytegrad", "qadam"):
        assert results[label]["wire"]["bytes_per_worker"] <= 0.27 * plain
    assert results["qadam"]["wire"]["warmup_bytes_per_worker"] == plain
    for name in ("loss_vs_steps.png", "loss_vs_bytes.png"):
        assert (tmp_path / "runs/demo" / name).stat().st_size > 20_000


# --- run --check ---


def test_a_check_names_what_would_run_and_writes_nothing(lab):
    assert lab.run(algorithms=["bytegrad"])[0] == 0
    before = sorted(lab.root.rglob("*"))
    status, out, err = lab.run("--check", algorithms=["bytegrad", "decentralized"])
    assert (status, err) == (0, "")
    done, to_do = out.splitlines()
    assert done == f"{lab.folder('bytegrad')}: finished"
    assert "/small/decentralized-" in to_do and to_do.endswith("-s0: to run")
    assert sorted(lab.root.rglob("*")) == before


@pytest.mark.parametrize(
    ("flags", "changes", "words"),
    [
        (["--steps", "-1"], {}, "steps: must be"),
        ([], {"task": "mnist6k"}, "'mnist5k'"),
        ([], {"algorithms": [{"name": "bytegrad", "ratio": 1}]}, "'ratio'"),
        ([], {"algorithms": [{"name": "ef21", "compressor": "randk(0.1)"}]}, "ef21"),
        (
            ["--workers", "4096", "--where", "simulate"],
            {"algorithms": [{"name": "decentralized", "topology": "complete"}]},
            "at most 1,048,576 messages",
        ),
        (
            ["--workers", "300", "--where", "simulate"],
            {"algorithms": [{"name": "decentralized", "topology": "star"}]},
            "star of 300 workers has 299",
        ),
    ],
)
def test_a_check_refuses_what_a_run_refuses(lab, flags, changes, words):
    status, out, err = lab.run("--check", *flags, **changes)
    assert status == 2 and out == "" and words in err
    assert lab.run(*flags, **changes)[::2] == (status, err)
    assert [path.name for path in lab.root.iterdir()] == ["config.yaml"]
