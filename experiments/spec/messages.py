"""Messages about what the user wrote: bounded, and with the nearest valid name."""

import difflib
import re
import reprlib
import traceback
from collections.abc import Iterable
from typing import Any

__all__ = ["UNWRITABLE", "ConfigError", "blame", "quote", "shorten", "unknown"]

UNWRITABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters and halves of surrogate pairs: of no name, path or message."""
_LONGEST = 1_500  # bytes of a message
_LONGEST_VALUE = 200  # characters of a value in it


class ConfigError(ValueError):
    """Something the user wrote cannot be used; the message says what and why."""


_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxdict, _repr.maxlist, _repr.maxtuple = 4, 10, 10, 10
_repr.maxstring = _repr.maxother = _repr.maxlong = _LONGEST_VALUE


def quote(value: Any) -> str:
    """Write a value for a message: as ``repr`` does, and a long one shortened.

    >>> quote("steps"), len(quote(["x" * 10**6] * 10**6))
    ("'steps'", 200)
    """
    text = _repr.repr(value)
    if len(text) <= _LONGEST_VALUE:
        return text
    return text[: _LONGEST_VALUE - 23] + "..." + text[-20:]


def shorten(message: str) -> str:
    """Cut the middle out of a long message: its field and its cure are at the ends.

    >>> len(shorten("field: got " + "x" * 10**6 + ". Use y.").encode()) < 2000
    True
    """
    text = message.encode(errors="backslashreplace")
    if len(text) <= _LONGEST:
        return message
    left, right = text[: _LONGEST - 500], text[-400:]
    cut = f" ... ({len(text) - len(left) - len(right):,} bytes left out) ... "
    return left.decode(errors="ignore") + cut + right.decode(errors="ignore")


def unknown(field: str, value: Any, valid: Iterable[str], what: str) -> ConfigError:
    """Make the error for a name that is not among the valid ones.

    >>> print(unknown("where", "simulat", ["simulate", "devices"], "choice"))
    where: unknown choice 'simulat'; did you mean 'simulate'? Valid: simulate, devices.
    """
    valid = list(valid)
    name = str(value) if isinstance(value, str | int | float) else ""
    near = difflib.get_close_matches(name[:100], valid, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    return ConfigError(
        f"{field}: unknown {what} {quote(value)}{hint} "
        f"Valid: {', '.join(valid) or 'none'}."
    )


def blame(error: BaseException) -> str:
    """Say in one line what went wrong in someone's code, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    at = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    message = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {message}{at}"
