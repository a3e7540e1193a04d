"""The one reader of files that torch wrote: nothing in them is ever executed, and a damaged one is told from all else.

torch names its own ways to read a damaged file by half a dozen classes, and some of its messages advise to read it
unsafely, so what it says is not passed on.
"""

from pathlib import Path

import torch
from torch import Tensor

from bench import Refusal


class Unreadable(Exception):
    """A file that torch cannot read; says the class of what it raised."""


def loaded(path: Path) -> object:
    """What a file holds, on the CPU. Raises Unreadable."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:  # no fault of the file
        raise
    except Exception as error:
        raise Unreadable(type(error).__name__) from None


def read_weights(path: Path, remedy: str) -> dict[str, Tensor]:
    """A run's weights by name; a Refusal with `remedy`, what the user can do, for a file that holds anything else."""
    try:
        found = loaded(path)
    except Unreadable as error:
        raise Refusal(f"{path} is damaged, it cannot be read as weights ({error}); {remedy}") from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise Refusal(f"{path} does not hold the weights of a run, but {type(found).__name__}; {remedy}")
    return found
