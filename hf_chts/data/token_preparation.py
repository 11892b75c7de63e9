"""A corpus turned into prepared tokens by several processes, resumed where an earlier call stopped."""

import json
import multiprocessing
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_chts.data.arguments import OnBadDocument
from hf_chts.data.bad_documents import DocumentFilter
from hf_chts.data.holdout import Holdout
from hf_chts.data.loading import Corpus
from hf_chts.data.packing import encode, text_batches
from hf_chts.data.sources import Piece, Source, pieces
from hf_chts.data.token_files import Shard, TokenIndex
from hf_chts.data.tokenizer import tokenizer_digest
from hf_chts.files.atomic import whole_file, write_json, write_whole

# at least this many shards, so that several processes can work on a corpus of few files
_SHARDS = 16
_KEY_NAME = "preparation.json"


@dataclass(frozen=True)
class ShardJob:
    """A shard to be made: contiguous pieces of a source, with a part for each split.

    Attributes:
        number: its place among the shards of the source.
        splits: for each split the choice of its documents; None for all.
    """

    number: int
    source: Source
    pieces: tuple[Piece, ...]
    splits: dict[str, Holdout | None]
    tokenizer: PreTrainedTokenizerBase
    dtype: str
    directory: Path
    on_bad_document: OnBadDocument

    def name(self, split: str) -> str:
        return f"{split}-{self.number:05}"

    @property
    def record(self) -> Path:
        """The file that says what was made; it is written last."""
        return self.directory / f"{self.name(next(iter(self.splits)))}.json"


def prepare_tokens(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    *,
    tokenizer_name: str,
    on_bad_document: OnBadDocument = "error",
    workers: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> TokenIndex:
    """Tokenize all documents of both parts into `directory`, and write its index.

    Shards that an earlier call with the same arguments made are checked and kept.

    Args:
        tokenizer_name: what to call the tokenizer in messages.
        on_bad_document: whether a bad document raises, or is skipped and counted; may differ from call to call.
        workers: processes; None for one per core.
        progress: called with a line after each shard.

    Raises:
        FileExistsError: `directory` holds other files, or tokens of another corpus or tokenizer.
        FileNotFoundError, ValueError: something is wrong with the corpus or a document.
    """
    directory = Path(directory)
    digest = tokenizer_digest(tokenizer)
    description = {
        "train": {**corpus.train.identity, "documents": str(corpus.kept or "all")},
        "validation": {**corpus.validation.identity, "documents": str(corpus.held_out or "all")},
        "tokenizer": tokenizer_name,
    }
    key = json.dumps([description, digest])
    dtype = "<u2" if len(tokenizer) <= 2**16 else "<u4"
    plans: list[tuple[Source, dict[str, Holdout | None]]]
    if corpus.held_out is None:
        plans = [(corpus.train, {"train": None}), (corpus.validation, {"validation": None})]
    else:
        plans = [(corpus.train, {"train": corpus.kept, "validation": corpus.held_out})]
    jobs = [
        ShardJob(number, source, dealt, splits, tokenizer, dtype, directory, on_bad_document)
        for source, splits in plans
        for number, dealt in enumerate(_deal(source))
    ]
    _check_directory(directory, key)
    write_whole(directory / _KEY_NAME, key)
    made = _run(jobs, workers or os.cpu_count() or 1, progress)
    splits = {name: [shards[name] for shards in made if name in shards] for name in ("train", "validation")}
    documents = {name: sum(shard.documents for shard in shards) for name, shards in splits.items()}
    for name, choice in (("train", corpus.kept), ("validation", corpus.held_out)):
        if choice is not None and not documents[name]:
            raise choice.empty_error(sum(documents.values()))
    index = TokenIndex(description, digest, dtype, splits)
    index.save(directory)
    return index


def _check_directory(directory: Path, key: str) -> None:
    if not directory.exists() or not any(directory.iterdir()):
        return
    path = directory / _KEY_NAME
    if not path.is_file():
        raise FileExistsError(f"{directory} is not empty and does not hold prepared tokens: give a new directory")
    if path.read_text(encoding="utf-8") != key:
        raise FileExistsError(
            f"{directory} holds tokens of another corpus, split or tokenizer: give a new directory, or remove it"
        )


def _deal(source: Source) -> Iterator[tuple[Piece, ...]]:
    shards = max(source.num_shards, _SHARDS)
    every = pieces(source.num_shards, shards)
    each = len(every) // shards
    for number in range(shards):
        yield tuple(every[number * each : (number + 1) * each])


def _run(jobs: list[ShardJob], workers: int, progress: Callable[[str], None]) -> list[dict[str, Shard]]:
    made: dict[int, dict[str, Shard]] = {}

    def done(index: int, shards: dict[str, Shard]) -> None:
        made[index] = shards
        tokens = sum(shard.tokens for shard in shards.values())
        skipped = sum(shard.skipped for shard in shards.values())
        progress(
            f"{len(made)} of {len(jobs)} shards: {tokens:,} tokens in {jobs[index].record.stem}"
            + (f", {skipped:,} bad documents skipped" if skipped else "")
        )

    if workers == 1:
        for index, job in enumerate(jobs):
            done(index, make_shard(job))
    else:
        # a fork would lose the tokenizer's threads
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
            futures = {pool.submit(_make_in_process, job): index for index, job in enumerate(jobs)}
            try:
                for future in as_completed(futures):
                    done(futures[future], future.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return [made[index] for index in range(len(jobs))]


def _make_in_process(job: ShardJob) -> dict[str, Shard]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return make_shard(job)


def make_shard(job: ShardJob) -> dict[str, Shard]:
    """Tokenize a shard, unless it exists already; returns what it holds, by split."""
    if job.record.is_file():
        shards = {name: Shard(**shard) for name, shard in json.loads(job.record.read_text("utf-8")).items()}
        for shard in shards.values():
            shard.check(job.directory, job.dtype, contents=True)
        return shards
    accept = DocumentFilter(job.on_bad_document)
    documents = (
        document for piece in job.pieces for document, _ in job.source.read(piece.shard, piece.part, piece.parts)
    )
    with ExitStack() as files:
        writers = {split: _ShardWriter(files, job.directory / job.name(split), job.dtype) for split in job.splits}
        for batch in text_batches(document for document in documents if accept(document)):
            for split, choice in job.splits.items():
                for tokens in encode((text for text in batch if choice is None or choice(text)), job.tokenizer):
                    writers[split].add(tokens)
    # a bad document belongs to no split: it is counted with the first
    counts = [accept.skipped, *[0] * len(writers)]
    shards = {split: writers[split].shard(skipped) for split, skipped in zip(writers, counts, strict=False)}
    write_json(job.record, {split: asdict(shard) for split, shard in shards.items()})
    return shards


class _ShardWriter:
    """Writes the two files of a shard, which take their places when `files` is closed without an error."""

    def __init__(self, files: ExitStack, path: Path, dtype: str) -> None:
        self.name, self.dtype = path.name, dtype
        self.files = {
            ending: files.enter_context(whole_file(path.with_name(f"{path.name}.{ending}")))
            for ending in ("tokens", "documents")
        }
        self.checksums = dict.fromkeys(self.files, 0)
        self.tokens = self.documents = 0

    def add(self, tokens: list[int]) -> None:
        for ending, data in (
            ("tokens", np.asarray(tokens, dtype=self.dtype).tobytes()),
            ("documents", np.asarray([len(tokens)], dtype="<u4").tobytes()),
        ):
            self.files[ending].write(data)
            self.checksums[ending] = zlib.crc32(data, self.checksums[ending])
        self.tokens += len(tokens)
        self.documents += 1

    def shard(self, skipped: int) -> Shard:
        checksums = (self.checksums["tokens"], self.checksums["documents"])
        return Shard(self.name, self.tokens, self.documents, *checksums, skipped)
