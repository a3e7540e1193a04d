"""`mixerbench show`: what is drawn is what the shell applies, files repeat bit for bit, a wrong input is one line."""

import dataclasses
import json
import math
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from bench import Refusal, cli, recorded, registry
from bench.compose import make_run, make_where, parse_run
from bench.config import resolved
from bench.report import matrices
from bench.report.matrices import Matrices, draw, load, save
from bench.run import build, execute
from bench.show import Wanted, materialise, show
from bench.store import Store
from tests.conftest import built
from tests.test_store import a_record, content
from tests.test_sweep import chain

__all__ = ["chain"]  # a fixture

TINY = {"protocol.backbone.layers": 2, "protocol.budget.steps": 8, "protocol.shell.gain": 0.5, "mixer.sam": True}
WORDS = ["protocol=quick_recall", "mixer=low_rank", *(f"{key}={str(value).lower()}" for key, value in TINY.items())]
PLAIN = Wanted(part="", example=0, source=None, layers=None, heads=None, fresh=False, with_skip=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(the run, its words, its store) of eight steps of recall in two layers, with calibrated scales."""
    root = tmp_path_factory.mktemp("trained") / "results"
    run = make_run("quick_recall", "low_rank", TINY, 0, 0)
    where = make_where({"where.results": str(root), "where.device": "cpu"})
    assert execute(run, where, lambda: False).outcome == "ok"
    return run, [*WORDS, f"where.results={root}"], Store(root)


def shown(words, out: Path, **changes) -> Matrices:
    path, *figures = show(words, dataclasses.replace(PLAIN, **changes), out)
    assert path.suffix == ".npz" and [f.suffix for f in figures[:2]] == [".png", ".pdf"]
    assert all(f.stat().st_size for f in figures)
    return load(path)


def made(layers: int = 1, heads: int = 2, length: int = 6, names=(), **about) -> Matrices:
    """A file's contents with random matrices."""
    m_NHLL = np.random.default_rng(0).standard_normal((layers, heads, length, length))
    known = {"id": "0" * 12, "label": "p", "mixer": "m", "sam": True, "seed": 0, "trained": True, "input": "x"}
    every = np.array(names or [""] * length)
    return Matrices(
        m_NHLL, np.arange(layers), np.arange(heads), np.ones(length, int), every, known | {"skip": True} | about
    )


def refusal(call, *arguments) -> str:
    with pytest.raises(Refusal) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is shown ------------------------------------------------------------------------------------------------------


def test_the_file_holds_what_the_shell_applies_to_that_input(trained, tmp_path):
    """Each layer's output, computed with the file's matrix in place of the mixer, is the layer's output."""
    run, words, store = trained
    found = shown(words, tmp_path, example=70)
    where = make_where({"where.results": str(store.root)})
    ready = build(run, where, "cpu")
    ready.model.load_state_dict(torch.load(store.weights(run.id), weights_only=True))
    model = ready.model.double().eval()
    batch = {k: v[70:71] for k, v in next(ready.task.held_out_batches("held_out", 512)).items()}
    x_BLD = model.embedding(batch)
    for layer, m_HLL in zip(model.layers, torch.from_numpy(found.m_NHLL), strict=True):
        shell, inner_BLD = layer.shell, layer.norm(x_BLD)
        z_BLC, v_BLHP, _ = shell.mixer_inputs(inner_BLD, batch["segments"])
        y_BLHP = torch.einsum("hij,bjhp->bihp", m_HLL, v_BLHP) + v_BLHP
        again_BLD = shell.out(shell.norm(y_BLHP.flatten(-2)) * F.silu(z_BLC))
        torch.testing.assert_close(again_BLD, shell(inner_BLD, batch["segments"]), rtol=1e-9, atol=1e-12)
        assert float(shell.scale) != 1
        x_BLD, _ = layer(x_BLD, batch["segments"])
    about = found.about
    assert about["run"] == json.loads(json.dumps(resolved(run))) and about["id"] == run.id and about["trained"]
    heads = found.m_NHLL.shape[1]
    assert about["scales"] == [[float(layer.shell.scale)] * heads for layer in model.layers] and about["item"] == 70
    keys = run.protocol.task.args["keys"]
    symbols = ["·" if t == 0 else f"k{t}" if t <= keys else f"v{t - keys}" for t in batch["tokens"][0].tolist()]
    assert found.names_L.tolist() == symbols


def test_fresh_is_the_start_of_training(trained, tmp_path):
    """The scales are those of the trained run, which training leaves alone; the matrices are others."""
    _, words, _ = trained
    after, before = shown(words, tmp_path), shown(words, tmp_path, fresh=True)
    assert before.about["scales"] == after.about["scales"] and not before.about["trained"]
    assert not np.allclose(before.m_NHLL, after.m_NHLL)
    assert "before training" in matrices.title(before.about)


def test_an_id_means_the_same_as_the_words_and_files_repeat_bit_for_bit(trained, tmp_path):
    run, words, store = trained
    for folder, given in (("a", words), ("b", words), ("c", [run.id, f"where.results={store.root}"])):
        shown(given, tmp_path / folder, layers=[1], heads=[2, 0])
    a, b, c = (content(tmp_path / name) for name in "abc")
    assert a == b == c and set(a) == {"held_out_0.npz", "held_out_0.png", "held_out_0.pdf"}
    found = load(tmp_path / "a" / "held_out_0.npz")
    assert found.layers_N.tolist() == [1] and found.heads_H.tolist() == [2, 0]
    whole = shown(words, tmp_path / "d")
    assert np.array_equal(whole.part([1], [2, 0]).m_NHLL, found.m_NHLL)


def test_the_start_of_an_id_is_enough_if_it_is_one_records_only(trained, tmp_path):
    run, _, store = trained
    where = f"where.results={store.root}"
    assert shown([run.id[:4], where], tmp_path / "a").about["id"] == run.id
    other = Store(tmp_path / "two")
    for seed in range(2):
        other.finish(a_record(seed), {})
    assert recorded.id_of(other, a_record(1).id[:6]) == a_record(1).id
    message = refusal(recorded.id_of, other, "")
    assert "2 records under" in message and all(a_record(seed).id in message for seed in range(2))


def test_a_sequence_of_ones_own(trained, tmp_path):
    """An example's own arrays, shorter by its last tokens, give the example; a filler less is another sequence."""
    run, words, store = trained
    task = build(run, make_where({"where.results": str(store.root)}), "cpu").task
    batch = {k: v.numpy()[4:5] for k, v in next(task.held_out_batches("held_out", 8)).items()}
    np.savez(tmp_path / "whole.npz", **batch)
    tokens = batch["tokens"][0]
    np.savez(tmp_path / "cut.npz", tokens=tokens[:9].astype(np.int32), segments=np.r_[[1] * 8, 0].astype(np.uint8))
    example, whole = shown(words, tmp_path, example=4), shown(words, tmp_path, source=tmp_path / "whole.npz")
    assert np.array_equal(example.m_NHLL, whole.m_NHLL) and whole.about["input"] == "input whole.npz"
    assert shown(words, tmp_path, source=tmp_path / "cut.npz").m_NHLL.shape == (2, 4, 8, 8)


@pytest.mark.parametrize("packed", [False, True])
def test_only_real_tokens_are_shown_and_documents_stay_apart(packed):
    changes = {"protocol.task.packed": packed, "protocol.backbone.layers": 1, "protocol.backbone.width": 32}
    model, task = built(make_run("mini_mlm", "attention", changes | {"protocol.budget.batch": 4}, 0, 0))
    batch = {k: v[1:2] for k, v in task.example(4).items()}
    found = materialise(model.double().eval(), batch, None, [0])
    segments = batch["segments"][0].numpy()
    assert 0 in segments and found.segments_L.tolist() == segments[segments > 0].tolist()
    apart = found.segments_L[:, None] != found.segments_L
    assert apart.any() == packed and (found.m_NHLL[..., apart] == 0).all()
    np.testing.assert_allclose(found.m_NHLL.sum(-1), 1, rtol=1e-12)


def test_a_mixer_without_a_matrix_and_one_that_is_not_its_matrix_are_refused(monkeypatch):
    model, task = built(make_run("quick_recall", "low_rank", TINY, 0, 0))
    batch = {k: v[:1] for k, v in task.example(2).items()}
    cls = type(model.layers[0].shell.mixer)
    right = cls.matrix
    monkeypatch.setattr(cls, "matrix", lambda *given: right(*given) * 1.001)
    assert "forward is not its matrix" in refusal(materialise, model.double(), batch, None, None)
    monkeypatch.setattr(cls, "structure", lambda self: ("not linear",))
    assert "not linear in v" in refusal(materialise, model, batch, None, None)


def test_a_layer_of_no_numbers_behind_a_sound_one_is_refused():
    model, task = built(make_run("quick_recall", "low_rank", TINY | {"protocol.backbone.layers": 2}, 0, 0))
    with torch.no_grad():
        model.layers[1].shell.in_zv.weight.fill_(math.nan)
    batch = {k: v[:1] for k, v in task.example(2).items()}
    assert "differ by nan" in refusal(materialise, model.double().eval(), batch, None, None)


@pytest.mark.parametrize("directions", ["concat", "add"])
def test_the_second_direction_is_shown_in_the_order_of_the_row(directions):
    """Its mixer looks back along a reversed document: upwards from the diagonal as it is drawn."""
    changes = {"protocol.shell.directions": directions, "mixer.heads": 2}
    model, task = built(make_run("quick_recall", "semiseparable", changes, 0, 0))
    found = materialise(model.double().eval(), {k: v[:1] for k, v in task.example(1).items()}, None, None)
    assert found.heads_H.tolist() == [0, 1, 2, 3]
    assert not np.triu(found.m_NHLL[:, :2], 1).any() and not np.tril(found.m_NHLL[:, 2:], -1).any()
    assert (abs(found.m_NHLL).max((2, 3)) > 0).all()


def test_patches_are_shown_too(tmp_path):
    words = ["protocol=quick_digits", "mixer=toeplitz", f"where.results={tmp_path / 'results'}"]
    m_NHLL = shown(words, tmp_path, fresh=True, heads=[0]).m_NHLL
    assert np.array_equal(m_NHLL[0, 0, 1:, 1:], m_NHLL[0, 0, :-1, :-1])
    assert not (tmp_path / "results" / "runs").exists()


# What cannot be shown -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": [2]}, "no layer 2; there are: 0, 1"),
        ({"heads": [0, 4]}, "no head 4; there are: 0, 1, 2, 3"),
        ({"heads": [1, 1]}, "twice"),
        ({"example": 512}, "no example 512 in held_out; there are: 0 to 511"),
        ({"example": -1}, "no example -1"),
        ({"part": "test"}, "no held-out set 'test'; there are: held_out"),
        ({"source": Path("nowhere.npz")}, "no such file: nowhere.npz"),
    ],
)
def test_what_is_not_there_is_named_and_nothing_is_written(trained, tmp_path, changes, said):
    assert said in refusal(show, trained[1], dataclasses.replace(PLAIN, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


L = 24
GOOD = {"tokens": np.ones(L, int), "segments": np.ones(L, int)}
BAD = {
    "lacks segments": ({"tokens": np.ones(L, int)}, "lacks the array 'segments'; wanted: tokens, segments"),
    "unknown": (GOOD | {"speakers": np.ones(L)}, "unknown array 'speakers'"),
    "too long": ({k: np.ones(L + 1, int) for k in GOOD}, "25 tokens; allowed: 1 to 24"),
    "lengths differ": (GOOD | {"tokens": np.ones(3, int)}, "tokens has shape (3,); wanted: (24,)"),
    "two examples": (GOOD | {"tokens": np.ones((2, L), int)}, "shape (2, 24)"),
    "fractions": (GOOD | {"tokens": np.ones(L)}, "tokens is float64; wanted: whole numbers"),
    "unknown id": (GOOD | {"tokens": np.full(L, 25)}, "allowed: 0 to 24"),
    "negative id": (GOOD | {"tokens": np.full(L, -1)}, "from -1 to -1"),
    "two documents": (GOOD | {"segments": np.repeat([1, 2], L // 2)}, "segments must be 1, then 0"),
    "padding first": (GOOD | {"segments": np.repeat([0, 1], L // 2)}, "segments must be 1, then 0"),
    "nothing but padding": (GOOD | {"segments": np.zeros(L, int)}, "segments must be 1, then 0"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_a_wrong_input_is_refused(trained, tmp_path, case):
    arrays, said = BAD[case]
    np.savez(tmp_path / "x.npz", **arrays)
    wanted = dataclasses.replace(PLAIN, source=tmp_path / "x.npz")
    assert said in refusal(show, trained[1], wanted, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Trap:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_nothing_in_a_file_is_executed(trained, tmp_path):
    trap = np.array([Trap(tmp_path / "mark")], dtype=object)
    np.savez(tmp_path / "x.npz", **GOOD | {"tokens": trap}, allow_pickle=True)
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Trap(tmp_path / "mark")))
    np.save(tmp_path / "one.npy", np.ones(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    wanted = dataclasses.replace(PLAIN, source=tmp_path / "x.npz")
    assert "without Python objects" in refusal(show, trained[1], wanted, tmp_path / "out")
    assert str(tmp_path / "x.npz") in refusal(load, tmp_path / "x.npz")
    for name in ("text", "pickle", "one"):  # numpy advises to load them unsafely
        assert f"{name}.npz is no .npz" in (message := refusal(load, tmp_path / f"{name}.npz"))
        assert "allow_pickle" not in message
    assert not (tmp_path / "mark").exists()


def test_missing_weights_come_with_the_command_that_trains_them(trained, tmp_path):
    run, words, store = trained
    other = [*WORDS, "seed=5", f"where.results={tmp_path / 'none'}"]
    message = refusal(show, other, PLAIN, tmp_path / "out")
    assert "no weights" in message and "--fresh" in message
    assert parse_run(trains(message))[0].id == parse_run(other)[0].id

    Store(tmp_path / "bare").finish(store.record(run.id), {})
    message = refusal(show, [run.id, f"where.results={tmp_path / 'bare'}", "where.threads=2"], PLAIN, tmp_path / "out")
    again, where = parse_run(trains(message))
    assert again.id == run.id and (where.results, where.threads) == ("retrained", 2) and "has a record" in message

    Store(tmp_path / "bad").finish(dataclasses.replace(store.record(run.id), outcome="diverged", reason="nan"), {})
    assert "diverged: nan" in refusal(show, [run.id, f"where.results={tmp_path / 'bad'}"], PLAIN, tmp_path / "out")
    for start in ("0123456789ab", "zzzz", "/x"):
        message = refusal(show, [start, words[-1]], PLAIN, None)
        assert f"no record {start} under" in message and "show takes an id or its start, an .npz" in message
    assert "'seed=1' beside the id" in refusal(show, [run.id, "seed=1"], PLAIN, None)
    assert not (tmp_path / "out").exists() and not (tmp_path / "none").exists()


def trains(message: str) -> list[str]:
    (command,) = re.findall(r"mixerbench run (.*?);", message)
    return shlex.split(command)


def damaged(path: Path) -> list[bytes]:
    """What torch names by as many classes: EOFError, UnpicklingError, KeyError, OSError, RuntimeError."""
    whole = path.read_bytes()
    return [b"", b"no weights", b"junk\n", whole[: len(whole) // 2], whole[:2000]]


def test_damaged_weights_are_one_line(trained, tmp_path):
    run, _, store = trained
    other = Store(tmp_path / "results")
    other.finish(store.record(run.id), {})
    words = [run.id, f"where.results={other.root}"]
    for text in damaged(store.weights(run.id)):
        other.weights(run.id).write_bytes(text)
        message = refusal(show, words, PLAIN, None)
        assert f"{other.weights(run.id)} is damaged" in message and "restore it" in message
        again, where = parse_run(trains(message))  # deleted and trained again it would be 'in the store already'
        assert again.id == run.id and where.results == "retrained" and "unsafe" not in message
    for wrong in ({"layers.0": torch.ones(1)}, torch.ones(3)):
        torch.save(wrong, other.weights(run.id))
        assert "does not hold the weights of" in refusal(show, words, PLAIN, None)


def test_damaged_weights_of_a_parent_are_one_line_too(chain, tmp_path):
    """`--fresh` starts from them. What is advised trains the parent in another folder."""
    child, store = make_run("child", "identity", {}, 0, 0), Store(tmp_path / "results")
    where = make_where({"where.results": str(store.root), "where.device": "cpu"})
    execute(child.parent, where, lambda: False)
    store.weights(child.parent.id).write_bytes(b"junk\n")
    words = ["protocol=child", "mixer=identity", f"where.results={store.root}"]
    for said in ("is damaged", "which are not here"):
        message = refusal(show, words, dataclasses.replace(PLAIN, fresh=True), tmp_path / "out")
        again, there = parse_run(trains(message))
        assert said in message and again.id == child.id and there.results == "retrained"
        store.weights(child.parent.id).unlink(missing_ok=True)
    assert not (tmp_path / "out").exists()


def test_the_run_of_a_record_is_the_run_and_knows_its_parent(tmp_path, monkeypatch):
    store = Store(tmp_path)
    child = make_run("mini_mrpc", "toeplitz", {}, 0, 1)
    chain = [child]
    while chain[-1].parent:
        chain.append(chain[-1].parent)
    others = [make_run("mini_mrpc", name, {}, seed, 0).parent for name in ("toeplitz", "dft") for seed in range(4)]
    for run in chain + [other for other in others if other.id != chain[1].id]:
        values = {"id": run.id, "label": run.label, "protocol_id": run.protocol_id, "run": resolved(run)}
        store.finish(dataclasses.replace(a_record(0), **json.loads(json.dumps(values))), {})
    again = recorded.run_of(store.record(child.id), store, True)
    assert again == child and again.parent == child.parent and again.parent.id == chain[1].id
    assert parse_run(recorded.words_of(again))[0] == child

    values = json.loads(json.dumps(resolved(child)))
    del values["protocol"]["shell"]["skip"], values["mixer"]["heads"], values["protocol"]["task"]["length"]
    young = {"protocol.shell.skip": True, "mixer.heads": 4, "mixer.rank": 2, "protocol.task.length": 7}
    monkeypatch.setattr(recorded, "NEUTRAL", young)
    filled = recorded.filled(values)
    assert filled["protocol"]["shell"]["skip"] is True and filled["protocol"]["task"]["length"] == 7
    assert filled["mixer"]["heads"] == 4 and "rank" not in filled["mixer"]  # toeplitz has none


# The figure ---------------------------------------------------------------------------------------------------------


def test_the_file_keeps_all_that_the_picture_says(tmp_path):
    one = made(2, 3, names=("a", "b", "é", "[MASK]", "$x$", "字"))
    save(one, tmp_path / "a.npz")
    again = load(tmp_path / "a.npz")
    assert np.array_equal(again.m_NHLL, one.m_NHLL) and again.names_L.tolist() == one.names_L.tolist()
    assert again.about == one.about and [p.name for p in tmp_path.iterdir()] == ["a.npz"]
    for key, value in (("m_NHLL", one.m_NHLL[:, :1]), ("segments_L", np.ones(5, int)), ("about", np.array("{}"))):
        arrays = {**vars(one), "about": np.array(json.dumps(one.about)), key: value}
        np.savez(tmp_path / "bad.npz", **arrays)
        assert "bad.npz" in refusal(load, tmp_path / "bad.npz")
    np.savez(tmp_path / "bad.npz", **GOOD)
    assert "is no file of matrices" in refusal(load, tmp_path / "bad.npz")


def test_panels_fill_the_width_of_a_page_and_pages_are_even():
    for layers, heads, pages in ((1, 1, 1), (6, 4, 1), (12, 12, 4), (24, 16, 6)):
        one = made(layers, heads, 4)
        sizes = matrices.grid(one)
        width = sizes.left + sizes.across * (sizes.panel + matrices.BESIDE) + matrices.BAR
        assert width <= matrices.WIDTH + 1e-9
        assert sizes.down * (sizes.panel + matrices.ABOVE) <= matrices.TALL + 1e-9
        shapes = [page.m_NHLL.shape[:2] for page in matrices.dealt(one, sizes)]
        assert len(shapes) == pages and len(set(shapes)) == 1, shapes
    assert matrices.grid(made(1, 4, 24, names=["k1"] * 24)).points > 3.5
    assert matrices.grid(made(1, 4, 128, names=["k1"] * 128)).points == 0  # not to be read
    assert matrices.grid(made(1, 1, 64, names=["k1"] * 64)).points > 3.5  # one panel may grow for its names


def test_colours_are_not_those_of_the_diagonal():
    m_HLL = np.full((1, 50, 50), 0.01) + np.eye(50) * 100
    assert matrices.limit(m_HLL) == 0.01
    assert matrices.limit(np.eye(50)[None] * 3 + 1e-12) == 3 + 1e-12
    assert matrices.limit(np.zeros((1, 50, 50))) == 1


def test_pages_of_an_earlier_figure_go_and_too_many_are_refused(tmp_path):
    written = draw(made(2, 9, 4), tmp_path / "x", False)
    assert [p.name for p in written] == ["x.png", "x.pdf", "x.page2.png", "x.page2.pdf"]
    (tmp_path / "y.page2.png").touch()
    assert [p.name for p in draw(made(), tmp_path / "x", False)] == ["x.png", "x.pdf"]
    assert {p.name for p in tmp_path.iterdir()} == {"x.png", "x.pdf", "y.page2.png"}
    message = refusal(draw, made(100, 32, 2), tmp_path / "z", False)
    assert "100 layers x 32 heads" in message and "--layers" in message and not (tmp_path / "z.png").exists()
    (tmp_path / "file").touch()
    assert "--out" in refusal(draw, made(), tmp_path / "file" / "x", False)


def test_the_skip_is_drawn_only_where_there_is_one(tmp_path):
    draw(made(), tmp_path / "a", False)
    draw(made(), tmp_path / "b", True)
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    assert "left out" in matrices.caption(made(), False) and "with the shell's skip" in matrices.caption(made(), True)
    assert "skip" not in matrices.caption(made(skip=False), False)
    assert "no skip" in refusal(draw, made(skip=False), tmp_path / "c", True)


def test_any_text_can_stand_at_the_ticks(tmp_path):
    """Names with mathematics, line ends and letters that the font lacks are drawn without a warning."""
    names = ["$x$", "a\nb", "字", "$\\no{$", "a-very-long-token", "\\alpha"]
    draw(made(names=names), tmp_path / "x", False)
    assert [matrices.drawable(n) for n in names[1:3]] == ["a□b", "□"] and matrices.drawable(names[4]) == "a-very-long…"


def test_nothing_written_on_a_page_is_cut_off():
    """Every text lies inside the page, whatever the run is called and however few panels there are."""
    label = "mini_mlm[" + ",".join(f"backbone.some_key={n}" for n in range(12)) + "]"
    for one in (made(label=label), made(1, 1, 24, names=["[MASK]" * 3] * 24), made(3, 8, 200, sam="misaligned")):
        figure = Figure()
        matrices.compose(figure, one, matrices.grid(one), {n: 1.0 for n in range(3)}, False)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        page = figure.bbox
        for text in figure.findobj(Text):
            box = text.get_window_extent(canvas.get_renderer())
            assert not text.get_text() or (box.x0 >= 0 and box.x1 <= page.x1 and box.y0 >= 0 and box.y1 <= page.y1), (
                text
            )


def test_a_file_is_drawn_again_without_torch(trained, tmp_path):
    shown(trained[1], tmp_path / "a")
    again = ["show", str(tmp_path / "a" / "held_out_0.npz"), "--out", str(tmp_path / "b")]
    code = "import sys; from bench import cli; sys.argv = ['mixerbench', *sys.argv[1:]]; assert cli.main() == 0\n"
    code += "print('torch' in sys.modules, 'hydra' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *again], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False False\n")
    for name in ("held_out_0.png", "held_out_0.pdf"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_verb(trained, tmp_path, monkeypatch, capsys):
    run, words, store = trained

    def call(*given) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mixerbench", "show", *map(str, given)])
        return cli.main(), *capsys.readouterr()

    code, out, err = call(*words, "--layers", "1", "--heads", "0,2", "--example", "3", "--with-skip")
    folder = store.root / "show" / run.id
    assert (code, err) == (0, "") and out.split() == [
        str(folder / f"held_out_3-skip.{s}") for s in ("npz", "png", "pdf")
    ]
    picture = folder / "held_out_3-skip.png"
    first = picture.read_bytes()
    picture.unlink()
    assert (
        call(folder / "held_out_3-skip.npz")[0] == 0 and picture.read_bytes() == first
    )  # with the skip, as its name says
    assert not (folder / "held_out_3.png").exists()
    for wrong in ([*words, "--layers", "7"], [folder / "held_out_3-skip.npz", "--fresh"], [tmp_path / "no.npz"]):
        code, out, err = call(*wrong)
        assert code == 2 and err.count("\n") == 1 and err.startswith("mixerbench: ") and out == ""
    for wrong in (["--layers", "one"], ["--example", "1", "--input", "x.npz"]):
        with pytest.raises(SystemExit) as caught:
            call(*words, *wrong)
        assert caught.value.code == 2


def test_ids_of_text_have_their_pieces_as_names(tmp_path):
    from bench.tasks.text import WordPiece

    pieces = object.__new__(WordPiece)
    pieces.words = ["[PAD]", "a", "##b"]
    for name in ("masked_lm", "glue"):
        task = object.__new__(registry.task_class(name))
        task.pieces = pieces
        assert task.words(np.array([2, 0])) == ["##b", "[PAD]"]


@pytest.mark.parametrize("with_skip", [False, True])
def test_the_skip_adds_to_the_diagonal_only(with_skip):
    assert np.array_equal(matrices.shown(np.zeros((2, 3, 3)), with_skip), [with_skip * np.eye(3)] * 2)
