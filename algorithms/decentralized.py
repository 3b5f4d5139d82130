"""Decentralized training: weights mixed with neighbours in full precision."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bagua_jax import buckets, checks, primitives, schedules, topologies
from bagua_jax.primitives import AxisName
from bagua_jax.renamed import takes_old_names
from bagua_jax.topologies import Topology

__all__ = ["DecentralizedState", "decentralized"]


class DecentralizedState(NamedTuple):
    """State of :func:`decentralized`."""

    count: jax.Array  # [] int32, steps taken; equal on all workers


@takes_old_names
def decentralized(
    *,
    axis_name: AxisName,
    topology: str | Topology = "ring",
    local_steps: int = 1,
    combine: Literal["before", "after"] = "before",
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
) -> optax.GradientTransformationExtraArgs:
    r"""Mix the parameters with those of neighbours (D-PSGD).

    Placement: weight side, last in the chain. Receives the optimizer's update u_i with
    ``params``, returns ``new_params - params`` of this worker, varying. The optimizer's
    own state is not mixed.

    On steps 0, H, 2H, ... (H = ``local_steps``), with the topology's next W:

    .. math::
        \text{before:}\quad x_i' = \sum_j W_{ij} x_j + u_i \qquad
        \text{after:}\quad x_i' = \sum_j W_{ij} (x_j + u_j)

    and :math:`x_i' = x_i + u_i` on the others. In both orders u_i comes from the
    gradient at the un-mixed x_i.

    Args:
        axis_name: the workers' axis, or ``("node", "local")``: then devices of a node
            are averaged and nodes mix.
        topology: a name, built for the axis's size at trace time, or a ``Topology``.
            ``"complete"`` is the original's ``all``, ``"shift_one"`` its pairs. A
            rotating topology moves on with each communication, not with each step.
        local_steps: H, at least 1; static.
        combine: whether mixing comes before the update, as in the original (combine,
            then adapt), or after it (adapt, then combine); static.
        bucket_bytes: target message size in bytes (static).

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept.

    Raises:
        ValueError: if an argument is out of range, the topology is unknown, made for
            another n, or not legal for this one; if params are missing, of another
            structure, not floating point, or hold no elements.
        NameError: if the axis is not mapped where ``update`` is called.

    Communication:
        On a communicating step, for each bucket one collective-permute of float32 for
        each neighbour; one all-reduce for ``"complete"``.

    State: a counter, equal on all workers.

    Theory:
        The mean over workers moves by the mean update, whatever W. Disagreement
        shrinks by ``topology.contraction`` a communication.

    Differences from the original:
        Any doubly stochastic topology, and combining after. Steps are optimizer steps
        (it counts forwards). Hierarchy is asked for, not the default.

    References:
        Lian et al., `Can Decentralized Algorithms Outperform Centralized Algorithms?`,
        2017. Gan et al., BAGUA, 2021 (arXiv 2107.01499), algorithm ``decentralized``.

    Example:
        >>> tx = decentralized(axis_name="workers", topology="complete")
        >>> params, updates = jnp.array([[0.0], [4.0]]), jnp.array([[1.0], [0.0]])
        >>> step = lambda u, x: x + tx.update(u, tx.init(x), x)[0]
        >>> jax.vmap(step, axis_name="workers")(updates, params).ravel().tolist()
        [3.0, 2.0]
    """
    caller = "decentralized"
    topologies.require_known(topology, caller)
    checks.require_at_least(caller, "local_steps", local_steps, 1, "It is in steps.")
    checks.require_choice(caller, "combine", combine, ("before", "after"))
    checks.require_at_least(caller, "bucket_bytes", bucket_bytes, 1, "It is in bytes.")

    def init_fn(params):
        checks.require_floats(params, caller)
        return DecentralizedState(count=jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params: Any = None, **extra_args):
        del extra_args
        checks.require_weights(updates, params, axis_name, caller)
        n = primitives.num_peers(axis_name, caller)
        graph = topologies.resolve(topology, n, caller)
        plan = buckets.plan(params, bucket_bytes, axis_name)
        communication, since = jnp.divmod(state.count, local_steps)

        def mix(x):
            return plan.unpack(
                [
                    primitives.d_fp_s(v, graph, axis_name=axis_name, step=communication)
                    for v in plan.pack(x)
                ]
            )

        def combined(x):
            x = primitives.worker_local(x, axis_name)
            return schedules.every(since == 0, local_steps, mix, lambda x: x, x)

        if combine == "before":
            moved = optax.tree.sub(combined(params), params)
            new_updates = optax.tree.add(moved, updates)
        else:
            adapted = optax.apply_updates(params, updates)
            new_updates = optax.tree.sub(combined(adapted), params)
        new_updates = optax.tree.cast_like(new_updates, updates)
        return new_updates, DecentralizedState(schedules.increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
