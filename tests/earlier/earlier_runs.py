"""The runs, models and ids that 0.1.0 wrote down here, made again by any later version."""

import torch
from cases import arguments, case_config
from tiny import random_blocks, tiny_llama

from hf_chts import SparseTrainer

STEPS, SAVED = 24, 12
# by folder: a method whose masks, history and seal are all there is; stored weights; birth dates and adaptive softness
CASES = {
    "chtss": {"method": "chtss", "sparsity": 0.8},
    "gmp": {"method": "gmp", "sparsity": 0.8},
    "adaptive": {
        "method": "chts",
        "sparsity": 0.8,
        "softness_schedule": "adaptive",
        "drop_fraction": 0.3,
        "regrown_adam": "per_weight_steps",
    },
}


def small_llama(seed=0):
    return tiny_llama(
        seed, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True
    )


def trainer(directory, case, seed=0):
    return SparseTrainer(
        model=small_llama(seed),
        args=arguments(directory, max_steps=STEPS, save_steps=SAVED),
        sparsity=case_config(**CASES[case]),
        train_dataset=random_blocks(16, 8),
        eval_dataset=random_blocks(8, 8),
    )


def losses_after(run, step):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry and entry["step"] > step]


def logits(model):
    """Of fixed ids, at their ends; float32 (2, 96)."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(16).view(2, 8)).logits[:, -1].float()


def links_by_layer(masks):
    """The positions of the links, as one number for each row: exact, and short enough to compare by eye."""
    weights = {name: 2.0 ** torch.arange(mask.shape[1], dtype=torch.float64) for name, mask in masks.items()}
    return {name: (mask.double().cpu() @ weights[name]).tolist() for name, mask in masks.items()}
