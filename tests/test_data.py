"""Pinned data: each way in which it can be absent or wrong is one line; derived arrays survive damage and races."""

import hashlib
import json
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bench import Refusal
from bench.tasks.base import Places
from bench.tasks.data import Pins, cached, digest, fetch, table

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write(folder: Path, name: str, columns: dict) -> str:
    """A small Parquet file; returns its sha256."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / name)
    return digest(folder / name)


def local(files: dict[str, str]) -> Pins:
    return Pins("poems", {"train": files}, "", "", "")


def refusal(call, *arguments) -> str:
    with pytest.raises(Refusal) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def places(tmp_path) -> Places:
    (tmp_path / "data").mkdir()
    return Places(tmp_path / "data", tmp_path / "cache")


def test_table_reads_the_files_of_a_split_in_order_and_only_the_columns_asked_for(places):
    files = {
        name: write(places.data, name, {"text": texts, "other": [0] * len(texts)})
        for name, texts in (("b.parquet", ["x", "y"]), ("a.parquet", ["z"]))
    }
    read = table(local(files), "train", places, ["text"])
    assert read.to_pydict() == {"text": ["x", "y", "z"]}


def test_missing_data_names_set_folder_variable_and_command(places, monkeypatch):
    monkeypatch.delenv("MIXERBENCH_DATA", raising=False)
    pins = local({"sub/a.parquet": "0" * 64})
    message = refusal(table, pins, "train", places, ["text"])
    assert "poems" in message and "sub/a.parquet" in message and str(places.data) in message
    assert "$MIXERBENCH_DATA is not set" in message and "mixerbench data fetch poems" in message
    monkeypatch.setenv("MIXERBENCH_DATA", str(places.data))
    assert "$MIXERBENCH_DATA is set" in refusal(table, pins, "train", places, ["text"])
    assert "no folder" in refusal(table, pins, "train", Places(None, places.cache), ["text"])


def test_other_content_than_pinned_is_refused_with_both_digests(places):
    pinned = write(places.data, "a.parquet", {"text": ["x"]})
    found = write(places.data, "a.parquet", {"text": ["y"]})
    message = refusal(table, local({"a.parquet": pinned}), "train", places, ["text"])
    assert pinned in message and found in message and "a.parquet" in message


@pytest.mark.parametrize("content", [b"", b"PAR1 and then nonsense PAR1", None])
def test_a_corrupt_file_is_one_line_with_its_name(places, content):
    write(places.data, "a.parquet", {"text": [str(number) for number in range(5000)]})
    whole = (places.data / "a.parquet").read_bytes()
    damaged = whole[:200] + bytes(400) + whole[600:] if content is None else content
    (places.data / "a.parquet").write_bytes(damaged)
    message = refusal(table, local({"a.parquet": digest(places.data / "a.parquet")}), "train", places, ["text"])
    assert "a.parquet is not readable Parquet: " in message


def test_unknown_split_and_column_list_what_there_is(places):
    pins = local({"a.parquet": write(places.data, "a.parquet", {"text": ["x"], "label": [1]})})
    assert "no split 'test'; it has train" in refusal(table, pins, "test", places, ["text"])
    assert "no column body; it has text, label" in refusal(table, pins, "train", places, ["text", "body"])


@pytest.mark.parametrize(
    "arguments, word",
    [
        (("poems", {}, "", "", ""), "split"),
        (("poems", {"train": {}}, "", "", ""), "split"),
        (("poems", {"train": {"/etc/a.parquet": "0" * 64}}, "", "", ""), "inside the data folder"),
        (("poems", {"train": {"../a.parquet": "0" * 64}}, "", "", ""), "inside the data folder"),
        (("poems", {"train": {"a.parquet": "abc"}}, "", "", ""), "64 hex digits"),
        (("poems", {"train": {"a.parquet": "0" * 64}}, "", "", COMMIT), "hub"),
        (("poems", {"train": {"train": ""}}, "org/poems", "", "main"), "full commit hash"),
    ],
)
def test_incomplete_pins_are_refused(arguments, word):
    assert word in refusal(Pins, *arguments)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A cache of `datasets` that holds org/poems at COMMIT, without network."""
    import datasets

    folder = tmp_path / "hub" / "org___poems" / "default" / "0.0.0" / COMMIT
    folder.mkdir(parents=True)
    rows = pa.table({"text": ["x", "y"], "label": [0, 1]})
    with pa.OSFile(str(folder / "poems-train.arrow"), "wb") as file, pa.ipc.new_stream(file, rows.schema) as stream:
        stream.write_table(rows)
    (folder / "dataset_info.json").write_text(
        json.dumps(
            {
                "builder_name": "parquet",
                "dataset_name": "poems",
                "config_name": "default",
                "version": {"version_str": "0.0.0"},
                "splits": {"train": {"name": "train", "num_bytes": 8, "num_examples": 2, "dataset_name": "poems"}},
            }
        )
    )
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_set_is_read_from_the_cache_of_datasets_at_the_pinned_commit_only(places):
    def pins(revision, hub, split):
        return Pins("poems", {"train": {split: ""}}, hub, "", revision)

    here = pins(COMMIT, "org/poems", "train")
    assert table(here, "train", places, ["text"]).to_pydict() == {"text": ["x", "y"]}
    assert [status.state for status in fetch(here, places, None)] == ["downloaded"]
    newer = refusal(table, pins("f" * 40, "org/poems", "train"), "train", places, ["text"])
    assert COMMIT in newer and "f" * 40 in newer and "mixerbench data fetch poems" in newer
    absent = refusal(table, pins(COMMIT, "org/prose", "train"), "train", places, ["text"])
    assert "cannot be reached" in absent and "mixerbench data fetch poems" in absent
    assert "dev" in refusal(table, pins(COMMIT, "org/poems", "dev"), "train", places, ["text"])


def test_fetch_copies_verified_files_and_reports_what_is_missing(places, tmp_path):
    source = tmp_path / "source"
    pins = local({"sub/a.parquet": write(source, "sub/a.parquet", {"text": ["x"]})})
    (missing,) = fetch(pins, places, None)
    assert missing.state == "missing" and "mixerbench data fetch poems" in missing.advice
    assert "is not set" not in missing.advice
    (nowhere,) = fetch(pins, Places(None, places.cache), None)
    assert nowhere.state == "missing" and nowhere.advice.startswith("$MIXERBENCH_DATA is not set, ")
    assert [status.state for status in fetch(pins, places, source)] == ["copied"]
    assert [status.state for status in fetch(pins, places, None)] == ["verified"]
    assert [file.name for file in (places.data / "sub").iterdir()] == ["a.parquet"]


def test_fetch_refuses_a_source_with_other_content_and_leaves_nothing_behind(places, tmp_path):
    write(tmp_path / "source", "a.parquet", {"text": ["y"]})
    pins = local({"a.parquet": hashlib.sha256(b"else").hexdigest()})
    assert "not the pinned file" in refusal(fetch, pins, places, tmp_path / "source")
    assert list(places.data.iterdir()) == []
    write(places.data, "a.parquet", {"text": ["z"]})
    assert [status.state for status in fetch(pins, places, None)] == ["other content"]


def test_a_copy_that_breaks_off_leaves_no_file(places, tmp_path, monkeypatch):
    def break_off(origin, target):
        target.write_bytes(b"half")
        raise OSError("no space left")

    pins = local({"a.parquet": write(tmp_path / "source", "a.parquet", {"text": ["x"]})})
    monkeypatch.setattr("shutil.copyfile", break_off)
    assert "cannot be written: no space left" in refusal(fetch, pins, places, tmp_path / "source")
    assert list(places.data.iterdir()) == []
    assert f"a.parquet is not in {tmp_path}" in refusal(fetch, pins, places, tmp_path)


def arrays() -> dict[str, np.ndarray]:
    return {"ids": np.arange(1000, dtype=np.uint16), "offsets": np.arange(10).reshape(2, 5)}


class Counted:
    """A build function that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return arrays()


def test_derived_arrays_are_built_once_per_key_and_cannot_be_written_to(places):
    build = Counted()
    for key in ("a", "a", "b"):
        opened = cached(places, key, build)
        assert isinstance(opened["ids"], np.memmap)
        for name, array in arrays().items():
            assert opened[name].dtype == array.dtype and np.array_equal(opened[name], array)
    assert build.calls == 2
    with pytest.raises(ValueError, match="read-only"):
        opened["ids"][0] = 1


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "ids.npy").unlink(),
        lambda entry: (entry / "manifest.json").unlink(),
        lambda entry: (entry / "manifest.json").write_text("[]"),
        lambda entry: (entry / "ids.npy").write_bytes((entry / "ids.npy").read_bytes()[:-2]),
        lambda entry: np.save(entry / "ids.npy", np.arange(1000, dtype=np.uint16).reshape(10, 100)),
        lambda entry: _flip(entry / "ids.npy"),
    ],
)
def test_a_damaged_entry_is_built_again(places, damage):
    build = Counted()
    cached(places, "a", build)
    (entry,) = places.cache.iterdir()
    damage(entry)
    opened = cached(places, "a", build)
    assert build.calls == 2 and np.array_equal(opened["ids"], arrays()["ids"])
    assert [file.name for file in places.cache.iterdir()] == [entry.name]  # nothing left beside it


def test_of_two_builds_at_once_the_first_wins_and_both_get_its_arrays(places):
    barrier, found = threading.Barrier(2), []

    def build():
        barrier.wait(10)
        return arrays()

    workers = [threading.Thread(target=lambda: found.append(cached(places, "a", build))) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 2 and all(np.array_equal(opened["ids"], arrays()["ids"]) for opened in found)
    assert len(list(places.cache.iterdir())) == 1


def test_an_unfinished_build_leaves_no_entry(places):
    def build():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(places, "a", build)
    assert cached(places, "a", arrays)["offsets"].shape == (2, 5)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refusal(cached, Places(None, tmp_path / "file"), "a", arrays)


def test_objects_are_never_stored(places):
    with pytest.raises(ValueError, match="Object arrays"):
        cached(places, "a", lambda: {"ids": np.array([{}, {}])})
