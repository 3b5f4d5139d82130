"""Compile per-worker programs for clusters ahead of time, once, and remember."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P

from bagua_jax import extras
from bagua_jax.network import Network
from bagua_jax.network.base import require, require_at_least
from bagua_jax.planning.clusters import Cluster
from bagua_jax.planning.schedule import Schedule, read_schedule
from bagua_jax.primitives import AxisName, on_nodes
from bagua_jax.workers import Workers

__all__ = [
    "CompileError",
    "Compiled",
    "Constants",
    "Memory",
    "MissingCompiler",
    "compile",
    "compile_lowered",
    "lower",
]


class CompileError(RuntimeError):
    """XLA refused a program, or gave nothing."""


class MissingCompiler(CompileError):
    """What compiles for a cluster is not installed; the message says what is."""


class Constants(NamedTuple):
    """Constants of XLA's analytical ("SoL") model of links between GPUs.

    Attributes:
        nic_speed_gbps: gigabytes per second between nodes, of each GPU.
        rtt_us: round trip between nodes, in microseconds.
        chunk_prep_us: to prepare a chunk of a message.
        nccl_op_launch_us: to launch a collective.
        gpus_per_node: 0 for as many as the cluster has.

    Example (25 Gbit/s for each GPU):
        >>> Constants(25 / 8).nic_speed_gbps
        3.125
    """

    nic_speed_gbps: float
    rtt_us: float = 1.0
    chunk_prep_us: float = 1.0
    nccl_op_launch_us: float = 5.0
    gpus_per_node: int = 0

    @classmethod
    def of(cls, network: Network) -> Constants:
        """Take what a network says of the links between its nodes.

        A GPU has its share of the node's ports, at the bandwidth of the slowest link
        between nodes; the round trip is twice the longest latency. A network of one
        node has 100 GB/s and 1 us, which then cost nothing.

        Example (eight GPUs share a network card of 10 Gbit/s):
            >>> from bagua_jax import network
            >>> nic = Constants.of(network.preset("10gbit", 16, 8)).nic_speed_gbps
            >>> round(8 * 8 * nic, 3)
            9.415
        """
        between = network.nodes[:, None] != network.nodes
        if not between.any():
            return cls(100.0, gpus_per_node=network.num_devices)
        per_node = round(network.num_devices / network.num_nodes)
        share = min(network.ports / per_node, 1.0)
        speed = share * float(network.bandwidth[between].min()) / 1e9
        trip = 2e6 * float(network.latency[between].max())
        return cls(speed, rtt_us=trip, gpus_per_node=per_node)

    def __str__(self) -> str:
        """State them."""
        return (
            f"{self.nic_speed_gbps:.4g} GB/s per GPU between nodes, round trip "
            f"{self.rtt_us:.4g} us, chunk {self.chunk_prep_us:.4g} us, launch "
            f"{self.nccl_op_launch_us:.4g} us"
        )


class Memory(NamedTuple):
    """Bytes on one device, by XLA's own account; names as in ``memory_analysis()``."""

    argument_size_in_bytes: int
    output_size_in_bytes: int
    alias_size_in_bytes: int
    temp_size_in_bytes: int
    generated_code_size_in_bytes: int

    @property
    def total(self) -> int:
        """All at once; an output that takes an argument's place counts once."""
        arguments, outputs, aliases, temporaries, code = self
        return arguments + outputs - aliases + temporaries + code


class Compiled(NamedTuple):
    """A program compiled for a cluster: what it says, not something that runs.

    Attributes:
        cluster: what it is compiled for.
        constants: of XLA's model of links; ``None`` for XLA's own.
        hlo: optimized and scheduled HLO, as text.
        memory: of one device.
        schedule: XLA's predicted one; ``None`` for TPU and A100, where it has none.
        from_cache: whether it was read instead of compiled.
    """

    cluster: Cluster
    constants: Constants | None
    hlo: str
    memory: Memory
    schedule: Schedule | None
    from_cache: bool

    def as_text(self) -> str:
        """Return the optimized HLO, as ``jax.stages.Compiled`` does."""
        return self.hlo

    def memory_analysis(self) -> Memory:
        """Return the bytes on one device, as ``jax.stages.Compiled`` does."""
        return self.memory


def compile(
    fn: Callable[..., Any],
    args: tuple,
    cluster: Cluster,
    *,
    in_specs: Any = P(),  # noqa: B008
    axis_name: AxisName = "workers",
    constants: Constants | None = None,
    options: Mapping[str, Any] | None = None,
    **jit: Any,
) -> Compiled:
    """Compile a per-worker function for a cluster ahead of time.

    Args:
        fn: per-worker function, as ``Workers.spmd`` takes it.
        args: its arguments at the boundary, arrays or ``jax.ShapeDtypeStruct``, with a
            leading axis of ``cluster.num_devices`` where the spec says so.
        cluster: what to compile for.
        in_specs: as in ``Workers.spmd``.
        axis_name: ``"workers"``, or ``("node", "local")`` for a mesh of two axes.
        constants: of XLA's model of links, which its scheduler follows; XLA's own
            where ``None``. It has no such model for TPU and A100.
        options: of the compiler, such as
            ``{"xla_gpu_all_gather_combine_threshold_bytes": "1"}``.
        **jit: options of ``jax.jit``, such as ``donate_argnums``.

    Returns:
        The compiled program, as text, with its memory and its schedule.

    Raises:
        ValueError: specs that do not fit, or constants for a TPU slice or A100s.
        MissingCompiler: what compiles for this platform is not installed.
        CompileError: XLA refuses the program.

    Example (needs ``bagua-jax[plan]``)::

        cluster = Cluster.parse("16x8:h100")
        compiled = planning.compile(
            step, (state, batch), cluster,
            in_specs=(specs, P("workers")), constants=Constants(100 / 8),
        )
        wire.count(compiled), planning.timeline(compiled)
    """
    lowered = lower(fn, args, cluster, in_specs=in_specs, axis_name=axis_name, **jit)
    return compile_lowered(lowered, cluster, constants=constants, options=options)


def lower(
    fn: Callable[..., Any],
    args: tuple,
    cluster: Cluster,
    *,
    in_specs: Any = P(),  # noqa: B008
    axis_name: AxisName = "workers",
    **jit: Any,
) -> jax.stages.Lowered:
    """Lower a per-worker function for a cluster; needs no plugin and no device.

    Arguments and errors are those of :func:`compile`. One lowering serves many
    compilations, with other constants or options.
    """
    n = cluster.num_devices
    shape = n if isinstance(axis_name, str) else (cluster.num_nodes, cluster.per_node)
    workers = Workers.abstract(shape, axis_name)
    program = workers.spmd(fn, in_specs, **jit)
    placed = workers.placed(args, in_specs)
    with on_nodes(cluster.nodes):
        traced = program.trace(*placed)
    return traced.lower(lowering_platforms=(cluster.platform,))


def compile_lowered(
    lowered: jax.stages.Lowered,
    cluster: Cluster,
    *,
    constants: Constants | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compile what :func:`lower`, or a ``jax.jit`` on an abstract mesh, has lowered.

    A result is kept in the user's cache folder (``BAGUA_JAX_CACHE`` names another)
    under a digest of the program, the cluster, constants, options and versions, and
    read from there the next time. ``XLA_FLAGS`` and
    ``LIBTPU_INIT_ARGS`` of the environment have no part in it.

    Args:
        lowered: a program for ``cluster.num_devices`` partitions.
        cluster: what to compile for.
        constants: as in :func:`compile`.
        options: as in :func:`compile`.

    Raises:
        ValueError: constants for a TPU slice or A100s, or below 0.
        CompileError: as :func:`compile`.
    """
    if constants is not None:
        rule = "planning.compile: constants need a chip whose schedule XLA predicts"
        require(cluster.has_timeline, rule, cluster.text)
        for name, value in constants._asdict().items():
            least = 1e-9 if name == "nic_speed_gbps" else 0
            require_at_least("planning.compile", name, value, least)
    program = _FILES.sub("unknown", lowered.as_text(debug_info=True))
    request = {
        "topology": cluster.topology(),
        "options": (_NCCL if cluster.has_timeline else {}) | dict(options or {}),
        "flags": _flags(cluster, constants),
        "versions": _versions(cluster),
    }
    digest = hashlib.sha256(json.dumps([_FORMAT, request, program]).encode())
    path = _cache_folder() / f"{digest.hexdigest()[:40]}.json.gz"
    entry = _read(path)
    result = entry or _run(request, program)
    if entry is None:
        _write(path, result)
    schedule = result["schedule"]
    return Compiled(
        cluster=cluster,
        constants=constants,
        hlo=result["hlo"],
        memory=Memory(**result["memory"]),
        schedule=None if schedule is None else Schedule.of_json(schedule),
        from_cache=entry is not None,
    )


# From jax 0.12 on XLA makes kernels of its own of small all-reduces, which its model of
# links does not know; a step of NCCL's collectives can be timed.
_NCCL = (
    {"xla_gpu_experimental_use_collective_kernels": ""}
    if jax.__version_info__ >= (0, 12)
    else {}
)
_FORMAT = 3  # of what is kept; another number makes old entries unknown
_FILES = re.compile(r'"(?:[^"\\]|\\.)*":\d+:\d+(?: to (?:\d+)?:\d+)?')  # in a location


_DUMP = "--xla_dump_latency_hiding_schedule=true"


def _flags(cluster: Cluster, constants: Constants | None) -> list[str]:
    """List the XLA flags: the costs of every instruction, and the schedule's times."""
    if not cluster.has_timeline:
        gpu = cluster.platform == "cuda"
        return ["--xla_gpu_enable_analytical_sol_latency_estimator=false"] * gpu
    flags = [
        "--xla_gpu_enable_analytical_sol_latency_estimator=true",
        "--xla_gpu_collect_cost_model_stats=true",
        _DUMP,
    ]
    if constants is not None:
        gpus = constants.gpus_per_node or cluster.per_node
        stated = constants._replace(gpus_per_node=gpus)._asdict().items()
        written = ",".join(f"{name}={value:.9g}" for name, value in stated)
        flags.append(f"--xla_gpu_analytical_latency_estimator_options={written}")
    return flags


# --- what is installed --------------------------------------------------------------

_PLUGINS = {"cuda": ("jax-cuda13-plugin", "jax-cuda12-plugin"), "tpu": ("libtpu",)}


def _versions(cluster: Cluster) -> dict[str, str]:
    found = {}
    for name in ("jax", "jaxlib", *_PLUGINS[cluster.platform]):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if not found.keys() & {*_PLUGINS[cluster.platform]}:
        raise MissingCompiler(
            f"planning.compile: compiling for {cluster.text} needs "
            f"{_PLUGINS[cluster.platform][0]}, which is not installed: "
            "pip install 'bagua-jax[plan]' (5 GB of disk; no GPU or TPU is needed)."
        )
    return found


# --- the process that compiles ------------------------------------------------------


def _run(request: Mapping[str, Any], program: str) -> dict[str, Any]:
    """Compile in a process of its own, whose XLA reads these flags."""
    with tempfile.TemporaryDirectory(prefix="bagua-jax-plan-") as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(request), "utf-8")
        (folder / "program.mlir").write_text(program, "utf-8")
        flags = request["flags"]
        if _DUMP in flags:
            flags = [*flags, f"--xla_dump_to={folder}"]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",  # whatever is attached stays out of it
            "XLA_FLAGS": " ".join(flags),
            "LIBTPU_INIT_ARGS": "",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TF_CPP_MIN_LOG_LEVEL": "2",
        }
        child = Path(__file__).with_name("child.py")
        done = subprocess.run(
            [sys.executable, "-P", str(child), name],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        try:
            result = json.loads((folder / "result.json").read_text("utf-8"))
        except (OSError, ValueError):
            said = "\n".join(done.stdout.strip().splitlines()[-12:])
            raise CompileError(
                "planning.compile: the compiler gave nothing for "
                f"{request['topology']['platform']} with versions "
                f"{request['versions']} (exit status {done.returncode}):\n{said}"
            ) from None
        if _DUMP not in flags:
            return result | {"schedule": None}
        texts = [p.read_text("utf-8") for p in folder.glob("*.schedule.txt")]
        # A program without collectives is not scheduled: XLA then writes no file.
        schedule = read_schedule(texts[0]).computations if texts else ()
        return result | {"schedule": schedule}


# --- the cache ----------------------------------------------------------------------


def _cache_folder() -> Path:
    if named := os.environ.get("BAGUA_JAX_CACHE"):
        return Path(named)
    try:
        import platformdirs
    except ModuleNotFoundError as error:
        raise ImportError(extras.missing(error, "planning.compile")) from None
    return Path(platformdirs.user_cache_dir("bagua-jax"))


def _read(path: Path) -> dict[str, Any] | None:
    """Read an entry; one that is missing, cut short or of another form is none."""
    try:
        entry = json.loads(gzip.decompress(path.read_bytes()))
        Memory(**entry["memory"])
        return entry if {"hlo", "schedule"} <= entry.keys() else None
    except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError):
        return None  # gzip checks what it unpacks


def _write(path: Path, entry: Mapping[str, Any]) -> None:
    """Write an entry as a whole or not at all; one that cannot be kept is no error."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_bytes(gzip.compress(json.dumps(entry).encode(), 6))
        os.replace(part, path)
