"""What an assembler made of a kernel: registers, stack, and addresses that nothing wrote.

Read from what cuobjdump prints of a cubin. A group of threads shares its uniform registers (UR0, UR1, ...); matrix
products take the addresses of their operands from them. ptxas 12.8 has been seen to drop the instruction that writes
one of these (triton-lang/triton, issues 10486 and 11366, tell of the like): the product then reads whatever memory an
old number points to, without a word from the compiler and right in the interpreter.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton

INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*([^;]*);")
BRINGERS = ("S2UR", "R2UR", "REDUX", "VOTEU")
"""Write uniform registers although their names do not begin with U."""


def resources(binary: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack."""
    said = _told(binary, "-res-usage")
    return tuple(int(re.search(rf"{word}:(\d+)", said)[1]) for word in ("REG", "STACK"))


def unwritten(binary: bytes) -> list[str]:
    """`unwritten_in` of what a cubin disassembles to."""
    return unwritten_in(_told(binary, "-sass"))


def unwritten_in(code: str) -> list[str]:
    """'UR12 at 5c20' for each uniform register that is read before any line above wrote it.

    Lines in their order, jumps not followed: a register that only some path writes counts as written, and so does one
    that still holds something else.
    """
    known, found = set(), []
    for place, name, text in INSTRUCTION.findall(code):
        operands = [x.strip() for x in text.split(",")]
        written = _written(name, operands)
        read = set().union(*_read(name, operands, 1 if written else 0))
        found += [f"UR{number} at {place}" for number in sorted(read - known)]
        known |= read | written
    return found


def _written(name: str, operands: list[str]) -> set[int]:
    first = re.fullmatch(r"UR(\d+)", operands[0])
    if not first or not (name.startswith("U") or name.split(".")[0] in BRINGERS):
        return set()
    return _pair(first[1]) if {"64", "WIDE"} & set(name.split(".")) else {int(first[1])}


def _pair(number: str) -> set[int]:
    return {int(number), int(number) + 1}


def _read(name: str, operands: list[str], first: int) -> Iterator[set[int]]:
    """Of each operand from the first that is read; what has 64 bits is a pair. A product of tiles has the addresses of
    both factors in a row of four, of which it needs the latter two alone where the first factor is in registers."""
    kinds = set(name.split("."))
    for n, operand in enumerate(operands[first:], first):
        added = n == 3 and "WIDE" in kinds  # the factors of a wide product have 32 bits, what is added to it has 64
        for memory, number, half in re.findall(r"(gdesc\[|desc\[|)UR(\d+)(\.64)?", operand):
            if memory == "gdesc[":
                later = {int(number) + 2, int(number) + 3}
                yield later if re.fullmatch(r"R\d+", operands[1]) else later | _pair(number)
            elif memory or half or added or ("64" in kinds and name.startswith("U")):
                yield _pair(number)
            else:
                yield {int(number)}


def _told(binary: bytes, question: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([tool, question, file.name], capture_output=True, text=True, check=True).stdout
