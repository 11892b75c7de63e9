"""Missing links stay missing whatever the optimizer; what it keeps of links that go is 0 too."""

import pytest
import torch
from cases import STEPS, arguments, case_config, check_links, losses, same_weights, weights
from tiny import random_blocks, tiny_llama
from transformers import Trainer, TrainerCallback

from hf_chts import SparseTrainer


class Lion(torch.optim.Optimizer):
    """Steps of one size, in the direction of a running mean's sign (arXiv 2302.06675)."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    mean = self.state[weight].setdefault("exp_avg", torch.zeros_like(weight))
                    weight.add_((0.9 * mean + 0.1 * weight.grad).sign_(), alpha=-group["lr"])
                    mean.lerp_(weight.grad, 0.01)


class TwoMeans(Lion):
    """Keeps a slow and a fast mean in one tensor, (2, out, in), as AdEMAMix does; of a class that nobody knows."""

    @torch.no_grad()
    def step(self, closure=None):
        for weight in (w for group in self.param_groups for w in group["params"] if w.grad is not None):
            means = self.state[weight].setdefault("means", torch.zeros(2, *weight.shape))
            means[0].lerp_(weight.grad, 0.1)
            means[1].lerp_(weight.grad, 0.01)
            weight.sub_(means.sum(0), alpha=1e-2)


def muon(model):
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 2)
    return torch.optim.Muon([p for p in model.parameters() if p.requires_grad], lr=0.02)


OPTIMIZERS = {
    "sgd with momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=1e-3, momentum=0.9, centered=True),
    "amsgrad": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True),
    "fused": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True),
    "lion": lambda model: Lion(model.parameters()),
    "muon": muon,
    "adamax": lambda model: torch.optim.Adamax(model.parameters(), lr=1e-3),
    "rprop": lambda model: torch.optim.Rprop(model.parameters(), lr=1e-3),
    "two means of each weight": lambda model: TwoMeans(model.parameters()),
    "adafactor": None,
    "adagrad": None,
}


class Zeros(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.look(optimizer)

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.look(optimizer)
        plan = self.trainer.sparse.config.plan(STEPS)
        check_links(self.trainer.sparse, plan.sparsity(state.global_step - state.global_step % 4))

    def look(self, optimizer):
        for layer in self.trainer.sparse.layers.values():
            state = {name: v for name, v in optimizer.state[layer.weight].items() if isinstance(v, torch.Tensor)}
            for never_zero in ("exp_inf", "step_size"):  # of Adamax and Rprop, from the first step on
                state.pop(never_zero, None)
            for tensor in (layer.weight, *state.values()):
                if tensor.shape[-2:] == layer.weight.shape:
                    assert tensor[..., ~layer.mask].eq(0).all()


def run_of(directory, name, case, seed=0):
    model = tiny_llama(seed)
    make = OPTIMIZERS[name]
    args = arguments(directory, **({"optim": name, "learning_rate": 1e-3} if make is None else {}))
    optimizers = (None, None) if make is None else (make(model), None)
    return SparseTrainer(
        model=model, args=args, sparsity=case_config(case), train_dataset=random_blocks(), optimizers=optimizers
    )


@pytest.mark.parametrize(
    ("name", "case"),
    [*((name, "rigl, historical weights") for name in OPTIMIZERS), ("muon", "chtss"), ("adafactor", "chtss")],
)
def test_missing_links_stay_0_and_the_run_resumes(tmp_path, name, case):
    run = run_of(tmp_path, name, case)
    run.add_callback(Zeros(run))
    run.train()
    assert losses(run)[-1] < losses(run)[0] + 1
    again = run_of(tmp_path, name, case, seed=5)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert losses(again) == losses(run)
    assert same_weights(weights(again), weights(run))


def test_muon_does_move_missing_links_where_nobody_masks_them_again(tmp_path):
    """So that the test above can fail."""
    run = run_of(tmp_path, "muon", "static")
    run.evolver._after_optimizer_step = lambda: None
    Trainer.train(run)
    with pytest.raises(RuntimeError, match="not 0 off its mask"):
        run.sparse.check()


class AdEMAMix(torch.optim.Optimizer):
    """Two means of the gradient in one tensor, (2, out, in), as bitsandbytes keeps them (arXiv 2409.03137)."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})
        self.log = []

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    means = self.state[weight].setdefault("state1", weight.new_zeros(2, *weight.shape))
                    means.lerp_(weight.grad, torch.tensor([0.1, 1e-4]).view(2, 1, 1))
                    weight.sub_(group["lr"] * means.sum(0))
                    self.log.append(tuple(weight.shape))


class FusedAdam(AdEMAMix):
    """One that runs on nothing but the weights that it was made with."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, lr)
        self.known = {id(weight) for group in self.param_groups for weight in group["params"]}

    def step(self, closure=None):
        assert all(id(weight) in self.known for group in self.param_groups for weight in group["params"])
        super().step(closure)


def stepping(kind, directory):
    model = tiny_llama()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 2)
    optimizer = kind([p for p in model.parameters() if p.requires_grad])
    run = SparseTrainer(
        model=model, args=arguments(directory, save_steps=1), sparsity=case_config("set"),
        train_dataset=random_blocks(), optimizers=(optimizer, None),
    )  # fmt: skip
    return run, optimizer


def test_state_of_another_shape_is_refused_before_training(tmp_path):
    run, optimizer = stepping(AdEMAMix, tmp_path)
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    before = weights(run)
    with pytest.raises(
        ValueError, match=r"AdEMAMix cannot be used: .* 'state1' is \(2, 3, 5\) for a weight of \(3, 5\)"
    ):
        run.train()
    assert same_weights(before, weights(run))
    assert not optimizer.state
    assert not optimizer.log
    assert not steps


def test_state_that_cannot_be_foreseen_is_refused_after_the_first_step(tmp_path):
    run, _ = stepping(FusedAdam, tmp_path)
    with pytest.raises(TypeError, match=r"'state1' is \(2, 40, 40\) for a weight of \(40, 40\)"):
        run.train()
    assert run.state.global_step == 0
    assert not list(tmp_path.glob("checkpoint-*"))
