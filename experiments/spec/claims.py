"""Claims: comparisons between finished runs that a config makes and a run checks.

A claim is one line of numbers, names, ``+ - * /``, ``min max abs log`` and
comparisons, which may be chained::

    claims:
      - choco.eval/distance_to_optimum < 1e-3 * naive.eval/distance_to_optimum
      - naive.diverged

A name is LABEL.METRIC, with @STEP behind it for the value on that step. It holds no
blank, so that - and / are arithmetic only between blanks. METRIC is one of a run's
summary (``wire/bytes_per_worker`` for what stands there under ``wire``), or, with a
step, of its metrics. Seconds are no metric: they are the machine's.
"""

import ast
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from bagua_jax.experiments.spec.config import (
    ConfigError,
    ExperimentConfig,
    quote,
    unknown,
)

__all__ = ["Claim", "Name", "Verdict", "check", "check_metrics", "judge", "parse"]

_NAME = re.compile(r"(\w[\w.+-]*)\.([a-z]\w*(?:/\w+)*)(?:@(\d+))?")
_ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_COMPARISONS = {
    ast.Lt: ("<", operator.lt),
    ast.LtE: ("<=", operator.le),
    ast.Gt: (">", operator.gt),
    ast.GtE: (">=", operator.ge),
    ast.Eq: ("==", operator.eq),
}
_FUNCTIONS = {  # and how many arguments they take
    "min": (min, range(2, 100)),
    "max": (max, range(2, 100)),
    "abs": (abs, range(1, 2)),
    "log": (math.log, range(1, 2)),
}
_LONGEST = 1_000  # characters of a claim
_MOST_PARTS = 200  # nodes of its syntax tree
_LARGEST = 1e300
_FLAGS = ("diverged",)  # true or false, not a number
_OF_DIVERGED = (*_FLAGS, "steps")  # what a diverged run can be asked


class Name(NamedTuple):
    """What a claim reads: a metric of a run, at its end or on a step."""

    label: str
    metric: str
    step: int | None


_Read = Callable[[Name], Any]


class Claim(NamedTuple):
    """A line of a config, ready to be judged.

    Attributes:
        text: the line.
        names: what it reads.
        test: given how to read names: what was measured, in words, and whether the
            claim holds.
    """

    text: str
    names: tuple[Name, ...]
    test: Callable[[_Read], tuple[str, bool]]

    @property
    def labels(self) -> set[str]:
        """The runs that it is about."""
        return {name.label for name in self.names}


class Verdict(NamedTuple):
    """What became of a claim."""

    claim: str
    measured: str
    holds: bool


class _Missing(Exception):
    """A name that has no value in these runs; the message says why."""


# --- reading ---


def parse(text: str) -> Claim:
    """Read a claim.

    Args:
        text: one line.

    Raises:
        ConfigError: if it says something else than a claim can.

    Example:
        >>> claim = parse("sign.eval/loss@100 > 2 * topk.steps")
        >>> claim.names[0]
        Name(label='sign', metric='eval/loss', step=100)
        >>> claim.test(lambda name: 20.0 if name.step else 4)
        ('20 > 8', True)
    """
    if len(text) > _LONGEST:
        raise _refusal(text, f"it is longer than {_LONGEST} characters")
    try:
        tree = ast.parse(_quoted(text), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _refusal(text, "it is no expression") from None
    nodes = list(ast.walk(tree))
    if len(nodes) > _MOST_PARTS:  # which bounds its depth, too
        raise _refusal(text, f"it has more than {_MOST_PARTS} parts")
    return Claim(text, tuple(filter(None, map(_name, nodes))), _test(tree, text))


def _quoted(text: str) -> str:
    """Put quotes around names: in the tree a name is a text, and nothing else is."""
    return _NAME.sub(r"'\g<0>'", text.strip())


def _refusal(text: str, why: str) -> ConfigError:
    return ConfigError(
        f"claims: {quote(text)}: {why}. A claim compares numbers and LABEL.METRIC with "
        "+ - * / between blanks, min, max, abs and log, or is LABEL.diverged or not "
        "LABEL.diverged."
    )


def _name(node: ast.AST) -> Name | None:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        return None
    found = _NAME.fullmatch(node.value)
    return found and Name(found[1], found[2], int(found[3]) if found[3] else None)


def _test(tree: ast.expr, text: str) -> Callable[[_Read], tuple[str, bool]]:
    """Make the test of a whole claim."""
    match tree:
        case ast.Compare(left=left, ops=ops, comparators=rest):
            return _comparison([left, *rest], ops, text)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            flag, wanted = _name(operand), False
        case _:
            flag, wanted = _name(tree), True
    if flag is None or flag.metric not in _FLAGS:
        raise _refusal(text, "it compares nothing")

    def truth(read: _Read) -> tuple[str, bool]:
        value = bool(read(flag))
        return f"{flag.label} {'' if value else 'not '}{flag.metric}", value == wanted

    return truth


def _comparison(
    sides: list[ast.expr], ops: list[ast.cmpop], text: str
) -> Callable[[_Read], tuple[str, bool]]:
    for op in ops:
        if type(op) not in _COMPARISONS:
            raise _refusal(text, "comparisons are < <= > >= ==")
    signs, holds = zip(*(_COMPARISONS[type(op)] for op in ops), strict=True)
    numbers = [_number(side, text) for side in sides]

    def comparison(read: _Read) -> tuple[str, bool]:
        values = [number(read) for number in numbers]
        links = list(zip(signs, holds, values, values[1:], strict=False))
        words = "".join(f" {sign} {right:.4g}" for sign, _, _, right in links)
        return f"{values[0]:.4g}{words}", all(ok(a, b) for _, ok, a, b in links)

    return comparison


def _number(node: ast.expr, text: str) -> Callable[[_Read], float]:
    """Make the function that computes a part of a comparison."""
    name = _name(node)
    if name is not None:
        if name.metric in _FLAGS:
            raise _refusal(text, f"{name.metric} is true or false, not a number")
        return lambda read: float(read(name))
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(
            number, bool
        ):
            if not abs(number) <= _LARGEST:
                raise _refusal(text, f"{quote(number)} is too large a number")
            return lambda read: number
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inner = _number(operand, text)
            return lambda read: -inner(read)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            compute = _ARITHMETIC[type(op)]
            a, b = _number(left, text), _number(right, text)
            return lambda read: compute(a(read), b(read))
        case ast.Call(func=ast.Name(id=known), args=args, keywords=[]) if (
            known in _FUNCTIONS and len(args) in _FUNCTIONS[known][1]
        ):
            function, values = _FUNCTIONS[known][0], [_number(a, text) for a in args]
            return lambda read: function(*(value(read) for value in values))
    part = ast.get_source_segment(_quoted(text), node)
    raise _refusal(text, f"{quote(part)} cannot stand in it")


# --- checking before the runs ---


def check(claims: Iterable[Claim], config: ExperimentConfig) -> None:
    """Refuse claims about runs that the config does not list, and about time.

    Raises:
        ConfigError: naming the nearest valid label.
    """
    labels = [algorithm.label for algorithm in config.algorithms]
    for claim in claims:
        for name in claim.names:
            if name.label not in labels:
                raise unknown(
                    f"claims: {quote(claim.text)}", name.label, labels, "label"
                )
            if name.metric.startswith("time"):
                raise _refusal(claim.text, "time is the machine's, not an algorithm's")


def check_metrics(
    claims: Iterable[Claim], run: ExperimentConfig, known: Mapping[bool, Sequence[str]]
) -> None:
    """Refuse claims about what a run does not measure.

    Args:
        claims: of the experiment.
        run: one run.
        known: its metrics: under ``False`` at its end, under ``True`` on a step.

    Raises:
        ConfigError: naming the nearest valid metric, or the steps that have it.
    """
    for claim in claims:
        for label, metric, step in claim.names:
            if label != run.algorithms[0].label:
                continue
            where, valid = f"claims: {quote(claim.text)}", known[step is not None]
            if metric not in valid:
                raise unknown(where, metric, valid, f"metric of {label}")
            if step is None:
                continue
            if metric.startswith("train/"):
                is_measured = 0 < step <= run.steps
            else:
                is_judged = step % run.eval_every == 0 or step == run.steps
                is_measured = is_judged and step <= run.steps
            if not is_measured:
                raise ConfigError(
                    f"{where}: {metric} of {label} is not measured on step {step} of "
                    f"{run.steps}: the loss is on every step from 1, the evaluation on "
                    f"every {run.eval_every}th."
                )


# --- judging after them ---


def judge(
    claims: Iterable[Claim],
    summaries: Mapping[str, Mapping[str, Any]],
    metrics: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[Verdict]:
    """Judge claims by what the runs measured.

    Args:
        claims: checked.
        summaries: of the runs that finished, by label.
        metrics: their lines, one for each step from 0.

    Returns:
        A verdict on each. A claim whose numbers are not there, because a run failed or
        diverged, does not hold.
    """

    def read(name: Name) -> Any:
        label, metric, step = name
        if label not in summaries:
            raise _Missing(f"{label} failed")
        summary = summaries[label]
        if step is not None:
            lines = metrics[label]
            if step >= len(lines) or metric not in lines[step]:
                raise _Missing(f"{label} diverged before step {step}")
            return lines[step][metric]
        if metric.startswith("wire/"):
            if summary["wire"] is None:
                raise _Missing(f"bytes of {label} were not counted")
            summary, metric = summary["wire"], metric.removeprefix("wire/")
        if summary.get("diverged") and metric not in _OF_DIVERGED:
            raise _Missing(f"{label} diverged")
        if metric not in summary:  # of a run that was not asked before
            raise _Missing(f"{label} has no {metric}")
        return summary[metric]

    verdicts = []
    for claim in claims:
        try:
            verdicts.append(Verdict(claim.text, *claim.test(read)))
        except _Missing as missing:
            verdicts.append(Verdict(claim.text, str(missing), False))
        except (ArithmeticError, ValueError) as error:  # 1/0, log(-1)
            verdicts.append(Verdict(claim.text, f"undefined: {error}", False))
    return verdicts
