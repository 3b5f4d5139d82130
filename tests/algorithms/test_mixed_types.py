"""Leaves that vary over a second axis, and leaves that do not: experts and their gate.

Workers stand along one axis of a mesh and experts along another, as in a mixture of
experts. The gate is equal on all experts, and must stay so through every exchange.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from table import ONE_EACH, ROWS, ids

import bagua_jax
from bagua_jax import algorithms as alg
from bagua_jax import buckets, compressors, primitives

AXIS, EXPERT = "workers", "expert"
SPECS = {"ex": P(AXIS, EXPERT), "gate": P(AXIS), "last": P(AXIS, EXPERT)}
every_algorithm = pytest.mark.parametrize("row", ONE_EACH, ids=ids(ONE_EACH))


def grid() -> Mesh:
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    return Mesh(devices, (AXIS, EXPERT), axis_types=(AxisType.Auto,) * 2)


def leaves(seed: int) -> dict[str, np.ndarray]:
    """A gate for each worker, between leaves of experts whose sizes differ."""
    rng = np.random.default_rng(seed)
    size = np.array([1, 9], "f4").reshape(1, 2, 1, 1)
    return {
        "ex": size * rng.standard_normal((2, 2, 12, 19)).astype("f4"),
        "gate": rng.standard_normal((2, 12, 19)).astype("f4"),
        "last": size[..., 0] * rng.standard_normal((2, 2, 7)).astype("f4"),
    }


def steps(tx, count: int):
    """A function of one device's leaves [1, (1,) ...] that takes ``count`` steps."""

    def program(params, grads):
        lead = {"ex": 2, "gate": 1, "last": 2}  # axes of length 1, of the mesh
        cut = lambda x, axes: x.reshape(x.shape[axes:])  # noqa: E731
        params, grads = (jax.tree.map(cut, tree, lead) for tree in (params, grads))

        def step(carry, _):
            x, state = carry
            updates, state = tx.update(grads, state, x)
            x = bagua_jax.worker_local(jax.tree.map(jnp.add, x, updates), AXIS)
            return (x, state), None

        state = tx.init(params)
        (x, _), _ = jax.lax.scan(step, (params, state), length=count)
        return jax.tree.map(lambda x, axes: x.reshape((1,) * axes + x.shape), x, lead)

    return program


@every_algorithm
def test_jax_proves_that_the_gate_stays_equal_on_all_experts(row):
    """``out_specs`` of the gate does not name the axis; states keep their types."""
    tx = row.make(AXIS)
    mapped = jax.shard_map(
        steps(tx, 2), mesh=grid(), in_specs=(SPECS, SPECS), out_specs=SPECS
    )
    jax.jit(mapped).lower(leaves(0), leaves(1))


MIXING = [  # whose codecs mix the elements of a bucket
    row
    for row in ROWS
    if row.algorithm in ("qadam", "choco_sgd", "cocktail_sgd", "diloco", "demo")
    or row.options.get("error_feedback") == "both"
]


@pytest.mark.parametrize("row", MIXING, ids=ids(MIXING))
def test_the_gate_stays_equal_where_jax_tracks_no_types(row):
    """With ``check_vma=False`` nobody knows what varies: every leaf travels alone."""
    apart = {**SPECS, "gate": P((AXIS, EXPERT))}  # one from every device
    overrides = {"warmup_steps": 2} if "warmup_steps" in row.options else {}
    mapped = jax.shard_map(
        steps(row.make(AXIS, **overrides), 5),
        mesh=grid(),
        in_specs=(SPECS, SPECS),
        out_specs=apart,
        check_vma=False,
    )
    out = jax.device_get(jax.jit(mapped)(leaves(0), leaves(1)))
    gate = out["gate"].reshape(2, 2, 12, 19)  # [workers, experts, ...]
    np.testing.assert_array_equal(gate[:, 0], gate[:, 1])
    assert not np.array_equal(gate[0, 0], leaves(0)["gate"][0])  # it has moved
    assert np.isfinite(gate).all()


def plan_of(tree, axis_name=AXIS, **kwargs):
    """The buckets of a tree of "g", one for each worker, and "e", for each device."""
    found = []

    def look(gate, expert):
        values = {name: {"g": gate, "e": expert}[kind] for name, kind in tree.items()}
        plan = buckets.plan(values, axis_name=axis_name)
        back = plan.unpack(plan.pack(values))
        for name, value in values.items():
            axes = primitives.varying_axes(value)
            assert primitives.varying_axes(back[name]) == axes, name
        found.append(plan)
        return gate

    mapped = jax.shard_map(
        look,
        mesh=grid(),
        in_specs=(P(AXIS), P(AXIS, EXPERT)),
        out_specs=P(AXIS),
        **kwargs,
    )
    jax.jit(mapped).lower(np.zeros((2, 3), "f4"), np.zeros((2, 2, 3), "f4"))
    return found[0].buckets


def test_buckets_hold_leaves_of_one_varying_type():
    tree = {"a": "e", "b": "g", "c": "e", "d": "g"}
    assert plan_of(tree) == ((3, 1), (2, 0))
    assert plan_of(tree, check_vma=False) == ((3,), (2,), (1,), (0,))
    # Where both axes are the workers', there is no other to vary over.
    both = (AXIS, EXPERT)
    assert plan_of(tree, both, check_vma=False) == ((3, 2, 1, 0),)


def both_kinds(tx, **kwargs):
    """Trace a step of experts and a gate."""
    mapped = jax.shard_map(
        steps(tx, 1), mesh=grid(), in_specs=(SPECS, SPECS), out_specs=SPECS, **kwargs
    )
    jax.jit(mapped).lower(leaves(0), leaves(1))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    ("tx", "cure"),
    [
        (alg.adasum(axis_name=AXIS, scope="whole"), "Use scope='leaf'"),
        (alg.dgc(axis_name=AXIS, clip=1.0), "Leave clip out"),
    ],
    ids=["adasum", "dgc"],
)
def test_a_number_of_all_leaves_is_refused(tx, cure, check_vma):
    with pytest.raises(ValueError, match=rf"is one number of all leaves.*{cure}"):
        both_kinds(tx, check_vma=check_vma)


def test_a_codec_that_keeps_state_is_made_where_it_is_used():
    """Outside shard_map nobody knows that some leaves will vary over experts."""
    tx = alg.compressed_mean(compressors.powersgd(1), axis_name=AXIS)
    both_kinds(tx)
    shapes = {"ex": jnp.zeros((12, 19)), "gate": jnp.zeros((12, 19))}
    made_outside = tx.init(shapes | {"last": jnp.zeros(7)})
    with pytest.raises(
        ValueError, match="codec for each of 1 buckets.* fill 2: .*init"
    ):
        both_kinds(tx._replace(init=lambda params: made_outside))
