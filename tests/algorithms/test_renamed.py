"""Names of arguments: one for one quantity, one order, and old ones with a warning."""

import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import bagua_jax
from bagua_jax import compressors, renamed
from bagua_jax.algorithms import REGISTRY

# What several algorithms have, in the order of their signatures.
ORDER = (
    "learning_rate",
    "compressor",
    "axis_name",
    "topology",
    "consensus_step_size",
    "local_steps",
    "ratio",
    "staleness",
    "warmup_steps",
    "momentum",
    "outer_learning_rate",
    "outer_momentum",
    "b1",
    "b2",
    "eps",
    "weight_decay",
    "error_feedback",
    "bucket_bytes",
    "seed",
)
POSITIONAL = ("learning_rate", "compressor")

# Of each renamed argument its name now, and two values that make a difference.
VALUES = {
    "period": ("local_steps", 2, 3),
    "communication_interval": ("local_steps", 2, 3),
    "start_step": ("warmup_steps", 1, 2),
    "mask_ratio": ("ratio", 0.5, 0.25),
    "density": ("ratio", 0.5, 0.25),
    "mixing_rate": ("consensus_step_size", 0.5, 0.25),
    "slow_learning_rate": ("outer_learning_rate", 1.0, 0.5),
    "slow_momentum": ("outer_momentum", 0.5, 0.25),
}
NEEDED = {
    "cocktail_sgd": {"compressor": compressors.identity()},
    "deep_squeeze": {"compressor": compressors.identity()},
    "local_sgd": {"local_steps": 3},
    "powersgd": {"min_compression": 1.0},
    "slowmo": {"local_steps": 1, "learning_rate": 0.1},
}
RENAMED = [
    (name, old, new)
    for name, names in renamed.ARGUMENTS.items()
    for old, new in names.items()
    if name in REGISTRY
]


@pytest.mark.parametrize("name", REGISTRY)
def test_arguments_have_one_order(name):
    parameters = inspect.signature(REGISTRY[name].factory).parameters
    places = [ORDER.index(p) for p in parameters if p in ORDER]
    assert places == sorted(places), list(parameters)
    for position, parameter in parameters.items():
        keyword = parameter.kind == inspect.Parameter.KEYWORD_ONLY
        assert keyword == (position not in POSITIONAL), position


@pytest.mark.parametrize("name", REGISTRY)
def test_no_algorithm_has_an_old_name(name):
    old = {k for names in renamed.ARGUMENTS.values() for k in names} - {"axis_name"}
    assert not old & set(inspect.signature(REGISTRY[name].factory).parameters)


def test_the_table_names_arguments_that_there_are():
    functions = {n: REGISTRY[n].factory for n in renamed.ARGUMENTS if n in REGISTRY}
    functions["sharded"] = bagua_jax.sharded
    assert set(functions) == set(renamed.ARGUMENTS)
    for name, function in functions.items():
        parameters = inspect.signature(function).parameters
        for old, new in renamed.ARGUMENTS[name].items():
            assert new in parameters and old not in parameters
    for name, argument in renamed.VALUES:
        assert argument in inspect.signature(REGISTRY[name].factory).parameters


def trained(name: str, **options) -> np.ndarray:
    """Parameters of three workers after four steps."""
    tx = REGISTRY[name].factory(axis_name="workers", **NEEDED.get(name, {}), **options)

    def run(x, updates):
        state = tx.init(x)
        for update in updates:
            new, state = tx.update(update, state, x)
            x = x + new
        return x

    updates = jax.random.normal(jax.random.key(0), (3, 4, 6, 5))
    x = jnp.ones((3, 6, 5))
    return np.asarray(jax.jit(jax.vmap(run, axis_name="workers"))(x, updates))


@pytest.mark.parametrize(("name", "old", "new"), RENAMED)
def test_an_old_name_works_and_says_the_new_one(name, old, new):
    expected, first, second = VALUES[old]
    assert new == expected
    message = rf"^{name}: {old} is called {new}; the old name works until 0\.3\.0\.$"
    with pytest.warns(DeprecationWarning, match=message) as seen:
        by_old = trained(name, **{old: second})
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        np.testing.assert_array_equal(by_old, trained(name, **{new: second}))
        assert np.any(by_old != trained(name, **{new: first}))
    with pytest.raises(TypeError, match=f"{old} is the old name of {new}, and both"):
        trained(name, **{old: first, new: first})


def test_an_old_name_of_the_mesh_axis():
    with pytest.warns(DeprecationWarning, match="sharded: axis_name is called shard_"):
        exchange = REGISTRY["gradient_allreduce"].factory(axis_name="workers")
        bagua_jax.sharded(exchange, {"w": P("rows")}, axis_name="rows", num_shards=2)


def test_an_old_value():
    factory = REGISTRY["compressed_mean"].factory
    with pytest.warns(DeprecationWarning, match="error_feedback=None is called 'auto'"):
        by_none = factory(
            compressors.topk(0.5), axis_name="workers", error_feedback=None
        )
    params = jnp.ones(8)
    by_default = factory(compressors.topk(0.5), axis_name="workers")

    def structure(tx):
        made = jax.vmap(lambda x: tx.init(x), axis_name="workers")(params[None])
        return jax.tree.structure(made)

    assert structure(by_none) == structure(by_default)


def test_other_functions_are_not_touched():
    given = {"period": 3, "axis_name": "workers"}
    assert renamed.translate("mine", given) == given
