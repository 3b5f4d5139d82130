"""What the benchmark against PyTorch makes of its measurements."""

import importlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from bagua_jax.experiments.runs.integrity import Journal


@pytest.fixture
def versus_ddp(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    return importlib.import_module("benchmarks.network.versus_ddp")


def facts(**medians):
    cases = {case: {"step_ms": [ms, 0.0, 1e6]} for case, ms in medians.items()}
    return {"networks": {n: {"cases": cases} for n in ("100mbit", "1gbit", "unshaped")}}


def test_ratios_are_of_medians_and_know_their_goals(versus_ddp):
    rows = versus_ddp.ratios(facts(bytegrad=50.0, ddp=200.0, local_sgd=30.0))
    assert [row["ratio"] for row in rows] == [0.25] * 3  # a pair needs both sides
    assert [row["target"] for row in rows] == [0.28, None, versus_ddp.UNSHAPED_TARGET]


@pytest.mark.parametrize(
    ("losses", "target", "steps"),
    [
        ([(0, 2.0), (10, 0.4), (20, 0.3), (30, 0.35)], 0.3, 20),
        ([(0, 2.0), (10, 0.4)], 0.3, None),
        ([(0, 2.0), (10, 0.2), (20, None)], 0.3, None),  # it diverged afterwards
        ([], 0.3, None),
    ],
)
def test_steps_to_a_loss(versus_ddp, losses, target, steps):
    assert versus_ddp.steps_to(losses, target) == steps


def test_steps_of_a_warm_up_take_the_time_of_an_all_reduce(versus_ddp):
    cases = facts(qadam=10.0, bytegrad=10.0, gradient_allreduce=100.0)
    cases = cases["networks"]["100mbit"]["cases"]
    assert versus_ddp.seconds_to(None, "bytegrad", cases) is None
    assert versus_ddp.seconds_to(60, "bytegrad", cases) == pytest.approx(0.6)
    # 50 steps of warm-up, ten after it
    assert versus_ddp.seconds_to(60, "qadam", cases) == pytest.approx(5.1)
    assert versus_ddp.seconds_to(30, "qadam", cases) == pytest.approx(3.0)
    del cases["gradient_allreduce"]
    assert versus_ddp.seconds_to(60, "qadam", cases) is None


@pytest.mark.parametrize(
    ("losses", "found"), [([2.0, 1.004], 0), ([2.0, 1.02], 1), ([2.0, None], 1)]
)
def test_a_case_in_one_program_must_train_alike(versus_ddp, losses, found):
    def curve(values):
        return [(10 * k, loss) for k, loss in enumerate(values)]

    curves = {
        "bytegrad": curve([2.0, 1.0, 0.5]),
        "bytegrad, one program": curve(losses),
        "qadam": curve([3.0]),
    }
    assert len(versus_ddp.differing(curves)) == found


@pytest.fixture
def soak(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    return importlib.import_module("benchmarks.soak")


def write_journal(path: Path, records: list[dict]) -> None:
    Journal(path, "run", records).close()


def asynchronous_run(soak, root: Path, mode: str = "rounds"):
    """Write what a sound run of two workers leaves; return its plan and its folder."""
    folder = root / "quadratic" / "async-mean-s0"
    folder.mkdir(parents=True)
    for worker in range(2):
        lines = [{"starts": 0}, {"step": 75}, {"starts": 50}, {"step": 100}]
        write_journal(folder / f"steps-{worker}.jsonl", lines)
        (folder / f"models-{worker}.f32").write_bytes(bytes(2 * 4 * 8))
    metrics = [
        {"eval/distance_to_optimum": distance, "consensus/distance_sq": 0.0}
        for distance in (5.0, 0.01)
    ]
    write_journal(folder / "metrics.jsonl", metrics)
    return soak.Plan(mode, mode, 2, 2, 100), folder


def test_a_soaked_run_is_judged(soak, tmp_path):
    plan, folder = asynchronous_run(soak, tmp_path)
    assert soak.lost(plan, tmp_path) == []

    def lost_with(name: str, records: list[dict], after: bytes = b"") -> list[str]:
        whole = (folder / name).read_bytes()
        write_journal(folder / name, records)
        with open(folder / name, "ab") as file:
            file.write(after)
        found = soak.lost(plan, tmp_path)
        (folder / name).write_bytes(whole)
        return found

    steps, begun = "steps-1.jsonl", {"starts": 0}
    end = [{"step": 75}, {"step": 100}]
    assert "is torn" in lost_with(steps, [begun, *end], b'{"st\n')[0]
    assert "worker 1 ends with" in lost_with(steps, [begun, *end[:1]])[0]
    fell = lost_with(steps, [begun, end[0], {"starts": 24}, end[1]])
    assert fell == ["worker 1 fell from 75 to 24"]
    again = lost_with(steps, [begun, {"step": 101}, begun, end[1]])
    assert again[1] == "worker 1 began again after 101"
    assert "bytes of models" in lost_with(steps, [begun, *end, end[1]])[0]
    assert (
        "distance to the optimum"
        in lost_with(
            "metrics.jsonl",
            [
                {"eval/distance_to_optimum": 5.0, "consensus/distance_sq": 0.0},
                {"eval/distance_to_optimum": 4.0, "consensus/distance_sq": 0.0},
            ],
        )[0]
    )
    assert (
        "not equal"
        in lost_with(
            "metrics.jsonl",
            [
                {"eval/distance_to_optimum": 5.0, "consensus/distance_sq": 0.0},
                {"eval/distance_to_optimum": 0.1, "consensus/distance_sq": 0.1},
            ],
        )[0]
    )
    assert soak.lost(plan, tmp_path) == []


def test_tables_of_soaks_add_up(soak, tmp_path):
    path = tmp_path / "soak.json"
    run = {"mode": "pairs", "machine": "some, 2 cores", "seconds": 60}
    for times in (3, 4):
        row = {"times": times, "noticed_s": [0.1] * times}
        soak.add(path, {**run, "disturbances": {"killed": row}}, None)
    facts = soak.add(path, {}, {"mode": "launch", "why": "hung", "events": []})
    assert len(facts["runs"]) == 2 and len(facts["failures"]) == 1
    console = Console(record=True, width=100, file=io.StringIO())
    soak.show(facts, console)
    said = console.export_text()
    assert "7 disturbances of 2 runs" in said
    assert "pairs: 2 runs, 2 minutes, 3.5 disturbances a minute" in said
    assert "failed: launch, hung" in said


@pytest.mark.parametrize(
    ("leak", "flat"),
    [({}, True), ({"rss_mb": 1e-3}, False), ({"descriptors": 1e-4}, False)],
)
def test_what_grows_over_a_long_run_is_noticed(monkeypatch, leak, flat):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    endurance = importlib.import_module("benchmarks.endurance")
    start = {"rss_mb": 300.0, "descriptors": 20, "threads": 40}
    samples = [
        {"step": step} | {k: v + step * leak.get(k, 0) for k, v in start.items()}
        for step in range(100, 20_000, 100)
    ]
    samples[0]["rss_mb"] = 900.0  # while it compiles
    assert endurance.is_flat(endurance.grown(samples, 20_000)) == flat
    assert len(endurance.thinned(samples, 20_000)) == 20


def test_broken_configs_are_accepted_or_refused():
    """A few of the trials; the program fails if one is answered otherwise."""
    program = Path(__file__).parents[1] / "benchmarks" / "config_fuzz.py"
    ran = subprocess.run(
        [sys.executable, program, "--trials", "60", "--first", "700", "--slow", "inf"],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    counts = dict(
        re.findall(r"^ *(flags: run|values: a value|all) +\d+ +(\d+)", ran.stdout, re.M)
    )
    assert 0 < int(counts["all"]) < 60
    assert all(int(count) > 0 for count in counts.values())


def test_every_mutation_fits_the_source(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    mutations = importlib.import_module("benchmarks.mutations")
    assert len(mutations.MUTATIONS) >= 30
    assert [f for m in mutations.MUTATIONS.values() if (f := mutations.fault(m))] == []
    for mutation in mutations.MUTATIONS.values():
        for word in mutation.tests.split(" -k ")[0].split():
            assert (mutations.ROOT / word).exists(), word


def test_the_page_of_mutations_is_that_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    mutations = importlib.import_module("benchmarks.mutations")
    known = json.loads(mutations.RESULTS.read_text("utf-8"))
    assert mutations.PAGE.read_text("utf-8") == mutations.page(known)
    assert [n for n, r in known["mutations"].items() if not r["noticed_by"]] == []
    assert list(known["mutations"]) == list(mutations.MUTATIONS)
