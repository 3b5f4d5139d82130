"""Which collectives of a traced function send what all workers hold alike."""

from collections.abc import Sequence
from typing import Any

from jax.extend.core import Literal

__all__ = ["pointless_collective"]

_SILENT = {"axis_index", "pvary", "pcast", "shard_map"}  # name an axis, move nothing


def pointless_collective(
    jaxpr: Any, suspects: Sequence[bool], axes: Sequence[str]
) -> str | None:
    """Find a collective over values that are equal on all workers.

    A value differs between workers only if it derives from ``axis_index``: the inputs
    of the jaxpr are equal on all.

    Args:
        jaxpr: per-worker, of ``jax.make_jaxpr``.
        suspects: for each input, whether a collective over what derives from it counts.
        axes: names of the workers' axes.

    Returns:
        The name of the first such collective's primitive, or ``None``.
    """
    found: list[str] = []

    def walk(jaxpr, inputs):
        # Of each value: does it differ between workers, does it come from a suspect?
        known = dict(zip(jaxpr.invars, inputs, strict=True))
        for eqn in jaxpr.eqns:
            reads = [
                (False, False) if isinstance(v, Literal) else known.get(v, (False,) * 2)
                for v in eqn.invars
            ]
            differs = any(d for d, _ in reads)
            suspect = any(s for _, s in reads)
            name = eqn.primitive.name
            if name == "axis_index":
                differs = True
            elif _names(eqn.params) & set(axes) and name not in _SILENT:
                if suspect and not differs:
                    found.append(name)
            for inner in _jaxprs(eqn.params):
                # Loops and branches: what one input does, any value inside may do.
                one_by_one = len(inner.invars) == len(reads) and not differs
                merged = [(differs, suspect)] * len(inner.invars)
                walked = walk(inner, reads if one_by_one else merged)
                differs = differs or any(d for d, _ in walked)
                suspect = suspect or any(s for _, s in walked)
            known.update(dict.fromkeys(eqn.outvars, (differs, suspect)))
        return [
            (False, False) if isinstance(v, Literal) else known.get(v, (False,) * 2)
            for v in jaxpr.outvars
        ]

    walk(jaxpr, [(False, bool(s)) for s in suspects])
    return found[0] if found else None


def _names(params: dict[str, Any]) -> set[str]:
    """Names of the axes that an equation speaks of."""
    found = set()
    for key in ("axes", "axis_name"):
        value = params.get(key, ())
        found |= set(value) if isinstance(value, tuple | list) else {value}
    return {name for name in found if isinstance(name, str)}


def _jaxprs(params: dict[str, Any]) -> list[Any]:
    """The jaxprs that an equation runs."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns") and hasattr(inner, "invars"):
                found.append(inner)
    return found
