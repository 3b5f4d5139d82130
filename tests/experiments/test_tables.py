"""Tables: whole on any width, and made in one place."""

import io
import random
import re
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from bagua_jax import experiments
from bagua_jax.experiments.tables.table import Table


def printed(table: Table, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue().splitlines()


NAMES = [
    "gradient_allreduce",
    "compressed_mean(compressor=qsgd(levels=7, bucket=512))",
    "low_precision_decentralized",
    "x" * 70,
    "",
]


def made(seed: int) -> tuple[Table, list[list[str]]]:
    rng = random.Random(seed)
    count = rng.randrange(1, 12)
    longest = rng.choice([5, 9, 16])

    def number() -> str:
        return f"{rng.randrange(10 ** rng.randrange(1, longest))}/{rng.random():.3g}"

    rows = [
        [rng.choice(NAMES), *(number() for _ in range(count))]
        for _ in range(rng.randrange(1, 6))
    ]
    headers = ["algorithm", *(f"column {i} of\nbytes/step" for i in range(count))]
    words = []
    if rng.random() < 0.5:
        words = ["why"]
        headers.append("why")
        rows = [[*row, "words that explain a row, one after the other"] for row in rows]
    return Table(headers, rows, words=words), rows


@pytest.mark.parametrize("width", [34, 40, 60, 80, 120, 200])
@pytest.mark.parametrize("seed", range(12))
def test_no_number_and_no_name_is_cut(seed, width):
    table, rows = made(seed)
    lines = printed(table, width)
    assert all(cell_len(line) <= width for line in lines)
    assert "…" not in "".join(lines)
    rule = next(i for i, line in enumerate(lines) if set(line) == {"─"})
    left = re.findall(r"\S+", "\n".join(lines[rule + 1 :]))
    for row in rows:
        for cell in row[1:]:
            for part in cell.split():
                assert part in left  # on one line, with blanks around it
                left.remove(part)
    # A name may be folded, and is then whole from line to line.
    assert "".join(left) == "".join(re.sub(r"\s", "", row[0]) for row in rows)


def test_a_table_that_fits_has_one_line_for_each_row():
    rows = [["a", "1", "words"], ["bb", "22.5", "more words here"]]
    table = Table(["", "n", "why"], rows, words={"why"}, title="title")
    assert printed(table, 80) == [
        "title",
        "       n  why",
        "─" * 25,
        "a      1  words",
        "bb  22.5  more words here",
    ]


def test_rows_go_on_under_headers_folded_alike():
    rows = [["one", "1.25 / 1", "2.5 / 2", "3 / 3"], ["compressor(ratio=1)", "4", "5"]]
    assert printed(Table(["system", "a b", "c", "d"], rows), 32) == [
        "system            a b        c",
        "                    d",
        "──────────────────────────────",
        "one          1.25 / 1  2.5 / 2",
        "                3 / 3",
        "compressor(         4        5",
        "ratio=1)",
    ]


def test_words_without_room_beside_the_numbers_stand_under_them():
    rows = [["a", "123456", "words that explain this row to readers"]]
    assert printed(Table(["", "bytes", "why"], rows, words={"why"}), 30) == [
        "    bytes",
        "  why",
        "──────────────────────────────",
        "a  123456",
        "  words that explain this row",
        "  to readers",
    ]


def test_several_columns_may_name_a_row():
    rows = [["bytegrad", "10gbit", "1", "2"], ["", "25gbit", "3", "4"]]
    lines = printed(Table(["algorithm", "network", "bytes", "ms"], rows, keys=2), 27)
    assert lines[-4:] == [
        "bytegrad   10gbit       1",
        "                        2",
        "           25gbit       3",
        "                        4",
    ]


def test_cells_are_no_markup_and_keep_their_style():
    table = Table(["", "x"], [["[dim]a[/]", Text("9 *", "bold red")]])
    console = Console(
        file=io.StringIO(), width=40, force_terminal=True, color_system="standard"
    )
    console.print(table)
    said = console.file.getvalue()
    assert "[dim]a[/]" in said and "\x1b[1;31m9 *" in said


def test_on_an_ascii_terminal_the_rule_is_ascii():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Console(file=file, width=40).print(Table(["", "n"], [["a", "1"]]))
    file.flush()
    assert b"----" in file.buffer.getvalue()


def test_all_tables_are_made_in_one_place():
    root = Path(experiments.__path__[0])
    others = [p for p in root.rglob("*.py") if p.name != "tables.py"]
    assert len(others) > 40
    for path in others:
        text = path.read_text("utf-8")
        made = re.findall(r"rich\.table import (\w+)|import (rich\.table)", text)
        assert set(made) <= {("Column", "")}, path
