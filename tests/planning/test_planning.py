"""Programs compiled ahead of time: lowered, kept, and their schedules read."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from bagua_jax import Workers, network, planning, primitives, wire
from bagua_jax.planning import Cluster, Constants, compiling

DATA = Path(__file__).parent / "data"
WORKERS = P("workers")


def dump(name: str) -> str:
    return gzip.decompress((DATA / f"{name}.schedule.txt.gz").read_bytes()).decode()


def compiled(name: str, cluster: str = "2x2:h100") -> planning.Compiled:
    """A program whose schedule is a stored dump of XLA's."""
    schedule = planning.read_schedule(dump(name))
    memory = planning.Memory(0, 0, 0, 0, 0)
    return planning.Compiled(
        Cluster.parse(cluster), Constants(1.25), "", memory, schedule, False
    )


def deviation(x):
    return x - primitives.c_fp_s(x, axis_name="workers")


# --- clusters ---


@pytest.mark.parametrize(
    "text, devices, nodes, platform",
    [
        ("16x8:h100", 128, 16, "cuda"),
        ("8:H200", 8, 1, "cuda"),
        ("2x4:b200", 8, 2, "cuda"),
        (" 3x5:a100 ", 15, 3, "cuda"),
        ("v5e:4x4", 16, 1, "tpu"),
        ("v5p:4x4x4", 64, 1, "tpu"),
        ("v4:4x4x4", 128, 1, "tpu"),  # two devices a chip
        ("tpu7x:2x2x1", 8, 1, "tpu"),
    ],
)
def test_clusters_are_read(text, devices, nodes, platform):
    cluster = Cluster.parse(text)
    assert (cluster.num_devices, cluster.num_nodes) == (devices, nodes)
    assert cluster.platform == cluster.topology()["platform"] == platform
    np.testing.assert_array_equal(
        cluster.nodes, np.arange(devices) // (devices // nodes)
    )
    assert cluster.text in str(cluster) and str(devices) in str(cluster)


@pytest.mark.parametrize(
    "text",
    ["", "16x8", "h100", "16x8:h1000", "0x8:h100", "2x2x2:h100", "v5e:4", "v5e:4x0"]
    + ["-2x8:h100", "8.5:h100", "h100:16x8", "v5e:4x4:h100", "v5p:2x2x2x2"],
)
def test_other_text_is_no_cluster(text):
    with pytest.raises(ValueError, match="NODESxGPUS:CHIP.*h100.*v5e.*got"):
        Cluster.parse(text)


def test_target_of_each_gpu_is_complete():
    for chip, facts in planning.GPUS.items():
        topology = Cluster.parse(f"2x8:{chip}").topology()
        config = topology["target_config"]
        assert topology["topology"] == "2x1x8", "each node a domain of NVLink"
        assert config.count("{") == config.count("}")
        assert "runtime_version" in config, "XLA refuses a target without one"
        for value in facts.values():
            assert str(value) in config


# --- constants ---


def test_constants_from_a_network():
    net = network.preset("25gbit", 16, 8)
    found = Constants.of(net)
    share = 25 / 8 * 1448 / 1538 / 8  # eight GPUs share a card; gigabytes per second
    assert found.nic_speed_gbps == pytest.approx(share)
    assert found.rtt_us == pytest.approx(40)
    own = Constants.of(network.preset("25gbit", 16, 8, ports=8))
    assert own.nic_speed_gbps == pytest.approx(8 * share)


def test_constants_are_those_of_the_slowest_link():
    net = network.preset("geo", 10, 2)
    found = Constants.of(net)
    assert found.rtt_us == pytest.approx(280e3)
    assert found.nic_speed_gbps == pytest.approx(0.3 / 8 * 1448 / 1538 / 2)


# --- schedules: dumps of XLA, see data/README.md ---


def test_times_are_the_stamps_of_the_dump():
    """Expected numbers were read from the dump by hand: a - b of its timestamps."""
    line = planning.timeline(compiled("layers"))
    assert line.end == pytest.approx(171.389, abs=2e-3)
    first, second, third = line.collectives
    assert [c.kind for c in line.collectives] == ["all-reduce"] * 3
    assert [c.latency for c in line.collectives] == pytest.approx([22.6] * 3, abs=0.1)
    # Between start and end: a matmul of 35.7; a copy of 0.01 in 21.64; 20.04 in 21.64.
    assert [len(c.covered) for c in line.collectives] == [1, 1, 2]
    waits = [c.wait for c in line.collectives]
    assert waits == pytest.approx([0.0, 21.63, 1.6], abs=0.01)
    assert first.hidden == 1.0
    assert second.hidden == pytest.approx(1 - 21.63 / 22.64, abs=1e-3)
    assert third.hidden == pytest.approx(1 - 1.6 / 22.64, abs=1e-3)
    assert line.exposed == pytest.approx(sum(waits))
    assert line.end == pytest.approx(line.busy + line.exposed + line.launches)
    assert "predicted" in str(line) and "1.25 GB/s" in str(line)


def test_statistics_of_the_dump_are_not_read():
    text = dump("layers")
    assert "total_cycles" in text
    changed = text.replace("wasted_cycles: 63", "wasted_cycles: 99")
    assert changed != text
    assert planning.read_schedule(changed) == planning.read_schedule(text)


def test_loops_and_branches_count_as_often_as_they_run():
    whole = compiled("nested").schedule
    entry, *_ = whole.computations
    assert not entry.scheduled, "XLA times only computations with collectives"
    scheduled = [c for c in whole.computations if c.scheduled]
    ends = {
        "while" if "while" in str(c.instructions) else "cond": c.instructions[-1].end
        for c in scheduled
    }
    line = planning.timeline(compiled("nested"))
    looped, branched = line.collectives
    assert (looped.weight, branched.weight) == (3, 0.25)
    rest = line.end - 3 * ends["while"] - 0.25 * ends["cond"]
    costs = [max(i.cost, 1) for i in entry.instructions if i.cost >= 0]
    assert sum(costs) <= rest <= sum(costs) + 5, "copies, and the branch that rests"
    always = {i.path: (0, 1) for i in entry.instructions if i.opcode == "conditional"}
    more = planning.timeline(compiled("nested"), branch_shares=always)
    assert more.collectives[1].weight == 1


def test_unknown_shares_and_trips_are_refused():
    text = dump("nested")
    unknown = planning.read_schedule(text.replace("branch_shares(", "of("))
    with pytest.raises(ValueError, match="take .* us and nothing says how often"):
        planning.timeline(compiled("nested")._replace(schedule=unknown))
    unknown = planning.read_schedule(text.replace("known_trip_count", "other"))
    with pytest.raises(ValueError, match="trip_counts="):
        planning.timeline(compiled("nested")._replace(schedule=unknown))


def test_no_timeline_where_xla_has_none():
    slice_ = compiled("layers", "v5e:2x2")._replace(schedule=None)
    with pytest.raises(ValueError, match="v5e:2x2 got none.*TPU"):
        planning.timeline(slice_)
    with pytest.raises(ValueError, match="must be a ScheduleProto"):
        planning.read_schedule("HloModule step")


def test_a_schedule_survives_json():
    schedule = planning.read_schedule(dump("nested"))
    rows = json.loads(json.dumps(schedule.computations))
    assert planning.Schedule.of_json(rows) == schedule


# --- lowering, without any plugin ---


def test_lowered_for_128_gpus_from_here():
    cluster = Cluster.parse("16x8:h100")
    x = jax.ShapeDtypeStruct((128, 4), jnp.float32)
    text = planning.lower(deviation, (x,), cluster, in_specs=WORKERS).as_text()
    assert "num_partitions = 128" in text and "all_reduce" in text


def test_lowered_for_nodes_of_devices():
    def levels(x):
        return primitives.c_fp_s(x, axis_name="local")

    x = jax.ShapeDtypeStruct((6, 4), jnp.float32)
    axes = ("node", "local")
    lowered = planning.lower(
        levels, (x,), Cluster.parse("2x3:h100"), in_specs=P(axes), axis_name=axes
    )
    (mean,) = wire.intended(lowered).collectives
    assert mean.groups == ((0, 1, 2), (3, 4, 5))


def test_abstract_workers_have_the_specs_and_shapes_of_real_ones(devices):
    x = jnp.ones((8, 3))
    real, nowhere = Workers.devices(8), Workers.abstract(8)
    assert real.specs(deviation, x, in_specs=WORKERS) == nowhere.specs(
        deviation, x, in_specs=WORKERS
    )
    (placed,) = nowhere.placed((x,), WORKERS)
    assert placed.shape == (8, 3) and placed.sharding.spec == WORKERS
    with pytest.raises(ValueError, match="must have a mesh"):
        Workers.simulate(8).placed((x,), WORKERS)


# --- the cache, with a compiler that counts ---


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Stands for the process that compiles; keeps its requests."""
    monkeypatch.setenv("BAGUA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiling, "_versions", lambda cluster: {"jax": "0"})
    requests = []

    def run(request, program):
        requests.append(request)
        memory = dict.fromkeys(planning.Memory._fields, len(requests))
        computations = planning.read_schedule(dump("layers")).computations
        return {"hlo": program, "memory": memory, "schedule": computations}

    monkeypatch.setattr(compiling, "_run", run)
    return requests


def compile_(cluster="2x2:h100", fn=deviation, **options):
    cluster = Cluster.parse(cluster)
    x = jax.ShapeDtypeStruct((cluster.num_devices, 4), jnp.float32)
    return planning.compile(fn, (x,), cluster, in_specs=WORKERS, **options)


def test_what_was_compiled_is_not_compiled_again(compiler):
    first, second = compile_(), compile_()
    assert (first.from_cache, second.from_cache) == (False, True)
    assert second == first._replace(from_cache=True)
    assert len(compiler) == 1


def test_what_differs_is_compiled(compiler, monkeypatch):
    compile_()
    compile_("4x1:h100")
    compile_("4:h200")
    compile_(constants=Constants(1.25))
    compile_(constants=Constants(1.25, rtt_us=2))
    compile_(options={"xla_gpu_all_gather_combine_threshold_bytes": "1"})
    compile_(fn=lambda x: 2 * deviation(x))
    monkeypatch.setattr(compiling, "_versions", lambda cluster: {"jax": "1"})
    compile_()
    assert len(compiler) == 8


def test_where_the_source_stands_does_not_matter(compiler):
    source = "def step(x):\n    return x - mean(x, axis_name='workers')"
    for k in range(3):
        scope = {"mean": primitives.c_fp_s}
        exec(compile(k * "\n" + source, f"/somewhere/{k}.py", "exec"), scope)
        found = compile_(fn=scope["step"])
        assert "somewhere" not in found.hlo and "shard_map" in found.hlo
    assert len(compiler) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b"",
        lambda b: b[:-9],
        lambda b: b"no gzip",
        lambda b: gzip.compress(b"1"),
    ]
    + [lambda b: b[:99] + bytes([b[99] ^ 255]) + b[100:]],
)
def test_a_damaged_entry_is_compiled_again(compiler, tmp_path, damage):
    compile_()
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert not compile_().from_cache
    assert compile_().from_cache
    assert len(compiler) == 2
    assert list((tmp_path / "cache").iterdir()) == [path], "nothing half-written"


def test_a_folder_that_cannot_be_written_is_no_error(compiler, tmp_path):
    (tmp_path / "cache").write_text("a file in its place")
    assert not compile_().from_cache
    assert not compile_().from_cache


def test_constants_must_make_sense(compiler):
    for constants in (Constants(0), Constants(1, rtt_us=-1), Constants(float("inf"))):
        with pytest.raises(ValueError, match="must be finite and at least"):
            compile_(constants=constants)
    for cluster in ("v5e:2x2", "2x2:a100"):
        with pytest.raises(ValueError, match=f"predicts; got '{cluster}'"):
            compile_(cluster, constants=Constants(1))
    assert not compiler


@pytest.mark.parametrize(
    "cluster, package", [("2:h100", "jax-cuda13-plugin"), ("v5e:2x2", "libtpu")]
)
def test_a_missing_compiler_is_named(monkeypatch, cluster, package):
    def version(name):
        if name in ("jax", "jaxlib"):
            return "0"
        raise compiling.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(compiling.importlib.metadata, "version", version)
    with pytest.raises(planning.CompileError, match=rf"{package}.*bagua-jax\[plan\]"):
        compile_(cluster)


def test_planning_alone_does_not_start_a_backend():
    code = (
        "import jax; from bagua_jax import planning; from jax._src import xla_bridge;"
        "assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- real compilation ---


@pytest.fixture
def cuda():
    reason = "the extra bagua-jax[plan] is not installed"
    pytest.importorskip("jax_cuda13_plugin", reason=reason)


_OWN = """
import jax, jax.numpy as jnp
from bagua_jax import Workers, planning, primitives, wire
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P

def step(x):
    return x - primitives.c_fp_s(jnp.tanh(x @ x), axis_name="workers")

x = jax.ShapeDtypeStruct((8, 256, 256), jnp.float32)
cluster = planning.Cluster.parse("2x4:h100")
"""
_THEIRS = """
devices = topologies.get_topology_desc(**cluster.topology()).devices
workers = Workers.devices(8, devices=devices)
program = workers.spmd(step, P("workers"), donate_argnums=0)
compiled = program.lower(*workers.placed((x,), P("workers"))).compile(
    compiler_options=planning.compiling._NCCL or None
)
memory = compiled.memory_analysis()
print([getattr(memory, name) for name in planning.Memory._fields])
print(wire.count(compiled))
"""


@pytest.mark.plan
def test_compiled_as_jax_itself_would(cuda, monkeypatch, tmp_path):
    """Against jax's own compilation for the same topology, in another process.

    Without a GPU jax loads its CUDA plugin only under JAX_PLATFORMS=cpu.
    """
    monkeypatch.setenv("BAGUA_JAX_CACHE", str(tmp_path))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    command = [sys.executable, "-c", _OWN + _THEIRS]
    theirs = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    scope = {}
    exec(_OWN, scope)
    step, x, cluster = (scope[name] for name in ("step", "x", "cluster"))
    ours = planning.compile(step, (x,), cluster, in_specs=WORKERS, donate_argnums=0)
    assert theirs.strip() == f"{[*ours.memory]}\n{wire.count(ours)}".strip()
    assert wire.count(ours).bytes_per_worker == 2 * 4 * 256 * 256 * 7 / 8


@pytest.mark.plan
@pytest.mark.parametrize("chip", planning.GPUS)
def test_every_gpu_compiles(cuda, monkeypatch, tmp_path, chip):
    monkeypatch.setenv("BAGUA_JAX_CACHE", str(tmp_path))
    found = compile_(f"2x2:{chip}")
    assert wire.count(found).bytes_per_worker == 2 * 16 * 3 / 4
    assert wire.count(found).bytes_between(found.cluster.nodes) == 2 * 16 * 3 / 4 / 2
    if found.cluster.has_timeline:
        assert planning.timeline(found).end > 0


@pytest.mark.plan
def test_a_slower_network_takes_longer(cuda, monkeypatch, tmp_path):
    monkeypatch.setenv("BAGUA_JAX_CACHE", str(tmp_path))
    x = jax.ShapeDtypeStruct((4, 2**20), jnp.float32)
    cluster = Cluster.parse("2x2:h100")
    lowered = planning.lower(deviation, (x,), cluster, in_specs=WORKERS)
    ends = [
        planning.timeline(
            planning.compile_lowered(lowered, cluster, constants=Constants(speed))
        ).end
        for speed in (1.25, 12.5)
    ]
    # A ring of 4 sends 1.5 x 4 MiB; most of it is bandwidth.
    assert 5 < ends[0] / ends[1] < 10


@pytest.mark.plan
def test_a_tpu_slice_compiles(monkeypatch, tmp_path):
    pytest.importorskip("libtpu", reason="the extra bagua-jax[plan] is not installed")
    monkeypatch.setenv("BAGUA_JAX_CACHE", str(tmp_path))
    cluster = Cluster.parse("v5e:2x2")
    x = jax.ShapeDtypeStruct((4, 4096), jnp.float32)
    found = planning.plan(
        deviation, (x,), cluster, in_specs=WORKERS, network=cluster.ici()
    )
    assert found.bytes_inside == 2 * 4 * 4096 * 3 / 4 and found.bytes_between == 0
    assert found.timeline is None and found.compiled.memory.total >= 2 * 4 * 4096
    rate = 200e9  # a v5e chip's links, each way
    assert found.communication.transfer == pytest.approx(found.bytes_inside / rate)
    assert "XLA, which predicts no times for this chip" in str(found)


_OPERATIONS = {
    "psum": lambda x: lax.psum(x, "workers"),
    "psum_scatter": lambda x: lax.psum_scatter(x, "workers", tiled=True),
    "all_gather": lambda x: lax.all_gather(x[: 2**22 // 8], "workers", tiled=True),
    "all_to_all": lambda x: lax.all_to_all(x, "workers", 0, 0, tiled=True),
    "ppermute": lambda x: lax.ppermute(
        x, "workers", [(i, (i + 1) % 8) for i in range(8)]
    ),
}


@pytest.mark.plan
@pytest.mark.parametrize(
    "cluster, constants, operation, microseconds",
    [
        ("8:h100", None, "psum", 145.3),
        ("8:h100", None, "psum_scatter", 86.6),
        ("8:h100", None, "all_gather", 82.2),
        ("8:h100", None, "all_to_all", 105.6),
        ("8:h100", None, "ppermute", 237.9),
        ("16x8:h100", None, "psum", 1395.7),
        ("16x8:h100", Constants(400), "psum", 84.4),
        ("16x8:h100", None, "all_to_all", 5145.3),
    ],
)
def test_latencies_of_an_earlier_study(
    cuda, monkeypatch, tmp_path, cluster, constants, operation, microseconds
):
    """16 MiB of f32 on each device: what the model of jax 0.10.2 charged before."""
    if jax.__version__ != "0.10.2":
        pytest.skip("another version of XLA may have another model")
    monkeypatch.setenv("BAGUA_JAX_CACHE", str(tmp_path))
    cluster = Cluster.parse(cluster)
    x = jax.ShapeDtypeStruct((cluster.num_devices, 2**22), jnp.float32)
    operate = _OPERATIONS[operation]
    compiled = planning.compile(
        operate, (x,), cluster, in_specs=WORKERS, constants=constants
    )
    (found,) = planning.timeline(compiled).collectives
    assert found.latency == pytest.approx(microseconds, abs=0.06)


@pytest.mark.plan
def test_what_xla_refuses_is_said(cuda, monkeypatch, tmp_path):
    monkeypatch.setenv("BAGUA_JAX_CACHE", str(tmp_path))
    with pytest.raises(planning.CompileError, match="no_such_flag"):
        compile_(options={"no_such_flag": "1"})
    assert not list(tmp_path.iterdir())
