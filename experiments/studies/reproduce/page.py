"""Tables, figures and the page of the comparison with the public numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bagua_jax.experiments.studies.reproduce import counts, tables
from bagua_jax.experiments.studies.reproduce.cells import Table
from bagua_jax.experiments.studies.reproduce.compare import Comparison, Errors
from bagua_jax.experiments.tables.table import Table as Grid

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["TOPOLOGY", "draw", "overview", "show", "to_json", "to_markdown"]

TOPOLOGY = (
    f"{counts.NODES} nodes x {counts.PER_NODE} GPUs, hierarchical: a node averages in "
    f"full precision, the {counts.NODES} nodes exchange, bytes are counted a node. "
    "allreduce, DDP and Horovod: one ring over all GPUs, which crosses each node once."
)

# --- numbers as text ------------------------------------------------------------------


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _cell(predicted: float, published: float) -> str:
    error = round(100 * (predicted / published - 1))
    return f"{_number(predicted)} / {published:g} ({error:+d})"


def _percent(errors: Errors | None) -> str:
    if errors is None:
        return "not possible: a constant lives in these cells alone"
    values = (errors.median, errors.mean, errors.percentile_90, errors.maximum)
    parts = (f"{100 * value:.1f}" for value in values)
    return " | ".join(parts) + f" | {errors.cells}"


def _flagged(table: Table, system: str, row: float) -> bool:
    return bool({(system, row), (system, None)} & set(table.exceptions))


def _constants(table: Table, found: Comparison) -> Iterable[str]:
    for name, value in found.constants.items():
        constant = table.constants[name]
        size = f"{value:.3g} {constant.unit}".strip()
        yield f"{constant.symbol} = {size}: {constant.meaning}"


def _places(values: Sequence[float], unit: str) -> str:
    return ", ".join(f"{value:.3g} {unit}" for value in values) or "never"


def _errors(table: Table, found: Comparison) -> list[tuple[str, Errors | None]]:
    number = len(found.constants)
    rows: list[tuple[str, Errors | None]] = [
        (f"{number} constants fitted", found.fitted),
        ("one algorithm left out, each predicted from the others", found.algorithm_out),
    ]
    if table.telling != table.rows:
        named = ", ".join(f"{row:g}" for row in table.telling)
        label = f"{number} constants fitted; {named} {table.row_unit}"
        rows.insert(1, (label, found.telling))
    rows += [
        (f"without {label} {table.row_unit}, predicted there", errors)
        for label, errors in found.row_out.items()
    ]
    return rows + [*found.baselines.items()]


# --- the terminal ---------------------------------------------------------------------


def show(table: Table, found: Comparison, console: Console) -> None:
    """Print a table cell by cell, what it rests on, and how wrong it is."""
    from rich.text import Text

    console.rule(f"[bold]{table.title}")
    console.print(f"predicted / published (error in %). {table.note}", highlight=False)
    rows = []
    for j, system in enumerate(table.published):
        cells = []
        for i, row in enumerate(table.rows):
            cell = _cell(found.predicted[i, j], table.cells[i, j])
            is_flagged = _flagged(table, system, row)
            cells.append(Text(f"{cell} *", "dim") if is_flagged else cell)
        rows.append([system, *cells])
    console.print(
        Grid(["", *(f"{row:g} {table.row_unit}" for row in table.rows)], rows)
    )
    for (system, row), reason in table.exceptions.items():
        where = "" if row is None else f" at {row:g} {table.row_unit}"
        console.print(f"* {system}{where}: {reason}", style="dim", highlight=False)
    for line in _constants(table, found):
        console.print(f"fitted: {line}", highlight=False)
    for line in table.stated:
        console.print(f"stated: {line}", highlight=False)

    rows = []
    for label, errors in _errors(table, found):
        parts = _percent(errors).split(" | ")
        rows.append([label, *parts] if errors else [f"{label}: {parts[0]}"])
    headers = ["relative errors, %", "median", "mean", "90th", "max", "cells"]
    console.print(Grid(headers, rows))
    right, pairs, wrong = found.orders
    console.print(f"order of pairs right: {right} of {pairs}", highlight=False)
    for row, first, second in wrong:
        console.print(
            f"  wrong at {row:g} {table.row_unit}: published {first} below {second}",
            style="dim",
            highlight=False,
        )
    for pair, (public, own) in found.crossovers.items():
        console.print(
            f"{pair} cross: published {_places(public, table.row_unit)}, predicted "
            f"{_places(own, table.row_unit)}",
            highlight=False,
        )


def overview(found: Mapping[str, Comparison], console: Console) -> None:
    """Print how wrong each table is: fitted, out of sample, with nothing fitted."""
    rows = ([name, *_summary(tables.load(name), r)] for name, r in found.items())
    title = "errors in %: fitted; out of sample; nothing fitted"
    console.print(Grid(_OVERVIEW, rows, title=title))


# --- files ----------------------------------------------------------------------------


def to_json(table: Table, found: Comparison) -> dict[str, Any]:
    """Return everything that a comparison holds, as JSON would have it."""
    exceptions = [
        {"system": system, "row": row, "reason": reason}
        for (system, row), reason in table.exceptions.items()
    ]

    def by_system(values: np.ndarray) -> Mapping[str, list[float]]:
        return dict(zip(table.published, values.T.tolist(), strict=True))

    return {
        "title": table.title,
        "source": tables.published()["source"],
        "topology": TOPOLOGY,
        "unit": table.unit,
        "row_unit": table.row_unit,
        "rows": list(table.rows),
        "published": {k: list(v) for k, v in table.published.items()},
        "predicted": by_system(found.predicted),
        "relative_error": by_system(found.errors),
        "sent": {
            system: table.exchange(system, table.rows[-1])._asdict()
            for system in table.published
        },
        "constants": dict(found.constants),
        "stated": list(table.stated),
        "fitted": found.fitted._asdict(),
        "fitted_where_constants_matter": found.telling._asdict(),
        "one_algorithm_left_out": found.algorithm_out._asdict(),
        "rows_left_out": {k: v and v._asdict() for k, v in found.row_out.items()},
        "nothing_fitted": {k: v._asdict() for k, v in found.baselines.items()},
        "orders": found.orders._asdict(),
        "crossovers": {
            pair: {"published": list(public), "predicted": list(own)}
            for pair, (public, own) in found.crossovers.items()
        },
        "exceptions": exceptions,
        "left_out": dict(table.left_out),
        "choices_after_seeing_the_data": list(table.choices),
        "misses": list(table.misses),
    }


_MARKERS = "osD^vP*Xd"


def draw(table: Table, found: Comparison, path: Path) -> None:
    """Draw the table: published marks on predicted curves, and every cell's error."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from bagua_jax.experiments import studies

    names, rows = list(table.published), np.array(table.rows, float)
    with plt.style.context(studies.STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6))
        if len(rows) > 2:
            _curves(left, table, found, rows, names)
        else:
            _dots(left, table, found, rows, names)
        cells = 100 * found.errors
        height = np.arange(len(names))[::-1]
        for i, row in enumerate(rows):
            shift = 0.28 - 0.56 * i / (len(rows) - 1)
            shade = str(0.0 + 0.62 * i / (len(rows) - 1))
            label = f"{row:g} {table.row_unit}"
            style = {"marker": _MARKERS[i], "color": shade, "linestyle": "none"}
            right.plot(cells[i], height + shift, **style, label=label)
        right.axvspan(-5, 5, color="#e8e8e8", zorder=0)
        right.axvline(0, color="black", linewidth=0.8)
        right.set_yticks(height, names)
        right.set_xlabel("predicted / published - 1, % (band: 5 %)")
        right.set_title("error of every cell")
        right.legend(fontsize=8)
        studies.write(figure, path)
        plt.close(figure)


def _curves(axes, table, found, rows, names) -> None:
    between = np.linspace if rows.min() == 0 else np.geomspace
    fine = rows if table.row_unit == "GPUs" else between(rows.min(), rows.max(), 200)
    for j, name in enumerate(names):
        style = {"marker": _MARKERS[j], "markersize": 6}
        (curve,) = axes.plot(
            fine, [table.predict(found.constants, name, float(row)) for row in fine]
        )
        style["color"] = curve.get_color()
        axes.plot(rows, table.cells[:, j], linestyle="none", **style)
        axes.plot([], [], linestyle=curve.get_linestyle(), label=name, **style)
    axes.legend(fontsize=8, ncols=2)
    if rows.min() > 0:
        axes.set_xscale("log")
        axes.set_xticks(rows, [f"{row:g}" for row in rows])
        axes.minorticks_off()
    axes.set_yscale("log")
    axes.set_xlabel(table.row_unit)
    axes.set_ylabel(table.unit)
    axes.set_title("lines: predicted; marks: published")


def _dots(axes, table, found, rows, names) -> None:
    height = np.arange(len(names))[::-1]
    for i, row in enumerate(rows):
        shift = 0.15 - 0.3 * i / (len(rows) - 1)
        style = {"marker": _MARKERS[i], "markersize": 7, "linestyle": "none"}
        face = "black" if i == 0 else "0.55"
        label = f"{row:g} {table.row_unit}"
        axes.hlines(
            height + shift, table.cells[i], found.predicted[i], color=face, linewidth=1
        )
        axes.plot(
            table.cells[i],
            height + shift,
            color=face,
            label=f"{label}, public",
            **style,
        )
        axes.plot(
            found.predicted[i],
            height + shift,
            color=face,
            markerfacecolor="white",
            label=f"{label}, predicted",
            **style,
        )
    axes.set_yticks(height, names)
    axes.set_xlabel(table.unit)
    axes.set_xlim(left=0)
    axes.set_title("filled: published; open: predicted")
    axes.legend(fontsize=8)


# --- the page -------------------------------------------------------------------------

_HEAD = """\
# BAGUA's evaluation, predicted

*Written by `bagua-jax reproduce --docs docs`; do not edit it.*

BAGUA asks which relaxation of communication wins on which network. Its public tutorials
show measured tables; here each stands beside a **prediction**: what our compiled programs
send between nodes, a network with stated constants, and at most two constants fitted to
the table. Nothing was run on that cluster by us, and nothing here is the paper's.

- Published numbers: {source}; {reading}. A perfect model would show a median error near
  1.7 % for that reason alone. Cluster: {cluster}.
- Effective topology: {topology}
- Constants are fitted by least squares on the logarithms, in code, each time this page is
  written. **Errors by cross-validation stand beside fitted ones**, and what was decided
  after seeing the data is listed: count those decisions as hidden constants.
- DDP, Horovod and BytePS are not ours: their bytes are by formula.
- Tests hold these bounds: bandwidth median 3 %, 90th percentile 9 %, maximum 18 %, DDP and
  Horovod within 2 % at 1 to 8 Gbit/s with nothing fitted, and every order of systems there;
  latency median 12 %, 90th percentile 26 %, maximum 38 %; throughput median 6 %, maximum 36 %;
  scaling median 3 %, maximum 15 %, with nothing fitted 8 and 21 %.

## The model

$$T = \\max\\Big(\\frac{{V}}{{g B}},\\; c + \\frac{{V}}{{C}} + d\\,\\big(n_b H + \\tfrac{{2 V_c}}{{W}}\\big)\\Big)$$

$V$ bytes leave a node in a step, $V_c$ of them through the busiest connection, in $n_b$
buckets of $H$ hops one after the other. $B$ is the bandwidth between nodes, $g$ the share
of it that payloads get, $d$ the added one-way latency, $c$ compute, $C$ the rate at which a
host copies and hands to TCP, $W$ the bytes in flight on a connection. The wire hides behind
work; host work and latency do not. Codecs cost nothing here: `tables.CODEC` takes the seconds
that one measures on a V100, which nobody has for ours; fitting them would explain nothing.

## What is sent

Megabytes that one node sends to others in a step: counted from the compiled program of our
exchange on 16 nodes of 8 devices, and the formula of the idea. The difference is ranges and
scales, one for every part of a bucket. *Messages* are the collectives between nodes, of one
device: buckets of 10 MiB, two phases where it is compressed; XLA combines exact means into one
all-reduce. The published systems' own bucket counts enter where latency counts, see there.

| workload | parameters | exchange | counted MB | formula MB | messages |
|---|---:|---|---:|---:|---:|
{sent}

The same programs of VGG16, compiled for GPUs that are not here by their own compiler, send the
same bytes; only the messages differ, because that compiler combines them otherwise:

| cluster | exchange | counted MB | of the count above | messages |
|---|---|---:|---:|---:|
{planned}

The five workloads at their true sizes are flax modules in
[experiments/studies/models](../experiments/studies/models/__init__.py), compiled and never trained.
Appendix numbers of the paper that we could not check are no target: where a size is our
choice, this table says so.

| workload | parameters | leaves | GFLOP a sample, forward and backward | sizes |
|---|---:|---:|---:|---|
{workloads}

A V100 gives 15.7 TFLOP/s in float32 at best. BERT-Large's published compute time of 0.526 s
means {bert:.1f} TFLOP/s by our count of operations, {share:.0%} of that: plausible. VGG16's
0.142 s means {vgg:.1f}, above it: the original's convolutions must have used a faster
algorithm or fewer bits, while its bytes on the wire fit float32.

## Overview

Errors in %.

| {heads} |
|---|---:|---|---:|---:|---:|---:|---:|---:|---:|
{overview}
"""  # noqa: E501

_FORMULAS = {  # of the model's bytes
    "allreduce": 2 * 127 / 128,
    "allreduce, hierarchical": 2 * 15 / 16,
    "ByteGrad": 2 * 15 / 16 / 4,
    "QAdam, 8 bits": 2 * 15 / 16 / 4,
    "QAdam, 1 bit": 2 * 15 / 16 / 32,
    "decentralized, shift_one": 1.0,
    "decentralized, all": 2 * 15 / 16,
    "LPD": 2 / 4,
    "async": 2 * 15 / 16,
}


def to_markdown() -> str:
    """Write the page of all tables; figures stand beside it, in ``figures/``."""
    numbers, public = counts.read(), tables.published()
    found = {name: tables.compared(name) for name in tables.TABLES}
    flops = {k: w["flops_per_sample"] for k, w in numbers["workloads"].items()}
    bert, vgg = 6 * flops["bert_large"] / 0.526e12, 32 * flops["vgg16"] / 0.142e12
    head = _HEAD.format(
        source=public["source"],
        reading=public["reading"],
        cluster=public["cluster"],
        topology=TOPOLOGY,
        sent="\n".join(_sent(numbers)),
        planned="\n".join(_planned(numbers)),
        workloads="\n".join(_workloads(numbers)),
        bert=bert,
        share=bert / 15.7,
        vgg=vgg,
        heads=" | ".join(_OVERVIEW),
        overview="\n".join(_overview(found)),
    )
    parts = (_section(tables.load(name), found[name]) for name in tables.TABLES)
    return head + "".join(parts)


def _sent(numbers: Mapping[str, Any]) -> Iterable[str]:
    for workload, programs in numbers["programs"].items():
        count = numbers["workloads"][workload]["parameters"]
        for exchange, sent in programs.items():
            counted, formula = sent["bytes"], _FORMULAS[exchange] * 4 * count
            yield (
                f"| {workload} | {count:,} | {exchange} | {counted / 1e6:,.1f} | "
                f"{formula / 1e6:,.1f} | {sent['messages']:g} |"
            )


def _planned(numbers: Mapping[str, Any]) -> Iterable[str]:
    for cluster, programs in numbers["planned"].items():
        for exchange, sent in programs.items():
            share = sent["bytes"] / numbers["programs"]["vgg16"][exchange]["bytes"]
            yield (
                f"| {cluster} | {exchange} | {sent['bytes'] / 1e6:,.1f} | "
                f"{share:.6g} | {sent['messages']:g} |"
            )


def _workloads(numbers: Mapping[str, Any]) -> Iterable[str]:
    from bagua_jax.experiments.studies.models import WORKLOADS

    for name, facts in numbers["workloads"].items():
        workload = WORKLOADS[name]
        yield (
            f"| {workload.title} | {facts['parameters']:,} | {facts['leaves']} | "
            f"{facts['flops_per_sample'] / 1e9:,.0f} | {workload.sizes} |"
        )


_OVERVIEW = (
    "table",
    "cells",
    "constants",
    "median",
    "mean",
    "90th",
    "max",
    "one algorithm left out: median, max",
    "nothing fitted: median, max",
    "order of pairs",
)


def _summary(table: Table, result: Comparison) -> list[str]:
    """Return a row of the overview, without the table's name; errors in %."""
    fitted, out = result.fitted, result.algorithm_out
    free = next(iter(result.baselines.values()))
    values = (fitted.median, fitted.mean, fitted.percentile_90, fitted.maximum)
    right, pairs, _ = result.orders
    return [
        f"{fitted.cells}",
        ", ".join(table.constants[key].symbol for key in result.constants),
        *(f"{100 * value:.1f}" for value in values),
        f"{100 * out.median:.1f}, {100 * out.maximum:.0f}",
        f"{100 * free.median:.1f}, {100 * free.maximum:.0f}",
        f"{right} of {pairs}",
    ]


def _overview(found: Mapping[str, Comparison]) -> Iterable[str]:
    for name, result in found.items():
        parts = (f"[{name}](#{name})", *_summary(tables.load(name), result))
        yield f"| {' | '.join(parts)} |"


def _section(table: Table, found: Comparison) -> str:
    systems = list(table.published)
    lines = [
        f"\n## {table.name}",
        f"\n{table.title}. Predicted / published (error in %); {table.note}.",
        f"\n![{table.title}](figures/reproduce_{table.name}.png)\n",
        f"| {table.row_unit} | {' | '.join(systems)} |",
        "|---:" * (len(systems) + 1) + "|",
    ]
    for i, row in enumerate(table.rows):
        cells = (
            _cell(found.predicted[i, j], table.cells[i, j])
            + "\\*" * _flagged(table, system, row)
            for j, system in enumerate(systems)
        )
        lines.append(f"| {row:g} | {' | '.join(cells)} |")
    for label, select in (("median", 1), ("max", 4)):
        parts = (f"{100 * found.by_system[s][select]:.0f}" for s in systems)
        lines.append(f"| {label} % | {' | '.join(parts)} |")
    lines.append("\n\\* Named exceptions:\n")
    for (system, row), reason in table.exceptions.items():
        where = "" if row is None else f" at {row:g} {table.row_unit}"
        lines.append(f"- {system}{where}: {reason}.")
    for system, reason in table.left_out.items():
        lines.append(f"- {system} is neither fitted nor summarized: {reason}.")
    lines.append("\nFitted here:\n")
    lines += [f"- {line}." for line in _constants(table, found)]
    lines.append("\nStated:\n")
    lines += [f"- {line}." for line in table.stated]
    lines.append(
        "\n| errors in % | median | mean | 90th | max | cells |\n"
        "|---|---:|---:|---:|---:|---:|"
    )
    for label, errors in _errors(table, found):
        wide = _percent(errors) + ("" if errors else " | | | |")
        lines.append(f"| {label} | {wide} |")
    right, pairs, wrong = found.orders
    lines.append(
        f"\nOrder of pairs that differ by more than 5 % in public: {right} of {pairs} "
        "right."
    )
    if wrong:
        missed = "; ".join(
            f"{first} below {second} at {row:g} {table.row_unit}"
            for row, first, second in wrong
        )
        lines.append(f"Wrong (as published): {missed}.")
    if found.crossovers:
        head = "curves cross (straight lines between rows)"
        lines.append(f"\n| {head} | published | predicted |\n|---|---|---|")
    for pair, (public, own) in found.crossovers.items():
        places = (_places(public, table.row_unit), _places(own, table.row_unit))
        lines.append(f"| {pair} | {places[0]} | {places[1]} |")
    lines.append(
        "\nDecided after seeing the data (numbers of the study that precedes this "
        "page, not computed again):\n"
    )
    lines += [f"- {choice}" for choice in table.choices]
    lines.append("\nWhere the model misses:\n")
    lines += [f"- {miss}" for miss in table.misses]
    return "\n".join(lines) + "\n"
