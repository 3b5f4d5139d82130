"""Base-(k+1) graphs: the exact mean in few steps, for any number of workers."""

import math
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import accumulate

import numpy as np

from bagua_jax.topologies.base import (
    Topology,
    require_few,
    require_workers,
    weighted_step,
)

__all__ = ["base_k"]


def base_k(n: int, k: int = 1) -> Topology:
    r"""Mix with at most k workers a step, so that one period is the exact mean.

    The Base-(k+1) graph. Where n is a product of L factors of at most k+1, numbers have
    L digits, and at step t those that differ in digit t alone average (the k-peer
    hyper-hypercube): L steps. Other n are written in base k+1,

    .. math:: n = a_1 (k+1)^{p_1} + \dots + a_m (k+1)^{p_m},
              \quad p_1 > \dots > p_m,\ 1 \le a_l \le k,

    and workers stand in groups of these sizes, each of a_l subsets of (k+1)^p_l:

    1. every group averages within itself, digit by digit;
    2. for l = 1, 2, ...: each worker of the later groups meets one worker of each
       subset of group l, with weight (k+1)^p_l / (size of group l and all later ones).
       The workers met differ, so that each subset of group l, and the later groups
       together, then have the mean of all workers;
    3. after its turn every subset averages within itself, digit by digit, while later
       groups have their turn. Workers with nobody to meet average in groups of k+1.

    Where n = p q with p of small factors, all of this runs in p sets of q workers, and
    workers of equal place then average over the p sets, if that takes fewer steps.

    Args:
        n: number of workers, at least 1.
        k: most workers that one meets in a step, at least 1.

    Returns:
        A topology of symmetric matrices whose period of at most 2 log_{k+1} n + 2 steps
        multiplies to J = 11'/n (contraction 0), if begun at step 0. A worker sends at
        most k messages a step. For n a power of two and k = 1 it is the hypercube, one
        dimension a step, with the log2 n steps of ``one_peer_exponential``.

    Raises:
        ValueError: if n or k is not a positive integer, or a step would have more
            than 2^20 messages.

    References:
        Takezawa et al., `Beyond Exponential Graph: Communication-Efficient Topologies
        for Decentralized Learning via Finite-time Convergence`, 2023 (arXiv
        2305.11420).

    Example:
        >>> [base_k(n).period for n in (4, 5, 6, 7, 8)]
        [2, 5, 4, 5, 3]
        >>> base_k(25).steps_to(0), base_k(25, k=4).steps_to(0)
        (9, 2)
    """
    require_workers("base_k", n)
    if not isinstance(k, int | np.integer) or isinstance(k, bool) or k < 1:
        raise ValueError(
            f"base_k: k must be a positive integer, got {k!r}. It is the most workers "
            "that one meets in a step; 1 gives the fewest messages."
        )
    n, k = int(n), int(k)
    require_few("base_k", n * min(k, n - 1))
    smooth = math.prod(_prime_factors(n, k + 1))
    rest = n // smooth
    split = [_repeated(w, smooth, rest) for w in _simple(rest, k)]
    split += [_spread(w, rest) for w in _hyper_hypercube(smooth, k)]
    steps = min(split, _simple(n, k), key=len) or [_alone(range(n))]
    return Topology("base_k", n, tuple(weighted_step(n, w) for w in steps))


# Weights of a step by (receiver, sender), as most of a matrix is zero.
_Weights = dict[tuple[int, int], float]


def _alone(workers: Iterable[int]) -> _Weights:
    return {(i, i): 1.0 for i in workers}


def _mean(workers: Sequence[int]) -> _Weights:
    return {(i, j): 1 / len(workers) for i in workers for j in workers}


def _repeated(w: _Weights, count: int, size: int) -> _Weights:
    """Let ``count`` sets of ``size`` workers, one after the other, do the same."""
    starts = range(0, count * size, size)
    return {(s + i, s + j): x for s in starts for (i, j), x in w.items()}


def _spread(w: _Weights, stride: int) -> _Weights:
    """Let ``stride`` sets, of every ``stride``-th worker, do the same."""
    return {
        (i * stride + t, j * stride + t): x
        for (i, j), x in w.items()
        for t in range(stride)
    }


def _moved(w: _Weights, start: int) -> _Weights:
    return {(start + i, start + j): x for (i, j), x in w.items()}


def _prime_factors(n: int, largest: int) -> list[int]:
    """List the prime factors of n that are at most ``largest``, with repeats."""
    factors = []
    for factor in range(2, largest + 1):
        while n % factor == 0:
            factors.append(factor)
            n //= factor
    return factors


@cache
def _few_factors(n: int, largest: int) -> tuple[int, ...]:
    """Write n as a product of the fewest factors of at most ``largest``."""
    if n == 1:
        return ()
    divisors = [f for f in range(largest, 1, -1) if n % f == 0]
    return min(((f, *_few_factors(n // f, largest)) for f in divisors), key=len)


def _hyper_hypercube(n: int, k: int) -> list[_Weights]:
    """Average digit by digit; n has no prime factor above k+1."""
    steps, stride = [], 1
    for factor in _few_factors(n, k + 1):
        average = _spread(_mean(range(factor)), stride)
        stride *= factor
        steps.append(_repeated(average, n // stride, stride))
    return steps


def _simple(n: int, k: int) -> list[_Weights]:
    """Average group after group of n's digits in base k+1: steps 1 to 3 above."""
    groups = _digits(n, k + 1)
    if len(groups) == 1:
        return _hyper_hypercube(n, k)
    bounds = list(accumulate((count * size for count, size in groups), initial=0))
    steps = []

    whole = [
        _hyper_hypercube(count * size, k) or [_alone(range(1))]
        for count, size in groups
    ]
    for t in range(len(whole[0])):
        w = {}
        for start, averages in zip(bounds, whole, strict=False):
            w |= _moved(averages[t % len(averages)], start)
        steps.append(w)

    subsets = [
        [_repeated(w, count, size) for w in _hyper_hypercube(size, k)]
        or [_mean(range(count))]
        for count, size in groups
    ]
    for turn in range(1 + len(subsets[0])):
        w = _alone(range(bounds[min(turn, len(groups))], n))
        for start, averages in zip(bounds[:turn], subsets, strict=False):
            w |= _moved(averages[turn % len(averages)], start)
        if turn < len(groups):
            _meet(w, *groups[turn], range(bounds[turn], n), k)
        steps.append(w)
    return steps


def _digits(n: int, base: int) -> list[tuple[int, int]]:
    """List (digit, base^place) of n, without zeros, the highest place first."""
    size = 1
    while size * base <= n:
        size *= base
    digits = []
    while n:
        if n >= size:
            digits.append((n // size, size))
        n, size = n % size, size // base
    return digits


def _meet(w: _Weights, count: int, size: int, workers: range, k: int) -> None:
    """Write one group's turn into w: its subsets come first among the workers."""
    later = workers[count * size :]
    weight = size / len(workers)
    idle = []
    w |= {(i, i): 1 - count * weight for i in later}
    for start in range(0, count * size, size):
        subset = workers[start : start + size]
        for i, j in zip(later, subset, strict=False):
            w[i, j] = w[j, i] = weight
            w[j, j] = 1 - weight
        idle.extend(subset[len(later) :])
    for start in range(0, len(idle), k + 1):
        w |= _mean(idle[start : start + k + 1])
