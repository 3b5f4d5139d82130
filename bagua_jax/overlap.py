r"""The exchange of gradients inside the backward pass, asked for at layer boundaries.

XLA places a collective as late as its latency allows, so gradients that are ready early
are still exchanged at the end, behind the backward pass. What moves them is data flow:
where the backward pass of a layer *needs* the finished exchange of a layer above, that
exchange must lie beside the backward pass of the layers between.

A :class:`Chain` is put around the layers of a model. Its forward pass changes nothing.
Its backward pass exchanges a layer's gradients as soon as they are complete, by any
gradient-side transform, and ties the gradient of the layer's input to the exchange that
was started ``lag`` layers earlier. ``jax.value_and_grad`` then returns exchanged
gradients; the optimizer is untouched.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from bagua_jax import checks, primitives
from bagua_jax.primitives import AxisName

__all__ = ["Chain", "init"]


def init(
    exchange: optax.GradientTransformation, params: Mapping[str, Any]
) -> dict[str, Any]:
    """Make the state of an exchange that a :class:`Chain` runs.

    Args:
        exchange: a gradient-side transform of :mod:`bagua_jax.algorithms`.
        params: the parts of the model by name, as the chain will get them.

    Returns:
        For each part the transform's state. Its new value is its cotangent, and only
        floats have one: whole numbers and keys are held as the floats of their bits.
        Keys differ from part to part.
    """

    def own_key(x, index):
        return jax.random.fold_in(x, index) if _is_key(x) else x

    return {
        name: _as_floats(
            jax.tree.map(lambda x, k=k: own_key(x, k), exchange.init(part))
        )
        for k, (name, part) in enumerate(sorted(params.items()))
    }


class Chain:
    r"""Layers whose gradients are exchanged while the layers below go backward.

    With y_k the exchanged gradient of layer k, g_k its own, and x_k its input, the
    backward pass is

    .. math::
        y_k = E(g_k),\qquad
        \bar x_k \leftarrow \bar x_k \text{ once } y_{k + \mathrm{lag}} \text{ is there}

    The wait is a select whose condition no number fulfils, so that gradients are those
    of the plain form, and a NaN or infinity passes as it does there.

    Args:
        exchange: a gradient-side transform: what is sent, by which plan, with which
            correction. One bucket for each part is best: give it a ``bucket_bytes``
            above the largest. ``None``: gradients stay local, for micro-batches before
            the last one of a step; pass worker-local params then.
        params: the parts by name: the layers, and the rest. Small leaves, such as a
            last norm, are best kept in a part with others: a part is a message.
        state: of :func:`init`; ``None`` for an exchange that keeps none.
        axis_name: the workers' axis, or ``("node", "local")``.
        lag: how many layers of the backward pass an exchange may take; static. 1 fits
            one bucket per layer; 2 deep models on slow networks.
        earlier: like params: the sum of this worker's gradients of the earlier
            micro-batches of this step, added before the exchange. Scale the loss by the
            number of micro-batches.

    Raises:
        ValueError: if params are no mapping of names, if the state is not one for each
            part, if ``lag`` < 1, if params are worker-local already, if a name is
            unknown or used twice; and what ``exchange`` refuses, when gradients are
            taken.

    Communication:
        That of ``exchange``, once for each part.

    State:
        ``jax.value_and_grad(loss_fn, argnums=(0, 1))`` with the state as second
        argument gives the new state where a gradient with respect to it would stand.

    Theory:
        Gradients equal those of ``exchange.update`` applied to each part after the
        backward pass.

    Example:
        >>> from bagua_jax.algorithms import bytegrad
        >>> exchange = bytegrad(axis_name="workers", error_feedback="both")
        >>> params = {"a": jnp.array([1.0]), "b": jnp.array([2.0])}
        >>> def loss_fn(params, state, x):
        ...     chain = Chain(exchange, params, state, axis_name="workers")
        ...     x = chain(jnp.multiply, "a", x)
        ...     x = chain(jnp.multiply, "b", x)
        ...     return chain.finish(x.sum())
        >>> grad = jax.grad(loss_fn, argnums=(0, 1))
        >>> step = lambda x: grad(params, init(exchange, params), x)[0]
        >>> batch = jnp.array([[1.0], [2.0], [6.0]])
        >>> grads = jax.vmap(step, axis_name="workers")(batch)
        >>> [f"{x:.3f}" for x in grads["a"].ravel()]
        ['6.000', '6.000', '6.000']
    """

    def __init__(
        self,
        exchange: optax.GradientTransformation | None,
        params: Mapping[str, Any],
        state: Mapping[str, Any] | None = None,
        *,
        axis_name: AxisName,
        lag: int = 1,
        earlier: Mapping[str, Any] | None = None,
    ):
        checks.require_at_least("Chain", "lag", lag, 1, "1 fits a bucket per layer.")
        if not isinstance(params, Mapping):
            raise ValueError(
                "Chain: params must map the names of the model's parts to their "
                f"parameters, got {type(params).__name__}."
            )
        if exchange is None:
            state = dict.fromkeys(params)
        elif state is None:
            state = init(exchange, params)
            if jax.tree.leaves(state):
                raise ValueError(
                    "Chain: the exchange keeps state between steps. Make it with "
                    "overlap.init(exchange, params), pass it, and take its new value "
                    "from jax.value_and_grad(loss_fn, argnums=(0, 1))."
                )
        for what, tree in (("state", state), ("earlier", earlier)):
            if tree is not None and tree.keys() != params.keys():
                raise ValueError(
                    f"Chain: {what} must have the names of params, {sorted(params)}; "
                    f"got {sorted(tree)}."
                )
        self._exchange, self._axis_name = exchange, axis_name
        self._params, self._state, self._earlier = params, state, earlier
        self._tokens = (jnp.zeros([]),) * lag
        self._hooked: dict[str, Any] = {}

    def __call__(self, layer: Callable[..., Any], name: str, x: Any, *args: Any) -> Any:
        """Run a layer on its part of the parameters.

        Args:
            layer: ``layer(params_k, x, *args)``; may be a ``jax.checkpoint`` of one.
            name: of its part.
            x: an array, or a tree, of activations that come from the layer below.
            *args: whatever else the layer takes.

        Returns:
            What the layer returns.
        """
        if name in self._hooked:
            raise ValueError(
                f"Chain: {name!r} was used before. Take a part that several layers "
                f"share once, with chain[{name!r}], before the first of them."
            )
        part, x = self._hook(name, x)
        return layer(part, x, *args)

    def __getitem__(self, name: str) -> Any:
        """Take a part that is no layer, such as an embedding, before its first use.

        Its gradients are exchanged when they are complete, which of an embedding they
        are at the very end.
        """
        if name not in self._hooked:
            self._hook(name, None)
        return self._hooked[name]

    def finish(self, loss: Any) -> Any:
        """Return the loss, once it is sure that every part went through the chain.

        A loss that is equal on all workers (a ``lax.pmean``) is typed as varying, so
        that, as with :func:`bagua_jax.value_and_grad`, the mean of the gradients is the
        gradient of the mean of the losses.

        Raises:
            ValueError: if one did not: its gradients would stay this worker's own.
        """
        if missing := self._params.keys() - self._hooked.keys():
            raise ValueError(
                f"Chain.finish: {sorted(missing)} never went through the chain, so "
                "their gradients would not be exchanged. Call chain(layer, name, x), "
                "or take chain[name]."
            )
        return primitives.worker_local(loss, self._axis_name)

    def _hook(self, name: str, x: Any) -> tuple[Any, Any]:
        if name not in self._params:
            raise ValueError(
                f"Chain: no part is named {name!r}; there are {sorted(self._params)}."
            )
        part = self._params[name]
        if self._exchange is not None:
            _require_replicated(part, self._axis_name, name)
            earlier = None if self._earlier is None else self._earlier[name]
            part, x, self._tokens = _hook(self._exchange, self._axis_name, name)(
                part, self._state[name], earlier, x, self._tokens
            )
        self._hooked[name] = part
        return part, x


def _hook(
    exchange: optax.GradientTransformation, axis_name: AxisName, name: str
) -> Callable:
    """Make the identity whose backward pass exchanges, and ties.

    The cotangents of the tokens carry, backward, the news that an exchange is finished;
    each hook takes the oldest and adds its own.
    """

    @jax.custom_vjp
    def hook(part, state, earlier, x, tokens):
        del state, earlier
        return primitives.worker_local(part, axis_name), x, tokens

    def forward(part, state, earlier, x, tokens):
        return hook(part, state, earlier, x, tokens), (state, earlier)

    def backward(kept, cotangents):
        state, earlier = kept
        grads, x, tokens = cotangents
        if x is not None:  # an embedding has no layer below, and is late as it is
            grads, x = _after(tokens[-1], (grads, x))
        if earlier is not None:
            grads = jax.tree.map(lambda g, e: g + e.astype(g.dtype), grads, earlier)
        state = _from_floats(state, exchange.init(grads))
        with jax.named_scope(f"exchange({name})"):  # paths of timelines and wire counts
            mean, state = exchange.update(grads, state)
        return mean, _as_floats(state), None, x, (_token(mean), *tokens[:-1])

    hook.defvjp(forward, backward)
    return hook


def _require_replicated(part: Any, axis_name: AxisName, name: str) -> None:
    axes = {axis_name} if isinstance(axis_name, str) else set(axis_name)
    if any(primitives.varying_axes(leaf) & axes for leaf in jax.tree.leaves(part)):
        raise ValueError(
            f"Chain: the parameters of {name!r} are worker-local already, and the "
            "exchanged gradients are equal on all workers. Pass the replicated params: "
            "the chain itself differentiates with respect to each worker's own."
        )


# --- the tie: a data dependence that no number ever feels -----------------------------


def _token(tree: Any) -> jax.Array:
    """Derive a number from all leaves, so that it is there when they are."""
    firsts = [_bits(jnp.ravel(leaf)[0]) for leaf in jax.tree.leaves(tree) if leaf.size]
    token = jnp.zeros([], jnp.int32)
    for bits in firsts:
        token = token | bits
    return lax.bitcast_convert_type(token, jnp.float32)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)


def _after(token: jax.Array, tree: Any) -> Any:
    """Return a tree that is there only once the token is.

    An odd number is never zero, which the compiler does not find out: it keeps the
    select. (It removes ``lax.optimization_barrier``.)
    """
    never = (_bits(token) | 1) == 0

    def wait(x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x  # nothing flows back to it
        return jnp.where(never, jnp.zeros_like(x), x)

    return jax.tree.map(wait, tree)


# --- state as cotangents --------------------------------------------------------------


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _as_floats(tree: Any) -> Any:
    """Hold whole numbers and keys as the floats of their bits; copies keep them."""

    def convert(x):
        if jnp.issubdtype(x.dtype, jnp.floating):
            return x
        x = jax.random.key_data(x) if _is_key(x) else x
        is_wide = x.dtype.itemsize == 8
        x = x.astype(jnp.int64 if is_wide else jnp.int32)
        return lax.bitcast_convert_type(x, jnp.float64 if is_wide else jnp.float32)

    return jax.tree.map(convert, tree)


def _from_floats(tree: Any, like: Any) -> Any:
    """Invert :func:`_as_floats`; ``like`` has the types."""

    def convert(x, like):
        if jnp.issubdtype(like.dtype, jnp.floating):
            return x
        bits = jax.random.key_data(like) if _is_key(like) else like
        wide = jnp.int64 if bits.dtype.itemsize == 8 else jnp.int32
        x = lax.bitcast_convert_type(x, wide).astype(bits.dtype)
        return (
            jax.random.wrap_key_data(x, impl=jax.random.key_impl(like))
            if _is_key(like)
            else x
        )

    return jax.tree.map(convert, tree, like)
