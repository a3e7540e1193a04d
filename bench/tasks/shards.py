"""Splits too large to hold: prepared once in the cache, one shard of arrays for each file of the source.

A shard is written whole or not at all, so a preparation that was cut off goes on with the files that are left, and
several processes can share one. Opened, it is read-only memory maps: a row costs its own pages, and each rank of a
run reads the rows of its own batches. Files come through `datasets`, streamed: no second copy of them is made.
"""

import hashlib
import json
import secrets
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench import Refusal
from bench.tasks.base import Places
from bench.tasks.data import Pins, check_columns, files_of, first_line, hub_builder, open_entry, verified, write_entry

SMALL = 2**30
"""Bytes of local Parquet files up to which a split is read whole instead."""
ROWS = 1000  # that are in memory at once, of one file
INDEX = "index.json"


def large(pins: Pins, split: str, places: Places) -> bool:
    """Whether a split is to be prepared in shards: a hub set, files other than Parquet, or more than SMALL bytes."""
    if pins.hub:
        return True
    paths = files_of(pins, split)
    if any(not path.endswith(".parquet") for path in paths):
        return True
    here = [places.data / path for path in paths] if places.data else []
    return sum(path.stat().st_size for path in here if path.is_file()) > SMALL


@dataclass(frozen=True)
class Shards:
    """One split. `build` makes the arrays of a shard from the tables of one file; `key` names all that they depend on
    besides the file's content: code and settings."""

    pins: Pins
    split: str
    columns: tuple[str, ...]
    key: str
    build: Callable[[Iterator, str], dict[str, np.ndarray]]  # (tables, what an error calls the file) -> arrays
    places: Places

    @property
    def entry(self) -> Path:
        text = json.dumps([self.pins.content(self.split), list(self.columns), self.key])
        return self.places.cache / hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def prepare(self, part: tuple[int, int], say: Callable[[str], None]) -> None:
        """Build what is missing of every part[1]-th file, from file part[0] (1 is the first) on; damaged ones again."""
        files = self._files()
        self._write_index(files)
        for number in range(part[0] - 1, len(files), part[1]):
            name = f"{self.pins.name} {self.split} {number + 1}/{len(files)}"
            if open_entry(self.entry / f"{number:05d}", sums=True) is not None:
                say(f"{name} verified")
                continue
            self._build(number, files[number])
            say(f"{name} prepared from {files[number]}")

    def open(self) -> list[dict[str, np.memmap]]:
        """The arrays of all shards, in order; a small local split is prepared first if need be.

        Raises Refusal if any is missing: a preparation may take days, so no run starts one.
        """
        if not large(self.pins, self.split, self.places):
            self.prepare((1, 1), lambda line: None)
        try:
            count = len(json.loads((self.entry / INDEX).read_text())["files"])
        except (OSError, ValueError, KeyError, TypeError):
            raise Refusal(f"{self._where} is not prepared in {self.places.cache}; {self._advice}") from None
        shards = [open_entry(self.entry / f"{number:05d}", sums=False) for number in range(count)]
        if absent := sum(shard is None for shard in shards):
            raise Refusal(
                f"{self._where}: {absent} of {count} shards are not prepared in {self.places.cache}; {self._advice}"
            )
        return shards

    @property
    def _where(self) -> str:
        return f"data set {self.pins.name}, split {self.split}"

    @property
    def _advice(self) -> str:
        cache = shlex.quote(f"where.cache={self.places.cache}")
        return f"to go on with it: mixerbench data fetch {self.pins.name} {cache}"

    def _files(self) -> list[str]:
        """Paths below the data folder, or addresses on the hub at the pinned commit."""
        if not self.pins.hub:
            return list(files_of(self.pins, self.split))
        builder = hub_builder(self.pins)
        there = builder.config.data_files
        absent = [name for name in files_of(self.pins, self.split) if name not in there]
        if absent:
            raise Refusal(f"{self._where}: {self.pins.hub} has no split {absent[0]}; it has {', '.join(there)}")
        return [file for name in files_of(self.pins, self.split) for file in there[name]]

    def _write_index(self, files: list[str]) -> None:
        temporary = self.entry / f".{INDEX}.{secrets.token_hex(4)}"
        try:
            self.entry.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"files": files}, indent=1))
            temporary.replace(self.entry / INDEX)
        except OSError as error:
            raise Refusal(f"the cache folder {self.places.cache} cannot be written: {first_line(error)}") from error

    def _build(self, number: int, file: str) -> None:
        path = file if self.pins.hub else str(verified(self.pins.name, file, self._pin(file), self.places))
        try:
            arrays = self.build(self._tables(path), f"{self._where}, {file}")
            write_entry(self.entry / f"{number:05d}", f"{self.key} {file}", arrays)
        except OSError as error:
            raise Refusal(f"{self._where}: {file}: {first_line(error)}; {self._advice}") from error

    def _pin(self, file: str) -> str:
        return self.pins.splits[self.split][file]

    def _tables(self, path: str) -> Iterator:
        """pyarrow Tables of at most ROWS rows with the wanted columns."""
        import datasets  # 0.5 s

        kind = "parquet" if path.endswith(".parquet") else "json"
        try:
            stream = datasets.load_dataset(kind, data_files=[path], split="train", streaming=True)
            for rows in stream.with_format("arrow").iter(batch_size=ROWS):
                check_columns(self.pins.name, path, list(self.columns), rows.column_names)
                yield rows.select(list(self.columns))
        except (datasets.exceptions.DatasetGenerationError, ValueError, EOFError) as error:
            raise Refusal(f"{self._where}: {path} is not readable {kind}: {first_line(error)}") from error


class Joined:
    """Rows of several parts, numbered through; `sizes` are the parts' numbers of rows."""

    def __init__(self, parts: list, sizes: list[int]):
        self.parts = parts
        self.ends = np.cumsum(sizes)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def groups(self, items: np.ndarray) -> Iterator[tuple[object, np.ndarray, np.ndarray]]:
        """For each part that holds any of `items`: the part, their places in `items`, their rows in the part."""
        part_B = np.searchsorted(self.ends, items, side="right")
        places = np.argsort(part_B, kind="stable")
        for at in np.split(places, np.flatnonzero(np.diff(part_B[places])) + 1):
            if len(at):
                number = part_B[at[0]]
                yield self.parts[number], at, items[at] - (self.ends[number - 1] if number else 0)
