"""The contributor's guide works: a new algorithm is its file, its entry, its oracle."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "own_algorithm.md").read_text()

ENTRY = '''    "round_robin": Entry(
        round_robin,
        "gradient",
        invariant="sent + errors = gradients, summed over time",
        oracle="round_robin.round_robin",
        examples=(Example({"stride": 8}, peers="none"),),
        contracts=(
            Contract(
                {"stride": 2},
                floor=0.2,
                # Half of each bucket, and a number that says whether it is finite.
                sends=lambda n, sizes: (
                    2 * (n - 1) / n * 4 * sum(math.ceil(d / 2) + 1 for d in sizes), 1
                ),
                plain={"stride": 1},
            ),
        ),
    ),
}
"""Every algorithm by name."""
'''

ORACLE = '''"""Round-robin sparsification."""

import numpy as np


def round_robin(grads, stride):
    """Return what is applied at each step: grads [steps, n, d]."""
    error, applied = np.zeros_like(grads[0]), []
    for t, g in enumerate(grads):
        v = g + error
        chosen = np.arange(v.shape[1]) % stride == t % stride
        applied.append(np.where(chosen, v.mean(axis=0), 0))
        error = np.where(chosen, 0, v)
    return np.array(applied)
'''


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository with a new algorithm in it."""
    root = tmp_path_factory.mktemp("copy")
    for part in ("bagua_jax", "algorithms", "experiments", "tests", "docs"):
        shutil.copytree(
            ROOT / part,
            root / part,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__", "figures"),
        )
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    source = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
    own = "from bagua_jax.algorithms import Entry\n"
    assert own in source
    source = source.replace(own, "").partition("\nentry = ")[0]
    (root / "algorithms" / "round_robin.py").write_text(source)
    (root / "tests" / "oracles" / "round_robin.py").write_text(ORACLE)
    registry = root / "algorithms" / "__init__.py"
    text = registry.read_text()
    last = "from bagua_jax.algorithms.signum import signum as signum\n"
    end = '}\n"""Every algorithm by name."""\n'
    assert last in text and end in text
    text = text.replace(
        last, "from bagua_jax.algorithms.round_robin import round_robin\n" + last
    )
    registry.write_text(text.replace(end, ENTRY))
    return root


def python(copy: Path, *arguments: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=copy,
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(copy),
            "PYTHONPATH": str(copy),
            "JAX_PLATFORMS": "cpu",
            "COLUMNS": "200",
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return ran.stdout


def test_lists_and_runs_before_anything_is_counted(copy):
    listed = python(copy, "bagua_jax.experiments", "list", "algorithms")
    assert re.search(r"round_robin +\? .*Send every stride-th entry", listed)
    command = ("run", "quadratic", "--steps", "20", "--algorithms")
    ran = python(copy, "bagua_jax.experiments", *command, "round_robin,bytegrad")
    assert re.search(r"round_robin +\d", ran)
    counted = python(
        copy,
        "bagua_jax.experiments",
        "wire",
        "quadratic",
        "--algorithms",
        "round_robin",
    )
    assert re.search(r"round_robin +\d", counted)


def test_pages_are_written_with_it(copy):
    python(copy, "bagua_jax.experiments.tables.survey")
    page = (copy / "docs" / "algorithms.md").read_text()
    assert "| `round_robin(stride=8)` |" in page
    assert "`round_robin`" in (copy / "README.md").read_text()
    listed = python(copy, "bagua_jax.experiments", "list", "algorithms")
    # An eighth of the exact mean's 7 bytes.
    assert re.search(r"round_robin +0\.87", listed)


def test_contracts_walk_over_it(copy):
    shown = python(
        copy,
        "pytest",
        *("-q", "-p", "no:cacheprovider", "-k", "round_robin"),
        "tests/algorithms/test_contracts.py",
        "tests/algorithms/test_wire_bytes.py",
        "tests/experiments/test_survey.py",
    )
    passed = re.search(r"(\d+) passed", shown)
    assert passed and int(passed[1]) >= 15, shown
