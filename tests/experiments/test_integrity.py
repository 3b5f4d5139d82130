"""Chained records and sealed documents: whatever is altered in them is seen."""

import errno
import json
import os
import random

import pandas as pd
import pytest

from bagua_jax.experiments.runs import integrity
from bagua_jax.experiments.runs.integrity import Journal, RunError, Unchecked

RECORDS = [{"step": i, "train/loss": 1 / (i + 1), "ü": None} for i in range(8)]


@pytest.fixture
def path(tmp_path):
    with Journal(tmp_path / "metrics.jsonl", "run", RECORDS[:3]) as journal:
        journal.append(RECORDS[3:5])
        journal.write("".join(json.dumps(record) + "\n" for record in RECORDS[5:]))
    return journal.path


def copy_of(path):
    return path.parent / "copies" / path.name


def test_what_is_written_is_read_and_is_plain_jsonl(path):
    found = integrity.read(path, "run")
    assert found.records == RECORDS and not found.fault and not found.mended
    assert len(set(found.checks)) == len(RECORDS)
    frame = pd.read_json(path, lines=True, precise_float=True)
    assert frame["train/loss"].tolist() == [x["train/loss"] for x in RECORDS]
    assert set(frame["run"]) == {"run"} and frame["check"].tolist() == found.checks
    assert copy_of(path).read_bytes() == path.read_bytes()


def test_every_flipped_bit_is_noticed_in_its_line(path):
    text = path.read_bytes()
    copy_of(path).unlink()
    lines = text.splitlines(keepends=True)
    starts = [sum(map(len, lines[:i])) for i in range(len(lines))]
    for at in range(0, len(text), 3):
        path.write_bytes(text[:at] + bytes([text[at] ^ (1 << at % 8)]) + text[at + 1 :])
        found = integrity.read(path, "run")
        number = sum(start <= at for start in starts)
        kept = number - 1
        assert found.records == RECORDS[:kept], at
        if at == len(text) - 1:  # the end of the last line: as a crash leaves it
            assert found.fault == ""
        else:
            assert found.fault.startswith(f"{path}, line {number}, "), found.fault


@pytest.mark.parametrize(
    "rearranged",
    [
        lambda x: x[:3] + x[4:],
        lambda x: x[1:],
        lambda x: x[:3] + x[2:],
        lambda x: [*x[:2], x[3], x[2], *x[4:]],
        lambda x: [*x, x[-1]],
        lambda x: [b"{}\n", *x],
        lambda x: [*x[:4], b"\xff\n", *x[4:]],
        lambda x: [*x[:4], b"[" * 10000 + b"\n", *x[4:]],
        lambda x: [*x[:4], x[4].replace(b"0.2", b"NaN"), *x[5:]],
    ],
)
def test_lines_that_are_lost_or_moved_are_noticed(path, rearranged):
    lines = path.read_bytes().splitlines(keepends=True)
    found = rearranged(lines)
    first = next(i for i, line in enumerate([*lines, b""]) if found[i] != line)
    path.write_bytes(b"".join(found))
    copy_of(path).unlink()
    read = integrity.read(path, "run")
    assert read.records == RECORDS[:first]
    assert read.fault.startswith(f"{path}, line {first + 1}, ")


def test_a_line_that_a_crash_cut_is_dropped_and_no_damage(path):
    text = path.read_bytes()
    for place in (path, copy_of(path)):
        place.write_bytes(text[:-5])
    found = integrity.read(path, "run")
    assert found.records == RECORDS[:-1]
    assert not found.fault and not found.mended
    with Journal(path, "run", found.records) as journal:
        journal.append(RECORDS[-1:])
    assert path.read_bytes() == text


def test_one_of_the_two_mends_the_other(path):
    text = path.read_bytes()
    for harmed in (path, copy_of(path)):
        harmed.write_bytes(text.replace(b"0.25", b"0.35"))
        found = integrity.read(path, "run")
        assert found.records == RECORDS and not found.fault
        assert found.mended.startswith(f"{harmed}, line 4, was altered")
        harmed.write_bytes(text)
    path.unlink()
    found = integrity.read(path, "run")
    assert found.records == RECORDS
    assert found.mended == f"{path} ends after line 0, of 8"


def test_another_file_s_and_another_run_s_records_are_not_taken(path):
    other = path.with_name("timing.jsonl")
    path.rename(other)
    copy_of(path).unlink()
    assert "line 1, was altered" in integrity.read(other, "run").fault
    other.rename(path)
    fault = integrity.read(path, "another").fault
    assert fault == f"{path}, line 1, is of another run, 'run'; this one is 'another'"
    path.write_text('{"step": 0}\n')
    assert "line 1, carries no checksum" in integrity.read(path, "run").fault


def test_marks_tell_executions_apart(path):
    found = integrity.read(path, "run")
    marks = [(k, check) for k, check in enumerate(["", *found.checks])]
    assert all(found.differ_from(mark) == "" for mark in marks)
    assert found.first(3).differ_from(marks[4]) == f"{path} ends after line 3, of 4"
    assert "another execution" in found.differ_from((4, found.checks[4]))


def test_appending_is_all_or_nothing(path, monkeypatch):
    text = path.read_bytes()
    with Journal(path, "run", RECORDS) as journal:
        assert path.read_bytes() == text
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def refuse(*_):
            raise full

        with monkeypatch.context() as patch:
            patch.setattr(journal, "sync", refuse)
            with pytest.raises(OSError, match=f"{path} cannot .* No space left on"):
                journal.append(RECORDS[:1])
        assert path.read_bytes() == copy_of(path).read_bytes() == text
        journal.append(RECORDS[:1])
        assert journal.reread() == RECORDS + RECORDS[:1]
        path.unlink()
        copy_of(path).unlink()
        with pytest.raises(RunError, match="something else writes to this folder"):
            journal.reread()


def test_documents_and_texts_are_refused_by_name(tmp_path):
    path, text = tmp_path / "summary.json", tmp_path / "config.yaml"
    value = {"a": 1.5, "b": [1, None, "ü"], "c": {}}
    marks = {"metrics.jsonl": (3, "abc")}
    assert integrity.read_document(path, "run") is None
    assert integrity.read_text(text) is None
    integrity.write_document(path, value, "run", marks)
    integrity.write_text(text, "a: 1\nb: ü\n")
    assert integrity.read_document(path, "run") == (value, marks)
    assert integrity.read_text(text) == "a: 1\nb: ü\n"
    with pytest.raises(RunError, match="is of another run, 'run'"):
        integrity.read_document(path, "other")
    draw = random.Random(0)
    reads = {path: lambda: integrity.read_document(path, "run")}
    reads[text] = lambda: integrity.read_text(text)
    for file, read in reads.items():
        whole = file.read_bytes()
        for at in range(len(whole)):
            for harmed in (
                whole[:at],
                whole[:at] + whole[at + 1 :],
                whole[:at]
                + bytes([whole[at] ^ (1 << draw.randrange(8))])
                + whole[at + 1 :],
            ):
                file.write_bytes(harmed)
                with pytest.raises(RunError, match=str(file)):
                    read()
    path.write_text("{}")
    with pytest.raises(Unchecked, match="an earlier version"):
        integrity.read_document(path, "run")
    path.rename(tmp_path / "results.json")
    integrity.write_document(path, value, "run", marks)
    path.rename(tmp_path / "results.json")
    with pytest.raises(RunError, match=r"results\.json was altered"):
        integrity.read_document(tmp_path / "results.json", "run")
