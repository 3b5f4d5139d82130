"""Checkpoints of everything that a run's next step needs, written with orbax.

A checkpoint holds the whole train state of all workers (parameters, optimizer, error
feedback, replicas, counters, keys), by path in the state. The data order needs nothing:
it is a function of seed and step. Where there are several processes each writes the
rows of its workers, and what is equal on all workers is written once; any number of
processes reads it back.

Beside the arrays lies a seal, written last: the identity of the run and the hash of
every file. So a checkpoint that was cut short, spoilt or made by another run is noticed
before it is read.
"""

import functools
import hashlib
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from bagua_jax import processes
from bagua_jax.experiments.folders import RunError, read_json, write_json
from bagua_jax.experiments.trees import pack, unpack

__all__ = ["newest", "restore", "save"]

_SEAL = "seal.json"

# orbax tells the log of every save, and of every error that it raises as well
logging.getLogger("absl").setLevel(logging.CRITICAL)


@functools.cache
def _hush_abandoned_writers() -> None:
    """Keep pages of traces from burying the error of a full disk.

    Where one of its writers fails, orbax raises that, and leaves the others alone: each
    then complains that nobody waits for it any more.
    """
    logging.getLogger("asyncio").addFilter(lambda x: "orbax" not in x.getMessage())
    warnings.filterwarnings("ignore", "coroutine 'async_serialize", RuntimeWarning)

    def hook(unraisable, before=sys.unraisablehook):
        if str(unraisable.exc_value) != "Event loop is closed" or unraisable.object:
            before(unraisable)

    sys.unraisablehook = hook


def _manager(folder: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    return ocp.CheckpointManager(
        folder.absolute(),
        options=options,
        item_handlers=ocp.StandardCheckpointHandler(),
    )


def save(
    folder: Path, step: int, state: Any, identity: dict[str, Any], *, keep: int
) -> None:
    """Write a checkpoint, whole or not at all, and then drop all but the newest few.

    Every process must call it.

    Args:
        folder: of the checkpoints.
        step: optimizer steps taken.
        state: tree of arrays.
        identity: of the run, JSON.
        keep: how many stay.

    Raises:
        OSError: if the disk is full, or cannot be written for another reason.
    """
    _hush_abandoned_writers()
    place = folder / str(step)
    try:
        with _manager(folder) as manager:
            manager.save(step, args=ocp.args.StandardSave(pack(state)))
        if not processes.is_first():
            return
        write_json(place / _SEAL, {"identity": identity, "files": _hashes(place)})
    except (OSError, ValueError) as error:
        reason = _system_reason(error)
        if reason is None:
            raise
        raise OSError(_unwritten(folder, step, reason)) from error
    for old in _steps(folder)[keep:]:
        (folder / str(old) / _SEAL).unlink(missing_ok=True)  # never half there
        shutil.rmtree(folder / str(old))


def _system_reason(error: Exception) -> str | None:
    """Say what the system refused; tensorstore puts it into its text, anywhere."""
    if isinstance(error, OSError):
        return error.strerror
    code = re.search(r"\[os_error_code='(\d+)'\]", str(error))
    return os.strerror(int(code[1])) if code else None


def _unwritten(folder: Path, step: int, reason: str) -> str:
    whole = [old for old in _steps(folder) if (folder / str(old) / _SEAL).exists()]
    rest = "There is none before it: the same command starts anew"
    if whole:
        rest = f"That of step {whole[0]} is whole: the same command continues from it"
    return (
        f"checkpoint: step {step} cannot be written to {folder}: {reason}. {rest} once "
        "there is room."
    )


def _steps(folder: Path) -> list[int]:
    """List the checkpoints that are there, finished or not, the newest first."""
    names = [path.name for path in folder.glob("*")]  # none where there is no folder
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def _hashes(place: Path) -> dict[str, str]:
    """Hash every file of a checkpoint."""
    return {
        path.relative_to(place).as_posix(): hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        for path in sorted(place.rglob("*"))
        if path.is_file() and path.name != _SEAL
    }


def restore(
    folder: Path,
    like: Any,
    identity: dict[str, Any],
    *,
    at_most: int,
    say: Callable[[str], None],
) -> tuple[int, Any]:
    """Read the newest intact checkpoint, and remove those that are newer.

    Every process must call it; the first one judges.

    Args:
        folder: of the checkpoints.
        like: tree of arrays with the structure, dtypes and placement of the state.
        identity: of the run; a checkpoint must carry the same.
        at_most: newest step that is of use.
        say: told of what was passed over.

    Returns:
        Step and state; ``(0, like)`` where there is no checkpoint up to ``at_most``.

    Raises:
        RunError: if a checkpoint is of another run, or every one is damaged.
    """
    step = processes.from_first(
        lambda: _newest_intact(folder, identity, at_most, say), RunError
    )
    if not step:
        return 0, like
    with _manager(folder) as manager:
        expected = {
            path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for path, x in pack(like).items()
        }
        _require_fitting(_stored(manager, step), expected, folder / str(step))
        arrays = manager.restore(step, args=ocp.args.StandardRestore(expected))
    return step, unpack(dict(arrays), like)


def _newest_intact(
    folder: Path, identity: dict[str, Any], at_most: int, say: Callable[[str], None]
) -> int:
    """Find the newest checkpoint of use, 0 if there is none; remove newer ones."""
    if not folder.exists():
        return 0
    damaged = ""
    for step in _steps(folder):
        place, trouble = folder / str(step), ""
        if step > at_most:
            trouble = "is newer than the metrics"
        elif not (place / _SEAL).exists():
            trouble = "was not finished"
        elif fault := _fault(place):
            damaged, trouble = fault, f"is damaged: {fault}"
        if not trouble:
            _require_same(read_json(place / _SEAL)["identity"], identity, place)
            return step
        say(f"checkpoint {step} {trouble}; looking for an older one")
        shutil.rmtree(place)
    if damaged:
        raise RunError(
            f"no intact checkpoint is left in {folder} ({damaged}). Start afresh with "
            "--overwrite."
        )
    return 0


def newest(folder: Path) -> tuple[int, dict[str, np.ndarray]]:
    """Read the arrays of the newest checkpoint, to go on with them elsewhere.

    Args:
        folder: of the checkpoints.

    Returns:
        Steps taken, and arrays by path in the train state, as :func:`pack` gives them:
        parameters are those whose path begins with ``.params``.

    Raises:
        RunError: if there is none, or it is damaged.
    """
    if not folder.exists():
        raise RunError(f"there is no folder {folder}.")
    steps = _steps(folder)
    if not steps:
        raise RunError(f"there is no checkpoint in {folder}.")
    place = folder / str(steps[0])
    if fault := _fault(place):
        raise RunError(f"the checkpoint {place} is damaged: {fault}.")
    with _manager(folder) as manager:
        like = {k: np.empty(*v) for k, v in _stored(manager, steps[0]).items()}
        arrays = manager.restore(steps[0], args=ocp.args.StandardRestore(like))
    return steps[0], dict(arrays)


def _fault(place: Path) -> str:
    """Say which file of a checkpoint is not as it was written; "" if all are."""
    seal = read_json(place / _SEAL)
    if not isinstance(seal, dict) or not isinstance(seal.get("files"), dict):
        return f"{place / _SEAL} cannot be read"
    found = _hashes(place)
    for name in sorted({*seal["files"], *found}):
        if name not in found:
            return f"{place / name} is missing"
        if found[name] != seal["files"].get(name):
            return f"{place / name} is not what was written"
    return ""


def _stored(manager: ocp.CheckpointManager, step: int) -> dict[str, tuple]:
    """Give shape and dtype of each array of a checkpoint, by path."""
    metadata: Any = manager.item_metadata(step)
    return {path: (x.shape, x.dtype) for path, x in metadata.items()}


def _require_same(found: dict[str, Any], expected: dict[str, Any], where: Path) -> None:
    different = [
        f"{key} is {found.get(key)!r} there and {expected.get(key)!r} here"
        for key in sorted({*found, *expected})
        if found.get(key) != expected.get(key)
    ]
    if different:
        raise RunError(
            f"the checkpoint {where} was written by another run: "
            f"{'; '.join(different)}. Move it away, or start afresh with --overwrite."
        )


def _require_fitting(found: dict[str, tuple], like: dict, where: Path) -> None:
    expected = {path: (x.shape, x.dtype) for path, x in like.items()}
    if found != expected:
        path = min(p for p in {*found, *expected} if found.get(p) != expected.get(p))
        raise RunError(
            f"the checkpoint {where} does not fit this version's state: {path} is "
            f"{found.get(path, 'missing')} there and {expected.get(path, 'missing')} "
            "here. Start afresh with --overwrite."
        )
