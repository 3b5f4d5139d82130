"""Clusters as compilation targets: what a compiler must be told to build for them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from bagua_jax.network import Link, Network
from bagua_jax.network.base import require

__all__ = ["GPUS", "TPUS", "Cluster", "TpuChip"]

# Facts of the chips, from XLA's public target specifications
# (xla/backends/gpu/target_config/specs: h100_sxm, h200, b200, a100_sxm_80). The A100's
# says nothing of its 12 NVLinks and its PCIe 4.0, which NVIDIA's data sheet does.
_HOPPER = dict(
    compute_capability=9,
    core_count=132,
    fpus_per_core=128,
    clock_rate_ghz=1.98,
    l2_cache_size=52428800,
    shared_memory_per_core=233472,
    shared_memory_per_block_optin=232448,
    pcie_bandwidth=34359738368,
    active_links=18,
)
GPUS: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "a100": _HOPPER
        | dict(
            name="NVIDIA A100-SXM4-80GB",
            compute_capability=8,
            core_count=108,
            fpus_per_core=64,
            clock_rate_ghz=1.41,
            l2_cache_size=41943040,
            shared_memory_per_core=167936,
            shared_memory_per_block_optin=166912,
            memory_bandwidth=2039040000000,
            device_memory_size=85100068864,
            active_links=12,
        ),
        "h100": _HOPPER
        | dict(
            name="NVIDIA H100 80GB HBM3",
            memory_bandwidth=3352320000000,
            device_memory_size=84942979072,
        ),
        "h200": _HOPPER
        | dict(
            name="NVIDIA H200 141GB HBM3e",
            memory_bandwidth=4800000000000,
            device_memory_size=151397597184,
        ),
        "b200": _HOPPER
        | dict(
            name="NVIDIA B200",
            compute_capability=10,
            core_count=148,
            clock_rate_ghz=1.965,
            l2_cache_size=132644864,
            memory_bandwidth=7672320000000,
            device_memory_size=191514411008,
            pcie_bandwidth=68719476736,
        ),
    }
)
"""Chips of GPU clusters, by name."""

# What the four have in common, and the versions of the CUDA that the plan extra brings.
_COMMON = """
threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
shared_memory_per_block: 49152 registers_per_core_limit: 65536
registers_per_block_limit: 65536 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
block_dim_limit_z: 65535 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024
thread_dim_limit_z: 64 device_vendor: "NVIDIA Corporation" driver_version: "13.0.0"
runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
"""


class TpuChip(NamedTuple):
    """A chip of TPU slices.

    Attributes:
        devices: how many JAX sees in one.
        ici: GB/s that all its links to other chips carry together, each way: half of
            the "bidirectional" bandwidth of the vendor's public specifications; v4 is
            six links of 400 Gbit/s.
    """

    devices: int
    ici: float


TPUS: MappingProxyType[str, TpuChip] = MappingProxyType(
    {
        "v4": TpuChip(2, 300.0),
        "v5e": TpuChip(1, 200.0),
        "v5p": TpuChip(1, 600.0),
        "v6e": TpuChip(1, 400.0),
        "tpu7x": TpuChip(2, 600.0),
    }
)
"""Chips of TPU slices, by name."""


@dataclass(frozen=True)
class Cluster:
    """A cluster or slice to compile for, with nothing attached.

    Make one with :meth:`parse`.

    Attributes:
        text: how it was written.
        chip: in ``GPUS`` or ``TPUS``.
        shape: (nodes, GPUs per node), or the chips of a TPU slice along each dimension.

    Example:
        >>> cluster = Cluster.parse("2x4:h100")
        >>> cluster.num_devices, cluster.nodes.tolist()
        (8, [0, 0, 0, 0, 1, 1, 1, 1])
    """

    text: str
    chip: str
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Cluster:
        """Read a cluster: ``16x8:h100``, ``8:b200`` (one node), or ``v5e:4x4``.

        Args:
            text: ``NODESxGPUS:CHIP`` or ``GPUS:CHIP`` with a chip of ``GPUS``, or
                ``CHIP:XxY`` or ``CHIP:XxYxZ`` with a chip of ``TPUS``.

        Raises:
            ValueError: another form, or a chip that is not known.
        """
        left, _, right = text.strip().lower().partition(":")
        gpu, tpu = right in GPUS, left in TPUS
        sizes = left if gpu else right
        shape = tuple(map(int, sizes.split("x"))) if _SIZES.fullmatch(sizes) else ()
        fits = len(shape) in ((1, 2) if gpu else (2, 3)) and 0 not in shape
        if not (gpu or tpu) or not fits:
            raise ValueError(
                "Cluster.parse: a cluster is NODESxGPUS:CHIP, such as 16x8:h100, or "
                f"GPUS:CHIP for one node (chips: {', '.join(GPUS)}), or a TPU slice "
                f"CHIP:XxY or CHIP:XxYxZ, such as v5e:4x4 (chips: {', '.join(TPUS)}); "
                f"got {text!r}."
            )
        if gpu and len(shape) == 1:
            shape = (1, *shape)
        return cls(text.strip().lower(), right if gpu else left, shape)

    @property
    def platform(self) -> str:
        """JAX's name of what is compiled for: ``"cuda"`` or ``"tpu"``."""
        return "cuda" if self.chip in GPUS else "tpu"

    @property
    def has_timeline(self) -> bool:
        """Whether XLA predicts times: not for TPU, and its tables have no A100."""
        return self.platform == "cuda" and self.chip != "a100"

    @property
    def num_nodes(self) -> int:
        """Nodes; a TPU slice is one, since its own links join all of it."""
        return self.shape[0] if self.platform == "cuda" else 1

    @property
    def per_node(self) -> int:
        """Devices of a node."""
        return self.num_devices // self.num_nodes

    @property
    def num_devices(self) -> int:
        """Devices as JAX counts them; some TPU chips are two."""
        chips = math.prod(self.shape)
        return chips if self.platform == "cuda" else chips * TPUS[self.chip].devices

    @property
    def nodes(self) -> np.ndarray:
        """The node of each device, [n], in the order of the mesh."""
        return np.repeat(np.arange(self.num_nodes), self.per_node)

    def ici(self) -> Network:
        """Describe the links of a TPU slice, from stated constants.

        A device has its share of its chip's links, as if every collective could use
        all of them at once, and 1 us to any other: a bound, since neither the torus nor
        its hops are modelled.

        Raises:
            ValueError: a GPU cluster, whose links ``bagua_jax.network.preset`` states.
        """
        rule = "Cluster.ici: the cluster must be a TPU slice"
        require(self.platform == "tpu", rule, self.text)
        devices, ici = TPUS[self.chip]
        link = Link(1e-6, ici * 1e9 / devices)
        return Network.from_levels(
            1, self.num_devices, inside=link, between=link, name="ici"
        )

    def topology(self) -> dict[str, str]:
        """Return the arguments of ``jax.experimental.topologies.get_topology_desc``."""
        if self.platform == "tpu":
            sizes = "x".join(map(str, self.shape))
            return {"platform": "tpu", "topology_name": f"{self.chip}:{sizes}"}
        facts = dict(GPUS[self.chip])
        name, major = facts.pop("name"), facts.pop("compute_capability")
        links = facts.pop("active_links")
        numbers = " ".join(f"{key}: {value}" for key, value in facts.items())
        config = (
            f'gpu_device_info {{ {numbers} {_COMMON} name: "{name}"\n'
            f"cuda_compute_capability {{ major: {major} }} "
            f"device_interconnect_info {{ active_links: {links} }} }}\n"
            'platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 } '
            f'device_description_str: "{name}"'
        )
        # Slices x hosts x GPUs: a slice is one domain of NVLink. jax 0.12 prices links
        # between hosts of a slice as NVLink.
        topology = f"{self.num_nodes}x1x{self.per_node}"
        return {"platform": "cuda", "target_config": config, "topology": topology}

    def __str__(self) -> str:
        """Say it in words."""
        if self.platform == "tpu":
            return f"{self.text}: {self.num_devices} devices of one {self.chip} slice"
        return (
            f"{self.text}: {self.num_devices} x {GPUS[self.chip]['name']}, "
            f"{self.num_nodes} node{'s' * (self.num_nodes > 1)} of {self.per_node}"
        )


_SIZES = re.compile(r"\d{1,5}(x\d{1,5})*")
