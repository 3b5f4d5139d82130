"""``bagua-jax launch``: a run in several processes of this host, watched over."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from bagua_jax.experiments import supervise
from bagua_jax.experiments.config import ConfigError
from bagua_jax.experiments.folders import require_writable

__all__ = ["Launch", "main"]


@dataclass(frozen=True)
class Launch:
    """Do a run in several processes of this host: `launch -n 4 -- run CONFIG`.

    The config's workers are dealt out to the processes, which JAX joins (gloo on CPUs,
    NCCL on GPUs). The progress shown is the first process's; each has a log in
    OUTPUT/EXPERIMENT/processes. If one dies or hangs, all are stopped, and with
    `--restarts` started again from the last checkpoint.
    """

    processes: Annotated[int, tyro.conf.arg(aliases=["-n"])]
    """How many; a divisor of the config's workers."""
    restarts: int = 0
    """How often at most all processes are started again after one died or hung."""
    fruitless: int = 1
    """Give up after so many failures in a row between which no step was gained."""
    backoff: float = 1.0
    """Seconds before a restart; doubled after each one that gained no step."""
    stuck_after: float = 60.0
    """Seconds in which a process must finish a step, an evaluation or a checkpoint."""
    start_within: float = 600.0
    """Seconds in which a process must start, compile, or write the report."""
    words: tyro.conf.Suppress[tuple[str, ...]] = ()
    command: tyro.conf.Suppress[Any] = None


def main(command: Launch) -> int:
    """Start the processes and watch over them; the exit status of the first failure."""
    if command.command is None:
        raise ConfigError(
            "launch: what is to run comes after --, as in "
            "`bagua-jax launch -n 2 -- run demo`."
        )
    config, n = command.command.experiment, command.processes
    if n < 1 or config.workers % n:
        raise ConfigError(
            f"launch: {config.workers} workers cannot go equally to {n} processes. "
            "Choose a divisor of the number of workers."
        )
    folder = Path(config.output) / config.experiment / "processes"
    require_writable(folder)
    return supervise.supervise(
        [sys.executable, "-m", "bagua_jax.experiments", *command.words],
        n,
        folder,
        labels=[algorithm.label for algorithm in config.algorithms],
        workers=config.workers,
        policy=supervise.Policy(
            command.restarts,
            command.fruitless,
            command.backoff,
            command.stuck_after,
            command.start_within,
        ),
    )
