"""From names in a config to the things they name, checked against their signatures."""

import dataclasses
import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bagua_jax import compressors, renamed, topologies
from bagua_jax.algorithms import REGISTRY as ALGORITHMS
from bagua_jax.compressors import Compressor
from bagua_jax.entries import Entry
from bagua_jax.experiments.spec import config as configs
from bagua_jax.experiments.spec import names
from bagua_jax.experiments.spec.config import (
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
    "compressor",
    "entry",
    "optimizer",
    "parameters",
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
    """Build the optimizer that the algorithm of one run is chained with.

    Raises:
        ConfigError: if one of ``package.module:function`` cannot be imported, does not
            take what is set, or returns no transform.
    """
    chosen = config.algorithms[0].optimizer or config.optimizer
    arguments = chosen.arguments()
    if not names.is_own(chosen.name):
        return getattr(optax, chosen.name)(chosen.learning_rate, **arguments)
    where = "optimizer.name"
    factory = names.find(chosen.name, {}, "optimizer", where)
    if not callable(factory):
        raise ConfigError(
            f"{where}: {quote(chosen.name)} must be a function of the learning rate; "
            f"got a {type(factory).__name__}."
        )
    for name in arguments:
        if name not in (known := _signature(factory)):
            what = f"argument of {chosen.name}"
            raise unknown(f"optimizer.{name}", name, known, what)
    try:
        made = factory(chosen.learning_rate, **arguments)
    except Exception as error:
        raise _refusal("optimizer", error) from None
    if not isinstance(made, optax.GradientTransformation):
        raise ConfigError(
            f"{where}: {quote(chosen.name)} must return an optax transform; got a "
            f"{type(made).__name__}."
        )
    return made


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
    known = parameters(algorithm.name)
    try:
        given = renamed.translate(algorithm.name, algorithm.arguments)
    except TypeError as error:  # an argument by both of its names
        raise ConfigError(f"{where}: {error}") from None
    for name, value in given.items():
        if name not in known:
            what = f"argument of {algorithm.name}"
            raise unknown(f"{where}.{name} = {quote(value)}", name, known, what)
    resolved: dict[str, Any] = {}
    for name, parameter in known.items():
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


def parameters(name: str) -> dict[str, inspect.Parameter]:
    """Get the arguments of an algorithm that a config may give.

    Args:
        name: of an algorithm of the registry, or ``module:name``.

    Returns:
        Parameters of its factory by name, in order.
    """
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
