"""Arguments that have been renamed: what they were called, for one minor version."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from bagua_jax import warning

__all__ = [
    "ARGUMENTS",
    "FLAGS",
    "UNTIL",
    "VALUES",
    "takes_old_names",
    "translate",
    "translate_flags",
]

UNTIL = "0.3.0"
"""The version in which the old names end."""

ARGUMENTS: Mapping[str, Mapping[str, str]] = {
    "async_model_average": {"period": "local_steps"},
    "cocktail_sgd": {"mask_ratio": "ratio"},
    "decentralized": {"communication_interval": "local_steps"},
    "deep_squeeze": {"mixing_rate": "consensus_step_size"},
    "dgc": {"density": "ratio"},
    "local_sgd": {"start_step": "warmup_steps"},
    "low_precision_decentralized": {"communication_interval": "local_steps"},
    "powersgd": {"start_step": "warmup_steps"},
    "sharded": {"axis_name": "shard_axis"},
    "slowmo": {
        "slow_learning_rate": "outer_learning_rate",
        "slow_momentum": "outer_momentum",
    },
}
"""Of each function: the old name of an argument, and the name that it has now."""

VALUES: Mapping[tuple[str, str], tuple[Any, Any]] = {
    ("compressed_mean", "error_feedback"): (None, "auto"),
}
"""Of a function's argument: a value that was renamed, and what it is now."""

FLAGS: Mapping[str, str] = {"--fruitless": "--give-up-after"}
"""The old name of a flag of the command line, and the name that it has now."""

P = ParamSpec("P")
T = TypeVar("T")


def takes_old_names(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function that stands in the tables be called by old names, with a warning.

    Example:
        >>> import warnings
        >>> from bagua_jax.algorithms import local_sgd
        >>> with warnings.catch_warnings(record=True) as seen:
        ...     warnings.simplefilter("always")
        ...     tx = local_sgd(axis_name="workers", local_steps=4, start_step=8)
        >>> print(seen[0].message)
        local_sgd: start_step is called warmup_steps; the old name works until 0.3.0.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return function(*args, **translate(function.__name__, kwargs))

    return call


def translate(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Put today's names and values in the place of old ones, each with a warning.

    Args:
        name: of the function.
        arguments: by name, of now or before.

    Returns:
        The arguments by today's names, in the same order.

    Raises:
        TypeError: if an argument is there by both of its names.
    """

    def warn(message: str):
        warning.warn(f"{name}: {message} works until {UNTIL}.", DeprecationWarning)

    renamed = ARGUMENTS.get(name, {})
    translated = {}
    for argument, value in arguments.items():
        new = renamed.get(argument, argument)
        if new != argument:
            if new in arguments:
                raise TypeError(
                    f"{name}: {argument} is the old name of {new}, and both are there. "
                    f"Leave out {argument}."
                )
            warn(f"{argument} is called {new}; the old name")
        old_value, new_value = VALUES.get((name, new), (value, value))
        if value is old_value and value is not new_value:
            warn(f"{new}={old_value!r} is called {new_value!r}; the old value")
            value = new_value
        translated[new] = value
    return translated


def translate_flags(words: Sequence[str]) -> list[str]:
    """Put today's flags in the place of old ones, each with a warning.

    Args:
        words: of a command line; ``--flag value`` and ``--flag=value``.
    """
    translated = []
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in FLAGS:
            text = f"{flag} is called {FLAGS[flag]}; the old name works until {UNTIL}."
            warning.warn(text, DeprecationWarning)
            word = FLAGS[flag] + equals + value
        translated.append(word)
    return translated
