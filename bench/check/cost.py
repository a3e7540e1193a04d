"""Rows that hold what a mixer says it costs, its state and its operations, to what is counted.

Axes: B batch, L length, H heads, P head width.
"""

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench.check.subject import WIDTH, Failed, Row, Subject, factors
from bench.mixers.base import Features

LENGTHS = (128, 256, 512, 1024)
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


def exponent(sizes: list[float]) -> float:
    """Slope of log size over log length from the first to the last length."""
    return math.log(sizes[-1] / sizes[0]) / math.log(LENGTHS[-1] / LENGTHS[0])


def cost(subject: Subject) -> list[Row]:
    """Counted operations against the declared `flops`, in growth and in size; growth of the bytes kept for backward.

    What is kept is written by some operation, so it cannot grow faster than the operations.
    """
    counted, declared, kept = [], [], []
    for length in LENGTHS:
        mixer = subject.mixer(length, False, torch.float32)
        segments_BL = subject.documents([[length]], length)
        v_BLHP, features = subject.inputs(mixer, segments_BL)
        operations, saved = measured(mixer, v_BLHP.float(), Features(*(x.float() for x in features)), segments_BL)
        counted.append(operations)
        declared.append(mixer.flops(length))
        kept.append(saved)
    if not all(isinstance(n, int) and n >= 0 for n in declared):
        raise Failed(f"flops must be whole numbers, not negative: {declared}")
    allowed = max(1.0, exponent(declared)) if min(declared) > 0 else 1.0
    rule = f"declared {allowed:.2f} over {LENGTHS[0]} to {LENGTHS[-1]} tokens"
    rows = []
    for name, sizes, note in (
        ("FLOPs, growth", counted, f"exponent; {rule}"),
        ("bytes kept for backward", kept, f"exponent; {rule}; {kept[-1] / 2**20:.2f} MiB at {LENGTHS[-1]}"),
    ):
        order = exponent(sizes) if min(sizes) > 0 else 0.0
        rows.append(Row(name, order, "pass" if order <= allowed + SLACK else "fail", note))
    small = [PASSES * length * subject.declared.heads * WIDTH for length in LENGTHS]
    return [rows[0], size(counted, declared, small), rows[1]]


def size(counted: list[float], declared: list[int], small: list[int]) -> Row:
    """Counted over declared at the length where they differ most; what is small need not be declared."""
    worst, good = 1.0, True
    for n, said, rest in zip(counted, declared, small, strict=True):
        good &= said / FACTOR <= n <= FACTOR * said + rest
        if said and abs(math.log(max(n, 1) / said)) >= abs(math.log(worst)):
            worst = max(n, 1) / said
    note = f"counted / declared; at most {FACTOR} apart, but for {PASSES} operations a number of v"
    return Row("FLOPs, size", worst, "pass" if good else "fail", note)


def measured(mixer, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> tuple[float, int]:
    """Operations of one `forward`, and bytes of the distinct storages that autograd keeps of it."""
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    leaves = [x.detach().requires_grad_() for x in (v_BLHP, *features)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), Operations() as operations:
        y_BLHP = mixer(leaves[0], Features(*leaves[1:]), segments_BL)
    if not y_BLHP.requires_grad:
        raise Failed("the output does not depend on v")
    return operations.total, sum(storages.values())


def state(subject: Subject) -> Row:
    """The rank of M's blocks strictly below and above the diagonal against the declared state / P.

    Declared: the larger rank is at most that, and at least half of it where a block has room. Declared to grow (None):
    at two lengths the ranks must not be one and the same number, well inside the blocks, as a bounded state's are.
    """
    half, whole = (ranks(subject, length) for length in (subject.length // 2, subject.length))
    found = max(rank for rank, _ in whole)
    bound = subject.mixer(subject.length, False).state_size
    if bound is None:
        bounded = all(a == b and 2 * a <= room for (a, room), (b, _) in zip(half, whole, strict=True))
        note = "declared to grow with the length: rank of off-diagonal blocks, not one that stays"
        return Row("state", found, "fail" if bounded else "pass", note)
    room = min(room for _, room in whole)
    least, most = min(bound / WIDTH, room) / 2, bound / WIDTH
    note = f"rank of off-diagonal blocks against state / head width; from {least:g} to {most:g}"
    return Row("state", found, "pass" if least <= found <= most else "fail", note)


def ranks(subject: Subject, length: int) -> list[tuple[float, int]]:
    """The rank of the blocks below and above the diagonal, and the size of the smaller half of the row."""
    mixer = subject.mixer(length, False)
    segments_BL = subject.documents([[length]], length)
    with torch.no_grad():
        m_HLL = factors(mixer, *subject.inputs(mixer, segments_BL), segments_BL)[0]
    cut = length // 2
    return [(sharp_rank(block), cut) for block in (m_HLL[:, cut:, :cut], m_HLL[:, :cut, cut:])]


def sharp_rank(block_HXY: Tensor) -> float:
    """The largest rank over heads, where singular values end in a fall; the block's size where they fade."""
    values_HN = torch.linalg.svdvals(block_HXY)
    largest_H1 = values_HN.amax(-1, keepdim=True).clamp(min=1e-300)
    falls_HN = (values_HN[:, 1:] < SHARP * values_HN[:, :-1]) & (values_HN[:, 1:] < ZERO * largest_H1)
    size = values_HN.shape[-1]
    first_H = torch.where(falls_HN.any(-1), falls_HN.int().argmax(-1) + 1, size)
    return float(torch.where(values_HN.amax(-1) > 0, first_H, 0).amax())
