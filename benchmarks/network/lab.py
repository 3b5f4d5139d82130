"""The lab: namespaces joined by a bridge, each with a shaped network card of its own.

Every worker runs in a network namespace whose ``eth0`` leads to one bridge. A token
bucket stands at both ends of each link, so that a worker has a full-duplex card of the
stated rate and what many send to one is limited, too. All of it lives inside private
network, mount and process namespaces: nothing of the machine's own network is touched,
and everything vanishes with the process that :func:`enter` started, however it ends.

::

    lab.enter()  # runs this program again inside private namespaces
    with lab.Lab(4, lab.NETWORKS["100mbit"]) as network:
        print(network.verify())
        outputs = network.run([sys.executable, "-m", "my_worker"])

Workers find ``WORKER``, ``WORKERS`` and ``COORDINATOR`` in their environment. Their
hosts file maps the machine's name to the address of their own ``eth0``: that is what
gloo binds to, and with the usual file it would bind to loopback, unshaped.
"""

import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

__all__ = ["NETWORKS", "SKIPPED", "Lab", "LabError", "Network", "enter", "missing"]

SKIPPED = 77  # exit status where the lab cannot be built here, as automake's
# Any namespace may use Reno. BBR's rate on links this short differs by 5 % from run to
# run, Reno's by 0.2 %.
CONGESTION_CONTROL = "reno"
_CONTROL = "/proc/sys/net/ipv4/tcp_congestion_control"
_INSIDE = "BAGUA_JAX_LAB"
_RUN = os.path.realpath("/var/run")  # where `ip netns` keeps its namespaces
_PROBE = str(Path(__file__).parent / "probe.py")
_SWITCH = str(Path(__file__).parent / "switch.py")


class Network(NamedTuple):
    """What every worker's link can do, in each direction."""

    name: str
    rate: float | None = None  # Mbit/s; None is unshaped
    delay: float = 0.0  # ms, one way


NETWORKS = {
    network.name: network
    for network in (
        Network("unshaped"),
        Network("1gbit", 1000),
        Network("100mbit", 100),
        Network("100mbit-10ms", 100, 10),
    )
}


class LabError(RuntimeError):
    """A network that is not what its name says, or a worker that failed."""


def enter() -> None:
    """Run this program again inside private namespaces; return only there.

    Where that is not possible, the program ends with status :data:`SKIPPED` and a
    message that says what is missing.
    """
    if os.environ.get(_INSIDE) == "1":
        _sh("mount", "-t", "tmpfs", "none", _RUN)
        os.mkdir(f"{_RUN}/netns")
        _sh("ip", "link", "set", "lo", "up")
        return
    reason = missing()
    if reason:
        _skip(reason)
    os.environ[_INSIDE] = "1"
    command = [*_private(), sys.executable, *sys.orig_argv[1:]]
    os.execvp(command[0], command)


def missing() -> str | None:
    """Say why the lab cannot be built here; ``None`` where it can."""
    for program in ("ip", "tc", "unshare", "mount"):
        if shutil.which(program) is None:
            return (
                f"`{program}` is missing (Debian: apt-get install iproute2 util-linux)"
            )
    trial = (
        "ip link add labbr type bridge && ip link add lab0 type veth peer name lab1 && "
        "tc qdisc add dev lab0 root tbf rate 100mbit burst 128kb latency 40ms"
    )
    ran = subprocess.run([*_private(), "sh", "-c", trial], capture_output=True)
    if ran.returncode:
        said = ran.stderr.decode(errors="replace").strip() or "no message"
        return (
            "private namespaces with a bridge, veth pairs and token buckets are not "
            f"allowed here: {said}. Run as root, or where unprivileged user namespaces "
            "are allowed, on Linux with the modules bridge, veth and sch_tbf"
        )
    return None


def _private() -> list[str]:
    """Command that runs another one as the first process of private namespaces."""
    options = ["--net", "--mount", "--pid", "--fork", "--kill-child"]
    if os.geteuid():
        options.append("--map-root-user")
    return ["unshare", *options, "--propagation", "private", "--"]


def _skip(reason: str) -> NoReturn:
    print(f"skipped: {reason}.", file=sys.stderr)
    raise SystemExit(SKIPPED)


def _sh(*command: str) -> None:
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if ran.returncode:
        said = ran.stdout.decode(errors="replace").strip()
        raise LabError(f"`{' '.join(command)}` failed: {said}")


def _has_netem() -> bool:
    """Try whether the kernel can delay frames."""
    trial = ["tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "0ms"]
    has = subprocess.run(trial, capture_output=True).returncode == 0
    if has:
        _sh("tc", "qdisc", "del", "dev", "lo", "root")
    return has


class Lab:
    """Namespaces of n workers on one network, until the end of the ``with`` block.

    Attributes:
        n: number of workers.
        network: what their links can do.
    """

    def __init__(self, n: int, network: Network) -> None:
        if os.environ.get(_INSIDE) != "1":
            raise LabError("Lab: call lab.enter() at the start of the program.")
        self.n, self.network = n, network
        self._running: list[subprocess.Popen] = []

    def __enter__(self) -> "Lab":
        with contextlib.ExitStack() as stack:
            folder = tempfile.TemporaryDirectory(dir=_RUN)  # private, in memory
            self._folder = stack.enter_context(folder)
            stack.callback(self._tear_down)
            self._build()
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def _build(self) -> None:
        for i in range(self.n):
            _sh("ip", "netns", "add", f"lab{i}")
            hosts = f"127.0.0.1 localhost\n{self.address(i)} {socket.gethostname()}\n"
            Path(self._folder, f"hosts{i}").write_text(hosts)
        self.delayed_by = ""
        if self.network.delay:
            self.delayed_by = "netem" if _has_netem() else "a switch in user space"
        if self.delayed_by.startswith("a switch"):
            self._connect_by_switch()
        else:
            self._connect_by_bridge()
        for i in range(self.n):
            inside = ["ip", "-n", f"lab{i}"]
            _sh(*inside, "link", "set", "lo", "up")
            _sh(*inside, "addr", "add", f"{self.address(i)}/24", "dev", "eth0")
            _sh(*inside, "link", "set", "eth0", "up")
            within = ["ip", "netns", "exec", f"lab{i}"]
            _sh(*within, "sh", "-c", f"echo {CONGESTION_CONTROL} > {_CONTROL}")
            self._shape(within, "eth0")  # what it sends

    def _connect_by_bridge(self) -> None:
        _sh("ip", "link", "add", "labbr", "type", "bridge")
        _sh("ip", "link", "set", "labbr", "up")
        for i in range(self.n):
            pair = ["type", "veth", "peer", "name", "eth0", "netns", f"lab{i}"]
            _sh("ip", "link", "add", f"lab{i}", *pair)
            _sh("ip", "link", "set", f"lab{i}", "master", "labbr", "up")
            self._shape([], f"lab{i}")  # what it receives

    def _connect_by_switch(self) -> None:
        names = [f"lab{i}" for i in range(self.n)]
        rate = str(self.network.rate or 0)
        command = [sys.executable, "-I", _SWITCH, str(self.network.delay), rate, *names]
        switch = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._running.append(switch)
        assert switch.stdout is not None and switch.stderr is not None
        if switch.stdout.readline() != b"ready\n":
            said = switch.stderr.read().decode(errors="replace")[-500:]
            raise LabError(
                f"{self.network.name}: this kernel has no netem, which delays frames, "
                f"and the switch in user space needs /dev/net/tun:\n{said}"
            )
        for i, name in enumerate(names):
            _sh("ip", "link", "set", name, "netns", f"lab{i}", "name", "eth0")

    def _shape(self, where: Sequence[str], device: str) -> None:
        add = [*where, "tc", "qdisc", "add", "dev", device]
        parent = ["root", "handle", "1:"]
        if self.network.rate is not None:
            # A burst holds more than one frame of 64 KB, the largest that Linux makes.
            bucket = f"tbf rate {self.network.rate:g}mbit burst 128kb latency 40ms"
            _sh(*add, *parent, *bucket.split())
            parent = ["parent", "1:1"]
        if self.delayed_by == "netem" and device == "eth0":
            delay = f"netem delay {self.network.delay:g}ms limit 10000"
            _sh(*add, *parent, *delay.split())

    def _tear_down(self) -> None:
        for process in self._running:
            process.kill()  # jax.distributed traps SIGTERM
        for process in self._running:
            process.wait()
        for i in range(self.n):  # a namespace takes its eth0 along, and that its peer
            subprocess.run(["ip", "netns", "del", f"lab{i}"], capture_output=True)
            subprocess.run(["ip", "link", "del", f"lab{i}"], capture_output=True)
        subprocess.run(["ip", "link", "del", "labbr"], capture_output=True)

    @staticmethod
    def address(worker: int) -> str:
        """Return the address of a worker's ``eth0``."""
        return f"10.77.0.{worker + 1}"

    def start(
        self, worker: int, command: Sequence[str], **popen: object
    ) -> subprocess.Popen:
        """Start a command as one worker; it is killed with the lab."""
        env = {
            **os.environ,
            "WORKER": str(worker),
            "WORKERS": str(self.n),
            "COORDINATOR": f"{self.address(0)}:29500",
            "NETWORK": self.network.name,
        }
        hosts = f"{self._folder}/hosts{worker}"
        bind = 'mount --bind "$0" /etc/hosts && exec "$@"'
        inside = ["ip", "netns", "exec", f"lab{worker}", "unshare", "--mount"]
        process = subprocess.Popen(
            [*inside, "sh", "-c", bind, hosts, *command],
            env=env,
            **popen,  # type: ignore[arg-type]
        )
        self._running.append(process)
        return process

    def run(
        self,
        command: Sequence[str] | Callable[[int], Sequence[str]],
        timeout: float = 600,
    ) -> list[dict]:
        """Run a command as every worker, and give the JSON object each printed.

        Args:
            command: the words, or a function of the worker that gives them.
            timeout: seconds after which all are killed.

        Raises:
            LabError: where one failed or printed no line that is a JSON object, with
                the end of what it wrote; the others are killed.
        """
        logs, workers = [], []
        for i in range(self.n):
            words = command(i) if callable(command) else command
            log = tempfile.TemporaryFile(dir=self._folder)
            out = tempfile.TemporaryFile(dir=self._folder)
            workers.append(self.start(i, words, stdout=out, stderr=log))
            logs.append((out, log))
        deadline, failed = time.monotonic() + timeout, None
        while failed is None and any(w.poll() is None for w in workers):
            bad = [i for i, w in enumerate(workers) if w.poll() not in (None, 0)]
            if bad or time.monotonic() > deadline:
                failed = (
                    bad[0]
                    if bad
                    else next(i for i, w in enumerate(workers) if w.poll() is None)
                )
            time.sleep(0.02)
        statuses = [w.poll() for w in workers]
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
            self._running.remove(worker)
        texts = []
        for out, log in logs:
            for file in (out, log):
                file.seek(0)
            texts.append([f.read().decode(errors="replace") for f in (out, log)])
            out.close()
            log.close()
        bad = [i for i, status in enumerate(statuses) if status != 0]
        if failed is not None or bad:
            i = bad[0] if failed is None else failed
            what = f"{timeout:g} s passed" if statuses[i] is None else statuses[i]
            raise LabError(f"worker {i} failed ({what}):\n" + "".join(texts[i])[-4000:])
        return [_object(out) for out, _ in texts]

    def verify(self, seconds: float = 2.0) -> dict[str, float | str]:
        """Measure what the network really does, before anything is measured on it.

        Every worker sends to the next at once; then 64 bytes go to and fro between the
        first two.

        Returns:
            ``throughput_mbit``, payload that arrives at the slowest worker, each in
            the best of a few tries; ``rtt_ms``, median; ``congestion_control``.

        Raises:
            LabError: if a shaped network's rate is not 90 to 100 % of its name's, or
                the round trip is shorter than its delays: nothing runs under a name
                that is not true.
        """
        rate, best, trips = self.network.rate, [0.0] * self.n, []
        for _ in range(4):  # other work on the machine slows a try, and speeds up none
            for i, result in enumerate(self._measure(seconds)):
                best[i] = max(best[i], result["throughput_mbit"])
                trips += result.get("rtt_ms", [])
            if rate is None or min(best) >= 0.9 * rate:
                break
        rtt = statistics.median(trips)
        if rate and not (0.9 * rate <= min(best) and max(best) <= rate):
            raise LabError(
                f"{self.network.name}: workers received {best} Mbit/s, which is not "
                f"what the name says. Nothing was run."
            )
        if rtt < 1.98 * self.network.delay:
            raise LabError(
                f"{self.network.name}: a round trip takes {rtt:.3f} ms, less than the "
                "delays of the name. Nothing was run."
            )
        return {
            "throughput_mbit": round(min(best), 1),
            "rtt_ms": round(rtt, 3),
            "delayed_by": self.delayed_by or "nothing",
            "congestion_control": CONGESTION_CONTROL,
        }

    def _measure(self, seconds: float) -> list[dict]:
        def probe(i):
            peer = self.address((i + 1) % self.n)
            return [sys.executable, "-I", _PROBE, self.address(i), peer, str(seconds)]

        return self.run(probe, timeout=seconds + 60)


def _object(text: str) -> dict:
    """Find the JSON object among what a worker printed; gloo prints, too."""
    lines = [line for line in text.splitlines() if line.startswith("{")]
    if not lines:
        raise LabError(f"a worker printed no result:\n{text[-2000:]}")
    return json.loads(lines[-1])
