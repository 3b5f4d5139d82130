"""Every algorithm on one model: what it sends, who else has it, what tests hold it to.

``python -m bagua_jax.experiments.tables.survey`` compiles the step of each on a model
with ResNet-50's 25,557,032 parameters for eight workers, counts the collectives of the
compiled programs, and writes docs/algorithms.md, README's table of families, and the
numbers that ``bagua-jax list`` shows. What was counted before is kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bagua_jax.algorithms import REGISTRY
from bagua_jax.entries import Entry

if TYPE_CHECKING:
    from bagua_jax import Workers
    from bagua_jax.wire import WireCount

__all__ = [
    "SURVEY",
    "Row",
    "count",
    "families",
    "label",
    "measure",
    "program",
    "read",
    "resnet50",
    "to_markdown",
]

WORKERS = 8


class Row(NamedTuple):
    """A configuration of an algorithm: an example of the registry, with its name."""

    algorithm: str
    options: Mapping[str, Any]
    known_as: str = ""
    peers: str = ""
    invariant: str = ""

    @property
    def entry(self) -> Entry:
        """What is known of the algorithm."""
        return REGISTRY[self.algorithm]


SURVEY = tuple(
    Row(name, *example)
    for name, entry in REGISTRY.items()
    for example in entry.examples
)
"""Every example of the registry."""


def label(row: Row) -> str:
    """Write a configuration in one line.

    >>> label(SURVEY[2])
    'bytegrad(error_feedback=both)'
    """
    options = ", ".join(f"{name}={value}" for name, value in row.options.items())
    return f"{row.algorithm}({options})" if options else row.algorithm


# --- the model ------------------------------------------------------------------------


def resnet50() -> dict[str, tuple[int, ...]]:
    """Return the shapes of ResNet-50's 161 parameters, by name.

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
    """Return one step of an algorithm, to compile anywhere; see :func:`count`.

    Returns:
        A per-worker function of (parameters, state) and gradients, the shapes of its
        arguments at the boundary, and their specs.
    """
    import jax
    import jax.numpy as jnp
    import optax

    from bagua_jax import worker_local
    from bagua_jax.experiments.spec import catalog
    from bagua_jax.experiments.spec.config import AlgorithmConfig, ExperimentConfig

    chosen = AlgorithmConfig(algorithm, arguments=dict(options), may_diverge=True)
    (config,) = catalog.resolve(
        ExperimentConfig("survey", "quadratic", (chosen,), workers=place.shape[0])
    )
    axis = place.axis_name
    tx = catalog.transform(config, axis)

    def init():
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
        if catalog.entry(algorithm).own_params:
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
    path = resources.files("bagua_jax.experiments.tables") / "survey.json"
    return json.loads(path.read_text("utf-8"))


# --- the page -------------------------------------------------------------------------

_START, _END = "<!-- families -->", "<!-- end of families -->"

_PAGE = """\
# Every algorithm: what it sends, who else has it, what tests hold it to

*Written by `python -m bagua_jax.experiments.tables.survey`; do not edit it.*

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
    dense = numbers["gradient_allreduce"]
    lines = []
    for row in SURVEY:
        counted = numbers[label(row)]
        share = counted["bytes_per_worker"] / dense["bytes_per_worker"]
        cells = (
            f"`{label(row)}`",
            row.known_as,
            row.entry.placement,
            f"{counted['bytes_per_worker'] / 1e6:.3g}",
            f"{share:.2%}",
            f"{counted['messages_per_worker']:.3g}",
            row.invariant or row.entry.invariant,
            f"`{row.entry.oracle}`",
            row.peers,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return _PAGE.format(
        workers=WORKERS,
        parameters=dense["parameters"],
        dense=dense["bytes_per_worker"] / 1e6,
        rows="\n".join(lines),
    )


def families() -> str:
    """Write README's table of names by family.

    >>> families().splitlines()[2][:37]
    '| gradient side | `adasum`, `bytegrad'
    """
    places = {"gradient": "gradient side", "weight": "local steps"}
    found: dict[str, list[str]] = {
        name: [] for name in ("gradient side", "optimizers", "gossip", "local steps")
    }
    for name, entry in REGISTRY.items():
        if entry.is_optimizer:
            found["optimizers"].append(name)
        elif entry.family == "gossip":
            found["gossip"].append(name)
        else:
            found[places[entry.placement]].append(name)
    lines = [
        f"| {family} | {', '.join(f'`{name}`' for name in sorted(names))} |"
        for family, names in found.items()
    ]
    return "\n".join(("| family | names |", "|---|---|", *lines))


def main() -> int:
    """Count what was not counted yet, and write pages and numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, default=Path("docs/algorithms.md"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    numbers = Path("experiments/tables/survey.json")
    parser.add_argument("--numbers", type=Path, default=numbers)
    parser.add_argument("--all", action="store_true", help="count everything again")
    parser.add_argument("algorithms", nargs="*", help="count these again")
    arguments = parser.parse_args()

    import jax
    from rich.console import Console
    from rich.progress import track

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", WORKERS)
    kept = json.loads(arguments.numbers.read_text())
    numbers = {}
    for row in track(SURVEY, "compiling", console=Console(stderr=True)):
        name = label(row)
        again = arguments.all or row.algorithm in arguments.algorithms
        numbers[name] = measure(row) if again or name not in kept else kept[name]
    before, start, rest = arguments.readme.read_text().partition(_START)
    _, end, after = rest.partition(_END)
    for path, text in (
        (arguments.numbers, json.dumps(numbers, indent=1) + "\n"),
        (arguments.page, to_markdown(numbers)),
        (arguments.readme, f"{before}{start}\n{families()}\n{end}{after}"),
    ):
        path.write_text(text, "utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
