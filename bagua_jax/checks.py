"""Refusals that algorithms share: each names the function, the rule and the cure."""

import sys
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from bagua_jax import primitives
from bagua_jax.primitives import AxisName

__all__ = [
    "require_at_least",
    "require_choice",
    "require_floats",
    "require_gradients",
    "require_one_type",
    "require_weights",
    "require_within",
]


def require_at_least(caller: str, name: str, value: Any, least: int, why: str) -> None:
    """Refuse an argument that is no integer, or one below its least value."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"{caller}: {name} must be an integer >= {least}, got {value!r}. {why}"
        )


def require_choice(
    caller: str, name: str, value: Any, choices: tuple[str, ...]
) -> None:
    """Refuse a word that is not among the choices."""
    if value not in choices:
        raise ValueError(
            f"{caller}: {name} must be one of {', '.join(map(repr, choices))}; "
            f"got {value!r}."
        )


def require_floats(tree: Any, caller: str) -> None:
    """Refuse leaves that are not floating point.

    An empty tree passes: optax calls ``init`` with placeholders that hold no leaves.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{caller}: every leaf must be floating point, and "
                f"'{jax.tree_util.keystr(path) or 'the tree'}' is {dtype}. Keep other "
                "leaves out with optax.masked, or convert them."
            )


def _require_elements(tree: Any, caller: str) -> None:
    if not any(jnp.size(leaf) for leaf in jax.tree.leaves(tree)):
        raise ValueError(
            f"{caller}: the updates hold no elements, so there is nothing to exchange. "
            "Pass a tree with at least one non-empty leaf."
        )


def _require_same(updates: Any, params: Any, caller: str) -> None:
    # Never two mapped trees: a class of a user's own may have no __eq__.
    found, wanted = map(_layout, (updates, params))
    if found != wanted:
        raise ValueError(
            f"{caller}: updates and params must have the same structure and shapes; "
            f"got updates {found[0]} with shapes {found[1]} and params {wanted[0]} "
            f"with shapes {wanted[1]}."
        )


def _layout(tree: Any) -> tuple[Any, list[tuple[int, ...]]]:
    return jax.tree.structure(tree), [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]


def _refuse_own_verdicts(axis_name: AxisName, caller: str) -> None:
    """Refuse optax's wrappers that decide on each worker alone whether it exchanges.

    An exchange cannot see the branch that it is traced in, nor what decides it; the
    Python frames of its trace name the wrapper. Those of a wrapper that JAX has traced
    before are not there: then nothing is refused.
    """
    frame, is_varying = sys._getframe(1), False
    while frame is not None:
        function = frame.f_code.co_qualname
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        is_varying |= package == "bagua_jax" and function.startswith("varying.")
        if package == "optax" and function.startswith("apply_if_finite."):
            raise ValueError(
                f"{caller}: optax.apply_if_finite around an exchange decides on each "
                "worker alone: one that skips it leaves the others waiting for ever, "
                "or they take its NaN. Use bagua_jax.skip_not_finite(tx, "
                f"{axis_name!r}) in its place."
            )
        if package == "optax" and function == "MultiSteps.update":
            _refuse_multi_steps(frame.f_locals, is_varying, axis_name, caller)
        frame = frame.f_back


def _refuse_multi_steps(scope, is_varying, axis_name, caller) -> None:
    """Refuse what cannot work of ``optax.MultiSteps``; ``scope`` is its update's."""
    skip = scope["self"]._should_skip_update_fn
    name = getattr(skip, "__qualname__", repr(skip))
    if not name.startswith("MultiSteps."):  # its own default, which skips nothing
        raise ValueError(
            f"{caller}: optax.MultiSteps with should_skip_update_fn={name} around an "
            "exchange decides on each worker alone: one that skips it leaves the "
            "others waiting for ever, or counts micro-batches of its own. Use "
            "bagua_jax.skip_not_finite(bagua_jax.accumulate(tx, every_k), "
            f"{axis_name!r})."
        )
    sums = jax.tree.leaves(scope["state"].acc_grads)
    is_equal = any(primitives.is_invariant(x, axis_name) for x in sums)
    if is_equal or (not is_varying and primitives.is_typed(axis_name)):
        raise ValueError(
            f"{caller}: optax.MultiSteps around an exchange has branches of unequal "
            "types, or averages that look already summed; and it exchanges on every "
            "micro-batch. Use bagua_jax.accumulate(tx, every_k), which exchanges once "
            "per optimizer step."
        )


def require_gradients(
    updates: Any, params: Any, axis_name: AxisName, caller: str
) -> None:
    """Refuse what a gradient-side transform cannot average.

    Raises:
        ValueError: if a leaf is not floating point, there are no elements, params of
            another structure are given, or the gradients are already summed.
        NameError: if the axis is not mapped here.
    """
    primitives.axis_size(axis_name, caller)
    _refuse_own_verdicts(axis_name, caller)
    require_floats(updates, caller)
    _require_elements(updates, caller)
    if params is not None:
        _require_same(updates, params, caller)
    primitives.require_local(updates, axis_name, caller)


def require_one_type(
    tree: Any, axis_name: AxisName, caller: str, what: str, cure: str
) -> None:
    """Refuse leaves of which some vary over a further axis, where a number joins them.

    Raises:
        ValueError: if JAX types the leaves differently, or tracks no types over an
            axis other than the workers' and there are several leaves.
    """
    types = primitives.leaf_types(tree, axis_name)
    if len(set(types)) > 1:
        raise ValueError(
            f"{caller}: {what} is one number of all leaves, and some of them vary over "
            "further axes of the mesh, or may (shard_map with check_vma=False): those "
            f"that do not would come apart along these axes. {cure}"
        )


def require_weights(
    updates: Any, params: Any, axis_name: AxisName, caller: str
) -> None:
    """Refuse what a weight-side transform cannot exchange.

    Raises:
        ValueError: if params are missing or of another structure than the updates, a
            leaf is not floating point, there are no elements, or the updates were
            averaged before.
        NameError: if the axis is not mapped here.
    """
    primitives.axis_size(axis_name, caller)
    _refuse_own_verdicts(axis_name, caller)
    if params is None:
        raise ValueError(
            f"{caller}: it exchanges the parameters, and params is None. Call "
            "tx.update(updates, state, params)."
        )
    require_floats(updates, caller)
    require_floats(params, caller)
    _require_elements(updates, caller)
    _require_same(updates, params, caller)
    primitives.require_own_updates(updates, axis_name, caller)


def require_within(
    caller: str,
    name: str,
    value: Any,
    low: float,
    high: float = float("inf"),
    *,
    open_below: bool = False,
) -> None:
    """Refuse a number outside [low, high), or (low, high); tracers pass unread."""
    if isinstance(value, jax.core.Tracer):
        return
    above = value > low if open_below else value >= low
    if not (above and value < high):
        bracket = "(" if open_below else "["
        raise ValueError(
            f"{caller}: {name} must be in {bracket}{low}, {high}), got {value!r}."
        )
