"""Run the studies of ``experiments/studies/notebooks``, and what they have in common.

``python -m bagua_jax.experiments.studies`` runs each in full, in a process of its own,
and writes their figures and pages: docs/studies.md, and one of docs/findings/ for each
finding, a study of something that the papers do not state. With ``BAGUA_FAST=1`` in the
environment a study has few workers and few steps: the same claims, in seconds.
"""

import argparse
import io
import multiprocessing
import os
import re
import runpy
import signal
import sys
import time
from collections.abc import Sequence
from importlib import resources
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

__all__ = [
    "FAST",
    "FINDINGS",
    "ORDER",
    "STYLE",
    "Row",
    "agree",
    "choose",
    "compare",
    "label_ends",
    "main",
    "need_devices",
    "run",
    "save",
]

FAST = os.environ.get("BAGUA_FAST") == "1"
"""Whether studies are to be small."""

_HOME = Path(str(resources.files("bagua_jax.experiments")))
_NOTEBOOKS = _HOME / "studies" / "notebooks"

STYLE = str(_HOME / "bagua.mplstyle")
"""The style of every figure, for ``matplotlib.pyplot.style.use``."""

ORDER = (
    "compression_constants",
    "error_feedback",
    "consensus",
    "heterogeneity",
    "difference_coding",
    "delay_and_local_steps",
    "adam",
    "choosing",
)
"""The studies, in the order of the page."""

FINDINGS = ("half_a_ring", "zero_on_the_grid", "two_thresholds")
"""Those that have pages of their own."""

T = TypeVar("T")


def choose(full: T, fast: T) -> T:
    """Return the first, or in fast mode the second."""
    return fast if FAST else full


def need_devices(count: int) -> None:
    """Request `count` devices (host devices on CPU); no effect once JAX has started."""
    import jax

    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # it has started
        pass
    found = len(jax.devices())
    if found < count:
        raise RuntimeError(
            f"studies: {count} devices are needed, JAX has started with {found}. "
            "Restart the kernel, and call need_devices first."
        )


# --- tables ---------------------------------------------------------------------------


class Row(NamedTuple):
    """A prediction beside a measurement.

    Attributes:
        what: is predicted and measured.
        predicted: by ``bagua_jax.theory``, or stated.
        measured: of our algorithms.
        error: standard error of the measurement; 0 where nothing is random.
        rounding: how far off rounding or a finite run may put it.
    """

    what: str
    predicted: float
    measured: float
    error: float = 0.0
    rounding: float = 0.0


def agree(row: Row) -> bool:
    """Tell whether prediction and measurement agree, to 4 s.e. and rounding.

    >>> agree(Row("a", 1.0, 1.1, error=0.03)), agree(Row("a", 1.0, 1.1, rounding=0.01))
    (True, False)
    """
    return abs(row.measured - row.predicted) <= 4 * row.error + row.rounding


def compare(rows: Sequence[Row]) -> str:
    """Write rows as a table, which also reads as text.

    >>> print(compare([Row("largest step", 2 / 3, 0.67, 0.01)]))
    | what | predicted | measured |
    |---|---:|---:|
    | largest step | 0.6667 | 0.67 ± 0.01 |
    """
    lines = ["| what | predicted | measured |", "|---|---:|---:|"]
    for row in rows:
        error = f" ± {row.error:.1g}" if row.error else ""
        numbers = f"{row.predicted:.4g} | {row.measured:.4g}{error}"
        lines.append(f"| {row.what} | {numbers} |")
    return "\n".join(lines)


# --- figures --------------------------------------------------------------------------


def label_ends(axes: Any, gap: float = 11.0, width: float = 0.3) -> None:
    """Write the labels of lines at their right ends, apart from each other.

    Args:
        axes: whose labelled lines are drawn, and whose limits are set.
        gap: least distance of two labels, in points.
        width: room for them, as a part of the axes' width; made by widening the range.
    """
    figure = axes.figure
    low, high = axes.get_xlim()
    to = axes.transScale.transform
    left, right = to((low, 1))[0], to((high, 1))[0]
    wide = axes.transScale.inverted().transform((right + width * (right - left), 0))[0]
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    axes.set_xlim(low, wide)
    axes.set_xticks(ticks)
    figure.canvas.draw()
    scale = 72 / figure.dpi
    ends = []
    for line in axes.get_lines():
        if line.get_label().startswith("_"):
            continue
        points = axes.transData.transform(np.column_stack(line.get_data(orig=False)))
        ends.append((_last_seen(points, axes.bbox.y0, axes.bbox.y1), line))
    ends.sort(key=lambda end: end[0][1])
    floor = axes.bbox.y0 * scale + gap / 2
    ceiling = axes.bbox.y1 * scale - gap / 2
    heights = np.array([point[1] * scale for point, _ in ends])
    heights = _apart(heights, gap, floor, ceiling)
    for (point, line), height in zip(ends, heights, strict=True):
        axes.annotate(
            line.get_label(),
            axes.transData.inverted().transform(point),
            xytext=(7, height - point[1] * scale),
            textcoords="offset points",
            color=line.get_color(),
            va="center",
            fontsize=9,
        )


def _last_seen(points: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return the last point of a polyline between two heights, or where it leaves them.

    >>> _last_seen(np.array([[0.0, 4.0], [2.0, 0.0]]), 1.0, 5.0).tolist()
    [1.5, 1.0]
    """
    points = points[np.isfinite(points).all(1)]
    last = np.flatnonzero((points[:, 1] >= low) & (points[:, 1] <= high))[-1]
    if last + 1 == len(points):
        return points[last]
    (x, y), (next_x, next_y) = points[last : last + 2]
    edge = np.clip(next_y, low, high)
    return np.array([x + (next_x - x) * (edge - y) / (next_y - y), edge])


def _apart(
    heights: np.ndarray, gap: float, floor: float = -np.inf, ceiling: float = np.inf
) -> np.ndarray:
    """Move sorted heights as little as it takes for a gap between neighbours.

    >>> _apart(np.array([0.0, 1.0, 9.0]), 2.0).tolist()
    [-0.5, 1.5, 9.0]
    """
    blocks: list[tuple[float, int]] = []  # (centre, labels): even blocks, pooled
    for height in heights:
        blocks.append((float(height), 1))
        while len(blocks) > 1:
            (low, m), (high, k) = blocks[-2:]
            if high - low >= gap * (m + k) / 2:
                break
            blocks[-2:] = [((low * m + high * k) / (m + k), m + k)]
    spread = [centre + gap * (np.arange(k) - (k - 1) / 2) for centre, k in blocks]
    steps = gap * np.arange(len(heights))
    up = np.maximum(np.concatenate(spread), floor + steps)
    return np.minimum(up, ceiling - steps[::-1])


def save(figure: Any, name: str) -> None:
    """Write a figure where ``main`` collects them; elsewhere do nothing.

    Args:
        figure: of matplotlib.
        name: of the file, without its end.
    """
    if folder := os.environ.get("BAGUA_FIGURES"):
        write(figure, Path(folder) / f"{name}.png")


def write(figure: Any, path: Path) -> None:
    """Write a figure to a small PNG file, for pages that are committed."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120)
    few = Image.open(drawn).convert("RGB").quantize(128)  # colours: a small file
    few.save(path, optimize=True)


# --- running --------------------------------------------------------------------------


def run(name: str) -> dict[str, Any]:
    """Run a study without a display; its last cell asserts what it claims.

    Args:
        name: one of :data:`ORDER` or :data:`FINDINGS`.

    Returns:
        Its variables; ``rows`` is its table.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.style.context("default"):
        found = runpy.run_path(str(_NOTEBOOKS / f"{name}.py"))
        plt.close("all")
    return found


def _prose(name: str) -> list[str]:
    """Return the text cells of a study, as Markdown; the first states its question."""
    text = (_NOTEBOOKS / f"{name}.py").read_text(encoding="utf-8")
    cells = text.split("# %% [markdown]\n")[1:]
    bodies = (cell.split("\n# %%")[0] for cell in cells)
    return [re.sub(r"^# ?", "", b, flags=re.MULTILINE).strip() for b in bodies]


def _image(name: str) -> str:
    """Show its figure."""
    return f"![{name}](figures/{name}.png)"


def _section(name: str, ran: "_Ran") -> str:
    """Write a study's part of the page."""
    opening = re.sub(r"^# ", "## ", _prose(name)[0])
    file = f"../experiments/studies/notebooks/{name}.py"
    link = f"[{name}.py]({file}), {ran.seconds:.0f} s"
    return "\n\n".join((opening, _image(name), ran.table, link)) + "\n"


_FINDING = """\
---

*Written by `{command} {name}`, which runs
[{name}.py](../../experiments/studies/notebooks/{name}.py); do not edit it.
Predictions come from `bagua_jax.theory`, measurements are of `bagua_jax.algorithms`
with simulated workers, ± one standard error over replicas ({seconds:.0f} s of processor
time on {machine}).*
"""


def _finding(name: str, ran: "_Ran") -> str:
    """Write a finding's page: all its text, figure and numbers."""
    figure = _image(name).replace("(figures/", "(../figures/")
    about = _FINDING.format(
        command=_COMMAND, name=name, seconds=ran.seconds, machine=_machine()
    )
    opening, *rest = _prose(name)
    return "\n\n".join((opening, figure, *rest, ran.table, about))


_COMMAND = "python -m bagua_jax.experiments.studies"
_PAGE = """\
# Studies: predictions beside measurements

*Written by `make notebooks`; do not edit it.*

Each study is a notebook in `experiments/studies/notebooks/` (a percent script: read it
as it is, or open it in Jupyter with jupytext). Its first cell, below, states the
question and what theory says; its last cell asserts it, in the test suite as well
(`BAGUA_FAST=1`, smaller). Predictions come from `bagua_jax.theory`; measurements are of
`bagua_jax.algorithms` with simulated workers, ± one standard error over replicas. Made
on {machine}. Three findings that papers do not state have pages of their own:
{findings}.
"""


def _page(sections: dict[str, str]) -> str:
    """Put the studies that have run in order, below a heading."""
    findings = []
    for name in FINDINGS:
        title = _prose(name)[0].splitlines()[0].removeprefix("# ")
        findings.append(f"[{title}](findings/{name}.md)")
    head = _PAGE.format(machine=_machine(), findings=";\n".join(findings))
    return "\n".join([head, *(sections[name] for name in ORDER if name in sections)])


def _machine() -> str:
    """Name the processor, and how much of it there is."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
        (model,) = set(re.findall(r"model name\s*: (.*)", text))
    except (OSError, ValueError):
        import platform

        model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"


class _Ran(NamedTuple):
    """What a study came to: its table, processor seconds, peak memory in MB."""

    table: str
    seconds: float
    memory: float


def _report(name: str, pipe: Connection) -> None:
    """Run a study in this process, and send what it came to."""
    import resource  # not on Windows, where the rest works

    need_devices(8)
    table = compare(run(name)["rows"])
    used = resource.getrusage(resource.RUSAGE_SELF)
    unit = 1024**2 if sys.platform == "darwin" else 1024
    pipe.send(_Ran(table, used.ru_utime + used.ru_stime, used.ru_maxrss / unit))


def _apart_from_others(target: Any, name: str) -> _Ran | str:
    """Run a study in a process of its own; say so where that did not end well.

    A study that is killed, for memory as a rule, cannot report it, and neither could
    a process that all studies share.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(name, send))
    process.start()
    send.close()  # so that the other end's death ends the wait
    try:
        found = receive.recv()
    except EOFError:
        found = None
    process.join()
    if found is not None:
        return found
    code = process.exitcode or 0
    if code >= 0:
        return f"stopped with exit code {code}; its message is above"
    how = f"its process was killed by {signal.Signals(-code).name}"
    if -code == signal.SIGKILL:
        how += ", as a system out of memory does: free some, or run it by itself"
    return how


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the studies in full, and write figures and pages; 1 where one fails."""
    parser = argparse.ArgumentParser(prog=_COMMAND, description=__doc__)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    names = (*ORDER, *FINDINGS)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(names)}; else all")
    given = parser.parse_args(arguments)
    if strange := set(given.names) - set(names):
        parser.error(f"no study is called {', '.join(sorted(strange))}")
    for folder in ("figures", "findings"):
        (given.docs / folder).mkdir(parents=True, exist_ok=True)
    os.environ["BAGUA_FIGURES"] = str(given.docs / "figures")
    page, failed = given.docs / "studies.md", []
    old = page.read_text(encoding="utf-8").split("\n## ") if page.exists() else []
    sections = {
        name: "## " + part for part in old for name in ORDER if _image(name) in part
    }
    for name in given.names or names:
        start = time.perf_counter()
        ran = _apart_from_others(_report, name)
        if isinstance(ran, str):
            failed.append(name)
            print(f"{name} FAILED: {ran}.", file=sys.stderr, flush=True)
            continue
        print(
            f"{name}: {ran.seconds:.0f} s of processor time, "
            f"{time.perf_counter() - start:.0f} s in all, {ran.memory:.0f} MB at most",
            flush=True,
        )
        if name in FINDINGS:
            text = _finding(name, ran)
            (given.docs / "findings" / f"{name}.md").write_text(text, "utf-8")
        else:
            sections[name] = _section(name, ran)
            page.write_text(_page(sections), "utf-8")
    if failed:
        print(f"{len(failed)} failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0
