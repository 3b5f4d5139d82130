"""A training step as several programs: exchanges apart from the compute around them.

XLA runs a CPU program one operation after the other: while it exchanges, it computes
nothing, and it fuses what would be faster apart. :func:`split` cuts a step where it
communicates, and where the library marked a place (a bucket that is packed, a mean that
is about to be compressed). Exchanges then run on a thread of their own, in one order on
all workers, while the step's other parts compute: that of the last layers' gradients
overlaps the rest of the backward pass, and in a loop of steps the last messages of one
overlap the forward pass of the next. The arithmetic, and so the result, is unchanged.
"""

import functools
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.extend.core import Literal as Constant
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bagua_jax.checks import require_at_least
from bagua_jax.marks import group_of
from bagua_jax.wire import WireCount, count
from bagua_jax.workers import Workers

__all__ = ["Part", "Split", "split"]

_SAME = P()  # equal on all workers
_LONGEST_UNROLLED = 32  # turns of a loop around exchanges; each has programs of its own
_CASTS = ("pcast", "pvary")
_NAMING = (*_CASTS, "reshape", "squeeze")  # the same numbers under new types
_EXCHANGE = re.compile(
    r"(unreduced_)?(p(sum|max|min|permute|broadcast)|psum_invariant|all_gather|"
    r"all_to_all|ragged_all_to_all|reduce_scatter|psum_scatter|psend|precv)"
    r"(_invariant|_reduced|_scatter|2)*(_start|_p)?"
)


class Part(NamedTuple):
    """One program of a step."""

    kind: Literal["compute", "exchange"]
    program: Any  # of global arrays; jitted
    reads: tuple[int, ...]  # numbers of the values it takes
    makes: tuple[int, ...]  # and gives
    frees: tuple[int, ...]  # nobody needs them afterwards
    arguments: tuple[jax.ShapeDtypeStruct, ...]


class _Operation(NamedTuple):
    """An equation of the step, its values numbered."""

    equation: Any
    reads: tuple[Any, ...]  # a number, or a constant
    makes: tuple[int, ...]
    path: tuple[int, ...]  # where it stands: positions in nested jaxprs

    @property
    def numbers(self) -> list[int]:
        return [v for v in self.reads if isinstance(v, int)]


class _Flat(NamedTuple):
    """A step as one list of operations, its branches chosen."""

    operations: tuple[_Operation, ...]
    types: tuple[Any, ...]  # of each value
    inputs: tuple[int, ...]
    outputs: tuple[Any, ...]
    constants: dict[int, Any]  # arrays that the step closes over
    cuts: dict[int, tuple[int, ...]]  # values that end a program, and with which others
    branches: tuple[_Operation, ...]  # that are still to be chosen


def split(
    workers: Workers,
    fn: Callable[..., Any],
    in_specs: Any = _SAME,
    *,
    message_bytes: int | None = None,
    donate_argnums: int | Sequence[int] = (),
) -> "Split":
    """Compile a per-worker function as several programs that overlap.

    A drop-in for ``workers.spmd(fn, in_specs)``, for workers on devices. Worth its
    while on CPU with one worker a process, where exchanges then overlap with compute;
    on GPU and TPU XLA does that inside one program.

    The function is traced to its operations and cut at every exchange and at every
    mark. Operations between cuts are compiled together, each before the first exchange
    that needs it. A branch around an exchange is chosen on the host: its condition is
    computed first, so that the parts of the branch that is taken are known. A
    ``lax.scan`` of up to 32 turns around exchanges is unrolled; its turns share their
    compiled programs. (Longer loops, ``while_loop``, and branches whose condition needs
    an exchange, stay one part.) Exchanges run on one thread, in an order that the
    function alone determines, where this process has one device; else everything runs
    in turn.

    Args:
        workers: on devices, one device a worker.
        fn: per-worker function of positional arguments, as for ``Workers.spmd``.
        in_specs: as for ``Workers.spmd``.
        message_bytes: most that a worker sends to one other at once in an all-to-all,
            in bytes; a longer one goes in rounds. ``None``: everything at once, which
            is best where switches do not drop. All n-1 others send to a worker at once,
            so that (n-1) message_bytes should fit into the queue of a switch's port.
        donate_argnums: positions of arguments that the caller gives away, as of
            ``jax.jit``: the last program that reads one may write a result over it. A
            training loop donates its state.

    Returns:
        A function of the boundary's arrays, which waits for its results.

    Raises:
        ValueError: if workers are simulated or are groups of devices, or message_bytes
            is less than 1; when called, if donate_argnums names an argument that is
            not there, and as ``Workers.spmd``.

    Communication:
        What the function communicates; but psums that XLA would combine stay separate
        messages, and an all-to-all may go in rounds.

    Differences from one program:
        None in the arithmetic that the function states. Results are equal bit for bit
        unless XLA chooses otherwise which products and sums to contract into one
        rounding, as it does for the moments of ``qadam``, or for a decoded mean that
        plain SGD applies: then they differ by it.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bagua_jax import Workers, primitives
        >>> workers = Workers.devices(1)
        >>> def step(x):
        ...     return x - primitives.c_fp_s(2 * x, axis_name="workers")
        >>> program = split(workers, step, in_specs=workers.spec)
        >>> program(jnp.ones((1, 3))).tolist()
        [[-1.0, -1.0, -1.0]]
        >>> [part.kind for part in program.parts(jnp.ones((1, 3)))]
        ['compute', 'exchange', 'compute']
    """
    mesh = workers.mesh
    if not isinstance(mesh, Mesh) or len(mesh.axis_names) != len(workers.axes):
        raise ValueError(
            "parts.split: workers must be on devices, one device each; got "
            f"{'simulated workers' if mesh is None else mesh}. Use Workers.devices(), "
            "or Workers.spmd, which compiles one program."
        )
    if message_bytes is not None:
        require_at_least("parts.split", "message_bytes", message_bytes, 1, "Or None.")
    if isinstance(donate_argnums, int):
        donate_argnums = (donate_argnums,)
    return Split(workers, fn, in_specs, message_bytes, frozenset(donate_argnums))


class Split:
    """A step in several programs; see :func:`split`."""

    def __init__(
        self,
        workers: Workers,
        fn,
        in_specs,
        message_bytes: int | None,
        donated: frozenset[int],
    ):
        self._workers, self._fn, self._in_specs = workers, fn, in_specs
        self._message_bytes, self._donated = message_bytes, donated
        self._traced: dict[Any, _Traced] = {}
        mesh = workers.mesh
        assert isinstance(mesh, Mesh)
        self._thread = None
        if len(mesh.local_devices) == 1:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="exchange")

    def __call__(self, *args: Any) -> Any:
        """Run the step; the result is ready."""
        leaves, structure = jax.tree.flatten(args)
        parts, flat, out_structure = self._plan(args, leaves, structure)
        values: dict[int, Any] = dict(flat.constants)
        values.update(zip(flat.inputs, leaves, strict=True))

        def run(part: Part, inputs: list[Any]) -> list[Any]:
            return part.program(*map(_ready, inputs))

        def exchange(part: Part, inputs: list[Any]) -> list[Any]:
            # Ready before and after: never two exchanges on the way.
            inputs = jax.block_until_ready([_ready(x) for x in inputs])
            return jax.block_until_ready(part.program(*inputs))

        for part in parts:
            inputs = [values[i] for i in part.reads]
            if part.kind == "exchange" and self._thread is not None:
                future = self._thread.submit(exchange, part, inputs)
                made = [_Later(future, k) for k in range(len(part.makes))]
            else:
                made = (exchange if part.kind == "exchange" else run)(part, inputs)
            values.update(zip(part.makes, made, strict=True))
            for i in part.frees:
                del values[i]
        results = [_ready(values[v]) if isinstance(v, int) else v for v in flat.outputs]
        return jax.block_until_ready(jax.tree.unflatten(out_structure, results))

    def parts(self, *args: Any) -> tuple[Part, ...]:
        """Return the programs that these arguments would run, in order."""
        leaves, structure = jax.tree.flatten(args)
        return self._plan(args, leaves, structure)[0]

    def count(self, *args: Any) -> WireCount:
        """Count what a step of these arguments sends, from its compiled programs."""
        programs = [
            part.program.lower(*part.arguments).compile()
            for part in self.parts(*args)
            if part.kind == "exchange"
        ]
        return WireCount(tuple(c for p in programs for c in count(p).collectives))

    def _plan(self, args, leaves, structure):
        key = (
            structure,
            tuple((np.shape(leaf), jax.numpy.result_type(leaf)) for leaf in leaves),
        )
        if key not in self._traced:
            self._traced[key] = _Traced(
                self._workers,
                self._fn,
                self._in_specs,
                self._message_bytes,
                self._donated,
                args,
            )
        traced = self._traced[key]
        return *traced.plan(leaves), traced.out_structure


class _Later(NamedTuple):
    """One result of a program that a thread runs."""

    future: Future
    index: int


def _ready(value: Any) -> Any:
    """Wait for a value that a thread makes."""
    if isinstance(value, _Later):
        return value.future.result()[value.index]
    return value


class _Traced:
    """A function traced for arguments of one kind, and its plans by branches taken."""

    def __init__(self, workers: Workers, fn, in_specs, message_bytes, donated, args):
        self._workers, self._message_bytes = workers, message_bytes
        missing = sorted(k for k in donated if not 0 <= k < len(args))
        if missing:
            raise ValueError(
                f"parts.split: donate_argnums must name some of the {len(args)} "
                f"arguments, counted from 0; got {missing}."
            )
        sizes = [len(jax.tree.leaves(arg)) for arg in args]
        self._donated = np.repeat([k in donated for k in range(len(args))], sizes)
        specs = workers._flat_specs(args, in_specs, "parts.split")
        out_specs = workers._trace(fn, args, specs)
        outer = jax.make_jaxpr(
            lambda *a: workers._sharded(fn, a, specs, out_specs), return_shape=True
        )(*args)
        closed, shapes = outer
        self.out_structure = jax.tree.structure(shapes)
        (mapped,) = (e for e in closed.jaxpr.eqns if e.primitive.name == "shard_map")
        self._jaxpr = mapped.params["jaxpr"]
        known = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        order = {v: k for k, v in enumerate(closed.jaxpr.invars)}
        # What goes in: an argument, by its position, or a constant.
        self._positions = [
            None if isinstance(v, Constant) else order.get(v) for v in mapped.invars
        ]
        self._values = [
            v.val if isinstance(v, Constant) else known.get(v) for v in mapped.invars
        ]
        made: list[Any] = list(mapped.outvars)
        self._results = [made.index(v) for v in closed.jaxpr.outvars]
        self._num_inputs = len(closed.jaxpr.invars)
        self._flat: dict[tuple, _Flat] = {}
        self._plans: dict[tuple, tuple[Part, ...]] = {}
        self._predicates: dict[tuple, Any] = {}
        self._loops: dict[int, tuple[Any, Any]] = {}
        self._programs: dict[Any, Any] = {}

    def plan(self, leaves) -> tuple[tuple[Part, ...], _Flat]:
        """Choose the branches for these arguments; give the parts to run."""
        choices: dict[tuple[int, ...], int] = {}
        while True:
            key = tuple(sorted(choices.items()))
            if key not in self._flat:
                self._flat[key] = self._flatten(choices)
            flat = self._flat[key]
            if not flat.branches:
                break
            if key not in self._predicates:
                wanted = [op.reads[0] for op in flat.branches]
                self._predicates[key] = self._schedule(flat, wanted)
            parts = self._predicates[key]
            values = dict(flat.constants) | dict(zip(flat.inputs, leaves, strict=True))
            for part in parts:
                made = part.program(*(values[i] for i in part.reads))
                values.update(zip(part.makes, made, strict=True))
            for op in flat.branches:
                index = values[op.reads[0]]
                if isinstance(index, jax.Array):
                    index = index.addressable_data(0)
                last = len(op.equation.params["branches"]) - 1
                choices[op.path] = int(np.clip(np.asarray(index).ravel()[0], 0, last))
        if key not in self._plans:
            donated = {v for v, d in zip(flat.inputs, self._donated, strict=True) if d}
            made = {v for op in flat.operations for v in op.makes}
            self._plans[key] = self._schedule(flat, flat.outputs, donated | made)
        return self._plans[key], flat

    # --- one list of operations ---

    def _flatten(self, choices) -> _Flat:
        operations: list[_Operation] = []
        types: list[Any] = []
        constants: dict[int, Any] = {}
        cuts: dict[int, tuple[int, ...]] = {}

        named: dict[str, list[Any]] = {}  # values of marks of one group
        alone: set[Any] = set()  # values of marks without a group

        def cut(values) -> None:
            together = tuple(v for v in values if isinstance(v, int))
            cuts.update(dict.fromkeys(together, together))

        def new(aval) -> int:
            types.append(aval)
            return len(types) - 1

        def inline(jaxpr, consts, arguments, path) -> list[Any]:
            env: dict[Any, Any] = dict(zip(jaxpr.invars, arguments, strict=True))
            for var, value in zip(jaxpr.constvars, consts, strict=True):
                env[var] = new(var.aval)
                constants[env[var]] = value

            def read(v):
                return v if isinstance(v, Constant) else env[v]

            for k, eqn in enumerate(jaxpr.eqns):
                here, reads = (*path, k), [read(v) for v in eqn.invars]
                inner = None
                if eqn.primitive.name in ("jit", "pjit", "closed_call"):
                    if _is_cut_inside(eqn):
                        inner, inputs = eqn.params["jaxpr"], reads
                elif (name := eqn.primitive.name) == "scan" and _is_unrolled(eqn):
                    env.update(zip(eqn.outvars, unroll(eqn, reads, here), strict=True))
                    continue
                elif name == "cond" and here in choices:
                    inner = eqn.params["branches"][choices[here]]
                    inputs = reads[1:]
                if inner is not None:
                    is_branch = eqn.primitive.name == "cond"
                    if is_branch:  # XLA fuses nothing across its ends
                        cut(inputs)
                    made = inline(inner.jaxpr, inner.consts, inputs, here)
                    if is_branch:
                        cut(made)
                elif (group := group_of(eqn)) is not None:
                    made = reads
                    if group:
                        named.setdefault(group, []).extend(made)
                    else:
                        cut(made)
                        # Of two marks in a row the second counts: a vector is packed
                        # and filled up at once.
                        for op in reversed(operations):
                            if made[0] in op.makes:
                                for v in alone.intersection(op.numbers):
                                    cuts.pop(v, None)
                                break
                        alone.update(made)
                else:
                    made = [new(v.aval) for v in eqn.outvars]
                    op = _Operation(eqn, tuple(reads), tuple(made), here)
                    operations.append(op)
                env.update(zip(eqn.outvars, made, strict=True))
            return [read(v) for v in jaxpr.outvars]

        def unroll(eqn, reads, path) -> list[Any]:
            body, length = eqn.params["jaxpr"], eqn.params["length"]
            num_consts, num_carry = _loop_sizes(eqn)
            fixed, carry = reads[:num_consts], reads[num_consts:][:num_carry]
            stacks = reads[num_consts + num_carry :]
            take, stack = self._rows(eqn)
            rows: list[list[Any]] = [[]] * length
            turns = range(length)
            for turn in reversed(turns) if eqn.params["reverse"] else turns:
                at = new(take.in_avals[0])
                constants[at] = np.int32(turn)
                here = (*path, turn)
                row = inline(take.jaxpr, take.consts, [at, *stacks], here)
                made = inline(body.jaxpr, body.consts, [*fixed, *carry, *row], here)
                carry, rows[turn] = made[:num_carry], made[num_carry:]
                cut(carry)  # the same programs, and roundings, as turn by turn
            joined = [v for row in rows for v in row]
            return [*carry, *inline(stack.jaxpr, stack.consts, joined, path)]

        inputs = [-1] * self._num_inputs
        arguments = []
        for var, value, position in zip(
            self._jaxpr.invars, self._values, self._positions, strict=True
        ):
            number = new(var.aval)
            arguments.append(number)
            if position is None:
                constants[number] = value
            else:
                inputs[position] = number
        outputs = inline(self._jaxpr, [], arguments, ())
        outputs = [outputs[k] for k in self._results]
        for group in named.values():
            cut(group)
        for k, number in enumerate(inputs):
            if number < 0:  # an argument that the function does not read
                inputs[k] = new(None)
        return _Flat(
            tuple(operations),
            tuple(types),
            tuple(inputs),
            tuple(outputs),
            constants,
            cuts,
            _open_branches(operations),
        )

    def _rows(self, eqn) -> tuple[Any, Any]:
        """Trace what a loop does to its rows: take those of a turn, join all turns'."""
        if id(eqn) not in self._loops:
            num_consts, num_carry = _loop_sizes(eqn)
            stacked = [v.aval for v in eqn.invars[num_consts + num_carry :]]
            made = [v.aval for v in eqn.params["jaxpr"].jaxpr.outvars]
            made = made[num_carry:] * eqn.params["length"]

            def take(turn, *stacks):
                return [
                    jax.lax.dynamic_index_in_dim(x, turn, keepdims=False)
                    for x in stacks
                ]

            def join(*rows):
                width = len(rows) // eqn.params["length"]
                return [jax.numpy.stack(rows[k::width]) for k in range(width)]

            def trace():  # where values that differ between workers are known as such
                turn = jax.ShapeDtypeStruct((), np.int32)
                traced.append(jax.make_jaxpr(take)(turn, *stacked))
                traced.append(jax.make_jaxpr(join)(*made))
                return ()

            traced: list[Any] = []
            mesh = self._workers.mesh
            jax.eval_shape(jax.shard_map(trace, mesh=mesh, in_specs=(), out_specs=()))
            self._loops[id(eqn)] = traced[0], traced[1]
        return self._loops[id(eqn)]

    # --- which operations run together, and when ---

    def _schedule(
        self, flat: _Flat, wanted: Sequence[Any], spare: Collection[int] = ()
    ) -> tuple[Part, ...]:
        """Divide operations into parts, which may write over spare values."""
        ops = flat.operations
        maker = {v: k for k, op in enumerate(ops) for v in op.makes}
        before = [[maker[v] for v in op.numbers if v in maker] for op in ops]

        def makers(values: Iterable[Any]) -> list[int]:
            return [maker[v] for v in values if isinstance(v, int) and v in maker]

        needed = _ancestors(before, makers(wanted))
        exchanges = {k for k in needed if _is_exchange(ops[k].equation)}
        behind: dict[int, frozenset[int]] = {}  # exchanges that an operation needs
        # Repeated where they are needed, not passed: what needs no input, and other
        # names of what ends a program, which it could only give as copies.
        fixed: set[int] = set()
        names: set[int] = set()
        needs: dict[int, set[int]] = {}  # what must be done before: not what is fixed
        given = {*flat.inputs, *flat.constants}
        for k in needed:
            own = exchanges & {k}
            behind[k] = frozenset(own.union(*(behind[b] for b in before[k])))
            needs[k] = set().union(
                *(needs[b] if b in fixed else {b} for b in before[k])
            )
            name, reads = ops[k].equation.primitive.name, set(ops[k].numbers)
            unnamed = reads & {v for b in set(before[k]) - names for v in ops[b].makes}
            if name in _CASTS and unnamed <= flat.cuts.keys():
                names.add(k)
            elif name in _NAMING and not unnamed and not needs[k]:
                names.add(k)
            elif own or given & reads or set(before[k]) - (fixed - names):
                continue
            fixed.add(k)
        exchanges = _in_order(sorted(exchanges), behind)
        position = {k: i for i, k in enumerate(exchanges)}
        # The last exchange that an operation waits for.
        latest = {k: max((position[e] for e in behind[k]), default=-1) for k in needed}

        groups: list[tuple[str, list[int]]] = []
        done = set(fixed)
        used_by: dict[int, list[int]] = {}
        for k in needed:
            for b in needs[k]:
                used_by.setdefault(b, []).append(k)
        came = [-1]  # exchanges that have been waited for, and so all before them

        def compute(ends: Iterable[int]) -> None:
            """Run what these need; what waits for an exchange after what does not."""
            ends = {m for k in ends for m in (needs[k] if k in fixed else {k})}
            missing = _ancestors(needs, ends, done)
            waits: dict[int, int] = {}
            for k in reversed(missing):
                users = [waits[u] for u in used_by.get(k, ()) if u in waits]
                is_here = latest[k] <= came[-1]
                waits[k] = min(users, default=came[-1]) if is_here else latest[k]
            for last in sorted(set(waits.values())):
                came.append(last)
                upto_cuts([k for k in missing if waits[k] == last])

        def upto_cuts(missing: list[int]) -> None:
            """Take operations, up to one cut after the other."""
            for k in missing:
                for v in ops[k].makes:
                    if v in flat.cuts and k not in done:
                        ends = [m for m in makers(flat.cuts[v]) if m in missing]
                        take(_ancestors(needs, ends, done))
            take([k for k in missing if k not in done])

        def take(group: list[int]) -> None:
            if group:
                groups.append(("compute", group))
                done.update(group)

        for k in exchanges:
            compute(before[k])
            groups.append(("exchange", [k]))
            done.add(k)
        ends: dict[tuple[int, ...], list[int]] = {}
        for k in makers(wanted):
            seen = sorted(position[e] for e in behind[k])
            ends.setdefault(tuple(reversed(seen)), []).append(k)
        for _, last in sorted(ends.items(), key=lambda end: end[0]):
            compute(last)

        repeated = {k: [b for b in before[k] if b in fixed] for k in needed}
        return self._compile(flat, groups, repeated, maker, wanted, spare)

    def _compile(self, flat, groups, repeated, maker, wanted, spare):
        ops = flat.operations
        result = {v for v in wanted if isinstance(v, int)}
        done = {k for _, group in groups for k in group}
        loose = [k for k in {maker[v] for v in result if v in maker} if k not in done]
        if loose:
            groups = [*groups, ("compute", _ancestors(repeated, loose))]
        bodies, reads, makes = [], [], []
        for _, group in groups:
            body = _ancestors(repeated, group)
            inner = {v for k in body for v in ops[k].makes}
            used = dict.fromkeys(v for k in body for v in ops[k].numbers)
            bodies.append(body)
            reads.append([v for v in used if v not in inner])
            makes.append([v for k in group for v in ops[k].makes])
        alive = {v for r in reads for v in r} | result
        whole = {*flat.inputs, *flat.constants, *result}
        # An exchange, on its own thread, may not have read its operands yet.
        lent = {
            v
            for (kind, _), r in zip(groups, reads, strict=True)
            if kind == "exchange"
            for v in r
        }
        parts, after = [], set(result)
        for (kind, _), body, r, m in reversed(
            list(zip(groups, bodies, reads, makes, strict=True))
        ):
            m = [v for v in m if v in alive]
            frees = [v for v in r if v not in after]
            over = (set(frees) & set(spare)) - lent
            parts.append(self._part(kind, flat, body, r, m, frees, over, whole))
            after.update(r)
        return tuple(reversed(parts))

    def _part(self, kind, flat, body, reads, makes, frees, over, whole) -> Part:
        axes, mesh = self._workers.axes, self._workers.mesh
        assert mesh is not None

        def varies(v) -> bool:
            return bool(set(flat.types[v].mat.varying) & set(axes))

        def spec(v) -> P:
            return self._workers.spec if varies(v) else P()

        # Between parts, workers' values are joined along their first axis: an axis of
        # workers would be a reshape, which XLA fuses with a concatenation into a loop
        # over single elements. The step's own arguments and results have that axis.
        def is_scalar(v) -> bool:
            return varies(v) and v not in whole and not flat.types[v].shape

        def program(*values):
            env = {
                v: x[0] if is_scalar(v) else x
                for v, x in zip(reads, values, strict=True)
            }
            for k in body:
                op = flat.operations[k]
                inputs = [env[v] if isinstance(v, int) else v.val for v in op.reads]
                made = _evaluate(op.equation, inputs, self._message_bytes)
                env.update(zip(op.makes, made, strict=True))
            return [env[v][None] if is_scalar(v) else env[v] for v in makes]

        mapped = jax.shard_map(
            program,
            mesh=mesh,
            in_specs=tuple(map(spec, reads)),
            out_specs=[spec(v) for v in makes],
        )
        n = self._workers.num_workers

        def struct(v) -> jax.ShapeDtypeStruct:
            shape, dtype = flat.types[v].shape, flat.types[v].dtype
            if varies(v):
                shape = (n * shape[0], *shape[1:]) if shape else (n,)
            return jax.ShapeDtypeStruct(
                shape, dtype, sharding=NamedSharding(mesh, spec(v))
            )

        arguments = tuple(map(struct, reads))
        room = [struct(v) for v in makes]
        donated = []
        for k, v in enumerate(reads):
            if v in over and arguments[k] in room:
                room.remove(arguments[k])
                donated.append(k)
        # A loop's turns are the same equations: most of their programs are the same.
        places: dict[int, int] = {}

        def named(values) -> tuple[int, ...]:
            return tuple(
                places.setdefault(v, len(places)) if isinstance(v, int) else -id(v)
                for v in values
            )

        operations = [flat.operations[k] for k in body]
        same = (
            tuple((id(o.equation), named(o.reads), named(o.makes)) for o in operations),
            (*named(reads), *map(is_scalar, reads), *arguments),
            (*named(makes), *map(is_scalar, makes), *donated),
        )
        if same not in self._programs:
            self._programs[same] = jax.jit(mapped, donate_argnums=donated)
        run = self._programs[same]
        return Part(kind, run, tuple(reads), tuple(makes), tuple(frees), arguments)


def _evaluate(eqn: Any, inputs: list[Any], message_bytes: int | None) -> list[Any]:
    """Run one equation again, under the names that it was traced with."""
    params = eqn.primitive.get_bind_params(eqn.params)
    bind = functools.partial(eqn.primitive.bind, **params)
    is_rows = (params.get("split_axis"), params.get("concat_axis")) == (0, 0)
    with jax.named_scope(str(eqn.source_info.name_stack)), eqn.ctx.manager:
        if message_bytes and is_rows and eqn.primitive.name == "all_to_all":
            groups = params["axis_index_groups"]
            n = len(groups[0]) if groups else jax.lax.axis_size(params["axis_name"])
            return [_in_rounds(bind, inputs[0], n, message_bytes)]
        out = bind(*inputs)
    return list(out) if eqn.primitive.multiple_results else [out]


def _in_rounds(all_to_all, x: jax.Array, n: int, message_bytes: int) -> jax.Array:
    """Exchange rows [n, ...] some columns at a time, round after round."""
    rows = x.reshape(x.shape[0], -1)
    columns = rows.shape[1]
    bytes_to_one = x.size * x.dtype.itemsize // n
    rounds = min(columns, -(-bytes_to_one // message_bytes))
    if rounds < 2:
        return all_to_all(x)
    width = columns // rounds

    def exchange(start, width, rows):  # in place: nobody reads these columns again
        part = jax.lax.dynamic_slice_in_dim(rows, start, width, 1)
        return jax.lax.dynamic_update_slice_in_dim(rows, all_to_all(part), start, 1)

    def one_round(k, rows):
        return exchange(k * width, width, rows)

    rows = jax.lax.fori_loop(0, rounds, one_round, rows)
    if rounds * width < columns:  # less than a column for each round is left
        rows = exchange(rounds * width, columns - rounds * width, rows)
    return rows.reshape(x.shape)


def _in_order(exchanges: Iterable[int], behind: dict[int, frozenset[int]]) -> list[int]:
    """Order exchanges, on all workers alike: phase by phase.

    A phase begins with what is computed first. If every exchange of a phase depends on
    exchanges of the previous phase only, all of its inputs arrive together: then what
    is needed first goes first, so that the next step's forward pass begins while this
    one's last messages are under way.
    """
    depth: dict[int, int] = {}
    goes_on: set[int] = set()
    for k in exchanges:
        depths = [depth[e] for e in behind[k] if e != k]
        depth[k] = 1 + max(depths, default=0)
        if depths.count(depth[k] - 1) == 1:
            goes_on.add(k)
    needed = dict.fromkeys(depth, len(behind))  # by what needs others of its phase too
    for position, k in enumerate(sorted(behind)):
        for e in behind[k] & goes_on:
            if any(depth[other] == depth[e] for other in behind[k] if other != e):
                needed[e] = position
                goes_on.remove(e)
    return sorted(depth, key=lambda k: (depth[k], needed[k], k))


def _ancestors(before, ends: Iterable[int], done: Collection[int] = ()) -> list[int]:
    """Operations behind these ends, and these, that are not done, in order."""
    found: set[int] = set()
    stack = list(ends)
    while stack:
        k = stack.pop()
        if k not in found and k not in done:
            found.add(k)
            stack += before[k]
    return sorted(found)


def _open_branches(operations: Iterable[_Operation]) -> tuple[_Operation, ...]:
    """Find branches around exchanges whose condition is known before any exchange."""
    late: set[int] = set()  # values that need an exchange
    found = []
    for op in operations:
        is_late = not late.isdisjoint(op.numbers)
        if op.equation.primitive.name == "cond" and _is_cut_inside(op.equation):
            if op.reads[0] not in late:
                found.append(op)
        if is_late or _is_exchange(op.equation):
            late.update(op.makes)
    return tuple(found)


def _is_exchange(eqn: Any) -> bool:
    name = eqn.primitive.name
    return bool(_EXCHANGE.fullmatch(name)) or any(
        _is_exchange(inner) for inner in _inner(eqn)
    )


def _is_cut_inside(eqn: Any) -> bool:
    return any(
        group_of(e) is not None or _is_exchange(e) or _is_cut_inside(e)
        for e in _inner(eqn)
    )


def _is_unrolled(eqn: Any) -> bool:
    return eqn.params["length"] <= _LONGEST_UNROLLED and _is_exchange(eqn)


def _loop_sizes(eqn: Any) -> tuple[int, int]:
    """Count a loop's constants and carried values; later JAX keeps trees of them."""
    if "ft_in" in eqn.params:
        constants, carried, _ = eqn.params["ft_in"].unpack()
        return len(constants), len(carried)
    return eqn.params["num_consts"], eqn.params["num_carry"]


def _inner(eqn: Any) -> list[Any]:
    """Equations of the functions that an equation calls."""
    called = []
    for value in eqn.params.values():
        for part in value if isinstance(value, tuple | list) else [value]:
            jaxpr = getattr(part, "jaxpr", part)
            called += getattr(jaxpr, "eqns", [])
    return called
