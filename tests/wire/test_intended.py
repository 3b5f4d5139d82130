# ruff: noqa: E501 (compilers print an operation on one line)
"""StableHLO in every form: what jax prints, and what it may print."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from wire_programs import W, lower, lower_here, repeated, scanned, shift, step_number

from bagua_jax import Workers, schedules, wire

VECTOR = "tensor<100xf32>"
SUM = """({
      ^bb0(%a: tensor<f32>, %b: tensor<f32>):
        %s = stablehlo.add %a, %b : tensor<f32>
        stablehlo.return %s : tensor<f32>
      })"""
GROUPS = "replica_groups = dense<[[0, 1, 2, 3]]> : tensor<1x4xi64>"
CHANNEL = "channel_handle = #stablehlo.channel_handle<handle = 1, type = 1>"


def all_reduce(operand="%x", groups=GROUPS, kind=VECTOR, extra=""):
    return (
        f'"stablehlo.all_reduce"({operand}) <{{{CHANNEL}, {groups}, '
        f"use_global_device_ids}}> {SUM} : ({kind}) -> {kind}{extra}"
    )


def module(body, *, functions="", mesh='<["a"=2, "b"=2]>', axes='"a", "b"'):
    """Write a program of four partitions whose body runs on every axis of a mesh."""
    specs = (
        f"in_shardings=[<@mesh, [{{{axes}}}]>] out_shardings=[<@mesh, [{{{axes}}}]>]"
    )
    return f"""
module @jit_f attributes {{mhlo.num_partitions = 4 : i32, mhlo.num_replicas = 1 : i32}} {{
  sdy.mesh @mesh = {mesh}
  func.func public @main(%arg: tensor<400xf32>) -> tensor<400xf32> {{
    %r = sdy.manual_computation(%arg) {specs} manual_axes={{{axes}}} (%x: {VECTOR}) {{
      {body}
      sdy.return %y : {VECTOR}
    }} : (tensor<400xf32>) -> tensor<400xf32> loc("jit(f)/shard_map")
    return %r : tensor<400xf32>
  }}
  {functions}
}}
"""


def test_one_collective():
    (c,) = wire.intended(module(f'%y = {all_reduce()} loc("psum")')).collectives
    assert c._replace(name="") == wire.Collective(
        kind="all-reduce",
        dtype="f32",
        operands=1,
        operand_bytes=400,
        group_size=4,
        bytes_sent=600,
        weight=1,
        asynchronous=False,
        path="jit(f)/shard_map/psum",
        name="",
        groups=((0, 1, 2, 3),),
        arrays=(("f32", 100),),
    )


@pytest.mark.parametrize(
    "axes, mesh, groups",
    [
        ('<name = "a">', '<["a"=2, "b"=2]>', [(0, 2), (1, 3)]),
        ('<name = "b">', '<["a"=2, "b"=2]>', [(0, 1), (2, 3)]),
        (
            '<name = "b">, #stablehlo.axis_ref<name = "a">',
            '<["a"=2, "b"=2]>',
            [(0, 2, 1, 3)],
        ),
        ('<name = "a">', '<["a"=2, "b"=2], device_ids=[3, 2, 1, 0]>', [(3, 1), (2, 0)]),
    ],
)
def test_groups_by_axes_of_a_mesh(axes, mesh, groups):
    """As jax 0.12 prints them, where StableHLO has the form."""
    named = (
        "replica_groups = #stablehlo.replica_group_mesh_axes<mesh = @mesh, "
        f"axes = [#stablehlo.axis_ref{axes}]>"
    )
    program = module(f"%y = {all_reduce(groups=named)}", mesh=mesh)
    try:
        counted = wire.intended(program)
    except ValueError as error:
        if "expected a lowered program" not in str(error):
            raise
        pytest.skip("this jaxlib lists devices instead")
    assert list(counted.collectives[0].groups) == groups


def scan_like(
    *, start=0, step=1, limit=5, compare="LT", add="%i, %step", test="%j, %limit"
):
    return f"""
      %start = stablehlo.constant dense<{start}> : tensor<i32>
      %carried = stablehlo.constant dense<{step}> : tensor<i32>
      %w:3 = stablehlo.while(%i = %start, %k = %carried, %v = %x) : tensor<i32>, tensor<i32>, {VECTOR}
      cond {{
        %limit = stablehlo.constant dense<{limit}> : tensor<i32>
        %p = stablehlo.compare {compare}, {test.replace("%j", "%i")}, SIGNED : (tensor<i32>, tensor<i32>) -> tensor<i1>
        stablehlo.return %p : tensor<i1>
      }} do {{
        %step = stablehlo.constant dense<{step}> : tensor<i32>
        %next = stablehlo.add {add} : tensor<i32>
        %sum = {all_reduce("%v")}
        stablehlo.return %next, %k, %sum : tensor<i32>, tensor<i32>, {VECTOR}
      }} loc("while")
      %y = stablehlo.negate %w#2 : {VECTOR}"""


@pytest.mark.parametrize(
    "loop, trips",
    [
        (dict(), 5),
        (dict(start=2, step=2, limit=7), 3),
        (dict(compare="LE"), 6),
        (dict(start=9, step=-3, limit=0, compare="GT"), 3),
        (dict(start=9, step=-3, limit=0, compare="GE"), 4),
        (dict(start=7), 0),
        (dict(add="%step, %i"), 5),
        (dict(add="%i, %k"), 5),  # a step that the loop carries and does not change
    ],
)
def test_loops_that_count(loop, trips):
    (c,) = wire.intended(module(scan_like(**loop))).collectives
    assert c.weight == trips


@pytest.mark.parametrize(
    "loop",
    [
        dict(step=-1),
        dict(compare="NE"),
        dict(add="%i, %i"),
        dict(add="%k, %step"),
        dict(test="%limit, %j"),
    ],
)
def test_other_loops_are_refused(loop):
    program = module(scan_like(**loop))
    with pytest.raises(ValueError, match=r"wire\.intended: a loop.*trip count.*while"):
        wire.intended(program)
    counted = wire.intended(program, trip_counts={"jit(f)/shard_map/while": 7})
    assert counted.messages_per_worker == 7
    with pytest.raises(ValueError, match="must use names of the program.*typo"):
        wire.intended(program, trip_counts={"jit(f)/shard_map/while": 7, "typo": 7})


def branches(op, name, *parts):
    regions = ", ".join(
        f"{{ {part}\n stablehlo.return %z : {VECTOR} }}" for part in parts
    )
    kind = "i32" if op == "case" else "i1"
    return f"""
      %i = stablehlo.constant dense<1> : tensor<{kind}>
      %y = "stablehlo.{op}"(%i) ({regions}) : (tensor<{kind}>) -> {VECTOR} loc("{name}")"""


SENDS, SILENT = f"%z = {all_reduce()}", f"%z = stablehlo.sine %x : {VECTOR}"


def test_branches_take_the_shares_of_their_scope():
    scope = "branch_shares(0.75,0.25)/cond"
    program = module(branches("case", scope, SENDS, SILENT))
    assert wire.intended(program).messages_per_worker == 0.75
    # the first region of an if is the true branch, which HLO names last
    program = module(branches("if", scope, SENDS, SILENT))
    assert wire.intended(program).messages_per_worker == 0.25
    program = module(branches("case", "cond", SENDS, SILENT))
    with pytest.raises(
        ValueError, match=r"wire\.intended: the branches.*send unequally"
    ):
        wire.intended(program)
    shares = {"jit(f)/shard_map/cond": (0.1, 0.9)}
    assert wire.intended(program, branch_shares=shares).messages_per_worker == 0.1


def test_a_function_called_twice_counts_twice():
    functions = f"""
  func.func private @f(%x: {VECTOR}) -> {VECTOR} {{
    %y = {all_reduce()} loc("psum")
    return %y : {VECTOR}
  }}"""
    call = f"func.call @f(%x) : ({VECTOR}) -> {VECTOR}"
    body = f'%a = {call} loc("first")\n%y = {call} loc("second")'
    found = wire.intended(module(body, functions=functions)).collectives
    paths = [c.path for c in found]
    assert paths == ["jit(f)/shard_map/first/psum", "jit(f)/shard_map/second/psum"]


def test_functions_of_any_name():
    """Of jit, which names functions after those of Python."""

    def odd(x):
        return lax.psum(x, W)

    odd.__name__ = "we.ird näme<1>"

    def fn(x):
        return jax.jit(odd)(jax.jit(lambda x: shift(x, 1))(x))

    kinds = [c.kind for c in wire.intended(lower(fn)).collectives]
    assert kinds == ["collective-permute", "all-reduce"]
    call = f"%y = func.call @missing(%x) : ({VECTOR}) -> {VECTOR}"
    declared = f"func.func private @missing({VECTOR}) -> {VECTOR}"
    with pytest.raises(ValueError, match="no function named 'missing'"):
        wire.intended(module(call, functions=declared))


def test_custom_calls_are_followed():
    functions = f"""
  func.func private @f(%x: {VECTOR}) -> {VECTOR} {{
    %y = {all_reduce()}
    return %y : {VECTOR}
  }}"""
    call = f"%y = stablehlo.custom_call @t(%x) {{called_computations = [@f]}} : ({VECTOR}) -> {VECTOR}"
    assert wire.intended(module(call, functions=functions)).messages_per_worker == 1
    call = f'%y = stablehlo.composite "own.t" %x {{decomposition = @f}} : ({VECTOR}) -> {VECTOR}'
    assert wire.intended(module(call, functions=functions)).messages_per_worker == 1


def test_other_collectives():
    def one(op):
        return wire.intended(module(op)).collectives[0]

    pairs = "source_target_pairs = dense<[[0, 1], [1, 2], [3, 3]]> : tensor<3x2xi64>"
    typed = f": ({VECTOR}) -> {VECTOR}"
    c = one(f'%y = "stablehlo.collective_permute"(%x) <{{{CHANNEL}, {pairs}}}> {typed}')
    assert (c.kind, c.bytes_sent) == ("collective-permute", 400 * 2 / 4)
    assert c.groups == ((0, 1), (1, 2), (3, 3))
    c = one(
        f'%y = "stablehlo.collective_broadcast"(%x) <{{{CHANNEL}, {GROUPS}}}> {typed}'
    )
    assert (c.kind, c.bytes_sent) == ("collective-broadcast", 300)
    ragged = f"""
      %i = stablehlo.constant dense<1> : tensor<4xi32>
      %y = stablehlo.custom_call @ragged_all_to_all(%x, %x, %i, %i, %i, %i) {{api_version = 4 : i32, backend_config = {{channel_id = 1 : i64, {GROUPS}}}}} : ({VECTOR}, {VECTOR}, tensor<4xi32>, tensor<4xi32>, tensor<4xi32>, tensor<4xi32>) -> {VECTOR}"""
    c = one(ragged)
    assert (c.kind, c.operands, c.bytes_sent) == ("ragged-all-to-all", 1, 300)


@pytest.mark.parametrize(
    "element, dtype, size",
    [
        ("bf16", "bf16", 200),
        ("f8E4M3FN", "f8e4m3fn", 100),
        ("i8", "s8", 100),
        ("ui8", "u8", 100),
        ("ui4", "u4", 50),
        ("i1", "pred", 100),
        ("complex<f32>", "c64", 800),
    ],
)
def test_types(element, dtype, size):
    kind = f"tensor<100x{element}>"
    pairs = "source_target_pairs = dense<[[0, 1]]> : tensor<1x2xi64>"
    body = f"""
      %v = stablehlo.custom_call @v() : () -> {kind}
      %w = "stablehlo.collective_permute"(%v) <{{{CHANNEL}, {pairs}}}> : ({kind}) -> {kind}
      %y = stablehlo.sine %x : {VECTOR}"""
    (c,) = wire.intended(module(body)).collectives
    assert (c.dtype, c.operand_bytes) == (dtype, size)


@pytest.mark.parametrize(
    "body, message",
    [
        (
            f'%y = "sdy.all_reduce"(%x) {{}} : ({VECTOR}) -> {VECTOR}',
            "expected a lowered program|not known",
        ),
        (
            f"%v = stablehlo.custom_call @v() : () -> tensor<?xf32>\n{all_reduce('%v', kind='tensor<?xf32>').replace('%y', '%q')}\n%y = stablehlo.sine %x : {VECTOR}",
            "of a size that is not known",
        ),
    ],
)
def test_what_is_not_known_is_refused(body, message):
    with pytest.raises(ValueError, match=message):
        wire.intended(module(body))


def test_axes_left_to_the_partitioner_are_refused():
    """Unless an inner shard_map takes them over."""
    mesh = Workers.abstract((2, 4)).mesh
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32)

    def lowered(inner):
        outer = jax.shard_map(
            inner,
            mesh=mesh,
            in_specs=P("node"),
            out_specs=P("node"),
            axis_names={"node"},
            check_vma=False,
        )
        return jax.jit(outer).trace(x).lower(lowering_platforms=("cpu",))

    with pytest.raises(ValueError, match="4 parts.*left to the partitioner"):
        wire.intended(lowered(lambda x: lax.psum(x, "node")))
    assert wire.intended(lowered(jnp.sin)).collectives == ()

    def nested(x):
        return jax.shard_map(
            lambda x: lax.psum(x, "node"),
            in_specs=P(None, "local"),
            out_specs=P(None, "local"),
            axis_names={"local"},
            check_vma=False,
        )(x)

    (c,) = wire.intended(lowered(nested)).collectives
    assert c.groups == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert c.bytes_sent == 4 * 4 * 64 / 4


def test_the_partitioner_before_shardy():
    """Shards enter a function through a custom call, whole or over some axes."""
    text = f"""
module @jit_f attributes {{mhlo.num_partitions = 4 : i32, mhlo.num_replicas = 1 : i32}} {{
  func.func public @main(%arg: tensor<400xf32>) -> {VECTOR} {{
    %0 = stablehlo.custom_call @SPMDFullToShardShape(%arg) {{mhlo.sharding = "{{manual}}"}} : (tensor<400xf32>) -> {VECTOR}
    %1 = func.call @body(%0) : ({VECTOR}) -> {VECTOR}
    return %1 : {VECTOR}
  }}
  func.func private @body(%x: {VECTOR}) -> {VECTOR} {{
    %y = {all_reduce()}
    return %y : {VECTOR}
  }}
}}"""
    assert wire.intended(text).bytes_per_worker == 600
    some = text.replace("{manual}", "{devices=[1,4]<=[4] last_tile_dims={manual}}")
    with pytest.raises(ValueError, match="left to the partitioner"):
        wire.intended(some)


def test_replicas():
    """As pmap once lowered: no mesh, no channel."""
    groups = "replica_groups = dense<[[0, 1], [2, 3]]> : tensor<2x2xi64>"
    text = f"""
module attributes {{mhlo.num_partitions = 1 : i32, mhlo.num_replicas = 4 : i32}} {{
  func.func public @main(%x: {VECTOR}) -> {VECTOR} {{
    %y = "stablehlo.all_reduce"(%x) <{{{groups}}}> {SUM} : ({VECTOR}) -> {VECTOR}
    return %y : {VECTOR}
  }}
}}"""
    (c,) = wire.intended(text).collectives
    assert (c.groups, c.bytes_sent) == (((0, 1), (2, 3)), 400)


def test_text_and_module_and_lowered_agree():
    lowered = lower_here(scanned)
    counted = wire.intended(lowered)
    assert counted.messages_per_worker == 5
    assert wire.intended(lowered.as_text(debug_info=True)) == counted
    assert wire.intended(lowered.compiler_ir("stablehlo")) == counted
    assert wire.intended(lower(scanned)) == counted  # nobody is attached
    nameless = wire.intended(lowered.as_text())
    assert nameless.bytes_per_worker == counted.bytes_per_worker


def test_only_lowered_programs_are_counted():
    compiled = lower_here(repeated).compile()
    for wrong in (compiled.as_text(), "", jnp.sin, "module @m {"):
        with pytest.raises(
            ValueError, match=r"lowered program|no function named 'main'"
        ):
            wire.intended(wrong)


@pytest.mark.parametrize("wrap", ["grad", "vmap", "checkpoint", "jit"])
def test_shares_survive_transformations(wrap):
    def scoped(flag, x):
        mean = lambda v: lax.all_gather(v, W).mean(0)  # noqa: E731
        return schedules.every(flag, 4, mean, jnp.sin, x)

    def fn(x):
        flag = step_number(x) > 0
        if wrap == "vmap":
            return jax.vmap(lambda y: scoped(flag, y))(x.reshape(2, -1)).ravel()
        if wrap == "jit":
            return jax.jit(scoped)(flag, x)
        inner = jax.checkpoint(scoped) if wrap == "checkpoint" else scoped
        return jax.grad(lambda y: jnp.sum(inner(flag, y) ** 2))(x)

    large = [c for c in wire.intended(lower(fn)).collectives if c.operand_bytes > 4]
    assert large
    assert {c.weight for c in large} == {0.25}
