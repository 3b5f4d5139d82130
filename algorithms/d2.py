"""D2: gossip on twice the last model less the one before, blind to heterogeneity."""

from typing import NamedTuple

import numpy as np
import optax

from bagua_jax import buckets, checks, primitives, topologies
from bagua_jax.algorithms import weights
from bagua_jax.primitives import AxisName
from bagua_jax.topologies import Topology

__all__ = ["D2State", "d2"]


class D2State(NamedTuple):
    """State of :func:`d2`."""

    adapted: optax.Params  # x_{t-1} + u_{t-1}, x_0 at first; like params in float32,
    # worker-local


def d2(
    *,
    axis_name: AxisName,
    topology: str | Topology,
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
) -> optax.GradientTransformationExtraArgs:
    r"""Mix the extrapolated models: no bias from heterogeneous data (D2).

    Placement: weight side, last in the chain. Receives the optimizer's update u_i with
    ``params``, returns ``new_params - params`` of this worker, varying.

    .. math::
        x_{t+1} = W (2 x_t - x_{t-1} + u_t - u_{t-1}),\qquad x_1 = W (x_0 + u_0)

    It is ``exact_diffusion`` with W in place of (I + W)/2: faster where W allows it.

    Args:
        axis_name: the workers' axis, or ``("node", "local")``: then devices of a node
            are averaged and nodes mix.
        topology: a name, built for the axis's size, or a ``Topology``; symmetric,
            doubly stochastic, of period 1, with all eigenvalues above -1/3. There is no
            default, as the ring of weights 1/3 and even n stands exactly at -1/3.
        bucket_bytes: target message size in bytes (static).

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept. All
        workers must start from equal params.

    Raises:
        ValueError: if an argument is out of range, the topology is unknown, rotates, is
            not symmetric, has an eigenvalue of -1/3 or less, is made for another n, or
            not legal for this one; if params are missing, of another structure, not
            floating point, or hold no elements.
        NameError: if the axis is not mapped where ``update`` is called.

    Communication:
        For each bucket one collective-permute of float32 for each neighbour; one
        all-reduce for ``"complete"``: what ``decentralized`` sends.

    State:
        One tree like params in float32, worker-local. On another number of workers
        :func:`bagua_jax.resize` keeps the mean of the memories: the correction begins
        anew.

    Theory:
        The mean over workers moves by the mean update, and with a constant step size
        and exact gradients every worker comes to the optimum of the mean. The mode of
        eigenvalue lambda has the polynomial :math:`z^2 - \lambda (2 - \gamma h) z +
        \lambda (1 - \gamma h)`: stable where :math:`\lambda > -1/(3 - 2 \gamma h)`.

    References:
        Tang et al., `D2: Decentralized Training over Decentralized Data`, 2018 (arXiv
        1803.07068).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> tx = d2(axis_name="workers", topology="complete")
        >>> params, updates = jnp.array([[0.0], [4.0]]), jnp.array([[2.0], [0.0]])
        >>> step = lambda u, x: x + tx.update(u, tx.init(x), x)[0]
        >>> jax.vmap(step, axis_name="workers")(updates, params).ravel().tolist()
        [3.0, 3.0]
    """
    caller = "d2"
    topologies.require_known(topology, caller)
    if isinstance(topology, Topology):
        _require_graph(topology, caller)
    checks.require_at_least(caller, "bucket_bytes", bucket_bytes, 1, "It is in bytes.")

    def init_fn(params):
        checks.require_floats(params, caller)
        return D2State(weights.private(params, axis_name))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.require_weights(updates, params, axis_name, caller)
        n = primitives.num_peers(axis_name, caller)
        graph = topologies.resolve(topology, n, caller)
        _require_graph(graph, caller)
        plan = buckets.plan(params, bucket_bytes, axis_name)

        adapted = weights.adapt(params, updates, axis_name)
        extrapolated = weights.correct(adapted, params, state.adapted)
        x = weights.mix(extrapolated, plan, graph, axis_name)
        new_updates = weights.updates_to(x, params, updates)
        return new_updates, D2State(adapted)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _require_graph(topology: Topology, caller: str) -> None:
    why = "the memory of one step needs a symmetric W that stays"
    weights.require_static(topology, caller, why, symmetric=True)
    # Gershgorin's discs, which take no time, before eigenvalues, which do for large n.
    (step,) = topology.steps
    heard = np.abs([send.weights for send in step.sends]).sum(0)
    if (np.array(step.self_weights) - heard).min() > -1 / 3 + 1e-9:
        return
    smallest = np.real(topology.eigenvalues()).min()
    if smallest <= -1 / 3 + 1e-9:
        raise ValueError(
            f"{caller}: every eigenvalue of W must be above -1/3, or it diverges; the "
            f"smallest of {topology.name!r} with n={topology.n} is {smallest:.6g}. Use "
            "self weights > 1/3, such as topologies.ring(n, self_weight=0.5), or "
            "exact_diffusion."
        )
