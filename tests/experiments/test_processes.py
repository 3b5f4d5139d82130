"""Several processes: equal numbers, one supervisor, nothing lost and nothing left."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from bagua_jax import processes
from bagua_jax.experiments.runs import supervise

ALGORITHMS = [
    {"name": "gradient_allreduce"},
    {"name": "bytegrad", "error_feedback": "both"},
    {
        "name": "qadam",
        "learning_rate": 0.05,
        "warmup_steps": 5,
        "error_feedback": "both",
    },
    {
        "name": "decentralized",
        "topology": "one_peer_exponential",
        "local_steps": 3,
    },
    {"name": "low_precision_decentralized"},
    {
        "name": "async_model_average",
        "local_steps": 3,
        "staleness": 2,
        "warmup_steps": 2,
    },
]
# gloo adds in another order than the host devices of one process: what sums in full
# precision differs in its last bits, and what moves bytes or gossips does not.
SUMS = ("gradient_allreduce", "qadam", "async_model_average")


def launch(*argv: str, **popen) -> subprocess.Popen:
    """Start `bagua-jax launch`; what it and its processes print can be read."""
    # A child of a background job inherits that Ctrl-C is ignored; here it may not be.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "bagua_jax.experiments", "launch", *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **popen,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def children(process: subprocess.Popen) -> list[int]:
    """Processes that a process has started and that still are."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(number) for number in path.read_text().split()]


def test_all_six_are_the_same_in_two_processes(lab):
    config = lab.config(output=str(lab.root / "two"), algorithms=ALGORITHMS)
    said, _ = (ours := launch("-n", "2", "--", "run", config)).communicate(timeout=300)
    assert ours.returncode == 0, said
    assert said.count("4 workers on host devices in 2 processes") == 2
    assert lab.run(output="one", algorithms=ALGORITHMS)[0] == 0
    for label in (entry["name"] for entry in ALGORITHMS):
        two, one = lab.lines(label, "two"), lab.lines(label, "one")
        assert [line.keys() for line in two] == [line.keys() for line in one]
        assert lab.summary(label, "two")["wire"] == lab.summary(label, "one")["wire"]
        if label in SUMS:
            for ours, theirs in zip(two, one, strict=True):
                np.testing.assert_allclose(
                    list(ours.values()), list(theirs.values()), rtol=2e-5, atol=1e-9
                )
        else:
            assert two == one
            assert lab.state(label, "two") == lab.state(label, "one")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killed_stopped_and_continued_by_another_number_of_processes(lab):
    """The coordinator is killed, then all are interrupted; one process finishes."""
    changes = {"algorithms": ALGORITHMS[1:2], "steps": 3000, "eval_every": 1500}
    changes["checkpoint_every"] = 120
    assert lab.run(output="whole", **changes)[0] == 0
    config = lab.config(output=str(lab.root / "cut"), **changes)
    ours = launch("-n", "2", "--restarts", "1", "--", "run", config)

    def wait_for(steps: int) -> None:
        until = time.monotonic() + 200
        while time.monotonic() < until and ours.poll() is None:
            paths = (lab.root / "cut").glob("*/*/metrics.jsonl")
            if sum(path.read_bytes().count(b"\n") for path in paths) > steps:
                return
            time.sleep(0.01)
        pytest.fail(f"never came to step {steps}: {ours.communicate()[0]}")

    wait_for(150)
    first, second = children(ours)
    os.kill(first, signal.SIGKILL)
    wait_for(400)
    again = children(ours)
    assert not {first, second} & set(again) and len(again) == 2
    ours.send_signal(signal.SIGINT)
    said, _ = ours.communicate(timeout=60)
    assert ours.returncode == 1 and "the same command continues" in said
    assert "process 0 (workers 0 to 1, host" in said and "killed by SIGKILL at" in said
    assert "continues after step" in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in again)

    last, _ = (ours := launch("-n", "1", "--", "run", config)).communicate(timeout=300)
    assert ours.returncode == 0 and "continues after step" in last, last
    assert lab.lines("bytegrad", "cut") == lab.lines("bytegrad", "whole")
    assert lab.state("bytegrad", "cut") == lab.state("bytegrad", "whole")
    left = (lab.folder("bytegrad", "cut") / "checkpoints").iterdir()
    assert {path.name for path in left} == {"2880", "3000"}


# --- what is refused ---


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["-n", "3", "--", "run", "CONFIG"], "4 workers cannot go equally to 3"),
        (["-n", "2"], "comes after --"),
        (["-n", "2", "--", "list"], "`run CONFIG` in several processes"),
        (["-n", "2", "--", "run", "CONFIG", "--where", "devices"], "got 'devices'"),
        (["-n", "2", "--", "run", "CONFIG", "--steps", "0"], "steps: must be from 1"),
    ],
    ids=str,
)
def test_launch_refuses(lab, argv, words):
    config = lab.config(output=str(lab.root))
    argv = [config if word == "CONFIG" else word for word in argv]
    status, out, err = lab.main("launch", *argv)
    assert status == 2 and words in err, (out, err)


def test_processes_need_a_launcher(lab, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "MPI_", "OMPI_", "BAGUA_JAX_")):
            monkeypatch.delenv(name)
    status, _, err = lab.run("--where", "processes")
    assert status == 2 and "bagua-jax launch -n 2 -- run CONFIG" in err


@pytest.mark.parametrize(
    ("resolved", "hosts", "words"),
    [
        ("203.0.113.7", 1, "no address of this host"),
        ("127.0.0.1", 2, "there are 2 hosts"),
        (None, 1, "resolves to no address"),
        ("8.8.8.8", 1, "a public address"),
    ],
)
def test_a_host_name_that_collectives_cannot_use_is_refused(
    monkeypatch, resolved, hosts, words
):
    def getaddrinfo(name, *args, **kwargs):
        if resolved is None:
            raise OSError("Name or service not known")
        return [(processes.socket.AF_INET, None, None, "", (resolved, 0))]

    monkeypatch.setattr(processes.socket, "getaddrinfo", getaddrinfo)
    if words == "a public address":  # as if it were this host's
        monkeypatch.setattr(processes.socket.socket, "bind", lambda *args: None)
    with pytest.raises(ValueError, match=words) as refusal:
        processes.listening_address(hosts=hosts)
    assert "/etc/hosts" in str(refusal.value)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ("192.0.2.5:9999", ValueError, "cannot listen on 192.0.2.5:9999"),
        ("no such host:9999", ValueError, "cannot listen on no such host:9999"),
        ("junk", ValueError, "must be host:port, .* got 'junk'"),
        (":9999", ValueError, "must be host:port"),
        ("127.0.0.1:99999", ValueError, "from 1 to 65535; got '127.0.0.1:99999'"),
        ("127.0.0.1:0", ValueError, "from 1 to 65535"),
        ("127.0.0.1:TAKEN", ConnectionError, "Address already in use"),
    ],
)
def test_an_address_that_the_coordinator_cannot_use_is_refused(given, error, words):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = given.replace("TAKEN", str(taken.getsockname()[1]))
        with pytest.raises(error, match=words):
            processes.initialize(
                coordinator_address=given,
                coordinator_bind_address=given,
                num_processes=2,
                process_id=0,
            )


@pytest.mark.parametrize(
    "value", ["", "junk", "1", "3/2", "2/2", "-1/2", "0/0", "1/2/3"]
)
def test_junk_in_the_environment_of_launch_is_refused(lab, monkeypatch, value):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:9999")
    monkeypatch.setenv(processes.PROCESS, value)
    with pytest.raises(ValueError, match=f"{processes.PROCESS} must be") as refusal:
        processes.find()
    assert f"got {value!r}" in str(refusal.value)
    monkeypatch.setattr(supervise.faulthandler, "register", lambda number: None)
    monkeypatch.setattr(supervise.ctypes, "CDLL", mock.MagicMock())
    status, _, err = lab.run()  # no supervisor has started this process
    assert status == 2 and f"{processes.PROCESS}={value!r}" in err and "unset" in err


def test_a_process_without_its_coordinator_is_refused(monkeypatch):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    monkeypatch.setenv(processes.PROCESS, "0/2")
    with pytest.raises(ValueError, match="JAX_COORDINATOR_ADDRESS"):
        processes.find()


def test_a_taken_port_is_changed_for_another(lab, monkeypatch):
    config = lab.config(output=str(lab.root), algorithms=["bytegrad"], steps=3)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address)
        ours = launch("-n", "2", "--restarts", "2", "--", "run", config)
        said, _ = ours.communicate(timeout=300)
    assert ours.returncode == 0, said
    assert f"cannot listen on {address}: Address already in use" in said
    assert "exit status 3 at starting" in said and "restart 1 of 2" in said
    assert "restart 2" not in said


# --- what processes compare when they join ---


DIFFERENT = """
import sys
from bagua_jax import processes

_, index, port, steps, version = sys.argv
if version:
    found = processes.metadata.version
    processes.metadata.version = lambda name: version if name == "jax" else found(name)
address = f"127.0.0.1:{port}"
try:
    processes.initialize(
        facts={"config.steps": int(steps), "config.seed": 0},
        coordinator_address=address,
        coordinator_bind_address=address,
        num_processes=3,
        process_id=int(index),
    )
    print("joined")
except ValueError as error:
    print(error)
"""


def join_three(*others: tuple[str, str, Path]) -> list[str]:
    """Join three processes, the last with another number of steps, version, or tree."""
    port = supervise.free_addresses(1)[0].rpartition(":")[2]
    own = ("20", "", Path(__file__).parents[2])
    ran = []
    for index, (steps, version, tree) in enumerate([own, own, *others]):
        words = [sys.executable, "-c", DIFFERENT, str(index), port, steps, version]
        env = clean_environment() | {"PYTHONPATH": str(tree)}
        ran.append(subprocess.Popen(words, env=env, stdout=-1, text=True, cwd=tree))
    said = [process.communicate(timeout=200)[0] for process in ran]
    return [text.splitlines()[-1] for text in said]


def test_processes_that_differ_are_named_in_all(tmp_path):
    root = Path(__file__).parents[2]
    assert join_three(("20", "", root)) == ["joined"] * 3
    for name in ("bagua_jax", "algorithms", "experiments"):
        shutil.copytree(
            root / name,
            tmp_path / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    with open(tmp_path / "bagua_jax" / "algorithms" / "bytegrad.py", "a") as file:
        file.write("# one comment\n")
    (said, *same) = join_three(("30", "0.1.2", tmp_path))
    assert same == [said, said]
    assert "process 2 on host" in said and "differs from process 0" in said
    jax_here = processes.metadata.version("jax")
    for words in (
        "config.steps is 30 in process 2 and 20 in process 0",
        f"version of jax is '0.1.2' in process 2 and '{jax_here}' in process 0",
        "hash of bagua_jax's source is '",
        f"and '{processes.code_identity()}' in process 0",
    ):
        assert words in said
    assert "config.seed" not in said


def test_this_host_has_an_address_to_listen_on():
    address = processes.listening_address()
    assert not processes.ipaddress.ip_address(address).is_global


FAILS = """
import sys, time
from bagua_jax import processes
from bagua_jax.experiments import cli
from bagua_jax.experiments.runs.folders import RunError

_, index, port, error = sys.argv
address = f"127.0.0.1:{port}"
processes.initialize(
    coordinator_address=address, num_processes=2, process_id=int(index)
)
def fail(flags):
    raise getattr(__builtins__, error, RunError)("no room")
cli.parse = fail if int(index) else lambda argv: time.sleep(600)
sys.exit(cli.main([]))
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(("error", "status"), [("RunError", 1), ("KeyError", 3)])
def test_a_process_ends_though_its_log_is_on_a_full_disk(error, status):
    """It has others: leaving in the usual way would be to wait for them."""
    port = supervise.free_addresses(1)[0].rpartition(":")[2]
    words = [sys.executable, "-c", FAILS]
    with open("/dev/full", "w") as full:
        first = subprocess.Popen([*words, "0", port, error])
        second = subprocess.Popen([*words, "1", port, error], stdout=full, stderr=full)
        try:
            assert second.wait(timeout=60) == status
        finally:
            for process in (first, second):
                process.kill()
                process.wait()


# --- the supervisor, over programs of a line or two ---


STORED = """
import os, sys
import jax
from bagua_jax import Workers, processes

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
join = jax.distributed.initialize if sys.argv[1] == "jax" else processes.initialize
join(coordinator_address=f"127.0.0.1:{sys.argv[2]}", num_processes=1, process_id=0)
workers = Workers.devices()
workers.spmd(lambda x: x + jax.lax.psum(x, "workers"), in_specs=workers.spec)(
    jax.numpy.ones((2, 3))
)
print(sorted(os.listdir(os.environ["JAX_COMPILATION_CACHE_DIR"])))
"""


@pytest.mark.parametrize("join", ["jax", "ours"])
def test_programs_of_joined_processes_are_not_stored(tmp_path, join):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ran = subprocess.run(
        [sys.executable, "-c", STORED, join, port],
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        },
    )
    if join == "ours":
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.splitlines()[-1] == "[]"  # gloo says something, too
    else:
        assert ran.returncode == 1
        assert "Workers.devices: on CPUs, programs of several" in ran.stderr
        assert "JAX_ENABLE_COMPILATION_CACHE=false" in ran.stderr


def watch(
    tmp_path, program: str, count: int = 2, together=True, fatal=(), **policy
) -> int | list[int]:
    """Supervise a program that may ``beat`` and knows its number and its attempt."""
    start = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from bagua_jax.experiments.runs.supervise import beat, tie\n"
        "tie()\n"
        "me = int(os.environ['BAGUA_JAX_PROCESS'][0])\n"
        f"count = Path({str(tmp_path)!r}) / f'attempts{{me}}'\n"
        "attempt = len(count.read_text()) if count.exists() else 0\n"
        "count.write_text('x' * (attempt + 1))\n"
        "Path(str(count) + '.pid').write_text(str(os.getpid()))\n"
    )
    own = supervise.Program([sys.executable, "-c", start + program])
    size = count if together else 1
    statuses = supervise.supervise(
        [lambda attempt: [own] * size] * (count // size),
        count,
        tmp_path,
        name="launch",
        labels=["first", "second"],
        workers=2 * count,
        policy=supervise.Policy(**{"backoff": 0.01} | policy),
        fatal=fatal,
    )
    return statuses[0] if together else statuses


def attempts(tmp_path) -> int:
    return len((tmp_path / "attempts0").read_text())


def test_all_finish(tmp_path):
    assert watch(tmp_path, "beat('step', 'first', 1)") == 0


def test_the_last_words_of_the_first_process_are_passed_on(tmp_path, capfd):
    program = "print('bagua-jax: warning: me', me, file=sys.stderr, flush=True)"
    assert watch(tmp_path, program) == 0
    assert capfd.readouterr().err.count("bagua-jax: warning: me 0") == 1


def test_the_exit_status_is_that_of_the_first_failure(tmp_path, capfd):
    program = "beat('step', 'first', 7); print('why', file=sys.stderr, flush=True)\n"
    program += "sys.exit(5) if me else time.sleep(600)"
    assert watch(tmp_path, program, restarts=9) == 5
    said = capfd.readouterr().err
    assert "process 1 (workers 2 to 3, host" in said
    assert "exit status 5 at step 7 of first" in said and "    why" in said
    assert "restart" not in said  # it said itself that it could not go on


def test_a_signal_is_named_and_all_start_again(tmp_path, capfd):
    program = "beat('step', 'first', 5 * attempt + 5)\n"
    program += "os.kill(os.getpid(), signal.SIGKILL) if me and attempt < 2 else None\n"
    program += "other = count.with_name('attempts1')\n"
    program += (
        "while not other.exists() or len(other.read_text()) < 3: time.sleep(0.01)"
    )
    assert watch(tmp_path, program, restarts=2) == 0
    said = capfd.readouterr().err
    assert "SIGKILL at step 5 of first" in said and "SIGKILL at step 10" in said
    assert "restart 2 of 2" in said


def test_restarts_are_bounded(tmp_path, capfd):
    program = "beat('step', 'second', attempt + 1); sys.exit(3)"
    assert watch(tmp_path, program, 1, restarts=2) == 3
    assert "gives up after 2 restarts" in capfd.readouterr().err
    assert attempts(tmp_path) == 3


def test_one_that_dies_in_its_first_start_is_started_again(tmp_path, capfd):
    # The other may be stopped before it has counted its attempt.
    program = "sys.exit(0 if me or attempt else 3)"
    assert watch(tmp_path, program, restarts=1) == 0
    assert "exit status 3 at starting" in capfd.readouterr().err
    assert watch(tmp_path, "sys.exit(3)", restarts=9) == 3  # attempts count on
    assert "no step was gained" in capfd.readouterr().err


# --- teams of one ---


ALONE = "other = count.with_name(f'attempts{1 - me}')\n"


def test_one_that_dies_alone_is_started_again_alone(tmp_path, capfd):
    program = ALONE + (
        "beat('step', 'first', 5 * attempt + 5)\n"
        "if me and not attempt: os.kill(os.getpid(), signal.SIGKILL)\n"
        "while not other.exists() or len(other.read_text()) < 2 - me: time.sleep(0.01)"
    )
    assert watch(tmp_path, program, together=False, restarts=1) == [0, 0]
    said = capfd.readouterr().err
    assert "process 1 (worker" in said and "the others go on" in said
    assert attempts(tmp_path) == 1
    assert (tmp_path / "attempts1").read_text() == "xx"


def test_one_that_is_given_up_leaves_the_others(tmp_path):
    program = "sys.exit(5) if me else beat('step', 'first', 1)"
    assert watch(tmp_path, program, together=False) == [0, 5]


def test_a_status_may_end_all(tmp_path):
    program = "sys.exit(4) if me else time.sleep(600)"
    assert watch(tmp_path, program, together=False, fatal=(4,)) == [4, 4]


def test_one_that_waits_for_others_does_not_hang(tmp_path):
    program = ALONE + (
        "beat('waiting' if me else 'step', 'first', 1)\n"
        "for k in range(20 * (1 - me)): time.sleep(0.1); beat('step', 'first', k)\n"
        "while me and not other.with_suffix('.end').exists(): time.sleep(0.01)\n"
        "count.with_suffix('.end').touch()"
    )
    found = watch(tmp_path, program, together=False, start_within=1.5, stuck_after=9.0)
    assert found == [0, 0]


def test_without_a_step_gained_it_gives_up(tmp_path, capfd):
    program = "beat('step', 'second', 4); os.kill(os.getpid(), signal.SIGSEGV)"
    assert watch(tmp_path, program, 1, restarts=9) == 128 + signal.SIGSEGV
    assert "no step was gained" in capfd.readouterr().err
    assert attempts(tmp_path) == 2
    assert watch(tmp_path, program, 1, restarts=9, give_up_after=3) == 139
    assert attempts(tmp_path) == 2 + 4


def test_a_process_that_hangs_is_found_among_those_that_wait(tmp_path, capfd):
    program = "beat('step', 'first', 3)\n"
    program += "if me != 1: time.sleep(0.2); beat('step', 'first', 4)\n"
    program += "os.kill(os.getpid(), signal.SIGSTOP) if me == 1 else time.sleep(600)"
    assert watch(tmp_path, program, 3, stuck_after=1.0) == 128 + signal.SIGALRM
    said = capfd.readouterr().err
    assert "process 1 (workers 2 to 3" in said and "has not moved" in said
    assert "at step 3 of first" in said


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's tie is Linux's")
def test_no_process_is_left_when_the_supervisor_is_killed(tmp_path):
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_processes\n"
        "from pathlib import Path\n"
        "test_processes.watch(Path(sys.argv[2]), 'time.sleep(600)')"
    )
    here = str(Path(__file__).parent)
    with subprocess.Popen([sys.executable, "-c", program, here, str(tmp_path)]) as it:
        pids = [tmp_path / f"attempts{me}.pid" for me in range(2)]
        while not all(path.exists() and path.read_text() for path in pids):
            time.sleep(0.01)
        it.kill()
    left = [int(path.read_text()) for path in pids]
    until = time.monotonic() + 20
    while any(map(is_alive, left)) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(map(is_alive, left))


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


# --- other launchers ---


def clean_environment() -> dict[str, str]:
    """Return the environment without what launchers leave in it."""
    ours = ("SLURM_", "MPI_", "OMPI_", "PMI_", "BAGUA_JAX_", "JAX_COORDINATOR")
    return {k: v for k, v in os.environ.items() if not k.startswith(ours)}


def require_equal_to_devices(lab, output: str) -> None:
    """Compare a run of gossip, on two workers, with that on two host devices."""
    label = "low_precision_decentralized"
    assert lab.run(output="one", algorithms=[label], workers=2, steps=4)[0] == 0
    assert lab.lines(label, output) == lab.lines(label, "one")
    assert lab.state(label, output) == lab.state(label, "one")


def command(lab, output: str) -> list[str]:
    """Return the command that every process runs, by whatever launcher."""
    changes = {"algorithms": ["low_precision_decentralized"], "workers": 2, "steps": 4}
    changes |= {"output": str(lab.root / output), "where": "processes"}
    program = [sys.executable, "-m", "bagua_jax.experiments", "run"]
    return [*program, lab.config(**changes)]


def test_processes_of_two_configs_do_not_start(lab):
    job = {
        "SLURM_JOB_ID": str(os.getpid() + 1),
        "SLURM_STEP_NODELIST": processes.socket.gethostname(),
        "SLURM_NTASKS": "2",
        "SLURM_LOCALID": "0",
    }
    words, tasks = command(lab, "slurm"), []
    for task, seed in enumerate(("0", "7")):
        env = clean_environment() | job | {"SLURM_PROCID": str(task)}
        tasks.append(
            subprocess.Popen(
                [*words, "--seed", seed], env=env, stderr=subprocess.PIPE, text=True
            )
        )
    said = [task.communicate(timeout=300)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [2, 2], said
    for text in said:
        assert "config.seed is 7 in process 1 and 0 in process 0" in text
        assert text.count("Traceback") == 0
    assert not (lab.root / "slurm").exists()


def test_slurm(lab):
    """SLURM's variables as srun sets them; no SLURM was needed, and none was used."""
    job = {
        "SLURM_JOB_ID": str(os.getpid()),  # which chooses the port
        "SLURM_STEP_NODELIST": processes.socket.gethostname(),
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
    }
    words, tasks = command(lab, "slurm"), []
    for task in ("0", "1"):
        own = job | {"SLURM_PROCID": task, "SLURM_LOCALID": task}
        out = subprocess.PIPE
        tasks.append(
            subprocess.Popen(
                words,
                env=clean_environment() | own,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        said = [task.communicate(timeout=300)[0] for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [0, 0], said
    require_equal_to_devices(lab, "slurm")


def mpiexec() -> Path | None:
    """Find the mpiexec of the MPI that mpi4py uses here."""
    found = Path(sys.executable).with_name("mpiexec")
    return found if found.exists() and find_spec("mpi4py") else None


@pytest.mark.skipif(not mpiexec(), reason="the wheels mpich and mpi4py are needed")
def test_mpiexec(lab):
    done = subprocess.run(
        [str(mpiexec()), "-n", "2", *command(lab, "mpi")],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    require_equal_to_devices(lab, "mpi")
