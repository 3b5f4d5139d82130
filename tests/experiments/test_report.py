"""What people look at: progress, the table's numbers, curves."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from rich.console import Console

from bagua_jax import Workers, primitives, schedules, worker_local
from bagua_jax.experiments.runs.progress import progress
from bagua_jax.experiments.runs.train import wire_facts
from bagua_jax.experiments.tables import report
from bagua_jax.experiments.tables.comparison import Result


def shown(width: int, *, terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width)
    with progress(console, "low_precision_decentralized", 0, 300) as show:
        for step in range(10, 301, 10):
            show(step, 1.5, 20.0, "accuracy 0.912")
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_a_live_bar(width):
    text = shown(width, terminal=True)
    assert "300/300" in text and "low_precision_decentralized" in text
    assert "loss 1.5000  20.0 steps/s" in text


def test_elsewhere_a_line_for_each_tenth():
    lines = shown(80, terminal=False).splitlines()
    assert lines[0] == (
        "low_precision_decentralized: step 30/300  loss 1.5000  20.0 steps/s  "
        "accuracy 0.912"
    )
    assert len(lines) == 10


def test_curves_are_smoothed_without_delay():
    line = np.arange(20.0)
    np.testing.assert_allclose(report._smooth(line, 3)[:17], line[:17])
    np.testing.assert_allclose(report._smooth(line, 0), line)


def summary(label: str, accuracy: float, **more) -> dict:
    return {
        "label": label,
        "eval/accuracy": accuracy,
        "train/loss_last_10": 0.25,
        "consensus/distance_sq": 0.0,
        "wire": {"bytes_per_worker": 1234.0, "messages_per_worker": 0.25},
        "time/steps_per_s": 12.34,
    } | more


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_is_whole_on_narrow_and_wide_terminals(width):
    console = Console(file=io.StringIO(), width=width)
    spread = {"eval/accuracy_worker_min": 0.9, "eval/accuracy_worker_max": 0.95}
    rows = [
        summary("low_precision_decentralized", 0.912),
        summary("decentralized", 0.934, **spread, wire=None),
    ]
    results = [Result(None, row) for row in rows]
    console.print(report._table(results, console.width))
    text = console.file.getvalue()
    words = ["low_precision_decentralized", "91.2%", "1.23 kB", "0.25", "12.3", "not"]
    if width == 120:
        words += ["90.0–95.0%", "same", "consensus", "not counted"]
    for word in words:
        assert word in text
    assert "…" not in text


def test_branches_of_share_zero_are_the_warm_up():
    workers = Workers.devices(4)

    def step(count, x):
        def mean(x):
            exact = primitives.c_fp_s(x, axis_name="workers")
            return worker_local(exact, "workers")

        return schedules.switch(count, [mean, lambda x: x], x, shares=(0, 1))

    program = workers.spmd(step, in_specs=(P(), workers.spec))
    compiled = program.lower(jnp.int32(0), jnp.ones((4, 100))).compile()
    facts = wire_facts(compiled.as_text(), {"warmup_steps": 7})
    assert facts is not None
    assert facts["bytes_per_worker"] == facts["messages_per_worker"] == 0
    assert facts["warmup_bytes_per_worker"] == 600
    assert facts["warmup_steps"] == 7
    assert wire_facts(None, {}) is None
