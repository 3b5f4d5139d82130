"""Run folders: one run, one folder, never overwritten unless asked.

::

    runs/<experiment>/<label>-<hash>-s<seed>/
        config.yaml       fully resolved; `bagua-jax run` takes it
        environment.json  versions, machine, git commit, command line
        metrics.jsonl     one line a step, bit for bit the same after an interruption
        timing.jsonl      seconds of each stretch of steps, never the same twice
        checkpoints/      the newest few, by step
        log.txt           what happened when
        summary.json      final numbers; written last, so that it marks a finished run
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
import traceback
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from bagua_jax.experiments import config as configs
from bagua_jax.experiments.config import ConfigError, ExperimentConfig

__all__ = [
    "RunError",
    "append_lines",
    "blame",
    "environment",
    "locked",
    "log",
    "mend_lines",
    "open_run",
    "path_of",
    "processor",
    "read_json",
    "read_lines",
    "require_writable",
    "write_json",
    "write_lines",
]


_LOCK = ".lock"


class RunError(RuntimeError):
    """A run cannot go on; the message says why and what helps.

    Attributes:
        status: the exit status that it makes.
    """

    status = 1


def blame(error: BaseException) -> str:
    """Say in one line what went wrong in someone's code, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    at = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    message = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {message}{at}"


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


def open_run(
    config: ExperimentConfig, *, overwrite: bool, folder: Path | None = None
) -> Path:
    """Make the folder of a run, or check that the one that is there is of this run.

    Args:
        config: of one run, resolved.
        overwrite: throw away what is there.
        folder: of the run; as :func:`path_of` says where ``None``.

    Raises:
        RunError: if the folder holds another config, or one that cannot be read.
        OSError: if it cannot be written.
    """
    folder = path_of(config) if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    if overwrite:
        _clear(folder)
    written = folder / "config.yaml"
    if not written.exists():
        write_json(folder / "environment.json", environment())
        _write(written, configs.dump(config))
        return folder
    try:
        found = configs.identity(configs.load(written))
    except ConfigError as error:
        raise RunError(
            f"the run folder's config is damaged: {error} Restore it, or start afresh "
            "with --overwrite."
        ) from None
    if found != configs.identity(config):
        raise RunError(
            f"{written} is the config of another run. Move the folder away, or start "
            "afresh with --overwrite."
        )
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
            raise RunError(f"another process is working in {folder}.") from None
        yield


# --- files ---


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    _write(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; None where there is no such file, or it holds something else."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSON Lines file up to the first line that is not whole."""
    lines: list[dict[str, Any]] = []
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return lines
    for line in text.splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(record, dict):
            break
        lines.append(record)
    return lines


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write a JSON Lines file, whole or not at all."""
    _write(path, "".join(map(_line, records)))


def append_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Append to a JSON Lines file; on disk when this returns."""
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(map(_line, records)))
        file.flush()
        os.fsync(file.fileno())


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def mend_lines(path: Path) -> None:
    """Cut off a last line that is not whole, so that others may be appended."""
    if path.exists():
        text = path.read_bytes()
        os.truncate(path, text.rfind(b"\n") + 1)


def log(folder: Path, message: str) -> None:
    """Append a line with the time to the run's log.txt."""
    with open(folder / "log.txt", "a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")


# --- the machine ---


def processor() -> str:
    """Name this machine: processor and cores, as ``"AMD EPYC, 2 cores"``."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
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
            ["git", "-C", str(here), *arguments],
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
