"""What the training module costs over a bare loop: same model, same batch, same optimiser, interleaved, medians.

Command: python benchmarks/overhead.py [--protocol mini_mlm --mixer attention] [--repeats 7] [--device cuda]
Prints milliseconds a step of both loops, the ratio of each repeat, and their median with the spread. No data set is
needed: the batch is the task's own example, and both loops get it from a host tensor through the same loader.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from bench import train
from bench.compose import make_run
from bench.config import Run
from bench.evaluate import to_device
from bench.seeds import Streams
from bench.speed.training import fitted, made, quiet

BACKEND = "torch"


def ours(run: Run, device: str, steps: int, folder: Path) -> float:
    """Seconds a step under the module, between two logged points, waiting for the device as often as a run does."""
    every = -(-steps // train.CURVE_POINTS)
    seconds, _ = fitted(run, quiet(device, device == "cuda", False, 1, folder), BACKEND, every)
    return statistics.median(seconds)


def bare(run: Run, device: str, steps: int) -> float:
    """Seconds a step of the plain loop over the same model, waiting for the device as often as `ours` does."""
    model, task = made(run, BACKEND, device)
    if device == "cuda":
        torch._dynamo.reset()
        for layer in model.layers:
            layer.compile(dynamic=False)
    settings = run.protocol.optimiser
    groups = [{k: g[k] for k in ("params", "weight_decay")} for g in train.optimiser_groups(model, settings)]
    optimiser = torch.optim.AdamW(
        groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=device == "cuda" or None
    )
    setting = quiet(device, device == "cuda", False, 1, Path())
    data = train.MicroBatches(task, Streams(0, 0), run.protocol.budget.batch, setting)
    loader = DataLoader(data, batch_size=None, sampler=range(steps), pin_memory=device == "cuda")
    every, seconds, clock = -(-steps // train.CURVE_POINTS), [], time.perf_counter()
    for step, (batch, targets) in enumerate(loader):
        batch = to_device(batch, device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=run.protocol.precision == "bf16"):
            loss = task.loss(model(batch), batch) / targets.to(device, non_blocking=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip, foreach=True)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if step % every == 0:
            loss.item()
            seconds.append((time.perf_counter() - clock) / every)
            clock = time.perf_counter()
    return statistics.median(seconds[len(seconds) // 3 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--protocol", default="mini_mlm")
    parser.add_argument("--mixer", default="attention")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=192)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    changes = {"protocol.budget.steps": options.steps, "protocol.budget.batch": options.batch}
    run = make_run(options.protocol, options.mixer, changes, 0, 0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.repeats):
            rows.append(
                (ours(run, options.device, options.steps, Path(folder)), bare(run, options.device, options.steps))
            )
            module, loop = rows[-1]
            print(f"module {1e3 * module:.3f} ms, bare loop {1e3 * loop:.3f} ms, ratio {module / loop:.4f}", flush=True)
    ratios = sorted(a / b for a, b in rows)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    summary = {
        "device": name,
        "ratio": statistics.median(ratios),
        "lowest": ratios[0],
        "highest": ratios[-1],
        "ms": 1e3 * statistics.median(b for _, b in rows),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
