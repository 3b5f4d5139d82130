"""Small programs that compilers change, and their optimized HLO for machines elsewhere.

``python tests/wire_programs.py`` writes ``tests/wire/data`` anew: it compiles each
program of ``ELSEWHERE`` for its cluster, with nothing attached, and keeps what a count
reads. It needs ``bagua-jax[plan]``; tests read the files and need no plugin.
"""

import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

from bagua_jax import Workers, compressors, primitives, schedules

DATA = Path(__file__).parent / "wire" / "data"
W, D = "workers", 65_536


def shift(x, by):
    n = lax.axis_size(W)
    return lax.ppermute(x, W, [(i, (i + by) % n) for i in range(n)])


def step_number(x):
    """Return a number that the compiler cannot know, equal on all workers."""
    return lax.psum(x[0], W).astype(jnp.int32)


def four_sums(x):
    return [lax.psum(x[k :: k + 2] * k, W) for k in range(1, 5)]


def four_gathers(x):
    return [lax.all_gather(x[:64] * k, W, tiled=True) for k in range(1, 5)]


def two_shifts(x):
    return [shift(x * k, 1) for k in (1.0, 2.0)]


def repeated(x):
    return lax.psum(x, W) + jnp.sin(lax.psum(x, W))


def unused(x):
    del_ = lax.psum(x * 3, W)
    return (del_, jnp.sin(x))[1]


def scatter_gather(x):
    part = lax.psum_scatter(x, W, tiled=True)
    return lax.all_gather(part * 2, W, tiled=True)


def quantized(x):
    return primitives.c_lp_s(x, compressors.minmax_uint8(), axis_name=W)[0]


def shift_bf16(x):
    return x + shift(x, 1)


def shift_bf16_as_f32(x):
    return x + shift(x.astype(jnp.float32), 1).astype(x.dtype)


def scanned(x):
    return lax.scan(lambda c, _: (c + shift(jnp.sin(c), 1), None), x, None, 5)[0]


def scanned_twice(x):
    def inner(x):
        return lax.scan(lambda c, _: (c + shift(jnp.sin(c), 1), None), x, None, 3)[0]

    return lax.scan(lambda c, _: (inner(c), None), x, None, 4)[0]


def unrolled(x):
    def body(c, _):
        return c + shift(jnp.sin(c), 1), None

    return lax.scan(body, x, None, 7, unroll=2)[0]


def unchanging(x):
    """Gather in each of 7 steps what a compiler may gather once."""
    return lax.scan(
        lambda c, _: (c + lax.all_gather(x, W, tiled=True)[: x.size], None), x, None, 7
    )[0]


def rotating(x):
    """Permute with a partner that changes, six times."""
    hops = [lambda v, by=2**k: (v + shift(v, by)) / 2 for k in range(2)]
    return lax.scan(lambda c, i: (lax.switch(i % 2, hops, c), None), x, jnp.arange(6))[
        0
    ]


def every_fourth(x):
    def mean(v):
        return primitives.worker_local(lax.pmean(v, W), W)

    due = step_number(x) > 0
    return schedules.every(due, 4, mean, lambda v: v * 2, x)


def overlapped(x):
    """Gather beside matrix products, which hide it on TPU."""
    products = x.reshape(256, 256)
    gathered = lax.all_gather(x[: D // lax.axis_size(W)] * 3, W, tiled=True)
    for _ in range(4):
        products = jnp.tanh(products @ products)
    return products.ravel() + gathered


def two_levels(x):
    return primitives.c_fp_s(x, axis_name=("node", "local"))


ELSEWHERE: dict[str, tuple[Callable, ...]] = {
    "8:h100": (
        four_sums,
        four_gathers,
        two_shifts,
        scatter_gather,
        shift_bf16_as_f32,
        scanned_twice,
        unrolled,
        rotating,
        every_fourth,
        overlapped,
    ),
    "v5e:2x2": (
        four_sums,
        four_gathers,
        scatter_gather,
        shift_bf16_as_f32,
        scanned_twice,
        unrolled,
        rotating,
        every_fourth,
        overlapped,
    ),
    "16x8:h100": (two_levels,),
}
WORKERS = {"8:h100": 8, "v5e:2x2": 4, "16x8:h100": (16, 8)}


def dtype(fn: Callable):
    return jnp.bfloat16 if "bf16" in fn.__name__ else jnp.float32


def lower(
    fn: Callable, n: int | tuple[int, int] = 8, platform: str = "cpu"
) -> jax.stages.Lowered:
    """Lower a program of workers on an abstract mesh: n, or (nodes, workers each)."""
    workers = Workers.abstract(n)
    x = jax.ShapeDtypeStruct((workers.num_workers, D), dtype(fn))
    program = workers.spmd(fn, in_specs=workers.spec)
    args = workers.placed((x,), workers.spec)
    return program.trace(*args).lower(lowering_platforms=(platform,))


def lower_here(fn: Callable) -> jax.stages.Lowered:
    """Lower a program of eight host devices."""
    workers = Workers.devices(8)
    x = jax.ShapeDtypeStruct((8, D), dtype(fn))
    return workers.spmd(fn, in_specs=workers.spec).lower(x)


def path_of(fn: Callable, cluster: str) -> Path:
    return DATA / f"{fn.__name__}-{cluster.replace(':', '-')}.hlo"


def trimmed(text: str) -> str:
    """Drop what no count reads: tables of files, layouts, configurations of kernels."""
    text = re.sub(
        r"\n(FileNames|StackFrames|FileLocations).*?\n\n", "\n", text, flags=re.S
    )
    text = re.sub(
        r"\n(FunctionNames|FileLocations|StackFrames)\n(\d+ .*\n)+", "\n", text
    )
    text = re.sub(r" stack_frame_id=\d+", "", text)
    text = re.sub(r" scheduling_name=\"[^\"]*\"", "", text)
    lines = []
    for line in text.splitlines():
        head, found, tail = line.partition(", backend_config=")
        kept = re.findall(r'"known_trip_count":\{[^}]*\}|"is_sync":true', tail)
        config = f", backend_config={{{','.join(kept)}}}" if kept else ""
        lines.append(head + config if found else line)
    return "\n".join(lines) + "\n"


def main() -> None:
    from bagua_jax import planning

    for text, programs in ELSEWHERE.items():
        cluster = planning.Cluster.parse(text)
        for fn in programs:
            lowered = lower(fn, WORKERS[text], cluster.platform)
            compiled = planning.compile_lowered(lowered, cluster)
            path_of(fn, text).write_text(trimmed(compiled.as_text()))
            print(path_of(fn, text).name)


if __name__ == "__main__":
    main()
