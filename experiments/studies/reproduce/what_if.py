"""Which algorithm would be fastest where, on hardware of today: predictions.

The exchange of every algorithm of the library is compiled over BERT-Large's parameters
on 16 nodes of 8 devices (``counts.json``); networks and compute times are stated.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from bagua_jax.algorithms import REGISTRY
from bagua_jax.entries import Family, Late
from bagua_jax.experiments.studies.reproduce import counts
from bagua_jax.network import GBIT, Cost, Link, step_time

__all__ = [
    "FAMILIES",
    "MACHINES",
    "PLACES",
    "Late",
    "Machine",
    "Overlap",
    "Place",
    "communication",
    "compute",
    "draw",
    "lateness",
    "predict",
    "seconds",
    "to_json",
    "to_markdown",
]

Overlap = Literal["none", "transfer"]

BATCH = 32  # sequences of 384 tokens a GPU and step; our choice
UTILISATION = 0.4  # of the peak; our choice, nothing measured
TCP = 1448 / 1538


class Machine(NamedTuple):
    """A node of eight GPUs: numbers of data sheets.

    Attributes:
        peak: FLOP/s of one GPU in bfloat16, dense.
        inside: from GPU to GPU of the node.
    """

    peak: float
    inside: Link


class Place(NamedTuple):
    """A network between nodes.

    Attributes:
        between: from node to node, through one port.
        ports: cards of a node.
    """

    between: Link
    ports: int


MACHINES: Mapping[str, Machine] = {
    "H100": Machine(989e12, Link(3e-6, 450e9, goodput=0.8)),
    "B200": Machine(2250e12, Link(3e-6, 900e9, goodput=0.8)),
}
"""Nodes of 8 by name: peaks and NVLink of the data sheets, 3 us and 0.8 stated."""


def _ethernet(gbits: float, ports: int, latency: float = 20e-6) -> Place:
    return Place(Link(latency, gbits * GBIT, goodput=TCP), ports)


PLACES: Mapping[str, Place] = {
    "1 Gbit/s, 30 ms": _ethernet(1, 1, 30e-3),
    "10 Gbit/s a node": _ethernet(10, 1),
    "25 Gbit/s a node": _ethernet(25, 1),
    "100 Gbit/s a node": _ethernet(100, 1),
    "400 Gbit/s a node": _ethernet(400, 1),
    "100 Gbit/s a GPU": _ethernet(100, 8),
    "400 Gbit/s a GPU": _ethernet(400, 8),
}
"""Networks by name; 20 us where nothing is said."""

FAMILIES: Mapping[Family, str] = {
    "mean": "every step, replicas equal",
    "gossip": "every step, gossip",
    "local steps": "rarely",
}
"""What a fair comparison needs to know of each algorithm: how much it relaxes."""


def lateness(algorithm: str, options: Mapping[str, Any]) -> Late | None:
    """Tell how late an exchange may come.

    Args:
        algorithm: its name in the registry.
        options: its arguments, as a config writes them.

    Returns:
        ``None`` where it is needed in its own step.

    Example:
        >>> lateness("async_model_average", {"local_steps": 8, "staleness": 4})
        Late(period=8, steps=4, inside=True)
        >>> lateness("bytegrad", {})
    """
    entry = REGISTRY[algorithm]
    signature = inspect.signature(entry.factory)
    defaults = {name: p.default for name, p in signature.parameters.items()}
    return entry.late(defaults | dict(options))


def compute(machine: Machine) -> float:
    """State the seconds of a step without communication: operations over utilisation.

    BERT-Large, forward and backward, counted from its program; not measured.
    """
    flops = counts.read()["workloads"][counts.LIBRARY]["flops_per_sample"]
    return BATCH * flops / (UTILISATION * machine.peak)


def communication(
    sent: Mapping[str, float], machine: Machine, place: Place
) -> tuple[Cost, Cost]:
    r"""Predict the time of a step's exchange between nodes, and inside them.

    .. math::
        \alpha h + \frac{V}{p \beta}, \qquad
        \alpha_{in} h_{in} + \frac{V_{in}}{\beta_{in}}

    Args:
        sent: as :class:`~bagua_jax.experiments.studies.reproduce.counts.Sent`.
        machine: the nodes.
        place: the network between them.
    """
    link, inside = place.between, machine.inside
    return (
        Cost(sent["hops"] * link.latency, sent["bytes"] / (place.ports * link.rate)),
        Cost(sent["inside_hops"] * inside.latency, sent["inside"] / inside.rate),
    )


def seconds(
    sent: Mapping[str, float],
    machine: Machine,
    place: Place,
    *,
    late: Late | None = None,
    overlap: Overlap = "none",
    codec: float = 0.0,
) -> float:
    r"""Predict the time of a step.

    Where an exchange is needed in its own step, by the rule of
    :func:`bagua_jax.network.step_time`. One that may take s steps, once in P, waits for
    what these steps do not cover: their time without it, w, plus
    :math:`\max(0, P k - s w) / P`, with k the exchange's mean seconds a step.

    Args:
        sent: what a step sends.
        machine: the nodes.
        place: the network.
        late: as :func:`lateness` gives it.
        overlap: ``"none"``: the exchange follows the backward pass, as packed buckets
            do; ``"transfer"``: bytes hide behind compute, latencies do not.
        codec: seconds a step of compressing and decompressing. Zero on the page,
            because they have not been measured on these GPUs: put yours here.
    """
    costs = communication(sent, machine, place)
    num_late = 0 if late is None else 2 if late.inside else 1
    hidden, prompt = costs[:num_late], costs[num_late:]
    step = step_time(
        compute(machine) + codec,
        sum(cost.transfer for cost in prompt),
        latency=sum(cost.latency for cost in prompt),
        overlap=overlap,
    )
    if late is None:
        return step
    waiting = sum(cost.seconds for cost in hidden) - late.steps * step / late.period
    return step + max(0.0, waiting)


class Prediction(NamedTuple):
    """Step times of every configuration, [rows, machines x places] seconds."""

    labels: tuple[str, ...]
    families: tuple[str, ...]
    columns: tuple[tuple[str, str], ...]  # machine, place
    compute: np.ndarray  # [columns]
    seconds: np.ndarray  # [rows, columns]

    @property
    def slowdown(self) -> np.ndarray:
        """Step time over the compute time of a step."""
        return self.seconds / self.compute

    @property
    def fastest(self) -> np.ndarray:
        """Mark the fastest of each family in each column, and those within 0.5 %."""
        own = np.array(self.families)
        marks = np.zeros(self.seconds.shape, bool)
        for family in set(self.families):
            rows = own == family
            best = self.seconds[rows].min(axis=0)
            marks[rows] = self.seconds[rows] <= 1.005 * best
        return marks


def predict(overlap: Overlap = "none") -> Prediction:
    """Predict every configuration of the survey everywhere, families together."""
    from bagua_jax.experiments.tables import survey

    library = counts.read()["library"]
    order = list(FAMILIES)
    rows = sorted(survey.SURVEY, key=lambda row: order.index(row.entry.family))
    columns = [(machine, place) for machine in MACHINES for place in PLACES]
    times = [
        [
            seconds(
                library[survey.label(row)],
                MACHINES[machine],
                PLACES[place],
                late=lateness(row.algorithm, row.options),
                overlap=overlap,
            )
            for machine, place in columns
        ]
        for row in rows
    ]
    return Prediction(
        labels=tuple(survey.label(row) for row in rows),
        families=tuple(FAMILIES[row.entry.family] for row in rows),
        columns=tuple(columns),
        compute=np.array([compute(MACHINES[machine]) for machine, _ in columns]),
        seconds=np.array(times),
    )


# --- files ----------------------------------------------------------------------------

_CAVEAT = (
    "Fast is not the same as learns: what a relaxation costs in steps is not in these "
    "numbers."
)


def to_json(found: Prediction, overlap: Overlap) -> dict[str, Any]:
    """Return a prediction as JSON would have it."""
    return {
        "prediction": True,
        "caveat": _CAVEAT,
        "overlap": overlap,
        "workload": counts.LIBRARY,
        "batch_per_gpu": BATCH,
        "utilisation": UTILISATION,
        "columns": [
            {"machine": machine, "network": place, "compute_s": float(work)}
            for (machine, place), work in zip(found.columns, found.compute, strict=True)
        ],
        "step_s": dict(zip(found.labels, found.seconds.tolist(), strict=True)),
    }


def number(value: float) -> str:
    """Write a slowdown.

    >>> number(1.004), number(12.34), number(1234.5)
    ('1.00', '12.3', '1234')
    """
    return (
        f"{value:.2f}"
        if value < 10
        else f"{value:.1f}"
        if value < 100
        else f"{value:.0f}"
    )


def draw(found: Prediction, path: Path) -> None:
    """Draw the heat map: how many times its compute a step takes, everywhere."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    from bagua_jax.experiments import studies

    slow, fastest = found.slowdown, found.fastest
    with plt.style.context(studies.STYLE):
        figure, axes = plt.subplots(figsize=(11, 0.245 * len(slow) + 1.6))
        axes.grid(False)
        image = axes.imshow(
            slow, cmap="Greys", norm=LogNorm(1, 100), aspect="auto", alpha=0.9
        )
        for i, j in np.ndindex(*slow.shape):
            wins = bool(fastest[i, j])
            axes.text(
                j,
                i,
                number(float(slow[i, j])) + " *" * wins,
                ha="center",
                va="center",
                fontsize=7,
                fontweight="bold" if wins else "normal",
                color="white" if slow[i, j] > 15 else "black",
            )
        axes.set_yticks(range(len(slow)), found.labels, fontsize=7)
        places = [place for _, place in found.columns]
        axes.set_xticks(range(len(places)), places, rotation=35, ha="right", fontsize=8)
        edges = [i for i in range(1, len(slow)) if _edge(found.families, i)]
        for edge in edges:
            axes.axhline(edge - 0.5, color="black", linewidth=1.2)
        machines = list(MACHINES)
        for k, machine in enumerate(machines):
            axes.text(
                (k + 0.5) * len(PLACES) - 0.5,
                -0.8,
                f"16 nodes of 8 {machine}, compute "
                f"{1e3 * compute(MACHINES[machine]):.0f} ms (stated)",
                ha="center",
                va="bottom",
                fontsize=9,
            )
        axes.axvline(len(PLACES) - 0.5, color="black", linewidth=1.2)
        axes.tick_params(length=0)
        bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=50)
        bar.set_label(
            "predicted step time / compute; *: fastest of its family, to 0.5 %"
        )
        studies.write(figure, path)
        plt.close(figure)


def _edge(families: Sequence[str], i: int) -> bool:
    return families[i] != families[i - 1]


_PAGE = """\
# What if: every algorithm on hardware of today

*Written by `bagua-jax what-if --docs docs`; do not edit it.*

**Everything on this page is a prediction from stated constants**; no number was measured on
these machines. {caveat} A row that is fast and learns half as much a step is slow. The
studies of [studies.md](studies.md) and the claims of `make published` are about that other
half.

- **What is sent** is counted from compiled programs: the update of every configuration of
  [algorithms.md](algorithms.md) over BERT-Large's {parameters:,} parameters on 16 nodes of 8
  devices, hierarchical: a node averages in float32 and the nodes are the workers. The model
  travels as one bucket, so that each phase pays its latency once (`bucket_bytes`).
- **Compute** is stated, not measured: {batch} sequences of 384 tokens a GPU, {gflops:,.0f}
  GFLOP each (forward and backward, counted from the program), at {utilisation:.0%} of the
  dense bfloat16 peak: {compute}.
- **Networks**: {networks}. Ethernet with TCP's goodput 1448/1538, 20 us one way where nothing
  is said. "A node" means one card shared by eight GPUs, "a GPU" one card each. Inside a node
  NVLink by its data sheet ({nvlink}), goodput 0.8 and 3 us.
- **Time** is compute + latency + bytes, none hidden: what packed buckets at the end of the
  backward pass do. An exchange that its algorithm needs later hides behind the compute of
  those steps: `delayed_gradients`, `overlapped_push`, `delayed_choco`, `decentralized`
  (which mixes the weights of before the step), `async_model_average`, `streaming_diloco`. The
  average inside the node is not late in `delayed_choco` and `overlapped_push`. The last table
  lets bytes hide for all.
- **Left out**: codecs (their time on these GPUs is not measured; the argument `codec` of
  `experiments.reproduce.what_if.seconds` takes yours), stragglers, congestion, and optimizer
  work. What is compressed hardest here would gain least from a fast network once its codec
  is counted.

![step time over compute, all algorithms](figures/what_if.png)

## The fastest of each family, nothing hidden

Predicted step, in multiples of its compute. *Rarely* communicates every few steps; the exact
mean in float32 stands first, to compare with. *Alike* are those within 0.5 %.

| machine | network | exact mean | {heads} |
|---|---|---:|{rule}
{winners}

## The same where bytes hide behind compute

The overlap of a perfect schedule: only latencies are exposed, unless bytes take longer than
compute.

| machine | network | exact mean | {heads} |
|---|---|---:|{rule}
{overlapped}

## What to read off

{readings}
"""  # noqa: E501


def to_markdown() -> str:
    """Write the page."""
    numbers = counts.read()["workloads"][counts.LIBRARY]
    families = list(FAMILIES.values())
    plain, hidden = predict("none"), predict("transfer")
    return _PAGE.format(
        caveat=_CAVEAT,
        parameters=numbers["parameters"],
        batch=BATCH,
        gflops=numbers["flops_per_sample"] / 1e9,
        utilisation=UTILISATION,
        compute="; ".join(
            f"{name} {machine.peak / 1e12:,.0f} TFLOP/s, "
            f"{1e3 * compute(machine):.1f} ms"
            for name, machine in MACHINES.items()
        ),
        networks="; ".join(PLACES),
        nvlink=", ".join(
            f"{name} {machine.inside.bandwidth / 1e9:.0f} GB/s each way"
            for name, machine in MACHINES.items()
        ),
        heads=" | ".join(families),
        rule="---|" * len(families),
        winners="\n".join(_winners(plain, families)),
        overlapped="\n".join(_winners(hidden, families)),
        readings="\n".join(f"- {line}" for line in _readings(plain, hidden)),
    )


def _winners(found: Prediction, families: Sequence[str]) -> Iterable[str]:
    mean = found.labels.index("gradient_allreduce")
    for j, (machine, place) in enumerate(found.columns):
        cells = [number(found.slowdown[mean, j])]
        for family in families:
            marked = [
                i
                for i in np.flatnonzero(found.fastest[:, j]).tolist()
                if found.families[i] == family
            ]
            first = min(marked, key=lambda i: found.seconds[i, j])
            alike = f" and {len(marked) - 1} alike" * (len(marked) > 1)
            time = number(found.slowdown[first, j])
            cells.append(f"{time} `{found.labels[first]}`{alike}")
        yield f"| {machine} | {place} | {' | '.join(cells)} |"


def _readings(plain: Prediction, hidden: Prediction) -> Iterable[str]:
    """Say what the numbers say: every sentence is computed."""

    def of(found: Prediction, label: str, column: tuple[str, str]) -> float:
        row, place = found.labels.index(label), found.columns.index(column)
        return float(found.slowdown[row, place])

    for machine in MACHINES:
        slow, fast = (machine, "10 Gbit/s a node"), (machine, "400 Gbit/s a GPU")
        mean, byte = "gradient_allreduce", "bytegrad"
        yield (
            f"{machine}: 8 bits instead of 32 make a step "
            f"{of(plain, mean, slow) / of(plain, byte, slow):.1f} times faster at 10 "
            f"Gbit/s a node and {of(plain, mean, fast) / of(plain, byte, fast):.2f} "
            "times at 400 Gbit/s a GPU, before any codec is paid."
        )
    geo = [j for j, (_, place) in enumerate(plain.columns) if "30 ms" in place]
    for j in geo:
        machine = plain.columns[j][0]
        near = [
            label
            for label, value in zip(plain.labels, plain.slowdown[:, j], strict=True)
            if value < 2
        ]
        yield (
            f"{machine} between regions: {len(near)} of {len(plain.labels)} "
            "configurations stay within twice their compute"
            + (f": {', '.join(f'`{label}`' for label in near)}." if near else ".")
        )
    hides = [
        sum(bool(value < 1.05) for value in hidden.slowdown[:, j])
        for j in range(len(hidden.columns))
    ]
    for (machine, place), count in zip(hidden.columns, hides, strict=True):
        if place == "400 Gbit/s a GPU":
            yield (
                f"{machine} at {place}: with bytes hidden, {count} of "
                f"{len(hidden.labels)} configurations are within 5 % of compute alone: "
                "there the network is no reason to relax anything."
            )
