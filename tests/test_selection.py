"""Examples that are held out for the selection of trials: never trained on, never reported, the same for every run."""

from pathlib import Path

import numpy as np
import pytest

from bench import Refusal
from bench.compose import make_run
from bench.config import Run
from bench.registry import make_task
from bench.seeds import Streams
from bench.tasks.base import SELECTION, TRAIN, Places
from tests import test_image_tasks, test_text_tasks
from tests.test_image_tasks import sets as sets
from tests.test_text_tasks import WORDS, plain
from tests.test_text_tasks import places as places


def tuned(changes: dict | None = None) -> Run:
    return make_run("quick_digits_tuned", "identity", {"mixer.heads": 2, **(changes or {})}, 0, 0)


@pytest.mark.parametrize("protocol", ["quick_digits", "quick_recall"])
def test_selection_is_the_same_for_every_seed_and_never_trained_on_or_reported(protocol):
    task = make_task(make_run(protocol, "identity", {}, 0, 0), Places(None, Path()))
    task.reserve(200)
    task.prepare()
    task.require_disjoint()
    batches = list(task.held_out_batches(SELECTION, 64))
    items = np.concatenate([b["items"].numpy() for b in batches])
    assert len(items) == 200 == len(set(items.tolist()))
    name, numbers = task.origin(SELECTION)
    assert np.array_equal(items, numbers)
    for seed in (0, 1):
        trained = np.concatenate([task.order(Streams(seed, 0), step, 64) for step in range(60)])
        if task.origin(TRAIN)[0] == name:
            assert not set(items.tolist()) & set(trained.tolist())
            assert set(trained.tolist()) == set(task.origin(TRAIN)[1].tolist())
    shown = [b["tokens" if "tokens" in b else "patches"].numpy().tobytes() for b in batches]
    reported = [
        b["tokens" if "tokens" in b else "patches"].numpy().tobytes() for b in task.held_out_batches("held_out", 64)
    ]
    assert not set(shown) & set(reported)


def test_examples_in_two_parts_are_refused(monkeypatch):
    task = make_task(tuned(), Places(None, Path()))
    task.prepare()
    task.require_disjoint()
    train, selection = task.split(len(task._train))
    monkeypatch.setattr(task, "_split", (np.append(train, selection[:3]), selection))
    with pytest.raises(Refusal, match="3 examples held out for the selection of trials are in 'train' too"):
        task.require_disjoint()
    with pytest.raises(Refusal, match="must be at most half of 1437"):
        other = make_task(tuned({"protocol.tune.selection.examples": 900}), Places(None, Path()))
        other.prepare()
        other.require_disjoint()


@pytest.mark.parametrize("packed", [False, True])
def test_of_text_whole_documents_are_held_out(places, packed):
    """Each document repeats a word of its own, so that tokens say where they come from."""
    texts = [" ".join([word] * (1 + 3 * number)) for number, word in enumerate(WORDS)]
    task = test_text_tasks.masked(places, texts, packed=packed, short=1)
    task.reserve(12)
    task.require_disjoint()
    assert len(task.origin(SELECTION)[1]) == 12 < len(task.rows[TRAIN]) - len(task.origin(TRAIN)[1])
    words = [set(), set()]
    for step in range(2 * -(-len(task.rows[TRAIN]) // 16)):
        words[0] |= set(plain(task, task.batch(Streams(3, 0), step, 16, slice(0, 16))).flatten().tolist())
    for batch in task.held_out_batches(SELECTION, 5):
        words[1] |= set(plain(task, batch).flatten().tolist())
    common = words[0] & words[1]
    assert common and max(common) < 5 < max(words[1])  # padding and the like


def test_of_sentences_and_images_rows_of_the_training_split_are_held_out(places, sets, tmp_path):
    rows = [(f"{word} {word}", number % 2) for number, word in enumerate(WORDS)]
    sentences = test_text_tasks.glue(places, "cola", rows)
    train, held_out, _ = sets
    images = test_image_tasks.make(tmp_path, train, held_out)
    for task, key, size in ((sentences, "tokens", 8), (images, "patches", 8)):
        task.reserve(10)
        task.prepare()
        batches = list(task.held_out_batches(SELECTION, 4))
        assert [len(b[key]) for b in batches] == [4, 4, 2] and "targets" not in batches[0]
        items = {i for b in batches for i in b["items"].tolist()}
        trained = {i for step in range(30) for i in task.order(Streams(1, 0), step, size).tolist()}
        assert not items & trained and items | trained == set(range(len(items | trained)))
        found = {name: np.zeros(10) for name in ("label", "prediction", "rank", "loss")}
        assert "loss" in task.metrics(SELECTION, found)  # whatever the reported sets are called
    images.require_disjoint()
    with pytest.raises(Refusal, match="10 examples held out for the selection of trials are in 'validation' too"):
        sentences.require_disjoint()  # this made-up task pins the same rows as both splits


def test_of_pairs_no_sentence_of_the_selection_is_trained_on(places):
    """Ten premises, each in three pairs; every hypothesis stands in two."""
    rows = [(WORDS[n // 3], f"{WORDS[10 + n // 2]} {WORDS[0]}", n % 3) for n in range(30)]
    task = test_text_tasks.glue(places, "mnli", rows)
    task.reserve(4)
    selection, train = task.origin(SELECTION)[1], task.origin(TRAIN)[1]
    alone = {
        n for n in range(30) if all(rows[n][0] != rows[m][0] and rows[n][1] != rows[m][1] for m in selection.tolist())
    }
    assert len(selection) == 4 and set(train.tolist()) == alone and 4 < 30 - len(alone) < 30
    trained = {n for step in range(9) for n in task.order(Streams(0, 0), step, 8).tolist()}
    assert trained == alone
