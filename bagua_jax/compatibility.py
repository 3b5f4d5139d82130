r"""Which compressors an algorithm can bear: one rule, read off their facts.

A compressor's relative error at d elements is a number e with
:math:`E\|C(x) - x\|^2 \le e \|x\|^2`: omega(d) of an unbiased one, 1 - delta(d) of a
biased one, or that of the largest elements, squared, where it is less. What an
algorithm does with the error decides how large e may be:

- it goes into a fresh estimate and is gone: unbiased errors average out, biased ones
  are lost for good;
- it is added to what is compressed next (error feedback, difference coding): the next
  error is up to e times the last one, so that e must be below 1, a *contraction*;
- it enters the momentum or the model, of which the next message is made.

An unbiased compressor's variance is of the order of its bound on ordinary vectors: it
is judged at the length of every vector that is compressed, and refused where it grows
without end. A biased compressor's bound belongs to its worst vector, which may never
come: it is judged once, at 65,536 elements, and mostly warned of.

A constant that the facts do not state counts as one beyond the limit. A constant that
is traced passes unread.

A cast to 8 bits has no scale. Let s be its smallest value: an entry g below s/2 becomes
zero. Fed back, it waits in the error until that has grown to s/2, and is sent as s. So
the error stays within s/2 and no mass is lost; but the iterate is off by up to
rate * s/2 on every entry and moves by rate * s at once, absolute numbers that do not
shrink with the gradient. And an error beyond the largest value is never finite again.
Without feedback such a code is warned of; with it, it is refused.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp

from bagua_jax import warning
from bagua_jax.compressors import Compressor

__all__ = [
    "CARRIED",
    "FED_BACK",
    "FRESH",
    "LEARNED",
    "REPLICATED",
    "WEIGHED",
    "Limit",
    "Needs",
    "Verdict",
    "has_no_scale",
    "is_stateful",
    "judge",
    "relative_error",
    "require_compressor",
]

_TYPICAL = 2**16  # elements of a vector, where its length is not known yet
_WIDE_ENOUGH = 2.0**32  # largest to smallest: between float8_e5m2 and float16
_LENGTHS = (2, 64, _TYPICAL)  # what is refused at all of them is refused at once


class Limit(NamedTuple):
    """How large a relative error may be, and what happens beyond it."""

    error: float = math.inf  # the relative error must be below it
    beyond: Literal["refused", "warned"] = "refused"


class Needs(NamedTuple):
    """What an algorithm's theory asks of its compressor.

    Attributes:
        because: what becomes of the compression error, a clause.
        cure: what to use instead, sentences.
        unbiased: limit of the relative error omega of unbiased compressors.
        biased: limit of the relative error 1 - delta of biased ones; ``None`` where
            every bias is forbidden.
        without_scale: what happens to a code without a scale.
    """

    because: str
    cure: str
    unbiased: Limit
    biased: Limit | None
    without_scale: Literal["refused", "warned"] = "warned"


_LESS = (
    "Use more levels or smaller blocks, an unscaled relative such as "
    "randk(ratio, scaled=False), or a contraction such as topk or sign('l1')."
)
FED_BACK = Needs(
    "its error is added to what is compressed next",
    _LESS,
    unbiased=Limit(1.0),
    biased=Limit(1.0, "warned"),
    without_scale="refused",
)
"""Error feedback and difference coding: a contraction."""

LEARNED = Needs(
    "its noise averages out and a bias would stay in the estimate",
    "Use ef21 for gradients, or an unbiased compressor such as qsgd or randk.",
    unbiased=Limit(),
    biased=None,
)
"""Shifts that learn what is compressed: unbiased."""

WEIGHED = Needs(
    "estimates average noise out and would keep a bias, and messages grow with time",
    "Use choco_sgd for it, or more levels.",
    unbiased=Limit(0.5, "warned"),
    biased=None,
)
"""Extrapolated messages: unbiased, and of small relative error."""

REPLICATED = Needs(
    "its error drives the replicas apart, up to what the graph bears",
    "Use choco_sgd, which bears every contraction, or more levels.",
    # Just 1 passes: a ring bears 4/3, other graphs 3/4 to 2 (dcd_largest_variance).
    unbiased=Limit(math.nextafter(1.0, 2.0), "warned"),
    biased=Limit(1.0, "warned"),
)
"""Differences against replicas without a consensus step: about a contraction."""

CARRIED = Needs(
    "its error stays in what is compressed next",
    "Use more levels or smaller blocks, or an algorithm or an argument that corrects "
    "errors.",
    unbiased=Limit(0.5, "warned"),
    biased=Limit(0.5, "warned"),
)
"""The momentum or the model itself is replaced by what was sent: a small error."""

FRESH = Needs(
    "without error feedback what it drops is lost for good, and training stalls or "
    "diverges on simple problems",
    "Use error_feedback='worker'.",
    unbiased=Limit(),
    biased=Limit(0.5),
)
"""Fresh gradients without correction: unbiased, or of small error."""


class Verdict(NamedTuple):
    """What the rule says of a compressor at a length."""

    kind: Literal["works", "warned", "refused"]
    reason: str = ""
    cure: str = ""  # that of the algorithm, where empty


def relative_error(compressor: Compressor, d: int) -> float | None:
    r"""Bound :math:`E\|C(x) - x\|^2 / \|x\|^2` for vectors of d elements.

    In the Euclidean or the maximum norm, whichever is less: what contracts in one norm
    may be fed back.

    Args:
        compressor: any.
        d: elements, at least 1.

    Returns:
        omega(d) or 1 - delta(d), or max_error squared; ``None`` if the facts state none
        of them; a tracer where they do.

    Example:
        >>> from bagua_jax.compressors import randk, topk
        >>> relative_error(randk(0.25), 100), relative_error(topk(0.25), 100)
        (3.0, 0.75)
    """
    facts, error = compressor.facts, None
    if facts.unbiased and facts.omega is not None:
        error = facts.omega(d)
    elif facts.delta is not None:
        error = 1 - facts.delta(d)
    if facts.max_error is None:
        return error
    return facts.max_error**2 if error is None else min(error, facts.max_error**2)


def has_no_scale(compressor: Compressor) -> bool:
    """Tell whether magnitudes may well lie outside what the code can hold.

    Example:
        >>> from bagua_jax.compressors import cast
        >>> has_no_scale(cast("float8_e5m2")), has_no_scale(cast("float16"))
        (True, False)
    """
    held = compressor.facts.range
    return held is not None and held[1] / held[0] < _WIDE_ENOUGH


def is_stateful(compressor: Compressor) -> bool:
    """Tell whether a compressor keeps state of a vector between steps."""
    like = jax.ShapeDtypeStruct((_TYPICAL,), jnp.float32)
    return bool(jax.tree.leaves(jax.eval_shape(compressor.init, like)))


def judge(compressor: Compressor, needs: Needs, d: int) -> Verdict:
    """Apply the rule to a compressor and vectors of d elements.

    Args:
        compressor: any.
        needs: of the algorithm.
        d: elements, at least 1.

    Returns:
        The verdict; with a clause of rule and value where it is not "works".

    Example:
        >>> from bagua_jax.compressors import randk
        >>> judge(randk(0.1, scaled=False), FED_BACK, 1000).kind
        'works'
        >>> judge(randk(0.1), FED_BACK, 1000).reason[-22:]
        'is 9 (omega at d=1000)'
    """
    verdict = _judge_error(compressor, needs, d)
    if verdict.kind == "refused" or not has_no_scale(compressor):
        return verdict
    smallest, largest = compressor.facts.range or (0.0, math.inf)
    lost = "zero" if needs.without_scale == "warned" else f"jumps of {smallest:.2g}"
    return Verdict(
        needs.without_scale,
        f"the code needs a scale, and {compressor.facts.name} has none: values below "
        f"{smallest / 2:.2g} become {lost}, and those beyond {largest:g} are no longer "
        "finite",
        "Use blockwise(8, 256), whose blocks have a scale.",
    )


def _judge_error(compressor: Compressor, needs: Needs, d: int) -> Verdict:
    facts = compressor.facts
    if not facts.unbiased and needs.biased is None:
        reason = f"the compressor must be unbiased, and {facts.name} is not"
        return Verdict("refused", reason)
    limit = needs.unbiased if facts.unbiased or needs.biased is None else needs.biased
    error = relative_error(compressor, d)
    if math.isinf(limit.error) or isinstance(error, jax.core.Tracer):
        return Verdict("works")
    if error is not None and error < limit.error:
        return Verdict("works")
    constant = "omega" if facts.unbiased else "delta"
    rule = f"the compressor's relative error must be below {limit.error:g}"
    if error is None:
        reason = f"{rule}, and the facts of {facts.name} state no {constant}"
    else:
        value = f"{error:.3g} ({'omega' if facts.unbiased else '1 - delta'} at d={d})"
        reason = f"{rule}, and that of {facts.name} is {value}"
    return Verdict(limit.beyond, reason)


def require_compressor(
    caller: str,
    compressor: Compressor,
    needs: Needs,
    *,
    stateful: bool = False,
    cure: str | None = None,
    published: str = "",
    unsafe: bool = False,
) -> Callable[[int], None]:
    """Refuse or warn of a compressor that an algorithm cannot bear.

    Called where the algorithm is made, before the length of vectors is known: what no
    length changes is refused at once. What is returned is called where vectors are
    compressed.

    Args:
        caller: the algorithm, for messages.
        compressor: what it was given.
        needs: of the algorithm.
        stateful: whether the algorithm keeps a compressor's state.
        cure: what to use instead, where it is not that of ``needs``.
        published: the name of a compressor of which nothing is said: the method's own,
            which its paper analyses by other means.
        unsafe: say nothing, for experiments that show what goes wrong.

    Returns:
        A function of a vector's length that refuses what that length forbids.

    Raises:
        ValueError: if it is no compressor, keeps state that would be lost, or is
            refused whatever the length.

    Warns:
        UserWarning: once, where theory gives no guarantee for vectors of 65,536.

    Example:
        >>> from bagua_jax.compressors import qsgd
        >>> check = require_compressor("choco_sgd", qsgd(8), FED_BACK, cure="Use sign.")
        >>> check(64)
        >>> check(2**16)
        Traceback (most recent call last):
        ...
        ValueError: choco_sgd: the compressor's relative error must be below 1, and \
that of qsgd(levels=8, norm=l2, bucket=None) is 31 (omega at d=65536): its error is \
added to what is compressed next. Use sign.
    """
    if not isinstance(compressor, Compressor):
        raise ValueError(
            f"{caller}: compressor must be a Compressor, got {compressor!r}. Call its "
            "factory, as in compressors.topk(0.01)."
        )
    name, cure = compressor.facts.name, needs.cure if cure is None else cure
    if not stateful and is_stateful(compressor):
        raise ValueError(
            f"{caller}: the compressor must be stateless, and {name} keeps state "
            f"between steps, which {caller} would lose. Use compressed_mean for it, or "
            "another compressor."
        )

    def text_of(verdict: Verdict) -> str:
        return f"{caller}: {verdict.reason}: {needs.because}. {verdict.cure or cure}"

    def refuse_at(d: int) -> None:
        verdict = judge(compressor, needs, max(d, 1))
        if verdict.kind == "refused":
            raise ValueError(text_of(verdict))

    if unsafe or name == published:
        return lambda d: None
    unbiased = compressor.facts.unbiased
    lengths = _LENGTHS if unbiased else (_TYPICAL,)
    verdicts = [judge(compressor, needs, d) for d in lengths]
    if all(verdict.kind == "refused" for verdict in verdicts):
        refuse_at(_TYPICAL)
    if verdicts[-1].kind == "warned":
        warning.warn(text_of(verdicts[-1]))
    return refuse_at if unbiased else lambda d: None
