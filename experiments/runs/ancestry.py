"""A run that begins with the state of another one, on its own number of workers.

``ancestry.json`` in its folder says of which, at which step, and on how many workers
that was trained; so does its summary. The run's own steps count from 0.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax

from bagua_jax import Workers, resize
from bagua_jax.experiments.runs import checkpoint, folders, integrity
from bagua_jax.experiments.runs.integrity import RunError
from bagua_jax.experiments.spec import config as configs
from bagua_jax.experiments.spec.config import ConfigError, ExperimentConfig
from bagua_jax.saving import from_arrays

__all__ = ["Ancestor", "find", "inherit", "read", "write"]

_FILE = "ancestry.json"


class Ancestor(NamedTuple):
    """The run whose state another one begins with.

    Attributes:
        folder: where it lives.
        config: of that run.
        step: of its newest checkpoint.
        arrays: of the checkpoint, by path in the train state.
    """

    folder: Path
    config: ExperimentConfig
    step: int
    arrays: dict[str, Any]


def find(config: ExperimentConfig) -> Ancestor:
    """Read the run that a config names under ``resume_from``.

    Args:
        config: of one run, resolved.

    Raises:
        RunError: if there is no such run, or no checkpoint of it is whole.
        ConfigError: if it trained another task or algorithm, or this run has several
            processes.
    """
    folder = Path(config.resume_from)
    if config.where == "processes":
        raise ConfigError(
            "resume_from: works in one process, got where: processes. Use devices."
        )
    if not (folder / "config.yaml").exists():
        raise RunError(
            f"resume_from: there is no run in {folder}: it has no config.yaml. Name "
            "the folder of a run, runs/EXPERIMENT/LABEL-HASH-sSEED."
        )
    own = configs.load(folder / "config.yaml")
    for what, there, here in (
        ("task", own.task, config.task),
        ("algorithm", own.algorithms[0].name, config.algorithms[0].name),
    ):
        if there != here:
            raise ConfigError(
                f"resume_from: the {what} of {folder} is {there}, and {here} here. A "
                f"run goes on with the same {what}; choose it with "
                f"--{'task' if what == 'task' else 'algorithms'} {there}."
            )
    try:
        return Ancestor(folder, own, *checkpoint.newest(folder / "checkpoints"))
    except RunError as error:
        raise RunError(f"resume_from: {error}") from None


def inherit(
    ancestor: Ancestor, functions: Any, initial: Any, like: Any, workers: int
) -> Any:
    """Carry an ancestor's train state to a number of workers.

    Args:
        ancestor: the run.
        functions: axis name -> the per-worker ``init(params)`` of its train state.
        initial: parameters that the task starts from.
        like: the train state of the new run, placed.
        workers: its number.

    Returns:
        A state like ``like``, placed as it is.

    Raises:
        RunError: if the state does not fit.
    """
    before = Workers.simulate(ancestor.config.workers)
    init = functions(before.axis_name)
    try:
        state = from_arrays(ancestor.arrays, before.spmd(init)(initial))
        specs = before.specs(init, initial)
        resized = resize(tuple(state), specs, tuple(like), workers=workers)
    except (ValueError, TypeError) as error:
        raise RunError(
            f"resume_from: the state of {ancestor.folder} does not fit: {error}"
        ) from None
    return type(like)(
        *jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), resized, tuple(like))
    )


def write(folder: Path, ancestor: Ancestor, name: str) -> None:
    """Record an ancestor, and its own ancestors, in the folder of the new run.

    Args:
        folder: of the new run.
        ancestor: what it began with.
        name: of the new run, as ``folders.name_of`` gives it.
    """
    own = {
        "run": str(ancestor.folder),
        "name": folders.name_of(ancestor.config),
        "step": ancestor.step,
        "workers": ancestor.config.workers,
    }
    earlier = read(ancestor.folder, own["name"])
    integrity.write_document(folder / _FILE, {"ancestors": [*earlier, own]}, name)


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    """Read the ancestors of a run, the first one first.

    Args:
        folder: of the run.
        name: of the run.

    Raises:
        RunError: if the record was altered.
    """
    try:
        found = integrity.read_document(folder / _FILE, name)
    except RunError as error:
        raise RunError(f"{error}. Start afresh with --overwrite.") from None
    return found.value["ancestors"] if found else []
