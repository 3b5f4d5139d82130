"""``bagua-jax what-if``: which algorithm would be fastest where."""

import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bagua_jax.experiments.commands import base

__all__ = ["WhatIf", "main"]


@dataclass(frozen=True)
class WhatIf:
    """Predict every algorithm's step on clusters of today, from compiled exchanges.

    BERT-Large on 16 nodes of 8 H100 or B200, from 1 Gbit/s and 30 ms to 400 Gbit/s a
    GPU. Prints step time over compute, and writes JSON and a heat map.
    """

    overlap: Literal["none", "transfer"] = "none"
    """What hides behind compute: nothing, or the bytes (never the latencies)."""
    output: Path = Path("runs/what_if")
    """Folder of the JSON file and the figure."""
    docs: Path | None = None
    """Write the page what_if.md and its figure (nothing hidden) into this folder."""


def main(command: WhatIf) -> int:
    """Print the table, write the files."""
    from bagua_jax.experiments.runs import folders
    from bagua_jax.experiments.studies.reproduce import what_if
    from bagua_jax.experiments.tables.table import Table

    folders.require_writable(command.output)
    found = what_if.predict(command.overlap)
    console = base.console()
    for machine in what_if.MACHINES:
        at = [j for j, column in enumerate(found.columns) if column[0] == machine]
        title = f"16 nodes of 8 {machine}: predicted step time / compute"
        rows = []
        for i, label in enumerate(found.labels):
            marks = ("*" if found.fastest[i, j] else " " for j in at)
            values = (what_if.number(found.slowdown[i, j]) for j in at)
            rows.append([label, *map(operator.add, values, marks)])
        headers = ["algorithm", *(found.columns[j][1] for j in at)]
        console.print(Table(headers, rows, title=title))
    console.print(
        "*: the fastest of its family, to 0.5 %. Everything here is predicted."
    )
    folders.write_json(
        command.output / "what_if.json", what_if.to_json(found, command.overlap)
    )
    what_if.draw(found, command.output / "what_if.png")
    if command.docs is not None:
        folders.require_writable(command.docs / "figures")
        what_if.draw(what_if.predict(), command.docs / "figures" / "what_if.png")
        (command.docs / "what_if.md").write_text(what_if.to_markdown(), "utf-8")
        console.print(command.docs / "what_if.md")
    console.print(f"Files are in {command.output}.", highlight=False)
    return 0
