"""What a compiled program sends, read from its optimized HLO."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from bagua_jax.wire.base import (
    PAIRWISE,
    RING,
    Collective,
    WireCount,
    collective,
    num_bytes,
)
from bagua_jax.wire.groups import device_groups, integers, listed
from bagua_jax.wire.weights import Shares, Weights, counted_trips

__all__ = ["count"]


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
        trip_counts: the length of a loop, named likewise, where the program does not
            state it: a loop with traced bounds.

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
    weights = Weights("wire.count", branch_shares, trip_counts)

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
                parts = map(visit, op.computations("body", "condition"))
                known = _trips(op, computation, module)
                inner = weights.loop(*parts, name=op.name, path=op.path, known=known)
            elif op.kind == "conditional":
                keys = "branch_computations", "false_computation", "true_computation"
                parts = [visit(name) for name in op.computations(*keys)]
                inner = weights.branches(parts, name=op.name, path=op.path)
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

    found = visit(module.entry)
    weights.require_known_names()
    return WireCount(found)


# A collective: what is sent, and by whom.

_COLLECTIVE = ("all-", "collective-", "ragged-all-", "reduce-scatter", "send")


def _collective(op: _Instruction, computation: str, module: _Module) -> Collective:
    if op.kind not in (*RING, *PAIRWISE) or "slice_sizes=" in op.tail:
        raise ValueError(
            f"wire.count: the form of {op.name} ({op.path}) is not known: {op.opcode}. "
            "Nothing is guessed; count the program compiled for another backend."
        )
    # The other operands of a ragged all-to-all are its output and index tables.
    names = op.operands[:1] if op.kind == "ragged-all-to-all" else op.operands
    shapes = [module.computations[computation][name].shape for name in names]
    arrays = [array for shape in shapes for array in _arrays(shape)]
    attributes = op.attributes
    if op.kind in PAIRWISE:
        pairs = re.search(r'source_target_pairs="?(\{[{}\d,]*\})', op.tail)
        if not pairs:
            raise ValueError(f"wire.count: {op.name} ({op.path}) names no pairs.")
        numbered = listed(pairs[1])
    else:
        numbered = attributes.get("replica_groups", "{}")
    groups = device_groups(
        numbered,
        kind=op.kind,
        replicas=module.replicas,
        partitions=module.partitions,
        channel="channel_id" in attributes,
        global_ids="use_global_device_ids" in attributes,
    )
    devices = module.replicas * module.partitions
    return collective(op.kind, arrays, groups, devices, op.path, op.name)


# A loop that counts: compilers for CPU and GPU state its trips, that for TPU does not.


def _trips(op: _Instruction, computation: str, module: _Module) -> int | None:
    """Trips of a loop that counts from a constant to a constant; else None."""
    if known := re.search(r'"known_trip_count\\?":\{\\?"n\\?":\\?"?(\d+)', op.tail):
        return int(known[1])
    (body,), (condition,) = op.computations("body"), op.computations("condition")
    inside, test = (module.root(name) for name in (body, condition))
    initial = module.computations[computation].get(op.operands[0])
    direction = re.search(r"direction=(\w\w)", test.tail)
    if not (initial and initial.opcode == inside.opcode == "tuple"):
        return None
    if test.opcode != "compare" or not direction:
        return None

    def scalar(value: _Scalar) -> int | None:
        """Read a constant, also one that the loop carries and does not change."""
        if isinstance(value, _Carried):
            if module.scalar(body, inside.operands[value.index]) != value:
                return None
            value = module.scalar(computation, initial.operands[value.index])
        return value if isinstance(value, int) else None

    counter, limit = (module.scalar(condition, name) for name in test.operands)
    if not isinstance(counter, _Carried):
        return None
    start = module.scalar(computation, initial.operands[counter.index])
    add = module.source(body, inside.operands[counter.index])
    if not add or add.opcode != "add":
        return None
    terms = [module.scalar(body, name) for name in add.operands]
    if counter not in terms:
        return None
    terms.remove(counter)
    return counted_trips(start, scalar(terms[0]), scalar(limit), direction[1])


class _Carried(NamedTuple):
    """An element of the tuple that a loop carries."""

    index: int


_Scalar = int | _Carried | None


# The text: a module has computations, which have instructions.


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    tail: str  # "operands), attributes"
    is_root: bool = False  # of its computation

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

    def root(self, computation: str) -> _Instruction:
        """Find what a computation returns."""
        return next(op for op in self.computations[computation].values() if op.is_root)

    def source(self, computation: str, name: str) -> _Instruction | None:
        """Find what gives a value, behind copies of it."""
        op = self.computations[computation].get(name)
        while op and op.kind in ("copy", "copy-done", "bitcast"):
            op = self.computations[computation].get(op.operands[0])
        return op

    def scalar(self, computation: str, name: str) -> _Scalar:
        """Read a constant integer, or an element of the computation's parameter."""
        op = self.source(computation, name)
        if op and op.opcode == "constant":
            constant = re.match(r"-?\d+(?=\))", op.tail)
            return int(constant[0]) if constant else None
        if op and op.opcode == "get-tuple-element":
            of = self.source(computation, op.operands[0])
            if of and of.opcode == "parameter":
                return _Carried(int(op.attributes["index"]))
        return None


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
            root = line.startswith("  ROOT ")
            name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
            end = _fields(rest, 1)[1] + 1 if rest.startswith("(") else rest.index(" ")
            opcode, _, tail = rest[end:].strip().partition("(")
            name = name.lstrip("%")
            body[name] = _Instruction(name, rest[:end], opcode, tail, root)
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
    """List the arrays of a shape with their elements; a token sends nothing.

    >>> _arrays("(u8[3,4]{1,0}, (s4[3]{0:T(8)E(4)}, f32[]), token[])")
    [('u8', 12), ('s4', 3), ('f32', 1)]
    """
    if shape.startswith("("):
        return [array for part in _fields(shape, 1)[0] for array in _arrays(part)]
    dtype, _, dims = shape.partition("]")[0].partition("[")
    if dtype == "token":
        return []
    if not re.fullmatch(r"[\d,<=]*", dims):
        raise ValueError(f"wire.count: cannot tell the size of {shape!r}.")
    num_bytes(dtype, 0)  # refuses a dtype that is not known
    return [(dtype, math.prod(integers(dims)))]
