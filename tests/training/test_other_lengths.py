"""A run that goes on with other schedules, or begins with a trained model: sparsity does not fall back; it is said."""

import json
import logging
import math

import pytest
import torch
from cases import INTERVAL, Stop, all_of, arguments, case_config, differences, trainer
from tiny import random_blocks, tiny_llama
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_chts import SparseTrainer, sparsify
from hf_chts.evolution.evolver import Evolver
from hf_chts.layers.shares import sparsity_ahead
from hf_chts.sharding.replicated import ReplicatedWeights
from hf_chts.topology.allocation import links_at


def cubic(step, end):
    return 0.9 - 0.4 * (1 - min(step / end, 1)) ** 3


def sigmoid(step, end):
    def logistic(t):
        return 1 / (1 + math.exp(-6 * (t - 0.5)))

    return 0.5 + 0.4 * (logistic(min(step / end, 1)) - logistic(0)) / (logistic(1) - logistic(0))


def elastic(step, end):
    return 0.85 if step / end < 0.6 else 0.875 if step < end else 0.9


# schedule, and where it ends in a run of 24 steps and in one of 48, with updates every four
RISING = {"chtss": (sigmoid, 8, 16), "gmp": (cubic, 16, 36), "granet": (cubic, 16, 36), "mest": (elastic, 16, 36)}
SHARED = [{}, {"allocation": "erdos_renyi"}, {"allocation": "global"}, {"layer_sparsity": {"q_proj": 0.95}}]


class Updates:
    """The updates of a run, without its training: weights and gradients are drawn anew each time."""

    def __init__(self, config, masks=None):
        self.model = tiny_llama(num_hidden_layers=1)
        self.sparse = sparsify(self.model, config, masks=masks)
        self.evolver = Evolver(self.sparse)
        self.engine = ReplicatedWeights(torch.optim.AdamW(self.model.parameters()))

    def links(self):
        return {name: layer.links for name, layer in self.sparse.layers.items()}

    @torch.no_grad()
    def update(self, step):
        generator = torch.Generator().manual_seed(step)
        for layer in self.sparse.layers.values():
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * layer.mask)
            if self.sparse.config.needs_gradient:
                layer.dense_gradient = self.engine.dense_gradient(layer, 0)
                layer.dense_gradient.add_(torch.randn(layer.weight.shape, generator=generator))
        self.evolver.update(step)
        return self.links()


@pytest.mark.parametrize("shared", SHARED, ids=str)
@pytest.mark.parametrize("method", RISING)
def test_a_longer_run_holds_its_sparsity_until_its_schedule_has_caught_up(method, shared):
    config = case_config(method, **shared)
    first = Updates(config)
    first.evolver.prepare(24, first.engine)
    for step in (4, 8):
        held = first.update(step)
    longer = Updates(config)
    longer.evolver.restore(first.evolver.state(10))
    longer.evolver.prepare(48, longer.engine, 10)
    schedule, earlier_end, end = RISING[method]
    weights = {name: mask.numel() for name, mask in longer.sparse.masks().items()}
    before = held
    for step in range(12, 37, INTERVAL):
        if not longer.evolver.plan.is_update(step):
            continue
        links = longer.update(step)
        sparsity = max(schedule(8, earlier_end), schedule(step, end))
        if config.allocation == "uniform":
            own = {name: 0.95 / 0.9 if "layer_sparsity" in shared and name.endswith("q_proj") else 1 for name in links}
            assert links == {name: links_at(weights[name], sparsity * own[name]) for name in links}
        else:
            assert sum(links.values()) == links_at(sum(weights.values()), sparsity)
        if config.allocation != "global":  # which moves links between layers at each update, by design
            assert all(links[name] <= before[name] for name in links)
        assert sum(links.values()) <= sum(before.values())
        before = links
    assert sum(before.values()) == pytest.approx(0.1 * sum(weights.values()), rel=0.06)


@pytest.mark.parametrize("shared", SHARED, ids=str)
@pytest.mark.parametrize("method", RISING)
def test_a_run_that_goes_on_as_it_was_has_no_floor(method, shared):
    config = case_config(method, **shared)
    for step in range(0, 49, INTERVAL):
        run = Updates(config)
        run.evolver.prepare(48, run.engine)
        for update in filter(run.evolver.plan.is_update, range(INTERVAL, step + 1, INTERVAL)):
            run.update(update)
        assert run.evolver.plan_from(step, 48) == run.evolver.plan
        assert run.evolver.plan.floor == 0
        if shared or step > 20:
            break  # the rest takes time and tells nothing new


@pytest.mark.parametrize("sizes", [(1600, 2400), (1855, 371, 99991)])
def test_a_sparsity_is_found_that_gives_the_links_there_are(sizes):
    config = case_config("chtss")
    shapes = {str(size): (1, size) for size in sizes}
    for sparsity in (0.5, 0.61803, 0.85, 0.9):
        links = {name: links_at(size, sparsity) for name, (_, size) in shapes.items()}
        assert sparsity_ahead(links, shapes, config, sparsity) is None
        found = sparsity_ahead(links, shapes, config, 0.3)
        assert links == {name: links_at(size, found) for name, (_, size) in shapes.items()}
    # no sparsity gives these: no layer gets back what it has lost
    assert sparsity_ahead({"a": 30, "b": 50}, {"a": (10, 10), "b": (10, 10)}, config, 0.5) == pytest.approx(0.7)


def lines(caplog):
    return [record.message for record in caplog.records if record.name.startswith("hf_chts")]


def stopped(directory, case, step, **changes):
    run = trainer(directory, case, [Stop(step)], **{"save_steps": step} | changes)
    run.train()
    return str(directory / f"checkpoint-{step}")


def test_a_longer_run_says_what_is_otherwise_and_goes_on_bit_for_bit(tmp_path, caplog):
    checkpoint = stopped(tmp_path / "short", "granet", 10, save_steps=2)  # which the Trainer goes on with
    longer = trainer(tmp_path / "long", "granet", model=tiny_llama(seed=5), max_steps=48)
    with caplog.at_level(logging.WARNING, logger="hf_chts"):
        longer.train(resume_from_checkpoint=checkpoint)
    changed, stays = lines(caplog)
    for said in ("step 48", "have gone to 24", "update is at step 36", "was at 16", "step 10 was"):
        assert said in changed
    # the cosine of a run of 24 steps after 10, and of one of 48; the warm-up after step 8 is over
    for steps in (24, 48):
        assert f"{1e-2 * (1 + math.cos(math.pi * 10 / steps)) / 2:.3g}" in changed
    # cubic, after step 8: 0.9 − 0.4·(1/2)³ is 85%, and of 36 steps it is 71.2%; 85% are passed between 16 and 20
    for said in ("stays at 85.00%", f"{cubic(8, 36):.2%}", "at step 20"):
        assert said in stays
    assert [line["sparsity"] for line in longer.evolver.history[2:4]] == pytest.approx([0.85, 0.85], abs=1e-3)
    plans = [json.loads(line) for line in (tmp_path / "long/topology/plans.jsonl").read_text().splitlines()]
    assert [(plan["step"], plan["max_steps"], plan["last_update"]) for plan in plans] == [(10, 48, 36)]
    assert plans[0]["sparsity_floor"] == pytest.approx(0.85, abs=1e-3)
    expected = all_of(longer)
    for at in (14, 28):  # before the schedule has caught up, and after
        again = trainer(tmp_path / "again", "granet", model=tiny_llama(seed=7), max_steps=48, save_strategy="no")
        again.train(resume_from_checkpoint=str(tmp_path / f"long/checkpoint-{at}"))
        assert differences(all_of(again), expected) == []


def test_a_shorter_run_catches_up_with_its_schedule_and_says_so(tmp_path, caplog):
    checkpoint = stopped(tmp_path / "long", "granet", 10, max_steps=48)
    shorter = trainer(tmp_path / "short", "granet", model=tiny_llama(seed=5), save_strategy="no")
    with caplog.at_level(logging.WARNING, logger="hf_chts"):
        shorter.train(resume_from_checkpoint=checkpoint)
    _, ahead = lines(caplog)
    for said in (f"{cubic(8, 36):.2%}", f"{cubic(12, 16):.2%}", "step 12"):
        assert said in ahead
    assert [line["sparsity"] for line in shorter.evolver.history] == pytest.approx(
        [cubic(4, 36), cubic(8, 36), cubic(12, 16), 0.9], abs=1e-3
    )


@pytest.mark.parametrize("case", ["mest", "gmp, global allocation"])
def test_a_run_that_cannot_reach_its_sparsity_any_more_says_so(tmp_path, case, caplog):
    checkpoint = stopped(tmp_path / "long", case, 16, max_steps=48)
    sparsity = {"mest": elastic}.get(case, cubic)(16, 36)
    for length in (20, 26, 27):  # three quarters of 27 steps are 20, the next update
        caplog.clear()
        run = trainer(tmp_path / "short", case, model=tiny_llama(seed=5), max_steps=length, save_strategy="no")
        with caplog.at_level(logging.WARNING, logger="hf_chts"):
            run.train(resume_from_checkpoint=checkpoint)
        told = [line for line in lines(caplog) if "No topology update is left" in line]
        if length == 27:
            assert told == []
            assert run.sparse.sparsity() == pytest.approx(0.9, abs=1e-3)
            continue
        assert run.sparse.sparsity() == pytest.approx(sparsity, abs=1e-3)
        assert len(told) == 1
        for said in ("step 16", f"{length} steps", f"{run.sparse.sparsity():.2%}", "90.00%", "at least 27 steps"):
            assert said in told[0]


def test_a_run_that_was_at_its_sparsity_and_has_no_more_updates_says_nothing_of_it(tmp_path, caplog):
    checkpoint = stopped(tmp_path / "first", "granet", 18)  # the decay has ended with step 16
    run = trainer(tmp_path / "shorter", "granet", model=tiny_llama(seed=5), max_steps=20, save_strategy="no")
    with caplog.at_level(logging.WARNING, logger="hf_chts"):
        run.train(resume_from_checkpoint=checkpoint)
    assert "No topology update is left" not in caplog.text


@pytest.mark.parametrize("case", ["chtss", "gmp, global allocation"])
def test_training_a_second_time_begins_anew_with_the_model_as_it_is(tmp_path, case, caplog):
    run = trainer(tmp_path, case, save_strategy="no")
    run.train()
    masks = {name: mask.clone() for name, mask in run.sparse.masks().items()}
    begun = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                begun.append((list(run.evolver.history), all_of(run)))

    run.add_callback(Look())
    with caplog.at_level(logging.WARNING, logger="hf_chts"):
        run.train()
    history, state = begun[0]
    assert history == []
    assert all(state[f"masks {name}"].equal(mask) for name, mask in masks.items())
    assert not any(tensor.any() for name, tensor in state.items() if name.startswith(("stored", "born")))
    assert [line["step"] for line in run.evolver.history] == [4, 8, 12, 16]
    assert all(line["sparsity"] == pytest.approx(0.9, abs=1e-3) for line in run.evolver.history)
    assert "stays at 90" in caplog.text
    # and so does another trainer that is given the model
    other = trainer(tmp_path / "other", case, model=run.model, save_strategy="no")
    other.train()
    assert all(line["sparsity"] == pytest.approx(0.9, abs=1e-3) for line in other.evolver.history)


def test_a_run_that_could_not_begin_leaves_nothing_to_the_next(tmp_path, monkeypatch):
    checkpoint = stopped(tmp_path / "first", "rigl, historical weights", 10)
    run = trainer(tmp_path / "run", "rigl, historical weights", save_strategy="no")
    with monkeypatch.context() as broken:
        broken.setattr(Trainer, "get_train_dataloader", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.train(resume_from_checkpoint=checkpoint)
    run.train()
    assert [line["step"] for line in run.evolver.history] == [4, 8, 12, 16]


def test_a_smaller_batch_that_is_tried_on_resume_goes_on_from_the_checkpoint(tmp_path, monkeypatch):
    case = "rigl, historical weights"
    checkpoint = stopped(tmp_path / "first", case, 10)
    step, sizes, found = Trainer.training_step, [], []

    def with_little_memory(self, model, inputs, *args, **kwargs):
        sizes.append(len(inputs["input_ids"]))
        if self.state.global_step == 10:
            found.append(
                {key: value.clone() for key, value in all_of(self).items() if key.startswith(("w", "m", "st"))}
            )
        if sizes[-1] > 3 and self.state.global_step == 13:  # after an update
            raise RuntimeError("CUDA out of memory.")
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", with_little_memory)
    run = trainer(tmp_path / "run", case, model=tiny_llama(seed=5), auto_find_batch_size=True, save_strategy="no")
    run.train(resume_from_checkpoint=checkpoint)
    assert (sizes[0], sizes[-2]) == (4, 3)
    at_first, again = found
    assert differences(again, at_first) == []
    assert [line["step"] for line in run.evolver.history] == [4, 8, 12, 16]


def rates(run):
    return [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]


@pytest.mark.parametrize(
    ("interval", "asked", "steps"), [(10, "default", 2), (INTERVAL, "default", 0), (10, 5, 5), (10, 0, 0)]
)
def test_the_rate_is_the_full_one_for_most_of_each_interval(tmp_path, capsys, interval, asked, steps):
    settings = {"max_steps": 30, "save_strategy": "no"}
    args = arguments(tmp_path, **settings, update_warmup_steps=None if asked == "default" else asked)
    run = SparseTrainer(
        tiny_llama(num_hidden_layers=1), args, sparsity=case_config("set", update_interval=interval),
        train_dataset=random_blocks(),
    )  # fmt: skip
    run.train()
    assert run.update_warmup_steps == steps
    expected = [1e-2 * (1 + math.cos(math.pi * step / 30)) / 2 for step in range(30)]
    for update in (step for step in range(interval, 30, interval) if step <= 20):
        for n in range(1, steps + 1):
            expected[update + n - 1] *= n / steps
    assert rates(run) == pytest.approx(expected)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("topology:"))
    assert (f"over {steps} steps" if steps else "no warm-up") in line
    assert ("paper's 20" in line) == (asked == "default")


def test_the_schedule_may_end_before_the_run(tmp_path):
    settings = {"max_steps": 20, "save_strategy": "no", "update_warmup_steps": 0, "lr_schedule_until": 0.5}
    linear = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 1.0, "lr_end": 1e-4}}
    run = SparseTrainer(
        tiny_llama(num_hidden_layers=1), arguments(tmp_path, **settings, **linear), sparsity=case_config("set"),
        train_dataset=random_blocks(),
    )  # fmt: skip
    run.train()
    expected = [1e-4 + (1e-2 - 1e-4) * (1 - min(step, 10) / 10) for step in range(20)]
    assert rates(run) == pytest.approx(expected)


def test_a_schedule_cannot_end_at_once_or_after_the_run(tmp_path):
    for until in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"lr_schedule_until is {until}"):
            arguments(tmp_path, lr_schedule_until=until)


def test_a_schedule_that_follows_the_loss_has_no_end(tmp_path):
    settings = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 5}
    args = arguments(tmp_path, **settings, save_strategy="no", lr_schedule_until=0.5, update_warmup_steps=0)
    run = SparseTrainer(
        tiny_llama(num_hidden_layers=1), args, sparsity=case_config("set"), train_dataset=random_blocks(),
        eval_dataset=random_blocks(4),
    )  # fmt: skip
    with pytest.raises(ValueError, match="lr_schedule_until is 0.5, but the schedule"):
        run.train()


@pytest.mark.parametrize(("asked", "interval"), [(4, 4), (20, 4), (20, 10), (2, 1)])
def test_a_warm_up_that_leaves_no_step_at_the_full_rate_is_refused(tmp_path, asked, interval):
    model = tiny_llama(num_hidden_layers=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config, args = case_config("set", update_interval=interval), arguments(tmp_path, update_warmup_steps=asked)
    with pytest.raises(ValueError, match=f"update_warmup_steps is {asked}, .* every {interval} steps"):
        SparseTrainer(model, args, sparsity=config)
    assert all(before[name].equal(value) for name, value in model.state_dict().items())
    SparseTrainer(model, args, sparsity=case_config("static", update_interval=interval))  # it has no updates


def said(capsys):
    return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("topology:"))


def test_it_is_said_where_no_warm_up_is_in_force(tmp_path, capsys):
    def run(args, optimizers=(None, None), model=None):
        return SparseTrainer(
            model or tiny_llama(num_hidden_layers=1), args, sparsity=case_config("set", update_interval=10),
            train_dataset=random_blocks(), eval_dataset=random_blocks(4), optimizers=optimizers,
        )  # fmt: skip

    settings = {"max_steps": 15, "save_strategy": "no"}
    plain = run(arguments(tmp_path, TrainingArguments, **settings))
    plain.train()
    line = said(capsys)
    assert "no warm-up" in line
    assert "SparseTrainingArguments" in line
    assert plain.update_warmup_steps == 0

    def own(asked):
        model = tiny_llama(num_hidden_layers=1)
        optimizer = torch.optim.AdamW(model.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        return run(arguments(tmp_path, **settings, update_warmup_steps=asked), (optimizer, schedule), model)

    own(None).train()
    line = said(capsys)
    assert "no warm-up" in line
    assert "not the Trainer's own" in line
    with pytest.raises(ValueError, match="update_warmup_steps is 2, but .* not the Trainer's own"):
        own(2).train()
    run(arguments(tmp_path, **settings, update_warmup_steps=None, warmup_steps=10)).train()
    assert "its own warm-up, 10 steps" in said(capsys)
    plateau = {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "eval_strategy": "steps",
        "eval_steps": 9,
        "update_warmup_steps": None,
    }
    run(arguments(tmp_path, **settings, **plateau)).train()
    assert "not a function of the step" in said(capsys)
