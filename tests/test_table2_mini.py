"""The sweeps of Table 2 at small scale: nothing but the mixer differs, and what was declared is what is tested."""

from functools import lru_cache
from types import SimpleNamespace

import pytest

from bench import registry
from bench.compose import ROOT, make_run
from bench.config import MISALIGNED, resolved, resolved_mixer
from bench.report.analysis import pairs, reference_of
from bench.report.frame import flattened
from bench.report.stats_tests import can_test
from bench.sweep import cells, grid, load
from tests.conftest import built

PARTIAL = {"mnli", "qnli", "qqp"}


@lru_cache
def sweep(suffix: str = ""):
    return load(ROOT / "sweeps" / f"table2_mini{suffix}.yaml")


@lru_cache
def every(suffix: str = ""):
    return cells(sweep(suffix))


def firsts(suffix: str = "", protocol: str = "table2_mini"):
    """The run of each arm with seed 0."""
    return [cell.run for cell in every(suffix) if cell.protocol == protocol and cell.seed == 0]


def sizes(suffix: str) -> dict[str, int]:
    """Kind -> number of comparisons of a table of all arms."""
    arms = [SimpleNamespace(mixer=resolved_mixer(run)) for run in firsts(suffix)]
    table = SimpleNamespace(sweep=sweep(suffix), arms=arms)
    return {kind: len(of) for kind, of in pairs(table, reference_of(table)).items()}


@pytest.mark.parametrize("suffix", ["", "_glue"])
def test_thirteen_arms_are_tested_against_attention_and_six_gains_and_one_twin(suffix):
    assert len(firsts(suffix)) == 17 and sizes(suffix) == {"reference": 13, "sam": 6, "a_a": 1}


def test_both_parts_of_three_gains_are_one_family():
    assert sizes("_misaligned") == {"parts": 6} and can_test(len(sweep("_misaligned").seeds), 6, 0.05)


def test_ten_seeds_can_test_both_families_and_no_seed_is_one_of_tuning():
    assert all(can_test(len(sweep().seeds), size, sweep().family.alpha) for size in (13, 6))
    tuned = make_run("mini_mlm_tuned", "identity", {}, 0, 0).protocol.tune.seeds
    assert not set(tuned) & set(sweep().seeds)


@pytest.mark.parametrize("suffix", ["", "_noconv", "_misaligned", "_glue"])
def test_nothing_but_the_mixer_differs_and_all_arms_have_as_many_heads(suffix):
    assert not sweep(suffix).departures and not sweep(suffix).varies
    assert all(registry.check(run) == "" for run in firsts(suffix))
    assert len({run.protocol_id for run in firsts(suffix)}) == 1
    assert {cell.run.mixer.args["heads"] for cell in every(suffix)} == {4}


def test_arms_with_a_state_have_the_same_a_head():
    states = {}
    for run in firsts():
        layer = next(m for m in built(run, "meta")[0].modules() if hasattr(m, "state_size"))
        if layer.state_size:
            states.setdefault(run.mixer.name, set()).add(layer.state_size)
    assert states == {"low_rank": {2048}, "quasiseparable": {2048}}


def test_the_reach_is_that_of_the_convolutions_and_the_same_without_them():
    plain, off = (make_run(name, "identity", {}, 0, 0) for name in ("table2_mini", "table2_mini_noconv"))
    shell, backbone = plain.protocol.shell, plain.protocol.backbone
    assert plain.protocol.task.args["reach"] == backbone.layers * (shell.conv_width // 2) == 18
    one, two = (flattened(resolved(run)) for run in (plain, off))
    assert {key: two[key] for key in one if one[key] != two[key]} == {"protocol.shell.conv_width": 0}


def test_the_smaller_sweeps_share_their_runs_with_the_table():
    known = {run.id for run in grid(sweep())}
    assert {c.run.id for c in every("_noconv") if c.protocol == "table2_mini"} < known
    assert {c.run.id for c in every("_misaligned") if c.run.mixer.args["sam"] != MISALIGNED} < known
    assert {c.run.id for c in every("_glue") if c.protocol == "table2_mini"} < known


def test_a_glue_chain_is_at_most_4000_steps_on_one_trunk_and_partial_data_say_so():
    chain = {c.protocol: c.run for c in every("_glue") if c.run.parent and c.run.mixer.name == "identity"}
    assert len(chain) == 8 and sum(run.steps for run in chain.values()) <= 4000
    for label, run in chain.items():
        subset, protocol = run.protocol.task.args["subset"], run.protocol
        assert label == f"table2_mini_{subset}{'_small' * (subset in PARTIAL)}"
        assert protocol.task.args["data"]["name"].endswith("_small") == (subset in PARTIAL)
        parent = "table2_mini_mnli_small" if subset in ("rte", "mrpc", "stsb") else "table2_mini"
        assert run.parent.label == parent and protocol.shell == run.parent.protocol.shell
        assert protocol.shell.gain == 1.0 and 128 <= protocol.budget.batch <= 256
