import math

import pytest
import torch
from transformers import EvalPrediction, Trainer, TrainingArguments

from hf_chts.evaluation import language_modeling_metrics
from hf_chts.evaluation.trainer_metrics import token_losses

LENGTHS = torch.arange(257) % 5  # some tokens stand for no byte at all


def examples():
    """Seven rows, of lengths that batches of three have to pad differently; labels ignored at the start and inside."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for length in (9, 5, 12, 7, 7, 3, 16):
        ids = torch.randint(257, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 4] = -100
        labels[length // 2] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def collate(rows):
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad([row["input_ids"] for row in rows], batch_first=True, padding_value=0),
        "attention_mask": pad([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True),
        "labels": pad([row["labels"] for row in rows], batch_first=True, padding_value=-100),
    }


def brute_force(model, rows):
    """(total nats, tokens, bytes), one unpadded row and one token at a time, with log_softmax in float64."""
    nats, tokens, total_bytes = 0.0, 0, 0
    with torch.no_grad():
        for row in rows:
            log_probabilities = model(row["input_ids"][None]).logits[0].double().log_softmax(-1)
            for position in range(1, len(row["labels"])):
                label = int(row["labels"][position])
                if label >= 0:
                    nats -= float(log_probabilities[position - 1, label])
                    tokens += 1
                    total_bytes += label % 5
    return nats, tokens, total_bytes


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_trainer_agrees_with_a_loop_over_tokens(tmp_path, tiny_llama, batch_size):
    model = tiny_llama(0).eval()
    preprocess, compute = language_modeling_metrics(LENGTHS)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(tmp_path),
            per_device_eval_batch_size=batch_size,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        ),
        data_collator=collate,
        eval_dataset=examples(),
        preprocess_logits_for_metrics=preprocess,
        compute_metrics=compute,
    )
    metrics = trainer.evaluate()
    nats, tokens, total_bytes = brute_force(model, examples())
    assert metrics["eval_loss_per_token"] == pytest.approx(nats / tokens, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert metrics["eval_bits_per_byte"] == pytest.approx(nats / math.log(2) / total_bytes, rel=1e-5)
    assert "eval_loss" in metrics  # the Trainer's own, untouched


def test_what_is_kept_of_the_logits_is_one_number_per_token():
    logits = torch.randn(2, 6, 257, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[5, 1, -100, 9, 200, 256], [7, -100, -100, -100, -100, -100]])
    losses = token_losses((logits, "past key values"), labels)
    assert losses.shape == (2, 5)
    assert losses.dtype == torch.float32
    assert (losses == -100).tolist() == (labels[:, 1:] == -100).tolist()
    expected = -(logits[0, 3].float().softmax(-1)[200].log())
    assert losses[0, 3].item() == pytest.approx(expected.item(), rel=1e-5)


def test_refuses_what_cannot_be_scored():
    with pytest.raises(ValueError, match="float32"):
        language_modeling_metrics(torch.ones(257))
    _, compute = language_modeling_metrics(LENGTHS[:10])
    with pytest.raises(ValueError, match="Label 10 has no byte length"):
        compute(EvalPrediction(predictions=torch.ones(1, 1).numpy(), label_ids=torch.tensor([[0, 10]]).numpy()))
    with pytest.raises(ValueError, match="0 tokens"):
        compute(EvalPrediction(predictions=torch.ones(1, 1).numpy(), label_ids=torch.tensor([[0, -100]]).numpy()))
