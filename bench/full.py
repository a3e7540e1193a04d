"""What can still be said when the disk is full: room that was written to beforehand, filled in place."""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

BYTES = 4096  # of room: one block, one page
SPARE = ".spare"  # its name in a folder that somebody works in


def reserve(path: Path) -> None:
    """Make room for a text of BYTES, if it is not there. Raises OSError where the disk has none left."""
    if path.exists():
        return
    try:
        with open(path, "xb") as file:
            file.write(b" " * (BYTES - 1) + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return  # somebody else was as quick
    except OSError:
        path.unlink(missing_ok=True)
        raise


def overwrite(path: Path, text: str) -> None:
    """Put a text in the place of what a file holds, blanks after it, in one write. Raises OSError for a longer text."""
    size, content = path.stat().st_size, text.encode()
    if len(content) + 1 > size:
        raise OSError(f"{path} has room for {size - 1} bytes, not for {len(content)}")
    with open(path, "r+b", buffering=0) as file:
        file.write(content.ljust(size - 1) + b"\n")
        os.fsync(file.fileno())


def save(write: Callable, values: dict, path: Path) -> None:
    """By a Python file: given the path, torch.save says of a full disk 'unexpected pos 576 vs 534'."""
    with open(path, "wb") as file:
        write(values, file)


def say(text: str, error: bool = False) -> None:
    """Print a line. That the disk of the log is full is no reason to end."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr if error else sys.stdout, flush=True)
