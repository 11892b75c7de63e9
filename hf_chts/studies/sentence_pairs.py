"""Sentences and their translations: loading, a vocabulary of both languages, and batches of about as many tokens."""

import gzip
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from hf_chts.files.atomic import write_whole
from hf_chts.studies.images import DATA_VARIABLE

PAD, END = 0, 1
_SPECIAL = ("<pad>", "</s>")
# as the files of Multi30k are called, and as splits of data sets of the Hub are
_FILES = {"train": "train", "validation": "val", "test": "test_2016_flickr"}
_LANGUAGES = ("en", "de")

Pairs = list[tuple[str, str]]


def load_pairs(data: str) -> dict[str, Pairs]:
    """English sentences with their German translations, by split: "train", "validation" and "test".

    Args:
        data: a folder with {train,val,test_2016_flickr}.{en,de}.gz, one sentence a line; or a data set of the Hub
            with columns "en" and "de". A folder of its name in $HF_CHTS_STUDY_DATA comes before the Hub.

    Raises:
        FileNotFoundError: there is no such data; the message says where it was looked for.
        ValueError: two files have different numbers of lines.
    """
    places = [Path(data)]
    if (shared := os.environ.get(DATA_VARIABLE)) is not None:
        places.append(Path(shared) / data.rpartition("/")[2])
    for place in places:
        if place.is_dir():
            return {split: _read(place, name) for split, name in _FILES.items()}
    import datasets  # slow, and of use only without files

    try:
        loaded = datasets.load_dataset(data)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"data is {data!r}: there is no folder {' or '.join(map(str, places))}, and no such data set from the Hub "
            f"({error}). Give a folder, set {DATA_VARIABLE}, or load the data set once with a network"
        ) from error
    return {split: [(row["en"].strip(), row["de"].strip()) for row in loaded[split]] for split in _FILES}


def _read(folder: Path, name: str) -> Pairs:
    sides = []
    for language in _LANGUAGES:
        path = folder / f"{name}.{language}.gz"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: a folder of sentence pairs has {name}.en.gz and {name}.de.gz")
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as lines:
            sides.append([line.strip() for line in lines])
    if len(sides[0]) != len(sides[1]):
        raise ValueError(f"{folder / name}.en.gz has {len(sides[0])} lines, and .de.gz has {len(sides[1])}")
    return list(zip(*sides, strict=True))


@dataclass(frozen=True)
class Vocabulary:
    """Byte-pair encoding of both languages, which knows every text and restores it exactly."""

    tokenizer: Tokenizer

    @classmethod
    def of(cls, pairs: Pairs, size: int, path: Path) -> "Vocabulary":
        """The vocabulary in `path`, or one of at most `size` tokens learned from `pairs` and kept there."""
        if not path.is_file():
            tokenizer = Tokenizer(models.BPE())
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
            tokenizer.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(
                vocab_size=size,
                special_tokens=list(_SPECIAL),
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            )
            tokenizer.train_from_iterator((text for pair in pairs for text in pair), trainer)
            write_whole(path, tokenizer.to_str())
        return cls(Tokenizer.from_file(str(path)))

    def __len__(self) -> int:
        return int(self.tokenizer.get_vocab_size())

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, and END."""
        return [[*encoded.ids, END] for encoded in self.tokenizer.encode_batch(list(texts))]

    def decode(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        """The texts, without special tokens."""
        return [text.strip() for text in self.tokenizer.decode_batch([list(ids) for ids in tokens])]


@dataclass(frozen=True)
class EncodedPairs:
    """Token ids of sentences (`source`) and of their translations (`target`), each with END."""

    source: list[list[int]]
    target: list[list[int]]

    @classmethod
    def of(cls, pairs: Pairs, vocabulary: Vocabulary) -> "EncodedPairs":
        return cls(*(vocabulary.encode([pair[side] for pair in pairs]) for side in range(2)))

    @property
    def lengths(self) -> list[int]:
        """Of the longer side of each pair, in tokens."""
        return [max(len(source), len(target)) for source, target in zip(self.source, self.target, strict=True)]


def batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices in batches of like length, the shortest first.

    A batch has at most `tokens` tokens on each side, padding included, as OpenNMT counts them; a longer one goes alone.
    """
    found: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        # in this order the new one is the longest
        if not found or (len(found[-1]) + 1) * lengths[index] > tokens:
            found.append([])
        found[-1].append(index)
    return found


def shuffled_batches(lengths: Sequence[int], tokens: int, seed: int) -> Iterator[list[int]]:
    """`batches`, epoch after epoch without end: pairs of one length meet others in each, and batches change places."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        made = batches([lengths[index] for index in order], tokens)
        for number in torch.randperm(len(made), generator=generator).tolist():
            yield [order[index] for index in made[number]]


def padded(sequences: Sequence[Sequence[int]], value: int = PAD) -> Tensor:
    """int64 (sequences, longest), filled up with `value`."""
    rows = [torch.tensor(list(sequence)) for sequence in sequences]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
