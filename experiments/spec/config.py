"""Experiment configs: YAML read into strict frozen dataclasses.

Nothing here imports jax: the command line reads a config before jax starts.
"""

import dataclasses
import hashlib
import importlib.resources
import json
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from tyro.conf import Suppress
from tyro.constructors import PrimitiveConstructorSpec

from bagua_jax.experiments.spec.messages import UNWRITABLE, ConfigError, quote, unknown
from bagua_jax.experiments.spec.strict_yaml import MAX_BYTES, read_yaml

__all__ = [
    "AlgorithmConfig",
    "ConfigError",
    "ExperimentConfig",
    "OptimizerConfig",
    "check_value",
    "dump",
    "identity",
    "load",
    "parse_algorithms",
    "quote",
    "read_yaml",
    "require_ranges",
    "run_name",
    "select",
    "shipped",
    "unknown",
]


_COUNT = 2**31 - 1  # optax counts steps in int32
_LARGEST = 3.4e38  # in float32
_MAX_ALGORITHMS = 100
_LONGEST_NAME = 100  # bytes; hash and seed are appended, and a file system allows 255
_MAX_WORKERS = 4_096  # a dense graph of them is n^2 messages

_RANGES: dict[str, tuple[float, float]] = {
    "workers": (1, _MAX_WORKERS),
    "steps": (1, _COUNT),
    "batch_size": (1, _COUNT),
    "seed": (0, _COUNT),
    "eval_every": (1, _COUNT),
    "checkpoint_every": (1, _COUNT),
    "check_replicas_every": (1, _COUNT),
    "keep_checkpoints": (1, _COUNT),
}
_OPTIMIZER_RANGES: dict[str, tuple[float, float]] = {
    "learning_rate": (math.ulp(0.0), _LARGEST),
    "momentum": (0, 1),
    "b1": (0, math.nextafter(1, 0)),
    "b2": (0, math.nextafter(1, 0)),
    "eps": (0, _LARGEST),
    "weight_decay": (0, _LARGEST),
}


def require_ranges(
    owner: Any, ranges: Mapping[Any, tuple[float, float]], prefix: str = ""
) -> None:
    """Check numeric fields of a dataclass, inclusive; NaN is in no range, None in all.

    Raises:
        ConfigError: naming the field, its range and the value.
    """
    for name, (low, high) in ranges.items():
        value = getattr(owner, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is None or low <= number <= high:
                continue
            bounds = f"from {low:,} to {high:,}"
            if low == math.ulp(0.0):
                bounds = f"positive and at most {high:,}"
            raise ConfigError(f"{prefix}{name}: must be {bounds}, got {quote(number)}.")


def _require_choice(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise unknown(name, value, valid, "choice")


def _require_path(name: str, value: str) -> None:
    if not value or UNWRITABLE.search(value):
        raise ConfigError(
            f"{name}: must be a path without control characters, got {quote(value)}."
        )


def _require_file_name(name: str, value: str) -> None:
    if not re.fullmatch(r"\w[\w.+-]*", value):
        raise ConfigError(
            f"{name}: becomes a folder's name, so it must be made of letters, digits, "
            f"'_', '-', '+' and '.'; got {quote(value)}."
        )
    if len(value.encode()) > _LONGEST_NAME:
        raise ConfigError(
            f"{name}: becomes a folder's name, so it must have at most {_LONGEST_NAME} "
            f"bytes; got {len(value.encode())}: {quote(value)}."
        )


_OPTIMIZER_FIELDS = {
    "sgd": ("momentum", "nesterov"),
    "adam": ("b1", "b2", "eps"),
    "adamw": ("b1", "b2", "eps", "weight_decay"),
}


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer that an algorithm is chained with. None means optax's default."""

    name: str = "sgd"
    """optax's sgd, adam or adamw; or package.module:function, which takes the learning
    rate and what else is set here, such as optax:lion or one of your own."""
    learning_rate: float = 0.1
    """Step size, constant over the run."""
    momentum: float | None = None
    """sgd."""
    nesterov: bool | None = None
    """sgd."""
    b1: float | None = None
    """adam and adamw: decay of the first moment."""
    b2: float | None = None
    """adam and adamw: decay of the second moment."""
    eps: float | None = None
    """adam and adamw: added to the root of the second moment."""
    weight_decay: float | None = None
    """adamw: decoupled decay, times the learning rate."""

    def __post_init__(self):
        require_ranges(self, _OPTIMIZER_RANGES, "optimizer.")
        if ":" in self.name:  # of a module: its signature says what it takes
            return
        if self.name not in _OPTIMIZER_FIELDS:
            what = "optimizer (and no package.module:function)"
            raise unknown("optimizer.name", self.name, _OPTIMIZER_FIELDS, what)
        for name, value in self.arguments().items():
            if name not in _OPTIMIZER_FIELDS[self.name]:
                users = [k for k, names in _OPTIMIZER_FIELDS.items() if name in names]
                raise ConfigError(
                    f"optimizer.{name}: {self.name} has no {name}, got "
                    f"{quote(value)}. It is an argument of {' and '.join(users)}."
                )

    def arguments(self) -> dict[str, Any]:
        """Return what was set besides name and learning rate."""
        own = dataclasses.asdict(self)
        del own["name"], own["learning_rate"]
        return {name: value for name, value in own.items() if value is not None}


@dataclass(frozen=True)
class AlgorithmConfig:
    """One algorithm of an experiment, one run.

    In YAML its arguments stand beside its name:
    ``{name: bytegrad, error_feedback: worker, label: with-feedback}``.
    """

    name: str
    """One that `bagua-jax list algorithms` shows, or your own as package.module:name.

    That is a `bagua_jax.algorithms.Entry`, which says where the transform stands."""
    label: str = ""
    """What tables, plots and folders call it; where empty its name, without a module,
    or the module's where that says no more than `entry`."""
    optimizer: OptimizerConfig | None = None
    """Instead of the experiment's optimizer (as a whole)."""
    may_diverge: bool = False
    """Whether a loss that is not finite or above a million ends the run as diverged; a
    loss that is not finite is else a failure."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the algorithm, without ``axis_name``."""

    def __post_init__(self):
        module, _, name = self.name.rpartition(":")
        own = module.rpartition(".")[2] if name == "entry" else name
        object.__setattr__(self, "label", self.label or own)
        _require_file_name("algorithms.label", self.label)


@dataclass(frozen=True)
class ExperimentConfig:
    """One experiment: a task, its workers, and the algorithms to compare on it."""

    experiment: str
    """Name of the experiment and of its folder."""
    task: str
    """One that `bagua-jax list tasks` shows, or your own as package.module:name."""
    algorithms: Annotated[
        tuple[AlgorithmConfig, ...],
        PrimitiveConstructorSpec(
            nargs=1,
            metavar="NAME,NAME,...",
            instance_from_str=lambda words: parse_algorithms(words[0]),
            is_instance=lambda value: isinstance(value, tuple),
            str_from_instance=lambda value: [",".join(a.label for a in value)],
        ),
    ]
    """What is compared, one run each; a flag takes labels, names or a YAML list."""
    workers: int = 8
    """Number of workers."""
    where: Literal["simulate", "devices", "processes"] = "simulate"
    """All on one device, or each on its own (without a GPU, on a host device): in this
    process, or in several (bagua-jax launch, mpiexec, srun)."""
    sharding: Literal["iid", "label"] = "iid"
    """Deal samples out at random, or by label (heterogeneous workers)."""
    steps: int = 200
    """Optimizer steps."""
    batch_size: int = 32
    """Samples per worker and step."""
    seed: int = 0
    """Of everything random: split, shards and order of the data, parameters."""
    eval_every: int = 50
    """Steps between evaluations; the last step is always evaluated."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    check_replicas_every: int = 50
    """Steps between comparisons of what all workers hold alike; one that differs stops
    the run."""
    on_nan: Literal["stop", "skip", "drop"] = "stop"
    """What to do when a worker's loss or gradient is not finite: `stop` the run, `skip`
    the step on all workers (one small all-reduce more), or `drop` the worker
    (`async --exchange pairs` only) while the others go on."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on disk."""
    output: str = "runs"
    """Folder of all experiments."""
    resume_from: str = ""
    """Folder of a run with any number of workers, whose state this run begins with."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """What algorithms are chained with that are no optimizers themselves."""
    claims: Suppress[tuple[str, ...]] = ()
    """What must hold of the runs at their end, such as ``topk.eval/loss < 0.1``."""

    def __post_init__(self):
        _require_file_name("experiment", self.experiment)
        _require_choice("where", self.where, ("simulate", "devices", "processes"))
        _require_choice("sharding", self.sharding, ("iid", "label"))
        _require_choice("on_nan", self.on_nan, ("stop", "skip", "drop"))
        require_ranges(self, _RANGES)
        _require_path("output", self.output)
        if self.resume_from:
            _require_path("resume_from", self.resume_from)
        if not self.algorithms:
            raise ConfigError(
                "algorithms: must list at least one algorithm, got none. "
                "`bagua-jax list algorithms` shows them."
            )
        if len(self.algorithms) > _MAX_ALGORITHMS:
            raise ConfigError(
                f"algorithms: must be at most {_MAX_ALGORITHMS}, got "
                f"{len(self.algorithms)}. Make several experiments of them."
            )
        labels = [a.label for a in self.algorithms]
        for label in labels:
            if labels.count(label) > 1:
                raise ConfigError(
                    f"algorithms: {labels.count(label)} entries are called "
                    f"{quote(label)}; give each its own label."
                )


# --- reading ---


def shipped() -> dict[str, Path]:
    """Find the configs that come with the package, by name, such as ``published/X``."""
    folder = Path(str(importlib.resources.files("bagua_jax.experiments"))) / "configs"
    paths = sorted(folder.glob("*.yaml")) + sorted(folder.glob("*/*.yaml"))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def load(source: str | Path) -> ExperimentConfig:
    """Read a config.

    Args:
        source: path of a YAML file, or the name of a shipped config, with or without
            its folder.

    Raises:
        ConfigError: if there is no such config, or it is not one.
    """
    path, known = Path(source), shipped()
    short = {name.rpartition("/")[2]: file for name, file in known.items()}
    exists = os.path.exists(source)  # Path.exists raises where a name is too long
    if not exists and str(source) in short | known:
        path = (short | known)[str(source)]
    elif not exists:
        raise unknown("CONFIG", str(source), known, "file or shipped config")
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_BYTES + 1).decode("utf-8")  # a device never ends
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: cannot be read: {error}.") from None
    raw = read_yaml(text, str(source))
    try:
        return _parse_experiment(raw)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _parse_experiment(raw: Any) -> ExperimentConfig:
    if isinstance(raw, dict) and "algorithms" in raw:
        raw = raw | {"algorithms": parse_algorithms(raw["algorithms"])}
    if isinstance(raw, dict) and "claims" in raw:
        claims = raw["claims"]
        if not isinstance(claims, list) or not all(isinstance(c, str) for c in claims):
            raise ConfigError(f"claims: must be a list of lines, got {quote(claims)}.")
        raw = raw | {"claims": tuple(claims)}
    return _parse(ExperimentConfig, raw, "")


def parse_algorithms(raw: Any) -> tuple[AlgorithmConfig, ...]:
    """Read a list of algorithms: names, or mappings of name, label and arguments.

    Args:
        raw: a list; or text, as a flag gives it: names with commas between, or YAML.

    Raises:
        ConfigError: if it is something else.

    Example:
        >>> [a.name for a in parse_algorithms("bytegrad,qadam")]
        ['bytegrad', 'qadam']
        >>> parse_algorithms("[{name: qadam, warmup_steps: 9}]")[0].arguments
        {'warmup_steps': 9}
    """
    if isinstance(raw, str):
        text = raw if raw.lstrip().startswith("[") else f"[{raw}]"
        raw = read_yaml(text, "algorithms")
    if not isinstance(raw, list):
        raise ConfigError(
            f"algorithms: must be a list such as [bytegrad, qadam], got {quote(raw)}."
        )
    return tuple(_parse_algorithm(entry, i) for i, entry in enumerate(raw))


def select(
    config: ExperimentConfig, wanted: Iterable[AlgorithmConfig]
) -> tuple[AlgorithmConfig, ...]:
    """Look bare names up among the algorithms of a config, by label, then by name.

    Args:
        config: lists algorithms with their arguments.
        wanted: what to run; one that says more than a name is taken as it is, and so is
            one that the config does not list.
    """
    chosen = []
    for algorithm in wanted:
        bare = algorithm == AlgorithmConfig(algorithm.name)
        by_label = [a for a in config.algorithms if a.label == algorithm.name]
        by_name = [a for a in config.algorithms if a.name == algorithm.name]
        chosen += (bare and (by_label or by_name)) or [algorithm]
    return tuple(chosen)


def _parse_algorithm(raw: Any, index: int) -> AlgorithmConfig:
    if isinstance(raw, str):
        return AlgorithmConfig(raw)
    path = f"algorithms[{index}]"
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path}: must be a name or a mapping with a name, got {quote(raw)}."
        )
    named = ("name", "label", "optimizer", "may_diverge")
    own = {k: v for k, v in raw.items() if k in named}
    arguments = {k: v for k, v in raw.items() if k not in own}
    return _parse(AlgorithmConfig, own | {"arguments": arguments}, path + ".")


def _parse(cls: type, raw: Any, path: str) -> Any:
    """Read a mapping into a dataclass: no unknown key, none missing, types right."""
    where = path.rstrip(".") or "the config"
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: must be a mapping of fields, got {quote(raw)}.")
    hints = typing.get_type_hints(cls)
    for key, value in raw.items():
        if key not in hints:
            raise unknown(f"{path}{key} = {quote(value)}", key, hints, "field")
    for f in dataclasses.fields(cls):
        required = f.default is f.default_factory is dataclasses.MISSING
        if required and f.name not in raw:
            raise ConfigError(f"{path}{f.name}: is required and missing.")
    values = {
        key: check_value(value, hints[key], path + key) for key, value in raw.items()
    }
    return cls(**values)


def check_value(value: Any, hint: Any, name: str) -> Any:
    """Check a value of a config against a type hint.

    Args:
        value: as read from YAML.
        hint: ``int``, ``float``, ``str``, ``bool``, a ``Literal``, a dataclass, a union
            of such, or anything else, which is not checked.
        name: of the field, for the error.

    Returns:
        The value; an int as a float where a float is due.

    Raises:
        ConfigError: if it does not fit.
    """
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _parse(hint, value, name + ".")
    if typing.get_origin(hint) is Literal:
        valid = typing.get_args(hint)
        if value not in valid:
            raise unknown(name, value, map(str, valid), "choice")
        return value
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [p for p in typing.get_args(hint) if p is not type(None)]
        if value is None and len(parts) < len(typing.get_args(hint)):
            return None
        origins = [typing.get_origin(part) for part in parts]
        if isinstance(value, list) and Sequence in origins:
            return value
        checkable = [p for p in parts if _checkable(p)]
        if len(checkable) == 1 and (len(parts) == 1 or checkable != [str]):
            return check_value(value, checkable[0], name)
        return value
    if hint in (int, float, str, bool):
        is_number_as_bool = isinstance(value, bool) and hint is not bool
        accepted = (int, float) if hint is float else hint
        if not isinstance(value, accepted) or is_number_as_bool:
            words = {int: "a whole number", float: "a number", str: "text"}
            expected = words.get(hint, "true or false")
            raise ConfigError(f"{name}: must be {expected}, got {quote(value)}.")
        if hint is float and isinstance(value, int | float):
            return _finite(value, name)
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ConfigError(f"{name}: must fit in 64 bits, got {quote(value)}.")
    return value


def _finite(value: int | float, name: str) -> float:
    try:
        number = float(value)
    except OverflowError:  # an int
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(f"{name}: must be a finite number, got {quote(value)}.")
    return number


def _checkable(hint: Any) -> bool:
    return (
        hint in (int, float, str, bool)
        or dataclasses.is_dataclass(hint)
        or typing.get_origin(hint) is Literal
    )


# --- writing ---


def _as_yaml(algorithm: AlgorithmConfig) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": algorithm.name, "label": algorithm.label}
    if algorithm.optimizer is not None:
        entry["optimizer"] = _set_fields(algorithm.optimizer)
    if algorithm.may_diverge:
        entry["may_diverge"] = True
    return entry | dict(algorithm.arguments)


def _set_fields(optimizer: OptimizerConfig) -> dict[str, Any]:
    own = {"name": optimizer.name, "learning_rate": optimizer.learning_rate}
    return own | optimizer.arguments()


def dump(config: ExperimentConfig) -> str:
    """Write a config as YAML that :func:`load` reads back to an equal one."""
    raw = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if config.optimizer == OptimizerConfig():
        del raw["optimizer"]
    else:
        raw["optimizer"] = _set_fields(config.optimizer)
    raw["algorithms"] = [_as_yaml(a) for a in config.algorithms]
    raw["claims"] = list(config.claims)
    for name in ("claims", "resume_from"):
        if not raw[name]:
            del raw[name]
    return yaml.safe_dump(raw, sort_keys=False)


def identity(config: ExperimentConfig) -> dict[str, Any]:
    """Collect what decides the numbers of a run: its one algorithm and its setting.

    Left out is what does not: names, the output folder, how often a checkpoint is
    written, how many processes there are. Two runs with one identity have equal
    metrics, bit for bit, on one machine.

    Args:
        config: of one run, with one algorithm, resolved.
    """
    (algorithm,) = config.algorithms
    own = _as_yaml(algorithm)
    del own["label"]
    own.pop("optimizer", None)
    optimizer = algorithm.optimizer or config.optimizer
    skips = {"on_nan": "skip"} if config.on_nan == "skip" else {}
    origin = {"resume_from": config.resume_from} if config.resume_from else {}
    return (
        skips
        | origin
        | {
            "task": config.task,
            "workers": config.workers,
            "where": config.where,
            "sharding": config.sharding,
            "steps": config.steps,
            "batch_size": config.batch_size,
            "seed": config.seed,
            "eval_every": config.eval_every,
            "optimizer": _set_fields(optimizer),
            "algorithm": own,
        }
    )


def run_name(config: ExperimentConfig) -> str:
    """Name the folder of a run: ``<label>-<hash of the identity>-s<seed>``."""
    facts = identity(config)
    seed = facts.pop("seed")
    text = json.dumps(facts, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{config.algorithms[0].label}-{digest}-s{seed}"
