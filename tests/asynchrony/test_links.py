"""Links that stop, heal, or are cut in mid message: noticed, named and survived."""

import contextlib
import io
import threading
import time

import pytest
from asynchrony.links import Link
from asynchrony.processes import free_ports
from asynchrony.test_pairs import SECRET, assert_replayed, parsed
from asynchrony.training import Trainer, initial

from bagua_jax.asynchrony import PairGossip, Replica

pytest.importorskip("zmq")


class Pair:
    """Two workers in threads, which train until told to stop; a link each way."""

    def __init__(self, timeout_s: float, cut_after: range | None = None):
        own = [f"127.0.0.1:{port}" for port in free_ports(2)]
        # links[w]: on which worker w asks the other
        self.links = [Link(own[1 - w], cut_after, seed=w) for w in (0, 1)]
        there = [[own[0], self.links[0].address], [self.links[1].address, own[1]]]
        self.replicas = [Replica(initial()) for _ in (0, 1)]
        self.logs = [io.StringIO(), io.StringIO()]
        self.gossips = [
            PairGossip(
                self.replicas[w],
                worker=w,
                addresses=there[w],
                secret=SECRET,
                log=self.logs[w],
                timeout_s=timeout_s,
            )
            for w in (0, 1)
        ]
        self._trainers = [Trainer(w) for w in (0, 1)]
        self._failures: list[BaseException] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._train, args=(w,)) for w in (0, 1)
        ]

    def _train(self, w: int) -> None:
        def slowly(params):
            time.sleep(0.002)
            return self._trainers[w](params)

        try:
            with self.gossips[w]:
                while not self._stop.is_set():
                    self.replicas[w].step(slowly)
        except BaseException as error:
            self._failures.append(error)

    def wait_until(self, condition) -> None:
        until = time.monotonic() + 120
        while not condition():
            assert not self._failures and time.monotonic() < until
            time.sleep(0.01)

    def wait_for_exchanges(self, count: int) -> None:
        goal = [gossip.exchanges + count for gossip in self.gossips]
        self.wait_until(
            lambda: all(
                gossip.exchanges >= least
                for gossip, least in zip(self.gossips, goal, strict=True)
            )
        )

    def numbers(self) -> list[list[int]]:
        """Of the exchanges that each worker took part in."""
        return [[event.exchange for event in parsed(log)] for log in self.logs]

    def __enter__(self) -> "Pair":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._stop.set()
        with contextlib.ExitStack() as stack:
            for link in self.links:
                stack.callback(link.close)
            for thread in self._threads:
                thread.join(120)
        assert not any(thread.is_alive() for thread in self._threads)
        assert not self._failures


def test_connections_that_are_cut_in_mid_message_tear_no_exchange_apart():
    """Each lasts for its handshake and some messages; both sides apply, or neither."""
    with Pair(timeout_s=0.5, cut_after=range(2500, 6000)) as pair:
        pair.wait_until(lambda: sum(link.cuts for link in pair.links) >= 10)
        pair.wait_for_exchanges(3)
    first, second = pair.numbers()
    assert sorted(first) == sorted(second) and len(first) > 10
    steps = [replica.steps for replica in pair.replicas]
    events = {w: parsed(log) for w, log in enumerate(pair.logs)}
    assert_replayed(pair.replicas, events, None, steps)


def test_a_link_that_stops_is_named_and_training_goes_on_until_it_heals(caplog):
    with Pair(timeout_s=0.3) as pair:
        pair.wait_for_exchanges(3)
        for link in pair.links:
            link.stop()
        pair.wait_until(lambda: [g.unreachable for g in pair.gossips] == [{1}, {0}])
        alone = [replica.steps for replica in pair.replicas]
        pair.wait_until(
            lambda: all(
                replica.steps > steps + 20
                for replica, steps in zip(pair.replicas, alone, strict=True)
            )
        )
        for link in pair.links:
            link.heal()
        pair.wait_for_exchanges(3)
        pair.wait_until(lambda: not any(g.unreachable for g in pair.gossips))
    first, second = map(set, pair.numbers())
    assert len(first ^ second) <= 1  # one may have been under way
    said = [record.getMessage() for record in caplog.records]
    for w in (0, 1):
        named = f"worker {1 - w} ({pair.links[w].address}) has given worker {w} no"
        assert any(named in line and "the link is cut" in line for line in said)
        back = f"worker {1 - w} is back: it answers worker {w} again"
        assert any(back in line for line in said)


def test_exchanges_go_on_if_a_link_stops_in_one_direction():
    """Who cannot ask is still asked."""
    with Pair(timeout_s=0.3) as pair:
        pair.wait_for_exchanges(3)
        pair.links[0].stop()
        pair.wait_until(lambda: pair.gossips[0].unreachable == {1})
        pair.wait_for_exchanges(3)
        assert pair.gossips[0].unreachable == {1}
        assert not pair.gossips[1].unreachable


def test_connections_that_are_reset_are_made_again():
    with Pair(timeout_s=0.5) as pair:
        for _ in range(5):
            pair.wait_for_exchanges(2)
            for link in pair.links:
                link.cut()
        pair.wait_for_exchanges(2)
    first, second = pair.numbers()
    assert sorted(first) == sorted(second)


def test_a_worker_finishes_although_its_link_is_down():
    with Pair(timeout_s=0.3) as pair:
        pair.wait_for_exchanges(3)
        for link in pair.links:
            link.stop()
        pair.wait_until(lambda: all(g.unreachable for g in pair.gossips))
    # On leaving, each waits for the other for a timeout, and no longer.
