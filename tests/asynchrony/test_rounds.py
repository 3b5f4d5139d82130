"""Rounds over two real processes: what they promise, and their replay in this one."""

import re
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asynchrony.processes import Workers, free_ports
from asynchrony.training import ALGORITHMS, Trainer, initial

import bagua_jax
from bagua_jax.asynchrony import Replica, Rounds, make_exchange, read, replay, staleness

N = 2


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Two processes that train with every algorithm; the folder they leave."""
    folder = tmp_path_factory.mktemp("rounds")
    (port,) = free_ports(1)
    with Workers("rounds_worker") as workers:
        started = [workers.start(w, N, port, folder) for w in range(N)]
        said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * N, "\n".join(said)
    return folder


def left_behind(run: Path, name: str):
    events = {w: read(run / f"{name}-{w}.jsonl") for w in range(N)}
    arrays = [dict(np.load(run / f"{name}-{w}.npz")) for w in range(N)]
    steps = {w: int(own.pop("steps")) for w, own in enumerate(arrays)}
    return events, arrays, steps


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_round_was_everybodys_and_the_last_one_found_all_finished(run, name):
    events, _, steps = left_behind(run, name)
    assert steps == {0: 40, 1: 28}
    assert len(events[0]) == len(events[1]) > 3
    for worker, own in events.items():
        assert [e.exchange for e in own] == list(range(len(own)))
        assert all(e.snapshot <= e.apply for e in own)
        assert own[-1].snapshot == own[-1].apply == steps[worker]
        assert sum(staleness(own).values()) == len(own)
    assert any(event.in_step for own in events.values() for event in own)


def test_with_an_exact_mean_all_end_with_the_same_model(run):
    _, (first, second), _ = left_behind(run, "full")
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=0, atol=1e-6)
    assert not np.allclose(first["in"], initial()["in"], atol=0.01)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_replay_in_one_process_ends_bit_for_bit_where_the_run_did(run, name):
    events, arrays, steps = left_behind(run, name)
    replicas = {w: Replica(initial()) for w in range(N)}
    trainers = [Trainer(w) for w in range(N)]
    exchange = make_exchange(
        ALGORITHMS[name](), bagua_jax.Workers.simulate(N), initial()
    )
    carry = exchange.init(jax.tree.map(lambda x: jnp.stack([x] * N), initial()))

    def mix(number, workers, snapshots):
        nonlocal carry
        assert workers == (0, 1)
        models = jax.tree.map(lambda *x: jnp.stack(x), *snapshots)
        carry, corrections, _ = exchange.step(carry, models, jnp.zeros(N))
        return [jax.tree.map(lambda x, i=i: x[i], corrections) for i in range(N)]

    replay(events, replicas, lambda w, x: trainers[w](x)[0], mix, steps)
    for worker, expected in enumerate(arrays):
        found = replicas[worker].params
        assert replicas[worker].steps == steps[worker]
        for leaf, value in expected.items():
            np.testing.assert_array_equal(
                found[leaf], value, err_msg=f"{worker} {leaf}"
            )


def test_a_log_with_a_hole_is_refused(run):
    events, _, steps = left_behind(run, "full")
    events[1] = events[1][:1] + events[1][2:]
    replicas = {w: Replica(initial()) for w in range(N)}
    no_change = jax.tree.map(jnp.zeros_like, initial())
    with pytest.raises(ValueError, match=r"exchange 1 .* not all .* logged"):
        replay(
            events,
            replicas,
            lambda w, x: x,
            lambda number, workers, snapshots: [no_change] * N,
            steps,
        )


# --- what goes wrong between two processes ---


@pytest.mark.parametrize(("harm", "who"), [("cut", (0, 1)), ("stopped", (0,))])
def test_a_link_that_is_lost_ends_training_with_a_message(tmp_path, harm, who):
    """Local steps wait for nobody, and yet do not go on for ever without the others.

    gloo tells one side or both that a connection is lost; who is not told finds that a
    round takes too long.
    """
    failed = r"(round \d+ of worker {0} failed: .*link was cut|"
    waited = r"worker {0} has waited \d+ s for round \d+ to end.*link is cut)"
    (port,) = free_ports(1)
    with Workers("rounds_worker") as workers:
        started = [workers.start(w, N, port, tmp_path, harm) for w in range(N)]
        for w in who:
            said = ""
            # Not to its end: jax.distributed waits there for who is stopped.
            while line := started[w].stdout.readline():
                said += line
                if re.search("Rounds: " + (failed + waited).format(w), said, re.DOTALL):
                    break
            else:
                raise AssertionError(said)


# --- what goes wrong, with one worker in this process ---


def alone(**options) -> tuple[Replica, Rounds]:
    replica = Replica(initial())
    workers = bagua_jax.Workers.devices(1)
    return replica, Rounds(replica, ALGORITHMS["full"](), workers, **options)


def no_step(params):
    return params, None


def test_what_the_thread_dies_of_is_raised_by_the_next_step(tmp_path):
    log = open(tmp_path / "events.jsonl", "w")  # noqa: SIM115
    log.close()
    replica, rounds = alone(log=log)
    with pytest.raises(ValueError, match="closed file"), rounds:
        for _ in range(10**6):
            replica.step(no_step)


def test_a_single_thread_of_xla_is_refused(monkeypatch):
    monkeypatch.setenv("NPROC", "1")
    with pytest.raises(ValueError, match=r"XLA has 1: .* Set .* NPROC=2"):
        alone()


def test_a_round_that_does_not_end_is_reported_with_its_number():
    never = threading.Event()
    replica, rounds = alone(timeout_s=0.2)
    rounds._round = lambda snapshot, finished: never.wait()
    with pytest.raises(TimeoutError, match=r"worker 0 has waited .* for round 0"):
        with rounds:
            replica.step(no_step)
    never.set()


def test_a_round_that_does_not_end_stops_the_local_steps():
    never = threading.Event()
    replica, rounds = alone(timeout_s=0.2)
    rounds._round = lambda snapshot, finished: never.wait()
    with pytest.raises(TimeoutError, match=r"Another worker .* hangs.* link is cut"):
        with rounds:
            while not never.is_set():
                replica.step(no_step)
    never.set()


def test_an_error_in_the_loop_is_not_kept_waiting():
    replica, rounds = alone()
    with pytest.raises(KeyError, match="mine"), rounds:
        raise KeyError("mine")


def test_a_process_needs_exactly_one_of_the_devices():
    for workers in (bagua_jax.Workers.simulate(2), bagua_jax.Workers.devices(2)):
        with pytest.raises(ValueError, match="every process must have one"):
            Rounds(Replica(initial()), ALGORITHMS["full"](), workers)
