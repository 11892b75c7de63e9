"""Tokens a second of the data pipeline alone against the training step of LLaMA-60M, and how long the step waits.

    python benchmarks/data_pipeline.py [--repeats 5]

The corpus is the Python standard library's own sources, cut into documents of 60 lines and written as the Hub's
datasets are: Parquet as OpenWebText, gzipped JSON lines as C4, JSON lines in Zstandard as SlimPajama. In each repeat
the training step and every case are measured in turns; prints one JSON line a case, with the median of the ratios.
Streams are shuffled; each case begins when every worker has given its first batches.
"""

import gzip
import json
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from setups import MODELS, UNEVENTFUL, StopAfter, network, with_model
from torch.utils.data import DataLoader
from transformers import AutoConfig, PrinterCallback, default_data_collator

from hf_chts import SparseTrainer, SparseTrainingArguments, SparsityConfig
from hf_chts.data import BlockStream, DataArguments, Shuffle, embedded_documents, embedded_tokenizer, load_source
from hf_chts.data.loading import load_corpus
from hf_chts.data.token_preparation import prepare_tokens

FILES, LINES = 8, 60
CORPORA = ("parquet", "json.gz", "jsonl.zst")


def write_corpus(folder: Path) -> None:
    sources = [document.text.splitlines(keepends=True) for document in embedded_documents("train")]
    texts = ["".join(part[i : i + LINES]) for part in sources for i in range(0, len(part), LINES)]
    for name in CORPORA:
        (folder / name).mkdir()
    for file in range(FILES):
        mine = texts[file::FILES]
        pq.write_table(pa.table({"text": mine}), folder / f"parquet/train-{file:05}-of-{FILES:05}.parquet")
        lines = "".join(json.dumps({"text": text}) + "\n" for text in mine).encode()
        (folder / f"json.gz/c4-train.{file:05}-of-{FILES:05}.json.gz").write_bytes(gzip.compress(lines))
        packed = pa.Codec("zstd").compress(lines, asbytes=True)
        (folder / f"jsonl.zst/train-{file:05}-of-{FILES:05}.jsonl.zst").write_bytes(packed)


def rate(batches, seconds: float) -> float:
    """Tokens a second of an iterator over batches, for about so long."""
    tokens, start = 0, time.perf_counter()
    for batch in batches:
        tokens += batch["input_ids"].numel()
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            break
    return tokens / elapsed


class Timing(SparseTrainer):
    """Measures how long each step waits for its batches."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.waited: list[float] = []

    def get_batch_samples(self, *args, **kwargs):
        start = time.perf_counter()
        samples = super().get_batch_samples(*args, **kwargs)
        self.waited.append(time.perf_counter() - start)
        return samples


def train(model: str, dataset, batch: int, workers: int, steps: int) -> tuple[float, float]:
    """Seconds of a step, the median, and the share of the time that goes by in waiting; the first step is left out."""
    stop = StopAfter(steps)
    trainer = Timing(
        model=network(model),
        args=SparseTrainingArguments(
            output_dir="/tmp/hf_chts_data_pipeline",
            per_device_train_batch_size=batch,
            dataloader_num_workers=workers,
            use_cpu=True,
            **UNEVENTFUL,
        ),
        # far from the end of the run, so that no update falls into the measurement
        sparsity=SparsityConfig(method="chtss", update_interval=10_000),
        train_dataset=dataset,
        data_collator=default_data_collator,
        callbacks=[stop],
    )
    trainer.remove_callback(PrinterCallback)  # standard output is for the JSON lines
    trainer.train()
    seconds = [after - before for before, after in zip(stop.ended, stop.ended[1:], strict=False)]
    return statistics.median(seconds), sum(trainer.waited[1:]) / sum(seconds)


def main() -> None:
    parser = with_model(__doc__)
    parser.add_argument("--batch", type=int, default=8, help="sequences of 256 tokens (default: 8)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of all cases (default: 5)")
    parser.add_argument("--steps", type=int, default=4, help="training steps in each repeat (default: 4)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each case in each repeat (default: 2)")
    args = parser.parse_args()
    vocabulary = AutoConfig.from_pretrained(MODELS / f"{args.model}.json").vocab_size
    tokenizer = embedded_tokenizer(vocabulary)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        write_corpus(folder)
        corpus = load_corpus(DataArguments(dataset=str(folder / "parquet"), streaming=True), seed=0)
        index = prepare_tokens(corpus, tokenizer, folder / "tokens", tokenizer_name="embedded", workers=1)
        tokens = index.blocks(folder / "tokens", "train", tokenizer, 256, "packed")
        streams = {
            name: BlockStream(load_source(str(folder / name)), tokenizer, 256, shuffle=Shuffle(1000, 0))
            for name in CORPORA
        }

        def stream_rate(name: str, workers: int) -> float:
            batches = iter(streams[name].loader(batch_size=args.batch, workers=workers, collate=default_data_collator))
            for _ in islice(batches, max(1, workers) * 3):  # those that were made ahead, too
                pass
            return rate(batches, args.seconds)

        def prepared_rate(workers: int) -> float:
            loader = iter(DataLoader(tokens, args.batch, shuffle=True, num_workers=workers, drop_last=True))
            for _ in islice(loader, max(1, workers) * 3):
                pass
            return rate(loader, args.seconds)

        cases = {
            f"streamed {name}, {workers} worker{'s' * (workers > 1)}": (stream_rate, (name, workers))
            for name in streams
            for workers in (1, 2)
        } | {"prepared, no worker": (prepared_rate, (0,)), "prepared, 1 worker": (prepared_rate, (1,))}
        steps: list[float] = []
        waits: list[float] = []
        rates: dict[str, list[float]] = {name: [] for name in cases}
        for repeat in range(args.repeats + 1):
            seconds, waited = train(args.model, streams["json.gz"], args.batch, 1, args.steps)
            measured = {name: measure(*options) for name, (measure, options) in cases.items()}
            if repeat:  # the first is to warm up
                steps.append(args.batch * 256 / seconds)
                waits.append(waited)
                for name, value in measured.items():
                    rates[name].append(value)
    for name, values in rates.items():
        ratios = [value / step for value, step in zip(values, steps, strict=True)]
        print(
            json.dumps({
                "benchmark": "data_pipeline",
                "case": name,
                "tokens_per_second": round(statistics.median(values)),
                "step_tokens_per_second": round(statistics.median(steps)),
                "ratio": round(statistics.median(ratios), 1),
                "ratios": [round(ratio, 1) for ratio in sorted(ratios)],
                "model": args.model,
                "batch": f"{args.batch}x256",
                "threads": torch.get_num_threads(),
            }),
            flush=True,
        )  # fmt: skip
    print(
        json.dumps({
            "benchmark": "data_pipeline",
            "case": "training on streamed json.gz, 1 worker: share of the step spent on waiting for data",
            "share": round(statistics.median(waits), 5),
            "shares": [round(share, 5) for share in sorted(waits)],
            "repeats": args.repeats,
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
