"""The command line: ``bagua-jax run CONFIG`` and ``bagua-jax list``.

jax is imported only after the flags are read: help comes at once, and host devices can
be made before jax starts.
"""

import contextlib
import dataclasses
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from bagua_jax.experiments import claims
from bagua_jax.experiments import config as configs
from bagua_jax.experiments.config import ConfigError, ExperimentConfig
from bagua_jax.experiments.folders import RunError, blame, require_writable

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["main"]

_USAGE = 2
_FAILED = 1
_COUNTED = 256


@dataclass(frozen=True)
class Run:
    """Train the algorithms of a config and compare them.

    Each algorithm gets a run folder, runs/EXPERIMENT/LABEL-HASH-sSEED. A finished run
    is not repeated, and an interrupted one continues where it stopped. The flags'
    defaults are the config's: `bagua-jax run CONFIG --help` shows them, and without a
    CONFIG those of demo.
    """

    config: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CONFIG")]
    """A YAML file, or the name of a shipped config. Flags come after it."""
    experiment: Annotated[ExperimentConfig, tyro.conf.arg(name="")]
    overwrite: bool = False
    """Throw away the folders of these runs and start afresh."""


@dataclass(frozen=True)
class List:
    """List what configs can name, with one line on each."""

    what: tyro.conf.Positional[
        Literal["all", "algorithms", "compressors", "topologies", "tasks", "configs"]
    ] = "all"
    """One kind, or all."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments; those of the process where ``None``.

    Returns:
        Exit status: 0 done, 1 a run failed or a claim does not hold, 2 bad usage.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    warnings.showwarning = _warn
    try:
        command = _parse(argv)
        return _list(command) if isinstance(command, List) else _run(command)
    except SystemExit as stop:  # tyro has shown help, or what is wrong with the flags
        return stop.code if isinstance(stop.code, int) else _USAGE
    except ConfigError as error:
        return _complain(str(error), _USAGE)
    except (RunError, OSError) as error:
        return _complain(str(error), _FAILED)
    except KeyboardInterrupt:
        return _complain("interrupted; the same command continues.", _FAILED)


def _warn(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"bagua-jax: warning: {message}", file=sys.stderr)


def _complain(message: str, status: int) -> int:
    print(f"bagua-jax: {message}", file=sys.stderr)
    return status


def _parse(argv: list[str]) -> Run | List:
    """Read the arguments; the config's values are the defaults of the flags."""
    loaded = None
    default = Run(tyro.MISSING, configs.load("demo"))
    if argv[:1] == ["run"] and not {"-h", "--help"} & set(argv[1:2]):
        if len(argv) < 2 or argv[1].startswith("-"):
            raise ConfigError(
                "CONFIG: is missing. It comes first: `bagua-jax run demo --steps 50`; "
                "`bagua-jax list configs` shows what there is."
            )
        loaded = configs.load(argv[1])
        claims.check(map(claims.parse, loaded.claims), loaded)
        default = Run(argv[1], loaded)
    command = tyro.cli(
        Annotated[Run, tyro.conf.subcommand("run", default=default)]
        | Annotated[List, tyro.conf.subcommand("list")],
        args=argv,
        prog="bagua-jax",
        description="Communication relaxations for data-parallel training in JAX.",
    )
    if isinstance(command, Run) and loaded is not None:
        chosen = configs.select(loaded, command.experiment.algorithms)
        experiment = dataclasses.replace(command.experiment, algorithms=chosen)
        command = dataclasses.replace(command, experiment=experiment)
    return command


def _console() -> "Console":
    from rich.console import Console

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=120)  # a table in a log file need not be narrow
    return console


def _list(command: List) -> int:
    from rich.table import Table

    from bagua_jax.experiments import catalog

    console = _console()
    kinds = catalog.LISTS if command.what == "all" else [command.what]
    for kind in kinds:
        facts, caption = catalog.LISTS[kind].facts, catalog.LISTS[kind].caption
        table = Table(title=kind, title_justify="left", box=None)
        table.add_column("", style="bold", no_wrap=True, min_width=27)
        for header in facts:
            table.add_column(header, no_wrap=True)
        table.add_column("")
        for row in catalog.describe(kind):
            table.add_row(row.name, *row.facts, row.summary)
        console.print(table)
        console.print(f"[dim]{caption}\n" if caption else "", highlight=False)
    return 0


def _run(command: Run) -> int:
    config = command.experiment
    _prepare_host_devices(config)

    from bagua_jax.experiments import catalog, report, tasks, train
    from bagua_jax.experiments.data import Shards

    _require_devices(config)
    runs = catalog.resolve(config)
    task = tasks.load(config.task)
    try:
        data = task.data(config.seed, config.workers)
    except Exception as error:
        raise RunError(f"the task's data failed: {blame(error)}.") from error
    Shards.deal(data, config.workers, config.sharding, config.batch_size, config.seed)

    labels = {run.algorithms[0].label for run in runs}
    stated = [claims.parse(text) for text in config.claims]
    stated = [claim for claim in stated if claim.labels <= labels]
    for run in runs if stated else ():
        claims.check_metrics(stated, run, train.metric_names(run, task, data))

    require_writable(Path(config.output) / config.experiment)

    console = _console()
    console.print(report.headline(config, task.title), highlight=False)
    results, failures = [], []
    for run in runs:
        try:
            summary = train.run(run, task, data, console, overwrite=command.overwrite)
            results.append((run, summary))
        except RunError as error:
            failures.append(f"{run.algorithms[0].label}: {error}")
            _complain(failures[-1], _FAILED)
    verdicts = report.judge(stated, results)
    if results:
        report.write(config, task.title, results, failures, verdicts, console)
    left_out = len(config.claims) - len(stated)
    if left_out:
        console.print(f"{left_out} claims about runs left out are not judged.")
    return _FAILED if failures or not all(v.holds for v in verdicts) else 0


def _prepare_host_devices(config: ExperimentConfig) -> None:
    """Have a host device for each worker, before jax starts its first backend.

    A simulation needs them too, to compile what its step would send; one of more
    workers than ``_COUNTED`` goes without, because that takes minutes.
    """
    if config.where == "devices":
        # Fewer threads than this, and the collectives of jax 0.10 can wait for ever.
        os.environ.setdefault("NPROC", str(2 * config.workers))
    import jax

    with contextlib.suppress(RuntimeError):  # jax has started: there are what there are
        if config.where == "devices" or config.workers <= _COUNTED:
            jax.config.update("jax_num_cpu_devices", config.workers)


def _require_devices(config: ExperimentConfig) -> None:
    import jax

    found = jax.devices()
    if config.where == "devices" and len(found) < config.workers:
        raise ConfigError(
            f"workers: {config.workers} workers need {config.workers} devices, and "
            f"there are {len(found)} ({found[0].device_kind}). Use fewer workers, or "
            "--where simulate."
        )
