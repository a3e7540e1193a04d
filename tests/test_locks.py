"""Only the mixer varies: shared parameters and batches are bitwise equal, every shipped file builds and trains."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch

from bench import Refusal, backbone, registry, train
from bench.compose import ROOT, compose_group, load_yaml, make_run, shipped
from bench.config import NEUTRAL, Named, resolved
from bench.record import RESTORE, parse, read_records
from bench.report.frame import flattened
from bench.seeds import Streams
from bench.store import Store
from bench.sweep import grid, load, ordered
from bench.tasks.base import Places
from tests.conftest import built, setting, shrunk

SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))
ARMS = [(name, level) for name in shipped("mixer") for level in registry.mixer_class(name).levels]


def an_arm(protocol: str, name: str, level: bool, seed: int = 0):
    return make_run(protocol, name, {"mixer.sam": level, "mixer.heads": 2}, seed, 0)


@pytest.fixture(scope="module")
def models():
    return {arm: built(an_arm("quick_recall", *arm))[0] for arm in ARMS}


@pytest.mark.parametrize("pair", list(itertools.combinations(ARMS, 2)), ids=str)
def test_shared_parameters_of_any_two_arms_are_bitwise_equal(models, pair):
    one, two = (dict(backbone.shared(models[arm])) for arm in pair)
    assert list(one) == list(two) and len(one) > 5
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_shared_parameters_differ_between_seeds_and_all_of_them_are_drawn():
    zero, one = (dict(built(an_arm("quick_recall", "attention", True, seed))[0].named_parameters()) for seed in (0, 1))
    constant = [name for name in zero if torch.equal(zero[name], one[name])]
    assert all("norm" in name or name.endswith("bias") for name in constant)


def test_a_parameter_does_not_depend_on_what_else_is_drawn():
    deep = dict(built(make_run("quick_recall", "dense", {"protocol.backbone.layers": 3}, 0, 0))[0].named_parameters())
    flat = dict(built(make_run("quick_recall", "dense", {}, 0, 0))[0].named_parameters())
    assert set(flat) < set(deep) and all(torch.equal(deep[name], flat[name]) for name in flat)


@pytest.mark.parametrize("protocol", ["quick_digits", "quick_recall", "quick_copying"])
def test_the_first_ten_batches_of_all_arms_are_bitwise_equal(protocol, tmp_path):
    first: list[dict] = []
    for arm in ARMS:
        run = an_arm(protocol, *arm)
        task = registry.make_task(run, Places(None, tmp_path))
        task.prepare()
        data = train.MicroBatches(task, Streams(run.seed, run.replica), run.protocol.budget.batch, setting(tmp_path))
        batches = [data[index][0] for index in range(10)]
        first = first or batches
        assert all(torch.equal(a[key], b[key]) for a, b in zip(first, batches, strict=True) for key in a)
    assert not torch.equal(first[0]["labels"], first[1]["labels"])


def test_the_optimiser_treats_shared_parameters_of_all_arms_alike(models):
    settings = make_run("quick_recall", "dense", {}, 0, 0).protocol.optimiser
    assert len({train.groups_digest(model, settings) for model in models.values()}) == 1


def test_a_mixer_gets_only_its_grant():
    for name, level in ARMS:
        run = an_arm("quick_recall", name, level)
        task = registry.make_task(run, Places(None, Path()))
        grant = registry.grant(run, task, registry.mixer_args(run))
        assert set(vars(grant)) == {"heads", "head_width", "length", "packed"}


@pytest.mark.parametrize("name", [n for n in shipped("mixer") if registry.mixer_class(n).levels == (False,)])
def test_a_mixer_without_a_sequence_aligned_form_is_refused_one(name):
    with pytest.raises(Refusal, match=f"mixer '{name}' has no form with sam=true; it has: sam=false"):
        registry.check(an_arm("quick_recall", name, True))


@pytest.mark.parametrize("heads", [0, 3, 65])
def test_heads_that_do_not_divide_the_inner_width_are_refused_and_those_that_do_are_listed(heads):
    with pytest.raises(Refusal, match=rf"mixer.heads={heads} does not fit 'dense' at inner width 64; allowed: 1, 2, 4"):
        registry.check(make_run("quick_recall", "dense", {"mixer.heads": heads}, 0, 0))


@pytest.mark.parametrize("group", ["protocol", "mixer", "task", "shell"])
def test_every_yaml_of_a_group_composes_and_says_what_it_is_for(group):
    for name in shipped(group):
        assert compose_group(group, name)
        assert (ROOT / "configs" / group / f"{name}.yaml").read_text().startswith("# "), name


def test_no_yaml_is_named_by_nobody():
    used = {run.label.split("[")[0] for path in SWEEPS for run in ordered(grid(load(path)))}
    assert used == set(shipped("protocol"))


def on_task(task: str):
    """A run on a task as its own yaml describes it, whether or not a protocol uses it as it is."""
    values, run = compose_group("task", task), make_run("mini_images", "low_rank", {}, 0, 0)
    named = Named(values.pop("name"), values)
    return dataclasses.replace(run, label=task, protocol=dataclasses.replace(run.protocol, task=named))


def everything():
    """One run of each pretraining protocol and mixer that the sweeps, protocols and mixers of this checkout can make;
    of fine-tunings, one of each protocol and one of each mixer in each shell at each length: others add no code."""
    runs = [run for path in SWEEPS for run in ordered(grid(load(path)))]
    runs += [an_arm("quick_recall", *arm) for arm in ARMS]
    used = {str(run.protocol.task) for run in runs}
    runs += [run for run in map(on_task, shipped("task")) if str(run.protocol.task) not in used]
    seen, found = set(), []
    for run in runs:
        if not (kinds := tried(run)) <= seen:
            seen |= kinds
            found.append(run)
    return found


def tried(run) -> set:
    """What a run tries: what no run before it has tried is worth a training."""
    if not run.parent:
        return {(run.protocol_id, str(run.mixer))}
    protocol = run.protocol
    return {run.label.split("[")[0], (str(run.mixer), str(protocol.shell), protocol.task.args["length"])}


def fitted(run) -> tuple:
    """All that decides whether a run's trunk has its parent's shapes."""
    protocol = run.protocol
    lengths = protocol.task.args["length"], run.parent.protocol_id
    return str(run.mixer), str(protocol.backbone), str(protocol.shell), *lengths


def shapes(run) -> dict[str, torch.Size]:
    """Of all parameters at full size."""
    return {name: p.shape for name, p in built(run, "meta")[0].named_parameters()}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_every_fine_tuning_builds_at_full_size_around_the_trunk_that_it_starts_from(path):
    """So its parent's weights fit: a matrix of another length would only be refused once the parent is trained."""
    runs, trunks = grid(load(path)), {}
    assert {run.parent.id for run in runs if run.parent} <= {run.id for run in runs}
    for run in {fitted(run): run for run in runs if run.parent}.values():
        assert registry.check(run) == ""
        above = run.parent.protocol_id, str(run.mixer)
        trunks[above] = trunks.get(above) or shapes(run.parent)
        own = shapes(run)
        new = {name for name, shape in own.items() if trunks[above].get(name) != shape}
        assert new <= {"head.weight", "head.bias", "pooler.weight", "pooler.bias"} and len(own) - len(new) > 10


@pytest.mark.parametrize("run", everything(), ids=lambda r: f"{r.label}-{r.mixer.name}-{r.mixer.args['sam']}")
def test_every_shipped_arm_builds_at_full_size_and_trains_two_steps_when_shrunk(run, tmp_path):
    assert registry.check(run) == ""
    full, _ = built(run, "meta")
    assert sum(p.numel() for p in full.parameters()) > 0 and all(p.is_meta for p in full.parameters())
    small = shrunk(run)
    model, task = built(small)
    training = train.Training(model, task, small.protocol, Streams(0, 0), setting(tmp_path))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train.fit(training)
    assert [step for step, _ in training.trace.curve] == [1, 2]
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert any(".out." in name or ".mlp." in name for name in moved)  # of a layer: some shells have no map of their own


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*/records.jsonl")), ids=lambda p: p.parent.name)
def test_committed_records_still_have_their_ids_and_belong_to_their_sweep(path):
    """Reading checks each id against its run; the sweep's ids must be the committed ones, or evidence is lost.

    Runs that it shares with another sweep may lie in that one's folder.
    """
    records = Store(ROOT / "results").committed()
    runs = grid(load(ROOT / "sweeps" / f"{path.parent.name}.yaml"))
    assert {run.id for run in runs} <= set(records)
    assert {run.id for run in runs} & set(read_records(path))
    for run in runs:
        now = flattened(json.loads(json.dumps(resolved(run))))
        # A key that is younger than the record has its neutral value now.
        assert now == {key: NEUTRAL[key] for key in now if key in NEUTRAL} | flattened(records[run.id].run)


def test_a_record_of_each_kind_is_committed():
    kinds = {
        r.run["protocol"]["task"]["name"]
        for p in (ROOT / "results").glob("*/records.jsonl")
        for r in read_records(p).values()
    }
    assert {"masked_lm", "glue", "images"} <= kinds


def test_sweep_headers_name_their_command_and_cost():
    for path in SWEEPS:
        head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
        assert "Command: " in head, path
        assert load_yaml(path)["question"].endswith("?"), path


def test_a_record_survives_reading_and_writing():
    from bench.record import dump

    for path in (ROOT / "results").glob("*/records.jsonl"):
        for line in path.read_text().splitlines():
            assert dump(parse(line, str(path), RESTORE)) == line
