"""A run that begins with another run's state, on another number of workers."""

import json
import re
from pathlib import Path

import pytest

from bagua_jax.experiments.runs import integrity

TASK = {"task": "breast_cancer"}  # whose data are the same for any number of workers
WEIGHTS = [{"name": "local_sgd", "local_steps": 4}]


def of(lab, output: str, label: str = "bytegrad") -> Path:
    return lab.folder(label, output)


@pytest.fixture
def parent(lab):
    status, _, complaint = lab.run(
        "--algorithms", "bytegrad", output="parent", workers=4, steps=20, **TASK
    )
    assert status == 0, complaint
    return of(lab, "parent")


def metrics(folder: Path) -> list[dict]:
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_another_number_of_workers_goes_on(lab, parent, workers):
    changes = {"workers": workers, "steps": 10, **TASK}
    flags = ("--algorithms", "bytegrad", "--resume-from", str(parent))
    status, out, complaint = lab.run(*flags, output="child", **changes)
    assert status == 0, complaint
    assert "begins with step 20" in out and "4 workers trained" in out
    child = of(lab, "child")
    last, first = metrics(parent)[-1], metrics(child)[0]
    assert first["eval/distance_to_optimum"] == last["eval/distance_to_optimum"]
    assert [line["step"] for line in metrics(child)] == list(range(11))
    summary = json.loads((child / "summary.json").read_text())
    (own,) = summary["ancestors"]
    assert (own["run"], own["step"], own["workers"]) == (str(parent), 20, 4)

    status, out, _ = lab.run(*flags, output="child", **changes)  # it is finished
    assert status == 0 and "finished before" in out
    flags = ("--algorithms", "bytegrad", "--resume-from", str(child))
    status, _, complaint = lab.run(
        *flags, output="grandchild", workers=8, steps=5, **TASK
    )
    assert status == 0, complaint
    summary = json.loads((of(lab, "grandchild") / "summary.json").read_text())
    assert [a["workers"] for a in summary["ancestors"]] == [4, workers]


def test_own_parameters_and_devices(lab, devices):
    status, _, complaint = lab.run(
        output="parent", algorithms=WEIGHTS, workers=4, steps=10, **TASK
    )
    assert status == 0, complaint
    parent = of(lab, "parent", "local_sgd")
    status, _, complaint = lab.run(
        *("--resume-from", str(parent)),
        output="child",
        algorithms=WEIGHTS,
        workers=8,
        steps=10,
        **TASK,
    )
    assert status == 0, complaint
    first = metrics(of(lab, "child", "local_sgd"))[0]
    last = metrics(parent)[-1]
    key = "eval/distance_to_optimum"
    assert first[key] == pytest.approx(last[key], rel=1e-6)
    assert first["consensus/distance_sq"] == 0


def test_an_interrupted_child_goes_on_from_its_own_checkpoint(lab, parent):
    flags = ("--algorithms", "bytegrad", "--resume-from", str(parent))
    changes = {"workers": 2, "steps": 10, **TASK}
    assert lab.run(*flags, output="child", **changes)[0] == 0
    child = of(lab, "child")
    whole = (child / "metrics.jsonl").read_bytes()
    (child / "summary.json").unlink()
    status, out, complaint = lab.run(*flags, output="child", **changes)
    assert status == 0, complaint
    assert "begins with" not in out
    assert (child / "metrics.jsonl").read_bytes() == whole
    assert json.loads((child / "summary.json").read_text())["ancestors"]


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({}, ("--algorithms", "gradient_allreduce"), "the algorithm of .* is bytegrad"),
        ({"task": "quadratic"}, ("--algorithms", "bytegrad"), "the task of .* is"),
        (
            {"optimizer": {"name": "adam"}},
            ("--algorithms", "bytegrad"),
            "does not fit",
        ),
    ],
)
def test_what_does_not_fit_is_refused(lab, parent, changes, flags, message):
    status, _, complaint = lab.run(
        *flags,
        "--resume-from",
        str(parent),
        output="child",
        workers=2,
        **TASK | changes,
    )
    assert status in (1, 2)
    assert "resume_from: " in complaint
    assert re.search(message, complaint), complaint


def test_damage_is_named(lab, parent, tmp_path):
    flags = ("--algorithms", "bytegrad", "--resume-from")
    status, _, complaint = lab.run(
        *flags, str(tmp_path / "nowhere"), output="child", **TASK
    )
    assert status == 1 and "there is no run in" in complaint
    for seal in parent.glob("checkpoints/*/seal.json"):
        seal.write_text(seal.read_text().replace("a", "b", 1))
    status, _, complaint = lab.run(
        *flags, str(parent), output="other", workers=2, **TASK
    )
    assert status == 1
    assert "resume_from: the checkpoint" in complaint and "is damaged" in complaint


def test_altered_ancestry_is_named(lab, parent):
    flags = ("--algorithms", "bytegrad", "--resume-from", str(parent))
    assert lab.run(*flags, output="child", workers=2, **TASK)[0] == 0
    child = of(lab, "child")
    path = child / "ancestry.json"
    path.write_text(path.read_text().replace('"step": 20', '"step": 21'))
    with pytest.raises(integrity.RunError, match="ancestry.json"):
        integrity.read_document(path, "")
    (child / "summary.json").unlink()
    status, _, complaint = lab.run(*flags, output="child", workers=2, **TASK)
    assert status == 1 and "ancestry.json" in complaint
