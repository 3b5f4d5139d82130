"""One process of the test of pair gossip: trains until it is told to stop."""

import sys
import time
from pathlib import Path

import jax
import numpy as np


def main(worker: int, folder: Path, addresses: list[str]) -> None:
    jax.config.update("jax_platforms", "cpu")

    from asynchrony.training import Trainer, initial

    from bagua_jax.asynchrony import PairGossip, Replica

    replica = Replica(initial())
    gossip = PairGossip(
        replica,
        worker=worker,
        addresses=addresses,
        secret=(folder / "secret").read_bytes(),
        timeout_s=2.0,
    )
    Trainer(worker)  # compiles before the others wait for this worker
    with (
        open(folder / f"steps-{worker}.txt", "a", buffering=1) as progress,
        gossip,
    ):
        train = Trainer(worker, start=replica.steps)
        print(f"starts at {replica.steps}", file=progress)
        while not (folder / "stop").exists():
            time.sleep(0.01)
            loss = replica.step(train)
            print(f"{replica.steps} {gossip.exchanges} {loss:.6f}", file=progress)
    np.savez(folder / f"{worker}.npz", **replica.params)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
