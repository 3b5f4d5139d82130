"""``bagua-jax list``: what configs can name."""

from dataclasses import dataclass
from typing import Literal

import tyro

from bagua_jax.experiments.commands import base

__all__ = ["List", "main"]


@dataclass(frozen=True)
class List:
    """List what configs can name, with one line on each."""

    what: tyro.conf.Positional[
        Literal["all", "algorithms", "compressors", "topologies", "tasks", "configs"]
    ] = "all"
    """One kind, or all."""


def main(command: List) -> int:
    """Print the lists."""
    from rich.table import Table

    from bagua_jax.experiments import catalog

    console = base.console()
    kinds = catalog.LISTS if command.what == "all" else [command.what]
    for kind in kinds:
        facts, caption = catalog.LISTS[kind].facts, catalog.LISTS[kind].caption
        table = Table(title=kind, title_justify="left", box=None)
        table.add_column("", style="bold", no_wrap=True, min_width=27)
        for header in facts:
            table.add_column(header, no_wrap=True)
        table.add_column("")
        for row in catalog.describe(kind):
            table.add_row(row.name, *row.facts, row.summary)
        console.print(table)
        console.print(f"[dim]{caption}\n" if caption else "", highlight=False)
    return 0
