"""Where the time of one layer, or of a whole training, goes: the kernels of a step, the longest first.

Command: python benchmarks/profile_gpu.py --lengths 128,2048 "low_rank mixer.sam=true mixer.heads=12" identity
         python benchmarks/profile_gpu.py --training protocol=mini_mlm where.graph=on "low_rank mixer.heads=4"
For each arm and length, milliseconds a step and calls of each kernel. Layer and training are `mixerbench speed`'s, on
its backend `auto` or the one given. Needs a CUDA device.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.compiling import allow_many
from bench.config import Run, Where
from bench.registry import backend, mixer_class
from bench.speed import layer, settings, training

WARM, STEPS, ROWS = 4, 5, 32
FITTED = 40  # steps of a training: its first ones are not those of the rest

Found = list[tuple[float, float, str]]  # (milliseconds, calls, name) a step


def recorded(act: Callable[[], object], steps: int) -> Found:
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        act()
        torch.cuda.synchronize()
    found = [
        (event.self_device_time_total / 1e3 / steps, event.count / steps, event.key)
        for event in seen.key_averages()
        if event.self_device_time_total
    ]
    return sorted(found, reverse=True)


def of_a_layer(subject: layer.Subject) -> Found:
    def steps(n: int) -> None:
        for _ in range(n):
            subject.step()

    steps(WARM)
    torch.cuda.synchronize()
    return recorded(partial(steps, STEPS), STEPS)


def of_a_training(run: Run, where: Where, way: str) -> Found:
    """The first fit compiles, the second one is recorded."""
    run = replace(run, protocol=replace(run.protocol, budget=replace(run.protocol.budget, steps=FITTED)))
    with tempfile.TemporaryDirectory() as folder:
        setting = training.quiet("cuda", True, where.one_graph("cuda"), where.micro_batches, Path(folder))
        fit = partial(training.fitted, run, setting, way, FITTED)
        fit()
        return recorded(fit, FITTED)


def show(title: str, found: Found) -> None:
    print(f"{title}: {sum(ms for ms, _, _ in found):.3f} ms of kernels", flush=True)
    for ms, calls, name in found[:ROWS]:
        print(f"  {ms:7.3f} ms {calls:5.1f} x {name[:110]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="128")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--training", action="store_true")
    parser.add_argument("arms", nargs="+")
    asked = parser.parse_args()
    request = settings.Asked(
        words=[*asked.arms, "where.device=cuda", f"where.backend={asked.backend}"],
        lengths=[] if asked.training else [int(length) for length in asked.lengths.split(",")],
        tokens=0, batch=0, ways="", segments="", seconds=0.0, rounds=0,
        training=asked.training, steps=FITTED if asked.training else 0,
        until=float("inf"), out=None, as_json=False,
    )  # fmt: skip
    chosen, entries, where = settings.read(request)
    allow_many()
    for entry in entries:
        way = backend(mixer_class(entry.run.mixer.name), where.backend, "cuda")
        if asked.training:
            show(f"{entry.label} {way} training", of_a_training(entry.run, where, way))
            continue
        for length in chosen.lengths:
            subject = layer.subject_of(entry.run, length, chosen.examples(length), "full", way, "cuda")
            layer.prepare(subject, "fast", True)
            show(f"{entry.label} {way} L={length}", of_a_layer(subject))


if __name__ == "__main__":
    main()
