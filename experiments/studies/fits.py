"""Which algorithm bears which compressor: the page docs/compressors.md.

``python -m bagua_jax.experiments.studies.fits`` makes every algorithm that takes a
compressor with one of every class, traces a step, and writes what happened.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from bagua_jax import compressors
from bagua_jax.algorithms import REGISTRY
from bagua_jax.compatibility import is_stateful, relative_error
from bagua_jax.compressors import Compressor

__all__ = [
    "CLASSES",
    "USERS",
    "User",
    "claiming",
    "classify",
    "outcome",
    "registered",
    "to_markdown",
]

_LENGTH = 2**16  # elements of the vectors that are judged
_WORKERS = 4


class User(NamedTuple):
    """An algorithm that takes a compressor, and all its other arguments."""

    algorithm: str
    options: Mapping[str, Any]
    label: str

    def make(self, compressor: Compressor, axis_name: str = "workers"):
        """Build the transform."""
        factory: Callable[..., Any] = REGISTRY[self.algorithm].factory
        return factory(compressor=compressor, axis_name=axis_name, **self.options)


_FEEDBACK = {  # the rule depends on it
    "compressed_mean": (
        {"plan": "all_gather", "error_feedback": "worker"},
        {"plan": "all_gather", "error_feedback": "none"},
    ),
    "qadam": ({"error_feedback": "both"}, {"error_feedback": "none"}),
}


def _users() -> tuple[User, ...]:
    users = []
    for name, entry in REGISTRY.items():
        if "compressor" not in inspect.signature(entry.factory).parameters:
            continue
        required = {
            key: value
            for key, value in entry.contracts[0].options.items()
            if key not in ("compressor", "plan", "error_feedback")
        }
        for variant in _FEEDBACK.get(name, ({},)):
            feedback = variant.get("error_feedback")
            label = f"{name}(error_feedback={feedback})" if feedback else name
            users.append(User(name, {**required, **variant}, label))
    return tuple(users)


USERS = _users()
"""Every algorithm of the registry that takes a compressor."""


def claiming(
    *, unbiased: bool, error: float | None, stateful: bool = False
) -> Compressor:
    """Make a compressor that sends everything and whose facts claim what is asked.

    Args:
        unbiased: which of both kinds.
        error: its relative error at every length; ``None`` for facts that state none.
        stateful: whether it keeps state.
    """
    whole = compressors.identity()
    constant = None if error is None else (lambda d: error if unbiased else 1 - error)
    facts = whole.facts._replace(
        name="claiming",
        unbiased=unbiased,
        omega=constant if unbiased else None,
        delta=None if unbiased else constant,
    )
    keep = (lambda x: jnp.zeros(x.shape)) if stateful else whole.init
    return whole._replace(init=keep, facts=facts)


CLASSES: dict[str, Compressor] = {
    "omega < 1/2": claiming(unbiased=True, error=0.25),
    "omega < 1": claiming(unbiased=True, error=0.75),
    "omega >= 1": claiming(unbiased=True, error=4.0),
    "no omega": claiming(unbiased=True, error=None),
    "delta > 1/2": claiming(unbiased=False, error=0.25),
    "delta > 0": claiming(unbiased=False, error=0.75),
    "delta <= 0": claiming(unbiased=False, error=2.0),
    "no delta": claiming(unbiased=False, error=None),
    "keeps state": claiming(unbiased=False, error=0.75, stateful=True),
}
"""One compressor of every class that the rule tells apart."""


def classify(compressor: Compressor, d: int = _LENGTH) -> str:
    """Name the class of a compressor for vectors of d elements.

    Example:
        >>> classify(compressors.randk(0.1)), classify(compressors.minmax_uint8())
        ('omega >= 1', 'delta > 1/2')
    """
    if is_stateful(compressor):
        return "keeps state"
    error, unbiased = relative_error(compressor, d), compressor.facts.unbiased
    if error is None:
        return "no omega" if unbiased else "no delta"
    size = 0 if error < 0.5 else 1 if error < 1 else 2
    if unbiased:
        return ("omega < 1/2", "omega < 1", "omega >= 1")[size]
    return ("delta > 1/2", "delta > 0", "delta <= 0")[size]


def registered() -> tuple[Compressor, ...]:
    """Make every compressor of the registry, with its defaults where it has any."""
    given = {"cast": ("bfloat16",)}
    return tuple(
        factory(*given.get(name, ())) for name, factory in compressors.REGISTRY.items()
    )


def outcome(
    user: User, compressor: Compressor, d: int = _LENGTH
) -> Literal["works", "warned", "refused"]:
    """Make an algorithm with a compressor and trace a step on d elements."""

    def step(x):
        return tx.update(x, tx.init(x), x)[0]

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            tx = user.make(compressor)
            vectors = jax.ShapeDtypeStruct((_WORKERS, d * _WORKERS), jnp.float32)
            jax.eval_shape(jax.vmap(step, axis_name="workers"), vectors)
        except ValueError:
            return "refused"
    return "warned" if seen else "works"


_PAGE = """# Which algorithm bears which compressor

*Written by `python -m bagua_jax.experiments.studies.fits`; do not edit it.*

Every algorithm that takes a compressor judges it by its facts (`CompressorFacts`)
alone, in one place, [`bagua_jax.compatibility`](../bagua_jax/compatibility.py), so that
a compressor of your own is judged as those of the registry are. The relative error is
`omega` of an unbiased compressor and `1 - delta` of a biased one, for the length of the
vector that is compressed (or `max_error` squared, in the maximum norm, if it is less).

- **refused**: theory or arithmetic forbids it. A `ValueError` names the rule, the value
  and what to use instead: where the algorithm is made, or, if it depends on the length
  of the vectors, where its first step is traced.
- **warned**: it may work, and nothing guarantees it. One `UserWarning` where the
  algorithm is made.
- A constant that the facts do not state counts as one beyond the limit: state `omega`
  or `delta` in the facts of a compressor of your own.
- Randomness is no obstacle: all of these algorithms take a `seed`.
- A method's own compressor passes without a word: `sign("l2")` in the 1-bit optimizers.
- A code without a scale, a cast to 8 bits (`facts.range`), is refused where errors are
  fed back, and warned of elsewhere: it loses what lies below its range.
- An algorithm with `unsafe=True` (`compressed_mean`) says nothing.

| algorithm | {classes} |
|---|{rule}|
{rows}

Compressors of the registry, with their defaults, for vectors of {length:,} elements:

| compressor | relative error | class |
|---|---:|---|
{compressors}
"""


def to_markdown() -> str:
    """Write the page."""
    rows = [
        f"| `{user.label}` | "
        + " | ".join(outcome(user, compressor) for compressor in CLASSES.values())
        + " |"
        for user in USERS
    ]
    known = []
    for compressor in registered():
        error = relative_error(compressor, _LENGTH)
        size = "not stated" if error is None else f"{error:.3g}"
        name = compressor.facts.name
        known.append(f"| `{name}` | {size} | {classify(compressor)} |")
    return _PAGE.format(
        classes=" | ".join(CLASSES),
        rule="---|" * (len(CLASSES) - 1) + "---",
        rows="\n".join(rows),
        length=_LENGTH,
        compressors="\n".join(known),
    )


def main() -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, default=Path("docs/compressors.md"))
    arguments = parser.parse_args()
    arguments.page.write_text(to_markdown())
    print(arguments.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
