"""Later commands add to an experiment's comparison, and never mix unlike runs."""

import json
import shutil

import pytest

from bagua_jax.experiments.tables import report

MORE = {
    "steps": 4,
    "where": "simulate",
    "algorithms": [
        "gradient_allreduce",
        {"name": "bytegrad", "label": "byte"},
        {"name": "async_model_average", "local_steps": 2, "label": "late"},
    ],
}


def results(lab, output: str = "runs") -> dict:
    return json.loads((lab.root / output / "small/results.json").read_text())


def labels(lab) -> list[tuple[str, bool]]:
    return [(r["label"], r["earlier"]) for r in results(lab)["results"]]


def test_commands_on_parts_of_a_config_add_up(lab):
    lab.draws = True
    status, out, _ = lab.run("--algorithms", "late", **MORE)
    assert status == 0 and "earlier" not in out
    assert labels(lab) == [("late", False)]
    status, out, _ = lab.run("--algorithms", "gradient_allreduce,byte", **MORE)
    assert status == 0
    # In the config's order, whichever came first.
    assert labels(lab) == [
        ("gradient_allreduce", False),
        ("byte", False),
        ("late", True),
    ]
    assert "* of an earlier command" in out
    rows = [line.split()[:2] for line in out.splitlines() if " steps" not in line]
    assert ["late", "*"] in rows and ["byte", "*"] not in rows
    folders = {path.name for path in (lab.root / "runs/small").glob("*-s0")}
    assert {r["folder"] for r in results(lab)["results"]} == folders
    # The whole config again repeats nothing and has nothing of an earlier command.
    status, out, _ = lab.run(**MORE)
    assert labels(lab) == [
        ("gradient_allreduce", False),
        ("byte", False),
        ("late", False),
    ]
    assert out.count("finished before") == 3 and "earlier command" not in out


def test_figures_show_earlier_runs(lab, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        report, "_figures", lambda *a: drawn.append([r.label for r in a[2]]) or []
    )
    lab.run("--algorithms", "byte", **MORE)
    lab.run("--algorithms", "late", **MORE)
    assert drawn == [["byte"], ["byte *", "late"]]


@pytest.mark.parametrize(
    ("flags", "changes", "told"),
    [
        (["--steps", "6"], {}, "steps 4, now 6"),
        (["--seed", "1"], {}, "seed 0, now 1"),
        (["--task", "logistic"], {}, "task quadratic, now logistic"),
        (["--workers", "2"], {}, "workers 4, now 2"),
        (["--where", "devices"], {}, "where simulate, now devices"),
        (["--batch-size", "8"], {}, "batch_size 16, now 8"),
        (["--sharding", "iid"], {}, "sharding label, now iid"),
        (["--on-nan", "skip"], {}, "on_nan None, now skip"),
        (
            ["--optimizer.learning-rate", "0.2"],
            {},
            "optimizer.learning_rate 0.1, now 0.2",
        ),
        (
            [],
            {
                "algorithms": [
                    "bytegrad",
                    {"name": "gradient_allreduce", "label": "byte"},
                ]
            },
            "algorithm.name bytegrad, now gradient_allreduce",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_unlike_runs_are_named_and_left_out(lab, flags, changes, told):
    lab.run("--algorithms", "byte", **MORE)
    earlier = lab.folder("byte").name
    wanted = "bytegrad" if changes else "gradient_allreduce"
    flags = [*flags, "--algorithms", wanted]
    status, out, _ = lab.run(*flags, **MORE | changes)
    assert status == 0
    assert labels(lab) == [(wanted, False)]
    (left,) = results(lab)["left_out"]
    assert left["folder"] == earlier and told in left["because"]
    assert f"not compared: {earlier}: " in " ".join(out.split())
    assert told in " ".join(out.split())


def test_a_label_that_now_means_something_else_is_left_out(lab):
    lab.run("--algorithms", "late", **MORE)
    other = [
        {"name": "async_model_average", "local_steps": 3, "label": "late"},
        "bytegrad",
    ]
    for chosen in ("bytegrad", "late"):
        lab.run("--algorithms", chosen, **MORE | {"algorithms": other})
        (left,) = results(lab)["left_out"]
        assert left["because"] == "algorithm.local_steps 2, now 3"


def test_two_runs_of_one_label_that_the_config_does_not_list(lab):
    for period in (2, 3):
        own = f"[{{name: async_model_average, local_steps: {period}, label: mine}}]"
        lab.run("--algorithms", own, **MORE)
    lab.run("--algorithms", "byte", **MORE)
    found = results(lab)
    assert [r["label"] for r in found["results"]] == ["byte", "mine"]
    assert ["label" in left["because"] for left in found["left_out"]] == [True]


@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "metrics.jsonl"])
def test_damaged_and_foreign_folders(lab, name):
    lab.run("--algorithms", "byte", **MORE)
    folder = lab.folder("byte")
    shutil.copytree(folder, folder.with_name("a-copy"))
    shutil.rmtree(folder / "copies")
    text = (folder / name).read_text()
    assert "4" in text
    (folder / name).write_text(text.replace("4", "5"))
    status, _, _ = lab.run("--algorithms", "late", **MORE)
    assert status == 0 and labels(lab) == [("late", False)]
    (left,) = results(lab)["left_out"]
    assert left["folder"] == folder.name and "cannot be compared" in left["because"]
    assert name in left["because"]


def test_a_folder_that_was_moved_is_compared(lab):
    lab.run("--algorithms", "byte", **MORE)
    shutil.move(lab.root / "runs", lab.root / "moved")
    lab.draws = True
    status, _, _ = lab.run("--algorithms", "late", output="moved", **MORE)
    assert status == 0
    found = results(lab, "moved")["results"]
    assert [r["label"] for r in found] == ["byte", "late"]


def test_claims_are_judged_by_earlier_runs_too(lab):
    both = ["byte.steps == late.steps", "byte.steps == 5", "late.steps == 4"]
    changes = MORE | {"claims": [*both, "gradient_allreduce.steps > 0"]}
    status, _, _ = lab.run("--algorithms", "byte", **changes)
    assert status == 1  # its own claim does not hold
    status, out, _ = lab.run("--algorithms", "late", **changes)
    assert status == 0  # that one is the other run's
    judged = {c["claim"]: c["holds"] for c in results(lab)["claims"]}
    assert judged == dict(zip(both, (True, False, True), strict=True))
    assert "1 claims about runs left out" in out


def test_a_failed_run_does_not_hide_earlier_ones(lab):
    wild = {"name": "gradient_allreduce", "label": "wild"}
    wild["optimizer"] = {"name": "sgd", "learning_rate": 1e30}
    changes = MORE | {"algorithms": ["bytegrad", wild]}
    lab.run("--algorithms", "bytegrad", **changes)
    status, out, _ = lab.run("--algorithms", "wild", **changes)
    assert status == 1 and "failed: wild" in out
    assert labels(lab) == [("bytegrad", True)]
    assert len(results(lab)["failures"]) == 1
