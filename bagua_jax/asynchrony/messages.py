"""What workers of pair gossip say to one another: a fixed header and raw arrays.

Nothing is unpickled and nothing in a message says how long or of which type it is: both
sides know that from the model, and a message that is not exactly what its kind must be
is refused. What else both must agree on is told in words to one that does not.
"""

import enum
import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

__all__ = [
    "Different",
    "Kind",
    "Layout",
    "Message",
    "Refused",
    "decode",
    "encode",
    "read_facts",
    "write_facts",
]

_HEADER = struct.Struct("<4s16sBBHQQQ")
_MAGIC = b"BJX3"
_FACTS = jax.ShapeDtypeStruct((8192,), np.uint8)
_LONGEST = 120  # characters of a value among the facts


class Refused(ValueError):
    """A message that is not what it must be."""


class Different(Refused):
    """A message of a worker with another model, or other facts."""


class Kind(enum.IntEnum):
    """What a message is for; the reply to each question in its line."""

    PING = 1  # -> PONG: how far are you?
    PONG = 2
    PULL = 3  # -> STATE: give me your parameters
    STATE = 4
    ASK = 5  # -> GRANT, and at once OFFER with a payload; or BUSY: an exchange?
    GRANT = 6
    OFFER = 7
    BUSY = 8
    GIVE = 9  # with a payload, while the offer is under way; no reply
    COMMIT = 10  # the offer is here -> DONE: both apply; EXPIRED: neither ever will
    DONE = 11
    EXPIRED = 12
    FACTS = 13  # in reply to a worker that differs: what is the case here


class Message(NamedTuple):
    """One message.

    Attributes:
        kind: what it is for.
        worker: who sent it.
        exchange: the number of the question, which the reply repeats.
        reference: the exchange after which both sides last held the same reference, to
            which payloads are differences; 0 for full precision.
        steps: local steps that the sender has taken.
        finished: whether the sender will ask for no more exchanges.
        arrays: the payload's leaves, or the parameters as flat vectors.
    """

    kind: Kind
    worker: int
    exchange: int
    reference: int = 0
    steps: int = 0
    finished: bool = False
    arrays: tuple[np.ndarray, ...] = ()


class Layout(NamedTuple):
    """What arrays a message may carry: shapes and dtypes, known on both sides.

    Attributes:
        full: of the parameters as flat vectors.
        compressed: of a payload; as ``full`` where there is no compressor.
        workers: how many there are.
        facts: what else must agree, such as the compressor's name; see
            :func:`write_facts`.
    """

    full: tuple[jax.ShapeDtypeStruct, ...]
    compressed: tuple[jax.ShapeDtypeStruct, ...]
    workers: int
    facts: bytes = b""

    @property
    def fingerprint(self) -> bytes:
        """16 bytes that differ where layouts do."""
        parts = [
            [(tuple(x.shape), np.dtype(x.dtype).name) for x in arrays]
            for arrays in (self.full, self.compressed)
        ]
        text = repr((parts, self.workers, self.facts))
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    @property
    def largest(self) -> int:
        """Bytes of the largest message."""
        payloads = self.full, self.compressed, (_FACTS,)
        return _HEADER.size + max(map(_nbytes, payloads))

    def carried(self, kind: Kind, reference: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Say what a message of a kind carries."""
        if kind is Kind.STATE:
            return self.full
        if kind in (Kind.OFFER, Kind.GIVE):
            return self.compressed if reference else self.full
        return (_FACTS,) if kind is Kind.FACTS else ()


def _nbytes(arrays: Sequence[jax.ShapeDtypeStruct]) -> int:
    return sum(x.size * np.dtype(x.dtype).itemsize for x in arrays)


def encode(message: Message, layout: Layout) -> bytes:
    """Write a message.

    Raises:
        ValueError: if its arrays are not those of the layout.
    """
    expected = layout.carried(message.kind, message.reference)
    found = [(x.shape, x.dtype) for x in message.arrays]
    if found != [(tuple(x.shape), np.dtype(x.dtype)) for x in expected]:
        raise ValueError(
            f"messages.encode: {message.kind.name} carries {expected}; got {found}."
        )
    header = _HEADER.pack(
        _MAGIC,
        layout.fingerprint,
        message.kind,
        message.finished,
        message.worker,
        message.exchange,
        message.reference,
        message.steps,
    )
    return b"".join([header, *(_plain(x).data for x in message.arrays)])


def _plain(x: np.ndarray) -> np.ndarray:
    """View as bytes: the buffer protocol does not know bfloat16."""
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)


def decode(data: Any, layout: Layout) -> Message:
    """Read a message; the arrays are views of its bytes.

    Args:
        data: what arrived, a bytes-like object.
        layout: what may arrive.

    Raises:
        Refused: naming what is wrong, if it is anything else than a message that
            :func:`encode` writes with this layout, or its facts, with any.
    """
    if len(data) < _HEADER.size:
        raise Refused("shorter than a header")
    magic, fingerprint, kind, finished, worker, *numbers = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise Refused("no message of this protocol")
    if fingerprint != layout.fingerprint and kind != Kind.FACTS:
        raise Different("another model, compressor, number of workers or other facts")
    try:
        kind = Kind(kind)
    except ValueError:
        raise Refused("unknown kind") from None
    if worker >= layout.workers or finished > 1:
        raise Refused("a field of the header is out of range")
    exchange, reference, steps = numbers
    expected = layout.carried(kind, reference)
    if len(data) != _HEADER.size + _nbytes(expected):
        raise Refused("another size than its kind has")
    arrays, start = [], _HEADER.size
    for like in expected:
        dtype = np.dtype(like.dtype)
        array = np.frombuffer(data, dtype, like.size, start).reshape(like.shape)
        arrays.append(array)
        start += array.nbytes
    return Message(
        kind, worker, exchange, reference, steps, bool(finished), tuple(arrays)
    )


def write_facts(facts: Mapping[str, str]) -> np.ndarray:
    """Write facts as the array of a message, in JSON.

    Of a long value the beginning is written and a digest, which differs where it does.

    Raises:
        ValueError: if they take more than the bytes of the array.

    Example:
        >>> read_facts(write_facts({"version of jax": "0.10.2"}))
        {'version of jax': '0.10.2'}
    """
    short = {name: _shortened(value) for name, value in facts.items()}
    text = json.dumps(short, sort_keys=True)
    if len(text) > _FACTS.size:
        raise ValueError(
            f"PairGossip: facts must take at most {_FACTS.size:,} bytes as JSON, got "
            f"{len(text):,}. Give a digest of what is long."
        )
    return np.frombuffer(text.encode().ljust(_FACTS.size), np.uint8)


def _shortened(value: str) -> str:
    if len(value) <= _LONGEST:
        return value
    digest = hashlib.blake2b(value.encode(), digest_size=4).hexdigest()
    return f"{value[:_LONGEST]}... (digest {digest})"


def read_facts(array: np.ndarray) -> dict[str, str]:
    """Read facts.

    Raises:
        Refused: if there are none in the array.
    """
    try:
        found = json.loads(array.tobytes())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise Refused("no facts")
    return {str(name): str(value) for name, value in found.items()}
