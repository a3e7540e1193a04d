"""The conformance suite: shipped mixers pass it, and every wrong mixer fails in the row that is meant for it."""

import functools
import itertools
import json
import re
import sys

import pytest
import torch

from bench import NotInstalled, cli
from bench.check import ROWS, Declared, check_mixer, subject_of
from bench.check.aligned import aligned
from bench.check.backends import COMPILED, HALF, SINGLE, backends, errors, plain
from bench.check.isolation import data_dependence, padding
from bench.check.structure import PREDICATES
from bench.check.verb import distinct, everything, of
from bench.compose import ROOT, make_where
from bench.mixers import quasiseparable
from benchmarks import check_tables
from tests import wrong_at_edges as edges
from tests import wrong_mixers as wrong

CPU = make_where({"where.device": "cpu"})
SHIPPED = everything({}, CPU)
VARIANTS = [
    ("quasiseparable", {"groups": 2, "separate": False}),
    ("add", {"shift": True, "diagonal": True}),  # equal to another mixer, and so no form of its own
    ("mult", {"groups": 2, "separate": False}),
    ("semiseparable", {"groups": 4}),
    ("cauchy", {"rank": 1}),
    ("vandermonde", {"rank": 1}),
]
for name, changes in VARIANTS:
    SHIPPED |= {label: found for label, found in of(name, changes, CPU).items() if "sam=misaligned" not in label}
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
    (wrong.UndeclaredProduct, "linear in v"),
    (wrong.DeclaredNotLinear, "not linear in v"),
    (wrong.MovingFactor, "not linear in v"),
    (wrong.OtherFactor, "forward = matrix v, fp64"),
    (wrong.UnmixedProduct, "mixes tokens"),
    (wrong.LeakingFactor, "padding invariance"),
    (wrong.LeakingFactor, "segment isolation"),
    (wrong.MisalignedFactor, "sequence alignment"),
    (wrong.DataFactor, "data independence"),
    (wrong.FrozenLength, "shorter lengths"),
    (wrong.FrozenAbove, "longer lengths"),
    (wrong.NoRefusal, "longer lengths"),
    (wrong.BakedScale, "granted length"),
    (wrong.Misaligned, "sequence alignment"),
    (wrong.SwappedFeatures, "sequence alignment"),
    (wrong.ShiftedEmittedLags, "sequence alignment"),
    (wrong.UnevenLags, "structure: constant diagonals"),
    (wrong.WrongRank, "structure: rank 3"),
    (wrong.Renamed, "simplest form: differences of cosines"),
    (wrong.SummedCosines, "simplest form: differences of cosines"),
    (wrong.Reciprocals, "structure: reciprocal sums"),
    (wrong.ZeroStart, "gain"),
    (wrong.Huge, "gain"),
    (wrong.Constant, "gain, varying"),
    (wrong.CosineInBf16, "bf16 error"),
    (wrong.ExponentialInBf16, "bf16 error"),
    (wrong.CoarseGradient, "bf16 gradients"),
    (wrong.RandomOrder, "determinism"),
    (wrong.Dropping, "determinism"),
    (wrong.SwappedOutput, "heads"),
    (wrong.PairedHeads, "heads allowed"),
    (wrong.NoDivisors, "heads allowed"),
    (wrong.HalfWidths, "odd grants"),
    (wrong.WrongInSilence, "odd grants"),
    (wrong.NoReason, "odd grants"),
    (wrong.UnfitEverywhere, "odd grants"),
    (wrong.SmallState, "state"),
    (wrong.LargeState, "state"),
    (wrong.NoState, "state"),
    (wrong.CheapWord, "FLOPs, growth"),
    (wrong.DearWord, "FLOPs, size"),
    (wrong.KeepsTerms, "bytes kept for backward"),
    (edges.RowScale, "document alone"),
    (edges.RowScaleOfTable, "document alone"),
    (edges.PackedScale, "document alone"),
    (edges.PlaceInRow, "document alone"),
    (edges.MergedDocuments, "segment isolation"),
    (edges.LeakInBf16, "segment isolation"),
    (edges.MaskByANumber, "segment isolation"),
    (edges.MaskByANumber, "padding invariance"),
    (edges.OldMask, "batch independence"),
    (edges.WrongAtPowersOfTwo, "shorter lengths"),
    (edges.WrongBeyond256, "longer lengths"),
    (edges.FrozenAtTwice, "longer lengths"),
    (edges.MisalignedLater, "sequence alignment"),
    (edges.OtherInEvaluation, "inputs only read"),
    (edges.WritesV, "inputs only read"),
    (edges.WritesSegments, "inputs only read"),
    (edges.ReadsMemory, "inputs only read"),
    (edges.DrawsInPython, "determinism"),
    (edges.Clamped, "linear in v"),
    (edges.OneHeadOfTwo, "data dependence"),
    (edges.LateDetach, "gradients of whole rows"),
    (edges.SlightlyDetached, "gradients of whole rows"),
    (edges.BatchInBackward, "gradients of whole rows"),
    (edges.FaintGradient, "gradients at initialisation"),
    (edges.RoundedPhases, "rounded features"),
    (edges.PlacesInBf16, "bf16 error"),
    (edges.BareSoftmax, "extreme features"),
    (edges.DividedDecays, "extreme features"),
    (edges.NanInEmptyRows, "extreme features"),
    (edges.NearlyOff, "gain"),
    (edges.NearlyConstant, "gain, varying"),
    (edges.Poles, "bf16 error"),
    (edges.TiedDiagonal, "structure: free diagonal"),
    (edges.WidthlessState, "state"),
    (edges.StateOfGrant, "state"),
    (edges.LargeBoundedState, "state"),
    (edges.BrokenState, "state"),
    (edges.WidthlessFlops, "FLOPs, size"),
    (edges.PackedWord, "FLOPs, growth, packed"),
    (edges.PackedWord, "bytes kept for backward, packed"),
    (edges.PackedCube, "FLOPs, size"),
]
KNOWN = {
    "contraction that mixes no tokens": [(wrong.NoMix, "mixes tokens")],
    "zero initialisation with dead gradients": [
        (wrong.DeadStart, "gradients at initialisation"),
        (wrong.ZeroStart, "gradients at initialisation"),
    ],
    "Toeplitz off by one, with a wrapped corner": [
        (wrong.ShiftedLags, "forward = matrix v, fp64"),
        (wrong.ShiftedEmittedLags, "sequence alignment"),
    ],
    "swapped head and length axes": [(wrong.SwappedOutput, "heads"), (wrong.SwappedFeatures, "sequence alignment")],
    "DFT under the name Vandermonde": [(wrong.Renamed, "simplest form: differences of cosines")],
    "softmax over padding": [(wrong.SoftmaxOverPadding, "padding invariance")],
    "backward scan from inside the padding": [(wrong.BackwardFromPadding, "padding invariance")],
    "data-dependent diagonal without SAM": [
        (wrong.DataDiagonal, "data independence"),
        (wrong.ValueDiagonal, "data independence"),
    ],
    "frozen length": [(wrong.FrozenLength, "shorter lengths"), (wrong.FrozenAbove, "longer lengths")],
    "cosine in bf16": [(wrong.CosineInBf16, "bf16 error")],
    "scale baked to the training length": [(wrong.BakedScale, "granted length")],
    "segment leak": [(wrong.SegmentLeak, "segment isolation")],
    "sum in an order of chance": [(wrong.RandomOrder, "determinism")],
}
RIGHT = [wrong.Table, wrong.Aligned, wrong.Lags, wrong.EmittedLags, wrong.BackwardScan, wrong.Waves, wrong.Product]


@functools.cache
def verdicts(cls) -> dict[str, str]:
    declared = Declared(cls.sam, HEADS, functools.partial(cls.unfit, args=None))
    return {row.property: row.verdict for row in check_mixer(cls, declared)}


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


@pytest.mark.parametrize("defect", KNOWN)
def test_a_defect_of_released_code_fails_in_the_row_meant_for_it(defect):
    assert all(verdicts(cls)[row] == "fail" for cls, row in KNOWN[defect])


def test_a_wrong_backend_is_measured():
    """The row needs a GPU; what it measures does not."""
    subject = subject_of(wrong.Lags, Declared(False, HEADS), full=False)
    assert max(errors(subject, wrong.Lags, False, 37, True, plain).values()) < HALF
    assert max(errors(subject, wrong.ShiftedLags, False, 37, True, plain).values()) > SINGLE


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(("cls", "wrong_way"), [(wrong.Aligned, False), (wrong.DetachedWhenCompiled, True)])
def test_a_gradient_that_compilation_loses_is_measured(cls, wrong_way):
    """The row compiles for a GPU; what it measures shows with a compiler for any device."""
    subject = subject_of(cls, Declared(True, HEADS), full=False)
    torch._dynamo.reset()
    figures = errors(subject, cls, False, 37, False, lambda m: torch.compile(m, fullgraph=True, backend="aot_eager"))
    assert (max(figures.values()) > COMPILED) == wrong_way


def test_the_full_level_passes_a_right_mixer_and_fails_a_wrong_one():
    assert "fail" not in {row.verdict for row in check_mixer(wrong.Waves, Declared(True, HEADS), full=True)}
    rows = check_mixer(wrong.CosineInBf16, Declared(True, HEADS), full=True)
    assert [row.property for row in rows if row.verdict == "fail"] == ["bf16 error", "bf16 gradients"]


def test_every_row_has_a_wrong_mixer_that_fails_it():
    """A row that nothing fails would prove nothing."""
    rows = {row for cls in RIGHT for row in verdicts(cls)}
    none_declared, needs_a_gpu = {"structure", "backends"}, {"compiled"}  # the latter is measured in a test of its own
    assert rows - {row for _, row in MUTANTS} <= none_declared | needs_a_gpu


@pytest.mark.parametrize("kind", PREDICATES)
def test_every_structure_is_refused_to_a_random_matrix(kind):
    m_BHLL = torch.randn(2, 2, 20, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    figure, limit, _ = PREDICATES[kind](m_BHLL, 3)
    assert figure > limit


def test_a_mixer_may_refuse_a_setting_that_it_calls_unfit():
    class Refusing(wrong.WrongInSilence):
        def __init__(self, grant):
            if grant.head_width == 1:
                raise ValueError("a head of width 1")
            super().__init__(grant)

    assert verdicts(Refusing)["odd grants"] == verdicts(Refusing)["heads allowed"] == "pass"


def test_an_unknown_structure_is_named():
    class Misspelt(wrong.Table):
        def structure(self):
            return ("constant diagonal",)

    (row,) = [row for row in check_mixer(Misspelt, Declared(False, HEADS)) if row.property == "structure"]
    assert row.verdict == "fail" and "'constant diagonal'; known: constant diagonals, lower" in row.note


def test_sequence_alignment_says_which_definition_holds():
    def note(cls, heads=HEADS):
        (row,) = [row for row in check_mixer(cls, Declared(True, heads)) if row.property == "sequence alignment"]
        return row.note

    class Softmax(wrong.Aligned):
        def entries(self, v_BLHP, features, segments_BL):
            same_B1LL = wrong.same_segment(segments_BL)
            e_BHLL = self.raw(v_BLHP, features).exp() * same_B1LL
            return e_BHLL / (e_BHLL.sum(-1, keepdim=True) + ~same_B1LL.any(-1, keepdim=True))

    assert note(wrong.Aligned) == "strict: holds; leading: holds"
    assert re.fullmatch(r"strict: does not hold \(moves .*\); leading: holds", note(wrong.EmittedLags))
    factor = r"holds up to one factor a row, its normaliser \(.*\)"
    assert re.fullmatch(f"strict: {factor}; leading: {factor}", note(Softmax))


def test_the_misaligned_control_depends_on_the_tokens_but_is_not_aligned():
    subject = subject_of(*SHIPPED["low_rank sam=misaligned"], full=False)
    row = data_dependence(subject)
    assert row.property == "data dependence" and row.verdict == "pass"
    assert aligned(subject).verdict == "pass" and aligned(subject).figure > 1e-2


def test_a_control_that_is_aligned_after_all_fails():
    rows = check_mixer(wrong.Aligned, Declared(True, HEADS, aligned=False))
    assert [row.property for row in rows if row.verdict == "fail"] == ["sequence alignment"]


def test_two_names_of_one_matrix_are_found():
    """A copy under another name and of another size, as the released Vandermonde arm was an identity."""

    class Scaled(wrong.Table):
        def entries(self, v_BLHP, features, segments_BL):
            return -3 * super().entries(v_BLHP, features, segments_BL)

    made = {cls.__name__: (cls, Declared(cls.sam, HEADS)) for cls in (wrong.Table, wrong.Aligned, Scaled)}
    row = distinct(made)
    assert row.verdict == "fail" and row.note.endswith("Table and Scaled")
    assert distinct(dict(itertools.islice(made.items(), 2))).verdict == "pass"
    assert distinct(everything({}, CPU)).verdict == "pass"


def test_every_form_is_checked_unless_the_words_set_more_than_sam():
    assert list(of("add", {"sam": True}, CPU)) == [
        "add sam=true",
        "add sam=true diagonal=true",
        "add sam=true shift=true",
    ]
    assert len(of("add", {}, CPU)) == 7 and len(of("add", {"sam": "misaligned"}, CPU)) == 3
    four = ["add sam=false state=4", "add sam=true state=4", "add sam=misaligned state=4"]
    assert list(of("add", {"state": 4}, CPU)) == four


# The verb


@pytest.fixture
def call(monkeypatch, capsys):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["mixerbench", *words])
        return cli.main(), *capsys.readouterr()

    return call


def test_the_mixer_of_the_readme_passes_and_a_wrong_one_has_exit_code_1(call, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "window_of_readme.py").write_text(code)
    (tmp_path / "window_too_wide.py").write_text(code.replace("<= self.args.reach", "<= 3 * self.args.reach"))
    monkeypatch.syspath_prepend(tmp_path)
    words = ("sam=false", "heads=2", "reach=2")
    status, out, _ = call("check", "window_of_readme:Window", *words)
    assert status == 0 and " 0 fail" in out and "pass  structure: constant diagonals" in out
    status, out, _ = call("check", "window_too_wide:Window", *words)
    assert status == 1 and re.search(r"fail  state +6 ", out)


def of_padding(cls):
    return padding(subject_of(cls, Declared(True, 2), full=False))


def test_padding_that_only_bf16_lets_through_is_found():
    assert of_padding(edges.RightMask).verdict == "pass"
    found = of_padding(edges.FiniteMaskInBf16)
    assert found.verdict == "fail" and found.note.endswith(": content, bf16")


def test_a_backend_that_is_not_installed_is_skipped_and_refused_by_name(monkeypatch):
    def absent(grant):
        raise NotInstalled("no package")

    declared = Declared(True, HEADS, backends=(("fast", absent),))
    (row,) = backends(subject_of(wrong.Waves, declared, full=False, device="cuda"))
    assert (row.property, row.verdict, row.note) == ("backend fast", "skip", "no package")
    monkeypatch.setattr(quasiseparable, "mamba_scan", functools.partial(absent, None))
    assert of("quasiseparable", {"sam": True}, make_where({"where.device": "cuda"}))
    with pytest.raises(NotInstalled):
        of("quasiseparable", {"sam": True}, make_where({"where.device": "cuda", "where.backend": "mamba_ssm"}))


def test_json_has_the_rows_of_the_table(call):
    status, out, _ = call("check", "identity", "--json", "heads=2")
    (rows,) = json.loads(out).values()
    assert status == 0 and {row["verdict"] for row in rows} == {"pass", "skip"}
    assert {"property", "figure", "verdict", "note"} == set(rows[0])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing"], "unknown mixer 'nothing'; known: all, add, attention"),
        (["identity", "sam=true"], "mixer 'identity' has no form with sam=true; it has: sam=false"),
        (["identity", "sam=misaligned"], "mixer 'identity' has no form with sam=misaligned; it has: sam=false"),
        (["low_rank", "sam=misalignd"], "no form with sam=misalignd; it has: sam=false, sam=true, sam=misaligned"),
        (["identity", "heads=0"], "mixer 'identity' does not allow heads=0"),
        (["identity", "head=2"], "unknown key 'mixer.head'; allowed: sam, heads"),
        (["all", "heads=2"], "check all takes no keys of a mixer, got: heads"),
        (["identity", "where.threads=2"], "check does not take where.threads; allowed: where.device, where.backend"),
        (["identity", "where.backend=cublas"], "where.backend must be one of auto, torch, triton, mamba_ssm"),
        (["identity", "where.backend=mamba_ssm"], "where.backend=mamba_ssm needs a CUDA device; on cpu use: torch"),
        (["bench.nowhere:Mixer"], "cannot import 'bench.nowhere'"),
        ([":"], "'' is no name of a module; wanted: package.module:Class"),
        (["..:Mixer"], "'..' is no name of a module"),
        (["bench.mixers.base:Mixer", "sam=true"], "bench.mixers.base.Mixer must set Args, levels"),
        (["bench.config:Run"], "'Run' of bench.config is not a class of mixers"),
    ],
)
def test_what_cannot_be_checked_is_refused_with_exit_code_2(call, words, said):
    status, out, err = call("check", *words)
    assert (status, out) == (2, "") and said in err


def test_tables_of_its_json_show_what_fails_and_what_was_skipped(call, tmp_path, monkeypatch, capsys):
    _, out, _ = call("check", "identity", "--json")
    found = json.loads(out)
    (rows,) = found.values()
    rows[0] |= {"verdict": "fail", "figure": 0.25}
    rows[1] |= {"verdict": "skip", "figure": None}
    (tmp_path / "check.json").write_text(json.dumps(found))
    monkeypatch.setattr(sys, "argv", ["check_tables.py", str(tmp_path / "check.json")])
    check_tables.main()
    said = capsys.readouterr().out
    assert "1 fail, " in said and f"| {rows[0]['property']} | **0.25** |" in said
    assert f"| {rows[1]['property']} | - |" in said and "| property | sam=false |" in said
