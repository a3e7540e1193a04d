"""Text tasks: batches are pure functions, masks keep their rates and promises, metrics agree with closed forms.

Small made-up documents; tests marked `data` read the real sets from the folder in MIXERBENCH_DATA.
"""

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from bench import Refusal
from bench.compose import make_run
from bench.config import build
from bench.seeds import Streams
from bench.tasks.base import Places
from bench.tasks.data import Pins, digest
from bench.tasks.glue import SUBSETS, Glue, truncate
from bench.tasks.glue import Args as GlueArgs
from bench.tasks.masked_lm import UNUSED, MaskedLM, cut_rows
from bench.tasks.masked_lm import Args as MaskedArgs
from bench.tasks.text import SPECIALS, Vocabulary, WordPiece, train_vocabulary
from tests.conftest import built, shrunk

PAD, UNK, CLS, SEP, MASK = range(5)
WORDS = [f"w{number}" for number in range(95)]
CONFIGS = Path(__file__).parent.parent / "configs" / "task"
STREAMS = Streams(3, 0)


def write_vocabulary(folder: Path, words: list[str]) -> Vocabulary:
    file = folder / "vocabulary.txt"
    file.write_text("\n".join(words) + "\n", encoding="utf-8")
    return Vocabulary("vocabulary.txt", digest(file), len(words))


def write_split(folder: Path, name: str, columns: dict) -> dict[str, str]:
    pq.write_table(pa.table(columns), folder / name)
    return {name: digest(folder / name)}


@pytest.fixture
def places(tmp_path) -> Places:
    (tmp_path / "data").mkdir()
    return Places(tmp_path / "data", tmp_path / "cache")


def documents(count: int, longest: int) -> list[str]:
    """Texts of 1 .. longest words of one token each; every fourth word is not in the vocabulary."""
    draw = np.random.default_rng(0)
    return [
        " ".join(
            "zzz" if draw.random() < 0.25 else WORDS[draw.integers(95)] for _ in range(draw.integers(1, longest + 1))
        )
        for _ in range(count)
    ]


def masked_args(places: Places, texts: list[str], words=WORDS, **changes) -> MaskedArgs:
    splits = {
        "train": write_split(places.data, "train.parquet", {"text": texts}),
        "validation": write_split(places.data, "validation.parquet", {"text": texts[:37]}),
    }
    args = MaskedArgs(
        length=32,
        documents=0,
        packed=False,
        pieces=0,
        mask_rate=0.3,
        mask_rate_held_out=0.15,
        short=4,
        reach=0,
        lengths=(),
        data=Pins("poems", splits, "", "", ""),
        column="text",
        vocabulary=write_vocabulary(places.data, [*SPECIALS, *words]),
    )
    return dataclasses.replace(args, **changes)


def masked(places: Places, texts: list[str], **changes) -> MaskedLM:
    task = MaskedLM(masked_args(places, texts, **changes), places)
    task.prepare()
    return task


def plain(task: MaskedLM, batch: dict) -> torch.Tensor:
    """The tokens of a batch before they were masked."""
    used = batch["labels"] != UNUSED
    tokens_BL = batch["tokens"].clone()
    row = torch.arange(len(tokens_BL))[:, None].expand_as(used)
    tokens_BL[row[used], batch["positions"][used]] = batch["labels"][used]
    return tokens_BL


# Vocabulary and tokenisation


def test_tokens_are_greedy_longest_pieces_of_lower_case_text_and_never_specials(places):
    words = [*SPECIALS, "[", "]", "mask", "play", "##ing", "##in", "##g", "e"]
    pieces = WordPiece(write_vocabulary(places.data, words), "poems", places)
    ids, offsets = pieces.encode(["Playing [MASK]", "", "é qqq"])
    assert [words[i] for i in ids] == ["play", "##ing", "[", "mask", "]", "e", "[UNK]"]
    assert offsets.tolist() == [0, 5, 5, 7] and ids.dtype == np.uint16


@pytest.mark.parametrize(
    "words, size, message",
    [
        ([*SPECIALS, "a"], 7, "has 6 entries, declared are 7"),
        (["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a"], 5, r"lacks \[MASK\]"),
        ([*SPECIALS, "a", "b", "a"], 8, "holds 'a' 2 times"),
    ],
)
def test_a_vocabulary_that_is_not_what_it_says_is_refused(places, words, size, message):
    vocabulary = dataclasses.replace(write_vocabulary(places.data, words), size=size)
    with pytest.raises(Refusal, match=message):
        WordPiece(vocabulary, "poems", places)


def test_a_vocabulary_with_other_content_is_refused(places):
    vocabulary = dataclasses.replace(write_vocabulary(places.data, [*SPECIALS]), sha256="0" * 64)
    with pytest.raises(Refusal, match="not the pinned file"):
        WordPiece(vocabulary, "poems", places)


TRAIN = """
import random
from bench.tasks.text import train_vocabulary
draw = random.Random(0)
texts = [" ".join("".join(draw.choices("abcdefgh", k=draw.randint(1, 6))) for _ in range(30)) for _ in range(40)]
found = [train_vocabulary(texts, 200) for _ in range(3)]
"""


def test_training_a_vocabulary_repeats_on_any_number_of_threads():
    """Many pieces of these random words are equally frequent, so that the order of ties shows."""
    program = TRAIN + 'print(*sum(found, []), end="")'
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=CONFIGS.parent.parent,
        env={**os.environ, "RAYON_NUM_THREADS": "1"},
    )
    words = done.stdout.split(" ")
    here: dict = {}
    exec(TRAIN, here)
    found = [words[:200], words[200:400], words[400:], *here["found"]]
    first = found[0]
    assert all(words == first for words in found)
    assert first[:5] == list(SPECIALS) and first[5:] == sorted(set(first[5:])) and len(first) == 200
    assert {"a", "h", "##a", "##h"} <= set(first)


def test_too_little_text_for_a_vocabulary_is_refused():
    with pytest.raises(Refusal, match="wanted are 500"):
        train_vocabulary(["so little text"], 500)


# Cutting into rows


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("short", [0, 1, 4])
def test_pieces_cover_each_document_but_for_short_tails_and_fit_their_rows(packed, short):
    totals = np.random.default_rng(1).integers(0, 70, 300)
    offsets = np.concatenate([[0], np.cumsum(totals)])
    cut = cut_rows(offsets, 16, short, packed, 0)
    pieces = [set(range(s, s + c)) for s, c in zip(cut["start"], cut["count"], strict=True)]
    covered = list(itertools.chain.from_iterable(sorted(piece) for piece in pieces))
    assert covered == sorted(set(covered)) and min(cut["count"]) >= 1
    for begin, end in itertools.pairwise(offsets.tolist()):
        mine = [piece for piece in pieces if begin <= min(piece) < end]
        dropped = (end - begin) - sum(map(len, mine))
        assert all(max(piece) < end for piece in mine) and 0 <= dropped < max(1, short)
        assert all(len(piece) >= min(short, end - begin) for piece in mine)
    rows = [sum(cut["count"][a:b] + 2) for a, b in itertools.pairwise(cut["first"])]
    assert cut["first"][0] == 0 and cut["first"][-1] == len(pieces) and max(rows) <= 16 and min(rows) >= 3
    if packed:  # what is left could not have held the beginning of anything: 2 and `short` tokens, less one
        assert min(rows[:-1]) > 16 - 2 - max(1, short)
    else:
        assert cut["first"].tolist() == list(range(len(pieces) + 1))


def test_a_row_reads_as_cls_text_sep_padding(places):
    task = masked(places, ["w0 w1 w2 w3 w4 w5 w6 w7 w8", "w9"], length=8, short=4)
    batch = next(task.held_out_batches("validation", 8))
    assert plain(task, batch).tolist() == [[CLS, 5, 6, 7, 8, 9, 10, SEP], [CLS, 14, SEP, PAD, PAD, PAD, PAD, PAD]]
    assert batch["segments"].tolist() == [[1] * 8, [1, 1, 1, 0, 0, 0, 0, 0]]
    assert not batch["types"].any()


def test_packed_rows_number_their_pieces(places):
    task = masked(places, ["w0 w1", "w2", "w3 w4 w5 w6 w7", "w8"], length=12, short=2, packed=True)
    batch = next(task.held_out_batches("validation", 8))
    assert plain(task, batch).tolist() == [
        [CLS, 5, 6, SEP, CLS, 7, SEP, CLS, 8, 9, 10, SEP],
        [CLS, 11, 12, SEP, CLS, 13, SEP] + [PAD] * 5,
    ]
    assert batch["segments"].tolist() == [[1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3], [1, 1, 1, 1, 2, 2, 2] + [0] * 5]


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_document_gives_its_first_pieces_and_no_others(pieces):
    offsets = np.concatenate([[0], np.cumsum(np.random.default_rng(1).integers(0, 70, 300))])
    every, first = cut_rows(offsets, 16, 4, False, 0), cut_rows(offsets, 16, 4, False, pieces)
    place = every["start"] - offsets[np.searchsorted(offsets, every["start"], side="right") - 1]
    assert (place >= 14 * pieces).any()
    for name in ("start", "count"):
        assert first[name].tolist() == every[name][place < 14 * pieces].tolist()
    assert first["first"].tolist() == list(range(len(first["start"]) + 1))


def test_a_truncated_document_is_one_row_that_ends_with_sep(places):
    task = masked(places, ["w0 w1 w2 w3 w4 w5 w6 w7 w8 w9 w10", "w9", ""], length=8, short=4, pieces=1)
    batch = next(task.held_out_batches("validation", 8))
    assert plain(task, batch).tolist() == [[CLS, 5, 6, 7, 8, 9, 10, SEP], [CLS, 14, SEP, PAD, PAD, PAD, PAD, PAD]]


def test_only_the_first_documents_are_used(places):
    texts = documents(50, 20)
    few = masked(places, texts, documents=7)
    assert len(few.rows["train"]) == 7 and len(few.rows["validation"]) == 37


# Masks


@pytest.mark.parametrize("packed", [False, True])
def test_exactly_the_rounded_share_of_ordinary_tokens_is_chosen_and_labelled(places, packed):
    task = masked(places, documents(200, 60), packed=packed)
    batch = task.batch(STREAMS, 5, 64, slice(0, 64))
    before_BL, used_BT = plain(task, batch), batch["labels"] != UNUSED
    for row in range(64):
        ordinary = (before_BL[row] >= 5).sum().item()
        positions = batch["positions"][row][used_BT[row]].tolist()
        assert len(positions) == min(ordinary, max(1, round(0.3 * ordinary)))
        assert positions == sorted(set(positions)) and (before_BL[row][positions] >= 5).all()
    assert not batch["positions"][~used_BT].any()
    assert task.count(batch) == used_BT.sum().item()


def test_chosen_tokens_become_mask_random_and_themselves_80_10_10(places):
    task = masked(places, documents(300, 60))
    batches = [task.batch(STREAMS, step, 256, slice(0, 256)) for step in range(12)]
    seen, labels = [], []
    for batch in batches:
        used = batch["labels"] != UNUSED
        seen.append(batch["tokens"].gather(1, batch["positions"])[used])
        labels.append(batch["labels"][used])
    seen, labels = torch.cat(seen), torch.cat(labels)
    n = len(labels)
    masked_share = (seen == MASK).float().mean().item()
    random_share = ((seen != MASK) & (seen != labels)).float().mean().item() * 95 / 94  # one in 95 hits the label
    assert abs(masked_share - 0.8) < 4.5 * (0.16 / n) ** 0.5
    assert abs(random_share - 0.1) < 4.5 * (0.09 / n) ** 0.5
    other = seen[(seen != MASK) & (seen != labels)]
    counts = np.bincount(other.numpy(), minlength=100)
    assert counts[:5].sum() == 0  # a special token is never drawn, and each other one is about as often
    assert abs(counts[5:] - len(other) / 95).max() < 5.5 * (len(other) / 95) ** 0.5


def test_every_place_of_a_row_is_chosen_equally_often(places):
    task = masked(places, [" ".join(WORDS[:30])] * 64, length=32)
    batches = [task.batch(STREAMS, step, 256, slice(0, 256)) for step in range(20)]
    counts = sum(np.bincount(b["positions"][b["labels"] != UNUSED].numpy(), minlength=32) for b in batches)
    expected = counts.sum() / 30
    assert counts[0] == counts[31] == 0 and abs(counts[1:31] - expected).max() < 4.5 * expected**0.5


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_is_the_same_whichever_part_is_asked_for_in_any_order(places, packed):
    task = masked(places, documents(100, 60), packed=packed)
    whole = task.batch(STREAMS, 7, 40, slice(0, 40))
    for part in (slice(33, 40), slice(0, 8), slice(8, 33), slice(None)):
        found = task.batch(STREAMS, 7, 40, part)
        assert all(torch.equal(found[name], values[part]) for name, values in whole.items())
    assert np.array_equal(task.order(STREAMS, 7, 40), whole["items"].numpy())
    assert all(len(values) == 40 for values in whole.values())


def test_masks_differ_between_seeds_steps_and_epochs(places):
    task = masked(places, [" ".join(WORDS[:30])] * 4)
    found = [
        task.batch(streams, step, 4, slice(0, 4))
        for streams, step in ((STREAMS, 0), (STREAMS, 1), (STREAMS, 2), (Streams(4, 0), 0), (Streams(3, 1), 0))
    ]
    assert all(not torch.equal(a["positions"], b["positions"]) for a, b in itertools.combinations(found, 2))


def test_held_out_rows_come_once_with_the_same_masks_for_any_batch_size(places):
    task = masked(places, documents(100, 60))

    def every(size):
        batches = list(task.held_out_batches("validation", size))
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

    whole = every(1000)
    assert whole["items"].tolist() == list(range(len(task.rows["validation"])))
    for size in (1, 7):
        assert all(torch.equal(values, whole[name]) for name, values in every(size).items())


def test_masked_loss_outcomes_and_metrics_against_closed_forms(places):
    """With odds e^2 : 1 : 1 ... for the right one of 100 ids, the loss is log(e^2 + 99) - 2; half the rows invert."""
    task = masked(places, documents(100, 60))
    batch = task.batch(STREAMS, 0, 16, slice(0, 16))
    labels_BT = batch["labels"].clamp(min=0)
    sign_B = torch.where(torch.arange(16) < 8, 2.0, -2.0)
    outputs = torch.zeros(*labels_BT.shape, 100).scatter_(
        2, labels_BT[..., None], sign_B[:, None, None].expand(16, labels_BT.shape[1], 1)
    )
    count_B = (batch["labels"] != UNUSED).sum(1)
    loss_B = torch.where(sign_B > 0, np.log(np.e**2 + 99) - 2, np.log(np.e**-2 + 99) + 2) * count_B
    outcomes = task.outcomes(outputs, batch)
    assert np.allclose(outcomes["loss_sum"], loss_B, rtol=1e-5)
    assert outcomes["correct"].tolist() == torch.where(sign_B > 0, count_B, 0).tolist()
    assert torch.allclose(task.loss(outputs, batch), loss_B.sum().float(), rtol=1e-5)
    metrics = task.metrics("validation", outcomes)
    assert metrics["tokens"] == task.count(batch) == count_B.sum()
    assert metrics["loss"] == pytest.approx(float(loss_B.sum() / count_B.sum()), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(float(count_B[:8].sum() / count_B.sum()))


def far_by_definition(batch: dict, reach: int) -> list[list[bool]]:
    """Of each slot: masked, and of the places of its segment that show its id one or more, all beyond the reach."""
    far_BT = []
    for tokens_L, segments_L, positions_T, labels_T in zip(
        *(batch[name].tolist() for name in ("tokens", "segments", "positions", "labels")), strict=True
    ):
        far_BT.append([])
        for place, label in zip(positions_T, labels_T, strict=True):
            apart = [
                abs(other - place)
                for other, token in enumerate(tokens_L)
                if token == label and segments_L[other] == segments_L[place]
            ]
            far_BT[-1].append(label != UNUSED and bool(apart) and min(apart) > reach)
    return far_BT


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reach", [1, 3, 9, 40])
def test_the_loss_beyond_a_reach_is_that_of_tokens_shown_only_farther_away(places, packed, reach):
    """Texts of twelve words, so that most come twice; rows of 32 tokens have nothing 40 away."""
    draw = np.random.default_rng(reach)
    texts = [" ".join(draw.choice(WORDS[:12], draw.integers(1, 70))) for _ in range(60)]
    task = masked(places, texts, packed=packed, reach=reach)
    batch = task.batch(STREAMS, 0, 40, slice(0, 40))
    assert int(batch["segments"].max()) > 1 if packed else int(batch["segments"].min()) == 0
    far_BT = torch.tensor(far_by_definition(batch, reach))
    shares = {1: (0.4, 0.9), 3: (0.2, 0.9), 9: (0.02, 0.5), 40: (0, 0)}[reach]
    assert shares[0] <= float(far_BT[batch["labels"] != UNUSED].float().mean()) <= shares[1]

    outputs = torch.randn(*batch["labels"].shape, 100, generator=torch.Generator().manual_seed(0))
    right_BT = outputs.log_softmax(-1).gather(2, batch["labels"].clamp(min=0)[..., None])[..., 0]
    loss_B = torch.where(far_BT, -right_BT, 0.0).sum(1)
    found = task.outcomes(outputs, batch)
    assert found["count_far"].tolist() == far_BT.sum(1).tolist()
    assert np.allclose(found["loss_sum_far"], loss_B, rtol=1e-4, atol=1e-6)
    metrics, tokens = task.metrics("validation", found), int(far_BT.sum())
    assert metrics["tokens_far"] == tokens
    assert metrics.get("loss_far") == (pytest.approx(float(loss_B.sum()) / tokens, rel=1e-4) if tokens else None)


def test_the_second_reading_changes_nothing_of_the_first(places):
    tasks = [masked(places, documents(100, 60), reach=reach) for reach in (0, 3)]
    one, two = (task.batch(STREAMS, 0, 16, slice(0, 16)) for task in tasks)
    assert all(torch.equal(one[name], two[name]) for name in one)
    outputs = torch.randn(*one["labels"].shape, 100, generator=torch.Generator().manual_seed(0))
    first, second = (task.outcomes(outputs, one) for task in tasks)
    assert set(second) - set(first) == {"loss_sum_far", "count_far"}
    assert all(np.array_equal(first[name], second[name]) for name in first)
    plain, both = (task.metrics("validation", found) for task, found in zip(tasks, (first, second), strict=True))
    assert plain == {name: both[name] for name in ("loss", "accuracy", "tokens")}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"length": 2}, "length"),
        ({"mask_rate": 0.0}, "mask_rate"),
        ({"mask_rate_held_out": 1.0}, "mask_rate_held_out"),
        ({"documents": -1}, "documents"),
        ({"short": 31}, "short"),
        ({"pieces": -1}, "pieces"),
        ({"pieces": 1, "packed": True}, "pieces"),
        ({"reach": -1}, "reach"),
        ({"lengths": (64, 32)}, "lengths"),
        ({"lengths": (2, 32)}, "lengths"),
    ],
)
def test_settings_out_of_range_are_refused_without_data(places, changes, message):
    with pytest.raises(Refusal, match=f"task.{message} is"):
        MaskedLM(masked_args(places, ["w1"], **changes), Places(None, places.cache))


@pytest.mark.parametrize("packed", [False, True])
def test_rows_of_other_lengths_hide_the_same_tokens_of_the_same_documents(places, packed):
    task, count = masked(places, texts := documents(100, 90), packed=packed, lengths=(7, 32, 40)), 38
    long = sum(len(text.split()) // count for text in texts[:37])
    found = []
    for length in (7, 32, 40):
        batches = list(task.held_out_batches(f"validation_at_{length}", 3))
        rows = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        assert rows["items"].tolist() == list(range(long * -(-count // (length - 2))))
        inside_BL = (rows["segments"] == 1) & (rows["tokens"] != CLS) & (rows["tokens"] != SEP)
        assert ((rows["segments"] == 0) == (rows["tokens"] == PAD)).all()
        hidden = torch.full(inside_BL.shape, UNUSED)
        for row, (positions, labels) in enumerate(zip(rows["positions"], rows["labels"], strict=True)):
            hidden[row, positions[labels != UNUSED]] = labels[labels != UNUSED]
        assert bool((hidden[~inside_BL] == UNUSED).all())
        found.append((rows["tokens"][inside_BL], hidden[inside_BL]))
    assert long > 5 and len(found[0][0]) == long * count
    assert (found[0][1] != UNUSED).sum() > long
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_metrics_of_another_length_carry_it_and_too_short_documents_are_refused(places):
    task = masked(places, documents(100, 60), lengths=(8, 16))
    assert task.held_out() == ["validation", "validation_at_8", "validation_at_16"] and task.longest() == 32
    outcomes = {"count": np.array([2, 2]), "loss_sum": np.array([1.0, 3.0]), "correct": np.array([0, 1])}
    assert task.metrics("validation_at_8", outcomes) == {"loss_at_8": 1.0, "accuracy_at_8": 0.25, "tokens_at_8": 4.0}
    with pytest.raises(Refusal, match="no validation document of poems has 98 tokens"):
        masked(places, documents(100, 60), lengths=(100,))


# The cache


def test_tokens_are_cached_by_content_and_shared_by_all_lengths(places, monkeypatch):
    calls = []
    encode = WordPiece.encode
    monkeypatch.setattr(WordPiece, "encode", lambda self, texts: calls.append(1) or encode(self, texts))
    texts = documents(60, 40)
    first = masked(places, texts)
    assert len(calls) == 2
    again, longer = masked(places, texts), masked(places, texts, length=64)
    assert len(calls) == 2 and longer.spec().length == 64
    tokens_BL = first.batch(STREAMS, 0, 8, slice(0, 8))["tokens"]
    assert torch.equal(tokens_BL, again.batch(STREAMS, 0, 8, slice(0, 8))["tokens"])
    masked(places, texts, words=WORDS[::-1])
    assert len(calls) == 4  # another vocabulary
    masked(places, [*texts[:-1], "w1"])
    assert len(calls) == 5  # another training split, the same validation split
    for file in places.cache.glob("*/ids.npy"):
        file.write_bytes(b"")
    rebuilt = masked(places, texts)
    assert torch.equal(tokens_BL, rebuilt.batch(STREAMS, 0, 8, slice(0, 8))["tokens"])


# GLUE


def glue(places: Places, subset: str, rows: list[tuple], **changes) -> Glue:
    """A GLUE task whose splits all hold `rows` (texts and label)."""
    columns = dict(zip([*SUBSETS[subset].columns, "label"], map(list, zip(*rows, strict=True)), strict=True))
    names = ["train", *(part if part == "validation" else f"validation_{part}" for part in SUBSETS[subset].held_out)]
    splits = {name: write_split(places.data, f"{name}.parquet", columns) for name in names}
    args = GlueArgs(
        subset=subset,
        length=12,
        shorter=(),
        together=1,
        label_smoothing=0.0,
        data=Pins("exam", splits, "", "", ""),
        vocabulary=write_vocabulary(places.data, [*SPECIALS, *WORDS]),
    )
    task = Glue(dataclasses.replace(args, **changes), places)
    task.prepare()
    return task


def test_sentences_and_pairs_are_laid_out_with_types_and_padding(places):
    (single,) = glue(places, "sst2", [("w0 w1", 1)]).held_out_batches("validation", 4)
    assert single["tokens"].tolist() == [[CLS, 5, 6, SEP] + [PAD] * 8]
    assert single["segments"].tolist() == [[1] * 4 + [0] * 8] and not single["types"].any()
    (pair,) = glue(places, "rte", [("w0 w1", "w2", 1), ("w3", "", 0)]).held_out_batches("validation", 4)
    assert pair["tokens"].tolist() == [[CLS, 5, 6, SEP, 7, SEP] + [PAD] * 6, [CLS, 8, SEP, SEP] + [PAD] * 8]
    assert pair["types"].tolist() == [[0] * 4 + [1] * 2 + [0] * 6, [0] * 3 + [1] + [0] * 8]
    assert pair["labels"].tolist() == [1, 0] and pair["items"].tolist() == [0, 1]


def test_long_texts_lose_their_end_and_keep_the_separators(places):
    long = " ".join(WORDS[:30])
    (single,) = glue(places, "cola", [(long, 1)]).held_out_batches("validation", 4)
    assert single["tokens"].tolist() == [[CLS, *range(5, 15), SEP]]
    (pair,) = glue(places, "mrpc", [(long, "w50 w51", 1)]).held_out_batches("validation", 4)
    assert pair["tokens"].tolist() == [[CLS, *range(5, 12), SEP, 55, 56, SEP]]


def test_truncation_takes_tokens_off_the_longer_text_one_by_one():
    cases = list(itertools.product(range(12), range(12), range(2, 11)))
    for a, b, room in cases:
        left, right = a, b
        while left + right > room:
            left, right = (left - 1, right) if left > right else (left, right - 1)
        found = truncate(np.array([a]), np.array([b]), room)
        assert (int(found[0][0]), int(found[1][0])) == (left, right)


@pytest.mark.parametrize("subset", SUBSETS)
def test_glue_batches_are_pure_shuffled_and_complete(places, subset):
    pair = len(SUBSETS[subset].columns) == 2
    rows = [(text, *([text[::-1]] if pair else []), number % 2) for number, text in enumerate(documents(50, 12))]
    task = glue(places, subset, rows)
    epoch = torch.cat([task.batch(STREAMS, step, 10, slice(0, 10))["items"] for step in range(5)])
    assert sorted(epoch.tolist()) == list(range(50)) and epoch.tolist() != list(range(50))
    whole = task.batch(STREAMS, 3, 20, slice(0, 20))
    for part in (slice(13, 20), slice(0, 13)):
        found = task.batch(STREAMS, 3, 20, part)
        assert all(torch.equal(found[name], values[part]) for name, values in whole.items())
    for part in task.held_out():
        items = [item for batch in task.held_out_batches(part, 7) for item in batch["items"].tolist()]
        assert items == list(range(50))


def test_batches_sorted_by_length_hold_the_same_examples_with_less_padding(places):
    """Four batches of eight at a time: theirs are the examples of the same four steps as drawn, in other company."""
    rows = [(" ".join(WORDS[: 1 + number % 10]), number % 2) for number in range(64)]
    drawn, is_sorted = (glue(places, "cola", rows, together=together, shorter=(4, 8)) for together in (1, 4))
    cut = {1: [], 4: []}
    for first in (0, 4, 8):
        items = {1: [], 4: []}
        for task in (drawn, is_sorted):
            batches = [task.batch(STREAMS, first + n, 8, slice(0, 8)) for n in range(4)]
            items[task.args.together] += [i for batch in batches for i in batch["items"].tolist()]
            cut[task.args.together] += [batch["tokens"].shape[1] for batch in batches]
            for batch in batches:
                longest = int(batch["segments"].sum(1).max())
                assert batch["tokens"].shape[1] == next(n for n in (4, 8, 12) if n >= longest)
        assert sorted(items[1]) == sorted(items[4]) and items[1] != items[4]
    assert sum(cut[4]) < sum(cut[1])
    assert any(four != sorted(four) for four in (cut[4][:4], cut[4][4:8], cut[4][8:]))  # short ones do not come first
    parts = [is_sorted.batch(STREAMS, 2, 8, part) for part in (slice(0, 3), slice(3, 8))]
    whole = is_sorted.batch(STREAMS, 2, 8, slice(0, 8))
    assert all(torch.equal(torch.cat([part[name] for part in parts]), values) for name, values in whole.items())


@pytest.mark.parametrize("mixer", ["attention", "toeplitz", "dft", "quasiseparable", "monarch"])
def test_a_batch_that_is_cut_means_what_it_meant_with_its_padding(places, mixer):
    run = shrunk(make_run("mini_cola", mixer, {"mixer.heads": 2}, 0, 0))
    model, _ = built(run)
    rows = [(" ".join(WORDS[: 1 + number % 4]), number % 2) for number in range(8)]
    padded, cut = (
        glue(places, "cola", rows, shorter=shorter).batch(STREAMS, 0, 8, slice(0, 8)) for shorter in ((), (6,))
    )
    assert padded["tokens"].shape[1] == 12 and cut["tokens"].shape[1] == 6
    torch.testing.assert_close(model.eval()(cut), model(padded))


@pytest.mark.parametrize("label", [-1, 2])
def test_hidden_or_impossible_labels_are_refused(places, label):
    with pytest.raises(Refusal, match="labels from 0 to 1"):
        glue(places, "sst2", [("w1", 0), ("w2", label)])


def test_bad_glue_settings_are_refused(places):
    with pytest.raises(Refusal, match="none of cola, sst2"):
        Glue(dataclasses.replace(glue(places, "cola", [("w1", 0)]).args, subset="wsc"), places)
    with pytest.raises(Refusal, match="label_smoothing"):
        glue(places, "stsb", [("w1", "w2", 2.5)], label_smoothing=0.1)
    with pytest.raises(Refusal, match="length"):
        glue(places, "cola", [("w1", 0)], length=4)
    for shorter in ((8, 4), (0, 4), (4, 4), (12,)):
        with pytest.raises(Refusal, match=r"task.shorter is .* lengths from 1 to 11, ascending"):
            glue(places, "cola", [("w1", 0)], shorter=shorter)
    with pytest.raises(Refusal, match="together is 0"):
        glue(places, "cola", [("w1", 0)], together=0)


def outcomes(label, prediction) -> dict[str, np.ndarray]:
    return {
        "item": np.arange(len(label)),
        "label": np.asarray(label),
        "prediction": np.asarray(prediction),
        "loss": np.linspace(0, 1, len(label), dtype=np.float32),
    }


def test_classification_metrics_against_their_definitions(places):
    """3 true positives, 1 false positive, 2 false negatives, 4 true negatives."""
    found = outcomes([1] * 3 + [0] + [1] * 2 + [0] * 4, [1] * 4 + [0] * 6)
    assert glue(places, "sst2", [("w1", 0)]).metrics("validation", found) == pytest.approx(
        {"accuracy": 0.7, "loss": 0.5}
    )
    assert glue(places, "mrpc", [("w1", "w2", 0)]).metrics("validation", found) == pytest.approx(
        {"accuracy": 0.7, "f1": 6 / 9, "loss": 0.5}
    )
    assert glue(places, "cola", [("w1", 0)]).metrics("validation", found) == pytest.approx(
        {"matthews": (3 * 4 - 1 * 2) / (4 * 5 * 5 * 6) ** 0.5, "accuracy": 0.7, "loss": 0.5}
    )
    assert glue(places, "mnli", [("w1", "w2", 0)]).metrics("mismatched", found) == pytest.approx(
        {"accuracy_mismatched": 0.7, "loss_mismatched": 0.5}
    )


def test_correlations_against_closed_forms(places):
    """Ranks 1 2 3 4 against 1 3 2 4: Spearman 1 - 6 * 2 / (4 * 15) = 0.8; Pearson of an affine map is 1."""
    task = glue(places, "stsb", [("w1", "w2", 0.0)])
    score = np.array([0.0, 1.0, 2.0, 5.0], np.float32)
    assert task.metrics("validation", outcomes(score, [0.0, 30.0, 20.0, 90.0]))["spearman"] == pytest.approx(0.8)
    assert task.metrics("validation", outcomes(score, 7 - 2 * score))["pearson"] == pytest.approx(-1)


@pytest.mark.parametrize("subset, constant", [("cola", 1), ("stsb", 2.5)])
def test_constant_predictions_correlate_with_nothing_and_warn_of_nothing(places, subset, constant):
    task = glue(places, subset, [("w1", "w2", 0)] if subset == "stsb" else [("w1", 0)])
    labels = np.array([0, 1, 1, 0, 1], np.float32 if subset == "stsb" else np.int64)
    for label, prediction in ((labels, np.full_like(labels, constant)), (np.full_like(labels, constant), labels)):
        found = task.metrics("validation", outcomes(label, prediction))
        assert all(found[name] == 0 for name in ("matthews", "pearson", "spearman") if name in found)
        assert len(found) == 3


def test_glue_losses_against_closed_forms(places):
    task = glue(places, "sst2", [("w1", 1), ("w2", 0)], label_smoothing=0.2)
    (batch,) = task.held_out_batches("validation", 2)
    outputs = torch.tensor([[0.0, 2.0], [0.0, 2.0]])
    right, wrong = np.log(1 + np.e**-2), np.log(1 + np.e**2)
    assert np.allclose(task.outcomes(outputs, batch)["loss"], [right, wrong])
    assert task.outcomes(outputs, batch)["prediction"].tolist() == [1, 1]
    smooth = 0.9 * right + 0.1 * wrong + 0.9 * wrong + 0.1 * right  # a share of 0.2 is spread over both classes
    assert task.loss(outputs, batch).item() == pytest.approx(smooth) and task.count(batch) == 2
    score = glue(places, "stsb", [("w1", "w2", 1.0), ("w2", "w3", 5.0)])
    (batch,) = score.held_out_batches("validation", 2)
    assert score.loss(torch.tensor([[1.5], [2.0]]), batch).item() == pytest.approx(0.25 + 9)
    assert score.outcomes(torch.tensor([[1.5], [2.0]]), batch)["prediction"].tolist() == [1.5, 2.0]


# Made-up batches


@pytest.mark.parametrize("packed", [False, True])
def test_example_batches_need_no_data_and_have_the_shapes_of_real_ones(places, packed):
    pairs = [(masked(places, documents(100, 60), packed=packed), 8)]
    pairs += [
        (glue(places, subset, [("w1", "w2", 0)[-2 if len(spec.columns) == 1 else -3 :]] * 9), 8)
        for subset, spec in SUBSETS.items()
    ]
    for task, size in pairs:
        made = type(task)(task.args, Places(None, places.cache)).example(size)
        real, spec = task.batch(STREAMS, 0, size, slice(0, size)), task.spec()
        assert {n: (v.shape, v.dtype) for n, v in made.items()} == {n: (v.shape, v.dtype) for n, v in real.items()}
        assert int(made["tokens"].min()) >= 0 and int(made["tokens"].max()) < spec.symbols
        assert int(made["types"].max()) < spec.types and int(made["segments"].max()) == 1 + spec.packed
        if not spec.pooled:
            assert (made["segments"].gather(1, made["positions"]) > 0).all()


# Real data


def real(name: str, tmp_path: Path, **changes):
    """The task of a yaml in configs/task, on the real data."""
    folder = os.environ.get("MIXERBENCH_DATA")
    if not folder:
        pytest.skip("MIXERBENCH_DATA is not set")
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")) | changes
    cls = {"glue": Glue, "masked_lm": MaskedLM}[values.pop("name")]
    task = cls(build(cls.Args, values, "task"), Places(Path(folder), tmp_path))
    task.prepare()
    return task


@pytest.mark.data
@pytest.mark.parametrize(
    "name, sizes",
    [
        ("glue_sst2", {"train": 67349, "validation": 872}),
        ("glue_cola", {"train": 8551, "validation": 1043}),
        ("glue_mrpc", {"train": 3668, "validation": 408}),
        ("glue_stsb", {"train": 5749, "validation": 1500}),
        ("glue_rte", {"train": 2490, "validation": 277}),
        ("glue_qnli_small", {"train": 2000, "validation": 5463}),
        ("glue_qqp_small", {"train": 2977, "validation": 7600}),
        ("glue_mnli_small", {"train": 25395, "matched": 9815, "mismatched": 1000}),
    ],
)
def test_real_glue_sets_are_whole_and_their_batches_sane(name, sizes, tmp_path):
    task = real(name, tmp_path)
    assert {part: len(examples) for part, examples in task.examples.items()} == sizes
    batch = task.batch(STREAMS, 0, 256, slice(0, 256))
    tokens_BL, used_BL = batch["tokens"], batch["segments"] == 1
    assert (tokens_BL[:, 0] == 101).all() and (tokens_BL[~used_BL] == 0).all() and (tokens_BL[used_BL] != 0).all()
    assert ((tokens_BL == 102).sum(1) == len(task.subset.columns)).all()
    assert (tokens_BL == 100).sum() < 0.01 * used_BL.sum()  # hardly a word is unknown
    assert (used_BL[:, 1:] <= used_BL[:, :-1]).all()


@pytest.mark.data
@pytest.mark.parametrize("packed", [False, True])
def test_a_slice_of_real_wikipedia_fills_rows_and_masks_15_percent(packed, tmp_path):
    task = real("masked_lm_simplewiki", tmp_path, documents=500, packed=packed)
    batch = task.batch(STREAMS, 0, 128, slice(0, 128))
    used = batch["segments"] > 0
    assert used.float().mean() > (0.99 if packed else 0.85)
    assert task.count(batch) / used.sum().item() == pytest.approx(0.147, abs=0.005)
    assert len(task.rows["validation"]) > 1900
