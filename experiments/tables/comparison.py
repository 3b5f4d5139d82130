"""Which finished runs of an experiment's folder stand in one comparison.

Later commands add runs to an experiment; its report is made of all run folders that are
there. A run of an earlier command is compared if what the config says now would make
the same run; one that differs (other steps, another seed, another task) is named, with
what differs, and left out.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bagua_jax.experiments.runs import folders, integrity
from bagua_jax.experiments.runs.integrity import RunError
from bagua_jax.experiments.spec import catalog
from bagua_jax.experiments.spec import config as configs
from bagua_jax.experiments.spec.config import (
    AlgorithmConfig,
    ConfigError,
    ExperimentConfig,
)

__all__ = ["Comparison", "LeftOut", "Result", "gather"]


class Result(NamedTuple):
    """A finished run.

    Attributes:
        run: its config, resolved.
        summary: its final numbers.
        earlier: whether an earlier command made it.
    """

    run: ExperimentConfig
    summary: dict[str, Any]
    earlier: bool = False

    @property
    def label(self) -> str:
        """What tables and figures call it; a run of an earlier command has a mark."""
        return self.summary["label"] + " *" * self.earlier


class LeftOut(NamedTuple):
    """A finished run that is not compared."""

    folder: str
    because: str


class Comparison(NamedTuple):
    """The runs of an experiment, in the config's order, and those left out."""

    results: list[Result]
    left_out: list[LeftOut]


def gather(
    config: ExperimentConfig,
    runs: Sequence[ExperimentConfig],
    finished: Iterable[tuple[ExperimentConfig, dict[str, Any]]],
    listed: Sequence[AlgorithmConfig],
) -> Comparison:
    """Put the runs of a command beside those of earlier ones in the same folder.

    Args:
        config: of the experiment, as this command has it.
        runs: of this command, resolved, whether or not they finished.
        finished: of them, with their summaries.
        listed: the algorithms of the config, those that the command left out as well.
    """
    own = {configs.run_name(run) for run in runs}
    now = {algorithm.label: algorithm for algorithm in listed}
    now |= {run.algorithms[0].label: run.algorithms[0] for run in runs}
    results = [Result(run, summary) for run, summary in finished]
    left_out = []
    for folder in sorted((Path(config.output) / config.experiment).iterdir()):
        if folder.name in own or not folder.is_dir():
            continue
        try:
            found = _read(folder)
            if found is None:
                continue
            algorithm = found.run.algorithms[0]
            expected = catalog.written_out(now.get(algorithm.label, algorithm), config)
        except (ConfigError, RunError) as error:
            left_out.append(LeftOut(folder.name, f"it cannot be compared: {error}"))
            continue
        because = _differences(found.run, expected)
        if not because and algorithm.label in {r.summary["label"] for r in results}:
            because = "another run has its label, and the config names neither"
        if because:
            left_out.append(LeftOut(folder.name, because))
        else:
            results.append(found)
    order = [*now, *sorted(found.run.algorithms[0].label for found in results)]
    results.sort(key=lambda found: order.index(found.run.algorithms[0].label))
    return Comparison(results, left_out)


def _read(folder: Path) -> Result | None:
    """Read a finished run; None where the folder is none that `run` has made.

    Raises:
        ConfigError, RunError: if its config, summary or records are damaged.
    """
    if integrity.read_text(folder / "config.yaml") is None:
        return None
    run = configs.load(folder / "config.yaml")
    if len(run.algorithms) != 1 or configs.run_name(run) != folder.name:
        return None
    name = folders.name_of(run)
    summary = integrity.read_document(folder / "summary.json", name)
    if summary is None:
        return None
    for file, mark in summary.marks.items():
        if fault := integrity.read(folder / file, name).differ_from(mark):
            raise RunError(fault)
    # Where it stands now: the folder may have been moved.
    run = dataclasses.replace(
        run, output=str(folder.parent.parent), experiment=folder.parent.name
    )
    return Result(run, summary.value, earlier=True)


def _differences(run: ExperimentConfig, expected: ExperimentConfig) -> str:
    """Say in what a run differs from the one that the config would make now."""
    was, now = (_flat(configs.identity(each)) for each in (run, expected))
    changed = (k for k in was | now if was.get(k) != now.get(k))
    return ", ".join(f"{k} {was.get(k)}, now {now.get(k)}" for k in changed)


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    flat = {k: v for k, v in facts.items() if not isinstance(v, dict)}
    for name in ("optimizer", "algorithm"):
        flat |= {f"{name}.{k}": v for k, v in facts[name].items()}
    return flat
