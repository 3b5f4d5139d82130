"""Every study runs in fast mode, with its claims; one is run as a notebook, too."""

import ast
import os
from pathlib import Path

import jupytext
import pytest
from nbclient import NotebookClient

from bagua_jax.experiments import studies

FOLDER = Path(__file__).parents[2] / "experiments" / "notebooks"


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
    assert sorted(studies.ORDER) == sorted(found)


@pytest.mark.parametrize("name", studies.ORDER)
def test_study_holds(name: str):
    rows = studies.run(name)["rows"]
    assert len(rows) >= 4
    assert all(isinstance(row, studies.Row) for row in rows)


@pytest.mark.parametrize("name", studies.ORDER)
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
