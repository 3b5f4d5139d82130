"""Files that show where they were altered: chained records and sealed documents.

Records
    A :class:`Journal` is a JSON Lines file. Each of its lines ends with two keys more
    than the record has: ``run``, which names the run, and ``check``, the beginning of
    the SHA-256 of the check of the line before and of this line. So a changed digit, a
    line that is lost or stands twice, and a line of another file or run are noticed,
    and it is known which line. Every record is written twice, to the file and to one of
    the same name in ``copies/``; what one of them lost is read from the other.

Marks
    The number of records and the check of the last one. A checkpoint and a summary
    state the marks of the journals they belong to, and fit no others.

Documents
    A JSON object whose last key, ``seal``, holds the same for the file as a whole. A
    text has its checksum in a comment at its end.

A process that is killed leaves at most a last line without its end. That is no damage,
and the line is dropped; everything else is. The checksums find damage and mistakes;
they do not keep anyone from forging a file.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "COPIES",
    "Document",
    "Journal",
    "Mark",
    "Records",
    "RunError",
    "Unchecked",
    "check_of",
    "digest",
    "peek",
    "read",
    "read_document",
    "read_text",
    "write_document",
    "write_text",
    "write_whole",
]

COPIES = "copies"
"""Folder, beside the journals, in which every record stands a second time."""

_UNCHECKED = (
    "carries no checksum: an earlier version of bagua_jax wrote it, or its end is lost"
)
_COMMENT = "# sha256: "

Mark = tuple[int, str]
"""Number of records, and the check of the last."""


class RunError(RuntimeError):
    """A run cannot go on; the message says why and what helps.

    Attributes:
        status: the exit status that it makes.
    """

    status = 1


class Unchecked(RunError):
    """A file carries no checksum: an earlier version wrote it, or its end is lost."""


def check_of(*parts: str | bytes) -> str:
    """Return the first 16 hex digits of the SHA-256 of some texts together."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode() if isinstance(part, str) else part)
    return total.hexdigest()[:16]


def digest(identity: Mapping[str, Any]) -> str:
    """Name a run, in eight hex digits, by what decides its numbers.

    Args:
        identity: JSON, from :func:`bagua_jax.experiments.spec.config.identity`.
    """
    return check_of(json.dumps(identity, sort_keys=True))[:8]


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all; on disk when this returns.

    Raises:
        OSError: if it cannot be written, with the file's name in its message.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(exist_ok=True)
        with open(part, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise _unwritten(path, error) from error


def _unwritten(path: Path, error: OSError) -> OSError:
    return OSError(
        f"{path} cannot be written: {error.strerror}. Nothing that was written before "
        "is lost: make room, or the folder writable, and give the same command again."
    )


# --- records ---


class Records(NamedTuple):
    """What a journal holds.

    Attributes:
        path: of the file.
        records: as they were given to the journal.
        checks: of each.
        fault: file, line and what is wrong with it, if a line after these was damaged
            in the file and in its copy; else empty.
        mended: the same, of what one of the two lost and the other has.
    """

    path: Path
    records: list[dict[str, Any]]
    checks: list[str]
    fault: str = ""
    mended: str = ""

    def differ_from(self, mark: Mark) -> str:
        """Say why these are not records that a mark was made of; empty if they are."""
        count, check = mark
        if count > len(self.records):
            lost = f"{self.path} ends after line {len(self.records)}, of {count}"
            return self.fault or lost
        if count and self.checks[count - 1] != check:
            return f"{self.path} is of another execution of this run"
        return ""

    def first(self, count: int) -> "Records":
        """Leave out what comes after so many records."""
        return self._replace(records=self.records[:count], checks=self.checks[:count])


def read(path: Path, run: str) -> Records:
    """Read a journal: of the file and its copy what goes further.

    Args:
        path: of the file; it need not be there.
        run: as :func:`digest` names it.
    """
    own, copy = _parse(path, path.name, run), _parse(_copy(path), path.name, run)
    best, other = (own, copy) if len(own.checks) >= len(copy.checks) else (copy, own)
    if best.fault:
        faults = (own.fault, copy.fault)
        return best._replace(path=path, fault="; ".join(filter(None, faults)))
    mended = other.fault
    if len(other.checks) < len(best.checks) and not mended:
        mended = f"{other.path} ends after line {len(other.checks)}"
        mended += f", of {len(best.checks)}"
    return best._replace(path=path, mended=mended)


def peek(path: Path) -> list[dict[str, Any]]:
    """Read a journal that is being written, unchecked, to show how a run goes."""
    found = []
    try:
        for line in path.read_bytes().splitlines():
            found.append(json.loads(line))
    except (FileNotFoundError, ValueError):
        pass
    return found


def _copy(path: Path) -> Path:
    return path.parent / COPIES / path.name


def _line(record: Mapping[str, Any], run: str, before: str) -> tuple[str, str]:
    """Return the line of a record, and its check."""
    text = json.dumps({**record, "run": run}, allow_nan=False)
    check = check_of(before, text)
    return f'{text[:-1]}, "check": "{check}"}}\n', check


def _parse(path: Path, name: str, run: str) -> Records:
    """Read the lines of a file up to the first that is not as it was written."""
    found = Records(path, [], [])
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return found
    before = name
    for number, line in enumerate(text.split(b"\n")[:-1], 1):
        record, fault = _unsealed(line, run, before)
        if fault:
            return found._replace(fault=f"{path}, line {number}, {fault}")
        before = record.pop("check")
        del record["run"]
        found.records.append(record)
        found.checks.append(before)
    return found


def _unsealed(line: bytes, run: str, before: str) -> tuple[dict[str, Any], str]:
    """Return the record of a line, run and check included, and what is wrong."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}, "is damaged"
    if not isinstance(record, dict):
        return {}, "is damaged"
    if "run" not in record or "check" not in record:
        return {}, _UNCHECKED
    if record["run"] != run:
        return {}, f"is of another run, {record['run']!r}; this one is {run!r}"
    own = {k: v for k, v in record.items() if k not in ("run", "check")}
    try:
        expected = _line(own, run, before)[0].encode()
    except ValueError:  # a number that is not finite
        return {}, "is damaged"
    if line + b"\n" != expected:
        return {}, "was altered, or a line before it is lost or stands twice"
    return record, ""


class Journal:
    """A file of records that is written anew, and then appended to.

    It serves as the text file that :func:`bagua_jax.asynchrony.PairGossip` logs to.

    Args:
        path: of the file.
        run: as :func:`digest` names it.
        records: with which it begins.
        durable: whether what was appended is on disk when :meth:`append` returns; it
            survives the process in any case.

    Raises:
        OSError: if it cannot be written.

    Attributes:
        mark: of the records so far.
    """

    def __init__(
        self,
        path: Path,
        run: str,
        records: Iterable[Mapping[str, Any]] = (),
        *,
        durable: bool = True,
    ):
        self.path, self._run, self._durable = path, run, durable
        text, self.mark = self._sealed(records, (0, path.name))
        for place in (path, _copy(path)):
            write_whole(place, text)
        self._files = [open(x, "ab", buffering=0) for x in (path, _copy(path))]

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; what was written stays."""
        for file in self._files:
            file.close()

    def _sealed(
        self, records: Iterable[Mapping[str, Any]], mark: Mark
    ) -> tuple[str, Mark]:
        count, check = mark
        lines = []
        for record in records:
            line, check = _line(record, self._run, check)
            lines.append(line)
        return "".join(lines), (count + len(lines), check)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append records, to the file and then to its copy; all or none.

        Raises:
            OSError: if they cannot be written.
        """
        text, mark = self._sealed(records, self.mark)
        before = [os.fstat(file.fileno()).st_size for file in self._files]
        try:
            for file in self._files:
                rest = memoryview(text.encode())
                while rest:
                    rest = rest[file.write(rest) :]
            if self._durable:
                self.sync()
        except OSError as error:
            for file, size in zip(self._files, before, strict=True):
                with contextlib.suppress(OSError):
                    file.truncate(size)
            raise _unwritten(self.path, error) from error
        self.mark = mark

    def write(self, text: str) -> None:
        """Append records that are JSON Lines already."""
        self.append(json.loads(line) for line in text.splitlines())

    def flush(self) -> None:
        """Do nothing: the system has what was appended."""

    def sync(self) -> None:
        """Have on disk what was appended."""
        for file in self._files:
            os.fsync(file.fileno())

    def reread(self) -> list[dict[str, Any]]:
        """Read back what was written.

        Raises:
            RunError: if it is not there any more.
        """
        found = read(self.path, self._run)
        if fault := found.differ_from(self.mark):
            raise RunError(f"{fault}: something else writes to this folder.")
        return found.records


# --- documents ---


class Document(NamedTuple):
    """A sealed JSON object, and the marks of the journals it belongs to, by name."""

    value: dict[str, Any]
    marks: dict[str, Mark]


def write_document(
    path: Path,
    value: Mapping[str, Any],
    run: str,
    marks: Mapping[str, Mark] | None = None,
) -> None:
    """Write a JSON object with its seal, whole or not at all.

    Args:
        path: of the file.
        value: JSON, without a key ``seal``.
        run: what it belongs to, as :func:`digest` names it.
        marks: of the journals it belongs to, by the file's name.

    Raises:
        OSError: if it cannot be written.
    """
    write_whole(path, _document(path.name, value, run, marks or {}))


def _document(
    name: str, value: Mapping[str, Any], run: Any, marks: Mapping[str, Any]
) -> str:
    seal = {"run": run, "marks": marks}
    check = check_of(name, json.dumps([value, seal], allow_nan=False))
    text = json.dumps({**value, "seal": seal | {"check": check}}, indent=2)
    return text + "\n"


def read_document(path: Path, run: str) -> Document | None:
    """Read a sealed JSON object.

    Args:
        path: of the file.
        run: what it must belong to.

    Returns:
        The object and its marks; ``None`` where there is no such file.

    Raises:
        RunError: if it was altered, carries no seal, or belongs to something else. The
            message names the file and what is wrong, and leaves the cure to you.
    """
    try:
        text = path.read_bytes().decode()
        value = json.loads(text)
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        raise RunError(f"{path}{f', line {line},' * bool(line)} is damaged") from None
    if not isinstance(value, dict) or not isinstance(value.get("seal"), dict):
        raise Unchecked(f"{path} {_UNCHECKED}")
    seal = value.pop("seal")
    found, marks = seal.get("run"), seal.get("marks")
    try:
        intact = text == _document(path.name, value, found, marks)
    except ValueError:  # a number that is not finite
        intact = False
    if not intact:
        raise RunError(f"{path} was altered")
    if found != run:
        raise RunError(f"{path} is of another run, {found!r}; this one is {run!r}")
    return Document(
        value, {name: (count, check) for name, (count, check) in marks.items()}
    )


def write_text(path: Path, text: str) -> None:
    """Write a text with its checksum in a comment at its end, whole or not at all."""
    write_whole(path, f"{text}{_COMMENT}{check_of(path.name, text)}\n")


def read_text(path: Path) -> str | None:
    """Read a text that :func:`write_text` wrote.

    Returns:
        The text; ``None`` where there is no such file.

    Raises:
        RunError: if it was altered or carries no checksum; as :func:`read_document`.
    """
    try:
        whole = path.read_bytes()
    except FileNotFoundError:
        return None
    text, comment, check = whole.rpartition(_COMMENT.encode())
    if not comment:
        raise Unchecked(f"{path} {_UNCHECKED}")
    if check != f"{check_of(path.name, text)}\n".encode():
        raise RunError(f"{path} was altered")
    return text.decode()
