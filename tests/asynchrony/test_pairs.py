"""Pair gossip: the mean is kept, messages are not believed, a worker may die."""

import fcntl
import io
import json
import math
import os
import tempfile
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asynchrony.processes import Workers, free_ports
from asynchrony.training import Trainer, initial

from bagua_jax.asynchrony import (
    Event,
    PairArithmetic,
    PairGossip,
    Replica,
    pairs,
    replay,
)
from bagua_jax.asynchrony.messages import (
    Kind,
    Message,
    decode,
    encode,
    write_facts,
)
from bagua_jax.asynchrony.transport import Server, endpoint
from bagua_jax.compressors import Compressor, blockwise, minmax_uint8, qsgd, randk, topk

zmq = pytest.importorskip("zmq")
SECRET = bytes(range(32))


def addresses(n: int) -> list[str]:
    return [f"127.0.0.1:{port}" for port in free_ports(n)]


# --- what a pair computes ---


@pytest.mark.parametrize("compressor", [None, minmax_uint8(), topk(0.2)])
def test_a_pair_agrees_exactly_and_keeps_its_mean(compressor: Compressor | None):
    """With a compressor, too, in the limit: differences to the reference are sent."""
    x = jax.random.normal(jax.random.key(0), (2, 40)) * 3 + 10
    exchange = PairArithmetic(x[0], compressor).replayed()
    x = [x[0], x[1]]
    mean = (x[0] + x[1]) / 2
    distances = []
    for number in range(60):
        if number == 3:  # progress that a compressor has to catch up with
            x[0], mean = x[0] + 1.0, mean + 0.5
        first, second = exchange(number, (0, 1), x)
        np.testing.assert_array_equal(first, -second)
        x = [x[0] + first, x[1] + second]
        distances.append(float(jnp.max(jnp.abs(x[0] - x[1]))))
    assert distances[0] < 1e-5  # the first exchange is in full precision
    assert distances[-1] < 1e-5
    np.testing.assert_allclose((x[0] + x[1]) / 2, mean, atol=1e-5)


def test_a_compressed_exchange_follows_its_equations():
    y = [jnp.array([1.0, -2.0, 0.5]), jnp.array([3.0, 0.0, 0.25])]
    arithmetic, codec = PairArithmetic(y[0], minmax_uint8()), minmax_uint8()
    exchange = arithmetic.replayed()
    exchange(1, (0, 1), y)
    r = (y[0] + y[1]) / 2
    y = [r + jnp.array([0.3, 0.0, 0.1]), r - jnp.array([0.0, 0.7, 0.2])]

    @jax.jit
    def q(v):
        return codec.decompress(codec.compress(None, v, ())[0], v)

    first, _ = exchange(2, (0, 1), y)
    np.testing.assert_allclose(first, (q(y[1] - r) - q(y[0] - r)) / 2, atol=1e-6)
    assert sum(a.nbytes for a in arithmetic.code((y[0],), (r,), 2, 0)) == 3 + 8


@pytest.mark.parametrize(
    ("compressor", "why"),
    [(qsgd(1), "no contraction"), (randk(0.1), "no contraction")],
)
def test_a_compressor_that_would_diverge_is_refused(compressor, why):
    with pytest.raises(ValueError, match=why):
        PairArithmetic(jnp.zeros(1000), compressor)


# --- workers in threads ---


def train_in_threads(
    n: int, compressor: Compressor | None, is_enough, timeout_s: float = 5.0
):
    """Run n workers of one process until it is enough, as their gossips say.

    Returns their replicas, gossips and events.
    """
    where = addresses(n)
    replicas = [Replica(initial()) for _ in range(n)]
    logs = [io.StringIO() for _ in range(n)]
    gossips = [
        PairGossip(
            replicas[w],
            worker=w,
            addresses=where,
            secret=SECRET,
            compressor=compressor,
            log=logs[w],
            timeout_s=timeout_s,
        )
        for w in range(n)
    ]
    trainers = [Trainer(w) for w in range(n)]
    failures = []

    def work(w):
        def slowly(params):
            time.sleep(0.002 * (1 + 2 * (w == 0)))
            return trainers[w](params)

        try:
            with gossips[w]:
                while not is_enough(gossips):
                    replicas[w].step(slowly)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(w,)) for w in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(180)
    assert not failures and not any(thread.is_alive() for thread in threads)
    return replicas, gossips, {w: parsed(log) for w, log in enumerate(logs)}


def parsed(log: io.StringIO) -> list[Event]:
    lines = map(json.loads, log.getvalue().splitlines())
    return [Event(**x | {"workers": tuple(x["workers"])}) for x in lines]


def assert_replayed(replicas, events, compressor: Compressor | None, steps: list[int]):
    """The events alone lead to the same parameters, bit for bit."""
    again = {w: Replica(initial()) for w in events}
    trainers = [Trainer(w) for w in range(len(events))]
    replay(
        events,
        again,
        lambda w, x: trainers[w](x)[0],
        PairArithmetic(initial(), compressor).replayed(),
        dict(enumerate(steps)),
    )
    for w in events:
        for name, value in replicas[w].params.items():
            np.testing.assert_array_equal(again[w].params[name], value, f"{w} {name}")


@pytest.mark.parametrize("compressor", [None, blockwise(8, 16)])
def test_the_replay_ends_bit_for_bit_where_the_run_did(compressor):
    n = 3

    def is_enough(gossips):
        in_step = max(gossip._log.getvalue().count("true") for gossip in gossips)
        return min(g.exchanges for g in gossips) > 5 and in_step

    replicas, gossips, events = train_in_threads(n, compressor, is_enough)
    numbers = [e.exchange for own in events.values() for e in own]
    assert all(numbers.count(e) == 2 for e in numbers)  # both sides, or neither
    assert [g.exchanges for g in gossips] == [len(events[w]) for w in range(n)]
    assert not any(g.refused for g in gossips)
    assert any(event.in_step for own in events.values() for event in own)
    assert_replayed(replicas, events, compressor, [x.steps for x in replicas])


def test_a_lost_message_tears_no_exchange_apart(monkeypatch):
    """Every fifth question, payload, commitment and answer vanishes."""
    kinds = (Kind.ASK, Kind.GRANT, Kind.OFFER, Kind.GIVE, Kind.COMMIT, Kind.DONE)
    sent, send = dict.fromkeys(kinds, 0), pairs._send

    def lossy(socket, frames):
        kind = frames[-1][20]  # in the header
        if kind in sent:
            sent[kind] += 1
            if sent[kind] % 5 == 0:
                return True
        return send(socket, frames)

    monkeypatch.setattr(pairs, "_send", lossy)
    replicas, _, events = train_in_threads(
        2, None, lambda _: min(sent.values()) >= 10, timeout_s=0.3
    )
    numbers = [[e.exchange for e in events[w]] for w in (0, 1)]
    assert len(numbers[0]) > 5
    assert sorted(numbers[0]) == sorted(numbers[1])  # both sides, or neither
    assert_replayed(replicas, events, None, [x.steps for x in replicas])


def test_who_rests_wakes_when_the_rest_is_over(listening, monkeypatch):
    """Else two workers that asked each other at the same time do it again and again."""
    gossip, _, _ = listening
    waits, attend, rested = [], gossip._attend, threading.Event()

    def watched(wait_s):
        waits.append((wait_s, gossip._rest_until - time.monotonic()))
        if len(waits) < 20:
            gossip._rest_until = time.monotonic() + 0.005
        else:
            rested.set()
        attend(0.0)

    monkeypatch.setattr(gossip, "_attend", watched)
    assert rested.wait(30)
    assert max(wait for wait, _ in waits[1:20]) <= 0.005


# --- strangers and noise ---


class Stranger:
    """Speaks to a worker over sockets of its own, in the name of worker 1."""

    def __init__(self, address: str, secret: bytes, largest: int = 10**6):
        (own,) = addresses(1)
        self._server = Server(own, secret, largest)
        self.socket = self._server.connect(address)

    def say(self, data: bytes | list[bytes], wait_ms: int = 5000) -> bytes | None:
        """Send something; the answer, if there is one."""
        if not self.socket.poll(wait_ms, zmq.POLLOUT):
            return None
        frames = data if isinstance(data, list) else [data]
        self.socket.send_multipart(frames, zmq.NOBLOCK)
        return self.hear(wait_ms)

    def hear(self, wait_ms: int = 5000) -> bytes | None:
        """Wait for an answer."""
        return self.socket.recv() if self.socket.poll(wait_ms, zmq.POLLIN) else None

    def __enter__(self) -> "Stranger":
        return self

    def __exit__(self, *error) -> None:
        self._server.close()


@pytest.fixture
def listening():
    """A worker that has begun, alone, with a model of four numbers."""
    where = addresses(2)
    replica = Replica(jnp.array([1.0, 2.0, 3.0, 4.0]))
    gossip = PairGossip(
        replica,
        worker=0,
        addresses=where,
        secret=SECRET,
        patience_s=0.0,
        timeout_s=0.5,
    )
    with gossip:
        yield gossip, replica, where[0]


def question(gossip, kind: Kind, number: int, *arrays, **fields) -> bytes:
    message = Message(kind, 1, number, arrays=tuple(arrays), **fields)
    return encode(message, gossip._layout)


def answer(gossip, data: bytes | None) -> Message:
    assert data is not None, gossip.refused
    return decode(data, gossip._layout)


def test_what_a_killed_worker_left_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folders = [tmp_path / f"bagua-jax-{name}" for name in ("dead", "alive", "young")]
    for folder in folders:
        folder.mkdir()
        (folder / "lock").touch()
    for folder in folders[:2]:
        os.utime(folder, (0, 0))
    with open(folders[1] / "lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        server = Server(*addresses(1), SECRET, 1000)
        left = sorted(path.name for path in tmp_path.iterdir())
        assert len(left) == 3 and "bagua-jax-dead" not in left
        server.close()
    assert sorted(tmp_path.iterdir()) == folders[1:]


def test_a_gift_is_applied_once_however_often_it_is_given(listening):
    gossip, replica, address = listening
    theirs = np.array([3.0, 2.0, 1.0, 0.0], np.float32)
    with Stranger(address, SECRET) as peer:
        grant = answer(gossip, peer.say(question(gossip, Kind.ASK, 5)))
        assert (grant.kind, grant.arrays) == (Kind.GRANT, ())
        offer = answer(gossip, peer.hear())
        assert (offer.kind, offer.exchange) == (Kind.OFFER, 5)
        assert offer.arrays[0].tolist() == [1, 2, 3, 4]
        replica.step(lambda x: (x + 100, None))  # progress since the snapshot is kept
        given = question(gossip, Kind.GIVE, 5, theirs)
        assert peer.say(given, wait_ms=100) is None
        assert replica.params.tolist() == [101, 102, 103, 104]  # until it is committed
        for _ in range(3):
            done = answer(gossip, peer.say(question(gossip, Kind.COMMIT, 5)))
            assert (done.kind, done.exchange) == (Kind.DONE, 5)
            assert peer.say(given, wait_ms=50) is None
        assert replica.params.tolist() == [102, 102, 102, 102]
        late = answer(gossip, peer.say(question(gossip, Kind.COMMIT, 4)))
        assert late.kind is Kind.EXPIRED  # never granted, so never applied
    assert replica.params.tolist() == [102, 102, 102, 102]
    assert gossip.exchanges == 1


def test_a_worker_that_differs_is_told_where_and_does_not_begin(listening, caplog):
    gossip, replica, address = listening

    def other(params, **facts) -> PairGossip:
        where = [address, *addresses(1)]
        own = Replica(params)
        return PairGossip(own, worker=1, addresses=where, secret=SECRET, facts=facts)

    with pytest.raises(ValueError, match="worker 1 differs from worker 0") as caught:
        with other(jnp.zeros(4), rate=0.1):
            pass
    assert "rate is 0.1 in worker 1 and nothing in worker 0" in str(caught.value)
    assert "model" not in str(caught.value)
    with pytest.raises(ValueError, match=r"\[5\]' in worker 1 and 'float32\[4\]'"):
        with other(jnp.zeros(5)):
            pass
    assert replica.params.tolist() == [1, 2, 3, 4]


def test_one_that_comes_later_and_differs_is_left_alone(caplog):
    """The first trains already; the other says what differs to it, too."""
    first = PairGossip(
        Replica(jnp.zeros(4)),
        worker=0,
        addresses=addresses(2),
        secret=SECRET,
        patience_s=0.0,
    )
    with first:
        first._compare(
            Message(Kind.FACTS, 1, 0, arrays=(write_facts({"workers": "3"}),))
        )
        first._compare(Message(Kind.FACTS, 1, 0, arrays=(np.zeros(8192, np.uint8),)))
        first._compare(Message(Kind.FACTS, 1, 0, arrays=(first._facts,)))
    assert "workers is 2 in worker 0 and 3 in worker 1" in caplog.text
    assert first.refused == {"no facts": 1, "facts that are the same": 1}


def test_nothing_is_committed_before_it_is_given(listening):
    gossip, replica, address = listening
    with Stranger(address, SECRET) as peer:
        answer(gossip, peer.say(question(gossip, Kind.ASK, 5)))
        answer(gossip, peer.hear())
        early = answer(gossip, peer.say(question(gossip, Kind.COMMIT, 5)))
        assert early.kind is Kind.EXPIRED
    assert replica.params.tolist() == [1, 2, 3, 4] and not gossip.exchanges


def test_a_model_that_is_not_finite_is_not_taken(listening):
    gossip, replica, address = listening
    with Stranger(address, SECRET) as peer:
        answer(gossip, peer.say(question(gossip, Kind.ASK, 5)))
        answer(gossip, peer.hear())
        theirs = np.array([0.0, math.nan, 0.0, 0.0], np.float32)
        assert peer.say(question(gossip, Kind.GIVE, 5, theirs), wait_ms=50) is None
        reply = answer(gossip, peer.say(question(gossip, Kind.COMMIT, 5)))
        assert reply.kind is Kind.EXPIRED
    assert replica.params.tolist() == [1, 2, 3, 4]
    assert gossip.refused == {"a model that is not finite": 1}


def test_noise_is_refused_and_the_worker_goes_on(listening):
    gossip, replica, address = listening
    rng = np.random.default_rng(0)
    valid = question(gossip, Kind.ASK, 5)
    with Stranger(address, SECRET) as peer:
        for size in (0, 1, 47, 48, 49, 64):
            assert peer.say(rng.bytes(size), wait_ms=50) is None
        assert peer.say([valid, valid], wait_ms=50) is None
        assert peer.say(valid[:22] + b"\x00\x00" + valid[24:], wait_ms=50) is None
        assert peer.say(question(gossip, Kind.DONE, 5), wait_ms=50) is None
        # An answer means that all that came before it has been judged.
        assert answer(gossip, peer.say(valid)).kind is Kind.GRANT
        assert sum(gossip.refused.values()) == 9
        assert gossip.refused["not one frame"] == 1
        assert gossip.refused["a message in this worker's name"] == 1
        assert gossip.refused["a reply where questions come"] == 1
    assert replica.params.tolist() == [1, 2, 3, 4]


def test_a_message_that_is_too_large_closes_its_connection_unread(listening):
    gossip, _, address = listening
    with Stranger(address, SECRET) as peer:
        assert answer(gossip, peer.say(question(gossip, Kind.PING, 1))).exchange == 1
        assert peer.say(bytes(gossip._layout.largest + 1000), wait_ms=300) is None
    assert not gossip.refused  # it never reached the program
    with Stranger(address, SECRET) as peer:
        assert answer(gossip, peer.say(question(gossip, Kind.PING, 2))).exchange == 2


def test_who_does_not_know_the_secret_is_not_heard(listening):
    gossip, _, address = listening
    with Stranger(address, SECRET[:-1] + b"\0") as stranger:
        assert stranger.say(question(gossip, Kind.PULL, 1), wait_ms=300) is None
    host, port = address.split(":")
    plain = zmq.Context()
    with plain.socket(zmq.DEALER) as client:
        client.linger, client.immediate = 0, True
        client.connect(f"tcp://{host}:{port}")
        assert not client.poll(300, zmq.POLLOUT)  # no handshake without CURVE
    plain.term()
    assert not gossip.refused and not gossip._seen
    assert gossip.strangers["another secret, or none"] >= 2


@pytest.mark.parametrize(
    "address",
    ["0.0.0.0:5000", "8.8.8.8:5000", "[::]:5000", "[2001:4860::8]:5000", "224.0.0.1:5"],
)
def test_only_loopback_and_private_addresses_are_used(address):
    with pytest.raises(ValueError, match="only loopback and private addresses"):
        endpoint(address)


@pytest.mark.parametrize("address", ["127.0.0.1", "", "10.0.0.1:99999", "a b:1", "@:1"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ValueError, match="no address"):
        endpoint(address)


def test_private_addresses_are_taken():
    assert endpoint("10.1.2.3:80") == "tcp://10.1.2.3:80"
    assert endpoint("[fd00::1]:80") == "tcp://[fd00::1]:80"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"secret": b"short"}, "at least 16 random bytes, got 5 bytes"),
        ({"worker": 2}, "worker a place among them; got worker=2"),
        ({"addresses": ["127.0.0.1:5", "127.0.0.1:5"]}, "different ones"),
        ({"neighbours": [0]}, "neighbours must be other workers than 0"),
        ({"timeout_s": 0}, "timeout_s must be positive"),
    ],
)
def test_arguments_are_checked(changes, why):
    given = {"worker": 0, "addresses": ["127.0.0.1:5", "127.0.0.1:6"], "secret": SECRET}
    with pytest.raises(ValueError, match=why):
        PairGossip(Replica(jnp.zeros(2)), **given | changes)


# --- a worker dies and comes back ---


def test_survivors_go_on_and_a_restarted_worker_takes_over_from_a_peer(tmp_path: Path):
    n, where = 3, addresses(3)
    (tmp_path / "secret").write_bytes(SECRET)

    def lines(worker: int) -> list[str]:
        path = tmp_path / f"steps-{worker}.txt"
        return path.read_text().splitlines() if path.exists() else []

    def counts(worker: int) -> tuple[int, int]:
        """Steps and exchanges, as the last whole line says."""
        found = [x.split() for x in lines(worker) if x.count(" ") == 2]
        found = [x for x in found if x[0].isdigit()]
        return (int(found[-1][0]), int(found[-1][1])) if found else (0, 0)

    def wait_until(condition) -> None:
        until = time.monotonic() + 180
        while not condition():
            assert time.monotonic() < until, [lines(w)[-1:] for w in range(n)]
            assert all(p.poll() is None for w, p in alive.items()), "a worker ended"
            time.sleep(0.05)

    with Workers("pairs_worker") as workers:
        alive = {w: workers.start(w, tmp_path, *where) for w in range(n)}
        wait_until(lambda: all(counts(w)[1] > 3 for w in range(n)))
        alive.pop(2).kill()
        before = {w: counts(w) for w in (0, 1)}
        wait_until(
            lambda: all(
                counts(w)[0] > before[w][0] + 20 and counts(w)[1] > before[w][1] + 3
                for w in (0, 1)
            )
        )
        reached = min(counts(w)[0] for w in (0, 1))
        alive[2] = workers.start(2, tmp_path, *where)
        wait_until(lambda: sum(x.startswith("starts") for x in lines(2)) == 2)
        (started,) = [x for x in lines(2) if x.startswith("starts")][1:]
        assert int(started.split()[-1]) >= reached
        wait_until(lambda: counts(2)[0] > int(started.split()[-1]) and counts(2)[1] > 3)
        (tmp_path / "stop").touch()
        said = {w: p.communicate(timeout=180)[0] for w, p in alive.items()}
        assert {w: p.returncode for w, p in alive.items()} == {0: 0, 1: 0, 2: 0}, said
    models = [dict(np.load(tmp_path / f"{w}.npz")) for w in range(n)]
    for model in models:
        np.testing.assert_allclose(model["in"], models[0]["in"], atol=0.3)
        assert np.isfinite(model["out"]).all()
