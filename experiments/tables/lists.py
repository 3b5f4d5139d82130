"""What configs can name: the tables of ``bagua-jax list``."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bagua_jax import compressors, topologies
from bagua_jax.algorithms import REGISTRY as ALGORITHMS
from bagua_jax.compressors import Compressor
from bagua_jax.experiments import tasks
from bagua_jax.experiments.spec import catalog
from bagua_jax.experiments.spec import config as configs
from bagua_jax.experiments.tables import survey
from bagua_jax.topologies import Topology

__all__ = ["LISTS", "Kind", "Row", "describe"]


class Row(NamedTuple):
    """One line of ``bagua-jax list``."""

    name: str
    summary: str
    facts: tuple[str, ...] = ()


class Kind(NamedTuple):
    """One table of ``bagua-jax list``: its rows, and what their facts are."""

    rows: Callable[[], list[Row]]
    facts: tuple[str, ...] = ()
    caption: str = ""


def _first_line(thing: Any) -> str:
    line = (inspect.getdoc(thing) or "").partition("\n")[0]
    return re.sub(r":? :math:`[^`]*`", "", line)  # formulas are for the manual


def _compressors() -> list[Row]:
    rows = []
    for name, factory in compressors.REGISTRY.items():
        made = catalog.compressor("cast(bfloat16)" if name == "cast" else name)
        vector = jax.ShapeDtypeStruct((_LENGTH,), jnp.float32)
        sent = made.facts.payload_bytes(vector) / _LENGTH
        rows.append(
            Row(name, _first_line(factory), (f"{sent:.3g}", _constant_of(made)))
        )
    return rows


def _constant_of(made: Compressor | Topology) -> str:
    if isinstance(made, Topology):
        return f"ρ {made.contraction:.3g}"
    facts = made.facts
    for symbol, bound in (("ω", facts.omega), ("δ", facts.delta)):
        if bound is not None:
            value = bound(_LENGTH)
            return f"{symbol} {value:.3g}" if value >= 0 else f"{symbol} ≤ 0"
    return "none known"


def _topologies() -> list[Row]:
    return [
        Row(
            name,
            _first_line(factory),
            (f"{4 * factory(_WORKERS).messages:.3g}", _constant_of(factory(_WORKERS))),
        )
        for name, factory in topologies.REGISTRY.items()
    ]


def _algorithms() -> list[Row]:
    counted, surveyed = (
        survey.read(),
        {row.algorithm: row for row in survey.SURVEY[::-1]},
    )
    rows = []
    for name, known in ALGORITHMS.items():
        row = surveyed[name]
        numbers = counted.get(survey.label(row))  # none: `survey` did not run since
        sent = (
            f"{numbers['bytes_per_worker'] / numbers['parameters']:.3g}"
            if numbers
            else "?"
        )
        rows.append(Row(name, _first_line(known.factory), (sent, _constants(row))))
    return rows


def _constants(row: survey.Row) -> str:
    """Write the constants of what a surveyed configuration is made of."""
    defaults = {k: p.default for k, p in catalog.parameters(row.algorithm).items()}
    arguments = defaults | dict(row.options)
    made = []
    if isinstance(arguments.get("compressor"), str | Compressor):
        value = arguments["compressor"]
        made.append(catalog.compressor(value) if isinstance(value, str) else value)
    if isinstance(arguments.get("topology"), str):
        made.append(catalog.topology(arguments["topology"], _WORKERS))
    steps = {
        symbol: arguments[name]
        for name, symbol in (("local_steps", "H"), ("staleness", "τ"))
        if isinstance(arguments.get(name), int) and arguments[name]
    }
    said = [_constant_of(thing) for thing in made]
    said += [f"{symbol} {value}" for symbol, value in steps.items()]
    return ", ".join(said)


def _simple(registry: Mapping[str, Any]) -> list[Row]:
    return [Row(name, _first_line(thing)) for name, thing in registry.items()]


_LENGTH, _WORKERS = 2**20, 8
LISTS = {
    "algorithms": Kind(
        _algorithms,
        ("B/param", "constants"),
        "B/param: bytes that each of 8 workers sends for a parameter on a step, read "
        "from the compiled program of a model of 25.6 million (docs/algorithms.md, "
        "first configuration). constants: those of its compressor and graph, H steps "
        "between exchanges, staleness τ.",
    ),
    "compressors": Kind(
        _compressors,
        ("B/param", "constant"),
        "With defaults, for a float32 vector of 2^20. ω: E|C(x) - x|² <= ω|x|², "
        "unbiased. δ: E|C(x) - x|² <= (1 - δ)|x|²; no contraction where δ ≤ 0.",
    ),
    "topologies": Kind(
        _topologies,
        ("B/param", "constant"),
        "For 8 workers, float32. ρ: by how much a step shrinks the distance to "
        "consensus, the geometric mean over a period; 0 is exact after one.",
    ),
    "tasks": Kind(lambda: _simple(tasks.TASKS)),
    "configs": Kind(
        lambda: [
            Row(name, _claim(path.read_text("utf-8")))
            for name, path in configs.shipped().items()
        ]
    ),
}


def describe(what: str) -> list[Row]:
    """List what there is of a kind, with one line on each and its facts.

    Args:
        what: a key of ``LISTS``.

    Example:
        >>> [row.name for row in describe("topologies")][:2]
        ['ring', 'complete']
    """
    return LISTS[what].rows()


def _claim(text: str) -> str:
    """Read from a config's comments what it shows."""
    found = re.search(r"^# Claim: (.*)$", text, re.MULTILINE)
    return found[1] if found else ""
