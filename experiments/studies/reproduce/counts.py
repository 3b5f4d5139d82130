"""What the compiled exchanges send between nodes, at the workloads' true sizes.

``python -m bagua_jax.experiments.studies.reproduce.counts`` compiles the update of each
algorithm on a mesh of 16 nodes of 8 devices over the workloads' parameters, counts the
collectives of the optimized programs, and writes ``counts.json``. 128 host devices
stand for the cluster; nothing runs. It takes about 25 minutes of one core. With
``--plan 16x8:h100`` the programs of VGG16 are compiled for 128 H100s instead.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import operator
import os
import re
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from bagua_jax.experiments.tables import survey
    from bagua_jax.wire import WireCount

__all__ = [
    "LIBRARY",
    "NODES",
    "PER_NODE",
    "PROGRAMS",
    "SCALES",
    "Program",
    "Sent",
    "between_nodes",
    "in_one_bucket",
    "measure",
    "measure_planned",
    "read",
]

NODES, PER_NODE = 16, 8
SCALES = (1, 2, 4, 8, 16)  # nodes, of the scaling table
LIBRARY = "bert_large"  # the workload on which every algorithm is counted


class Program(NamedTuple):
    """An exchange to compile.

    Attributes:
        algorithm: its name in the registry.
        options: its arguments, as a config writes them.
        hierarchical: whether nodes are the workers; else all 128 devices are.
    """

    algorithm: str
    options: Mapping[str, Any]
    hierarchical: bool = True


PROGRAMS: Mapping[str, Program] = {
    "allreduce": Program("gradient_allreduce", {}, hierarchical=False),
    "allreduce, hierarchical": Program("gradient_allreduce", {}),
    "ByteGrad": Program("bytegrad", {}),
    "QAdam, 8 bits": Program("qadam", {"learning_rate": 1e-3}),
    "QAdam, 1 bit": Program(
        "qadam",
        {"learning_rate": 1e-3, "compressor": "sign(l1)", "error_feedback": "both"},
    ),
    "decentralized, shift_one": Program("decentralized", {"topology": "shift_one"}),
    "decentralized, all": Program("decentralized", {"topology": "complete"}),
    "LPD": Program("low_precision_decentralized", {}),
    "async": Program("async_model_average", {"local_steps": 1, "staleness": 1}),
}
"""BAGUA's algorithms as its evaluation ran them, by our name for each."""

SCALED = ("allreduce, hierarchical", "ByteGrad")  # of the scaling table, on VGG16


class Sent(NamedTuple):
    """What one node sends to others in a step, in the long run.

    Attributes:
        bytes: of the node that sends most.
        busiest: bytes from one node to another, of the busiest pair of a step. Branches
            of a schedule are steps of their own; what always runs counts as another.
        messages: collectives that cross nodes, of one device.
        hops: inter-node hops, one after the other, where messages do not overlap: 1 for
            a permute or all-to-all, those on the longest way around a ring.
        inside: bytes that one device sends to others of its node.
        inside_hops: likewise inside a node.
    """

    bytes: float
    busiest: float
    messages: float
    hops: float
    inside: float
    inside_hops: float


def between_nodes(count: WireCount, nodes: np.ndarray) -> Sent:
    """Add up what a compiled program sends from node to node.

    A ring sends to the next device of its group, all-to-all to each alike.

    Args:
        count: of the program.
        nodes: the node of each device, from 0, in the order of the mesh.

    Example (a ring over two nodes of two devices crosses twice):
        >>> from bagua_jax import wire
        >>> text = '''HloModule step, replica_count=4
        ... ENTRY %main (x: f32[100]) -> f32[100] {
        ...   %x = f32[100]{0} parameter(0)
        ...   ROOT %sum = f32[100]{0} all-reduce(%x), replica_groups={{0,1,2,3}}
        ... }'''
        >>> sent = between_nodes(wire.count(text), np.array([0, 0, 1, 1]))
        >>> sent.bytes, sent.hops, sent.inside, sent.inside_hops
        (600.0, 3.0, 300.0, 3.0)
    """
    k = int(nodes.max()) + 1
    by_branch: dict[tuple[str, ...], np.ndarray] = {}
    messages, hops, inside_hops = 0.0, 0.0, 0.0
    for c in count.collectives:
        if c.bytes_sent == 0:
            continue
        groups = np.array(c.groups)
        if c.kind in ("collective-permute", "send"):
            source, target = groups.T
            each, rounds, inner = float(c.operand_bytes), 1, 1
        elif c.kind.endswith("all-to-all"):
            first, second = np.nonzero(~np.eye(c.group_size, dtype=bool))
            source, target = groups[:, first].ravel(), groups[:, second].ravel()
            each, rounds, inner = c.bytes_sent / (c.group_size - 1), 1, 1
        else:
            source, target = groups.ravel(), np.roll(groups, -1, axis=1).ravel()
            way = (2 if c.kind == "all-reduce" else 1) * (c.group_size - 1)
            rounds = _crossings(nodes[groups], way)
            each, inner = c.bytes_sent, way - rounds
        crosses = nodes[source] != nodes[target]
        if crosses.any():
            branch = tuple(re.findall(r"branch_\d+", c.path))
            sent = by_branch.setdefault(branch, np.zeros((k, k)))
            pairs = nodes[source[crosses]], nodes[target[crosses]]
            np.add.at(sent, pairs, c.weight * each)
            messages += c.weight
            hops += c.weight * rounds
        if not crosses.all():
            inside_hops += c.weight * inner
    total = sum(by_branch.values(), np.zeros((k, k)))
    return Sent(
        bytes=float(total.sum(axis=1).max()),
        busiest=sum(float(sent.max()) for sent in by_branch.values()),
        messages=messages,
        hops=hops,
        inside=count.bytes_inside(nodes),
        inside_hops=inside_hops,
    )


def _crossings(nodes: np.ndarray, hops: int) -> int:
    """Count the hops between nodes on the worst way of a chunk around its ring.

    >>> _crossings(np.array([[0, 0, 1, 1]]), 6)
    3
    """
    edges = np.cumsum(np.tile(nodes != np.roll(nodes, -1, axis=1), 2), axis=1)
    n = nodes.shape[1]
    laps, rest = divmod(hops, n)
    longest = edges[:, rest : rest + n] - edges[:, :n]
    return int((laps * edges[:, n - 1] + longest.max(axis=1)).max())


def measure(program: Program, params: Any, nodes: int, per_node: int) -> Sent:
    """Compile an exchange for a cluster, without running it, and count.

    Args:
        program: the exchange.
        params: tree of ``jax.ShapeDtypeStruct``.
        nodes: of the cluster.
        per_node: devices of each; nodes x per_node host devices must be there.

    Raises:
        ValueError: if the algorithm refuses a hierarchy, or that many workers.
    """
    import jax

    from bagua_jax import Workers
    from bagua_jax.experiments.tables import survey

    shape = (nodes, per_node) if program.hierarchical else nodes * per_node
    place = Workers.devices(shape, devices=jax.devices("cpu"))
    counted = survey.count(program.algorithm, program.options, params, place)
    return between_nodes(counted, np.repeat(np.arange(nodes), per_node))


def measure_planned(program: Program, params: Any, cluster: str) -> Sent:
    """Compile an exchange for a cluster of GPUs, with its own compiler, and count.

    Needs ``pip install 'bagua-jax[plan]'``.

    Args:
        program: the exchange.
        params: tree of ``jax.ShapeDtypeStruct``.
        cluster: such as ``16x8:h100``.
    """
    from bagua_jax import Workers, planning, wire
    from bagua_jax.experiments.tables import survey

    there = planning.Cluster.parse(cluster)
    shape = (there.num_nodes, there.per_node)
    place = Workers.abstract(shape if program.hierarchical else there.num_devices)
    step, args, specs = survey.program(
        program.algorithm, program.options, params, place
    )
    compiled = planning.compile(
        step, args, there, in_specs=specs, axis_name=place.axis_name
    )
    return between_nodes(wire.count(compiled), np.array(there.nodes))


def in_one_bucket(row: survey.Row) -> Program:
    """Let a configuration send its model as one vector, where it has buckets at all.

    A phase then is one message, and its latency is paid once.
    """
    from bagua_jax.algorithms import REGISTRY

    arguments = inspect.signature(REGISTRY[row.algorithm].factory).parameters
    whole = {"bucket_bytes": 2**40} if "bucket_bytes" in arguments else {}
    return Program(row.algorithm, {**row.options, **whole})


def read() -> dict[str, Any]:
    """Read the numbers of the last counting."""
    path = resources.files("bagua_jax.experiments.studies.reproduce") / "counts.json"
    return json.loads(path.read_text("utf-8"))


def main() -> int:
    """Compile and count everything, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path("experiments/studies/reproduce/counts.json")
    parser.add_argument("--numbers", type=Path, default=default)
    parser.add_argument(
        "--plan",
        metavar="CLUSTER",
        help="count the programs of VGG16 compiled for a cluster such as 16x8:h100, "
        "and nothing else",
    )
    parser.add_argument(
        "algorithms", nargs="*", help="count only these again; all where none is named"
    )
    arguments = parser.parse_args()

    # LLVM's optimizations take time and change no collective.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", NODES * PER_NODE)

    from bagua_jax.experiments.studies.models import WORKLOADS, flops, parameters
    from bagua_jax.experiments.tables import survey

    if arguments.plan:
        numbers = json.loads(arguments.numbers.read_text("utf-8"))
        params, found = parameters(WORKLOADS["vgg16"]), {}
        for label, program in PROGRAMS.items():
            print(arguments.plan, label, file=sys.stderr, flush=True)
            found[label] = measure_planned(program, params, arguments.plan)._asdict()
        numbers.setdefault("planned", {})[arguments.plan] = found
        arguments.numbers.write_text(json.dumps(numbers, indent=1) + "\n", "utf-8")
        return 0
    there = arguments.numbers.exists()
    kept = json.loads(arguments.numbers.read_text("utf-8")) if there else {}
    old = kept if arguments.algorithms else {}

    def count(program: Program, params: Any, *path: str, nodes: int = NODES) -> dict:
        """Count, or take what was counted before, of an algorithm not named."""
        if old and program.algorithm not in arguments.algorithms:
            return functools.reduce(operator.getitem, path, old)
        print(*path, file=sys.stderr, flush=True)
        return measure(program, params, nodes, PER_NODE)._asdict()

    shapes = {name: parameters(workload) for name, workload in WORKLOADS.items()}
    numbers: dict[str, Any] = {
        "workloads": {
            name: {
                "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes[name])),
                "leaves": len(jax.tree.leaves(shapes[name])),
                "flops_per_sample": flops(workload),
            }
            for name, workload in WORKLOADS.items()
        },
        "programs": {
            name: {
                label: count(program, shapes[name], "programs", name, label)
                for label, program in PROGRAMS.items()
            }
            for name in WORKLOADS
        },
        "scaling": {
            label: {
                str(n): count(
                    PROGRAMS[label], shapes["vgg16"], "scaling", label, str(n), nodes=n
                )
                for n in SCALES
            }
            for label in SCALED
        },
        "library": {
            survey.label(row): count(
                in_one_bucket(row), shapes[LIBRARY], "library", survey.label(row)
            )
            for row in survey.SURVEY
        },
    }
    numbers["planned"] = kept.get("planned", {})  # --plan counts these again
    arguments.numbers.write_text(json.dumps(numbers, indent=1) + "\n", "utf-8")
    print(arguments.numbers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
