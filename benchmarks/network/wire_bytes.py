"""Does a network card send what `bagua_jax.wire.count` says? Measured, and judged.

``python -m benchmarks.network.wire_bytes`` runs BAGUA's algorithms on four processes
(jax.distributed, gloo), each in a network namespace of its own, and compares the bytes
that leave by ``eth0`` in a number of steps with the count of the compiled program.
Nothing is subtracted: frames are measured with their headers. Prints a table, writes
benchmarks/results/wire_bytes.json, and ends with status 1 if any algorithm differs on
any worker by more than 3 %, 77 if namespaces are not allowed here.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.network import lab, machine, process

N, WIDTH, LAYERS, BATCH, TOLERANCE = 4, 1024, 2, 8, 0.03
RESULTS = Path(__file__).parents[1] / "results" / "wire_bytes.json"


class Case(NamedTuple):
    """An algorithm in one of its phases."""

    algorithm: str
    options: dict[str, Any] = {}
    steps: int = 8  # a multiple of its period
    before: int = 2  # steps that are not measured
    branch_shares: tuple[float, ...] | None = None  # where the phase is not the last


CASES = {
    "gradient_allreduce": Case("gradient_allreduce"),
    "bytegrad": Case("bytegrad"),
    "qadam, warm-up": Case("qadam", {"warmup_steps": 100}, branch_shares=(1, 0)),
    "qadam, after it": Case("qadam", {"warmup_steps": 2}),
    "decentralized, ring": Case("decentralized", {"topology": "ring"}),
    "decentralized, one_peer_exponential": Case(
        "decentralized", {"topology": "one_peer_exponential"}
    ),
    "low_precision_decentralized, ring": Case("low_precision_decentralized"),
    "async_model_average, period 4, staleness 1": Case(
        "async_model_average", {"local_steps": 4, "staleness": 1}, steps=16, before=4
    ),
}


# --- one worker -----------------------------------------------------------------------


def work(names: list[str]) -> None:
    """Be one of the workers: measure all cases, print them as JSON."""
    process.connect_jax()
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from bagua_jax import Workers, algorithms, value_and_grad, wire, worker_local

    workers = Workers.devices()
    rng = np.random.default_rng(process.worker())
    batch = rng.standard_normal((BATCH, WIDTH)).astype(np.float32)
    batch = process.global_array(batch, workers.spec, workers.mesh)

    def loss(params, x):
        for weights in params:
            x = jnp.tanh(x @ weights)
        return jnp.mean(x**2)

    def prepare(case: Case):
        """Return the state and the training step of a case."""
        entry = algorithms.REGISTRY[case.algorithm]
        if entry.is_optimizer:
            tx = entry.factory(1e-3, axis_name="workers", **case.options)
        else:
            relaxation = entry.factory(axis_name="workers", **case.options)
            parts = [relaxation, optax.sgd(0.1)]
            tx = optax.chain(*(parts[::-1] if entry.own_params else parts))

        def init():
            keys = jax.random.split(jax.random.key(0), LAYERS)
            params = [jax.random.normal(k, (WIDTH, WIDTH)) / 32 for k in keys]
            if entry.own_params:
                params = worker_local(params, "workers")
            return params, tx.init(params)

        def train_step(state, x):
            params, inner = state
            _, grads = value_and_grad(loss, "workers")(params, x)
            updates, inner = tx.update(grads, inner, params)
            return optax.apply_updates(params, updates), inner

        specs = (workers.specs(init), workers.spec)
        return workers.spmd(init)(), workers.spmd(train_step, in_specs=specs)

    found = {}
    for name in names:
        case = CASES[name]
        state, step = prepare(case)
        program = step.lower(state, batch).compile()
        counted = wire.count(program)
        if case.branch_shares:
            # The conditional that says "after the warm-up", by its own name.
            paths = "\n".join(c.path for c in counted.collectives)
            found_in = re.findall(r"^(.*branch_shares\([^/]*/[^/]*)", paths, re.M)
            shares = dict.fromkeys(found_in, case.branch_shares)
            counted = wire.count(program, branch_shares=shares)

        def run(state, count, program=program):
            for _ in range(count):
                state = jax.block_until_ready(program(state, batch))
            return state

        state = run(state, case.before)
        start = process.sent_bytes()
        run(state, case.steps)
        sent = (process.sent_bytes() - start) / case.steps
        found[name] = {
            "counted": counted.bytes_per_worker,
            "messages": counted.messages_per_worker,
            "sent": sent,
        }
    print(json.dumps(found))


# --- all of them ----------------------------------------------------------------------


def main() -> int:
    """Measure, print the table, write the numbers; 1 if any does not agree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=lab.NETWORKS, default="unshaped")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.cases)
        return 0

    lab.enter()
    words = ["--work", "--cases", *arguments.cases]
    command = [sys.executable, "-m", "benchmarks.network.wire_bytes", *words]
    with lab.Lab(N, lab.NETWORKS[arguments.network]) as network:
        measured = network.verify()
        results = network.run(command)

    console, rows = Console(width=110), []
    table = Table(title="bytes sent per worker and step")
    table.add_column("algorithm", no_wrap=True)
    for column in ("counted", "at eth0", "difference", "smallest", "largest"):
        table.add_column(column, justify="right")
    for name in arguments.cases:
        counted = results[0][name]["counted"]
        sent = [result[name]["sent"] for result in results]
        difference = sum(sent) / len(sent) / counted - 1
        rows.append(
            {
                "algorithm": name,
                "steps": CASES[name].steps,
                "messages": results[0][name]["messages"],
                "counted_bytes": counted,
                "sent_bytes": sent,
                "difference": difference,
                "agrees": all(abs(s / counted - 1) <= TOLERANCE for s in sent),
            }
        )
        table.add_row(
            name,
            f"{counted:,.0f}",
            f"{sum(sent) / len(sent):,.0f}",
            f"{difference:+.2%}" + ("" if rows[-1]["agrees"] else " !"),
            *(f"{extreme / counted - 1:+.2%}" for extreme in (min(sent), max(sent))),
        )
    facts = {
        "machine": machine.describe(),
        "network": {"name": arguments.network, **measured},
        "workers": N,
        "parameters": LAYERS * WIDTH**2,
        "tolerance": TOLERANCE,
        "rows": rows,
    }
    console.print(f"{facts['machine']}; network {facts['network']}", highlight=False)
    console.print(table)
    if arguments.cases == list(CASES):  # a part is a trial, and replaces nothing
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(facts, indent=1) + "\n")
        console.print(f"wrote {RESULTS}")
    return 0 if all(row["agrees"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
