"""Programs of several processes: how they find one another, and what they agree on.

Every process runs the same program, on workers of its own; ``jax.distributed`` joins
them. Collectives between processes go over gloo on CPUs and over NCCL on GPUs.
"""

import contextlib
import errno
import functools
import hashlib
import ipaddress
import json
import os
import re
import socket
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import distributed  # the coordinator's store has no public name
from jax.experimental import multihost_utils

__all__ = [
    "Place",
    "code_identity",
    "count",
    "differences",
    "environment",
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

_PATIENCE_MS = 60_000
"""How long joined processes wait for one another while they are compared."""
_SHOWN = 5
"""Differences that a message names."""

_joining = False
"""Whether this process has begun to join others."""


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
        ValueError: if ``mpiexec`` started it and mpi4py is missing, or a variable of
            ``bagua-jax launch`` holds something else.
    """
    if PROCESS in os.environ:
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", os.environ[PROCESS], re.ASCII)
        index, count = map(int, found.groups()) if found else (0, 0)
        if index >= count or "JAX_COORDINATOR_ADDRESS" not in os.environ:
            raise ValueError(
                f"processes.find: {PROCESS} must be a process's number and how many "
                "there are, such as 1/4, beside the address in "
                f"JAX_COORDINATOR_ADDRESS; got {os.environ[PROCESS]!r}. "
                "`bagua-jax launch` sets both: unset them, and start with it."
            )
        return Place(index, count, "launch", 1)
    if {"MPI_LOCALNRANKS", "OMPI_COMM_WORLD_SIZE"} & set(os.environ):
        try:
            from mpi4py import MPI  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError(
                "processes.start: mpiexec started this process, and mpi4py, through "
                f"which processes find one another, cannot be imported: {error}. "
                "pip install 'bagua-jax[mpi]', or start with `bagua-jax launch`."
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


def start(
    num_workers: int,
    *,
    heartbeat_seconds: int = 10,
    facts: Mapping[str, Any] | None = None,
) -> Place:
    """Join the other processes of this program. Call it before JAX is used.

    Each process gets as many of the workers as every other, in order. On a CPU it makes
    a host device for each of its own; on GPUs ``bagua-jax launch`` gives it its share
    of them, and MPI and SLURM one, by its number on its host.

    Args:
        num_workers: n, of all processes together.
        heartbeat_seconds: a process that is silent for so long is given up, and the
            others are stopped.
        facts: name and value of what must be equal in all processes, such as the fields
            of a config; see :func:`initialize`. The number of workers and of XLA's
            threads is added.

    Returns:
        Where this process is.

    Raises:
        ValueError: if there are no other processes to be found, n is no multiple of
            their number, an address will not do, or processes differ.
        ConnectionError: if they cannot be joined now, and may be another time.

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
        if place.index == 0:
            _require_free(f"{host}:{port}")
    own_facts = {"workers": num_workers, "NPROC": os.environ["NPROC"]}
    initialize(facts={**(facts or {}), **own_facts}, **options)
    return place


def initialize(*, facts: Mapping[str, Any] | None = None, **options: Any) -> None:
    """Call ``jax.distributed.initialize``, and compare the processes that have joined.

    Every process compares its facts with the first process's. The versions of jax,
    jaxlib and this package, and :func:`code_identity`, are always among them. Processes
    that differ would run different programs: their collectives hang, or add what does
    not belong together.

    JAX's compilation cache is turned off on CPUs.

    XLA runs the collectives of a CPU program in the same order in every process, but in
    any order where a program was read from the cache and one of them stands in a branch
    (jaxlib 0.10.2 and 0.12.0): gloo then adds what does not belong together, or aborts.

    Args:
        facts: name and value of what must be equal in all processes.
        **options: of ``jax.distributed.initialize``.

    Raises:
        ValueError: in every process, if one differs from the first: with its number,
            the names and both values. In the first process, if its address is no
            ``host:port`` that this host can listen on.
        ConnectionError: if the processes cannot be joined now, and may be another time:
            the coordinator's port is taken, or others did not come.
        RuntimeError: as ``jax.distributed.initialize``: if it was called before, or JAX
            was used before it.

    Communication:
        Through the coordinator: the facts of the first process to all, and a verdict of
        each. No program is compiled.

    Example, in each of two processes that know their number:

        bagua_jax.processes.initialize(
            coordinator_address="10.0.0.1:9000", num_processes=2, process_id=index
        )
    """
    global _joining
    address = options.get("coordinator_address")
    bind = options.get("coordinator_bind_address")
    for given in (address, bind):
        if given is not None:
            _split(given)
    if bind is not None and options.get("process_id") == 0:
        _require_free(bind)
    _joining = True
    try:
        jax.distributed.initialize(**options)
        difference = _difference(environment() | dict(facts or {}))
    except jax.errors.JaxRuntimeError as error:
        raise ConnectionError(
            "processes.initialize: the processes could not be joined"
            f"{f' at {address}' if address else ''}: {error}"
        ) from error
    if difference:
        jax.distributed.shutdown()  # waits for all: each has read what is wrong
        raise ValueError(f"processes.initialize: {difference}")
    if _uses_gloo():
        jax.config.update("jax_enable_compilation_cache", False)


def _split(address: str) -> tuple[str, int]:
    """Read ``host:port``, as in ``127.0.0.1:9000`` or ``[::1]:9000``."""
    host, _, port = address.rpartition(":")
    if not host or not re.fullmatch(r"\d{1,5}", port) or not 0 < int(port) < 2**16:
        raise ValueError(
            "processes.initialize: a coordinator's address must be host:port, with a "
            f"port from 1 to 65535; got {address!r}. Mend it where it is set: in the "
            "call, or in the environment variable JAX_COORDINATOR_ADDRESS or "
            "JAX_COORDINATOR_PORT."
        )
    return host.strip("[]"), int(port)


def _require_free(address: str) -> None:
    """Refuse an address that the coordinator cannot listen on.

    gRPC, left alone, crashes on one that is not this host's, and shares a port with
    another coordinator of the same user, whose processes would be mixed with these.
    """
    host, port = _split(address)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(found[0], socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(found[4])
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        message = (
            "processes.initialize: the coordinator cannot listen on "
            f"{address}: {why}. Choose another"
        )
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise ConnectionError(f"{message} port, or start again.") from None
        raise ValueError(
            f"{message} address, one of this host's own, in the call or in "
            "JAX_COORDINATOR_ADDRESS; `bagua-jax launch` needs none there."
        ) from None


@functools.cache
def code_identity() -> str:
    """Identify this package's source: a hash over its files' names and contents.

    Returns:
        16 hexadecimal digits, the same for equal source wherever it is installed.
    """
    root, digest = Path(__file__).parent, hashlib.sha256()
    paths = [
        Path(folder, name)
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if name.endswith(".py")
    ]
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        text = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(text)} ".encode())
        digest.update(text)
    return digest.hexdigest()[:16]


def differences(
    own: Mapping[str, str], here: str, theirs: Mapping[str, str], there: str
) -> str:
    """Say where two sides' facts differ, with both values; nothing where they agree.

    Example:
        >>> differences({"jax": "0.10"}, "worker 1", {"jax": "0.12"}, "worker 0")
        'jax is 0.10 in worker 1 and 0.12 in worker 0'
    """
    absent = "nothing"
    names = [
        k for k in {**theirs, **own} if theirs.get(k, absent) != own.get(k, absent)
    ]
    fields = [
        f"{k} is {own.get(k, absent):.200} in {here} and "
        f"{theirs.get(k, absent):.200} in {there}"
        for k in names[:_SHOWN]
    ]
    return "; ".join(
        fields + [f"and {len(names) - _SHOWN} more"] * (len(names) > _SHOWN)
    )


def environment() -> dict[str, Any]:
    """Collect what must be equal in all processes, whatever they run."""
    packages = ("jax", "jaxlib", "bagua-jax")
    versions = {}
    for package in packages:
        try:
            versions[f"version of {package}"] = metadata.version(package)
        except metadata.PackageNotFoundError:  # used from a checkout
            versions[f"version of {package}"] = None
    return versions | {"hash of bagua_jax's source": code_identity()}


def _difference(facts: Mapping[str, Any]) -> str:
    """Compare this process's facts with the first's; say where any process differs.

    Returns:
        What differs in the first process that does, the same text in all; else nothing.
    """
    state = distributed.global_state
    store: Any = state.client
    me = state.process_id
    own = {name: repr(value) for name, value in facts.items()}
    if me == 0:
        store.key_value_set("bagua_jax/facts", json.dumps(own))
    first = json.loads(store.blocking_key_value_get("bagua_jax/facts", _PATIENCE_MS))
    differs = differences(own, f"process {me}", first, "process 0")
    verdict = (
        f"process {me} on host {socket.gethostname()} differs from process 0: "
        f"{differs}. Start all with the same code, versions and settings."
    )
    store.key_value_set(f"bagua_jax/verdicts/{me:09}", verdict if differs else "same")
    store.wait_at_barrier("bagua_jax/compared", _PATIENCE_MS)
    verdicts = sorted(store.key_value_dir_get("bagua_jax/verdicts/"))
    return next((text for _, text in verdicts if text != "same"), "")


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
    if status and _joining:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # it may be a log on a full disk
                stream.flush()
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
