"""Pinned data sets, where they are found or fetched, and the cache of arrays derived from them.

A set is either local Parquet files, pinned by sha256, or a hub data set, pinned by its commit; other content is
refused. Local files are read with pyarrow, so that no second copy of them appears in the cache of `datasets`.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from bench import Refusal
from bench.tasks.base import Places


@dataclass(frozen=True)
class Pins:
    """A data set and the exact content it must have.

    `splits` maps a split to {path under the data folder: sha256}, or, with `hub` (a data set id of the hub, '' for
    local files), to {split name on the hub: ''}; several files of a split are read in the order given. `config` is
    the hub's configuration ('' for none), `revision` the full commit hash. Raises Refusal if the pins are incomplete.
    """

    name: str  # how messages and `mixerbench data` call the set
    splits: dict[str, dict[str, str]]
    hub: str
    config: str
    revision: str

    def __post_init__(self):
        if not self.splits or not all(self.splits.values()):
            raise Refusal(f"data set {self.name}: every split needs at least one pinned file")
        if self.hub:
            if not re.fullmatch("[0-9a-f]{40}", self.revision):
                raise Refusal(f"data set {self.name}: revision '{self.revision}' is not a full commit hash (40 digits)")
            return
        if self.config or self.revision:
            raise Refusal(f"data set {self.name}: config and revision belong to a hub set, but hub is ''")
        for path, sha256 in self.files().items():
            _check_pin(self.name, path, sha256)

    def files(self) -> dict[str, str]:
        """Local files of all splits -> sha256; {} for a hub set."""
        return {} if self.hub else {path: sha for files in self.splits.values() for path, sha in files.items()}

    def content(self, split: str) -> list:
        """What identifies the content of a split, for the keys of derived arrays."""
        files = files_of(self, split)
        return [self.hub, self.config, self.revision, *files] if self.hub else list(files.values())


def _check_pin(name: str, path: str, sha256: str) -> None:
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise Refusal(f"data set {name}: '{path}' must be a path inside the data folder")
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise Refusal(f"data set {name}: the sha256 of {path} must be 64 hex digits, got '{sha256}'")


def files_of(pins: Pins, split: str) -> dict[str, str]:
    if split not in pins.splits:
        raise Refusal(f"data set {pins.name} has no split '{split}'; it has {', '.join(pins.splits)}")
    return pins.splits[split]


def table(pins: Pins, split: str, places: Places, columns: list[str]):
    """One split as a pyarrow Table with exactly `columns`, its content verified against the pins.

    Raises Refusal (one line) for missing data, other content than pinned, a corrupt file, a missing column, and a
    hub that cannot be reached. HF_HUB_OFFLINE and the other variables of `datasets` are obeyed.
    """
    if pins.hub:
        return _hub_table(pins, split, columns)
    import pyarrow as pa

    parts = [
        _parquet(pins.name, path, verified(pins.name, path, sha256, places), columns)
        for path, sha256 in files_of(pins, split).items()
    ]
    return pa.concat_tables(parts)


def verified(name: str, path: str, sha256: str, places: Places) -> Path:
    """The absolute path of a pinned file of set `name`; Refusal if it is missing or holds something else."""
    variable = "is set" if os.environ.get("MIXERBENCH_DATA") else "is not set"
    if places.data is None or not (places.data / path).is_file():
        folder = places.data or "no folder"
        raise Refusal(
            f"data set {name}: {path} is missing; looked in {folder} ($MIXERBENCH_DATA {variable}); "
            f"to get it: mixerbench data fetch {name}"
        )
    _match(name, places.data / path, sha256)
    return places.data / path


def _match(name: str, file: Path, sha256: str) -> None:
    found = digest(file)
    if found != sha256:
        raise Refusal(
            f"data set {name}: {file} is not the pinned file: expected sha256 {sha256}, found {found}; "
            f"to see what is needed: mixerbench data fetch {name}"
        )


def digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parquet(name: str, path: str, file: Path, columns: list[str]):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            check_columns(name, path, columns, parquet.schema_arrow.names)
            return parquet.read(columns=columns).select(columns)
    except (pa.ArrowException, OSError) as error:
        raise Refusal(f"data set {name}: {path} is not readable Parquet: {first_line(error)}") from error


def check_columns(name: str, where: str, wanted: list[str], there: list[str]) -> None:
    absent = [column for column in wanted if column not in there]
    if absent:
        raise Refusal(f"data set {name}: {where} has no column {', '.join(absent)}; it has {', '.join(there)}")


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _hub_table(pins: Pins, split: str, columns: list[str]):
    data = _hub(pins, split)
    check_columns(pins.name, f"{pins.hub} {split}", columns, data.column_names)
    return data.select_columns(columns).with_format("arrow")[:]


def _hub(pins: Pins, split: str):
    names = "+".join(files_of(pins, split))
    builder = hub_builder(pins)
    try:
        builder.download_and_prepare()
        return builder.as_dataset(split=names)
    except OSError as error:
        raise _unreachable(pins, error) from error
    except ValueError as error:
        raise Refusal(
            f"data set {pins.name}: no split {names} of config '{pins.config}' of {pins.hub} at "
            f"{pins.revision}: {first_line(error)}; {_fetch_it(pins)}"
        ) from error


def hub_builder(pins: Pins):
    """The builder of `datasets` for a hub set, at the pinned commit and no other; nothing is downloaded yet."""
    import datasets  # 0.5 s

    try:
        builder = datasets.load_dataset_builder(pins.hub, pins.config or None, revision=pins.revision)
    except OSError as error:
        raise _unreachable(pins, error) from error
    except ValueError as error:
        raise Refusal(f"data set {pins.name}: {pins.hub} at {pins.revision}: {first_line(error)}") from error
    # Without a network `datasets` silently takes the newest commit in its cache, whatever `revision` says.
    if builder.hash != pins.revision:
        raise Refusal(
            f"data set {pins.name}: the local cache holds {pins.hub} at commit {builder.hash}, pinned is "
            f"{pins.revision}; {_fetch_it(pins)}"
        )
    return builder


def _fetch_it(pins: Pins) -> str:
    return f"with a network: mixerbench data fetch {pins.name}"


def _unreachable(pins: Pins, error: Exception) -> Refusal:
    return Refusal(
        f"data set {pins.name}: {pins.hub} is not in the local cache and the hub cannot be reached (no network, or "
        f"offline mode): {first_line(error)}; {_fetch_it(pins)}"
    )


class Status(NamedTuple):
    """What `fetch` found or did for one file (or hub split)."""

    path: str
    state: str  # 'verified', 'copied', 'downloaded', 'missing', 'other content'
    advice: str  # what to do about it, '' if nothing


def fetch(pins: Pins, places: Places, source: Path | None) -> list[Status]:
    """Brings a set to this machine: a hub set through `datasets`, local files from the folder `source`.

    Files are verified before they are copied, and appear complete or not at all. Without a source, says for each
    file whether it is here and how to obtain it. Raises Refusal as `table` does.
    """
    if pins.hub:
        for split in pins.splits:
            _hub(pins, split)
        return [Status(f"{pins.hub} {split}", "downloaded", "") for split in pins.splits]
    if source is None:
        return [_state(pins, path, sha256, places) for path, sha256 in pins.files().items()]
    if places.data is None:
        raise Refusal(f"data set {pins.name}: set $MIXERBENCH_DATA to the folder that the files shall be copied to")
    return [_copy(pins, path, sha256, places.data, source) for path, sha256 in pins.files().items()]


def _state(pins: Pins, path: str, sha256: str, places: Places) -> Status:
    here = places.data is not None and (places.data / path).is_file()
    if here and digest(places.data / path) == sha256:
        return Status(path, "verified", "")
    unset = "" if places.data else "$MIXERBENCH_DATA is not set, it must name the folder of all data sets; "
    advice = (
        f"{unset}the file with sha256 {sha256} must lie at {path} in $MIXERBENCH_DATA; copy it from a folder that has "
        f"it: mixerbench data fetch {pins.name} --from FOLDER"
    )
    return Status(path, "other content" if here else "missing", advice)


def _copy(pins: Pins, path: str, sha256: str, data: Path, source: Path) -> Status:
    target = data / path
    if target.is_file() and digest(target) == sha256:
        return Status(path, "verified", "")
    if not (source / path).is_file():
        raise Refusal(f"data set {pins.name}: {path} is not in {source}")
    _match(pins.name, source / path, sha256)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise Refusal(f"data set {pins.name}: {target} cannot be written: {first_line(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return Status(path, "copied", "")


def cached(places: Places, key: str, build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.memmap]:
    """The arrays that `build` returns for `key`, as read-only memory maps; built once, then opened from the cache.

    `key` must name all that the arrays depend on (content of the data, settings, code). An entry appears whole or
    not at all: of two processes that build at once the first wins and both use its files. A damaged entry (a file
    missing, other sizes or bytes than written) is built again. Raises Refusal if the cache cannot be written.
    """
    entry = places.cache / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    arrays = open_entry(entry, sums=True)
    if arrays is not None:
        return arrays
    built = build()
    try:
        write_entry(entry, key, built)
    except OSError as error:
        raise Refusal(f"the cache folder {places.cache} cannot be written: {first_line(error)}") from error
    arrays = open_entry(entry, sums=True)
    if arrays is None:
        raise Refusal(f"the cache entry {entry} cannot be read back; delete it, or choose another cache folder")
    return arrays


def write_entry(entry: Path, key: str, arrays: dict[str, np.ndarray]) -> None:
    temporary = entry.with_name(f".{entry.name}.{secrets.token_hex(4)}")
    temporary.mkdir(parents=True)
    try:
        manifest = {"key": key, "arrays": {}}
        for name, array in arrays.items():
            with (temporary / f"{name}.npy").open("wb") as file:
                np.save(file, array, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
            manifest["arrays"][name] = _checksum(temporary / f"{name}.npy")
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        _place(temporary, entry)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _place(temporary: Path, entry: Path) -> None:
    try:
        os.rename(temporary, entry)
    except OSError:
        if open_entry(entry, sums=True) is not None:
            return  # another process was first
        # The damaged entry is moved aside in one step, so that nobody sees half of it.
        aside = entry.with_name(f".{entry.name}.{secrets.token_hex(4)}")
        os.rename(entry, aside)
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(temporary, entry)


def open_entry(entry: Path, sums: bool) -> dict[str, np.memmap] | None:
    """The arrays of an entry, or None if it is absent or damaged: other sizes than written or, with `sums`, bytes."""
    try:
        manifest = json.loads((entry / "manifest.json").read_text())
        files = {name: entry / f"{name}.npy" for name in manifest["arrays"]}
        written = manifest["arrays"]
        if any(file.stat().st_size != written[name][0] for name, file in files.items()):
            return None
        if sums and any(_checksum(file) != written[name] for name, file in files.items()):
            return None
        return {name: np.load(file, mmap_mode="r", allow_pickle=False) for name, file in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _checksum(file: Path) -> list[int]:
    """[bytes, CRC-32]: finds rot and torn writes at more than 1 GB/s; nobody is expected to forge a cache."""
    crc = size = 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return [size, crc]
