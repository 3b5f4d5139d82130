"""Run folders: one run, one folder, never overwritten unless asked.

::

    runs/<experiment>/<label>-<hash>-s<seed>/
        config.yaml       fully resolved; `bagua-jax run` takes it
        environment.json  versions, machine, git commit, command line
        metrics.jsonl     one line a step, bit for bit the same after an interruption
        timing.jsonl      seconds of each stretch of steps, never the same twice
        copies/           both once more, to mend one from the other
        checkpoints/      the newest few, by step
        log.txt           what happened when
        summary.json      final numbers; written last, so that it marks a finished run

All but environment.json and log.txt, which nothing reads, show it where they were
altered: see :mod:`bagua_jax.experiments.runs.integrity`.
"""

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from bagua_jax.experiments.runs.integrity import (
    RunError,
    Unchecked,
    digest,
    read_text,
    write_text,
    write_whole,
)
from bagua_jax.experiments.spec import config as configs
from bagua_jax.experiments.spec.config import ConfigError, ExperimentConfig

__all__ = [
    "RunError",
    "environment",
    "locked",
    "log",
    "name_of",
    "open_run",
    "path_of",
    "processor",
    "require_writable",
    "write_json",
]


_LOCK = ".lock"


def require_writable(folder: Path) -> None:
    """Make a folder and refuse to go on where files cannot be written to it.

    Raises:
        RunError: if they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RunError(
            f"output: cannot write to {folder}: {error.strerror}. Choose another "
            "folder with --output."
        ) from None


def path_of(config: ExperimentConfig) -> Path:
    """Say where a run lives. The config is resolved and has one algorithm."""
    return Path(config.output) / config.experiment / configs.run_name(config)


def name_of(config: ExperimentConfig) -> str:
    """Name a run as its records do, by what decides its numbers."""
    return digest(configs.identity(config))


def open_run(
    config: ExperimentConfig, *, overwrite: bool, folder: Path | None = None
) -> Path:
    """Make the folder of a run, or check that the one that is there is of this run.

    Args:
        config: of one run, resolved.
        overwrite: throw away what is there.
        folder: of the run; as :func:`path_of` says where ``None``.

    Returns:
        The folder. A config that was altered is written anew, because whatever else is
        there says itself which run it is of.

    Raises:
        RunError: if the folder holds another run's config, or that of an earlier
            version, which wrote no checksums.
        OSError: if it cannot be written.
    """
    folder = path_of(config) if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    if overwrite:
        _clear(folder)
    written = folder / "config.yaml"
    cure = "Move the folder away, or start afresh with --overwrite."
    try:
        found = read_text(written)
    except Unchecked as error:
        raise RunError(f"{error}. {cure}") from None
    except RunError as error:
        log(folder, f"{error}; it is written anew")
        found = None
    if found is None:
        if not (folder / "environment.json").exists():
            write_json(folder / "environment.json", environment())
        write_text(written, configs.dump(config))
        return folder
    try:
        identity = configs.identity(configs.load(written))
    except ConfigError as error:
        raise RunError(f"this version cannot use {error} {cure}") from None
    if identity != configs.identity(config):
        raise RunError(f"{written} is the config of another run. {cure}")
    return folder


def _clear(folder: Path) -> None:
    """Empty a run folder, the summary first, so that it never looks finished."""
    (folder / "summary.json").unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run folder while this one works in it.

    The lock dies with the process, however it dies. Where the system has no ``fcntl``
    nothing is locked.

    Raises:
        RunError: if another process holds it.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"another process is working in {folder}. Wait until it has ended, or "
                "choose another folder with --output."
            ) from None
        yield


# --- files ---


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_whole(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def log(folder: Path, message: str) -> None:
    """Append a line with the time to the run's log.txt."""
    with open(folder / "log.txt", "a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")


# --- the machine ---


def processor() -> str:
    """Name this machine: processor and cores, as ``"AMD EPYC, 2 cores"``."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    cores = getattr(os, "process_cpu_count", os.cpu_count)()
    return f"{name}, {cores} cores"


def environment() -> dict[str, Any]:
    """Collect what a number may depend on besides the config."""
    import jax

    packages = ("bagua-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    versions = {"python": platform.python_version()}
    for package in (*packages, "numpy", "scikit-learn", "mlxtend"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "versions": versions,
        "system": platform.platform(),
        "processor": processor(),
        "devices": [device.device_kind for device in jax.devices()],
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """Find the commit of this package's checkout, with + where files were changed."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(here), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return None
