"""CocktailSGD: a random mask, the largest inside it, and few bits for each of those."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bagua_jax import buckets, checks, compatibility, primitives, schedules
from bagua_jax.algorithms import weights
from bagua_jax.algorithms.feedback import init_errors
from bagua_jax.compressors import Compressor, blockwise, chain, topk
from bagua_jax.compressors.numerics import draw_places, kept, poisoned
from bagua_jax.primitives import AxisName, Errors
from bagua_jax.renamed import takes_old_names

__all__ = ["CocktailSGDState", "cocktail_sgd"]


class CocktailSGDState(NamedTuple):
    """State of :func:`cocktail_sgd`; trees like params in float32, typed varying."""

    count: jax.Array  # [] int32, steps taken; equal on all workers
    key: jax.Array  # [] typed PRNG key; equal on all workers
    shared: optax.Params  # x_hat, the copy that all share; equal on all workers
    error: Errors  # e_i, unsent by this worker, and E, unsent by it as an owner
    pending: optax.Updates | None  # the move under way; None where staleness is 0


@takes_old_names
def cocktail_sgd(
    compressor: Compressor = chain(topk(0.5), blockwise(8, 128)),  # noqa: B008
    *,
    axis_name: AxisName,
    ratio: float = 0.5,
    staleness: int = 0,
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Move a shared copy of the model by masked, sparsified, quantized differences.

    Placement: weight side, last in the chain. Receives the optimizer's update u_i with
    ``params``, returns ``new_params - params`` of this worker, varying.

    With R the entries inside this step's mask, drawn from a key that all workers share,
    and an owner for each part of the vector:

    .. math::
        \text{worker } i:\quad & x_i \leftarrow \hat x + u_i,\quad
        \delta_i = (x_i - \hat x) + e_i,\quad
        c_i = C(\delta_i|_R),\quad e_i \leftarrow \delta_i - c_i

        \text{owner}:\quad & P = \tfrac1n \sum_i c_i + E|_R,\quad c = C(P),\quad
        E|_R \leftarrow P - c

        \text{all}:\quad & \hat x \leftarrow \hat x + c,\quad x_i \leftarrow \hat x

    With ``staleness=1`` the last line waits: c is added to :math:`\hat x` when the next
    step begins, so that its exchange may overlap with that step's computation, and
    gradients are taken at :math:`\hat x + u_i` without it.

    Args:
        compressor: C on the entries inside the mask, stateless, a contraction; ``topk``
            and ``blockwise`` in a chain by default. Every owner's part has its own.
        axis_name: the workers' axis, or ``("node", "local")``: then updates are
            averaged in full precision inside the node and nodes are the workers.
        ratio: share of entries inside the mask, in (0, 1]; static. The same places
            of every part; at least one.
        staleness: 0, or 1 for an exchange that may overlap with the next step; static.
        bucket_bytes: target bucket size in bytes (static).
        seed: of the key that masks and a stochastic compressor draw from.

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept. All
        workers must start from equal params.

    Raises:
        ValueError: if an argument is out of range; if the compressor keeps state, or
            feedback would make its error grow; if params are missing, of another
            structure, not floating point, or hold no elements.
        NameError: if the axis is not mapped where ``update`` is called.

    Warns:
        UserWarning: once, at construction, for a compressor without a known
            contraction.

    Communication:
        For each bucket one all-to-all and one all-gather of payloads for
        ``ratio`` N/n elements. The mask does not travel.

    State:
        Three trees like params in float32: the shared copy, equal on all workers, and
        two of errors, worker-local. With staleness a fourth. Checkpoint them all. On
        another number of workers :func:`bagua_jax.resize` keeps the mean of what
        workers, and all of what owners, have not sent.

    Theory:
        Nothing is lost: x_hat - x_0 and what errors and the message under way hold
        (owners' summed, workers' averaged) add up to the sum of mean updates. Without
        mask, compression and staleness it is ``local_sgd(local_steps=1)``.

    Differences from the paper:
        Any compressor inside the mask, which is redrawn at every step. A value that is
        not finite makes its bucket's message so, inside the mask or not.

    References:
        Wang et al., `CocktailSGD: Fine-tuning Foundation Models over 500Mbps Networks`,
        2023.

    Example:
        >>> from bagua_jax.compressors import identity
        >>> tx = cocktail_sgd(identity(), axis_name="workers", ratio=1.0)
        >>> params, updates = jnp.array([[4.0], [4.0]]), jnp.array([[4.0], [0.0]])
        >>> step = lambda u, x: x + tx.update(u, tx.init(x), x)[0]
        >>> jax.vmap(step, axis_name="workers")(updates, params).ravel().tolist()
        [6.0, 6.0]
    """
    caller = "cocktail_sgd"
    if isinstance(ratio, bool) or not 0 < ratio <= 1:
        raise ValueError(
            f"cocktail_sgd: ratio must be in (0, 1], got {ratio!r}. 1 leaves "
            "the choice to the compressor."
        )
    checks.require_at_least(caller, "staleness", staleness, 0, "It is in steps.")
    if staleness > 1:
        raise ValueError(
            f"cocktail_sgd: staleness must be 0 or 1, got {staleness}: one message is "
            "under way at a time."
        )
    checks.require_at_least(caller, "bucket_bytes", bucket_bytes, 1, "It is in bytes.")
    check = compatibility.require_compressor(caller, compressor, compatibility.FED_BACK)

    def init_fn(params) -> Any:
        checks.require_floats(params, caller)
        shared = weights.private(params, axis_name)
        return CocktailSGDState(
            count=jnp.zeros([], jnp.int32),
            key=jax.random.key(seed),
            shared=shared,
            error=init_errors(params, "both", axis_name),
            pending=optax.tree.zeros_like(shared) if staleness else None,
        )

    def update_fn(updates, state, params=None, **extra_args) -> Any:
        del extra_args
        checks.require_weights(updates, params, axis_name, caller)
        n = primitives.num_peers(axis_name, caller)
        plan = buckets.plan(params, bucket_bytes, axis_name)
        key = jax.random.fold_in(state.key, state.count)

        def exchange(progress, error, owner_error, key):
            if progress.size == 0:
                return progress, error, owner_error
            shard = primitives.node_shard(progress, axis_name, caller, "zero")
            size = shard.value.shape[0]
            length = -(-size // n)
            mask_key, codec_key = jax.random.split(key)
            inside = draw_places(mask_key, length, kept(ratio, length))
            check(inside.shape[0])

            def parts(x):  # a row for each owner, whatever the mask
                return jnp.pad(x, (0, n * length - size)).reshape(n, length)

            def replace(x, values):  # inside the mask
                rows = parts(x).at[:, inside].set(values.reshape(n, -1))
                return rows.reshape(-1)[:size]

            delta = shard.value + shard.take(error)
            unsent = shard.take(owner_error)
            masked = poisoned(parts(delta)[:, inside].reshape(-1), delta)
            move, left = primitives.c_lp_s(
                masked,
                compressor,
                Errors(jnp.zeros_like(masked), parts(unsent)[:, inside].reshape(-1)),
                axis_name=primitives.peer_axis(axis_name),
                key=codec_key,
            )
            return (
                shard.gather(replace(jnp.zeros_like(delta), move)),
                shard.put(replace(delta, left.worker)),
                shard.put(replace(unsent, left.owner)),
            )

        progress = weights.private(updates, axis_name)
        move, *error = primitives.worker_local(
            plan.map(exchange, progress, *state.error, keys=key), axis_name
        )
        if staleness:
            shared = optax.tree.add(state.shared, state.pending)
            x, pending = optax.tree.add(shared, progress), move
        else:
            shared = optax.tree.add(state.shared, move)
            x, pending = shared, None
        return weights.updates_to(x, params, updates), CocktailSGDState(
            count=schedules.increment(state.count),
            key=state.key,
            shared=shared,
            error=Errors(*error),
            pending=pending,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
