"""What a compiled program sends: bytes and messages, read from its optimized HLO."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Collective", "WireCount", "count", "replica_groups"]

Groups = tuple[tuple[int, ...], ...]
Shares = Sequence[float] | np.ndarray


class Collective(NamedTuple):
    """One communication site of a compiled program."""

    kind: str  # HLO opcode, without "-start"
    dtype: str  # on the wire, after the compiler's changes; "u8+f32" where mixed
    operands: int
    operand_bytes: int  # of one worker, summed over the operands
    group_size: int  # workers that take part together; of a permute, all devices
    bytes_sent: float  # per worker, for one execution
    weight: float  # executions per run of the program: loop trips x branch shares
    asynchronous: bool
    path: str  # op_name metadata: scopes and primitive of the source
    name: str  # of the instruction
    groups: Groups  # of devices, by place in the mesh; a permute's (source, target)


class WireCount(NamedTuple):
    """Everything that one run of a compiled program sends."""

    collectives: tuple[Collective, ...]

    @property
    def bytes_per_worker(self) -> float:
        """Bytes that one worker sends, weighted by loops and branches."""
        return math.fsum(c.weight * c.bytes_sent for c in self.collectives)

    @property
    def messages_per_worker(self) -> float:
        """Collectives that one worker runs, without those that send nothing."""
        return math.fsum(c.weight for c in self.collectives if c.bytes_sent > 0)

    def by_kind(self) -> dict[str, tuple[float, float]]:
        """Messages and bytes per worker of each kind of collective."""
        parts: dict[str, tuple[Collective, ...]] = {}
        for c in self.collectives:
            parts[c.kind] = (*parts.get(c.kind, ()), c)
        return {
            kind: (
                WireCount(part).messages_per_worker,
                WireCount(part).bytes_per_worker,
            )
            for kind, part in parts.items()
        }

    def bytes_between(self, nodes: Sequence[int] | np.ndarray) -> float:
        """Bytes per worker that leave their node; the others stay on faster links.

        A ring runs in the order of its group; all-to-all sends to each peer alike.

        Args:
            nodes: the node of each device, in the order of the mesh.

        Example (two nodes of two workers; two of the four ring edges cross):
            >>> text = '''HloModule step, replica_count=4
            ... ENTRY %main (x: f32[100]) -> f32[100] {
            ...   %x = f32[100]{0} parameter(0)
            ...   ROOT %sum = f32[100]{0} all-reduce(%x), replica_groups={{0,1,2,3}}
            ... }'''
            >>> count(text).bytes_per_worker, count(text).bytes_between([0, 0, 1, 1])
            (600.0, 300.0)
        """
        return math.fsum(
            c.weight * c.bytes_sent * _crossing(c, np.asarray(nodes))
            for c in self.collectives
            if c.bytes_sent > 0
        )

    def __str__(self) -> str:
        """Show a table, one collective a line, and the totals."""
        head = ("kind", "dtype", "ops", "bytes", "group", "sent", "weight", "path")
        rows: list[tuple[str, ...]] = [head]
        for c in self.collectives:
            numbers = c.operands, c.operand_bytes, c.group_size, c.bytes_sent, c.weight
            kind = c.kind + " (async)" * c.asynchronous
            rows.append((kind, c.dtype, *(f"{n:,.10g}" for n in numbers), c.path))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map("{:{}{}}".format, r, "<<>>>>><", widths)) for r in rows]
        return "\n".join(line.rstrip() for line in lines) + (
            f"\nper worker: {self.bytes_per_worker:,.10g} bytes sent"
            f" in {self.messages_per_worker:,.10g} messages"
        )


def count(
    compiled: Any,
    *,
    branch_shares: Mapping[str, Shares] | None = None,
    trip_counts: Mapping[str, int] | None = None,
) -> WireCount:
    """Count what one run of a compiled program sends.

    The optimized HLO tells the truth about the wire: a backend widens (bfloat16 travels
    as float32 on CPU), combines, moves and removes collectives. Each is weighted with
    the trip counts of the loops and the shares of the branches around it.

    S operand bytes in a group of n: each worker sends 2S(n-1)/n in an all-reduce,
    S(n-1)/n in a reduce-scatter, all-to-all or broadcast, S(n-1) in an all-gather,
    S x (pairs whose source is not their target) / devices in a permute. A ragged
    all-to-all counts as if full, and remote copies inside custom kernels are not seen.

    Args:
        compiled: a ``jax.stages.Compiled``, or the text of its optimized HLO.
        branch_shares: the share of runs that takes each branch of a conditional (the
            false branch first), by the conditional's op_name or instruction name. Wins
            over the shares that ``bagua_jax.schedules.switch`` wrote into the program.
        trip_counts: the length of a loop, named likewise, where the compiler does not
            state it: a loop with traced bounds, and any loop compiled for TPU.

    Raises:
        ValueError: a loop of unknown length that communicates, branches that send
            unequally and have no shares, or text that is not understood: nothing is
            guessed.

    Example:
        >>> text = '''HloModule step, replica_count=4
        ... ENTRY %main (x: u8[100]) -> u8[400] {
        ...   %x = u8[100]{0} parameter(0)
        ...   ROOT %all = u8[400]{0} all-gather(%x), replica_groups={}, dimensions={0}
        ... }'''
        >>> print(count(text))
        kind        dtype  ops  bytes  group  sent  weight  path
        all-gather  u8       1    100      4   300       1
        per worker: 300 bytes sent in 1 messages
    """
    text = compiled.as_text() if hasattr(compiled, "as_text") else str(compiled)
    module = _parse(text or "")
    chains = {  # the pieces of one asynchronous collective on TPU, by instruction name
        name: (op.kind, op.attributes.get("channel_id"), chain[1])
        for ops in module.computations.values()
        for name, op in ops.items()
        if (chain := re.search(r'[{,]chain_id="([^"]*)"', op.tail))
    }
    given_shares = {k: [*map(float, v)] for k, v in (branch_shares or {}).items()}
    given_trips = dict(trip_counts or {})
    conditionals: set[str] = set()
    loops: set[str] = set()

    @cache
    def visit(computation: str) -> tuple[Collective, ...]:
        found: list[Collective] = []
        started = set()
        for op in module.computations[computation].values():
            if op.opcode.endswith(("-done", "-update")) or op.stays_on_host:
                continue
            if op.kind.startswith(_COLLECTIVE):
                inner = [_collective(op, computation, module)]
            elif op.kind == "while":
                inner = loop(op)
            elif op.kind == "conditional":
                inner = branches(op)
            else:  # calls, fusions, custom calls, wrapped asynchronous operations
                called = op.computations("calls", "to_apply", "called_computations")
                inner = [c for name in called for c in visit(name)]
            if op.opcode.endswith("-start") and '"is_sync":true' not in op.tail:
                inner = [c._replace(asynchronous=True) for c in inner]
            if op.kind == "fusion":
                inner = unrepeated(op, inner, started)
            found += inner
        return tuple(found)

    def unrepeated(
        fusion: _Instruction, inner: list[Collective], started: set
    ) -> list[Collective]:
        """Keep the first piece of what TPU shows again in each fusion it overlaps."""
        first = fusion.name.startswith("async-collective-start")
        kept = [c for c in inner if first or chains.get(c.name) not in started]
        started.update(chains[c.name] for c in kept if c.name in chains)
        return [c._replace(asynchronous=True) if c.name in chains else c for c in kept]

    def loop(op: _Instruction) -> list[Collective]:
        body, condition = map(visit, op.computations("body", "condition"))
        loops.update({op.name, op.path} - {""})
        known = re.search(r'"known_trip_count\\?":\{\\?"n\\?":\\?"?(\d+)', op.tail)
        given = given_trips.get(op.path, given_trips.get(op.name))
        trips = known[1] if known else given
        if trips is not None:
            n = int(trips)
            return _weighted(body, n) + _weighted(condition, n + 1)
        if any(c.bytes_sent for c in body + condition):
            raise ValueError(
                "wire.count: a loop that communicates needs a known trip count; the "
                f"compiler states none for {op.name} ({op.path}). Use lax.scan, or "
                "lax.fori_loop with bounds that are Python integers; on TPU, pass "
                f"trip_counts={{{op.path or op.name!r}: ...}}."
            )
        return []

    def branches(op: _Instruction) -> list[Collective]:
        conditionals.update({op.name, op.path} - {""})
        keys = "branch_computations", "false_computation", "true_computation"
        parts = [WireCount(visit(name)) for name in op.computations(*keys)]
        totals = [(p.bytes_per_worker, p.messages_per_worker) for p in parts]
        shares = given_shares.get(op.path, given_shares.get(op.name))
        if shares is None:
            shares = scoped_shares(op.path)
        if shares is None and np.allclose(totals, totals[0], rtol=1e-12):
            shares = [1 / len(parts)] * len(parts)
        if shares is None:
            sent = "; ".join(
                f"branch {i}: {b:,.10g} bytes in {m:,.10g} messages"
                for i, (b, m) in enumerate(totals)
            )
            raise ValueError(
                f"wire.count: the branches of {op.name} ({op.path}) send unequally and "
                f"nothing says how often each is taken: {sent}. Write it with "
                "bagua_jax.schedules.switch(..., shares=...), or pass "
                f"branch_shares={{{op.path or op.name!r}: (...)}}."
            )
        valid = len(shares) == len(parts) and min(shares) >= 0
        if not valid or not math.isclose(sum(shares), 1, abs_tol=1e-6):
            raise ValueError(
                f"wire.count: {op.name} ({op.path}) needs {len(parts)} shares, one a "
                f"branch, none negative, that sum to 1; got {tuple(shares)}."
            )
        weighted = zip(parts, shares, strict=True)
        return [c for part, share in weighted for c in _weighted(part[0], share)]

    found = visit(module.entry)
    _require_named("branch_shares", given_shares, conditionals)
    _require_named("trip_counts", given_trips, loops)
    return WireCount(found)


def _require_named(argument: str, given: Mapping[str, Any], known: set[str]) -> None:
    if unknown := sorted(given.keys() - known):
        raise ValueError(
            f"wire.count: {argument} must use names of the program, which are "
            f"{sorted(known)}; got {unknown}."
        )


def _weighted(collectives: Sequence[Collective], factor: float) -> list[Collective]:
    return [c._replace(weight=c.weight * factor) for c in collectives]


def scoped_shares(path: str) -> list[float] | None:
    """Read the shares from the scope that stands directly around a conditional.

    >>> scoped_shares("jit(f)/branch_shares(0.9,0.1)/cond/branch_1_fun/cond")  # outer
    >>> scoped_shares("jit(f)/vmap(branch_shares(0.9,0.1))/cond")
    [0.9, 0.1]
    """
    scope = re.search(r"branch_shares\(([^()]*)\)\)*/[^/]*$", path)
    return [float(share) for share in scope[1].split(",")] if scope else None


# A collective: what is sent, and by whom.

_COLLECTIVE = ("all-", "collective-", "ragged-all-", "reduce-scatter", "send")
_PAIRWISE = ("collective-permute", "send")
_RING = {  # bytes sent by each of n workers, for S operand bytes
    "all-reduce": lambda S, n: 2 * S * (n - 1) / n,
    "all-gather": lambda S, n: S * (n - 1.0),
    "reduce-scatter": lambda S, n: S * (n - 1) / n,
    "all-to-all": lambda S, n: S * (n - 1) / n,
    "ragged-all-to-all": lambda S, n: S * (n - 1) / n,
    "collective-broadcast": lambda S, n: S * (n - 1) / n,  # the last sends nothing
}


def _collective(op: _Instruction, computation: str, module: _Module) -> Collective:
    if op.kind not in (*_RING, *_PAIRWISE) or "slice_sizes=" in op.tail:
        raise ValueError(
            f"wire.count: the form of {op.name} ({op.path}) is not known: {op.opcode}. "
            "Nothing is guessed; count the program compiled for another backend."
        )
    # The other operands of a ragged all-to-all are its output and index tables.
    names = op.operands[:1] if op.kind == "ragged-all-to-all" else op.operands
    shapes = [module.computations[computation][name].shape for name in names]
    arrays = [array for shape in shapes for array in _arrays(shape)]
    size = sum(size for _, size in arrays)
    groups = _device_groups(op, module)
    if op.kind in _PAIRWISE:
        n = module.replicas * module.partitions
        sent = size * sum(source != target for source, target in groups) / n
    else:
        n = len(groups[0])
        sent = _RING[op.kind](size, n)
    return Collective(
        kind=op.kind,
        dtype="+".join(dict.fromkeys(dtype for dtype, _ in arrays)),
        operands=len(arrays),
        operand_bytes=size,
        group_size=n,
        bytes_sent=sent,
        weight=1.0,
        asynchronous=False,
        path=op.path,
        name=op.name,
        groups=groups,
    )


def _crossing(c: Collective, nodes: np.ndarray) -> float:
    """Share of what a collective sends that leaves the sender's node."""
    at = nodes[np.array(c.groups)]  # [groups, n], or [pairs, 2]
    if c.kind in _PAIRWISE:
        source, target = at[[a != b for a, b in c.groups]].T
        return np.mean(source != target)
    if c.kind.endswith("all-to-all"):
        n = c.group_size
        return np.mean(at[:, :, None] != at[:, None, :]) * n / (n - 1)
    return np.mean(at != np.roll(at, -1, axis=1))


def _device_groups(op: _Instruction, module: _Module) -> Groups:
    """Return the groups of a collective, or the pairs of a permute, as device numbers.

    Device [r, p] runs partition p of replica r. Without channel_id the text numbers
    replicas, with use_global_device_ids devices, else partitions; but gathers and
    reductions then number replicas, each of which brings all its partitions.
    """
    attributes = op.attributes
    device = np.arange(module.replicas * module.partitions)
    device = device.reshape(module.replicas, module.partitions)
    if "use_global_device_ids" in attributes:
        rows = device.reshape(1, -1)
    elif "channel_id" not in attributes:
        rows = device.T
    elif op.kind in ("all-reduce", "all-gather", "reduce-scatter"):
        rows = device[None]  # [1, replicas, partitions]: a number stands for a replica
    else:
        rows = device
    if op.kind in _PAIRWISE:
        pairs = re.search(r'source_target_pairs="?(\{[{}\d,]*\})', op.tail)
        if not pairs:
            raise ValueError(f"wire.count: {op.name} ({op.path}) names no pairs.")
        groups = _listed(pairs[1])
    else:
        text = attributes.get("replica_groups", "{}")
        groups = replica_groups(text, rows.shape[1])
    return tuple(tuple(row[list(g)].ravel().tolist()) for row in rows for g in groups)


def replica_groups(text: str, devices: int) -> Groups:
    """Parse the groups of a collective.

    Args:
        text: as printed: lists, an iota, or axes of a mesh; ``{}`` means one group.
        devices: how many numbers the groups divide among them.

    Raises:
        ValueError: a form that is not known, or groups that are not of equal size or
            do not hold every number once.

    Example:
        >>> replica_groups("{{0,1},{2,3}}", 4)
        ((0, 1), (2, 3))
        >>> replica_groups("[2,2]<=[2,2]T(1,0)", 4)
        ((0, 2), (1, 3))
        >>> replica_groups("mesh['node'=2,'local'=2] {'node'}", 4)
        ((0, 2), (1, 3))
    """
    if text in ("{}", "{{}}"):
        return (tuple(range(devices)),)
    try:
        if re.fullmatch(r"\{(\{[\d,]+\},?)+\}", text):
            groups = _listed(text)
        elif iota := re.fullmatch(r"(\[\d+,\d+\])<=(\[[\d,]+\].*)", text):
            groups = _iota(iota[2]).reshape(_integers(iota[1])).tolist()
        elif mesh := re.fullmatch(
            r"mesh\[(.*?)\](?:,device_ids=\((.*)\))? \{(.*)\}", text
        ):
            groups = _mesh_groups(*mesh.groups())
        else:
            raise ValueError("neither lists, nor an iota, nor axes of a mesh")
    except (ValueError, LookupError) as error:
        raise ValueError(
            f"wire.replica_groups: the form is not known: {text!r} ({error})."
        ) from error
    numbers = sorted(number for group in groups for number in group)
    if numbers != [*range(devices)] or len({len(group) for group in groups}) > 1:
        raise ValueError(
            f"wire.replica_groups: groups must be of equal size and hold each of "
            f"{devices} devices once; got {text!r}."
        )
    return tuple(map(tuple, groups))


def _mesh_groups(axes: str, device_ids: str | None, along: str) -> list[list[int]]:
    """Group along axes of a mesh; 'a':(2)3 is the middle factor of 'a' = 2 x 3 x rest.

    >>> _mesh_groups("'a'=2,'b'=4", None, "'a','b':(1)2")
    [[0, 2, 4, 6], [1, 3, 5, 7]]
    """
    sizes = {k: int(v) for k, v in (axis.split("=") for axis in axes.split(","))}
    at = dict(zip(sizes, np.indices(list(sizes.values())), strict=True))
    outside, inside, length = dict(at), [], 1
    for name, _, part in (axis.partition(":") for axis in along.split(",") if axis):
        before, size = _integers(part) or (1, sizes[name])
        stride, remainder = divmod(sizes[name], before * size)
        if remainder:
            raise ValueError(f"{part} is no part of {name}")
        inside.append(at[name] // stride % size)
        outside[name] = outside[name] - inside[-1] * stride
        length *= size
    order = np.lexsort([k.ravel() for k in [*outside.values(), *inside][::-1]])
    ids = _iota(device_ids).ravel()[order] if device_ids else order
    return ids.reshape(-1, length).tolist()


def _iota(text: str) -> np.ndarray:
    """Numbers in the order of "[4,2]T(1,0)", or of a plain list."""
    dims, _, order = text.partition("T")
    if "[" not in dims:
        return np.array(_integers(dims))
    numbers = np.arange(math.prod(_integers(dims))).reshape(_integers(dims))
    return numbers.transpose(_integers(order)) if order else numbers


def _listed(text: str) -> Groups:
    return tuple(tuple(_integers(group)) for group in re.findall(r"\{([\d,]+)\}", text))


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


# The text: a module has computations, which have instructions.


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    tail: str  # "operands), attributes"

    @property
    def kind(self) -> str:
        return self.opcode.removesuffix("-start")

    @property
    def stays_on_host(self) -> bool:
        return "is_host_transfer=true" in self.tail

    @property
    def path(self) -> str:
        name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.tail)
        return name[1] if name else ""

    @property
    def operands(self) -> list[str]:
        return [operand.split()[-1].lstrip("%") for operand in _fields(self.tail)[0]]

    @property
    def attributes(self) -> dict[str, str]:
        _, end = _fields(self.tail)
        attributes = _mapping(_fields(self.tail, end + 1)[0])
        if "device_ids" in attributes:  # printed inside replica_groups=mesh[...]
            attributes["replica_groups"] += ",device_ids=" + attributes["device_ids"]
        return attributes

    def computations(self, *keys: str) -> list[str]:
        keys = tuple(key for key in keys if f"{key}=" in self.tail)
        attributes = self.attributes if keys else {}  # parsing takes time
        named = ",".join(attributes.get(key, "").strip("{}") for key in keys)
        return [name.strip(" %") for name in named.split(",") if name]


class _Module(NamedTuple):
    replicas: int
    partitions: int
    entry: str
    computations: dict[str, dict[str, _Instruction]]


def _parse(text: str) -> _Module:
    if len(re.findall(r"^ENTRY ", text, re.MULTILINE)) != 1:
        raise ValueError(
            "wire.count: expected the optimized HLO of one program, with one ENTRY "
            f"computation; got {text[:40]!r}. Compile first: "
            "wire.count(jax.jit(f).lower(*args).compile())."
        )
    header, entry, computations, body = {}, "", {}, {}
    for line in re.sub(r"/\*index=\d+\*/", "", text).splitlines():
        if line.startswith("HloModule"):
            header = _mapping(_fields(line)[0])
        elif line.startswith("  ") and " = " in line:
            name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
            end = _fields(rest, 1)[1] + 1 if rest.startswith("(") else rest.index(" ")
            opcode, _, tail = rest[end:].strip().partition("(")
            name = name.lstrip("%")
            body[name] = _Instruction(name, rest[:end], opcode, tail)
        elif line.endswith("{") and (name := re.match(r"(ENTRY )?%?([^\s(]+)", line)):
            body = computations[name[2]] = {}
            entry = name[2] if name[1] else entry
    replicas = int(header.get("replica_count", 1))
    partitions = int(header.get("num_partitions", 1))
    return _Module(replicas, partitions, entry, computations)


_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[()\[\]{},]')


def _fields(text: str, start: int = 0) -> tuple[list[str], int]:
    """Split at the commas outside brackets and quotes, up to the end of a list.

    The list ends at the bracket that closes what was opened before ``start``, or with
    the text; that place is returned too.

    >>> _fields('f(a, {b, c}), kind="x, y"', 2)
    (['a', '{b, c}'], 11)
    """
    fields, depth, begin, end = [], 0, start, len(text)
    for token in _TOKEN.finditer(text, start):
        depth += (token[0] in "([{") - (token[0] in ")]}")
        if depth < 0:
            end = token.start()
            break
        if token[0] == "," and depth == 0:
            fields.append(text[begin : token.start()].strip())
            begin = token.end()
    last = text[begin:end].strip()
    return fields + [last] * bool(last), end


def _mapping(fields: list[str]) -> dict[str, str]:
    return {key: value for key, _, value in (f.partition("=") for f in fields)}


def _arrays(shape: str) -> list[tuple[str, int]]:
    """List the arrays of a shape with their bytes; a token sends nothing.

    >>> _arrays("(u8[3,4]{1,0}, (s4[3]{0:T(8)E(4)}, f32[]), token[])")
    [('u8', 12), ('s4', 2), ('f32', 4)]
    """
    if shape.startswith("("):
        return [array for part in _fields(shape, 1)[0] for array in _arrays(part)]
    dtype, _, dims = shape.partition("]")[0].partition("[")
    if dtype == "token":
        return []
    bits = re.fullmatch(
        r"pred|(?:bf|[fsuc])(1|2|4|8|16|32|64|128)(e\d+m\d+\w*)?", dtype
    )
    if not bits or not re.fullmatch(r"[\d,<=]*", dims):
        raise ValueError(f"wire.count: cannot tell the size of {shape!r}.")
    size = math.prod(_integers(dims)) * int(bits[1] or 8)
    return [(dtype, math.ceil(size / 8))]
