"""Checkpoints of everything that a run's next step needs, written with orbax.

A checkpoint holds the whole train state of all workers (parameters, optimizer, error
feedback, replicas, counters, keys), by path in the state. The data order needs nothing:
it is a function of seed and step. Where there are several processes each writes the
rows of its workers, and what is equal on all workers is written once; any number of
processes reads it back.

Beside the arrays lies a seal, written last: the identity of the run, the hash of every
file, and the marks of the run's records. So a checkpoint that was cut short, spoilt,
made by another run, or does not belong to these records is noticed before it is read.
"""

import contextlib
import functools
import hashlib
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from bagua_jax import processes
from bagua_jax.experiments.runs.integrity import (
    Document,
    Mark,
    RunError,
    read_document,
    write_document,
)
from bagua_jax.saving import from_arrays, to_arrays

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


@contextlib.contextmanager
def _without_counters() -> Iterator[None]:
    """Keep orbax from reading tensorstore's counters, whose sum it would only log.

    What they are read into is never freed (tensorstore 0.1.86): 26 KB a checkpoint.
    """
    name = "experimental_collect_matching_metrics"
    read = getattr(tensorstore, name)
    setattr(tensorstore, name, lambda *args, **kwargs: [])
    try:
        yield
    finally:
        setattr(tensorstore, name, read)


def _manager(folder: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    return ocp.CheckpointManager(
        folder.absolute(),
        options=options,
        item_handlers=ocp.StandardCheckpointHandler(),
    )


def save(
    folder: Path,
    step: int,
    state: Any,
    identity: dict[str, Any],
    marks: Mapping[str, Mark] | None = None,
    *,
    keep: int,
) -> None:
    """Write a checkpoint, whole or not at all, and then drop all but the newest few.

    Every process must call it.

    Args:
        folder: of the checkpoints.
        step: optimizer steps taken.
        state: tree of arrays.
        identity: of the run, JSON.
        marks: of the run's journals, by file name.
        keep: how many stay.

    Raises:
        OSError: if the disk is full, or cannot be written for another reason.
    """
    _hush_abandoned_writers()
    place = folder / str(step)
    try:
        with _without_counters(), _manager(folder) as manager:
            manager.save(step, args=ocp.args.StandardSave(to_arrays(state)))
        if not processes.is_first():
            return
        seal = {"identity": identity, "files": _hashes(place)}
        write_document(place / _SEAL, seal, str(step), marks)
    except (OSError, ValueError) as error:
        reason = _system_reason(error)
        if reason is None:
            raise
        raise OSError(_unwritten(folder, step, reason)) from error
    for old in _steps(folder)[keep:]:
        _drop(folder / str(old))


def _system_reason(error: Exception) -> str | None:
    """Say what the system refused; tensorstore puts it into its text, anywhere."""
    if isinstance(error, OSError):
        cause = error.__cause__ if error.strerror is None else error
        return getattr(cause, "strerror", None)
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
    trouble: Callable[[dict[str, Mark]], str] = lambda marks: "",
    say: Callable[[str], None],
) -> tuple[int, Any, dict[str, Mark]]:
    """Read the newest intact checkpoint of use, and remove those that are newer.

    Every process must call it; the first one judges.

    Args:
        folder: of the checkpoints.
        like: tree of arrays with the structure, dtypes and placement of the state.
        identity: of the run; a checkpoint must carry the same.
        trouble: says why the run's records are not those that a checkpoint with these
            marks belongs to; empty where they are.
        say: told of what was passed over.

    Returns:
        Step, state and marks; ``(0, like, {})`` where no checkpoint was finished.

    Raises:
        RunError: if a checkpoint is of another run, or none of those that were finished
            is of use. Nothing is removed then.
    """
    step, marks = processes.from_first(
        lambda: _newest_of_use(folder, identity, trouble, say), RunError
    )
    if not step:
        return 0, like, {}
    with _manager(folder) as manager:
        expected = {
            path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for path, x in to_arrays(like).items()
        }
        _require_fitting(_stored(manager, step), expected, folder / str(step))
        arrays = manager.restore(step, args=ocp.args.StandardRestore(expected))
    return step, from_arrays(dict(arrays), like), marks


def _newest_of_use(
    folder: Path,
    identity: dict[str, Any],
    trouble: Callable[[dict[str, Mark]], str],
    say: Callable[[str], None],
) -> tuple[int, dict[str, Mark]]:
    """Find the newest checkpoint of use, 0 if none was finished; remove newer ones."""
    passed, reasons = [], []
    for step in _steps(folder):
        place = folder / str(step)
        seal, fault = _sealed(place)
        if seal is not None:
            _require_same(seal.value["identity"], identity, place)
            fault = trouble(seal.marks)
        if seal is not None and not fault:
            _remove(passed, say)
            return step, seal.marks
        if fault:
            reasons.append(fault)
            fault = (
                f"is damaged: {fault}" if seal is None else f"cannot be used: {fault}"
            )
        passed.append((place, fault or "was not finished"))
    if reasons:
        raise RunError(
            f"no checkpoint in {folder} can be continued from: {'; '.join(reasons)}. "
            "Start afresh with --overwrite."
        )
    _remove(passed, say)
    return 0, {}


def _remove(passed: list[tuple[Path, str]], say: Callable[[str], None]) -> None:
    for place, fault in passed:
        say(f"checkpoint {place.name} {fault}; looking for an older one")
        _drop(place)


def _drop(place: Path) -> None:
    (place / _SEAL).unlink(missing_ok=True)  # never half there
    shutil.rmtree(place)


def newest(folder: Path) -> tuple[int, dict[str, np.ndarray]]:
    """Read the arrays of the newest checkpoint, to go on with them elsewhere.

    Args:
        folder: of the checkpoints.

    Returns:
        Steps taken, and arrays by path in the train state, as ``to_arrays`` gives them:
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
    seal, fault = _sealed(place)
    if seal is None:
        raise RunError(
            f"the checkpoint {place} is damaged: {fault or 'it was not finished'}."
        )
    with _manager(folder) as manager:
        like = {k: np.empty(*v) for k, v in _stored(manager, steps[0]).items()}
        arrays = manager.restore(steps[0], args=ocp.args.StandardRestore(like))
    return steps[0], dict(arrays)


def _sealed(place: Path) -> tuple[Document | None, str]:
    """Read the seal of a checkpoint whose files all are as they were written.

    Returns:
        The seal, and "". Else ``None``, and which file is not; "" where there is no
        seal, because the checkpoint was not finished.
    """
    try:
        seal = read_document(place / _SEAL, place.name)
    except RunError as error:
        return None, str(error)
    if seal is None:
        return None, ""
    files, found = seal.value["files"], _hashes(place)
    for name in sorted({*files, *found}):
        if name not in found:
            return None, f"{place / name} is missing"
        if found[name] != files.get(name):
            return None, f"{place / name} is not what was written"
    return seal, ""


def _stored(manager: ocp.CheckpointManager, step: int) -> dict[str, tuple]:
    """Return shape and dtype of each array of a checkpoint, by path."""
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
