"""Warnings at the line outside of the package that led to them."""

import sys
import warnings

__all__ = ["warn"]


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn as :func:`warnings.warn` does, at the nearest caller outside of bagua_jax.

    Args:
        message: what is wrong, and the cure.
        category: of the warning.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back and _is_ours(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, level)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == "bagua_jax"
