"""The plain PyTorch loop: the Trainer's masks, weights and losses bit for bit, and what is refused in it."""

import copy

import pytest
import torch
from cases import CASES, INTERVAL, STEPS, arguments, case_config, losses, same_weights, trainer, weights
from tiny import random_blocks, tiny_llama
from transformers import TrainerCallback, get_scheduler

from hf_chts import SparseTrainer, sparsify
from hf_chts.evolution.evolver import check_same_config
from hf_chts.layers.links import MaskedStorage

WARMUP = 2  # as tests/cases.py has it


class Batches(SparseTrainer):
    """Keeps what each step was given."""

    def __init__(self, *args, **kwargs):
        self.batches = []
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, num_items_in_batch=None, **kwargs):
        self.batches.append({**copy.deepcopy(dict(inputs)), "num_items_in_batch": num_items_in_batch})
        return super().compute_loss(model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs)


def trained_by_trainer(directory, case):
    args = arguments(directory, save_strategy="no", logging_nan_inf_filter=False)
    run = Batches(model=tiny_llama(), args=args, sparsity=case_config(case), train_dataset=random_blocks())
    run.train()
    return run


class Loop:
    """The loop of the README, on the batches and with the optimizer and schedule of a Trainer's run."""

    def __init__(self, run, case):
        self.batches, self.accumulation = run.batches, run.args.gradient_accumulation_steps
        self.model = tiny_llama()
        self.sparse = sparsify(self.model, case_config(case))
        decayed = run.get_decay_parameter_names(run.model)
        groups = [
            {"params": [p for n, p in self.model.named_parameters() if n in decayed], "weight_decay": 0.1},
            {"params": [p for n, p in self.model.named_parameters() if n not in decayed], "weight_decay": 0.0},
        ]
        fused = run.optimizer.optimizer.defaults.get("fused")
        self.optimizer = torch.optim.AdamW(groups, lr=run.args.learning_rate, fused=fused)
        self.evolver = self.sparse.evolver(self.optimizer, max_steps=STEPS)
        self.scheduler = get_scheduler("cosine", self.optimizer, num_warmup_steps=0, num_training_steps=STEPS)
        self.evolver.scale_rate(self.scheduler)
        if self.sparse.config.evolves:
            self.evolver.warm_up(self.scheduler, WARMUP)
        self.losses, self.figures = [], []

    def step(self, batch):
        self.model.train()
        loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.figures.append(self.evolver.step())
        self.losses.append(loss.item())

    def run(self, first=0):
        for batch in self.batches[first:]:
            self.step(batch)

    def saved(self):
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "evolver": self.evolver}
        return {name: part.state_dict() for name, part in parts.items()}

    def load(self, saved):
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        self.evolver.load_state_dict(saved["evolver"])


@pytest.mark.parametrize("case", ["static", *CASES])
def test_the_loop_is_the_trainer_and_resumes_bit_for_bit(case, tmp_path):
    run = trained_by_trainer(tmp_path, case)
    loop = Loop(run, case)
    for number, batch in enumerate(loop.batches, start=1):
        loop.step(batch)
        if number == 10:
            torch.save(loop.saved(), tmp_path / "state.pt")
    assert [round(loss, 4) for loss in loop.losses] == [round(loss, 4) for loss in losses(run)]
    assert same_weights(weights(run), loop.model.state_dict())
    for name, mask in run.sparse.masks().items():
        assert mask.equal(loop.sparse.masks()[name]), name
    assert all(loop.evolver.explored[name].equal(bits) for name, bits in run.evolver.explored.items())
    changes = [{k: v for k, v in line.items() if k != "topology_seconds"} for line in run.evolver.history]
    found = [{k: v for k, v in line.items() if k != "topology_seconds"} for line in loop.evolver.history]
    assert found == changes
    assert [bool(figures) for figures in loop.figures] == [loop.evolver.plan.is_update(n + 1) for n in range(STEPS)]

    resumed = Loop(run, case)
    resumed.load(torch.load(tmp_path / "state.pt"))
    resumed.run(first=10)
    assert resumed.losses == loop.losses[10:]
    assert same_weights(loop.model.state_dict(), resumed.model.state_dict())
    assert all(mask.equal(resumed.sparse.masks()[name]) for name, mask in loop.sparse.masks().items())
    assert [line["step"] for line in resumed.evolver.history] == [line["step"] for line in loop.evolver.history]


def small(case="rigl", optimizer=torch.optim.AdamW, **changes):
    model = tiny_llama()
    sparse = sparsify(model, case_config(case, **changes))
    return model, sparse, optimizer(model.parameters(), lr=1e-2)


def backward(model, seed=0):
    ids = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("case", ["rigl", "chtss, per-weight Adam steps"])
def test_micro_batches_are_no_steps(case):
    model, sparse, optimizer = small(case)
    evolver = sparse.evolver(optimizer, max_steps=STEPS)
    for micro_batch in range(3 * INTERVAL):
        backward(model, micro_batch)
        if micro_batch % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
        evolver.step()
        assert evolver.finished == (micro_batch + 1) // 3
        evolver.check()
    assert [line["step"] for line in evolver.history] == [INTERVAL]


def test_a_step_that_a_scaler_skips_is_none():
    model, sparse, optimizer = small()
    evolver = sparse.evolver(optimizer, max_steps=STEPS)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(3):
        ids = torch.full((1, 4), 1)
        loss = model(input_ids=ids, labels=ids).loss * (torch.inf if step == 1 else 1)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        evolver.step()
    assert evolver.finished == 2


def test_optimizers_that_move_missing_links():
    model, sparse, _ = small("set")
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    optimizer = torch.optim.Muon(matrices, lr=1e-2)
    evolver = sparse.evolver(optimizer, max_steps=STEPS)
    for step in range(2 * INTERVAL):
        backward(model, step)
        optimizer.step()
        evolver.check()  # at once, not only when the evolver is asked
        optimizer.zero_grad()
        evolver.step()
    assert len(evolver.history) == 2


def test_what_is_refused():
    model, sparse, optimizer = small()
    other = torch.optim.AdamW(torch.nn.Linear(3, 3).parameters())
    with pytest.raises(ValueError, match="none of the sparse layers' weights"):
        sparse.evolver(other, max_steps=STEPS)
    evolver = sparse.evolver(optimizer, max_steps=STEPS)
    with pytest.raises(ValueError, match="another evolver"):
        sparse.evolver(optimizer, max_steps=STEPS)
    before = weights_of(model)
    backward(model)
    optimizer.step()
    moved = weights_of(model)
    assert not same_weights(before, moved)
    with pytest.raises(RuntimeError, match=r"evolver\.step\(\) was not called after optimizer step 1"):
        optimizer.step()
    assert same_weights(moved, weights_of(model))
    evolver.step()
    optimizer.step()
    evolver.close()
    optimizer.step()  # let go of: nobody minds
    optimizer.step()
    assert sparse.evolver(optimizer, max_steps=STEPS).plan.max_steps == STEPS


def weights_of(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def test_a_state_of_another_config_or_model_is_refused():
    _, sparse, optimizer = small()
    evolver = sparse.evolver(optimizer, max_steps=STEPS)
    masks = {name: mask.clone() for name, mask in sparse.masks().items()}
    state = evolver.state_dict()
    with pytest.raises(ValueError, match="no state of an evolver"):
        evolver.load_state_dict({"step": 3})
    _, others, optimizer_of_others = small("set")
    with pytest.raises(ValueError, match="method: 'set' there, 'rigl' here"):
        evolver.load_state_dict(others.evolver(optimizer_of_others, max_steps=STEPS).state_dict())
    patterned = case_config("rigl", pattern="fan_in", storage="links")
    for there, here in ((case_config("rigl"), patterned), (patterned, case_config("rigl"))):
        with pytest.raises(
            ValueError, match=f"sparsity config .pattern: {there.pattern!r} there, {here.pattern!r} here.:"
        ):
            check_same_config(there, here, "a checkpoint")
    larger = tiny_llama(intermediate_size=64)
    wrong = sparsify(larger, case_config("rigl")).evolver(torch.optim.SGD(larger.parameters()), max_steps=STEPS)
    with pytest.raises(ValueError, match="another model"):
        wrong.load_state_dict(state)
    assert all(mask.equal(sparse.masks()[name]) for name, mask in masks.items())


def test_an_update_without_the_dense_gradient_says_what_is_wrong():
    model, sparse, optimizer = small()
    evolver = sparse.evolver(optimizer, max_steps=STEPS)
    backward(model)
    optimizer.step()
    with pytest.raises(RuntimeError, match="no dense gradient"):
        evolver.update(INTERVAL)


class CountsWrites(TrainerCallback):
    """Every write into a mask goes through its owner: torch counts the writes into a tensor, and the owner its own."""

    def __init__(self):
        self.seen = {}

    def on_step_end(self, args, state, control, **kwargs):
        for name, layer in self.trainer.sparse.layers.items():
            assert layer.mask._version == layer.storage.version, name
            self.seen[name] = layer.storage.version


@pytest.mark.parametrize("case", CASES)
def test_nobody_but_the_owner_writes_masks(case, tmp_path):
    for resume in (False, True):
        run = trainer(tmp_path, case)
        counts = CountsWrites()
        counts.trainer = run
        begun = {name: layer.storage.version for name, layer in run.sparse.layers.items()}
        run.add_callback(counts)
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10") if resume else None)
        assert all(counts.seen[name] > version for name, version in begun.items())
        assert all(isinstance(layer.storage, MaskedStorage) for layer in run.sparse.layers.values())


def test_the_count_of_links_follows_every_change():
    _, sparse, _ = small("set")
    layer = next(iter(sparse.layers.values()))
    before = layer.links
    layer.set_mask(torch.zeros_like(layer.topology).index_fill_(0, torch.tensor([1, 3]), True))
    assert layer.links == 2 * layer.topology.shape[1] != before
    assert layer.storage.positions().tolist() == layer.topology.flatten().nonzero().flatten().tolist()
