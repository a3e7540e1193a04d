"""Rows that hold what a mixer says it costs, its state and its operations, to what is counted.

Axes: B batch, L length, H heads, P head width.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench.check.subject import WIDTH, Failed, Row, Subject, factors
from bench.mixers.base import Features, Grant

LENGTHS, PACKED = (128, 256, 512, 768), (192, 576)
OTHER = 11  # another width of a head
ROOM = 1024
SLACK = 0.2  # of an exponent, for lower-order terms
FACTOR = 1.5  # between counted and declared operations: declared are leading terms
PASSES = 32  # operations a number of v that need not be declared: masks, scales, sums of lower order
FOURIER = {"_fft_r2c": 2.5, "_fft_c2r": 2.5, "_fft_c2c": 5.0}  # times n log2 n for a transform of n points
MOVES = ("clone", "copy_", "_to_copy")  # marked as entrywise, but no arithmetic
SHARP, ZERO = 1e-6, 1e-10  # a rank ends where the next singular value falls so far, and to so little of the first


class Operations(TorchDispatchMode):
    """Counts operations while it is entered: matrix products as torch's own counter does, one an entry for entrywise
    operations and sums, and the usual formula for Fourier transforms. Copies and index moves count nothing."""

    def __init__(self):
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.total += self.of(func, args, kwargs or {}, out)
        return out

    def of(self, func, args, kwargs: dict, out) -> float:
        kind = func.overloadpacket
        if kind in flop_registry:
            return flop_registry[kind](*args, **kwargs, out_val=out)
        tensors = [x for x in (*args, out) if isinstance(x, Tensor)]
        largest = max((x.numel() for x in tensors), default=0)
        if kind.__name__ in FOURIER:
            n = math.prod(max(x.shape[d] for x in tensors) for d in args[1])
            return FOURIER[kind.__name__] * largest * math.log2(max(n, 2))
        counts = {torch.Tag.pointwise, torch.Tag.reduction} & set(func.tags) and kind.__name__ not in MOVES
        return float(largest) if counts else 0.0


def exponent(lengths: tuple[int, ...], sizes: list[float]) -> float:
    """Slope of log size over log length from the first to the last length."""
    return math.log(sizes[-1] / sizes[0]) / math.log(lengths[-1] / lengths[0])


def cost(subject: Subject) -> list[Row]:
    """Counted operations against the declared `flops`, in growth and in size; growth of the bytes kept for backward.

    What is kept is written by some operation, so it cannot grow faster than the operations. Packed rows, and heads of
    another width, have a cost of their own.
    """
    whole = [counted(subject, subject.grant(length, False)) for length in LENGTHS]
    packed = [counted(subject, subject.grant(length, True)) for length in PACKED]
    wide = [counted(subject, subject.grant(PACKED[0], False, OTHER))]
    words = [said for _, said, _, _ in (*whole, *packed, *wide)]
    if not all(type(n) is int and n >= 0 for n in words):
        raise Failed(f"flops must be whole numbers, not negative: {words}")
    rows = growth(LENGTHS, whole, "")
    crowded = growth(PACKED, packed, ", packed")
    return [rows[0], crowded[0], size([*whole, *packed, *wide]), rows[1], crowded[1]]


class Count(NamedTuple):
    """Of one `forward`: counted and declared operations, bytes kept for the backward pass, numbers in v."""

    operations: float
    declared: int
    kept: int
    numbers: int


def growth(lengths: tuple[int, ...], counts: list[Count], tag: str) -> list[Row]:
    said = [count.declared for count in counts]
    allowed = max(1.0, exponent(lengths, said)) if min(said) > 0 else 1.0
    rule = f"exponent; declared {allowed:.2f} over {lengths[0]} to {lengths[-1]} tokens"
    rows = []
    for name, sizes, note in (
        ("FLOPs, growth", [count.operations for count in counts], rule),
        (
            "bytes kept for backward",
            [count.kept for count in counts],
            f"{rule}; {counts[-1].kept / 2**20:.2f} MiB at {lengths[-1]}",
        ),
    ):
        order = exponent(lengths, sizes) if min(sizes) > 0 else 0.0
        rows.append(Row(f"{name}{tag}", order, "pass" if order <= allowed + SLACK else "fail", note))
    return rows


def size(counts: list[Count]) -> Row:
    """Counted over declared where they differ most; what is small need not be declared."""
    worst, good = 1.0, True
    for n, said, _, numbers in counts:
        good &= said / FACTOR <= n <= FACTOR * said + PASSES * numbers
        if said and abs(math.log(max(n, 1) / said)) >= abs(math.log(worst)):
            worst = max(n, 1) / said
    note = f"counted / declared; at most {FACTOR} apart, but for {PASSES} operations a number of v"
    return Row("FLOPs, size", worst, "pass" if good else "fail", note)


def counted(subject: Subject, grant: Grant) -> Count:
    """One `forward` in fp32 of a row that is full; packed: of two documents. Bytes are those of distinct storages."""
    mixer = subject.initialised(subject.make(grant), torch.float32)
    n = grant.length
    segments_BL = subject.documents([[n // 2, n - n // 2] if grant.packed else [n]], n)
    v_BLHP, features = subject.inputs(mixer, segments_BL)
    leaves = [x.float().requires_grad_() for x in (v_BLHP, *features)]
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), Operations() as operations:
        y_BLHP = mixer(leaves[0], Features(*leaves[1:]), segments_BL)
    if not y_BLHP.requires_grad:
        raise Failed("the output does not depend on v")
    return Count(operations.total, mixer.flops(n), sum(storages.values()), v_BLHP.numel())


def state(subject: Subject) -> Row:
    """The rank of M's blocks strictly below and above the diagonal against the declared state / P.

    Declared: the larger rank is at most that, and at least half of it where a block has room; the word is the same at
    any granted length, and in proportion to the heads' width. Rows are long enough for a block to have more room, up to
    `ROOM` tokens. Declared to grow (None): at two lengths the ranks must not be one and the same number, well inside
    the blocks, as a bounded state's are.
    """
    words = [subject.make(subject.grant(*given)).state_size for given in said_for(subject)]
    if any(n is not None and (type(n) is not int or n < 0) for n in words):
        raise Failed(f"state_size must be a whole number, not negative, or None: {words}")
    if len({n is None for n in words}) > 1 or (words[0] is not None and words[1] != words[0]):
        raise Failed(f"state_size depends on the granted length ({words[0]}, {words[1]}): one that grows is None")
    if words[0] is None:
        half, whole = (ranks(subject, length) for length in (subject.length // 2, subject.length))
        bounded = all(a == b and 2 * a <= room for (a, room), (b, _) in zip(half, whole, strict=True))
        note = "declared to grow with the length: rank of off-diagonal blocks, not one that stays"
        return Row("state", max(rank for rank, _ in whole), "fail" if bounded else "pass", note)
    least, most = (pick(words[0] / WIDTH, words[2] / OTHER) for pick in (min, max))
    found = ranks(subject, max(subject.length, min(ROOM, int(2 * most) + 2)))
    rank, room = max(rank for rank, _ in found), min(room for _, room in found)
    note = f"rank of off-diagonal blocks against state / head width; from {min(least, room) / 2:g} to {least:g}"
    good = min(most, room) / 2 <= rank <= least
    return Row("state", rank, "pass" if good else "fail", note)


def said_for(subject: Subject) -> list[tuple[int, bool, int]]:
    """Grants for which a mixer is asked for its state: two lengths, two widths of a head."""
    return [(subject.length, False, WIDTH), (2 * subject.length, False, WIDTH), (subject.length, False, OTHER)]


def ranks(subject: Subject, length: int) -> list[tuple[float, int]]:
    """The rank of the blocks below and above the diagonal at three cuts, and the size of the smaller part of a row."""
    mixer = subject.mixer(length, False)
    segments_BL = subject.documents([[length]], length)
    with torch.no_grad():
        m_HLL = factors(mixer, *subject.inputs(mixer, segments_BL), segments_BL)[0]
    found = []
    for cut in (length // 2, length // 3, 2 * length // 3 + 1):
        blocks = m_HLL[:, cut:, :cut], m_HLL[:, :cut, cut:]
        found += [(sharp_rank(block), min(cut, length - cut)) for block in blocks]
    return found


def sharp_rank(block_HXY: Tensor) -> float:
    """The largest rank over heads, where singular values end in a fall; the block's size where they fade."""
    values_HN = torch.linalg.svdvals(block_HXY)
    largest_H1 = values_HN.amax(-1, keepdim=True).clamp(min=1e-300)
    falls_HN = (values_HN[:, 1:] < SHARP * values_HN[:, :-1]) & (values_HN[:, 1:] < ZERO * largest_H1)
    size = values_HN.shape[-1]
    first_H = torch.where(falls_HN.any(-1), falls_HN.int().argmax(-1) + 1, size)
    return float(torch.where(values_HN.amax(-1) > 0, first_H, 0).amax())
