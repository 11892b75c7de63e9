"""Weights of half precision are refused before anything is trained, and what steps on fp32 is not."""

import pytest
import torch
from cases import arguments, case_config, same_weights, trainer, weights
from tiny import random_blocks, tiny_llama
from transformers import Trainer, TrainingArguments

from hf_chts import TopologyCallback, sparsify
from hf_chts.evolution.evolver import Evolver
from hf_chts.sharding.replicated import ReplicatedWeights


@pytest.mark.parametrize("case", ["static", "chtss"])
def test_float16_weights_are_refused(tmp_path, case):
    model = tiny_llama(num_hidden_layers=1).half()
    run = trainer(tmp_path, case, model=model)
    assert "eval_loss" in run.evaluate()  # which needs no step
    before = weights(run)
    with pytest.raises(ValueError, match="weight of model.layers.0.self_attn.q_proj is float16.*fp16=True.*bfloat16"):
        run.train()
    assert same_weights(before, weights(run))
    assert not list(tmp_path.glob("checkpoint-*"))


def test_they_are_refused_before_a_checkpoint_is_loaded(tmp_path):
    trainer(tmp_path, "set", model=tiny_llama(num_hidden_layers=1), max_steps=8, save_steps=8).train()
    run = trainer(tmp_path, "set", model=tiny_llama(seed=5, num_hidden_layers=1).half(), max_steps=8)
    before = weights(run)
    with pytest.raises(ValueError, match="is float16"):
        run.train(resume_from_checkpoint=True)
    assert same_weights(before, weights(run))


def test_the_callback_alone_refuses_them_too(tmp_path):
    model = tiny_llama(num_hidden_layers=1).half()
    callback = TopologyCallback(sparsify(model, case_config("set")))
    run = Trainer(model, arguments(tmp_path, TrainingArguments), train_dataset=random_blocks(), callbacks=[callback])
    with pytest.raises(ValueError, match="is float16"):
        run.train()
    assert run.state.global_step == 0


def test_bfloat16_weights_are_not(tmp_path):
    model = tiny_llama(num_hidden_layers=1).to(torch.bfloat16)
    trainer(tmp_path, "set", model=model, max_steps=8, save_strategy="no").train()


def test_half_precision_that_only_follows_fp32_master_weights_is_not(tmp_path):
    class Masters(ReplicatedWeights):
        def held(self, layer):
            return {"weight": layer.weight.detach().float(), "working": layer.weight.detach()}

    model = tiny_llama(num_hidden_layers=1).half()
    callback = Evolver(sparsify(model, case_config("set")))
    callback.prepare(24, Masters(torch.optim.AdamW(model.parameters())))
    assert callback.plan.last_update == 16
