"""WordPiece ids from text: a pinned vocabulary, tokenisation in batches, and training a vocabulary that repeats.

The text is lower-cased and stripped of accents as in the released BERT. Special tokens are never produced from text:
a literal "[MASK]" in a document becomes "[", "mask", "]". Axes: B rows, L length.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench import Refusal
from bench.tasks.base import Places
from bench.tasks.data import Pins, verified

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Vocabulary:
    """A WordPiece vocabulary: one token a line, the line number is the id. `size` is the number of lines."""

    file: str  # path under the data folder
    sha256: str
    size: int


def vocabulary_pins(vocabulary: Vocabulary, name: str) -> Pins:
    """The vocabulary as pinned files of the set `name`, for `data.fetch`."""
    return Pins(name, {"vocabulary": {vocabulary.file: vocabulary.sha256}}, "", "", "")


class Ragged(NamedTuple):
    """Sequences of different lengths: sequence i is ids[offsets[i] : offsets[i + 1]]."""

    ids: np.ndarray  # uint16 if the vocabulary allows, else uint32
    offsets: np.ndarray  # int64, one more than there are sequences


class WordPiece:
    """Ids of a pinned vocabulary; `name` is the data set that error messages speak of.

    Raises Refusal if the file is missing or has other content, if its size is not the one declared, or if a special
    token is absent or an entry occurs twice.
    """

    def __init__(self, vocabulary: Vocabulary, name: str, places: Places):
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

        file = verified(name, vocabulary.file, vocabulary.sha256, places)
        words = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        _check(vocabulary, words)
        ids = {word: index for index, word in enumerate(words)}
        self.size, self.words = vocabulary.size, words
        self.pad, self.unk, self.cls, self.sep, self.mask = (ids[token] for token in SPECIALS)
        self.dtype = np.uint16 if self.size <= 2**16 else np.uint32
        self.tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
        self.tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        self.tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()

    @property
    def special_C(self) -> np.ndarray:
        """True at the ids of the five special tokens."""
        special_C = np.zeros(self.size, bool)
        special_C[[self.pad, self.unk, self.cls, self.sep, self.mask]] = True
        return special_C

    def encode(self, texts: Iterable) -> Ragged:
        """Ids of each text, without [CLS] and [SEP]. `texts` is a list of str or a pyarrow string column."""
        ids, lengths = [np.zeros(0, self.dtype)], []
        for batch in _batches(texts, 1024):
            encodings = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(batch, add_special_tokens=False)]
            lengths += map(len, encodings)
            ids += [np.asarray(encoding, self.dtype) for encoding in encodings]
        return Ragged(np.concatenate(ids), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64))


def _check(vocabulary: Vocabulary, words: list[str]) -> None:
    if len(words) != vocabulary.size:
        raise Refusal(f"vocabulary {vocabulary.file} has {len(words)} entries, declared are {vocabulary.size}")
    absent = [token for token in SPECIALS if token not in words]
    if absent:
        raise Refusal(f"vocabulary {vocabulary.file} lacks {', '.join(absent)}; it must hold {', '.join(SPECIALS)}")
    word, times = Counter(words).most_common(1)[0]
    if times > 1:
        raise Refusal(f"vocabulary {vocabulary.file} holds '{word}' {times} times")


def _batches(texts, size: int):
    """Lists of at most `size` str; a missing text counts as empty."""
    for start in range(0, len(texts), size):
        part = texts[start : start + size]
        yield [text or "" for text in (part if isinstance(part, list) else part.to_pylist())]


def train_vocabulary(texts: list[str], size: int) -> list[str]:
    """A WordPiece vocabulary of exactly `size` entries: the special tokens, then the others sorted.

    It holds each of the size // 8 most frequent characters, alone and as a continuation (##), and then the pieces
    of most frequent merges; rarer characters become [UNK]. The same texts give the same vocabulary on any
    number of threads. Raises Refusal if the texts are too few to yield `size` pieces.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    letters = _letters(texts, tokenizer.normalizer, size // 8)
    # The trainer breaks ties by id and numbers continuations in the order of a randomly seeded hash table; named
    # here as if they were special tokens, they get their numbers beforehand.
    fixed = [*SPECIALS, *letters, *("##" + letter for letter in letters)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=1,
        show_progress=False,
        special_tokens=fixed,
        initial_alphabet=letters,
        limit_alphabet=len(letters),
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = set(tokenizer.get_vocab(with_added_tokens=False))
    if len(found) != size:
        raise Refusal(f"the texts yield a vocabulary of {len(found)} entries, wanted are {size}")
    return [*SPECIALS, *sorted(found - set(SPECIALS))]


def _letters(texts: list[str], normalizer, limit: int) -> list[str]:
    """The most frequent characters, in code point order; ties go to the lower code point."""
    counts: Counter = Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    ranked = sorted((letter for letter in counts if not letter.isspace()), key=lambda letter: (-counts[letter], letter))
    return sorted(ranked[:limit])


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... (counts[0] of them), starts[1], ...: the concatenated ranges, int64."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - counts), counts) + np.arange(total)


def code_digest(*files: Path) -> str:
    """For keys of derived arrays: what they depend on besides data and settings (this file, `files`, tokenizers)."""
    import tokenizers

    code = b"".join(Path(path).read_bytes() for path in (__file__, *files))
    return hashlib.sha256(code + tokenizers.__version__.encode()).hexdigest()
