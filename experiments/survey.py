"""Every algorithm on one model: what it sends, who else has it, what tests hold it to.

``python -m bagua_jax.experiments.survey`` compiles the step of each on a model with
ResNet-50's 25,557,032 parameters for eight workers, counts the collectives of the
compiled programs, and writes docs/algorithms.md and the numbers that ``bagua-jax list``
shows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from bagua_jax import Workers
    from bagua_jax.wire import WireCount

__all__ = [
    "SURVEY",
    "Row",
    "count",
    "label",
    "measure",
    "program",
    "read",
    "resnet50",
    "to_markdown",
]

WORKERS = 8


class Row(NamedTuple):
    """One configuration of an algorithm.

    Attributes:
        algorithm: its name in the registry.
        options: its arguments, as a config writes them.
        peers: which peers have it; in brackets, those that have a part of it.
        invariant: what stays true on every step, and is tested to rounding.
        oracle: the NumPy oracle in ``tests/oracles``, as module.function.
        known_as: what the literature calls this configuration, where its name is not
            the algorithm's.
    """

    algorithm: str
    options: Mapping[str, Any]
    peers: str
    invariant: str
    oracle: str
    known_as: str = ""


_GOSSIP = "mean of x moves by the mean update"
_ERRORS = "sent + errors = gradients, summed over time"

SURVEY = (
    Row(
        "gradient_allreduce",
        {},
        "Bagua, DDP, Horovod, BytePS, DeepSpeed, BlueFog",
        "the mean gradient",
        "algorithms.gradient_allreduce",
    ),
    Row(
        "bytegrad",
        {},
        "Bagua, DDP, DeepSpeed, GRACE, hivemind, OpenDiLoCo, CocktailSGD, CGX, EQuARX",
        "replicas equal bit for bit",
        "algorithms.bytegrad",
    ),
    Row(
        "bytegrad",
        {"error_feedback": "both"},
        "DeepSpeed, BytePS, CocktailSGD (all with other codes)",
        _ERRORS,
        "algorithms.bytegrad",
    ),
    Row(
        "compressed_mean",
        {"compressor": "cast(bfloat16)"},
        "DDP, Horovod, BytePS, DeepSpeed, GRACE, hivemind, OpenDiLoCo, EQuARX "
        "(MaxText, CGX)",
        "replicas equal bit for bit",
        "gradient_side.compressed_mean",
        "bfloat16 on the wire",
    ),
    Row(
        "compressed_mean",
        {"compressor": "qsgd(levels=7, bucket=512)"},
        "BytePS, GRACE, epfml, CGX, FedJAX, fl_pytorch",
        "unbiased",
        "gradient_side.compressed_mean",
        "QSGD, 4 bits",
    ),
    Row(
        "compressed_mean",
        {"compressor": "terngrad(clip=2.5)"},
        "GRACE, FedJAX, fl_pytorch",
        "replicas equal bit for bit",
        "gradient_side.compressed_mean",
        "TernGrad",
    ),
    Row(
        "compressed_mean",
        {"compressor": "sign(l1)", "error_feedback": "both"},
        "BytePS, DeepSpeed, GRACE, epfml (DeMo)",
        _ERRORS,
        "gradient_side.compressed_mean",
        "DoubleSqueeze, EF-signSGD",
    ),
    Row(
        "compressed_mean",
        {"compressor": "topk(0.01)", "plan": "all_gather"},
        "BytePS, GRACE, epfml, CocktailSGD, fl_pytorch (DeMo)",
        _ERRORS,
        "gradient_side.compressed_mean",
        "MEM-SGD, EF-SGD",
    ),
    Row(
        "compressed_mean",
        {"compressor": "randk(0.01)"},
        "BytePS, GRACE, CocktailSGD, fl_pytorch (epfml)",
        "unbiased",
        "gradient_side.compressed_mean",
        "random-k, shared mask",
    ),
    Row(
        "diana",
        {"compressor": "qsgd(levels=7, bucket=512)"},
        "fl_pytorch",
        "h = mean of h_i",
        "gradient_side.diana",
    ),
    Row(
        "marina",
        {"compressor": "randk(0.01, mask=private)", "probability": 0.01},
        "fl_pytorch",
        "g = the mean gradient after each dense step",
        "estimators.marina",
    ),
    Row(
        "ef21",
        {"compressor": "topk(0.01)"},
        "fl_pytorch",
        "g = mean of g_i",
        "gradient_side.ef21",
    ),
    Row(
        "dgc",
        {"density": 0.001},
        "GRACE, epfml (BytePS)",
        "sent + v = momentum, summed over time",
        "gradient_side.dgc",
    ),
    Row(
        "powersgd",
        {"rank": 2},
        "DDP, GRACE, hivemind, epfml",
        _ERRORS,
        "gradient_side.powersgd",
    ),
    Row(
        "delayed_gradients",
        {"staleness": 1},
        "(hivemind, SGP, torchft, CocktailSGD, MaxText)",
        "the mean gradient of tau steps ago",
        "gradient_side.delayed_gradients",
    ),
    Row(
        "adasum",
        {},
        "Horovod",
        "replicas equal bit for bit",
        "estimators.adasum",
    ),
    Row(
        "qadam",
        {"learning_rate": 1e-3},
        "Bagua",
        "replicas equal bit for bit",
        "algorithms.qadam",
    ),
    Row(
        "signum",
        {"learning_rate": 1e-4},
        "GRACE (DeMo)",
        "vote = sign of the sum of signs",
        "gradient_side.signum",
    ),
    Row(
        "one_bit_adam",
        {"learning_rate": 1e-3},
        "DeepSpeed (Bagua)",
        "replicas equal bit for bit",
        "gradient_side.one_bit_adam",
    ),
    Row(
        "zero_one_adam",
        {"learning_rate": 1e-3},
        "DeepSpeed",
        "replicas equal bit for bit after each exchange",
        "optimizers.zero_one_adam",
        "0/1 Adam",
    ),
    Row(
        "one_bit_lamb",
        {"learning_rate": 1e-3},
        "DeepSpeed",
        "replicas equal bit for bit",
        "optimizers.one_bit_lamb",
    ),
    Row(
        "demo",
        {"learning_rate": 1e-3},
        "DeMo",
        "replicas equal bit for bit",
        "optimizers.demo",
    ),
    Row(
        "gradient_tracking",
        {"learning_rate": 0.1},
        "BlueFog, epfml",
        "mean of y = mean gradient",
        "optimizers.gradient_tracking",
        "DIGing, DSGT",
    ),
    Row(
        "decentralized",
        {"topology": "ring"},
        "Bagua, BlueFog, epfml, SGP (hivemind)",
        _GOSSIP,
        "algorithms.decentralized",
        "D-PSGD",
    ),
    Row(
        "decentralized",
        {"topology": "one_peer_exponential"},
        "BlueFog, epfml, SGP (Bagua)",
        _GOSSIP,
        "algorithms.decentralized",
        "D-PSGD, one peer",
    ),
    Row(
        "decentralized",
        {"topology": "random_matching"},
        "SGP (epfml)",
        _GOSSIP,
        "algorithms.decentralized",
        "AD-PSGD's pairs",
    ),
    Row(
        "low_precision_decentralized",
        {},
        "epfml (Bagua)",
        "replicas of neighbours equal theirs bit for bit",
        "algorithms.low_precision_decentralized",
        "DCD-PSGD",
    ),
    Row(
        "ecd_psgd",
        {"compressor": "qsgd(levels=127, bucket=512)"},
        "epfml",
        "estimates unbiased, their variance as derived",
        "gossip.ecd_psgd",
    ),
    Row(
        "moniqua",
        {"theta": 1.0},
        "none",
        _GOSSIP + ", to a step of the grid",
        "gossip.moniqua",
    ),
    Row(
        "quantized_gossip",
        {"compressor": "minmax_uint8"},
        "none (the cautionary baseline)",
        "floor and walk of the mean as derived",
        "quantized_gossip.quantized_gossip",
        "naive quantized gossip",
    ),
    Row(
        "choco_sgd",
        {"compressor": "sign(l1)", "consensus_step_size": 0.3},
        "epfml",
        _GOSSIP,
        "weight_side.choco_sgd",
    ),
    Row(
        "delayed_choco",
        {"compressor": "sign(l1)", "consensus_step_size": 0.1},
        "none",
        _GOSSIP,
        "weight_side.choco_sgd",
    ),
    Row(
        "deep_squeeze",
        {"compressor": "minmax_uint8", "mixing_rate": 0.8},
        "epfml",
        _GOSSIP,
        "weight_side.deep_squeeze",
    ),
    Row(
        "exact_diffusion",
        {},
        "BlueFog, epfml",
        _GOSSIP,
        "weight_side.exact_diffusion",
    ),
    Row(
        "d2",
        {"topology": "ring(self_weight=0.5)"},
        "BlueFog, epfml",
        _GOSSIP,
        "weight_side.d2",
    ),
    Row(
        "stochastic_gradient_push",
        {},
        "BlueFog, epfml, SGP",
        "mass sums to n",
        "weight_side.stochastic_gradient_push",
        "SGP",
    ),
    Row(
        "overlapped_push",
        {"staleness": 1},
        "SGP",
        "mass, with that in flight, sums to n",
        "gossip.overlapped_push",
        "overlapped SGP",
    ),
    Row(
        "relay_sgd",
        {},
        "epfml",
        "counts reach n - 1 after the tree's diameter",
        "gossip.relay_sgd",
        "RelaySGD",
    ),
    Row(
        "quasi_global_momentum",
        {"learning_rate": 0.1},
        "epfml",
        "mean moves as one worker's",
        "gossip.quasi_global_momentum",
        "QG-DSGDm",
    ),
    Row(
        "async_model_average",
        {"period": 8, "staleness": 4},
        "(Bagua, BytePS, BlueFog, hivemind, SGP: in real time)",
        _GOSSIP,
        "algorithms.async_model_average",
    ),
    Row(
        "local_sgd",
        {"local_steps": 8},
        "DDP, BlueFog, hivemind, epfml, OpenDiLoCo, torchft, MaxText, FedJAX, "
        "fl_pytorch (Bagua, DeepSpeed, DrJAX)",
        _GOSSIP,
        "weight_side.local_sgd",
    ),
    Row(
        "hierarchical_averaging",
        {"periods": {4: 4, 16: None}},
        "DDP",
        _GOSSIP,
        "gossip.hierarchical_averaging",
        "multi-period averaging",
    ),
    Row(
        "slowmo",
        {"local_steps": 12, "learning_rate": 0.1},
        "(FedJAX, torchft)",
        "replicas equal after each exchange",
        "weight_side.slowmo",
    ),
    Row(
        "diloco",
        {"local_steps": 100},
        "OpenDiLoCo, torchft, MaxText, FedJAX (DrJAX, fl_pytorch)",
        "replicas equal after each exchange",
        "weight_side.diloco",
    ),
    Row(
        "diloco",
        {"local_steps": 100, "compressor": "blockwise(4)"},
        "OpenDiLoCo, torchft",
        "replicas equal after each exchange",
        "weight_side.diloco",
    ),
    Row(
        "streaming_diloco",
        {"local_steps": 100, "fragments": 4, "compressor": "blockwise(4)"},
        "torchft, MaxText (with other codes)",
        "sent + errors = moves, summed over time",
        "gossip.streaming_diloco",
    ),
    Row(
        "cocktail_sgd",
        {"compressor": "chain(topk(0.1), blockwise(4, 128))", "mask_ratio": 0.1},
        "CocktailSGD",
        "sent + errors = moves, summed over time",
        "estimators.cocktail_sgd",
    ),
)
"""What the table shows; a test fails where a registered algorithm has no row."""


def label(row: Row) -> str:
    """Write a configuration in one line.

    >>> label(SURVEY[2])
    'bytegrad(error_feedback=both)'
    """
    options = ", ".join(f"{name}={value}" for name, value in row.options.items())
    return f"{row.algorithm}({options})" if options else row.algorithm


# --- the model ------------------------------------------------------------------------


def resnet50() -> dict[str, tuple[int, ...]]:
    """Give the shapes of ResNet-50's 161 parameters, by name.

    >>> import math
    >>> len(resnet50()), sum(map(math.prod, resnet50().values()))
    (161, 25557032)
    """

    def convolution(name: str, size: int, inputs: int, outputs: int):
        yield f"{name}.kernel", (size, size, inputs, outputs)
        yield f"{name}.scale", (outputs,)
        yield f"{name}.bias", (outputs,)

    def layers() -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from convolution("stem", 7, 3, 64)
        inputs = 64
        for stage, blocks in enumerate((3, 4, 6, 3)):
            width = 64 * 2**stage
            for block in range(blocks):
                name = f"stage{stage}.block{block}"
                yield from convolution(f"{name}.reduce", 1, inputs, width)
                yield from convolution(f"{name}.middle", 3, width, width)
                yield from convolution(f"{name}.expand", 1, width, 4 * width)
                if block == 0:
                    yield from convolution(f"{name}.skip", 1, inputs, 4 * width)
                inputs = 4 * width
        yield "head.kernel", (inputs, 1000)
        yield "head.bias", (1000,)

    return dict(layers())


# --- counting -------------------------------------------------------------------------


def measure(
    row: Row,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    workers: int = WORKERS,
) -> dict[str, float]:
    """Compile one step of a configuration, without running it, and count its wire.

    Args:
        row: the configuration.
        shapes: of the float32 parameters, by name; ResNet-50's where ``None``.
        workers: how many; as many host devices must be there.

    Returns:
        ``bytes_per_worker`` and ``messages_per_worker`` of a step in the long run, and
        ``parameters``, their number.
    """
    import math

    import jax
    import jax.numpy as jnp

    from bagua_jax import Workers

    shapes = resnet50() if shapes is None else shapes
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()
    }
    place = Workers.devices(workers, devices=jax.devices("cpu"))
    counted = count(row.algorithm, row.options, params, place)
    return {
        "bytes_per_worker": counted.bytes_per_worker,
        "messages_per_worker": counted.messages_per_worker,
        "parameters": sum(map(math.prod, shapes.values())),
    }


def count(
    algorithm: str, options: Mapping[str, Any], params: Any, place: Workers
) -> WireCount:
    """Compile one step of an algorithm, without running it, and count its wire.

    Args:
        algorithm: its name in the registry.
        options: its arguments, as a config writes them.
        params: tree of ``jax.ShapeDtypeStruct``.
        place: the workers; of a hierarchy, the algorithm relaxes between the nodes.

    Returns:
        What a step sends in the long run.

    Raises:
        ConfigError: if the factory refuses a value.
        ValueError: if the algorithm refuses a hierarchy.
    """
    from bagua_jax import wire

    step, args, specs = program(algorithm, options, params, place)
    return wire.count(place.spmd(step, in_specs=specs).lower(*args).compile())


def program(
    algorithm: str, options: Mapping[str, Any], params: Any, place: Workers
) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...]]:
    """Give one step of an algorithm, to compile anywhere; see :func:`count`.

    Returns:
        A per-worker function of (parameters, state) and gradients, the shapes of its
        arguments at the boundary, and their specs.
    """
    import jax
    import jax.numpy as jnp
    import optax

    from bagua_jax import worker_local
    from bagua_jax.algorithms import REGISTRY
    from bagua_jax.experiments import catalog
    from bagua_jax.experiments.config import AlgorithmConfig, ExperimentConfig

    chosen = AlgorithmConfig(algorithm, arguments=dict(options))
    (config,) = catalog.resolve(
        ExperimentConfig("survey", "quadratic", (chosen,), workers=place.shape[0])
    )
    axis = place.axis_name
    tx = catalog.transform(config, axis)

    def init():
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
        if REGISTRY[algorithm].own_params:
            zeros = worker_local(zeros, axis)
        return zeros, tx.init(zeros)

    def step(state, grads):
        params, opt_state = state
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    state = jax.eval_shape(place.spmd(init))
    grads = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((place.num_workers, *x.shape), x.dtype), params
    )
    return step, (state, grads), (place.specs(init), place.spec)


def read() -> dict[str, dict[str, float]]:
    """Read the numbers of the last survey, by configuration."""
    path = resources.files("bagua_jax.experiments") / "survey.json"
    return json.loads(path.read_text())


# --- the page -------------------------------------------------------------------------

_PAGE = """\
# Every algorithm: what it sends, who else has it, what tests hold it to

*Written by `python -m bagua_jax.experiments.survey`; do not edit it.*

Bytes and messages are what one of {workers} workers sends on a step in the long run
(after any warm-up, averaged over a schedule's period), counted from the compiled
program of a model with the shapes of ResNet-50: {parameters:,} float32 parameters in
161 leaves. The exact mean sends 8d(n-1)/n = {dense:.1f} MB. Every configuration is one
line of a config file. Peers in brackets have a part of it; the list was made from their
sources and documentation, and omissions are ours to mend.

| algorithm | known as | stands | MB sent | of the exact mean | messages | invariant, tested to rounding | oracle in tests/oracles | peers that have it |
|---|---|---|---:|---:|---:|---|---|---|
{rows}
"""  # noqa: E501


def to_markdown(numbers: Mapping[str, Mapping[str, float]]) -> str:
    """Write the page.

    Args:
        numbers: as :func:`measure` gives them, by :func:`label`.
    """
    from bagua_jax.algorithms import REGISTRY

    dense = numbers["gradient_allreduce"]
    lines = []
    for row in SURVEY:
        counted = numbers[label(row)]
        share = counted["bytes_per_worker"] / dense["bytes_per_worker"]
        cells = (
            f"`{label(row)}`",
            row.known_as,
            REGISTRY[row.algorithm].placement,
            f"{counted['bytes_per_worker'] / 1e6:.3g}",
            f"{share:.2%}",
            f"{counted['messages_per_worker']:.3g}",
            row.invariant,
            f"`{row.oracle}`",
            row.peers,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return _PAGE.format(
        workers=WORKERS,
        parameters=dense["parameters"],
        dense=dense["bytes_per_worker"] / 1e6,
        rows="\n".join(lines),
    )


def main() -> int:
    """Count every configuration, and write the page and the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, default=Path("docs/algorithms.md"))
    parser.add_argument("--numbers", type=Path, default=Path("experiments/survey.json"))
    parser.add_argument(
        "algorithms", nargs="*", help="count only these again; all where none is named"
    )
    arguments = parser.parse_args()
    again = set(arguments.algorithms) or {row.algorithm for row in SURVEY}

    import jax
    from rich.console import Console
    from rich.progress import track

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", WORKERS)
    numbers = {}
    for row in track(SURVEY, "compiling", console=Console(stderr=True)):
        name = label(row)
        numbers[name] = measure(row) if row.algorithm in again else read()[name]
    for path, text in (
        (arguments.numbers, json.dumps(numbers, indent=1) + "\n"),
        (arguments.page, to_markdown(numbers)),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
