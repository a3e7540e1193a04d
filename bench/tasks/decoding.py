"""From encoded images to pixels: whole splits at once, files as they are, one image and what is used of it.

`args` are those of the images task. Axes: N images, Y rows, X columns, 3 colours.
"""

import io
import math
from collections.abc import Callable, Iterator

import numpy as np

from bench import Refusal

FORMATS = ("JPEG", "PNG", "WEBP")  # no others: some of Pillow's decoders start programs
TRIES = 10  # of a random crop
Box = Callable[[int, int], tuple[int, int, int, int]]
"""(width, height) of an image -> left, top, right, bottom of what is used of it."""


def decode(args, where: str, rows) -> dict[str, np.ndarray]:
    """`images` NYX3 (uint8) and `labels` N (int64) from a pyarrow table; Refusal naming the first bad row."""
    images = np.empty((rows.num_rows, args.resolution, args.resolution, 3), dtype=np.uint8)
    row = 0
    for chunk in rows.column(args.image_column).chunks:
        for value in chunk:
            place = f"{where}, row {row}, column {args.image_column}"
            images[row] = pixels(value.as_py(), args.resolution, place, lambda *size: middle_box(*size, 1.0))
            row += 1
    labels = [checked(args, label, f"{where}, row {n}") for n, label in enumerate(rows[args.label_column].to_pylist())]
    return {"images": images, "labels": np.array(labels, dtype=np.int64)}


def checked(args, label, where: str) -> int:
    if not isinstance(label, int) or not 0 <= label < args.classes:
        raise Refusal(f"{where}: label is {label}, must be 0 to {args.classes - 1}")
    return label


def encoded(args, tables: Iterator, where: str) -> dict[str, np.ndarray]:
    """One file as it is: the images' `bytes` one after the other, `offsets` (N + 1) and `labels` N."""
    chunks, sizes, labels = [np.zeros(0, np.uint8)], [0], []
    for rows in tables:
        images, own = rows[args.image_column].to_pylist(), rows[args.label_column].to_pylist()
        for value, label in zip(images, own, strict=True):
            place = f"{where}, row {len(labels)}"
            labels.append(checked(args, label, place))
            chunks.append(np.frombuffer(image_bytes(value, place), np.uint8))
            sizes.append(len(chunks[-1]))
    return {"bytes": np.concatenate(chunks), "offsets": np.cumsum(sizes), "labels": np.array(labels, np.int64)}


def image_bytes(value, where: str) -> bytes:
    if not isinstance(value, dict) or not isinstance(value.get("bytes"), bytes):
        raise Refusal(f"{where}: holds no image bytes")
    return value["bytes"]


def middle_box(width: int, height: int, share: float) -> tuple[int, int, int, int]:
    """The middle square whose side is `share` of the shorter side."""
    side = max(1, round(share * min(width, height)))
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def random_box(width: int, height: int, area: float, draw: np.random.Generator) -> tuple[int, int, int, int]:
    """A box of `area` to all of the image's area and aspect 3/4 to 4/3 (even in its logarithm), anywhere in it.

    As torchvision's RandomResizedCrop: if none of ten tries fits, the middle, its aspect brought into that range.
    """
    for _ in range(TRIES):
        wanted = width * height * draw.uniform(area, 1)
        aspect = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        wide, high = round(math.sqrt(wanted * aspect)), round(math.sqrt(wanted / aspect))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(draw.integers(width - wide + 1)), int(draw.integers(height - high + 1))
            return left, top, left + wide, top + high
    wide, high = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high


def pixels(value: dict, resolution: int, where: str, box: Box) -> np.ndarray:
    """One image, RGB uint8 YX3, from {bytes, path}; only `bytes` is read."""
    from PIL import Image

    data = image_bytes(value, where)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image = image.convert("RGB")
    except Exception as error:  # a broken file makes decoders raise almost anything
        raise Refusal(f"{where}: not a readable {', '.join(FORMATS)} image: {type(error).__name__}") from error
    edges = box(*image.size)
    if edges != (0, 0, resolution, resolution) or image.size != (resolution, resolution):
        # Not resize(box=...): that filters across the edge of the box.
        image = image.crop(edges).resize((resolution, resolution), Image.Resampling.BICUBIC)
    return np.asarray(image)
