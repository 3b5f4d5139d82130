"""What a worker that waits for nobody saves, by itself, and goes on from."""

import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from bagua_jax.experiments import trees
from bagua_jax.experiments.folders import RunError

__all__ = ["load", "save", "steps_of"]


def save(folder: Path, worker: int, state: Any, steps: int) -> None:
    """Write a worker's state, whole or not at all, over what it saved before.

    Args:
        folder: of the run.
        worker: which.
        state: tree of arrays.
        steps: local steps that led to it.

    Raises:
        RunError: if it cannot be written.
    """
    arrays: dict[str, Any] = {k: np.asarray(x) for k, x in trees.pack(state).items()}
    path = _saved(folder, worker)
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            np.savez(file, steps=steps, **arrays)
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


def load(folder: Path, worker: int, like: Any) -> tuple[Any, int]:
    """Read what a worker saved.

    Args:
        folder: of the run.
        worker: which.
        like: tree of arrays with the wished structure, shapes and dtypes.

    Returns:
        The state, a tree like ``like``, and the steps.

    Raises:
        RunError: if there is nothing, or nothing that can be read and fits.
    """
    path = _saved(folder, worker)
    if not path.exists():
        raise RunError(f"worker {worker} has saved nothing in {folder} to resume from.")
    arrays = _read(path)
    steps = int(arrays.pop("steps"))
    wanted = trees.pack(like)
    if _types(arrays) != _types(wanted):
        raise RunError(
            f"{path} is of another model or optimizer. Move the folder away, or start "
            "afresh with --overwrite."
        )
    found = {k: jnp.asarray(x.view(wanted[k].dtype)) for k, x in arrays.items()}
    return trees.unpack(found, like), steps


def steps_of(folder: Path, workers: int) -> list[int] | None:
    """Say how far each worker of a run had come when it last saved.

    Returns:
        Steps of each worker; ``None`` if one of them has not saved yet.

    Raises:
        RunError: if what one saved cannot be read.
    """
    paths = [_saved(folder, worker) for worker in range(workers)]
    if not all(path.exists() for path in paths):
        return None
    return [int(_read(path)["steps"]) for path in paths]


def _read(path: Path) -> dict[str, np.ndarray]:
    """Read what a worker saved; every array has a checksum in the file."""
    try:
        with open(path, "rb") as raw, np.load(raw) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise RunError(
            f"{path} cannot be read: {error}. It was altered or is not whole; start "
            "afresh with --overwrite."
        ) from None


def _types(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Give shapes and dtypes; NumPy reads a bfloat16 back as two bytes of no type."""
    return {k: (x.shape, np.dtype(x.dtype).str[1:]) for k, x in arrays.items()}


def _saved(folder: Path, worker: int) -> Path:
    return folder / f"saved-{worker}.npz"
