"""Which algorithm bears which compressor: the rule, its table, every cell at work."""

import functools
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bagua_jax import algorithms as alg
from bagua_jax import compatibility, compressors
from bagua_jax.experiments.studies import fits

AXIS = "workers"
PAGE = Path(__file__).parents[2] / "docs" / "compressors.md"
by_label = pytest.mark.parametrize("user", fits.USERS, ids=lambda user: user.label)

# Verdicts by class, in the order of ``fits.CLASSES``: works, warned, refused.
FED_BACK = "w w r r w w ! ! r"
VERDICTS = {
    "compressed_mean(error_feedback=worker)": "w w r r w w ! ! w",
    "compressed_mean(error_feedback=none)": "w w w w w r r r r",
    "diana": "w w w r r r r r r",
    "marina": "w w w w r r r r r",
    "ecd_psgd": "w ! ! ! r r r r r",
    "low_precision_decentralized": "w w ! ! w w ! ! r",
    "quantized_gossip": "w ! ! ! w ! ! ! r",
    "qadam(error_feedback=none)": "w ! ! ! w ! ! ! r",
    "qadam(error_feedback=both)": FED_BACK,
    "ef21": FED_BACK,
    "one_bit_adam": FED_BACK,
    "zero_one_adam": FED_BACK,
    "one_bit_lamb": FED_BACK,
    "diloco": FED_BACK,
    "streaming_diloco": FED_BACK,
    "cocktail_sgd": FED_BACK,
    "choco_sgd": FED_BACK,
    "delayed_choco": FED_BACK,
    "deep_squeeze": FED_BACK,
}
WORDS = {"w": "works", "!": "warned", "r": "refused"}


def test_every_algorithm_that_takes_a_compressor_has_a_row():
    assert {user.label for user in fits.USERS} == set(VERDICTS)


@by_label
def test_a_compressor_of_ones_own_is_judged_by_its_facts(user):
    expected = [WORDS[letter] for letter in VERDICTS[user.label].split()]
    found = [fits.outcome(user, own, 300) for own in fits.CLASSES.values()]
    assert found == expected


def test_the_page_is_current():
    assert PAGE.read_text() == fits.to_markdown()


@by_label
def test_the_registry_is_judged_by_class(user):
    share = user.options.get("ratio", 1)  # of a vector, that is compressed
    for compressor in fits.registered():
        kind = fits.classify(compressor, int(share * 2**16))
        verdict = VERDICTS[user.label].split()[list(fits.CLASSES).index(kind)]
        found = fits.outcome(user, compressor)
        assert found == WORDS[verdict], compressor.facts.name


# --- every cell at work ---------------------------------------------------------------

N, D, STEPS = 4, 300, 80
TARGETS = 1 + jax.random.normal(jax.random.key(5), (N, D))
# What every class but those without constants has in the registry.
AT_WORK = {
    "omega < 1/2": compressors.natural(),
    "omega < 1": compressors.randk(0.6, mask="private"),
    "omega >= 1": compressors.randk(0.1, mask="private"),
    "delta > 1/2": compressors.minmax_uint8(),
    "delta > 0": compressors.topk(0.2),
    "delta <= 0": compressors.sign("l2"),
    "keeps state": compressors.powersgd(1),
}
LONGER = {"warmup_steps": 20, "b2": 0.9}
TUNED = {  # rates at which the error has a limit: the class alone does not give it
    **dict.fromkeys(
        ["diloco", "streaming_diloco"],
        {"outer_learning_rate": 0.3, "outer_momentum": 0.5},
    ),
    "choco_sgd": {"consensus_step_size": 0.1},
    "delayed_choco": {"consensus_step_size": 0.1},
    "deep_squeeze": {"consensus_step_size": 0.1},
    "qadam": {"learning_rate": 0.02, **LONGER},
    "one_bit_adam": {"learning_rate": 0.02, **LONGER},
    "one_bit_lamb": {"learning_rate": 0.02, **LONGER},
    "zero_one_adam": {"learning_rate": 0.05, "var_freeze_step": 60, "eps": 1.0},
}


def largest(user, compressor):
    """Train on a heterogeneous quadratic; the largest element ever seen."""
    user = user._replace(options={**user.options, **TUNED.get(user.algorithm, {})})
    tx, entry = user.make(compressor), alg.REGISTRY[user.algorithm]
    if entry.placement == "gradient":
        tx = optax.chain(tx, optax.sgd(0.05))
    elif entry.placement == "weight":
        tx = optax.chain(optax.sgd(0.05), tx)

    @jax.jit
    @functools.partial(jax.vmap, axis_name=AXIS)
    def train(target):
        def step(carry, _):
            x, opt = carry
            updates, opt = tx.update(x - target, opt, x)
            x = x + updates
            return (x, opt), jnp.max(jnp.abs(x), initial=0)

        x = jnp.zeros(D)
        (x, _), sizes = jax.lax.scan(step, (x, tx.init(x)), length=STEPS)
        return jnp.where(jnp.isfinite(x).all(), sizes.max(), jnp.inf)

    return float(np.max(train(TARGETS)))


@by_label
def test_what_works_stays_bounded_and_what_does_not_says_so(user):
    for kind, compressor in AT_WORK.items():
        assert fits.classify(compressor) == kind
        at = list(fits.CLASSES).index(kind)
        verdict = WORDS[VERDICTS[user.label].split()[at]]
        if (user.algorithm, kind) in PUBLISHED:
            verdict = "works"
        if verdict == "refused":
            with pytest.raises(ValueError, match=rf"^{user.algorithm}: ") as info:
                largest(user, compressor)
            assert compressor.facts.name in str(info.value)
            continue
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            size = largest(user, compressor)
        assert [w.category for w in seen] == [UserWarning] * (verdict == "warned")
        if verdict == "warned":
            text = str(seen[0].message)
            assert text.startswith(f"{user.algorithm}: ")
            assert compressor.facts.name in text and "Use " in text
        else:
            assert size < 20, (kind, size)  # targets are up to 4 from 1


ONE_BIT = ("one_bit_adam", "zero_one_adam", "one_bit_lamb")
PUBLISHED = {(name, "delta <= 0") for name in ONE_BIT}  # their papers' own sign("l2")


@pytest.mark.parametrize("name", ["choco_sgd", "diloco", "one_bit_adam"])
def test_a_refusal_is_no_whim(name):
    """What the rule refuses diverges, with the same settings, if its facts lie."""
    user = next(user for user in fits.USERS if user.label == name)
    bad = compressors.randk(0.1, mask="private")
    lying = bad._replace(facts=bad.facts._replace(omega=lambda d: 0.5))
    assert largest(user, lying) > 1e3


# --- the rule -------------------------------------------------------------------------


def test_a_length_is_refused_where_it_is_traced():
    """qsgd(8) contracts vectors of 64 elements, and none of 65,536."""
    tx = alg.choco_sgd(
        compressors.qsgd(8), axis_name=AXIS, consensus_step_size=0.1, topology="ring"
    )

    def trace(d):
        step = lambda x: tx.update(x, tx.init(x), x)[0]  # noqa: E731
        vectors = jax.ShapeDtypeStruct((4, d), jnp.float32)
        jax.eval_shape(jax.vmap(step, axis_name=AXIS), vectors)

    trace(64)
    with pytest.raises(ValueError, match=r"choco_sgd: .*\(omega at d=65536\)"):
        trace(2**16)


def test_parts_of_a_vector_are_what_is_judged():
    """Eight owners compress 64 elements each, where one worker has all 512."""
    tx = alg.diloco(axis_name=AXIS, local_steps=1, compressor=compressors.qsgd(8))

    def trace(n):
        step = lambda x: tx.update(x, tx.init(x), x)[0]  # noqa: E731
        vectors = jax.ShapeDtypeStruct((n, 512), jnp.float32)
        jax.eval_shape(jax.vmap(step, axis_name=AXIS), vectors)

    trace(8)
    with pytest.raises(ValueError, match=r"diloco: .* is 1.83 \(omega at d=512\)"):
        trace(1)


def test_a_traced_constant_passes_unread():
    @jax.jit
    def make(omega):
        whole = compressors.identity()
        facts = whole.facts._replace(omega=lambda d: omega)
        compatibility.require_compressor(
            "test", whole._replace(facts=facts), compatibility.FED_BACK
        )
        return omega

    make(9.0)


def test_what_is_no_compressor_is_refused():
    with pytest.raises(ValueError, match=r"ef21: compressor must be a Compressor, got"):
        alg.ef21(compressors.topk, axis_name=AXIS)  # the factory, not called
    with pytest.raises(ValueError, match=r"qadam: .*got 'topk'"):
        alg.qadam(0.1, axis_name=AXIS, compressor="topk")


@pytest.mark.parametrize("plan", ["scatter_reduce", "all_gather", "ring"])
def test_an_end_without_feedback_counts(plan):
    """Feedback at the worker alone leaves the bias of owners that compress."""
    make = functools.partial(
        alg.compressed_mean,
        compressors.topk(0.01),
        axis_name=AXIS,
        plan=plan,
        error_feedback="worker",
    )
    if plan != "scatter_reduce":
        make()
        return
    with pytest.raises(ValueError, match="lost for good.*error_feedback='both'"):
        make()
    make(unsafe=True)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_element_of_a_block_is_wrong_by_more_than_the_facts_say(bits, rounding):
    """Which is why its error may be fed back where delta is negative."""
    compressor = compressors.blockwise(bits=bits, rounding=rounding)
    rng = np.random.default_rng(bits)
    noise = rng.standard_normal(5_000).astype("f4")
    ends = np.where(np.arange(5_000) % 512 < 2, (-1.0) ** np.arange(5_000), 0.0)
    halfway = np.where(ends == 0, 1 / (2**bits - 1) * (1 - 1e-4), ends)

    @jax.jit
    def there_and_back(x, key):
        return compressor.decompress(compressor.compress(key, x, ())[0], x)

    largest = 0.0
    for x in (noise, noise**3, 100 + noise, ends, halfway):
        x = x.astype("f4")
        decoded = np.asarray(there_and_back(x, jax.random.key(bits)), np.float64)
        largest = max(largest, np.abs(decoded - x).max() / np.abs(x).max())
    limit = compressor.facts.max_error or 0.0
    assert 0.8 * limit < largest <= limit * (1 + 1e-5)
    assert compatibility.judge(compressor, compatibility.FED_BACK, 5_000).kind == (
        "works"
    )
