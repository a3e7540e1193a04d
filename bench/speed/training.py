"""Whole trainings: the training module itself (model, optimiser, schedule, loader) fed with the task's made-up batches.

So the rate is that of the loop when batches cost nothing to make; no data set is needed. Fits of all mixers alternate;
each compiles anew, as a run does, and the first third of its steps is not counted.
"""

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from bench import backbone, capacity, registry, train
from bench.config import Run, Where
from bench.provenance import peak_memory, reset_peak_memory
from bench.seeds import Streams
from bench.speed import clock
from bench.speed.layer import flops_of
from bench.speed.rounds import Timed
from bench.speed.settings import Entry, Settings
from bench.tasks.base import Places, Task

NOWHERE = Places(data=None, cache=Path())  # no data are read


def made(run: Run, backend: str, device: str) -> tuple[backbone.Backbone, Task]:
    """The run's model with its initial values, and its task, whose every batch is now its example."""
    task = registry.make_task(run, NOWHERE)
    model = capacity.model_of(run, task, backend)
    backbone.initialise(model, Streams(run.seed, run.replica), registry.salt(run))
    example = task.example(run.protocol.budget.batch)
    task.batch = lambda streams, step, size, part: {key: value[part] for key, value in example.items()}
    return model.to(device), task


def quiet(device: str, compiled: bool, graph: bool, micro_batches: int, folder: Path) -> train.Setting:
    """One process without checkpoints and loaders."""
    return train.Setting(
        device=device,
        rank=0,
        world=1,
        micro_batches=micro_batches,
        loaders=0,
        compiled=compiled,
        graph=graph,
        folder=folder,
        stamp="",
        write=lambda name, how: how(folder / name),
        checkpoint_seconds=float("inf"),
        should_stop=lambda: False,
    )


def fitted(run: Run, setting: train.Setting, backend: str, stretch: int) -> tuple[list[float], float]:
    """Seconds a step of each stretch of a fit, the first third left out, and of the first step."""
    model, task = made(run, backend, setting.device)
    training = train.Training(model, task, run.protocol, Streams(run.seed, run.replica), setting)
    training.every = stretch
    train.fit(training)
    seconds = training.trace.step_seconds
    return seconds[len(seconds) // 3 :], training.trace.first_step


@dataclass
class Fitted:
    """What is known of an arm's trainings so far; plain values."""

    arm: str
    backend: str
    outcome: str = ""
    reason: str = ""
    first: float = 0.0
    turns: list[list[float]] = field(default_factory=list)  # seconds a step
    peak_memory: int = 0
    parameters: int = 0
    flops: int = 0  # of the layers, a step


class Fit(Timed):
    """An arm's fits, one a turn."""

    def __init__(self, entry: Entry, where: Where, settings: Settings):
        super().__init__(entry.label, settings)
        self.entry, self.where = entry, where
        self.result = Fitted(entry.label, "")
        if entry.refused or (reason := registry.check(entry.run)):
            self.result.outcome, self.result.reason = "unfit", entry.refused or reason
            return
        self.result.backend = registry.backend(
            registry.mixer_class(entry.run.mixer.name), where.backend, settings.device
        )
        budget = replace(entry.run.protocol.budget, steps=settings.training.steps)
        self.run = replace(entry.run, protocol=replace(entry.run.protocol, budget=budget))
        with torch.device("meta"):
            model = capacity.model_of(self.run, registry.make_task(self.run, NOWHERE), self.result.backend)
        self.length = model.spec.length
        self.result.parameters = sum(p.numel() for p in model.parameters())
        self.result.flops = sum(flops_of(layer, self.length, budget.batch) for layer in model.layers)

    def prepare(self) -> None:
        """Nothing is shared between fits, so there is nothing to prepare."""
        self.result.outcome = self.result.outcome or "ok"

    def known(self) -> bool:
        return bool(self.result.turns)

    def turns(self) -> int:
        return self.settings.rounds

    def turn(self) -> None:
        settings, result = self.settings, self.result
        clock.release(settings.device)
        before = clock.in_use(settings.device)
        reset_peak_memory(settings.device)
        with tempfile.TemporaryDirectory() as folder:
            graph, cut = self.where.one_graph(settings.device), self.where.micro_batches
            setting = quiet(settings.device, settings.compiled, graph, cut, Path(folder))
            seconds, first = fitted(self.run, setting, result.backend, settings.training.stretch)
        result.peak_memory = peak_memory(settings.device) - before
        result.first = result.first or first
        result.turns.append(seconds)
