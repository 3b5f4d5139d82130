"""What a run shows while it works: a live bar on a terminal, plain lines elsewhere."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

__all__ = ["Show", "progress"]

Show = Callable[[int, float, float, str], None]
"""``(step, loss, steps per second, note)``."""


@contextlib.contextmanager
def progress(console: Console, label: str, done: int, steps: int) -> Iterator[Show]:
    """Show how a run goes.

    Args:
        console: where; a live bar if it is a terminal that can redraw, else a line for
            each tenth.
        label: of the run.
        done: steps taken before.
        steps: of the whole run.

    Yields:
        A function to call now and then.
    """
    if not console.is_terminal or console.is_dumb_terminal:
        yield _plain_lines(console, label, done, steps)
        return
    counts = len(f"{steps}/{steps}")
    columns = (  # the last gives way where the terminal is narrow
        TextColumn("[bold]{task.description}", table_column=Column(min_width=27)),
        BarColumn(bar_width=16, table_column=Column(min_width=8)),
        MofNCompleteColumn(table_column=Column(min_width=counts, no_wrap=True)),
        TextColumn(
            "{task.fields[numbers]}",
            table_column=Column(no_wrap=True, overflow="ellipsis"),
        ),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(label, total=steps, completed=done, numbers="")

        def show(step: int, loss: float, rate: float, note: str) -> None:
            numbers = f"loss {loss:.4f}  {rate:.1f} steps/s  {note}"
            bars.update(task, completed=step, numbers=numbers)

        yield show


def _plain_lines(console: Console, label: str, done: int, steps: int) -> Show:
    tenth = done * 10 // steps

    def show(step: int, loss: float, rate: float, note: str) -> None:
        nonlocal tenth
        if step * 10 // steps > tenth:
            tenth = step * 10 // steps
            console.print(
                f"{label}: step {step}/{steps}  loss {loss:.4f}  "
                f"{rate:.1f} steps/s  {note}".rstrip(),
                highlight=False,
                soft_wrap=True,
            )

    return show
