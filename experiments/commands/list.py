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
    from rich.text import Text

    from bagua_jax.experiments.tables import lists
    from bagua_jax.experiments.tables.table import Table

    console = base.console()
    kinds = lists.LISTS if command.what == "all" else [command.what]
    for kind in kinds:
        facts, caption = lists.LISTS[kind].facts, lists.LISTS[kind].caption
        rows = [
            [Text(row.name, "bold"), *row.facts, row.summary]
            for row in lists.describe(kind)
        ]
        headers = [kind, *facts, "what it does"]
        console.print(Table(headers, rows, words={"what it does"}, left=facts))
        console.print(f"[dim]{caption}\n" if caption else "", highlight=False)
    return 0
