"""Sets too large for memory: prepared by file, resumed, shared; the same batches as a set that is read whole.

C4 and ImageNet-1K themselves cannot be had here. Stand-ins of their layout are made up: a data set on a hub that this
machine serves itself (tests/hub.py), and local trees of .json.gz and Parquet files.
"""

import dataclasses
import gzip
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import Refusal, cli, seeds
from bench.seeds import Streams
from bench.tasks import shards as room
from bench.tasks.base import Places
from bench.tasks.data import Pins, digest
from bench.tasks.decoding import middle_box, random_box
from bench.tasks.images import Images
from bench.tasks.masked_lm import MaskedLM
from tests.hub import Hub
from tests.test_image_tasks import encoded, make, sets  # noqa: F401
from tests.test_text_tasks import documents, masked_args

STREAMS = Streams(5, 0)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def places(tmp_path) -> Places:
    (tmp_path / "data").mkdir()
    return Places(tmp_path / "data", tmp_path / "cache")


def jsonl(path: Path, texts: list[str]) -> str:
    """A file as C4 has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        file.writelines(
            json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "x"}) + "\n" for text in texts
        )
    return digest(path)


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def fetched(task) -> list[str]:
    """What `data fetch` says of the task's shards."""
    said: list[str] = []
    for shards in task.shards():
        shards.prepare((1, 1), said.append)
    return said


def twin(places: Places, texts: list[str], cuts: list[int], **changes) -> MaskedLM:
    """A task over the same texts as `masked_args` has, as files of C4's kind cut at `cuts`."""
    args = masked_args(places, texts, **changes)
    ends = [0, *cuts, len(texts)]
    parts = [texts[a:b] for a, b in itertools.pairwise(ends)]
    train = {f"en/t.{n}.json.gz": jsonl(places.data / f"en/t.{n}.json.gz", part) for n, part in enumerate(parts)}
    held = {"en/v.json.gz": jsonl(places.data / "en/v.json.gz", texts[:37])}
    return MaskedLM(
        dataclasses.replace(args, data=Pins("c4", {"train": train, "validation": held}, "", "", "")), places
    )


@pytest.mark.parametrize("pieces", [0, 1, 2])
def test_a_large_set_gives_the_batches_of_the_same_set_read_whole(places, pieces):
    texts = documents(90, 80)
    whole, parted = (
        MaskedLM(masked_args(places, texts, pieces=pieces), places),
        twin(places, texts, [31, 64], pieces=pieces),
    )
    fetched(parted)
    whole.prepare(), parted.prepare()
    assert [len(rows.parts) for rows in parted.rows.values()] == [3, 1]
    for step in range(3):  # across epochs
        assert same(whole.batch(STREAMS, step, 64, slice(64)), parted.batch(STREAMS, step, 64, slice(64)))
    assert same(
        parted.batch(STREAMS, 1, 64, slice(16, 32)),
        {k: v[16:32] for k, v in whole.batch(STREAMS, 1, 64, slice(64)).items()},
    )
    for one, two in zip(
        whole.held_out_batches("validation", 16), parted.held_out_batches("validation", 16), strict=True
    ):
        assert same(one, two)


def test_packed_rows_fill_up_within_a_file(places):
    texts = documents(90, 80)
    parted = twin(places, texts, [31, 64], packed=True)
    fetched(parted)
    parted.prepare()
    alone = MaskedLM(masked_args(places, texts[31:64], packed=True), places)
    alone.prepare()
    first, second = parted.rows["train"].parts[:2]
    assert len(second) == len(alone.rows["train"].parts[0])
    batch = parted._batch(
        parted.rows["train"],
        np.arange(len(first), len(first) + len(second)),
        np.zeros((len(second), 96), np.uint32),
        0.3,
    )
    assert batch["segments"].max() > 1 and (batch["segments"] > 0).float().mean() > 0.8


def test_a_preparation_goes_on_where_it_stopped_and_no_run_starts_without_it(places):
    task = twin(places, documents(90, 80), [31, 64], pieces=1)
    with pytest.raises(Refusal, match=r"split train is not prepared in (\S+); .* data fetch c4 where.cache=\1$"):
        task.prepare()
    train = task.shards()[0]
    said: list[str] = []
    train.prepare((2, 3), said.append)  # one of three processes
    assert said == ["c4 train 2/3 prepared from en/t.1.json.gz"]
    with pytest.raises(Refusal, match="2 of 3 shards are not prepared"):
        task.prepare()
    stamp = (train.entry / "00001" / "tokens.npy").stat().st_mtime_ns
    train.prepare((1, 1), said.append)
    assert [line.split()[3] for line in said[1:]] == ["prepared", "verified", "prepared"]
    assert (train.entry / "00001" / "tokens.npy").stat().st_mtime_ns == stamp
    file = train.entry / "00002" / "tokens.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    train.prepare((1, 1), said.append)  # damage of the same size is found and mended by a fetch
    assert [line.split()[3] for line in said[4:]] == ["verified", "verified", "prepared"]
    file.write_bytes(content[:-1])
    with pytest.raises(Refusal, match="1 of 3 shards"):
        train.open()


def test_a_file_that_is_cut_off_or_not_as_pinned_is_one_line_and_leaves_no_shard(places):
    task = twin(places, documents(90, 80), [40], pieces=1)
    file = places.data / "en/t.1.json.gz"
    file.write_bytes(file.read_bytes()[:-30])
    said: list[str] = []
    with pytest.raises(Refusal, match=r"t\.1\.json\.gz is not the pinned file"):
        task.shards()[0].prepare((1, 1), said.append)
    cut = dict(task.args.data.splits["train"]) | {"en/t.1.json.gz": digest(file)}
    args = dataclasses.replace(
        task.args, data=dataclasses.replace(task.args.data, splits={**task.args.data.splits, "train": cut})
    )
    broken = MaskedLM(args, places).shards()[0]
    with pytest.raises(Refusal, match=r"t\.1\.json\.gz") as caught:
        broken.prepare((1, 1), said.append)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in broken.entry.iterdir()) == ["00000", "index.json"]


def test_a_large_set_is_used_whole(places):
    task = twin(places, documents(90, 80), [40], documents=10)
    with pytest.raises(Refusal, match=r"task\.documents is 10; it must be 0"):
        task.prepare()


# Images -------------------------------------------------------------------------------------------------------------


def test_images_decoded_on_demand_are_those_decoded_once(tmp_path, sets, monkeypatch):  # noqa: F811
    whole = make(tmp_path, *sets[:2])
    whole.prepare()
    monkeypatch.setattr(room, "SMALL", 0)
    lazy = make(tmp_path, *sets[:2])
    with pytest.raises(Refusal, match="not prepared"):
        lazy.prepare()
    assert [line.split()[3] for line in fetched(lazy)] == ["prepared", "prepared"]
    lazy.prepare()
    assert "bytes" in lazy._splits["train"].parts[0] and "images" in whole._splits["train"].parts[0]
    for step in range(3):
        assert same(whole.batch(STREAMS, step, 16, slice(16)), lazy.batch(STREAMS, step, 16, slice(16)))
    for one, two in zip(whole.held_out_batches("validation", 4), lazy.held_out_batches("validation", 4), strict=True):
        assert same(one, two)


def test_random_crops_are_pure_functions_of_seed_and_place_and_stay_small_sets_own_business(tmp_path, sets):  # noqa: F811
    task = make(tmp_path, *sets[:2], crop_area=0.08)
    task.prepare()  # small: no fetch needed
    batch = task.batch(STREAMS, 0, 16, slice(16))
    assert same(task.batch(STREAMS, 0, 16, slice(8, 16)), {k: v[8:16] for k, v in batch.items()})
    plain = make(tmp_path, *sets[:2])
    plain.prepare()
    assert not torch.equal(plain.batch(STREAMS, 0, 16, slice(16))["patches"], batch["patches"])
    held = [next(iter(t.held_out_batches("validation", 4)))["patches"] for t in (task, plain)]
    assert torch.equal(*held)


def test_random_boxes_have_even_areas_bounded_aspects_and_lie_anywhere_inside():
    draws = [STREAMS.draw("crop", n) for n in range(3000)]
    boxes = np.array([random_box(400, 300, 0.25, draw) for draw in draws])
    left, top, right, bottom = boxes.T
    assert left.min() == 0 and top.min() == 0 and right.max() == 400 and bottom.max() == 300
    wide, high = right - left, bottom - top
    assert (wide / high).min() > 0.74 and (wide / high).max() < 1.35
    share = wide * high / 120_000
    assert share.min() > 0.24 and 0.5 < share.mean() < 0.625  # even from 0.25 to 1, but the largest fit less often
    assert random_box(1000, 10, 1.0, STREAMS.draw("crop", 0)) == (493, 0, 506, 10)  # none fits: the middle
    assert middle_box(400, 300, 0.9) == (65, 15, 335, 285)


# A hub of one's own -------------------------------------------------------------------------------------------------

CARD = """---
configs:
- config_name: en
  data_files:
  - {split: train, path: en/c4-train.*.json.gz}
  - {split: validation, path: en/c4-validation.*.json.gz}
- config_name: images
  data_files:
  - {split: train, path: data/train-*.parquet}
  - {split: validation, path: data/validation-*.parquet}
---
"""
SCRIPT = """
import dataclasses, pickle, sys
from pathlib import Path
from bench.tasks.images import Images
from bench.tasks.masked_lm import MaskedLM
for name, args, places in pickle.loads(Path(sys.argv[1]).read_bytes()):
    task = {"MaskedLM": MaskedLM, "Images": Images}[name](args, places)
    for shards in task.shards():
        shards.prepare((1, 1), print)
"""


def test_hub_sets_are_streamed_at_the_pinned_commit_once_and_then_need_no_network(places, tmp_path, sets, monkeypatch):  # noqa: F811
    import pickle

    texts, tree = documents(60, 40), tmp_path / "tree"
    for n, part in enumerate((texts[:25], texts[25:])):
        jsonl(tree / f"en/c4-train.{n:05d}-of-00002.json.gz", part)
    jsonl(tree / "en/c4-validation.00000-of-00001.json.gz", texts[:37])
    (tree / "README.md").write_text(CARD)
    whole = MaskedLM(masked_args(places, texts, pieces=1), places)
    files = {split: {split: ""} for split in ("train", "validation")}
    c4 = dataclasses.replace(whole.args, data=Pins("c4", files, "allenai/c4", "en", COMMIT))
    pictures = make(tmp_path, *sets[:2])
    (tree / "data").mkdir()
    (tmp_path / "train.parquet").rename(tree / "data/train-00000-of-00001.parquet")
    (tmp_path / "val.parquet").rename(tree / "data/validation-00000-of-00001.parquet")
    net = dataclasses.replace(pictures.args, data=Pins("net", files, "allenai/c4", "images", COMMIT))
    (tmp_path / "tasks").write_bytes(pickle.dumps([("MaskedLM", c4, places), ("Images", net, places)]))
    with Hub({("datasets/allenai/c4", COMMIT): tree}) as hub:
        environment = os.environ | hub.environment(tmp_path / "home")
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "tasks")]
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.count("prepared from hf://datasets/allenai/c4@" + COMMIT) == 5
    assert all(COMMIT in path for path in hub.asked if "/resolve/" in path or "/tree/" in path)
    monkeypatch.setattr("bench.tasks.shards.hub_builder", lambda pins: pytest.fail("asked the hub"))
    streamed = MaskedLM(c4, places)
    whole.prepare(), streamed.prepare()
    assert same(whole.batch(STREAMS, 0, 32, slice(32)), streamed.batch(STREAMS, 0, 32, slice(32)))
    again = Images(net, places)
    again.prepare()
    assert len(again._splits["train"]) == 40


# Order, command line ------------------------------------------------------------------------------------------------


def test_the_order_of_a_large_set_is_a_permutation_each_epoch_whatever_part_is_asked_for(monkeypatch):
    monkeypatch.setattr(seeds, "LARGE", 0)
    for n in (1, 2, 3, 1000, 1025):
        epochs = STREAMS.order(0, 2 * n, n).reshape(2, n)
        assert all(sorted(epoch) == list(range(n)) for epoch in epochs.tolist())
    assert STREAMS.order(1000, 50, 1025).tolist() == STREAMS.order(0, 1050, 1025)[1000:].tolist()
    one, two = STREAMS.order(0, 1000, 1000), Streams(6, 0).order(0, 1000, 1000)
    assert (one == two).mean() < 0.01 and (one == STREAMS.order(1000, 1000, 1000)).mean() < 0.01
    # as often before as after the middle, wherever in the epoch, and no memory of the neighbour
    many = np.concatenate([Streams(s, 0).order(0, 512, 1000) for s in range(40)])
    assert abs((many < 500).mean() - 0.5) < 0.02 and abs(np.corrcoef(many[1:], many[:-1])[0, 1]) < 0.03


def test_the_order_of_all_of_c4_takes_no_memory_of_its_size():
    items = STREAMS.order(10**8, 4096, 364_868_892)
    assert len(set(items.tolist())) == 4096 and items.min() >= 0 and items.max() < 364_868_892


@pytest.mark.parametrize("part", ["0/2", "3/2", "half"])
def test_a_part_that_is_none_is_refused_by_name(part, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mixerbench", "data", "fetch", "simplewiki", "--part", part])
    assert cli.main() == 2
    assert f"--part is '{part}'; allowed: k/n" in capsys.readouterr().err


def test_the_vocabulary_is_fetched_before_a_large_set_is_prepared(places, capsys, monkeypatch):
    monkeypatch.setattr("bench.tasks.shards.hub_builder", lambda pins: pytest.fail("asked the hub"))
    words = [f"where.data={places.data}", f"where.cache={places.cache}"]
    monkeypatch.setattr(sys, "argv", ["mixerbench", "data", "fetch", "masked_lm_c4", *words])
    assert cli.main() == 1
    assert "bert-base-uncased-vocab.txt missing" in capsys.readouterr().out
