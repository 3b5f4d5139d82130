"""Every block of code in the README does what a newcomer who pastes it expects.

- ``python`` blocks run each alone, in a fresh process and an empty folder, with
  warnings as errors.
- ``bash`` and ``console`` blocks run line by line, in the order of the README, in one
  folder, with this environment's commands first on the path. Lines that set up a
  checkout (git, pip, make, ...) are not run but checked otherwise: see ``CHECKED``.
- ``yaml`` blocks are read as configs.
- ``text`` blocks are output, or drawings. No other language may stand there.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from bagua_jax.experiments.spec import config

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
LANGUAGES = ("python", "bash", "console", "yaml", "text")
SECONDS = 600


class Block(NamedTuple):
    """A fenced block: its language, the line of its first line, and its text."""

    language: str
    line: int
    text: str


def fenced_blocks(markdown: str) -> list[Block]:
    """Return every fenced block, also an indented one (in a list), dedented."""
    blocks: list[Block] = []
    fence, indent, language, start = "", "", "", 0
    lines = markdown.splitlines()
    for number, line in enumerate(lines, 1):
        if not fence:
            if match := re.match(r"(\s*)(`{3,}|~{3,})\s*([\w-]*)", line):
                indent, fence, language = match.groups()
                start = number + 1
        elif re.fullmatch(rf"\s*{fence[0]}{{{len(fence)},}}\s*", line):
            inside = [
                text.removeprefix(indent) for text in lines[start - 1 : number - 1]
            ]
            blocks.append(Block(language, start, "\n".join(inside) + "\n"))
            fence = ""
    assert not fence, f"README.md:{start - 1}: the block is never closed"
    return blocks


def commands(block: Block) -> list[tuple[int, str]]:
    """Return the commands of a block with their lines; ``\\`` and ``&&`` join them."""
    found: list[tuple[int, str]] = []
    pending = ""
    for number, line in enumerate(block.text.splitlines(), block.line):
        if block.language == "console" and not pending:
            if not line.startswith("$ "):
                continue  # output
            line = line.removeprefix("$ ")
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        parts = [part.strip() for part in pending.split("&&")]
        found += [(number, p) for p in parts if p and not p.startswith("#")]
        pending = ""
    return found


BLOCKS = fenced_blocks(README.read_text(encoding="utf-8"))


def of(*languages: str) -> list[Block]:
    """Return the README's blocks in these languages."""
    return [block for block in BLOCKS if block.language in languages]


def environment() -> dict[str, str]:
    """Make a newcomer's environment: none of what the tests set, nothing of jax's."""
    ours = re.compile(r"(XLA|JAX|PYTHON|PYTEST|BAGUA)_?|NPROC$|VIRTUAL_ENV$")
    env = {key: value for key, value in os.environ.items() if not ours.match(key)}
    path = [str(Path(sys.executable).parent), env.get("PATH", "")]
    return env | {"PATH": os.pathsep.join(path)}


def run(command: list[str], folder: Path, where: str) -> None:
    """Run a command of the README; show its output if it fails."""
    ran = subprocess.run(
        command,
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    assert ran.returncode == 0, f"{where} fails:\n{ran.stdout}"


# --- lines that set up a checkout: checked instead of run ---


def check_clone(words: list[str]) -> None:
    """``git clone ADDRESS [FOLDER]``."""
    assert words[1] == "clone", "only `git clone` is expected in the README"
    assert words[2].startswith("https://"), f"{words[2]!r} is no https address"


def check_cd(words: list[str]) -> None:
    """``cd`` into the clone, the one folder that a README can know."""
    lines = [line for b in of("bash", "console") for _, line in commands(b)]
    addresses = [shlex.split(x, comments=True)[-1] for x in lines if "git clone" in x]
    clones = [a.rstrip("/").split("/")[-1].removesuffix(".git") for a in addresses]
    assert words[1] in clones, f"cd {words[1]}: the README clones {clones}"


def check_pip(words: list[str]) -> None:
    """``pip install [-e] WHAT``: this project, in extras that it has, or its jax."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    extras = {"jax": ["cuda13"], "bagua-jax": project["optional-dependencies"]}
    extras["."] = extras["bagua-jax"]
    words = [word for word in words if word not in ("-e", "--editable", "-U")]
    assert words[1] == "install", "only `pip install` is expected in the README"
    assert words[2:], "pip install needs a package"
    for word in words[2:]:
        match = re.fullmatch(r"([\w.-]+?)(?:\[([\w,]+)\])?(?:[<>=~]=?[\d.]+)?", word)
        assert match, f"pip install {word}: neither a package nor an option known here"
        name, wanted = match[1], match[2]
        assert name in extras, f"pip install {word}: expected one of {list(extras)}"
        for extra in wanted.split(",") if wanted else []:
            assert extra in extras[name], f"pip install {word}: no extra {extra!r}"


def check_venv(words: list[str]) -> None:
    """``source .venv/bin/activate``, which the path of these tests stands for."""
    assert words[1] == ".venv/bin/activate", f"{words[1]!r} is not what `make` creates"


def check_make(words: list[str]) -> None:
    """``make TARGET...``: the targets exist. (What they run is run elsewhere.)"""
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    ran = subprocess.run(
        [make, "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr


def check_pytest(words: list[str]) -> None:
    """``pytest [OPTIONS] PATHS``: the paths exist. (This is pytest.)"""
    for word in words[1:]:
        if not word.startswith("-") and "--pyargs" not in words:
            assert (ROOT / word.partition("::")[0]).exists(), f"{word} does not exist"


CHECKED: dict[str, Callable[[list[str]], None]] = {
    "cd": check_cd,
    "git": check_clone,
    "make": check_make,
    "pip": check_pip,
    "pytest": check_pytest,
    "source": check_venv,
}


def run_or_check(line: str, folder: Path, where: str) -> None:
    """Run a line in bash, or check it if it is one of those that are not run."""
    words = shlex.split(line, comments=True)
    words = [w for w in words if not re.match(r"[A-Z_]+=", w)]
    if words[:2] == ["python", "-m"] and words[2] in CHECKED:
        words = words[2:]
    if words and words[0] in CHECKED:
        CHECKED[words[0]](words)
        return
    run(["bash", "-euo", "pipefail", "-c", line], folder, f"{where}: {line}")


# --- the README ---


def test_readme_has_code_to_run():
    assert of("python"), "README.md has no python block"
    assert of("bash", "console"), "README.md has no bash block"


def test_every_block_names_a_known_language():
    unknown = [f"README.md:{b.line}: {b.language!r}" for b in BLOCKS]
    unknown = [
        u for u, b in zip(unknown, BLOCKS, strict=True) if b.language not in LANGUAGES
    ]
    assert unknown == []


@pytest.mark.parametrize("block", of("python"), ids=lambda b: f"line{b.line}")
def test_python_block_runs_alone(block: Block, tmp_path: Path):
    file = tmp_path / "pasted.py"
    file.write_text(block.text, encoding="utf-8")
    command = [sys.executable, "-W", "error", str(file)]
    run(command, tmp_path, f"README.md:{block.line}")


def test_shell_blocks_run_in_order(tmp_path: Path):
    for block in of("bash", "console"):
        for number, line in commands(block):
            run_or_check(line, tmp_path, f"README.md:{number}")


@pytest.mark.parametrize("block", of("yaml"), ids=lambda b: f"line{b.line}")
def test_yaml_block_is_a_config(block: Block, tmp_path: Path):
    file = tmp_path / "pasted.yaml"
    file.write_text(block.text, encoding="utf-8")
    config.load(file)


# --- the reader of READMEs ---


def test_fences_are_found_indented_and_nested():
    text = (
        "a\n```python\nx = 1\n```\n- b\n  ~~~bash\n  ls\n  ~~~\n````text\n```\n````\n"
    )
    assert fenced_blocks(text) == [
        Block("python", 3, "x = 1\n"),
        Block("bash", 7, "ls\n"),
        Block("text", 10, "```\n"),
    ]


def test_commands_are_found():
    bash = Block("bash", 5, "# a comment\nmake demo && ls -l\necho \\\n  two\n")
    assert commands(bash) == [(6, "make demo"), (6, "ls -l"), (8, "echo   two")]
    console = Block("console", 1, "$ echo 1\n1\n$ true\n")
    assert commands(console) == [(1, "echo 1"), (3, "true")]


@pytest.mark.parametrize(
    "line",
    [
        "make no-such-target",
        "git push",
        "git clone git@host:bagua_jax",
        "cd somewhere",
        "pip install .[no_such_extra]",
        "pip install another-package",
        "python -m pip install",
        "source env/bin/activate",
        "pytest tests/no_such_test.py",
        "false",
        "false | cat",
        "bagua-jax run no-such-config",
    ],
)
def test_a_wrong_line_fails(line: str, tmp_path: Path):
    with pytest.raises(AssertionError):
        run_or_check(line, tmp_path, "README.md:1")


@pytest.mark.parametrize(
    "line",
    [
        "make lint",
        "make test PYTHON=python3.12",
        "git clone https://example.org/bagua_jax.git",
        "pip install -e '.[dev]'",
        'pip install "bagua-jax[cuda]"',
        "python -m pip install 'jax[cuda13]>=0.10'",
        "source .venv/bin/activate",
        "pytest tests/test_readme.py",
        "bagua-jax list algorithms",
    ],
)
def test_a_right_line_passes(line: str, tmp_path: Path):
    run_or_check(line, tmp_path, "README.md:1")
