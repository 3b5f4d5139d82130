"""One entry for exact predictions: an algorithm by name, on a quadratic."""

import inspect
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from bagua_jax import topologies
from bagua_jax.compressors import Compressor, identity
from bagua_jax.theory import mixing, modes, moments
from bagua_jax.theory.compression import EXACT, Message, message, payload_bytes
from bagua_jax.theory.problems import Quadratic
from bagua_jax.topologies import Topology

__all__ = ["COVERED", "Prediction", "predict", "trajectory"]


class Prediction(NamedTuple):
    r"""What is known exactly of an algorithm on a quadratic.

    Attributes:
        rate: factor a step of :math:`E\|x - x^\star\|^2`, in the long run; 1 or more
            where it diverges.
        floor: where :math:`\tfrac1n \sum_i E\|x_i - x^\star\|^2` comes to rest;
            infinite where it diverges. Of local methods right after they average.
        consensus: the part of it that is :math:`\tfrac1n \sum_i E\|x_i - \bar x\|^2`.
        largest_learning_rate: the threshold of stability in mean square.
        bytes_per_step: what a worker sends, on average over steps.
        steps_to_target: steps until the error is at most the target; infinite where it
            never is; ``None`` without a target.
        bytes_to_target: what a worker sends until then.
    """

    rate: float
    floor: float
    consensus: float
    largest_learning_rate: float
    bytes_per_step: float
    steps_to_target: float | None = None
    bytes_to_target: float | None = None


class _Setting(NamedTuple):
    """What a model is told beside its options."""

    name: str
    n: int
    d: int
    momentum: float


class _Model(NamedTuple):
    """A covered algorithm, ready to be evaluated."""

    make: Callable[[float, float], modes.Modes]  # (curvature, learning rate)
    bytes_per_step: float
    spectrum: mixing.Spectrum | None = None  # None: all workers average exactly


def predict(
    algorithm: str,
    problem: Quadratic,
    options: Mapping[str, Any] | None = None,
    *,
    learning_rate: float,
    momentum: float = 0.0,
    start: Any = 0.0,
    target: float | None = None,
) -> Prediction:
    r"""Predict how an algorithm behaves on a quadratic: exact values, no bounds.

    Args:
        algorithm: its name in the registry.
        problem: all workers with the same curvature, and targets and noise of any kind.
        options: as the algorithm's factory takes them; ``axis_name`` and ``seed`` do
            not matter.
        learning_rate: gamma of the SGD beside it.
        momentum: beta of that SGD, heavy ball, not Nesterov.
        start: x_0, equal on all workers; a number or [d].
        target: a value of :math:`\tfrac1n \sum_i E\|x_i - x^\star\|^2` to reach.

    Returns:
        The prediction.

    Raises:
        ValueError: for what is not covered, with the reason.

    Example:
        >>> from bagua_jax.theory import problems
        >>> problem = problems.quadratic(8, [1.0], sigma=1.0)
        >>> found = predict("gradient_allreduce", problem, learning_rate=0.5)
        >>> round(found.rate, 4), round(found.floor, 6), found.largest_learning_rate
        (0.25, 0.041667, 2.0)
    """
    case = _case(algorithm, problem, options, learning_rate, momentum, start)
    parts = [part for part, *_ in case.parts]
    floor = consensus = math.inf
    if all(part.stable for part in parts):
        steady = [
            part.steady(offsets, problem.sigma) for part, _, offsets in case.parts
        ]
        floor = sum(energies.total for energies in steady)
        consensus = sum(energies.consensus for energies in steady)
    model = case.model
    prediction = Prediction(
        rate=max(part.rate for part in parts),
        floor=floor,
        consensus=consensus,
        largest_learning_rate=moments.stable_learning_rate(
            model.make, list(problem.curvature[0])
        ),
        bytes_per_step=model.bytes_per_step,
    )
    if target is None:
        return prediction
    limit = 200_000 if floor < target else 1_000  # it may dip below before it rests
    steps = math.inf
    for t, energies in itertools.islice(_energies(case, problem), limit):
        if energies.total <= target:
            steps = t
            break
    return prediction._replace(
        steps_to_target=steps,
        bytes_to_target=steps * model.bytes_per_step if steps else 0.0,
    )


def trajectory(
    algorithm: str,
    problem: Quadratic,
    options: Mapping[str, Any] | None = None,
    *,
    learning_rate: float,
    steps: int,
    momentum: float = 0.0,
    start: Any = 0.0,
) -> list[tuple[int, moments.Energies]]:
    """Predict the expected squared errors of every step: exact values, no bounds.

    Args:
        algorithm: as in :func:`predict`.
        problem: as in :func:`predict`.
        options: as in :func:`predict`.
        learning_rate: as in :func:`predict`.
        steps: the last step.
        momentum: as in :func:`predict`.
        start: as in :func:`predict`.

    Returns:
        (steps taken, energies): of every step, for local methods of every average.

    Example:
        >>> from bagua_jax.theory import problems
        >>> problem = problems.quadratic(2, [1.0])
        >>> path = trajectory("local_sgd", problem, {"local_steps": 2},
        ...                   learning_rate=0.5, steps=4, start=1.0)
        >>> [(t, round(energies.total, 9)) for t, energies in path]
        [(0, 1.0), (2, 0.0625), (4, 0.00390625)]
    """
    case = _case(algorithm, problem, options, learning_rate, momentum, start)
    path = _energies(case, problem)
    return list(itertools.takewhile(lambda at: at[0] <= steps, path))


class _Case(NamedTuple):
    """A model on a problem: for each curvature its moments, start and targets."""

    model: _Model
    parts: list[tuple[moments.ModeMoments, np.ndarray, np.ndarray]]


def _case(algorithm, problem, options, learning_rate, momentum, start) -> _Case:
    if algorithm not in COVERED:
        why = _REASONS.get(algorithm, "no model of it is written")
        raise _refusal(algorithm, f"{why}. Covered are {', '.join(COVERED)}")
    if not problem.equal_curvature:
        raise _refusal(
            algorithm,
            "workers differ in curvature, so that modes of W mix. Give all the same, "
            "or see modes.local_sgd_fixed_point for the bias of local steps",
        )
    setting = _Setting(algorithm, problem.n, problem.d, momentum)
    model = _model(setting, dict(options or {}))
    spectrum = model.spectrum or mixing.spectrum(topologies.complete(problem.n))
    curvature = problem.curvature[0]
    offsets = spectrum.to_modes(problem.target)
    begin = spectrum.to_modes(np.broadcast_to(np.asarray(start, float), offsets.shape))
    parts = []
    for h in np.unique(curvature):
        part = moments.ModeMoments(model.make(float(h), learning_rate))
        parts.append((part, begin[:, curvature == h], offsets[:, curvature == h]))
    return _Case(model, parts)


def _energies(case: _Case, problem: Quadratic):
    """Return (steps taken, energies summed over elements), for ever."""
    stride = case.parts[0][0].modes.steps
    paths = [
        part.energies(start, offsets, problem.sigma)
        for part, start, offsets in case.parts
    ]
    for k, each in enumerate(zip(*paths, strict=True)):
        mean, consensus = sum(e.mean for e in each), sum(e.consensus for e in each)
        yield k * stride, moments.Energies(mean, consensus)


def _model(setting: _Setting, options: dict[str, Any]) -> _Model:
    options.pop("axis_name", None)
    options.pop("seed", None)
    bucket_bytes = options.pop("bucket_bytes", math.inf)
    if bucket_bytes < 4 * setting.d:
        raise _refusal(
            setting.name,
            f"a bucket of {bucket_bytes} bytes does not hold the {setting.d} elements. "
            "Leave bucket_bytes out",
        )
    make = COVERED[setting.name]
    try:
        inspect.signature(make).bind(setting, **options)
    except TypeError as error:
        raise _refusal(setting.name, f"its options do not fit: {error}") from None
    return make(setting, **options)


def _refusal(name: str, why: str) -> ValueError:
    return ValueError(f"predict: {name!r} is not covered: {why}.")


# --- what is common -------------------------------------------------------------------


def _allreduce(setting: _Setting, payload: float | None = None) -> float:
    """Bytes of a ring all-reduce; of float32 parameters where no payload is given."""
    payload = 4 * setting.d if payload is None else payload
    return 2 * (setting.n - 1) / setting.n * payload


def _no_momentum(setting: _Setting) -> None:
    if setting.momentum:
        raise _refusal(
            setting.name, "its model has no momentum in the local steps. Set it to 0"
        )


def _only(setting: _Setting, name: str, value: Any, covered: Any) -> None:
    if value != covered:
        raise _refusal(
            setting.name, f"only {name}={covered!r} has a model, got {value!r}"
        )


def _graph(
    setting: _Setting, topology: str | Topology, sent: Message = EXACT
) -> tuple[Topology, mixing.Spectrum]:
    graph = topologies.resolve(topology, setting.n, "predict")
    if graph.period != 1:
        raise _refusal(
            setting.name, f"{graph.name!r} rotates, and its matrices share no modes"
        )
    if not graph.doubly_stochastic:
        raise _refusal(setting.name, f"{graph.name!r} does not preserve the mean")
    spectrum = mixing.spectrum(graph)
    if sent.variance and not spectrum.even:
        raise _refusal(
            setting.name,
            f"workers of {graph.name!r} are not alike, so that compression errors "
            "mix modes. Use moments.lift on the whole network, or a ring or torus",
        )
    return graph, spectrum


def _gossip(
    setting: _Setting,
    make: Callable[..., modes.Modes],
    topology: str | Topology,
    compressor: Compressor | None = None,
    **options: Any,
) -> _Model:
    """A model on W's eigenvalues, with a message to each neighbour."""
    sent = message(compressor, setting.d)
    graph, spectrum = _graph(setting, topology, sent)
    if compressor is not None:
        options["message"] = sent
    each = payload_bytes(compressor or identity(), setting.d)
    exact_mean = compressor is None and graph.name == "complete"
    return _Model(
        lambda h, gamma: make(spectrum.eigenvalues, h, gamma, **options),
        _allreduce(setting) if exact_mean else graph.messages * each,
        spectrum,
    )


def _gathered(setting: _Setting, compressor: Compressor, plan: str) -> float:
    payload = payload_bytes(compressor, setting.d)
    if plan == "linear_sum":
        return _allreduce(setting, payload)
    return (setting.n - 1) * payload


# --- the algorithms, with their options -----------------------------------------------


def _gradient_allreduce(setting: _Setting) -> _Model:
    return _Model(
        lambda h, gamma: modes.gradient_allreduce(
            setting.n, h, gamma, momentum=setting.momentum
        ),
        _allreduce(setting),
    )


def _compressed_mean(
    setting: _Setting,
    *,
    compressor: Compressor,
    plan: str | None = None,
    error_feedback: str = "auto",
    unsafe: bool = False,
) -> _Model:
    del unsafe  # the arithmetic is the same
    sent = message(compressor, setting.d)
    if plan is None and compressor.facts.linear:
        plan = "linear_sum"
    if plan not in ("all_gather", "linear_sum"):
        raise _refusal(
            setting.name,
            f"plan {plan or 'scatter_reduce'!r} compresses sums once more. Pass "
            "plan='all_gather'",
        )
    if error_feedback == "auto":
        error_feedback = "none" if compressor.facts.unbiased else "worker"
    return _Model(
        lambda h, gamma: modes.compressed_mean(
            setting.n,
            h,
            gamma,
            message=sent,
            error_feedback=error_feedback == "worker",
            common=plan == "linear_sum",
            momentum=setting.momentum,
        ),
        _gathered(setting, compressor, plan),
    )


def _diana(
    setting: _Setting, *, compressor: Compressor, alpha: float | None = None
) -> _Model:
    return _difference_coding(setting, modes.diana, compressor, alpha=alpha)


def _ef21(setting: _Setting, *, compressor: Compressor) -> _Model:
    return _difference_coding(setting, modes.ef21, compressor)


def _difference_coding(setting, make, compressor, **options) -> _Model:
    sent = message(compressor, setting.d)
    plan = "linear_sum" if compressor.facts.linear else "all_gather"
    return _Model(
        lambda h, gamma: make(
            setting.n,
            h,
            gamma,
            message=sent,
            common=compressor.facts.linear,
            momentum=setting.momentum,
            **options,
        ),
        _gathered(setting, compressor, plan),
    )


def _delayed_gradients(setting: _Setting, *, staleness: Any = 1) -> _Model:
    if not isinstance(staleness, int):
        raise _refusal(setting.name, "a trace of delays changes the step with time")
    return _Model(
        lambda h, gamma: modes.delayed_gradients(
            setting.n, h, gamma, staleness=staleness, momentum=setting.momentum
        ),
        _allreduce(setting),
    )


def _decentralized(
    setting: _Setting,
    *,
    topology: str | Topology = "ring",
    local_steps: int = 1,
    combine: str = "before",
) -> _Model:
    _only(setting, "local_steps", local_steps, 1)
    return _gossip(
        setting,
        modes.decentralized,
        topology,
        combine=combine,
        momentum=setting.momentum,
    )


def _stochastic_gradient_push(
    setting: _Setting, *, topology: str | Topology = "one_peer_exponential"
) -> _Model:
    model = _decentralized(setting, topology=topology, combine="after")
    graph = topologies.resolve(topology, setting.n, "predict")
    mass = _allreduce(setting, 4) if graph.name == "complete" else 4 * graph.messages
    return model._replace(bytes_per_step=model.bytes_per_step + mass)


def _exact_diffusion(setting: _Setting, *, topology: str | Topology = "ring") -> _Model:
    return _gossip(setting, modes.exact_diffusion, topology, momentum=setting.momentum)


def _d2(setting: _Setting, *, topology: str | Topology) -> _Model:
    return _gossip(setting, modes.d2, topology, momentum=setting.momentum)


def _gradient_tracking(
    setting: _Setting, *, topology: str | Topology = "ring"
) -> _Model:
    _no_momentum(setting)
    model = _gossip(setting, modes.gradient_tracking, topology)
    return model._replace(bytes_per_step=2 * model.bytes_per_step)


def _low_precision_decentralized(
    setting: _Setting,
    *,
    compressor: Compressor,
    topology: str | Topology = "ring",
    local_steps: int = 1,
) -> _Model:
    _only(setting, "local_steps", local_steps, 1)
    return _gossip(
        setting,
        modes.low_precision_decentralized,
        topology,
        compressor,
        momentum=setting.momentum,
    )


def _choco_sgd(
    setting: _Setting,
    *,
    compressor: Compressor,
    consensus_step_size: float,
    topology: str | Topology = "ring",
) -> _Model:
    return _gossip(
        setting,
        modes.choco_sgd,
        topology,
        compressor,
        consensus_step_size=consensus_step_size,
        momentum=setting.momentum,
    )


def _delayed_choco(
    setting: _Setting,
    *,
    compressor: Compressor,
    consensus_step_size: float,
    topology: str | Topology = "ring",
    staleness: int = 1,
) -> _Model:
    return _gossip(
        setting,
        modes.delayed_choco,
        topology,
        compressor,
        consensus_step_size=consensus_step_size,
        staleness=staleness,
        momentum=setting.momentum,
    )


def _deep_squeeze(
    setting: _Setting,
    *,
    compressor: Compressor,
    consensus_step_size: float,
    topology: str | Topology = "ring",
) -> _Model:
    return _gossip(
        setting,
        modes.deep_squeeze,
        topology,
        compressor,
        consensus_step_size=consensus_step_size,
        momentum=setting.momentum,
    )


def _local_sgd(setting: _Setting, *, local_steps: int, warmup_steps: int = 0) -> _Model:
    _no_momentum(setting)
    _only(setting, "warmup_steps", warmup_steps, 0)
    return _Model(
        lambda h, gamma: modes.local_sgd(setting.n, h, gamma, local_steps=local_steps),
        _allreduce(setting) / local_steps,
    )


def _async_model_average(
    setting: _Setting, *, local_steps: int, staleness: int = 0, warmup_steps: int = 0
) -> _Model:
    _no_momentum(setting)
    _only(setting, "warmup_steps", warmup_steps, 0)
    return _Model(
        lambda h, gamma: modes.async_model_average(
            setting.n, h, gamma, local_steps=local_steps, staleness=staleness
        ),
        _allreduce(setting) / local_steps,
    )


def _slowmo(
    setting: _Setting,
    *,
    local_steps: int,
    outer_momentum: float = 0.5,
    outer_learning_rate: float = 1.0,
    learning_rate: float | None = None,
) -> _Model:
    del learning_rate  # gamma of the SGD, which is known
    _no_momentum(setting)
    return _Model(
        lambda h, gamma: modes.slowmo(
            setting.n,
            h,
            gamma,
            local_steps=local_steps,
            outer_momentum=outer_momentum,
            outer_learning_rate=outer_learning_rate,
        ),
        _allreduce(setting) / local_steps,
    )


def _diloco(
    setting: _Setting,
    *,
    local_steps: int,
    outer_learning_rate: float = 0.7,
    outer_momentum: float = 0.9,
    compressor: Compressor | None = None,
) -> _Model:
    _no_momentum(setting)
    _only(setting, "compressor", compressor, None)
    return _Model(
        lambda h, gamma: modes.diloco(
            setting.n,
            h,
            gamma,
            local_steps=local_steps,
            outer_learning_rate=outer_learning_rate,
            outer_momentum=outer_momentum,
        ),
        _allreduce(setting) / local_steps,
    )


COVERED: dict[str, Callable[..., _Model]] = {
    "gradient_allreduce": _gradient_allreduce,
    "compressed_mean": _compressed_mean,
    "diana": _diana,
    "ef21": _ef21,
    "delayed_gradients": _delayed_gradients,
    "decentralized": _decentralized,
    "stochastic_gradient_push": _stochastic_gradient_push,
    "exact_diffusion": _exact_diffusion,
    "d2": _d2,
    "gradient_tracking": _gradient_tracking,
    "low_precision_decentralized": _low_precision_decentralized,
    "choco_sgd": _choco_sgd,
    "delayed_choco": _delayed_choco,
    "deep_squeeze": _deep_squeeze,
    "local_sgd": _local_sgd,
    "async_model_average": _async_model_average,
    "slowmo": _slowmo,
    "diloco": _diloco,
}
"""What can be predicted, by the names of the algorithms' registry."""

_ROUNDING = "its codec rounds, which is not linear, and its error depends on the vector"
_ADAPTIVE = "its step is divided by a running second moment, which is not linear"
_REASONS = {
    "bytegrad": _ROUNDING,
    "qadam": _ADAPTIVE,
    "one_bit_adam": _ADAPTIVE + "; modes.frozen_adam models it after the freeze",
    "one_bit_lamb": _ADAPTIVE,
    "zero_one_adam": _ADAPTIVE,
    "signum": "a vote of signs is not linear in the gradients",
    "demo": "the sign of what it sends is not linear in the gradients",
    "powersgd": "what it keeps depends on the matrix; see "
    "compression.subspace_contraction for a fixed one",
    "dgc": "which elements are largest is not linear in the gradients",
    "marina": "its coin ties all elements together; moments.marina has its second "
    "moments for equal curvature",
    "moniqua": _ROUNDING,
    "adasum": "its weights depend on the gradients' angles",
    "quantized_gossip": "errors of whole models do not shrink; modes.quantized_gossip "
    "models additive ones",
    "ecd_psgd": "its weights change with every step; moments.ecd_error_variance has "
    "the variance of its estimates",
}
