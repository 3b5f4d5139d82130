"""Who takes part in a collective: replica groups in every notation."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

from bagua_jax.wire.base import PAIRWISE, Groups

__all__ = ["device_groups", "integers", "listed", "replica_groups"]


def device_groups(
    groups: Groups | str,
    *,
    kind: str,
    replicas: int,
    partitions: int,
    channel: bool,
    global_ids: bool,
) -> Groups:
    """Return the groups of a collective, or the pairs of a permute, as device numbers.

    Device [r, p] runs partition p of replica r. Without a channel the program numbers
    replicas, with global ids devices, else partitions; but gathers and reductions then
    number replicas, each of which brings all its partitions.

    Args:
        groups: as the program gives them, or their text.
        kind: of the collective.
        replicas: of the program.
        partitions: of each replica.
        channel: whether the collective has a channel.
        global_ids: whether it uses global device ids.
    """
    device = np.arange(replicas * partitions).reshape(replicas, partitions)
    if global_ids:
        rows = device.reshape(1, -1)
    elif not channel:
        rows = device.T
    elif kind in ("all-reduce", "all-gather", "reduce-scatter"):
        rows = device[None]  # [1, replicas, partitions]: a number stands for a replica
    else:
        rows = device
    if isinstance(groups, str):
        groups = replica_groups(groups, rows.shape[1])
    elif kind not in PAIRWISE:
        groups = _checked(groups, rows.shape[1], groups)
    return tuple(tuple(row[list(g)].ravel().tolist()) for row in rows for g in groups)


def replica_groups(text: str, devices: int) -> Groups:
    """Parse the groups of a collective.

    Args:
        text: as printed: lists, an iota, or axes of a mesh; ``{}`` means one group.
        devices: how many numbers the groups divide among them.

    Raises:
        ValueError: a form that is not known, or groups that are not of equal size or
            do not hold every number once.

    Example:
        >>> replica_groups("{{0,1},{2,3}}", 4)
        ((0, 1), (2, 3))
        >>> replica_groups("[2,2]<=[2,2]T(1,0)", 4)
        ((0, 2), (1, 3))
        >>> replica_groups("mesh['node'=2,'local'=2] {'node'}", 4)
        ((0, 2), (1, 3))
    """
    if text in ("{}", "{{}}"):
        return (tuple(range(devices)),)
    try:
        if re.fullmatch(r"\{(\{[\d,]+\},?)+\}", text):
            groups = listed(text)
        elif iota := re.fullmatch(r"(\[\d+,\d+\])<=(\[[\d,]+\].*)", text):
            groups = _iota(iota[2]).reshape(integers(iota[1])).tolist()
        elif mesh := re.fullmatch(
            r"mesh\[(.*?)\](?:,device_ids=\((.*)\))? \{(.*)\}", text
        ):
            groups = _mesh_groups(*mesh.groups())
        else:
            raise ValueError("neither lists, nor an iota, nor axes of a mesh")
    except (ValueError, LookupError) as error:
        raise ValueError(
            f"wire.replica_groups: the form is not known: {text!r} ({error})."
        ) from error
    return _checked(groups, devices, text)


def _checked(listed: Iterable[Sequence[int]], devices: int, shown: object) -> Groups:
    groups = tuple(tuple(group) for group in listed)
    numbers = sorted(number for group in groups for number in group)
    if numbers != [*range(devices)] or len({len(group) for group in groups}) > 1:
        raise ValueError(
            f"wire.replica_groups: groups must be of equal size and hold each of "
            f"{devices} devices once; got {shown!r}."
        )
    return groups


def _mesh_groups(axes: str, device_ids: str | None, along: str) -> list[list[int]]:
    """Group along axes of a mesh; 'a':(2)3 is the middle factor of 'a' = 2 x 3 x rest.

    >>> _mesh_groups("'a'=2,'b'=4", None, "'a','b':(1)2")
    [[0, 2, 4, 6], [1, 3, 5, 7]]
    """
    sizes = {k: int(v) for k, v in (axis.split("=") for axis in axes.split(","))}
    at = dict(zip(sizes, np.indices(list(sizes.values())), strict=True))
    outside, inside, length = dict(at), [], 1
    for name, _, part in (axis.partition(":") for axis in along.split(",") if axis):
        before, size = integers(part) or (1, sizes[name])
        stride, remainder = divmod(sizes[name], before * size)
        if remainder:
            raise ValueError(f"{part} is no part of {name}")
        inside.append(at[name] // stride % size)
        outside[name] = outside[name] - inside[-1] * stride
        length *= size
    order = np.lexsort([k.ravel() for k in [*outside.values(), *inside][::-1]])
    ids = _iota(device_ids).ravel()[order] if device_ids else order
    return ids.reshape(-1, length).tolist()


def _iota(text: str) -> np.ndarray:
    """Numbers in the order of "[4,2]T(1,0)", or of a plain list."""
    dims, _, order = text.partition("T")
    if "[" not in dims:
        return np.array(integers(dims))
    numbers = np.arange(math.prod(integers(dims))).reshape(integers(dims))
    return numbers.transpose(integers(order)) if order else numbers


def listed(text: str) -> Groups:
    """Read "{{0,1},{2,3}}"."""
    return tuple(tuple(integers(group)) for group in re.findall(r"\{([\d,]+)\}", text))


def integers(text: str) -> list[int]:
    """Read every whole number of a text."""
    return [int(number) for number in re.findall(r"\d+", text)]
