"""Where a record comes from: machine and versions, and digests of the files whose code made its numbers.

Torch is imported by what asks it, so that a plan can compare code without it.
"""

import ast
import contextlib
import hashlib
import json
import os
import platform
import resource
import subprocess
from collections.abc import Iterable
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Protocol

from bench import Refusal
from bench.compose import ROOT, choices, claim_of
from bench.config import Run, Where
from bench.plugins import Claim, module_file
from bench.record import Environment

PACKAGES = ("numpy", "lightning", "kornia", "pillow", "tokenizers")
WRITERS = ("provenance", "record", "store")  # files that only write down what others made


def environment(run: Run, where: Where, device: str, compiled: bool, backend: str) -> Environment:
    import torch

    claim = claim_of(run.mixer.name)
    brought = {claim.distribution: claim.version} if claim else {}
    return Environment(
        commit=commit(),
        python=platform.python_version(),
        torch=torch.__version__,
        packages={name: metadata.version(name) for name in PACKAGES} | brought,
        device=model_of(device),
        world=where.devices * where.nodes,
        threads=where.threads,
        precision=run.protocol.precision,
        backend=backend,
        compiled=compiled,
        micro_batches=where.micro_batches,
        node=os.environ.get("SLURMD_NODENAME") or platform.node(),  # several nodes of Slurm may share a host
    )


def model_of(device: str) -> str:
    """The model name of 'cuda' or 'cpu' on this machine."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else processor()


def card(device: str) -> str:
    """Which GPU this process computes on, whatever CUDA_VISIBLE_DEVICES calls it; '' on a CPU."""
    import torch

    return str(torch.cuda.get_device_properties(device).uuid) if device == "cuda" else ""


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
    """The checkout's commit, with '+changes' if code or configurations differ from it, '' outside git. Provenance only:
    what counts are the digests of the files."""
    noted = ROOT / "COMMIT"  # of a snapshot, which may lie inside a checkout that has moved on
    if noted.exists():
        return noted.read_text().strip()
    try:
        changed = _git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no", "--", "bench", "configs")
        return _git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(*words: str) -> str:
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()


def code_digests(run: Run) -> dict[str, str]:
    """File -> SHA-256 (16 hex digits) of the contents of all files that make a run's numbers.

    Those of this package, and for a mixer of another distribution its module and what that imports of its own package,
    as 'mixers/<distribution>/<module>'. Only import statements are followed.
    """
    claim, own = claim_of(run.mixer.name), (f"tasks.{run.protocol.task.name}", f"shells.{run.protocol.shell.name}")
    roots = ["run", "backbone", "train", "registry", *own, *([] if claim else [f"mixers.{run.mixer.name}"])]
    seen = _followed([f"bench.{name}" for name in roots] + ([claim.module] if claim else []))
    for path, now in seen.values():
        if LOADED.get(path, now) != now:
            raise Refusal(f"{path} has changed since this process loaded it; stop the workers and start again")
    named = {_key(module, claim): now for module, (_, now) in seen.items()}
    return {k: v for k, v in sorted(named.items()) if k not in WRITERS}


class Coded(Protocol):
    """A finished run: its record, or what a plan keeps of it."""

    protocol_id: str
    seed: int
    commit: str
    digests: dict[str, str]


def other_code(todo: list[Run], done: Iterable[Coded]) -> list[str]:
    """A line a commit on finished runs that have other code than what is to do for their protocol and seed.

    The report compares the arms of one seed, and refuses one of which some have the one code and some the other.
    """
    kinds: dict[tuple[str, str, str], dict[str, str]] = {}
    now: dict[tuple[str, int, str], str] = {}  # of a block and a file
    for run in todo:
        kind = run.mixer.name, run.protocol.task.name, run.protocol.shell.name
        if kind not in kinds:
            kinds[kind] = code_digests(run)
        now |= {(run.protocol_id, run.seed, file): digest for file, digest in kinds[kind].items()}
    odd: dict[str, tuple[set[str], list[int]]] = {}  # by commit: files and seeds
    for one in done:
        block = one.protocol_id, one.seed
        if files := [file for file, digest in one.digests.items() if now.get((*block, file), digest) != digest]:
            names, seeds = odd.setdefault(one.commit[:7], (set(), []))
            names.update(files)
            seeds.append(one.seed)
    return [
        f"with other code{f' (commit {commit})' if commit else ''} than the runs to do now: {len(seeds)} of these "
        f"records, of seed {', '.join(map(str, sorted(set(seeds))))}; files: {', '.join(sorted(files))}. A report "
        "refuses a seed that has both: finish it with that code, or remove those records"
        for commit, (files, seeds) in odd.items()
    ]


def _key(module: str, claim: Claim | None) -> str:
    if module.startswith("bench."):
        return module.removeprefix("bench.").replace(".", "/")
    return f"mixers/{claim.distribution}/{module.replace('.', '/')}"


def _followed(roots: list[str]) -> dict[str, tuple[str, str]]:
    """Module -> path and digest of the file, for the roots and all that they import of their own packages."""
    tops = {name.split(".")[0] for name in roots}
    seen: dict[str, tuple[str, str]] = {}
    while roots:
        name = roots.pop()
        if name in seen or (path := module_file(name)) is None:
            continue
        content = path.read_bytes()
        seen[name] = str(path), _digest(content)
        if path.suffix == ".py":
            roots += [m for m in imports(content, name, path.stem == "__init__") if m.split(".")[0] in tops]
        if not name.startswith("bench."):  # importing a.b.c runs a and a.b too; the harness's own hold docstrings only
            roots += [name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)]
    return seen


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _found_at_start() -> dict[str, str]:
    """Path -> digest of every file of this package and of the mixers that other distributions bring."""
    files = {str(p): _digest(p.read_bytes()) for p in Path(__file__).parent.rglob("*.py")}
    for name in choices("mixer"):
        with contextlib.suppress(Refusal):  # a broken claim is refused when it is used
            if claim := claim_of(name):
                files |= dict(_followed([claim.module]).values())
    return files


def stamp(digests: dict[str, str], micro_batches: int) -> str:
    """What a checkpoint and the process that goes on from it must share."""
    return hashlib.sha256(json.dumps([digests, micro_batches]).encode()).hexdigest()[:16]


def reset_peak_memory(device: str) -> None:
    """Start to measure anew: a worker serves many runs."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # only Linux can; elsewhere the peak is the process's
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> int:
    """Bytes since the last reset: allocated on the GPU, else resident in the host."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def imports(content: bytes, module: str, is_package: bool) -> set[str]:
    """Modules of a package that the import statements of one of its files name; none if it is not Python."""
    parents = module.split(".") if is_package else module.split(".")[:-1]
    found = set()
    for node in _statements(content):
        if isinstance(node, ast.ImportFrom):
            above = parents[: len(parents) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            inner = {f"{base}.{alias.name}" for alias in node.names}
            found |= {m for m in inner if module_file(m)} or {base}
        else:
            found |= {alias.name for alias in node.names}
    return found - {"bench"}


@cache
def _statements(content: bytes) -> list[ast.Import | ast.ImportFrom]:
    """The import statements of a file, parsed once, as most runs of a sweep have most files; none if no Python."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):  # its import says what is wrong
        return []
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


LOADED = _found_at_start()  # what this process runs, whatever is on the disk later
