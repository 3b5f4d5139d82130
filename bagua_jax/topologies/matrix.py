"""Any mixing matrix, or a sequence of them, as a topology."""

from typing import Any

import numpy as np

from bagua_jax.topologies.base import TOLERANCE, Topology, mixing_step

__all__ = ["from_matrix"]

_KINDS = {  # the axes along which weights sum to 1
    "double": (1, 0),
    "row": (1,),
    "column": (0,),
}


def from_matrix(
    w: Any, *, stochastic: str = "double", name: str = "from_matrix"
) -> Topology:
    r"""Mix with given weights: :math:`x_i' = \sum_j W_{ij} x_j`.

    The support of W is split into as few partial permutations as there can be: as many
    as the most workers that one hears, or is heard by. This is a colouring of the edges
    of a bipartite graph; as weights belong to receivers, no Birkhoff decomposition,
    with its up to (n-1)^2 + 1 permutations, is needed.

    Args:
        w: [n, n], or [period, n, n], or a sequence of [n, n]: W_ij is the weight that
            worker i puts on what it hears from j. Dense or of ``scipy.sparse``; no
            weight is negative. In float32, as ``jax.numpy`` computes it, sums may be
            off by rounding, and are made exact: each weight changes by that share.
        stochastic: what W is. ``"double"``: rows and columns sum to 1, as plain mixing
            needs. ``"column"``: columns alone, each worker's shares of what it gives
            away, for push-sum on directed graphs. ``"row"``: rows alone; workers agree,
            but not on the mean.
        name: of the topology, and in errors.

    Returns:
        A topology of as many steps as there are matrices. A worker sends one message to
        each that puts weight on it; the matrices may be disconnected (``connected``).

    Raises:
        ValueError: if W is no square matrix of finite numbers >= 0, or sums are off by
            more than 1e-12 (float32: 1e-7 n); the step and the row or column are named.

    Example:
        Worker 0 tells both others, who tell only it:

        >>> push = [[1/3, 1/2, 1/2], [1/3, 1/2, 0], [1/3, 0, 1/2]]
        >>> topology = from_matrix(push, stochastic="column")
        >>> topology.doubly_stochastic, topology.max_degree, round(topology.messages, 2)
        (False, 2, 1.33)
    """
    if stochastic not in _KINDS:
        raise ValueError(
            f"{name}: stochastic must be one of {', '.join(map(repr, _KINDS))}; got "
            f"{stochastic!r}."
        )
    matrices, tolerance = _matrices(w, name)
    for step, matrix in enumerate(matrices):
        _require_weights(matrix, step, stochastic, name, tolerance)
        if tolerance > TOLERANCE:
            matrices[step] = _rescaled(matrix, stochastic)
    return Topology(name, matrices.shape[1], tuple(map(mixing_step, matrices)))


def _matrices(w: Any, name: str) -> tuple[np.ndarray, float]:
    """Read matrices [period, n, n] in float64, and how far their sums may be off."""
    if hasattr(w, "is_directed"):
        raise ValueError(
            f"{name}: W must be a matrix, got a graph, {w}. Use "
            "topologies.from_networkx(graph), which weighs its edges."
        )
    try:
        found = np.asarray(w.toarray() if hasattr(w, "toarray") else w)
        if np.iscomplexobj(found):
            raise TypeError("they are complex")
        is_rounded = found.dtype == np.float32
        found = found.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name}: W must be an array of real numbers: {error}."
        ) from None
    found = found[None] if found.ndim == 2 else found
    if found.ndim != 3 or found.shape[1] != found.shape[2] or not found.size:
        raise ValueError(
            f"{name}: W must be one matrix [n, n], or several of one size "
            f"[period, n, n]; got the shape {np.shape(w)}."
        )
    return found, found.shape[1] * 2.0**-23 if is_rounded else TOLERANCE


def _rescaled(w: np.ndarray, stochastic: str) -> np.ndarray:
    r"""Make sums that are off by rounding exact: :math:`W_{ij} (1 + u_i + v_j)`.

    With :math:`v = 0` for rows, :math:`u = 0` for columns; for both, the smallest that
    solve the linear equations. What is zero stays so, and what is symmetric.
    """
    rows, columns = w.sum(1), w.sum(0)
    if stochastic == "row":
        return w / rows[:, None]
    if stochastic == "column":
        return w / columns[None]
    sums = np.block([[np.diag(rows), w], [w.T, np.diag(columns)]])
    u, v = np.split(np.linalg.lstsq(sums, 1 - np.diag(sums), rcond=None)[0], 2)
    return w * (1 + u[:, None] + v[None])


def _require_weights(
    w: np.ndarray, step: int, stochastic: str, name: str, tolerance: float
) -> None:
    if not (w >= 0).all():  # a NaN neither
        i, j = np.argwhere(~(w >= 0))[0]
        raise ValueError(
            f"{name}: weights must be numbers >= 0, and W[{i}, {j}] of step {step} is "
            f"{w[i, j]}. In I - a L a smaller a keeps the diagonal from being negative."
        )
    sums = [w.sum(0), w.sum(1)]
    for axis in _KINDS[stochastic]:
        off = int(np.argmax(np.abs(sums[axis] - 1)))
        if not abs(sums[axis][off] - 1) <= tolerance:
            word = ("column", "row")[axis]
            cure = (
                "Normalize in float64; where columns alone sum to 1, as push-sum "
                "needs, say stochastic='column', where rows alone do, "
                "stochastic='row'."
            )
            if np.isin(w, (0, 1)).all():
                cure = (
                    "It looks like an adjacency matrix, without weights: use "
                    "topologies.from_networkx(graph), or from_edges(n, edges)."
                )
            raise ValueError(
                f"{name}: every {word} must sum to 1 within {tolerance:.1g}, and "
                f"{word} {off} of step {step} sums to {sums[axis][off]:.15g}. {cure}"
            )
