"""What trains a translator: a model from scratch, batches of about as many tokens, and transformers' Seq2SeqTrainer."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    MarianConfig,
    MarianMTModel,
    PegasusConfig,
    PegasusForConditionalGeneration,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_chts.studies.clock import Clock
from hf_chts.studies.sentence_pairs import END, PAD, EncodedPairs, batches, padded, shuffled_batches
from hf_chts.training.arguments import SparseTrainingArguments
from hf_chts.training.trainer import SparseTrainerMixin

# labels that no loss counts
_IGNORED = -100
# where norms are: transformers' model of that kind
KINDS: dict[str, tuple[Any, Any]] = {
    "post": (MarianConfig, MarianMTModel),
    "pre": (PegasusConfig, PegasusForConditionalGeneration),
}
# more positions than any sentence of Multi30k takes, in tokens
POSITIONS = 256


def new_model(
    vocabulary: int,
    *,
    width: int,
    feed_forward: int,
    layers: int,
    heads: int,
    dropout: float,
    norm: str = "post",
    gain: float = 1.0,
) -> Any:
    """An encoder-decoder with sinusoidal positions and weights that are drawn from torch's global generator.

    Embeddings of both languages and the output are one matrix, as in Vaswani et al. 2017. Weights of linear layers are
    Glorot's, as in the code of arXiv 2501.19107 (OpenNMT's `param_init_glorot`), and not Marian's 0.02.

    Args:
        vocabulary: number of tokens.
        layers: of the encoder, and as many of the decoder.
        norm: "post", after each sum, as in Marian and Vaswani et al. 2017, or "pre", before each layer and once at the
            end, as in Pegasus and OpenNMT.
        gain: factor on Glorot's weights.
    """
    sides: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        sides |= {f"{side}_layers": layers, f"{side}_ffn_dim": feed_forward, f"{side}_attention_heads": heads}
    configuration, kind = KINDS[norm]
    config = configuration(
        vocab_size=vocabulary,
        d_model=width,
        dropout=dropout,
        attention_dropout=dropout,
        activation_function="relu",
        scale_embedding=True,
        init_std=width**-0.5,  # of the embeddings, which are multiplied by √width
        max_position_embeddings=POSITIONS,
        pad_token_id=PAD,
        eos_token_id=END,
        forced_eos_token_id=END,
        decoder_start_token_id=PAD,
        **sides,
    )
    model = kind(config)
    for module in model.model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, gain)
    return model


def inputs_of(pairs: EncodedPairs, indices: Sequence[int]) -> dict[str, Tensor]:
    """The model's inputs for these pairs, int64 (pairs, longest) each; the decoder's are the labels one place on."""
    source = padded([pairs.source[index] for index in indices])
    targets = [pairs.target[index] for index in indices]
    return {
        "input_ids": source,
        "attention_mask": source.ne(PAD).long(),
        "decoder_input_ids": padded([[PAD, *target[:-1]] for target in targets]),
        "labels": padded(targets, _IGNORED),
    }


class TrainingBatches(Dataset[dict[str, Any]]):
    """All batches of a run, in order: an item is a whole batch, with its tokens in one row.

    The row is there for `compute: auto`, which measures with as many tokens as the first item has.
    """

    def __init__(self, pairs: EncodedPairs, steps: int, tokens: int, seed: int) -> None:
        self.pairs = pairs
        self.indices = list(islice(shuffled_batches(pairs.lengths, tokens, seed), steps))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, step: int) -> dict[str, Any]:
        inputs = inputs_of(self.pairs, self.indices[step])
        return {"pairs": len(self.indices[step])} | {name: tensor.flatten() for name, tensor in inputs.items()}


def whole_batch(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The one item of a batch, with a row for each pair again."""
    (item,) = items
    return {name: value.view(item["pairs"], -1) for name, value in item.items() if name != "pairs"}


@torch.no_grad()
def loss_of(model: nn.Module, pairs: EncodedPairs, tokens: int) -> float:
    """Mean cross-entropy of a target token in nats, without label smoothing and dropout.

    Args:
        tokens: in a batch.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for indices in batches(pairs.lengths, tokens):
        inputs = {name: tensor.to(device) for name, tensor in inputs_of(pairs, indices).items()}
        labels = inputs.pop("labels").flatten()
        logits = model(**inputs).logits.flatten(0, 1)
        total += float(nn.functional.cross_entropy(logits, labels, ignore_index=_IGNORED, reduction="sum"))
        count += int(labels.ne(_IGNORED).sum())
    model.train(was_training)
    return total / count


@torch.no_grad()
def translate(model: Any, sources: Sequence[list[int]], *, tokens: int, beams: int, longest: int) -> list[list[int]]:
    """The best translation of each sentence by beam search, as token ids with special ones among them.

    Args:
        model: in evaluation mode.
        tokens: in a batch of sources.
        longest: most tokens of a translation.
    """
    found: dict[int, list[int]] = {}
    for indices in batches([len(source) for source in sources], tokens):
        source = padded([sources[index] for index in indices]).to(model.device)
        made = model.generate(
            source, attention_mask=source.ne(PAD).long(), num_beams=beams, max_length=longest, do_sample=False
        )
        found |= dict(zip(indices, made.tolist(), strict=True))
    return [found[index] for index in range(len(sources))]


@dataclass
class TranslationArguments(SparseTrainingArguments, Seq2SeqTrainingArguments):
    """Seq2SeqTrainingArguments with those of sparse training."""


class TranslationTrainer(SparseTrainerMixin, Seq2SeqTrainer):
    """Seq2SeqTrainer with sparse training, whose evaluation is the mean loss of a token.

    Seconds of training go into the log at each evaluation, so that a checkpoint, which has the log, keeps them.

    Args (beside the Trainer's own):
        eval_dataset: pairs.
        tokens: in a batch of them.
    """

    def __init__(self, *, eval_dataset: EncodedPairs, tokens: int, **named: Any) -> None:
        super().__init__(eval_dataset=eval_dataset, **named)
        self.pairs, self.tokens = eval_dataset, tokens
        self.clock = Clock()
        self.add_callback(_Counts(self.clock))  # last, so that a step's topology update counts

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        assert self.model is not None
        metrics = {"eval_loss": loss_of(self.model, self.pairs, self.tokens), **self.clock.state_dict()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class _Counts(TrainerCallback):
    """Has a clock run from each step's begin to its end."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self._step = clock, contextlib.ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for entry in reversed(state.log_history):  # of the checkpoint, if there is one
            if "processor_seconds" in entry:
                self.clock.load_state_dict(entry)
                break

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._step.enter_context(self.clock.running())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._step.close()
