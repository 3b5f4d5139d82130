"""From names in a config to the things they name, checked against their signatures."""

import dataclasses
import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bagua_jax import compressors, topologies
from bagua_jax.algorithms import REGISTRY as ALGORITHMS
from bagua_jax.compressors import Compressor
from bagua_jax.entries import Entry
from bagua_jax.experiments import config as configs
from bagua_jax.experiments import names, survey, tasks
from bagua_jax.experiments.config import (
    AlgorithmConfig,
    ConfigError,
    ExperimentConfig,
    OptimizerConfig,
    check_value,
    quote,
    unknown,
)
from bagua_jax.primitives import AxisName
from bagua_jax.topologies import Topology

__all__ = [
    "LISTS",
    "compressor",
    "describe",
    "entry",
    "optimizer",
    "relaxation",
    "resolve",
    "topology",
    "transform",
    "uses_optimizer",
    "written_out",
]

_SUPPLIED = "axis_name"  # by the runner, never by a config
_CODECS = compressors.REGISTRY
_TRACED = 16  # turns of a rotating graph
_MAX_ROUNDS = 256  # of messages in a step; each is an operation of the program


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
        run = written_out(algorithm, config)
        _try_out(run)
        runs.append(run)
    return tuple(runs)


def written_out(
    algorithm: AlgorithmConfig, config: ExperimentConfig
) -> ExperimentConfig:
    """Make the config of one run of an experiment, with every argument written out.

    Errors are those of :func:`resolve`; nothing is built.
    """
    algorithm = _resolve_algorithm(algorithm, config)
    used = config.optimizer if uses_optimizer(algorithm) else OptimizerConfig()
    return dataclasses.replace(
        config, algorithms=(algorithm,), optimizer=used, claims=()
    )


def _try_out(run: ExperimentConfig) -> None:
    """Trace one step on a vector: what a transform refuses, it refuses here.

    Every turn of a rotating graph is a branch of the program. All are built; few are
    traced, because the thousandth says no more than the first.
    """
    transform(run, axis_name="workers")
    tx = transform(run, axis_name="workers", turns=_TRACED)

    def step(x):
        return tx.update(x, tx.init(x), x)

    try:
        vectors = jax.ShapeDtypeStruct((run.workers, 2), jnp.float32)
        jax.eval_shape(jax.vmap(step, axis_name="workers"), vectors)
    except Exception as error:
        raise _refusal(f"algorithms.{run.algorithms[0].label}", error) from None


def _refusal(where: str, error: Exception) -> ConfigError:
    """Pass on what a factory, or the trace of a step, said against its arguments."""
    if isinstance(error, Warning):  # made an error by Python's -W: not a refusal
        raise error
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return ConfigError(f"{where}: {kind}{error}")


def uses_optimizer(algorithm: AlgorithmConfig) -> bool:
    """Tell whether an algorithm is chained with an optimizer or is one itself."""
    return not entry(algorithm.name).is_optimizer


def entry(name: str) -> Entry:
    """Find what is known of an algorithm.

    Args:
        name: in ``bagua_jax.algorithms.REGISTRY``, or ``package.module:attribute`` of
            an :class:`~bagua_jax.algorithms.Entry` of your own.

    Raises:
        ConfigError: if there is none.

    Example:
        >>> entry("bytegrad").placement
        'gradient'
    """
    found = names.find(name, ALGORITHMS, "algorithm", "algorithms")
    if isinstance(found, Entry):
        return found
    module, _, attribute = name.partition(":")
    what = "a function" if callable(found) else f"a {type(found).__name__}"
    raise ConfigError(
        f"algorithms: {quote(name)} must be an Entry, which says where the transform "
        f"stands in a chain; got {what}. Write in {module}, for example, "
        f'`entry = bagua_jax.algorithms.Entry({attribute}, "gradient")`, and name '
        f"{module}:entry."
    )


def transform(
    config: ExperimentConfig, axis_name: AxisName, turns: int | None = None
) -> optax.GradientTransformationExtraArgs:
    """Build the transform of one run, optimizer included.

    Args:
        config: of one run, resolved.
        axis_name: the workers' axis.
        turns: of a rotating graph, so many; ``None``: all.

    Raises:
        ConfigError: if the factory refuses a value.
    """
    (algorithm,) = config.algorithms
    known = entry(algorithm.name)
    own = relaxation(config, axis_name, turns)
    if known.is_optimizer:
        return own
    parts = (own, optimizer(config))
    return optax.chain(*(parts if known.placement == "gradient" else parts[::-1]))


def relaxation(
    config: ExperimentConfig, axis_name: AxisName, turns: int | None = None
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
        graph = topology(arguments["topology"], config.workers, f"{where}.topology")
        is_mean = all(step.is_mean for step in graph.steps)
        if "compressor" in arguments or not is_mean:  # else one all-reduce
            _require_rounds(graph, f"{where}.topology")
        arguments["topology"] = graph._replace(steps=graph.steps[:turns])
    try:
        factory = entry(algorithm.name).factory
        with warnings.catch_warnings():
            if algorithm.may_diverge:  # the reader knows
                warnings.simplefilter("ignore", UserWarning)
            return factory(**arguments, axis_name=axis_name)
    except Exception as error:
        raise _refusal(where, error) from None


def optimizer(config: ExperimentConfig) -> optax.GradientTransformation:
    """Build the optimizer that the algorithm of one run is chained with."""
    chosen = config.algorithms[0].optimizer or config.optimizer
    return getattr(optax, chosen.name)(chosen.learning_rate, **chosen.arguments())


def _resolve_algorithm(
    algorithm: AlgorithmConfig, config: ExperimentConfig
) -> AlgorithmConfig:
    where = f"algorithms.{algorithm.label}"
    entry(algorithm.name)
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
            raise unknown(f"{where}.{name} = {quote(value)}", name, parameters, what)
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
        elif not isinstance(parameter.default, Compressor):
            resolved[name] = parameter.default
        elif (written := parameter.default.facts.name).split("(")[0] in _CODECS:
            resolved[name] = written
    return dataclasses.replace(algorithm, arguments=resolved)


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    """Get the arguments of an algorithm that a config may give."""
    return {k: p for k, p in _signature(entry(name).factory).items() if k != _SUPPLIED}


def _signature(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Get the named parameters of a function, with their types where they are known."""
    try:
        signature = inspect.signature(factory, eval_str=True)
    except NameError:  # a type that its module imports for type checkers only
        signature = inspect.signature(factory)
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {k: p for k, p in signature.parameters.items() if p.kind not in several}


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
    return _build(value, _CODECS, "compressor", where, Compressor)


def topology(value: Any, workers: int, where: str = "topology") -> Topology:
    """Build a topology of a number of workers, written as :func:`compressor` is.

    Raises:
        ConfigError: if name or parameters are not valid, or do not fit the workers.

    Example:
        >>> topology("ring(self_weight=0.5)", 4).mixing_matrix(0)[0].tolist()
        [0.5, 0.25, 0.0, 0.25]
    """
    return _build(value, topologies.REGISTRY, "topology", where, Topology, workers)


def _require_rounds(graph: Topology, where: str) -> None:
    rounds = max(len(step.sends) for step in graph.steps)
    if rounds > _MAX_ROUNDS:
        raise ConfigError(
            f"{where}: a step must have at most {_MAX_ROUNDS} rounds of messages, as a "
            f"program has an operation for each; {graph.name} of {graph.n:,} workers "
            f"has {rounds:,}. Use fewer workers, or a graph of fewer neighbours, such "
            "as one_peer_exponential."
        )


def _build(
    value: Any,
    registry: Mapping[str, Any],
    what: str,
    where: str,
    kind: type,
    *supplied: int,
) -> Any:
    call = _parse_call(value) if isinstance(value, str) else value
    if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{where}: parameters have names, got {quote(value)}.")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        example = next(iter(registry))
        raise ConfigError(
            f"{where}: must be a name or a mapping with a name, such as {example} or "
            f"{{name: {example}}}; got {quote(value)}."
        )
    name, given = call["name"], {k: v for k, v in call.items() if k != "name"}
    factory = names.find(name, registry, what, where)
    if isinstance(factory, kind) and not given:
        return factory
    if not callable(factory):
        raise ConfigError(
            f"{where}: {quote(name)} must be a function that returns a "
            f"{kind.__name__}, got {type(factory).__name__}."
        )
    parameters = dict(list(_signature(factory).items())[len(supplied) :])
    for key in [key for key in given if isinstance(key, int)]:  # by position
        if key >= len(parameters):
            raise ConfigError(
                f"{where}: {name} takes {len(parameters)} parameters, got "
                f"{quote(value)}."
            )
        given[list(parameters)[key]] = given.pop(key)
    for key, argument in given.items():
        if key not in parameters:
            raise unknown(
                f"{where}.{key} = {quote(argument)}",
                key,
                parameters,
                f"parameter of {name}",
            )
        path = f"{where}.{key}"
        if isinstance(parameters[key].default, Compressor):
            given[key] = compressor(argument, path)
        else:
            argument = tuple(argument) if isinstance(argument, list) else argument
            given[key] = check_value(argument, parameters[key].annotation, path)
    try:
        made = factory(*supplied, **given)
    except Exception as error:
        raise _refusal(where, error) from None
    if not isinstance(made, kind):
        raise ConfigError(
            f"{where}: {quote(name)} must return a {kind.__name__}, got "
            f"{type(made).__name__}."
        )
    return made


def _parse_call(text: str) -> dict[Any, Any] | None:
    """Read ``name`` or ``name(value, key=value)``; positions become integer keys.

    >>> _parse_call("blockwise(4, rounding=nearest)")
    {'name': 'blockwise', 0: 4, 'rounding': 'nearest'}
    >>> _parse_call("my.codecs:coarse(3)")
    {'name': 'my.codecs:coarse', 0: 3}
    """
    found = re.fullmatch(r"\s*([\w.]+:\w+|\w+)\s*(?:\((.*)\))?\s*", text)
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
    for name, known in ALGORITHMS.items():
        row = surveyed[name]
        numbers = counted.get(survey.label(row))  # none: `survey` did not run since
        sent = (
            f"{numbers['bytes_per_worker'] / numbers['parameters']:.3g}"
            if numbers
            else "?"
        )
        rows.append(Row(name, _first_line(known.factory), (sent, _constants(row))))
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
            Row(name, _claim(path.read_text("utf-8")))
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
