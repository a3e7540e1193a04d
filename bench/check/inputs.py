"""Rows about what is handed to a mixer: rounded or extreme features, inputs that it must only read.

Axes: B batch, L length, H heads, P head width.
"""

import torch
from torch import Tensor

from bench.check.algebra import EXACT
from bench.check.subject import Failed, Row, Subject, at_most, by_matrix, differ, gradients
from bench.mixers.base import Features, Mixer

HALF = 2e-2  # output, with features rounded to bf16
LARGE = 30.0  # times the usual size of features
LOOSE = 1e-2  # fp32 there


def rounded(subject: Subject) -> Row:
    """In fp64: what rounding conv and raw channels to bf16, as autocast does, leaves of the output: error / size.

    A quantity that it ruins, such as a frequency that is multiplied by a place, must be asked for as an exact channel.
    """
    length = 2 * subject.length
    mixer, segments_BL = subject.mixer(length, False), subject.documents([[length]], length)
    v_BLHP, features = subject.inputs(mixer, segments_BL)
    coarse = Features(*(x.bfloat16().double() for x in features))._replace(exact_BLK=features.exact_BLK)
    with torch.no_grad():
        y, z = (mixer(v_BLHP, x, segments_BL) for x in (features, coarse))
    figures = {"conv and raw": float((z - y).norm() / y.norm())}
    return at_most("rounded features", figures, HALF, f"conv and raw channels in bf16, {length} tokens")


def extreme(subject: Subject) -> Row:
    """Features of zero and `LARGE` times the usual: values and gradients stay finite; fp32 values near `matrix`'s."""
    figures = {}
    for packed in (False, True):
        length = subject.length // 2
        segments_BL = subject.documents([[length // 2, 9] if packed else [length // 2 + 9], []], length)
        exact, single = (subject.mixer(length, packed, dtype) for dtype in (torch.float64, torch.float32))
        v_BLHP, features = subject.inputs(exact, segments_BL)
        for times in (0.0, LARGE):
            where = f"features times {times:g}{', packed' * packed}"
            given = v_BLHP, Features(*(times * x for x in features))
            for half in (False, True):
                found = gradients(single, autocast(single, subject.device, half), *in_fp32(*given), segments_BL)
                lost = [key for key, x in found.items() if not x.isfinite().all()]
                if lost:
                    raise Failed(f"{where}, {'bf16' if half else 'fp32'}: not finite: {', '.join(lost)}")
                if not half:
                    with torch.no_grad():
                        y = by_matrix(exact, *given, segments_BL)
                    figures[where] = differ(found["value"], y) if y.any() else float(found["value"].abs().amax())
    return at_most("extreme features", figures, LOOSE, f"times 0 and {LARGE:g}: finite; fp32 against fp64")


def autocast(mixer: Mixer, device: str, half: bool):
    def way(*given):
        with torch.autocast(device, torch.bfloat16, enabled=half):
            return mixer(*given)

    return way


def in_fp32(v_BLHP: Tensor, features: Features) -> tuple[Tensor, Features]:
    return v_BLHP.float(), Features(*(x.float() for x in features))


def only_read(subject: Subject) -> Row:
    """`forward` and `matrix` write into nothing they are given; strides and evaluation mode change nothing."""
    figures = {}
    for packed in (False, True):
        mixer, segments_BL = subject.mixer(subject.length, packed), subject.layouts(packed, subject.length)[1:2]
        v_BLHP, features = subject.inputs(mixer, segments_BL)
        before = [x.clone() for x in (v_BLHP, *features, segments_BL)]
        with torch.no_grad():
            y = mixer(v_BLHP, features, segments_BL)
            mixer.matrices(v_BLHP, features, segments_BL)
            written = [not torch.equal(x, old) for x, old in zip((v_BLHP, *features, segments_BL), before, strict=True)]
            if any(written):
                names = ("v", *features._fields, "segments")
                raise Failed(f"writes into {', '.join(n for n, w in zip(names, written, strict=True) if w)}")
            # As a convolution over tokens leaves them: the tokens' axis varies fastest.
            turned = turn(v_BLHP), Features(*map(turn, features))
            figures[f"other strides{', packed' * packed}"] = differ(mixer(*turned, segments_BL), y)
            figures[f"evaluation mode{', packed' * packed}"] = differ(mixer.eval()(v_BLHP, features, segments_BL), y)
    return at_most("inputs only read", figures, EXACT, "nothing written; strides, evaluation mode without effect")


def turn(x_BL: Tensor) -> Tensor:
    """The same tensor with the axis of tokens last in memory."""
    return x_BL.movedim(1, -1).contiguous().movedim(-1, 1)
