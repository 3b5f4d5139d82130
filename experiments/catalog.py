"""From names in a config to the things they name, checked against their signatures."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bagua_jax import compressors, topologies
from bagua_jax.algorithms import REGISTRY as ALGORITHMS
from bagua_jax.compressors import Compressor
from bagua_jax.experiments import config as configs
from bagua_jax.experiments import survey, tasks
from bagua_jax.experiments.config import (
    AlgorithmConfig,
    ConfigError,
    ExperimentConfig,
    OptimizerConfig,
    check_value,
    unknown,
)
from bagua_jax.primitives import AxisName
from bagua_jax.topologies import Topology

__all__ = [
    "LISTS",
    "compressor",
    "describe",
    "optimizer",
    "relaxation",
    "resolve",
    "topology",
    "transform",
    "uses_optimizer",
]

_SUPPLIED = "axis_name"  # by the runner, never by a config


def resolve(config: ExperimentConfig) -> tuple[ExperimentConfig, ...]:
    """Split an experiment into its runs, each with every argument written out.

    Arguments are checked against the signature of the algorithm's factory, and the
    transform is built and traced once, so that what it refuses is refused here. A
    ``seed`` that the config leaves out is the experiment's.

    Args:
        config: an experiment.

    Returns:
        For each algorithm a config that holds it alone.

    Raises:
        ConfigError: if an algorithm, argument, compressor or topology is not known, or
            the factory refuses a value.
    """
    runs = []
    for algorithm in config.algorithms:
        algorithm = _resolve_algorithm(algorithm, config)
        used = config.optimizer if uses_optimizer(algorithm) else OptimizerConfig()
        run = dataclasses.replace(
            config, algorithms=(algorithm,), optimizer=used, claims=()
        )
        _try_out(run)
        runs.append(run)
    return tuple(runs)


def _try_out(run: ExperimentConfig) -> None:
    """Trace one step on a vector: what a transform refuses, it refuses here."""
    tx = transform(run, axis_name="workers")

    def step(x):
        return tx.update(x, tx.init(x), x)

    try:
        vectors = jax.ShapeDtypeStruct((run.workers, 2), jnp.float32)
        jax.eval_shape(jax.vmap(step, axis_name="workers"), vectors)
    except ValueError as error:
        raise ConfigError(f"algorithms.{run.algorithms[0].label}: {error}") from None


def uses_optimizer(algorithm: AlgorithmConfig) -> bool:
    """Tell whether an algorithm is chained with an optimizer or is one itself."""
    return not ALGORITHMS[algorithm.name].is_optimizer


def transform(
    config: ExperimentConfig, axis_name: AxisName
) -> optax.GradientTransformationExtraArgs:
    """Build the transform of one run, optimizer included.

    Args:
        config: of one run, resolved.
        axis_name: the workers' axis.

    Raises:
        ConfigError: if the factory refuses a value.
    """
    (algorithm,) = config.algorithms
    entry = ALGORITHMS[algorithm.name]
    own = relaxation(config, axis_name)
    if entry.is_optimizer:
        return own
    parts = (own, optimizer(config))
    return optax.chain(*(parts if entry.placement == "gradient" else parts[::-1]))


def relaxation(
    config: ExperimentConfig, axis_name: AxisName
) -> optax.GradientTransformationExtraArgs:
    """Build the algorithm of one run, without the optimizer that it is chained with.

    Args and errors are those of :func:`transform`.
    """
    (algorithm,) = config.algorithms
    where = f"algorithms.{algorithm.label}"
    arguments = dict(algorithm.arguments)
    if arguments.get("compressor") is not None:
        arguments["compressor"] = compressor(
            arguments["compressor"], f"{where}.compressor"
        )
    if "topology" in arguments:
        arguments["topology"] = topology(
            arguments["topology"], config.workers, f"{where}.topology"
        )
    try:
        factory = ALGORITHMS[algorithm.name].factory
        return factory(**arguments, axis_name=axis_name)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from None


def optimizer(config: ExperimentConfig) -> optax.GradientTransformation:
    """Build the optimizer that the algorithm of one run is chained with."""
    chosen = config.algorithms[0].optimizer or config.optimizer
    return getattr(optax, chosen.name)(chosen.learning_rate, **chosen.arguments())


def _resolve_algorithm(
    algorithm: AlgorithmConfig, config: ExperimentConfig
) -> AlgorithmConfig:
    where = f"algorithms.{algorithm.label}"
    if algorithm.name not in ALGORITHMS:
        raise unknown("algorithms", algorithm.name, ALGORITHMS, "algorithm")
    if algorithm.optimizer is not None and not uses_optimizer(algorithm):
        raise ConfigError(
            f"{where}.optimizer: {algorithm.name} is the optimizer itself; give "
            "learning_rate and the like among its arguments."
        )
    parameters = _parameters(algorithm.name)
    given = dict(algorithm.arguments)
    for name, value in given.items():
        if name not in parameters:
            what = f"argument of {algorithm.name}"
            raise unknown(f"{where}.{name} = {value!r}", name, parameters, what)
    resolved: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if name in given:
            value, hint = given[name], parameter.annotation
            is_thing = name in ("compressor", "topology")
            checked = value if is_thing else check_value(value, hint, f"{where}.{name}")
            resolved[name] = checked
        elif name == "seed":
            resolved[name] = config.seed
        elif parameter.default is inspect.Parameter.empty:
            raise ConfigError(
                f"{where}.{name}: {algorithm.name} requires it, and it is missing."
            )
        else:
            resolved[name] = _as_config(parameter.default)
    return dataclasses.replace(algorithm, arguments=resolved)


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    """Get the arguments of an algorithm that a config may give."""
    signature = inspect.signature(ALGORITHMS[name].factory, eval_str=True)
    return {k: p for k, p in signature.parameters.items() if k != _SUPPLIED}


def _as_config(default: Any) -> Any:
    """Write a default as a config would; compressors by name and parameters."""
    return default.facts.name if isinstance(default, Compressor) else default


# --- compressors and topologies ---


def compressor(value: Any, where: str = "compressor") -> Compressor:
    """Build a compressor from its name and parameters.

    Args:
        value: ``minmax_uint8``, ``topk(0.1)``, ``topk(ratio=0.1)``, or
            ``{name: topk, ratio: 0.1}``; in the place of a parameter that is a
            compressor the same again.
        where: the field, for errors.

    Raises:
        ConfigError: if name or parameters are not valid.

    Example:
        >>> compressor("cast(bfloat16)").facts.name
        'cast(bfloat16)'
    """
    return _build(value, compressors.REGISTRY, "compressor", where)


def topology(value: Any, workers: int, where: str = "topology") -> Topology:
    """Build a topology of a number of workers, written as :func:`compressor` is.

    Raises:
        ConfigError: if name or parameters are not valid, or do not fit the workers.

    Example:
        >>> topology("ring(self_weight=0.5)", 4).mixing_matrix(0)[0].tolist()
        [0.5, 0.25, 0.0, 0.25]
    """
    return _build(value, topologies.REGISTRY, "topology", where, workers)


def _build(
    value: Any, registry: Mapping[str, Any], what: str, where: str, *supplied: int
) -> Any:
    call = _parse_call(value) if isinstance(value, str) else value
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        example = next(iter(registry))
        raise ConfigError(
            f"{where}: must be a name or a mapping with a name, such as {example} or "
            f"{{name: {example}}}; got {value!r}."
        )
    name, given = call["name"], {k: v for k, v in call.items() if k != "name"}
    if name not in registry:
        raise unknown(where, name, registry, what)
    signature = inspect.signature(registry[name], eval_str=True)
    parameters = dict(list(signature.parameters.items())[len(supplied) :])
    for key in [key for key in given if isinstance(key, int)]:  # by position
        if key >= len(parameters):
            raise ConfigError(
                f"{where}: {name} takes {len(parameters)} parameters, got {value!r}."
            )
        given[list(parameters)[key]] = given.pop(key)
    for key, argument in given.items():
        if key not in parameters:
            raise unknown(
                f"{where}.{key} = {argument!r}", key, parameters, f"parameter of {name}"
            )
        path = f"{where}.{key}"
        if isinstance(parameters[key].default, Compressor):
            given[key] = compressor(argument, path)
        else:
            argument = tuple(argument) if isinstance(argument, list) else argument
            given[key] = check_value(argument, parameters[key].annotation, path)
    try:
        return registry[name](*supplied, **given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from None


def _parse_call(text: str) -> dict[Any, Any] | None:
    """Read ``name`` or ``name(value, key=value)``; positions become integer keys.

    >>> _parse_call("blockwise(4, rounding=nearest)")
    {'name': 'blockwise', 0: 4, 'rounding': 'nearest'}
    """
    found = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", text)
    if not found:
        return None
    call: dict[Any, Any] = {"name": found[1]}
    # Commas outside brackets separate.
    parts = re.findall(
        r"(?:[^,(\[]|\([^()]*(?:\([^()]*\)[^()]*)*\)|\[[^\]]*\])+", found[2] or ""
    )
    for position, part in enumerate(parts):
        key, equals, value = part.partition("=")
        if not equals or "(" in key:
            key, value = position, part
        read = None if value.strip() == "None" else configs.read_yaml(value)
        call[key.strip() if isinstance(key, str) else key] = read
    return call


# --- what there is ---


class Row(NamedTuple):
    """One line of ``bagua-jax list``."""

    name: str
    summary: str
    facts: tuple[str, ...] = ()


class Kind(NamedTuple):
    """One table of ``bagua-jax list``: its rows, and what their facts are."""

    rows: Callable[[], list[Row]]
    facts: tuple[str, ...] = ()
    caption: str = ""


def _first_line(thing: Any) -> str:
    line = (inspect.getdoc(thing) or "").partition("\n")[0]
    return re.sub(r":? :math:`[^`]*`", "", line)  # formulas are for the manual


def _compressors() -> list[Row]:
    rows = []
    for name, factory in compressors.REGISTRY.items():
        made = compressor("cast(bfloat16)" if name == "cast" else name)
        vector = jax.ShapeDtypeStruct((_LENGTH,), jnp.float32)
        sent = made.facts.payload_bytes(vector) / _LENGTH
        rows.append(
            Row(name, _first_line(factory), (f"{sent:.3g}", _constant_of(made)))
        )
    return rows


def _constant_of(made: Compressor | Topology) -> str:
    if isinstance(made, Topology):
        return f"ρ {made.contraction:.3g}"
    facts = made.facts
    for symbol, bound in (("ω", facts.omega), ("δ", facts.delta)):
        if bound is not None:
            value = bound(_LENGTH)
            return f"{symbol} {value:.3g}" if value >= 0 else f"{symbol} ≤ 0"
    return "none known"


def _topologies() -> list[Row]:
    return [
        Row(
            name,
            _first_line(factory),
            (f"{4 * factory(_WORKERS).messages:.3g}", _constant_of(factory(_WORKERS))),
        )
        for name, factory in topologies.REGISTRY.items()
    ]


def _algorithms() -> list[Row]:
    counted, surveyed = (
        survey.read(),
        {row.algorithm: row for row in survey.SURVEY[::-1]},
    )
    rows = []
    for name, entry in ALGORITHMS.items():
        row = surveyed[name]
        numbers = counted[survey.label(row)]
        sent = numbers["bytes_per_worker"] / numbers["parameters"]
        facts = (f"{sent:.3g}", _constants(row))
        rows.append(Row(name, _first_line(entry.factory), facts))
    return rows


def _constants(row: survey.Row) -> str:
    """Write the constants of what a surveyed configuration is made of."""
    defaults = {k: p.default for k, p in _parameters(row.algorithm).items()}
    arguments = defaults | dict(row.options)
    made = []
    if isinstance(arguments.get("compressor"), str | Compressor):
        value = arguments["compressor"]
        made.append(compressor(value) if isinstance(value, str) else value)
    if isinstance(arguments.get("topology"), str):
        made.append(topology(arguments["topology"], _WORKERS))
    steps = {
        symbol: arguments[name]
        for name, symbol in (("local_steps", "H"), ("period", "H"), ("staleness", "τ"))
        if isinstance(arguments.get(name), int) and arguments[name]
    }
    said = [_constant_of(thing) for thing in made]
    said += [f"{symbol} {value}" for symbol, value in steps.items()]
    return ", ".join(said)


def _simple(registry: Mapping[str, Any]) -> list[Row]:
    return [Row(name, _first_line(thing)) for name, thing in registry.items()]


_LENGTH, _WORKERS = 2**20, 8
LISTS = {
    "algorithms": Kind(
        _algorithms,
        ("B/param", "constants"),
        "B/param: bytes that each of 8 workers sends for a parameter on a step, read "
        "from the compiled program of a model of 25.6 million (docs/algorithms.md, "
        "first configuration). constants: those of its compressor and graph, H steps "
        "between exchanges, staleness τ.",
    ),
    "compressors": Kind(
        _compressors,
        ("B/param", "constant"),
        "With defaults, for a float32 vector of 2^20. ω: E|C(x) - x|² <= ω|x|², "
        "unbiased. δ: E|C(x) - x|² <= (1 - δ)|x|²; no contraction where δ ≤ 0.",
    ),
    "topologies": Kind(
        _topologies,
        ("B/param", "constant"),
        "For 8 workers, float32. ρ: by how much a step shrinks the distance to "
        "consensus, the geometric mean over a period; 0 is exact after one.",
    ),
    "tasks": Kind(lambda: _simple(tasks.TASKS)),
    "configs": Kind(
        lambda: [
            Row(name, _claim(path.read_text()))
            for name, path in configs.shipped().items()
        ]
    ),
}


def describe(what: str) -> list[Row]:
    """List what there is of a kind, with one line on each and its facts.

    Args:
        what: a key of ``LISTS``.

    Example:
        >>> [row.name for row in describe("topologies")][:2]
        ['ring', 'complete']
    """
    return LISTS[what].rows()


def _claim(text: str) -> str:
    """Read from a config's comments what it shows."""
    found = re.search(r"^# Claim: (.*)$", text, re.MULTILINE)
    return found[1] if found else ""
