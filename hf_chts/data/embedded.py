"""A corpus that every machine has, the source files of the Python standard library, and its tokenizer."""

import hashlib
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import tokenizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from hf_chts.files.atomic import whole_directory

SPLITS = ("train", "validation", "test")
EOS_TOKEN = "<|endoftext|>"

# tests and installed packages are not the library; config-* and _sysconfigdata* differ between machines
_LEFT_OUT_FOLDERS = re.compile(r"tests?|.+_tests?|site-packages|dist-packages|__pycache__|config-.+|\..+")
_LEFT_OUT_FILES = re.compile(r"_sysconfigdata.*\.py|sitecustomize\.py|usercustomize\.py")


class Document(NamedTuple):
    """A source file: `path` relative to the standard library, with forward slashes, and its whole `text`."""

    path: str
    text: str


def split_of(path: str) -> str:
    """The split of a file, from its relative posix `path` alone: 90% are train, 5% validation, 5% test."""
    percent = int(hashlib.sha256(path.encode()).hexdigest(), 16) % 100
    return "train" if percent < 90 else "validation" if percent < 95 else "test"


def embedded_documents(split: str) -> list[Document]:
    """The documents of `split`, sorted by path. Empty files and files that are not UTF-8 are left out.

    Raises:
        ValueError: `split` is not in `SPLITS`.
        FileNotFoundError: this Python comes without the sources of its standard library.
    """
    if split not in SPLITS:
        raise ValueError(f"The embedded corpus has no split {split!r}: use one of {', '.join(SPLITS)}.")
    root = Path(sysconfig.get_path("stdlib"))
    documents = [
        Document(path, text)
        for path in sorted(_source_paths(root))
        if split_of(path) == split and (text := _read(root / path)).strip()
    ]
    if not documents:
        raise FileNotFoundError(
            f"There are no source files of the standard library in {root}, so there is no embedded corpus: "
            "use a Python that has its sources, or set dataset and tokenizer to other ones."
        )
    return documents


def embedded_dataset(split: str) -> datasets.Dataset:
    """The documents of `split`: string columns `path` and `text`. Raises as `embedded_documents` does."""
    documents = embedded_documents(split)
    return datasets.Dataset.from_dict({name: [getattr(d, name) for d in documents] for name in Document._fields})


def embedded_tokenizer(vocab_size: int, cache_dir: Path | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE of exactly `vocab_size` tokens, trained on the embedded corpus's train split.

    `<|endoftext|>` (id 0) ends a document and pads; there is no beginning-of-sequence token. Trained once per corpus
    and size, then read from `cache_dir` (by default `$HF_CHTS_CACHE`, else `~/.cache/hf_chts`).

    Raises:
        ValueError: `vocab_size` is smaller than 257 (256 bytes and EOS), or larger than the corpus can fill.
    """
    if cache_dir is None:
        cache_dir = Path(os.environ.get("HF_CHTS_CACHE") or "~/.cache/hf_chts").expanduser()
    documents = embedded_documents("train")
    digest = hashlib.sha256(tokenizers.__version__.encode())
    for document in documents:
        for part in document:
            digest.update(hashlib.sha256(part.encode()).digest())
    directory = cache_dir / f"tokenizer-{vocab_size}-{digest.hexdigest()[:16]}"
    if not directory.is_dir():
        tokenizer = train_byte_level_bpe((document.text for document in documents), vocab_size)
        try:
            with whole_directory(directory) as unfinished:
                tokenizer.save_pretrained(unfinished)
        except OSError:
            if not directory.is_dir():  # where another process finished first, its tokenizer is the same
                raise
    return PreTrainedTokenizerFast.from_pretrained(directory)


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of exactly `vocab_size` tokens: EOS, the 256 bytes, then the merges.

    Raises:
        ValueError: `vocab_size` is smaller than 257, or `texts` hold too few distinct pairs to reach it.
    """
    if vocab_size < 257:
        raise ValueError(
            f"vocab_size={vocab_size} is too small for a byte-level tokenizer: use at least 257 (256 bytes and EOS)."
        )
    bpe = tokenizers.Tokenizer(BPE())
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() != vocab_size:
        raise ValueError(
            f"The corpus fills a vocabulary of {bpe.get_vocab_size()} tokens, not vocab_size={vocab_size}: "
            "lower the model's vocab_size, or set tokenizer to one of that size."
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=EOS_TOKEN, pad_token=EOS_TOKEN, clean_up_tokenization_spaces=False
    )


def _source_paths(root: Path) -> Iterator[str]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _LEFT_OUT_FOLDERS.fullmatch(name)]
        for name in files:
            if name.endswith(".py") and not _LEFT_OUT_FILES.fullmatch(name):
                yield (Path(folder) / name).relative_to(root).as_posix()


def _read(path: Path) -> str:
    """The file's text with its line ends as they are; empty when it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return ""
