"""What `where` means on this machine: folders, and the device. Training is not loaded for it."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from bench import Refusal
from bench.compose import ROOT
from bench.config import Run, Where

if TYPE_CHECKING:
    from bench.tasks.base import Places


def places(where: Where) -> "Places":
    from bench.tasks.base import Places

    folder = where.data or os.environ.get("MIXERBENCH_DATA", "")
    cache = Path(where.cache) if where.cache else results(where) / "cache"
    return Places(data=Path(folder) if folder else None, cache=cache)


def results(where: Where) -> Path:
    """The results folder, which need not be there yet. Raises Refusal if it can be none."""
    path = ROOT / where.results
    there = next(above for above in (path, *path.parents) if above.exists())
    if not there.is_dir():
        raise Refusal(f"where.results={where.results}: {there} is a file; name a folder, which need not be there yet")
    return path


def device_of(run: Run, where: Where) -> str:
    """'cpu' or 'cuda'; a device or precision that is not there is refused, never replaced."""
    import torch

    present = torch.cuda.is_available()
    if where.device == "cuda" and not present:
        raise Refusal("where.device=cuda: no CUDA device is visible; use: cpu")
    device = "cuda" if present and where.device != "cpu" else "cpu"
    if run.protocol.precision == "bf16" and device == "cuda" and not torch.cuda.is_bf16_supported():
        raise Refusal(f"protocol.precision=bf16 is not supported by {torch.cuda.get_device_name()}")
    if device == "cuda" and where.devices > torch.cuda.device_count():
        raise Refusal(f"where.devices={where.devices}: {torch.cuda.device_count()} CUDA devices are visible")
    return device


def shares(where: Where, workers: int) -> list[str]:
    """The GPUs that each worker of this machine sees, in CUDA_VISIBLE_DEVICES' words; '' where there are none to share.

    They are dealt round: where.devices to a worker, from the first again once all have been given.
    """
    import torch

    if where.device == "cpu" or not torch.cuda.is_available():
        return [""] * workers
    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    names, each = seen.split(","), where.devices
    return [",".join(names[(n * each + k) % len(names)] for k in range(each)) for n in range(workers)]
