"""What a program is meant to send, read from its StableHLO."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.extend.mlir import ir
from jax.interpreters.mlir import make_ir_context

from bagua_jax.wire.base import (
    PAIRWISE,
    RING,
    Collective,
    Groups,
    WireCount,
    collective,
)
from bagua_jax.wire.groups import device_groups
from bagua_jax.wire.weights import Shares, Weights, counted_trips

__all__ = ["intended"]


def intended(
    lowered: Any,
    *,
    branch_shares: Mapping[str, Shares] | None = None,
    trip_counts: Mapping[str, int] | None = None,
) -> WireCount:
    """Count what a lowered program is meant to send, before a compiler changes it.

    Reads the StableHLO that JAX hands to the compiler: every collective that the source
    asks for, in its own dtype, also those that a compiler will combine or remove. The
    rows, formulae and weights are those of :func:`bagua_jax.wire.count`; the names in
    ``path`` are the same. Nothing is compiled, so 128 workers cost no more than 8.

    Args:
        lowered: a ``jax.stages.Lowered``, or its StableHLO. Text should be that of
            ``lowered.as_text(debug_info=True)``: without it, names and the shares of
            ``bagua_jax.schedules.switch`` are missing.
        branch_shares: the share of runs that takes each branch of a conditional, by
            ``path``, as in :func:`bagua_jax.wire.count`.
        trip_counts: the length of a loop with traced bounds, by ``path``.

    Raises:
        ValueError: as :func:`bagua_jax.wire.count`; or collectives over some axes of a
            mesh whose other axes are left to the partitioner, which then decides how
            large their operands are.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bagua_jax import Workers
        >>> workers = Workers.abstract(128)
        >>> def f(x):
        ...     return jax.lax.pmean(x, workers.axis_name)
        >>> mean = workers.spmd(f, in_specs=workers.spec)
        >>> x = jax.ShapeDtypeStruct((128, 1000), jnp.bfloat16)
        >>> lowered = mean.trace(x).lower(lowering_platforms=("cpu",))
        >>> intended(lowered).by_kind()
        {'all-reduce': (1.0, 3968.75)}
    """
    program = _Program(_module(lowered), Weights(_CALLER, branch_shares, trip_counts))
    return program.count()


_CALLER = "wire.intended"
_RAGGED = "ragged_all_to_all"
_CONTROL = ("stablehlo.case", "stablehlo.if", "stablehlo.while")
_DTYPES = {"i1": "pred", "complex<f32>": "c64", "complex<f64>": "c128"}
_COLLECTIVE = re.compile(
    r"(stablehlo|sdy|mhlo)\.(all_(?!slice)|collective_|ragged_|reduce_scatter|send$)"
)


def _module(lowered: Any) -> Any:
    if hasattr(lowered, "compiler_ir"):
        lowered = lowered.compiler_ir("stablehlo")
    if isinstance(lowered, ir.Module):
        return lowered
    try:
        with make_ir_context():
            return ir.Module.parse(str(lowered))
    except ir.MLIRError as error:
        raise ValueError(
            f"{_CALLER}: expected a lowered program, jax.jit(f).lower(*args), or its "
            f"StableHLO; got {str(lowered)[:40]!r}."
        ) from error


class _Program:
    """A module of StableHLO: its functions and meshes.

    ``free`` below is the number of parts that the partitioner still makes of an array:
    1 where ``shard_map`` has mapped every axis of the mesh.
    """

    def __init__(self, module: Any, weights: Weights):
        self.weights, self.module = weights, module  # operations die with the module
        operations = [op.operation for op in module.body.operations]
        named = [op for op in operations if "sym_name" in op.attributes]
        self.symbols = {_text(op.attributes["sym_name"]): op for op in named}
        given = module.operation.attributes
        names = "mhlo.num_replicas", "mhlo.num_partitions"
        self.replicas, self.partitions = (
            ir.IntegerAttr(given[name]).value if name in given else 1 for name in names
        )
        if self.partitions == 1:  # lowered for a mesh whose devices are not known yet
            meshes = [op for op in named if op.name == "sdy.mesh"]
            sizes = [math.prod(size for _, size in _axes(mesh)[0]) for mesh in meshes]
            self.partitions = max(sizes, default=1)
        self.numbers = itertools.count()
        self.silent: set[str] = set()  # functions that send nothing

    def count(self) -> WireCount:
        found = self.function("main", "", self.partitions)
        self.weights.require_known_names()
        return WireCount(tuple(found))

    def function(self, name: str, prefix: str, free: int) -> list[Collective]:
        if name in self.silent:
            return []
        body = self.symbols[name].regions[0] if name in self.symbols else None
        if body is None or not [op for block in body.blocks for op in block.operations]:
            raise ValueError(f"{_CALLER}: the program has no function named {name!r}.")
        found = self.region(body, prefix, free)
        if not found:
            self.silent.add(name)
        return found

    def region(self, region: Any, prefix: str, free: int) -> list[Collective]:
        return [
            c
            for block in region.blocks
            for op in block.operations
            for c in self.operation(op.operation, prefix, free)
        ]

    def operation(self, op: Any, prefix: str, free: int) -> list[Collective]:
        path = "/".join(filter(None, (prefix, _name(op))))
        if _COLLECTIVE.match(op.name) or _target(op) == _RAGGED:
            return self.collective(op, path, free)
        if called := _callees(op):
            inside = 1 if _enters_shards(op) else free
            return [c for name in called for c in self.function(name, path, inside)]
        if op.name == "sdy.manual_computation":
            inside = free // self.mapped(op)
            return [c for r in op.regions for c in self.region(r, path, inside)]
        parts = [self.region(r, prefix, free) for r in op.regions]
        if not any(parts) and op.name not in _CONTROL:
            return []
        if op.name == "stablehlo.while":
            condition, body = parts
            known = _trips(op) if condition or body else None
            return self.weights.loop(body, condition, name=path, path=path, known=known)
        if op.name == "stablehlo.case":
            return self.weights.branches(parts, name=path, path=path)
        if op.name == "stablehlo.if":  # the false branch first, as in HLO
            return self.weights.branches(parts[::-1], name=path, path=path)
        raise ValueError(
            f"{_CALLER}: {op.name} ({path}) holds a collective, and how often it runs "
            "is not known. Nothing is guessed."
        )

    def mapped(self, op: Any) -> int:
        """Count the shards that a manual computation maps, over all of its axes."""
        shardings = [str(op.attributes[f"{side}_shardings"]) for side in ("in", "out")]
        mesh = re.search(r"<@([\w.]+)", "".join(shardings))
        axes = re.findall(r'"([^"]*)"', str(op.attributes["manual_axes"]))
        if axes and (not mesh or mesh[1] not in self.symbols):
            raise ValueError(
                f"{_CALLER}: {op.name} names no mesh of the program: {shardings}."
            )
        sizes = dict(_axes(self.symbols[mesh[1]])[0]) if mesh else {}
        return math.prod(sizes[axis] for axis in axes)

    def collective(self, op: Any, path: str, free: int) -> list[Collective]:
        attributes = op.attributes
        if _target(op) == _RAGGED:
            kind, attributes = "ragged-all-to-all", attributes["backend_config"]
            channel = "channel_id" in attributes
        else:
            kind = op.name.partition(".")[2].replace("_", "-")
            channel = "channel_handle" in attributes
        if kind == "send" and "true" in str(attributes["is_host_transfer"]):
            return []
        if kind not in (*RING, *PAIRWISE) or op.name.startswith("sdy."):
            raise ValueError(
                f"{_CALLER}: {op.name} ({path}) is not known. Nothing is guessed."
            )
        if free != 1 and self.partitions > 1:
            raise ValueError(
                f"{_CALLER}: {kind} ({path}) runs where {free} parts of each array are "
                "left to the partitioner, which decides what is sent. Map every axis "
                "of the mesh with shard_map, or count the compiled program."
            )
        if kind in PAIRWISE:
            groups = _rows(attributes["source_target_pairs"])
        else:
            groups = self.groups(attributes["replica_groups"])
        # A send has a token, and a ragged all-to-all its output and index tables.
        first = kind in ("send", "ragged-all-to-all")
        operands = list(op.operands)[: 1 if first else None]
        groups = device_groups(
            groups,
            kind=kind,
            replicas=self.replicas,
            partitions=self.partitions,
            channel=channel,
            global_ids="use_global_device_ids" in attributes,
        )
        arrays = [_array(operand.type, path) for operand in operands]
        devices = self.replicas * self.partitions
        name = f"{kind}.{next(self.numbers)}"
        return [collective(kind, arrays, groups, devices, path, name)]

    def groups(self, attribute: Any) -> Groups | str:
        """Read lists of groups, or write axes of a mesh as HLO does."""
        if isinstance(attribute, ir.DenseElementsAttr):
            return _rows(attribute) or "{}"
        text = str(attribute)
        mesh = re.search(r"mesh = @([\w.]+)", text)
        axes = re.findall(r'axis_ref<name = "([^"]*)"(?:[^<>]*?(\(\d+\)\d+))?', text)
        if not text.startswith("#stablehlo.replica_group_mesh_axes") or not mesh:
            raise ValueError(f"{_CALLER}: groups of a form that is not known: {text}.")
        sizes, ids = _axes(self.symbols[mesh[1]])
        listed = ",".join(f"'{name}'={size}" for name, size in sizes)
        ids = f",device_ids=({ids})" if ids else ""
        along = ",".join(f"'{name}'" + f":{part}" * bool(part) for name, part in axes)
        return f"mesh[{listed}]{ids} {{{along}}}"


def _trips(op: Any) -> int | None:
    """Trips of a loop that counts from a constant to a constant; else None."""
    condition, body = (region.blocks[0] for region in op.regions)
    test = _owner(_last(condition).operands[0])
    if test is None or test.name != "stablehlo.compare":
        return None
    direction = re.search(r"(\w\w)>$", str(test.attributes["comparison_direction"]))

    def carried(value: Any, block: Any) -> int | None:
        """Tell which of the loop's values it is, if any."""
        is_argument = isinstance(value, ir.BlockArgument) and value.owner == block
        return value.arg_number if is_argument else None

    def scalar(value: Any, block: Any) -> int | None:
        """Read a constant, also one that the loop carries and does not change."""
        index = carried(value, block)
        if index is not None:
            unchanged = carried(_last(body).operands[index], body) == index
            return _constant(op.operands[index]) if unchanged else None
        return _constant(value)

    counter, limit = test.operands
    index = carried(counter, condition)
    if index is None or direction is None:
        return None
    add = _owner(_last(body).operands[index])
    if add is None or add.name != "stablehlo.add":
        return None
    steps = [value for value in add.operands if carried(value, body) != index]
    if len(steps) != 1:
        return None
    start, step = _constant(op.operands[index]), scalar(steps[0], body)
    return counted_trips(start, step, scalar(limit, condition), direction[1])


def _owner(value: Any) -> Any:
    """Find the operation that gives a value; None for an argument of a block."""
    return None if isinstance(value, ir.BlockArgument) else value.owner.operation


def _last(block: Any) -> Any:
    return block.operations[len(block.operations) - 1].operation


def _constant(value: Any) -> int | None:
    op = _owner(value)
    if op is None or op.name != "stablehlo.constant":
        return None
    number = np.array(op.attributes["value"])
    whole = number.size == 1 and np.issubdtype(number.dtype, np.integer)
    return int(number.item()) if whole else None


def _name(op: Any) -> str:
    return op.location.name_str if isinstance(op.location, ir.NameLoc) else ""


def _text(attribute: Any) -> str:
    return ir.StringAttr(attribute).value


def _target(op: Any) -> str:
    custom = op.name == "stablehlo.custom_call"
    return _text(op.attributes["call_target_name"]) if custom else ""


def _callees(op: Any) -> list[str]:
    """Name the functions that an operation calls."""
    if op.name == "stablehlo.custom_call":
        given = op.attributes
        called = given["called_computations"] if "called_computations" in given else []
        return [ir.FlatSymbolRefAttr(symbol).value for symbol in called]
    key = {"func.call": "callee", "stablehlo.composite": "decomposition"}.get(op.name)
    return [ir.FlatSymbolRefAttr(op.attributes[key]).value] if key else []


def _enters_shards(op: Any) -> bool:
    """Whether a call gets shards, in programs for the partitioner before Shardy."""
    owners = [owner for operand in op.operands if (owner := _owner(operand))]
    return any(
        _target(owner) == "SPMDFullToShardShape"
        and _text(owner.attributes["mhlo.sharding"]) == "{manual}"
        for owner in owners
    )


def _axes(mesh: Any) -> tuple[list[tuple[str, int]], str]:
    """Read the names and sizes of a mesh's axes, and its device ids."""
    text = str(mesh.attributes["mesh"])
    sizes = [(name, int(size)) for name, size in re.findall(r'"([^"]*)"=(\d+)', text)]
    ids = re.search(r"device_ids=\[([\d, ]*)\]", text)
    return sizes, ids[1].replace(" ", "") if ids else ""


def _rows(attribute: Any) -> Groups:
    return tuple(map(tuple, np.array(attribute).tolist()))


def _array(kind: Any, path: str) -> tuple[str, int]:
    """Name a type as HLO does, with its elements."""
    kind = ir.RankedTensorType(kind)
    if not kind.has_static_shape:
        raise ValueError(
            f"{_CALLER}: {path} sends {kind}, of a size that is not known."
        )
    name = str(kind.element_type)
    name = _DTYPES.get(name) or re.sub(r"^i(?=\d)", "s", name)
    name = re.sub(r"^ui(?=\d)", "u", name).lower()
    return name, math.prod(kind.shape)
