"""Each Triton operator alone, forward and backward, at the shapes of a layer, under several settings of its constants.

Command: python benchmarks/kernels.py [--only convolution,scan] [--tokens 16384] [--length 128] [--out kernels.json]
For each setting: the error against plain torch in fp32 (values and gradients), the median of CUDA graph replays in
milliseconds, and the least by bytes at the bandwidth that a copy reaches in the same run. A setting is a change of the
constants at the head of the operator's file; what wins is written there. Needs a CUDA device.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from bench.kernels import conv, gated_norm, low_rank, scan
from bench.shells.base import short_conv
from bench.speed.clock import copying

INNER, EPS = 1536, 1e-5
DTYPE = torch.bfloat16


class Case:
    """An operator: `fast` and `exact` take the same leaves; `moved`: bytes of leaves and value, twice for backward."""

    def __init__(self, name: str, module, settings: dict[str, tuple], fast: Callable, exact: Callable, leaves: list):
        self.name, self.module, self.settings = name, module, settings
        self.fast, self.exact, self.leaves = fast, exact, leaves

    def variants(self) -> Iterator[dict]:
        for values in itertools.product(*self.settings.values()):
            yield dict(zip(self.settings, values, strict=True))

    def step(self, way: Callable, leaves: list[Tensor], gradient: Tensor) -> list[Tensor]:
        y = way(*leaves)
        return [y, *torch.autograd.grad(y, leaves, gradient)]

    def moved(self) -> int:
        big = sum(x.numel() * x.element_size() for x in self.leaves)
        y = self.fast(*self.leaves)
        return 3 * (big + y.numel() * y.element_size())


def draw(*shape: int, dtype=DTYPE) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype).requires_grad_()


def convolution(batch: int, length: int, channels: int) -> Case:
    segments_BL = torch.ones(batch, length, dtype=torch.int64, device="cuda")

    def exact(x, weight, bias):
        return F.silu(short_conv(x, segments_BL, weight, bias, False, False))

    leaves = [
        draw(batch, length, channels),
        draw(channels, 7, dtype=torch.float32),
        draw(channels, dtype=torch.float32),
    ]
    settings = {"TOKENS": (32, 64, 128), "CHANNELS": (128, 256, 512)}
    fast = lambda x, weight, bias: conv.short_conv(x, segments_BL, weight, bias, 3, False, True)  # noqa: E731
    return Case(f"convolution {channels}", conv, settings, fast, exact, leaves)


def norm(batch: int, length: int) -> Case:
    scale = torch.tensor(1.3, device="cuda")

    def exact(y, v, z, w):
        return F.rms_norm(y * scale + v, (INNER,), w, EPS) * F.silu(z)

    leaves = [*(draw(batch, length, INNER) for _ in range(3)), draw(INNER, dtype=torch.float32)]
    fast = lambda y, v, z, w: gated_norm.gated_norm(y, v, z, scale, w, EPS, True)  # noqa: E731
    return Case("gated norm", gated_norm, {"PROGRAMS": (528, 1056, 2048)}, fast, exact, leaves)


def product(batch: int, length: int, rank: int) -> Case:
    def exact(q, k, v):
        return torch.einsum("bihr,bhrp->bihp", q, torch.einsum("bjhr,bjhp->bhrp", k, v))

    leaves = [draw(batch, length, 12, rank), draw(batch, length, 12, rank), draw(batch, length, 12, 128)]
    settings = {"TOKENS": (64, 128), "TILE": (64, 128), "WARPS": (4, 8)}
    fast = lambda q, k, v: low_rank.low_rank_product(q, k, v)[0]  # noqa: E731
    return Case(f"low rank {rank}", low_rank, settings, fast, exact, leaves)


def both_ways(batch: int, length: int, heads: int, state: int) -> Case:
    from bench.mixers.scan import Terms, chunked_scan

    segments_BL = torch.ones(batch, length, dtype=torch.int64, device="cuda")

    def terms(c, b, raw, delta):
        dt = F.softplus(raw.float() - 3)
        return c, b, dt, -dt, delta.float()

    def exact(v, c, b, raw, delta):
        return chunked_scan(v, Terms(*terms(c, b, raw, delta)), segments_BL, False)

    def fast(v, c, b, raw, delta):
        return scan.scan(v, *terms(c, b, raw, delta), segments_BL, False)

    pair = [draw(batch, length, 2, 1, state) for _ in range(2)]
    leaves = [
        draw(batch, length, heads, INNER // heads),
        *pair,
        draw(batch, length, 2, heads),
        draw(batch, length, heads),
    ]
    settings = {"WARPS": (2, 4, 8), "WARPS_BACK": (2, 4)}
    return Case(f"scan {heads} heads of state {state}", scan, settings, fast, exact, leaves)


def error(case: Case) -> float:
    """The largest norm of a difference over the norm, of the value and of every gradient."""
    wide = [x.detach().float().requires_grad_() for x in case.leaves]
    gradient = torch.randn_like(case.fast(*case.leaves))
    exact = case.step(case.exact, wide, gradient.float())
    fast = case.step(case.fast, case.leaves, gradient)
    return max(float((a.float() - b).norm() / b.norm()) for a, b in zip(fast, exact, strict=True))


def replayed(step: Callable[[], object]) -> float:
    """Median milliseconds of a CUDA graph of the step."""
    return triton.testing.do_bench_cudagraph(step, rep=60, return_mode="median")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="words that the name of a case begins with")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    size = asked.tokens // asked.length, asked.length
    copy, moved = copying(1 << 30, "cuda")
    bandwidth = moved / statistics.median(replayed(copy) for _ in range(3)) * 1e3
    cases = [convolution(*size, INNER), convolution(*size, 384), norm(*size), product(*size, 16), product(*size, 192)]
    cases += [both_ways(*size, 12, 16), both_ways(*size, 24, 64)]
    rows = []
    for case in cases:
        if asked.only and not case.name.startswith(tuple(asked.only.split(","))):
            continue
        floor = case.moved() / bandwidth * 1e3
        for values in case.variants():
            rows.append(row := {"case": case.name, **values, "floor_ms": floor, **measured(case, values)})
            print(
                "  ".join(
                    f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
                ),
                flush=True,
            )
    if asked.out:
        asked.out.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")


def measured(case: Case, values: dict) -> dict:
    """Error and time under these constants; a setting that cannot run says why."""
    usual = {key: getattr(case.module, key) for key in values}
    for key, value in values.items():
        setattr(case.module, key, value)
    try:
        wrong = error(case)
        gradient = torch.randn_like(case.fast(*case.leaves))
        return {"error": wrong, "ms": replayed(lambda: case.step(case.fast, case.leaves, gradient))}
    except Exception as failure:  # too much shared memory, say
        return {"failed": " ".join(str(failure).split())[:120]}
    finally:
        for key, value in usual.items():
            setattr(case.module, key, value)


if __name__ == "__main__":
    main()
