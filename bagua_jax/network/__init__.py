r"""What communication would cost on a network that is described, not attached.

A :class:`Network` states, for every pair of devices, a latency and a bandwidth, and
how many ports a node has. From these follow, by the formulae of the alpha-beta model,
the time of each collective and of a compiled program's step
(:func:`communication_time`), who should sit where (:func:`embed`) and how hard each
link should compress (:func:`topk_per_edge`). :class:`ShiftedExponential` says what
stragglers cost; :func:`calibrate` fits links to measurements.

Everything here is a prediction from constants. Those of the presets are stated, not
measured, and each network says where its own come from.
"""

from bagua_jax.network.base import GBIT, Link, Network
from bagua_jax.network.calibration import LinkFit, calibrate
from bagua_jax.network.collectives import (
    Cost,
    all_gather,
    all_reduce,
    all_to_all,
    broadcast,
    gossip,
    hierarchical_all_reduce,
    permute,
    reduce_scatter,
)
from bagua_jax.network.placement import Placement, embed
from bagua_jax.network.presets import PRESETS, preset
from bagua_jax.network.ratios import topk_per_edge
from bagua_jax.network.stragglers import ShiftedExponential
from bagua_jax.network.timing import (
    CollectiveTime,
    CommunicationTime,
    communication_time,
    step_time,
)

__all__ = [
    "GBIT",
    "PRESETS",
    "CollectiveTime",
    "CommunicationTime",
    "Cost",
    "Link",
    "LinkFit",
    "Network",
    "Placement",
    "ShiftedExponential",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "broadcast",
    "calibrate",
    "communication_time",
    "embed",
    "gossip",
    "hierarchical_all_reduce",
    "permute",
    "preset",
    "reduce_scatter",
    "step_time",
    "topk_per_edge",
]
