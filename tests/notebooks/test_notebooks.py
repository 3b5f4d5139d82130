"""Every study runs in fast mode, with its claims; one is run as a notebook, too."""

import ast
import importlib
import os
from pathlib import Path

import jupytext
import pytest
from nbclient import NotebookClient

from bagua_jax.experiments import studies

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "studies" / "notebooks"
ALL = (*studies.ORDER, *studies.FINDINGS)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few workers and few steps, here and in kernels; no figures are written."""
    monkeypatch.setattr(studies, "FAST", True)
    monkeypatch.setenv("BAGUA_FAST", "1")
    monkeypatch.delenv("BAGUA_FIGURES", raising=False)


def cells(name: str) -> list:
    """Cells of a study, as Jupyter has them."""
    return jupytext.read(FOLDER / f"{name}.py").cells


def test_all_studies_are_in_the_order_of_the_page():
    found = {path.stem for path in FOLDER.glob("[!_]*.py")}
    assert sorted(ALL) == sorted(found)


@pytest.mark.parametrize("name", ALL)
def test_study_holds(name: str):
    rows = studies.run(name)["rows"]
    assert len(rows) >= 4
    assert all(isinstance(row, studies.Row) for row in rows)


@pytest.mark.parametrize("name", ALL)
def test_study_keeps_the_rules_of_notebooks(name: str):
    """Question first, short cells, assertions last."""
    first, *_, last = cells(name)
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert "*Question.*" in first.source and "*Prediction.*" in first.source
    assert any(isinstance(node, ast.Assert) for node in ast.parse(last.source).body)
    for cell in cells(name):
        assert len(cell.source.splitlines()) <= 18, cell.source


def test_study_opens_as_a_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for kind in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(kind, str(tmp_path / kind))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    notebook = jupytext.read(FOLDER / "delay_and_local_steps.py")
    client = NotebookClient(notebook, kernel_name="python3", timeout=300)
    client.execute(env=os.environ.copy(), cwd=str(tmp_path))
    assert notebook.cells[-1].execution_count is not None


# --- the command ----------------------------------------------------------------------


ENDS = """
import os, signal

def killed(name, pipe):
    os.kill(os.getpid(), signal.SIGKILL)  # as a system does that is out of memory

def broken(name, pipe):
    assert not name

def fine(name, pipe):
    pipe.send(("table of " + name, 1.0, 2.0))
"""


def test_a_study_that_is_killed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "ends_of_studies.py").write_text(ENDS)  # which a new process imports
    monkeypatch.syspath_prepend(str(tmp_path))
    ends = importlib.import_module("ends_of_studies")
    assert "killed by SIGKILL" in studies._apart_from_others(ends.killed, "adam")
    assert "exit code 1" in studies._apart_from_others(ends.broken, "adam")
    assert "AssertionError" in capfd.readouterr().err
    assert studies._apart_from_others(ends.fine, "adam") == ("table of adam", 1.0, 2.0)


def test_the_command_goes_on_after_a_failure_and_keeps_old_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def apart(target, name):
        del target
        return "died" if name == "adam" else studies._Ran(f"of {name}", 1.0, 2.0)

    monkeypatch.setenv("BAGUA_FIGURES", "")
    monkeypatch.setattr(studies, "_apart_from_others", apart)
    page = tmp_path / "studies.md"
    assert studies.main(["--docs", str(tmp_path), "choosing", "consensus"]) == 0
    assert studies.main(["--docs", str(tmp_path), "adam", "half_a_ring"]) == 1
    assert "adam FAILED: died" in capsys.readouterr().err
    text = page.read_text("utf-8")
    assert text.index("of consensus") < text.index("of choosing")
    finding = (tmp_path / "findings" / "half_a_ring.md").read_text("utf-8")
    assert "of half_a_ring" in finding and "](../figures/half_a_ring.png)" in finding
    with pytest.raises(SystemExit):
        studies.main(["--docs", str(tmp_path), "adams"])


def test_committed_pages_are_those_of_the_notebooks():
    """Their text is the notebooks', their figures are there."""
    for name in ALL:
        assert (ROOT / "docs" / "figures" / f"{name}.png").exists()
    for name in studies.FINDINGS:
        page = (ROOT / "docs" / "findings" / f"{name}.md").read_text("utf-8")
        assert all(cell in page for cell in studies._prose(name)), name
    page = (ROOT / "docs" / "studies.md").read_text("utf-8")
    for name in studies.ORDER:
        assert studies._prose(name)[0].removeprefix("# ") in page, name
        assert f"findings/{studies.FINDINGS[0]}.md" in page
