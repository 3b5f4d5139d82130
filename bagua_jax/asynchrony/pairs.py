"""Pair gossip: workers average with one other at a time, and may die and come back."""

import collections
import logging
import random
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bagua_jax import buckets, processes
from bagua_jax.asynchrony import events
from bagua_jax.asynchrony.messages import (
    Different,
    Kind,
    Layout,
    Message,
    Refused,
    decode,
    encode,
    read_facts,
    write_facts,
)
from bagua_jax.asynchrony.replica import Moment, Replica
from bagua_jax.asynchrony.transport import Server, endpoint, require_secret, require_zmq
from bagua_jax.compressors import Compressor, identity
from bagua_jax.compressors.numerics import all_finite

__all__ = ["PairArithmetic", "PairGossip"]

_log = logging.getLogger(__name__)

Vectors = tuple[jax.Array, ...]


class PairArithmetic:
    r"""What a pair computes: the same on both sides, and in a replay.

    In full precision each side moves half way to the other's snapshot,

    .. math:: x_a \leftarrow x_a + \tfrac12 (y_b - y_a),\qquad
              x_b \leftarrow x_b + \tfrac12 (y_a - y_b)

    and the two corrections add up to zero, bit for bit: the mean is conserved. With a
    compressor C both sides hold the same reference r, at first the mean of their first
    exchange, which is in full precision. They send :math:`q_i = C(y_i - r)`, and

    .. math:: x_a \leftarrow x_a + \tfrac12 (q_b - q_a),\quad
              x_b \leftarrow x_b + \tfrac12 (q_a - q_b),\quad
              r \leftarrow r + \tfrac12 (q_a + q_b)

    The corrections still add up to zero. What C left out, :math:`y_i - r - q_i`, is
    exactly how far the model is from the new reference, so it is sent the next time:
    the difference is its own error feedback. What is compressed shrinks as the pair
    agrees, and for a contraction the only fixed point is exact agreement. Compressing
    the models themselves would stop at the resolution of their range.

    Args:
        params: of one worker, for shapes and dtypes.
        compressor: C, stateless and a contraction; ``None`` for full precision.
        seed: of what a stochastic compressor draws, with the exchange and the worker.

    Raises:
        ValueError: if the compressor keeps state, or is no contraction.
    """

    def __init__(
        self, params: Any, compressor: Compressor | None = None, seed: int = 0
    ):
        wide = jax.eval_shape(lambda x: optax.tree.cast(x, jnp.float32), params)
        plan = buckets.plan(wide)
        vectors = jax.eval_shape(plan.pack, wide)
        key = jax.random.key(seed)
        self.keeps_references = compressor is not None
        if compressor is None:
            compressor = identity()
        else:
            _require_contraction(compressor, vectors)

        def code(y, reference, exchange, worker):
            own = jax.random.fold_in(jax.random.fold_in(key, exchange), worker)
            return [
                compressor.compress(jax.random.fold_in(own, b), y - r, ())[0]
                for b, (y, r) in enumerate(zip(y, reference, strict=True))
            ]

        def read(payload):
            pairs = zip(payload, vectors, strict=True)
            return tuple(compressor.decompress(p, like) for p, like in pairs)

        def meet(mine, theirs, reference):
            half = [0.5 * (b - a) for a, b in zip(mine, theirs, strict=True)]
            middle = tuple(
                r + 0.5 * (a + b)
                for a, b, r in zip(mine, theirs, reference, strict=True)
            )
            finite = jnp.all(jnp.stack([all_finite(h) for h in half]))
            return plan.unpack(half), middle, finite

        number = jax.ShapeDtypeStruct((), jnp.uint32)
        self.pack = _compiled(
            lambda x: plan.pack(optax.tree.cast(x, jnp.float32)), params
        )
        self.unpack = _compiled(plan.unpack, vectors)
        self.meet = _compiled(meet, vectors, vectors, vectors)
        self.nothing: Vectors = tuple(jnp.zeros(v.shape, v.dtype) for v in vectors)
        payload = jax.eval_shape(code, vectors, vectors, number, number)
        if self.keeps_references:
            self._code = _compiled(code, vectors, vectors, number, number)
            self._read = _compiled(read, payload)
        self._payload = jax.tree.structure(payload)
        self.full = tuple(vectors)
        self.compressed = tuple(jax.tree.leaves(payload))

    def code(self, y: Vectors, reference: Vectors, exchange: int, worker: int) -> tuple:
        """Compress :math:`y - r`: the arrays that travel."""
        low = np.uint32(exchange & 0xFFFFFFFF)
        payload = self._code(y, reference, low, np.uint32(worker))
        return tuple(map(np.asarray, jax.tree.leaves(payload)))

    def read(self, arrays: Sequence[Any]) -> Vectors:
        """Decompress what :meth:`code` gave."""
        leaves = [jnp.asarray(array) for array in arrays]
        return self._read(jax.tree.unflatten(self._payload, leaves))

    def replayed(self) -> Any:
        """Return the function that :func:`bagua_jax.asynchrony.replay` wants.

        Returns:
            ``(number, workers, snapshots) -> corrections``, which keeps the references
            of all pairs.
        """
        references: dict[frozenset[int], Vectors] = {}

        def exchange(number, workers, snapshots):
            ys = [self.pack(snapshot) for snapshot in snapshots]
            pair = frozenset(workers)
            reference = references.get(pair, self.nothing)
            if pair in references:
                ys = [
                    self.read(self.code(y, reference, number, worker))
                    for worker, y in zip(workers, ys, strict=True)
                ]
            first, middle, _ = self.meet(ys[0], ys[1], reference)
            second, _, _ = self.meet(ys[1], ys[0], reference)
            if self.keeps_references:
                references[pair] = middle
            return [first, second]

        return exchange


def _compiled(function: Any, *like: Any) -> Any:
    return jax.jit(function).lower(*like).compile()


def _require_contraction(compressor: Compressor, vectors: Vectors) -> None:
    facts, d = compressor.facts, max(v.size for v in vectors)
    if jax.tree.leaves(jax.eval_shape(compressor.init, vectors[0])):
        raise ValueError(
            f"PairGossip: {facts.name} keeps state between steps, and the two sides "
            "of a pair would not hold the same. Use a stateless compressor."
        )
    omega = facts.omega(d) if facts.omega else 0.0
    delta = facts.delta(d) if facts.delta else 1.0 if facts.unbiased else None
    if omega >= 1 or delta is None or delta <= 0:
        known = f"omega={omega:.3g}" if facts.unbiased else f"delta={delta}"
        raise ValueError(
            f"PairGossip: {facts.name} is no contraction at d={d} ({known}), so "
            "differences to the pair's reference would grow. Use minmax_uint8, "
            "blockwise, or topk."
        )


class _Asked(NamedTuple):
    """An exchange that this worker asked for."""

    peer: int
    exchange: int
    late: float  # when to do something about it
    until: float = 0.0  # when to give up, once it is committed
    give: Message | None = None
    give_again: bool = False  # once there is a connection
    taken: Moment = Moment(0, False)
    mine: Vectors = ()
    theirs: Vectors | None = None  # what was offered; then it is committed
    reference: Vectors = ()


class _Granted(NamedTuple):
    """An exchange that a peer asked for, between grant and commitment."""

    peer: int
    exchange: int
    until: float
    reference_of: int
    taken: Moment
    mine: Vectors
    reference: Vectors
    theirs: Vectors | None = None  # what was given


class PairGossip:
    r"""Average with one other worker at a time, in the background of training.

    Asynchronous decentralized SGD: a worker trains by itself, and a thread averages its
    model with that of a random peer, again and again. No barrier, no
    ``jax.distributed``: every worker is an ordinary JAX program that knows the others'
    addresses, and may die, and may come back.

    One exchange is one transaction. The worker that asks is *granted* it (or the
    other answers BUSY immediately, so that requests cannot deadlock in a cycle). Then
    both snapshots travel at the same time: one side *gives*, the other *offers*. Who
    has the offer *commits*; who has what was given, too, then applies its correction
    and says that it is *done*, upon which the first applies the negative of it. An
    answer that is lost is asked for again, and nothing is applied twice. So the mean of
    the models moves by local steps alone. The exception is a death: a worker that dies
    takes its progress with it, and a peer that stays out of reach for three times
    ``timeout_s`` is taken for dead.

    A peer that gives no answer for ``timeout_s`` (its worker has died or hangs, or a
    link is cut) is *unreachable* until it answers again. Training and exchanges with
    others go on; when a peer becomes unreachable, and when it is back, the logger
    ``bagua_jax.asynchrony.pairs`` says so.

    A worker that starts asks the others how far they are. Where all are at the start it
    begins with its own parameters; where one is ahead it takes over that one's
    parameters and count of steps before it takes a step. One whose replica has steps
    already, because it goes on from what it saved, keeps its own.

    Args:
        replica: of this worker; all start from the same parameters, or from what they
            saved.
        worker: this worker's place in the list of addresses.
        addresses: ``host:port`` of every worker, loopback or private.
        secret: at least 16 random bytes, the same for all. It makes the keys by which
            workers know one another; the traffic is encrypted.
        compressor: what the payloads are compressed by; see :class:`PairArithmetic`.
            Then a reference for every peer is kept, in float32.
        neighbours: whom to ask; everybody where ``None``. The graph must be connected.
        log: where events go, one JSON line each; ``None`` for nowhere.
        interval_s: seconds to rest after an exchange that this worker asked for.
        timeout_s: how long to wait for an answer. A peer that gives none is left alone
            for as long. It must exceed the time a payload takes.
        patience_s: how long a first worker waits for the others to start.
        facts: name and value of what must be equal for all workers. The model, their
            number, the compressor, the versions of jax and of this package and its
            source are always compared.
        seed: of what a stochastic compressor draws. Who meets whom, and when, is not
            repeatable: the log says it.

    Raises:
        ImportError: if pyzmq is not installed.
        ValueError: if an argument does not fit; when entered, if a worker that is
            there differs: with its number, the names and both values.
        OSError: when entered, if the address is taken.

    Attributes:
        refused: how many messages were refused, by reason.
        strangers: how many connections were closed before they proved the secret, by
            reason.
        exchanges: how many this worker took part in.
        unreachable: the peers that give no answer now.

    Communication:
        An exchange sends the payload of the whole model once in each direction, both at
        the same time, and four short messages.

    References:
        Lian et al., `Asynchronous Decentralized Parallel Stochastic Gradient Descent`,
        2018 (AD-PSGD). The transaction, and compressed differences to a reference of
        the pair, are ours.

    Example:
        In every worker's own program::

            replica = Replica(params)
            with PairGossip(replica, worker=i, addresses=addresses, secret=secret):
                while replica.steps < 1000:
                    loss = replica.step(local_step)
    """

    def __init__(
        self,
        replica: Replica,
        *,
        worker: int,
        addresses: Sequence[str],
        secret: bytes,
        compressor: Compressor | None = None,
        neighbours: Sequence[int] | None = None,
        log: events.Log | None = None,
        interval_s: float = 0.0,
        timeout_s: float = 5.0,
        patience_s: float = 60.0,
        facts: Mapping[str, Any] | None = None,
        seed: int = 0,
    ):
        require_zmq()
        require_secret(secret)
        n = len(addresses)
        places = [endpoint(address) for address in addresses]
        if n < 2 or not 0 <= worker < n or len(set(places)) < n:
            raise ValueError(
                "PairGossip: addresses must be two or more different ones and worker a "
                f"place among them; got worker={worker} and {list(addresses)}."
            )
        others = [peer for peer in range(n) if peer != worker]
        asked = others if neighbours is None else sorted(set(neighbours))
        if not asked or not set(asked) <= set(others):
            raise ValueError(
                f"PairGossip: neighbours must be other workers than {worker}, of 0 to "
                f"{n - 1}; got {neighbours}."
            )
        if timeout_s <= 0 or interval_s < 0 or patience_s < 0:
            raise ValueError(
                "PairGossip: timeout_s must be positive, interval_s and patience_s not "
                f"negative; got {timeout_s}, {interval_s} and {patience_s}."
            )
        self.worker, self.refused = worker, collections.Counter[str]()
        self.strangers = collections.Counter[str]()
        self.exchanges = 0
        self._replica, self._addresses, self._secret = replica, addresses, secret
        self._neighbours, self._others, self._log = asked, others, log
        self._interval_s, self._timeout_s = interval_s, timeout_s
        self._patience_s = patience_s
        self._random = random.Random()

        params, _ = replica.snapshot()
        self._arithmetic = PairArithmetic(params, compressor, seed)
        leaves = [f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(params)]
        stated = {
            "model": ", ".join(leaves),
            "workers": n,
            "compressor": compressor.facts.name if compressor else None,
            **processes.environment(),
            **(facts or {}),
        }
        self._facts = write_facts({name: repr(v) for name, v in stated.items()})
        self._layout = Layout(
            self._arithmetic.full,
            self._arithmetic.compressed,
            n,
            self._facts.tobytes(),
        )
        self._different: set[int] = set()  # the peers whose facts are others
        self._asked: _Asked | None = None
        self._granted: _Granted | None = None
        self._done: dict[int, int] = {}  # last exchange applied for each peer
        self._references: dict[int, tuple[int, Vectors]] = {}
        self._rest_until = 0.0
        self._left_alone: dict[int, float] = {}  # peer -> until when
        self._seen: dict[int, float] = {}  # when a peer was last heard
        self._unanswered_since: dict[int, float] = {}  # the peers that owe an answer
        self.unreachable: set[int] = set()
        self._least: dict[int, int] = {}  # fewest steps that it said it had taken
        self._finished: set[int] = set()
        self._pulled: int | None = None  # the question that a state must answer
        self._finished_since = 0.0
        self._joined = threading.Event()
        self._leave_at_once = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="pairs", daemon=True)

    def __enter__(self) -> "PairGossip":
        self._server = Server(
            self._addresses[self.worker],
            self._secret,
            self._layout.largest,
            most=4 * len(self._addresses),
        )
        self.strangers = self._server.door.closed
        connect, addresses = self._server.connect, self._addresses
        self._clients = {peer: connect(addresses[peer]) for peer in self._others}
        self._thread.start()
        while not self._joined.wait(0.1):
            if not self._thread.is_alive():
                break
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Finish: answer until the others have finished, or are gone; then leave."""
        self._leave_at_once = error is not None
        self._replica.finished = True
        self._thread.join()  # it ends: its waits are bounded
        if error is None and self._failure is not None:
            raise self._failure

    # --- the thread ---

    def _run(self) -> None:
        try:
            self._join()
            self._joined.set()
            while not self._may_leave():
                # Wake when the rest is over: two workers that asked each other at the
                # same time rest for different times, and would else wake together.
                rest_s = self._rest_until - time.monotonic()
                self._attend(min(rest_s, 0.02) if rest_s > 0 else 0.02)
                self._mind_the_clock()
        except BaseException as error:
            self._failure = error
            self._replica.fail(error)
        finally:
            self._server.close()

    def _join(self) -> None:
        """Ask the others how far they are, and take over from one that is ahead.

        One that was ever heard at its start began with this worker, not before it.
        """
        begun = time.monotonic()
        ahead_since = asked_at = 0.0
        while len(self._least) < len(self._others):
            now = time.monotonic()
            if any(self._least.values()):
                ahead_since = ahead_since or now
                if now > ahead_since + 0.2:
                    break
            if now > begun + self._patience_s or self._leave_at_once:
                break
            if now > asked_at + 0.05:
                asked_at = now
                for peer in self._others:
                    if peer not in self._least:
                        self._ask(peer, Kind.PING)
            self._attend(0.02)
        for peer in sorted(self._least, key=lambda peer: -self._least[peer]):
            if not self._least[peer] or self._replica.steps:
                break
            self._pulled = self._ask(peer, Kind.PULL)
            until = time.monotonic() + self._timeout_s
            while self._pulled and time.monotonic() < until:
                self._attend(0.02)
            self._pulled = None

    def _attend(self, wait_s: float) -> None:
        """Read and answer what has arrived."""
        zmq = require_zmq()
        poller = zmq.Poller()
        for each in (self._server.socket, *self._clients.values()):
            poller.register(each, zmq.POLLIN)
        ready = {each for each, _ in poller.poll(1000 * wait_s)}
        if self._server.socket in ready:
            while frames := _receive(self._server.socket):
                if len(frames) != 2:
                    self.refused["not one frame"] += 1
                elif message := self._understood(frames[1], frames[0]):
                    for reply in self._replies_to(message):
                        self._reply(frames[0], reply)
        for peer, client in list(self._clients.items()):
            while client in ready and (frames := _receive(client)):
                if len(frames) != 1:
                    self.refused["not one frame"] += 1
                elif message := self._understood(frames[0]):
                    if message.worker == peer and message.kind is Kind.FACTS:
                        self._compare(message)
                    elif message.worker == peer:
                        self._answered(message)
                    else:
                        self.refused["a reply in another's name"] += 1

    def _reply(self, sender: bytes, message: Message) -> None:
        _send(self._server.socket, [sender, encode(message, self._layout)])

    def _understood(self, data: bytes, sender: bytes = b"") -> Message | None:
        try:
            message = decode(data, self._layout)
            if message.worker == self.worker:
                raise Refused("a message in this worker's name")
            if message.kind is Kind.FACTS:
                if sender:
                    raise Refused("a reply where questions come")
                return message
        except Refused as reason:
            self.refused[str(reason)] += 1
            if sender and isinstance(reason, Different):
                told = self._message(Kind.FACTS, 0, arrays=(self._facts,))
                self._reply(sender, told)
            return None
        self._seen[message.worker] = time.monotonic()
        least = self._least.get(message.worker, message.steps)
        self._least[message.worker] = min(least, message.steps)
        if message.finished:
            self._finished.add(message.worker)
        else:
            self._finished.discard(message.worker)
        return message

    def _compare(self, message: Message) -> None:
        """Tell where a peer differs; one that is not in training yet does not begin."""
        peer = message.worker
        try:
            theirs = read_facts(message.arrays[0])
        except Refused as reason:
            self.refused[str(reason)] += 1
            return
        differs = processes.differences(
            read_facts(self._facts), f"worker {self.worker}", theirs, f"worker {peer}"
        )
        if not differs:
            self.refused["facts that are the same"] += 1
            return
        text = (
            f"PairGossip: worker {self.worker} differs from worker {peer} "
            f"({self._addresses[peer]}): {differs}. Start all with the same code, "
            "versions and settings."
        )
        if not self._joined.is_set():
            raise ValueError(text)
        if peer not in self._different:
            self._different.add(peer)
            _log.warning("%s Training goes on without it.", text)

    def _message(self, kind: Kind, exchange: int, **fields: Any) -> Message:
        has_finished = self._replica.finished and self._asked is None
        steps = self._replica.steps
        return Message(
            kind, self.worker, exchange, steps=steps, finished=has_finished, **fields
        )

    def _ask(self, peer: int, kind: Kind, **fields: Any) -> int | None:
        """Send a question; give its number, or ``None`` if the peer is not there."""
        number = secrets.randbits(63) | 1
        message = self._message(kind, number, **fields)
        self._unanswered_since.setdefault(peer, time.monotonic())
        return number if self._tell(peer, message) else None

    # --- as the one who is asked ---

    def _replies_to(self, message: Message) -> Iterator[Message]:
        number = message.exchange
        if message.kind is Kind.PING:
            yield self._message(Kind.PONG, number)
        elif message.kind is Kind.PULL:
            params, moment = self._replica.snapshot()
            arrays = tuple(map(np.asarray, self._arithmetic.pack(params)))
            reply = self._message(Kind.STATE, number, arrays=arrays)
            yield reply._replace(steps=moment.steps)
        elif message.kind is Kind.ASK:
            yield from self._grant(message)
        elif message.kind is Kind.GIVE:
            self._take(message)
        elif message.kind is Kind.COMMIT:
            yield self._message(self._settle(message), number)
        else:
            self.refused["a reply where questions come"] += 1

    def _grant(self, message: Message) -> Iterator[Message]:
        peer, number = message.worker, message.exchange
        others = self._granted is not None and self._granted.peer != peer
        if not self._joined.is_set() or self._asked is not None or others:
            yield self._message(Kind.BUSY, number)
            return
        known, reference = self._reference_of(peer)
        if known != message.reference:  # one of the two has died since, or missed one
            known, reference = 0, self._arithmetic.nothing
        yield self._message(Kind.GRANT, number, reference=known)  # so that both send
        arrays, mine, taken = self._offer(number, known, reference)
        until = time.monotonic() + 2 * self._timeout_s
        self._granted = _Granted(peer, number, until, known, taken, mine, reference)
        yield self._message(Kind.OFFER, number, reference=known, arrays=arrays)

    def _granted_to(self, message: Message) -> _Granted | None:
        """Return the exchange that a message is about, if it is still granted."""
        of = (message.worker, message.exchange, message.reference)
        granted = self._granted
        if granted and (granted.peer, granted.exchange, granted.reference_of) == of:
            return granted
        return None

    def _take(self, message: Message) -> None:
        granted = self._granted_to(message)
        if granted is not None:  # else it was given before, or comes too late
            self._granted = granted._replace(theirs=self._read(message))

    def _settle(self, message: Message) -> Kind:
        """Apply what was given, now that the peer has what was offered."""
        peer, number = message.worker, message.exchange
        if self._done.get(peer) == number:  # the answer was lost
            return Kind.DONE
        granted = self._granted_to(message)
        if granted is None or granted.theirs is None:
            return Kind.EXPIRED
        self._granted = None
        if not self._apply(number, peer, (peer, self.worker), granted):
            return Kind.EXPIRED
        self._done[peer] = number
        return Kind.DONE

    # --- as the one who asks ---

    def _answered(self, message: Message) -> None:
        peer = message.worker
        since = self._unanswered_since.pop(peer, 0.0)
        if peer in self.unreachable:
            self.unreachable.remove(peer)
            _log.warning(
                "PairGossip: worker %d is back: it answers worker %d again, after "
                "%.1f s.",
                *(peer, self.worker, time.monotonic() - since),
            )
        if message.kind is Kind.STATE and message.exchange == self._pulled:
            arrays = tuple(map(jnp.asarray, message.arrays))
            if all(map(np.isfinite, map(np.sum, message.arrays))):
                params = self._arithmetic.unpack(arrays)
                self._replica.adopt(params, message.steps)
            self._pulled = None
            return
        asked = self._asked
        if asked is None or message.exchange != asked.exchange:
            return  # a pong, or the answer to a question that was given up
        if message.kind is Kind.GRANT and asked.give is None:
            self._give(asked, message)
        elif message.kind is Kind.OFFER and asked.give and asked.theirs is None:
            self._commit(asked, message)
        elif message.kind is Kind.DONE and asked.theirs is not None:
            pair = (self.worker, asked.peer)
            self._asked = None
            self._apply(asked.exchange, asked.peer, pair, asked)
            self._rest_until = time.monotonic() + self._interval_s
        elif message.kind is Kind.BUSY:
            self._asked = None
            self._rest_until = time.monotonic() + self._random.uniform(0.001, 0.02)
        elif message.kind is Kind.EXPIRED:
            self._asked = None
        else:
            self.refused["a reply to another question"] += 1

    def _give(self, asked: _Asked, grant: Message) -> None:
        known, reference = self._reference_of(asked.peer)
        if grant.reference != known:
            known, reference = 0, self._arithmetic.nothing
        if grant.reference != known:
            self.refused["a reference that this worker does not have"] += 1
            self._asked = None
            return
        arrays, mine, taken = self._offer(asked.exchange, known, reference)
        give = self._message(Kind.GIVE, asked.exchange, reference=known, arrays=arrays)
        self._tell(asked.peer, give)
        self._asked = asked._replace(
            late=time.monotonic() + self._timeout_s,
            give=give,
            taken=taken,
            mine=mine,
            reference=reference,
        )

    def _commit(self, asked: _Asked, offer: Message) -> None:
        assert asked.give is not None
        if offer.reference != asked.give.reference:
            self.refused["a reference that this worker does not have"] += 1
            self._asked = None
            return
        until = time.monotonic() + 3 * self._timeout_s
        self._asked = asked._replace(theirs=self._read(offer), until=until)
        self._say_commit()

    def _say_commit(self) -> None:
        asked = self._asked
        assert asked is not None and asked.give is not None
        known = asked.give.reference
        commit = self._message(Kind.COMMIT, asked.exchange, reference=known)
        self._tell(asked.peer, commit)
        late = time.monotonic() + self._timeout_s
        self._asked = asked._replace(late=late, give_again=False)

    def _tell(self, peer: int, message: Message) -> bool:
        return _send(self._clients[peer], [encode(message, self._layout)])

    def _name_unreachable(self, now: float) -> None:
        for peer, since in self._unanswered_since.items():
            is_new = peer not in self.unreachable and peer not in self._finished
            if is_new and now > since + self._timeout_s:
                self.unreachable.add(peer)
                _log.warning(
                    "PairGossip: worker %d (%s) has given worker %d no answer for "
                    "%.1f s: it has died or hangs, or the link is cut. Training goes "
                    "on without it.",
                    *(peer, self._addresses[peer], self.worker, now - since),
                )

    def _mind_the_clock(self) -> None:
        now = time.monotonic()
        self._name_unreachable(now)
        asked, granted = self._asked, self._granted
        if granted is not None and now > granted.until:
            self._granted = None
        if asked is not None:
            lost = not _is_connected(self._clients[asked.peer])
            is_committed = asked.theirs is not None
            is_over = now > asked.until if is_committed else lost or now > asked.late
            if is_over:
                self._leave_alone(asked.peer)
            elif now > asked.late:
                self._renew(asked.peer)
                late = now + self._timeout_s
                self._asked = asked._replace(late=late, give_again=True)
            elif asked.give_again and not lost:
                assert asked.give is not None
                self._tell(asked.peer, asked.give)
                self._say_commit()
            return
        if granted is not None or now < self._rest_until:
            return
        if self._replica.finished:
            self._finished_since = self._finished_since or now
            for peer in self._others:
                self._ask(peer, Kind.PING)  # says that this worker has finished
            # Often enough that nobody takes this worker's silence for its end.
            self._rest_until = now + min(0.1, self._timeout_s / 4)
            return
        free = [p for p in self._neighbours if self._left_alone.get(p, 0.0) < now]
        if not free:
            return
        peer = self._random.choice(free)
        known, _ = self._reference_of(peer)
        number = self._ask(peer, Kind.ASK, reference=known)
        if number is None:
            self._rest_until = now + 0.01
        else:
            self._asked = _Asked(peer, number, now + self._timeout_s)

    def _leave_alone(self, peer: int) -> None:
        """Take a peer for dead, for a while."""
        self._asked = None
        self._left_alone[peer] = time.monotonic() + self._timeout_s
        self._renew(peer)

    def _renew(self, peer: int) -> None:
        """Start a fresh connection: what waits in the old one is out of date."""
        self._clients[peer].close()
        self._clients[peer] = self._server.connect(self._addresses[peer])

    def _may_leave(self) -> bool:
        if self._leave_at_once:
            return True
        if not self._finished_since or self._asked or self._granted:
            return False
        silent_since = time.monotonic() - self._timeout_s
        return all(
            peer in self._finished
            or max(self._seen.get(peer, 0.0), self._finished_since) < silent_since
            for peer in self._others
        )

    # --- what both do ---

    def _reference_of(self, peer: int) -> tuple[int, Vectors]:
        return self._references.get(peer, (0, self._arithmetic.nothing))

    def _offer(self, number: int, known: int, reference: Vectors):
        """Take a snapshot; give what travels, what it stands for, and the moment."""
        params, taken = self._replica.snapshot()
        y = self._arithmetic.pack(params)
        if not known:
            return tuple(map(np.asarray, y)), y, taken
        arrays = self._arithmetic.code(y, reference, number, self.worker)
        return arrays, self._arithmetic.read(arrays), taken

    def _read(self, message: Message) -> Vectors:
        if message.reference:
            return self._arithmetic.read(message.arrays)
        return tuple(map(jnp.asarray, message.arrays))

    def _apply(
        self,
        number: int,
        peer: int,
        pair: tuple[int, int],
        own: _Asked | _Granted,
    ) -> bool:
        correction, middle, finite = self._arithmetic.meet(
            own.mine, own.theirs, own.reference
        )
        if not finite:
            self.refused["a model that is not finite"] += 1
            return False
        moment = self._replica.apply(correction)
        if self._arithmetic.keeps_references:
            self._references[peer] = number, middle
        self.exchanges += 1
        if self._log is not None:
            steps = own.taken.steps, moment.steps, moment.in_step
            events.write(self._log, events.Event(self.worker, number, pair, *steps))
        return True


def _send(socket: Any, frames: list[bytes]) -> bool:
    """Send, unless nobody is connected or the queue is full."""
    zmq = require_zmq()
    try:
        socket.send_multipart(frames, zmq.NOBLOCK)
    except zmq.Again:
        return False
    return True


def _receive(socket: Any) -> list[bytes] | None:
    zmq = require_zmq()
    try:
        return socket.recv_multipart(zmq.NOBLOCK)
    except zmq.Again:
        return None


def _is_connected(socket: Any) -> bool:
    return bool(socket.getsockopt(require_zmq().EVENTS) & require_zmq().POLLOUT)
