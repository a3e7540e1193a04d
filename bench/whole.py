"""Files that appear whole or not at all: written under a temporary name, then linked (the first wins) or renamed."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path


def link_whole(path: Path, text: str) -> bool:
    """Create `path` with all of `text` or not at all; False if it is there already."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "x") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
        return True
    except FileExistsError:
        # Over NFS the answer to a link that was made can get lost; asked again, it is there already, and it is ours.
        return temporary.exists() and temporary.stat().st_nlink == 2
    finally:
        temporary.unlink(missing_ok=True)


def linked(source: Path, path: Path) -> bool:
    """Give a file another name; False if that is another file's already."""
    try:
        os.link(source, path)
        return True
    except FileExistsError:
        return False


def replace_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Create or replace `path` whole, with what `write` writes to the path that it is given."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def clear_half_written(folder: Path, names: tuple[str, ...]) -> None:
    """Remove what processes that were killed while they wrote files of these names left under temporary ones.

    One that lives after all can no longer put what it writes in their place: it gets a FileNotFoundError.
    """
    for name in names:
        for path in folder.glob(f".{name}.*"):
            path.unlink(missing_ok=True)
