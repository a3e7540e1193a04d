"""Random augmentation of small groups of images: flip, RandAugment, erasing, MixUp or CutMix. On the host, by kornia.

kornia draws from torch's global generator, once a call; so each group is augmented inside a fork of that generator,
seeded from the group's own stream, and its result depends on nothing else. Nothing global is left changed.

Axes: B images of one group, Y rows, X columns, 3 colours, C classes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

# Candidates of RandAugment, (operation, lowest, highest): kornia's own, written down so that they cannot drift.
POLICY = (
    ("auto_contrast", 0, 1),
    ("equalize", 0, 1),
    ("invert", 0, 1),
    ("rotate", -30.0, 30.0),
    ("posterize", 4.0, 8.0),
    ("solarize", 0.0, 1.0),
    ("solarize_add", 0.0, 0.43),
    ("color", 0.1, 1.9),
    ("contrast", 0.1, 1.9),
    ("brightness", 0.1, 1.9),
    ("sharpness", 0.1, 1.9),
    ("shear_x", -0.3, 0.3),
    ("shear_y", -0.3, 0.3),
    ("translate_x", -0.1, 0.1),
    ("translate_y", -0.1, 0.1),
)
MAGNITUDES = 30  # kornia's scale; the magnitude must lie strictly between 0 and this


class Augment:
    """Augments one group at a time; `args` are the `Args` of the images task.

    Order: flip (probability 0.5 an image), RandAugment on [0, 1], normalisation, erasing (to the mean colour; 2 to 33 %
    of the area, aspect 0.3 to 3.3), then MixUp or CutMix, with equal odds a group if both are on.

    RandAugment differs from the recipe of vision transformers (rand-m9-mstd0.5-inc1):
    - the same operations, in the same order, for the whole group (without replacement); only the sign is per image;
    - the magnitude m is the same for all, without spread (mstd 0): m / 30 of the way from lowest to highest, so
      9 is 0.3 of the range, where the recipe's 9 is 0.9 of its range;
    - colour, contrast, brightness and sharpness run from 0.1 to 1.9 without a sign: below m = 15 they always weaken,
      at 15 they do nothing, above they strengthen; brightness is added, not multiplied. Solarize inverts what exceeds
      m / 30, so a larger m inverts less. The recipe's 'increasing' variants all grow with m;
    - shears are in degrees, 180 times the range (m = 9: 16 degrees, tan = 0.29); translations reach 10 % of the side.

    MixUp: kornia draws its weight uniformly, whatever alpha; here it is Beta(alpha, alpha), one an image. CutMix: boxes
    lie inside the image, so that the weight 1 - area is exact; one an image. Partners are a permutation of the group.
    """

    def __init__(self, args):
        import kornia.augmentation as kornia  # 0.3 s, and not needed to check settings
        from kornia.augmentation.auto import RandAugment

        self._args = args
        self._mean = torch.tensor(args.mean).view(3, 1, 1)
        self._std = torch.tensor(args.std).view(3, 1, 1)
        policy = [[operation] for operation in POLICY]
        ops, magnitude = args.randaugment_ops, args.randaugment_magnitude
        self._randaugment = RandAugment(ops, magnitude, policy, transformation_matrix_mode="skip") if ops else None
        self._erasing = kornia.RandomErasing(
            scale=(0.02, 0.33), ratio=(0.3, 3.3), value=0.0, p=args.erasing_probability
        )
        self._cutmix = None
        if args.cutmix_alpha:
            self._cutmix = kornia.RandomCutMixV2(
                beta=args.cutmix_alpha, data_keys=["input", "class"], use_correct_lambda=True
            )

    def normalised(self, images_BYX3: np.ndarray) -> Tensor:
        """uint8 to (value / 255 - mean) / std, B3YX, without augmentation."""
        return (self._unit(images_BYX3) - self._mean) / self._std

    def group(self, images_BYX3: np.ndarray, labels_B: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """(pixels B3YX, soft labels BC) of one group, a pure function of its arguments. Call inside `forked_rng`."""
        args = self._args
        torch.default_generator.manual_seed(int(rng.integers(2**63)))
        flipped_B, choice = rng.random(len(labels_B)) < 0.5, rng.random()
        x_B3YX = self._unit(images_BYX3)
        if args.flip:
            x_B3YX = torch.where(torch.from_numpy(flipped_B)[:, None, None, None], x_B3YX.flip(-1), x_B3YX)
        if self._randaugment is not None:
            x_B3YX = self._randaugment(x_B3YX)
        x_B3YX = (x_B3YX - self._mean) / self._std
        if args.erasing_probability:
            x_B3YX = self._erasing(x_B3YX)
        if args.mixup_alpha and (choice < 0.5 or not args.cutmix_alpha):
            weight_B = torch.from_numpy(rng.beta(args.mixup_alpha, args.mixup_alpha, len(labels_B))).float()
            partner_B = torch.from_numpy(rng.permutation(len(labels_B)))
            x_B3YX = torch.lerp(x_B3YX[partner_B], x_B3YX, weight_B[:, None, None, None])
            return x_B3YX, soft(labels_B, labels_B[partner_B], weight_B, args.classes)
        if self._cutmix is not None:
            x_B3YX, mixed_1B3 = self._cutmix(x_B3YX, labels_B)
            first_B, second_B, weight_B = mixed_1B3[0].unbind(-1)
            return x_B3YX, soft(first_B.long(), second_B.long(), weight_B, args.classes)
        return x_B3YX, functional.one_hot(labels_B, args.classes).float()

    def _unit(self, images_BYX3: np.ndarray) -> Tensor:
        return torch.from_numpy(images_BYX3).permute(0, 3, 1, 2).float() / 255


def soft(first_B: Tensor, second_B: Tensor, weight_B: Tensor, classes: int) -> Tensor:
    """Label distributions BC with `weight` on the first label and the rest on the second."""
    one, two = functional.one_hot(first_B, classes), functional.one_hot(second_B, classes)
    return one * weight_B[:, None] + two * (1 - weight_B[:, None])


@contextmanager
def forked_rng() -> Iterator[None]:
    """What is drawn from torch's CPU generator inside leaves no trace outside. Not for two threads at once."""
    # torch.manual_seed would also reseed the GPUs' generators, which this fork does not bring back.
    with torch.random.fork_rng(devices=[]):
        yield
