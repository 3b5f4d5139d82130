"""Tables of the command line: a number or a row's name is never cut, on any width.

Every command makes its tables here. What does not fit on one line of the terminal goes
on over several lines of the same row, under the column headers folded alike::

                1 Gbit/s         2 Gbit/s
                4 Gbit/s
    ----------------------------------------
    ByteGrad    748 / 730 (+2)   374 / 365 (+2)
                187 / 180 (+4)
"""

import re
from collections.abc import Collection, Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

__all__ = ["Table"]

_GAP = 2  # blanks between columns
_INDENT = 2  # of what goes on in a further line, where it stands under a name
_NAME_SHARE = 0.45  # of the width: a longer name is folded where lines are short
_SHORTEST_NAME = 6
_WORDS = 30  # columns that words need to stand beside the numbers


class Table:
    """A table that ``rich`` prints whole on any width.

    Args:
        headers: of the columns, wrapped at blanks as their cells allow.
        rows: cells as they are read (no markup), or styled.
        title: above it.
        keys: how many of the first columns name a row; at the left of every line.
        words: headers of columns of text, which may be wrapped at blanks.
        left: headers of columns that stand at the left of their place, like keys and
            words; numbers stand at the right.

    Example:
        >>> import io
        >>> table = Table(["", "loss", "steps"], [["bytegrad", "0.25", "1000"]])
        >>> console = Console(file=io.StringIO(), width=16)
        >>> console.print(table)
        >>> shown = console.file.getvalue()
        >>> "0.25" in shown and "1000" in shown  # folded, never cut
        True
    """

    def __init__(
        self,
        headers: Sequence[str],
        rows: Iterable[Sequence[str | Text]],
        *,
        title: str = "",
        keys: int = 1,
        words: Collection[str] = (),
        left: Collection[str] = (),
    ):
        self.headers = list(headers)
        self.title = title
        self.rows = [[_text(cell) for cell in row] for row in rows]
        for row in self.rows:  # what a row leaves out at its end is empty
            row += [Text() for _ in self.headers[len(row) :]]
        self._keys = keys
        self._words = [i for i, h in enumerate(headers) if h in words]
        self._left = {*range(keys), *self._words}
        self._left |= {i for i, h in enumerate(headers) if h in left}

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        """Yield lines of at most ``options.max_width``, where any layout has such."""
        layout = _Layout(self, options.max_width)
        if self.title:
            yield Text(self.title, "italic")
        heads = [
            _wrapped(h, w) for h, w in zip(self.headers, layout.widths, strict=True)
        ]
        if any(self.headers):
            yield from layout.lines(heads, bottom=True)
            yield Text(("-" if options.ascii_only else "─") * layout.width)
        for row in self.rows:
            cells = [[cell] for cell in row]
            for i, width in layout.folded.items():
                if i in self._words:
                    cells[i] = list(row[i].wrap(console, width)) or [Text()]
                else:
                    cells[i] = _folded(row[i], width)
            yield from layout.lines(cells)


def _text(cell: str | Text) -> Text:
    text = Text(cell) if isinstance(cell, str) else cell.copy()
    text.no_wrap, text.end = False, ""
    return text


def _folded(name: Text, width: int) -> list[Text]:
    """Fold a name behind brackets, commas and blanks, where it has them."""
    cuts, begin, fits = [], 0, 0
    for end in (m.end() for m in re.finditer(r"[^(,\s]*(?:[(,]\s*|\s+|$)", name.plain)):
        if cell_len(name.plain[begin:end].rstrip()) > width:
            if fits > begin:
                cuts.append(fits)
                begin = fits
            while cell_len(name.plain[begin:end].rstrip()) > width:
                begin += width
                cuts.append(begin)
        fits = end
    lines = list(name.divide(cuts))
    for line in lines:
        line.rstrip()
    return lines


def _wrapped(header: str, width: int) -> list[Text]:
    """Wrap a header at blanks, and nowhere else."""
    lines: list[str] = []
    for word in header.split():
        if lines and cell_len(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return [Text(line, "bold") for line in lines] or [Text()]


class _Layout:
    """Where columns stand: bands of columns, one under the other, and words beside.

    Attributes:
        widths: of every column.
        folded: columns whose cells are wrapped, and to which width.
        width: of the widest line.
    """

    def __init__(self, table: Table, available: int):
        self._table = table
        columns = range(len(table.headers))
        longest = [
            max((cell_len(word) for word in h.split()), default=0)
            for h in table.headers
        ]
        self.widths = [
            max([longest[i], *(cell_len(row[i].plain) for row in table.rows)])
            for i in columns
        ]
        self.folded: dict[int, int] = {}
        self._numbers = [
            i for i in columns if i >= table._keys and i not in table._words
        ]
        self._beside = self._fits_in_one_band(available)
        if not self._beside:
            self._fold_names(available)
            self._beside = self._fits_in_one_band(available)
        self._bands = [self._numbers] if self._beside else self._split(available)
        self._slots = self._slot_widths(self._bands)
        self._fold_words(available)
        self.width = min(available, max(self._left_part, *self._ends()))

    @property
    def _left_part(self) -> int:
        keys = self.widths[: self._table._keys]
        return sum(keys) + _GAP * (len(keys) - 1)

    def _fits_in_one_band(self, available: int) -> bool:
        taken = self._left_part + sum(self.widths[i] + _GAP for i in self._numbers)
        needed = sum(min(self.widths[i], _WORDS) + _GAP for i in self._table._words)
        return taken + needed <= available

    def _fold_names(self, available: int) -> None:
        others = sum(w + _GAP for w in self.widths[1 : self._table._keys])
        widest = max((self.widths[i] for i in self._numbers), default=0)
        most = min(int(_NAME_SHARE * available), available - _GAP - widest - others)
        if self.widths[0] > max(most, _SHORTEST_NAME):
            limit = self.folded[0] = max(most, _SHORTEST_NAME)
            parts = [p for row in self._table.rows for p in _folded(row[0], limit)]
            head = [cell_len(word) for word in self._table.headers[0].split()]
            self.widths[0] = max([*head, *(cell_len(p.plain) for p in parts)])

    def _split(self, available: int) -> list[list[int]]:
        """Deal the numbers out to as few lines as hold them, as evenly as may be."""
        numbers = self._numbers
        for lines in range(1, len(numbers)):
            per_line = -(-len(numbers) // lines)
            bands = [
                numbers[i : i + per_line] for i in range(0, len(numbers), per_line)
            ]
            taken = sum(w + _GAP for w in self._slot_widths(bands))
            if self._left_part + taken <= available:
                return bands
        return [[i] for i in numbers]

    def _slot_widths(self, bands: list[list[int]]) -> list[int]:
        slots = [0] * max(map(len, bands), default=0)
        for band in bands:
            for slot, i in enumerate(band):
                slots[slot] = max(slots[slot], self.widths[i])
        return slots

    def _fold_words(self, available: int) -> None:
        words = self._table._words
        taken = self._left_part + sum(w + _GAP for w in self._slots)
        room = available - (taken + _GAP * len(words) if self._beside else _INDENT)
        for i in words:  # beside the numbers they share what is left
            share = room // len(words) if self._beside else room
            if self.widths[i] > share:
                self.widths[i] = self.folded[i] = max(share, 8)

    def _ends(self) -> list[int]:
        numbers = self._left_part + sum(w + _GAP for w in self._slots)
        words = [self.widths[i] for i in self._table._words]
        if self._beside:
            return [numbers + sum(w + _GAP for w in words)]
        return [numbers, *(w + _INDENT for w in words)]

    def lines(self, cells: list[list[Text]], *, bottom: bool = False) -> Iterable[Text]:
        """Set the cells of a row, each of one line or more."""
        table = self._table
        keys = [(i, self.widths[i]) for i in range(table._keys)]
        words = [(i, self.widths[i]) for i in table._words]
        for number, band in enumerate(self._bands or [[]]):
            parts = [*cells]
            for i, _ in keys:  # a name's further lines, too, stand beside numbers
                is_last = bottom or number + 1 == max(len(self._bands), 1)
                first = len(cells[i]) if bottom and number else number
                parts[i] = cells[i][first : None if is_last else number + 1]
            places = keys + list(zip(band, self._slots, strict=False))
            places += words if self._beside else []
            if any(part.plain for i, _ in places for part in parts[i]):
                yield from self._set(places, parts, bottom)
        for i, width in () if self._beside else words:
            if any(line.plain for line in cells[i]):
                yield from self._set([(None, 0), (i, width)], cells, bottom)

    def _set(
        self,
        places: Sequence[tuple[int | None, int]],
        cells: list[list[Text]],
        bottom: bool,
    ) -> Iterable[Text]:
        columns = [[] if i is None else cells[i] for i, _ in places]
        height = max(map(len, columns))
        for number in range(height):
            line = Text(end="", no_wrap=False)
            gap = 0
            for (i, width), parts in zip(places, columns, strict=True):
                at = number - (height - len(parts) if bottom else 0)
                part = parts[at] if 0 <= at < len(parts) else Text()
                blanks = max(width - cell_len(part.plain), 0)
                is_left = i is None or i in self._table._left
                line.append(" " * (gap + (0 if is_left else blanks)))
                line.append_text(part)
                line.append(" " * (blanks if is_left else 0))
                gap = _GAP
            line.rstrip()
            line.end = "\n"
            yield line
