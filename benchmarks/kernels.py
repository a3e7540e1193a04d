"""Each Triton operator alone, forward and backward, at the shapes of a layer, under several settings of its constants.

Command: python benchmarks/kernels.py --out kernels.jsonl [--only scan,toeplitz] [--tokens 16384] [--seconds 220]
First all settings are compiled and checked side by side, by processes that take a few each: the error is that against
plain torch in fp32, values and gradients, at fewer tokens and heads. Then they are timed one after another, all usual
settings first: the median of CUDA graph replays, and the least by bytes at the bandwidth that a copy reaches in the
same run, or by products at the rate of a large one. Rows are written as they come, so that a run that is cut keeps what
it has; a setting that fails says why and costs no other. A setting is a change of the constants at the head of the
operator's file; what wins is written there. The cases are in operators.py. Without a CUDA device, with
TRITON_INTERPRET=1 and --tokens 64, it shows only that it runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import torch
import triton
from operators import CASES, Case, Size, chosen, step

from bench.speed.clock import copying, multiplying

PROCESSES, EACH = max(1, 3 * (os.cpu_count() or 1) // 4), 3
"""That compile side by side, and the settings that one of them takes."""
COMPILING = 0.6  # of the time there is, at most
SMALL_TOKENS, SMALL_HEADS = 2048, 2  # of the check against plain torch
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)


# One process: what it is given on its input, a line of JSON for each ------------------------------------------------


def build(name: str, tokens: int, heads: int) -> Case:
    length = CASES[name].length if CUDA else min(CASES[name].length, tokens)
    return CASES[name].make(Size(max(tokens // length, 1), length, heads, DEVICE, DTYPE))


def prepared(name: str, values: dict, tokens: int) -> dict:
    """Compiled at the full size, and its error at a small one."""
    case = build(name, tokens, 12 if CUDA else SMALL_HEADS)
    with case.under(values):
        step(case.ways[values.get("way", "")], case.leaves)
        case = build(name, min(tokens, SMALL_TOKENS), SMALL_HEADS)
        wide = [x.detach().float().requires_grad_() for x in case.leaves]
        found, exact = step(case.ways[values.get("way", "")], case.leaves), step(case.exact, wide)
    pairs = zip(found, exact, strict=True)
    return {"error": max(float((a.float() - b).norm() / b.norm().clamp(min=1e-20)) for a, b in pairs)}


def replayed(work: Callable[[], object]) -> float:
    """Median milliseconds of a CUDA graph of it; on a CPU of the one time that it is done."""
    if CUDA:
        return triton.testing.do_bench_cudagraph(work, rep=40, return_mode="median")
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def timed(name: str, values: dict, tokens: int, bandwidth: float, rate: float) -> dict:
    case = build(name, tokens, 12 if CUDA else SMALL_HEADS)
    with case.under(values):
        way = case.ways[values.get("way", "")]
        with torch.no_grad():
            y = way(*case.leaves)
            forward = replayed(lambda: way(*case.leaves))
        gradient = torch.randn_like(y)
        both = replayed(lambda: step(way, case.leaves, gradient))
    leaves = sum(x.numel() * x.element_size() for x in case.leaves)
    moved = 3 * leaves + 2 * y.numel() * y.element_size()  # read, read again, written; y written, its gradient read
    floor = max(moved / bandwidth, case.flops / rate) * 1e3
    return {"forward_ms": forward, "ms": both, "floor_ms": floor, "ratio": both / floor}


def ceilings() -> tuple[float, float]:
    """Bytes and FLOPs a second that this device reaches."""
    if not CUDA:
        return 1e10, 1e11
    copy, moved = copying(1 << 30, DEVICE)
    product, flops = multiplying(8192, "bf16", DEVICE)
    return tuple(
        n / statistics.median(replayed(x) for _ in range(3)) * 1e3 for x, n in ((copy, moved), (product, flops))
    )


def child(tokens: int) -> None:
    """Reads [what, [[case, setting], ..]] and answers each in its order."""
    what, tasks = json.loads(sys.stdin.read())
    reached = ceilings() if what == "time" else ()
    for name, index in tasks:
        values = CASES[name].settings[index]
        try:
            row = prepared(name, values, tokens) if what == "prepare" else timed(name, values, tokens, *reached)
        except Exception as failure:  # too much shared memory, say
            row = {"failed": " ".join(f"{type(failure).__name__}: {failure}".split())[:160]}
        print(json.dumps(row), flush=True)
        if "failed" in row and "CUDA error" in row["failed"]:
            sys.exit(1)  # nothing that this process still did would be right


# The process that gives out work ------------------------------------------------------------------------------------


def answers(what: str, tasks: list, tokens: int, until: float) -> Iterator[tuple]:
    """Each task with its row; after a process that died on one, the next goes on with those behind it."""
    while tasks and time.time() < until:
        command = [sys.executable, "-W", "ignore", __file__, "--child", "--tokens", str(tokens)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process, ThreadPoolExecutor(1) as killer:  # fmt: skip
            killer.submit(end_at, process, until)
            process.stdin.write(json.dumps([what, tasks]))
            process.stdin.close()
            done = 0
            for line in process.stdout:
                yield tasks[done], json.loads(line)
                done += 1
        if done < len(tasks) and time.time() < until and process.returncode not in (0, 1):
            yield tasks[done], {"failed": f"its process ended with {process.returncode}"}
            done += 1
        if done == 0:
            return
        tasks = tasks[done:]


def end_at(process: subprocess.Popen, until: float) -> None:
    try:
        process.wait(max(0, until - time.time()))
    except subprocess.TimeoutExpired:
        process.kill()


def prepare(tasks: list, tokens: int, until: float, keep: Callable[[tuple, dict], None]) -> dict:
    """Rows of all settings that were compiled in time, by (case, setting)."""
    found, lock = {}, Lock()
    groups = [tasks[i : i + EACH] for i in range(0, len(tasks), EACH)]

    def work(group: list) -> None:
        for task, row in answers("prepare", group, tokens, until):
            with lock:
                found[task] = row
                if "failed" in row:
                    keep(task, row)

    with ThreadPoolExecutor(PROCESSES if CUDA else 1) as pool:
        list(pool.map(work, groups))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=chosen, default=list(CASES), help="words that the name of a case begins with")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--seconds", type=float, default=220)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", action="store_true", help="for its own use")
    asked = parser.parse_args()
    if asked.child:
        return child(asked.tokens)
    start, rows = time.time(), []
    tasks = [(n, i) for n in asked.only for i in range(len(CASES[n].settings))]
    file = (asked.out or Path(os.devnull)).open("w")

    def keep(task: tuple, row: dict) -> None:
        rows.append(row := {"case": task[0], "setting": CASES[task[0]].settings[task[1]], **row})
        file.write(json.dumps(row) + "\n")
        file.flush()
        print(line(row), flush=True)

    found = prepare(tasks, asked.tokens, start + COMPILING * asked.seconds, keep)
    print(f"{len(found)} of {len(tasks)} settings compiled and checked in {time.time() - start:.0f} s", flush=True)
    ready = sorted((task for task in found if "failed" not in found[task]), key=lambda task: task[1])
    for task, row in answers("time", ready, asked.tokens, start + asked.seconds):
        keep(task, {**found[task], **row})
    device = torch.cuda.get_device_name() if CUDA else "cpu"
    print(f"\n{device}, {asked.tokens} tokens, {time.time() - start:.0f} s in all; ms of forward and backward\n")
    for row in sorted((row for row in rows if "ms" in row), key=lambda row: (asked.only.index(row["case"]), row["ms"])):
        print(line(row))


def line(row: dict) -> str:
    setting = " ".join(f"{key}={value}" for key, value in row["setting"].items()) or "as it is"
    if "failed" in row:
        return f"{row['case']:26} {setting:44} {row['failed']}"
    figures = (
        f"{row['ms']:8.3f} ms  floor {row['floor_ms']:6.3f}  x {row['ratio']:5.1f}  forward {row['forward_ms']:7.3f}"
    )
    return f"{row['case']:26} {setting:44} {figures}  error {row['error']:.1e}"


if __name__ == "__main__":
    main()
