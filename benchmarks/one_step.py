"""One optimiser step of every arm of the full-scale sweeps at full size: is the loss finite, what does it need?

Command: python benchmarks/one_step.py [sweeps/table2_paper.yaml ...] [--out FILE] [--results DIR] [--stop-after 8m]
Without names: the paper's tables first, an arm of each in turn, then strict and attribution; of each group first the
pretrainings, then the fine-tunings, of which those that cost the same are tried once. The next models are built while
one is measured. Prints a line an arm and appends it as JSON to --out: loss, peak device memory, examples and tokens a
second, or why it failed; the next arm follows, in a new process where CUDA itself has failed. Arms with a line in --out
are left out, so the same command goes on where it was stopped; but those whose last line is an error are tried again.
Micro-batches are halved until they fit; after --share seconds the rest of a step's examples are left out. The exit
status is 1 while an arm's last line is not ok. With --results, what worked is added to DIR/pilots.jsonl, from which
`mixerbench plan` reckons: on the backend that a training would choose (but for --backend), on a GPU with a pass as one
CUDA graph, without torch.compile (but for --compile). A training that is compiled takes less, one that is spread over
several devices, whose passes the host launches, may take more. No data set is needed: the batch is the task's own
made-up example, so the loss says nothing of a mixer, and loading costs nothing.
--shrink rehearses with tiny sizes on any machine; its pilots are of a device 'shrunk, ...'.
"""

import argparse
import contextlib
import dataclasses
import itertools
import math
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from bench import Refusal, kernels, registry
from bench.cli import guarded
from bench.compose import ROOT
from bench.config import Run, inner_width, one_of
from bench.mixers.base import Mixer
from bench.plan.arms import Arm, arms
from bench.plan.evidence import WEIGHT_BYTES, Pilot, append_pilot
from bench.provenance import model_of
from bench.speed.training import NOWHERE, made
from bench.store import utc
from bench.words import Parser, duration
from benchmarks.step_files import GROUPS, append, latest, pilot_of, quantiles, refuse_unwritable, tries
from benchmarks.stepping import PASSES, Step

FIRST = 256  # examples of a forward pass that is tried first
AHEAD = 4  # models that are built while one is measured
DEAD = "AcceleratorError"  # what torch raises once the device's context is lost: nothing works in this process any more


def shrunk(run: Run) -> Run:
    """A copy with one layer, width 32 (or the next that its heads divide, inside the shell too), two steps of two
    examples (or groups). A mixer with a head for each channel keeps one.
    """
    group = registry.make_task(run, NOWHERE).spec().group
    protocol, mixer, heads = run.protocol, run.mixer, run.mixer.args["heads"]
    fitting = (w for w in itertools.count(32) if w % heads == 0 and w * protocol.shell.expand % heads == 0)
    width = next(fitting)
    if heads == protocol.inner:
        width, own = 32, {"heads": inner_width(32, protocol.shell.expand)}
        mixer = dataclasses.replace(mixer, args=mixer.args | own)
    small = dataclasses.replace(protocol.backbone, layers=1, width=width)
    budget = dataclasses.replace(protocol.budget, steps=2, batch=2 * group)
    return dataclasses.replace(run, mixer=mixer, protocol=dataclasses.replace(protocol, backbone=small, budget=budget))


def ahead(todo: list[Arm], options: argparse.Namespace) -> Iterator[tuple[Arm, Run, Future]]:
    """Each arm with the run to try and its model and task, which are built on the host while others are measured."""
    with ThreadPoolExecutor(AHEAD) as pool:
        waiting: deque[tuple[Arm, Run, Future]] = deque()
        try:
            for arm in todo:
                run = shrunk(arm.run) if options.shrink else arm.run
                waiting.append((arm, run, pool.submit(built, run, way_of(run, options))))
                if len(waiting) > AHEAD:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            pool.shutdown(cancel_futures=True)


def way_of(run: Run, options: argparse.Namespace) -> str:
    """The backend of mixer and shell."""
    return registry.backend(registry.mixer_class(run.mixer.name), options.backend, options.device)


def built(run: Run, way: str) -> tuple[torch.nn.Module, object, float]:
    """Model and task on the host, seconds that it took."""
    clock = time.perf_counter()
    return *made(run, way, "cpu"), time.perf_counter() - clock


# One arm ----------------------------------------------------------------------------------------------------------


def measure(arm: Arm, run: Run, future: Future, options) -> tuple[dict, list[Pilot]]:
    """What one arm needs, and a pilot of every run that it stands for. The first micro-batch, a warm-up, is apart."""
    device, size = options.device, run.protocol.budget.batch
    model, task, startup = future.result()
    one = Step(run, model, task, device, options.compile)
    micro, first = one.fitting(min(options.micro, size))
    loss, seconds = one.take(micro, options.share)
    whole, passes, graph = len(seconds), math.ceil(size / micro), False
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    optimiser, look = one.updated(micro), one.look(micro)
    if device == "cuda":
        with contextlib.suppress(RuntimeError):  # also for want of memory: then as they were
            seconds, graph = one.replayed(micro, options.share), True
        torch.cuda.synchronize()  # a context that is lost was not for want of memory
    while not graph and len(seconds) < PASSES and sum(seconds) < options.share:
        seconds += one.take(micro, options.share - sum(seconds))[1]
    low, mid, high = (q * passes + optimiser for q in quantiles(seconds))
    parameters = sum(p.numel() for p in model.parameters())
    told = {
        "loss": loss,
        "finite": math.isfinite(loss),
        "parameters": parameters,
        "micro": micro,
        "passes": f"{whole} of {passes}",
        "graph": graph,
        "memory_gib": round(memory / 2**30, 2),
        "examples_per_s": round(size / mid, 1),
        "tokens_per_s": round(size * task.spec().length / mid, 1),
        "step_s": round(mid, 4),
    }
    known = {
        "device": model_on(options),
        "world": 1,
        "steps": 1,
        "startup": startup,
        "first_step": first + low * (passes - 1) / passes + optimiser,
        "step_p10": low,
        "step_p50": mid,
        "step_p90": high,
        "peak_memory": memory,
        "weights_bytes": WEIGHT_BYTES * parameters,
        "torch": torch.__version__,
        "time": utc(),
    }
    return told, [pilot_of(each, look, known) for each in arm.alike]


def tried(arm: Arm, run: Run, future: Future, options) -> tuple[dict, list[Pilot]]:
    """`measure`, with a failure as one more result."""
    try:
        told, pilots = measure(arm, run, future, options)
        return {"outcome": "ok" if told["finite"] else "not finite", **told}, pilots
    except torch.OutOfMemoryError:
        return {"outcome": "oom", "reason": "out of memory with one example a pass"}, []
    except Exception as error:  # whatever one arm does wrong: the others are measured nevertheless
        return {"outcome": "error", "reason": " ".join(f"{type(error).__name__}: {error}".split())[:300]}, []


# All of them ------------------------------------------------------------------------------------------------------


def model_on(options) -> str:
    return "shrunk, " * options.shrink + model_of(options.device)


def ends_of(steps: list[dict], options) -> dict[str, str]:
    """The outcome on this device of each run that has a line: that of its last."""
    here = model_on(options)
    return {run: step["outcome"] for (run, device), step in latest(steps).items() if device == here}


def keep(arm: Arm, told: dict, pilots: list[Pilot], options) -> None:
    if options.out:
        line = {"arm": arm.name, "run": arm.run.id, "protocol": arm.run.protocol_id, **told}
        line |= {"also": sorted({r.label for r in arm.alike[1:]})}
        line |= {"device": model_on(options), "backend": way_of(arm.run, options), "torch": torch.__version__}
        append(options.out, line)
    if options.results and told["outcome"] == "ok":
        for pilot in pilots:
            append_pilot(options.results / "pilots.jsonl", pilot)


def refuse(options) -> None:
    """Refuse what would make arm after arm fail, or would be missed only when the first one has been measured."""
    one_of("--device", options.device, ("cpu", "cuda"))
    if options.device == "cuda" and not torch.cuda.is_available():
        raise Refusal("--device cuda: no CUDA device is visible; use: cpu")
    if options.micro < 1:
        raise Refusal(f"--micro must be at least 1, got {options.micro}")
    try:
        registry.backend(Mixer, options.backend, options.device)
    except Refusal as error:  # says it of a run's words
        raise Refusal(str(error).replace("where.backend", "--backend")) from None
    if options.backend == "triton":
        kernels.require_triton()
    if options.out:
        refuse_unwritable("--out", options.out, False, "a file in a folder that is there")
    if options.results:
        refuse_unwritable("--results", options.results / "pilots.jsonl", True, "a folder, which need not be there yet")


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("sweeps", type=Path, nargs="*", help="sweep files; none: all full-scale ones")
    parser.add_argument("--micro", type=int, default=FIRST, help="examples of a forward pass to begin with")
    parser.add_argument("--share", type=duration, default=2.0, help="of an arm's passes, like 2s; 10m: whole steps")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="auto", help="of mixers and shells: auto, torch, triton or mamba_ssm")
    parser.add_argument("--compile", action="store_true", help="torch.compile of each layer, as training does")
    parser.add_argument("--shrink", action="store_true", help="tiny sizes")
    parser.add_argument("--stop-after", type=duration, default=math.inf, help="start no arm after this time, like 8m")
    parser.add_argument("--out", type=Path, help="JSON lines are appended to this file; arms that it has are left out")
    parser.add_argument("--results", type=Path, help="folder whose pilots.jsonl gets the costs")
    since = "the call began with so many lines of --out: errors after them are its own (set when it starts anew)"
    parser.add_argument("--since", type=int, metavar="LINES", help=since)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """0 if no arm that was tried, in this call or according to --out, was without a finite loss."""
    options, begun = parsed(arguments), time.monotonic()
    refuse(options)
    steps = tries(options.out) if options.out else []
    since = len(steps) if options.since is None else options.since
    groups = [options.sweeps] if options.sweeps else [[ROOT / "sweeps" / f"{n}.yaml" for n in g] for g in GROUPS]
    every, ends, own = arms(groups), ends_of(steps, options), ends_of(steps[since:], options)
    # What is not in --out is to do like what ended as an error there, be it in an earlier call only.
    todo = [arm for arm in every if arm.run.id not in own and ends.get(arm.run.id, "error") == "error"]
    stand_for = sum(len(arm.alike) for arm in every)
    print(f"{len(every)} arms for {stand_for} protocols and mixers, {len(todo)} to try", flush=True)
    for number, (arm, run, future) in enumerate(ahead(todo, options), 1):
        past = time.monotonic() - begun
        if past > options.stop_after:
            print(f"stopped before arm {number} of {len(todo)}: {arm.name}; the same command goes on", flush=True)
            break
        told, pilots = tried(arm, run, future, options)
        ends[arm.run.id] = told["outcome"]
        text = ", ".join(f"{k} {v}" for k, v in told.items())
        print(f"[{number}/{len(todo)}, {past:.0f} s] {arm.name}: {text}", flush=True)
        keep(arm, told, pilots, options)
        if options.out and told.get("reason", "").startswith(DEAD):
            again(options, since, begun)
    bad = Counter(ends[arm.run.id] for arm in every if ends.get(arm.run.id, "ok") != "ok")
    if bad:
        print(f"not ok: {', '.join(f'{count} {outcome}' for outcome, count in bad.items())}", flush=True)
    return int(bool(bad))


def again(options, since: int, begun: float) -> None:
    """The same command in a new process, which does not try again what this one has tried."""
    left = max(0.0, options.stop_after - (time.monotonic() - begun))
    words = ["--since", str(since), *([] if math.isinf(left) else ["--stop-after", f"{left:.0f}s"])]
    os.execv(sys.executable, [sys.executable, *sys.argv, *words])


if __name__ == "__main__":
    raise SystemExit(guarded(main, sys.argv[1:]))
