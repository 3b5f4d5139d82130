"""A worker's value and gradient, equal in meaning wherever workers live."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bagua_jax import extras, primitives
from bagua_jax.compressors import numerics
from bagua_jax.primitives import AxisName

__all__ = ["nnx_value_and_grad", "value_and_grad"]


def value_and_grad(
    fun: Callable[..., Any],
    axis_name: AxisName,
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    weight: Callable[..., Any] | None = None,
) -> Callable[..., tuple[Any, Any]]:
    r"""Differentiate a loss with respect to this worker's own parameters.

    ``jax.value_and_grad``, with one rule under ``jax.shard_map`` (with and without
    ``check_vma``), ``jax.vmap`` and ``jax.pmap``, whatever collectives ``fun`` holds:
    *the mean over the workers of the gradients is the gradient of the mean over the
    workers of what* ``fun`` *returns.*

    .. math::
        \frac1n \sum_i g_i = \nabla_x \frac1n \sum_j c_j f_j(x, \dots, x),\qquad
        c_j = 1,\ \text{or}\ \frac{n w_j}{\sum_k w_k}\ \text{with weights}

    So ``fun`` may return the loss of this worker's batch, its ``lax.pmean``, or a loss
    whose statistics are synchronized inside. ``jax.value_and_grad`` counts a loss that
    is equal on all workers once under ``shard_map``, and n times elsewhere.

    Args:
        fun: the loss, ``fun(*args, **kwargs)``: a scalar, or ``(scalar, aux)``.
        axis_name: the axis, or axes, of the workers.
        argnums: which positional arguments to differentiate.
        has_aux: whether ``fun`` returns ``(scalar, aux)``.
        weight: function of ``fun``'s arguments, or ``None``: this worker's number of
            samples or tokens, a scalar of at least 0. Then ``fun`` returns the mean
            over its own samples, and means over workers are means over all samples. A
            worker of weight 0 counts nothing, and what is not finite in its own loss
            and backward pass is dropped.

    Returns:
        A function of ``fun``'s arguments that returns the value, or ``(value, aux)``,
        and the gradient, both this worker's own (varying); with ``weight`` both are
        multiplied by :math:`c_i`.

    Raises:
        NameError: when called, if the axis is not mapped there.
        ValueError: when called, if ``weight`` does not return a scalar, or an argument
            to differentiate holds a module of ``flax.nnx``: see
            :func:`nnx_value_and_grad`.

    Communication:
        None of its own; with ``weight`` one all-reduce of a number. The gradient of a
        loss that ends in ``pmean`` or ``psum`` takes one more all-reduce of a number.

    Differences from the one-device program:
        No type shows that a loss is divided wrongly: this worker's sum over the
        ``psum`` of counts makes all gradients n times too small, everywhere. Return the
        mean over this worker's samples, and pass ``weight``. Where statistics are
        synchronized in ``fun``, a division by zero at an empty worker reaches the
        others before anybody can drop it: divide by ``max(count, 1)``.

    Example:
        >>> loss = lambda p, x: jax.lax.pmean(jnp.mean((p - x) ** 2), "workers")
        >>> step = lambda x: value_and_grad(loss, "workers")(jnp.float32(0), x)
        >>> value, grads = jax.vmap(step, axis_name="workers")(jnp.array([1.0, 3.0]))
        >>> value.tolist(), float(grads.mean())  # the mean of 1 and 9; of -2 and -6
        ([5.0, 5.0], -4.0)

        Two samples at one worker, none at the other:

        >>> loss = lambda p, x, real: jnp.sum((p - x) ** 2 * real) / jnp.sum(real)
        >>> count = lambda p, x, real: jnp.sum(real)
        >>> step = lambda *b: value_and_grad(loss, "workers", weight=count)(0.0, *b)
        >>> real = jnp.array([[1.0, 1.0], [0.0, 0.0]])
        >>> x = jnp.array([[1.0, 3.0], [7.0, 9.0]])
        >>> value, grads = jax.vmap(step, axis_name="workers")(x, real)
        >>> float(value.mean()), float(grads.mean())
        (5.0, -4.0)
    """
    caller = "value_and_grad"
    differentiated = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    def wrapped(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        primitives.axis_size(axis_name, caller)
        own = list(args)
        for k in differentiated:
            primitives.refuse_graphs(own[k], caller)
            arrays = jax.tree.map(_as_array, own[k])
            own[k] = primitives.worker_local(arrays, axis_name)
        share = None
        if weight is not None:
            share = primitives.worker_share(
                jax.lax.stop_gradient(weight(*own, **kwargs)), axis_name, caller
            )

        def loss_fn(*args, **kwargs):
            out = fun(*args, **kwargs)
            loss, aux = out if has_aux else (out, None)
            if share is not None:
                loss = _weighted(loss, share)
            # Typed as varying here, a loss that is equal on all workers is counted once
            # for each of them, as it is wherever JAX does not know that it is equal.
            return primitives.worker_local(loss, axis_name), aux

        take = jax.value_and_grad(loss_fn, argnums, has_aux=True)
        (loss, aux), grads = take(*own, **kwargs)
        if share is not None:
            grads = jax.tree.map(lambda g: _without_faults(g, share), grads)
        return ((loss, aux) if has_aux else loss), grads

    return wrapped


def nnx_value_and_grad(
    fun: Callable[..., Any],
    axis_name: AxisName,
    *,
    wrt: Any = None,
    has_aux: bool = False,
    weight: Callable[..., Any] | None = None,
) -> Callable[..., tuple[Any, Any]]:
    """Differentiate a loss of a ``flax.nnx`` module at this worker's own parameters.

    :func:`value_and_grad` for modules that are changed in place: the module is split,
    a copy of it is differentiated as a pure function, and what the forward pass wrote
    (running means, counts of random draws) is written into the module that was passed.

    Args:
        fun: the loss, ``fun(model, *args, **kwargs)``: a scalar, or ``(scalar, aux)``.
        axis_name: the axis, or axes, of the workers.
        wrt: what to differentiate, a filter of ``flax.nnx``; ``None``: ``nnx.Param``.
        has_aux: whether ``fun`` returns ``(scalar, aux)``.
        weight: function of ``fun``'s arguments, as in :func:`value_and_grad`.

    Returns:
        A function of ``fun``'s arguments that returns the value, or ``(value, aux)``,
        and the gradient, a ``nnx.State``, both this worker's own.

    Randomness:
        Keys of the module are equal on all workers, and stay so. In the copy each
        worker's index is folded into them, so that dropout differs between workers;
        worker 0 draws what the module alone would.

    State:
        What ``fun`` writes is each worker's own where it depends on the worker's batch,
        such as running means of a ``BatchNorm`` without ``axis_name``: typed as
        varying, it cannot leave a ``shard_map`` of your own by ``out_specs=P()``.
        ``Workers.loop`` with the module's state in its own stacks it.

    Raises:
        ImportError: if flax is not installed.
        ValueError: when called, if the first argument is no module, or ``fun`` gives
            it another key, which could not be kept.

    Communication:
        That of :func:`value_and_grad`.

    Example:
        >>> from flax import nnx
        >>> class Scale(nnx.Module):
        ...     def __init__(self):
        ...         self.by = nnx.Param(jnp.ones(()))
        ...         self.calls = nnx.Variable(jnp.zeros((), int))
        ...     def __call__(self, x):
        ...         self.calls[...] += 1
        ...         return self.by[...] * x
        >>> def step(x):
        ...     model = Scale()
        ...     loss_fn = lambda model, x: model(x) ** 2
        ...     loss, grads = nnx_value_and_grad(loss_fn, "workers")(model, x)
        ...     return loss, grads["by"][...], model.calls[...]
        >>> loss, grads, calls = jax.vmap(step, axis_name="workers")(jnp.arange(1.0, 3))
        >>> loss.tolist(), grads.tolist(), calls.tolist()
        ([1.0, 4.0], [2.0, 8.0], [1, 1])
    """
    caller = "nnx_value_and_grad"
    try:
        from flax import nnx
    except ModuleNotFoundError as error:
        raise ImportError(extras.missing(error, caller)) from None
    kinds = (nnx.Param if wrt is None else wrt, nnx.RngKey, ...)

    def wrapped(model: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not isinstance(model, nnx.Module):
            raise ValueError(
                f"{caller}: the first argument must be a flax.nnx.Module, got "
                f"{type(model).__name__}. For trees use bagua_jax.value_and_grad."
            )
        graph, params, keys, rest = nnx.split(model, *kinds)
        index = primitives.axis_index(axis_name, caller)
        own_keys = jax.tree.map(lambda key: _own_key(key, index), keys)

        def merged(params, rest):
            return nnx.merge(graph, params, own_keys, rest, copy=True)

        def pure(params, rest, *args, **kwargs):
            copy = merged(params, rest)
            out = fun(copy, *args, **kwargs)
            loss, aux = out if has_aux else (out, None)
            _, _, after, rest = nnx.split(copy, *kinds)
            if any(map(operator.is_not, *map(jax.tree.leaves, (after, own_keys)))):
                raise ValueError(
                    f"{caller}: {getattr(fun, '__name__', 'fun')} gives the module "
                    "another key (nnx.reseed, or a fork), and keys are those of a "
                    "worker's copy there. Do it outside of the loss."
                )
            return loss, (aux, rest)

        def of_copy(count):
            return lambda params, rest, *args, **kwargs: count(
                merged(params, rest), *args, **kwargs
            )

        pure_weight = None if weight is None else of_copy(weight)
        take = value_and_grad(pure, axis_name, has_aux=True, weight=pure_weight)
        (loss, (aux, rest)), grads = take(params, rest, *args, **kwargs)
        nnx.update(model, rest)
        return ((loss, aux) if has_aux else loss), grads

    return wrapped


def _own_key(key: jax.Array, index: jax.Array) -> jax.Array:
    """Fold a worker's index into keys of any shape, typed or not; not into worker 0."""
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    keys = key if is_typed else jax.random.wrap_key_data(key)
    fold = jax.vmap(lambda k: jax.random.fold_in(k, index))
    own = jnp.where(index == 0, keys, fold(keys.reshape(-1)).reshape(keys.shape))
    return own if is_typed else jax.random.key_data(own)


def _as_array(x: Any) -> Any:
    """Make an array of a Python number, which would have no type to mark."""
    return jnp.asarray(x) if isinstance(x, float | complex) else x


def _weighted(loss: jax.Array, share: jax.Array) -> jax.Array:
    weighted = loss.astype(jnp.promote_types(loss.dtype, share.dtype)) * share
    return jnp.where(share == 0, 0, weighted).astype(loss.dtype)


def _without_faults(gradient: jax.Array, share: jax.Array) -> jax.Array:
    """Drop an empty worker's 0 * inf, and keep what others' losses send it."""
    sound = (share != 0) | numerics.is_finite(gradient)
    return jnp.where(sound, gradient, jnp.zeros_like(gradient))
