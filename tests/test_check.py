"""The conformance suite: shipped mixers pass it, and every wrong mixer fails in the row that is meant for it."""

import pytest
import torch

from bench.check import ROWS, Declared, check_mixer
from bench.check.verb import distinct, everything
from tests import wrong_mixers as wrong

SHIPPED = everything({})
HEADS = 2

MUTANTS = [
    (wrong.ShiftedLags, "forward = matrix v, fp64"),
    (wrong.RoundedKeys, "forward = matrix v, fp32"),
    (wrong.Detached, "gradcheck"),
    (wrong.NoMix, "mixes tokens"),
    (wrong.DeadStart, "gradients at initialisation"),
    (wrong.ZeroStart, "gradients at initialisation"),
    (wrong.DeadChannel, "gradients at initialisation"),
    (wrong.GlobalDraw, "initial values"),
    (wrong.SoftmaxOverPadding, "padding invariance"),
    (wrong.BackwardFromPadding, "padding invariance"),
    (wrong.SegmentLeak, "segment isolation"),
    (wrong.BatchNorm, "batch independence"),
    (wrong.DataDiagonal, "data independence"),
    (wrong.ValueDiagonal, "data independence"),
    (wrong.DeclaredSam, "data dependence"),
    (wrong.Rectified, "linear in v"),
    (wrong.FrozenLength, "shorter lengths"),
    (wrong.FrozenAbove, "longer lengths"),
    (wrong.NoRefusal, "longer lengths"),
    (wrong.BakedScale, "granted length"),
    (wrong.Misaligned, "sequence alignment"),
    (wrong.SwappedFeatures, "sequence alignment"),
    (wrong.ShiftedLagsBoth, "structure: constant diagonals"),
    (wrong.WrongRank, "structure: rank 3"),
    (wrong.ZeroStart, "gain"),
    (wrong.Huge, "gain"),
    (wrong.Constant, "gain, varying"),
    (wrong.CosineInBf16, "bf16 error"),
    (wrong.ExponentialInBf16, "bf16 error"),
    (wrong.RandomOrder, "determinism"),
    (wrong.Dropping, "determinism"),
    (wrong.SwappedOutput, "heads"),
    (wrong.SmallState, "state"),
    (wrong.CheapWord, "FLOPs, counted"),
    (wrong.KeepsTerms, "bytes kept for backward"),
]
RIGHT = [wrong.Table, wrong.Aligned, wrong.Lags, wrong.BackwardScan, wrong.Waves]


def verdicts(cls) -> dict[str, str]:
    return {row.property: row.verdict for row in check_mixer(cls, Declared(sam=cls.sam, heads=HEADS))}


@pytest.mark.parametrize("label", SHIPPED)
def test_a_shipped_mixer_passes(label):
    rows = check_mixer(*SHIPPED[label])
    assert len(rows) >= len(ROWS)
    assert not [row for row in rows if row.verdict == "fail"]


@pytest.mark.parametrize("cls", RIGHT)
def test_a_right_mixer_passes(cls):
    """What the wrong ones are made from: so that each fails for its own defect."""
    assert "fail" not in verdicts(cls).values()


@pytest.mark.parametrize(("cls", "row"), MUTANTS)
def test_a_wrong_mixer_fails_in_the_row_meant_for_it(cls, row):
    assert verdicts(cls)[row] == "fail"
