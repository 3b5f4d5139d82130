"""Claims: what they can say, what they are refused for, and what becomes of them."""

import dataclasses
import io
import json
import math

import jax.numpy as jnp
import pytest
from rich.console import Console

from bagua_jax.experiments import tasks
from bagua_jax.experiments.runs import integrity, train
from bagua_jax.experiments.spec import catalog, claims, config
from bagua_jax.experiments.spec.claims import Verdict
from bagua_jax.experiments.spec.config import ConfigError
from bagua_jax.experiments.tables import report
from bagua_jax.experiments.tables.comparison import Result

PUBLISHED = [name for name in config.shipped() if name.startswith("published/")]

SUMMARIES = {
    "a-1": {
        "steps": 8,
        "diverged": False,
        "eval/loss": 0.5,
        "wire": {"bytes_per_worker": 12.0},
    },
    "b.2": {"steps": 3, "diverged": True, "eval/loss": 9.0, "wire": None},
}
METRICS = {
    "a-1": [{"step": 0, "eval/loss": 4.0}, {"step": 1, "train/loss": 2.0}],
    "b.2": [{"step": 0, "eval/loss": 4.0}],
}


def judge(text: str) -> Verdict:
    (verdict,) = claims.judge([claims.parse(text)], SUMMARIES, METRICS)
    return verdict


# A claim, what was measured, whether it holds.
JUDGED = [
    ("a-1.eval/loss < 1", "0.5 < 1", True),
    ("a-1.eval/loss <= 0.5 < 1", "0.5 <= 0.5 < 1", True),
    ("1 < a-1.eval/loss < 2", "1 < 0.5 < 2", False),
    ("a-1.eval/loss > a-1.eval/loss@0", "0.5 > 4", False),
    ("a-1.train/loss@1 == 2", "2 == 2", True),
    ("a-1.wire/bytes_per_worker * 2 >= 24", "24 >= 24", True),
    ("2 * a-1.steps / 4 - 1 + 0.5 == 3.5", "3.5 == 3.5", True),
    ("2*(a-1.steps - 6)<1e1", "4 < 10", True),
    ("-a-1.steps < -7", "-8 < -7", True),
    ("min(a-1.steps, 3) == max(1, 2, 3)", "3 == 3", True),
    ("abs(log(a-1.eval/loss)) > 0.69", "0.6931 > 0.69", True),
    ("a-1.diverged", "a-1 not diverged", False),
    ("not a-1.diverged", "a-1 not diverged", True),
    ("b.2.diverged", "b.2 diverged", True),
    ("b.2.steps < 4", "3 < 4", True),
    ("b.2.eval/loss@0 == 4", "4 == 4", True),
    # What has no value does not hold, whichever way it is turned.
    ("b.2.eval/loss > 0", "b.2 diverged", False),
    ("b.2.eval/loss@1 > 0", "b.2 diverged before step 1", False),
    ("b.2.wire/bytes_per_worker > 0", "bytes of b.2 were not counted", False),
    ("c.eval/loss > 0", "c failed", False),
    ("1 / (a-1.steps - 8) > 0", "undefined: float division by zero", False),
]


@pytest.mark.parametrize(
    ("text", "measured", "holds"), JUDGED, ids=[row[0] for row in JUDGED]
)
def test_claims_are_judged(text, measured, holds):
    assert judge(text) == Verdict(text, measured, holds)


def test_a_logarithm_of_nothing_does_not_hold():
    verdict = judge("log(a-1.steps - 8) < 0")
    assert not verdict.holds and verdict.measured.startswith("undefined")
    with pytest.raises(ValueError):
        math.log(0)


# A claim, and the words that must be in its refusal.
REFUSED = [
    ("a.eval/loss", ["compares nothing"]),
    ("a.eval/loss < ", ["no expression"]),
    ("", ["no expression"]),
    ("1", ["compares nothing"]),
    ("not 1 < 2", ["compares nothing"]),
    ("a.steps != 1", ["comparisons are"]),
    ("a.steps in 3", ["comparisons are"]),
    ("a.steps < 1 and b.steps < 1", ["compares nothing"]),
    ("a.steps ** 2 < 1", ["cannot stand"]),
    ("loss < 1", ["'loss'", "cannot stand"]),
    ("sqrt(a.steps) < 1", ["sqrt", "cannot stand"]),
    ("abs(1, 2) < 1", ["cannot stand"]),
    ("min(a.steps) < 1", ["cannot stand"]),
    ("min(a.steps, key=1) < 1", ["cannot stand"]),
    ("a.diverged < 1", ["true or false"]),
    ("2 * a.diverged == 0", ["true or false"]),
    ("True < a.steps", ["cannot stand"]),
    ("1j < a.steps", ["cannot stand"]),
    ("'text' < a.steps", ["cannot stand"]),
    ("[a.steps for x in y] < 1", ["cannot stand"]),
    ("__import__('os').system('true') < 1", ["cannot stand"]),
    ("(lambda: 1)() < a.steps", ["cannot stand"]),
    ("f'{a.steps}' < 1", ["expression"]),
    ("1e400 < a.steps", ["too large"]),
]


@pytest.mark.parametrize(("text", "words"), REFUSED, ids=[row[0] for row in REFUSED])
def test_other_expressions_are_refused(text, words):
    with pytest.raises(ConfigError) as caught:
        claims.parse(text)
    for word in ["claims", repr(text), "LABEL.METRIC", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("-" * 900 + "a.steps < 1", "more than 200 parts"),
        ("(" * 900 + "a.steps", "no expression"),
        ("a.steps" + " + 1" * 200 + " < 1", "more than 200 parts"),
        ("1" + " < 2" * 200, "more than 200 parts"),
        ("9" * 900 + " < a.steps", "too large"),
        ("a.steps < 1" + " " * 1000, "longer than 1000"),
    ],
    ids=lambda text: text[:12],
)
def test_endless_expressions_are_refused_in_few_words(text, why):
    with pytest.raises(ConfigError, match=why) as caught:
        claims.parse(text)
    assert len(str(caught.value)) < 1000


# --- through the command line ---


@pytest.mark.parametrize(
    ("claim", "words"),
    [
        ("gradient_allreduc.steps > 0", ["label", "'gradient_allreduce'"]),
        ("gradient_allreduce.eval/exces_loss > 0", ["'eval/excess_loss'"]),
        ("gradient_allreduce.wire/bytes > 0", ["'wire/bytes_per_worker'"]),
        ("gradient_allreduce.eval/excess_loss_worker_min > 0", ["unknown metric"]),
        ("gradient_allreduce.steps@5 > 0", ["unknown metric"]),
        ("gradient_allreduce.eval/excess_loss@6 > 0", ["step 6 of 12", "every 5th"]),
        ("gradient_allreduce.train/loss@13 > 0", ["step 13"]),
        ("gradient_allreduce.train/loss@0 > 0", ["step 0"]),
        ("gradient_allreduce.time/steps_per_s > 0", ["time is the machine's"]),
        ("gradient_allreduce > 0", ["cannot stand"]),
    ],
)
def test_claims_about_nothing_are_refused_before_any_run(lab, claim, words):
    status, _, err = lab.run(claims=[claim])
    assert status == 2
    for word in ["claims", claim, *words]:
        assert word in err
    assert not list(lab.root.glob("runs/small/*"))


@pytest.mark.parametrize("value", ["a.steps > 1", [3], {"that": "a.steps > 1"}])
def test_claims_are_a_list_of_lines(lab, value):
    status, _, err = lab.run(claims=value)
    assert status == 2 and "claims: must be a list of lines" in err


def test_a_claim_that_does_not_hold_is_status_1(lab, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")  # a line for each claim
    right = (
        "gradient_allreduce.eval/excess_loss < gradient_allreduce.eval/excess_loss@0"
    )
    wrong = "gradient_allreduce.steps < 12"
    other = "bytegrad.steps > 0"
    both = {"algorithms": ["gradient_allreduce", "bytegrad"]}
    flags = ["--algorithms", "gradient_allreduce"]
    status, out, err = lab.run(*flags, claims=[right, wrong, other], **both)
    assert status == 1 and err == ""
    assert "12 < 12" in out and "1 claims about runs left out" in out
    assert [line.split()[-1] for line in out.splitlines() if "@0" in line] == ["yes"]
    assert [line.split()[-1] for line in out.splitlines() if wrong in line] == ["no"]
    results = json.loads((lab.root / "runs/small/results.json").read_text())
    assert [v["claim"] for v in results["claims"]] == [right, wrong]
    assert [v["holds"] for v in results["claims"]] == [True, False]
    # Of finished runs as well, and without a claim that fails the status is 0.
    status, out, _ = lab.run(*flags, claims=[right], **both)
    assert status == 0 and "finished before" in out


# --- runs that diverge ---

WILD = {
    "name": "gradient_allreduce",
    "label": "wild",
    "may_diverge": True,
    "optimizer": {"name": "sgd", "learning_rate": 8.0},
}


def test_a_diverged_run_is_finished(lab):
    said = ["wild.diverged", "wild.steps > 2", "wild.eval/excess_loss < 1"]
    status, out, _ = lab.run(algorithms=[WILD], claims=said)
    assert status == 1  # of the third claim
    assert "wild: diverged: the training loss is" in out and "failed" not in out
    summary, lines = lab.summary("wild"), lab.lines("wild")
    assert summary["diverged"] and summary["steps"] == lines[-1]["step"] < 12
    assert all(line["train/loss"] <= 1e6 for line in lines[1:])
    results = json.loads((lab.root / "runs/small/results.json").read_text())
    assert [v["holds"] for v in results["claims"]] == [True, True, False]
    assert results["claims"][2]["measured"] == "wild diverged"
    status, out, _ = lab.run(algorithms=[WILD], claims=said[:2])
    assert status == 0 and "finished before" in out


def test_a_run_that_may_diverge_and_does_not(lab):
    tame = WILD | {"optimizer": {"name": "sgd", "learning_rate": 0.1}}
    status, _, _ = lab.run(algorithms=[tame], claims=["not wild.diverged"])
    assert status == 0 and lab.summary("wild")["steps"] == 12


def test_an_interrupted_run_diverges_on_the_same_step(lab, monkeypatch):
    class Killed(BaseException):
        pass

    original = integrity.Journal.append

    def deadly(path, records):
        original(path, records)
        if any(record["step"] == 5 for record in records):
            raise Killed

    lab.run(output="whole", algorithms=[WILD])
    with monkeypatch.context() as patch:
        patch.setattr(integrity.Journal, "append", deadly)
        with pytest.raises(Killed):
            lab.run(output="cut", algorithms=[WILD])
    status, out, _ = lab.run(output="cut", algorithms=[WILD])
    assert status == 0 and "continues after step 4" in out
    assert lab.metrics("wild", "cut") == lab.metrics("wild", "whole")
    whole, cut = lab.summary("wild", "whole"), lab.summary("wild", "cut")
    assert {**whole, "time/steps_per_s": 0} == {**cut, "time/steps_per_s": 0}


def test_an_evaluation_that_is_not_finite_ends_a_run_as_well(lab, monkeypatch):
    load = tasks.load

    def overflows(name):
        task = load(name)

        def evaluate(params, test):
            distance = task.evaluate(params, test)["distance_to_optimum"]
            return {"first": distance, "ends": jnp.log(distance - 1)}

        return task._replace(evaluate=evaluate)

    monkeypatch.setattr(tasks, "load", overflows)
    slow = {"name": "gradient_allreduce", "label": "slow", "may_diverge": True}
    status, out, _ = lab.run(algorithms=[slow], claims=["slow.diverged"], steps=60)
    assert status == 0 and "diverged: the evaluation gives" in out
    assert list(lab.summary("slow"))[5:7] == ["eval/first", "eval/ends"]
    status, _, err = lab.run(algorithms=[slow | {"may_diverge": False}], steps=60)
    assert status == 1 and "the evaluation gives" in err


def test_the_table_says_diverged_instead_of_numbers():
    wire = {"bytes_per_worker": 1234.0, "messages_per_worker": 0.25}
    row = {"label": "wild", "eval/loss": 7.0, "train/loss_last_10": 8.0, "wire": wire}
    row |= {"consensus/distance_sq": 9.0, "time/steps_per_s": 5.0, "diverged": True}
    console = Console(file=io.StringIO(), width=120)
    console.print(report._table([Result(None, row)], console.width))
    (line,) = (x for x in console.file.getvalue().splitlines() if "wild" in x)
    told = "wild diverged diverged diverged 1.23 kB 0.25 diverged 5"
    assert line.split() == told.split()


# --- the published configs ---


def test_there_are_twelve():
    assert len(PUBLISHED) == 12


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_say_what_they_show_and_claim_it(name):
    path = config.shipped()[name]
    words = ("Paper", "Claim", "Expected", "Cost", "Command")
    for line, word in zip(path.read_text().splitlines(), words, strict=False):
        assert line.startswith(f"# {word}: ") and "TODO" not in line
    assert f"# Command: bagua-jax run {name}\n" in path.read_text()
    experiment = config.load(name)
    assert experiment == config.load(name.removeprefix("published/"))
    assert experiment.experiment == name.removeprefix("published/")
    assert len(experiment.claims) >= 2
    stated = [claims.parse(text) for text in experiment.claims]
    claims.check(stated, experiment)
    assert {label for claim in stated for label in claim.labels} == {
        algorithm.label for algorithm in experiment.algorithms
    }
    task = tasks.load(experiment.task)
    data = task.data(experiment.seed, experiment.workers)
    for run in catalog.resolve(experiment):
        assert run.claims == ()
        claims.check_metrics(stated, run, train.metric_names(run, task, data))
    again = dataclasses.replace(experiment)
    path_of_copy = config.dump(again)
    assert config.read_yaml(path_of_copy)["claims"] == list(experiment.claims)


@pytest.mark.parametrize("name", ["ef_signsgd", "top1_divergence"])
def test_the_fastest_published_claims_hold(lab, name):
    """The others: ``make published``."""
    status, out, err = lab.main("run", name, "--output", str(lab.root))
    assert status == 0, out + err
