"""Gradients compressed in any way, averaged by any plan, with error feedback."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from bagua_jax import (
    buckets,
    checks,
    compatibility,
    precision,
    primitives,
    resizing,
    schedules,
)
from bagua_jax.algorithms.feedback import ErrorFeedback, init_errors
from bagua_jax.compatibility import is_stateful
from bagua_jax.compressors import Compressor
from bagua_jax.primitives import AxisName, Errors
from bagua_jax.renamed import takes_old_names

__all__ = ["CompressedMeanState", "Plan", "choose_plan", "compressed_mean"]

Plan = Literal["scatter_reduce", "all_gather", "linear_sum", "ring"]

_TYPICAL = jax.ShapeDtypeStruct((2**16,), jnp.float32)  # to judge compressors by


class CompressedMeanState(NamedTuple):
    """State of :func:`compressed_mean`."""

    count: jax.Array  # [] int32, steps taken; equal on all workers
    key: jax.Array  # [] typed PRNG key; equal on all workers
    error: Errors  # each None, or like params in float32 and worker-local; unsent mass
    codec: tuple[
        Any, ...
    ]  # a stateful compressor's state for each bucket, worker-local

    def resized(self, like, params, workers):
        """Errors keep their mean and sum; a codec's state that differs begins anew."""
        count, key = resizing.mean((self.count, self.key), workers)
        error = self.error.resized(like.error, params, workers)
        codec = resizing.agreed(self.codec, like.codec, workers)
        return CompressedMeanState(count, key, error, codec)


@takes_old_names
def compressed_mean(
    compressor: Compressor,
    *,
    axis_name: AxisName,
    plan: Plan | None = None,
    error_feedback: ErrorFeedback | Literal["auto"] = "auto",
    unsafe: bool = False,
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Replace each worker's gradient by a mean of compressed gradients.

    Placement: gradient side, before the optimizer. Updates out are invariant over
    ``axis_name``.

    .. math::
        v^i = g_t^i + d_t^i,\quad c^i = C(v^i),\quad d_{t+1}^i = v^i - c^i

        \text{all\_gather, linear\_sum:}\quad & u_t = \tfrac1n \sum_i c^i

        \text{scatter\_reduce:}\quad & v = \tfrac1n \sum_i c^i + e_t,\quad u_t = C(v),
        \quad e_{t+1} = v - u_t

        \text{ring:}\quad & v^i = c^{i-1} + \tfrac1n (g_t^i + d_t^i),\quad c^i = C(v^i),
        \quad d_{t+1}^i = n (v^i - c^i),\quad u_t = c^n

    Many methods of the literature are choices of its arguments:

    ================================  ============================================
    method                            arguments
    ================================  ============================================
    QSGD                              ``qsgd(127), plan="all_gather"``
    EF-SGD, MEM-SGD                   ``topk(0.01)``
    EF-signSGD                        ``sign("l1"), plan="all_gather"``
    DoubleSqueeze, dist-EF-SGD        ``sign("l1"), error_feedback="both"``
    block-quantized all-reduce        ``blockwise(4, 512)``
    random-k with a common mask       ``randk(0.01, mask="shared")``
    f16 or bf16 compression           ``cast("bfloat16")``
    the same by a ring all-reduce     ``cast("float16"), plan="ring"``
    ================================  ============================================

    Args:
        compressor: C. A stateful one needs the plans ``all_gather`` or ``linear_sum``,
            and one axis.
        axis_name: the workers' axis, or ``("node", "local")``: then gradients are
            averaged in full precision inside the node and nodes are the workers.
        plan: ``"linear_sum"`` adds payloads up in an all-reduce; ``"scatter_reduce"``
            gives every worker a part to add up and compress again; ``"all_gather"``
            sends every payload to everybody; ``"ring"`` passes every part around all
            workers, each of which adds its own and compresses again. Where ``None``
            ``linear_sum`` for payloads that may be summed, ``all_gather`` for stateful
            compressors and for payloads below half a bit per element, else
            ``scatter_reduce``.
        error_feedback: where the errors d (``"worker"``) and e (``"owner"``) are kept:
            there, at ``"both"`` ends, or at ``"none"``. ``"auto"``: none for unbiased
            compressors and for ``cast`` to 8 bits, else wherever something is
            compressed.
        unsafe: take a compressor all the same whose bias would be lost, or whose error
            feedback makes grow: the baseline that shows what the rule is for.
        bucket_bytes: target bucket size in bytes (static).
        seed: of the key that a stochastic compressor draws from.

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept.

    Raises:
        ValueError: if an argument is out of range, or the combination is one that
            arithmetic or theory forbids: summing payloads that cannot be summed;
            partitioning a stateful compressor; feedback at an owner that does not
            exist; a biased compressor that loses most of a vector, or has no
            contraction at all, without error feedback at an end where it is used; error
            feedback around an unbiased one whose error can exceed the vector, or around
            a cast to 8 bits. When ``update`` is traced, for the gradients that every
            gradient-side algorithm refuses.
        NameError: if the axis is not mapped where ``update`` is called.

    Warns:
        UserWarning: once, at construction, where a combination is merely risky: error
            feedback around a biased compressor that is no contraction on every vector;
            a cast to 8 bits, which loses gradients below its range.

    Communication:
        linear_sum: one all-reduce of the payload per bucket. scatter_reduce: one
        all-to-all and one all-gather of payloads of N/n. all_gather: one all-gather of
        the payload, n-1 payloads sent per worker. ring: n-1 messages to the next
        worker and one all-gather, of payloads of N/n.

    State:
        The errors, trees like params in float32, and the compressor's own state. On
        another number of workers :func:`bagua_jax.resize` keeps the mean of what
        workers, and all of what owners, have not sent; a compressor's state that
        differs between workers begins anew.

    Theory:
        With error feedback wherever something is compressed no mass is lost: the sum
        of all updates equals the sum of all mean gradients less what the errors hold.

    Differences from the papers:
        Errors are in gradient units, without the learning rate: under a schedule the
        virtual iterate is exact only for a constant rate.

    References:
        Alistarh et al., `QSGD`, 2017; Stich et al., `Sparsified SGD with Memory`, 2018;
        Karimireddy et al., `Error Feedback Fixes SignSGD`, 2019; Tang et al.,
        `DoubleSqueeze`, 2019.

    Example:
        >>> from bagua_jax.compressors import cast
        >>> tx = compressed_mean(cast("bfloat16"), axis_name="workers")
        >>> grads = jnp.array([[1.0, 0.0], [2.0, 0.5], [6.0, 1.0]])
        >>> step = lambda g: tx.update(g, tx.init(g))[0]
        >>> jax.vmap(step, axis_name="workers")(grads)[0].tolist()
        [3.0, 0.5]
    """
    caller = "compressed_mean"
    plan = choose_plan(compressor) if plan is None else plan
    checks.require_choice(caller, "plan", plan, get_args(Plan))
    if error_feedback == "auto":
        everywhere = "both" if plan == "scatter_reduce" else "worker"
        error_feedback = "none" if _stands_alone(compressor) else everywhere
    choices = (*get_args(ErrorFeedback), "auto")
    checks.require_choice(caller, "error_feedback", error_feedback, choices)
    checks.require_at_least(caller, "bucket_bytes", bucket_bytes, 1, "It is in bytes.")
    _require_plan(compressor, plan, error_feedback, axis_name)
    check = _require_feedback(compressor, plan, error_feedback, unsafe)
    stateful = is_stateful(compressor)

    def init_fn(params):
        checks.require_floats(params, caller)
        layout = buckets.plan(params, bucket_bytes, axis_name)
        leaves, codec = jax.tree.leaves(params), []
        for size, bucket in zip(layout.sizes, layout.buckets, strict=True):
            first = leaves[bucket[0]]
            vector = jnp.zeros((size,), precision.wide_dtype(first))
            kept = compressor.init(vector) if stateful else ()
            axes = tuple(sorted(primitives.varying_axes(first)))
            codec.append(primitives.worker_local(kept, axes))
        return CompressedMeanState(
            count=jnp.zeros([], jnp.int32),
            key=jax.random.key(seed),
            error=init_errors(params, error_feedback, axis_name),
            codec=primitives.worker_local(tuple(codec) if stateful else (), axis_name),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.require_gradients(updates, params, axis_name, caller)
        key = jax.random.fold_in(state.key, state.count)

        def exchange(g, worker, owner, codec, key):
            where = {"axis_name": axis_name, "key": key}
            if plan in ("scatter_reduce", "ring"):
                check(primitives.part_length(g, axis_name))
            if plan == "scatter_reduce":
                mean, errors = primitives.c_lp_s(
                    g, compressor, Errors(worker, owner), **where
                )
                return mean, *errors, codec
            if plan == "ring":
                mean, worker = primitives.ring_mean(g, compressor, worker, **where)
                return mean, worker, None, codec
            check(primitives.shard_length(g, axis_name))
            run = getattr(
                primitives, "linear_mean" if plan == "linear_sum" else "gather_mean"
            )
            mean, worker, codec = run(g, compressor, worker, state=codec, **where)
            return mean, worker, None, primitives.worker_local(codec, axis_name)

        layout = buckets.plan(updates, bucket_bytes, axis_name)
        codecs = state.codec if stateful else ((),) * len(layout.buckets)
        if len(codecs) != len(layout.buckets):
            raise ValueError(
                f"{caller}: the state holds a codec for each of {len(codecs)} buckets, "
                f"and gradients fill {len(layout.buckets)}: they vary over other axes "
                "than the parameters that `init` saw. Call `init` where `update` is, "
                "inside the same shard_map."
            )
        columns = zip(*map(layout.pack, (updates, *state.error)), codecs, strict=True)
        results = [
            exchange(g, worker, owner, codec, jax.random.fold_in(key, bucket))
            for bucket, (g, worker, owner, codec) in enumerate(columns)
        ]
        mean, worker, owner, codecs = zip(*results, strict=True)
        return layout.unpack(mean), CompressedMeanState(
            count=schedules.increment(state.count),
            key=state.key,
            error=Errors(layout.unpack(worker), layout.unpack(owner)),
            codec=codecs if stateful else (),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def choose_plan(compressor: Compressor) -> Plan:
    """Choose how payloads are averaged, from what is known of the compressor.

    Args:
        compressor: any.

    Returns:
        ``"linear_sum"`` where payloads may be summed; ``"all_gather"`` for stateful
        compressors and payloads below half a bit per element; ``"scatter_reduce"``
        for the others.

    Example:
        >>> from bagua_jax.compressors import minmax_uint8
        >>> choose_plan(minmax_uint8())
        'scatter_reduce'
    """
    if compressor.facts.linear:
        return "linear_sum"
    bits = 8 * compressor.facts.payload_bytes(_TYPICAL) / _TYPICAL.shape[0]
    return "all_gather" if bits < 0.5 or is_stateful(compressor) else "scatter_reduce"


def _stands_alone(compressor: Compressor) -> bool:
    """Whether nothing is gained by feeding its error back."""
    alone = compatibility.judge(compressor, compatibility.FRESH, _TYPICAL.shape[0])
    without_scale = compatibility.has_no_scale(compressor)
    return compressor.facts.unbiased or (without_scale and alone.kind != "refused")


def _require_plan(compressor, plan, error_feedback, axis_name) -> None:
    """Refuse what the arithmetic of a plan forbids."""
    name = compressor.facts.name
    if plan == "linear_sum" and not compressor.facts.linear:
        raise ValueError(
            f"compressed_mean: payloads of {name} cannot be summed, so "
            "plan='linear_sum' would add codes of different meaning. Use 'all_gather' "
            "or 'scatter_reduce'."
        )
    stateful = is_stateful(compressor)
    if stateful and plan in ("scatter_reduce", "ring"):
        raise ValueError(
            f"compressed_mean: {name} keeps state for a whole vector, and "
            f"plan={plan!r} cuts it in parts. Use 'all_gather'."
        )
    if stateful and not isinstance(axis_name, str):
        raise ValueError(
            f"compressed_mean: {name} keeps state for a whole vector, and a "
            f"hierarchy {axis_name!r} exchanges shards. Use one axis."
        )
    if error_feedback in ("owner", "both") and plan != "scatter_reduce":
        raise ValueError(
            f"compressed_mean: with plan={plan!r} no owner compresses a mean, so "
            f"error_feedback={error_feedback!r} has nothing to keep. Use 'worker'."
        )


def _require_feedback(
    compressor, plan, error_feedback, unsafe
) -> Callable[[int], None]:
    """Judge the compressor by what becomes of its error at each end that uses it."""
    ends = {"worker", "owner"} if plan == "scatter_reduce" else {"worker"}
    kept = ends if error_feedback == "both" else ends & {error_feedback}
    cure = f"Use error_feedback={'both' if len(ends) > 1 else 'worker'!r}"
    judged = functools.partial(
        compatibility.require_compressor,
        "compressed_mean",
        compressor,
        stateful=True,
        unsafe=unsafe,
    )
    fed_back_in_vain = kept and compatibility.has_no_scale(compressor)  # refused below
    if kept != ends and not fed_back_in_vain:
        judged(compatibility.FRESH, cure=f"{cure}. unsafe=True shows it.")
    if not kept:
        return lambda d: None
    cure = (
        "Use no error feedback where it is unbiased, or an unscaled relative, which "
        "contracts. unsafe=True shows it."
    )
    return judged(compatibility.FED_BACK, cure=cure)
