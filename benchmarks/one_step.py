"""One optimiser step of every pretraining arm of a sweep at full size: is the loss finite, what does it need?

Command: python benchmarks/one_step.py sweeps/table2_paper.yaml [--micro 128] [--device cuda]
Prints a line an arm: loss, peak device memory, examples a second of a second step. No data set is needed: the batch is
the task's own made-up example, so the loss says nothing of a mixer. Costs for `mixerbench plan` are measured on
real data: mixerbench plan sweeps/table2_paper.yaml --pilot where.devices=8.
"""

import argparse
import math
import time
from pathlib import Path

import torch

from bench import train
from bench.compose import make_run
from bench.config import Run
from bench.evaluate import to_device
from bench.speed.training import made
from bench.sweep import cells, load

BACKEND = "torch"


def step(model, task, run: Run, optimiser, micro: int, device: str) -> float:
    """The loss of one optimiser step over the protocol's batch, in micro-batches."""
    size, total = run.protocol.budget.batch, 0.0
    batch = task.example(size)
    targets = task.count(batch)
    for first in range(0, size, micro):
        part = to_device({key: value[first : first + micro] for key, value in batch.items()}, device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=run.protocol.precision == "bf16"):
            loss = task.loss(model(part), part) / targets
        loss.backward()
        total += float(loss.detach())
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return total


def measure(run: Run, micro: int, device: str) -> str:
    model, task = made(run, BACKEND, device)
    optimiser = torch.optim.AdamW(train.optimiser_groups(model, run.protocol.optimiser), lr=run.protocol.optimiser.lr)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses, clock = [step(model, task, run, optimiser, micro, device)], time.perf_counter()
    losses.append(step(model, task, run, optimiser, micro, device))
    rate = run.protocol.budget.batch / (time.perf_counter() - clock)
    memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else math.nan
    finite = "finite" if all(map(math.isfinite, losses)) else "NOT FINITE"
    return f"loss {losses[0]:.3f}, {losses[1]:.3f} {finite}, {memory:.1f} GiB, {rate:.0f} examples/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--micro", type=int, default=128, help="examples of one forward pass")
    parser.add_argument("--batch", type=int, default=0, help="examples of the step; 0: the protocol's")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    for cell in cells(load(options.sweep)):
        if cell.run.parent or cell.seed:
            continue
        own = {"protocol.budget.batch": options.batch} if options.batch else {}
        changes = {**cell.variation, **cell.arm.departed, **cell.arm.changes, **own}
        run = make_run(cell.protocol.split("[")[0], cell.arm.mixer, changes, 0, 0)
        name = f"{cell.protocol} {cell.arm.mixer} {cell.arm.changes}"
        try:
            print(f"{name}: {measure(run, options.micro, options.device)}", flush=True)
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory with --micro {options.micro}", flush=True)


if __name__ == "__main__":
    main()
