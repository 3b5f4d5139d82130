"""``bagua-jax wire``: the table and the JSON, and refusals; nothing is trained."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from wire_programs import path_of, scatter_gather

from bagua_jax import planning
from bagua_jax.experiments import cli
from bagua_jax.experiments.commands.wire import Wire

SENT = 2 * 128 * 3 / 4  # of a vector of 32 float32, by one of 4 workers
WARM = {"name": "qadam", "learning_rate": 0.01, "warmup_steps": 3}
EVERY = {"name": "async_model_average", "local_steps": 4, "staleness": 1}


def wire(lab, *flags, **changes):
    written = lab.root / "wire.json"
    status, out, err = lab.main(
        "wire", lab.config(**changes), *flags, "--json", str(written)
    )
    return status, out, err, json.loads(written.read_text()) if status == 0 else {}


def test_table_and_json(lab):
    algorithms = ["gradient_allreduce", WARM, EVERY]
    status, out, err, found = wire(lab, "--nodes", "2", algorithms=algorithms)
    assert (status, err) == (0, "")
    rows = {(s["algorithm"], s["phase"]): s for s in found["steps"]}
    for label, phase, steps, nbytes, messages in (
        ("gradient_allreduce", "in the long run", None, SENT, 1),
        ("qadam", "warm-up", 3, SENT, 1),
        ("qadam", "in the long run", None, 2 * 3 * (8 + 8), 2),
        ("async_model_average", "in the long run", None, SENT / 4, 1 / 4),
    ):
        row = rows.pop((label, phase))
        assert row["steps"] == steps and row["differences_in_bytes"] == {}
        for side in ("intended", "compiled"):
            assert row[side]["bytes_per_worker"] == pytest.approx(nbytes)
            assert row[side]["messages_per_worker"] == pytest.approx(messages)
            parts = [row[side][f"bytes_{k}"] for k in ("inside_node", "between_nodes")]
            assert sum(parts) == pytest.approx(nbytes)
            weighted = [c["weight"] * c["bytes_sent"] for c in row[side]["collectives"]]
            assert sum(weighted) == pytest.approx(nbytes)
    # a ring of four over two nodes leaves them at two of its edges
    ring = found["steps"][0]["compiled"]
    assert ring["bytes_between_nodes"] == pytest.approx(SENT / 2)
    assert [label for label, _ in rows] in ([], ["async_model_average"])
    assert found["nodes"] == [0, 0, 1, 1] and found["workers"] == 4
    lines = [line.split() for line in out.splitlines()]
    assert "gradient_allreduce 1 192 1 192 96 96 nothing".split() in lines
    assert "its first 3 steps 1 192 1 192 96 96 nothing".split() in lines
    assert not (lab.root / "runs").exists()


def test_a_hierarchy_one_by_one(lab):
    status, out, _, found = wire(lab, "--nodes", "2", "--hierarchy", "--verbose")
    assert status == 0 and found["hierarchy"] is True
    (row,) = found["steps"]
    kinds = [c["kind"] for c in row["compiled"]["collectives"]]
    assert sorted(kinds) == ["all-gather", "all-reduce", "reduce-scatter"]
    assert row["compiled"]["bytes_between_nodes"] == 64
    assert out.count("jit(step)/shard_map/") == 3
    assert "per worker: 192 bytes sent in 3 messages, 64 between nodes" in out


def test_differences_are_named(lab):
    """XLA joins the all-reduces of small buckets."""
    small = {"name": "gradient_allreduce", "bucket_bytes": 64}
    status, out, _, found = wire(lab, task="digits", algorithms=[small])
    (row,) = found["steps"]
    buckets = row["intended"]["messages_per_worker"]
    assert status == 0 and buckets > 1
    assert row["differences_in_bytes"] == {f"combined {buckets:.0f} -> 1": 0}
    assert f"combined {buckets:.0f} -> 1" in " ".join(out.split())


def test_clusters_compile_through_planning(lab, monkeypatch):
    """What compiles is not installed here: a stored program stands for its answer."""
    asked = []

    def compile_lowered(lowered, cluster):
        asked.append((cluster.text, "psum" in lowered.as_text(debug_info=True)))
        text = path_of(scatter_gather, cluster.text).read_text()
        return SimpleNamespace(as_text=lambda: text)

    monkeypatch.setattr(planning, "compile_lowered", compile_lowered)
    status, out, _, found = wire(lab, "--target", "v5e:2x2")
    assert status == 0 and asked == [("v5e:2x2", True)]
    assert found["target"] == "v5e:2x2" and found["nodes"] is None
    (row,) = found["steps"]
    assert row["intended"]["bytes_per_worker"] == pytest.approx(SENT)
    assert row["compiled"]["bytes_per_worker"] == 589_824
    assert set(row["differences_in_bytes"]) == {"added", "removed"}


def test_commands_of_the_page_are_understood():
    page = Path(__file__).parents[2] / "docs" / "wire.md"
    lines = re.findall(r"^\$ bagua-jax (wire .*)$", page.read_text(), re.MULTILINE)
    assert len(lines) >= 3
    for line in lines:
        assert isinstance(cli.parse(line.split()), Wire)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--target", "h100"], ["target: is cpu or a cluster", "16x8:h100"]),
        (["--nodes", "3"], ["nodes: must divide the 4 workers", "3"]),
        (["--nodes", "-2"], ["nodes: must be from 0", "-2"]),
        (["--hierarchy"], ["hierarchy: needs --nodes"]),
        (["--hierarchy", "--nodes", "4"], ["hierarchy", "4 nodes for 4 workers"]),
        (["--target", "2x4:h100", "--nodes", "2"], ["nodes: 2x4:h100 has nodes"]),
        (["--workers", "1000"], ["workers: 1000 workers need 1000 host devices"]),
    ],
    ids=" ".join,
)
def test_refusals(lab, flags, words):
    status, _, err = lab.main("wire", lab.config(), *flags)
    assert status == 2
    for word in words:
        assert word in err
