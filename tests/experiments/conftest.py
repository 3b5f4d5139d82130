"""Small experiments, run through the command line in this process."""

import json
import textwrap
from pathlib import Path

import pytest
import yaml

from bagua_jax.experiments.cli import main
from bagua_jax.experiments.runs import checkpoint
from bagua_jax.experiments.tables import report

SMALL = {
    "experiment": "small",
    "task": "quadratic",
    "workers": 4,
    "where": "devices",
    "sharding": "label",
    "steps": 12,
    "batch_size": 16,
    "eval_every": 5,
    "checkpoint_every": 4,
    "optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9},
    "algorithms": ["gradient_allreduce"],
}


class Lab:
    """A folder to run experiments in, and eyes for what they leave behind."""

    def __init__(self, root: Path, capsys):
        self.root = root
        self.draws = False  # figures take longer than these runs
        self._capsys = capsys

    def config(self, **changes) -> str:
        path = self.root / "config.yaml"
        path.write_text(yaml.safe_dump(SMALL | changes, sort_keys=False))
        return str(path)

    def text(self, text: str) -> str:
        path = self.root / "config.yaml"
        path.write_text(textwrap.dedent(text))
        return str(path)

    def run(self, *flags: str, output: str = "runs", **changes) -> tuple[int, str, str]:
        """Run a config; exit status, what was printed, and what was complained of."""
        where = str(self.root / output)
        return self.main("run", self.config(output=where, **changes), *flags)

    def main(self, *argv: str) -> tuple[int, str, str]:
        self._capsys.readouterr()
        status = main(list(argv))
        captured = self._capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return status, captured.out, " ".join(captured.err.split())

    def folder(self, label: str = "gradient_allreduce", output: str = "runs") -> Path:
        (found,) = (self.root / output / "small").glob(f"{label}-????????-s*")
        return found

    def metrics(self, label: str = "gradient_allreduce", output: str = "runs") -> bytes:
        return (self.folder(label, output) / "metrics.jsonl").read_bytes()

    def lines(self, label: str = "gradient_allreduce", output: str = "runs") -> list:
        """The records, without what makes them checkable."""
        read = [json.loads(x) for x in self.metrics(label, output).splitlines()]
        return [
            {k: v for k, v in record.items() if k not in ("run", "check")}
            for record in read
        ]

    def state(self, label: str = "gradient_allreduce", output: str = "runs") -> dict:
        """The last checkpoint's arrays, as bytes by path."""
        _, arrays = checkpoint.newest(self.folder(label, output) / "checkpoints")
        return {path: (x.dtype, x.shape, x.tobytes()) for path, x in arrays.items()}

    def summary(self, label: str = "gradient_allreduce", output: str = "runs") -> dict:
        text = (self.folder(label, output) / "summary.json").read_text()
        return {k: v for k, v in json.loads(text).items() if k != "seal"}


@pytest.fixture
def lab(tmp_path, capsys, monkeypatch, devices) -> Lab:
    del devices  # started: a command in this process does not choose their number
    own, figures = Lab(tmp_path, capsys), report._figures
    monkeypatch.setenv("COLUMNS", "120")  # tables do not depend on who runs the tests
    monkeypatch.setattr(report, "_figures", lambda *a: figures(*a) if own.draws else [])
    return own
