"""A stream under a real Trainer: the blocks that each rank trains on, and runs resumed from a checkpoint."""

import json
import shutil
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import arguments, case_config, losses, same_weights, weights
from tiny import random_blocks, tiny_llama
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from two_ranks import run_two_ranks

from hf_chts import SparseTrainer
from hf_chts.commands import end_rank
from hf_chts.data import BlockStream, DataArguments, Shuffle, load_data, load_source

BATCH, ACCUMULATION, STEPS, SAVED, BLOCK = 2, 3, 9, 4, 16


class Recording:
    """Keeps the blocks of every training step."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.seen = [*getattr(self, "seen", []), inputs["input_ids"].tolist()]
        return super().training_step(model, inputs, *args, **kwargs)


class RecordingTrainer(Recording, Trainer):
    pass


class RecordingSparseTrainer(Recording, SparseTrainer):
    pass


@pytest.fixture(scope="module")
def trained(tmp_path_factory, letters):
    """Files of uneven numbers of documents that are all different, the tokenizer, and a run with its trainer."""
    folder = tmp_path_factory.mktemp("trained")
    letters.save_pretrained(folder / "letters")
    (folder / "corpus").mkdir()
    for file, count in enumerate((30, 4, 61)):
        rows = [json.dumps({"text": f"file {file} row {row}"}) for row in range(count)]
        (folder / "corpus" / f"{file}.jsonl").write_text("\n".join(rows))
    trainer = sparse_trainer(folder, "run")
    trainer.train()
    return folder, trainer


@pytest.fixture
def folder(trained, tmp_path):
    """The corpus and the tokenizer, which a test may change."""
    for name in ("letters", "corpus"):
        shutil.copytree(trained[0] / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def checkpoint(trained):
    return str(trained[0] / f"run/checkpoint-{SAVED}")


def stream_of(folder):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "letters")
    return BlockStream(load_source(str(folder / "corpus")), tokenizer, BLOCK, shuffle=Shuffle(8, 3))


def sparse_trainer(folder, name, dataset=None, workers=2, **changes):
    # a rank is to be the same whether there are two or not
    settings = {"max_steps": STEPS, "save_steps": SAVED, "per_device_train_batch_size": BATCH, **changes}
    return RecordingSparseTrainer(
        model=tiny_llama(vocab_size=257),
        args=arguments(
            folder / name,
            gradient_accumulation_steps=ACCUMULATION,
            dataloader_num_workers=workers,
            ddp_find_unused_parameters=False,
            **settings,
        ),
        sparsity=case_config(update_interval=3),
        train_dataset=dataset or stream_of(folder),
    )


def test_resumed_bit_for_bit(folder, trained, checkpoint):
    unbroken = trained[1]
    assert len(unbroken.seen) == STEPS * ACCUMULATION
    resumed = sparse_trainer(folder, "resumed")
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.seen == unbroken.seen[SAVED * ACCUMULATION :]
    assert resumed.seen != unbroken.seen[: len(resumed.seen)]
    assert same_weights(weights(resumed), weights(unbroken))
    assert losses(resumed) == losses(unbroken)
    assert [entry["epoch"] for entry in resumed.state.log_history if "loss" in entry] == [
        entry["epoch"] for entry in unbroken.state.log_history if "loss" in entry
    ]
    assert resumed.args.ignore_data_skip is False
    # and a checkpoint of the resumed run is as good
    third = sparse_trainer(folder, "third")
    third.train(resume_from_checkpoint=str(folder / f"resumed/checkpoint-{2 * SAVED}"))
    assert third.seen == unbroken.seen[2 * SAVED * ACCUMULATION :]


def spoil(folder):
    """Add a bad document to each file but the small one."""
    for file in (0, 2):
        path = folder / f"corpus/{file}.jsonl"
        path.write_text(path.read_text() + '\n{"text": ["a", "list"]}')


def skipped_in(history):
    """By step, of the logs of training and of its end."""
    return [
        (entry["step"], entry.get("documents_skipped")) for entry in history if "loss" in entry or "train_loss" in entry
    ]


def test_documents_that_were_skipped_are_counted_in_the_log(folder, trained):
    assert {count for _, count in skipped_in(trained[1].state.log_history)} == {None}
    spoil(folder)
    settings = {"max_steps": 30, "save_steps": 15, "logging_steps": 5}
    unbroken = sparse_trainer(folder, "run", **settings)
    unbroken.train()
    counts = skipped_in(unbroken.state.log_history)
    # the bad documents in the windows of the batches so far, two in an epoch; steps with an update are logged too
    logged = {step for step in range(1, 31) if step % 5 == 0 or unbroken.evolver.plan.is_update(step)}
    loader = stream_of(folder).loader(batch_size=BATCH, workers=2)
    expected = []
    for taken, _ in enumerate(islice(loader, 30 * ACCUMULATION), 1):
        if taken % ACCUMULATION == 0 and taken // ACCUMULATION in logged:
            expected.append((taken // ACCUMULATION, loader.skipped or None))
    assert counts == [*expected, expected[-1]]
    assert 4 <= counts[-1][1] <= 2 * (loader.state_dict()["readers"][0]["place"]["epoch"] + 2)
    resumed = sparse_trainer(folder, "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(folder / "run/checkpoint-15"))
    assert skipped_in(resumed.state.log_history) == counts


def test_another_number_of_workers_is_refused_or_starts_the_data_over(folder, trained, checkpoint):
    other = sparse_trainer(folder, "other", workers=0)
    before = weights(other)
    with pytest.raises(ValueError, match=r"checkpoint-4 cannot be resumed: .*1 ranks with 2 .* now there are 1 ranks"):
        other.train(resume_from_checkpoint=checkpoint)
    assert same_weights(weights(other), before)
    runs = []
    for name in ("a", "b"):
        anew = sparse_trainer(folder, name, workers=0, ignore_data_skip=True)
        anew.train(resume_from_checkpoint=checkpoint)
        assert anew.state.global_step == STEPS
        runs.append(anew.seen)
    assert runs[0] == runs[1]
    fresh = stream_of(folder).loader(batch_size=BATCH)
    first = [batch["input_ids"].tolist() for batch in islice(fresh, STEPS * ACCUMULATION)]
    assert sum(batch in first for batch in runs[0]) < len(runs[0]) / 4  # a few by chance


def test_data_of_another_kind_are_refused(folder, checkpoint):
    mapped = sparse_trainer(folder, "mapped", random_blocks(), save_steps=2)
    with pytest.raises(ValueError, match=r"was trained on a stream, this run does not read one"):
        mapped.train(resume_from_checkpoint=checkpoint)
    sparse_trainer(folder, "mapped", random_blocks(), save_steps=2).train()
    stream = sparse_trainer(folder, "stream")
    with pytest.raises(FileNotFoundError, match=r"was not trained on a stream, this run reads one"):
        stream.train(resume_from_checkpoint=str(folder / "mapped/checkpoint-2"))


def test_a_damaged_state_and_other_files_are_refused(folder, checkpoint):
    copied = shutil.copytree(checkpoint, folder / "copy/checkpoint-4")
    (copied / "data_state_0.json").write_text("{}")
    with pytest.raises(ValueError, match=r"data_state_0.json has 2 bytes"):
        sparse_trainer(folder, "other").train(resume_from_checkpoint=str(copied))
    (folder / "corpus/9.jsonl").write_text('{"text": "one more"}\n')
    with pytest.raises(ValueError, match=r"checkpoint-4 cannot be resumed: .*files: 3 there, 4 here"):
        sparse_trainer(folder, "other").train(resume_from_checkpoint=checkpoint)


def test_a_plain_trainer_reads_a_stream(folder):
    """Epoch after epoch, the whole corpus each time."""
    args = DataArguments(
        dataset=str(folder / "corpus"), tokenizer=str(folder / "letters"), block_size=BLOCK, streaming=True,
        shuffle_buffer=8,
    )  # fmt: skip
    data = load_data(args, vocab_size=257, seed=0)
    trainer = RecordingTrainer(
        model=tiny_llama(vocab_size=257),
        args=arguments(folder / "plain", TrainingArguments, max_steps=60, save_strategy="no"),
        train_dataset=data.train,
        eval_dataset=data.validation,
    )
    trainer.train()
    data.train.set_epoch(0)
    one_epoch = [block["input_ids"].tolist() for block in data.train]
    seen = [block for batch in trainer.seen for block in batch]
    assert len(seen) > 2 * len(one_epoch)
    assert seen[: len(one_epoch)] == one_epoch
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))


@pytest.mark.distributed
def test_two_ranks(folder):
    spoil(folder)
    run_two_ranks(__file__, folder)
    unbroken, resumed = ([json.loads((folder / f"{run}-{r}.json").read_text()) for r in (0, 1)] for run in ("a", "b"))
    assert [len(blocks) for blocks in unbroken] == [STEPS * ACCUMULATION] * 2
    assert resumed == [blocks[SAVED * ACCUMULATION :] for blocks in unbroken]
    # what the loader alone gives the two, so each trains on its own share
    for rank in range(2):
        alone = stream_of(folder).loader(rank=rank, ranks=2, batch_size=BATCH)
        assert [batch["input_ids"].tolist() for batch in islice(alone, STEPS * ACCUMULATION)] == unbroken[rank]
    assert unbroken[0] != unbroken[1]
    # and the log counts what both have skipped
    readers = [json.loads((folder / f"a/checkpoint-{STEPS}/data_state_{rank}.json").read_text()) for rank in range(2)]
    skipped = [state["readers"][0]["skipped"] for state in readers]
    assert min(skipped) > 0
    for run in ("a", "b"):
        history = json.loads((folder / run / f"checkpoint-{STEPS}/trainer_state.json").read_text())["log_history"]
        assert skipped_in(history)[-1] == (STEPS, sum(skipped))
    for rank in range(2):
        assert (folder / f"a/checkpoint-{SAVED}/data_state_{rank}.json").is_file()
    last = [(folder / run / f"checkpoint-{STEPS}/model.safetensors").read_bytes() for run in ("a", "b")]
    assert last[0] == last[1]


if __name__ == "__main__":
    run = Path(sys.argv[1])
    for name, checkpoint in (("a", None), ("b", str(run / f"a/checkpoint-{SAVED}"))):
        trainer = sparse_trainer(run, name, workers=1, ddp_backend="gloo")
        assert dist.get_world_size() == 2
        trainer.train(resume_from_checkpoint=checkpoint)
        (run / f"{name}-{dist.get_rank()}.json").write_text(json.dumps(trainer.seen))
    dist.destroy_process_group()
    end_rank()
