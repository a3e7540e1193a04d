"""Where a record comes from: machine and versions, and digests of the files whose code made its numbers."""

import ast
import contextlib
import hashlib
import importlib.util
import json
import platform
import resource
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import torch

from bench import Refusal
from bench.compose import ROOT
from bench.config import Run, Where
from bench.record import Environment

PACKAGES = ("numpy", "lightning", "kornia", "pillow", "tokenizers")
WRITERS = ("provenance", "record", "store")  # files that only write down what others made


def environment(run: Run, where: Where, device: str, compiled: bool, backend: str) -> Environment:
    return Environment(
        commit=commit(),
        python=platform.python_version(),
        torch=torch.__version__,
        packages={name: metadata.version(name) for name in PACKAGES},
        device=torch.cuda.get_device_name() if device == "cuda" else processor(),
        world=where.devices,
        threads=where.threads,
        precision=run.protocol.precision,
        backend=backend,
        compiled=compiled,
        micro_batches=where.micro_batches,
        node=platform.node(),
    )


@lru_cache
def processor() -> str:
    """The processor's model name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.machine()


@lru_cache
def commit() -> str:
    """The checkout's commit, '' outside git. Provenance only: what counts are the digests of the files."""
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _files() -> dict[str, str]:
    """Path of every file of this package -> SHA-256 (16 hex digits) of its content."""
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in Path(__file__).parent.rglob("*.py")}


LOADED = _files()  # as this process found them when it started: what it runs, whatever is on the disk later


def code_digests(task: str, mixer: str) -> dict[str, str]:
    """File -> SHA-256 (16 hex digits) of the contents of all files of this package that make a run's numbers."""
    roots = [
        "bench.run",
        "bench.backbone",
        "bench.train",
        "bench.registry",
        f"bench.tasks.{task}",
        f"bench.mixers.{mixer}",
    ]
    seen: dict[str, str] = {}
    while roots:
        name = roots.pop()
        path = Path(importlib.util.find_spec(name).origin)
        text = path.read_bytes()
        now = hashlib.sha256(text).hexdigest()[:16]
        if LOADED.get(str(path), now) != now:
            raise Refusal(f"{path} has changed since this process loaded it; stop the workers and start again")
        seen[name.removeprefix("bench.").replace(".", "/")] = now
        roots += [m for m in imports(text) if m.removeprefix("bench.").replace(".", "/") not in seen]
    return {k: v for k, v in sorted(seen.items()) if k not in WRITERS}


def stamp(digests: dict[str, str], micro_batches: int) -> str:
    """What a checkpoint and the process that goes on from it must share."""
    return hashlib.sha256(json.dumps([digests, micro_batches]).encode()).hexdigest()[:16]


def reset_peak_memory(device: str) -> None:
    """Start to measure anew: a worker serves many runs."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # only Linux can; elsewhere the peak is the process's
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> int:
    """Bytes since the last reset: allocated on the GPU, else resident in the host."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def imports(text: bytes) -> set[str]:
    """Modules of this package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and (node.module + ".").startswith("bench."):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {m for m in inner if importlib.util.find_spec("bench") and _is_module(m)} or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("bench.")}
    return found - {"bench"}


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
