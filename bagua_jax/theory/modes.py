r"""Linear algorithms on quadratics, one small linear system for each mode of W.

On :math:`f_i(x) = \tfrac h2 \|x - b_i\|^2` with equal curvature h, the coefficients of
all workers' states in one eigenvector of W (a *mode*) evolve by themselves:

.. math::
    s_{t+1} = A s_t + N u_t + c\,\varepsilon_t,\qquad x_t = e_1^\top s_t,\qquad
    z_t = r^\top s_t + \rho^\top u_t

Here u is what the gradients hold beside h x (noise, and -h b_k), z what is compressed,
and :math:`\varepsilon` its compression error. Each algorithm is written once, as its
step; the matrices are read off by applying it to unit vectors. The roots of its mode
polynomial are the eigenvalues of A.

Models follow the algorithms of ``bagua_jax.algorithms`` beside SGD, step for step, and
have their names.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bagua_jax.theory.compression import EXACT, Message

__all__ = [
    "Form",
    "Modes",
    "async_model_average",
    "choco_sgd",
    "compressed_mean",
    "d2",
    "decentralized",
    "deep_squeeze",
    "delayed_choco",
    "delayed_gradients",
    "diana",
    "diloco",
    "ef21",
    "exact_diffusion",
    "frozen_adam",
    "gradient_allreduce",
    "gradient_tracking",
    "largest_stable",
    "local_sgd",
    "local_sgd_fixed_point",
    "low_precision_decentralized",
    "quantized_gossip",
    "slowmo",
]

Form = np.ndarray
"""A linear form for each mode, [m, states + noises + 1]: what a variable of a step is
made of. Sums and multiples of forms are sums and multiples of arrays."""

_MARGIN = 1e-12  # from 1, of what counts as stable


class Modes(NamedTuple):
    """The systems of all modes; the mean's is the first.

    Attributes:
        transition: A [m, b, b]; unreachable parts of the state are projected out.
        noise: N [m, b, p], of p independent gradients a transition.
        start: [m, b], the state when x_0 is 1.
        answer: c [m, b], how a compression error enters.
        argument: r [m, b], what is compressed.
        argument_noise: rho [m, p].
        message: the compressor.
        common: whether all workers draw one mask.
        curvature: h.
        steps: optimizer steps of a transition, H for local methods.
    """

    transition: np.ndarray
    noise: np.ndarray
    start: np.ndarray
    answer: np.ndarray
    argument: np.ndarray
    argument_noise: np.ndarray
    message: Message
    common: bool
    curvature: float
    steps: int

    @property
    def drive(self) -> np.ndarray:
        """Response to a constant u, [m, b]."""
        return self.noise.sum(-1)

    @property
    def poles(self) -> np.ndarray:
        """Roots of the mode polynomials, [m, b], the largest modulus first."""
        found = np.linalg.eigvals(self.transition)
        order = np.argsort(-np.abs(found), axis=1, kind="stable")
        return np.take_along_axis(found, order, axis=1)

    @property
    def polynomials(self) -> np.ndarray:
        """Coefficients of the mode polynomials, [m, b + 1], that of z^b first."""
        return np.stack([np.poly(a) for a in self.transition])

    @property
    def rate(self) -> float:
        """Factor a step of the expected state's distance to its fixed point."""
        return float(np.abs(self.poles).max(initial=0.0)) ** (1 / self.steps)

    @property
    def stable(self) -> bool:
        """Whether the expected state comes to a fixed point."""
        return float(np.abs(self.poles).max(initial=0.0)) < 1 - _MARGIN

    def select(self, which: Any) -> "Modes":
        """Take some modes, such as ``slice(1, None)``: disagreement alone."""
        return self._replace(
            transition=self.transition[which],
            noise=self.noise[which],
            start=self.start[which],
            answer=self.answer[which],
            argument=self.argument[which],
            argument_noise=self.argument_noise[which],
        )

    def without_mean(self) -> "Modes":
        """Take out the mean that gossip alone conserves: the pole at 1 of mode 0.

        Raises:
            ValueError: if there is none, as where gradients pull; or if it is what is
                compressed, so that errors depend on it.
        """
        a, b = self.transition[0], self.transition.shape[-1]
        values, right = np.linalg.eig(a)
        k = int(np.argmin(np.abs(values - 1)))
        left = np.linalg.inv(right)[k]
        sent = self.argument[0] @ right[:, k]
        if abs(values[k] - 1) > 1e-9 or abs(sent) > 1e-9:
            raise ValueError(
                "without_mean: the mean is not conserved, or errors depend on it; the "
                f"poles of mode 0 are {values.round(6).tolist()}. Set the curvature "
                "to 0."
            )
        rest = np.eye(b) - np.outer(right[:, k], left)

        def first(stack, value):
            return np.concatenate([value[None], stack[1:]])

        return self._replace(
            transition=first(self.transition, a @ rest),
            noise=first(self.noise, rest @ self.noise[0]),
            start=first(self.start, rest @ self.start[0]),
            answer=first(self.answer, rest @ self.answer[0]),
            argument=first(self.argument, self.argument[0] @ rest),
        )

    def fixed_point(self, offsets: np.ndarray) -> np.ndarray:
        """Return the expected state that stays, [m, b, ...].

        Args:
            offsets: b_k [m, ...], the coefficients of the workers' targets.
        """
        offsets = np.asarray(offsets)
        identity = np.eye(self.transition.shape[-1])
        unit = np.linalg.solve(identity - self.transition, self.drive[..., None])[
            ..., 0
        ]
        shape = unit.shape + (1,) * (offsets.ndim - 1)
        return unit.reshape(shape) * (-self.curvature * offsets)[:, None]

    @property
    def bias(self) -> np.ndarray:
        """Fixed point of x in each mode when b_k is 1, [m]: 1 for the mean, if exact.

        In the modes of disagreement 0 means no bias from heterogeneity.
        """
        return self.fixed_point(np.ones(len(self.transition)))[:, 0]

    @property
    def variance(self) -> np.ndarray:
        """Steady variance of x in each mode, [m], for noise of variance 1.

        Without compression error; for that see :mod:`bagua_jax.theory.moments`. The
        mean model's variance is that of mode 0, divided by n.
        """
        source = self.noise @ np.swapaxes(self.noise.conj(), -1, -2)
        return np.real(solve_stein(self.transition, source)[:, 0, 0])


def solve_stein(a: np.ndarray, source: np.ndarray, z: float = 1.0) -> np.ndarray:
    r"""Solve :math:`z S - A S A^* = Q` for stacked [m, b, b] matrices."""
    m, b, _ = a.shape
    kron = (a[:, :, None, :, None] * a.conj()[:, None, :, None, :]).reshape(
        m, b * b, b * b
    )
    right = source.reshape(m, b * b, 1)
    return np.linalg.solve(z * np.eye(b * b) - kron, right).reshape(m, b, b)


# --- tracing a step -------------------------------------------------------------------


class _Step:
    """What a step may do with its variables; counts the gradients that it takes."""

    def __init__(self, eigenvalues, curvature, learning_rate, momentum, compressor):
        self.eigenvalues = np.atleast_1d(np.asarray(eigenvalues))[:, None]
        self.is_mean = np.arange(len(self.eigenvalues))[:, None] == 0
        self.curvature, self.learning_rate = curvature, learning_rate
        self.momentum, self.message = momentum, compressor
        self.noises: list[Form] = []
        self.error: Form = np.zeros(1)
        self.argument: Form | None = None
        self.taken = 0

    def gradient(self, x: Form) -> Form:
        """Take a gradient at x: h x + u, with a u of its own."""
        self.taken += 1
        return self.curvature * x + self.noises[self.taken - 1]

    def adapt(self, x: Form, velocity: Form) -> tuple[Form, Form]:
        """Step as SGD with heavy-ball momentum does."""
        velocity = self.momentum * velocity + self.gradient(x)
        return x - self.learning_rate * velocity, velocity

    def mix(self, x: Form) -> Form:
        """Mix with neighbours: lambda x."""
        return self.eigenvalues * x

    def mean(self, x: Form) -> Form:
        """Average over all workers: x in the mean's mode, 0 in the others."""
        return np.where(self.is_mean, x, 0)

    def compress(self, z: Form) -> Form:
        """Compress: q z, and an error."""
        self.argument = z
        return self.message.kept * z + self.error


def _linearize(
    step: Callable[..., tuple[Form, ...]],
    start: tuple[float, ...],
    eigenvalues: Any,
    curvature: float,
    learning_rate: float,
    *,
    momentum: float = 0.0,
    message: Message = EXACT,
    common: bool = False,
    gradients: int = 1,
    steps: int = 1,
) -> Modes:
    """Read the matrices of a step off its values at unit vectors.

    Where ``eigenvalues`` is a number of workers, all start from equal parameters.
    """
    equal = isinstance(eigenvalues, int)
    eigenvalues = np.eye(eigenvalues)[0] if equal else eigenvalues
    ops = _Step(eigenvalues, curvature, learning_rate, momentum, message)
    m, b, p = len(ops.eigenvalues), len(start), gradients
    units = np.broadcast_to(np.eye(b + p + 1)[:, None], (b + p + 1, m, b + p + 1))
    ops.noises, ops.error = list(units[b : b + p]), units[-1]
    after = np.stack(step(ops, *units[:b]), axis=1)  # [m, b, b + p + 1]
    argument = np.zeros((m, b + p + 1)) if ops.argument is None else ops.argument
    assert ops.taken == gradients
    starts = np.ones((m, 1)) * start * (ops.is_mean if equal else 1)
    a, noise, answer = after[..., :b], after[..., b : b + p], after[..., -1]

    # States that nothing reads are dropped, such as a velocity without momentum; what
    # nothing reaches is projected out, such as conserved parts that start at zero.
    read = np.abs(a).sum((0, 1)) + np.abs(argument[:, :b]).sum(0) > 0
    read[0] = True
    a, noise = a[:, read][:, :, read], noise[:, read]
    answer, starts = answer[:, read], starts[:, read]
    reached = _reachable(
        a, np.concatenate([starts[..., None], noise, answer[..., None]], -1)
    )
    return Modes(
        transition=a @ reached,
        noise=noise,
        start=starts,
        answer=answer,
        argument=argument[:, :b][:, read],
        argument_noise=argument[:, b : b + p],
        message=message,
        common=common,
        curvature=curvature,
        steps=steps,
    )


def _reachable(a: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """Orthogonal projector [m, b, b] on the states that inputs can lead to.

    What cancels to less than 1e-7 is taken for zero: its direction is rounding noise.
    """

    def unit(columns, least=1e-7):
        length = np.linalg.norm(columns, axis=-2, keepdims=True)
        small = length <= least
        return np.where(small, 0, columns / np.where(small, 1, length))

    powers = [unit(inputs, 0.0)]
    for _ in range(a.shape[-1] - 1):
        powers.append(unit(a @ powers[-1]))
    left, size, _ = np.linalg.svd(np.concatenate(powers, -1), full_matrices=False)
    left = left * (size > 1e-6 * size[:, :1])[:, None]
    return left @ np.swapaxes(left.conj(), -1, -2)


def largest_stable(is_stable: Callable[[float], bool], upper: float) -> float:
    """Find where stability ends: the first parameter, from 0 on, that is not stable.

    Args:
        is_stable: of a positive parameter.
        upper: an estimate of what is certainly too large.

    Returns:
        The threshold, to about 1e-11 of itself; infinite if even ``upper`` is stable, 0
        if everything down to 1e-4 ``upper`` is unstable.

    Example:
        >>> round(largest_stable(lambda a: abs(1 - a) < 1, 10.0), 9)
        2.0
    """
    low = 0.0
    for high in upper * np.append(np.geomspace(1e-4, 0.1, 13), np.linspace(0.1, 1, 46)):
        if not is_stable(float(high)):
            break
        low = float(high)
    else:
        return math.inf
    high = float(high)
    while low and high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if is_stable(middle) else (low, middle)
        if middle in (low, high) and (low + high) / 2 == middle:
            break
    return high if low else 0.0


# --- gradient side: parameters are equal on all workers -------------------------------


def gradient_allreduce(
    n: int, curvature: float, learning_rate: float, *, momentum: float = 0.0
) -> Modes:
    """Model SGD on the mean gradient, with heavy-ball momentum.

    Args:
        n: number of workers.
        curvature: h.
        learning_rate: gamma.
        momentum: beta of SGD.

    Example:
        >>> heavy_ball = gradient_allreduce(2, 1.0, 0.5, momentum=0.25)
        >>> heavy_ball.polynomials[0].round(6).tolist()  # z^2 - (1 + beta - a) z + beta
        [1.0, -0.75, 0.25]
    """

    def step(ops, x, velocity):
        velocity = momentum * velocity + ops.mean(ops.gradient(x))
        return x - learning_rate * velocity, velocity

    return _linearize(step, (1, 0), n, curvature, learning_rate)


def compressed_mean(
    n: int,
    curvature: float,
    learning_rate: float,
    *,
    message: Message = EXACT,
    error_feedback: bool = False,
    common: bool = False,
    momentum: float = 0.0,
) -> Modes:
    """Model a mean of compressed gradients, with error feedback at the worker or not.

    Args:
        n: number of workers.
        curvature: h.
        learning_rate: gamma.
        message: the compressor.
        error_feedback: whether workers keep what they did not send.
        common: all workers draw one mask.
        momentum: beta of SGD.
    """

    def step(ops, x, velocity, error):
        corrected = ops.gradient(x) + error if error_feedback else ops.gradient(x)
        sent = ops.compress(corrected)
        velocity = momentum * velocity + ops.mean(sent)
        x = x - learning_rate * velocity
        return x, velocity, corrected - sent

    return _linearize(
        step,
        (1, 0, 0),
        n,
        curvature,
        learning_rate,
        message=message,
        common=common,
    )


def diana(
    n: int,
    curvature: float,
    learning_rate: float,
    *,
    message: Message,
    alpha: float | None = None,
    common: bool = False,
    momentum: float = 0.0,
) -> Modes:
    """Model DIANA: compressed differences to shifts that follow the gradients.

    Args:
        n: number of workers.
        curvature: h.
        learning_rate: gamma.
        message: an unbiased compressor.
        alpha: step of the shifts; 1/(1 + omega) where ``None``.
        common: all workers draw one mask.
        momentum: beta of SGD.
    """
    rate = 1 / (1 + message.variance) if alpha is None else alpha

    def step(ops, x, velocity, shift):
        sent = ops.compress(ops.gradient(x) - shift)
        velocity = momentum * velocity + ops.mean(shift + sent)
        return x - learning_rate * velocity, velocity, shift + rate * sent

    return _linearize(
        step,
        (1, 0, 0),
        n,
        curvature,
        learning_rate,
        message=message,
        common=common,
    )


def ef21(
    n: int,
    curvature: float,
    learning_rate: float,
    *,
    message: Message,
    common: bool = False,
    momentum: float = 0.0,
) -> Modes:
    """Model EF21: the mean of copies of the gradients, moved by what is sent.

    Args:
        n: number of workers.
        curvature: h.
        learning_rate: gamma.
        message: a contractive compressor.
        common: all workers draw one mask.
        momentum: beta of SGD.
    """
    return diana(
        n,
        curvature,
        learning_rate,
        message=message,
        alpha=1.0,
        common=common,
        momentum=momentum,
    )


def delayed_gradients(
    n: int,
    curvature: float,
    learning_rate: float,
    *,
    staleness: int,
    momentum: float = 0.0,
) -> Modes:
    """Model SGD on the mean gradient of tau steps ago.

    Args:
        n: number of workers.
        curvature: h.
        learning_rate: gamma.
        staleness: tau.
        momentum: beta of SGD.

    Example:
        >>> np.abs(delayed_gradients(2, 1.0, 0.25, staleness=1).poles[0]).round(6)
        array([0.5, 0.5])
    """

    def step(ops, x, velocity, *pending):
        due, *pending = (*pending, ops.mean(ops.gradient(x)))
        velocity = momentum * velocity + due
        return x - learning_rate * velocity, velocity, *pending

    start = (1, 0) + (0,) * staleness
    return _linearize(step, start, n, curvature, learning_rate)


def frozen_adam(
    n: int, curvature: float, learning_rate: float, *, second_moment: float, b1: float
) -> Modes:
    """Model 1-bit Adam and its kin after the freeze, without compression.

    Args:
        n: number of workers.
        curvature: h.
        learning_rate: gamma.
        second_moment: v of this element; the step is divided by its root.
        b1: decay of the momentum.
    """

    def step(ops, x, momentum):
        momentum = b1 * momentum + (1 - b1) * ops.mean(ops.gradient(x))
        return x - learning_rate / math.sqrt(second_moment) * momentum, momentum

    return _linearize(step, (1, 0), n, curvature, learning_rate)


# --- weight side: gossip --------------------------------------------------------------


def decentralized(
    eigenvalues: Any,
    curvature: float,
    learning_rate: float,
    *,
    combine: str = "before",
    momentum: float = 0.0,
) -> Modes:
    """Model D-PSGD: ``"before"`` mixes, then adapts (CTA); ``"after"`` the reverse.

    Args:
        eigenvalues: of W, that of the mean first.
        curvature: h.
        learning_rate: gamma.
        combine: the order.
        momentum: beta of the local SGD.

    Example:
        >>> decentralized([1.0, 0.5], 1.0, 0.25).poles[:, 0].real.tolist()  # lambda - a
        [0.75, 0.25]
    """

    def step(ops, x, velocity):
        adapted, velocity = ops.adapt(x, velocity)
        if combine == "before":
            return ops.mix(x) + (adapted - x), velocity
        return ops.mix(adapted), velocity

    return _linearize(
        step, (1, 0), eigenvalues, curvature, learning_rate, momentum=momentum
    )


def d2(
    eigenvalues: Any, curvature: float, learning_rate: float, *, momentum: float = 0.0
) -> Modes:
    """Model D2: W times the extrapolated models.

    Args:
        eigenvalues: of W, that of the mean first.
        curvature: h.
        learning_rate: gamma.
        momentum: beta of the local SGD.

    Example:
        >>> d2([1.0, 0.5], 1.0, 0.5).polynomials[1].round(6).tolist()
        [1.0, -0.75, 0.25]
    """

    def step(ops, x, velocity, old):
        adapted, velocity = ops.adapt(x, velocity)
        return ops.mix(adapted + x - old), velocity, adapted

    return _linearize(
        step, (1, 0, 1), eigenvalues, curvature, learning_rate, momentum=momentum
    )


def exact_diffusion(
    eigenvalues: Any, curvature: float, learning_rate: float, *, momentum: float = 0.0
) -> Modes:
    """Model exact diffusion: D2 on (I + W)/2.

    Args:
        eigenvalues: of W, that of the mean first.
        curvature: h.
        learning_rate: gamma.
        momentum: beta of the local SGD.
    """
    lazy = (1 + np.asarray(eigenvalues)) / 2
    return d2(lazy, curvature, learning_rate, momentum=momentum)


def gradient_tracking(
    eigenvalues: Any, curvature: float, learning_rate: float, *, combine: str = "after"
) -> Modes:
    r"""Model gradient tracking in two orders.

    ``"after"``: :math:`x' = W (x - \gamma y)`; ``"before"``: :math:`x' = W x - \gamma
    y`; in both :math:`y' = W y + g' - g`, with y the gradient at first.

    Args:
        eigenvalues: of W, that of the mean first.
        curvature: h.
        learning_rate: gamma.
        combine: the order.
    """

    def step(ops, x, lead):  # lead = y - g, so that every gradient is taken once
        gradient = ops.gradient(x)
        tracker = lead + gradient
        if combine == "before":
            x = ops.mix(x) - learning_rate * tracker
        else:
            x = ops.mix(x - learning_rate * tracker)
        return x, ops.mix(tracker) - gradient

    return _linearize(step, (1, 0), eigenvalues, curvature, learning_rate)


def low_precision_decentralized(
    eigenvalues: Any,
    curvature: float,
    learning_rate: float,
    *,
    message: Message = EXACT,
    momentum: float = 0.0,
) -> Modes:
    """Model DCD-PSGD: compressed differences to the last model, which all know.

    Args:
        eigenvalues: of W, that of the mean first.
        curvature: h.
        learning_rate: gamma.
        message: the compressor.
        momentum: beta of the local SGD.
    """

    def step(ops, x, velocity):
        adapted, velocity = ops.adapt(x, velocity)
        return x + ops.compress(adapted + ops.mix(x) - 2 * x), velocity

    return _linearize(
        step,
        (1, 0),
        eigenvalues,
        curvature,
        learning_rate,
        momentum=momentum,
        message=message,
    )


def choco_sgd(
    eigenvalues: Any,
    curvature: float,
    learning_rate: float,
    *,
    consensus_step_size: float,
    message: Message = EXACT,
    momentum: float = 0.0,
) -> Modes:
    """Model CHOCO-SGD.

    Args:
        eigenvalues: of W, that of the mean first.
        curvature: h; 0 for gossip alone.
        learning_rate: gamma.
        consensus_step_size: gamma_c.
        message: the compressor.
        momentum: beta of the local SGD.
    """
    return delayed_choco(
        eigenvalues,
        curvature,
        learning_rate,
        consensus_step_size=consensus_step_size,
        staleness=0,
        message=message,
        momentum=momentum,
    )


def delayed_choco(
    eigenvalues: Any,
    curvature: float,
    learning_rate: float,
    *,
    consensus_step_size: float,
    staleness: int = 1,
    message: Message = EXACT,
    momentum: float = 0.0,
) -> Modes:
    """Model CHOCO-SGD whose consensus step uses the public copies of tau steps ago.

    Args:
        eigenvalues: of W, that of the mean first.
        curvature: h.
        learning_rate: gamma.
        consensus_step_size: gamma_c.
        staleness: tau.
        message: the compressor.
        momentum: beta of the local SGD.
    """

    def step(ops, x, velocity, public, *known):
        x, velocity = ops.adapt(x, velocity)
        public = public + ops.compress(x - public)
        arrived, *known = (*known, public)
        x = x + consensus_step_size * (ops.mix(arrived) - arrived)
        return x, velocity, public, *known

    return _linearize(
        step,
        (1, 0, 0) + (0,) * staleness,
        eigenvalues,
        curvature,
        learning_rate,
        momentum=momentum,
        message=message,
    )


def deep_squeeze(
    eigenvalues: Any,
    curvature: float,
    learning_rate: float,
    *,
    consensus_step_size: float,
    message: Message = EXACT,
    momentum: float = 0.0,
) -> Modes:
    """Model DeepSqueeze: compressed models whose errors are fed back.

    Args:
        eigenvalues: of W, that of the mean first.
        curvature: h.
        learning_rate: gamma.
        consensus_step_size: eta.
        message: the compressor.
        momentum: beta of the local SGD.
    """

    def step(ops, x, velocity, error):
        x, velocity = ops.adapt(x, velocity)
        corrected = x + error
        sent = ops.compress(corrected)
        return (
            x + consensus_step_size * (ops.mix(sent) - sent),
            velocity,
            corrected - sent,
        )

    return _linearize(
        step,
        (1, 0, 0),
        eigenvalues,
        curvature,
        learning_rate,
        momentum=momentum,
        message=message,
    )


def quantized_gossip(eigenvalues: Any) -> Modes:
    """Model mixing of models that carry an additive error e: x' = W (x + e).

    Its noise stands for e, of any variance: the mean does a random walk.

    Args:
        eigenvalues: of W, that of the mean first.
    """

    def step(ops, x):
        return (ops.mix(x + ops.gradient(x)),)

    return _linearize(step, (1,), eigenvalues, 0.0, 1.0)


# --- weight side: local steps; a transition covers a whole period ---------------------


def local_sgd(
    n: int, curvature: float, learning_rate: float, *, local_steps: int
) -> Modes:
    """Model local SGD, from one average to the next.

    Args:
        n: number of workers.
        curvature: h.
        learning_rate: gamma.
        local_steps: H.
    """

    def period(ops, x):
        for _ in range(local_steps):
            x = x - learning_rate * ops.gradient(x)
        return (ops.mean(x),)

    return _linearize(
        period,
        (1,),
        n,
        curvature,
        learning_rate,
        gradients=local_steps,
        steps=local_steps,
    )


def async_model_average(
    n: int,
    curvature: float,
    learning_rate: float,
    *,
    local_steps: int,
    staleness: int = 0,
) -> Modes:
    """Model averaging whose mean arrives late, from one snapshot to the next.

    Args:
        n: number of workers.
        curvature: h.
        learning_rate: gamma.
        local_steps: steps between snapshots.
        staleness: steps from a snapshot to its use, at most ``local_steps``.
    """

    def one_period(ops, x, correction):
        for step in range(1, local_steps + 1):
            x = x - learning_rate * ops.gradient(x)
            if step == staleness:
                x = x + correction
        return (x, ops.mean(x) - x) if staleness else (ops.mean(x), correction)

    return _linearize(
        one_period,
        (1, 0),
        n,
        curvature,
        learning_rate,
        gradients=local_steps,
        steps=local_steps,
    )


def slowmo(
    n: int,
    curvature: float,
    learning_rate: float,
    *,
    local_steps: int,
    outer_momentum: float,
    outer_learning_rate: float = 1.0,
) -> Modes:
    r"""Model SlowMo, from one slow step to the next.

    With :math:`s = 1 - (1 - \gamma h)^H` its polynomial is :math:`z^2 - (1 + \beta -
    \alpha s) z + \beta`.

    Args:
        n: number of workers.
        curvature: h.
        learning_rate: gamma.
        local_steps: H.
        outer_momentum: beta.
        outer_learning_rate: alpha.
    """

    def period(ops, anchor, velocity):
        x = anchor
        for _ in range(local_steps):
            x = x - learning_rate * ops.gradient(x)
        velocity = outer_momentum * velocity + (anchor - ops.mean(x)) / learning_rate
        return anchor - outer_learning_rate * learning_rate * velocity, velocity

    return _linearize(
        period,
        (1, 0),
        n,
        curvature,
        learning_rate,
        gradients=local_steps,
        steps=local_steps,
    )


def diloco(
    n: int,
    curvature: float,
    learning_rate: float,
    *,
    local_steps: int,
    outer_learning_rate: float = 0.7,
    outer_momentum: float = 0.9,
) -> Modes:
    r"""Model DiLoCo with SGD inside, from one outer step to the next.

    With :math:`s = 1 - (1 - \gamma h)^H` its polynomial is :math:`z^2 - (1 + \beta) (1
    - \eta s) z + \beta (1 - \eta s)`.

    Args:
        n: number of workers.
        curvature: h.
        learning_rate: gamma.
        local_steps: H.
        outer_learning_rate: eta.
        outer_momentum: beta.
    """

    def period(ops, anchor, velocity):
        x = anchor
        for _ in range(local_steps):
            x = x - learning_rate * ops.gradient(x)
        gradient = ops.mean(anchor - x)
        velocity = outer_momentum * velocity + gradient
        anchor = anchor - outer_learning_rate * (gradient + outer_momentum * velocity)
        return anchor, velocity

    return _linearize(
        period,
        (1, 0),
        n,
        curvature,
        learning_rate,
        gradients=local_steps,
        steps=local_steps,
    )


def local_sgd_fixed_point(
    curvature: np.ndarray, target: np.ndarray, learning_rate: float, local_steps: int
) -> np.ndarray:
    r"""Return where local SGD comes to rest when workers differ in curvature, too.

    :math:`\sum_i q_i b_i / \sum_i q_i` with :math:`q_i = 1 - (1 - \gamma h_i)^H`: the
    optimum for H = 1 or equal curvatures, the mean of targets for large H.

    Args:
        curvature: h [n, d].
        target: b [n, d].
        learning_rate: gamma.
        local_steps: H.

    Returns:
        [d].
    """
    q = 1 - (1 - learning_rate * curvature) ** local_steps
    return (q * target).sum(0) / q.sum(0)
