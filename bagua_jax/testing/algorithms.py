"""What every algorithm promises, as checks of one configuration."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import bagua_jax
from bagua_jax import Workers, buckets, wire
from bagua_jax.entries import Placement
from bagua_jax.primitives import AxisName
from bagua_jax.testing.base import run_all
from bagua_jax.traffic import Sends

__all__ = ["CHECKS", "Case", "algorithm_checks", "check_algorithm"]

AXIS = "workers"
LEARNING_RATE = 0.1


class Case(NamedTuple):
    """One configuration of an algorithm, and what the checks must know of it.

    Attributes:
        factory: with the keyword ``axis_name``; returns an optax transform.
        placement: where the transform stands in a chain.
        options: keyword arguments of the factory.
        floor: distance to the optimum that compression or heterogeneity leaves; above 1
            it is the workers' spread, and their mean comes closer.
        sends: (n, sizes of buckets) -> bytes and messages of a worker on a step;
            ``None`` leaves the wire unchecked.
        oracle: the same algorithm in NumPy, with its optimizer, as two functions:
            ``init(x [n, d]) -> state`` and ``step(state, grads [n, d], t) -> state``,
            where the state is a mapping with the parameters under "x"; in a chain the
            optimizer is SGD with rate 0.1 and momentum 0.5.
        tolerance: how far simulation, devices and oracle may be apart.
    """

    factory: Callable[..., optax.GradientTransformationExtraArgs]
    placement: Placement
    options: Mapping[str, Any] = {}
    floor: float = 0.05
    sends: Sends | None = None
    oracle: tuple[Callable, Callable] | None = None
    tolerance: float = 5e-3

    @property
    def is_optimizer(self) -> bool:
        """Whether it stands alone."""
        return self.placement.endswith("optimizer")

    @property
    def own_params(self) -> bool:
        """Whether each worker has parameters of its own."""
        return self.placement in ("weight", "local optimizer")

    def make(
        self, axis_name: AxisName = AXIS, **overrides: Any
    ) -> optax.GradientTransformationExtraArgs:
        """Make the transform."""
        return self.factory(axis_name=axis_name, **{**self.options, **overrides})

    def chain(
        self, axis_name: AxisName = AXIS, inner: Any = None, **overrides: Any
    ) -> optax.GradientTransformationExtraArgs:
        """Put the transform where it stands in a training loop."""
        tx = self.make(axis_name, **overrides)
        inner = optax.sgd(LEARNING_RATE, momentum=0.5) if inner is None else inner
        if self.placement == "gradient":
            return optax.chain(tx, inner)
        return optax.chain(inner, tx) if self.placement == "weight" else tx


# --- a small problem: f_i(x) = 1/2 |x - b_i|^2 over a tree of awkward leaves ----------


def awkward(dtype=jnp.float32) -> dict[str, Any]:
    """Return parameters with odd, empty, scalar and missing leaves."""
    return {
        "nested": {"odd": jnp.linspace(-1, 1, 15, dtype=dtype).reshape(5, 3)},
        "scalar": jnp.asarray(0.5, dtype),
        "none": None,
        "empty": jnp.zeros((0, 2), dtype),
        "vector": jnp.full(7, 0.25, dtype),
    }


def targets(n: int) -> jax.Array:
    """Return b_i [n]: heterogeneous, mean 1."""
    b = jnp.arange(n, dtype=jnp.float32)
    return 1 + 0.25 * (b - b.mean())


def loss(tree: Any, target: jax.Array) -> jax.Array:
    """Return the squared distance to the target, halved."""
    leaves = jax.tree.leaves(tree)
    squares = [jnp.sum((x - target.astype(x.dtype)) ** 2) for x in leaves]
    return 0.5 * jnp.asarray(sum(squares))


@jax.tree_util.register_pytree_with_keys_class
class Affine:
    """Parameters in a class of a user's own, that compares by identity."""

    def __init__(self, w: Any, b: Any) -> None:
        self.w, self.b = w, b

    def tree_flatten_with_keys(self):
        keys = map(jax.tree_util.GetAttrKey, ("w", "b"))
        return tuple(zip(keys, (self.w, self.b), strict=True)), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        del aux
        return cls(*children)


class Training(NamedTuple):
    """A compiled training loop."""

    init: Callable
    step: Callable
    specs: Any


def training(workers: Workers, case: Case, tx=None, start=None, loss=loss) -> Training:
    """Build a loop; parameters vary where workers have their own."""
    axis = workers.axis_name
    tx = case.chain(axis) if tx is None else tx
    start = awkward() if start is None else start

    def init():
        x = bagua_jax.worker_local(start, axis) if case.own_params else start
        return x, tx.init(x)

    def step(state, target):
        x, opt = state
        grads = jax.grad(loss)(bagua_jax.worker_local(x, axis), target)
        updates, opt = tx.update(grads, opt, x)
        return optax.apply_updates(x, updates), opt

    specs = workers.specs(init)
    return Training(
        workers.spmd(init), workers.spmd(step, in_specs=(specs, workers.spec)), specs
    )


def run(workers: Workers, case: Case, steps: int, **kwargs):
    """Train, and return the state at the boundary."""
    loop = training(workers, case, **kwargs)
    state = loop.init()
    for _ in range(steps):
        state = jax.block_until_ready(loop.step(state, targets(workers.num_workers)))
    return state


def stacked(n: int, case: Case, tree: Any) -> Any:
    """Return parameters with a worker axis, whatever the placement."""
    if case.own_params:
        return tree
    return jax.tree.map(lambda x: np.broadcast_to(x, (n, *x.shape)), tree)


# --- the checks -----------------------------------------------------------------------


def extra_arguments_are_ignored(case: Case, n: int) -> None:
    """Update takes any keyword that another transform of the chain may want."""
    tx = case.make()

    def step(x):
        return tx.update(x, tx.init(x), x, value=1.0, nonsense=object())[0]

    out = jax.eval_shape(jax.vmap(step, axis_name=AXIS), jnp.ones((n, 3)))
    chex.assert_shape(out, (n, 3))


def init_needs_no_axis(case: Case, n: int) -> None:
    """Init holds no collective, and its state only arrays."""
    del n
    tx = case.make()
    state = tx.init(awkward())
    abstract = jax.eval_shape(tx.init, awkward())
    chex.assert_trees_all_equal_shapes_and_dtypes(state, abstract)
    for leaf in jax.tree.leaves(state):
        assert isinstance(leaf, jax.Array), f"the state holds a {type(leaf).__name__}"


def one_compilation(case: Case, n: int) -> None:
    """The state keeps its shapes and types from step to step."""
    loop = training(Workers.simulate(n), case)
    state = loop.init()
    for _ in range(3):
        state = loop.step(state, targets(n))
    count = loop.step._cache_size()
    assert count == 1, f"three steps took {count} compilations"


def types_are_stable(case: Case, n: int) -> None:
    """The state is a carry of ``lax.scan`` and passes ``lax.cond``, types included."""
    workers, tx = Workers.devices(n), case.chain()

    def program(target):
        x = awkward()
        x = bagua_jax.worker_local(x, AXIS) if case.own_params else x
        opt = tx.init(x)

        def step(carry, t):
            x, opt = carry
            grads = jax.grad(loss)(bagua_jax.worker_local(x, AXIS), target)
            updates, new = tx.update(grads, opt, x)
            opt = jax.lax.cond(t < 100, lambda: new, lambda: opt)
            return (optax.apply_updates(x, updates), opt), None

        (x, new_opt), _ = jax.lax.scan(step, (x, opt), jnp.arange(3))
        chex.assert_trees_all_equal_shapes_and_dtypes(opt, new_opt)
        return x

    out = workers.spmd(program, in_specs=workers.spec)(targets(n))
    chex.assert_tree_all_finite(out)


def dtype_is_kept(case: Case, n: int) -> None:
    """Updates have the parameters' dtypes, and no step changes one of the state.

    With bfloat16 and float32, and with float64 beside them where JAX has it enabled.
    """
    start: dict[str, Any] = {"h": jnp.ones(7, jnp.bfloat16), "f": jnp.ones((4, 3))}

    def check():
        before, after, updates = _traced_step(case, start, n)
        chex.assert_trees_all_equal_dtypes(before, after)
        chex.assert_trees_all_equal_dtypes(updates, start)

    check()
    with jax.enable_x64(True):
        start["d"] = jnp.ones((5, 2), jnp.float64)
        check()


def promotion_may_be_strict(case: Case, n: int) -> None:
    """It runs in float32 under ``jax_numpy_dtype_promotion="strict"``."""
    with jax.numpy_dtype_promotion("strict"):
        _traced_step(case, {"a": jnp.ones((4, 3)), "b": jnp.zeros(3)}, n)


def buffers_are_its_own(case: Case, n: int) -> None:
    """A state that was made outside of ``jax.jit`` can be donated with the parameters.

    No buffer of it is the parameters', or stands in it twice.
    """
    del n
    params = {"a": jnp.ones((4, 3)), "b": jnp.zeros(3)}
    seen: dict[int, str] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(
        (params, case.chain().init(params))
    ):
        name = jax.tree_util.keystr(path)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        if x.size:
            first = seen.setdefault(x.unsafe_buffer_pointer(), name)
            assert first == name, f"{name} is the buffer of {first}, of (params, state)"


def any_class_of_parameters(case: Case, n: int) -> None:
    """Parameters may be a pytree class without ``__eq__``, as in Equinox."""
    start = Affine(jnp.ones((4, 3)), jnp.zeros(3))
    before, after, updates = _traced_step(case, start, n)
    for tree, like in ((after, before), (updates, start)):
        assert jax.tree.structure(tree) == jax.tree.structure(like)


def _traced_step(case: Case, start: Any, n: int) -> Any:
    """Trace a step on n workers: the state before and after it, and the updates."""
    tx = case.chain(inner=optax.sgd(LEARNING_RATE))

    def step(x):
        state = tx.init(start)
        grads = jax.tree.map(lambda p: x.astype(p.dtype) * p, start)
        updates, after = tx.update(grads, state, start)
        return state, after, updates

    return jax.eval_shape(jax.vmap(step, axis_name=AXIS), jnp.ones(n))


def simulation_equals_devices(case: Case, n: int) -> None:
    """The same transform does the same under vmap and under shard_map."""
    simulated = run(Workers.simulate(n), case, steps=25)
    real = run(Workers.devices(n), case, steps=25)
    chex.assert_trees_all_close(simulated[0], real[0], atol=case.tolerance, rtol=0)


def long_vectors_too(case: Case, n: int) -> None:
    """Above 4,096 elements, in several buckets where the factory has buckets."""
    start = {"a": jnp.linspace(-1, 1, 5000), "b": jnp.linspace(0, 1, 999)}
    takes = inspect.signature(case.factory).parameters
    small: dict[str, Any] = {"bucket_bytes": 8192} if "bucket_bytes" in takes else {}
    simulated, real = (
        run(place, case, 3, start=start, tx=case.chain(**small))
        for place in (Workers.simulate(n), Workers.devices(n))
    )
    chex.assert_tree_all_finite(simulated[0])
    chex.assert_trees_all_close(simulated[0], real[0], atol=case.tolerance, rtol=0)


def mean_model_reaches_the_optimum(case: Case, n: int) -> None:
    """On a heterogeneous quadratic, up to the stated floor."""
    x = stacked(n, case, run(Workers.simulate(n), case, steps=200)[0])
    for leaf in map(np.asarray, jax.tree.leaves(x)):
        if leaf.size:
            off = np.max(np.abs(leaf.mean(axis=0) - 1))
            assert off < (case.floor if case.floor < 1 else 0.05), (
                f"after 200 steps the mean model is {off:.3g} off, floor {case.floor}"
            )
            assert np.max(np.abs(leaf - 1)) < max(case.floor, 0.05)


def replicas_are_proved_equal(case: Case, n: int) -> None:
    """JAX's types say whether workers share the parameters, and the bits agree."""
    workers = Workers.devices(n)
    loop = training(workers, case)
    for spec in jax.tree.leaves(loop.specs[0], is_leaf=lambda s: isinstance(s, P)):
        assert spec == (workers.spec if case.own_params else P())
    state = before = loop.init()
    for _ in range(3):
        state = jax.block_until_ready(loop.step(state, targets(n)))
    chex.assert_trees_all_equal_shapes_and_dtypes(before, state)
    if case.own_params:
        return
    for leaf in jax.tree.leaves(state[0]):
        copies = [np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards]
        assert copies == copies[:1] * n, "the workers' copies differ"


def summed_gradients_are_refused(case: Case, n: int) -> None:
    """Gradients that JAX has already summed would be n times too large."""
    if case.own_params:
        return
    workers, tx = Workers.devices(n), case.chain()

    def step(target):
        x = awkward()
        grads = jax.grad(loss)(x, target)  # x is replicated: summed by JAX
        return tx.update(grads, tx.init(x), x)[0]

    try:
        workers.spmd(step, in_specs=workers.spec)(targets(n))
    except ValueError as error:
        assert "already summed" in str(error), error
    else:
        raise AssertionError("gradients that were already summed were averaged again")


def wrappers_compose(case: Case, n: int) -> None:
    """named_chain changes nothing; masked and accumulate work."""
    workers, bare = Workers.simulate(n), case.make()
    inner = optax.sgd(LEARNING_RATE, momentum=0.5)
    parts = {
        "gradient": [("sync", bare), ("opt", inner)],
        "weight": [("opt", inner), ("sync", bare)],
    }.get(case.placement, [("sync", bare)])
    named = optax.named_chain(*parts)
    out, plain = (run(workers, case, 3, tx=tx) for tx in (named, case.chain()))
    chex.assert_trees_all_equal(out[0], plain[0])
    mask = jax.tree.map(lambda x: x.ndim > 0, awkward())
    masked = [
        (name, optax.masked(t, mask) if name == "sync" else t) for name, t in parts
    ]
    for tx in (optax.named_chain(*masked), bagua_jax.accumulate(case.chain(), 2)):
        # A leaf that is not exchanged becomes each worker's own.
        own = case._replace(placement="weight")
        chex.assert_tree_all_finite(run(workers, own, 3, tx=tx)[0])


def non_finite_values_are_seen(case: Case, n: int) -> None:
    """A NaN or an infinity on one worker reaches all others."""
    for start in (None, {"a": jnp.linspace(-1, 1, 5000), "b": jnp.zeros(7)}):
        loop = training(Workers.simulate(n), case, start=start)
        for bad in (jnp.nan, jnp.inf, -jnp.inf):
            state, target = loop.init(), targets(n)
            for t in range(3 * n):
                given = target.at[n // 2].set(bad) if t == 0 else target
                state = loop.step(state, given)
            for leaf in jax.tree.leaves(stacked(n, case, state[0])):
                if leaf.size:
                    rows = (~np.isfinite(np.asarray(leaf))).reshape(n, -1)
                    hidden = np.flatnonzero(~rows.any(axis=1)).tolist()
                    assert not hidden, f"{bad} on one worker is hidden from {hidden}"


def a_saved_state_continues(case: Case, n: int) -> None:
    """The state as NumPy arrays and back goes on bit for bit."""
    loop = training(Workers.simulate(n), case)
    state = loop.init()
    for _ in range(3):
        state = loop.step(state, targets(n))

    def is_key(leaf) -> bool:
        return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)

    def copied(leaf):
        if is_key(leaf):
            data = jnp.asarray(np.asarray(jax.random.key_data(leaf)))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return jnp.asarray(np.asarray(leaf))

    restored = jax.tree.map(copied, state)
    for _ in range(9):
        state = loop.step(state, targets(n))
        restored = loop.step(restored, targets(n))
    chex.assert_trees_all_equal(state[0], restored[0])


def one_worker_trains(case: Case, n: int) -> None:
    """Without peers it is an optimizer like others."""
    del n
    for place in (Workers.simulate(1), Workers.devices(1)):
        x = stacked(1, case, run(place, case, steps=200)[0])
        for leaf in map(np.asarray, jax.tree.leaves(x)):
            if leaf.size:
                off = np.max(np.abs(leaf - 1))
                assert off < max(0.05, min(case.floor, 1)), (
                    f"alone it ends {off:.3g} off"
                )


def bytes_are_as_stated(case: Case, n: int) -> None:
    """What the compiled program sends is what ``sends`` says."""
    if case.sends is None:
        return
    start = {"w": jnp.zeros((301, 7)), "b": jnp.zeros(13), "s": jnp.zeros(())}
    loop = training(Workers.devices(n), case, start=start)
    program = loop.step.lower(loop.init(), targets(n))
    size = case.options.get("bucket_bytes", buckets.DEFAULT_BUCKET_BYTES)
    nbytes, messages = case.sends(n, buckets.plan(start, size).sizes)
    compared = wire.compare(program, program.compile())
    for counted in (compared.intended, compared.compiled):
        np.testing.assert_allclose(counted.bytes_per_worker, nbytes, rtol=1e-6)
    # XLA may combine messages that the program intends.
    found = compared.compiled.messages_per_worker
    np.testing.assert_allclose(found, messages, rtol=1e-6)


def the_oracle_agrees(case: Case, n: int) -> None:
    """20 steps on 5,000 parameters equal those of the oracle in NumPy."""
    if case.oracle is None:
        return
    init, step = case.oracle
    start, b = np.linspace(-1, 1, 5000, dtype=np.float32), np.asarray(targets(n))
    state = init(np.tile(start, (n, 1)))
    for t in range(20):
        state = step(state, state["x"] - b[:, None], t)
    x = run(Workers.simulate(n), case, 20, start=jnp.asarray(start))[0]
    found = stacked(n, case, x)
    np.testing.assert_allclose(found, state["x"], atol=case.tolerance, rtol=0)


CHECKS: Mapping[Callable[[Case, int], None], str] = {
    extra_arguments_are_ignored: "Take **extra_args in update_fn.",
    init_needs_no_axis: "Keep collectives and Python numbers out of init_fn.",
    one_compilation: "Return every leaf of the state with its shape and dtype.",
    types_are_stable: "Declare what differs between workers with "
    "bagua_jax.worker_local(tree, axis_name) in init_fn, and only that.",
    dtype_is_kept: "Cast the update back: .astype(g.dtype); and keep trees of the "
    "state in bagua_jax.precision.zeros(params), float32 or wider.",
    promotion_may_be_strict: "Cast before arithmetic of two dtypes: counters and "
    "booleans to the vector's, x.astype(v.dtype).",
    buffers_are_its_own: "Copy parameters that the state keeps, "
    "bagua_jax.precision.copy(params), and make zeros for every field.",
    any_class_of_parameters: "Compare jax.tree.structure and the shapes of leaves, "
    "never two trees that were mapped.",
    simulation_equals_devices: "Communicate through bagua_jax.primitives only.",
    long_vectors_too: "Communicate through bagua_jax.primitives only; decide what is "
    "finite by jnp.isfinite, never by a maximum.",
    mean_model_reaches_the_optimum: "If the bias is wanted, state it: floor=...",
    replicas_are_proved_equal: "Check the placement. On the gradient side return what "
    "primitives return, which is typed as equal on all workers.",
    summed_gradients_are_refused: "Call bagua_jax.primitives.require_local(updates, "
    "axis_name, caller) in update_fn.",
    wrappers_compose: "Treat missing leaves as optax does: map over trees.",
    non_finite_values_are_seen: "Do not replace, clip or code away what is not finite.",
    a_saved_state_continues: "Keep all of the state in the state: no Python counters.",
    one_worker_trains: "Nothing may divide by n - 1, or index a peer that is none.",
    bytes_are_as_stated: "Mend the formula, or find out what the compiler changed with "
    "bagua_jax.wire.compare.",
    the_oracle_agrees: "One of the two is wrong: compare them step by step.",
}
"""Every check, with what usually cures its failure."""


def check_algorithm(
    factory: Callable[..., optax.GradientTransformationExtraArgs],
    placement: Placement,
    options: Mapping[str, Any] | None = None,
    *,
    floor: float = 0.05,
    sends: Sends | None = None,
    oracle: tuple[Callable, Callable] | None = None,
    tolerance: float = 5e-3,
    workers: Sequence[int] = (2, 8),
    skip: Sequence[str] = (),
) -> None:
    """Hold an algorithm to the contracts of the shipped ones.

    Args:
        factory: with the keyword ``axis_name``; returns an optax transform.
        placement: "gradient" (before the optimizer), "weight" (last), "optimizer"
            or "local optimizer" (alone; with parameters equal on all workers, or each
            worker's own).
        options: keyword arguments of the factory.
        floor: see :class:`Case`.
        sends: see :class:`Case`.
        oracle: see :class:`Case`.
        tolerance: see :class:`Case`.
        workers: numbers of workers; as many devices must be there.
        skip: names of checks to leave out.

    Raises:
        AssertionError: naming every failed check, what was seen, and the cure.
        ValueError: if a name in ``skip`` is not a check's, or devices are missing.

    Example:
        >>> from bagua_jax.algorithms import gradient_allreduce
        >>> check_algorithm(gradient_allreduce, "gradient", workers=[1])
    """
    case = Case(factory, placement, options or {}, floor, sends, oracle, tolerance)
    there = len(jax.devices())
    if max(workers) > there:
        raise ValueError(
            f"check_algorithm: workers={list(workers)} needs {max(workers)} devices, "
            f"and there are {there}. Before anything else of jax: "
            f'jax.config.update("jax_num_cpu_devices", {max(workers)}).'
        )
    names = [check.__name__ for check in CHECKS]
    if wrong := sorted(set(skip) - set(names)):
        raise ValueError(
            f"check_algorithm: skip must name checks, got {wrong}. There are "
            f"{', '.join(names)}."
        )
    run_all(
        getattr(factory, "__name__", "the algorithm"),
        (
            (f"{name} (n = {n})", check, cure)
            for n in workers
            for name, check, cure in algorithm_checks(case, n)
            if name not in skip
        ),
    )


def algorithm_checks(case: Case, n: int) -> list[tuple[str, Callable[[], None], str]]:
    """List name, check and cure of every check, for ``pytest.mark.parametrize``.

    Example:
        >>> from bagua_jax.algorithms import bytegrad
        >>> [name for name, *_ in algorithm_checks(Case(bytegrad, "gradient"), 8)][:2]
        ['extra_arguments_are_ignored', 'init_needs_no_axis']
    """
    return [
        (check.__name__, lambda check=check: check(case, n), cure)
        for check, cure in CHECKS.items()
    ]
