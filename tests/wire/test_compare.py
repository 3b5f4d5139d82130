"""Pairs of collectives, and the words for what differs between them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bagua_jax.wire import WireCount, compare
from bagua_jax.wire.base import collective

RING = ((0, 1, 2, 3),)


def site(kind="all-reduce", *arrays, weight=1.0, path="a", groups=RING):
    arrays = arrays or (("f32", 100),)
    return collective(kind, arrays, groups, 4, path, "")._replace(weight=weight)


def words(meant, sent):
    compared = compare(WireCount(tuple(meant)), WireCount(tuple(sent)))
    return sorted(w for change in compared.changes for w in change.differences)


@pytest.mark.parametrize(
    "meant, sent, expected",
    [
        ([site()], [site()], []),
        ([site(path="a"), site(path="b")], [site(path="b"), site(path="a")], []),
        ([site()], [site(path="other")], []),  # XLA may rename what it keeps
        ([site()], [], ["removed"]),
        ([site(groups=((0,), (1,), (2,), (3,)))], [], ["removed (sends nothing)"]),
        ([site(), site()], [site()], ["removed (another like it stays)"]),
        ([site(), site("all-reduce", ("f32", 99))], [site()], ["removed"]),
        ([site(), site(weight=0.5)], [site()], ["removed"]),
        ([], [site()], ["added"]),
        ([site()], [site(path="b", groups=((0, 1), (2, 3)))], ["added", "removed"]),
        # another dtype
        ([site("all-reduce", ("bf16", 9))], [site("all-reduce", ("f32", 9))],
         ["widened bf16 -> f32"]),
        ([site("all-gather", ("s4", 9))], [site("all-gather", ("s8", 9))],
         ["widened s4 -> s8"]),
        ([site("all-gather", ("f32", 9))], [site("all-gather", ("bf16", 9))],
         ["narrowed f32 -> bf16"]),
        ([site("all-gather", ("bf16", 9))], [site("all-gather", ("u16", 9))],
         ["recast bf16 -> u16"]),
        # not of the same source: nothing says that they belong together
        ([site("all-reduce", ("bf16", 9))], [site("all-reduce", ("f32", 9), path="b")],
         ["added", "removed"]),
        # another kind
        ([site("reduce-scatter")], [site("all-reduce", path="")],
         ["rewritten reduce-scatter -> all-reduce"]),
        ([site("all-gather", ("f32", 9))], [site("all-reduce", ("f32", 36))],
         ["rewritten all-gather -> all-reduce"]),
        ([site("reduce-scatter", ("bf16", 9))], [site("all-reduce", ("f32", 9))],
         ["rewritten reduce-scatter -> all-reduce", "widened bf16 -> f32"]),
        # another number of runs
        ([site(weight=5)], [site()], ["moved 5 -> 1 runs"]),
        ([site(weight=6)], [site(weight=3), site(weight=3)], ["unrolled 1 -> 2"]),
        ([site(weight=7)], [site(weight=6), site(weight=1)], ["unrolled 1 -> 2"]),
        # another number of messages
        ([site(), site("all-reduce", ("f32", 50))],
         [site("all-reduce", ("f32", 100), ("f32", 50))], ["combined 2 -> 1"]),
        ([site(), site("all-reduce", ("f32", 50))],
         [site("all-reduce", ("f32", 150), path="")], ["combined 2 -> 1"]),
        ([site("all-reduce", ("f32", n)) for n in (1, 2, 4, 8)],
         [site("all-reduce", ("f32", n), path="") for n in (10, 5)],
         ["combined 4 -> 2"]),
        ([site("all-reduce", ("bf16", 9)), site("all-reduce", ("f32", 5))],
         [site("all-reduce", ("f32", 9), ("f32", 5))],
         ["combined 2 -> 1", "widened bf16 -> f32"]),
        ([site("all-reduce", ("f32", 100), ("f32", 50))],
         [site(), site("all-reduce", ("f32", 50))], ["split 1 -> 2"]),
        ([site("all-to-all", ("u8", 80))],
         [site("all-to-all", ("u8", 20), ("u8", 20), ("u8", 20), ("u8", 20))], []),
        # one of three is removed, and two are joined
        ([site("all-reduce", ("f32", n)) for n in (3, 5, 9)],
         [site("all-reduce", ("f32", 12), path="")], ["combined 2 -> 1", "removed"]),
        # a pair that stays at home is no part of a permute
        ([site("collective-permute", groups=((0, 1), (2, 2)))],
         [site("collective-permute", groups=((0, 1),))], []),
    ],
)  # fmt: skip
def test_words(meant, sent, expected):
    assert words(meant, sent) == expected


sites = st.lists(
    st.builds(
        lambda kind, dtype, size, weight, path: site(
            kind, (dtype, size), weight=weight, path=path
        ),
        st.sampled_from(["all-reduce", "all-gather", "reduce-scatter"]),
        st.sampled_from(["f32", "bf16"]),
        st.sampled_from([4, 8, 12]),
        st.sampled_from([1.0, 2.0, 1 / 3]),
        st.sampled_from(["a", "b", ""]),
    ),
    max_size=6,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(sites, sites)
def test_bytes_and_messages_add_up_whatever_the_pairs(meant, sent):
    compared = compare(WireCount(tuple(meant)), WireCount(tuple(sent)))
    assert sorted(compared.intended.collectives) == sorted(meant)
    assert sorted(compared.compiled.collectives) == sorted(sent)
    more = WireCount(tuple(sent)).bytes_per_worker
    more -= WireCount(tuple(meant)).bytes_per_worker
    assert sum(compared.differences.values()) == pytest.approx(more, abs=1e-9)
    for change in compared.changes:
        if not change.differences:  # nothing is called equal that is not
            a, b = (WireCount(c) for c in (change.intended, change.compiled))
            assert a.bytes_per_worker == pytest.approx(b.bytes_per_worker)
            assert len(a.collectives) == len(b.collectives) == 1


@settings(max_examples=50, deadline=None, derandomize=True)
@given(sites)
def test_a_program_equals_itself(meant):
    assert words(meant, meant) == []


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 1000), min_size=2, max_size=12), st.data())
def test_concatenations_are_found(sizes, data):
    """As XLA for GPU joins sums: one vector, in place of several operands."""
    cut = data.draw(st.integers(1, len(sizes) - 1))
    meant = [site("all-reduce", ("f32", n)) for n in sizes]
    parts = [sizes[:cut], sizes[cut:]]
    sent = [site("all-reduce", ("f32", sum(p)), path="") for p in parts]
    found = words(meant, sent)
    assert not [word for word in found if word.startswith(("added", "removed"))]
