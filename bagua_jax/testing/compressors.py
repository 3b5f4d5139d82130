"""What every compressor promises, as checks of its facts."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from bagua_jax.compressors import Compressor
from bagua_jax.testing.base import run_all

__all__ = ["check_compressor"]

SIZES = (1, 7, 512, 4095, 4096, 5000)
DRAWS = 400


def _coded(compressor: Compressor, x: jax.Array, key: jax.Array) -> jax.Array:
    payload, _ = compressor.compress(key, x, compressor.init(x))
    return compressor.decompress(payload, x)


def _vectors(d: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(d)
    spike = np.zeros(d)
    spike[d // 2] = 3.0
    found = {
        "normal": rng.normal(size=d),
        "heavy tails": rng.standard_cauchy(size=d),
        "offset": 5 + 0.1 * rng.normal(size=d),
        "equal": np.full(d, -2.0),
        "a spike": spike,
    }
    return {name: x.astype(np.float32) for name, x in found.items()}


def shapes_and_bytes(compressor: Compressor) -> None:
    """The decoded vector is like the first one, the payload as large as stated."""
    for dtype in (jnp.float32, jnp.bfloat16):
        for d in SIZES:
            x = jnp.ones(d, dtype)
            state = jax.eval_shape(compressor.init, x)
            key = jax.random.key(0)
            payload, new = jax.eval_shape(compressor.compress, key, x, state)
            chex.assert_trees_all_equal_shapes_and_dtypes(state, new)
            back = jax.eval_shape(lambda p, x=x: compressor.decompress(p, x), payload)
            chex.assert_shape(back, (d,))
            assert back.dtype == dtype, f"{x.dtype} comes back as {back.dtype}"
            sent = sum(
                leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(payload)
            )
            stated = compressor.facts.payload_bytes(x)
            assert sent == stated, f"d = {d}, {x.dtype}: {sent} bytes, stated {stated}"


def zero_is_zero(compressor: Compressor) -> None:
    """A zero vector is decoded as zero: nothing is invented."""
    for d in SIZES:
        back = jax.jit(lambda x: _coded(compressor, x, jax.random.key(1)))(jnp.zeros(d))
        assert not np.any(np.asarray(back)), f"d = {d}"


def errors_are_as_stated(compressor: Compressor) -> None:
    """The mean square error is within omega or 1 - delta; unbiased where stated."""
    facts = compressor.facts
    assert not facts.unbiased or facts.delta is None, "an unbiased one states omega"
    for d in (7, 512, 5000):
        keys = jax.random.split(jax.random.key(d), DRAWS if d < 5000 else DRAWS // 10)

        def draw(x, keys=keys):
            return jax.lax.map(lambda key: _coded(compressor, x, key), keys)

        draw = jax.jit(draw)
        for name, x in _vectors(d).items():
            off = np.asarray(draw(x), np.float64) - x.astype(np.float64)
            energy = float(np.sum(x.astype(np.float64) ** 2))
            share = (off**2).sum(axis=1) / energy
            spread = share.std() / np.sqrt(len(keys))
            bound = None
            if facts.omega is not None:
                bound = facts.omega(d)
            elif facts.delta is not None:
                bound = 1 - facts.delta(d)
            if bound is not None:
                assert share.mean() <= bound * (1 + 1e-5) + 5 * spread + 1e-6, (
                    f"{name}, d = {d}: |C(x) - x|^2 is {share.mean():.4g} |x|^2, "
                    f"stated {bound:.4g}"
                )
            if facts.unbiased:
                # Along x itself, one number with a known spread.
                along = off @ x / energy
                z = abs(along.mean()) / (along.std() / np.sqrt(len(keys)) + 1e-6)
                assert z < 6, f"{name}, d = {d}: biased along x by {along.mean():.3g}"


def non_finite_values_are_seen(compressor: Compressor) -> None:
    """NaN and infinities are not coded away, wherever they stand; compiled."""
    for d in SIZES:
        places = sorted({0, d // 2, d - 1})
        code = jax.jit(jax.vmap(lambda x: _coded(compressor, x, jax.random.key(2))))
        for bad in (np.nan, np.inf, -np.inf):
            x = np.tile(np.linspace(-1, 1, d, dtype=np.float32), (len(places), 1))
            x[np.arange(len(places)), places] = bad
            seen = np.any(~np.isfinite(np.asarray(code(x))), axis=1)
            hidden = np.array(places)[~seen].tolist()
            assert not hidden, f"{bad} at {hidden} of {d} elements is hidden"


def places_agree(compressor: Compressor) -> None:
    """Compiled, mapped and not, the same key gives the same payload."""
    key, x = jax.random.key(3), jnp.asarray(_vectors(4096)["normal"])
    plain = jax.jit(lambda x: _coded(compressor, x, key))(x)
    mapped = jax.jit(jax.vmap(lambda x: _coded(compressor, x, key)))(jnp.stack([x, x]))
    np.testing.assert_allclose(mapped[0], plain, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(mapped[0], mapped[1])


CHECKS: dict[Callable[[Compressor], None], str] = {
    shapes_and_bytes: "Decode with `.astype(like.dtype)`, and compute payload_bytes "
    "from shape and dtype alone.",
    zero_is_zero: "Where a scale is zero, decode zero.",
    errors_are_as_stated: "State a bound that holds for every vector, or None.",
    non_finite_values_are_seen: "Decide what is finite by jnp.isfinite, or by "
    "compressors.numerics; a float maximum may drop NaN.",
    places_agree: "Draw from the key that is given, by shape alone.",
}


def check_compressor(compressor: Compressor) -> None:
    """Hold a compressor to its facts.

    Args:
        compressor: any; its state may be of any kind.

    Raises:
        AssertionError: naming every failed check, what was seen, and the cure.

    Example:
        >>> from bagua_jax import compressors
        >>> check_compressor(compressors.sign("l1"))
    """
    run_all(
        compressor.facts.name,
        (
            (check.__name__, lambda check=check: check(compressor), cure)
            for check, cure in CHECKS.items()
        ),
    )
