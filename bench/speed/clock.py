"""Time and memory of a callable on one device, what the device itself can do, and what counts as out of memory.

On CUDA: events around each step, read after all steps are issued, so that the host never waits inside. Where issuing a
step takes the host as long as the step, the device waits for the host. On a CPU: the clock.
"""

import contextlib
import ctypes
import gc
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.provenance import peak_memory, reset_peak_memory

SHORTAGE = ("can't allocate memory", "not enough memory", "out of memory")  # how torch says it without a class for it


def timed(step: Callable[[], object], times: int, device: str) -> tuple[list[float], float]:
    """Seconds of each of `times` steps, and the least of the host to issue one (0 on a CPU, where it does the work).

    The least, because the host is held up once the queue of launches is full.
    """
    if device == "cpu":
        marks = [time.perf_counter()]
        for _ in range(times):
            step()
            marks.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(marks)], 0.0
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    torch.cuda.synchronize()
    events[0].record()
    issued = [time.perf_counter()]
    for event in events[1:]:
        step()
        event.record()
        issued.append(time.perf_counter())
    torch.cuda.synchronize()
    host = min(after - before for before, after in itertools.pairwise(issued))
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)], host


def waited(step: Callable[[], object], device: str) -> float:
    """Seconds until one step is done, waiting included."""
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_of(step: Callable[[], object], device: str) -> int:
    """Bytes in use at the highest point of one step: of torch's tensors on a GPU, of the whole process on a CPU."""
    reset_peak_memory(device)
    waited(step, device)
    return peak_memory(device)


def in_use(device: str) -> int:
    """Bytes in use now, as `peak_of` counts them."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return _kilobytes(Path("/proc/self/status"), "VmRSS")


def free(device: str) -> int:
    """Bytes that can still be had."""
    if device == "cuda":
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable") or sys.maxsize


def _kilobytes(path: Path, key: str) -> int:
    """A line of a Linux table, in bytes; 0 elsewhere."""
    if not path.exists():
        return 0
    return next(int(line.split()[1]) * 1024 for line in path.read_text().splitlines() if line.startswith(key))


def release(device: str) -> None:
    """Give back what nobody holds, so that the next peak counts from what is in use."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    else:
        with contextlib.suppress(OSError, AttributeError):  # only glibc has it
            ctypes.CDLL(None).malloc_trim(0)


def is_shortage(error: Exception) -> bool:
    """Whether an exception says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in SHORTAGE)


def copying(size: int, device: str) -> tuple[Callable[[], object], int]:
    """A copy on the device, and the bytes that it reads and writes."""
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return lambda: target.copy_(source), 2 * size


def multiplying(rows: int, precision: str, device: str) -> tuple[Callable[[], object], int]:
    """A product of two square matrices in the dtype that the layers' products have, and its FLOPs."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(rows, rows, device=device).to(dtype) for _ in range(2))
    result = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=result), 2 * rows**3
