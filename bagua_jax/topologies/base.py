"""What a topology is: mixing steps made of static permutations with weights."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

__all__ = ["MixingStep", "Send", "Topology"]

MAX_MESSAGES = 2**20  # of a period, each a pair of numbers; 1 s and 200 MB to list
TOLERANCE = 1e-12  # of sums of weights in float64, and of what counts as exact


class Send(NamedTuple):
    """One message per sending worker, along a static permutation.

    Attributes:
        pairs: (source, destination) pairs; no worker appears twice on a side. On an
            irregular graph the permutation is partial: some workers stay out of it.
        weights: ``weights[i]``, the weight that worker i puts on what it receives;
            0 where it receives nothing.
    """

    pairs: tuple[tuple[int, int], ...]
    weights: tuple[float, ...]


class MixingStep(NamedTuple):
    """One mixing x_i' = w_ii x_i + sum over sends of w x_source.

    Attributes:
        self_weights: ``self_weights[i]`` = w_ii.
        sends: the permutations; their number is the number of rounds of messages, and
            where every worker takes part in all of them, the messages a worker sends.
    """

    self_weights: tuple[float, ...]
    sends: tuple[Send, ...]

    @property
    def is_mean(self) -> bool:
        """Whether it is the exact mean over all workers, as one all-reduce is."""
        n = len(self.self_weights)
        weights = [self.self_weights, *(send.weights for send in self.sends)]
        if n == 1:
            return True
        if any(ws.count(1 / n) != n for ws in weights):
            return False
        return len(set().union(*(send.pairs for send in self.sends))) == n * (n - 1)


class Topology(NamedTuple):
    """Who talks to whom, and with which weights, at each step of a period.

    Rows of W belong to receivers, columns to senders. Rows that sum to 1 leave workers
    that agree as they are; columns that sum to 1 preserve the sum over the workers.
    Plain mixing needs both (``doubly_stochastic``); push-sum only the columns.

    Attributes:
        name: as in ``topologies.REGISTRY``.
        n: number of workers.
        steps: the mixing steps of one period, used in turn.
    """

    name: str
    n: int
    steps: tuple[MixingStep, ...]

    @property
    def period(self) -> int:
        """Number of steps after which the graph repeats."""
        return len(self.steps)

    def mixing_matrix(self, step: int = 0) -> np.ndarray:
        """Matrix W [n, n] float64 of one step; W_ij is the weight i puts on j."""
        mixing = self.steps[step % self.period]
        w = np.diag(np.asarray(mixing.self_weights))
        for send in mixing.sends:
            sources, destinations = _ends(send)
            w[destinations, sources] += np.asarray(send.weights)[destinations]
        return w

    def eigenvalues(self, step: int = 0) -> np.ndarray:
        """Eigenvalues of one step's W, [n] complex128, the largest modulus first.

        Equal moduli stand by real part, then by imaginary part, the largest first.
        """
        w = self.mixing_matrix(step)
        symmetric = np.allclose(w, w.T, rtol=0, atol=TOLERANCE)
        found = np.linalg.eigvalsh(w) if symmetric else np.linalg.eigvals(w)
        found = found.astype(np.complex128)
        rounded = found.round(10)  # so that rounding decides no tie
        order = np.lexsort((-rounded.imag, -rounded.real, -np.abs(rounded).round(10)))
        return found[order]

    @property
    def contraction(self) -> float:
        """Factor per step by which disagreement shrinks in the long run.

        The spectral radius of (product of one period's matrices - J), J = 11'/n, to the
        power 1/period. For one symmetric W that is its second largest |eigenvalue|; for
        rows or columns that sum to 1 that of the product, whichever way.
        """
        return _contraction(self)

    @property
    def spectral_gap(self) -> float:
        """1 - contraction; for one symmetric W, 1 - max(|lambda_2|, |lambda_n|)."""
        return 1.0 - self.contraction

    def steps_to(self, eps: float) -> float:
        """Count the steps until disagreement is eps times what it was, at the worst.

        The smallest k with ``||W_{k-1} ... W_1 W_0 - J||_2 <= eps``: whatever the
        workers start from, the distance to their mean is then at most eps times the
        first one. For graphs that average exactly, eps = 0 gives their finite number.

        Args:
            eps: in [0, 1).

        Returns:
            An int; ``math.inf`` where no number of steps is enough.

        Raises:
            ValueError: if eps is outside [0, 1), or the topology is not doubly
                stochastic, so that workers do not approach their mean.

        Example:
            >>> from bagua_jax import topologies
            >>> topologies.ring(8).steps_to(1e-3)
            32
            >>> topologies.hypercube(8).steps_to(0), topologies.complete(8).steps_to(0)
            (inf, 1)
        """
        if not 0 <= eps < 1:
            raise ValueError(
                f"steps_to: eps must be in [0, 1), got {eps!r}. It is the share of the "
                "first disagreement that is left, such as 1e-3."
            )
        if not self.doubly_stochastic:
            raise ValueError(
                f"steps_to: {self.name!r} is not doubly stochastic, so that workers do "
                "not approach their mean by mixing alone. Use `contraction`, the rate "
                "of push-sum's ratios."
            )
        return _steps_to(self, eps)

    @property
    def row_stochastic(self) -> bool:
        """Whether no weight is negative and every row sums to 1, at every step."""
        return _stochastic(self, axis=1)

    @property
    def column_stochastic(self) -> bool:
        """Whether no weight is negative and every column sums to 1, at every step."""
        return _stochastic(self, axis=0)

    @property
    def doubly_stochastic(self) -> bool:
        """Whether rows and columns sum to 1, within 1e-12, at every step."""
        return self.row_stochastic and self.column_stochastic

    @property
    def symmetric(self) -> bool:
        """Whether W equals its transpose, within 1e-12, at every step."""
        return all(_symmetric(self.n, mixing) for mixing in self.steps)

    @property
    def connected(self) -> bool:
        """Whether everybody's vector reaches everybody when steps repeat."""
        linked = np.zeros((self.n, self.n), bool)
        for mixing in self.steps:
            receivers, senders, weights = _entries(self.n, mixing)
            linked[receivers, senders] |= weights != 0
        return all(reached(side).all() for side in (linked, linked.T))

    @property
    def messages(self) -> float:
        """Messages that a worker sends in a step, on average; to itself is none."""
        pairs = [p for step in self.steps for send in step.sends for p in send.pairs]
        return sum(a != b for a, b in pairs) / (self.n * self.period)

    @property
    def max_degree(self) -> int:
        """Most neighbours that a worker hears, or is heard by, in one step."""
        degrees = [0]
        for step in range(self.period):
            linked = self.mixing_matrix(step) != 0
            np.fill_diagonal(linked, False)
            degrees += [int(linked.sum(0).max()), int(linked.sum(1).max())]
        return max(degrees)


def _deviations(topology: Topology) -> list[np.ndarray]:
    """W - J of each step, whose products say what is left of a disagreement.

    As W J = J W = J, they are (product of the W) - J, but keep their relative precision
    however small they get.
    """
    matrices = map(topology.mixing_matrix, range(topology.period))
    deviations = [w - 1 / topology.n for w in matrices]
    return [d if np.linalg.norm(d) > TOLERANCE else 0 * d for d in deviations]


@lru_cache(maxsize=256)
def _contraction(topology: Topology) -> float:
    product, log_scale = np.eye(topology.n) - 1 / topology.n, 0.0
    for factor in _deviations(topology):
        product = _times(factor, product)
        if not product.any():
            return 0.0
        scale = np.linalg.norm(product)  # long periods would underflow
        product, log_scale = product / scale, log_scale + math.log(scale)
    power = product
    for _ in range(len(power).bit_length()):
        # Eigenvalues that are all zero are found as noise; the powers vanish.
        power = _times(power, power)
        if not power.any():
            return 0.0
        power = power / np.linalg.norm(power)
    radius = float(np.max(np.abs(np.linalg.eigvals(product))))
    return math.exp((math.log(radius) + log_scale) / topology.period)


@lru_cache(maxsize=256)
def _steps_to(topology: Topology, eps: float) -> float:
    """Search the powers of one period by doubling: the norm never grows with k."""
    n, period = topology.n, topology.period
    if n == 1:
        return 0
    if topology.contraction > (1 - TOLERANCE if eps else 0):
        return math.inf
    factors = _deviations(topology)
    left = np.eye(n) - 1 / n
    power = left
    for factor in factors:
        power = _times(factor, power)
    powers = []  # of one period: its 1st, 2nd, 4th, ... that are not enough
    while _norm(power) > eps:
        powers.append(power)
        power = _times(power, power)
    steps = 0
    for i, power in reversed(list(enumerate(powers))):
        further = _times(power, left)
        if _norm(further) > eps:
            left, steps = further, steps + 2**i * period
    for factor in factors:
        left, steps = _times(factor, left), steps + 1
        if _norm(left) <= eps:
            break
    return steps


def _norm(a: np.ndarray) -> float:
    return float(np.linalg.norm(a, 2))


def _times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Multiply; a product that is only rounding noise is zero."""
    product = a @ b
    largest = np.linalg.norm(a) * np.linalg.norm(b)
    noise = np.linalg.norm(product) <= TOLERANCE * largest
    return np.zeros_like(product) if noise else product


def _ends(send: Send) -> np.ndarray:
    """[2, pairs]: sources and destinations."""
    return np.array(send.pairs, int).reshape(-1, 2).T


def _entries(n: int, mixing: MixingStep) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """List a step's i, j and W_ij, each pair once; a large W is mostly zeros."""
    ends = np.concatenate(
        [np.tile(np.arange(n), (2, 1)), *map(_ends, mixing.sends)], axis=1
    )
    weights = [np.asarray(send.weights)[_ends(send)[1]] for send in mixing.sends]
    pairs, place = np.unique(ends[1] * n + ends[0], return_inverse=True)
    found = np.bincount(place, np.concatenate([mixing.self_weights, *weights]))
    return pairs // n, pairs % n, found


def _stochastic(topology: Topology, axis: int) -> bool:
    def sums(mixing: MixingStep) -> bool:
        *ends, weights = _entries(topology.n, mixing)
        found = np.bincount(ends[1 - axis], weights, topology.n)
        return weights.min() >= 0 and bool(np.abs(found - 1).max() <= TOLERANCE)

    return all(map(sums, topology.steps))


def _symmetric(n: int, mixing: MixingStep) -> bool:
    i, j, weights = _entries(n, mixing)
    there, back = i * n + j, j * n + i
    order = np.argsort(back)
    if np.array_equal(there, back[order]):
        return bool(np.allclose(weights, weights[order], rtol=0, atol=TOLERANCE))
    w = Topology("", n, (mixing,)).mixing_matrix()  # zeros may be listed on one side
    return bool(np.allclose(w, w.T, rtol=0, atol=TOLERANCE))


def reached(linked: np.ndarray) -> np.ndarray:
    """Follow the links [n, n] from worker 0, each row once: [n] whom they lead to."""
    known = np.zeros(len(linked), bool)
    known[0], frontier = True, np.array([0])
    while frontier.size:
        fresh = linked[frontier].any(0) & ~known
        known |= fresh
        frontier = np.flatnonzero(fresh)
    return known


def circulant(n: int, self_weight: float, shifts: Sequence[tuple[int, float]]):
    """Build the step where worker i hears worker i - shift for each (shift, weight)."""
    workers = tuple(range(n))

    def rotated(shift: int) -> tuple[int, ...]:
        return workers[shift % n :] + workers[: shift % n]

    return MixingStep(
        self_weights=(self_weight,) * n,
        sends=tuple(
            Send(tuple(zip(workers, rotated(shift), strict=True)), (weight,) * n)
            for shift, weight in shifts
        ),
    )


def mixing_step(w: np.ndarray, name: str = "from_matrix") -> MixingStep:
    """Split a matrix into as few sends as there can be: see :func:`weighted_step`.

    Args:
        w: [n, n], the matrix of one step.
        name: of the topology, for the error.
    """
    entries = np.argwhere(w != 0)
    require_few(name, len(entries) - int(np.count_nonzero(np.diag(w))))
    return weighted_step(len(w), {(i, j): float(w[i, j]) for i, j in entries.tolist()})


def weighted_step(n: int, weights: Mapping[tuple[int, int], float]) -> MixingStep:
    """Split weights into as few sends as there can be.

    Weights belong to receivers, so that any partial permutation is one send. The links
    of W make a bipartite graph of sources and destinations; sends are the colours of
    its edges, and by Kőnig's theorem as many suffice as the busiest worker has to send
    or to receive: 2 for a path, n-1 for a star.

    Args:
        n: number of workers.
        weights: W_ij of a step by (i, j); those that are left out are 0.

    Returns:
        The step, whose number of sends is the largest in- or out-degree.
    """
    links = [(j, i) for (i, j), x in sorted(weights.items()) if i != j and x != 0]
    sends = []
    for pairs in _colour(links):
        heard = [0.0] * n
        for source, destination in pairs:
            heard[destination] = weights[destination, source]
        sends.append(Send(tuple(pairs), tuple(heard)))
    return MixingStep(tuple(weights.get((i, i), 0.0) for i in range(n)), tuple(sends))


def _colour(links: Iterable[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Share (source, destination) links out among few classes without a repeat.

    A link takes a colour that is free at both of its ends. Where there is none, let a
    be free at its source and b at its destination: along the path from the destination
    whose links are coloured a, b, a, ... the two are exchanged, and a is free at both.
    """
    outgoing = defaultdict(dict)  # outgoing[source][colour] = destination
    incoming = defaultdict(dict)  # incoming[destination][colour] = source
    sent, heard = defaultdict(int), defaultdict(int)  # below these all are taken

    def paint(link, colour):
        source, destination = link
        outgoing[source][colour] = destination
        incoming[destination][colour] = source

    def free(coloured, below, node):
        while below[node] in coloured[node]:
            below[node] += 1
        return below[node]

    for source, destination in links:
        a = free(outgoing, sent, source)
        b = free(incoming, heard, destination)
        path, end = [], destination
        for colour, links_at in itertools.cycle(((a, incoming), (b, outgoing))):
            other = links_at[end].get(colour)
            if other is None:
                break
            link = (other, end) if links_at is incoming else (end, other)
            path.append((link, colour))
            end = other
        for (i, j), colour in path:
            del outgoing[i][colour], incoming[j][colour]
            sent[i], heard[j] = min(sent[i], colour), min(heard[j], colour)
        for link, colour in path:
            paint(link, a + b - colour)
        paint((source, destination), a)

    classes = defaultdict(list)
    for source, coloured in outgoing.items():
        for colour, destination in coloured.items():
            classes[colour].append((source, destination))
    return [sorted(classes[colour]) for colour in sorted(classes)]


def require_workers(name: str, n: int) -> None:
    """Refuse a number of workers below one.

    Raises:
        ValueError: if ``n`` is not a positive integer.
    """
    if not isinstance(n, int | np.integer) or isinstance(n, bool) or n < 1:
        raise ValueError(
            f"{name}: n must be a positive integer, got {n!r}. "
            "It is the number of workers on the axis."
        )


def require_few(name: str, messages: int) -> None:
    """Refuse a period of more messages than can be listed.

    Raises:
        ValueError: naming the topology and their number.
    """
    if messages > MAX_MESSAGES:
        raise ValueError(
            f"{name}: a period must have at most {MAX_MESSAGES:,} messages, which are "
            f"listed one by one, and has {messages:,}. Use fewer workers, fewer "
            "neighbours, such as those of 'one_peer_exponential', or an all-reduce for "
            "the exact mean."
        )
