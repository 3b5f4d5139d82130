"""Be one worker of one side, and do as the conductor says; see `versus_ddp`.

One JSON object a line comes in, and one goes out: ``{"case": name, "steps": k}``
trains, ``{"case": name, "loss": true}`` evaluates.
"""

import importlib
import json
import sys
import time

from benchmarks.network import process
from benchmarks.network.problem import Images


def main() -> None:
    side = importlib.import_module(f"benchmarks.network.{sys.argv[1]}")
    side.connect()
    images, trainers = Images(), {}
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        name = order["case"]
        if name not in trainers:
            trainers[name] = side.trainer(side.CASES[name], images)
        trainer, answer = trainers[name], {}
        if order.get("steps"):
            before = process.sent_bytes()
            steps = order["steps"] * trainer.steps_at_once
            cpu = time.process_time()
            answer["seconds"] = trainer.steps(steps)
            answer["cpu_seconds"] = (time.process_time() - cpu) / steps
            answer["bytes"] = (process.sent_bytes() - before) / steps
        if order.get("loss"):
            answer["loss"] = trainer.held_out_loss()
        if order.get("forget"):
            del trainers[name]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
