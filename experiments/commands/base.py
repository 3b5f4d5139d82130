"""What subcommands share: a config with its flags, a console, host devices."""

import contextlib
import dataclasses
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from bagua_jax.experiments.commands.terminal import degrade, interruptible
from bagua_jax.experiments.runs import supervise
from bagua_jax.experiments.runs.folders import RunError
from bagua_jax.experiments.spec.config import ConfigError, ExperimentConfig
from bagua_jax.experiments.spec.messages import shorten

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "FAILED",
    "USAGE",
    "NotJoined",
    "OnConfig",
    "complain",
    "console",
    "facts_of",
    "join_processes",
    "prepare_host_devices",
]

USAGE = 2
FAILED = 1
_COUNTED = 256


class NotJoined(RunError):
    """The processes of a run could not be joined, and may be another time."""

    status = supervise.CRASHED


@dataclass(frozen=True)
class OnConfig:
    """A command on a config, whose every field is a flag after it."""

    config: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CONFIG")]
    """A YAML file, or the name of a shipped config. Flags come after it."""
    experiment: Annotated[ExperimentConfig, tyro.conf.arg(name="")]


def complain(message: str, status: int) -> int:
    """Say on stderr what is wrong, and give the exit status."""
    with contextlib.suppress(OSError):  # stderr may be a log on a full disk
        print(shorten(f"bagua-jax: {message}"), file=sys.stderr)
    return status


def console(*, quiet: bool = False) -> "Console":
    """Make the console that commands print to.

    A command makes it when all is imported, and work begins that Ctrl-C interrupts.
    """
    from rich.console import Console

    interruptible()
    found = Console(quiet=quiet)
    if not found.is_terminal and "COLUMNS" not in os.environ:
        # A table in a log file need not be narrow.
        found = Console(width=120, quiet=quiet)
    return found


def join_processes(config: ExperimentConfig) -> None:
    """Join the other processes of a run, before jax starts its first backend.

    Raises:
        ConfigError: if there are none, they cannot have these workers, or they differ.
        NotJoined: if they cannot be joined now, and may be another time.
    """
    from bagua_jax import processes

    try:
        processes.start(config.workers, facts=facts_of(config))
    except ValueError as error:
        raise ConfigError(f"where: {error}") from None
    except ConnectionError as error:
        raise NotJoined(str(error)) from error
    # gloo tells file 1 of every connection: that belongs in the log, on stderr.
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, encoding=sys.stdout.encoding)
    degrade(sys.stdout)
    os.dup2(2, 1)


def facts_of(config: ExperimentConfig) -> dict[str, Any]:
    """List a config's fields, which must be equal in all processes, by their paths.

    The output folder is left out: a host may have it under another path.
    """
    import jax

    fields = dataclasses.asdict(config)
    del fields["output"]
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        fields, is_leaf=lambda x: x is None
    )
    return {
        "config." + jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in leaves
    }


def prepare_host_devices(config: ExperimentConfig) -> None:
    """Have a host device for each worker, before jax starts its first backend.

    A simulation needs them too, to compile what its step would send; one of more
    workers than ``_COUNTED`` goes without, because that takes minutes.
    """
    on_devices = config.where != "simulate"
    if on_devices:
        # Fewer threads than this, and the collectives of jax 0.10 can wait for ever.
        os.environ.setdefault("NPROC", str(2 * config.workers))
    import jax

    with contextlib.suppress(RuntimeError):  # jax has started: there are what there are
        if on_devices or config.workers <= _COUNTED:
            jax.config.update("jax_num_cpu_devices", config.workers)
