"""What each Triton kernel takes of the chip, told by its compiler: no GPU is needed.

Command: python benchmarks/compiled.py [--only scan,toeplitz] [--settings all] [--flags] [--dtype float32] [--heads 1]
    [--arch 90]
Every operator of operators.py is called on the CPU, forward and backward; its launches are compiled for a card's
architecture (90: H100 and H200) and not made; with --flags also with each of its flags the other way, such as PACKED,
which no case has. A line for each kernel: registers of a thread (255 at most), bytes of a thread's stack, which is
where registers are spilled to, bytes of shared memory of a program, and reads and writes of two bytes, where 16 could
go at once. What does not compile, needs more shared memory than there is, or takes an address from a register that
nothing wrote (machine_code.py), is named and ends the command with 1. The compiler is that of the Triton installed:
another may find another fault.
"""

import argparse
import functools
import re
import sys
from collections.abc import Iterator

import torch
from machine_code import resources, unwritten
from operators import CASES, Size, chosen, step
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

TOKENS = 256  # enough to have the strides of a layer
SHARED = 232_448  # bytes for a program on an H100
NARROW = re.compile(r"\b(?:ld|st)\.global\S*\.b16\b")


class Card:
    """The driver of a card that is not there: what Triton asks before it compiles."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def kernel_name(kernel: jit.JITFunction) -> str:
    return f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"


def compile_only(arch: int, flags: bool, made: list) -> None:
    """From now on a launch compiles its kernel, with each of its flags the other way if `flags`, adds it to `made`, and
    does not happen."""
    driver.set_active(Card(arch))
    run = jit.JITFunction.run

    @functools.wraps(run)
    def compiled(kernel, *words, grid, warmup, **options):
        turned = [key for key, value in options.items() if isinstance(value, bool)] if flags else []
        for key in [None, *turned]:
            values = options | ({key: not options[key]} if key else {})
            name = kernel_name(kernel) + (f" {key}={values[key]}" if key else "")
            made.append((name, run(kernel, *words, grid=grid, warmup=True, **values)))

    jit.JITFunction.run = compiled


def lines(name: str, values: dict, dtype: torch.dtype, heads: int, made: list) -> Iterator[tuple[str, bool]]:
    """What is said of each kernel of an operator under a setting, and whether it can run."""
    made.clear()
    length = CASES[name].length
    try:
        case = CASES[name].make(Size(max(TOKENS // length, 1), length, heads, "cpu", dtype))
        with case.under(values):
            step(case.ways[values.get("way", "")], case.leaves)
    except Exception as failure:
        yield f"does not compile: {type(failure).__name__}: {' '.join(str(failure).split())[-300:]}", False
    for kernel, compiled in {compiled.hash: (kernel, compiled) for kernel, compiled in made}.values():
        (registers, stack), shared = resources(compiled.asm["cubin"]), compiled.metadata.shared
        wrong = [f"more than {SHARED}"] if shared > SHARED else []
        wrong += [f"reads {place}, which nothing wrote" for place in unwritten(compiled.asm["cubin"])]
        narrow = len(NARROW.findall(compiled.asm["ptx"]))
        said = f"{kernel:36} registers {registers:3}  stack {stack:4}  shared {shared:6}  narrow {narrow:3}"
        yield ", ".join([said, *wrong]), not wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=chosen, default=list(CASES), help="words that the name of a case begins with")
    parser.add_argument("--settings", choices=["first", "all"], default="first")
    parser.add_argument("--flags", action="store_true")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--arch", type=int, default=90)
    asked, made, runs = parser.parse_args(), [], True
    compile_only(asked.arch, asked.flags, made)
    for name in asked.only:
        for values in CASES[name].settings[: None if asked.settings == "all" else 1]:
            setting = " ".join(f"{key}={value}" for key, value in values.items()) or "as it is"
            for line, able in lines(name, values, getattr(torch, asked.dtype), asked.heads, made):
                runs &= able
                print(f"{name:22} {setting:36} {line}", flush=True)
    return 0 if runs else 1


if __name__ == "__main__":
    sys.exit(main())
