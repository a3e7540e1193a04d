"""Recall, copying and digits: labels by brute force, purity of batches, distances, held-out sets, closed forms."""

import dataclasses
import math
import random

import numpy as np
import pytest
import torch

from bench import Refusal
from bench.compose import CONFIGS, load_yaml
from bench.config import build
from bench.registry import task_class
from bench.seeds import Streams
from bench.tasks.base import Places
from bench.tasks.copying import Args as CopyingArgs
from bench.tasks.copying import Copying
from bench.tasks.digits import Args as DigitsArgs
from bench.tasks.digits import Digits, cut
from bench.tasks.recall import Args as RecallArgs
from bench.tasks.recall import Recall

RECALL = RecallArgs(length=40, pairs=5, keys=9, values=7, queries=4, gap=12, held_out=50)
COPYING = CopyingArgs(length=30, symbols=6, offset=13, held_out=50)
DIGITS = DigitsArgs(patch=2, held_out=200, label_smoothing=0.1)
STREAMS = Streams(3, 1)


@pytest.fixture(params=["recall", "copying", "digits"])
def task(request, tmp_path):
    kind, args = {"recall": (Recall, RECALL), "copying": (Copying, COPYING), "digits": (Digits, DIGITS)}[request.param]
    made = kind(args, Places(None, tmp_path))
    made.prepare()
    return made


def every(task, size: int) -> dict[str, torch.Tensor]:
    """The whole held-out set as one batch."""
    batches = list(task.held_out_batches(task.held_out()[0], size))
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def perfect(batch: dict, outputs: int) -> torch.Tensor:
    return 200.0 * torch.nn.functional.one_hot(batch["labels"], outputs).float()


def test_a_batch_is_a_pure_function_of_seed_and_step(task):
    before = torch.get_rng_state().clone(), np.random.get_state()[1].copy(), random.getstate()
    whole = task.batch(STREAMS, 7, 24, slice(0, 24))
    task.batch(Streams(4, 0), 2, 24, slice(0, 24))
    for start, stop in ((12, 24), (0, 12), (5, 6)):
        part = task.batch(STREAMS, 7, 24, slice(start, stop))
        assert same(part, {key: value[start:stop] for key, value in whole.items()})
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()


def test_batches_differ_with_seed_replica_and_step(task):
    key = task.spec().kind
    batches = [task.batch(*which, 24, slice(0, 24))[key] for which in ((STREAMS, 7), (STREAMS, 8))]
    batches += [task.batch(streams, 7, 24, slice(0, 24))[key] for streams in (Streams(4, 1), Streams(3, 0))]
    for i in range(4):
        for j in range(i):
            assert not torch.equal(batches[i], batches[j])


def test_the_order_names_the_items_of_the_batch(task):
    batch = task.batch(STREAMS, 7, 24, slice(8, 24))
    order = task.order(STREAMS, 7, 24)
    assert order.dtype == np.int64
    assert np.array_equal(batch["items"].numpy(), order[8:])


def test_batches_have_the_shapes_and_ids_of_the_spec(task):
    spec = task.spec()
    for batch in (task.example(6), task.batch(STREAMS, 0, 6, slice(0, 6)), next(task.held_out_batches("held_out", 6))):
        shape = (6, spec.length) if spec.kind == "tokens" else (6, spec.length, spec.symbols)
        assert tuple(batch[spec.kind].shape) == shape
        assert batch["segments"].dtype == torch.int64 and batch["segments"].eq(1).all()
        assert batch["labels"].dtype == torch.int64
        assert batch["labels"].min() >= 0 and batch["labels"].max() < spec.outputs
        assert ("positions" in batch) != spec.pooled
        if spec.kind == "tokens":
            assert batch["tokens"].min() >= 0 and batch["tokens"].max() < spec.symbols
            assert batch["positions"].shape == batch["labels"].shape


def test_held_out_is_the_same_for_any_batch_size_and_has_every_item_once(task):
    assert task.held_out() == ["held_out"]
    once = every(task, 7)
    assert same(once, every(task, 1000))
    items = once["items"].tolist()
    assert len(items) == len(set(items)) == task.args.held_out


def test_no_training_example_is_held_out(task):
    key = task.spec().kind
    held = {tuple(row.flatten().tolist()) for row in every(task, 50)[key]}
    for streams in (Streams(0, 0), Streams(1, 0)):
        for step in range(4):
            rows = task.batch(streams, step, 50, slice(0, 50))[key]
            assert not held & {tuple(row.flatten().tolist()) for row in rows}


def test_metrics_of_perfect_uniform_and_constant_predictions(task):
    outputs = task.spec().outputs
    batch = every(task, 1000)

    def metrics(predicted):
        return task.metrics("held_out", task.outcomes(predicted, batch))

    exact = metrics(perfect(batch, outputs))
    assert exact["accuracy"] == 1 and exact["loss"] == 0
    uniform = metrics(torch.zeros(*batch["labels"].shape, outputs, dtype=torch.bfloat16))
    assert uniform["loss"] == pytest.approx(math.log(outputs), rel=1e-6)
    hits = [metrics(torch.eye(outputs)[c].expand(*batch["labels"].shape, outputs))["accuracy"] for c in range(outputs)]
    assert sum(hits) == pytest.approx(1)
    assert max(hits) < 1.3 / outputs and min(hits) > 0.7 / outputs  # chance, whichever class is named


def test_metrics_do_not_depend_on_the_batches_they_were_gathered_in(task):
    outputs = task.spec().outputs

    def gathered(size):
        columns = []
        for batch in task.held_out_batches("held_out", size):
            wave = torch.sin(batch["items"].float()[:, None] * torch.arange(1, 1 + outputs))
            predicted = wave if task.spec().pooled else wave[:, None].expand(*batch["labels"].shape, outputs)
            columns.append(task.outcomes(predicted, batch))
        joined = {name: np.concatenate([c[name] for c in columns]) for name in columns[0]}
        assert {len(column) for column in joined.values()} == {task.args.held_out}
        return task.metrics("held_out", joined)

    assert gathered(7) == gathered(1000)
    assert 0 < gathered(7)["accuracy"] < 1


def test_the_loss_is_a_sum_that_parts_add_up_to(task):
    spec = task.spec()
    whole = task.batch(STREAMS, 1, 8, slice(0, 8))
    predicted = torch.randn(*whole["labels"].shape, spec.outputs, generator=torch.Generator().manual_seed(0))
    parts = [({key: value[a:b] for key, value in whole.items()}, predicted[a:b]) for a, b in ((0, 3), (3, 8))]
    assert task.count(whole) == sum(task.count(batch) for batch, _ in parts) == whole["labels"].numel()
    total = sum(task.loss(outputs, batch) for batch, outputs in parts)
    torch.testing.assert_close(task.loss(predicted, whole), total)
    smoothing = task.args.label_smoothing if isinstance(task, Digits) else 0.0
    log = predicted.log_softmax(-1)
    own = log.gather(-1, whole["labels"].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(total, -((1 - smoothing) * own + smoothing * log.mean(-1)).sum())


@pytest.mark.parametrize("exact", [False, True])
def test_recall_by_brute_force(exact, tmp_path):
    """Reading each sequence from the left answers each query, and every query is `gap` tokens from any pair."""
    args = RecallArgs(length=21, pairs=4, keys=4, values=4, queries=4, gap=10, held_out=9) if exact else RECALL
    task = Recall(args, Places(None, tmp_path))
    batch = task.batch(STREAMS, 0, 200, slice(0, 200))
    nearest = args.length
    for tokens, positions, labels in zip(*(batch[k].tolist() for k in ("tokens", "positions", "labels")), strict=True):
        end = 2 * args.pairs
        book = dict(zip(tokens[0:end:2], tokens[1:end:2], strict=True))
        assert len(book) == args.pairs == len(set(book.values()))
        assert all(1 <= key <= args.keys < value <= args.keys + args.values for key, value in book.items())
        assert [p for p in range(end, args.length) if tokens[p] != 0] == positions
        assert len({tokens[p] for p in positions}) == args.queries
        for position, label in zip(positions, labels, strict=True):
            assert book[tokens[position]] == 1 + args.keys + label
            nearest = min(nearest, position - (end - 1))
    assert nearest == args.gap  # kept by all, reached by one


def test_recall_draws_keys_values_pairs_and_places_evenly(tmp_path):
    task = Recall(RECALL, Places(None, tmp_path))
    batch = task.batch(STREAMS, 0, 4000, slice(0, 4000))
    tokens = batch["tokens"]
    assert torch.bincount(tokens[:, 0], minlength=10)[1:].float().div(4000).sub(1 / 9).abs().max() < 0.03
    assert torch.bincount(batch["labels"][:, 0], minlength=7).float().div(4000).sub(1 / 7).abs().max() < 0.03
    asked = (tokens[:, 0:10:2] == tokens.gather(1, batch["positions"][:, :1])).float().mean(0)
    assert asked.sub(1 / 5).abs().max() < 0.03
    first = 2 * 5 - 1 + 12
    places = (tokens[:, first:] > 0).float().mean(0)
    assert places.sub(4 / (40 - first)).abs().max() < 0.03


def test_copying_by_brute_force(tmp_path):
    task = Copying(COPYING, Places(None, tmp_path))
    batch = task.batch(STREAMS, 0, 20, slice(0, 20))
    for tokens, positions, labels in zip(*(batch[k].tolist() for k in ("tokens", "positions", "labels")), strict=True):
        assert positions == list(range(13, 30))
        assert labels == [tokens[p - 13] for p in positions]
    assert set(batch["tokens"].flatten().tolist()) == set(range(6))


def test_digits_are_split_by_class_in_proportion(tmp_path):
    from sklearn.datasets import load_digits

    labels = load_digits().target
    task = Digits(DIGITS, Places(None, tmp_path))
    task.prepare()
    held = every(task, 64)
    share = np.bincount(labels) * 200 / 1797
    assert (np.abs(np.bincount(held["labels"]) - share) < 1).all()
    assert np.array_equal(held["labels"], labels[held["items"]])
    epoch = np.concatenate([task.order(STREAMS, 0, 1597), held["items"].numpy()])
    assert sorted(epoch.tolist()) == list(range(1797))


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_digit_patches_give_back_the_image(patch, tmp_path):
    from sklearn.datasets import load_digits

    task = Digits(dataclasses.replace(DIGITS, patch=patch), Places(None, tmp_path))
    task.prepare()
    batch = task.batch(STREAMS, 0, 5, slice(0, 5))
    side = 8 // patch
    for patches, item in zip(batch["patches"].numpy(), batch["items"].tolist(), strict=True):
        image = np.block([[patches[r * side + c].reshape(patch, patch) for c in range(side)] for r in range(side)])
        assert np.array_equal((image + 1) * 8, load_digits().images[item])


def test_patches_run_in_reading_order():
    image = np.arange(16).reshape(1, 4, 4)
    assert cut(image, 2).tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]]


def test_other_digits_than_the_pinned_ones_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("bench.tasks.digits._SHA256", "0" * 64)
    with pytest.raises(Refusal, match="sha256"):
        Digits(DIGITS, Places(None, tmp_path)).prepare()


@pytest.mark.parametrize(
    ("good", "change", "named"),
    [
        (RECALL, {"pairs": 10}, "keys"),
        (RECALL, {"values": 4}, "values"),
        (RECALL, {"queries": 6}, "queries"),
        (RECALL, {"gap": 28}, "length is 40, must be at least .* = 41"),
        (RECALL, {"gap": 0}, "gap"),
        (RECALL, {"held_out": 0}, "held_out"),
        (COPYING, {"offset": 30}, "offset"),
        (COPYING, {"offset": 0}, "offset"),
        (COPYING, {"symbols": 1}, "symbols"),
        (COPYING, {"held_out": 0}, "held_out"),
        (DIGITS, {"patch": 3}, "patch"),
        (DIGITS, {"held_out": 1000}, "held_out"),
        (DIGITS, {"label_smoothing": 1.0}, "label_smoothing"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(good, change, named):
    with pytest.raises(Refusal, match=named):
        dataclasses.replace(good, **change)


@pytest.mark.parametrize("file", ["recall", "copying", "digits", "images_tiny"])
def test_the_yaml_of_a_task_is_total_and_gives_a_working_task(file, tmp_path):
    values = load_yaml(CONFIGS / "task" / f"{file}.yaml")
    cls = task_class(values.pop("name"))
    task = cls(build(cls.Args, values, "task"), Places(None, tmp_path))
    batch = task.example(2 * task.spec().group)
    outputs = torch.zeros(*batch["labels"].shape, task.spec().outputs)
    assert task.loss(outputs, batch) / task.count(batch) == pytest.approx(math.log(task.spec().outputs))
