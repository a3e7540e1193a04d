"""Training: the only room that imports lightning. One optimiser rule, one schedule, exact resume, evaluation.

Peculiar: a loader item is one micro-batch, a pure function of its index = optimiser step x micro-batches + micro-batch;
losses are summed, and the gradients of a whole optimiser step are divided by its number of targets, added up over
ranks. So neither world size nor micro-batch changes the objective, and a resume starts the loader at an index.
"""

import hashlib
import json
import logging
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bench.backbone import Backbone
from bench.compiling import compile_parts
from bench.config import Optimiser, Protocol, Schedule, part_size
from bench.full import save
from bench.replay import Replay
from bench.seeds import Streams
from bench.shells.base import owned_by_mixer
from bench.tasks.base import Batch, Task
from bench.weights import Unreadable, loaded

CURVE_POINTS = 64
CHECKPOINT = "checkpoint.pt"
DIVISOR = "divisor"  # beside a batch's own keys: what its loss is divided by
STOP_EVERY = 10  # optimiser steps between questions to rank 0
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Diverged(Exception):
    """The loss is not finite: an outcome of the science."""


class Interrupted(Exception):
    """Asked to stop; a checkpoint of the last optimiser step is on disk."""


@dataclass(frozen=True)
class Setting:
    """How this process executes a run; nothing here changes the objective."""

    device: str  # 'cpu' or 'cuda'
    rank: int
    world: int
    micro_batches: int
    loaders: int
    compiled: bool
    graph: bool  # issue an optimiser step as one CUDA graph
    folder: Path  # where a checkpoint may lie
    stamp: str  # what a checkpoint must share with the process that goes on from it: code and micro-batches
    write: Callable[[str, Callable[[Path], object]], None]  # puts a file of a name there, whole or not at all
    checkpoint_seconds: float
    should_stop: Callable[[], bool]


@dataclass
class Trace:
    """What training leaves behind besides the weights; goes through checkpoints, so only plain values."""

    curve: list[tuple[int, float]]
    step_seconds: list[float]  # mean of each stretch between two points of the curve
    first_step: float
    spent: float  # seconds before the checkpoint that this process started from


class MicroBatches(Dataset):
    """Item i is this rank's micro-batch i % m of optimiser step i // m."""

    def __init__(self, task: Task, streams: Streams, size: int, setting: Setting):
        self.task, self.streams, self.size, self.setting = task, streams, size, setting
        self.part = part_size("this protocol", size, setting.world, setting.micro_batches, task.spec().group)

    def __getitem__(self, index: int) -> tuple[Batch, Tensor]:
        """The micro-batch and what its loss is divided by, both made on the host."""
        step, micro = divmod(index, self.setting.micro_batches)
        start = (self.setting.rank * self.setting.micro_batches + micro) * self.part
        batch = self.task.batch(self.streams, step, self.size, slice(start, start + self.part))
        return batch, torch.tensor(float(self.task.count(batch)))


def learning_rate(step: int, steps: int, peak: float, schedule: Schedule) -> float:
    """Of optimiser step `step` (0, 1, ...): linear warm-up to `peak`, then decay to final x peak at the last step."""
    warm = round(schedule.warmup * steps)
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm) / max(1, steps - 1 - warm)
    left = 1 - done if schedule.shape == "linear" else (1 + math.cos(math.pi * done)) / 2
    return peak * (schedule.final + (1 - schedule.final) * left)


def optimiser_groups(model: nn.Module, settings: Optimiser) -> list[dict]:
    """Weight decay by number of dimensions, for every parameter alike; no flags on tensors."""
    named = sorted(model.named_parameters())
    matrices, others = [x for x in named if x[1].ndim >= 2], [x for x in named if x[1].ndim < 2]
    decays = ((matrices, settings.weight_decay), (others, 0.0))
    return [{"names": [n for n, _ in g], "params": [p for _, p in g], "weight_decay": d} for g, d in decays]


def groups_digest(model: nn.Module, settings: Optimiser) -> str:
    """SHA-256 (16 hex digits) of the optimiser's rule and its shared members."""
    groups = optimiser_groups(model, settings)
    shared = [[g["weight_decay"], [n for n in g["names"] if not owned_by_mixer(n)]] for g in groups]
    rule = [shared, settings.lr, settings.betas, settings.eps, settings.clip]
    return hashlib.sha256(json.dumps(rule).encode()).hexdigest()[:16]


class Training(lightning.LightningModule):
    """One run's training. `done` counts finished optimiser steps."""

    def __init__(self, model: Backbone, task: Task, protocol: Protocol, streams: Streams, setting: Setting):
        super().__init__()
        self.automatic_optimization = False
        self.model, self.task, self.protocol, self.streams, self.setting = model, task, protocol, streams, setting
        task.fused = setting.device == "cuda" and model.fused
        self.done, self.trace = 0, Trace([], [], 0.0, 0.0)
        self.every = math.ceil(protocol.budget.steps / CURVE_POINTS)
        self.draws = any(getattr(protocol.backbone, key) for key in ("dropout", "hidden_dropout", "drop_path"))
        self.average = [p.detach().clone() for p in model.parameters()] if protocol.optimiser.ema else []
        self.optimiser_state: dict | None = None

    def configure_optimizers(self):
        settings = self.protocol.optimiser
        groups = [{k: g[k] for k in ("params", "weight_decay")} for g in optimiser_groups(self.model, settings)]
        fast = {"fused": True, "capturable": True} if self.setting.device == "cuda" else {}
        optimiser = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, **fast)
        if self.optimiser_state is not None:
            optimiser.load_state_dict(self.optimiser_state)
            self.optimiser_state = None
        return optimiser

    def on_fit_start(self) -> None:
        self.average = [a.to(self.device) for a in self.average]
        self.totals = torch.zeros(3, device=self.device)  # loss sum, targets, steps with a loss that is not finite
        self.parameters_ = list(self.model.parameters())
        self.optimiser = self.optimizers(use_pl_optimizer=False)
        if self.setting.device == "cuda":  # the rate lives on the device, where a recorded step reads it
            self.rate = torch.zeros((), device=self.device)
            for group in self.optimiser.param_groups:
                group["lr"] = self.rate
        self.replay = Replay(partial(self.compute, first=True, last=True)) if self.setting.graph else None
        self.begun = self.clock = self.saved = time.perf_counter()
        self.logged = self.done

    def on_train_batch_start(self, item: tuple[Batch, Tensor], index: int) -> None:
        wrapped = self.trainer.strategy.model
        if isinstance(wrapped, nn.parallel.DistributedDataParallel):
            wrapped.require_backward_grad_sync = (index + 1) % self.setting.micro_batches == 0

    def training_step(self, item: tuple[Batch, Tensor], index: int) -> None:
        batch, divisor = item
        first, last = index % self.setting.micro_batches == 0, (index + 1) % self.setting.micro_batches == 0
        if first and self.draws:
            torch.manual_seed(self.streams.torch_seed(f"dropout {self.done} {self.setting.rank}"))
        if last:
            self.set_rate()
        compute = self.replay or partial(self.compute, first=first, last=last)
        compute({**batch, DIVISOR: divisor})
        self.done += last

    def set_rate(self) -> None:
        protocol = self.protocol
        rate = learning_rate(self.done, protocol.budget.steps, protocol.optimiser.lr, protocol.schedule)
        if self.setting.device == "cuda":
            self.rate.fill_(rate)
        else:
            for group in self.optimiser.param_groups:
                group["lr"] = rate

    def compute(self, inputs: Batch, first: bool, last: bool) -> None:
        """The device's part of a micro-batch: nothing here waits for the device or depends on the step's number."""
        if first:
            self.totals[:2] = 0
        loss = self.loss(self.model.read(inputs), inputs)
        self.manual_backward(loss)
        self.totals[0] += loss.detach()
        self.totals[1] += inputs[DIVISOR]
        if last:
            self.optimiser_step()

    def loss(self, x: Tensor, inputs: Batch) -> Tensor:
        """Of what the head gets; one function, so that compiled no fp32 copy of a vocabulary's outputs is written."""
        return self.task.loss(self.model.outputs(x), inputs)

    def optimiser_step(self) -> None:
        settings, world = self.protocol.optimiser, self.setting.world
        if world > 1:
            torch.distributed.all_reduce(self.totals[:2])
        self.totals[2] += ~self.totals[0].isfinite()
        gradients = [p.grad for p in self.parameters_ if p.grad is not None]
        torch._foreach_mul_(gradients, world / self.totals[1].clamp(min=1))  # DDP has averaged over ranks
        if settings.clip:
            nn.utils.clip_grad_norm_(self.parameters_, settings.clip, foreach=True)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if self.average:
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters_], 1 - settings.ema)

    def on_train_batch_end(self, outputs, item: tuple[Batch, Tensor], index: int) -> None:
        if (index + 1) % self.setting.micro_batches:
            return
        finished = self.done == self.protocol.budget.steps
        if self.done % self.every == 0 or finished or self.done == 1:
            self.log_point()
        stop = self.agreed_stop() and not finished
        due = time.perf_counter() - self.saved > self.setting.checkpoint_seconds
        if stop or (due and not finished):
            self.save()
        if stop:
            raise Interrupted(f"stopped after step {self.done} of {self.protocol.budget.steps}")

    def agreed_stop(self) -> bool:
        """Rank 0 decides, so that all ranks stop at the same step; they ask rarely, since the answer costs a wait."""
        if self.setting.world == 1:
            return self.setting.should_stop()
        if self.done % STOP_EVERY:
            return False
        flag = torch.tensor(float(self.setting.should_stop()), device=self.device)
        torch.distributed.broadcast(flag, 0)
        return bool(flag)

    def log_point(self) -> None:
        """The one place that waits for the device."""
        loss_sum, targets, bad = self.totals.tolist()
        now = time.perf_counter()
        if self.done == 1:
            self.trace.first_step = now - self.clock
        else:
            self.trace.step_seconds.append((now - self.clock) / max(1, self.done - self.logged))
        self.clock, self.logged = now, self.done
        self.require_finite(bad)
        loss = loss_sum / max(1.0, targets)
        finished = self.done == self.protocol.budget.steps
        if self.done % self.every == 0 or finished:  # else the first step, for its time only
            self.trace.curve.append((self.done, loss))
        if self.setting.rank == 0:
            progress = {"step": self.done, "steps": self.protocol.budget.steps, "loss": loss}
            if self.trace.step_seconds:
                progress["pace"] = self.trace.step_seconds[-1]  # seconds a step
            self.setting.write("progress.json", lambda path: path.write_text(json.dumps(progress)))

    def require_finite(self, bad: float) -> None:
        if bad:
            raise Diverged(f"the training loss was not finite by step {self.done}")

    def save(self) -> None:
        """A checkpoint at an optimiser step. There are no random states to keep: every draw is keyed by its step."""
        self.saved = time.perf_counter()
        self.require_finite(float(self.totals[2]))
        if self.setting.rank:
            return
        trace, spent = self.trace, self.trace.spent + self.saved - self.begun
        state = {
            "stamp": self.setting.stamp,
            "done": self.done,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "average": self.average,
            "trace": [trace.curve, trace.step_seconds, trace.first_step, spent],
        }
        self.setting.write(CHECKPOINT, lambda path: save(torch.save, state, path))

    def restore(self) -> None:
        """Go on from a checkpoint if there is one; one of no use is dropped, and nothing in it is ever executed."""
        path = self.setting.folder / CHECKPOINT
        if not path.exists():
            return
        try:
            state = loaded(path)
            fault = "" if state["stamp"] == self.setting.stamp else "made by other code or with other micro-batches"
        except (Unreadable, KeyError, TypeError) as error:
            fault = f"unreadable, {error if isinstance(error, Unreadable) else type(error).__name__}"
        if fault:
            print(f"{path} is of no use ({fault}), starting over", file=sys.stderr)
            path.unlink()
            return
        self.model.load_state_dict(state["model"])
        self.optimiser_state, self.average, self.done = state["optimiser"], state["average"], state["done"]
        curve, step_seconds, first_step, spent = state["trace"]
        self.trace = Trace([tuple(point) for point in curve], list(step_seconds), first_step, spent)


def fit(training: Training) -> None:
    """Train to the end of the budget, from wherever `training` stands. Raises Diverged or Interrupted."""
    setting, steps = training.setting, training.protocol.budget.steps
    if training.done >= steps:
        return
    loader = DataLoader(
        MicroBatches(training.task, training.streams, training.protocol.budget.batch, setting),
        batch_size=None,
        sampler=range(training.done * setting.micro_batches, steps * setting.micro_batches),
        num_workers=setting.loaders,
        multiprocessing_context="fork" if setting.loaders and sys.platform == "linux" else None,  # shares the data
        pin_memory=setting.device == "cuda",
        prefetch_factor=4 if setting.loaders else None,
    )
    if setting.compiled:
        compile_parts(training.model)
        training.loss = torch.compile(training.loss, dynamic=False)
    answer = signal.getsignal(signal.SIGTERM)  # Lightning puts an exit without a checkpoint in its place
    here = int(os.environ.get("LOCAL_WORLD_SIZE", setting.world))  # ranks of this node
    trainer = lightning.Trainer(
        accelerator="gpu" if setting.device == "cuda" else "cpu",
        devices=here,
        num_nodes=setting.world // here,
        strategy="ddp" if setting.world > 1 else "auto",
        callbacks=[LambdaCallback(on_train_start=lambda *_: signal.signal(signal.SIGTERM, answer))],
        plugins=[LightningEnvironment()],  # a Slurm job around us is not Lightning's to read or to requeue
        precision="bf16-mixed" if training.protocol.precision == "bf16" else "32-true",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    training.model.train()
    with warnings.catch_warnings():
        # That the loader has few workers is the user's choice (where.loaders); the other is lightning's debt to torch.
        warnings.filterwarnings("ignore", category=PossibleUserWarning)
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        trainer.fit(training, train_dataloaders=loader)
    training.replay = None  # gives its memory back
    if training.done != steps:
        raise RuntimeError(f"training ended after step {training.done} of {steps}")
