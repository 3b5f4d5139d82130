"""What a run folder must bear: no room, no permission, company, names, clocks."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from bagua_jax.experiments.runs import asynchronous, folders, integrity
from bagua_jax.experiments.runs.folders import RunError


@contextlib.contextmanager
def as_nobody(folder: Path):
    """Own a folder and be no superuser, whom permissions do not bind."""
    if os.geteuid():
        yield
        return
    for path in (folder, *folder.rglob("*")):
        os.chown(path, 65534, 65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def reachable():
    """A folder that every user can reach."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("locked", ["runs", "runs/small", "runs/small/RUN"])
def test_a_read_only_folder_is_named_with_the_cure(lab, reachable, locked):
    output = str(reachable / "runs")
    config = str(shutil.copy(lab.config(output=output), reachable / "config.yaml"))
    assert lab.main("run", config, "--steps", "4")[0] == 0
    (run,) = (reachable / "runs/small").glob("gradient_allreduce-*")
    folder = reachable / locked.replace("RUN", run.name)
    if locked == "runs":
        shutil.rmtree(reachable / "runs/small")
        (reachable / "runs").mkdir(exist_ok=True)
    elif locked == "runs/small":
        shutil.rmtree(run)
    else:
        (run / "summary.json").unlink()
    before = set(reachable.rglob("*"))
    with as_nobody(reachable):
        folder.chmod(0o555)
        status, _, err = lab.main("run", config, "--steps", "4")
        folder.chmod(0o755)
    assert status == 1
    assert "Permission denied" in err and str(folder) in err
    assert "--output" in err or "the folder writable" in err
    assert set(reachable.rglob("*")) == before


@pytest.mark.parametrize("nth", [1, 2, 5, 8])
def test_a_full_disk_is_named_and_loses_nothing(lab, monkeypatch, nth):
    """Whichever append finds no room: what was written before stays whole."""
    assert lab.run(output="whole")[0] == 0
    calls = iter(range(1, 10**6))
    sync = integrity.Journal.sync

    def full(journal):
        if next(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(journal)

    with monkeypatch.context() as patch:
        patch.setattr(integrity.Journal, "sync", full)
        status, _, err = lab.run(output="full")
    assert status == 1
    assert ".jsonl cannot be written: No space left on device" in err
    assert "Nothing that was written before is lost: make room" in err
    folder = lab.folder(output="full")
    for name in ("metrics.jsonl", "timing.jsonl"):
        own, copy = folder / name, folder / "copies" / name
        assert own.read_bytes() == copy.read_bytes()
        assert not integrity.read(own, "?").mended
    assert lab.run(output="full")[0] == 0
    assert lab.metrics(output="full") == lab.metrics(output="whole")
    assert lab.state(output="full") == lab.state(output="whole")


def test_a_summary_for_which_there_is_no_room_is_made_by_the_next_command(
    lab, monkeypatch
):
    def full(path, *_):
        raise integrity._unwritten(path, OSError(errno.ENOSPC, "No space left"))

    with monkeypatch.context() as patch:
        patch.setattr(integrity, "write_document", full)
        status, _, err = lab.run()
    assert status == 1 and "summary.json cannot be written: No space left" in err
    status, out, _ = lab.run()
    assert status == 0 and "continues after step 12" in out
    assert lab.summary()["steps"] == 12


def test_two_commands_in_one_folder_do_not_meet(lab):
    """The second is refused at once, changes nothing, and may come again later."""
    assert lab.run()[0] == 0
    folder = lab.folder()
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    program = "import sys, pathlib; from bagua_jax.experiments.runs import folders\n"
    program += "with folders.locked(pathlib.Path(sys.argv[1])): print(), input()"
    with subprocess.Popen(
        [sys.executable, "-uc", program, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()  # it is inside
        status, _, err = lab.run("--overwrite")
        other.communicate(b"\n")
    assert status == 1
    assert f"another process is working in {folder}. Wait until it has ended" in err
    assert "--output" in err
    after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    changed = {p.name for p in before if after[p] != before[p]}
    assert changed <= {"log.txt"}  # which says that it was refused
    assert "finished before" in lab.run()[1]


@pytest.mark.parametrize("name", ["two words", "Größe 例 #1 50% ?a=b&c", "-n'\"$(x)"])
def test_names_of_folders_are_free(lab, name):
    output = f"{name}/runs"
    assert lab.run(output=output)[0] == 0
    (lab.folder(output=output) / "summary.json").unlink()
    shutil.rmtree(lab.folder(output=output) / "checkpoints/12")
    status, out, _ = lab.run(output=output)
    assert status == 0 and "continues after step 8" in out
    assert "finished before" in lab.run(output=output)[1]


def test_asynchronous_runs_in_a_folder_of_any_name(lab, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    small = {"workers": 2, "steps": 6, "checkpoint_every": 2, "eval_every": 2}
    config = lab.config(output=str(lab.root / "zwei Wörter 例"), **small)
    status, out, err = lab.main("async", config, "--exchange", "pairs")
    assert status == 0, out + err
    (folder,) = (lab.root / "zwei Wörter 例/small").glob("async-*")
    assert (folder / "saved-1.npz").exists()
    summary = (folder / "summary.json").read_bytes()
    (folder / "summary.json").unlink()
    status, out, err = lab.main("async", config, "--exchange", "pairs")
    assert status == 0 and "every worker had finished" in out
    assert (folder / "summary.json").read_bytes() == summary


def test_a_clock_that_is_set_back_does_not_turn_records_round(tmp_path, monkeypatch):
    """Neither while a worker runs nor between its runs."""
    like, wall = {"x": np.zeros(3)}, time.time()
    monkeypatch.setattr(time, "time", lambda: wall)
    for part in range(3):
        with asynchronous.Recorder(tmp_path, 0, every=1, like=like) as recorder:
            recorder.start(2 * part)
            for step in (1, 2):
                wall -= 3600
                recorder.step(2 * part + step, 0.5, {"x": np.full(3, step)})
    lines = (tmp_path / "steps-0.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines]
    assert len(seconds) == 9 and seconds == sorted(seconds)
    assert seconds[-1] - seconds[0] < 60


def test_a_clock_that_is_set_back_changes_no_run(lab, monkeypatch):
    assert lab.run(output="whole")[0] == 0
    hours = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: 1e9 - 3600.0 * next(hours))
    assert lab.run(output="back")[0] == 0
    assert lab.metrics(output="back") == lab.metrics(output="whole")
    (lab.folder(output="back") / "summary.json").unlink()
    status, out, _ = lab.run(output="back")
    assert status == 0 and "continues after step 12" in out
    assert lab.summary(output="back")["time/steps_per_s"] > 0


def test_refusals_are_run_errors():
    assert issubclass(integrity.Unchecked, RunError)
    assert folders.RunError is integrity.RunError
