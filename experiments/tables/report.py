"""What an experiment shows at its end: tables, two figures, one results.json."""

import math
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from bagua_jax.experiments.runs import folders, integrity
from bagua_jax.experiments.runs.integrity import RunError
from bagua_jax.experiments.spec import claims
from bagua_jax.experiments.spec.config import ExperimentConfig
from bagua_jax.experiments.tables.comparison import Comparison, Result
from bagua_jax.experiments.tables.table import Table

__all__ = ["cumulative_bytes", "headline", "human_bytes", "judge", "write"]


def headline(config: ExperimentConfig, title: str) -> str:
    """Say in one line what was done where; a simulation is called one.

    Args:
        config: of the experiment.
        title: of the task.
    """
    import jax

    machine = folders.processor()
    n, device = config.workers, jax.devices()[0]
    workers = "1 worker" if n == 1 else f"{n} workers"
    if device.platform != "cpu":
        machine = f"{device.device_kind}, {machine}"
    if config.where == "simulate":
        place = f"simulation of {workers} on one device"
    elif device.platform == "cpu":
        place = f"{workers} on host devices"
        place += " of one machine" if config.where == "devices" else ""
    else:
        place = f"{workers} on {n} x {device.device_kind}"
    if config.where == "processes":
        place += f" in {jax.process_count()} processes"
    return f"{config.experiment}: {title}, {place} ({machine})"


def write(
    config: ExperimentConfig,
    title: str,
    compared: Comparison,
    failures: Sequence[str],
    verdicts: Sequence[claims.Verdict],
    console: Console,
) -> None:
    """Print the tables, and save them with the figures in the experiment's folder.

    Args:
        config: of the experiment.
        title: of the task.
        compared: the runs that finished, of this command and of earlier ones.
        failures: a line for each run that did not.
        verdicts: on the config's claims.
        console: where the table goes.
    """
    folder, results = Path(config.output) / config.experiment, compared.results
    console.print(f"\n[bold]{escape(headline(config, title))}", highlight=False)
    console.print(_table(results, console.width))
    console.print(f"[dim]{_caption(config)}", highlight=False)
    if any(result.earlier for result in results):
        console.print("* of an earlier command, with this setting.", highlight=False)
    for line in _left_out(compared):
        console.print(line, highlight=False, markup=False)
    for failure in failures:
        console.print(f"failed: {failure}", highlight=False, soft_wrap=True)
    if verdicts:
        console.print(_claims(verdicts))
    content = {
        "title": headline(config, title),
        "where": config.where,
        "results": [
            {"folder": folders.path_of(run).name, "earlier": earlier, **summary}
            for run, summary, earlier in results
        ],
        "left_out": [left._asdict() for left in compared.left_out],
        "failures": list(failures),
        "claims": [verdict._asdict() for verdict in verdicts],
    }
    integrity.write_document(folder / "results.json", content, config.experiment)
    paths = _figures(config, title, results, folder)
    names = ", ".join(["results.json", *(path.name for path in paths)])
    console.print(f"In {folder}: {names}", highlight=False, soft_wrap=True)


def judge(
    stated: Iterable[claims.Claim], results: Sequence[Result]
) -> list[claims.Verdict]:
    """Judge claims by the runs that finished.

    Args:
        stated: the claims.
        results: of these runs.
    """
    summaries = {result.summary["label"]: result.summary for result in results}
    metrics = {result.summary["label"]: _metrics(result.run) for result in results}
    return claims.judge(stated, summaries, metrics)


def _metrics(run: ExperimentConfig) -> list[dict[str, Any]]:
    path = folders.path_of(run) / "metrics.jsonl"
    found = integrity.read(path, folders.name_of(run))
    if found.fault:
        raise RunError(f"{found.fault}. The same command mends it.")
    return found.records


# --- the tables ---


def _claims(verdicts: Sequence[claims.Verdict]) -> Table:
    rows = (
        (claim, measured, Text("yes") if holds else Text("no", "bold red"))
        for claim, measured, holds in verdicts
    )
    headers = ["claim", "measured", "holds"]
    return Table(headers, rows, left=headers)


def human_bytes(number: float) -> str:
    """Write a number of bytes with three digits or so.

    >>> human_bytes(365_862.0), human_bytes(12), human_bytes(2.5e6)
    ('366 kB', '12 B', '2.5 MB')
    """
    thousands = 0
    while number >= 999.5 and thousands < 4:
        number, thousands = number / 1000, thousands + 1
    return f"{number:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[thousands]}"


def _metric(results: Sequence[Result]) -> str:
    """Name the metric that stands for a task: the first that its evaluation gives."""
    return next(
        key.removeprefix("eval/")
        for key in results[0].summary
        if key.startswith("eval/")
    )


def _words(metric: str) -> str:
    words = metric.replace("_", " ")
    return f"test {words}" if metric in ("accuracy", "loss") else words


def _number(metric: str, value: float) -> str:
    return f"{100 * value:.1f}%" if "accuracy" in metric else f"{value:.3g}"


def _table(results: Sequence[Result], width: int) -> Table:
    metric = _metric(results)
    is_wide = width >= 98
    columns = {  # header: what it shows of a summary
        _words(metric): lambda s: _number(metric, s[f"eval/{metric}"]),
        "over workers": lambda s: _spread(metric, s),
        "final loss": lambda s: f"{s['train/loss_last_10']:.3g}",
        "bytes /step": lambda s: _sent(s, "bytes_per_worker", human_bytes),
        "messages /step": lambda s: _sent(s, "messages_per_worker", "{:.3g}".format),
        "consensus distance²": lambda s: f"{s['consensus/distance_sq']:.2g}",
        "steps /s": lambda s: f"{s['time/steps_per_s']:.3g}",
    }
    if not is_wide:
        del columns["over workers"]
        short = {"messages /step": "msgs /step", "consensus distance²": "cons. dist.²"}
        columns = {short.get(name, name): show for name, show in columns.items()}
    lasting = ("/step", "/s")  # columns that a run which diverged has as well
    rows = []
    for result in results:
        summary = result.summary
        gone = summary.get("diverged")
        cells = (
            "diverged" if gone and not name.endswith(lasting) else show(summary)
            for name, show in columns.items()
        )
        rows.append([Text(result.label, "bold"), *cells])
    return Table(["algorithm", *columns], rows)


def _sent(summary: dict[str, Any], key: str, show: Callable[[float], str]) -> str:
    return show(summary["wire"][key]) if summary["wire"] else "not counted"


def _sends(summary: dict[str, Any]) -> bool:
    return bool(summary["wire"] and summary["wire"]["bytes_per_worker"])


def _spread(metric: str, summary: dict[str, Any]) -> str:
    if f"eval/{metric}_worker_min" not in summary:
        return "same"
    low, high = (
        _number(metric, summary[f"eval/{metric}_worker_{end}"])
        for end in ("min", "max")
    )
    return f"{low.removesuffix('%')}–{high}"


def _caption(config: ExperimentConfig) -> str:
    sent = "would send" if config.where == "simulate" else "sends"
    return (
        f"bytes/step, messages/step: what a worker {sent} on a step in the long run, "
        "after any warm-up, counted from the compiled program. final loss: training "
        "loss of each worker's model on its own batches, mean over the last 10 steps. "
        "consensus distance²: mean over workers of |x_i - mean|². Workers of one "
        "machine share its cores: steps/s says nothing about a cluster."
    )


def _left_out(compared: Comparison) -> Iterable[str]:
    """Name runs of earlier commands that are not compared, those alike on one line."""
    reasons: dict[str, list[str]] = {}
    for folder, because in compared.left_out:
        reasons.setdefault(because, []).append(folder)
    for because, names in reasons.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield f"not compared: {', '.join(names[:3])}{more}: {because}"


# --- the figures ---


def cumulative_bytes(steps: np.ndarray, wire: dict[str, Any]) -> np.ndarray:
    """Count what a worker has sent after each step, warm-up included.

    Args:
        steps: [k] steps taken.
        wire: as in a summary.

    Example:
        >>> wire = {"bytes_per_worker": 1.0, "warmup_bytes_per_worker": 4.0,
        ...         "warmup_steps": 2}
        >>> cumulative_bytes(np.array([1, 2, 4]), wire).tolist()
        [4.0, 8.0, 10.0]
    """
    warm = np.minimum(steps, wire["warmup_steps"])
    first, steady = wire["warmup_bytes_per_worker"], wire["bytes_per_worker"]
    return warm * first + (steps - warm) * steady


def _smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Average each value with ``reach`` on either side, fewer at the beginning."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    around = np.minimum(reach, at)
    low, high = at - around, np.minimum(at + around + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _figures(
    config: ExperimentConfig, title: str, results: Sequence[Result], folder: Path
) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    style = Path(str(resources.files("bagua_jax.experiments"))) / "bagua.mplstyle"
    curves = [
        (result.summary | {"label": result.label}, _metrics(result.run))
        for result in results
    ]
    metric = _metric(results)
    paths = []
    with plt.style.context(str(style)):
        for axis in ("steps", "bytes"):
            shown = [c for c in curves if axis == "steps" or _sends(c[0])]
            if not shown:
                continue
            figure, panels = plt.subplots(1, 2)
            rows_of_legend = math.ceil(len(shown) / 3)
            figure.set_figheight(figure.get_figheight() + 0.22 * rows_of_legend)
            for summary, lines in shown:
                _draw(panels, summary, lines, axis, metric)
            _label(panels, axis, metric, config)
            figure.suptitle(headline(config, title), fontsize=10)
            handles, labels = panels[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=3)
            path = folder / f"loss_vs_{axis}.png"
            figure.savefig(path)
            plt.close(figure)
            paths.append(path)
    return paths


def _draw(panels, summary, lines, axis, metric) -> None:
    trained = [line for line in lines if "train/loss" in line]
    judged = [line for line in lines if f"eval/{metric}" in line]
    losses = np.array([line["train/loss"] for line in trained])
    values = [line[f"eval/{metric}"] for line in judged]
    steps, at = (np.array([x["step"] for x in part]) for part in (trained, judged))
    if summary.get("diverged"):  # what came last would dwarf the others
        soon = np.logical_and.accumulate(np.abs(losses) <= 10 * np.abs(losses[:1]))
        losses, steps = losses[soon], steps[soon]
    if axis == "bytes":
        steps, at = (cumulative_bytes(x, summary["wire"]) for x in (steps, at))
    smooth = _smooth(losses, len(losses) // 50)
    (curve,) = panels[0].plot(steps, smooth, label=summary["label"])
    look = {"color": curve.get_color(), "linestyle": curve.get_linestyle()}
    if axis == "steps":
        panels[0].plot(steps, losses, **look, alpha=0.15, linewidth=0.7)
    # Before the first step: no bytes for a logarithmic axis, and accuracy by chance.
    first = int(axis == "bytes" or metric == "accuracy")
    panels[1].plot(at[first:], values[first:], **look, marker="o")


def _label(panels, axis, metric, config) -> None:
    from matplotlib import ticker

    x = "optimizer steps"
    if axis == "bytes":
        sent = "would have sent" if config.where == "simulate" else "sent"
        x = f"bytes that a worker {sent}"
    for panel, y in zip(panels, ("training loss", _words(metric)), strict=True):
        panel.set_xlabel(x)
        panel.set_ylabel(y)
        xs, ys = (
            [getattr(line, f"get_{k}data")() for line in panel.get_lines()]
            for k in "xy"
        )
        if axis == "bytes":
            panel.set_xscale("log")
            _tick(panel.xaxis, ticker.EngFormatter("B"), _decades(xs) < 1.7)
        if "accuracy" not in y and _decades(ys) > 1:
            panel.set_yscale("log")
            if _decades(ys) < 4:
                _tick(panel.yaxis, ticker.FormatStrFormatter("%g"), _decades(ys) < 3)
    panels[0].set_title("training loss, mean over workers")
    panels[1].set_title(f"{_words(metric)}, decentralized: of the averaged model")


def _tick(axis, formatter, is_short: bool) -> None:
    """Tick a logarithmic axis in plain numbers: a short one at 1, 2, 5, 10, ..."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if is_short else (1,)))
    axis.set_major_formatter(formatter)
    axis.set_minor_formatter(ticker.NullFormatter())
    if is_short:
        axis.set_minor_locator(ticker.NullLocator())


def _decades(curves: Sequence[np.ndarray]) -> float:
    """Measure how many decades the values span; 0 where one is not positive."""
    low, high = (float(end(np.concatenate(curves))) for end in (np.min, np.max))
    return math.log10(high / low) if low > 0 else 0.0
