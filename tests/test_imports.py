"""The shape of the package: who imports whom, who communicates, what is public."""

import ast
import graphlib
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from bagua_jax.algorithms import REGISTRY

ROOT = Path(__file__).parents[1]
PLACES = {
    "bagua_jax": "bagua_jax",
    "algorithms": "bagua_jax.algorithms",
    "experiments": "bagua_jax.experiments",
}
# What moves data between workers, in every jax from 0.10 on: jax.lax's own, relatives
# elsewhere in jax, and their primitives. axis_index, axis_size and pcast move nothing.
COLLECTIVE = re.compile(
    r"(p(sum|mean|max|min|argmax|argmin|permute|shuffle|swapaxes|broadcast|send|recv)"
    r"|psum_scatter|psum_invariant|all_gather(_invariant|_reduced)?|(ragged_)?all_to_all"
    r"|unreduced_p(sum|max|min|sum_scatter)|preduced)(_start|_p)?"
)


def _modules() -> dict[str, Path]:
    """Every module of the package by name, each once: links are not followed."""
    found = {}
    for folder, package in PLACES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT / folder)
            if folder == "bagua_jax" and (ROOT / folder / inside.parts[0]).is_symlink():
                continue
            parts = [package, *inside.with_suffix("").parts]
            found[".".join(p for p in parts if p != "__init__")] = path
    return found


MODULES = _modules()
PUBLIC = [m for m in MODULES if not re.search(r"\._|\.notebooks\b", m)]


# --- who imports whom ---


def _dotted(node: ast.AST, names: dict[str, str]) -> str:
    """Spell out an expression such as ``lax.psum``; "" if it is not a dotted name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, "")
    if isinstance(node, ast.Attribute) and (owner := _dotted(node.value, names)):
        return f"{owner}.{node.attr}"
    return ""


def _uses(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Return every imported name that a source uses, spelled out, with its line.

    Imports inside functions count; so do ``import_module("...")`` and attributes of
    imported modules, under whatever name they were imported.
    """
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
                first = alias.name.split(".")[0]
                names[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level + is_package or None]
            base = [node.module] if node.module else []
            base = ".".join([*parents, *base] if node.level else base)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
                names[alias.asname or alias.name] = f"{base}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := _dotted(node, names)):
            yield node.lineno, name
        elif isinstance(node, ast.Call) and node.args:
            function = node.func
            called = getattr(function, "attr", getattr(function, "id", ""))
            argument = node.args[0]
            if called in ("import_module", "__import__") and isinstance(
                argument, ast.Constant
            ):
                yield node.lineno, str(argument.value)


def _uses_of(module: str) -> Iterator[tuple[int, str]]:
    path = MODULES[module]
    text = path.read_text(encoding="utf-8")
    return _uses(text, module, is_package=path.name == "__init__.py")


def _module_of(name: str) -> str | None:
    """Find the module of the package that a dotted name lies in; None if outside."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def _layer(module: str) -> int:
    """0 for the runtime, 1 for algorithms, 2 for experiments."""
    layers = ("bagua_jax.algorithms", "bagua_jax.experiments")
    return next(
        (i for i, p in enumerate(layers, 1) if f"{module}.".startswith(p + ".")), 0
    )


def _upward(module: str, uses: Iterator[tuple[int, str]]) -> list[str]:
    return [
        f"{module}:{line} uses {name}"
        for line, name in uses
        if (target := _module_of(name)) and _layer(target) > _layer(module)
    ]


def test_imports_point_down():
    """Experiments import algorithms, algorithms the runtime, never the other way.

    ``bagua_jax`` itself, the public face, names all, and imports nothing by itself.
    """
    below = [m for m in MODULES if m != "bagua_jax"]
    assert [fault for m in below for fault in _upward(m, _uses_of(m))] == []


def test_runtime_modules_import_each_other_without_a_cycle():
    runtime = [m for m in MODULES if _layer(m) == 0 and m != "bagua_jax"]
    graph = {
        module: {
            target
            for _, name in _uses_of(module)
            if (target := _module_of(name)) not in (None, module, "bagua_jax")
        }
        for module in runtime
    }
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


# Rooms of experiments by floor; a room's imports point to lower ones.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("commands",),
    ("studies",),
    ("tables",),
    ("runs",),
    ("tasks",),
    ("spec",),
)


def _room(module: str) -> str:
    return f"{module}...".split(".")[2]


def _arrows() -> dict[tuple[str, str], list[str]]:
    """Imports between rooms of experiments: from, to, and where each is."""
    found: dict[tuple[str, str], list[str]] = {}
    for module in MODULES:
        if _layer(module) == 2:
            for line, name in _uses_of(module):
                target = _module_of(name) or ""
                arrow = _room(module), _room(target)
                if _layer(target) == 2 and all(arrow) and arrow[0] != arrow[1]:
                    found.setdefault(arrow, []).append(f"{module}:{line} uses {name}")
    return found


def test_rooms_of_experiments_are_few_and_their_imports_point_down():
    floor = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
    rooms = {_room(m) for m in MODULES if _layer(m) == 2} - {"", "configs"}
    assert rooms == set(floor)
    arrows = _arrows()
    assert {a: w for a, w in arrows.items() if floor[a[0]] >= floor[a[1]]} == {}
    assert len(arrows) < 25


def test_modules_of_experiments_import_each_other_without_a_cycle():
    modules = [m for m in MODULES if _layer(m) == 2]
    packages = {m for m in modules if MODULES[m].name == "__init__.py"}
    graph = {
        module: {
            target
            for _, name in _uses_of(module)
            if (target := _module_of(name)) in modules
            and target != module
            # A package that is named only on the way to a module of it.
            and not (target in packages and f"{module}.".startswith(f"{target}."))
        }
        for module in modules
    }
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_only_the_package_name_is_imported():
    """No module imports ``algorithms`` or ``experiments`` bare, nor the tests."""
    outside = ("algorithms", "experiments", "tests", "oracles", "benchmarks")
    faults = [
        f"{module}:{line} imports {name}"
        for module in MODULES
        for line, name in _uses_of(module)
        if name.split(".")[0] in outside
    ]
    assert faults == []


# --- who communicates ---


def _collectives(uses: Iterator[tuple[int, str]]) -> list[str]:
    return [
        f"line {line}: {name}"
        for line, name in uses
        if name.split(".")[0] == "jax" and COLLECTIVE.fullmatch(name.rpartition(".")[2])
    ]


def test_only_primitives_call_collectives():
    callers = {m: calls for m in MODULES if (calls := _collectives(_uses_of(m)))}
    assert list(callers) == ["bagua_jax.primitives"], callers


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("import jax\njax.lax.psum(x, 'i')", "line 2: jax.lax.psum"),
        ("import jax as j\nj.lax.pmean(x, 'i')", "line 2: jax.lax.pmean"),
        ("from jax import lax\nlax.ppermute(x)", "line 2: jax.lax.ppermute"),
        ("import jax.lax as l\nf = l.all_to_all", "line 2: jax.lax.all_to_all"),
        ("from jax.lax import all_gather as g", "line 1: jax.lax.all_gather"),
        ("def f():\n from jax.lax import psum_scatter", "line 2: jax.lax.psum_scatter"),
        (
            "from jax._src.lax import parallel\nparallel.psum_p.bind(x)",
            "line 2: jax._src.lax.parallel.psum_p",
        ),
    ],
)
def test_a_collective_is_seen_however_it_is_spelled(source: str, fault: str):
    assert _collectives(_uses(source, "bagua_jax.wire", is_package=False)) == [fault]


# --- who decides what is finite ---

# XLA may lose a NaN in a maximum; compressors.numerics has the forms that do not. That
# floats are reduced by none is read from programs, in test_nothing_hidden.
DECISION = re.compile(
    r"is(finite|nan|inf)|is_finite|nan_to_num|nan(max|min|argmax|argmin)"
    r"|top_k|approx_(max|min)_k|(arg)?(sort|partition)|reduce(_max|_min)?"
)


def _decisions(uses: Iterator[tuple[int, str]]) -> list[str]:
    return [
        f"line {line}: {name}"
        for line, name in uses
        if name.startswith("jax.") and DECISION.fullmatch(name.rpartition(".")[2])
    ]


def test_only_numerics_decide_what_is_finite():
    places = {m: found for m in MODULES if (found := _decisions(_uses_of(m)))}
    assert list(places) == ["bagua_jax.compressors.numerics"], places


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("import jax.numpy as jnp\njnp.isfinite(x)", "line 2: jax.numpy.isfinite"),
        ("from jax import lax\nlax.top_k(x, 3)", "line 2: jax.lax.top_k"),
        ("from jax.numpy import isnan", "line 1: jax.numpy.isnan"),
    ],
)
def test_a_decision_is_seen_however_it_is_spelled(source: str, fault: str):
    assert _decisions(_uses(source, "bagua_jax.wire", is_package=False)) == [fault]


def test_a_local_computation_is_no_collective():
    source = "import jax\njax.lax.axis_index('i')\njax.lax.pcast(x)\nself.psum(x)"
    assert _collectives(_uses(source, "bagua_jax.wire", is_package=False)) == []


@pytest.mark.parametrize(
    "source",
    [
        "from bagua_jax.algorithms import qadam",
        "from bagua_jax import algorithms",
        "import bagua_jax.algorithms.qadam",
        "def f():\n from .algorithms import qadam",
        "from . import algorithms",
        "import bagua_jax\nbagua_jax.algorithms.qadam(1)",
        "import importlib\nimportlib.import_module('bagua_jax.algorithms')",
        "from bagua_jax.experiments.spec.config import load",
    ],
)
def test_an_upward_import_is_seen_however_it_is_spelled(source: str):
    module = "bagua_jax.primitives"
    assert _upward(module, _uses(source, module, is_package=False))


# --- what importing does ---


def _python(code: str) -> str:
    """Run code at the repository root, where a bare import would find a second copy."""
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_importing_everything_makes_one_copy_and_starts_no_backend():
    """A user may still choose platform and devices after every import."""
    everything = [m for m in MODULES if ".notebooks" not in m]
    _python(
        "import importlib, sys\n"
        "from jax._src import xla_bridge\n"
        f"for name in {everything!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert not xla_bridge.backends_are_initialized(), name\n"
        "twice = {'algorithms', 'experiments'} & set(sys.modules)\n"
        "assert not twice, twice\n"
    )


def test_importing_the_package_alone_imports_nothing_else():
    """What is used is imported then: algorithms, too, which nobody has imported."""
    _python(
        "import sys\n"
        "import bagua_jax\n"
        "loaded = {m for m in sys.modules if m.startswith(('bagua_jax.', 'jax'))}\n"
        "assert not loaded, loaded\n"
        "assert 'algorithms' in dir(bagua_jax)\n"
        "bagua_jax.Workers\n"
        "assert 'bagua_jax.algorithms' not in sys.modules\n"
        "name = bagua_jax.algorithms.bytegrad.__module__\n"
        "assert name == 'bagua_jax.algorithms.bytegrad'\n"
        "from bagua_jax import algorithms\n"
        "assert algorithms is bagua_jax.algorithms\n"
    )


# --- the list of packages ---


def test_every_package_is_listed():
    """A folder that is not listed by name would be missing from the wheel."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        setuptools = tomllib.load(file)["tool"]["setuptools"]
    folders = {path.parent for path in MODULES.values()}
    without_init = {str(f) for f in folders if not (f / "__init__.py").exists()}
    assert without_init == set()
    packages = {
        module.rpartition(".")[0] if path.name != "__init__.py" else module: path.parent
        for module, path in MODULES.items()
    }
    assert sorted(setuptools["packages"]) == sorted(packages)
    mapped = {
        package: str(folder.relative_to(ROOT))
        for package, folder in packages.items()
        if folder != ROOT / package.replace(".", "/")
    }
    assert setuptools["package-dir"] == mapped


# --- what is public ---


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_exist_and_are_documented(name: str):
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    module = importlib.import_module(name)
    assert module.__doc__
    if name == "bagua_jax.algorithms":  # exports its factories by ``import x as x``
        assert {k for k in REGISTRY if getattr(module, k) is REGISTRY[k].factory} == (
            set(REGISTRY)
        )
        return
    if not hasattr(module, "__all__"):
        kinds = (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
        assert not any(isinstance(node, kinds) for node in tree.body), "no __all__"
        return
    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        thing = getattr(module, public)
        if inspect.isfunction(thing) or inspect.isclass(thing):
            doc = thing.__doc__ if inspect.isfunction(thing) else vars(thing)["__doc__"]
            generated = doc is None or doc.startswith(f"{public}(")
            assert not generated, f"{name}.{public} has no docstring"


@pytest.mark.parametrize("name", REGISTRY)
@pytest.mark.parametrize(
    "section",
    [
        r"^Placement: (gradient side|weight side|(local )?optimizer)",
        r"^\.\. math::",
        r"^Args:",
        r"^Returns:",
        r"^Raises:",
        r"^Communication:",
        r"^State:",
        r"^Differences from|^References:",
        r"^Example:(.|\n)*^ +>>> ",
    ],
)
def test_every_algorithm_states_its_facts(name: str, section: str):
    doc = inspect.getdoc(REGISTRY[name].factory) or ""
    assert re.search(section, doc, re.MULTILINE), f"{name}: no {section!r}"


@pytest.mark.parametrize("name", REGISTRY)
def test_every_argument_is_documented(name: str):
    doc = inspect.getdoc(REGISTRY[name].factory) or ""
    for argument in inspect.signature(REGISTRY[name].factory).parameters:
        assert re.search(
            rf"^    {argument}(, \w+)*: |^    (\w+, )+{argument}", doc, re.M
        ), f"{name}: {argument} is not under Args"
