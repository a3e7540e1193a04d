"""Optimiser steps of one arm, in parts, each timed."""

import time

import torch

from bench import train
from bench.compiling import compile_parts
from bench.config import Run
from bench.evaluate import to_device
from bench.replay import WARM, Replay

PASSES = 8  # timed of each arm, if its share of the time allows it


class Step:
    """A model and its optimiser steps over the protocol's batch, in micro-batches; seconds of each are kept."""

    def __init__(self, run: Run, model: torch.nn.Module, task, device: str, compiled: bool):
        self.run, self.device, self.task = run, device, task
        self.model = model.to(device).train()
        settings = run.protocol.optimiser
        task.fused = device == "cuda" and model.fused  # as in training
        fast = {"fused": True} if device == "cuda" else {}
        self.optimiser = torch.optim.AdamW(train.optimiser_groups(self.model, settings), lr=settings.lr, **fast)
        if compiled:
            compile_parts(self.model)
        self.batch = task.batch(None, 0, run.protocol.budget.batch, slice(None))  # made already, whatever is asked for
        self.targets = task.count(self.batch)

    def parts(self, micro: int):
        for first in range(0, self.run.protocol.budget.batch, micro):
            yield to_device({k: v[first : first + micro] for k, v in self.batch.items()}, self.device)

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def precision(self):
        return torch.autocast(self.device, torch.bfloat16, enabled=self.run.protocol.precision == "bf16")

    def one(self, part: dict) -> tuple[float, float]:
        """Loss of a micro-batch, a share of the whole batch's; seconds forward and back."""
        clock = self.now()
        with self.precision():
            loss = self.task.loss(self.model(part), part) / self.targets
        loss.backward()
        return float(loss.detach()), self.now() - clock

    def fitting(self, micro: int) -> tuple[int, float]:
        """The largest micro-batch, from `micro` down by halves, that the device has memory for beside the gradients and
        moments that a step adds; seconds of its first."""
        added = 3 * sum(p.numel() for p in self.model.parameters())
        while True:
            if self.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            held = None
            try:
                held = torch.empty(added, device=self.device)
                return micro, self.one(next(self.parts(micro)))[1]
            except torch.OutOfMemoryError:
                if micro == 1:
                    raise
            finally:
                del held
                self.optimiser.zero_grad(set_to_none=True)
            micro //= 2

    def take(self, micro: int, share: float) -> tuple[float, list[float]]:
        """Loss of an example seen, seconds of each micro-batch. After `share` the rest is left out, but not the second
        micro-batch."""
        total, seconds, seen = 0.0, [], 0
        for part in self.parts(micro):
            if len(seconds) > 1 and sum(seconds) > share:
                break
            loss, took = self.one(part)
            total, seen = total + loss, seen + self.task.count(part)
            seconds.append(took)
        self.update()
        return total * self.targets / seen, seconds

    def update(self) -> float:
        """Seconds of the optimiser, whose gradients are gone afterwards."""
        clock = self.now()
        if clip := self.run.protocol.optimiser.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return self.now() - clock

    def updated(self, micro: int) -> float:
        """Seconds of an optimiser's step that is not its first, which makes the moments."""
        self.one(next(self.parts(micro)))
        return self.update()

    def replayed(self, micro: int, share: float) -> list[float]:
        """Seconds of micro-batches as CUDA graphs, without what the host needs to launch them one by one; after `share`
        no more. Raises RuntimeError if a pass is none, or memory for one lacks."""

        def passed(inputs: dict) -> None:
            with self.precision():
                loss = self.task.loss(self.model(inputs), inputs) / self.targets
            loss.backward()
            self.optimiser.zero_grad(set_to_none=True)

        replay, part, seconds = Replay(passed), next(self.parts(micro)), []
        for _ in range(WARM + 1):
            replay(part)
        while not seconds or (len(seconds) < PASSES and sum(seconds) < share):
            clock = self.now()
            replay(part)
            seconds.append(self.now() - clock)
        return seconds

    def look(self, micro: int) -> float:
        """Seconds of an example when it is only evaluated."""
        part = next(self.parts(micro))
        self.model.eval()
        with torch.no_grad(), self.precision():
            self.model(part)
            clock = self.now()
            self.model(part)
        return (self.now() - clock) / min(micro, self.run.protocol.budget.batch)
