"""What a worker's process needs: its place among the others, and its bytes on eth0."""

import os
import time
from pathlib import Path

__all__ = ["connect_jax", "global_array", "network", "sent_bytes", "worker", "workers"]


def worker() -> int:
    """Return this worker's index."""
    return int(os.environ["WORKER"])


def workers() -> int:
    """Return the number of workers."""
    return int(os.environ["WORKERS"])


def network() -> str:
    """Return the name of the lab's network."""
    return os.environ["NETWORK"]


def connect_jax(threads: int | None = None, port: int = 0) -> None:
    """Join this process to the others by jax.distributed, on CPU over gloo.

    Args:
        threads: that compute; ``None`` for as many as there are cores.
        port: of the coordinator, counted from the usual one.
    """
    if threads is not None:
        os.environ["NPROC"] = str(threads)
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    host, usual = os.environ["COORDINATOR"].split(":")

    from bagua_jax import processes

    processes.initialize(
        coordinator_address=f"{host}:{int(usual) + port}",
        num_processes=workers(),
        process_id=worker(),
        initialization_timeout=120,
    )


def global_array(local, spec, mesh):
    """Make an array of all workers' rows from this worker's [...]."""
    import jax

    sharding = jax.sharding.NamedSharding(mesh, spec)
    return jax.make_array_from_process_local_data(sharding, local[None])


def sent_bytes(device: str = "eth0", quiet_s: float = 0.3) -> int:
    """Read how many bytes left by a network card, once nothing leaves any more.

    Frames count with their headers, as Linux counts them: one header for a frame of up
    to 64 KB that the card would cut up.
    """

    def now() -> int:
        text = Path("/proc/self/net/dev").read_text()
        columns = text.partition(f"{device}:")[2].split()
        return int(columns[8])

    # The coordinator's heartbeats are some 100 bytes.
    last = now()
    while True:
        time.sleep(quiet_s)
        latest = now()
        if latest - last < 1000:
            return latest
        last = latest
