"""Terminals as they are: one that knows ASCII only, and Ctrl-C at any time.

Imports only what Python has imported already: it comes before everything else.
"""

import codecs
import os
import signal

TYPE_CHECKING = False  # typing is one of the imports that come later
if TYPE_CHECKING:
    from typing import TextIO

__all__ = ["degrade", "interruptible", "stop_at_once"]

# --- characters ---

_PLAIN = str.maketrans("ωδρτγ²·×–—−…•→←‘’“”", "wdrtg2*x---.*><''\"\"") | {
    ord("≤"): "<=",
    ord("≥"): ">=",
    ord("±"): "+-",
}


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Write a character that the encoding lacks by one like it, else as an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_PLAIN)
    return text.encode("ascii", "backslashreplace").decode(), error.end


codecs.register_error("bagua_jax.plain", _plain)


def degrade(*streams: "TextIO") -> None:
    """Never fail over a character that a stream's encoding lacks.

    Args:
        streams: such as ``sys.stdout``; one that cannot be configured is left alone.
    """
    for stream in streams:
        configure = getattr(stream, "reconfigure", None)
        if configure is not None:
            configure(errors="bagua_jax.plain")


# --- Ctrl-C ---


def stop_at_once() -> None:
    """Let Ctrl-C end this process without a word from Python.

    While modules are imported a KeyboardInterrupt would end in a traceback, or in
    another error of the module that it struck; nothing is lost by leaving at once.
    Where a parent process had Ctrl-C ignored it stays so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def interruptible() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again: there is something to put in order."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: object) -> None:
    os.write(2, _FAREWELL)
    os._exit(1)


_FAREWELL = b"bagua-jax: interrupted.\n"
