"""The command line: one module of ``experiments/commands`` for each subcommand.

jax is imported only after the flags are read: help comes at once, and host devices can
be made before jax starts.
"""

import contextlib
import dataclasses
import functools
import io
import operator
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro

from bagua_jax import extras, renamed
from bagua_jax.experiments.commands import (
    asynchronous,
    launch,
    plan,
    reproduce,
    run,
    what_if,
    wire,
)
from bagua_jax.experiments.commands import list as list_
from bagua_jax.experiments.commands.base import FAILED, USAGE, OnConfig, complain
from bagua_jax.experiments.commands.terminal import degrade
from bagua_jax.experiments.runs import supervise
from bagua_jax.experiments.runs.folders import RunError
from bagua_jax.experiments.spec import claims
from bagua_jax.experiments.spec import config as configs
from bagua_jax.experiments.spec.config import ConfigError
from bagua_jax.experiments.spec.messages import quote, shorten

__all__ = ["COMMANDS", "main", "parse"]

COMMANDS: dict[str, tuple[type, Callable[[Any], int]]] = {
    "run": (run.Run, run.main),
    "launch": (launch.Launch, launch.main),
    "wire": (wire.Wire, wire.main),
    "async": (asynchronous.Async, asynchronous.main),
    "plan": (plan.Plan, plan.main),
    "reproduce": (reproduce.Reproduce, reproduce.main),
    "what-if": (what_if.WhatIf, what_if.main),
    "list": (list_.List, list_.main),
}
"""Subcommand: its flags, and what does it. One on a config derives from OnConfig."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments; those of the process where ``None``.

    Returns:
        Exit status: 0 done, 1 a run failed or a claim does not hold, 2 bad usage.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    warnings.showwarning = _warn
    old_name = rf".* works until {re.escape(renamed.UNTIL)}\.$"
    warnings.filterwarnings("default", old_name, DeprecationWarning)
    argv = renamed.translate_flags(argv)
    degrade(sys.stdout, sys.stderr)
    try:
        status = _main(argv)
    except Exception:
        with contextlib.suppress(OSError):  # stderr may be a log on a full disk
            traceback.print_exc()
        _leave(supervise.CRASHED)
        return supervise.CRASHED if supervise.is_launched() else FAILED
    _leave(status)
    return status


def _leave(status: int) -> None:
    """Let a process that fails among several end without waiting for the others."""
    if "bagua_jax.processes" in sys.modules:  # else there are none
        sys.modules["bagua_jax.processes"].leave(status)


def _main(argv: list[str]) -> int:
    try:
        command = parse(argv)
        return {flags: do for flags, do in COMMANDS.values()}[type(command)](command)
    except SystemExit as stop:  # tyro has shown help, or what is wrong with the flags
        return stop.code if isinstance(stop.code, int) else USAGE
    except ConfigError as error:
        return complain(str(error), USAGE)
    except RunError as error:
        return complain(str(error), error.status)
    except OSError as error:
        return complain(str(error), FAILED)
    except ModuleNotFoundError as error:
        if not (message := extras.missing(error, "this command")):
            raise
        return complain(message, USAGE)
    except KeyboardInterrupt:
        return complain("interrupted; the same command continues.", FAILED)


def _warn(message, category, filename, lineno, file=None, line=None) -> None:
    print(shorten(f"bagua-jax: warning: {message}"), file=sys.stderr)


def parse(argv: list[str]) -> Any:
    """Read the arguments, and those of the run that `launch` is given.

    Returns:
        The flags of a subcommand; nothing of it has begun.

    Raises:
        ConfigError: if the config, or a flag, says something wrong.
        SystemExit: the same, where tyro has said what; or help was shown.
    """
    if argv[:1] == ["launch"] and "--" in argv:
        own, inner = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
        return dataclasses.replace(
            parse(own), words=tuple(inner), command=_parse_launched(inner)
        )
    if supervise.is_launched():
        supervise.tie()
        if argv[:1] != ["async"]:
            return _parse_launched(argv)
    return _parse_on("", argv)


def _parse_launched(argv: list[str]) -> run.Run:
    """Read what several processes do: a run, with `where: processes` as its default."""
    if argv[:1] != ["run"]:
        raise ConfigError(
            "launch: runs `run CONFIG` in several processes; got "
            f"{quote(argv)} after --."
        )
    command = _parse_on("processes", argv)
    if command.experiment.where != "processes":
        raise ConfigError(
            f"where: launch runs processes; got {quote(command.experiment.where)}."
        )
    return command


def _parse_on(where: str, argv: list[str]) -> Any:
    """Read the arguments; the config's values are the defaults of the flags.

    Where ``where`` is not empty, it is the default of the field of that name.
    """
    on_config = {k for k, (flags, _) in COMMANDS.items() if issubclass(flags, OnConfig)}
    loaded, positional = configs.load("demo"), tyro.MISSING
    given = argv[:1] and argv[0] in on_config and argv[1:2] not in (["-h"], ["--help"])
    if given:
        if len(argv) < 2 or argv[1].startswith("-"):
            raise ConfigError(
                "CONFIG: is missing. It comes first: "
                f"`bagua-jax {argv[0]} demo --steps 50`; "
                "`bagua-jax list configs` shows what there is."
            )
        loaded, positional = configs.load(argv[1]), argv[1]
        claims.check(map(claims.parse, loaded.claims), loaded)
    if where:
        loaded = dataclasses.replace(loaded, where=where)
    subcommands = []
    for name, (flags, _) in COMMANDS.items():
        default = {"default": flags(positional, loaded)} if name in on_config else {}
        subcommands.append(Annotated[flags, tyro.conf.subcommand(name, **default)])
    command: Any = _read_flags(functools.reduce(operator.or_, subcommands), argv)
    if given:
        chosen = configs.select(loaded, command.experiment.algorithms)
        experiment = dataclasses.replace(command.experiment, algorithms=chosen)
        command = dataclasses.replace(command, experiment=experiment)
    return command


def _read_flags(subcommands: Any, argv: list[str]) -> Any:
    """Let tyro read the flags; what it says of wrong ones is bounded."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                subcommands,
                args=argv,
                prog="bagua-jax",
                description="Communication relaxations for data-parallel training in "
                "JAX.",
            )
    finally:
        if said.getvalue():
            print(shorten(said.getvalue().rstrip()), file=sys.stderr)
