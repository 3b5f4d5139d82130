"""Break shipped configs and flags, thousands of times, and count what becomes of them.

A trial takes a shipped config or flags of a command, breaks them at a place drawn at
random, and has them judged as the command line does: ``bagua-jax run CONFIG --check``
for configs and its flags, the reading of the flags alone for other commands. Nothing is
trained, and while a trial is judged nothing may be started, written, or connected to:
Python's audit hooks tell.

    accepted            status 0: the config is another one, and can be run
    refused             status 2, with one message of less than 2 KB
    long message        status 2, with more
    other status        neither 0 nor 2
    executed            a process, a file written, a connection
    slow                more than SLOW seconds of processor time of its own
    traceback           an exception that no message was made of

Everything runs in this process. Run it from the repository's root:
``python benchmarks/config_fuzz.py``. It prints a table, writes
``benchmarks/results/config_fuzz.json``, and fails if a trial was anything but accepted
or refused; such a trial is printed with the number that repeats it (``--first``).
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import io
import json
import os
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bagua_jax.experiments import cli
from bagua_jax.experiments.commands.base import OnConfig
from bagua_jax.experiments.runs import supervise
from bagua_jax.experiments.spec import config

RESULTS = Path(__file__).parent / "results"
ANSWERS = (
    "accepted",
    "refused",
    "long message",
    "other status",
    "executed",
    "slow",
    "traceback",
)
WRONG = ANSWERS[2:]
LONGEST = 2_000
"""Bytes of a message."""
SLOW = 1.0
"""Seconds of processor time for one algorithm's arguments to be read and traced."""

CANARY = "canary"
VALUES: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 65, 1000, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 10**30, 10**400),
    *(0.0, -0.0, 0.5, 1.0, 1.5, -2.5, 1e-45, 1e-300, 1e38, 1e300),
    *(float("nan"), float("inf"), -float("inf")),
    *(None, True, False, "", " ", "x", "0", "1e-3", "nan", "null", "~", "-", ".", ".."),
    *("x" * 5_000, "é" * 300, "\u202e", "\ufeff", "a\tb", "a\nb", "a/b", "../x", "/"),
    *("topk", "topk(", "topk(2)", "topk(nan)", "topk(0.1, 0.1)", "topk(ratio=1e-9)"),
    *("qsgd(levels=0)", "qsgd(99999999999)", "cast(int8)", "cast(V99999999)", "cast()"),
    *("chain(topk(0.1), blockwise(4))", "hadamard(hadamard(sign))", "powersgd(9999)"),
    *("ring", "ring(self_weight=2)", "random_matching(1000)", "base_k(0)", "torus"),
    *("os:system", "posix:abort", f"os:system('touch {CANARY}')", "subprocess:run"),
    *("this:x", "nowhere:x", ":", "a:", ":a", "numpy:load", "antigravity:x"),
    *(
        f"__import__('os').system('touch {CANARY}')",
        f"$(touch {CANARY})",
        "{0.__class__}",
    ),
    *(
        "simulate",
        "devices",
        "processes",
        "stop",
        "skip",
        "drop",
        "label",
        "iid",
        "sgd",
    ),
    *(
        [],
        {},
        [[]],
        [None],
        ["x"] * 500,
        {"name": "topk"},
        {"name": "topk", "ratio": -1},
    ),
    *({"name": "os:system", "command": f"touch {CANARY}"}, {"name": []}, {1: 2}),
)
SNIPPETS = (
    *("!!python/object/apply:os.system ['touch canary']", "!!python/name:os.system ''"),
    *(
        "!!python/module:os ''",
        "!!int abc",
        "!!float x",
        "!!timestamp y",
        "!!binary 'x'",
    ),
    *("!!set {a, b}", "!!omap [a: 1]", "!mine x", "!<tag:x,2000:y> z", "2001-99-99"),
    *("2001-01-01", "&a [*a]", "*nothing", "&a x", "<<: *a", "<<: {steps: 3}", "? x"),
    *('"\\U00110000"', '"\\ud800"', '"\\0"', '"\\x1b[2J"', "\x00", "\x1b", "\x85"),
    *("[" * 40, "{a: " * 40, "[" * 3_000, "- " * 300, "---\n", "...\n", "%YAML 9.9\n"),
    *(
        ": ",
        "- ",
        "# ",
        "|\n",
        ">\n",
        "'",
        '"',
        "{",
        "}",
        "[",
        "]",
        ",",
        "\t",
        "\n",
        "@",
    ),
    *(
        "9" * 5_000,
        "0x",
        "0o9",
        "1:30",
        "1_000",
        "=",
        "yes",
        "no",
        "steps: 3\nsteps: 4\n",
    ),
    "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"b{i}: &a{i} [{', '.join(['*a'] * 10)}]\n" for i in range(3)),
    "a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)),
)


class Trial(NamedTuple):
    """Something broken, and how.

    Attributes:
        how: it was broken.
        argv: of the command line; ``CONFIG`` stands for the file.
        content: of the config file.
    """

    how: str
    argv: list[str]
    content: bytes


# --- breaking ---


def _text(rng: random.Random, text: str) -> tuple[str, bytes]:
    """Break the text of a config."""
    lines = text.splitlines(keepends=True)
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    place = rng.randrange(len(text))
    how = rng.choice(
        ("a character", "a line", "lines", "a cut", "a snippet", "indents", "bytes")
    )
    match how:
        case "a character":
            new = chr(rng.choice((rng.randrange(128), rng.randrange(0xD800))))
            text = text[:place] + new + text[place + rng.randrange(2) :]
        case "a line":
            lines[at] = rng.choice(("", lines[at] * 2, lines[at] * 999, lines[other]))
            text = "".join(lines)
        case "lines":
            lines[at], lines[other] = lines[other], lines[at]
            text = "".join(lines)
        case "a cut":
            text = text[:place] if rng.random() < 0.5 else text[place:]
        case "a snippet":
            if rng.random() < 0.5:
                head, _, _ = lines[at].partition(":")
                lines[at] = f"{head}: {rng.choice(SNIPPETS)}\n"
                text = "".join(lines)
            else:
                text = text[:place] + rng.choice(SNIPPETS) + text[place:]
        case "indents":
            lines[at] = " " * rng.randrange(5) + lines[at].lstrip()
            text = "".join(lines)
        case "bytes":
            code = rng.choice(("utf-16", "utf-32", "utf-8-sig", "latin-1", "utf-7"))
            raw = bytearray(text.encode(code, "replace"))
            for _ in range(rng.choice((0, 1, 5))):
                raw[rng.randrange(len(raw))] = rng.randrange(256)
            return how, bytes(raw)
    return how, text.encode(errors="surrogatepass")


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container of a tree with each of its keys."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(pairs):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _value(rng: random.Random, old: Any) -> Any:
    """Draw a value in place of another."""
    if isinstance(old, bool) or rng.random() < 0.6:
        return rng.choice(VALUES)
    if isinstance(old, int | float):
        return old * rng.choice((-1, 2, 10, 1000, 10**9, 0.5, 1e-9, 1e30))
    if isinstance(old, str) and old:
        at = rng.randrange(len(old))
        new = rng.choice((chr(rng.randrange(32, 127)), "", old[at] * 2, old))
        return old[:at] + new + old[at + 1 :]
    return rng.choice(VALUES)


def _tree(rng: random.Random, text: str) -> tuple[str, bytes]:
    """Break the values of a config."""
    tree, how = yaml.safe_load(text), "nothing"
    for _ in range(rng.choice((1, 1, 1, 1, 2, 5))):
        places = list(_places(tree))
        if not places:
            break
        within, key = rng.choice(places)
        how = rng.choice(("a value", "a value", "a name", "one less", "one more"))
        if how == "one less":
            del within[key]
        elif how == "one more" and isinstance(within, list):
            within.insert(key, rng.choice((within[key], rng.choice(VALUES))))
        elif how == "one more":
            within[str(rng.choice(VALUES))[:50]] = within[key]
        elif how == "a name" and isinstance(within, dict):
            within[str(_value(rng, key))] = within.pop(key)
        else:
            how, within[key] = "a value", _value(rng, within[key])
    return how, yaml.safe_dump(tree, sort_keys=False).encode()


@functools.cache
def _fitting(flags: type) -> dict[str, list[str]]:
    """Return for each flag of a command what it takes in shipped configs.

    A switch takes nothing, and comes with its negative.
    """
    of = config.OptimizerConfig
    found: dict[str, list[str]] = {}

    def add(name: str, values: Iterable[Any]) -> None:
        values = list(values)
        if all(isinstance(value, bool) for value in values):
            found[f"--{name}"] = found[f"--no-{name}"] = []
        else:
            said = ("None" if value is None else str(value) for value in values)
            found[f"--{name}"] = sorted(set(said))

    loaded = [config.load(name) for name in config.shipped()]
    for field in dataclasses.fields(flags):
        name = field.name.replace("_", "-")
        if field.name == "experiment" and issubclass(flags, OnConfig):
            for inner in dataclasses.fields(config.ExperimentConfig):
                values = [getattr(one, inner.name) for one in loaded]
                if inner.name == "algorithms":
                    values = [",".join(a.label for a in one) for one in values]
                if inner.name not in ("optimizer", "claims"):
                    add(inner.name.replace("_", "-"), values)
            for inner in dataclasses.fields(of):
                values = [getattr(one.optimizer, inner.name) for one in loaded]
                add(f"optimizer.{inner.name}".replace("_", "-"), values)
        elif field.name == "policy":
            for inner in dataclasses.fields(supervise.Policy):
                add(inner.name.replace("_", "-"), [inner.default])
        elif field.name not in ("config", "words", "command", "check"):
            add(name, ["2" if field.default is dataclasses.MISSING else field.default])
    return found


def _flags(rng: random.Random, command: str) -> list[str]:
    """Draw flags, most of them with a value that fits in another config."""
    fitting = _fitting(cli.COMMANDS[command][0])
    words = []
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4))):
        name = rng.choice(list(fitting))
        values = fitting[name]
        if rng.random() < 0.1:
            at = rng.randrange(len(name))
            name = name[:at] + rng.choice(("", "-", "x", "=")) + name[at + 1 :]
        if not values and rng.random() < 0.9:
            words.append(name)
            continue
        value = rng.choice(values or ["true"])
        match rng.randrange(5):
            case 0:
                value = str(rng.choice(rng.choice((VALUES, SNIPPETS))))
            case 1:
                value = str(_value(rng, _number(value)))
        if name == "--algorithms" and rng.random() < 0.5:
            value = f"[{{name: qadam, learning_rate: 0.1, warmup_steps: {value}}}]"
        words += [name, value.replace("\0", "")][: rng.choice((1, *[2] * 19))]
    return words


def _number(text: str) -> Any:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def draw(seed: int, number: int) -> Trial:
    """Draw a trial: the same one for the same seed and number."""
    rng = random.Random(f"{seed}/{number}")
    shipped = config.shipped()
    text = shipped[rng.choice(list(shipped))].read_text("utf-8")
    kind = rng.choice(("text", "values", "values", "flags"))
    if kind != "flags":
        how, content = (_text if kind == "text" else _tree)(rng, text)
        return Trial(f"{kind}: {how}", ["run", "CONFIG", "--check"], content)
    command = rng.choice(("run", "run", "run", *sorted(cli.COMMANDS)))
    argv = [command]
    if issubclass(cli.COMMANDS[command][0], OnConfig):
        argv.append("CONFIG")
    argv += ["--check"] * (command == "run")
    if command == "list":  # a word, and no flag
        argv.append(rng.choice(("all", "tasks", "algorithms", str(rng.choice(VALUES)))))
    else:
        argv += _flags(rng, command)
    if command == "launch":
        argv += ["--processes", "2"] * (rng.random() < 0.8)
        argv += ["--", "run", "CONFIG", *_flags(rng, "run")]
    return Trial(f"flags: {command}", argv, text.encode())


# --- judging ---

_STARTED = {
    *("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn"),
    *("os.fork", "os.forkpty", "pty.spawn", "socket.connect", "socket.bind"),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink"),
    *("os.chmod", "os.truncate", "os.kill", "shutil.rmtree", "ctypes.dlopen"),
}
_watched: list[str] | None = None


def _watch(event: str, arguments: tuple) -> None:
    if _watched is None:
        return
    if event == "open":
        path, mode, flags = arguments
        writes = set(mode or "") & set("wax+")
        writes = writes or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and "__pycache__" not in str(path) and path != os.devnull:
            _watched.append(f"open {path!r} {mode}")
    elif event in _STARTED:
        _watched.append(f"{event} {arguments!r}"[:200])


@contextlib.contextmanager
def _only_read(name: str) -> Iterator[None]:
    """Let a command do nothing once its flags are read."""
    kept = cli.COMMANDS[name]
    if name != "run":
        cli.COMMANDS[name] = kept[0], lambda command: 0
    try:
        yield
    finally:
        cli.COMMANDS[name] = kept


def judge(trial: Trial, folder: Path, slow: float = SLOW) -> tuple[str, float, str]:
    """Judge a trial in a folder: the answer, seconds of processor time, what was said.

    Args:
        trial: to judge.
        folder: of its config file, in which commands run.
        slow: seconds beyond which it is.
    """
    global _watched
    file = folder / "config.yaml"
    file.write_bytes(trial.content)
    argv = [str(file) if word == "CONFIG" else word for word in trial.argv]
    out, err = io.StringIO(), io.StringIO()
    status, failed = 0, ""
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        _only_read(argv[0]),
    ):
        started = _watched = []
        begun = time.process_time()
        try:
            status = cli.main(argv)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            failed = traceback.format_exc()
        finally:
            took = time.process_time() - begun
            _watched = None
    said = err.getvalue()
    left = {path.name for path in folder.iterdir()} - {file.name}
    if failed or "Traceback" in said + out.getvalue():
        return "traceback", took, failed or said
    if started or left:
        return "executed", took, f"{started} {left}"
    if status not in (0, 2):
        return "other status", took, f"{status}: {said}"
    if len(said.encode(errors="backslashreplace")) >= LONGEST:
        return "long message", took, said
    if status == 2 and not said.strip():
        return "other status", took, "2, and nothing was said"
    if took > slow:
        return "slow", took, said or out.getvalue()
    return ("refused" if status else "accepted"), took, said


# --- counting ---


def run(
    numbers: range, seed: int, say: Callable[[str], None], slow: float = SLOW
) -> list[dict[str, Any]]:
    """Draw and judge trials.

    Args:
        numbers: which.
        seed: of all of them.
        say: told of every trial that went wrong.
        slow: seconds beyond which a trial is.
    """
    import jax

    sys.addaudithook(_watch)
    done = []
    with tempfile.TemporaryDirectory() as folder:
        for name in config.shipped():  # what is imported late is imported now
            text = config.shipped()[name].read_bytes()
            judge(Trial("", ["run", "CONFIG", "--check"], text), Path(folder))
        for number in numbers:
            trial = draw(seed, number)
            answer, took, said = judge(trial, Path(folder), slow)
            done.append({"how": trial.how, "answer": answer, "seconds": took})
            if answer in WRONG:
                say(f"{number}: {trial.how}: {answer}, {took:.2f} s: {trial.argv}")
                say(f"    {said[-1500:]}")
                for path in Path(folder).iterdir():
                    path.unlink()
            if number % 500 == 499:
                jax.clear_caches()
                say(f"{len(done)} of {len(numbers)}")
    return done


def tabulate(done: list[dict[str, Any]]) -> list[list[str]]:
    """Count answers by how the trials were broken, and in all."""
    ways = sorted({trial["how"] for trial in done})
    rows = []
    for way in [*ways, "all"]:
        own = [trial["answer"] for trial in done if way in ("all", trial["how"])]
        rows.append([way, str(len(own)), *(str(own.count(a)) for a in ANSWERS)])
    return rows


def main() -> None:
    """Break, judge, and write down what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slow", type=float, default=SLOW, help="seconds that are")
    arguments = parser.parse_args()
    begun = time.monotonic()
    numbers = range(arguments.first, arguments.first + arguments.trials)
    say = functools.partial(print, flush=True)
    done = run(numbers, arguments.seed, say, arguments.slow)

    import jax
    from rich.console import Console

    from bagua_jax.experiments.runs import folders
    from bagua_jax.experiments.tables.table import Table

    rows = tabulate(done)
    Console().print(Table(["broken", "trials", *ANSWERS], rows))
    seconds = sorted(trial["seconds"] for trial in done)
    facts = {
        "machine": folders.processor(),
        "load_average_at_the_end": os.getloadavg()[0],
        "python": sys.version.split()[0],
        "jax": jax.__version__,
        "seed": arguments.seed,
        "trials": len(done),
        "seconds": round(time.monotonic() - begun),
        "processor_seconds_of_a_trial": {
            "median": round(statistics.median(seconds), 4),
            "99th percentile": round(seconds[int(0.99 * len(seconds))], 4),
            "maximum": round(seconds[-1], 4),
        },
        "answers": dict(collections.Counter(trial["answer"] for trial in done)),
        "columns": ["broken", "trials", *ANSWERS],
        "rows": rows,
    }
    print(json.dumps(facts["processor_seconds_of_a_trial"]))
    if numbers == range(10_000):
        text = json.dumps(facts, indent=1) + "\n"
        (RESULTS / "config_fuzz.json").write_text(text, "utf-8")
    if any(trial["answer"] in WRONG for trial in done):
        raise SystemExit("a trial was neither accepted nor refused as it should be")


if __name__ == "__main__":
    main()
