"""A stream under a real `Trainer`: which blocks each rank trains on, with workers and with two ranks."""

import json
import os
import socket
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_chts.data import DataArguments, load_data

BATCH, STEPS, BLOCK = 2, 3, 8


class RecordingTrainer(Trainer):
    """Writes down the blocks of every training step."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            self.seen = [*getattr(self, "seen", []), *inputs["input_ids"].tolist()]
        return super().compute_loss(model, inputs, *args, **kwargs)


def train_on(folder, corpus, num_workers=0, dispatch_batches=None):
    args = DataArguments(
        dataset=str(corpus),
        tokenizer=str(folder / "letters"),
        block_size=BLOCK,
        streaming=True,
        validation_documents=3,
    )
    data = load_data(args, vocab_size=257, seed=0)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    trainer = RecordingTrainer(
        model=LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=BLOCK, **shape)),
        args=TrainingArguments(
            output_dir=str(folder / "out"),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            dataloader_num_workers=num_workers,
            accelerator_config={"dispatch_batches": dispatch_batches},
            use_cpu=True,
            report_to=[],
            save_strategy="no",
        ),
        train_dataset=data.train,
        eval_dataset=data.validation,
    )
    trainer.train()
    assert trainer.state.global_step == STEPS
    return trainer, data


@pytest.fixture
def folder(tmp_path, letters):
    """Four files of 30 documents that are all different; the tokenizer next to them."""
    letters.save_pretrained(tmp_path / "letters")
    (tmp_path / "corpus").mkdir()
    for file in range(4):
        rows = [json.dumps({"text": f"file {file} row {row}"}) for row in range(30)]
        (tmp_path / "corpus" / f"{file}.jsonl").write_text("\n".join(rows))
    return tmp_path


def expected_blocks(folder, letters):
    """The stream worked out from the files: the first three documents are held out."""
    texts = [json.loads(line)["text"] for file in range(4) for line in lines_of(folder, file)][3:]
    ids = [index for text in texts for index in [*map(letters.get_vocab().get, text.replace(" ", "Ġ")), 0]]
    return [ids[start : start + BLOCK] for start in range(0, len(ids) - BLOCK + 1, BLOCK)]


def lines_of(folder, file):
    return (folder / "corpus" / f"{file}.jsonl").read_text().splitlines()


def test_training_on_a_stream(folder, letters):
    trainer, data = train_on(folder, folder / "corpus")
    expected = expected_blocks(folder, letters)
    assert trainer.seen == expected[: STEPS * BATCH]
    assert [block["input_ids"].tolist() for block in islice(data.train, len(expected) + 1)] == expected
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))


def test_several_epochs_of_a_stream(folder, letters):
    """A corpus smaller than max_steps starts anew."""
    small = folder / "small.jsonl"
    small.write_text("\n".join(lines_of(folder, 0)[:7]))
    trainer, _ = train_on(folder, small)
    blocks = expected_blocks(folder, letters)[:6]  # 4 documents of 13 tokens
    assert trainer.seen == blocks[: STEPS * BATCH]
    one_block = folder / "one.jsonl"
    one_block.write_text("\n".join(lines_of(folder, 0)[:4]))
    trainer, _ = train_on(folder, one_block)
    assert trainer.seen == [blocks[0]] * STEPS


def test_two_workers(folder, letters):
    trainer, _ = train_on(folder, folder / "corpus", num_workers=2)
    expected = expected_blocks(folder, letters)
    # the first worker packs files 0 and 2 (as the whole stream begins), the second files 1 and 3; they take turns
    assert [trainer.seen[i] for i in (0, 1, 4, 5)] == expected[:4]
    assert letters.decode(trainer.seen[2]) == "file 1 r"


@pytest.mark.distributed
def test_two_ranks(folder, letters):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        ranks.append(
            subprocess.Popen(
                [sys.executable, __file__, str(folder)], env=environment, stderr=subprocess.PIPE, text=True
            )
        )
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)

    for dispatch_batches in ("None", "False"):
        seen = [json.loads((folder / f"{dispatch_batches}-{rank}.json").read_text()) for rank in range(2)]
        assert [len(blocks) for blocks in seen] == [STEPS * BATCH] * 2
        # together, step by step, the beginning of the stream: none left out, none twice
        together = [
            block for step in range(STEPS) for blocks in seen for block in blocks[step * BATCH : (step + 1) * BATCH]
        ]
        assert together == expected_blocks(folder, letters)[: 2 * STEPS * BATCH]


if __name__ == "__main__":
    run = Path(sys.argv[1])
    for dispatch in (None, False):
        trainer, _ = train_on(run, run / "corpus", dispatch_batches=dispatch)
        assert dist.get_world_size() == 2
        (run / f"{dispatch}-{dist.get_rank()}.json").write_text(json.dumps(trainer.seen))
    dist.destroy_process_group()
