"""0/1 Adam: local Adam steps, summed up and averaged in one bit now and then."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from bagua_jax import buckets, checks, compatibility, precision, primitives, schedules
from bagua_jax.algorithms import moments, weights
from bagua_jax.algorithms.feedback import init_errors, scatter_reduce
from bagua_jax.compressors import Compressor, sign
from bagua_jax.primitives import AxisName, Errors

__all__ = ["ZeroOneAdamState", "zero_one_adam"]


class ZeroOneAdamState(NamedTuple):
    """State of :func:`zero_one_adam`; trees like params in float32."""

    count: jax.Array  # [] int32, steps taken; equal on all workers
    key: jax.Array  # [] typed PRNG key; equal on all workers
    mu: optax.Updates  # momentum; worker-local, the same after a synchronization
    nu: optax.Updates  # second moment; equal on all workers
    moved: optax.Updates  # u, the momenta times gamma since the last one; worker-local
    rates: jax.Array  # [] float32, s, sum of gamma since then; equal on all workers
    anchor: optax.Params  # where the last one left every worker; equal, typed varying
    error: Errors  # each worker-local


def zero_one_adam(
    learning_rate: optax.ScalarOrSchedule,
    compressor: Compressor = sign("l2"),  # noqa: B008  (immutable)
    *,
    axis_name: AxisName,
    var_freeze_step: int = 100,
    var_update_scaler: int = 16,
    local_step_scaler: int = 100,
    local_step_clipper: int = 16,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam of rare variances and rarer synchronizations, in one bit an element.

    Placement: local optimizer, alone. Receives this worker's own gradient with
    ``params``, returns a finished update of this worker, varying.

    Every step t = 0, 1, ..., with s the sum of gamma since the last synchronization:

    .. math::
        m_i \leftarrow \beta_1 m_i + (1 - \beta_1) g_i,\quad
        x_i \leftarrow x_i - \gamma_t \frac{m_i}{\sqrt v + \epsilon},\quad
        u_i \leftarrow u_i + \gamma_t m_i

    On the steps of :math:`T_u`, with :math:`\hat x` where the last one left everybody:

    .. math::
        \bar u = \mathrm{C\_LP\_S}(u_1, \dots, u_n),\quad
        x_i, \hat x \leftarrow \hat x - \frac{\bar u}{\sqrt v + \epsilon},\quad
        m_i \leftarrow \frac{\bar u}{s},\quad u_i, s \leftarrow 0

    and after that, on those of :math:`T_v`,
    :math:`v \leftarrow \beta_2 v + (1 - \beta_2) (\tfrac1n \sum_i g_i)^2`.

    :math:`T_v` starts with every step; its gap doubles after every kappa refreshes, and
    the variance stays from step F on. Until then :math:`T_u` is every step; afterwards
    it is every H-th, where H starts at 1 and doubles every ``local_step_scaler`` steps,
    up to ``local_step_clipper``.

    Args:
        learning_rate: gamma; a number, or a schedule of steps already taken.
        compressor: C, stateless; a contraction, or the paper's ``sign("l2")``, which is
            none on vectors of few large elements. ``sign("l1")`` always is one.
        axis_name: the workers' axis, or ``("node", "local")``: then u is averaged in
            full precision inside the node first.
        var_freeze_step: F, at least 1; static. Usually the end of the learning rate's
            warm-up.
        var_update_scaler: kappa, at least 1; static.
        local_step_scaler: steps until H doubles, at least 1; static. In the paper about
            the steps in which the learning rate halves.
        local_step_clipper: largest H, at least 1; static. 1 synchronizes every step.
        b1: beta_1, decay of the momentum, in [0, 1).
        b2: beta_2, decay of the second moment, in [0, 1). It sees few refreshes, about
            kappa log2(1 + F/kappa), and v is not corrected for its start at zero: with
            less than a few times 1/(1 - b2) of them steps are too long.
        eps: added to the denominator, > 0.
        bucket_bytes: target bucket size in bytes, counted in the updates' dtype;
            static. Every part of a bucket has one scale.
        seed: of the key that a stochastic compressor draws from.

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept. All
        workers must start from equal params.

    Raises:
        ValueError: if an argument is out of range; if params are missing, of another
            structure, not floating point, or hold no elements; if gradients arrive
            already summed over the axis; if the compressor keeps state, or feedback
            would make its error grow.
        NameError: if the axis is not mapped where ``update`` is called.

    Warns:
        UserWarning: once, at construction, for another compressor without a known
            contraction.

    Communication:
        On a step of T_u one all-to-all and one all-gather of packed signs and a scale
        for each bucket, in the long run every ``local_step_clipper`` steps. On a step
        of T_v, of which none comes after F, one all-reduce of float32 for each bucket.

    State:
        Six trees like params, of which the variance and the anchor are equal on all
        workers. Evaluate right after a synchronization, or on the anchor. On another
        number of workers :func:`bagua_jax.resize` keeps the mean of what workers, and
        all of what owners, have not sent.

    Theory:
        Synchronizing and refreshing at every step with C the identity it is Adam
        without bias correction whose variance is one step late. Feedback at both ends
        loses nothing: u-bar summed over time is the sum of the mean u less what the
        errors hold.

    Differences from the paper:
        eps stands beside the root. An entry does not move while v = 0: at the first
        step, or if its gradient has always been zero. A learning rate of 0 since the
        last synchronization leaves the momentum as it is (s = 0). Params end up at the
        anchor up to the rounding of params + update, which does not add up. DeepSpeed's
        program refreshes the variance a step later (at 18, 20, ... where ours does at
        17, 19, ...), freezes it a step later, and compresses gradients before that.

    References:
        Lu et al., `Maximizing Communication Efficiency for Large-scale Training via 0/1
        Adam`, 2022 (arXiv 2202.06009). Names of arguments as in DeepSpeed.

    Example:
        >>> tx = zero_one_adam(0.1, axis_name="workers", b1=0.0, b2=0.0)
        >>> grads = jnp.array([[1.0], [3.0]])
        >>> def second_step(g, x):
        ...     state = tx.update(g, tx.init(x), x)[1]
        ...     return tx.update(g, state, x)[0]
        >>> out = jax.vmap(second_step, axis_name="workers")(grads, 0 * grads)
        >>> [round(float(u), 3) for u in out.ravel()]
        [-0.1, -0.1]
    """
    caller = "zero_one_adam"
    for name, value, why in (
        ("var_freeze_step", var_freeze_step, "The variance is frozen there."),
        ("var_update_scaler", var_update_scaler, "It counts refreshes."),
        ("local_step_scaler", local_step_scaler, "It is in steps."),
        ("local_step_clipper", local_step_clipper, "1 synchronizes every step."),
        ("bucket_bytes", bucket_bytes, "It is in bytes."),
    ):
        checks.require_at_least(caller, name, value, 1, why)
    checks.require_within(caller, "b1", b1, 0, 1)
    checks.require_within(caller, "b2", b2, 0, 1)
    checks.require_within(caller, "eps", eps, 0, open_below=True)
    check = compatibility.require_compressor(
        caller, compressor, compatibility.FED_BACK, published="sign(l2)"
    )

    def init_fn(params) -> Any:
        checks.require_floats(params, caller)
        anchor = weights.private(params, axis_name)
        return ZeroOneAdamState(
            count=jnp.zeros([], jnp.int32),
            key=jax.random.key(seed),
            mu=optax.tree.zeros_like(anchor),
            nu=precision.zeros(params),
            moved=optax.tree.zeros_like(anchor),
            rates=jnp.zeros([], jnp.float32),
            anchor=anchor,
            error=init_errors(params, "both", axis_name),
        )

    def update_fn(updates, state, params: Any = None, **extra_args) -> Any:
        del extra_args
        checks.require_weights(updates, params, axis_name, caller)
        primitives.require_local(updates, axis_name, caller)
        plan = buckets.plan(updates, bucket_bytes, axis_name)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate

        def precondition(tree):
            return moments.precondition(tree, state.nu, eps)

        grads = precision.wide(updates)
        mu = optax.tree.update_moment(grads, state.mu, b1, 1)
        step = optax.tree.scale(rate, mu)
        moved = optax.tree.add(state.moved, step)
        rates = state.rates + rate
        x = weights.adapt(params, optax.tree.scale(-1, precondition(step)), axis_name)

        def stay():
            return x, mu, moved, rates, state.anchor, state.error

        def synchronize():
            mean, error = scatter_reduce(
                moved,
                state.error,
                plan,
                compressor,
                axis_name=axis_name,
                key=jax.random.fold_in(state.key, state.count),
                check=check,
            )
            anchor = optax.tree.sub(state.anchor, precondition(mean))
            common = jax.tree.map(
                lambda u, m: jnp.where(rates == 0, m, u / rates), mean, mu
            )
            nothing = jax.tree.map(jnp.zeros_like, (moved, rates))
            return anchor, common, *nothing, anchor, error

        x, mu, moved, rates, anchor, error = schedules.every(
            _is_sync(
                state.count, var_freeze_step, local_step_scaler, local_step_clipper
            ),
            local_step_clipper,
            synchronize,
            stay,
        )

        def refresh():
            vectors = plan.pack(updates)
            mean = plan.unpack(
                [primitives.c_fp_s(g, axis_name=axis_name) for g in vectors]
            )
            mean = precision.wide(mean)
            return optax.tree.update_moment(mean, state.nu, b2, 2)

        due = _is_refresh(state.count, var_update_scaler)
        nu = schedules.switch(
            (due & (state.count < var_freeze_step)).astype(jnp.int32),
            [lambda: state.nu, refresh],
            shares=(1, 0),
        )
        new_updates = weights.updates_to(x, params, updates)
        count = schedules.increment(state.count)
        return new_updates, ZeroOneAdamState(
            count, state.key, mu, nu, moved, rates, anchor, error
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_sync(count: jax.Array, start: int, scaler: int, clipper: int) -> jax.Array:
    """Say whether step ``count`` is in T_u: one in H, which is 1 before ``start``."""
    doublings = jnp.clip((count - start) // scaler, 0, (clipper - 1).bit_length())
    interval = jnp.minimum(2**doublings, clipper)
    return (count + 1) % interval == 0


def _is_refresh(count: jax.Array, kappa: int) -> jax.Array:
    """Say whether step ``count`` is in T_v: kappa gaps of 1, kappa of 2, of 4, ...

    The gaps of 2^q are those from step kappa (2^q - 1) to kappa (2^(q + 1) - 1).
    """
    doublings = 31 - lax.clz(count // kappa + 1)
    return (count - kappa * (2**doublings - 1)) % 2**doublings == 0
