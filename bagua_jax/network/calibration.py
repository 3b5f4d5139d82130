"""Links fitted to measured messages."""

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import numpy as np

from bagua_jax.network.base import Link, require

__all__ = ["LinkFit", "calibrate"]


class LinkFit(NamedTuple):
    """Latency and bandwidth fitted to measurements, with standard errors."""

    latency: float  # seconds; may be negative within its error
    bandwidth: float  # bytes/s of payload
    latency_error: float
    bandwidth_error: float
    residual: float  # root mean square: seconds, or share of each where noise is that
    measurements: int

    @property
    def link(self) -> Link:
        """The link, for networks; the goodput is in its bandwidth."""
        return Link(max(0.0, self.latency), self.bandwidth)


def calibrate(
    measurements: Mapping[str, Iterable[tuple[float, float]]],
    *,
    noise: Literal["absolute", "relative"] = "absolute",
) -> dict[str, LinkFit]:
    r"""Fit each class of links to measured messages, by least squares.

    .. math:: t_i = \alpha + b_i / \beta + \varepsilon_i

    The standard error of the bandwidth follows from that of 1/beta, to first order.

    Args:
        measurements: for each class of links, (bytes, seconds) of single messages, one
            way.
        noise: ``"absolute"`` where all times scatter by equally many seconds,
            ``"relative"`` where each scatters by a share of itself, as times of sizes
            over decades do.

    Returns:
        The fit of each class.

    Raises:
        ValueError: what cannot be identified: fewer than three measurements, a single
            size, a time per byte below three of its standard errors, or a latency that
            is negative by more than three. Also sizes or times that are no such.

    Example:
        >>> rows = [(0, 1.1e-3), (1e6, 9.0e-3), (2e6, 16.9e-3), (4e6, 33.0e-3)]
        >>> fit = calibrate({"between": rows})["between"]
        >>> f"{fit.latency * 1e3:.2f} +- {fit.latency_error * 1e3:.2f} ms"
        '1.04 +- 0.07 ms'
        >>> f"{fit.bandwidth / 1e6:.1f} +- {fit.bandwidth_error / 1e6:.1f} MB/s"
        '125.4 +- 0.5 MB/s'
    """
    rule = "calibrate: noise must be 'absolute' or 'relative'"
    require(noise in ("absolute", "relative"), rule, noise)
    return {
        name: _fit(np.array([*rows], np.float64), noise, f"calibrate: {name!r}")
        for name, rows in measurements.items()
    }


def _fit(data: np.ndarray, noise: str, caller: str) -> LinkFit:
    rule = f"{caller} needs at least 3 measurements (bytes, seconds)"
    require(data.shape == (len(data), 2) and len(data) >= 3, rule, data.shape)
    size, seconds = data.T
    valid = np.isfinite(data).all() and (size >= 0).all() and (seconds > 0).all()
    rule = f"{caller} needs sizes of at least 0 bytes and times above 0 seconds"
    require(valid, rule, data.tolist())
    rule = f"{caller} needs two sizes to tell latency from bandwidth"
    require(np.ptp(size) > 0, rule, size.tolist())

    weight = 1 / seconds if noise == "relative" else np.ones_like(seconds)
    unit = size.max()  # both columns of order one
    design = np.stack([weight, weight * size / unit], axis=1)
    covariance = np.linalg.inv(design.T @ design)
    latency, slope = covariance @ design.T @ (weight * seconds)
    residual = weight * seconds - design @ [latency, slope]
    variance = residual @ residual / (len(data) - 2)
    latency_error, slope_error = np.sqrt(variance * np.diag(covariance))

    rule = f"{caller} does not identify a bandwidth: seconds per byte"
    found = f"{slope / unit:.3g} +- {slope_error / unit:.3g}"
    cure = "Measure larger messages, or more of them."
    require(slope > 3 * slope_error, rule, found, cure)
    rule = f"{caller} does not follow latency + bytes / bandwidth: a latency in seconds"
    found = f"{latency:.3g} +- {latency_error:.3g}"
    cure = "Small messages are faster than large ones foretell: fit a narrower range."
    rounding = 1e-9 * seconds.max()
    require(latency >= -3 * latency_error - rounding, rule, found, cure)
    return LinkFit(
        latency=float(latency),
        bandwidth=float(unit / slope),
        latency_error=float(latency_error),
        bandwidth_error=float(unit / slope**2 * slope_error),
        residual=float(np.sqrt(np.mean(residual**2))),
        measurements=len(data),
    )
