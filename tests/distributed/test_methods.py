"""Methods on every engine: what holds at every step, resume, and the same masks as in one process.

What is checked on the ranks is in the worker. Here the first update is done again in one process, from the weights and
gradients that the ranks had.
"""

import pytest
import torch
from cases import INTERVAL, arguments, case_config
from tiny import random_blocks, tiny_llama

from hf_chts import SparseTrainer, SparsityHandle, load_sparse, sparsify
from hf_chts.evolution.evolver import Evolver
from hf_chts.sharding.replicated import ReplicatedWeights

from launching import accelerate  # isort: skip - beside this file
from methods_worker import FROZEN, IN_SLOTS, MODEL, STEPS  # isort: skip

pytestmark = pytest.mark.distributed

CASES = ["chtss", "rigl", "chtss bf16", "rigl bf16", "rigl, historical weights, frozen"]
CASES += [f"{case}{IN_SLOTS}" for case in ("chtss", "rigl bf16")]
MORE = [
    "gmp, global allocation, frozen",
    "mest, layers with their own sparsity",
    "gmp, global allocation",
    "rigl, historical weights",
    "granet",
    "cht",
    "rigl, fan-in",
    "chts, 1:5 in attention",
]
SLOTS = [
    f"{case}{IN_SLOTS}"
    for case in ("rigl, historical weights, frozen", "gmp, global allocation", "chts, per head", "chtss, fan-in")
]
ENGINES = {
    "cpu_ddp": "ReplicatedWeights",
    "cpu_fsdp2": "Fsdp2Weights",
    "cpu_zero1": "ZeroStage12Weights",
    "cpu_zero2": "ZeroStage12Weights",
    "cpu_zero3": "ZeroStage3Weights",
}


def update_in_one_process(case, first):
    model = tiny_llama(**MODEL)
    sparse = sparsify(model, case_config(case.removesuffix(", frozen")), masks=first["masks"])
    for name in FROZEN if case.endswith(", frozen") else ():
        model.get_submodule(name).requires_grad_(False)
    for name, layer in sparse.layers.items():
        layer.weight.data = first["weights"][name].clone()
    engine = ReplicatedWeights(torch.optim.AdamW(model.parameters()))
    topology = Evolver(sparse)
    topology.prepare(STEPS, engine)
    for name, gradient in first["gradients"].items():
        layer = sparse.layers[name]
        layer.dense_gradient = engine.dense_gradient(layer, 0)
        layer.dense_gradient.add_(gradient)
    topology.update(INTERVAL)
    return sparse.masks()


def check_export(directory):
    """What any engine exported is whole, and one process trains on from it."""
    model = load_sparse(directory).float()
    sparse = SparsityHandle.of(model)
    assert sparse.sparsity() > 0.75
    sparse.check()
    # a link that was just regrown is 0, and so is one between neurons that reach nothing
    assert sum(int(layer.weight.count_nonzero()) for layer in sparse.layers.values()) > 0.5 * sparse.links()
    run = SparseTrainer(
        model=model, args=arguments(directory / "on", max_steps=12, save_strategy="no"), train_dataset=random_blocks()
    )
    run.train()
    sparse.check()


@pytest.mark.parametrize(
    ("config", "ranks", "cases"),
    [
        *((config, 2, CASES) for config in ENGINES),
        (
            "cpu_fsdp2",
            3,
            [*MORE, "set, percolation", "chts, adaptive softness", "chtss, per-weight Adam steps", *SLOTS],
        ),
        (
            "cpu_zero3",
            3,
            [*MORE, "set, Erdos-Renyi allocation", "chts, per head", "chtss, per-weight Adam steps", *SLOTS],
        ),
    ],
)
def test_methods(tmp_path, config, ranks, cases):
    if "zero" in config:
        pytest.importorskip("deepspeed")
    accelerate(config, "methods_worker.py", str(tmp_path), ENGINES[config], *cases, ranks=ranks)
    found = torch.load(tmp_path / "updates.pt")
    assert found.keys() == set(cases)
    for number, (case, first) in enumerate(found.items()):
        check_export(tmp_path / str(number) / "export")
        masks = update_in_one_process(case.removesuffix(IN_SLOTS).removesuffix(" bf16"), first)
        assert any(not first["after"][name].equal(mask) for name, mask in first["masks"].items()), case
        for name, mask in masks.items():
            assert mask.equal(first["after"][name]), f"{case}: {name}"
