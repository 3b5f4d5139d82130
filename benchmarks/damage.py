"""Damage the files of run folders, thousands of times, and count what becomes of it.

Runs of every kind are made once: in simulation, on devices, over processes with
``bagua-jax launch``, and asynchronous ones in rounds and in pairs. A trial copies the
folder of one, finished or interrupted, damages a file of it, gives the command again,
and compares what comes out with what comes out of the undamaged folder: metrics,
summary, the last checkpoint or models, the times of earlier stretches, the tables.

    named and refused   the command fails, and names the file
    healed              the outcome is the undamaged one, and the damage is said or gone
    left out            the command says what it had to leave out
    harmless            the outcome is the undamaged one; nothing reads what was damaged
    silently wrong      another outcome, and nothing is said
    traceback           an exception that no message was made of

The commands run in this process, with every compiled program kept from trial to trial;
asynchronous workers that go on are run here one after the other, without exchanges.
Run it from the repository's root: ``python benchmarks/damage.py``. It prints a table,
writes ``benchmarks/results/damage.json``, and fails if a trial was silently wrong, gave
a traceback, or was refused without the file's name.
"""

import argparse
import collections
import contextlib
import copy
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
ANSWERS = (
    "named and refused",
    "healed",
    "left out",
    "harmless",
    "refused without a name",
    "silently wrong",
    "traceback",
)
WRONG = ANSWERS[4:]
SMALL = {
    "task": "quadratic",
    "workers": 4,
    "steps": 12,
    "batch_size": 16,
    "eval_every": 5,
    "checkpoint_every": 4,
    "keep_checkpoints": 3,
    "optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9},
}
MEAN = {"name": "async_model_average", "local_steps": 1, "label": "mean"}
KINDS: dict[str, dict[str, Any]] = {
    "simulated": {
        "where": "simulate",
        "algorithms": [
            {"name": "bytegrad", "error_feedback": "both"},
            {"name": "low_precision_decentralized"},
        ],
        "claims": ["bytegrad.train/loss@7 > 0"],
    },
    "devices": {
        "where": "devices",
        "algorithms": [
            {"name": "gradient_allreduce"},
            {"name": "async_model_average", "local_steps": 3, "staleness": 1},
        ],
    },
    "processes": {"where": "processes", "algorithms": [{"name": "decentralized"}]},
    "rounds": {"workers": 2, "algorithms": [MEAN]},
    "pairs": {"workers": 2, "algorithms": [MEAN]},
}
ASYNC = ("rounds", "pairs")
PACE = ("--pace", "0.004", "0.006")


# --- damage ---


def flip(text: bytes, draw: random.Random) -> bytes:
    """Flip a bit."""
    at = draw.randrange(len(text))
    return text[:at] + bytes([text[at] ^ 1 << draw.randrange(8)]) + text[at + 1 :]


def digit(text: bytes, draw: random.Random) -> bytes:
    """Change a digit, so that the file can be read as before."""
    places = [m.start() for m in re.finditer(rb"\d", text)]
    if not places:
        return flip(text, draw)
    at = draw.choice(places)
    other = draw.choice([d for d in b"0123456789" if d != text[at]])
    return text[:at] + bytes([other]) + text[at + 1 :]


def cut(text: bytes, draw: random.Random) -> bytes:
    """Lose the end."""
    return text[: draw.randrange(len(text))]


def hole(text: bytes, draw: random.Random) -> bytes:
    """Lose some bytes, or have zeros there."""
    at, length = draw.randrange(len(text)), draw.choice([1, 4, 64])
    rest = text[at + length :]
    zeros = bytes(len(text) - at - len(rest)) if draw.random() < 0.5 else b""
    return text[:at] + zeros + rest


def lines(text: bytes, draw: random.Random) -> bytes:
    """Lose a line, have it twice, exchange it with the next, or lose the last ones."""
    found = text.splitlines(keepends=True)
    at = draw.randrange(len(found))
    pair = found[at : at + 2]
    changed = draw.choice([[], [found[at]] * 2 + pair[1:], pair[::-1], None])
    if changed is None:
        return b"".join(found[:at])
    return b"".join([*found[:at], *changed, *found[at + (1 if not changed else 2) :]])


def empty(text: bytes, draw: random.Random) -> bytes:
    """Lose everything but the name."""
    return b""


CHANGES = (flip, digit, cut, hole, lines, empty)


class Case(NamedTuple):
    """Runs of one kind, made once.

    Attributes:
        kind: a key of ``KINDS``.
        root: with the folders ``finished`` and ``interrupted`` to be damaged, and
            ``again`` and ``other`` to exchange files with: the same config done once
            more, and one with another seed.
        argv: of the command, without its output folder.
    """

    kind: str
    root: Path
    argv: list[str]


def damage(case: Case, folder: Path, draw: random.Random) -> tuple[str, list[Path]]:
    """Damage a file; say how, and which."""
    by_class = collections.defaultdict(list)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "compiled" not in path.parts:
            by_class[class_of(path)].append(path)
    path = draw.choice(by_class[draw.choice(sorted(by_class))])
    victims, second = [path], path.parent / "copies" / path.name
    if second.exists() and draw.random() < 0.4:
        victims.append(second)
    how = draw.choice(["change"] * 4 + ["lose", "exchange"])
    if path.parent.parent.name == "checkpoints" and draw.random() < 0.2:
        how = "lose the folder"
        shutil.rmtree(path.parent)
    elif how == "lose":
        for victim in victims:
            victim.unlink()
    elif how == "exchange":
        how, source = stranger(case, path, folder, draw)
        for victim in victims:
            victim.write_bytes(source)
    else:
        change = draw.choice(CHANGES)
        how = change.__name__
        state = draw.getstate()
        for victim in victims:  # alike
            draw.setstate(state)
            text = victim.read_bytes()
            victim.write_bytes(change(text, draw) if text else b"x")
    return how, victims


def stranger(
    case: Case, path: Path, folder: Path, draw: random.Random
) -> tuple[str, bytes]:
    """Find a file of the same kind elsewhere."""
    inside = path.relative_to(folder)
    found = []
    for name in ("again", "other"):
        pattern = re.sub(r"-[0-9a-f]{8}-s\d", "-*", str(inside))
        pattern = re.sub(r"^(.*async-.*)-s\d", r"\1-s*", pattern)
        found += [(f"of {name}", p) for p in (case.root / name).glob(pattern)]
    same = [p for p in folder.rglob(f"*{path.suffix}") if p != path and p.is_file()]
    found += [("of another name", p) for p in sorted(same) if "compiled" not in p.parts]
    how, chosen = draw.choice(found) if found else ("empty", None)
    return how, chosen.read_bytes() if chosen else b""


def class_of(path: Path) -> str:
    """Name the kind of a file, so that each kind is damaged as often as the others."""
    if "checkpoints" in path.parts and path.name != "seal.json":
        return "checkpoint"
    name = re.sub(r"-\d+\.", "-W.", path.name)
    return f"copies/{name}" if path.parent.name == "copies" else name


# --- commands in this process ---


def command(case: Case, output: Path) -> tuple[int, str]:
    """Return the command; its status and what it said."""
    from bagua_jax.experiments import cli

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = cli.main([*case.argv, "--output", str(output)])
        except BaseException:
            traceback.print_exc()
            status = -1
    return status, said.getvalue()


def prepare(case_kind: str) -> None:
    """Keep compiled programs, and leave out figures and other processes."""
    os.environ["COLUMNS"] = "200"
    workers = KINDS[case_kind].get("workers", SMALL["workers"])
    if case_kind == "processes":
        from bagua_jax import processes
        from bagua_jax.experiments.runs import supervise

        address = supervise.free_addresses(1)[0]
        os.environ |= {
            "JAX_COORDINATOR_ADDRESS": address,
            processes.PROCESS: "0/1",
        }
        processes.start(workers)
        del os.environ[processes.PROCESS], os.environ["JAX_COORDINATOR_ADDRESS"]
    import jax

    if case_kind != "processes":
        jax.config.update("jax_num_cpu_devices", workers)

    from bagua_jax.experiments import cli
    from bagua_jax.experiments.commands import asynchronous as async_command
    from bagua_jax.experiments.commands import base
    from bagua_jax.experiments.runs import asynchronous, folders, train
    from bagua_jax.experiments.spec import catalog
    from bagua_jax.experiments.tables import report

    patched: list[tuple[Any, str, Callable]] = [
        (report, "_figures", lambda *_: []),
        (cli, "_leave", lambda status: None),
        (base, "join_processes", lambda config: None),
        (catalog, "resolve", kept(catalog.resolve, repr)),
        (train, "build", kept(train.build, lambda config, *_: folders.name_of(config))),
        (train, "_in_order", kept(train._in_order, lambda judge: judge.__qualname__)),
        (asynchronous, "_mixing", lambda *_: contextlib.nullcontext()),
        (asynchronous, "_mean_of_all", lambda params, workers: params),
        (async_command, "_train", train_here),
    ]
    for module, name, value in patched:
        setattr(module, name, value)


def kept(make: Callable, key: Callable) -> Callable:
    """Keep what a function makes."""
    made: dict[Any, Any] = {}

    def get(*args):
        name = key(*args)
        if name not in made:
            made[name] = make(*args)
        return made[name]

    return get


def train_here(command, run, folder: Path, console, resume: bool):
    """Stand for the supervisor of an asynchronous run: its workers, one by one."""
    from bagua_jax.experiments import tasks
    from bagua_jax.experiments.commands.asynchronous import _setting
    from bagua_jax.experiments.runs import asynchronous as runs

    task, setting = tasks.load(run.task), _setting(command, ("",) * run.workers)
    setting = setting._replace(pace_s=())
    data = task.data(run.seed, run.workers)
    for worker in range(run.workers):
        runs.work(run, task, data, setting, worker, folder, b"", resume=resume)
    return setting


# --- what is made once ---


def make(kind: str, root: Path) -> Case:
    """Do the runs of a kind; the interrupted ones are cut out of finished ones."""
    config = root / "config.yaml"
    config.write_text(yaml.safe_dump({"experiment": "small"} | SMALL | KINDS[kind]))
    argv = ["async" if kind in ASYNC else "run", str(config)]
    if kind == "pairs":
        argv += ["--exchange", "pairs"]
    case = Case(kind, root, argv)
    for name, seed in (("finished", "0"), ("again", "0"), ("other", "1")):
        words = [*argv, "--output", str(root / name), "--seed", seed]
        words += PACE if kind in ASYNC else ()
        if kind == "processes":
            words = ["launch", "-n", "2", "--", *words]
        done = subprocess.run(
            [sys.executable, "-m", "bagua_jax.experiments", *words],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{kind}: {done.stdout}{done.stderr}")
    shutil.copytree(root / "finished", root / "interrupted")
    for folder in (root / "interrupted/small").iterdir():
        if folder.is_dir() and folder.name != "processes":
            interrupt(folder)
    (root / "interrupted/small/results.json").unlink(missing_ok=True)
    return case


def interrupt(folder: Path) -> None:
    """Leave a run as a kill after its last checkpoint but one would have left it."""
    for name in ("summary.json", "loss_vs_steps.png", "loss_vs_bytes.png"):
        (folder / name).unlink(missing_ok=True)
    if (folder / "checkpoints").exists():
        shutil.rmtree(folder / "checkpoints/12")
        tear(folder, "metrics.jsonl", lambda line: '"step": 11' in line)
        tear(folder, "timing.jsonl", lambda line: '"step": 12' in line)
        return
    for path in (folder / "metrics.jsonl", folder / "copies/metrics.jsonl"):
        path.unlink()
    for path in sorted(folder.glob("steps-*.jsonl")):
        tear(folder, path.name, lambda line: '"stops"' in line)
        last = json.loads(path.read_text().splitlines()[-2])
        for events in (folder, folder / "copies"):  # those of which a record tells
            events /= path.name.replace("steps", "events")
            found = events.read_text().splitlines(keepends=True)
            events.write_text("".join(found[: last["events"][0]]))


def tear(folder: Path, name: str, first_lost: Callable[[str], bool]) -> None:
    """Cut a journal, and its copy, within a line."""
    for path in (folder / name, folder / "copies" / name):
        found = path.read_text().splitlines(keepends=True)
        count = next(k for k, line in enumerate(found) if first_lost(line))
        path.write_text("".join(found[:count]) + found[count][:-9])


# --- outcomes ---


def outcome(output: Path) -> dict[str, Any]:
    """Collect what must not depend on damage."""
    found: dict[str, Any] = {}
    for folder in sorted((output / "small").iterdir()):
        if folder.name.startswith("async-"):
            found[folder.name] = outcome_of_async(folder)
        elif (folder / "metrics.jsonl").exists():
            found[folder.name] = outcome_of_run(folder)
    results = output / "small/results.json"
    if results.exists():
        found["results"] = plain(json.loads(results.read_text()))
    return found


def plain(value: Any) -> Any:
    """Leave out seals and what a clock says."""
    if isinstance(value, list):
        return [plain(x) for x in value]
    if not isinstance(value, dict):
        return value
    left_out = ("seal", "seconds", "run", "check")
    return {
        k: plain(v)
        for k, v in value.items()
        if k not in left_out and not k.startswith("time/")
    }


def outcome_of_run(folder: Path) -> Any:
    from bagua_jax.experiments.runs import checkpoint
    from bagua_jax.experiments.runs.folders import RunError

    try:
        step, arrays = checkpoint.newest(folder / "checkpoints")
    except RunError:  # of a finished run, which does not read it
        step, arrays = 0, {}
    timing = (folder / "timing.jsonl").read_text().splitlines()
    stretches = [json.loads(line) for line in timing]
    steps, seconds = (sum(x[key] for x in stretches) for key in ("steps", "seconds"))
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "metrics": (folder / "metrics.jsonl").read_text(),
        "summary": plain(summary),
        "timed": (steps, abs(summary["time/steps_per_s"] * seconds / steps - 1) < 1e-9),
        "step": step,
        "state": {k: x.tobytes() for k, x in sorted(arrays.items())},
    }


def outcome_of_async(folder: Path) -> Any:
    metrics = (folder / "metrics.jsonl").read_text().splitlines()
    models = sorted(folder.glob("models-*.f32"))
    return {
        "metrics": [plain(json.loads(line)) for line in metrics],
        "summary": plain(json.loads((folder / "summary.json").read_text())),
        "models": [path.read_bytes() for path in models],
    }


def agree(found: Any, expected: Any, finished: bool) -> bool:
    """Compare outcomes; checkpoints and models of a finished run are not read again."""
    if finished:
        for own in (*found.values(), *expected.values()):
            for key in {"step", "state", "models"} & set(own):
                del own[key]
    return found == expected


def answer_to(
    case: Case, state: str, expected: Any, draw: random.Random, scratch: Path
):
    """Do one trial; the answer, how and what was damaged, and what was said."""
    output = scratch / "runs"
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(case.root / state, output)
    how, victims = damage(case, output / "small", draw)
    damaged = [path.read_bytes() if path.exists() else None for path in victims]
    what = class_of(victims[0])
    status, said = command(case, output)
    finished = state == "finished"
    logs = "".join(p.read_text() for p in output.rglob("log.txt") if p not in victims)
    names = {victims[0].name, *(victims[0].parent.name,) * (what == "checkpoint")}
    if what == "checkpoint" or victims[0].name == "seal.json":
        names.add(f"checkpoint {step_of(victims[0])}")
        names.add(f"checkpoints/{step_of(victims[0])}")
    trouble = (
        "altered|damaged|, line|lost|missing|ends|checksum|another|cannot|not what"
        "|is of worker"
    )
    troubled = [x for x in (said + logs).splitlines() if re.search(trouble, x)]
    named = any(name in line for line in troubled for name in names)
    if "Traceback" in said + logs or status == -1:
        answer = "traceback"
    elif status:
        answer = "named and refused" if named else "refused without a name"
    else:
        try:
            equal = agree(outcome(output), copy.deepcopy(expected), finished)
        except Exception as error:
            equal, said = False, f"{said}\n{error!r}"
        after = [path.read_bytes() if path.exists() else None for path in victims]
        if equal:
            answer = "healed" if named or after != damaged else "harmless"
        else:
            answer = "left out" if named else "silently wrong"
    return answer, what, how, said


def step_of(path: Path) -> str:
    """Find which checkpoint a file is of."""
    parts = path.parts
    return parts[parts.index("checkpoints") + 1]


def trials(kind: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Do the trials of one kind in this process."""
    prepare(kind)
    done = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        case = make(kind, root)
        expected = {}
        for state in ("finished", "interrupted"):
            output = root / "expected" / state
            shutil.copytree(root / state, output)
            status, said = command(case, output)
            if status:
                raise SystemExit(f"{kind}, {state}: {said}")
            expected[state] = outcome(output)
        for number in range(count):
            draw = random.Random(f"{seed} {kind} {number}")
            state = draw.choice(["finished", "interrupted", "interrupted"])
            begun = time.process_time()
            answer, what, how, said = answer_to(
                case, state, expected[state], draw, root
            )
            trial = dict(kind=kind, number=number, state=state, file=what, how=how)
            trial |= {"answer": answer, "cpu_s": time.process_time() - begun}
            if answer in WRONG:
                print(trial, said[-3000:], sep="\n", file=sys.stderr, flush=True)
            done.append(trial)
    return done


# --- all of them ---


def show(done: list[dict[str, Any]], console: Console) -> None:
    """Print how often each kind of file and of run got each answer."""
    for key, title in (("kind", "run"), ("file", "file")):
        table = Table(box=None)
        table.add_column(title)
        for answer in ("trials", *ANSWERS):
            table.add_column(answer, justify="right")
        groups = sorted({trial[key] for trial in done})
        for group in [*groups, "all"]:
            own = [t["answer"] for t in done if group in ("all", t[key])]
            counts = [own.count(answer) for answer in ANSWERS]
            table.add_row(group, str(len(own)), *map(str, counts))
        console.print(table)


def main() -> None:
    """Damage, judge, and write down what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=500, help="of each kind of run")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        done = trials(arguments.only, arguments.trials, arguments.seed)
        print(json.dumps(done))
        return
    done, begun = [], time.monotonic()
    words = ["--trials", str(arguments.trials), "--seed", str(arguments.seed)]
    started = [  # each in a process, because each starts jax in its own way
        subprocess.Popen(
            [sys.executable, __file__, "--only", kind, *words],
            stdout=subprocess.PIPE,
            text=True,
        )
        for kind in arguments.kinds
    ]
    for process in started:
        said, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"{process.args} ended with {process.returncode}")
        done += json.loads(said.splitlines()[-1])
    show(done, Console(width=120))

    import jax

    from bagua_jax.experiments.runs import folders

    counts = collections.Counter(
        (t["kind"], t["state"], t["file"], t["how"], t["answer"]) for t in done
    )
    facts = {
        "machine": folders.processor(),
        "load_average_at_the_end": os.getloadavg()[0],
        "jax": jax.__version__,
        "seed": arguments.seed,
        "trials": len(done),
        "seconds": round(time.monotonic() - begun),
        "answers": {a: sum(t["answer"] == a for t in done) for a in ANSWERS},
        "counts": [[*key, count] for key, count in sorted(counts.items())],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "damage.json").write_text(json.dumps(facts, indent=1) + "\n")
    if any(facts["answers"][answer] for answer in WRONG):
        raise SystemExit("damage was hidden, or answered badly")


if __name__ == "__main__":
    main()
