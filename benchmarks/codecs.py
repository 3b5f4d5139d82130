"""What a codec costs: compressing and decompressing 25 million elements, on this CPU.

``python benchmarks/codecs.py`` measures every codec on one vector, beside a copy of it:

- CPU time of compress and of decompress, in copies (threads of XLA added up; a loaded
  machine does not change it much): the least of interleaved repeats, and the median;
- bytes that the compiled compress touches, in vectors (XLA's ``cost_analysis``), and
  its temporary memory (``memory_analysis``);
- the reductions alone that decide whether values are finite, beside the ``jnp.max`` and
  ``jnp.min`` that lose NaN on XLA's CPU.

``--before PATH`` measures another checkout of the package as well, in turns with this
one, and adds the ratio of its CPU time to ours::

    git worktree add /tmp/before 2ad59cb
    python benchmarks/codecs.py --before /tmp/before
    git worktree remove /tmp/before

Prints a table; writes benchmarks/results/codecs.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HOME = Path(__file__).parents[1]
RESULT = HOME / "benchmarks" / "results" / "codecs.json"
CODECS: dict[str, tuple[str, tuple]] = {
    "minmax_uint8": ("minmax_uint8", ()),
    "blockwise 8": ("blockwise", (8,)),
    "blockwise 4": ("blockwise", (4,)),
    "qsgd l2": ("qsgd", (127,)),
    "qsgd max": ("qsgd", (7, "max", 512)),
    "terngrad": ("terngrad", ()),
    "natural": ("natural", ()),
    "sign": ("sign", ()),
    "topk 1 %": ("topk", (0.01,)),
    "block_topk 1 %": ("block_topk", (0.01,)),
    "randk 1 %": ("randk", (0.01,)),
    "dct_topk": ("dct_topk", ()),
    "hadamard sign": ("hadamard", ()),
    "powersgd 2": ("powersgd", (2,)),
    "bfloat16": ("cast", ("bfloat16",)),
}
SLOW = ("randk 1 %",)  # of tens of seconds: repeated a third as often


# --- one side, in a process of its own ------------------------------------------------


def serve(size: int) -> None:
    """Compile what is named on standard input, run it once, answer with its cost."""
    import jax
    import jax.numpy as jnp

    from bagua_jax import compressors
    from bagua_jax.compressors import numerics

    x = jax.random.normal(jax.random.key(0), (size,))
    key = jax.random.key(1)
    programs: dict[tuple[str, str], Any] = {}

    def make(name: str, what: str) -> tuple[Any, tuple]:
        if name == "copy":
            return jax.jit(jnp.copy), (x,)
        if name == "finite":
            return jax.jit(reductions(what)), (x,)
        factory, arguments = CODECS[name]
        c = compressors.REGISTRY[factory](*arguments)
        state = c.init(x)
        encode = jax.jit(lambda key, x, state: c.compress(key, x, state)[0])
        if what == "compress":
            return encode, (key, x, state)
        return jax.jit(lambda p: c.decompress(p, x)), (encode(key, x, state),)

    def reductions(what: str):
        plain = {
            "jnp.max |x|": lambda x: jnp.max(jnp.abs(x)),
            "jnp.min, jnp.max": lambda x: (jnp.min(x), jnp.max(x)),
            "jnp of rows": lambda x: (jnp.min(rows(x), -1), jnp.max(rows(x), -1)),
        }
        if what in plain:
            return plain[what]
        return {
            "largest_magnitude": numerics.largest_magnitude,
            "extrema": numerics.extrema,
            "extrema of rows": lambda x: numerics.extrema(rows(x)),
            "all_finite": numerics.all_finite,
        }[what]

    def rows(x):
        return x[: size - size % 500].reshape(-1, 500)

    for line in sys.stdin:
        name, what = json.loads(line)
        if (name, what) not in programs:
            program, args = make(name, what)
            compiled = program.lower(*args).compile()
            programs = {(name, what): (compiled, args)}  # the last one only: memory
            jax.block_until_ready(compiled(*args))
        compiled, args = programs[name, what]
        start = time.process_time()
        jax.block_until_ready(compiled(*args))
        seconds = time.process_time() - start
        cost = compiled.cost_analysis() or {}
        memory = compiled.memory_analysis()
        answer = {
            "seconds": seconds,
            "bytes": cost.get("bytes accessed", 0.0) / (4 * size),
            "temporary": memory.temp_size_in_bytes / (4 * size),
        }
        print(json.dumps(answer), flush=True)


class Side:
    """A checkout of the package at work in another process."""

    def __init__(self, home: Path, size: int):
        environment = {**os.environ, "PYTHONPATH": str(home), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, str(Path(__file__)), "--serve", str(size)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def measure(self, name: str, what: str) -> dict[str, float]:
        """Run a program once."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps([name, what]), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{name} {what} failed in {self.process.args}.")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


# --- both sides, in turns -------------------------------------------------------------


def in_turns(sides: dict[str, Side], name: str, what: str, repeats: int) -> dict:
    """Measure one program on all sides, one repeat after the other."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, process in sides.items():
            found[side].append(process.measure(name, what))
    return {
        side: {
            **rows[-1],
            "seconds": min(row["seconds"] for row in rows),
            "median": statistics.median(row["seconds"] for row in rows),
        }
        for side, rows in found.items()
    }


def cpu_model() -> str:
    """Name the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=25_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--before", type=Path, help="another checkout, in turns")
    parser.add_argument("--only", nargs="*", help="names of codecs, or 'finite'")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return

    sides = {"now": Side(HOME, options.size)}
    if options.before:
        sides["before"] = Side(options.before.resolve(), options.size)
    load = os.getloadavg()
    wanted = [name for name in CODECS if not options.only or name in options.only]
    try:
        rows = measure_all(sides, wanted, options.repeats)
        finite = {}
        if not options.only or "finite" in options.only:
            finite = measure_reductions(sides["now"], options.repeats)
    finally:
        for side in sides.values():
            side.close()
    result = {
        "machine": f"{cpu_model()}, {os.cpu_count()} CPUs",
        "load": [load, os.getloadavg()],
        "jax": metadata.version("jax"),
        "elements": options.size,
        "repeats": options.repeats,
        "codecs": rows,
        "reductions": finite,
    }
    show(result)
    if not options.only:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


def measure_all(sides: dict[str, Side], wanted: list[str], repeats: int) -> list[dict]:
    rows = []
    for name in wanted:
        row: dict[str, Any] = {"codec": name}
        for what in ("compress", "decompress"):
            times = -(-repeats // 3) if name in SLOW else repeats
            copy = sides["now"]
            row["copy"] = min(copy.measure("copy", "")["seconds"] for _ in range(3))
            row[what] = in_turns(sides, name, what, times)
        rows.append(row)
        print(name, json.dumps(row["compress"]), file=sys.stderr)
    return rows


def measure_reductions(side: Side, repeats: int) -> dict[str, dict]:
    forms = (
        "jnp.max |x|",
        "largest_magnitude",
        "all_finite",
        "jnp.min, jnp.max",
        "extrema",
        "jnp of rows",
        "extrema of rows",
    )
    found: dict[str, list[dict]] = {form: [] for form in forms}
    for _ in range(repeats):
        for form in forms:
            found[form].append(side.measure("finite", form))
    return {
        form: {**rows[0], "seconds": min(row["seconds"] for row in rows)}
        for form, rows in found.items()
    }


def show(result: dict) -> None:
    """Print both tables."""
    title = (
        f"{result['elements']:,} elements; {result['machine']}; load {result['load']}"
    )
    console = Console()
    table = Table(title=title)
    heads = ("codec", "encode", "was/now", "decode", "was/now", "bytes", "temporary")
    for column in heads:
        table.add_column(column, no_wrap=True)
    for row in result["codecs"]:
        cells = []
        for what in ("compress", "decompress"):
            now = row[what]["now"]["seconds"]
            before = row[what].get("before")
            cells.append(f"{now / row['copy']:.1f}")
            cells.append(f"{before['seconds'] / now:.2f}" if before else "")
        cost = row["compress"]["now"]
        table.add_row(
            row["codec"], *cells, f"{cost['bytes']:.1f}", f"{cost['temporary']:.2f}"
        )
    console.print(table)
    console.print("Times in copies, bytes and memory of encoding in vectors.")
    table = Table(title="reductions alone")
    for column in ("form", "CPU ms", "bytes", "temporary"):
        table.add_column(column, no_wrap=True)
    for form, cost in result["reductions"].items():
        table.add_row(
            form,
            f"{1e3 * cost['seconds']:.1f}",
            f"{cost['bytes']:.1f}",
            f"{cost['temporary']:.2f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
