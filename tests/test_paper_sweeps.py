"""The sweeps of the paper's other tables: arms are allowed, have the printed parameters, and a golden batch script."""

import dataclasses
from functools import lru_cache

import pytest

from bench import registry, submit
from bench.cluster import load as load_cluster
from bench.compose import ROOT, make_run, make_where
from bench.config import resolved
from bench.report.frame import flattened
from bench.sweep import cells, load
from tests.conftest import built

GOLDEN = ROOT / "tests" / "golden"
SWEEPS = ("table2_paper", "table2_strict", "table3", "table4", "table5", "table10", "attribution")
# (sweep, row): index of the arm, printed millions.
PRINTED = {
    ("table3", "Mamba"): (0, 68),
    ("table3", "Add"): (1, 70),
    ("table3", "Mult"): (2, 70),
    ("table3", "Concat"): (3, 69),
    ("table3", "Quasiseparable"): (4, 70),
    ("table4", "BERT"): (0, 110),
    ("table4", "MLP-Mixer"): (1, 112),
    ("table4", "FNet"): (2, 112),
    ("table4", "M2"): (3, 116),
    ("table4", "Hydra"): (4, 112),
    ("table5", "ViT-B"): (0, 87),
    ("table5", "S4-ViT-B"): (1, 89),
    ("table5", "Hyena-ViT-B"): (2, 88),
    ("table5", "Mamba-ViT-B"): (3, 89),
    ("table10", "Add"): (0, 70),
    ("table10", "Add + Diag"): (1, 70),
    ("table10", "Add + Shift"): (2, 70),
    ("table10", "Quasi"): (3, 70),
}
TOLERANCE = 0.005
HALF = {"table3": 0.5, "table10": 0.5}  # millions: whole ones are printed; Tables 4 and 5 need no such allowance


@lru_cache
def firsts(name: str):
    """One cell for each arm and protocol."""
    found = {}
    for cell in cells(load(ROOT / "sweeps" / f"{name}.yaml")):
        if cell.seed == 0 and cell.replica == 0:
            found.setdefault((cell.protocol, str(cell.arm)), cell)
    return list(found.values())


@pytest.mark.parametrize("name", SWEEPS)
def test_every_arm_is_allowed_and_fits(name):
    assert [registry.check(cell.run) for cell in firsts(name)] == [""] * len(firsts(name))


def parameters(name: str, arm: int) -> float:
    roots = [cell for cell in firsts(name) if cell.run.parent is None]
    return sum(p.numel() for p in built(roots[arm].run, "meta")[0].parameters()) / 1e6


@pytest.mark.parametrize("row", PRINTED, ids=str)
def test_an_arm_has_the_parameters_that_the_paper_prints(row):
    arm, printed = PRINTED[row]
    assert abs(parameters(row[0], arm) - printed) <= HALF.get(row[0], 0) + TOLERANCE * printed


def released_hydra(state: int, pairs: int) -> int:
    """Parameters of a released layer of width 768: 24 heads of 64, 7 taps, `pairs` of B and C for two directions."""
    width, inner, heads, scanned = 768, 1536, 24, 2 * pairs * state
    maps = width * (2 * inner + scanned + 2 * heads) + inner * heads + inner * width
    return maps + (inner + scanned) * (7 + 1) + 3 * heads + inner + 2 * width


def text_model(layers: int, layer: int) -> int:
    """A whole masked-LM model of width 768, its decoder tied."""
    width, rows = 768, 30528
    return (rows + 2 + 2) * width + layers * layer + width * width + 3 * width + rows


def vision_model(layers: int, layer: int) -> int:
    """Patches of 16 x 16 x 3, a norm after them and one at the end, 1,000 classes; no positions, no class token."""
    width = 768
    return (16 * 16 * 3 + 1) * width + 4 * width + layers * layer + 1000 * (width + 1)


def test_the_released_block_gives_the_printed_counts_of_text_but_with_its_defaults_not_the_91_million_of_table_5():
    """Its authors name the defaults for Table 5. Half their state, or one pair of B and C for both directions, counts
    91 M; that the sources do not say which. The paper's own Table 3 has 2 M between Mamba and Hydra for 12 layers, so
    for 24 there should be 4, where Table 5 has 2."""
    default = released_hydra(64, 2)
    assert [round(text_model(n, default) / 1e6) for n in (12, 23)] == [70, 112]  # Tables 3 and 4
    millions = {key: round(vision_model(24, released_hydra(*key)) / 1e6, 1) for key in ((64, 2), (32, 2), (64, 1))}
    assert millions == {(64, 2): 93.2, (32, 2): 90.8, (64, 1): 90.8}
    mamba, hydra = PRINTED["table3", "Mamba"][1], PRINTED["table3", "Quasiseparable"][1]
    assert PRINTED["table5", "Mamba-ViT-B"][1] + 2 * (hydra - mamba) == round(millions[64, 2])


def test_the_hydra_row_of_table_5_has_the_defaults_and_is_off_the_released_count_by_a_named_cause():
    """The diagonal is a feature of the stream, convolved, where the released block maps the inner channels; dt has a
    bias for each direction."""
    (cell,) = (c for c in firsts("table5") if c.arm.mixer == "quasiseparable")
    cause = (768 + 7 + 1) * 24 - 1536 * 24 + 24
    for state, pairs, millions in ((64, 2, 92.8), (32, 2, 90.4), (64, 1, 90.4)):
        own = {"mixer.state": state, "mixer.separate": pairs == 2}
        run = make_run("paper_imagenet", "quasiseparable", cell.arm.changes | own, 0, 0)
        count = sum(p.numel() for p in built(run, "meta")[0].parameters())
        assert round(count / 1e6, 1) == millions
        assert count - vision_model(24, released_hydra(state, pairs)) == 24 * cause
    assert cell.arm.changes["mixer.state"] == 64 and cell.arm.changes["mixer.separate"] is True


def test_a_second_filter_would_put_hyena_off_its_printed_count():
    """So the vision transformer of Table 5 looks one way, as its authors' yaml says."""
    (cell,) = (c for c in firsts("table5") if c.arm.mixer == "hyena")
    both = {**cell.arm.departed, **cell.arm.changes, "mixer.bidirectional": True}
    model = built(make_run("paper_imagenet", "hyena", both, 0, 0), "meta")[0]
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 89.5


def test_what_an_arm_of_tables_4_and_5_varies_is_declared_with_its_source():
    for name in ("table4", "table5"):
        sweep = load(ROOT / "sweeps" / f"{name}.yaml")
        assert all(f"Table {name[-1]}, row " in departure.source for departure in sweep.departures)
        for cell in firsts(name):
            plain = make_run(cell.protocol, cell.arm.mixer, cell.arm.changes, 0, 0)
            one, two = (flattened(resolved(run)) for run in (plain, cell.run))
            differing = {k for k in one if one[k] != two[k] and k != "protocol.init"}
            assert differing <= set(cell.arm.departed)


def test_nothing_but_the_mixer_differs_in_the_strict_table():
    assert not any(cell.arm.departed for cell in firsts("table2_strict"))
    assert len({cell.run.protocol_id for cell in firsts("table2_strict") if cell.run.parent is None}) == 1


def test_each_confound_is_one_key_of_the_strict_protocol():
    strict = flattened(resolved(make_run("strict_mlm", "identity", {}, 0, 0)))
    for name, key in {
        "positions": "backbone.positions",
        "skip": "shell.skip",
        "gain": "shell.gain",
    }.items():
        other = flattened(resolved(make_run(f"confound_{name}", "identity", {}, 0, 0)))
        assert [k for k in strict if strict[k] != other[k]] == [f"protocol.{key}"]


@pytest.mark.parametrize("name", SWEEPS)
def test_the_batch_script_of_a_cluster_of_eight_gpu_nodes_is_this(name, monkeypatch, tmp_path):
    """To take a wanted change over: delete the file and run this test."""
    monkeypatch.setattr(submit.sys, "executable", "/opt/venv/bin/python")
    code = tmp_path / "results" / "slurm" / "snapshots" / "0123"
    monkeypatch.setattr(submit, "snapshot", lambda results: (code, "0123"))
    own = load_cluster(ROOT / "slurm" / "eight_gpus.yaml")
    words = ["where.device=cuda", "where.devices=8"]
    where = make_where({"where.results": str(tmp_path / "results"), "where.device": "cuda", "where.devices": 8})
    (tmp_path / "results" / "slurm" / name).mkdir(parents=True)
    runs = [cell.run.id for cell in firsts(name)]
    made = submit.prepare(ROOT / "sweeps" / f"{name}.yaml", name, submit.RUNS, words, where, own, runs)
    text = (
        submit.script(made) + "\nsbatch\n" + "\n".join(f"  {w}" for w in submit.command(made.folder, made.name, own, 1))
    )
    for value, word in ((made.folder.name, "UUID"), (made.name, "mb-UUID8"), (str(tmp_path), "/home/me")):
        text = text.replace(value, word)
    golden = GOLDEN / f"slurm_{name}.txt"
    if not golden.exists():
        golden.write_text(text + "\n")
    assert text + "\n" == golden.read_text()
    assert dataclasses.asdict(own)["gres"] == "gpu:8"
