"""The package as others get it: a wheel, an sdist, an editable install.

Everything is built from a copy of the sources, without leftovers of earlier builds, and
without the network: build tools and dependencies are those of this environment.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import bagua_jax
from bagua_jax import extras

ROOT = Path(__file__).parents[2]
FOLDERS = ("bagua_jax", "algorithms", "experiments")
FILES = ("pyproject.toml", "README.md", "LICENSE")
SHIPPED = (".py", ".yaml", ".json", ".mplstyle", ".typed")


ENV = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command without this process's import path; show its output if it fails."""
    ran = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert ran.returncode == 0, f"{ran.args}\n{ran.stdout}"
    return ran.stdout


def build(what: str, source: Path, target: Path) -> Path:
    """Build the wheel or sdist of a source tree; give its file."""
    options = ("--no-isolation", "--outdir", target, source)
    run(sys.executable, "-m", "build", f"--{what}", *options, cwd=target.parent)
    (built,) = target.iterdir()
    return built


def needed(requirements: Iterable[str]) -> set[str]:
    """Names of the distributions that requirements bring, with theirs in turn."""
    found: set[tuple[str, str]] = set()  # name and extra
    todo = [(Requirement(text), "") for text in requirements]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        for own in ("", *requirement.extras):
            if (requirement.name, own) not in found:
                found.add((requirement.name, own))
                theirs = importlib.metadata.requires(requirement.name) or []
                todo += [(Requirement(text), own) for text in theirs]
    return {name for name, _ in found}


def make_environment(folder: Path, only: Iterable[str] | None = None) -> Path:
    """Make an environment that has this one's packages but not its bagua_jax.

    A path listed in a ``.pth`` file is searched, but ``.pth`` files found there are not
    read, so that an editable bagua_jax does not come along.

    Args:
        folder: where.
        only: requirements; the packages that they bring, and no others, are linked.

    Returns:
        Its ``python``.
    """
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    paths = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", scheme="venv", vars=paths))
    if only is None:
        (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    else:
        for name in needed(only):
            distribution = importlib.metadata.distribution(name)
            firsts = {file.parts[0] for file in distribution.files or ()}
            for first in firsts - {"..", "__pycache__"}:
                if not (site / first).exists():
                    (site / first).symlink_to(str(distribution.locate_file(first)))
    return Path(sysconfig.get_path("scripts", scheme="venv", vars=paths)) / "python"


def install(python: Path, *what: str | Path, cwd: Path) -> None:
    """Install into an environment, without dependencies and without the network."""
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--quiet")
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--ignore-installed", *options, *what, cwd=cwd)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy what a clean checkout has, links as links."""
    copy = tmp_path_factory.mktemp("source")
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def expected(source: Path) -> set[str]:
    """The names that a wheel must have: every shipped file, each once."""
    names = set()
    for folder in FOLDERS:
        package = Path("bagua_jax") / ("" if folder == "bagua_jax" else folder)
        for path, subfolders, files in os.walk(source / folder):  # follows no links
            assert "__pycache__" not in subfolders
            inside = package / Path(path).relative_to(source / folder)
            names |= {(inside / f).as_posix() for f in files if f.endswith(SHIPPED)}
    return names


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel of the sources."""
    return build("wheel", source, tmp_path_factory.mktemp("build") / "wheel")


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the source archive."""
    return build("sdist", source, tmp_path_factory.mktemp("build") / "sdist")


def wheel_names(wheel: Path) -> list[str]:
    """Return the names in a wheel, without its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return [n for n in archive.namelist() if ".dist-info/" not in n]


SEES_EVERYTHING = """
import importlib.resources, inspect, sys
import bagua_jax, bagua_jax.algorithms, bagua_jax.experiments.cli
for entry in bagua_jax.algorithms.REGISTRY.values():
    assert inspect.getmodule(entry.factory).__name__.startswith("bagua_jax.algorithms.")
configs = importlib.resources.files("bagua_jax.experiments.configs")
assert (configs / "demo.yaml").is_file()
assert not {"algorithms", "experiments"} & set(sys.modules)
print(bagua_jax.__file__)
print(bagua_jax.algorithms.__file__)
"""


def locations(python: Path, cwd: Path) -> list[Path]:
    """Import the package in a folder; give where it and its algorithms came from."""
    lines = run(python, "-c", SEES_EVERYTHING, cwd=cwd).splitlines()
    return [Path(line).resolve().parent for line in lines[-2:]]


# --- the wheel ---


def test_wheel_holds_every_module_and_config_once(wheel: Path, expected: set[str]):
    names = wheel_names(wheel)
    assert sorted(names) == sorted(expected)
    assert {name.split("/")[0] for name in names} == {"bagua_jax"}


def test_wheel_states_version_license_and_cuda(wheel: Path, source: Path):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [n for n in archive.namelist() if n.endswith("/METADATA")]
        text = archive.read(metadata).decode()
        assert any(n.endswith("/licenses/LICENSE") for n in archive.namelist())
    init = (source / "bagua_jax" / "__init__.py").read_text()
    (version,) = re.findall(r'^__version__ = "(.+)"$', init, re.MULTILINE)
    assert f"\nVersion: {version}\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text
    assert re.search(r"^Requires-Dist: jax\[cuda13\].*extra == .cuda.$", text, re.M)


def test_wheel_works_in_a_clean_environment(wheel: Path, tmp_path: Path):
    """From any folder, as an import, as a module and as the command."""
    python = make_environment(tmp_path / "env")
    install(python, wheel, cwd=tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    package, algorithms = locations(python, elsewhere)
    assert (tmp_path / "env").resolve() in package.parents
    assert algorithms == package / "algorithms"
    assert {p.name for p in package.parent.iterdir()}.isdisjoint(
        {"algorithms", "experiments", "tests", "benchmarks"}
    )
    as_module = run(python, "-m", "bagua_jax.experiments", "list", cwd=elsewhere)
    assert "low_precision_decentralized" in as_module
    assert "demo" in as_module
    command = python.with_name("bagua-jax")
    assert run(command, "list", cwd=elsewhere) == as_module


# --- the core, and what extras bring ---


def project() -> dict:
    """The project table of pyproject.toml."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        return tomllib.load(file)["project"]


def refusal(*command: str | Path, cwd: Path) -> str:
    """Run a command that lacks an extra; return what it says."""
    ran = subprocess.run(command, cwd=cwd, env=ENV, capture_output=True, text=True)
    assert ran.returncode == 2 and not ran.stdout, ran
    return ran.stderr


IN_THE_CORE = """
import importlib, importlib.util, pkgutil, sys, bagua_jax
for module in sys.argv[1:]:
    assert not importlib.util.find_spec(module), module
for module in pkgutil.walk_packages(bagua_jax.__path__, "bagua_jax."):
    if not module.name.startswith(("bagua_jax.experiments", "bagua_jax.testing")):
        importlib.import_module(module.name)
"""


def test_the_core_alone_runs_the_first_example(wheel: Path, tmp_path: Path):
    """With jax, optax, numpy and what these need; the command says what it needs."""
    python = make_environment(tmp_path / "env", only=project()["dependencies"])
    install(python, wheel, cwd=tmp_path)
    absent = {m for modules in extras.EXTRAS.values() for m in modules} - {"scipy"}
    run(python, "-c", IN_THE_CORE, *absent, cwd=tmp_path)  # jax brings scipy
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code, printed = re.findall(r"```(?:python|text)\n(.*?)```", readme, re.DOTALL)[:2]
    (tmp_path / "first.py").write_text(code)
    said = run(python, "-W", "error", "first.py", cwd=tmp_path)
    assert said.splitlines()[1:] == printed.splitlines()[1:]  # all but the loss
    command = python.with_name("bagua-jax")
    version = run(command, "--version", cwd=tmp_path)
    assert version == f"bagua-jax {bagua_jax.__version__}\n"
    refused = refusal(command, "list", cwd=tmp_path)
    assert "pip install 'bagua-jax[experiments]'" in refused
    assert refused.count("\n") == 1


def test_the_experiments_extra_brings_the_command_line(wheel: Path, tmp_path: Path):
    own = project()
    only = own["dependencies"] + own["optional-dependencies"]["experiments"]
    python = make_environment(tmp_path / "env", only=only)
    install(python, wheel, cwd=tmp_path)
    command = python.with_name("bagua-jax")
    one = ("--algorithms", "bytegrad", "--steps", "20", "--output", "runs")
    assert "bytegrad" in run(command, "run", "quadratic", *one, cwd=tmp_path)
    refused = refusal(
        command, "async", "quadratic", "--exchange", "pairs", cwd=tmp_path
    )
    assert "PairGossip needs zmq, which is not installed" in refused
    assert "pip install 'bagua-jax[async]'" in refused


def test_messages_name_the_extra_that_brings_a_module():
    """Every package of an extra has its modules in extras.EXTRAS, and no other has."""
    optional, known = project()["optional-dependencies"], {}
    for module, names in importlib.metadata.packages_distributions().items():
        for name in map(canonicalize_name, names):
            known.setdefault(name, set()).add(module)
    for extra, modules in extras.EXTRAS.items():
        names = {canonicalize_name(Requirement(x).name) for x in optional[extra]}
        brought = {name: known.get(name, {name}) for name in names - {"jax"}}
        assert set().union(*brought.values()) >= set(modules), extra
        unnamed = [name for name, own in brought.items() if not own & {*modules}]
        assert not unnamed, f"{extra} brings {unnamed}, which extras.EXTRAS misses"


# --- the sdist ---


def test_sdist_holds_no_file_twice(sdist: Path, expected: set[str]):
    with tarfile.open(sdist) as archive:
        assert not any(m.issym() or m.islnk() for m in archive.getmembers())
        names = [name.partition("/")[2] for name in archive.getnames()]
    in_package = [n for n in names if n.startswith(FOLDERS) and n.endswith(SHIPPED)]
    moved = {f"bagua_jax/{n}" if "bagua_jax/" not in n else n for n in in_package}
    assert moved == expected
    assert len(in_package) == len(expected)


def test_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path):
    with tarfile.open(sdist) as archive:
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(tmp_path, **safely)  # before 3.11.4 there is no filter
    (unpacked,) = tmp_path.iterdir()
    again = build("wheel", unpacked, tmp_path / "wheel")
    assert again.name == wheel.name
    assert sorted(wheel_names(again)) == sorted(wheel_names(wheel))


# --- the editable install ---


@pytest.mark.parametrize("links", ["links", "links-as-text"])
def test_editable_install_works_from_the_root_and_elsewhere(
    links: str, source: Path, tmp_path: Path
):
    """Also where git checks links out as text files: then from elsewhere only."""
    checkout = tmp_path / "checkout"
    shutil.copytree(source, checkout, symlinks=True)
    if links == "links-as-text":
        for name in ("algorithms", "experiments"):
            link = checkout / "bagua_jax" / name
            text = os.readlink(link)
            link.unlink()
            link.write_text(text)
    python = make_environment(tmp_path / "env")
    install(python, "--editable", checkout, cwd=tmp_path)
    for folder in [checkout, tmp_path] if links == "links" else [tmp_path]:
        package, algorithms = locations(python, folder)
        assert package == (checkout / "bagua_jax").resolve()
        assert algorithms == (checkout / "algorithms").resolve()
    listed = run(python, "-m", "bagua_jax.experiments", "list", cwd=tmp_path)
    assert "low_precision_decentralized" in listed


def test_links_are_relative_and_point_at_the_top_level():
    for name in ("algorithms", "experiments"):
        assert os.readlink(ROOT / "bagua_jax" / name) == f"../{name}"


def test_the_command_of_the_readme_is_declared():
    with open(ROOT / "pyproject.toml", "rb") as file:
        scripts = tomllib.load(file)["project"]["scripts"]
    assert scripts == {"bagua-jax": "bagua_jax.experiments.__main__:main"}
