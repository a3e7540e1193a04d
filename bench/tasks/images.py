"""Image classification from pinned Parquet files: patches in, one class out, augmented as for image transformers.

Images are decoded once, to uint8 in the cache; those of a large set or one that is cropped at random, when a batch asks
for them (shards.py). Augmentation works on groups of `group` images, so that a batch is a
pure function of (seed, step) however it is cut between groups.

Axes: N images of a split, B of a batch, Y rows, X columns, 3 colours, L patches, F values of a patch, C classes.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bench import Refusal
from bench.seeds import Streams
from bench.tasks.augment import MAGNITUDES, POLICY, Augment, forked_rng
from bench.tasks.base import SELECTION, TRAIN, Batch, Places, Spec, Task
from bench.tasks.data import Pins, cached, table
from bench.tasks.decoding import Box, decode, encoded, middle_box, pixels, random_box
from bench.tasks.shards import Joined, Shards, large

_DECODING = 1  # to be raised when decoding changes, so that old caches are not used
_STORING = 1  # the same for what `encoded` stores


@dataclass(frozen=True)
class Args:
    """Sizes in pixels. `data` has the split 'train' and others, which are all reported.

    The image column holds {bytes, path}, the label column 0 .. classes - 1. `randaugment_ops` 0, an alpha of 0 and a
    probability of 0 switch that augmentation off; `bench.tasks.augment` says what `randaugment_magnitude` means. `mean`
    and `std` are of colours in [0, 1]. `crop_area` above 0: a training image is a random box of at least that share of
    its area (aspect 3/4 to 4/3), resized. `crop_held_out`: the middle square that is reported has this share of the
    shorter side (1: all of it). `group` is the number of images augmented together, which mix with one another.
    """

    data: Pins
    image_column: str
    label_column: str
    classes: int
    resolution: int
    patch: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_area: float
    crop_held_out: float
    flip: bool
    randaugment_ops: int
    randaugment_magnitude: float
    erasing_probability: float
    mixup_alpha: float
    cutmix_alpha: float
    group: int
    label_smoothing: float

    def __post_init__(self):
        if TRAIN not in self.data.splits or len(self.data.splits) < 2:
            raise Refusal(
                f"images: data needs the split '{TRAIN}' and one to report, has {', '.join(self.data.splits)}"
            )
        if self.patch < 1 or self.resolution < 1 or self.resolution % self.patch:
            raise Refusal(f"images: patch is {self.patch}, must divide resolution ({self.resolution})")
        if self.classes < 2:
            raise Refusal(f"images: classes is {self.classes}, must be at least 2")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3:
                raise Refusal(f"images: {name} is {getattr(self, name)}, must be 3 numbers (red, green, blue)")
        if min(self.std) <= 0:
            raise Refusal(f"images: std is {self.std}, must be above 0")
        self._check_augmentation()

    def _check_augmentation(self):
        if not 0 <= self.randaugment_ops <= len(POLICY):
            raise Refusal(f"images: randaugment_ops is {self.randaugment_ops}, must be 0 to {len(POLICY)}")
        if self.randaugment_ops and not 0 < self.randaugment_magnitude < MAGNITUDES:
            raise Refusal(
                f"images: randaugment_magnitude is {self.randaugment_magnitude}, must be above 0 and below {MAGNITUDES}"
            )
        if not 0 < self.crop_held_out <= 1:
            raise Refusal(f"images: crop_held_out is {self.crop_held_out}, must be above 0, at most 1")
        for name in ("crop_area", "erasing_probability", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise Refusal(f"images: {name} is {getattr(self, name)}, must be 0 to 1")
        for name in ("mixup_alpha", "cutmix_alpha"):
            if not 0 <= getattr(self, name) < math.inf:
                raise Refusal(f"images: {name} is {getattr(self, name)}, must be at least 0 (0: off)")
        least = 2 if self.mixes else 1
        if self.group < least:
            raise Refusal(f"images: group is {self.group}, must be at least {least}")

    @property
    def mixes(self) -> bool:
        """Whether training labels are soft."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    @property
    def augments(self) -> bool:
        return self.mixes or self.flip or self.randaugment_ops > 0 or self.erasing_probability > 0


class Images(Task):
    """One output an image. Images become RGB; one of another size loses the ends of its longer side, then is resized
    (bicubic), unless it is cropped otherwise (`crop_area`, `crop_held_out`). A patch is its pixels in reading order,
    each (red, green, blue); patches are in reading order.
    """

    Args = Args

    def __init__(self, args: Args, places: Places):
        super().__init__(args, places)
        self._splits: dict[str, Joined] = {}

    def spec(self) -> Spec:
        args = self.args
        return Spec(
            kind="patches",
            symbols=3 * args.patch**2,
            types=0,
            length=(args.resolution // args.patch) ** 2,
            outputs=args.classes,
            pooled=True,
            tied=False,
            packed=False,
            group=args.group if args.augments else 1,
        )

    def prepare(self) -> None:
        """Decodes each small split once (about 0.2 ms a 64x64 JPEG, all of it in memory), then opens it from the cache.

        Raises Refusal for data that are missing or not as pinned, and names the row of a broken image or label.
        """
        if self._splits:
            return
        self._augment = Augment(self.args)
        self._splits = {split: self._open(split) for split in self.args.data.splits}

    def _open(self, split: str) -> Joined:
        stored = self._on_demand(split)
        parts = self._shards(split).open() if stored else [self._decoded(split)]
        return Joined(parts, [len(part["labels"]) for part in parts])

    def _on_demand(self, split: str) -> bool:
        """Whether images stay encoded until a batch asks for them."""
        share = self.args.crop_area if split == TRAIN else self.args.crop_held_out < 1
        return bool(share) or large(self.args.data, split, self.places)

    def _decoded(self, split: str) -> dict[str, np.ndarray]:
        import PIL

        args = self.args
        columns = [args.image_column, args.label_column]
        content = [args.data.content(split), columns, args.resolution, args.classes, PIL.__version__]
        key = json.dumps(["images", _DECODING, *content])
        return cached(
            self.places,
            key,
            lambda: decode(
                args, f"data set {args.data.name}, split {split}", table(args.data, split, self.places, columns)
            ),
        )

    def shards(self) -> list[Shards]:
        return [self._shards(split) for split in self.args.data.splits if large(self.args.data, split, self.places)]

    def _shards(self, split: str) -> Shards:
        args, columns = self.args, (self.args.image_column, self.args.label_column)
        key = json.dumps(["images", _STORING, args.classes])
        return Shards(args.data, split, columns, key, lambda *of: encoded(args, *of), self.places)

    def order(self, streams: Streams, step: int, size: int) -> np.ndarray:
        return self.drawn(streams, step * size, size, len(self._splits[TRAIN]))

    def batch(self, streams: Streams, step: int, size: int, part: slice) -> Batch:
        """Raises ValueError unless `size` and the bounds of `part` are multiples of Spec.group."""
        group = self.spec().group
        start, stop, stride = part.indices(size)
        if size % group or start % group or stop % group or stride != 1:
            raise ValueError(f"batch of {size}, part {start}:{stop}:{stride}: must be multiples of the group ({group})")
        items = self.order(streams, step, size)[start:stop]
        boxes = None
        if self.args.crop_area:
            boxes = [streams.draw("crop", step * size + at) for at in range(start, stop)]
        images_BYX3, labels_B = self._rows(TRAIN, items, boxes)
        if not self.args.augments:
            return self._assemble(self._augment.normalised(images_BYX3), labels_B, items)
        parts, targets = [], []
        with forked_rng():
            for at in range(0, stop - start, group):
                rng = streams.draw("augment", (step * size + start + at) // group)
                x_B3YX, soft_BC = self._augment.group(images_BYX3[at : at + group], labels_B[at : at + group], rng)
                parts.append(x_B3YX)
                targets.append(soft_BC)
        batch = self._assemble(torch.cat(parts), labels_B, items)
        return {**batch, "targets": torch.cat(targets)} if self.args.mixes else batch

    def held_out(self) -> list[str]:
        return [split for split in self.args.data.splits if split != TRAIN]

    def held_out_batches(self, part: str, size: int) -> Iterator[Batch]:
        _, every = self.origin(part)
        for start in range(0, len(every), size):
            items = every[start : start + size]
            images_BYX3, labels_B = self._rows(TRAIN if part == SELECTION else part, items, None)
            yield self._assemble(self._augment.normalised(images_BYX3), labels_B, items)

    def origin(self, part: str) -> tuple[str, np.ndarray]:
        source = TRAIN if part in (TRAIN, SELECTION) else part
        n = len(self._splits[source])
        items = np.arange(n, dtype=np.int64) if source == part != TRAIN else self.split(n)[part == SELECTION]
        return str(self.args.data.content(source)), items

    def count(self, batch: Batch) -> float:
        return float(len(batch["labels"]))

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy (nats) to `targets` if labels are soft, else to `labels`, with label smoothing; summed."""
        target = batch["targets"] if "targets" in batch else batch["labels"]
        smoothing = self.args.label_smoothing
        return functional.cross_entropy(outputs.float(), target, reduction="sum", label_smoothing=smoothing)

    def outcomes(self, outputs: Tensor, batch: Batch) -> dict[str, np.ndarray]:
        """Per image: `label`, `prediction`, `rank` of the label among the classes (0 is best) and `loss` (nats,
        without smoothing). An output that is not a number counts as above the label's."""
        outputs_BC, labels_B = outputs.float(), batch["labels"]
        own_B1 = outputs_BC.gather(1, labels_B[:, None])
        before_BC = torch.arange(outputs_BC.shape[1], device=outputs.device) < labels_B[:, None]
        rank_B = (~(outputs_BC <= own_B1) | ((outputs_BC == own_B1) & before_BC)).sum(1)
        loss_B = functional.cross_entropy(outputs_BC, labels_B, reduction="none")
        columns = {"item": batch["items"], "label": labels_B, "prediction": outputs_BC.argmax(1), "rank": rank_B}
        return {name: column.cpu().numpy() for name, column in {**columns, "loss": loss_B}.items()}

    def metrics(self, part: str, outcomes: dict[str, np.ndarray]) -> dict[str, float]:
        """`top1`, `top5` and `loss` (nats) per image; '<split>_top1' and so on if several splits are reported."""
        top1, top5 = (float(np.mean(outcomes["rank"] < k)) for k in (1, 5))
        loss = float(np.mean(outcomes["loss"], dtype=np.float64))
        return dict(zip(self.names(part), (top1, top5, loss), strict=True))

    def names(self, part: str) -> list[str]:
        prefix = f"{part}_" if len(self.held_out()) > 1 and part != SELECTION else ""
        return [f"{prefix}top1", f"{prefix}top5", f"{prefix}loss"]

    def example(self, size: int) -> Batch:
        args, rng = self.args, Streams(0, 0).draw("made-up examples", 0)
        x_B3YX = torch.from_numpy(rng.standard_normal((size, 3, args.resolution, args.resolution), dtype=np.float32))
        labels_B = torch.from_numpy(rng.integers(args.classes, size=size))
        batch = self._assemble(x_B3YX, labels_B, np.arange(size))
        return {**batch, "targets": functional.one_hot(labels_B, args.classes).float()} if args.mixes else batch

    def _rows(
        self, split: str, items: np.ndarray, draws: list[np.random.Generator] | None
    ) -> tuple[np.ndarray, Tensor]:
        """Images BYX3 and labels B; with `draws`, one an image, cropped at random."""
        side = self.args.resolution
        images_BYX3, labels_B = np.empty((len(items), side, side, 3), np.uint8), np.empty(len(items), np.int64)
        for part, at, own in self._splits[split].groups(items):
            labels_B[at] = part["labels"][own]
            if "images" in part:
                images_BYX3[at] = part["images"][own]
                continue
            for place, row in zip(at, own, strict=True):
                value = {"bytes": bytes(part["bytes"][part["offsets"][row] : part["offsets"][row + 1]])}
                where = f"data set {self.args.data.name}, split {split}, image {items[place]}"
                box = self._box(split, draws[place] if draws else None)
                images_BYX3[place] = pixels(value, side, where, box)
        return images_BYX3, torch.from_numpy(labels_B)

    def _box(self, split: str, draw: np.random.Generator | None) -> Box:
        if draw is not None:
            return lambda width, height: random_box(width, height, self.args.crop_area, draw)
        share = 1.0 if split == TRAIN else self.args.crop_held_out
        return lambda width, height: middle_box(width, height, share)

    def _assemble(self, pixels_B3YX: Tensor, labels_B: Tensor, items: np.ndarray) -> Batch:
        patches_BLF = cut(pixels_B3YX, self.args.patch)
        return {
            "patches": patches_BLF,
            "segments": torch.ones(patches_BLF.shape[:2], dtype=torch.int64),
            "labels": labels_B,
            "items": torch.from_numpy(items.copy()),
        }


def cut(pixels_B3YX: Tensor, patch: int) -> Tensor:
    """Square patches in reading order, BLF with F = (row, column, colour) of a pixel within its patch."""
    size, colours, height, width = pixels_B3YX.shape
    tiles = pixels_B3YX.reshape(size, colours, height // patch, patch, width // patch, patch)
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(size, -1, patch * patch * colours)
