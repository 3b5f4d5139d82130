"""What moves an exchange beside the backward pass: formulations and their predictions.

``python benchmarks/overlap.py`` compiles one training step of a transformer in several
forms for clusters of H100s that are not here, and reads from each program what it sends
per link class, and from XLA's schedule how long the step takes and how much of its
communication is hidden. Needs ``bagua-jax[plan]``; no GPU. Writes
benchmarks/results/overlap.json and prints a table.

**Every time is a prediction of XLA's cost model. Nothing ran on a GPU.** Compare rows
of one cluster and one network only. Rows that the file holds stay, unless they are
compiled again.

A form is ``PLACE-EXCHANGE``, where the place is

- ``end``: after the backward pass, packed buckets; needs no change of the model;
- ``tie``, ``tie2``: in the backward pass, through ``overlap.Chain`` of lag 1 or 2;

and the exchange ``f32`` (gradient_allreduce), ``u8`` (bytegrad) or ``ring`` (8 bits,
encoded again at each hop of a ring; only with ``hier``), flat, or ``hier`` between
nodes only (reduce-scatter and gather inside). ``remat`` at the end recomputes each
layer in the backward pass; ``nocombine`` keeps XLA from joining gathers and
reduce-scatters of several buckets; ``note`` adds XLA's scheduling annotations.

Model: pre-LN decoder of width 1024, vocabulary 8192 with tied embedding, 8 sequences of
512 tokens a device, bfloat16 compute, float32 parameters, SGD. Layers of the size of
BERT-Large's, and as many: ``--layers 24 --tokens 6x384 --clusters 16x8:h100 --forms
end-f32 tie-u8-hier --gbit 25 100``.
"""

import argparse
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxlib.mlir import ir
from rich.console import Console
from rich.table import Table

from bagua_jax import (
    buckets,
    compressors,
    overlap,
    planning,
    primitives,
    topologies,
    value_and_grad,
    wire,
)
from bagua_jax.algorithms import bytegrad, gradient_allreduce
from bagua_jax.compressors.minmax import MinMaxPayload

RESULTS = Path(__file__).parent / "results" / "overlap.json"
VOCABULARY, TOKENS = 8192, "8x512"  # sequences x length, a device
MEBI = 2**20
WHOLE = 2**40  # a bucket that holds any part
NOCOMBINE = {
    "xla_gpu_all_gather_combine_threshold_bytes": "1",
    "xla_gpu_reduce_scatter_combine_threshold_bytes": "1",
}


# --- the model ------------------------------------------------------------------------


class Block(nn.Module):
    """A pre-LN layer: attention, then a perceptron four times as wide."""

    width: int

    @nn.compact
    def __call__(self, x):
        """Map [B, T, width] to the same."""

        def dense(features, x):
            return nn.Dense(features, use_bias=False, dtype=jnp.bfloat16)(x)

        norm = lambda x: nn.LayerNorm(use_bias=False, dtype=jnp.bfloat16)(x)  # noqa: E731
        q, k, v = jnp.split(dense(3 * self.width, norm(x)), 3, axis=-1)
        q, k, v = (y.reshape(*y.shape[:2], -1, 64) for y in (q, k, v))  # heads of 64
        # Scores in bfloat16: float32 ones are priced at ten times as much.
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 8
        past = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(past[None, None], scores.astype(jnp.float32), -jnp.inf)
        attention = jax.nn.softmax(scores).astype(v.dtype)
        heard = jnp.einsum("bhqk,bkhd->bqhd", attention, v)
        x = x + dense(self.width, heard.reshape(x.shape))
        return x + dense(self.width, nn.gelu(dense(4 * self.width, norm(x))))


class Model(NamedTuple):
    """Shapes of the parts, and the loss through whatever hands the parts out."""

    params: dict[str, Any]
    loss: Callable[[Callable, Callable, jax.Array], jax.Array]


def transformer(layers: int, width: int, length: int, remat: bool = False) -> Model:
    """Make the model: parts ``layer_0`` to ``layer_{L-1}`` and ``rest``."""
    block = Block(width)
    names = [f"layer_{k:02}" for k in range(layers)]
    like = jnp.zeros((1, length, width), jnp.bfloat16)
    key = jax.random.key(0)
    layer = jax.eval_shape(block.init, key, like)["params"]
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
    rest = {"embedding": shape(VOCABULARY, width), "norm": shape(width)}

    def apply(params, x):
        return block.apply({"params": params}, x)

    apply = jax.checkpoint(apply) if remat else apply

    def loss(take, call, tokens):
        rest = take("rest")  # before the layers: its gradient is complete at the end
        table = rest["embedding"].astype(jnp.bfloat16)
        x = table[tokens[:, :-1]]
        for name in names:
            x = call(apply, name, x)
        x = nn.LayerNorm(use_bias=False, dtype=jnp.bfloat16).apply(
            {"params": {"scale": rest["norm"]}}, x
        )
        logits = (x @ table.T).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean()

    return Model({**dict.fromkeys(names, layer), "rest": rest}, loss)


# --- a ring that encodes again at each hop: tried here, no part of the product --------


def ring_mean(x: jax.Array, axis_name: tuple[str, str]) -> jax.Array:
    """Average [N] as ``c_lp_s`` does, with a ring between nodes for its all-to-all.

    A part travels once around the n nodes. Each decodes it, adds its own and encodes
    the sum, so that a part is rounded n times where ``c_lp_s`` rounds it twice.
    """
    codec = compressors.minmax_uint8()
    shard = primitives.node_shard(x, axis_name, "ring_mean").value
    node, local = axis_name
    n, me = primitives.axis_size(node), primitives.axis_index(node)
    onward = topologies.directed_ring(n).steps[0]
    length = -(-shard.size // n)
    filled = jnp.pad(shard, (0, n * length - shard.size), mode="edge")
    parts = filled.reshape(n, length)
    part = lambda hop: parts[(me - hop) % n]  # noqa: E731

    def encode(v):  # one message: a second, small one would take a slot of its own
        (codes, bounds), _ = codec.compress(None, v, ())
        return jnp.append(codes, lax.bitcast_convert_type(bounds, jnp.uint8))

    def decode(message):
        bounds = lax.bitcast_convert_type(message[length:].reshape(2, 4), jnp.float32)
        return codec.decompress(MinMaxPayload(message[:length], bounds), parts[0])

    running = part(0)
    for hop in range(1, n):
        (message,) = primitives.neighbours(encode(running), onward, axis_name=node)
        running = decode(message) + part(hop)
    codes = primitives.gather_rows(encode(running / n), axis_name=node)
    codes = primitives.gather_rows(codes, axis_name=local)  # as codes inside nodes, too
    means = jnp.roll(
        jax.vmap(jax.vmap(decode))(codes), 1, axis=1
    )  # node j has part j+1
    return means.reshape(len(codes), -1)[:, : shard.size].ravel()[: x.size]


def ring(*, axis_name: tuple[str, str], bucket_bytes: int):
    """Make :func:`ring_mean` a gradient-side transform."""

    def update(updates, state, params=None):
        del params
        plan = buckets.plan(updates, bucket_bytes)
        (mean,) = plan.map(lambda g: (ring_mean(g, axis_name),), updates)
        return mean, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


# --- formulations ---------------------------------------------------------------------

GROUPED = ("stablehlo.reduce_scatter", "stablehlo.all_gather")
EXCHANGES = {"f32": gradient_allreduce, "u8": bytegrad, "ring": ring}


class Form(NamedTuple):
    """How gradients are exchanged, and where; see the module's docstring."""

    place: str
    exchange: str
    hierarchical: bool
    remat: bool
    nocombine: bool
    note: bool

    @classmethod
    def parse(cls, text: str) -> "Form":
        """Read ``tie-u8-hier-nocombine`` and the like."""
        place, exchange, *rest = text.split("-")
        known = {"hier", "remat", "nocombine", "note"}
        if (
            place not in ("end", "tie", "tie2")
            or exchange not in EXCHANGES
            or set(rest) - known
            or (exchange == "ring" and "hier" not in rest)
        ):
            raise ValueError(
                "overlap: a form is end, tie or tie2, then one of "
                f"{sorted(EXCHANGES)}, then any of {sorted(known)} (ring needs hier), "
                f"joined by '-'; got {text!r}."
            )
        flags = (word in rest for word in ("hier", "remat", "nocombine", "note"))
        return cls(place, exchange, *flags)

    @property
    def axis_name(self) -> str | tuple[str, str]:
        """What the exchange is given."""
        return ("node", "local") if self.hierarchical else "workers"

    @property
    def options(self) -> dict[str, str]:
        """Of the compiler."""
        return NOCOMBINE if self.nocombine else {}

    def step(self, model: Model, learning_rate: float = 0.1) -> Callable:
        """Make the training step: params, tokens [B, T + 1] -> params, loss."""
        axis = self.axis_name
        factory = EXCHANGES[self.exchange]
        # At the end: the sizes at which each did best in the study.
        cap = (32 if self.exchange == "f32" else 64) * MEBI
        exchange = factory(
            axis_name=axis, bucket_bytes=cap if self.place == "end" else WHOLE
        )

        def plain(params, tokens):
            call = lambda layer, name, x: layer(params[name], x)  # noqa: E731
            return model.loss(params.__getitem__, call, tokens)

        def chained(params, tokens):
            lag = 2 if self.place == "tie2" else 1
            chain = overlap.Chain(exchange, params, axis_name=axis, lag=lag)
            return chain.finish(model.loss(chain.__getitem__, chain, tokens))

        def step(params, tokens):
            if self.place == "end":
                loss, grads = value_and_grad(plain, axis)(params, tokens)
                grads, _ = exchange.update(grads, exchange.init(params))
            else:
                loss, grads = jax.value_and_grad(chained)(params, tokens)
            params = jax.tree.map(lambda p, g: p - learning_rate * g, params, grads)
            return params, loss

        return step


def annotate(program: jax.stages.Lowered) -> None:
    """Ask XLA to schedule a layer's exchange beside products of the layer below.

    A scheduling group holds one collective and one product, a weight's gradient: XLA
    takes no group in which other work lies between two members. No all-to-all, at
    which the compiler of jax 0.10.2 crashes. Marked on the lowered program, because
    ``set_xla_metadata`` around a layer marks its forward pass, too.
    """
    waiting: list[ir.Operation] = []
    groups = itertools.count()

    def visit(op: ir.Operation) -> ir.WalkResult:
        where = str(op.location)
        if op.name in GROUPED and "exchange(layer_" in where:
            waiting.append(op)
        elif waiting and re.match(r'loc\("transpose[^"]*/Dense_\d/dot_general"', where):
            if ir.RankedTensorType(op.results[0].type).rank == 2:  # a weight's
                group = ir.StringAttr.get(str(next(groups)))
                marks = ir.DictAttr.get({"_scheduling_group_id": group})
                for member in (waiting.pop(0), op):
                    member.attributes["mhlo.frontend_attributes"] = marks
        return ir.WalkResult.ADVANCE

    module = program.compiler_ir("stablehlo")
    assert module is not None
    with module.context:
        module.operation.walk(lambda op: visit(op.operation))


# --- predictions ----------------------------------------------------------------------


def lowered(
    form: Form, cluster: planning.Cluster, layers: int, width: int, tokens: str
):
    """Lower a form's step for a cluster; one lowering serves every network."""
    batch, length = map(int, tokens.split("x"))
    model = transformer(layers, width, length, form.remat)
    n = cluster.num_devices
    tokens_type = jax.ShapeDtypeStruct((n, batch, length + 1), jnp.int32)
    program = planning.lower(
        form.step(model),
        (model.params, tokens_type),
        cluster,
        in_specs=(P(), P(form.axis_name)),
        axis_name=form.axis_name,
        donate_argnums=0,
    )
    if form.note:
        annotate(program)
    return program


def hidden_by_part(line: planning.Timeline) -> dict[str, float]:
    """Return the hidden share of each part's exchange, in the order they begin.

    Of the collectives that the chain has named; where XLA has joined those of two
    parts, the joint one counts for the part whose name it bears.
    """
    found: dict[str, list[float]] = {}
    for c in sorted(line.collectives, key=lambda c: c.start):
        if name := re.search(r"exchange\((\w+)\)", c.path):
            times = found.setdefault(name[1], [0.0, 0.0])
            times[0] += c.latency
            times[1] += min(c.wait, c.latency)
    return {name: 1 - wait / latency for name, (latency, wait) in found.items()}


def predict(
    text: str,
    cluster: planning.Cluster,
    gbits: Sequence[float],
    *,
    layers: int = 4,
    width: int = 1024,
    tokens: str = TOKENS,
    options: Mapping[str, str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Compile a form for each network; report what it sends and how long it takes.

    Args:
        text: of the form.
        cluster: of GPUs.
        gbits: Gbit/s between nodes, of each GPU.
        layers: of the model.
        width: of the model.
        tokens: ``"8x512"``: sequences on each device, and the length of each.
        options: of the compiler, beside the form's own.

    Yields:
        A row for each network: numbers and names for JSON.
    """
    form = Form.parse(text)
    program = lowered(form, cluster, layers, width, tokens)
    for gbit in gbits:
        compiled = planning.compile_lowered(
            program,
            cluster,
            constants=planning.Constants(gbit / 8),
            options={**form.options, **(options or {})},
        )
        line, count = planning.timeline(compiled), wire.count(compiled)
        between = count.bytes_between(cluster.nodes)
        yield {
            "form": text,
            "layers": layers,
            "tokens": tokens,
            "cluster": cluster.text,
            "gbit_per_gpu": gbit,
            "constants": str(compiled.constants),
            "end_us": round(line.end, 1),
            "exposed_us": round(line.exposed, 1),
            "hidden": round(line.hidden, 3),
            "hidden_by_part": {k: round(v, 3) for k, v in hidden_by_part(line).items()},
            "collectives": len(line.collectives),
            "mb_inside": round((count.bytes_per_worker - between) / 1e6, 2),
            "mb_between": round(between / 1e6, 2),
            "temporary_mb": round(compiled.memory.temp_size_in_bytes / 1e6, 1),
        }


FORMS = {
    "8:h100": ["end-f32", "end-u8", "tie-f32", "tie-u8", "tie-u8-remat"],
    "16x8:h100": [
        "end-f32",
        "end-u8",
        "tie-u8",
        "end-f32-hier",
        "end-u8-hier",
        "tie-f32-hier",
        "tie-u8-hier",
        "tie-u8-hier-nocombine",
        "tie-u8-hier-note",
        "end-ring-hier",
        "tie-ring-hier",
    ],
}


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Show rows as people read them."""
    shown = Table(title="Predictions of XLA's cost model; nothing ran on a GPU")
    columns = ["cluster", "L", "tokens", "Gbit/s", "form", "END us", "exposed us"]
    for column in [*columns, "hidden", "MB inside", "MB between"]:
        shown.add_column(column, justify="left" if column == "form" else "right")
    keys = "cluster layers tokens gbit_per_gpu form end_us exposed_us hidden".split()
    for row in rows:
        shown.add_row(*(str(row[key]) for key in [*keys, "mb_inside", "mb_between"]))
    return shown


def main() -> None:
    """Compile the forms, write them down, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", default=TOKENS, help="8x512: sequences x length")
    parser.add_argument("--clusters", nargs="+", default=list(FORMS))
    parser.add_argument("--forms", nargs="+", help="all of the cluster by default")
    parser.add_argument("--gbit", nargs="+", type=float, default=[10.0, 25.0, 100.0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    kept = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
    same = ("cluster", "layers", "tokens", "gbit_per_gpu", "form")
    rows = {tuple(row[key] for key in same): row for row in kept}
    for text in args.clusters:
        cluster = planning.Cluster.parse(text)
        gbits = args.gbit if cluster.num_nodes > 1 else [100.0]  # has no influence
        for form in args.forms or FORMS[text]:
            for row in predict(
                form,
                cluster,
                gbits,
                layers=args.layers,
                width=args.width,
                tokens=args.tokens,
            ):
                rows[tuple(row[key] for key in same)] = row
                listed = [rows[key] for key in sorted(rows)]
                note = "Predictions of XLA's cost model. Nothing ran on a GPU."
                found = {"note": note, "jax": jax.__version__, "rows": listed}
                args.output.write_text(json.dumps(found, indent=1) + "\n")
    Console(width=120).print(table(list(rows.values())))


if __name__ == "__main__":
    main()
