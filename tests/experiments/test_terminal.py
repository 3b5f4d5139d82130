"""The command line on poor terminals, without a home, and under Ctrl-C at any time."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from bagua_jax.experiments.commands import terminal

PROGRAM = [sys.executable, "-m", "bagua_jax.experiments"]
RUN = "run quadratic --steps 20 --workers 2 --algorithms bytegrad".split()


def environment(**changes: str | None) -> dict[str, str]:
    drop = ("JAX_PLATFORMS", "XLA_FLAGS", "NPROC", "COLUMNS")
    clean = {k: v for k, v in os.environ.items() if k not in drop} | changes
    return {k: v for k, v in clean.items() if v is not None}


ASCII = environment(LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0")


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (["list"], 0, ["w 0.", "r 0", "one_peer_exponential"]),
        (["run", "demo", "--help"], 0, ["--steps"]),
        (["run", "demo", "--steps", "é"], 2, ["--steps"]),
        (["run", "démo"], 2, ["'d\\udcc3\\udca9mo'", "'demo'"]),
        (RUN, 0, ["distance2", "bytegrad", "results.json"]),
        (["what-if"], 0, ["bytegrad"]),
    ],
    ids=lambda x: " ".join(x[:2]) if isinstance(x, list) else "",
)
def test_an_ascii_terminal(tmp_path, argv, status, words):
    done = subprocess.run(
        [*PROGRAM, *argv], cwd=tmp_path, env=ASCII, capture_output=True, timeout=300
    )
    text = (done.stdout + done.stderr).decode("ascii")
    assert done.returncode == status, text
    assert "Traceback" not in text
    for word in words:
        assert word in text


def test_characters_that_are_lacking_are_written_by_others_like_them():
    def plain(text: str) -> bytes:
        return text.encode("ascii", "bagua_jax.plain")

    assert plain("ω ≤ |x|²…") == b"w <= |x|2."
    assert plain("中é") == rb"\u4e2d\xe9"
    assert "é²ω".encode("latin-1", "bagua_jax.plain") == b"\xe9\xb2w"
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("ascii", "bagua_jax.plain")
    terminal.degrade(object())  # type: ignore[arg-type]  # has no reconfigure


def on_a_terminal(argv: list[str], cwd, **changes: str | None) -> tuple[int, str]:
    """Run a command whose stdout and stderr are a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*PROGRAM, *argv],
        cwd=cwd,
        env=environment(**changes),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    said = b""
    try:
        while part := os.read(ours, 65536):
            said += part
    except OSError:  # Linux ends a terminal's stream in an error
        pass
    os.close(ours)
    return process.wait(timeout=60), said.decode()


def test_a_dumb_terminal_shows_lines_and_no_escape_sequences(tmp_path):
    status, said = on_a_terminal(RUN, tmp_path, TERM="dumb")
    assert status == 0, said
    assert "Traceback" not in said and "\x1b" not in said
    assert "bytegrad: step 20/20  loss" in said and "results.json" in said


@pytest.mark.parametrize("home", [None, "/nonexistent"])
def test_no_home(tmp_path, home):
    env = environment(HOME=home, XDG_CACHE_HOME=None, XDG_CONFIG_HOME=None)
    env.pop("MPLCONFIGDIR", None)
    done = subprocess.run(
        [*PROGRAM, *RUN], cwd=tmp_path, env=env, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    assert (tmp_path / "runs/quadratic/loss_vs_steps.png").exists()


# --- Ctrl-C ---


@pytest.fixture(autouse=True)
def heeded():
    """A child of a background job inherits that Ctrl-C is ignored; here it may not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# Ctrl-C comes while the given import is done: at exactly that point of the start.
STRUCK = """
import os, signal, sys
from bagua_jax.experiments.__main__ import main
def strike(event, arguments):
    global left
    if event == "import":
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGINT)
left = int(sys.argv.pop(1))
sys.addaudithook(strike)
sys.exit(main())
"""


@pytest.mark.parametrize("imported", [1, 3, 30, 100, 200, 400, 700, 1000])
def test_ctrl_c_while_the_program_starts(tmp_path, imported):
    done = subprocess.run(
        [sys.executable, "-c", STRUCK, str(imported), *RUN],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (1, b"bagua-jax: interrupted.\n")
    assert done.stdout == b""
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_while_it_trains_leaves_what_can_be_continued(tmp_path):
    argv = [*PROGRAM, *RUN[:2], "--steps", "10000000", *RUN[4:]]
    process = subprocess.Popen(
        argv,
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("runs/quadratic/*/metrics.jsonl")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    process.send_signal(2)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert said == "bagua-jax: interrupted; the same command continues.\n"


def test_where_ctrl_c_is_ignored_it_stays_so():
    program = (
        "import signal; signal.signal(2, signal.SIG_IGN);"
        "from bagua_jax.experiments.commands import terminal;"
        "terminal.stop_at_once(); terminal.interruptible();"
        "print(signal.getsignal(2) is signal.SIG_IGN)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "True\n"
