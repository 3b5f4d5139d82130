"""PyTorch DDP's side: a worker that trains as it is told; see `versus_ddp`."""

# PyTorch is the peer that is measured; nothing else needs it.
# pyright: reportMissingImports=false

import os
import time
from typing import Any

from benchmarks.network import problem, process

LOCAL_STEPS = 8
CASES = {
    "ddp": {},
    "ddp_fp16": {"hook": "fp16"},
    "ddp_powersgd1": {"rank": 1},
    "ddp_powersgd2": {"rank": 2},
    "ddp_powersgd4": {"rank": 4},
    "ddp_post_local": {"hook": "post_local"},
}


class Lockstep:
    """One case under way: model, optimizer and hook."""

    steps_at_once = 1

    def __init__(self, case: dict[str, Any], images: problem.Images) -> None:
        import torch
        import torch.distributed as dist
        from torch.distributed.algorithms.ddp_comm_hooks import (
            default_hooks,
            post_localSGD_hook,
            powerSGD_hook,
        )
        from torch.distributed.algorithms.model_averaging.averagers import (
            PeriodicModelAverager,
        )
        from torch.distributed.optim import PostLocalSGDOptimizer

        self._torch, self._dist, self._images, self._count = torch, dist, images, 0
        layers: list[torch.nn.Module] = []
        for weight, bias in problem.first_weights():
            layer = torch.nn.Linear(*weight.shape[::-1])
            with torch.no_grad():
                layer.weight.copy_(torch.from_numpy(weight))
                layer.bias.copy_(torch.from_numpy(bias))
            layers += [layer, torch.nn.ReLU()]
        self._module = torch.nn.Sequential(*layers[:-1])
        # More than one bucket aborts PowerSGD's hook on gloo.
        cap: dict[str, Any] = {"bucket_cap_mb": 1000} if "rank" in case else {}
        self._model = torch.nn.parallel.DistributedDataParallel(
            self._module, gradient_as_bucket_view=True, **cap
        )
        optimizer: Any = torch.optim.SGD(self._module.parameters(), lr=problem.RATE)
        if "rank" in case:
            state = powerSGD_hook.PowerSGDState(
                None, case["rank"], start_powerSGD_iter=2, min_compression_rate=1
            )
            self._model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        elif case.get("hook") == "fp16":
            self._model.register_comm_hook(None, default_hooks.fp16_compress_hook)
        elif case.get("hook") == "post_local":
            alone = [dist.new_group([i]) for i in range(process.workers())]
            state = post_localSGD_hook.PostLocalSGDState(
                None, alone[process.worker()], start_localSGD_iter=2
            )
            self._model.register_comm_hook(state, post_localSGD_hook.post_localSGD_hook)
            averager = PeriodicModelAverager(period=LOCAL_STEPS, warmup_steps=2)
            optimizer = PostLocalSGDOptimizer(optimizer, averager)
        self._optimizer = optimizer

    def steps(self, count: int) -> list[float]:
        """Train; give the seconds of each step. Batches are drawn outside of them."""
        torch, seconds = self._torch, []
        for _ in range(count):
            images, labels = self._images.batch(process.worker(), self._count)
            images, labels = torch.from_numpy(images), torch.from_numpy(labels).long()
            start = time.perf_counter()
            self._optimizer.zero_grad()
            logits = self._model(images)
            torch.nn.functional.cross_entropy(logits, labels).backward()
            self._optimizer.step()
            seconds.append(time.perf_counter() - start)
            self._count += 1
        return seconds

    def held_out_loss(self) -> float:
        """Return the loss of the mean model on the held-out images."""
        torch = self._torch
        images, labels = self._images.held_out
        own = [p.detach().clone() for p in self._module.parameters()]
        with torch.no_grad():
            for p in self._module.parameters():
                self._dist.all_reduce(p)
                p /= process.workers()
            logits = self._module(torch.from_numpy(images))
            target = torch.from_numpy(labels).long()
            loss = torch.nn.functional.cross_entropy(logits, target)
            for p, kept in zip(self._module.parameters(), own, strict=True):
                p.copy_(kept)
        return float(loss)


def trainer(case: dict[str, Any], images: problem.Images) -> Lockstep:
    """Start a case."""
    return Lockstep(case, images)


def connect() -> None:
    """Join the other workers."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    host, port = os.environ["COORDINATOR"].split(":")
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{host}:{int(port) + 100}",
        rank=process.worker(),
        world_size=process.workers(),
    )
