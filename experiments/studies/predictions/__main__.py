"""``python -m bagua_jax.experiments.studies.predictions``: check and write all rows."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from bagua_jax.experiments.studies.predictions import ROWS, SIGMAS, Verdict, check

__all__ = ["main", "report"]

_COMMAND = "python -m bagua_jax.experiments.studies.predictions"


def _number(x: float) -> str:
    return f"{x:.6g}"


def _cells(verdict: Verdict) -> list[str]:
    """Write a verdict: of several numbers the one that is farthest off."""
    seconds = f"{verdict.seconds:.1f}"
    row, mark = verdict.row, "yes" if verdict.agrees else "**no**"
    if row.rule.kind == "sides":
        below, above = verdict.measured
        margin = np.abs(verdict.measured - 1).min()
        error = verdict.error.max()
        sides = f"{_number(below)} below, {_number(above)} above"
        how = f"{_number(margin)} from 1" + (f" ± {error:.1e}" if error else "")
        return [
            row.name,
            row.claim,
            _number(float(verdict.predicted)),
            sides,
            how,
            seconds,
            mark,
        ]
    k = verdict.worst
    predicted = np.broadcast_to(verdict.predicted, verdict.measured.shape).ravel()[k]
    measured, error = verdict.measured.ravel()[k], verdict.error.ravel()[k]
    off = measured - predicted
    sign = "≤ " if row.rule.kind == "at most" else ""
    how = f"{off:+.1e} of {verdict.tolerance.ravel()[k]:.1e}"
    return [
        row.name,
        row.claim,
        sign + _number(predicted),
        _number(measured) + (f" ± {error:.1e}" if error else ""),
        how,
        seconds,
        mark,
    ]


SECTIONS = {
    "A": "Compressors",
    "B": "Mixing",
    "C.1": "Exact values on quadratics",
    "C.2": "Counterexamples",
    "C.3": "Identities",
}


def report(verdicts: Sequence[Verdict], effort: int) -> str:
    """Write the table as Markdown.

    Args:
        verdicts: of the rows.
        effort: that they were measured with.
    """
    agree = sum(v.agrees for v in verdicts)
    lines = [
        "# Predictions and measurements",
        "",
        f"*Written by `{_COMMAND} --out FILE`; do not edit it.*",
        "",
        f"{agree} of {len(verdicts)} rows agree (effort {effort}; jax "
        f"{jax.__version__}, {jax.default_backend()}; "
        f"{sum(v.seconds for v in verdicts):.0f} s of processor time).",
        "",
        "Every prediction is computed by `bagua_jax.theory`, every measurement is made",
        "with the algorithms of this package on simulated workers. ± is the standard",
        f"error over replicas; the tolerance is {SIGMAS:g} of them, and rounding of",
        "float32. Of rows with several numbers the one that is farthest off is shown.",
        "*s* is processor time; rows that share a program show it at the first.",
    ]
    for section, title in SECTIONS.items():
        chosen = [v for v in verdicts if v.row.section == section]
        if not chosen:
            continue
        lines += ["", f"## {section} {title}", ""]
        lines.append("| row | claim | predicted | measured | off | s | agrees |")
        lines.append("|---|---|---|---|---|---|---|")
        for verdict in chosen:
            cells = [cell.replace("|", "\\|") for cell in _cells(verdict)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 1 where a row does not agree."""
    parser = argparse.ArgumentParser(prog=_COMMAND, description=__doc__)
    parser.add_argument("--out", type=Path, help="a Markdown file; printed if left out")
    parser.add_argument("--only", default="", help="a pattern of names of rows")
    parser.add_argument(
        "--quick", action="store_true", help="what tests check by default"
    )
    parser.add_argument(
        "--effort", type=int, default=1, help="multiple of the replicas"
    )
    given = parser.parse_args(arguments)
    verdicts = []
    for row in ROWS.values():
        if re.search(given.only, row.name) and (row.quick or not given.quick):
            verdict = check(row, given.effort)
            verdicts.append(verdict)
            name, _, predicted, measured, how, seconds, agrees = _cells(verdict)
            line = f"{name}: {predicted} | {measured} | {how} | {seconds} s | {agrees}"
            print(line, file=sys.stderr, flush=True)
    text = report(verdicts, given.effort)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text, encoding="utf-8")
    else:
        print(text)
    return 0 if all(v.agrees for v in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
