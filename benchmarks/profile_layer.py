"""Where the time of one layer goes: the kernels of a step, forward and backward, the longest first.

Command: python benchmarks/profile_layer.py --lengths 128,2048 "low_rank mixer.sam=true mixer.heads=12" identity
For each arm and length, milliseconds a step and calls of each kernel. The layer is `mixerbench speed`'s, on its backend
`auto` or the one given. Needs a CUDA device.
"""

import argparse

import torch
from torch.profiler import ProfilerActivity, profile

from bench.registry import backend, mixer_class
from bench.speed import layer, settings
from bench.speed.verb import many_compilations

WARM, STEPS, ROWS = 4, 5, 16


def kernels(subject: layer.Subject) -> list[tuple[float, float, str]]:
    """(milliseconds, calls, name) a step."""
    for _ in range(WARM):
        subject.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(STEPS):
            subject.step()
        torch.cuda.synchronize()
    found = [
        (event.self_device_time_total / 1e3 / STEPS, event.count / STEPS, event.key)
        for event in recorded.key_averages()
        if event.self_device_time_total
    ]
    return sorted(found, reverse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="128")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("arms", nargs="+")
    asked = parser.parse_args()
    request = settings.Asked(
        words=[*asked.arms, "where.device=cuda", f"where.backend={asked.backend}"],
        lengths=[int(length) for length in asked.lengths.split(",")],
        tokens=0, batch=0, ways="", segments="", seconds=0.0, rounds=0, training=False, steps=0,
        until=float("inf"), out=None, as_json=False,
    )  # fmt: skip
    chosen, entries, where = settings.read(request)
    many_compilations(chosen)
    for entry in entries:
        way = backend(mixer_class(entry.run.mixer.name), where.backend, "cuda")
        for length in chosen.lengths:
            subject = layer.subject_of(entry.run, length, chosen.examples(length), "full", way, "cuda")
            layer.prepare(subject, "fast", True)
            found = kernels(subject)
            print(f"{entry.label} {way} L={length}: {sum(ms for ms, _, _ in found):.3f} ms of kernels", flush=True)
            for ms, calls, name in found[:ROWS]:
                print(f"  {ms:7.3f} ms {calls:5.1f} x {name[:110]}")


if __name__ == "__main__":
    main()
