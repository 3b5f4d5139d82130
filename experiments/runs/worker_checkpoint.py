"""Per-worker checkpoints of asynchronous runs (one .npz per worker).

The file is NumPy's ``.npz``, followed by the SHA-256 of its bytes: nothing is read of a
file that is not as it was written. Its entry ``about`` says whose it is.
"""

import errno
import hashlib
import io
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bagua_jax import saving
from bagua_jax.experiments.runs.integrity import Mark, RunError

__all__ = ["About", "about", "load", "save"]

_TRAILER = b"\nsha256:"
_LENGTH = len(_TRAILER) + 64


class About(NamedTuple):
    """What a save says of itself.

    Attributes:
        run: whose it is, by :func:`bagua_jax.experiments.runs.integrity.digest`.
        worker: which.
        steps: local steps that led to it.
        marks: of the worker's journals when it was made, by file name.
    """

    run: str
    worker: int
    steps: int
    marks: dict[str, Mark]


PATIENCE_S = 10.0
"""How long a save waits for a free file descriptor."""


def save(
    folder: Path,
    worker: int,
    state: Any,
    steps: int,
    *,
    run: str = "",
    marks: Mapping[str, Mark] | None = None,
) -> None:
    """Write a worker's state, whole or not at all, over what it saved before.

    Args:
        folder: of the run.
        worker: which.
        state: tree of arrays.
        steps: local steps that led to it.
        run: whose it is.
        marks: of the worker's journals.

    Raises:
        RunError: if it cannot be written.
    """
    leaves = saving.to_arrays(state).items()
    arrays: dict[str, Any] = {k: np.asarray(x) for k, x in leaves}
    own = About(run, worker, steps, dict(marks or {}))
    path = _saved(folder, worker)
    part = path.with_suffix(".part")
    try:
        with _create(part) as file:
            np.savez(file, about=json.dumps(own._asdict()), **arrays)
            file.seek(0)
            check = hashlib.file_digest(file, "sha256").hexdigest()
            file.write(_TRAILER + check.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        then = "Make room and start it again."
        if path.exists():
            then = "What it saved before is whole: the same command goes on from it."
        raise RunError(
            f"worker {worker}: step {steps} cannot be saved to {path}: "
            f"{error.strerror}. {then}"
        ) from None


def load(folder: Path, worker: int, like: Any, *, run: str = "") -> tuple[Any, int]:
    """Read what a worker saved.

    Args:
        folder: of the run.
        worker: which.
        like: tree of arrays with the target structure, shapes and dtypes.
        run: whose it must be.

    Returns:
        The state, a tree like ``like``, and the steps.

    Raises:
        RunError: if there is nothing, or nothing that is whole, this worker's, and
            fits.
    """
    own, arrays = _read(folder, worker, run)
    if own is None:
        raise RunError(f"worker {worker} has saved nothing in {folder} to resume from.")
    wanted = saving.to_arrays(like)
    if _types(arrays) != _types(wanted):
        raise RunError(
            f"{_saved(folder, worker)} is of another model or optimizer. {_CURE}"
        )
    return saving.from_arrays(arrays, like), own.steps


def about(folder: Path, worker: int, *, run: str = "") -> About | None:
    """Read what a worker's save says of itself; ``None`` if it has not saved yet.

    Raises:
        RunError: if it is not whole, or not this worker's.
    """
    return _read(folder, worker, run)[0]


_CURE = "Move the folder away, or start afresh with --overwrite."


def _read(
    folder: Path, worker: int, run: str
) -> tuple[About | None, dict[str, np.ndarray]]:
    """Read what a worker saved, and whose it is."""
    path = _saved(folder, worker)
    try:
        whole = path.read_bytes()
    except FileNotFoundError:
        return None, {}
    if whole[-_LENGTH:-64] != _TRAILER:
        raise RunError(
            f"{path} cannot be read: it carries no checksum. An earlier version wrote "
            f"it, or its end is lost. {_CURE}"
        )
    body = memoryview(whole)[:-_LENGTH]
    if hashlib.sha256(body).hexdigest().encode() != whole[-64:]:
        raise RunError(f"{path} cannot be read: it was altered. {_CURE}")
    with np.load(io.BytesIO(body)) as file:
        arrays = {name: file[name] for name in file.files}
    own = About(**json.loads(str(arrays.pop("about"))))
    if (own.run, own.worker) != (run, worker):
        raise RunError(
            f"{path} is of worker {own.worker} of run {own.run!r}; this is worker "
            f"{worker} of run {run!r}. {_CURE}"
        )
    return own, arrays


def _create(path: Path) -> io.BufferedRandom:
    """Open a file to write it; where no descriptor is free, wait for one."""
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            return open(path, "w+b")
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def _types(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return shapes and dtypes; NumPy reads a bfloat16 back as two bytes of no type."""
    return {k: (x.shape, np.dtype(x.dtype).str[1:]) for k, x in arrays.items()}


def _saved(folder: Path, worker: int) -> Path:
    return folder / f"saved-{worker}.npz"
