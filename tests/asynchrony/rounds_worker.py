"""One process of the test of rounds: trains, mixes, and leaves model and events.

With a harm, it trains until that shows: ``cut`` closes the connections of worker 1's
collectives, ``stopped`` stops its process.
"""

import contextlib
import os
import signal
import socket
import sys
import time
from pathlib import Path

import jax
import numpy as np


def cut(coordinator: int) -> None:
    """Shut down every TCP connection but those to the coordinator."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=int(name)) as one:
            try:
                ends = one.getsockname()[1], one.getpeername()[1]
                if one.family != socket.AF_UNIX and coordinator not in ends:
                    one.shutdown(socket.SHUT_RDWR)
            finally:
                one.detach()  # it is another's


def main(worker: int, n: int, port: int, folder: Path, harm: str = "") -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")

    from bagua_jax import processes

    processes.initialize(
        coordinator_address=f"127.0.0.1:{port}",
        num_processes=n,
        process_id=worker,
        initialization_timeout=60,
    )

    from asynchrony.training import ALGORITHMS, Trainer, initial

    from bagua_jax import Workers
    from bagua_jax.asynchrony import Replica, Rounds

    def slowly(params):
        time.sleep(0.002 + 0.004 * worker)
        return train(params)

    if harm:
        replica, train = Replica(initial()), Trainer(worker)
        workers = Workers.devices(n)
        with Rounds(replica, ALGORITHMS["full"](), workers, timeout_s=3.0) as rounds:
            while replica.steps < 10**6:
                replica.step(slowly)
                if worker == 1 and rounds.rounds >= 5 and harm:
                    if harm == "cut":
                        cut(port)
                    else:
                        os.kill(os.getpid(), signal.SIGSTOP)
                    harm = ""

    for name in ("full", "low", "ring"):
        replica, train = Replica(initial()), Trainer(worker)
        with (
            open(folder / f"{name}-{worker}.jsonl", "w") as log,
            Rounds(replica, ALGORITHMS[name](), Workers.devices(n), log=log),
        ):
            for _ in range(40 - 12 * worker):  # they finish at different times
                replica.step(slowly)
        np.savez(folder / f"{name}-{worker}.npz", steps=train.steps, **replica.params)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), Path(sys.argv[4]), *sys.argv[5:])
