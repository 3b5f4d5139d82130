"""``bagua-jax launch``: a run in several processes of this host, watched over."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from bagua_jax.experiments.commands.terminal import interruptible
from bagua_jax.experiments.runs import supervise
from bagua_jax.experiments.runs.folders import require_writable
from bagua_jax.experiments.spec.config import ConfigError, require_ranges

__all__ = ["Launch", "main"]

_COORDINATOR = "JAX_COORDINATOR_ADDRESS"


@dataclass(frozen=True)
class Launch:
    """Do a run in several processes of this host: `launch -n 4 -- run CONFIG`.

    The config's workers are dealt out to the processes, which JAX joins (gloo on CPUs,
    NCCL on GPUs). The progress shown is the first process's; each has a log in
    OUTPUT/EXPERIMENT/processes. If one dies or hangs, all are stopped, and with
    `--restarts` started again from the last checkpoint, with another port.
    """

    processes: Annotated[int, tyro.conf.arg(aliases=["-n"])]
    """How many; a divisor of the config's workers."""
    policy: Annotated[supervise.Policy, tyro.conf.arg(name="")] = supervise.Policy()
    words: tyro.conf.Suppress[tuple[str, ...]] = ()
    command: tyro.conf.Suppress[Any] = None

    def __post_init__(self):
        require_ranges(self, {"processes": (1, 4_096)}, "launch: ")


def main(command: Launch) -> int:
    """Start the processes and watch over them; the exit status of the first failure."""
    if command.command is None:
        raise ConfigError(
            "launch: what is to run comes after --, as in "
            "`bagua-jax launch -n 2 -- run demo`."
        )
    config, n = command.command.experiment, command.processes
    if config.workers % n:
        raise ConfigError(
            f"launch: {config.workers} workers cannot go equally to {n} processes. "
            "Choose a divisor of the number of workers."
        )
    folder = Path(config.output) / config.experiment / "processes"
    interruptible()
    require_writable(folder)
    words = [sys.executable, "-m", "bagua_jax.experiments", *command.words]
    given = os.environ.get(_COORDINATOR, "")

    def programs(attempt: int) -> list[supervise.Program]:
        """Name a coordinator's address: another port each time."""
        address = given
        if attempt or not given:
            host = given.rpartition(":")[0].strip("[]") or "127.0.0.1"
            (address,) = supervise.free_addresses(1, host)
        return [supervise.Program(words, {_COORDINATOR: address})] * n

    (status,) = supervise.supervise(
        [programs],
        n,
        folder,
        name="launch",
        labels=[algorithm.label for algorithm in config.algorithms],
        workers=config.workers,
        policy=command.policy,
    )
    return status
