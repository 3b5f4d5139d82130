"""Bad input gets an error that names the function, the rule, the value and the cure."""

import jax
import jax.numpy as jnp
import optax
import pytest
from table import ONE_EACH, ids

from bagua_jax import Workers, accumulate, compressors, topologies
from bagua_jax import algorithms as alg

AXIS = "workers"
ONE_WAY = topologies.from_matrix([[0.5, 0.5], [0, 1]], stochastic="row")

BAD_ARGUMENTS = [
    ("gradient_allreduce", {"bucket_bytes": 0}, r"bucket_bytes must be .* >= 1, got 0"),
    ("bytegrad", {"bucket_bytes": 1.5}, r"bucket_bytes must be an integer .* got 1.5"),
    ("bytegrad", {"error_feedback": "all"}, r"error_feedback must be .*'both'.*'all'"),
    ("compressed_mean", {"plan": "tree"}, r"plan must be one of .*got 'tree'"),
    ("compressed_mean", {"bucket_bytes": 0}, r"bucket_bytes must be .* >= 1, got 0"),
    ("compressed_mean", {"error_feedback": "all"}, r"error_feedback must be .*'all'"),
    ("delayed_gradients", {"staleness": -1}, r"staleness must be .* >= 0, got -1"),
    ("delayed_gradients", {"staleness": 1.5}, r"staleness must be integers .* got 1.5"),
    ("delayed_gradients", {"staleness": [[0, 1], [1]]}, r"must be integers >= 0, got"),
    ("delayed_gradients", {"staleness": [0, -2]}, r">= 0, got \[0, -2\]. Give one, "),
    ("delayed_gradients", {"bucket_bytes": 0}, r"bucket_bytes must be .* got 0"),
    ("adasum", {"scope": "bucket"}, r"scope must be one of 'leaf', 'whole'; got"),
    ("adasum", {"bucket_bytes": 0}, r"bucket_bytes must be .* got 0"),
    ("marina", {"probability": 0.0}, r"probability must be in \(0, 1\], got 0.0: with"),
    ("marina", {"probability": 1.5}, r"probability must be in \(0, 1\], got 1.5"),
    ("marina", {"compressor": compressors.topk()}, r"must be unbiased.* Use ef21"),
    ("marina", {"bucket_bytes": 0}, r"bucket_bytes must be .* got 0"),
    ("cocktail_sgd", {"ratio": 0.0}, r"ratio must be in \(0, 1\], got 0.0"),
    ("cocktail_sgd", {"staleness": 2}, r"staleness must be 0 or 1, got 2: one message"),
    ("cocktail_sgd", {"staleness": -1}, r"staleness must be an integer >= 0, got -1"),
    ("cocktail_sgd", {"bucket_bytes": 0}, r"bucket_bytes must be .* got 0"),
    ("diana", {"alpha": 1.5}, r"alpha must be at most 1, got 1.5"),
    ("diana", {"bucket_bytes": 0}, r"bucket_bytes must be .* got 0"),
    ("diana", {"compressor": compressors.sign()}, r"must be unbiased.* Use ef21"),
    ("ef21", {"bucket_bytes": 0}, r"bucket_bytes must be .* got 0"),
    ("ef21", {"compressor": compressors.randk()}, r"must be below 1.* Use diana"),
    ("dgc", {"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
    ("dgc", {"ratio": 0}, r"ratio must be in \(0, 1\], got 0"),
    ("dgc", {"ratio": 1.5}, r"ratio must be in \(0, 1\], got 1.5"),
    ("dgc", {"clip": 0.0}, r"clip must be in \(0, inf\), got 0.0"),
    ("dgc", {"bucket_bytes": 0}, r"bucket_bytes must be .* got 0"),
    ("powersgd", {"rank": 0}, r"rank must be an integer >= 1, got 0"),
    ("powersgd", {"warmup_steps": -1}, r"warmup_steps must be .* >= 0, got -1"),
    ("powersgd", {"min_compression": 0.5}, r"min_compression must be .* got 0.5"),
    ("signum", {"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
    ("signum", {"weight_decay": -1.0}, r"weight_decay must be in \[0, inf\), got -1"),
    ("signum", {"bucket_bytes": 0}, r"bucket_bytes must be .* got 0"),
    ("one_bit_adam", {"warmup_steps": 0}, r"warmup_steps must be .* >= 1, got 0"),
    ("one_bit_adam", {"b1": 1.0}, r"b1 must be in \[0, 1\), got 1.0"),
    ("one_bit_adam", {"b2": -0.1}, r"b2 must be in \[0, 1\), got -0.1"),
    ("one_bit_adam", {"eps": 0.0}, r"eps must be in \(0, inf\), got 0.0"),
    ("one_bit_adam", {"bucket_bytes": 0}, r"bucket_bytes must be .* got 0"),
    ("zero_one_adam", {"var_freeze_step": 0}, r"var_freeze_step must be .* got 0"),
    ("zero_one_adam", {"var_update_scaler": 1.5}, r"var_update_scaler .* got 1.5"),
    ("zero_one_adam", {"local_step_scaler": 0}, r"local_step_scaler must .* got 0"),
    ("zero_one_adam", {"local_step_clipper": 0}, r"local_step_clipper must .* got 0"),
    ("zero_one_adam", {"bucket_bytes": 0}, r"bucket_bytes must be .* got 0"),
    ("zero_one_adam", {"b2": 1.0}, r"b2 must be in \[0, 1\), got 1.0"),
    ("zero_one_adam", {"eps": 0.0}, r"eps must be in \(0, inf\), got 0.0"),
    ("one_bit_lamb", {"warmup_steps": 0}, r"warmup_steps must be .* >= 1, got 0"),
    ("one_bit_lamb", {"b1": 1.0}, r"b1 must be in \[0, 1\), got 1.0"),
    ("one_bit_lamb", {"coeff_beta": 1.0}, r"coeff_beta must be in \[0, 1\), got 1.0"),
    ("one_bit_lamb", {"eps": 0.0}, r"eps must be in \(0, inf\), got 0.0"),
    ("one_bit_lamb", {"weight_decay": -1.0}, r"weight_decay must be .* got -1.0"),
    ("one_bit_lamb", {"max_coeff": 0.0}, r"max_coeff must be in \(0, inf\), got 0.0"),
    ("one_bit_lamb", {"factor_max": 0.5}, r"factor_max must be in \[1, inf\), got 0.5"),
    ("one_bit_lamb", {"factor_min": 1.0}, r"factor_min must be in \(0, 1\), got 1.0"),
    ("one_bit_lamb", {"factor_threshold": 1}, r"factor_threshold must .*, got 1"),
    ("demo", {"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
    ("demo", {"topk": 0}, r"topk must be an integer >= 1, got 0"),
    ("demo", {"chunk": 0}, r"chunk must be an integer >= 1, got 0"),
    ("demo", {"weight_decay": -1.0}, r"weight_decay must be in \[0, inf\), got -1"),
    ("gradient_tracking", {"topology": "rings"}, r"topology must .*'rings'.*mean ring"),
    ("gradient_tracking", {"bucket_bytes": 0}, r"bucket_bytes must be .* got 0"),
    (
        "gradient_tracking",
        {"topology": topologies.from_matrix([[0.5, 0], [0.5, 1]], stochastic="column")},
        r"rows and columns of W must sum to 1.*'stochastic_gradient_push'",
    ),
    ("qadam", {"warmup_steps": 1}, r"warmup_steps must be an integer >= 2, got 1"),
    ("qadam", {"warmup_steps": 10.0}, r"warmup_steps must be an integer .* got 10.0"),
    ("qadam", {"b1": 1.0}, r"b1 must be in \[0, 1\), got 1.0"),
    ("qadam", {"b2": -0.1}, r"b2 must be in \[0, 1\), got -0.1"),
    ("qadam", {"eps": 0.0}, r"eps must be in \(0, inf\), got 0.0"),
    ("qadam", {"eps": float("nan")}, r"eps must be in \(0, inf\), got nan"),
    ("qadam", {"weight_decay": -1.0}, r"weight_decay must be in \[0, inf\), got -1"),
    ("qadam", {"error_feedback": None}, r"error_feedback must be one of"),
    ("decentralized", {"topology": "rings"}, r"topology must .*'rings'.*mean ring"),
    ("decentralized", {"local_steps": 0}, r"local_steps .* >= 1"),
    ("decentralized", {"combine": "during"}, r"combine must be .*'before', 'after'"),
    ("low_precision_decentralized", {"topology": 3}, r"topology must be .* got 3"),
    (
        "low_precision_decentralized",
        {"topology": topologies.shift_one(8)},
        r"symmetric and of period 1, and 'shift_one' is rotating",
    ),
    (
        "low_precision_decentralized",
        {"topology": topologies.static_exponential(8)},
        r"symmetric and of period 1, and 'static_exponential' is directed",
    ),
    ("quantized_gossip", {"topology": "rings"}, r"topology must .*'rings'.*mean ring"),
    ("quantized_gossip", {"bucket_bytes": 0}, r"bucket_bytes must be .* >= 1, got 0"),
    (
        "async_model_average",
        {"local_steps": 0},
        r"local_steps must be an integer >= 1, got 0",
    ),
    (
        "async_model_average",
        {"local_steps": 2, "staleness": -1},
        r"staleness .* got -1",
    ),
    (
        "async_model_average",
        {"local_steps": 2, "staleness": 3},
        r"at most local_steps=2, got 3",
    ),
    (
        "async_model_average",
        {"local_steps": 2, "warmup_steps": -1},
        r"warmup_steps must be an integer >= 0, got -1",
    ),
    ("local_sgd", {"local_steps": 0}, r"local_steps must be an integer >= 1, got 0"),
    (
        "local_sgd",
        {"local_steps": 2, "warmup_steps": -1},
        r"warmup_steps .* >= 0, got -1",
    ),
    ("slowmo", {"outer_momentum": 1.0}, r"outer_momentum must be in \[0, 1\), got 1.0"),
    (
        "slowmo",
        {"outer_learning_rate": 0.0},
        r"outer_learning_rate must be in \(0, inf",
    ),
    ("slowmo", {"learning_rate": -0.1}, r"learning_rate must be in \(0, inf\), got"),
    ("diloco", {"local_steps": 2.0}, r"local_steps must be an integer >= 1, got 2.0"),
    ("diloco", {"outer_momentum": -0.1}, r"outer_momentum must be in \[0, 1\), got"),
    ("diloco", {"outer_learning_rate": 0}, r"outer_learning_rate must be in \(0, inf"),
    ("choco_sgd", {"consensus_step_size": 0.0}, r"consensus_step_size .* \(0, inf\)"),
    (
        "choco_sgd",
        {"topology": topologies.one_peer_exponential(8)},
        r"weights that stay; 'one_peer_exponential' rotates. Use 'ring'",
    ),
    ("delayed_choco", {"staleness": -1}, r"staleness must be an integer >= 0, got -1"),
    ("delayed_choco", {"topology": topologies.shift_one(8)}, r"'shift_one' rotates"),
    (
        "exact_diffusion",
        {"topology": topologies.directed_ring(8)},
        r"a symmetric W that stays; 'directed_ring' is directed",
    ),
    ("d2", {"topology": topologies.directed_ring(8)}, r"'directed_ring' is directed"),
    (
        "d2",
        {"topology": topologies.ring(8)},
        r"'ring' with n=8 is -0.333333. Use self weights > 1/3, such as topologies",
    ),
    (
        "deep_squeeze",
        {"consensus_step_size": -1.0},
        r"consensus_step_size must be in \(0, inf\), got",
    ),
    ("deep_squeeze", {"topology": topologies.shift_one(8)}, r"'shift_one' rotates"),
    (
        "stochastic_gradient_push",
        {"topology": ONE_WAY},
        r"every column of W must sum to 1.*Transpose W",
    ),
    (
        "ecd_psgd",
        {"compressor": compressors.sign()},
        r"must be unbiased.*Use choco_sgd for it",
    ),
    ("ecd_psgd", {"topology": topologies.shift_one(8)}, r"'shift_one' rotates"),
    ("moniqua", {"theta": 0.0}, r"theta must be in \(0, inf\), got 0.0"),
    ("moniqua", {"bits": 0}, r"bits must be an integer >= 1, got 0"),
    ("moniqua", {"bits": 17}, r"bits must be at most 16, got 17"),
    ("moniqua", {"topology": ONE_WAY}, r"rows and columns of W must sum to 1"),
    ("relay_sgd", {"topology": "ring"}, r"one of 'path', 'binary_tree', got 'ring'"),
    ("relay_sgd", {"topology": topologies.ring(8)}, r"must be a tree .* 7 edges"),
    ("quasi_global_momentum", {"momentum": 1.0}, r"momentum must be in \[0, 1\), got"),
    ("quasi_global_momentum", {"smoothing": -0.1}, r"smoothing must be in \[0, 1\)"),
    ("quasi_global_momentum", {"topology": ONE_WAY}, r"columns of W must sum to 1"),
    ("overlapped_push", {"staleness": -1}, r"staleness must be .* >= 0, got -1"),
    ("overlapped_push", {"topology": ONE_WAY}, r"every column of W must sum to 1"),
    ("hierarchical_averaging", {"periods": {}}, r"must map periods .* got \{\}"),
    ("hierarchical_averaging", {"periods": {0: 2}}, r"a period must be .* >= 1, got 0"),
    ("hierarchical_averaging", {"periods": {2: 0}}, r"size of a group must .* got 0"),
    ("hierarchical_averaging", {"periods": {2: None, 4: 8}}, r"only the longest perio"),
    ("hierarchical_averaging", {"periods": {2: 4, 8: 6}}, r"nest.*6 workers over 4"),
    ("streaming_diloco", {"fragments": 5}, r"at most local_steps=4, got 5"),
    ("streaming_diloco", {"staleness": 4}, r"less than local_steps=4, got 4"),
    ("streaming_diloco", {"mixing": 1.0}, r"mixing must be in \[0, 1\), got 1.0"),
    (
        "stochastic_gradient_push",
        {"bucket_bytes": 0},
        r"bucket_bytes must be an integer >= 1, got 0",
    ),
]


REQUIRED = {
    "qadam": {"learning_rate": 0.1},
    "local_sgd": {"local_steps": 2},
    "slowmo": {"local_steps": 2, "learning_rate": 0.1},
    "diloco": {"local_steps": 2},
    "choco_sgd": {"compressor": compressors.sign(), "consensus_step_size": 0.1},
    "delayed_choco": {"compressor": compressors.sign(), "consensus_step_size": 0.1},
    "deep_squeeze": {"compressor": compressors.sign(), "consensus_step_size": 0.1},
    "quantized_gossip": {"compressor": compressors.minmax_uint8()},
    "ecd_psgd": {"compressor": compressors.natural()},
    "moniqua": {"theta": 1.0},
    "quasi_global_momentum": {"learning_rate": 0.1},
    "hierarchical_averaging": {"periods": {4: None}},
    "streaming_diloco": {"local_steps": 4, "fragments": 2},
    "signum": {"learning_rate": 0.1},
    "one_bit_adam": {"learning_rate": 0.1},
    "zero_one_adam": {"learning_rate": 0.1},
    "one_bit_lamb": {"learning_rate": 0.1},
    "demo": {"learning_rate": 0.1},
    "gradient_tracking": {"learning_rate": 0.1},
    "compressed_mean": {"compressor": compressors.sign()},
    "diana": {"compressor": compressors.qsgd()},
    "marina": {"compressor": compressors.qsgd(), "probability": 0.5},
    "ef21": {"compressor": compressors.topk()},
}


def make(name, options):
    factory = alg.REGISTRY[name].factory
    required = REQUIRED.get(name, {})
    return factory(axis_name=AXIS, **{**required, **options})


@pytest.mark.parametrize(("name", "options", "text"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused_at_construction(name, options, text):
    with pytest.raises(ValueError, match=text) as info:
        make(name, options)
    assert str(info.value).startswith(name)


def update(tx, updates, n=4, params="same"):
    """Trace one update under vmap."""

    def step(u):
        x = u if isinstance(params, str) else params
        return tx.update(u, tx.init(u), x)[0]

    return jax.vmap(step, axis_name=AXIS, axis_size=n)(updates)


@pytest.mark.parametrize("row", ONE_EACH, ids=ids(ONE_EACH))
class TestEveryAlgorithm:
    def test_integer_leaves(self, row):
        tree = {"w": jnp.ones((4, 3)), "n": jnp.ones((4, 2), jnp.int32)}
        with pytest.raises(ValueError, match=r"floating point, and '\['n'\]' is int32"):
            update(row.make(AXIS), tree)

    @pytest.mark.parametrize("tree", [{}, {"a": None}, {"a": jnp.zeros((4, 0))}])
    def test_empty_trees(self, row, tree):
        with pytest.raises(ValueError, match="hold no elements") as info:
            update(row.make(AXIS), tree)
        assert str(info.value).startswith(row.algorithm)

    def test_gradients_and_params_of_different_structure(self, row):
        tx = row.make(AXIS)

        def step(u):
            return tx.update(u, tx.init(u), {"a": u["a"], "b": u["a"]})[0]

        with pytest.raises(ValueError, match="same structure and shapes"):
            jax.vmap(step, axis_name=AXIS)({"a": jnp.ones((4, 3))})

    def test_gradients_and_params_of_different_shapes(self, row):
        tx = row.make(AXIS)

        def step(u):
            return tx.update(u, tx.init(u), {"a": u["a"][:2]})[0]

        with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
            jax.vmap(step, axis_name=AXIS)({"a": jnp.ones((4, 3))})

    def test_a_missing_axis_is_named(self, row):
        tx = row.make("wrokers")
        x = jnp.ones(3)
        state = tx.init(x)
        with pytest.raises(NameError, match=r"no mapped axis is named 'wrokers'") as e:
            tx.update(x, state, x)
        assert "shard_map" in str(e.value)
        assert "vmap" in str(e.value)
        assert str(e.value).startswith(row.algorithm)

    def test_three_axes_are_no_hierarchy(self, row):
        tx = row.make(("a", "b", "c"))
        x = jnp.ones((1, 1, 1, 3))

        def step(u):
            return tx.update(u, tx.init(u), u)[0]

        mapped = step
        for name in ("c", "b", "a"):
            mapped = jax.vmap(mapped, axis_name=name)
        with pytest.raises(ValueError, match=r"pair of names \('node', 'local'\)"):
            mapped(x)


needs_params = [row for row in ONE_EACH if row.own_params]


@pytest.mark.parametrize("row", needs_params, ids=ids(needs_params))
def test_missing_params(row):
    with pytest.raises(ValueError, match="params is None") as info:
        update(row.make(AXIS), jnp.ones((4, 3)), params=None)
    assert "tx.update(updates, state, params)" in str(info.value)


def test_weight_decay_needs_params():
    tx = alg.qadam(0.1, axis_name=AXIS, weight_decay=0.1)
    with pytest.raises(ValueError, match="qadam: weight decay .* params is None"):
        update(tx, jnp.ones((4, 3)), params=None)


@pytest.mark.parametrize("n", [1, 3, 7])
def test_odd_n_for_shift_one(n):
    tx = alg.decentralized(axis_name=AXIS, topology="shift_one")
    with pytest.raises(ValueError, match=f"must be even, got n={n}"):
        update(tx, jnp.ones((n, 3)), n=n)


@pytest.mark.parametrize("name", ["decentralized", "low_precision_decentralized"])
def test_a_topology_whose_n_differs(name):
    tx = make(name, {"topology": topologies.ring(5)})
    with pytest.raises(ValueError, match=r"made for n=5 workers, and the axis has 4"):
        update(tx, jnp.ones((4, 3)))


def test_replicas_need_to_know_the_number_of_neighbours():
    tx = make("low_precision_decentralized", {"topology": "complete"})
    with pytest.raises(ValueError, match=r"topologies.complete\(8\)"):
        tx.init(jnp.ones(3))


def test_rotating_topology_by_name_is_refused_for_replicas():
    tx = make("low_precision_decentralized", {"topology": "shift_one"})
    with pytest.raises(ValueError, match="'shift_one' is rotating"):
        update(tx, jnp.ones((4, 3)))


@pytest.mark.parametrize("k", [0, -1, 2.0, True])
def test_accumulate(k):
    with pytest.raises(ValueError, match="every_k must be an integer >= 1"):
        accumulate(optax.sgd(0.1), k)


def test_stateful_compressors_are_refused_where_payloads_are_exchanged_stateless():
    keeps = compressors.identity()._replace(init=lambda x: jnp.zeros(x.shape))
    with pytest.raises(ValueError, match="qadam: .* stateless, .*keeps state between"):
        make("qadam", {"compressor": keeps})


def test_workers_without_devices():
    with pytest.raises(ValueError, match=r"9 workers need 9 devices, and there are 8"):
        Workers.devices(9)
