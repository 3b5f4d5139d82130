"""Programs of several processes: how they find one another, and what they agree on.

Every process runs the same program, on workers of its own; ``jax.distributed`` joins
them. Collectives between processes go over gloo on CPUs and over NCCL on GPUs.
"""

import ipaddress
import json
import os
import socket
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

__all__ = [
    "Place",
    "count",
    "fetch",
    "find",
    "from_first",
    "hosts",
    "initialize",
    "is_first",
    "leave",
    "listening_address",
    "start",
]

PROCESS = "BAGUA_JAX_PROCESS"
"""What `bagua-jax launch` tells a process: its number and how many there are, "1/4"."""


_joined: list["Place"] = []


class Place(NamedTuple):
    """One process among those of a program.

    Attributes:
        index: its number, from 0.
        count: how many there are.
        launcher: who started them: ``"launch"``, ``"mpi4py"`` or ``"slurm"``.
        hosts: on how many hosts they are.
    """

    index: int
    count: int
    launcher: str
    hosts: int


def find() -> Place | None:
    """Find this process's place from what its launcher left in the environment.

    ``bagua-jax launch``, ``mpiexec`` (MPICH's or Open MPI's, with mpi4py installed) and
    SLURM's ``srun`` are known.

    Returns:
        Its place; ``None`` where nothing says that there are other processes.

    Raises:
        ValueError: if ``mpiexec`` started it and mpi4py is missing.
    """
    if PROCESS in os.environ:
        index, count = map(int, os.environ[PROCESS].split("/"))
        return Place(index, count, "launch", 1)
    if {"MPI_LOCALNRANKS", "OMPI_COMM_WORLD_SIZE"} & set(os.environ):
        try:
            from mpi4py import MPI  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError(
                "processes.start: mpiexec started this process, and mpi4py, through "
                f"which processes find one another, cannot be imported: {error}. "
                "Install mpi4py, or start with `bagua-jax launch`."
            ) from None
        world = MPI.COMM_WORLD
        hosts = len(set(world.allgather(socket.gethostname())))
        return Place(world.Get_rank(), world.Get_size(), "mpi4py", hosts)
    step = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID")
    if all(name in os.environ for name in (*step, "SLURM_LOCALID")):
        count = int(os.environ.get("SLURM_STEP_NUM_TASKS", os.environ["SLURM_NTASKS"]))
        hosts = int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
        return Place(int(os.environ["SLURM_PROCID"]), count, "slurm", hosts)
    return None


def listening_address(*, hosts: int = 1) -> str:
    """Find the address that this process's collectives listen on, or say what is wrong.

    gloo binds to what the host's name resolves to, and to nothing else. An address that
    is not this host's makes it hang; a loopback address keeps hosts apart.

    Args:
        hosts: on how many hosts the processes are.

    Returns:
        The address: of this host, and loopback or private.

    Raises:
        ValueError: if the name resolves to none, to another host's, to a public one,
            or to a loopback address although there are several hosts.
    """
    name = socket.gethostname()
    cure = f"Give this host's own private address to {name!r} in /etc/hosts."
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(
            f"processes.start: this host's name {name!r} resolves to no address that "
            f"collectives could listen on: {error}. {cure}"
        ) from None
    address = str(found[4][0])
    try:
        with socket.socket(found[0], socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        raise ValueError(
            f"processes.start: this host's name {name!r} resolves to {address}, which "
            f"is no address of this host: collectives would hang. {cure}"
        ) from None
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if parsed.is_global:
        raise ValueError(
            f"processes.start: this host's name {name!r} resolves to {address}, a "
            f"public address: whoever reaches it could join the collectives. {cure}"
        )
    if parsed.is_loopback and hosts > 1:
        raise ValueError(
            f"processes.start: this host's name {name!r} resolves to {address}, and "
            f"there are {hosts} hosts: the others cannot reach it. {cure}"
        )
    return address


def start(num_workers: int, *, heartbeat_seconds: int = 10) -> Place:
    """Join the other processes of this program. Call it before JAX is used.

    Each process gets as many of the workers as every other, in order. On a CPU it makes
    a host device for each of its own; on GPUs ``bagua-jax launch`` gives it its share
    of them, and MPI and SLURM one, by its number on its host.

    Args:
        num_workers: n, of all processes together.
        heartbeat_seconds: a process that is silent for so long is given up, and the
            others are stopped.

    Returns:
        Where this process is.

    Raises:
        ValueError: if there are no other processes to be found, n is no multiple of
            their number, or an address will not do.

    Example, in a program that ``mpiexec -n 2`` or ``srun -n 2`` starts::

        place = bagua_jax.processes.start(num_workers=8)
        workers = bagua_jax.Workers.devices()     # eight, four of them here
    """
    place = find()
    if place is None:
        raise ValueError(
            "processes.start: nothing in the environment says that there are other "
            "processes. Start the program with `bagua-jax launch -n 2 -- run CONFIG`, "
            "mpiexec (with mpi4py) or srun."
        )
    own, rest = divmod(num_workers, place.count)
    if rest or not own:
        raise ValueError(
            f"processes.start: {num_workers} workers cannot go equally to "
            f"{place.count} processes. Choose a number of workers that is a multiple."
        )
    address = listening_address(hosts=place.hosts)
    # Threads of XLA on a CPU. Fewer than two a device, and the collectives of jax 0.10
    # can wait for ever. Their number decides how matrix products are cut up, and so
    # the last bits: it must not depend on the number of processes.
    os.environ.setdefault("NPROC", str(2 * num_workers))
    jax.config.update("jax_num_cpu_devices", own)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    options: dict[str, Any] = {"heartbeat_timeout_seconds": heartbeat_seconds}
    if place.launcher == "launch":
        coordinator = os.environ["JAX_COORDINATOR_ADDRESS"]
        first = place.index * own
        options |= {
            "coordinator_address": coordinator,
            "coordinator_bind_address": coordinator,
            "num_processes": place.count,
            "process_id": place.index,
            "local_device_ids": list(range(first, first + own)),
        }
    else:
        # JAX's coordinator would listen on every interface; give it the private one.
        port = os.environ.setdefault("JAX_COORDINATOR_PORT", _port(place.launcher))
        host = f"[{address}]" if ":" in address else address
        options |= {
            "cluster_detection_method": place.launcher,
            "coordinator_bind_address": f"{host}:{port}",
        }
    initialize(**options)
    _joined.append(place)
    return place


def initialize(**options: Any) -> None:
    """Call ``jax.distributed.initialize``; on CPUs without JAX's compilation cache.

    XLA runs the collectives of a CPU program in the same order in every process, but in
    any order where a program was read from the cache and one of them stands in a branch
    (jaxlib 0.10.2 and 0.12.0): gloo then adds what does not belong together, or aborts.

    Args:
        **options: of ``jax.distributed.initialize``.

    Raises:
        RuntimeError: as ``jax.distributed.initialize``: if it was called before, or JAX
            was used before it.

    Example, in each of two processes that know their number:

        bagua_jax.processes.initialize(
            coordinator_address="10.0.0.1:9000", num_processes=2, process_id=index
        )
    """
    jax.distributed.initialize(**options)
    if _uses_gloo():
        jax.config.update("jax_enable_compilation_cache", False)


def _uses_gloo() -> bool:
    """Say whether collectives go over gloo: on CPUs, once processes are joined."""
    return jax.distributed.is_initialized() and jax.default_backend() == "cpu"


def require_own_programs(caller: str) -> None:
    """Refuse the cache that :func:`initialize` turns off.

    Args:
        caller: named in the error.

    Raises:
        ValueError: if processes are joined on CPUs, and JAX's compilation cache is on.
    """
    is_on = jax.config.values["jax_enable_compilation_cache"]
    folder = jax.config.values["jax_compilation_cache_dir"]
    if is_on and folder and _uses_gloo():
        raise ValueError(
            f"{caller}: on CPUs, programs of several processes must not come from "
            f"JAX's compilation cache, which is on ({folder}): read from there, they "
            "can run their collectives in another order than other processes do. Join "
            "them by bagua_jax.processes.initialize, which turns it off, or set the "
            "environment variable JAX_ENABLE_COMPILATION_CACHE=false."
        )


def leave(status: int) -> None:
    """End this process at once where it is one of several and has failed.

    A process of ``jax.distributed`` that ends in the usual way waits for the others,
    which may be waiting for it.

    Args:
        status: of the exit; with 0, or alone, nothing is done.
    """
    if status and _joined:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _port(launcher: str) -> str:
    """Choose a port for the coordinator on which its launcher lets all agree."""
    if launcher == "slurm":  # a function of the job, as JAX's own choice is
        return str(61440 + int(os.environ["SLURM_JOB_ID"]) % 4096)
    with socket.socket() as probe:  # the first process tells the others
        probe.bind(("", 0))
        return str(probe.getsockname()[1])


def count() -> int:
    """Count the processes of this program."""
    return jax.process_count()


def is_first() -> bool:
    """Say whether this is the process that writes and speaks for all."""
    return jax.process_index() == 0


def fetch(tree: Any) -> Any:
    """Copy arrays of all workers to this process.

    Every process must call it, in the same order.

    Args:
        tree: arrays on devices of any processes; no typed keys where there are several.

    Returns:
        Numpy arrays of the same shapes, equal in every process.

    Communication:
        Where there are several processes, an all-gather of each array.
    """
    if count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def hosts() -> list[str]:
    """Name the host of each process; every process must call it.

    Communication:
        An all-gather of 64 bytes.
    """
    name = np.zeros(64, np.uint8)
    text = socket.gethostname().encode()[:64]
    name[: len(text)] = np.frombuffer(text, np.uint8)
    rows = np.reshape(multihost_utils.process_allgather(name), (-1, 64))
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in rows]


def from_first(work: Callable[[], Any], error: type[Exception] = RuntimeError) -> Any:
    """Let the first process do something, and tell the others what came of it.

    Every process must call it, in the same order. With one process it is a call.

    Args:
        work: gives something that JSON can hold.
        error: raised in every process where it fails, with the same message.

    Returns:
        What ``work`` gave, in every process.

    Communication:
        Two broadcasts, of the length and of the text.
    """
    if count() == 1:
        return work()
    failure, told = None, ["", ""]
    if is_first():
        try:
            told = [json.dumps(work()), ""]
        except Exception as caught:
            failure, told = caught, ["null", str(caught) or repr(caught)]
    text = json.dumps(told).encode()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    room = max(1024, 1 << (length - 1).bit_length())  # few sizes: few compilations
    padded = np.zeros(room, np.uint8)
    if is_first():
        padded[:length] = np.frombuffer(text, np.uint8)
    padded = np.asarray(multihost_utils.broadcast_one_to_all(padded))
    value, message = json.loads(padded[:length].tobytes())
    if message:
        raise error(message) from failure
    return json.loads(value)
