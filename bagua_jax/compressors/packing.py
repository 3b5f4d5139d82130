"""Small codes in few bytes, and indices in the narrowest integer."""

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["index_dtype", "pack", "packed_bytes", "unpack"]


def index_dtype(count: int) -> np.dtype:
    """Return the narrowest unsigned integer that holds 0 .. count - 1.

    Example:
        >>> [str(index_dtype(n)) for n in (1, 256, 257, 65536, 65537)]
        ['uint8', 'uint8', 'uint16', 'uint16', 'uint32']
    """
    return np.min_scalar_type(max(count, 1) - 1)


def _per_byte(radix: int) -> int:
    """Count the digits of a radix that a byte holds."""
    digits = 1
    while radix ** (digits + 1) <= 256:
        digits += 1
    return digits


def _radices(alphabet: int) -> tuple[int, ...]:
    """Choose the digits that codes are cut into, so that bytes are well filled.

    Either fields of 8, 4, 2 and 1 bits, which fill bytes evenly, or the code itself as
    one digit: five of radix 3 fit a byte.
    """
    bits = max(1, (alphabet - 1).bit_length())
    fields = tuple(1 << width for width in (8, 4, 2, 1) if bits & width)
    return min(
        (fields, (alphabet,)),
        key=lambda radices: sum(1 / _per_byte(r) for r in radices),
    )


def packed_bytes(alphabet: int, count: int) -> int:
    """Count the bytes that :func:`pack` makes of ``count`` codes."""
    if alphabet > 256:
        return 2 * count
    return sum(-(-count // _per_byte(radix)) for radix in _radices(alphabet))


def pack(codes: jax.Array, alphabet: int) -> jax.Array:
    """Pack codes into bytes.

    A code is cut into fields of 4, 2 and 1 bits (7 bits: all three), and each field of
    all codes is packed by itself, two, four or eight a byte. Alphabets of 3, 5 and 6,
    for which that wastes more, are packed as digits of that radix: five, three and
    three a byte. Byte i of a field holds the elements i, i + b, i + 2b, ... of b bytes.

    Args:
        codes: [d] unsigned, each below ``alphabet``.
        alphabet: 2 .. 65536, static.

    Returns:
        [``packed_bytes(alphabet, d)``] uint8; above 256 the codes as [d] uint16.

    Example:
        >>> codes = jnp.array([1, 0, 1, 1, 0, 0, 1, 0, 1], jnp.uint8)
        >>> pack(codes, 2).tolist()
        [27, 2]
    """
    if alphabet > 256:
        return codes.astype(jnp.uint16)
    codes = codes.astype(jnp.uint8)
    fields = []
    for radix in _radices(alphabet):
        per_byte = _per_byte(radix)
        if radix == 256:
            fields.append(codes)
            continue
        digits, codes = codes % np.uint8(radix), codes // np.uint8(radix)
        digits = jnp.pad(digits, (0, -len(digits) % per_byte)).reshape(per_byte, -1)
        weights = np.array([radix**i for i in range(per_byte)], np.uint8)[:, None]
        fields.append(jnp.sum(digits * weights, axis=0, dtype=jnp.uint8))
    return jnp.concatenate(fields)


def unpack(packed: jax.Array, alphabet: int, count: int) -> jax.Array:
    """Invert :func:`pack`.

    Args:
        packed: what ``pack`` gave.
        alphabet: that of ``pack``.
        count: d, the number of codes.

    Returns:
        [d] uint8; uint16 for alphabets above 256.

    Example:
        >>> codes = jnp.array([2, 0, 1, 1, 2, 0], jnp.uint8)
        >>> unpack(pack(codes, 3), 3, 6).tolist()
        [2, 0, 1, 1, 2, 0]
    """
    if alphabet > 256:
        return packed
    codes, start, place = jnp.zeros((count,), jnp.uint8), 0, 1
    for radix in _radices(alphabet):
        per_byte = _per_byte(radix)
        size = -(-count // per_byte)
        field, start = packed[start : start + size], start + size
        if radix == 256:
            return field
        weights = np.array([radix**i for i in range(per_byte)], np.uint8)[:, None]
        digits = field[None] // weights % np.uint8(radix)
        codes = codes + digits.reshape(-1)[:count] * np.uint8(place)
        place *= radix
    return codes
