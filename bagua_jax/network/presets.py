"""Networks by name, from stated constants."""

from collections.abc import Callable, Mapping

import numpy as np

from bagua_jax.network.base import GBIT, Link, Network, require

__all__ = ["PRESETS", "preset"]

TCP = 1448 / 1538  # payload in an Ethernet frame: MTU 1500, TCP with time stamps
NVLINK = Link(latency=3e-6, bandwidth=300e9, goodput=0.8)

# Five regions: America east and west, Europe, east Asia, South America. Above the
# diagonal Gbit/s of one connection, below it milliseconds one way; our own numbers.
REGION = Link(latency=0.2e-3, bandwidth=10 * GBIT, goodput=TCP)
REGIONS = np.array([
    [0.0, 2.0, 1.5, 0.6, 0.8],
    [32., 0.0, 0.8, 1.0, 0.5],
    [40., 70., 0.0, 0.5, 0.5],
    [85., 55., 120, 0.0, 0.3],
    [60., 90., 100, 140, 0.0],
])  # fmt: skip


def _ethernet(name: str, latency: float, gbits: float) -> Callable[..., Network]:
    between = Link(latency, gbits * GBIT, goodput=TCP)

    def build(num_nodes: int, per_node: int, ports: int) -> Network:
        return Network.from_levels(
            num_nodes, per_node, inside=NVLINK, between=between, ports=ports, name=name
        )

    return build


def _geo(num_nodes: int, per_node: int, ports: int) -> Network:
    near = Network.from_levels(
        num_nodes, per_node, inside=NVLINK, between=REGION, ports=ports
    )
    at = near.nodes * len(REGIONS) // num_nodes  # the region of each device, in blocks
    far, pair = at[:, None] != at, np.ix_(at, at)
    gbits, ms = np.triu(REGIONS), np.tril(REGIONS)
    return Network(
        np.where(far, (ms + ms.T)[pair] * 1e-3, near.latency),
        np.where(far, (gbits + gbits.T)[pair] * GBIT * TCP, near.bandwidth),
        near.nodes,
        ports,
        name="geo",
    )


PRESETS: Mapping[str, Callable[..., Network]] = {
    **{f"{g}gbit": _ethernet(f"{g}gbit", 20e-6, g) for g in (10, 25, 100, 400)},
    "wan": _ethernet("wan", 30e-3, 1),
    "geo": _geo,
}


def preset(name: str, num_nodes: int, per_node: int = 1, *, ports: int = 1) -> Network:
    """Return a network by name. Its constants are stated, not measured.

    - ``10gbit``, ``25gbit``, ``100gbit``, ``400gbit``: Ethernet between nodes, 20 us,
      goodput 1448/1538 (TCP, MTU 1500).
    - ``wan``: 1 Gbit/s and 30 ms between nodes, the same goodput.
    - ``geo``: nodes in five regions, in blocks; 10 Gbit/s and 0.2 ms inside a region,
      0.3 to 2 Gbit/s and 32 to 140 ms between regions, the same goodput.

    Inside a node all have NVLink: 300 GB/s each way, goodput 0.8, 3 us.

    Args:
        name: one of ``PRESETS``.
        num_nodes: at least 1.
        per_node: devices of a node; at least 1.
        ports: network cards of a node, each of the named bandwidth.

    Raises:
        ValueError: a name that is not known, or a count below 1.

    Example:
        >>> print(preset("10gbit", num_nodes=16, per_node=8))
        10gbit: 128 devices on 16 nodes of 1 port; constants stated, not measured
          inside a node: 3 us, 1,920 Gbit/s of payload
          between nodes: 20 us, 9.415 Gbit/s of payload
    """
    rule = f"preset: name must be one of {', '.join(map(repr, PRESETS))}"
    cure = "Network.from_levels and Network.from_matrices describe any other."
    require(name in PRESETS, rule, name, cure)
    return PRESETS[name](num_nodes, per_node, ports)
