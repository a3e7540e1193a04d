"""The images task and its augmentation: purity to the bit, labels that agree with the pixels, refusals, real data."""

import dataclasses
import hashlib
import io
import math
import os
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from bench import Refusal
from bench.seeds import Streams
from bench.tasks.augment import Augment, forked_rng
from bench.tasks.base import Places
from bench.tasks.data import Pins
from bench.tasks.images import Args, Images, cut

STREAMS = Streams(5, 0)
SIDE, CLASSES = 16, 6
OFF = {"flip": False, "randaugment_ops": 0, "erasing_probability": 0.0, "mixup_alpha": 0.0, "cutmix_alpha": 0.0}


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write(folder: Path, name: str, images: list[bytes], labels: list[int]) -> dict[str, str]:
    struct = pa.array([{"bytes": b, "path": f"{i}.png"} for i, b in enumerate(images)])
    pq.write_table(pa.table({"image": struct, "label": labels}), folder / name)
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()}


def make(folder: Path, train, held_out, **changes) -> Images:
    """A task over (images, labels) pairs of encoded images; all augmentation on unless changed."""
    splits = {"train": write(folder, "train.parquet", *train), "validation": write(folder, "val.parquet", *held_out)}
    args = Args(
        data=Pins("tiny", splits, "", "", ""),
        image_column="image",
        label_column="label",
        classes=CLASSES,
        resolution=SIDE,
        patch=4,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.25, 0.3),
        crop_area=0.0,
        crop_held_out=1.0,
        flip=True,
        randaugment_ops=2,
        randaugment_magnitude=9.0,
        erasing_probability=0.25,
        mixup_alpha=0.8,
        cutmix_alpha=1.0,
        group=4,
        label_smoothing=0.1,
    )
    return Images(dataclasses.replace(args, **changes), Places(folder, folder / "cache"))


@pytest.fixture
def sets():
    """40 training and 15 held-out images of noise, (encoded, labels) each, and the raw pixels of both."""
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (55, SIDE, SIDE, 3), dtype=np.uint8)
    labels = rng.integers(CLASSES, size=55)
    png = [encoded(image) for image in raw]
    return (png[:40], labels[:40]), (png[40:], labels[40:]), raw


@pytest.fixture
def task(tmp_path, sets):
    made = make(tmp_path, *sets[:2])
    made.prepare()
    return made


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_a_batch_is_a_pure_function_of_seed_and_step(task, tmp_path, sets):
    torch.manual_seed(1)
    before = torch.get_rng_state().clone(), np.random.get_state()[1].copy(), random.getstate()
    whole = {step: task.batch(STREAMS, step, 24, slice(0, 24)) for step in range(6)}
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()
    again = make(tmp_path, *sets[:2])
    again.prepare()
    for step in (4, 0, 5, 1):
        for start, stop in ((16, 24), (4, 16), (0, 4)):
            part = again.batch(STREAMS, step, 24, slice(start, stop))
            assert same(part, {key: value[start:stop] for key, value in whole[step].items()})


def test_augmentation_changes_with_seed_step_and_group(tmp_path, sets):
    """One image in all places, so that only the augmentation can differ."""
    one = ([sets[0][0][0]] * 8, [1] * 8)
    task = make(tmp_path, one, one, mixup_alpha=0.0, cutmix_alpha=0.0)
    task.prepare()
    groups = [task.batch(STREAMS, step, 8, slice(0, 8))["patches"].split(4) for step in range(3)]
    groups += [task.batch(Streams(6, 0), 0, 8, slice(0, 8))["patches"].split(4)]
    flat = [group for pair in groups for group in pair]
    assert all(not torch.equal(flat[i], flat[j]) for i in range(len(flat)) for j in range(i))


def test_parts_that_cut_a_group_are_an_error(task):
    for size, part in ((24, slice(2, 8)), (24, slice(0, 6)), (22, slice(0, 4))):
        with pytest.raises(ValueError, match="multiples of the group"):
            task.batch(STREAMS, 0, size, part)


def test_without_augmentation_batches_are_the_images_in_any_cut(tmp_path, sets):
    task = make(tmp_path, *sets[:2], **OFF)
    task.prepare()
    assert task.spec().group == 1
    batch = task.batch(STREAMS, 3, 10, slice(3, 8))
    items = task.order(STREAMS, 3, 10)[3:8]
    assert np.array_equal(batch["items"], items)
    assert batch["labels"].tolist() == sets[0][1][items].tolist()
    mean, std = np.float32(task.args.mean), np.float32(task.args.std)
    for patches, item in zip(batch["patches"].numpy(), items, strict=True):
        tiles = patches.reshape(4, 4, 4, 4, 3)  # patch row, patch column, row, column, colour
        image = np.concatenate([np.concatenate(list(row), axis=1) for row in tiles], axis=0)
        np.testing.assert_allclose((image * std + mean) * 255, sets[2][item], atol=1e-3)


def test_patches_and_their_pixels_run_in_reading_order():
    x = torch.arange(2 * 4 * 4).reshape(1, 2, 4, 4)  # colour 1 is colour 0 plus 16
    assert cut(x, 2)[0].tolist()[1] == [2, 18, 3, 19, 6, 22, 7, 23]


def test_shapes_and_ids_match_the_spec(task):
    spec = task.spec()
    assert (spec.length, spec.symbols, spec.group, spec.pooled) == (16, 48, 4, True)
    for batch in (task.example(8), task.batch(STREAMS, 0, 8, slice(0, 8))):
        assert batch["patches"].shape == (8, 16, 48) and batch["patches"].dtype == torch.float32
        assert batch["segments"].shape == (8, 16) and batch["segments"].eq(1).all()
        assert batch["targets"].shape == (8, CLASSES) and batch["targets"].dtype == torch.float32
        assert {len(value) for value in batch.values()} == {8}


def test_soft_labels_are_distributions_over_the_groups_own_labels(task):
    for step in range(10):
        batch = task.batch(STREAMS, step, 24, slice(0, 24))
        torch.testing.assert_close(batch["targets"].sum(1), torch.ones(24))
        assert batch["targets"].min() >= 0
        for group in range(0, 24, 4):
            labels = set(batch["labels"][group : group + 4].tolist())
            for row in range(group, group + 4):
                own = batch["labels"][row].item()
                named = set(batch["targets"][row].nonzero().flatten().tolist())
                assert named <= labels and len(named | {own}) <= 2


@pytest.mark.parametrize("on", [{"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}, {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}])
def test_soft_labels_agree_with_the_pixels(on, tmp_path):
    """A black image of class 0 and a white one of class 3: the label's weight on 3 is the share of white."""
    black, white = np.zeros((SIDE, SIDE, 3), np.uint8), np.full((SIDE, SIDE, 3), 255, np.uint8)
    pair = ([encoded(black), encoded(white)], [0, 3])
    task = make(tmp_path, pair, pair, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), group=2, **{**OFF, **on})
    task.prepare()
    batch = task.batch(STREAMS, 0, 200, slice(0, 200))
    white_share = batch["patches"].mean((1, 2))
    torch.testing.assert_close(batch["targets"][:, 3], white_share, atol=1e-5, rtol=0)
    assert ((white_share > 0.02) & (white_share < 0.98)).float().mean() > 0.25
    flat = batch["patches"].amax((1, 2)) - batch["patches"].amin((1, 2)) < 1e-5
    mixed = (white_share > 1e-4) & (white_share < 1 - 1e-4)
    blended = (flat & mixed).reshape(-1, 2).any(1).float().mean()
    cut_out = (~flat & mixed).reshape(-1, 2).any(1).float().mean()
    assert (blended > 0.1) == ("mixup_alpha" in on)
    assert (cut_out > 0.1) == ("cutmix_alpha" in on)


def test_mixup_weights_are_beta(task):
    """Their variance is 1 / (4 (2 alpha + 1)); uniform weights would have 1 / 12."""
    augment = Augment(dataclasses.replace(task.args, **{**OFF, "mixup_alpha": 0.1}))
    weights = []
    with forked_rng():
        for i in range(300):
            rng = STREAMS.draw("augment", i)
            _, soft_BC = augment.group(np.zeros((4, 2, 2, 3), np.uint8), torch.tensor([0, 1, 2, 3]), rng)
            weights.append(soft_BC.diagonal())
    weights = torch.cat(weights)
    mixed = weights[weights < 1]
    assert mixed.var() == pytest.approx(1 / (4 * 1.2), rel=0.1)


def test_flips_are_even_and_nothing_else_moves(tmp_path, sets):
    task = make(tmp_path, *sets[:2], **{**OFF, "flip": True})
    plain = make(tmp_path, *sets[:2], **OFF)
    task.prepare()
    plain.prepare()
    assert "targets" not in task.batch(STREAMS, 0, 4, slice(0, 4))
    flipped = []
    for step in range(10):
        got, own = (t.batch(STREAMS, step, 40, slice(0, 40))["patches"] for t in (task, plain))
        mirror = own.reshape(40, 4, 4, 4, 4, 3).flip(2).flip(4).reshape(40, 16, 48)
        is_own, is_mirror = (got == own).all(2).all(1), (got == mirror).all(2).all(1)
        assert (is_own ^ is_mirror).all()
        flipped.append(is_mirror.float())
    assert abs(torch.cat(flipped).mean() - 0.5) < 0.1


def test_erasing_takes_its_share_of_images_and_leaves_the_mean_colour(tmp_path, sets):
    task = make(tmp_path, *sets[:2], **{**OFF, "erasing_probability": 0.25})
    task.prepare()
    patches = torch.cat([task.batch(STREAMS, step, 40, slice(0, 40))["patches"] for step in range(10)])
    erased = (patches.reshape(400, -1, 3) == 0).all(2).float().mean(1)
    assert abs((erased > 0).float().mean() - 0.25) < 0.07
    assert erased.max() < 0.45


def test_randaugment_keeps_colours_in_range(tmp_path, sets):
    changes = {**OFF, "randaugment_ops": 3, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    task = make(tmp_path, *sets[:2], **changes)
    task.prepare()
    patches = torch.cat([task.batch(STREAMS, step, 40, slice(0, 40))["patches"] for step in range(6)])
    assert patches.min() >= 0 and patches.max() <= 1 and patches.isfinite().all()


def test_held_out_images_are_plain_each_once_and_in_order(task, sets):
    seen = []
    for size in (4, 7, 100):
        batches = list(task.held_out_batches("validation", size))
        assert torch.cat([b["items"] for b in batches]).tolist() == list(range(15))
        assert torch.cat([b["labels"] for b in batches]).tolist() == sets[1][1].tolist()
        assert all("targets" not in b for b in batches)
        whole = torch.cat([b["patches"] for b in batches])
        torch.testing.assert_close(whole[:, 0, 0], torch.from_numpy(sets[2][40:, 0, 0, 0] / 255 - 0.5).float() / 0.2)
        seen.append(whole)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


def test_metrics_against_closed_forms(task):
    batch = next(task.held_out_batches("validation", 15))
    labels = batch["labels"]

    def metrics(outputs):
        return task.metrics("validation", task.outcomes(outputs, batch))

    assert metrics(200 * torch.eye(CLASSES)[labels]) == {"top1": 1, "top5": 1, "loss": 0}
    assert metrics(torch.zeros(15, CLASSES))["loss"] == pytest.approx(math.log(CLASSES))
    hits = [metrics(torch.eye(CLASSES)[c].expand(15, -1))["top1"] for c in range(CLASSES)]
    assert hits == pytest.approx((torch.bincount(labels, minlength=CLASSES) / 15).tolist())
    last = -torch.eye(CLASSES)[labels]
    assert metrics(last)["top5"] == 0
    ordered = torch.arange(CLASSES).flip(0).float().expand(15, -1)  # class c has rank c
    assert task.outcomes(ordered, batch)["rank"].tolist() == labels.tolist()
    assert metrics(torch.full((15, CLASSES), math.nan))["top5"] == 0  # a broken model is not right


def test_loss_is_the_smoothed_soft_cross_entropy_summed(task):
    batch = task.batch(STREAMS, 0, 8, slice(0, 8))
    outputs = torch.randn(8, CLASSES, generator=torch.Generator().manual_seed(0))
    smooth = 0.9 * batch["targets"] + 0.1 / CLASSES
    torch.testing.assert_close(task.loss(outputs, batch), -(smooth * outputs.log_softmax(1)).sum())
    hard = next(task.held_out_batches("validation", 8))
    smooth = 0.9 * torch.eye(CLASSES)[hard["labels"]] + 0.1 / CLASSES
    torch.testing.assert_close(task.loss(outputs, hard), -(smooth * outputs.log_softmax(1)).sum())
    assert task.count(batch) == 8


def test_grey_palette_and_transparent_images_become_rgb_and_others_are_resized(tmp_path):
    grey = np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE)
    rgba = np.dstack([np.full((SIDE, SIDE), c, np.uint8) for c in (10, 20, 30, 255)])
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200  # the central square
    images = [encoded(grey), encoded(rgba), encoded(wide), encoded(grey, "JPEG")]
    task = make(tmp_path, (images, [0, 1, 2, 3]), (images, [0, 1, 2, 3]))
    task.prepare()
    decoded = task._splits["train"].parts[0]["images"]
    assert np.array_equal(decoded[0], np.dstack([grey] * 3))
    assert (decoded[1] == (10, 20, 30)).all()
    assert (decoded[2] == 200).all()
    assert np.array_equal(decoded[3][..., 0], decoded[3][..., 2])


def test_images_are_decoded_once(tmp_path, sets, monkeypatch):
    make(tmp_path, *sets[:2]).prepare()
    calls = []
    monkeypatch.setattr("bench.tasks.images.decode", lambda *given: calls.append(given))
    make(tmp_path, *sets[:2]).prepare()
    assert not calls


@pytest.mark.parametrize(
    "broken", [b"", b"not an image", "cut", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", None]
)
def test_a_broken_image_is_refused_by_its_row(broken, tmp_path, sets):
    images, labels = sets[0]
    broken = images[0][:200] if broken == "cut" else broken
    task = make(tmp_path, ([*images[:3], broken], labels[:4]), sets[1])
    with pytest.raises(Refusal, match=r"^data set tiny, split train, row 3[^\n]*\Z"):
        task.prepare()


def test_a_label_out_of_range_is_refused_by_its_row(tmp_path, sets):
    task = make(tmp_path, (sets[0][0][:3], [0, CLASSES, 1]), sets[1])
    with pytest.raises(Refusal, match=f"row 1: label is {CLASSES}"):
        task.prepare()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"patch": 5}, "patch"),
        ({"classes": 1}, "classes"),
        ({"group": 1}, "group"),
        ({"randaugment_ops": 99}, "randaugment_ops"),
        ({"randaugment_magnitude": 30.0}, "randaugment_magnitude"),
        ({"erasing_probability": 1.5}, "erasing_probability"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"mixup_alpha": -1.0}, "mixup_alpha"),
        ({"cutmix_alpha": math.nan}, "cutmix_alpha"),
        ({"std": (0.1, 0.0, 0.1)}, "std"),
        ({"mean": (0.5,)}, "mean"),
        ({"data": Pins("x", {"train": {"a": "0" * 64}}, "", "", "")}, "split"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(change, named, tmp_path, sets):
    with pytest.raises(Refusal, match=named):
        make(tmp_path, *sets[:2], **change)


@pytest.mark.data
def test_tiny_imagenet_validation_images_are_sane(tmp_path):
    if "MIXERBENCH_DATA" not in os.environ:
        pytest.skip("MIXERBENCH_DATA is not set")
    from bench.compose import load_yaml
    from bench.config import build

    path = Path(__file__).parent.parent / "configs" / "task" / "images_tiny.yaml"
    values = {key: value for key, value in load_yaml(path).items() if key != "name"}
    validation = values["data"]["splits"]["validation"]
    values["data"]["splits"]["train"] = validation
    task = Images(build(Args, values, "task"), Places(Path(os.environ["MIXERBENCH_DATA"]), tmp_path))
    task.prepare()
    (arrays,) = task._splits["validation"].parts  # decoded once, as a small set is
    assert arrays["images"].shape == (5000, 64, 64, 3)
    assert (np.bincount(arrays["labels"], minlength=100) == 50).all()
    grey = (arrays["images"] == arrays["images"][..., :1]).all((1, 2, 3))
    assert 96 <= grey.sum() < 200
    batch = next(task.held_out_batches("validation", 500))
    colours = batch["patches"].reshape(-1, 3)
    assert colours.mean(0).abs().max() < 0.3 and (colours.std(0) - 1).abs().max() < 0.35
    assert task.batch(STREAMS, 0, 16, slice(0, 16))["patches"].isfinite().all()
