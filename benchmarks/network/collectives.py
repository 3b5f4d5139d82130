"""How near to the wire single exchanges come, and what could stand in for them.

``python -m benchmarks.network.collectives --network 100mbit`` times XLA's collectives
over gloo on four processes: all-to-all at once, in the rounds of `bagua_jax.parts`, and
as n-1 permutes that carry the same rows; float16 sums against an exchange of bit-cast
halves; messages of several sizes. An exchange is timed three times in a row, as a token
bucket that was idle gives 10 ms away. "Ideal" is what a card of the stated rate needs
for the bytes alone, at the 95.5 % of it that TCP leaves. Writes
benchmarks/results/collectives.json.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.network import lab, machine, process

N, GOODPUT, IN_A_ROW = 4, 0.955, 3
MESSAGE_BYTES = 2**16  # of a round
RESULTS = Path(__file__).parents[1] / "results" / "collectives.json"
SIZES = (1 << 18, 1 << 20, 1 << 22)  # bytes of one worker's operand
# Bytes that a worker sends, per byte of its operand.
SENT = {
    "all_to_all": (N - 1) / N,
    "all_to_all in rounds": (N - 1) / N,
    "all_to_all by permutes": (N - 1) / N,
    "all_gather": N - 1,
    "all_gather by permutes": N - 1,
    "psum float32": 2 * (N - 1) / N,
    "psum float16": 2 * (N - 1) / N,
    "float16 by scatter-reduce": 2 * (N - 1) / N,
    "float16 by scatter-reduce in rounds": 2 * (N - 1) / N,
    "permute": 1,
}


def work(repeats: int) -> None:
    """Be one of the workers: time everything, print it as JSON."""
    process.connect_jax(threads=1)
    import jax.numpy as jnp
    import numpy as np
    from jax import lax

    from bagua_jax import Workers, parts, wire

    workers, axis = Workers.devices(), "workers"

    def rotations(rows):
        """Send row k to worker k, one distance after the other."""
        index = lax.axis_index(axis)
        out = [jnp.take(rows, index, axis=0)]
        for d in range(1, N):
            row = jnp.take(rows, (index + d) % N, axis=0)
            out.append(lax.ppermute(row, axis, [(i, (i + d) % N) for i in range(N)]))
        return jnp.stack(out)

    def ring_gather(x):
        out = [x]
        for _ in range(1, N):
            out.append(
                lax.ppermute(out[-1], axis, [(i, (i + 1) % N) for i in range(N)])
            )
        return jnp.stack(out)

    def scatter_reduce(x):
        bits = lax.bitcast_convert_type(x, jnp.uint16).reshape(N, -1)
        rows = lax.all_to_all(bits, axis, 0, 0, tiled=True)
        halves = lax.bitcast_convert_type(rows, jnp.float16)
        mean = jnp.mean(halves.astype(jnp.float32), axis=0).astype(jnp.float16)
        bits = lax.bitcast_convert_type(mean, jnp.uint16)
        return lax.all_gather(bits, axis, tiled=True)

    def exchange(x):
        return lax.all_to_all(x.reshape(N, -1), axis, 0, 0, tiled=True)

    shift = [(i, (i + 1) % N) for i in range(N)]
    operations = {
        "all_to_all": (np.uint8, exchange),
        "all_to_all in rounds": (np.uint8, exchange),
        "all_to_all by permutes": (np.uint8, lambda x: rotations(x.reshape(N, -1))),
        "all_gather": (np.uint8, lambda x: lax.all_gather(x, axis)),
        "all_gather by permutes": (np.uint8, ring_gather),
        "psum float32": (np.float32, lambda x: lax.psum(x, axis)),
        "psum float16": (np.float16, lambda x: lax.psum(x, axis)),
        "float16 by scatter-reduce": (np.float16, scatter_reduce),
        "float16 by scatter-reduce in rounds": (np.float16, scatter_reduce),
        "permute": (np.uint8, lambda x: lax.ppermute(x, axis, shift)),
    }
    found = {}
    for size in SIZES:
        programs = {}
        for name, (dtype, operation) in operations.items():
            length = size // np.dtype(dtype).itemsize
            if name.startswith("all_gather"):
                length //= N
            x = process.global_array(np.ones(length, dtype), workers.spec, workers.mesh)

            def probe(x, run=operation):
                """Read a little of every worker's part, or XLA sends less."""
                parts = jnp.reshape(run(x), (N, -1))[:, :1]
                return jnp.sum(parts.astype(jnp.float32))[None]

            if name.endswith("in rounds"):
                program = parts.split(
                    workers, probe, workers.spec, message_bytes=MESSAGE_BYTES
                )
                sent = program.count(x).bytes_per_worker
            else:
                program = workers.spmd(probe, in_specs=workers.spec)
                sent = wire.count(program.lower(x).compile()).bytes_per_worker
            expected = SENT[name] * x.nbytes / N
            if sent != expected:
                raise SystemExit(f"{name} sends {sent} bytes instead of {expected}.")
            program(x)
            programs[name] = program, x
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(repeats):
            for name, (program, x) in programs.items():
                start = time.perf_counter()
                for _ in range(IN_A_ROW):
                    program(x)
                seconds[name].append((time.perf_counter() - start) / IN_A_ROW)
        for name, times in seconds.items():
            found[f"{name}|{size}"] = 1e3 * statistics.median(times)
    print(json.dumps(found))


def main() -> int:
    """Measure, print the table, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=["100mbit", "unshaped"])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.repeats)
        return 0
    lab.enter()
    words = ["--work", "--repeats", str(arguments.repeats)]
    command = [sys.executable, "-m", "benchmarks.network.collectives", *words]
    facts = {"machine": machine.describe(), "workers": N, "networks": {}}
    console = Console(width=110)
    for name in arguments.networks:
        with lab.Lab(N, lab.NETWORKS[name]) as network:
            verified = network.verify()
            results = network.run(command)
        median = {k: statistics.median(r[k] for r in results) for k in results[0]}
        facts["networks"][name] = {**verified, "ms": median}
        rate = lab.NETWORKS[name].rate
        table = Table(title=f"{name}: median ms of {arguments.repeats}")
        table.add_column("operation", no_wrap=True)
        for column in ("operand, bytes", "sent, bytes", "ms", "ideal ms"):
            table.add_column(column, justify="right")
        for key, ms in median.items():
            operation, size = key.split("|")
            share = 1 / N if operation.startswith("all_gather") else 1
            operand = int(size) * share
            sent = SENT[operation] * operand
            ideal = f"{sent * 8e-3 / (rate * GOODPUT):.1f}" if rate else "-"
            table.add_row(
                operation, f"{operand:,.0f}", f"{sent:,.0f}", f"{ms:.1f}", ideal
            )
        console.print(f"{facts['machine']}; {name}: {verified}", highlight=False)
        console.print(table)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n")
    console.print(f"wrote {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
