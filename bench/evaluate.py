"""Evaluation: metrics and per-example outcomes of a model as it stands, on all reported sets of its task.

Short batches are filled up, so that shapes stay fixed and a compiled layer is not compiled again. Rows of another
length than the task's own are read without what was compiled: compiling for each would take longer than the reading.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from bench.backbone import Backbone
from bench.tasks.base import Batch, Task, rows_of


def to_device(batch: Batch, device: str) -> Batch:
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def evaluate(
    model: Backbone, task: Task, parts: list[str], size: int, device: str, precision: str
) -> tuple[dict, dict]:
    """(metrics, outcomes by set) of the held-out sets `parts`; `size`: examples of one forward pass."""
    metrics, outcomes = {}, {}
    model.to(device).eval()
    for part in parts:
        collected: dict[str, list[np.ndarray]] = {}
        for batch in task.held_out_batches(part, size):
            for name, values in _outcomes(model, task, batch, size, device, precision).items():
                collected.setdefault(name, []).append(values)
        outcomes[part] = {name: np.concatenate(values) for name, values in collected.items()}
        metrics.update(task.metrics(part, outcomes[part]))
    return metrics, outcomes


def _outcomes(
    model: Backbone, task: Task, batch: Batch, size: int, device: str, precision: str
) -> dict[str, np.ndarray]:
    n, length = batch["segments"].shape
    own = task.spec().length
    rows = torch.arange(rows_of(length, size, own)).clamp(max=n - 1)
    filled = to_device({key: value[rows] for key, value in batch.items()}, device)
    stance = torch.compiler.set_stance("default" if length == own else "force_eager")
    with stance, torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16"):
        outputs = model(filled)
    return task.outcomes(outputs[:n].float(), {key: value[:n] for key, value in filled.items()})


@contextmanager
def averaged(model: Backbone, average: list[Tensor]) -> Iterator[None]:
    """The model holds the averaged weights inside, its own again afterwards."""
    own = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), average, strict=True):
            parameter.copy_(value)
        yield
        for parameter, value in zip(model.parameters(), own, strict=True):
            parameter.copy_(value)
