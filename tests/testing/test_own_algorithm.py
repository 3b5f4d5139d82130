"""The page on a relaxation of one's own is true: its file runs, its commands work."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bagua_jax import testing
from bagua_jax.experiments import cli

PAGE = (Path(__file__).parents[2] / "docs" / "own_algorithm.md").read_text()
FILE, TEST = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "round_robin.py").write_text(FILE)
    (tmp_path / "own_parts.py").write_text(
        "from bagua_jax import compressors, topologies\n"
        "def coarse(share: float = 0.5):\n    return compressors.topk(share)\n"
        "def pull(n: int, own: float = 0.5):\n"
        "    return topologies.ring(n, self_weight=own)\n"
        "def task():\n    return 3\n"
        "import optax\n"
        "def half(learning_rate, momentum=0.0):\n"
        "    return optax.sgd(learning_rate / 2, momentum)\n"
        "def three_of(learning_rate):\n    return 3\n"
        "three = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in ("round_robin", "own_parts"):
        sys.modules.pop(name, None)


def bagua_jax(command: str) -> int:
    return cli.main(shlex.split(command.removeprefix("bagua-jax ")))


def test_the_commands_of_the_page(folder, capsys):
    for command in COMMANDS:
        assert bagua_jax(command) == 0, command
    shown = capsys.readouterr().out
    assert "round_robin" in shown
    results = json.loads((folder / "runs" / "mine" / "results.json").read_text())
    assert "round_robin" in json.dumps(results)


def test_the_contracts_of_the_page(folder, devices):
    spec = importlib.util.spec_from_file_location("round_robin", "round_robin.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "testing.check_algorithm(round_robin" in TEST
    testing.check_algorithm(
        module.round_robin, "gradient", {"stride": 2}, floor=0.2, workers=[8]
    )


def test_compressors_and_topologies_of_ones_own(folder):
    algorithms = (
        "[{name: ef21, compressor: own_parts:coarse(0.3)},"
        " {name: decentralized, topology: own_parts:pull(own=0.4)}]"
    )
    assert bagua_jax(f"run quadratic --steps 5 --algorithms '{algorithms}'") == 0


def test_an_optimizer_of_ones_own(folder):
    def metrics(label, **optimizer):
        flags = [f"--optimizer.{k.replace('_', '-')} {v}" for k, v in optimizer.items()]
        command = f"run quadratic --steps 5 --experiment {label} --algorithms bytegrad "
        assert bagua_jax(command + " ".join(flags)) == 0
        (found,) = (folder / "runs" / label).glob("bytegrad-*/summary.json")
        return json.loads(found.read_text())["eval/distance_to_optimum"]

    half = metrics("half", name="own_parts:half", learning_rate=0.2, momentum=0.5)
    assert half == metrics("sgd", name="sgd", learning_rate=0.1, momentum=0.5)
    assert half != metrics("lion", name="optax:lion", learning_rate=0.1, b1=0.5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--optimizer.name own_parts:hal", "unknown name in own_parts 'hal'; did you"),
        (
            "--optimizer.name own_parts:half --optimizer.b1 0.5",
            "unknown argument of",
        ),
        ("--optimizer.name own_parts:three", "must be a function of the learning rate"),
        (
            "--optimizer.name own_parts:three_of",
            "must return an optax transform; got",
        ),
        ("--optimizer.name own_parts:task", "optimizer: TypeError: task() takes 0"),
        ("--optimizer.name os:system", "is Python's own"),
        ("--optimizer.name lion", "unknown optimizer"),
    ],
)
def test_errors_of_an_optimizer(folder, capsys, flags, message):
    assert bagua_jax(f"run quadratic --algorithms bytegrad {flags}") == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("algorithms", "message"),
    [
        (
            "round_robin:round_robin",
            "must be an Entry.*got a function.*round_robin:entry",
        ),
        ("own_parts:three", "must be an Entry.*got a int"),
        (
            "round_robin:entri",
            "unknown name in round_robin 'entri'; did you mean 'entry'",
        ),
        (
            "round_robbin:entry",
            "'round_robbin:entry' cannot be imported: ModuleNotFound",
        ),
        (
            "'{name: round_robin:entry, strid: 3}'",
            "unknown argument.*did you mean 'stri",
        ),
        ("'{name: round_robin:entry, stride: x}'", "stride: must be a whole number"),
        (
            "'{name: ef21, compressor: own_parts:corse}'",
            "unknown name in own_parts 'corse'",
        ),
        (
            "'{name: ef21, compressor: own_parts:three}'",
            "must be a function that returns a C",
        ),
        (
            "'{name: ef21, compressor: own_parts:task}'",
            "must return a Compressor, got int",
        ),
        (
            "'{name: ef21, compressor: own_parts:coarse(2)}'",
            "ratio must be a number in",
        ),
        (
            "'{name: decentralized, topology: own_parts:task}'",
            r"topology: .*task\(\) takes 0",
        ),
    ],
)
def test_errors_name_what_was_tried(folder, capsys, algorithms, message):
    assert bagua_jax(f"run quadratic --algorithms {algorithms}") == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_three_lines_of_pytest(folder):
    """As a user: the page's test file, in a Python of its own, one check of it."""
    quick = TEST.replace("floor=0.2", "floor=0.2, workers=[2], skip=SLOW")
    slow = [c.__name__ for c in list(testing.CHECKS)[2:]]
    (folder / "test_mine.py").write_text(f"SLOW = {slow}\n{quick}")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "test_mine.py"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout
