"""One optimiser step of every pretraining of the full-scale sweeps at full size: is the loss finite, what does it need?

Command: python benchmarks/one_step.py [sweeps/table2_paper.yaml ...] [--out FILE] [--results DIR] [--stop-after 8m]
Without names: all full-scale sweeps, the most important first, each arm once; --children: fine-tunings after them.
Prints a line an arm and appends it as JSON to --out: loss, peak device memory, examples and tokens a second, or why it
failed; the next arm follows. Micro-batches are halved until they fit. With --results, what worked is added to
DIR/pilots.jsonl, from which `mixerbench plan` reckons: without torch.compile (but for --compile), so too much rather
than too little. No data set is needed: the batch is the task's own made-up example, so the loss says nothing of a
mixer; what loading costs is not in it. --shrink tries the same on tiny sizes, on any machine.
"""

import argparse
import dataclasses
import json
import math
import statistics
import time
from pathlib import Path

import torch

from bench import registry, train
from bench.compose import ROOT
from bench.config import Run, inner_width, resolved
from bench.evaluate import to_device
from bench.plan.evidence import WEIGHT_BYTES, Pilot, append_pilot
from bench.provenance import model_of
from bench.speed.training import NOWHERE, made
from bench.store import utc
from bench.sweep import cells, load
from bench.words import duration

SWEEPS = ("table2_paper", "table4", "table5", "table3", "table2_strict", "table10", "attribution")
HELD_OUT = {"masked_lm": 364_608, "images": 50_000}  # examples that a run evaluates on: C4's and ImageNet's validation
BACKEND = "torch"
FIRST = 512  # examples of a forward pass that is tried first


def shrunk(run: Run) -> Run:
    """A copy with one layer, width 32 (or the next multiple of its heads), two steps of two examples (or groups).

    A mixer with a head for each channel keeps one.
    """
    group = registry.make_task(run, NOWHERE).spec().group
    protocol, mixer, width = run.protocol, run.mixer, -(-32 // run.mixer.args["heads"]) * run.mixer.args["heads"]
    if mixer.args["heads"] == protocol.inner:
        width, own = 32, {"heads": inner_width(32, protocol.shell.expand)}
        mixer = dataclasses.replace(mixer, args=mixer.args | own)
    small = dataclasses.replace(protocol.backbone, layers=1, width=width)
    budget = dataclasses.replace(protocol.budget, steps=2, batch=2 * group)
    return dataclasses.replace(run, mixer=mixer, protocol=dataclasses.replace(protocol, backbone=small, budget=budget))


def arms(paths: list[Path], children: bool) -> list[tuple[str, Run]]:
    """(sweep and arm, run) of each protocol and mixer, seed 0: all pretrainings first, then fine-tunings if wanted."""
    found: dict[tuple[str, str], tuple[str, Run]] = {}
    for path in paths:
        for cell in cells(load(path)):
            if cell.seed == 0 and cell.replica == 0 and (children or cell.run.parent is None):
                own = " ".join(f"{k.removeprefix('mixer.')}={v}" for k, v in cell.arm.changes.items())
                name = f"{path.stem} {cell.protocol} {cell.arm.mixer} {own}"
                found.setdefault((cell.run.protocol_id, cell.run.mixer.canonical), (name, cell.run))
    return sorted(found.values(), key=lambda arm: arm[1].parent is not None)  # stable: the sweeps' order stays


class Step:
    """A model and one optimiser step of it over the protocol's batch, in micro-batches; seconds of each are kept."""

    def __init__(self, run: Run, device: str, compiled: bool):
        self.run, self.device, started = run, device, time.perf_counter()
        self.model, self.task = made(run, BACKEND, device)
        settings = run.protocol.optimiser
        self.optimiser = torch.optim.AdamW(train.optimiser_groups(self.model, settings), lr=settings.lr)
        if compiled:
            for layer in self.model.layers:
                layer.compile(dynamic=False)
        self.batch = self.task.example(run.protocol.budget.batch)
        self.startup = time.perf_counter() - started

    def parts(self, micro: int):
        for first in range(0, self.run.protocol.budget.batch, micro):
            yield to_device({k: v[first : first + micro] for k, v in self.batch.items()}, self.device)

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def precision(self):
        return torch.autocast(self.device, torch.bfloat16, enabled=self.run.protocol.precision == "bf16")

    def take(self, micro: int) -> tuple[float, list[float], float]:
        """Loss, seconds of each micro-batch, seconds of the optimiser."""
        total, seconds, targets = 0.0, [], self.task.count(self.batch)
        self.model.train()
        for part in self.parts(micro):
            clock = self.now()
            with self.precision():
                loss = self.task.loss(self.model(part), part) / targets
            loss.backward()
            total += float(loss.detach())
            seconds.append(self.now() - clock)
        clock = self.now()
        if clip := self.run.protocol.optimiser.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return total, seconds, self.now() - clock

    def look(self, micro: int) -> float:
        """Seconds of an example when it is only evaluated."""
        part = next(self.parts(micro))
        self.model.eval()
        with torch.no_grad(), self.precision():
            self.model(part)
            clock = self.now()
            self.model(part)
        return (self.now() - clock) / min(micro, self.run.protocol.budget.batch)


def fitting(run: Run, device: str, compiled: bool, micro: int) -> tuple[Step, int, tuple[float, list[float], float]]:
    """The step taken with the largest micro-batch, from `micro` down by halves, that the device has memory for."""
    while True:
        try:
            one = Step(run, device, compiled)
            return one, micro, one.take(micro)
        except torch.OutOfMemoryError:
            if micro == 1:
                raise
        one, micro = None, micro // 2
        torch.cuda.empty_cache()


def measure(run: Run, device: str, compiled: bool, micro: int) -> tuple[dict, Pilot]:
    """What one arm needs, and the same as a pilot. Two micro-batches or more: the first, a warm-up, is not counted."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    size = run.protocol.budget.batch
    one, micro, (loss, seconds, optimiser) = fitting(run, device, compiled, min(micro, size))
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    first, passes = sum(seconds) + optimiser, math.ceil(size / micro)
    warm = seconds[1:] or one.take(micro)[1]
    low, mid, high = (q * passes + optimiser for q in quantiles(warm))
    parameters = sum(p.numel() for p in one.model.parameters())
    told = {
        "loss": loss,
        "finite": math.isfinite(loss),
        "parameters": parameters,
        "micro": micro,
        "memory_gib": round(memory / 2**30, 2),
        "examples_per_s": round(size / mid, 1),
        "tokens_per_s": round(size * one.task.spec().length / mid, 1),
        "step_s": round(mid, 4),
    }
    ema = bool(run.protocol.optimiser.ema)
    evaluation = HELD_OUT.get(run.protocol.task.name, 0) * (1 + ema) * one.look(micro)
    weights = WEIGHT_BYTES * parameters
    pilot = Pilot(
        protocol_id=run.protocol_id,
        label=run.label,
        mixer=resolved(run)["mixer"],
        device=model_of(device),
        world=1,
        steps=1,
        startup=one.startup,
        first_step=first,
        step_p10=low,
        step_p50=mid,
        step_p90=high,
        evaluation=evaluation,
        peak_memory=memory,
        weights_bytes=weights,
        checkpoint_bytes=weights * (3 + ema),
        record_bytes=len(json.dumps(resolved(run))),
        torch=torch.__version__,
        time=utc(),
    )
    return told, pilot


def quantiles(seconds: list[float]) -> tuple[float, float, float]:
    """The tenth, fiftieth and ninetieth percentile."""
    if len(seconds) == 1:
        return (seconds[0],) * 3
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return tenths[0], tenths[4], tenths[8]


def tried(run: Run, device: str, options) -> tuple[dict, Pilot | None]:
    """`measure`, with a failure as one more result."""
    try:
        told, pilot = measure(run, device, options.compile, options.micro)
        return {"outcome": "ok" if told["finite"] else "not finite", **told}, pilot
    except torch.OutOfMemoryError:
        return {"outcome": "oom", "reason": "out of memory with one example a pass"}, None
    except Exception as error:  # whatever one arm does wrong: the others are measured nevertheless
        return {"outcome": "error", "reason": " ".join(f"{type(error).__name__}: {error}".split())[:300]}, None


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sweeps", type=Path, nargs="*", help="sweep files; none: all full-scale ones")
    parser.add_argument("--children", action="store_true", help="fine-tunings too, after all pretrainings")
    parser.add_argument("--micro", type=int, default=FIRST, help="examples of a forward pass to begin with")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action="store_true", help="torch.compile of each layer, as training does")
    parser.add_argument("--shrink", action="store_true", help="tiny sizes; nothing is added to --results")
    parser.add_argument("--stop-after", type=duration, default=math.inf, help="start no arm after this time, like 8m")
    parser.add_argument("--out", type=Path, help="JSON lines are appended to this file")
    parser.add_argument("--results", type=Path, help="folder whose pilots.jsonl gets the costs")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """0 if every arm that was started gave a finite loss."""
    options, begun = parsed(arguments), time.monotonic()
    todo = arms(options.sweeps or [ROOT / "sweeps" / f"{name}.yaml" for name in SWEEPS], options.children)
    bad = 0
    for number, (name, run) in enumerate(todo, 1):
        if time.monotonic() - begun > options.stop_after:
            print(f"stopped before arm {number} of {len(todo)}: {name}", flush=True)
            break
        told, pilot = tried(shrunk(run) if options.shrink else run, options.device, options)
        bad += told["outcome"] != "ok"
        print(f"[{number}/{len(todo)}] {name}: " + ", ".join(f"{k} {v}" for k, v in told.items()), flush=True)
        if options.out:
            line = {"arm": name, "run": run.id, "protocol": run.protocol_id, **told}
            line |= {"device": model_of(options.device), "torch": torch.__version__, "shrunk": options.shrink}
            with options.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if options.results and pilot and not options.shrink and told["outcome"] == "ok":
            append_pilot(options.results / "pilots.jsonl", pilot)
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
