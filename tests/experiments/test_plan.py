"""``bagua-jax plan``: what it prints, writes and refuses; the compiler is replaced."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bagua_jax import network, planning
from bagua_jax.planning import compiling

DUMP = Path(__file__).parents[1] / "planning" / "data" / "layers.schedule.txt.gz"
HLO = """HloModule step, num_partitions=8
ENTRY %main (x: f32[100]) -> f32[100] {
  %x = f32[100]{0} parameter(0)
  ROOT %sum = f32[100]{0} all-reduce(%x), channel_id=1, use_global_device_ids=true,
    replica_groups={{0,1,2,3,4,5,6,7}}
}""".replace(",\n   ", ",")


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Stands for XLA: times of a stored schedule, the slower the program is longer."""
    monkeypatch.setenv("BAGUA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiling, "_versions", lambda cluster: {"jax": "0"})
    schedule = planning.read_schedule(gzip.decompress(DUMP.read_bytes()).decode())
    requests = []

    def run(request, program):
        requests.append(request)
        memory = dict.fromkeys(planning.Memory._fields, 1000)
        timed = any("sol_latency_estimator=true" in f for f in request["flags"])
        rows = schedule.computations if timed else None
        return {"hlo": HLO, "memory": memory, "schedule": rows}

    monkeypatch.setattr(compiling, "_run", run)
    return requests


def results(lab, name: str) -> list[dict]:
    text = (lab.root / "runs" / "small" / f"plan-{name}.json").read_text()
    return json.loads(text)["plans"]


def plan(lab, *flags: str, **changes) -> tuple[int, str, str]:
    config = lab.config(output=str(lab.root / "runs"), **changes)
    return lab.main("plan", config, *flags)


def test_help_needs_no_jax(tmp_path):
    program = (
        "import sys; from bagua_jax.experiments.cli import main; "
        "status = main(['plan', 'demo', '--help']); assert 'jax' not in sys.modules"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--cluster" in done.stdout and "16x8:h100" in done.stdout


def test_a_table_of_algorithms_and_networks(lab, compiler):
    algorithms = ["gradient_allreduce", {"name": "bytegrad", "label": "bytes"}]
    flags = "--cluster", "2x4:h100", "--network", "10gbit,100gbit"
    status, out, err = plan(lab, *flags, algorithms=algorithms)
    assert (status, err) == (0, "")
    assert out.count("PREDICTION, nothing measured: small on 2x4:h100, flat") == 1
    assert "4/4  bytes, 100gbit: compiled in" in out
    assert out.count("bytes") >= 3 and out.count("*") >= 4
    rows = results(lab, "2x4-h100")
    assert [(r["algorithm"], r["network_name"]) for r in rows] == [
        (a, n) for a in ("gradient_allreduce", "bytes") for n in ("10gbit", "100gbit")
    ]
    assert len(compiler) == 4, "one lowering of each, compiled with each one's links"
    links = [r["flags"][-1] for r in compiler]
    assert links[0] == links[2] != links[1] == links[3]
    for row in rows:
        net = network.preset(row["network_name"], 2, 4)
        cost = network.all_reduce(net, 400)
        assert row["network_communication_seconds"] == pytest.approx(cost.seconds)
        assert row["bytes_inside"] + row["bytes_between"] == 2 * 400 * 7 / 8
        assert row["bytes_between"] == 2 * 400 * 7 / 8 / 4  # a ring leaves a node once
        assert row["memory_bytes"] == 4 * 1000 - 1000
        assert row["xla_step_seconds"] == pytest.approx(171.4e-6, rel=1e-3)
        compute = row["xla_step_seconds"] - row["xla_exposed_seconds"]
        assert row["network_step_none_hidden_seconds"] == pytest.approx(
            compute + cost.seconds
        )
        assert row["network_step_all_hidden_seconds"] == pytest.approx(
            max(compute, cost.seconds)
        )
        assert row["xla_constants"]["gpus_per_node"] == 4
        (sent,) = row["collectives"]
        assert (sent["kind"], sent["operand_bytes"]) == ("all-reduce", 400)
        assert [c["covered"] for c in row["xla_schedule"]] == [1, 1, 2]
    report = (lab.root / "runs" / "small" / "plan-2x4-h100.txt").read_text()
    assert report.count("PREDICTION, nothing was run") == 4
    assert report.count("# bytes, ") == 2


def test_the_map_is_drawn(lab, compiler):
    import matplotlib.image

    status, out, _ = plan(lab, "--cluster", "2x4:h100")
    assert status == 0
    path = lab.root / "runs" / "small" / "plan-2x4-h100.png"
    assert str(path) in out
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 200 and np.ptp(pixels[..., :3]) > 0.5


def test_a_plan_made_before_is_read(lab, compiler):
    flags = "--cluster", "2x4:h100", "--network", "10gbit"
    first, again = plan(lab, *flags), plan(lab, *flags)
    assert first[0] == again[0] == 0
    assert "compiled in" in first[1] and "compiled before" in again[1]
    assert len(compiler) == 1


def test_hierarchy_is_asked_for_and_said(lab, compiler):
    flags = "--cluster", "2x4:h100", "--network", "10gbit"
    algorithms = [{"name": "decentralized", "topology": "ring"}]
    status, out, _ = plan(lab, *flags, "--hierarchy", algorithms=algorithms)
    assert status == 0 and "hierarchical exchange" in out
    assert results(lab, "2x4-h100-hierarchy")


def test_without_times_there_is_communication(lab, compiler):
    for cluster, networks in (("v5e:2x4", ["ici"]), ("2x4:a100", ["10gbit", "geo"])):
        flags = [] if "v5e" in cluster else ["--network", ",".join(networks)]
        status, out, _ = plan(lab, "--cluster", cluster, *flags)
        assert status == 0
        assert "XLA predicts no times for this chip" in " ".join(out.split())
        assert "0 of 1" in out, "asynchronous collectives"
        rows = results(lab, cluster.replace(":", "-"))
        assert [r["network_name"] for r in rows] == networks
        for row in rows:
            assert row["xla_step_seconds"] is row["network_step_all_hidden_seconds"]
            assert row["network_communication_seconds"] > 0
    assert len(compiler) == 2, "without links in the schedule one program serves all"


def test_one_node_has_its_own_links(lab, compiler):
    status, _, _ = plan(lab, "--cluster", "8:h200")
    assert status == 0
    (row,) = results(lab, "8-h200")
    assert (row["network_name"], row["bytes_between"]) == ("nvlink", 0)


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ("--cluster 3y:h100", "cluster: .* got '3y:h100'"),
        ("--cluster 2x4:h100 --network 10gbitt", "did you mean '10gbit'"),
        ("--cluster 8:h100 --network 10gbit", "network: 8:h100 is one node"),
        ("--cluster v5e:2x4 --network wan", "network: v5e:2x4 is one node"),
        ("--cluster 8:h100 --hierarchy", "hierarchy: needs nodes of several devices"),
        ("--cluster 2x4:h100 --ports 0", "ports: must be from 1"),
        ("--cluster 3x3:h100 --network 10gbit", "shift_one"),  # 9 workers do not pair
    ],
)
def test_bad_usage_is_refused(lab, compiler, flags, complaint):
    changes = {}
    if "shift_one" in complaint:
        changes = {"algorithms": [{"name": "decentralized", "topology": "shift_one"}]}
    status, _, err = plan(lab, *flags.split(), **changes)
    assert status == 2
    assert re.search(complaint, err), err
    assert not compiler


def test_one_algorithm_that_fails_does_not_stop_the_others(lab, compiler, monkeypatch):
    run = compiling._run

    def refuse(request, program):
        if "uint8" in program or "ui8" in program:
            raise planning.CompileError("XLA says no")
        return run(request, program)

    monkeypatch.setattr(compiling, "_run", refuse)
    flags = "--cluster", "2x4:h100", "--network", "10gbit"
    status, out, err = plan(lab, *flags, algorithms=["bytegrad", "gradient_allreduce"])
    assert status == 1
    assert "bytegrad" in err and "XLA says no" in err
    assert [r["algorithm"] for r in results(lab, "2x4-h100")] == ["gradient_allreduce"]


def test_a_missing_compiler_is_said_once(lab, monkeypatch):
    def version(name):
        if name in ("jax", "jaxlib"):
            return "0"
        raise compiling.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(compiling.importlib.metadata, "version", version)
    algorithms = ["gradient_allreduce", "bytegrad"]
    status, _, err = plan(lab, "--cluster", "2x4:h100", algorithms=algorithms)
    assert status == 1
    assert err.count("pip install 'bagua-jax[plan]'") == 1


@pytest.mark.plan
def test_the_real_compiler_from_the_command_line(lab, monkeypatch):
    pytest.importorskip("jax_cuda13_plugin", reason="bagua-jax[plan] is not installed")
    monkeypatch.setenv("BAGUA_JAX_CACHE", str(lab.root / "cache"))
    flags = "--cluster", "2x4:h100", "--network", "10gbit,100gbit"
    algorithms = ["gradient_allreduce", "decentralized"]
    status, out, err = plan(lab, *flags, algorithms=algorithms)
    assert (status, err) == (0, "")
    slow, fast, *gossip = results(lab, "2x4-h100")
    assert slow["xla_step_seconds"] > fast["xla_step_seconds"]
    assert slow["bytes_between"] == fast["bytes_between"] > 0
    d = 4 * (slow["bytes_inside"] + slow["bytes_between"]) / (2 * 7 / 8 * 4)
    for row in gossip:  # each neighbour gets the parameters
        total = row["bytes_inside"] + row["bytes_between"]
        assert total == pytest.approx(2 * d)
