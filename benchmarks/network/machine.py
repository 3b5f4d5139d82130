"""Name the machine that a number was measured on."""

import importlib.metadata
import os
import platform
from pathlib import Path

__all__ = ["describe"]


def describe() -> str:
    """Name processor, cores, kernel and the versions that matter."""
    text = Path("/proc/cpuinfo").read_text()
    names = [line for line in text.splitlines() if line.startswith("model name")]
    processor = names[0].partition(":")[2].strip() if names else platform.machine()
    versions = [f"Python {platform.python_version()}"]
    for package in ("jax", "jaxlib", "torch"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    kernel = f"Linux {platform.release()}"
    return ", ".join([f"{processor}, {os.cpu_count()} cores", kernel, *versions])
