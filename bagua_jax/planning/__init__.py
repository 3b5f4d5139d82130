"""Ahead-of-time compilation for clusters, and the step time that follows from it.

:func:`compile` builds a per-worker function for a :class:`Cluster` that is described,
not attached: 128 H100s, or a TPU slice, from a laptop. The result holds the optimized
program, so :func:`bagua_jax.wire.count` counts what it would send; the memory on a
device; and for GPUs the schedule that XLA predicts, which :func:`timeline` reads.
:func:`plan` puts all of it in one report, beside a model of the network.

All times are predictions of a cost model that nobody has validated: they are repeatable
and compare exchanges on one cluster; never compare clusters by them.

Compiling needs the extra ``bagua-jax[plan]``, and no GPU or TPU.
"""

from bagua_jax.planning.clusters import GPUS, TPUS, Cluster, TpuChip
from bagua_jax.planning.compiling import (
    Compiled,
    CompileError,
    Constants,
    Memory,
    MissingCompiler,
    compile,
    compile_lowered,
    lower,
)
from bagua_jax.planning.plans import Plan, plan, plan_lowered
from bagua_jax.planning.schedule import (
    Computation,
    Instruction,
    Schedule,
    read_schedule,
)
from bagua_jax.planning.timeline import (
    Covered,
    ScheduledCollective,
    Timeline,
    timeline,
)

__all__ = [
    "GPUS",
    "TPUS",
    "Cluster",
    "CompileError",
    "Compiled",
    "Computation",
    "Constants",
    "Covered",
    "Instruction",
    "Memory",
    "MissingCompiler",
    "Plan",
    "Schedule",
    "ScheduledCollective",
    "Timeline",
    "TpuChip",
    "compile",
    "compile_lowered",
    "lower",
    "plan",
    "plan_lowered",
    "read_schedule",
    "timeline",
]
