"""A corpus turned into prepared tokens, by several processes; taken up where it was left."""

import json
import multiprocessing
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_chts.data.arguments import OnBadDocument
from hf_chts.data.bad_documents import Sieve
from hf_chts.data.holdout import ByText
from hf_chts.data.packing import encode, tokenizer_digest
from hf_chts.data.prepare import SplitSource
from hf_chts.data.sources import Piece, Source, pieces
from hf_chts.data.token_files import INDEX_NAME, Shard, TokenIndex

# shards of a corpus of fewer files, so that several processes can work on it
_SHARDS = 16
_ENCODE_CHARACTERS = 2**20


@dataclass(frozen=True)
class ShardJob:
    """A shard to be made: contiguous pieces of a source, each choice of its documents into a split of its own.

    Attributes:
        number: its place among the shards of the source.
        splits: for each split the choice of its documents; None for all.
        key: what tells the whole preparation from another.
    """

    number: int
    source: Source
    pieces: tuple[Piece, ...]
    splits: dict[str, ByText | None]
    tokenizer: PreTrainedTokenizerBase
    dtype: str
    directory: Path
    key: str
    on_bad_document: OnBadDocument

    def name(self, split: str) -> str:
        return f"{split}-{self.number:05}"

    @property
    def record(self) -> Path:
        return self.directory / f"{self.name(next(iter(self.splits)))}.json"


def prepare_tokens(
    corpus: SplitSource,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    *,
    tokenizer_name: str,
    on_bad_document: OnBadDocument = "error",
    workers: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> TokenIndex:
    """Tokenize all documents of both parts into `directory`, and write its index.

    Shards that are there already, from an earlier call with the same arguments, are checked and kept.

    Args:
        tokenizer_name: what to call the tokenizer in messages.
        on_bad_document: whether a bad document raises, or is left out and counted. It may differ from call to call.
        workers: processes; None for one per core.
        progress: called with a line after each shard.

    Raises:
        FileExistsError: `directory` holds something else, or tokens of another corpus or tokenizer.
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
    plans: list[tuple[Source, dict[str, ByText | None]]]
    if corpus.held_out is None:
        plans = [(corpus.train, {"train": None}), (corpus.validation, {"validation": None})]
    else:
        plans = [(corpus.train, {"train": corpus.kept, "validation": corpus.held_out})]
    jobs = [
        ShardJob(number, source, dealt, dict(splits), tokenizer, dtype, directory, key, on_bad_document)
        for source, splits in plans
        for number, dealt in enumerate(_deal(source))
    ]
    _check_directory(directory, key)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _KEY_NAME).write_text(key, encoding="utf-8")
    made = _run(jobs, workers or os.cpu_count() or 1, progress)
    splits = {name: [shards[name] for shards in made if name in shards] for name in ("train", "validation")}
    documents = {name: sum(shard.documents for shard in shards) for name, shards in splits.items()}
    for name, choice in (("train", corpus.kept), ("validation", corpus.held_out)):
        if choice is not None and not documents[name]:
            raise choice.chose_nothing(sum(documents.values()))
    index = TokenIndex(description, digest, dtype, splits)
    _write_whole(directory / INDEX_NAME, index.to_json())
    return index


_KEY_NAME = "preparation.json"


def _check_directory(directory: Path, key: str) -> None:
    if not directory.exists() or not any(directory.iterdir()):
        return
    path = directory / _KEY_NAME
    if not path.is_file():
        raise FileExistsError(f"{directory} is not empty and holds no prepared tokens: give a new directory")
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
            + (f", {skipped:,} bad documents left out" if skipped else "")
        )

    if workers == 1:
        for index, job in enumerate(jobs):
            done(index, make_shard(job))
    else:
        # not forked: the tokenizer's threads would not survive it
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
    """Tokenize a shard, unless it is there already; what it holds, by split."""
    if job.record.is_file():
        shards = {name: Shard(**shard) for name, shard in json.loads(job.record.read_text("utf-8")).items()}
        for shard in shards.values():
            shard.check(job.directory, job.dtype, contents=True)
        return shards
    sieve = Sieve(job.on_bad_document)
    writers = {split: _Writer(job.directory / job.name(split), job.dtype) for split in job.splits}
    try:
        for batch in _batches(job, sieve):
            for split, choice in job.splits.items():
                texts = [text for text in batch if choice is None or choice(text)]
                for tokens in encode(texts, job.tokenizer, _ENCODE_CHARACTERS):
                    writers[split].add(tokens)
        # what cannot be read belongs to no split: it is counted with the first
        counts = [sieve.skipped, *[0] * len(writers)]
        shards = {split: writers[split].finish(skipped) for split, skipped in zip(writers, counts, strict=False)}
    finally:
        for writer in writers.values():
            writer.close()
    _write_whole(job.record, json.dumps({split: asdict(shard) for split, shard in shards.items()}))
    return shards


def _batches(job: ShardJob, sieve: Sieve) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for piece in job.pieces:
        for text, _ in job.source.read(piece.shard, piece.part, piece.parts):
            if sieve(text):
                batch.append(text)
                characters += len(text)
            if characters >= _ENCODE_CHARACTERS:
                yield batch
                batch, characters = [], 0
    yield batch


class _Writer:
    """The two files of a shard, under other names until they are whole."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype = path, dtype
        self.files: dict[str, IO[bytes]] = {
            ending: open(path.with_name(f".{path.name}.{ending}.{os.getpid()}"), "wb")  # noqa: SIM115
            for ending in ("tokens", "documents")
        }
        self.checksums = dict.fromkeys(self.files, 0)
        self.tokens = self.documents = 0

    def add(self, tokens: list[int]) -> None:
        self._write("tokens", np.asarray(tokens, dtype=self.dtype).tobytes())
        self._write("documents", np.asarray([len(tokens)], dtype="<u4").tobytes())
        self.tokens += len(tokens)
        self.documents += 1

    def _write(self, ending: str, data: bytes) -> None:
        self.files[ending].write(data)
        self.checksums[ending] = zlib.crc32(data, self.checksums[ending])

    def finish(self, skipped: int) -> Shard:
        for ending, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(file.name, self.path.with_name(f"{self.path.name}.{ending}"))
        checksums = (self.checksums["tokens"], self.checksums["documents"])
        return Shard(self.path.name, self.tokens, self.documents, *checksums, skipped)

    def close(self) -> None:
        """Remove what is not whole."""
        for file in self.files.values():
            file.close()
            Path(file.name).unlink(missing_ok=True)


def _write_whole(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
