"""Training loops: the types of a carried state, found before the first step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bagua_jax import primitives

__all__ = [
    "SHARED",
    "Loop",
    "make",
    "refuse_growth",
    "remember_growth",
    "shape_of",
    "spec_leaves",
]

SHARED = P()
"""The spec of a leaf that is equal on all workers."""


class Loop(NamedTuple):
    """A compiled training loop; see :meth:`bagua_jax.Workers.loop`.

    Attributes:
        init: ``init(*init_args) -> state``, at the boundary.
        step: ``step(state, *inputs)``, what the step returns; has ``lower``.
        specs: a tree like the state: ``P()`` or ``P("workers")`` at each leaf.
        types: a tree like the state: shape and dtype on one worker.
        promoted: names of the leaves that ``init`` makes equal on all workers and that
            are stacked, because ``step`` makes them each worker's own.
        average: ``average(state) -> state`` without worker axes: the mean of stacked
            floating leaves, worker 0's of others. To evaluate or export.
        stack: ``stack(state)``, a state without worker axes, such as an eager
            ``tx.init`` makes, in these specs: every worker starts from the same. What
            has its axis already is left as it is.
    """

    init: Callable[..., Any]
    step: Callable[..., Any]
    specs: Any
    types: Any
    promoted: tuple[str, ...]
    average: Callable[[Any], Any]
    stack: Callable[[Any], Any]


def make(
    workers: Any,
    init: Callable[..., Any],
    step: Callable[..., Any],
    init_args: tuple,
    inputs: tuple,
    in_specs: Any,
    flat: bool,
    donate: bool,
    caller: str,
) -> Loop:
    """Compile what :meth:`bagua_jax.Workers.loop` describes."""
    in_specs = input_specs(workers, inputs, in_specs, flat, caller)
    specs, types, promoted = _fixpoint(
        workers, init, step, tuple(init_args), tuple(inputs), in_specs, caller
    )
    stacked = [s == workers.spec for s in spec_leaves(specs)]

    def start(*args):
        flat_specs = [P()] * len(jax.tree.leaves(args))
        return workers._run(init, args, flat_specs, specs)

    def advance(*args):
        flat_specs = workers._flat_specs(args, (specs, *in_specs), caller)
        found, results = workers._traced(step, args, flat_specs)
        came = _carried(args[0], found)
        if came is None:
            raise _not_carried(caller, args[0], found)
        for name, spec, new in zip(
            _names(specs), spec_leaves(specs), spec_leaves(came), strict=True
        ):
            if spec == P() and new != P():
                raise ValueError(
                    f"{caller}: state leaf {name} is equal on all workers in the specs "
                    "that were found with the example inputs, and each worker's own "
                    "with these. Build the loop with inputs of this structure."
                )
        if came is found:
            return workers._run(step, args, flat_specs, specs)
        aux = [found[1:], results[1:]]
        kinds = jax.tree.map(_kind(workers, flat), *aux, is_leaf=_is_spec)

        def body(*args):
            state, *rest = step(*args)
            mean = lambda x, kind: _mean(workers, x) if kind == "mean" else x  # noqa: E731
            return (state, *jax.tree.map(mean, tuple(rest), kinds))

        aux_specs = jax.tree.map(
            lambda k: P() if k == "mean" else k, kinds, is_leaf=_is_spec
        )
        return workers._run(body, args, flat_specs, (specs, *aux_specs))

    def averaged(state):
        def one(x, is_stacked):
            if not is_stacked:
                return x
            if not jnp.issubdtype(x.dtype, jnp.inexact):
                return x[0]
            wide = jnp.promote_types(x.dtype, jnp.float32)
            return jnp.mean(x, 0, dtype=wide).astype(x.dtype)

        leaves, structure = jax.tree.flatten(state)
        return structure.unflatten(map(one, leaves, stacked))

    def stack(state):
        went = [
            workers.spec if np.ndim(x) > t.ndim else P()
            for x, t in zip(jax.tree.leaves(state), jax.tree.leaves(types), strict=True)
        ]
        return workers._run(lambda s: s, (state,), went, specs)

    for function, like in ((advance, step), (start, init)):
        function.__name__ = getattr(like, "__name__", function.__name__)
        function.__doc__ = like.__doc__
    return Loop(
        init=workers._jit(start),
        step=_stepper(workers, advance, donate),
        specs=specs,
        types=types,
        promoted=promoted,
        average=workers._jit(averaged),
        stack=workers._jit(stack),
    )


def input_specs(
    workers: Any, inputs: tuple, in_specs: Any, flat: bool, caller: str
) -> tuple:
    """Write a spec, or tree of specs, for each input; by default those of batches."""
    if in_specs is not None:
        return (in_specs,) * len(inputs) if _is_spec(in_specs) else tuple(in_specs)
    if not flat:
        return (workers.spec,) * len(inputs)
    # What has no axis (a rate, a typed key) is no batch, and the same for all.
    sizes = {np.shape(x)[0] for x in jax.tree.leaves(inputs) if np.ndim(x)}
    if len(sizes) > 1:
        raise ValueError(
            f"{caller}: inputs are batches [B, ...] by default, and their leading axes "
            f"have sizes {sorted(sizes)}. Say which are: in_specs=(workers.batch, P()) "
            "splits the first input among the workers and gives the second whole."
        )
    return tuple(
        jax.tree.map(lambda x: workers.batch if np.ndim(x) else P(), x) for x in inputs
    )


def _fixpoint(workers, init, step, init_args, inputs, in_specs, caller):
    """Stack what a step makes each worker's own, until nothing changes."""
    start, types = workers._traced(init, init_args, [P()] * _count(init_args))
    names = _names(types)
    leaves, structure = jax.tree.flatten(types)
    specs = list(spec_leaves(start))
    while True:
        state = [
            jax.ShapeDtypeStruct((workers.num_workers, *x.shape), x.dtype)
            if spec == workers.spec
            else x
            for x, spec in zip(leaves, specs, strict=True)
        ]
        args = (structure.unflatten(state), *inputs)
        flat_specs = workers._flat_specs(
            args, (structure.unflatten(specs), *in_specs), caller
        )
        found, out = workers._traced(step, args, flat_specs)
        came, new = _carried(args[0], found), _carried(args[0], out)
        if came is None or new is None:
            raise _not_carried(caller, args[0], found)
        for name, old, x in zip(names, leaves, jax.tree.leaves(new), strict=True):
            if (old.shape, old.dtype) != (x.shape, x.dtype):
                raise ValueError(
                    f"{caller}: state leaf {name} is {old.dtype}{list(old.shape)} in "
                    f"init and comes back from step as {x.dtype}{list(x.shape)}. Make "
                    "it so in init, or cast it back in the step (x.astype(old.dtype))."
                )
        grown = [
            workers.spec if workers.spec in (a, b) else P()
            for a, b in zip(specs, spec_leaves(came), strict=True)
        ]
        if grown == specs:
            pairs = zip(names, spec_leaves(start), specs, strict=True)
            promoted = tuple(name for name, a, b in pairs if a != b)
            return structure.unflatten(specs), types, promoted
        specs = grown


def _kind(workers, flat: bool):
    """What becomes of an output beside the state: a spec, or "mean"."""

    def kind(spec, x):
        if not flat or spec == P():
            return spec
        if x.ndim == 0:
            is_number = jnp.issubdtype(x.dtype, jnp.inexact)
            return "mean" if is_number else spec
        return workers.batch

    return kind


def _mean(workers, x):
    return primitives.c_fp_s(x[None], axis_name=workers.axis_name)[0]


def _stepper(workers, advance, donate: bool):
    """Compile the step at its first call: the state leaves placed as it came."""
    options = {"donate_argnums": 0} if donate else {}
    mesh = workers.mesh
    if not isinstance(mesh, Mesh) or set(mesh.axis_names) == set(workers.axes):
        return workers._jit(advance, **options)
    made: list[Any] = []

    def compiled(state):
        if not made:
            placed = jax.tree.map(lambda x: _placement(x, workers), state)
            made.append(workers._jit(_constrained(advance, placed), **options))
        return made[0]

    def step(state, *inputs):
        return compiled(state)(state, *inputs)

    step.lower = lambda state, *inputs: compiled(state).lower(state, *inputs)  # type: ignore[attr-defined]
    step.__name__, step.__doc__ = advance.__name__, advance.__doc__
    return step


def _placement(x: Any, workers: Any) -> Any:
    """The sharding of an array on the workers' mesh, or the user's; else nothing."""
    sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not sharding.spec:
        return ()
    if tuple(sharding.mesh.axis_names) != tuple(workers.mesh.axis_names):
        return ()
    return NamedSharding(workers.mesh, sharding.spec)


def _constrained(advance, placed):
    """Keep the layout over further mesh axes, which XLA would choose anew."""

    def run(state, *inputs):
        out = advance(state, *inputs)
        is_alone = jax.tree.structure(out) == jax.tree.structure(state)
        new = jax.tree.map(
            lambda x, p: x if p == () else lax.with_sharding_constraint(x, p),
            out if is_alone else out[0],
            placed,
            is_leaf=lambda x: isinstance(x, jax.Array),
        )
        return new if is_alone else (new, *out[1:])

    run.__name__, run.__doc__ = advance.__name__, advance.__doc__
    return run


# --- a state that is handed back ------------------------------------------------------


def remember_growth(args, flat_specs, out_specs, out_types, spec, n, grown) -> None:
    """Note what went in equal on all workers and came back each worker's own.

    Args:
        args: what a program was traced with.
        flat_specs: of their leaves.
        out_specs: a tree like the output.
        out_types: likewise, per-worker shapes and dtypes.
        spec: of a leaf with a worker axis.
        n: number of workers.
        grown: (argument, structure, leaf) -> shapes [n, ...] under which the leaf would
            come in again; written.
    """
    outputs = [(out_specs, out_types)]
    if isinstance(out_specs, tuple | list) and not _is_spec(out_specs):
        outputs += zip(out_specs, out_types, strict=True)
    specs = iter(flat_specs)
    for k, arg in enumerate(args):
        structure = jax.tree.structure(arg)
        went = [next(specs) for _ in range(structure.num_leaves)]
        for found, types in outputs:
            if jax.tree.structure(found, is_leaf=_is_spec) != structure:
                continue
            leaves = zip(
                _names(arg),
                jax.tree.leaves(arg),
                went,
                spec_leaves(found),
                jax.tree.leaves(types),
                strict=True,
            )
            for name, leaf, before, after, new in leaves:
                is_same = np.shape(leaf) == new.shape
                if before == P() and after == spec and is_same:
                    shapes = grown.setdefault((k, structure, name), set())
                    shapes.add((n, *new.shape))


def refuse_growth(args, flat_specs, grown) -> None:
    """Refuse a leaf that comes back with a row for each worker as if it were equal.

    Raises:
        ValueError: naming the leaf. Every such call has a new shape and is traced, so
            that looking for it costs nothing later.
    """
    specs = iter(flat_specs)
    for k, arg in enumerate(args):
        structure = jax.tree.structure(arg)
        for name, leaf in zip(_names(arg), jax.tree.leaves(arg), strict=True):
            shape = np.shape(leaf)
            is_shared = next(specs) == P()
            if is_shared and shape in grown.get((k, structure, name), ()):
                raise ValueError(
                    f"Workers.spmd: leaf [{k}]{name} went in as P(), equal on all "
                    "workers, came back with a row for each, and is passed in again as "
                    f"P() with shape {shape}: it would grow on every call. Use "
                    "Workers.loop, which finds the specs of a carried state; or "
                    "declare it in init with bagua_jax.worker_local, or average it in "
                    "the step."
                )


# --- trees of specs -------------------------------------------------------------------


def _is_spec(x: Any) -> bool:
    return isinstance(x, P | str)


def spec_leaves(specs: Any) -> list[Any]:
    """Flatten a tree of specs."""
    return jax.tree.leaves(specs, is_leaf=_is_spec)


def _names(tree: Any) -> list[str]:
    paths = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_spec)
    return [jax.tree_util.keystr(path) for path, _ in paths]


def shape_of(x: Any) -> jax.ShapeDtypeStruct:
    """Describe an array, or a Python number, without its values."""
    return jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x))


def _count(tree: Any) -> int:
    return len(jax.tree.leaves(tree))


def _carried(state: Any, out: Any) -> Any:
    """The state in what a step returned: the whole, or the first of a tuple."""
    structure = jax.tree.structure(state)
    if jax.tree.structure(out, is_leaf=_is_spec) == structure:
        return out
    if isinstance(out, tuple) and out and not _is_spec(out):
        if jax.tree.structure(out[0], is_leaf=_is_spec) == structure:
            return out[0]
    return None


def _not_carried(caller: str, state: Any, out: Any) -> ValueError:
    found = jax.tree.structure(out, is_leaf=_is_spec)
    return ValueError(
        f"{caller}: step must return the state, or a tuple with the state first, in "
        f"the structure that init gives, {jax.tree.structure(state)}; got {found}."
    )
