"""Speed: turns are fair, outcomes are rows, figures follow from samples, and what is timed is what trains."""

import copy
import dataclasses
import json
import math
import statistics
import sys
import time
from functools import partial

import pytest
import torch

from bench import Refusal, cli
from bench.compose import choices, make_run
from bench.report import speed as report
from bench.speed import clock, figures, layer, naive, rounds, settings, verb
from bench.speed.rounds import LayerCell, Timed, measure, share
from bench.speed.settings import Entry

USUAL = settings.defaults()
TINY = dataclasses.replace(
    USUAL,
    rounds=2,
    warm=1,
    most=2,
    devices={
        name: dataclasses.replace(here, copy=2**12, matrix=16, seconds=0.001) for name, here in USUAL.devices.items()
    },
)
NARROW = "protocol.backbone.width=24"
SMALL = ["--lengths", "8,16", "--tokens", "32", NARROW, "where.device=cpu"]
QUICK = ["protocol.budget.batch=2", "protocol.backbone.layers=1", "--steps", "17", "where.device=cpu"]
PLAIN = settings.Settings(
    protocol="p", device="cpu", threads=1, compiled=False, backend="auto", precision="fp32", width=24, inner=48,
    lengths=(8,), tokens=32, batch=0, ways=("fast",), segments="full", seconds=1.0, rounds=3, warm=1, most=4,
    copy=64, matrix=4, training=None,
)  # fmt: skip


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """(exit code, stdout, stderr) of `mixerbench speed`, on tiny ceilings, without data."""
    monkeypatch.delenv("MIXERBENCH_DATA", raising=False)
    monkeypatch.setattr(settings, "defaults", lambda: TINY)

    def called(*words) -> tuple[int, str, str]:
        words = [*map(str, words), *(() if "--out" in words else ("--out", str(tmp_path / "out")))]
        monkeypatch.setattr(sys, "argv", ["mixerbench", "speed", *words])
        capsys.readouterr()
        return cli.main(), *capsys.readouterr()

    return called


@pytest.fixture
def undrawn(monkeypatch):
    """No figures: they are what takes long."""
    monkeypatch.setattr(report, "draw", lambda result, paths: None)


# Figures ------------------------------------------------------------------------------------------------------------


def test_the_exponent_of_a_power_law_is_its_power():
    for power in (0.5, 1.0, 1.7, 2.0):
        assert math.isclose(figures.exponent((n, 3e-4 * n**power) for n in (128, 512, 2048, 8192)), power)
    assert figures.exponent([(128, 1.0)]) is None and figures.exponent([]) is None
    assert figures.exponent([(128, 0.0), (256, 1.0)]) is None


def test_growth_is_of_one_sequence_whatever_the_batch():
    """16,384 tokens a step at every length: a time that does not change is a linear mixer."""
    row = {"arm": "a", "way": "fast", "outcome": "ok", "peak_memory": 7}
    rows = [row | {"length": n, "batch": 16384 // n, "seconds": {"median": 0.002}} for n in (128, 1024, 8192)]
    (found,) = figures.growth([*rows, row | {"outcome": "oom", "length": 16384}])
    assert math.isclose(found["time"], 1) and math.isclose(found["memory"], 1) and found["lengths"] == [128, 1024, 8192]


def test_an_arm_that_was_not_begun_at_some_length_keeps_its_one_line():
    """What was not begun has neither times nor a state: the speed.json of a call that was cut short."""
    shared = {"arm": "a", "way": "fast", "backend": "torch"}
    rows = [shared | {"length": 128, "outcome": "ok", "state": 256}, shared | {"length": 512, "outcome": "skipped"}]
    found = report.across({"rows": rows}, lambda row: "1.0", "Layer", {("a", "fast"): {"time": 1.0}}, "time")
    assert found.lines == [["a", "fast", "torch", "1.0", "skipped", "1.00", "256"]]


def test_speed_ups_are_ratios_of_the_same_rounds():
    """Everything twice as slow in the second round is no spread of the ratio."""
    assert figures.ratios([[8.0, 8.0], [16.0]], [[2.0, 2.0], [4.0]]) == {"q1": 4, "median": 4, "q3": 4, "n": 2}
    assert figures.ratios([[8.0]], []) == {}
    spread = figures.spread([4.0, 1.0, 2.0, 3.0, 5.0])
    assert spread == {"q1": 2, "median": 3, "q3": 4, "n": 5}


def test_the_roofline_is_flops_over_rate_plus_bytes_over_bandwidth():
    ceilings = {"matrix": figures.ceiling(100, [[1.0, 1.0]]), "copy": figures.ceiling(10, [[1.0]])}
    assert figures.roofline(50, 20, ceilings) == 0.5 + 2.0
    assert figures.roofline(50, 20, {"copy": ceilings["copy"]}) is None
    row = {"outcome": "ok", "turns": [[5.0]], "estimate": 9.0, "host": [4.9], "flops": 50, "traffic": 20}
    found = figures.derived(row | {"way": "fast"}, None, ceilings)
    assert found["share"] == 0.5 and found["host_bound"] and found["seconds"]["n"] == 1
    early = figures.derived(row | {"way": "fast", "turns": [], "host": []}, None, ceilings)
    assert early["seconds"]["median"] == 9.0 and early["seconds"]["n"] == 0


# Turns and outcomes -------------------------------------------------------------------------------------------------


class Fake(Timed):
    """A cell that writes down its turns; `fails` is raised in the part of that name."""

    def __init__(self, label: str, log: list, seconds: float = 0.01, fails: dict | None = None):
        super().__init__(label, PLAIN)
        self.log, self.seconds, self.fails = log, seconds, fails or {}

    def prepare(self) -> None:
        self.log.append(f"prepare {self.label}")
        if "prepare" in self.fails:
            raise self.fails["prepare"]
        self.result.outcome, self.result.estimate = "ok", self.seconds

    def turn(self) -> None:
        self.log.append(self.label)
        if "turn" in self.fails:
            raise self.fails["turn"]

    def drop(self) -> None:
        self.log.append(f"drop {self.label}")


def test_arms_take_turns_and_every_second_round_goes_backwards():
    log, saved = [], []
    cells = [Fake("a", log), Fake("b", log), Fake("slow", log, seconds=9.0)]
    measure(cells, PLAIN, float("inf"), lambda cell, number: saved.append(cell.label if cell else number))
    turns = [entry for entry in log if " " not in entry]
    assert turns == ["a", "b", "slow", "b", "a", "a", "b"]
    assert saved == ["a", "b", "slow", 1, 2, 3]
    assert [cell.result.outcome for cell in cells] == ["ok"] * 3 and log[-3:] == ["drop a", "drop b", "drop slow"]


def test_memory_and_faults_are_outcomes_of_their_cells_only():
    log = []
    cells = [
        Fake("a", log, fails={"prepare": torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate 2 GiB")}),
        Fake("b", log, fails={"turn": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")}),
        Fake("c", log, fails={"prepare": ValueError("no such kernel")}),
        Fake("d", log),
    ]
    measure(cells, PLAIN, float("inf"), lambda cell, number: None)
    assert [cell.result.outcome for cell in cells] == ["oom", "oom", "error", "ok"]
    assert cells[0].result.reason == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert cells[2].result.reason == "ValueError: no such kernel"
    assert log.count("d") == 3 and log.count("b") == 1 and log.index("drop a") < log.index("prepare b")
    with pytest.raises(Refusal):
        measure([Fake("e", log, fails={"prepare": Refusal("wrong word")})], PLAIN, 0.0 + math.inf, lambda *_: None)


def test_what_finds_no_memory_beside_the_others_is_measured_after_them_by_itself():
    log, saved = [], []

    class Large(Fake):
        """Fits if all others have let go of their memory."""

        def prepare(self) -> None:
            if log.count("drop a") == 0:
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().prepare()

    never = {"prepare": torch.OutOfMemoryError("CUDA out of memory")}
    cells = [Large("early", log), Fake("a", log), Large("large", log), Fake("never", log, fails=never)]
    measure(cells, PLAIN, math.inf, lambda cell, number: saved.append(cell.label if cell else number))
    assert [c.result.outcome for c in cells] == ["oom", "ok", "ok", "oom"]
    assert [c.result.reason == rounds.ALONE for c in cells] == [False, False, True, False]
    assert log[log.index("prepare large") :][:5] == ["prepare large", "large", "large", "large", "drop large"]
    assert saved == ["early", "a", "large", "never", 1, 2, 3, "large", "never"]  # 'early' was alone as it was


def test_what_waited_for_memory_until_the_time_was_up_is_skipped(monkeypatch):
    log, until = [], time.time() + 60
    never = {"prepare": torch.OutOfMemoryError("CUDA out of memory")}
    cells = [Fake("a", log), Fake("large", log, fails=never)]
    monkeypatch.setattr(time, "time", lambda: until + ("drop a" in log))
    measure(cells, PLAIN, until, lambda cell, number: None)
    assert [cell.result.outcome for cell in cells] == ["ok", "skipped"]


def test_what_was_not_begun_in_time_is_skipped():
    cells = [Fake("a", []), Fake("b", [])]
    measure(cells, PLAIN, time.time() - 1, lambda cell, number: None)
    assert [cell.result.outcome for cell in cells] == ["skipped"] * 2 and cells[0].log == ["drop a"]


def test_a_training_whose_turn_never_came_has_no_figure(monkeypatch):
    """The time is up after the first cell's turn: the others were ready, but only a layer's step was timed before."""

    class Unprepared(Fake):
        def known(self) -> bool:
            return self.label in self.log

    log, until = [], time.time() + 60
    cells = [Unprepared("a", log), Unprepared("b", log), Fake("layer", log)]
    monkeypatch.setattr(time, "time", lambda: until + ("a" in log))
    measure(cells, PLAIN, until, lambda cell, number: None)
    assert [cell.result.outcome for cell in cells] == ["ok", "skipped", "ok"]


def test_seconds_are_shared_out_over_the_rounds():
    assert share(0.01, PLAIN) == (3, 4)  # `most` steps of each turn
    assert share(0.2, PLAIN) == (3, 1) and share(0.9, PLAIN) == (3, 1) and share(1.1, PLAIN) == (1, 1)
    assert share(0.1, dataclasses.replace(PLAIN, rounds=2)) == (2, 4)


def test_torch_says_that_memory_ran_out_in_words_that_are_known():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50, dtype=torch.uint8)
    assert clock.is_shortage(raised.value) and clock.is_shortage(MemoryError())
    assert not clock.is_shortage(RuntimeError("shapes differ")) and not clock.is_shortage(ValueError("out of memory"))


def cell_of(way: str, length: int, shorter: LayerCell | None, **changes) -> LayerCell:
    run = make_run("quick_recall", "low_rank", {"protocol.backbone.width": 24, "mixer.heads": 4}, 0, 0)
    entry = Entry("low_rank", run.mixer.args, ("sam", "heads"), run, "")
    return LayerCell(entry, way, length, dataclasses.replace(PLAIN, **changes), "torch", shorter)


def test_matrices_that_cannot_fit_are_not_tried(monkeypatch):
    small, large = cell_of("naive", 8, None), cell_of("naive", 32, None)
    small.prepare()
    assert small.result.outcome == "ok"
    matrices = 2 * 4 * 1 * 4 * 32**2  # M and its gradient, fp32, batch 1, 4 heads
    monkeypatch.setattr(clock, "free", lambda device: matrices)
    large.prepare()
    assert large.result.outcome == "oom" and "not tried" in large.result.reason and large.step is None
    # What the shorter length needed grows with B L^2: 4 x 8^2 then, 1 x 32^2 now.
    small.result.peak_memory = 10**9
    carried = cell_of("naive", 32, small)
    carried.counts = large.counts
    assert carried.least_memory() == 4 * 10**9


# What is timed ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def entries() -> list[Entry]:
    """Every arm of speed.yaml, at width 48."""
    arms = settings.arms_of([], True, {}, USUAL)
    return settings.entries_of("quick_recall", {"protocol.backbone.width": 48}, arms, strict=True)


def test_every_shipped_mixer_has_an_arm_and_no_two_are_equal(entries):
    assert {entry.name for entry in entries} >= set(choices("mixer")) - {"window"}
    assert len({entry.label for entry in entries}) == len(entries) == len(USUAL.arms) + len(USUAL.further)


@pytest.mark.parametrize("segments", settings.SEGMENTS)
def test_naive_is_the_same_layer(entries, segments):
    """The values and the gradients of the input that the fast form gives, in fp32."""
    for entry in entries:
        fast = layer.subject_of(entry.run, 16, 4, segments, layer.registry.mixer_class(entry.name).backends[0], "cpu")
        slow = copy.deepcopy(fast)
        layer.prepare(slow, "naive", compiled=False)
        outputs = []
        for subject in (fast, slow):
            outputs.append(subject.outputs()[0].detach())
            subject.step()
        real_BL1, why = fast.segments_BL[..., None] > 0, partial("{}: {}".format, entry.label)
        torch.testing.assert_close(outputs[0] * real_BL1, outputs[1] * real_BL1, msg=why)
        torch.testing.assert_close(fast.x_BLD.grad, slow.x_BLD.grad, rtol=1e-3, atol=1e-4)


def test_both_forms_run_under_autocast_as_on_a_gpu(entries):
    """bf16: forward, backward, a gradient for every parameter."""
    for entry in entries:
        run = dataclasses.replace(entry.run, protocol=dataclasses.replace(entry.run.protocol, precision="bf16"))
        for way in ("fast", "naive"):
            subject = layer.subject_of(run, 16, 2, "full", layer.registry.mixer_class(entry.name).backends[0], "cpu")
            layer.prepare(subject, way, compiled=False)
            subject.step()
            assert all(p.grad is not None for p in subject.layer.parameters()), (entry.label, way)
            assert subject.x_BLD.grad.isfinite().all(), (entry.label, way)


def test_the_layer_is_the_first_one_of_training():
    from tests.conftest import built

    run = make_run("quick_recall", "low_rank", {"mixer.heads": 4}, 0, 0)
    model, _ = built(run)
    subject = layer.subject_of(run, 16, 1, "full", "torch", "cpu")
    theirs = model.layers[0].state_dict()
    assert theirs.keys() == subject.layer.state_dict().keys()
    assert all(torch.equal(value, theirs[name]) for name, value in subject.layer.state_dict().items())


def test_rows_are_full_padded_or_packed():
    assert layer.rows_of("full", 2, 4).tolist() == [[1] * 4] * 2
    assert layer.rows_of("packed", 1, 8).tolist() == [[1, 1, 2, 2, 3, 3, 4, 4]]
    assert layer.rows_of("padded", 5, 12).sum(1).tolist() == [12, 10, 8, 6, 12]


def test_counts_are_those_of_the_formulas():
    """A layer without a mixer: 6 FLOPs a parameter of its two maps and token; bytes by hand from the stages."""
    run = make_run("quick_recall", "identity", {"protocol.backbone.width": 24, "mixer.heads": 4}, 0, 0)
    inner, width, tokens = run.protocol.inner, 24, 32
    counts = layer.counts_of(run, 8, 4, "full")
    assert counts.flops == 6 * tokens * (width * 2 * inner + inner * width) and counts.mixer_parameters == 0
    numbers = (width + 2 * inner) + 2 * inner + 2 * inner + 4 * inner + (inner + width)
    assert counts.traffic == 3 * tokens * (4 * numbers + 4 * 3 * width) + 12 * counts.parameters
    assert counts.state == 0 and naive.least_bytes(2, 3, 5) == 8 * 2 * 3 * 25


# The verb -----------------------------------------------------------------------------------------------------------


def test_a_call_leaves_every_row_complete_and_all_of_it_again_from_the_json(call, tmp_path, monkeypatch):
    code, out, err = call("low_rank", "identity", *SMALL)
    assert code == 0 and "[12/12]" in err and "round 2 of 2" in err
    folder = tmp_path / "out"
    result = json.loads((folder / "speed.json").read_text())
    rows = result["rows"]
    found = {(row["arm"], row["way"], row["length"]) for row in rows}
    arms = ["low_rank sam=true heads=12 rank=16", "low_rank sam=false heads=12 rank=16", "identity sam=false heads=12"]
    assert found == {(arm, way, length) for arm in arms for way in ("fast", "naive") for length in (8, 16)}
    for row in rows:
        assert row["outcome"] == "ok" and row["batch"] * row["length"] == 32 and row["seconds"]["n"] >= 1
        assert row["first"] > 0 and row["roofline"] > 0 and row["share"] > 0 and row["parameters"] > 0
        assert bool(row["speedup"]) == (row["way"] == "fast") and row["backend"] in ("torch", "matrix")
        assert sum(map(len, row["turns"])) == row["seconds"]["n"]
    assert {g["way"] for g in result["growth"]} == {"fast", "naive"} and len(result["growth"]) == 6
    assert result["settings"]["precision"] == "fp32" and result["environment"]["torch"] == torch.__version__
    assert set(result["ceilings"]) == {"copy", "matrix"} and "L=16" in out and "Times as fast" in out
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(written) == {"speed.json", "speed.md", "speed.png", "speed.pdf"}
    again = tmp_path / "a" / "b"
    assert call(folder / "speed.json", "--out", again)[0] == 0
    assert all((again / name).read_bytes() == written[name] for name in ("speed.md", "speed.png", "speed.pdf"))
    code, _, err = call("identity", *SMALL)
    assert code == 2 and "is there already" in err


def test_a_call_that_is_cut_short_leaves_what_it_knows(call, tmp_path, monkeypatch):
    told = []

    def cut(text: str) -> None:
        told.append(text)
        if len(told) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(verb, "say", cut)
    assert call("low_rank", *SMALL)[0] == 130
    result = report.load(tmp_path / "out" / "speed.json")
    (row,) = result["rows"]
    assert row["outcome"] == "ok" and row["seconds"]["n"] == 0
    assert "(once)" in report.markdown(report.sections(result))


def test_what_does_not_fit_is_a_row_with_its_reason(call, undrawn, tmp_path, monkeypatch):
    whole = layer.unfit
    wrong = lambda run, length, segments: "no power of 3" if length == 16 else whole(run, length, segments)  # noqa: E731
    monkeypatch.setattr(rounds.layer, "unfit", wrong)
    code, out, _ = call("identity", "--json", *SMALL)
    result = json.loads(out)
    assert code == 0 and [row["outcome"] for row in result["rows"]] == ["ok", "ok", "unfit", "unfit"]
    table = (tmp_path / "out" / "speed.md").read_text()
    assert "unfit: identity sam=false heads=12 fast L=16: no power of 3" in table
    # What a mixer refuses is a row where all arms stand, an error where it was named.
    every = settings.arms_of([], False, {"mixer.sam": True}, USUAL)
    found = settings.entries_of("quick_recall", {"protocol.backbone.width": 24}, every, strict=False)
    refused = [entry for entry in found if entry.run is None]
    assert {entry.name for entry in refused} == {"identity", "dense", "dft"} and "no form with" in refused[0].refused


def test_a_cell_that_fails_is_code_1_and_named(call, undrawn, monkeypatch):
    def broken(subject, way, compiled):
        raise ValueError(f"no {way} kernel")

    monkeypatch.setattr(rounds.layer, "prepare", broken)
    code, out, err = call("identity", *SMALL)
    assert code == 1 and "identity sam=false heads=12 fast: ValueError: no fast kernel" in err and "error" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["speedy"], "unknown mixer 'speedy'; known: "),
        (["low_rank mixer.bank=3"], "unknown key 'mixer.bank'"),
        (["mixer.bank=3"], "unknown key 'mixer.bank'"),
        (["low_rank", "all"], "'all' names every arm; leave out: low_rank"),
        (["low_rank mixer.heads=5"], "mixer.heads=5 does not fit"),
        (["--ways", "fast,quick"], "--ways must be one of fast, eager, graph, naive, got 'quick'"),
        (["--ways", "graph"], "--ways graph needs a CUDA device; on a CPU: fast, eager, naive"),
        (["--segments", "half"], "--segments must be one of full, padded, packed, got 'half'"),
        (["--lengths", "24"], "--lengths 24 do not divide --tokens 32"),
        (["--lengths", "0"], "--lengths must be at least 1"),
        (["--batch", "2"], "--tokens and --batch both set the batch"),
        (["--steps", "2"], "--steps goes with --training"),
        (["where.loaders=2"], "speed does not take where.loaders; allowed: where.device"),
        (["where.backend=magic"], "where.backend must be one of"),
        (["--training", "protocol=quick_recall"], "--tokens are for layers"),
        (["low_rank protocol.backbone.width=12"], "under one protocol"),
    ],
)
def test_a_wrong_word_is_one_line_and_nothing_is_written(call, tmp_path, words, message):
    given = ["identity", "--tokens", "32", NARROW, "where.device=cpu", "--lengths", "8"]
    given = given[1:] if "all" in words or "bank" in words[0] else given
    given = given[:-2] if "--lengths" in words else given
    code, out, err = call(*given, *words)
    assert code == 2 and out == "" and err.count("\n") == 1 and message in err
    assert not (tmp_path / "out" / "speed.json").exists()


def test_files_that_hold_no_measurement_are_refused(call, tmp_path):
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "other.json").write_text('{"kind": "layers"}')
    for name, message in (("bad", "not readable"), ("other", "holds no measurement"), ("none", "no such file")):
        code, _, err = call(tmp_path / f"{name}.json", "--out", tmp_path)
        assert code == 2 and message in err


def test_words_override_the_arms_of_the_yaml():
    arm = settings.parse_arm("quasiseparable mixer.state=8")
    found = settings.arms_of([arm], False, {"mixer.heads": 4, "mixer.rank": 2}, USUAL)
    assert {tuple(sorted(one.changes.items())) for one in found} == {
        (("mixer.heads", 4), ("mixer.sam", sam), ("mixer.state", 8)) for sam in (True, False)
    }
    entries = settings.entries_of("quick_recall", {}, found, strict=True)
    assert [entry.label for entry in entries] == [f"quasiseparable sam={s} heads=4 state=8" for s in ("true", "false")]


def test_trainings_alternate_and_give_tokens_and_examples(call, tmp_path):
    words = ["--training", "protocol=quick_recall", "low_rank mixer.sam=true", "identity", "mixer.heads=4"]
    code, out, err = call(*words, *QUICK)
    assert code == 0, err
    result = json.loads((tmp_path / "out" / "speed.json").read_text())
    assert [row["arm"] for row in result["rows"]] == ["low_rank sam=true heads=4 rank=16", "identity sam=false heads=4"]
    for row in result["rows"]:
        assert len(row["turns"]) == 2 and row["outcome"] == "ok" and row["first"] > 0
        each = [2 / seconds for turn in row["turns"] for seconds in turn]
        assert row["examples"]["median"] == pytest.approx(statistics.median(each))
        assert row["tokens"]["median"] == pytest.approx(24 * row["examples"]["median"])
    assert "tokens/s" in out and (tmp_path / "out" / "speed.png").exists()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own
def test_every_way_on_the_gpu(call, undrawn, tmp_path):
    words = ["low_rank", "identity", "--ways", "fast,eager,graph,naive", "--lengths", "128", "--tokens", "1024"]
    code, _, err = call(*words, "where.device=cuda")
    assert code == 0, err
    rows = json.loads((tmp_path / "out" / "speed.json").read_text())["rows"]
    assert len(rows) == 12
    for row in rows:
        assert row["outcome"] == "ok" and row["host"] and 2**20 < row["peak_memory"] < 2**30, row


@pytest.mark.parametrize("values", [(830, 1050), (830, 890), (100, 5000), (0.2, 40)])
def test_an_axis_says_at_least_two_of_its_values(values):
    from matplotlib.figure import Figure

    from bench.report.speed import axis

    ax = Figure().subplots()
    ax.plot([128, 256], values)
    axis(ax, "peak memory, MiB", [128, 256])
    low, high = ax.get_ylim()
    assert sum(low <= place <= high for place in ax.get_yticks()) >= 2
