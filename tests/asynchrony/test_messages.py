"""Messages: what is written is read, and everything else is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bagua_jax.asynchrony.messages import (
    Kind,
    Layout,
    Message,
    Refused,
    decode,
    encode,
    read_facts,
    write_facts,
)

LIKE = jax.ShapeDtypeStruct
LAYOUT = Layout(
    full=(LIKE((5,), jnp.float32), LIKE((0,), jnp.float32)),
    compressed=(LIKE((5,), jnp.uint8), LIKE((2,), jnp.float32), LIKE((), jnp.bfloat16)),
    workers=3,
    facts=b"topk",
)
HEADER = 48
numbers = st.integers(0, 2**64 - 1)


def arrays(kind: Kind, reference: int, raw: bytes) -> tuple[np.ndarray, ...]:
    """Arbitrary bits in the shapes that a kind carries; NaNs among them."""
    found, start = [], 0
    for like in LAYOUT.carried(kind, reference):
        size = like.size * np.dtype(like.dtype).itemsize
        bits = np.resize(np.frombuffer(raw, np.uint8), start + size)[start:]
        found.append(bits.view(like.dtype).reshape(like.shape))
        start += size
    return tuple(found)


@st.composite
def messages(draw) -> Message:
    kind = draw(st.sampled_from(Kind))
    reference = draw(st.sampled_from([0, 1, 2**64 - 1]))
    raw = draw(st.binary(min_size=1, max_size=40))
    return Message(
        kind,
        draw(st.integers(0, 2)),
        draw(numbers),
        reference,
        draw(numbers),
        draw(st.booleans()),
        arrays(kind, reference, raw),
    )


@given(messages())
def test_what_is_written_is_read_bit_for_bit(message):
    data = encode(message, LAYOUT)
    assert len(data) <= LAYOUT.largest
    found = decode(data, LAYOUT)
    assert found[:-1] == message[:-1]
    for ours, theirs in zip(found.arrays, message.arrays, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.tobytes() == theirs.tobytes()


@given(st.binary(max_size=200))
def test_noise_is_refused(data):
    with pytest.raises(Refused):
        decode(data, LAYOUT)


@given(messages(), st.data())
def test_what_is_altered_is_refused_or_is_another_valid_message(message, data):
    """Nothing but Refused is ever raised, and what passes is what encode writes."""
    sent = bytearray(encode(message, LAYOUT))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(sent) - 1))
        sent[place] = data.draw(st.integers(0, 255))
    try:
        found = decode(bytes(sent), LAYOUT)
    except Refused:
        return
    assert encode(found, LAYOUT) == sent


@given(messages(), st.integers(-60, 60).filter(bool))
def test_another_length_is_refused(message, change):
    data = encode(message, LAYOUT)
    changed = data + bytes(change) if change > 0 else data[:change]
    with pytest.raises(Refused):
        decode(changed, LAYOUT)


@pytest.mark.parametrize(
    "other",
    [
        LAYOUT._replace(workers=4),
        LAYOUT._replace(facts=b"sign"),
        LAYOUT._replace(full=(LIKE((5,), jnp.int32), LIKE((0,), jnp.float32))),
        LAYOUT._replace(full=(LIKE((5, 1), jnp.float32), LIKE((0,), jnp.float32))),
    ],
)
def test_another_model_is_refused_by_its_fingerprint(other):
    with pytest.raises(Refused, match="another model, compressor, number"):
        decode(encode(Message(Kind.PING, 0, 1), other), LAYOUT)


@pytest.mark.parametrize(
    ("place", "value", "why"),
    [
        (0, b"GET ", "no message of this protocol"),
        (20, b"\x00", "unknown kind"),
        (20, b"\x63", "unknown kind"),
        (21, b"\x02", "out of range"),
        (22, b"\x03\x00", "out of range"),
    ],
)
def test_each_field_of_the_header_is_checked(place, value, why):
    data = bytearray(encode(Message(Kind.PING, 1, 7), LAYOUT))
    assert len(data) == HEADER
    data[place : place + len(value)] = value
    with pytest.raises(Refused, match=why):
        decode(bytes(data), LAYOUT)


def test_a_message_with_other_arrays_is_not_written():
    wrong = (np.zeros(5, np.float64), np.zeros(0, np.float32))
    with pytest.raises(ValueError, match=r"messages\.encode: STATE carries"):
        encode(Message(Kind.STATE, 0, 1, arrays=wrong), LAYOUT)


def test_facts_differ_wherever_they_do_and_in_no_order():
    long = "x" * 5000
    facts = {"model": long, "rate": "0.1", "größe": "½"}
    written = write_facts(facts)
    np.testing.assert_array_equal(written, write_facts(dict(reversed(facts.items()))))
    again = read_facts(written)
    assert (again["rate"], again["größe"]) == ("0.1", "½")
    other = read_facts(write_facts({**facts, "model": long + "y"}))
    assert other["model"] != again["model"]
    assert {k: v for k, v in other.items() if k != "model"} == {
        k: v for k, v in again.items() if k != "model"
    }
    with pytest.raises(ValueError, match="at most 8,192 bytes as JSON, got"):
        write_facts({str(k): "x" for k in range(1000)})
    for raw in (b"[]", b"{", b"\xff"):
        with pytest.raises(Refused, match="no facts"):
            read_facts(np.frombuffer(raw.ljust(8192), np.uint8))
