"""The sweeps beyond Table 2 at small scale: directions, heads, images, lengths. What was declared is what is tested."""

from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import Refusal, evaluate, registry
from bench.capacity import capacity_of
from bench.compose import ROOT, compose_group, make_run, shipped
from bench.config import resolved_mixer
from bench.report.analysis import pairs, reference_of
from bench.report.stats_tests import can_test
from bench.sweep import cells, grid, load
from bench.tasks.base import rows_of
from tests.conftest import built, shrunk

NAMES = ("table3_mini", "table3_mini_causal", "heads_mini", "heads_mini_matched", "images_mini", "length_mini")
HEADS = [1, 2, 4, 8, 16]


@lru_cache
def sweep(name: str):
    return load(ROOT / "sweeps" / f"{name}.yaml")


@lru_cache
def firsts(name: str):
    """The run of each arm with seed 0."""
    return [cell.run for cell in cells(sweep(name)) if cell.seed == sweep(name).seeds[0]]


def args(run) -> dict:
    return run.mixer.args


@lru_cache
def capacities(name: str) -> list:
    return [(run.mixer.name, args(run)["heads"], capacity_of(built(run, "meta")[0])) for run in firsts(name)]


@pytest.mark.parametrize(
    "name, size",
    list(zip(NAMES, (3, 1, 24, 24, 5, 10), strict=True)),
)
def test_arms_fit_and_the_declared_family_is_that_of_the_issue(name, size):
    arms = [SimpleNamespace(mixer=resolved_mixer(run)) for run in firsts(name)]
    table = SimpleNamespace(sweep=sweep(name), arms=arms)
    assert {kind: len(of) for kind, of in pairs(table, reference_of(table)).items()} == {"reference": size}
    assert all(registry.check(run) == "" for run in firsts(name)) and not sweep(name).varies
    seeds = sweep(name).seeds
    assert len(seeds) == (10 if name.startswith("table3") else 5)
    assert can_test(len(seeds), size, sweep(name).family.alpha) == (len(seeds) == 10)
    assert not set(make_run("mini_mlm_tuned", "identity", {}, 0, 0).protocol.tune.seeds) & set(seeds)


@pytest.mark.parametrize("name, departing", list(zip(NAMES, (1, 1, 0, 0, 0, 0), strict=True)))
def test_nothing_but_the_mixer_differs_except_in_a_declared_departure(name, departing):
    ids = [run.protocol_id for run in firsts(name)]
    assert len(sweep(name).departures) == departing and len(set(ids)) == 1 + departing
    assert sorted(map(ids.count, set(ids)))[:departing] == [1] * departing


def test_ways_to_see_both_directions_have_as_many_parameters_and_share_the_runs_of_table2():
    known = {run.id for run in grid(sweep("table2_mini"))}
    shared = [cell for cell in cells(sweep("table3_mini")) if cell.run.id in known]
    assert {cell.run.mixer.name for cell in shared} == {"quasiseparable"} and len(shared) == 10
    counts = [capacity.parameters for _, _, capacity in capacities("table3_mini")]
    assert len(counts) == 7 and max(counts) < 1.01 * min(counts)
    trained = {run.id for run in grid(sweep("table3_mini"))}
    assert len({run.id for run in grid(sweep("table3_mini_causal"))} - trained) == 10


def test_the_causal_arm_alone_looks_at_no_later_token():
    (run,) = [run for run in firsts("table3_mini_causal") if run.mixer.name == "semiseparable"]
    centred = next(run for run in firsts("table3_mini") if run.mixer.name == "semiseparable")
    found = []
    for one in (run, centred):
        model, task = built(shrunk(one))
        batch = task.example(2)
        batch["segments"] = torch.ones_like(batch["segments"])
        other = {**batch, "tokens": batch["tokens"].clone()}
        other["tokens"][:, 60:] = (other["tokens"][:, 60:] + 1) % 100
        with torch.no_grad():
            apart = (model.layers[0](model.embedding(batch), batch["segments"])[0]
                     - model.layers[0](model.embedding(other), other["segments"])[0]).abs()  # fmt: skip
        found.append(bool((apart[:, :60] > 0).any()))
    assert found == [False, True]


def test_heads_of_one_rank_grow_and_matched_ranks_hold_the_mixers_parameters():
    fixed, matched = capacities("heads_mini"), capacities("heads_mini_matched")
    for name in ("attention", "low_rank", "cauchy", "quasiseparable"):
        own = {heads: capacity.mixer_parameters for n, heads, capacity in fixed if n == name}
        even = {heads: capacity.mixer_parameters for n, heads, capacity in matched if n == name}
        assert list(own) == list(even) == HEADS and own[16] > 15 * own[1] and own[4] == even[4]
        assert all(abs(count / own[4] - 1) < (0.03 if name == "quasiseparable" else 1e-9) for count in even.values())
    states = {heads: c.state_per_head for n, heads, c in fixed if n in ("low_rank", "quasiseparable")}
    assert states == {heads: 16 * 512 // heads for heads in HEADS}


def test_both_forms_of_heads_share_what_they_can():
    table, fixed, matched = ({run.id for run in grid(sweep(n))} for n in ("table2_mini", "heads_mini", NAMES[3]))
    assert (len(fixed), len(fixed - table)) == (125, 100) and len(matched - fixed) == 80


def test_images_are_256_row_major_patches_of_seven_arms():
    run = firsts("images_mini")[0]
    assert (len(firsts("images_mini")), run.protocol.task.args["patch"], run.protocol.shell.gain) == (7, 4, 1.0)
    assert built(run, "meta")[1].spec().length == 256
    assert {c.metric for c in sweep("images_mini").columns} == {"top1", "top5", "ema_top1", "ema_top5"}


# Lengths ------------------------------------------------------------------------------------------------------------


def test_every_aligned_mixer_is_read_at_every_length_without_positions():
    aligned = {name for name in shipped("mixer") if compose_group("mixer", name)["sam"]}
    assert {run.mixer.name for run in firsts("length_mini")} == aligned
    protocol = firsts("length_mini")[0].protocol
    assert not protocol.backbone.positions and protocol.task.args["lengths"] == [64, 128, 256, 512, 1024]
    assert {f"loss_at_{n}" for n in protocol.task.args["lengths"]} <= {c.metric for c in sweep("length_mini").columns}


def test_positions_that_end_are_refused_and_a_matrix_that_ends_is_unfit():
    with pytest.raises(Refusal, match="1024 tokens, learned positions have 128 rows"):
        registry.check(make_run("length_mini", "attention", {"protocol.backbone.positions": True}, 0, 0))
    reasons = [registry.check(make_run("length_mini", name, {}, 0, 0)) for name in ("dense", "identity", "toeplitz")]
    assert reasons == [*["has a matrix for 128 tokens, the task also reads 1024"] * 2, ""]


@pytest.mark.parametrize("run", firsts("length_mini"), ids=lambda run: run.mixer.name)
def test_every_arm_reads_rows_longer_and_shorter_than_its_own(run):
    """Compiled for its own length only; another is read without, fewer rows at once the longer they are."""
    model, task = built(shrunk(run))
    seen = []
    hooked = model.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0]["tokens"].shape)))
    rows = {length: longer(task, length) for length in (64, 128, 192)}
    task.held_out_batches = lambda part, size: [rows[int(part)]]
    task.metrics = lambda part, outcomes: {part: float(outcomes["loss_sum"].sum() / outcomes["count"].sum())}
    metrics, _ = evaluate.evaluate(model, task, ["64", "128", "192"], 4, "cpu", "fp32")
    hooked.remove()
    assert seen == [(4, 64), (4, 128), (1, 192)] and all(np.isfinite(v) for v in metrics.values())


def longer(task, length: int) -> dict:
    """A batch of one row of another length."""
    other = type(task)(replace(task.args, length=length), task.places).example(1)
    return {name: values for name, values in other.items()}


def test_only_rows_of_the_own_length_run_what_was_compiled():
    compiled = []

    def backend(graph, inputs):
        compiled.append(1)
        return graph.forward

    model, task = built(shrunk(firsts("length_mini")[0]))
    for layer in model.layers:
        layer.compile(dynamic=False, backend=backend)
    task.metrics = lambda part, outcomes: {}
    counts = []
    for length in (128, 64, 128, 192):
        task.held_out_batches = lambda part, size, length=length: [longer(task, length)]
        evaluate.evaluate(model, task, ["any"], 2, "cpu", "fp32")
        counts.append(len(compiled))
    assert counts[0] > 0 and set(counts) == {counts[0]}


def test_rows_of_another_length_need_no_larger_matrices():
    assert [rows_of(length, 512, 128) for length in (64, 128, 256, 1024, 8192)] == [512, 512, 128, 8, 1]
