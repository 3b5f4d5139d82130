"""The time of a step from what it sends: two constants, and how they are fitted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bagua_jax.network import Link, step_time

__all__ = ["Exchange", "Fit", "fit", "seconds"]


class Exchange(NamedTuple):
    """What a system sends in a step, as the network card of a node sees it.

    Attributes:
        bytes: V, that leave a node.
        busiest: Vc, of them through the busiest connection.
        hops: H, inter-node hops of one bucket, one after the other.
        buckets: nb, sent one after the other; ``None`` where it is fitted.
        counted: whether V is from our compiled program, else from a formula.
    """

    bytes: float
    busiest: float
    hops: int
    buckets: int | None
    counted: bool


def seconds(
    exchange: Exchange,
    *,
    compute: float,
    link: Link,
    processing: float = math.inf,
    window: float = math.inf,
    buckets: float = 1.0,
    codec: float = 0.0,
) -> float:
    r"""Predict the time of a step.

    .. math::
        T = \max\Big(\frac{V}{g B},\; c + k + \frac{V}{C} +
        d\,\big(n_b H + \tfrac{2 V_c}{W}\big)\Big)

    Bytes on the wire hide behind compute and the host's work; latency does not, and
    neither does the time that a connection waits for acknowledgements.

    Args:
        exchange: V, Vc, H, nb.
        compute: c, seconds of the step without communication.
        link: B and g, and the one-way latency d, between nodes.
        processing: C, bytes/s that a node's host copies and hands to TCP; exposed.
        window: W, bytes in flight on a connection.
        buckets: nb where the exchange does not say.
        codec: k, seconds of compressing and decompressing on the device; exposed. To be
            measured on the device in question, never fitted.

    Example (ten megabytes at 10 Gbit/s hide behind 20 ms of compute):
        >>> link = Link(latency=0, bandwidth=1.25e9)
        >>> seconds(Exchange(10e6, 1e7, 1, 1, True), compute=0.02, link=link)
        0.02
    """
    count = buckets if exchange.buckets is None else exchange.buckets
    trips = count * exchange.hops + 2 * exchange.busiest / window
    return step_time(
        compute,
        exchange.bytes / link.rate,
        latency=link.latency * trips if exchange.bytes else 0.0,
        host=codec + exchange.bytes / processing,
        overlap="transfer",
    )


class Fit(NamedTuple):
    """Constants by least squares, and whether the data determine them."""

    constants: Mapping[str, float]
    identified: bool


def fit(
    predict: Callable[[Mapping[str, float]], np.ndarray],
    published: np.ndarray,
    start: Mapping[str, float],
) -> Fit:
    r"""Fit positive constants to a table.

    .. math:: \min_\theta \sum_{\text{cells}} \log^2 \frac{\hat y(\theta)}{y}

    Ratios count, as readings off a plot are equally wrong in relative terms, and a time
    is as wrong as the rate that is its inverse.

    Args:
        predict: constants -> predictions, shaped like ``published``.
        published: cells; those that are NaN do not count.
        start: constants to start from, by name.

    Returns:
        The constants. They are not identified where some direction of them changes
        the predictions of no cell.

    Example:
        >>> x = np.array([1.0, 2.0, 4.0])
        >>> found = fit(lambda c: c["slope"] * x, 3 * x, {"slope": 1.0})
        >>> round(found.constants["slope"], 6), found.identified
        (3.0, True)
    """
    from scipy.optimize import least_squares

    names: Sequence[str] = list(start)
    known = np.isfinite(published)

    def residuals(logs: np.ndarray) -> np.ndarray:
        values = dict(zip(names, np.exp(logs).tolist(), strict=True))
        return np.log(predict(values) / published)[known]

    logs = np.log([start[name] for name in names])
    found = least_squares(residuals, logs, xtol=1e-12, ftol=1e-12, gtol=1e-12)
    singular = np.linalg.svd(found.jac, compute_uv=False)
    constants = dict(zip(names, np.exp(found.x).tolist(), strict=True))
    identified = len(singular) == len(names) and bool(singular[-1] > 1e-3)
    return Fit(constants, identified)
