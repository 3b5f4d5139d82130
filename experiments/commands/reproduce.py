"""``bagua-jax reproduce``: the public tables beside predictions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from bagua_jax.experiments.commands import base
from bagua_jax.experiments.spec.config import ConfigError

__all__ = ["Reproduce", "main"]


@dataclass(frozen=True)
class Reproduce:
    """Predict BAGUA's public tables from what our compiled programs send.

    Prints every cell beside the published one, with errors, and writes a JSON file and
    a figure for each table. Nothing is trained, and nothing but this machine is needed.
    """

    table: tyro.conf.Positional[
        Literal["all", "bandwidth", "latency", "throughput", "scaling"]
    ] = "all"
    """Which table."""
    output: Path = Path("runs/reproduce")
    """Folder of the JSON files and figures."""
    docs: Path | None = None
    """Write the page reproduce.md and its figures into this folder, too."""


def main(command: Reproduce) -> int:
    """Print the tables, write the files."""
    if command.docs is not None and command.table != "all":
        raise ConfigError(
            f"--docs: the page holds all tables, and {command.table} was named alone. "
            "Leave the table out."
        )
    from bagua_jax.experiments.runs import folders
    from bagua_jax.experiments.studies.reproduce import page, tables

    folders.require_writable(command.output)
    console = base.console()
    console.print(f"[bold]Predictions.[/] {page.TOPOLOGY}", highlight=False)
    source = tables.published()
    console.print(f"Published: {source['source']}; {source['reading']}.")
    names = tables.TABLES if command.table == "all" else [command.table]
    for name in names:
        table, found = tables.load(name), tables.compared(name)
        page.show(table, found, console)
        folders.write_json(command.output / f"{name}.json", page.to_json(table, found))
        page.draw(table, found, command.output / f"{name}.png")
        if command.docs is not None:
            folders.require_writable(command.docs / "figures")
            figure = command.docs / "figures" / f"reproduce_{name}.png"
            page.draw(table, found, figure)
    if len(names) > 1:
        page.overview({name: tables.compared(name) for name in names}, console)
    if command.docs is not None:
        (command.docs / "reproduce.md").write_text(page.to_markdown(), "utf-8")
        console.print(command.docs / "reproduce.md")
    console.print(f"Files are in {command.output}.", highlight=False)
    return 0
