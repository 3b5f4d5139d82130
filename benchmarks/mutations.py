"""Break the library on purpose, one line at a time: does a test notice?

Each mutation is a plausible mistake in one place. It is made in a copy of the working
tree, and the tests that ought to notice it are run there, until the first one fails.
``noticed`` names that test; a mutation that no test notices is a hole in the suite.

``python -m benchmarks.mutations`` runs all, some minutes each ten, prints a table and
writes ``benchmarks/results/mutations.json`` and ``docs/mutations.md``. Names after it
run these alone, and keep what is known of the others. It ends with status 1 if a
mutation was not noticed, and with 2 if one no longer fits the source.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.network import machine

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "mutations.json"
PAGE = ROOT / "docs" / "mutations.md"
PATIENCE_S = 900


class Mutation(NamedTuple):
    """One mistake: what stands in a file, what it becomes, and who ought to notice."""

    mistake: str
    file: str
    old: str
    new: str
    tests: str  # arguments of pytest


_ALGORITHMS, _RUNTIME = "tests/algorithms", "tests/runtime"
MUTATIONS = {
    # --- randomness
    "same key at every step": Mutation(
        "qadam draws alike on every step",
        "algorithms/qadam.py",
        "key = jax.random.fold_in(state.key, step)",
        "key = state.key",
        f"{_ALGORITHMS}/test_keys.py -k qadam",
    ),
    "same key in every bucket": Mutation(
        "all buckets draw alike",
        "bagua_jax/buckets.py",
        "key=jax.random.fold_in(keys, bucket)",
        "key=jax.random.fold_in(keys, 0)",
        f"{_RUNTIME}/test_buckets.py {_ALGORITHMS}/test_keys.py",
    ),
    "same key in the buckets of compressed_mean": Mutation(
        "its own loop over buckets forgets the bucket",
        "algorithms/compressed_mean.py",
        "jax.random.fold_in(key, bucket)",
        "key",
        f"{_ALGORITHMS}/test_keys.py -k compressed_mean",
    ),
    "same key on every worker": Mutation(
        "workers' rounding errors no longer average out",
        "bagua_jax/primitives.py",
        "to_owners, to_all = jax.random.split(worker_key(key, axis))",
        "to_owners, to_all = jax.random.split(key)",
        f"{_ALGORITHMS}/test_keys.py {_RUNTIME}/test_primitives.py",
    ),
    # --- what is finite
    "infinity is finite": Mutation(
        "the bound of the bit pattern is off by one",
        "bagua_jax/compressors/numerics.py",
        "    return bits < infinity\n",
        "    return bits <= infinity\n",
        f"{_RUNTIME}/test_nothing_hidden.py",
    ),
    "NaN dropped by the extrema": Mutation(
        "codes of a range no longer see it",
        "bagua_jax/compressors/numerics.py",
        "low, high = (jnp.where(top < infinity, v, jnp.nan) for v in (low, high))",
        "low, high = (jnp.nan_to_num(v) for v in (low, high))",
        f"{_RUNTIME}/test_nothing_hidden.py",
    ),
    "bad gradients are not skipped": Mutation(
        "the guard looks at updates alone",
        "bagua_jax/guards.py",
        "[*_finite(updates), *_finite(outcome)], axis_name=axis_name",
        "[*_finite(outcome)], axis_name=axis_name",
        f"{_RUNTIME}/test_guards.py {_ALGORITHMS}/test_guards.py",
    ),
    "a bad step stays in the state": Mutation(
        "updates are zeroed, and the state is not rolled back",
        "bagua_jax/guards.py",
        "inner_state=jax.tree.map(select, inner_state, state.inner_state),",
        "inner_state=inner_state,",
        f"{_RUNTIME}/test_guards.py {_ALGORITHMS}/test_guards.py",
    ),
    "the loss scale never grows": Mutation(
        "the count of good steps starts again at every step",
        "bagua_jax/loss_scale.py",
        "jnp.where(finite, schedules.increment(state.good_steps), 0)",
        "jnp.where(finite, 1, 0)",
        f"{_RUNTIME}/test_loss_scale.py",
    ),
    # --- error feedback and averages
    "errors with the wrong sign": Mutation(
        "what was sent, less what should have been",
        "bagua_jax/primitives.py",
        "errors = errors._replace(worker=corrected - sent)",
        "errors = errors._replace(worker=sent - corrected)",
        f"{_RUNTIME}/test_primitives.py",
    ),
    "owners forget": Mutation(
        "the error of the second compression is not added back",
        "bagua_jax/primitives.py",
        "mean = mean + _take_part(errors.owner, index, length, n, padding)",
        "mean = mean + 0 * _take_part(errors.owner, index, length, n, padding)",
        f"{_RUNTIME}/test_primitives.py",
    ),
    "filling stays in the mean": Mutation(
        "what fills the last part up takes part in ranges",
        "bagua_jax/primitives.py",
        "mean = mark(_clear_filling(mean, index, n, total, padding))",
        "mean = mark(mean)",
        f"{_RUNTIME}/test_primitives.py -k fill",
    ),
    "a bucket of two dtypes": Mutation(
        "buckets are kept apart by varying type alone",
        "bagua_jax/buckets.py",
        "kind = (leaf.dtype, types[leaf.index])",
        "kind = (jnp.dtype(jnp.float32), types[leaf.index])",
        f"{_RUNTIME}/test_buckets.py",
    ),
    # --- algorithms
    "the warm-up is a step too long": Mutation(
        "one_bit_adam freezes its variance late",
        "algorithms/one_bit_adam.py",
        "(step > warmup_steps).astype(jnp.int32)",
        "(step > warmup_steps + 1).astype(jnp.int32)",
        f"{_ALGORITHMS}/test_gradient_side.py -k one_bit_adam",
    ),
    "no correction of the bias": Mutation(
        "qadam steps with the raw momentum",
        "algorithms/qadam.py",
        "mu_hat = moments.unbiased(mu, b1, step)",
        "mu_hat = mu",
        f"{_ALGORITHMS}/test_optimizers.py {_ALGORITHMS}/test_trajectories.py -k qadam",
    ),
    "eps inside the root": Mutation(
        "the Adam family divides by another number",
        "algorithms/moments.py",
        "m / (jnp.sqrt(v) + eps)",
        "m / jnp.sqrt(v + eps)",
        f"{_ALGORITHMS}/test_optimizers.py",
    ),
    "one local step too many": Mutation(
        "local_sgd averages a step late",
        "algorithms/local_sgd.py",
        "((step + 1) % local_steps == 0)",
        "(step % local_steps == 0)",
        f"{_ALGORITHMS}/test_weight_side.py -k local_sgd",
    ),
    "a mean arrives late": Mutation(
        "async_model_average adds its correction a step later",
        "algorithms/async_model_average.py",
        "arrives = (step - staleness + 1) % local_steps == 0",
        "arrives = (step - staleness) % local_steps == 0",
        f"{_ALGORITHMS}/test_trajectories.py -k async_model_average",
    ),
    "momentum outlives what was sent": Mutation(
        "dgc does not mask its velocity",
        "algorithms/dgc.py",
        "velocity = shard.put(jnp.where(sent == 0, u, 0))",
        "velocity = shard.put(u)",
        f"{_ALGORITHMS}/test_gradient_side.py -k dgc",
    ),
    "bases that are not orthogonal": Mutation(
        "powersgd leaves out Gram-Schmidt",
        "algorithms/powersgd.py",
        "lefts = [jnp.linalg.qr(p)[0] for p in sums[: len(groups)]]",
        "lefts = [p / jnp.linalg.norm(p) for p in sums[: len(groups)]]",
        f"{_ALGORITHMS}/test_gradient_side.py -k powersgd",
    ),
    "trackers that overshoot": Mutation(
        "diana moves its mean tracker by all that came",
        "algorithms/diana.py",
        "mean_tracker + alpha * mean,",
        "mean_tracker + mean,",
        f"{_ALGORITHMS}/test_gradient_side.py -k diana",
    ),
    "mass that is not divided out": Mutation(
        "stochastic_gradient_push returns z w",
        "algorithms/stochastic_gradient_push.py",
        "z = plan.unpack([v / mass for v in vectors])",
        "z = plan.unpack([v for v in vectors])",
        f"{_ALGORITHMS}/test_gossip.py {_ALGORITHMS}/test_weight_side.py -k push",
    ),
    "copies that nobody holds": Mutation(
        "choco_sgd moves its public copy by the whole difference",
        "algorithms/choco_sgd.py",
        "public = public + own",
        "public = shard.value",
        f"{_ALGORITHMS}/test_weight_side.py -k choco",
    ),
    "half a step is left out": Mutation(
        "exact_diffusion mixes with W, not with (I + W)/2",
        "algorithms/exact_diffusion.py",
        "lambda c, m: (c + m) / 2",
        "lambda c, m: m",
        f"{_ALGORITHMS}/test_weight_side.py {_ALGORITHMS}/test_gossip.py -k exact",
    ),
    "the correction of another step": Mutation(
        "d2 and exact_diffusion add the old difference with the wrong sign",
        "algorithms/weights.py",
        "psi + (x - old)",
        "psi - (x - old)",
        f"{_ALGORITHMS}/test_weight_side.py -k 'd2 or exact'",
    ),
    "trackers forget their own gradient": Mutation(
        "gradient_tracking keeps the mixed tracker itself",
        "algorithms/gradient_tracking.py",
        "correction=optax.tree.sub(mixed, grads),",
        "correction=mixed,",
        f"{_ALGORITHMS}/test_optimizers.py -k tracking",
    ),
    "a sum in place of Adasum": Mutation(
        "products are not halved",
        "algorithms/adasum.py",
        "(1 - ab / (2 * jnp.where(x == 0, 1, x)) for x in own)",
        "(1 - ab / jnp.where(x == 0, 1, x) for x in own)",
        f"{_ALGORITHMS}/test_estimators.py -k adasum",
    ),
    "gradients of another step": Mutation(
        "delayed_gradients are a step younger than they say",
        "algorithms/delayed_gradients.py",
        "used = optax.tree.cast_like(due(pending[::-1]), updates)",
        "used = optax.tree.cast_like(due((*pending[:0:-1], latest)), updates)",
        f"{_ALGORITHMS}/test_estimators.py {_ALGORITHMS}/test_gradient_side.py "
        "-k delayed",
    ),
    "graph turned around": Mutation(
        "a directed ring hears from the worker ahead",
        "bagua_jax/topologies/ring.py",
        "(circulant(n, 0.5, [(1, 0.5)]),)",
        "(circulant(n, 0.5, [(-1, 0.5)]),)",
        f"{_RUNTIME}/test_topology_zoo.py -k 'ring or directed'",
    ),
    "weights of a ring": Mutation(
        "neighbours get the self weight's share once more",
        "bagua_jax/topologies/ring.py",
        "side = (1 - self_weight) / 2",
        "side = self_weight",
        f"{_RUNTIME}/test_topologies.py {_RUNTIME}/test_topology_zoo.py -k ring",
    ),
    # --- wire, time, theory
    "half an all-reduce": Mutation(
        "bytes of one phase are counted, of two",
        "bagua_jax/wire/base.py",
        '"all-reduce": lambda S, n: 2 * S * (n - 1) / n,',
        '"all-reduce": lambda S, n: S * (n - 1) / n,',
        "tests/wire/test_count.py",
    ),
    "a ring with a hop too few": Mutation(
        "the time of an all-reduce",
        "bagua_jax/network/collectives.py",
        "hops=2 * (n - 1))",
        "hops=2 * (n - 1) - 1)",
        f"{_RUNTIME}/test_network.py",
    ),
    "a theory of another algorithm": Mutation(
        "the prediction for SlowMo forgets its outer learning rate",
        "bagua_jax/theory/modes.py",
        "return anchor - outer_learning_rate * learning_rate * velocity, velocity",
        "return anchor - learning_rate * velocity, velocity",
        "tests/theory/test_closed_forms.py",
    ),
    # --- files, configs, peers
    "a state of other shapes": Mutation(
        "from_arrays takes what does not fit",
        "bagua_jax/saving.py",
        "if wanted.get(path) != found.get(path):",
        "if path not in found:",
        f"{_RUNTIME}/test_saving.py",
    ),
    "seals that seal nothing": Mutation(
        "the checksum of a document leaves its contents out",
        "experiments/runs/integrity.py",
        "check = check_of(name, json.dumps([value, seal], allow_nan=False))",
        "check = check_of(name, json.dumps([seal], allow_nan=False))",
        "tests/experiments/test_integrity.py",
    ),
    "aliases that multiply": Mutation(
        "an alias counts as one value",
        "experiments/spec/strict_yaml.py",
        "self._count(self._sizes.get(event.anchor, 1))",
        "self._count(1)",
        "tests/experiments/test_strict_yaml.py",
    ),
    "arguments that nobody has": Mutation(
        "a config's misspelled argument is dropped",
        "experiments/spec/catalog.py",
        "    for name, value in given.items():\n        if name not in known:\n",
        "    for name, value in given.items():\n        if False:\n",
        "tests/experiments/test_config.py",
    ),
    "an old name that means another": Mutation(
        "SlowMo's two old names are mixed up",
        "bagua_jax/renamed.py",
        '"slow_momentum": "outer_momentum"',
        '"slow_momentum": "outer_learning_rate"',
        f"{_ALGORITHMS}/test_renamed.py",
    ),
    "peers of another model": Mutation(
        "a message with another fingerprint is taken",
        "bagua_jax/asynchrony/messages.py",
        "if fingerprint != layout.fingerprint and kind != Kind.FACTS:",
        "if False:",
        "tests/asynchrony/test_messages.py",
    ),
    "an import that points up": Mutation(
        "a task reads from the tables",
        "experiments/tasks/base.py",
        "from bagua_jax.experiments.tasks.data import Data\n",
        "from bagua_jax.experiments.tables import table\n"
        "from bagua_jax.experiments.tasks.data import Data\n",
        "tests/test_imports.py -k rooms",
    ),
}


def fault(mutation: Mutation) -> str | None:
    """Say why a mutation does not fit the source; ``None`` if it does."""
    text = (ROOT / mutation.file).read_text(encoding="utf-8")
    if (times := text.count(mutation.old)) != 1:
        return f"{mutation.file} has {times} times {mutation.old!r}, not once"
    return None


def copy_tree(to: Path) -> None:
    """Copy what git knows, or would add, of the working tree; links stay links."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_symlink() or (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name, follow_symlinks=False)


def run(mutation: Mutation) -> dict[str, Any]:
    """Make a mistake in a copy, run its tests there, and say what came of it."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        copy_tree(copy)
        path = copy / mutation.file
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        line = text[: text.index(mutation.old)].count("\n") + 1
        words = f"{sys.executable} -m pytest -x -q -p no:cacheprovider".split()
        environment = os.environ | {"PYTHONPATH": str(copy)}
        noticed = problem = ""
        try:
            ran = subprocess.run(
                [*words, *shlex.split(mutation.tests)],
                cwd=copy,
                env=environment,
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
            )
        except subprocess.TimeoutExpired:
            problem = f"took longer than {PATIENCE_S} s"
        else:
            failed = re.search(r"^FAILED (\S+)", ran.stdout, re.MULTILINE)
            if ran.returncode == 1 and failed:
                noticed = failed[1]
            elif ran.returncode:  # it no longer imports, or no test was chosen
                problem = "\n".join(ran.stdout.splitlines()[-5:]) or ran.stderr[-500:]
    return {
        "mistake": mutation.mistake,
        "where": f"{mutation.file}:{line}",
        "tests": mutation.tests,
        "noticed_by": noticed,
        "problem": problem,
        "seconds": round(time.perf_counter() - start, 1),
    }


def table(results: dict[str, Any]) -> Table:
    """Show one mutation a row."""
    shown = Table("mutation", "where", "noticed by", "s")
    for name, row in results.items():
        noticed = row["noticed_by"].rpartition("/")[2] or row["problem"] or "nobody"
        style = "" if row["noticed_by"] else "red"
        shown.add_row(name, row["where"], noticed, f"{row['seconds']:.0f}", style=style)
    return shown


def page(known: dict[str, Any]) -> str:
    """Write the page of the results."""
    results = known["mutations"]
    noticed = sum(bool(row["noticed_by"]) for row in results.values())
    lines = [
        "# Mutations",
        "",
        "*Written by `python -m benchmarks.mutations`; do not edit it.*",
        "",
        "Plausible mistakes, each made in a copy of the library, and the test that",
        f"failed then. {noticed} of {len(results)} were noticed.",
        "",
        f"On {known['machine']}.",
        "",
        "| mistake | where | first test that failed |",
        "|---|---|---|",
    ]
    for name, row in results.items():
        test = row["noticed_by"].replace("|", "\\|")
        by = f"`{test}`" if test else f"**nobody** {row['problem'][:80]}"
        lines.append(f"| {name}: {row['mistake']} | `{row['where']}` | {by} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run mutations, print the table, and write results and page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mutations", description=__doc__
    )
    parser.add_argument("names", nargs="*", help="of mutations; else all")
    chosen = parser.parse_args().names or list(MUTATIONS)
    if strange := set(chosen) - set(MUTATIONS):
        parser.error(f"no mutation is called {', '.join(sorted(strange))}")
    faults = {name: why for name in chosen if (why := fault(MUTATIONS[name]))}
    if faults:
        for name, why in faults.items():
            print(f"{name}: {why}", file=sys.stderr)
        return 2
    known = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    results = known.get("mutations", {})
    for number, name in enumerate(chosen, 1):
        results[name] = run(MUTATIONS[name])
        by = results[name]["noticed_by"] or results[name]["problem"] or "NOBODY"
        print(f"{number}/{len(chosen)} {name}: {by}", flush=True)
        ordered = {n: results[n] for n in MUTATIONS if n in results}
        known = {"machine": machine.describe(), "mutations": ordered}
        RESULTS.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
        PAGE.write_text(page(known), "utf-8")
    Console().print(table(known["mutations"]))
    return 0 if all(results[name]["noticed_by"] for name in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
