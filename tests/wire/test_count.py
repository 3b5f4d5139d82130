# ruff: noqa: E501 (compilers print an instruction on one line)
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from bagua_jax import wire

N, D = 8, 65_536
VECTOR = 4 * D  # bytes of one worker's float32 vector


def compiled(fn, *, mesh=None, dtype=jnp.float32):
    """Compile fn, a per-worker function of a vector [D], for a mesh of 8 devices."""
    mesh = mesh or {"w": N}
    mesh = jax.make_mesh(
        tuple(mesh.values()), tuple(mesh), axis_types=(AxisType.Auto,) * len(mesh)
    )
    spec = P(mesh.axis_names)

    def worker(x):
        return jax.tree.map(lambda y: y[None], fn(x[0]))

    step = jax.shard_map(
        worker, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    return jax.jit(step).lower(jax.ShapeDtypeStruct((N, D), dtype)).compile()


def count(fn, *, mesh=None, dtype=jnp.float32, **named):
    return wire.count(compiled(fn, mesh=mesh, dtype=dtype), **named)


def facts(counted):
    return sorted((c.kind, c.dtype, c.operand_bytes) for c in counted.collectives)


def shift(x, by, axis="w", n=N):
    return lax.ppermute(x, axis, [(i, (i + by) % n) for i in range(n)])


def quantize(x):
    low = x.min(-1, keepdims=True)
    scale = (x.max(-1, keepdims=True) - low) / 255 + 1e-7
    return jnp.rint((x - low) / scale).astype(jnp.uint8), jnp.stack([low, scale], -1)


def dequantize(codes, ranges):
    return codes * ranges[..., 1] + ranges[..., 0]


# The exchanges of BAGUA, on one vector of 65,536 float32 per worker


def c_fp_s(x):
    return lax.pmean(x, "w")


def c_lp_s(x):
    codes, ranges = quantize(x.reshape(N, -1))
    codes, ranges = (lax.all_to_all(a, "w", 0, 0) for a in (codes, ranges))
    codes, ranges = quantize(dequantize(codes, ranges).mean(0))
    codes, ranges = (lax.all_gather(a, "w") for a in (codes, ranges))
    return dequantize(codes, ranges).ravel()


def d_fp_s(x):
    return (x + shift(x, 1) + shift(x, -1)) / 3


def d_lp_s(x):
    codes, ranges = quantize(x)
    near = [
        dequantize(shift(codes, by), shift(ranges, by).astype(jnp.float32))
        for by in (1, -1)
    ]
    return (x + near[0] + near[1]) / 3


def step_number(x):
    """Return a number that the compiler cannot know, equal on all workers."""
    return lax.psum(x[0], "w").astype(jnp.int32)


def one_peer(x, index):
    hops = [lambda x, by=2**k: (x + shift(x, by)) / 2 for k in range(3)]
    return lax.switch(index % 3, hops, x)


def test_exact_mean():
    counted = count(c_fp_s)
    assert facts(counted) == [("all-reduce", "f32", VECTOR)]
    assert counted.bytes_per_worker == 458_752
    assert counted.messages_per_worker == 1
    (c,) = counted.collectives
    assert (c.operands, c.group_size, c.weight, c.asynchronous) == (1, N, 1, False)
    assert c.groups == (tuple(range(N)),)
    assert "psum" in c.path


def test_quantized_mean():
    counted = count(c_lp_s)
    assert facts(counted) == [
        ("all-gather", "f32", 8),
        ("all-gather", "u8", D // N),
        ("all-to-all", "f32", 8 * N),
        ("all-to-all", "u8", D),
    ]
    assert counted.bytes_per_worker == 114_800
    assert counted.by_kind() == {"all-to-all": (2, 57_400), "all-gather": (2, 57_400)}
    # XLA on CPU splits the buffer: one message of 8 operands
    assert {c.operands for c in counted.collectives if c.kind == "all-to-all"} == {8}


def test_gossip():
    assert facts(count(d_fp_s)) == [("collective-permute", "f32", VECTOR)] * 2
    assert count(d_fp_s).bytes_per_worker == 524_288
    counted = count(d_lp_s)
    assert counted.bytes_per_worker == 131_088
    assert counted.messages_per_worker == 4


def test_round_robin_branches_need_no_shares():
    counted = count(lambda x: one_peer(x, x[0].astype(jnp.int32)))
    assert facts(counted) == [("collective-permute", "f32", VECTOR)] * 3
    assert [c.weight for c in counted.collectives] == pytest.approx([1 / 3] * 3)
    assert counted.bytes_per_worker == pytest.approx(262_144)
    assert counted.messages_per_worker == pytest.approx(1)


# Loops


def test_scan_multiplies():
    counted = count(lambda x: lax.scan(lambda c, _: (d_fp_s(c), None), x, None, 5)[0])
    assert [c.weight for c in counted.collectives] == [5, 5]
    assert counted.bytes_per_worker == 5 * 524_288


def test_loops_and_branches_multiply():
    def fn(x):
        return lax.scan(lambda c, i: (one_peer(c, i), None), x, jnp.arange(6))[0]

    counted = count(fn)
    assert [c.weight for c in counted.collectives] == pytest.approx([2, 2, 2])
    assert counted.messages_per_worker == pytest.approx(6)


def test_nested_scans_multiply():
    def inner(x):
        return lax.scan(lambda c, _: (c_fp_s(jnp.sin(c)), None), x, None, 3)[0]

    counted = count(lambda x: lax.scan(lambda c, _: (inner(c), None), x, None, 4)[0])
    assert counted.messages_per_worker == 12


def unknown_loop(body):
    return lambda x: lax.fori_loop(0, x[0].astype(jnp.int32), lambda i, c: body(c), x)


def test_unknown_trip_count_is_refused():
    program = compiled(unknown_loop(c_fp_s))
    with pytest.raises(ValueError, match=r"trip count.*while.*lax\.scan") as error:
        wire.count(program)
    path = "jit(worker)/shard_map/while"
    assert path in str(error.value)
    counted = wire.count(program, trip_counts={path: 7})
    assert counted.messages_per_worker == 7


def test_a_silent_loop_may_have_any_length():
    assert count(unknown_loop(jnp.sin)).collectives == ()
    counted = count(lambda x: c_fp_s(unknown_loop(jnp.sin)(x)))
    assert counted.messages_per_worker == 1
    alone = "ROOT %s = f32[4] all-reduce(%x), replica_groups={{0},{1},{2},{3}}"
    text = module(
        "ROOT %w = f32[4] while(%x), condition=%cond, body=%body",
        body=alone,
        cond='ROOT %p = pred[] custom-call(%x), custom_call_target="below"',
    )
    assert wire.count(text).messages_per_worker == 0


def test_the_condition_of_a_loop_runs_once_more():
    text = module(
        """
        ROOT %w = f32[4] while(%x), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
        """,
        body="ROOT %s = f32[4] all-reduce(%x), replica_groups={}, to_apply=%add",
        cond="""
        %n = f32[4] all-reduce(%x), replica_groups={}, to_apply=%add
        ROOT %p = pred[] custom-call(%n), custom_call_target="below"
        """,
    )
    assert [c.weight for c in wire.count(text).collectives] == [3, 4]


# Branches


def branching(shares, *, inner=None):
    """Return a program whose second branch communicates, under a scope of shares."""

    def fn(x):
        with jax.named_scope(f"branch_shares({shares})" if shares else "plain"):
            return lax.cond(step_number(x) > 0, inner or c_fp_s, jnp.sin, x)

    return fn


SMALL = 7.0  # bytes of the scalar all-reduce of step_number


def test_shares_of_the_scope_around_a_conditional():
    counted = count(branching("0.75,0.25"))
    assert counted.bytes_per_worker == SMALL + 458_752 / 4
    assert counted.messages_per_worker == 1.25
    assert count(branching("1.0,0.0")).bytes_per_worker == SMALL


def test_unequal_branches_without_shares_are_refused():
    program = compiled(branching(None))
    path = "jit(worker)/shard_map/plain/cond"
    with pytest.raises(ValueError) as error:
        wire.count(program)
    for part in (path, "branch 0: 0 bytes", "branch 1: 458,752 bytes in 1 messages"):
        assert part in str(error.value)
    assert "schedules.switch" in str(error.value)
    counted = wire.count(program, branch_shares={path: (0.9, 0.1)})
    assert counted.bytes_per_worker == pytest.approx(SMALL + 45_875.2)


def test_the_callers_shares_win():
    program = compiled(branching("0.75,0.25"))
    path = "jit(worker)/shard_map/branch_shares(0.75,0.25)/cond"
    by_path = wire.count(program, branch_shares={path: [0.5, 0.5]})
    assert by_path.bytes_per_worker == SMALL + 458_752 / 2
    name = next(
        line.split()[0].lstrip("%")
        for line in str(program.as_text()).splitlines()
        if " conditional(" in line
    )
    by_name = wire.count(program, branch_shares={name: np.array([0.5, 0.5])})
    assert by_name == by_path


def test_nested_scopes_multiply():
    counted = count(branching("0.75,0.25", inner=branching("0.5,0.5")))
    weights = {c.operand_bytes: c.weight for c in counted.collectives}
    assert weights[VECTOR] == 0.125


def test_an_inner_conditional_does_not_inherit_shares():
    program = compiled(branching("0.75,0.25", inner=branching(None)))
    with pytest.raises(ValueError, match="send unequally") as error:
        wire.count(program)
    path = str(error.value).split("branch_shares={'")[1].split("'")[0]
    assert path.endswith("branch_1_fun/plain/cond")
    counted = wire.count(program, branch_shares={path: (0.5, 0.5)})
    weights = {c.operand_bytes: c.weight for c in counted.collectives}
    assert weights[VECTOR] == 0.125


@pytest.mark.parametrize("wrap", ["grad", "vmap", "checkpoint", "jit"])
def test_scopes_survive_transformations(wrap):
    def scoped(flag, x):
        with jax.named_scope("branch_shares(0.75,0.25)"):
            return lax.cond(flag, c_fp_s, jnp.sin, x)

    def fn(x):
        flag = step_number(x) > 0
        if wrap == "vmap":
            return jax.vmap(lambda y: scoped(flag, y))(x.reshape(2, -1)).ravel()
        if wrap == "jit":
            return jax.jit(scoped)(flag, x)
        inner = jax.checkpoint(scoped) if wrap == "checkpoint" else scoped
        return jax.grad(lambda y: jnp.sum(inner(flag, y) ** 2))(x)

    large = [c for c in count(fn).collectives if c.operand_bytes == VECTOR]
    assert large
    assert {c.weight for c in large} == {0.25}


@pytest.mark.parametrize(
    "shares", [(0.5,), (0.5, 0.6), (-0.5, 1.5), (math.nan, 0.5), ()]
)
def test_bad_shares_are_refused(shares):
    program = compiled(branching(None))
    path = "jit(worker)/shard_map/plain/cond"
    with pytest.raises(ValueError, match="needs 2 shares.*sum to 1; got"):
        wire.count(program, branch_shares={path: shares})


def test_unknown_names_are_refused():
    program = compiled(branching("0.75,0.25"))
    with pytest.raises(ValueError, match=r"branch_shares must use names.*cond.*'typo'"):
        wire.count(program, branch_shares={"typo": (0.5, 0.5)})
    with pytest.raises(ValueError, match=r"trip_counts must use names.*'typo'"):
        wire.count(program, trip_counts={"typo": 2})


# What the CPU compiler changes


def test_combined_and_repeated_sums():
    parts = count(lambda x: [lax.psum(x[k :: k + 2] * k, "w") for k in range(1, 5)])
    (c,) = parts.collectives
    assert c.operands == 4
    assert c.operand_bytes == 4 * sum(len(range(k, D, k + 2)) for k in range(1, 5))
    twice = count(lambda x: lax.psum(x, "w") + jnp.sin(lax.psum(x, "w")))
    assert twice.messages_per_worker == 1


@pytest.mark.parametrize("move", [lambda x: lax.psum(x, "w"), lambda x: shift(x, 1)])
def test_bfloat16_travels_as_float32(move):
    counted = count(lambda x: move(x * 2), dtype=jnp.bfloat16)
    assert facts(counted)[0][1:] == ("f32", VECTOR)


def test_bit_cast_payload_keeps_its_size():
    def fn(x):
        return lax.bitcast_convert_type(
            shift(lax.bitcast_convert_type(x, jnp.uint16), 1), jnp.bfloat16
        )

    counted = count(fn, dtype=jnp.bfloat16)
    assert facts(counted) == [("collective-permute", "u16", 2 * D)]
    assert counted.bytes_per_worker == 2 * D


def test_partial_permute_sends_from_some():
    pairs = [(0, 1), (1, 2), (3, 3)]  # the last stays at home
    counted = count(lambda x: lax.ppermute(x, "w", pairs))
    assert counted.bytes_per_worker == VECTOR * 2 / N
    assert counted.collectives[0].group_size == N
    assert counted.collectives[0].groups == tuple(pairs)
    assert counted.bytes_between([0, 0, 1, 1, 1, 1, 1, 1]) == VECTOR / N


def test_subgroups():
    mesh = {"node": 2, "local": 4}

    def hierarchical(x):
        part = lax.psum_scatter(x, "local", tiled=True)
        return lax.all_gather(lax.psum(part, "node"), "local", tiled=True)

    counted = count(hierarchical, mesh=mesh)
    found = {c.kind: (c.group_size, c.bytes_sent) for c in counted.collectives}
    assert found == {
        "reduce-scatter": (4, VECTOR * 3 / 4),
        "all-reduce": (2, VECTOR / 4),
        "all-gather": (4, VECTOR / 4 * 3),
    }
    groups = {c.kind: c.groups for c in counted.collectives}
    assert groups["all-reduce"] == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert groups["all-gather"] == ((0, 1, 2, 3), (4, 5, 6, 7))
    # the reduction over "node" alone crosses between nodes of four
    assert counted.bytes_between([0] * 4 + [1] * 4) == VECTOR / 4
    assert counted.bytes_between([0] * 8) == 0


def test_one_worker_sends_nothing():
    counted = count(lambda x: lax.psum(x, "b"), mesh={"a": 8, "b": 1})
    assert counted.bytes_per_worker == counted.messages_per_worker == 0
    text = module(
        "ROOT %s = f32[4] all-reduce(%x), replica_groups={{0},{1},{2},{3}}, to_apply=%add"
    )
    (c,) = wire.count(text).collectives
    assert (c.group_size, c.bytes_sent) == (1, 0)
    assert wire.count(text).messages_per_worker == 0
    assert wire.count(text).bytes_between([0, 1, 2, 3]) == 0


# Text that the CPU compiler does not print


def module(entry, *, header="replica_count=4", **computations):
    """Write a module of f32[4] computations; ``add`` sums, as reductions need."""
    add = "%y = f32[4] parameter(1)\nROOT %sum = f32[4] add(%x, %y)"
    text = f"HloModule step, is_scheduled=true, {header}\n"
    for name, body in {"add": add, **computations, "ENTRY": entry}.items():
        head = "ENTRY %main" if name == "ENTRY" else f"%{name}"
        lines = ["%x = f32[4]{0} parameter(0)", *body.strip().splitlines()]
        inside = "".join(f"  {line.strip()}\n" for line in lines)
        text += f"\n{head} (x: f32[4]) -> f32[4] {{\n{inside}}}\n"
    return text


GPU = module(
    """
    %codes = u8[8,32768]{1,0} custom-call(%x), custom_call_target="codes"
    %ranges = f32[8,2]{1,0} custom-call(%x), custom_call_target="ranges"
    %all-to-all-start = ((u8[8,32768]{1,0}), u8[8,32768]{1,0}) all-to-all-start(%codes), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, metadata={op_name="jit(step)/shard_map/all_to_all" scheduling_name="all-to-all-start" stack_frame_id=36}, backend_config={"operation_queue_id":"0","collective_backend_config":{"is_sync":false,"backend":"DEFAULT"}}
    %all-to-all-done = u8[8,32768]{1,0} all-to-all-done(%all-to-all-start), metadata={op_name="jit(step)/shard_map/all_to_all" stack_frame_id=36}
    %all-gather-start = ((u8[8,32768]{1,0}, f32[8,2]{1,0}), (u8[64,32768]{1,0}, /*index=1*/f32[64,2]{1,0})) all-gather-start(%all-to-all-done, /*index=1*/%ranges), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}, use_global_device_ids=true, metadata={op_name="jit(step)/shard_map/all_gather" stack_frame_id=38}, backend_config={"collective_backend_config":{"is_sync":true}}
    %all-gather-done = (u8[64,32768]{1,0}, f32[64,2]{1,0}) all-gather-done(%all-gather-start)
    %collective-permute-start = (f32[4]{0}, f32[4]{0}) collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}
    %collective-permute-done = f32[4]{0} collective-permute-done(%collective-permute-start)
    %wrapped = ((f32[4]), f32[1], u32[]) async-start(%collective-permute-done), calls=%async_wrapped
    %pending = ((f32[4]), f32[1], u32[]) async-update(%wrapped), calls=%async_wrapped
    %scattered = f32[1] async-done(%pending), calls=%async_wrapped
    %graph = f32[4] call(%x), to_apply=%command_buffer
    %all-reduce-start = f32[4]{0} all-reduce-start(%graph), channel_id=1, replica_groups=[4,2]<=[2,4]T(1,0), use_global_device_ids=true, to_apply=%add, backend_config={"collective_backend_config":{"is_sync":false}}
    ROOT %all-reduce-done = f32[4]{0} all-reduce-done(%all-reduce-start)
    """,
    header="num_partitions=8",
    async_wrapped="ROOT %rs = f32[1] reduce-scatter(%x), channel_id=1, replica_groups=[2,4]<=[8], use_global_device_ids=true, dimensions={0}, to_apply=%add",
    command_buffer="ROOT %b = f32[4] collective-broadcast(%x), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}",
)


def test_gpu_forms():
    rows = [
        (c.kind, c.dtype, c.operands, c.operand_bytes, c.bytes_sent, c.asynchronous)
        for c in wire.count(GPU).collectives
    ]
    assert rows == [
        ("all-to-all", "u8", 1, 262_144, 229_376, True),
        ("all-gather", "u8+f32", 2, 262_208, 262_208 * 7, False),  # is_sync
        ("collective-permute", "f32", 1, 16, 16, True),
        ("reduce-scatter", "f32", 1, 16, 12, True),
        ("collective-broadcast", "f32", 1, 16, 14, False),
        ("all-reduce", "f32", 1, 16, 16, True),
    ]
    assert wire.count(GPU).collectives[-1].groups == ((0, 4), (1, 5), (2, 6), (3, 7))


PIECE = 'all-gather(%x), channel_id=4, replica_groups={{0,1,2,3}}, dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="0"}'
TPU = module(
    """
    %async-collective-start = (f32[4], f32[16], u32[]{:S(2)}) fusion(%x), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%fused_computation.110
    %fusion.67 = (f32[4], f32[16]{0:T(1024)(128)(4,1)S(1)}) fusion(%x), kind=kOutput, calls=%async_collective_fusion.67
    %fusion.74 = (f32[4], f32[16]) fusion(%x), kind=kOutput, calls=%async_collective_fusion.74
    %async-collective-done = f32[16] fusion(%fusion.74), kind=kCustom, calls=%fused_computation.114
    %all-gather.34 = f32[16] all-gather(%x), channel_id=2, replica_groups={{0,1,2,3}}, dimensions={0}, use_global_device_ids=true, frontend_attributes={async_collective_name="all-gather-start"}
    %async-collective-start.1 = (f32[4], f32[16], u32[]{:S(2)}) fusion(%x), kind=kCustom, calls=%fused_computation.120
    ROOT %async-collective-done.1 = f32[16] fusion(%x), kind=kCustom, calls=%fused_computation.121
    """,
    header="num_partitions=4",
    **{
        "fused_computation.110": f'%all-gather.25 = f32[16] {PIECE}\nROOT %c = (f32[4], f32[16], u32[]) custom-call(%all-gather.25), custom_call_target="AsyncCollectiveStart"',
        "async_collective_fusion.67": f"ROOT %all-gather.27 = f32[16] {PIECE}",
        "async_collective_fusion.74": f"ROOT %all-gather.29 = f32[16] {PIECE}",
        "fused_computation.114": f'%all-gather.33 = f32[16] {PIECE}\nROOT %d = f32[16] custom-call(%all-gather.33), custom_call_target="AsyncCollectiveDone"',
        "fused_computation.120": f"ROOT %all-gather.41 = f32[16] {PIECE}",
        "fused_computation.121": f"ROOT %all-gather.43 = f32[16] {PIECE}",
    },
)


def test_tpu_continuation_fusions_are_one_collective():
    found = [(c.name, c.asynchronous) for c in wire.count(TPU).collectives]
    assert found == [
        ("all-gather.25", True),
        ("all-gather.34", False),
        ("all-gather.41", True),  # another chain of the same number
    ]
    nameless = TPU.replace("async-collective-start", "fusion.start")
    assert [c.name for c in wire.count(nameless).collectives] == [
        "all-gather.25",
        "all-gather.34",
    ]


def test_predicate_conditional_counts_the_false_branch_first():
    conditional = """
        %p = pred[] constant(true)
        ROOT %c = f32[4] conditional(%p, %x, %x), true_computation=%yes, false_computation=%no, metadata={op_name="jit(f)/branch_shares(0.75,0.25)/cond"}
        """
    sends = "ROOT %s = f32[4] all-reduce(%x), replica_groups={}, to_apply=%add"
    silent = "ROOT %t = f32[4] sine(%x)"
    yes = wire.count(module(conditional, yes=sends, no=silent))
    assert yes.messages_per_worker == 0.25
    no = wire.count(module(conditional, yes=silent, no=sends))
    assert no.messages_per_worker == 0.75


def test_branches_that_send_different_amounts_are_unequal():
    conditional = (
        "ROOT %c = f32[4] conditional(%i, %x, %x), branch_computations={%one, %two}"
    )
    once = "%s = f32[4] all-reduce(%x), replica_groups={}, to_apply=%add"
    twice = once + "\nROOT %t = f32[4] all-reduce(%s), replica_groups={}, to_apply=%add"
    with pytest.raises(ValueError, match="24 bytes in 1 .* 48 bytes in 2"):
        wire.count(module(conditional, one=once, two=twice))
    assert wire.count(module(conditional, one=once, two=once)).messages_per_worker == 1


def test_a_reduction_is_no_site_of_its_own():
    """Neither the sum of an all-reduce nor a silent call adds anything."""
    text = module(
        """
        %c = f32[4] call(%x), to_apply=%add
        ROOT %s = f32[4] all-reduce(%c), replica_groups={}, to_apply=%add
        """
    )
    assert wire.count(text).messages_per_worker == 1


def test_a_computation_called_twice_counts_twice():
    send = "ROOT %s = f32[4] all-reduce(%x), replica_groups={}, to_apply=%add"
    text = module(
        """
        %a = f32[4] call(%x), to_apply=%send
        ROOT %b = f32[4] custom-call(%a), custom_call_target="t", called_computations={%send}
        """,
        send=send,
    )
    assert wire.count(text).messages_per_worker == 2


def test_point_to_point_and_host_transfers():
    text = module(
        """
        %t = token[] after-all()
        %send = (f32[4], u32[], token[]) send(%x, %t), channel_id=2, frontend_attributes={_xla_send_recv_source_target_pairs={{0,1},{1,2},{2,3}}}
        %send-done = token[] send-done(%send), channel_id=2
        %recv = (f32[4], u32[], token[]) recv(%t), channel_id=2, frontend_attributes={_xla_send_recv_source_target_pairs={{0,1},{1,2},{2,3}}}
        %host = (f32[4], u32[], token[]) send(%x, %t), channel_id=3, is_host_transfer=true
        ROOT %recv-done = (f32[4], token[]) recv-done(%recv), channel_id=2
        """,
        header="num_partitions=4",
    )
    (c,) = wire.count(text).collectives
    assert (c.kind, c.operands, c.operand_bytes) == ("send", 1, 16)
    assert c.bytes_sent == 16 * 3 / 4
    assert wire.count(text).bytes_between([0, 0, 1, 1]) == 4


def test_ragged_exchange_counts_its_buffer():
    text = module(
        """
        %i = s32[4] constant({0, 1, 2, 3})
        ROOT %r = f32[4] ragged-all-to-all(%x, %x, %i, %i, %i, /*index=5*/%i), replica_groups={{0,1,2,3}}
        """
    )
    (c,) = wire.count(text).collectives
    assert (c.operands, c.operand_bytes, c.bytes_sent) == (1, 16, 12)


@pytest.mark.parametrize(
    "instruction, groups",
    [
        # replicas [r], partitions [p]: device 2 r + p
        ("all-reduce(%x), replica_groups={{0,1,2}}", [(0, 2, 4), (1, 3, 5)]),
        ("all-reduce(%x), channel_id=1, replica_groups={}", [(0, 1, 2, 3, 4, 5)]),
        (
            "all-gather(%x), channel_id=1, replica_groups={{0},{1},{2}}",
            [(0, 1), (2, 3), (4, 5)],
        ),
        ("all-to-all(%x), channel_id=1, replica_groups={}", [(0, 1), (2, 3), (4, 5)]),
        (
            "all-reduce(%x), channel_id=1, use_global_device_ids=true, replica_groups=[2,3]<=[6]",
            [(0, 1, 2), (3, 4, 5)],
        ),
        (
            "collective-permute(%x), channel_id=1, source_target_pairs={{0,1}}",
            [(0, 1), (2, 3), (4, 5)],
        ),
    ],
)
def test_replicas_and_partitions(instruction, groups):
    text = module(
        f"ROOT %s = f32[4] {instruction}", header="replica_count=3, num_partitions=2"
    )
    (c,) = wire.count(text).collectives
    assert list(c.groups) == groups
    if c.kind == "collective-permute":
        assert c.bytes_sent == 16 / 2
    else:
        assert c.group_size == len(groups[0])


@pytest.mark.parametrize(
    "shape, size",
    [
        ("s4[5]{0:E(4)}", 3),
        ("u2[4]", 1),
        ("pred[7]", 7),
        ("f8e4m3fn[3]", 3),
        ("f8e8m0fnu[3]", 3),
        ("f4e2m1fn[4]", 2),
        ("bf16[3,2]{1,0:T(8,128)(2,1)}", 12),
        ("f16[]", 2),
        ("s64[2]", 16),
        ("f64[2]", 16),
        ("c64[2]", 16),
        ("c128[2]", 32),
        ("f32[<=8,2]", 64),
        ("u8[0]", 0),
        ("(u8[3], (f32[2], token[]))", 11),
    ],
)
def test_sizes_of_shapes(shape, size):
    text = module(
        f"""
        %v = {shape} custom-call(%x), custom_call_target="v"
        ROOT %s = {shape} all-reduce(%v), replica_groups={{}}
        """
    )
    assert wire.count(text).collectives[0].operand_bytes == size


@pytest.mark.parametrize("shape", ["f7[2]", "opaque[]", "f32[?]", "q8[3]", "f8x[2]"])
def test_unknown_shapes_are_refused(shape):
    text = module(
        f"""
        %v = {shape} custom-call(%x), custom_call_target="v"
        ROOT %s = {shape} all-reduce(%v), replica_groups={{}}
        """
    )
    with pytest.raises(ValueError, match="cannot tell the size"):
        wire.count(text)


@pytest.mark.parametrize(
    "instruction",
    [
        "all-shuffle(%x), replica_groups={}",
        "collective-teleport-start(%x), channel_id=1",
        "collective-permute-start(%x, %x, %i, %i), channel_id=1, source_target_pairs={{0,1}}, slice_sizes={{1,128}}",
    ],
)
def test_unknown_collectives_are_refused(instruction):
    with pytest.raises(ValueError, match="not known"):
        wire.count(module(f"ROOT %s = f32[4] {instruction}"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("{{0,1,2},{3}}", "equal size"),
        ("{{0,1},{1,2}}", "once"),
        ("{{0,1}}", "once"),
        ("[2,2]<=[2]", "not known"),
        ("mesh['a'=4] {'b'}", "not known"),
        ("mesh['a'=4] {'a':(3)2}", "not known"),
        ("groups(4)", "not known"),
        ("{{0,1},{2,3}", "not known"),
        ("<=[4]", "not known"),
    ],
)
def test_bad_groups_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        wire.replica_groups(text, 4)


def test_only_one_compiled_program_is_counted():
    lowered = jax.jit(jnp.sin).lower(1.0)
    for wrong in (lowered, jnp.sin, "", GPU + GPU):
        with pytest.raises(ValueError, match=r"optimized HLO.*\.compile\(\)"):
            wire.count(wrong)
    assert wire.count(lowered.compile()).collectives == ()


# Replica groups


@pytest.mark.parametrize(
    "text, groups",
    [
        ("{}", [(0, 1, 2, 3, 4, 5, 6, 7)]),
        ("[2,4]<=[8]", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("[2,4]<=[4,2]T(1,0)", [(0, 2, 4, 6), (1, 3, 5, 7)]),
        ("mesh['a'=2,'b'=4] {'b'}", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("mesh[a=2,b=4] {a}", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("mesh['a'=8] {}", [(i,) for i in range(8)]),
        ("mesh['a'=2,'b'=2,'c'=2] {'c','a'}", [(0, 4, 1, 5), (2, 6, 3, 7)]),
        ("mesh['a'=8] {'a':(2)2}", [(0, 2), (1, 3), (4, 6), (5, 7)]),
        ("mesh['a'=8] {'a':(1)2,'a':(4)2}", [(0, 1, 4, 5), (2, 3, 6, 7)]),
        (
            "mesh['a'=2,'b'=4],device_ids=([4,2]T(1,0)) {'a'}",
            [(0, 1), (2, 3), (4, 5), (6, 7)],
        ),
        (
            "mesh['a'=8],device_ids=(7,6,5,4,3,2,1,0) {'a':(4)2}",
            [(7, 6), (5, 4), (3, 2), (1, 0)],
        ),
    ],
)
def test_forms_of_replica_groups(text, groups):
    assert list(wire.replica_groups(text, 8)) == groups


def test_a_mesh_with_device_ids_is_read_from_an_instruction():
    text = module(
        "ROOT %s = f32[4] all-reduce(%x), channel_id=1, replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, use_global_device_ids=true, to_apply=%add",
        header="num_partitions=4",
    )
    assert wire.count(text).collectives[0].groups == ((0, 1), (2, 3))


@st.composite
def meshes(draw):
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    axes = draw(st.permutations(range(len(sizes))))
    return sizes, axes[: draw(st.integers(0, len(sizes)))]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(meshes())
def test_all_forms_of_the_same_groups_agree(mesh):
    sizes, along = mesh
    others = [i for i in range(len(sizes)) if i not in along]
    place = {c: i for i, c in enumerate(itertools.product(*map(range, sizes)))}

    def device(outside, inside):
        at = dict(zip([*others, *along], [*outside, *inside], strict=True))
        return place[tuple(at[i] for i in range(len(sizes)))]

    spans = [[range(sizes[i]) for i in axes] for axes in (others, along)]
    expected = tuple(
        tuple(device(outside, inside) for inside in itertools.product(*spans[1]))
        for outside in itertools.product(*spans[0])
    )
    n, length = math.prod(sizes), len(expected[0])
    printed = ",".join(f"'ax{i}'={size}" for i, size in enumerate(sizes))
    order = ",".join(map(str, [*others, *along]))
    named = ",".join(f"'ax{i}'" for i in along)
    forms = [
        "{" + ",".join("{" + ",".join(map(str, g)) + "}" for g in expected) + "}",
        f"[{n // length},{length}]<={sizes}T({order})".replace(" ", ""),
        f"mesh[{printed}] {{{named}}}",
    ]
    for form in forms:
        assert wire.replica_groups(form, n) == expected


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 4), min_size=3, max_size=3))
def test_part_of_an_axis_is_an_axis_of_a_finer_mesh(factors):
    before, size, after = factors
    n = before * size * after
    coarse = wire.replica_groups(f"mesh['a'={n}] {{'a':({before}){size}}}", n)
    fine = f"mesh['a'={before},'b'={size},'c'={after}] {{'b'}}"
    assert coarse == wire.replica_groups(fine, n)


# Between nodes


def test_bytes_between_nodes_of_eight():
    """16 nodes of 8: a ring leaves a node once, an all-to-all nearly always."""
    size, n = 1024, 128
    nodes = np.arange(n) // 8

    def between(instruction):
        text = module(
            f"""
            %v = u8[{size}] custom-call(%x), custom_call_target="v"
            ROOT %s = u8[{size}] {instruction}, channel_id=1, replica_groups=[1,128]<=[128], use_global_device_ids=true
            """,
            header="num_partitions=128",
        )
        return wire.count(text).bytes_between(nodes)

    ring = size * (n - 1) / n / 8
    assert between("all-reduce(%v)") == pytest.approx(2 * ring)
    assert between("reduce-scatter(%v)") == pytest.approx(ring)
    assert between("all-gather(%v)") == pytest.approx(ring * n)
    # 120 of 127 peers, size / 128 for each
    assert between("all-to-all(%v)") == pytest.approx(size / n * 120)


def test_bytes_between_uneven_nodes():
    text = "ROOT %s = f32[4] all-to-all(%x), replica_groups={{0,1,2,3}}"
    assert wire.count(module(text)).bytes_between([0, 0, 0, 1]) == 16 * 3 / 4 / 2


def test_table_is_readable():
    lines = str(wire.count(GPU)).splitlines()
    assert lines[0].split() == "kind dtype ops bytes group sent weight path".split()
    assert lines[1].split()[:2] == ["all-to-all", "(async)"]
    assert lines[1].endswith("jit(step)/shard_map/all_to_all")
    assert lines[-1].startswith("per worker: ")
    assert len(lines) == 1 + 6 + 1
