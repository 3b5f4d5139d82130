"""Compile one program for devices that are not attached, in a process of its own.

XLA reads its flags once in a process, and the constants of its latency estimator are
flags. So :mod:`bagua_jax.planning.compiling` runs this file, by its path, for each
compilation: ``python child.py FOLDER``. FOLDER holds ``request.json`` and
``program.mlir``; ``result.json`` and what XLA dumps are written beside them.
"""

import json
import sys
from pathlib import Path

import numpy as np
from jax._src.compiler import get_compile_options  # jax has no public name for it
from jax.experimental import topologies
from jax.interpreters import mlir
from jaxlib import xla_client
from jaxlib.mlir import ir

__all__ = ["main"]

_STATS = (
    "argument_size_in_bytes",
    "output_size_in_bytes",
    "alias_size_in_bytes",
    "temp_size_in_bytes",
    "generated_code_size_in_bytes",
)


def main(folder: Path) -> None:
    """Compile what the folder asks for."""
    request = json.loads((folder / "request.json").read_text("utf-8"))
    devices = topologies.get_topology_desc(**request["topology"]).devices
    options = get_compile_options(
        num_replicas=1,
        num_partitions=len(devices),
        device_assignment=np.array([[device.id for device in devices]]),
        env_options_overrides=request["options"],
    )
    # As jax does where out_shardings are left open: XLA keeps what shard_map says.
    build = options.executable_build_options
    build.allow_spmd_sharding_propagation_to_output = [True]
    with mlir.make_ir_context():
        compiled = devices[0].client.compile(
            ir.Module.parse((folder / "program.mlir").read_text("utf-8")),
            executable_devices=xla_client.DeviceList(tuple(devices)),
            compile_options=options,
        )
    (module,) = compiled.hlo_modules()
    stats = compiled.get_compiled_memory_stats()
    result = {
        "hlo": module.to_string(),
        "memory": {name: getattr(stats, name) for name in _STATS},
    }
    (folder / "result.json").write_text(json.dumps(result), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
