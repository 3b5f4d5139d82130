"""The algorithms: one idea, one file; each an optax transform written in primitives.

``REGISTRY`` is all that is known of them: lists, docs, tests, what-if and configs read
it. A new algorithm is its file, its import and entry here, and its oracle.
"""

import math
from collections.abc import Mapping
from typing import Any

from bagua_jax import compressors, traffic
from bagua_jax.algorithms.adasum import adasum as adasum
from bagua_jax.algorithms.async_model_average import (
    async_model_average as async_model_average,
)
from bagua_jax.algorithms.bytegrad import bytegrad as bytegrad
from bagua_jax.algorithms.choco_sgd import choco_sgd as choco_sgd
from bagua_jax.algorithms.cocktail_sgd import cocktail_sgd as cocktail_sgd
from bagua_jax.algorithms.compressed_mean import compressed_mean as compressed_mean
from bagua_jax.algorithms.d2 import d2 as d2
from bagua_jax.algorithms.decentralized import decentralized as decentralized
from bagua_jax.algorithms.deep_squeeze import deep_squeeze as deep_squeeze
from bagua_jax.algorithms.delayed_choco import delayed_choco as delayed_choco
from bagua_jax.algorithms.delayed_gradients import (
    delayed_gradients as delayed_gradients,
)
from bagua_jax.algorithms.demo import demo as demo
from bagua_jax.algorithms.dgc import dgc as dgc
from bagua_jax.algorithms.diana import diana as diana
from bagua_jax.algorithms.diloco import diloco as diloco
from bagua_jax.algorithms.ecd_psgd import ecd_psgd as ecd_psgd
from bagua_jax.algorithms.ef21 import ef21 as ef21
from bagua_jax.algorithms.exact_diffusion import exact_diffusion as exact_diffusion
from bagua_jax.algorithms.gradient_allreduce import (
    gradient_allreduce as gradient_allreduce,
)
from bagua_jax.algorithms.gradient_tracking import (
    gradient_tracking as gradient_tracking,
)
from bagua_jax.algorithms.hierarchical_averaging import (
    hierarchical_averaging as hierarchical_averaging,
)
from bagua_jax.algorithms.local_sgd import local_sgd as local_sgd
from bagua_jax.algorithms.low_precision_decentralized import (
    low_precision_decentralized as low_precision_decentralized,
)
from bagua_jax.algorithms.marina import marina as marina
from bagua_jax.algorithms.moniqua import moniqua as moniqua
from bagua_jax.algorithms.one_bit_adam import one_bit_adam as one_bit_adam
from bagua_jax.algorithms.one_bit_lamb import one_bit_lamb as one_bit_lamb
from bagua_jax.algorithms.overlapped_push import overlapped_push as overlapped_push
from bagua_jax.algorithms.powersgd import powersgd as powersgd
from bagua_jax.algorithms.qadam import qadam as qadam
from bagua_jax.algorithms.quantized_gossip import quantized_gossip as quantized_gossip
from bagua_jax.algorithms.quasi_global_momentum import (
    quasi_global_momentum as quasi_global_momentum,
)
from bagua_jax.algorithms.relay_sgd import relay_sgd as relay_sgd
from bagua_jax.algorithms.signum import signum as signum
from bagua_jax.algorithms.slowmo import slowmo as slowmo
from bagua_jax.algorithms.stochastic_gradient_push import (
    stochastic_gradient_push as stochastic_gradient_push,
)
from bagua_jax.algorithms.streaming_diloco import streaming_diloco as streaming_diloco
from bagua_jax.algorithms.zero_one_adam import zero_one_adam as zero_one_adam
from bagua_jax.entries import Contract as Contract
from bagua_jax.entries import Entry as Entry
from bagua_jax.entries import Example as Example
from bagua_jax.entries import Late as Late

_CODES = compressors.minmax_uint8()
_ROUNDED = compressors.blockwise(bits=8, rounding="stochastic")
_TOP = compressors.topk(0.25)
_NO_CODEC = {"compressor": compressors.identity()}

_GOSSIP = "mean of x moves by the mean update"
_ERRORS = "sent + errors = gradients, summed over time"
_REPLICAS = "replicas equal bit for bit"


def _mixes_what_was(options: Mapping[str, Any]) -> Late | None:
    """Combining before the step mixes weights that are there since the last one."""
    before = options["combine"] == "before"
    return Late(options["local_steps"], 1) if before else None


def _only_between_nodes(options: Mapping[str, Any]) -> Late | None:
    """What neighbours send is late; the average inside the node is not."""
    return Late(1, options["staleness"], inside=False) if options["staleness"] else None


REGISTRY: dict[str, Entry] = {
    "gradient_allreduce": Entry(
        gradient_allreduce,
        "gradient",
        invariant="the mean gradient",
        oracle="algorithms.gradient_allreduce",
        examples=(
            Example({}, peers="Bagua, DDP, Horovod, BytePS, DeepSpeed, BlueFog"),
        ),
        contracts=(Contract({}, floor=1e-4),),
    ),
    "bytegrad": Entry(
        bytegrad,
        "gradient",
        invariant=_REPLICAS,
        oracle="algorithms.bytegrad",
        examples=(
            Example(
                {},
                peers="Bagua, DDP, DeepSpeed, GRACE, hivemind, OpenDiLoCo, "
                "CocktailSGD, CGX, EQuARX",
            ),
            Example(
                {"error_feedback": "both"},
                peers="DeepSpeed, BytePS, CocktailSGD (all with other codes)",
                invariant=_ERRORS,
            ),
        ),
        contracts=(
            Contract({}, floor=0.1, sends=traffic.scatter_reduce(_CODES), plain=None),
            Contract(
                {"error_feedback": "both"},
                floor=0.1,
                sends=traffic.scatter_reduce(_CODES),
                plain=None,
            ),
        ),
    ),
    "compressed_mean": Entry(
        compressed_mean,
        "gradient",
        invariant=_REPLICAS,
        oracle="gradient_side.compressed_mean",
        examples=(
            Example(
                {"compressor": "cast(bfloat16)"},
                known_as="bfloat16 on the wire",
                peers="DDP, Horovod, BytePS, DeepSpeed, GRACE, hivemind, OpenDiLoCo, "
                "EQuARX (MaxText, CGX)",
            ),
            Example(
                {"compressor": "qsgd(levels=7, bucket=512)"},
                known_as="QSGD, 4 bits",
                peers="BytePS, GRACE, epfml, CGX, FedJAX, fl_pytorch",
                invariant="unbiased",
            ),
            Example(
                {"compressor": "terngrad(clip=2.5)"},
                known_as="TernGrad",
                peers="GRACE, FedJAX, fl_pytorch",
            ),
            Example(
                {"compressor": "sign(l1)", "error_feedback": "both"},
                known_as="DoubleSqueeze, EF-signSGD",
                peers="BytePS, DeepSpeed, GRACE, epfml (DeMo)",
                invariant=_ERRORS,
            ),
            Example(
                {"compressor": "topk(0.01)", "plan": "all_gather"},
                known_as="MEM-SGD, EF-SGD",
                peers="BytePS, GRACE, epfml, CocktailSGD, fl_pytorch (DeMo)",
                invariant=_ERRORS,
            ),
            Example(
                {"compressor": "randk(0.01)"},
                known_as="random-k, shared mask",
                peers="BytePS, GRACE, CocktailSGD, fl_pytorch (epfml)",
                invariant="unbiased",
            ),
        ),
        contracts=(
            Contract(
                {"compressor": _TOP, "plan": "all_gather", "bucket_bytes": 4},
                floor=0.1,
                sends=traffic.gather(_TOP),
                plain=_NO_CODEC,
            ),
            Contract(
                {"compressor": compressors.sign("l1")},
                floor=0.2,
                sends=traffic.scatter_reduce(compressors.sign("l1")),
                plain=_NO_CODEC,
            ),
            Contract(
                {"compressor": _CODES, "plan": "ring"},
                floor=0.1,
                sends=traffic.ring(_CODES),
                plain=_NO_CODEC,
            ),
        ),
    ),
    "diana": Entry(
        diana,
        "gradient",
        invariant="h = mean of h_i",
        oracle="gradient_side.diana",
        examples=(
            Example({"compressor": "qsgd(levels=7, bucket=512)"}, peers="fl_pytorch"),
        ),
        contracts=(
            Contract(
                {"compressor": compressors.qsgd(8)},
                floor=0.1,
                sends=traffic.gather(compressors.qsgd(8)),
                plain=_NO_CODEC,
            ),
        ),
    ),
    "marina": Entry(
        marina,
        "gradient",
        invariant="g = the mean gradient after each dense step",
        oracle="estimators.marina",
        examples=(
            Example(
                {"compressor": "randk(0.01, mask=private)", "probability": 0.01},
                peers="fl_pytorch",
            ),
        ),
        contracts=(
            Contract(
                {"compressor": compressors.qsgd(8), "probability": 0.25},
                floor=0.1,
                sends=traffic.together(
                    traffic.allreduce(1 / 4), traffic.gather(compressors.qsgd(8), 3 / 4)
                ),
                plain=_NO_CODEC,
            ),
        ),
    ),
    "ef21": Entry(
        ef21,
        "gradient",
        invariant="g = mean of g_i",
        oracle="gradient_side.ef21",
        examples=(Example({"compressor": "topk(0.01)"}, peers="fl_pytorch"),),
        contracts=(
            Contract(
                {"compressor": _TOP, "bucket_bytes": 4},
                floor=0.05,
                sends=traffic.gather(_TOP),
                plain=_NO_CODEC,
            ),
        ),
    ),
    "dgc": Entry(
        dgc,
        "gradient",
        invariant="sent + v = momentum, summed over time",
        oracle="gradient_side.dgc",
        examples=(Example({"ratio": 0.001}, peers="GRACE, epfml (BytePS)"),),
        contracts=(
            Contract(
                {"momentum": 0.5, "ratio": 0.25, "bucket_bytes": 4},
                floor=0.2,
                sends=traffic.gather(_TOP),
                plain={"ratio": 1.0},
            ),
        ),
    ),
    "powersgd": Entry(
        powersgd,
        "gradient",
        invariant=_ERRORS,
        oracle="gradient_side.powersgd",
        examples=(Example({"rank": 2}, peers="DDP, GRACE, hivemind, epfml"),),
        contracts=(
            Contract(
                {"rank": 1, "min_compression": 1.0},
                floor=0.05,
                # P with the exact leaves, then Q: rank 1 of a 301 x 7 matrix.
                sends=lambda n, sizes: (2 * (n - 1) / n * 4 * (301 + 14 + 7), 2),
                plain={"rank": 5},
            ),
        ),
    ),
    "delayed_gradients": Entry(
        delayed_gradients,
        "gradient",
        invariant="the mean gradient of tau steps ago",
        oracle="gradient_side.delayed_gradients",
        examples=(
            Example(
                {"staleness": 1}, peers="(hivemind, SGP, torchft, CocktailSGD, MaxText)"
            ),
        ),
        contracts=(Contract({"staleness": 2}, floor=1e-3, plain={"staleness": 0}),),
    ),
    "adasum": Entry(
        adasum,
        "gradient",
        invariant=_REPLICAS,
        oracle="estimators.adasum",
        examples=(Example({}, peers="Horovod"),),
        contracts=(
            Contract(
                {},
                floor=1e-3,
                # An n-th of every leaf both ways; per level three products of
                # pairs and leaves.
                sends=lambda n, sizes: (
                    2 * (n - 1) * 4 * (sum(math.ceil(d / n) for d in (301 * 7, 13, 1)))
                    + 2 * (n - 1) / n * 4 * 3 * 3 * (n - 1),
                    2 + math.log2(n),
                ),
            ),
        ),
    ),
    "qadam": Entry(
        qadam,
        "optimizer",
        invariant=_REPLICAS,
        oracle="algorithms.qadam",
        examples=(Example({"learning_rate": 1e-3}, peers="Bagua"),),
        contracts=(
            Contract(
                {"learning_rate": 0.05, "warmup_steps": 20},
                floor=0.2,
                sends=traffic.scatter_reduce(_CODES),
                plain=_NO_CODEC,
            ),
            Contract(
                {
                    "learning_rate": 0.05,
                    "warmup_steps": 20,
                    "weight_decay": 1e-4,
                    "error_feedback": "both",
                },
                floor=0.2,
                sends=traffic.scatter_reduce(_CODES),
                plain=_NO_CODEC,
            ),
        ),
    ),
    "signum": Entry(
        signum,
        "optimizer",
        invariant="vote = sign of the sum of signs",
        oracle="gradient_side.signum",
        examples=(Example({"learning_rate": 1e-4}, peers="GRACE (DeMo)"),),
        contracts=(
            Contract(
                {"learning_rate": 0.015, "weight_decay": 1e-4},
                floor=0.3,
                # Eight signs a byte, and a byte that says that they are finite.
                sends=lambda n, sizes: (
                    2 * (n - 1) * (-(-math.ceil(sum(sizes) / n) // 8) + 1),
                    2,
                ),
                plain=None,
            ),
        ),
    ),
    "one_bit_adam": Entry(
        one_bit_adam,
        "optimizer",
        invariant=_REPLICAS,
        oracle="gradient_side.one_bit_adam",
        examples=(Example({"learning_rate": 1e-3}, peers="DeepSpeed (Bagua)"),),
        contracts=(
            Contract(
                {"learning_rate": 0.05, "warmup_steps": 20, "b2": 0.9},
                floor=0.3,
                sends=traffic.scatter_reduce(compressors.sign("l2")),
                plain=None,
            ),
        ),
    ),
    "zero_one_adam": Entry(
        zero_one_adam,
        "local optimizer",
        family="local steps",
        invariant="replicas equal bit for bit after each exchange",
        oracle="optimizers.zero_one_adam",
        examples=(
            Example({"learning_rate": 1e-3}, known_as="0/1 Adam", peers="DeepSpeed"),
        ),
        contracts=(
            Contract(
                {
                    "learning_rate": 0.05,
                    "var_freeze_step": 20,
                    "local_step_scaler": 10,
                    "local_step_clipper": 4,
                    "b2": 0.9,
                },
                floor=0.2,
                sends=traffic.scatter_reduce(compressors.sign("l2"), share=1 / 4),
                plain=None,
            ),
        ),
    ),
    "one_bit_lamb": Entry(
        one_bit_lamb,
        "optimizer",
        invariant=_REPLICAS,
        oracle="optimizers.one_bit_lamb",
        examples=(Example({"learning_rate": 1e-3}, peers="DeepSpeed"),),
        contracts=(
            Contract(
                {"learning_rate": 0.05, "warmup_steps": 20, "b2": 0.9},
                floor=0.2,
                sends=traffic.scatter_reduce(compressors.sign("l2")),
                plain=None,
            ),
        ),
    ),
    "demo": Entry(
        demo,
        "optimizer",
        invariant=_REPLICAS,
        oracle="optimizers.demo",
        examples=(Example({"learning_rate": 1e-3}, peers="DeMo"),),
        contracts=(
            Contract(
                {"learning_rate": 0.015, "topk": 2},
                floor=0.1,
                # Seven blocks of 43 x 7, one of 13, and a number: indices of 2, 1
                # and 1 bytes.
                sends=lambda n, sizes: ((n - 1) * (7 * 2 * 6 + 2 * 5 + 5), 1),
                plain=None,
            ),
        ),
    ),
    "gradient_tracking": Entry(
        gradient_tracking,
        "local optimizer",
        family="gossip",
        invariant="mean of y = mean gradient",
        oracle="optimizers.gradient_tracking",
        examples=(
            Example(
                {"learning_rate": 0.1}, known_as="DIGing, DSGT", peers="BlueFog, epfml"
            ),
        ),
        contracts=(
            Contract(
                {"learning_rate": 0.1},
                floor=1e-4,
                # Models and estimates in one message.
                sends=lambda n, sizes: traffic.gossip()(n, (2 * sum(sizes),)),
                plain=None,
            ),
        ),
    ),
    "decentralized": Entry(
        decentralized,
        "weight",
        family="gossip",
        invariant=_GOSSIP,
        oracle="algorithms.decentralized",
        examples=(
            Example(
                {"topology": "ring"},
                known_as="D-PSGD",
                peers="Bagua, BlueFog, epfml, SGP (hivemind)",
            ),
            Example(
                {"topology": "one_peer_exponential"},
                known_as="D-PSGD, one peer",
                peers="BlueFog, epfml, SGP (Bagua)",
            ),
            Example(
                {"topology": "random_matching"},
                known_as="AD-PSGD's pairs",
                peers="SGP (epfml)",
            ),
        ),
        contracts=(
            Contract({}, floor=2.0, sends=traffic.gossip()),
            Contract({"combine": "after"}, floor=2.0, sends=traffic.gossip()),
            Contract({"topology": "complete"}, floor=0.6),
            Contract(
                {"topology": "shift_one", "local_steps": 2},
                floor=2.0,
                sends=traffic.gossip("shift_one", share=1 / 2),
            ),
            Contract(
                {"topology": "one_peer_exponential"},
                floor=2.0,
                sends=traffic.gossip("one_peer_exponential"),
            ),
            Contract(
                {"topology": "static_exponential"},
                floor=2.0,
                sends=traffic.gossip("static_exponential"),
            ),
        ),
        late=_mixes_what_was,
    ),
    "low_precision_decentralized": Entry(
        low_precision_decentralized,
        "weight",
        family="gossip",
        invariant="replicas of neighbours equal theirs bit for bit",
        oracle="algorithms.low_precision_decentralized",
        examples=(Example({}, known_as="DCD-PSGD", peers="epfml (Bagua)"),),
        contracts=(
            Contract(
                {}, floor=2.0, sends=traffic.gossip("ring", _CODES), plain=_NO_CODEC
            ),
            Contract(
                {"local_steps": 2},
                floor=2.0,
                sends=traffic.gossip("ring", _CODES, share=1 / 2),
                plain=_NO_CODEC,
            ),
        ),
    ),
    "ecd_psgd": Entry(
        ecd_psgd,
        "weight",
        family="gossip",
        invariant="estimates unbiased, their variance as derived",
        oracle="gossip.ecd_psgd",
        examples=(
            Example({"compressor": "qsgd(levels=127, bucket=512)"}, peers="epfml"),
        ),
        contracts=(
            Contract(
                {"compressor": _ROUNDED},
                floor=2.0,
                sends=traffic.gossip("ring", _ROUNDED),
                plain=_NO_CODEC,
            ),
        ),
    ),
    "moniqua": Entry(
        moniqua,
        "weight",
        family="gossip",
        invariant=_GOSSIP + ", to a step of the grid",
        oracle="gossip.moniqua",
        examples=(Example({"theta": 1.0}, peers="none"),),
        contracts=(
            Contract(
                {"theta": 4.0},
                floor=2.0,
                # A byte an element, and one that says that they are finite.
                sends=lambda n, sizes: (2 * (sum(sizes) + len(sizes)), 2 * len(sizes)),
            ),
        ),
    ),
    "quantized_gossip": Entry(
        quantized_gossip,
        "weight",
        family="gossip",
        invariant="floor and walk of the mean as derived",
        oracle="quantized_gossip.quantized_gossip",
        examples=(
            Example(
                {"compressor": "minmax_uint8"},
                known_as="naive quantized gossip",
                peers="none (the cautionary baseline)",
            ),
        ),
        contracts=(
            Contract(
                {"compressor": _CODES},
                floor=2.0,
                sends=traffic.gossip("ring", _CODES),
                plain=_NO_CODEC,
            ),
        ),
    ),
    "async_model_average": Entry(
        async_model_average,
        "weight",
        family="local steps",
        invariant=_GOSSIP,
        oracle="algorithms.async_model_average",
        examples=(
            Example(
                {"local_steps": 8, "staleness": 4},
                peers="(Bagua, BytePS, BlueFog, hivemind, SGP: in real time)",
            ),
        ),
        contracts=(
            Contract(
                {"local_steps": 4, "staleness": 2, "warmup_steps": 3},
                floor=2.0,
                sends=traffic.allreduce(1 / 4),
            ),
            Contract({"local_steps": 2}, floor=2.0, sends=traffic.allreduce(1 / 2)),
        ),
        late=lambda o: (
            Late(o["local_steps"], o["staleness"]) if o["staleness"] else None
        ),
    ),
    "local_sgd": Entry(
        local_sgd,
        "weight",
        family="local steps",
        invariant=_GOSSIP,
        oracle="weight_side.local_sgd",
        examples=(
            Example(
                {"local_steps": 8},
                peers="DDP, BlueFog, hivemind, epfml, OpenDiLoCo, torchft, MaxText, "
                "FedJAX, fl_pytorch (Bagua, DeepSpeed, DrJAX)",
            ),
        ),
        contracts=(
            Contract(
                {"local_steps": 4, "warmup_steps": 3},
                floor=2.0,
                sends=traffic.allreduce(1 / 4),
            ),
        ),
    ),
    "hierarchical_averaging": Entry(
        hierarchical_averaging,
        "weight",
        family="local steps",
        invariant=_GOSSIP,
        oracle="gossip.hierarchical_averaging",
        examples=(
            Example(
                {"periods": {4: 4, 16: None}},
                known_as="multi-period averaging",
                peers="DDP",
            ),
        ),
        contracts=(
            Contract(
                {"periods": {2: 2, 4: None}},
                floor=2.0,
                # Everybody after every fourth step, pairs in two halves after every
                # other.
                sends=lambda n, sizes: (
                    (
                        2 * (n - 1) / n * sum(sizes)
                        + sum(2 * math.ceil(d / 2) for d in sizes)
                    ),
                    (1 + 2 * len(sizes)) / 4,
                ),
                plain={"periods": {4: None}},
            ),
        ),
    ),
    "slowmo": Entry(
        slowmo,
        "weight",
        family="local steps",
        invariant="replicas equal after each exchange",
        oracle="weight_side.slowmo",
        examples=(
            Example(
                {"local_steps": 12, "learning_rate": 0.1}, peers="(FedJAX, torchft)"
            ),
        ),
        contracts=(
            Contract(
                {"local_steps": 3, "learning_rate": 0.1},
                floor=2.0,
                sends=traffic.allreduce(1 / 3),
                plain={"outer_momentum": 0.0, "outer_learning_rate": 1.0},
            ),
        ),
    ),
    "diloco": Entry(
        diloco,
        "weight",
        family="local steps",
        invariant="replicas equal after each exchange",
        oracle="weight_side.diloco",
        examples=(
            Example(
                {"local_steps": 100},
                peers="OpenDiLoCo, torchft, MaxText, FedJAX (DrJAX, fl_pytorch)",
            ),
            Example(
                {"local_steps": 100, "compressor": "blockwise(4)"},
                peers="OpenDiLoCo, torchft",
            ),
        ),
        contracts=(
            Contract(
                {"local_steps": 3},
                floor=2.0,
                sends=traffic.allreduce(1 / 3),
                plain={"outer_momentum": 0.0, "outer_learning_rate": 1.0},
            ),
            Contract(
                {"local_steps": 2, "compressor": _CODES},
                floor=2.0,
                sends=traffic.scatter_reduce(_CODES, share=1 / 2),
                plain={
                    "outer_momentum": 0.0,
                    "outer_learning_rate": 1.0,
                    "compressor": None,
                },
            ),
        ),
    ),
    "streaming_diloco": Entry(
        streaming_diloco,
        "weight",
        family="local steps",
        invariant="sent + errors = moves, summed over time",
        oracle="gossip.streaming_diloco",
        examples=(
            Example(
                {"local_steps": 100, "fragments": 4, "compressor": "blockwise(4)"},
                peers="torchft, MaxText (with other codes)",
            ),
        ),
        contracts=(
            Contract(
                {"local_steps": 4, "fragments": 2},
                floor=2.0,
                # Two fragments, each after every fourth step.
                sends=lambda n, sizes: (2 * (n - 1) / n * sum(sizes), 2 / 4),
                plain={
                    "outer_momentum": 0.0,
                    "outer_learning_rate": 1.0,
                    "staleness": 0,
                },
            ),
        ),
        late=lambda o: (
            Late(o["local_steps"] / o["fragments"], o["staleness"])
            if o["staleness"]
            else None
        ),
    ),
    "cocktail_sgd": Entry(
        cocktail_sgd,
        "weight",
        invariant="sent + errors = moves, summed over time",
        oracle="estimators.cocktail_sgd",
        examples=(
            Example(
                {
                    "compressor": "chain(topk(0.1), blockwise(4, 128))",
                    "ratio": 0.1,
                },
                peers="CocktailSGD",
            ),
        ),
        contracts=(
            Contract(
                {"ratio": 0.5, "staleness": 1},
                floor=0.3,
                # The default compressor on half of the places of each owner's part.
                sends=lambda n, sizes: traffic.scatter_reduce(
                    compressors.chain(
                        compressors.topk(0.5), compressors.blockwise(8, 128)
                    )
                )(n, tuple(n * math.ceil(math.ceil(d / n) / 2) for d in sizes)),
                plain={**_NO_CODEC, "ratio": 1.0, "staleness": 0},
            ),
        ),
    ),
    "choco_sgd": Entry(
        choco_sgd,
        "weight",
        family="gossip",
        invariant=_GOSSIP,
        oracle="weight_side.choco_sgd",
        examples=(
            Example(
                {"compressor": "sign(l1)", "consensus_step_size": 0.3}, peers="epfml"
            ),
        ),
        contracts=(
            Contract(
                {"compressor": _CODES, "consensus_step_size": 0.8},
                floor=2.0,
                sends=traffic.gossip("ring", _CODES),
                plain=_NO_CODEC,
            ),
        ),
    ),
    "delayed_choco": Entry(
        delayed_choco,
        "weight",
        family="gossip",
        invariant=_GOSSIP,
        oracle="weight_side.choco_sgd",
        examples=(
            Example(
                {"compressor": "sign(l1)", "consensus_step_size": 0.1}, peers="none"
            ),
        ),
        contracts=(
            Contract(
                {"compressor": _CODES, "consensus_step_size": 0.3},
                floor=2.0,
                sends=traffic.gossip("ring", _CODES),
                plain=_NO_CODEC,
            ),
        ),
        late=_only_between_nodes,
    ),
    "exact_diffusion": Entry(
        exact_diffusion,
        "weight",
        family="gossip",
        invariant=_GOSSIP,
        oracle="weight_side.exact_diffusion",
        examples=(Example({}, peers="BlueFog, epfml"),),
        contracts=(Contract({}, floor=0.01, sends=traffic.gossip()),),
    ),
    "d2": Entry(
        d2,
        "weight",
        family="gossip",
        invariant=_GOSSIP,
        oracle="weight_side.d2",
        examples=(
            Example({"topology": "ring(self_weight=0.5)"}, peers="BlueFog, epfml"),
        ),
        contracts=(Contract({"topology": "complete"}, floor=0.01),),
    ),
    "relay_sgd": Entry(
        relay_sgd,
        "weight",
        family="gossip",
        invariant="counts reach n - 1 after the tree's diameter",
        oracle="gossip.relay_sgd",
        examples=(Example({}, known_as="RelaySGD", peers="epfml"),),
        contracts=(
            Contract(
                {},
                floor=0.01,
                # Each of n - 1 edges both ways; three rounds, as some have three
                # neighbours.
                sends=lambda n, sizes: (
                    2 * (n - 1) / n * 4 * sum(sizes),
                    3 * len(sizes),
                ),
            ),
        ),
    ),
    "quasi_global_momentum": Entry(
        quasi_global_momentum,
        "weight",
        family="gossip",
        invariant="mean moves as one worker's",
        oracle="gossip.quasi_global_momentum",
        examples=(Example({"learning_rate": 0.1}, known_as="QG-DSGDm", peers="epfml"),),
        contracts=(
            Contract(
                {"learning_rate": 0.1, "momentum": 0.5, "smoothing": 0.5},
                floor=2.0,
                sends=traffic.gossip(),
                plain={"momentum": 0.0},
            ),
        ),
    ),
    "deep_squeeze": Entry(
        deep_squeeze,
        "weight",
        family="gossip",
        invariant=_GOSSIP,
        oracle="weight_side.deep_squeeze",
        examples=(
            Example(
                {"compressor": "minmax_uint8", "consensus_step_size": 0.8},
                peers="epfml",
            ),
        ),
        contracts=(
            Contract(
                {"compressor": _CODES, "consensus_step_size": 0.8},
                floor=2.0,
                sends=traffic.gossip("ring", _CODES),
                plain=_NO_CODEC,
            ),
        ),
    ),
    "stochastic_gradient_push": Entry(
        stochastic_gradient_push,
        "weight",
        family="gossip",
        invariant="mass sums to n",
        oracle="weight_side.stochastic_gradient_push",
        examples=(Example({}, known_as="SGP", peers="BlueFog, epfml, SGP"),),
        contracts=(
            Contract(
                {}, floor=2.0, sends=traffic.gossip("one_peer_exponential", extra=1)
            ),
        ),
    ),
    "overlapped_push": Entry(
        overlapped_push,
        "weight",
        family="gossip",
        invariant="mass, with that in flight, sums to n",
        oracle="gossip.overlapped_push",
        examples=(Example({"staleness": 1}, known_as="overlapped SGP", peers="SGP"),),
        contracts=(
            Contract(
                {"staleness": 2},
                floor=2.0,
                sends=traffic.gossip("one_peer_exponential", extra=1),
            ),
        ),
        late=_only_between_nodes,
    ),
}
"""Every algorithm by name."""
