"""The assertion for users' tests."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wire_programs import D, lower_here, quantized, rotating, scatter_gather

from bagua_jax import Workers, wire

ROW = D / 8 + 8  # bytes of one partition's codes and range


@pytest.fixture(scope="module")
def counted():
    return wire.count(lower_here(quantized).compile())


def test_every_form_of_a_program():
    lowered = lower_here(scatter_gather)
    compiled = lowered.compile()
    workers = Workers.devices(8)
    jitted = workers.spmd(scatter_gather, in_specs=workers.spec)
    args = (jax.ShapeDtypeStruct((8, D), jnp.float32),)
    sent = 2 * 4 * D * 7 / 8
    for program in (lowered, compiled, compiled.as_text(), wire.count(compiled)):
        assert wire.assert_bytes(program, sent, messages=2) == wire.count(compiled)
    wire.assert_bytes(jitted, sent, args=args)
    with pytest.raises(AssertionError):
        wire.assert_bytes(jitted, sent + 1, args=args)


def test_parts(counted):
    at = np.repeat([0, 1], 4)
    wire.assert_bytes(counted, 14 * ROW, messages=2)
    wire.assert_bytes(counted, 7 * ROW, kind="all-to-all", messages=1)
    wire.assert_bytes(counted, 14 * ROW, dtype="u8")
    wire.assert_bytes(counted, 0, dtype="f32", messages=0)
    # four of seven peers, and two of eight edges of the ring, are between nodes
    wire.assert_bytes(
        counted, 4 * ROW, kind="all-to-all", link="between", nodes=at, messages=1
    )
    wire.assert_bytes(counted, (3 + 7 * 6 / 8) * ROW, link="inside", nodes=at)


def test_exact_is_exact(counted):
    for wrong in (14 * ROW + 1, 14 * ROW - 1, 14 * ROW * (1 + 1e-9)):
        with pytest.raises(AssertionError):
            wire.assert_bytes(counted, wrong)
    wire.assert_bytes(counted, 14 * ROW * 1.02, rtol=0.02)
    with pytest.raises(AssertionError):
        wire.assert_bytes(counted, 14 * ROW * 1.03, rtol=0.02)
    with pytest.raises(AssertionError):
        wire.assert_bytes(counted, 14 * ROW, messages=2.01, rtol=0.5)


def test_weights_of_branches_round():
    """Six runs of two branches in turn: 6 x 1/2 + 6 x 1/2."""
    wire.assert_bytes(lower_here(rotating), 6 * 4 * D, messages=6)


def test_the_failure_shows_the_table(counted):
    with pytest.raises(AssertionError) as failure:
        wire.assert_bytes(
            counted, 9, kind="all-gather", link="between", nodes=[0] * 4 + [1] * 4,
            rtol=0.05,
        )  # fmt: skip
    first, *rest = str(failure.value).splitlines()
    assert first == (
        "expected 9 bytes per worker of all-gather between nodes (within 5%), and the "
        f"program sends {7 * ROW / 4:,.10g}:"
    )
    assert "\n".join(rest) == counted.table([0] * 4 + [1] * 4)
    with pytest.raises(AssertionError, match=r"3 messages .* sends 2:\nkind"):
        wire.assert_bytes(counted, 14 * ROW, messages=3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"rtol": -1}, "rtol must be at least 0; got -1"),
        ({"link": "outside", "nodes": [0]}, "link must be 'inside' or 'between'"),
        ({"link": "inside"}, "link and nodes go together"),
        ({"nodes": [0]}, "link and nodes go together"),
        ({"args": ()}, "args go with a jitted function"),
        ({"trip_counts": {"x": 1}}, "a WireCount has its weights"),
    ],
)
def test_arguments_that_do_not_fit(counted, arguments, message):
    with pytest.raises(ValueError, match=message):
        wire.assert_bytes(counted, 1, **arguments)


def test_a_function_needs_arguments():
    with pytest.raises(ValueError, match=r"needs args=\(\.\.\.\)"):
        wire.assert_bytes(jax.jit(jnp.sin), 0)
