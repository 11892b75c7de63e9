"""The language study's task: its data, its models, and what a run records, also one that was killed."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hf_chts.config import SparsityConfig
from hf_chts.methods import METHODS
from hf_chts.studies.language import CURVES, FIGURES, Settings, _figures, train
from hf_chts.studies.language_data import EOS, VOCABULARY, Windows, bits_per_byte, split_tokens
from hf_chts.studies.language_model import build_model, narrow_dense
from hf_chts.studies.language_records import OneRanksGradient
from hf_chts.studies.study import Run, Study
from hf_chts.studies.tasks import parsed
from hf_chts.training.arguments import SparseTrainingArguments
from hf_chts.training.trainer import SparseTrainer

STUDIES = Path(__file__).parents[2] / "studies"
TINY = {
    "width": 32, "ffn": 48, "layers": 1, "heads": 2, "context": 16, "batch": 4, "steps": 12, "evaluation_interval": 4,
    "evaluation_windows": 8, "update_warmup": 1,
}  # fmt: skip
SPARSE = {"sparsity": 0.8, "update_interval": 2, "storage": "links", "compute": "sparse"}


def trained(folder, seed=0, say=lambda line: None, **settings):
    return train(Run("language", "row", seed, {**TINY, **settings}, folder), say)


def test_each_token_but_the_first_is_predicted_once():
    windows = Windows(np.arange(50, dtype=np.uint16), context=8)
    predicted = [int(token) for window in windows for token in window["input_ids"][1:]]
    assert predicted == list(range(1, 50))


def test_windows_are_spread_over_the_text():
    windows = Windows(np.arange(101, dtype=np.uint16), context=11, most=4)  # of ten, at 0, 10, 20 …
    assert [int(window["labels"][0]) for window in windows] == [0, 20, 50, 70]
    assert len(Windows(np.arange(101, dtype=np.uint16), context=11, most=40)) == 10


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match="5 tokens.*context of 8"):
        Windows(np.arange(5, dtype=np.uint16), context=8)


def test_documents_are_bytes_with_an_end():
    tokens = split_tokens("validation")
    text = bytes(tokens[: int((tokens == EOS).argmax())].astype(np.uint8)).decode()
    assert "\n" in text
    assert tokens[-1] == EOS
    assert tokens.max() < VOCABULARY


class Uniform(nn.Module):
    """Says that all tokens are as likely."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, VOCABULARY) + self.weight
        return type("Output", (), {"logits": logits})


def test_bits_per_byte_count_the_ends_of_documents():
    tokens = np.array([7, 8, 9, EOS, 7, 8, 9, 10, 11], np.uint16)
    # eight predictions, one of them of an end that is no byte
    assert bits_per_byte(Uniform(), Windows(tokens, 5), autocast=False) == pytest.approx(math.log2(257) * 8 / 7)


@pytest.mark.parametrize("sparsity", [0.9, 0.95, 0.99])
def test_a_dense_model_has_as_many_weights_as_a_sparse_one_has_links(sparsity):
    width, ffn = narrow_dense(256, 688, 4, 4, sparsity, whole=False)
    model = build_model(width, ffn, 4, 4, 16, 0, bf16=False)
    linear = sum(m.weight.numel() for m in model.model.layers.modules() if isinstance(m, nn.Linear))
    assert linear == pytest.approx((1 - sparsity) * 3_162_112, rel=0.02)
    assert width % 8 == 0


@pytest.mark.parametrize("sparsity", [0.9, 0.95, 0.99])
def test_a_dense_model_has_as_many_parameters_as_a_sparse_one(sparsity):
    width, ffn = narrow_dense(256, 688, 4, 4, sparsity, whole=True)
    small, large = (sum(p.numel() for p in build_model(*size, 4, 4, 16, 0, bf16=False).parameters())
                    for size in ((width, ffn), (256, 688)))  # fmt: skip
    assert small == pytest.approx(large - sparsity * 3_162_112, rel=0.02)


def test_a_model_that_cannot_be_so_narrow_is_refused():
    with pytest.raises(ValueError, match="8 heads.*fewer heads"):
        narrow_dense(32, 48, 1, 8, 0.99, whole=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "fp16"}, "precision is 'fp16'"),
        ({"baseline": "same_links", "sparsity": {"method": "set"}}, "set sparsity.method to dense"),
        ({"one_rank_of": 3}, "one_rank_of is 3, and a batch of 4"),
        ({"steps": 13}, "steps is 13, not a multiple"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        parsed(Settings, {**TINY, **settings})


def test_a_dense_run_has_all_figures_and_curves(tmp_path):
    outcome = trained(tmp_path, sparsity={"method": "dense"})
    weights = 4 * 32 * 32 + 3 * 32 * 48
    assert outcome.figures["links"] == outcome.figures["average_links"] == weights
    assert outcome.figures["itop"] == outcome.figures["active_neurons"] == 1
    assert outcome.curves["step"] == [4, 8, 12]
    assert {len(curve) for curve in outcome.curves.values()} == {3}
    assert outcome.figures["validation_bits_last"] == outcome.curves["validation_bits"][-1]
    assert outcome.figures["validation_bits_best"] == min(outcome.curves["validation_bits"])
    # one byte of 257, before much is learned
    assert outcome.curves["train_loss"][0] == pytest.approx(math.log(257), rel=0.03)
    assert outcome.seconds > 0
    assert outcome.figures.keys() >= FIGURES.keys()
    assert outcome.curves.keys() >= CURVES.keys()


def test_links_are_averaged_over_the_steps(tmp_path):
    fields = {"method": "granet", "initial_sparsity": 0.5, "update_until": 0.75}
    outcome = trained(tmp_path, sparsity={**SPARSE, **fields})
    possible = 4 * 32 * 32 + 3 * 32 * 48
    # cubic from 0.5 at step 0 to 0.8 at step 9 (0.75 of 12 steps), at the updates 2, 4, 6 and 8, which is the last
    # one before 9; each sparsity is that of the steps that follow its update
    sparsities = [0.5] + [0.8 - 0.3 * (1 - step / 8) ** 3 for step in (2, 4, 6)] + [0.8]
    expected = (sum(2 * s for s in sparsities[:4]) + 4 * sparsities[4]) / 12
    assert 1 - outcome.figures["average_links"] / possible == pytest.approx(expected, abs=2e-3)
    assert 1 - outcome.figures["links"] / possible == pytest.approx(0.8, abs=2e-3)
    assert outcome.figures["itop"] >= 0.5


KILLED = """
import json, os, signal, sys
from pathlib import Path
from hf_chts.studies.language import train
from hf_chts.studies.study import Run

def say(line):
    if line.startswith("step 8:"):
        os.kill(os.getpid(), signal.SIGKILL)

train(Run("language", "row", 0, json.loads(sys.argv[1]), Path(sys.argv[2])), say)
"""


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_figures(tmp_path):
    sparsity = {**SPARSE, "method": "chtss", "initial_sparsity": 0.5}
    settings = json.dumps({**TINY, "sparsity": sparsity})
    killed = subprocess.run([sys.executable, "-c", KILLED, settings, str(tmp_path / "killed")], capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()
    left = [path.name for path in (tmp_path / "killed" / "training").glob("checkpoint-*")]
    assert left == ["checkpoint-4"]
    said = []
    shutil.copytree(tmp_path / "killed", tmp_path / "damaged")
    state = next((tmp_path / "damaged" / "training").glob("checkpoint-*/optimizer.pt"))
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"optimizer.pt has .* Remove {tmp_path}/damaged to begin the run anew"):
        trained(tmp_path / "damaged", sparsity=sparsity)
    resumed = trained(tmp_path / "killed", say=said.append, sparsity=sparsity)
    whole = trained(tmp_path / "whole", sparsity=sparsity)
    assert [line.partition(":")[0] for line in said] == ["step 8", "step 12"]
    assert resumed.figures == whole.figures
    assert resumed.curves == whole.curves
    assert resumed.seconds > 0


def test_a_loss_that_is_no_number_ends_a_run_with_what_it_has(tmp_path):
    outcome = trained(tmp_path, sparsity={**SPARSE, "method": "set"}, learning_rate=1e30)
    assert outcome.figures["diverged"] == 1
    assert math.isnan(outcome.figures["validation_bits_last"])


@pytest.mark.parametrize("precision", ["bf16_autocast", "bf16_pure"])
def test_a_run_in_bf16_learns(tmp_path, precision):
    outcome = trained(tmp_path, precision=precision, sparsity={**SPARSE, "method": "rigl"})
    bits = outcome.curves["validation_bits"]
    assert bits[-1] < bits[0]


def test_regrowth_can_see_the_gradient_of_one_rank_alone(tmp_path):
    model = build_model(32, 48, 1, 2, 16, 0, bf16=False)
    args = SparseTrainingArguments(
        str(tmp_path), max_steps=4, use_cpu=True, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    data = Windows(np.random.default_rng(0).integers(0, 256, 500).astype(np.uint16), 16)
    config = {"method": "rigl", "sparsity": 0.5, "update_interval": 1, "update_until": 0.75}
    inputs, seen = [], []

    class Watched(SparseTrainer):
        def training_step(self, model, given, *more):
            inputs.append(given["input_ids"].clone())
            return super().training_step(model, given, *more)

    trainer = Watched(model=model, args=args, train_dataset=data, sparsity=SparsityConfig(**config))
    trainer.add_callback(OneRanksGradient(trainer.evolver))
    name, layer = next(iter(trainer.sparse.layers.items()))
    weights = {key: value.clone() for key, value in model.state_dict().items()}

    class Looks(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if not seen:
                seen.append(layer.dense_gradient.sum.clone())

    trainer.add_callback(Looks())
    trainer.train()
    assert len(inputs) == 8
    plain = build_model(32, 48, 1, 2, 16, 0, bf16=False)
    plain.load_state_dict({key: value for key, value in weights.items() if not key.endswith(".mask")})
    plain(input_ids=inputs[1], labels=inputs[1]).loss.backward()
    expected = plain.get_submodule(name).weight.grad / 2  # a mean over two micro-batches
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["language", "language_rates", "language_regime", "precision"])
@pytest.mark.parametrize("quick", [False, True])
def test_the_studies_are_of_this_task(name, quick):
    study = Study.load(STUDIES / f"{name}.yaml", quick=quick)
    assert study.task == "language"
    for row in study.rows:
        settings = parsed(Settings, row.settings)
        assert settings.sparsity["method"] in METHODS, row.name


def test_the_best_step_is_one_at_the_target_sparsity():
    curves = {
        "step": [10.0, 20.0, 30.0], "validation_bits": [1.8, 2.0, 2.1], "test_bits": [1.7, 1.9, 1.95],
        "sparsity": [0.94, 0.99, 0.99], "itop": [0.1] * 3, "active_neurons": [1.0] * 3,
    }  # fmt: skip
    figures = _figures(curves, diverged=False)
    assert (figures["step_best"], figures["test_bits_best"], figures["validation_bits_best"]) == (20.0, 1.9, 2.0)
    assert figures["test_bits_last"] == 1.95
