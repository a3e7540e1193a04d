"""What others wrote, logs and messages, as a terminal may safely show it."""

import os
import re
from pathlib import Path

WIDTH = 160  # of a reason or a log's line
TAIL_BYTES = 65536  # of a log, when lines are counted from its end
ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|[\]PX^_].*?(\x07|\x1b\\|$)|[ -/]*[0-~]?)")
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def clean(text: str) -> str:
    """A line as a terminal may safely show it: of a progress bar what it showed last, no control characters."""
    text = ESCAPES.sub("", text.rstrip("\r\n").replace("\t", " "))
    return CONTROLS.sub("", text.rpartition("\r")[2]).strip()


def tail(path: Path, most: int) -> list[str]:
    """The last lines of a log that are not empty, cleaned. Raises OSError."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - max(TAIL_BYTES, 400 * most)))
        lines = file.read().decode(errors="replace").split("\n")
    return [line for line in map(clean, lines) if line][-most:]


def short(text: str) -> str:
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
