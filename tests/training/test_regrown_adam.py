"""Adam's bias correction of regrown links, against Adam written out for each link alone."""

import math

import pytest
import torch
from cases import arguments, case_config, losses, same_weights, weights
from tiny import random_blocks, tiny_llama

from hf_chts import MaskedLinear, SparseTrainer
from hf_chts.evolution.regrown_adam import RegrownAdam
from hf_chts.sharding.replicated import ReplicatedWeights

INTERVAL = 5


def adam_of_one_link(gradients, rates, betas, eps, decay, start):
    """The weight of a link that starts at `start` with no moments, after a step for each gradient."""
    weight, first, second = start, 0.0, 0.0
    for n, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        weight *= 1 - rate * decay
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        weight -= rate * (first / (1 - betas[0] ** n)) / (math.sqrt(second / (1 - betas[1] ** n)) + eps)
    return weight


def one_layer(weight, interval, kind=torch.optim.AdamW, **options):
    """(weight, corrections, optimizer) of a layer with links where the weights are not 0."""
    linear = torch.nn.Linear(len(weight[0]), len(weight), bias=False)
    layer = MaskedLinear.convert(linear, torch.ones(linear.weight.shape, dtype=torch.bool))
    layer.weight.data = torch.tensor(weight)
    layer.set_mask(layer.weight != 0)
    optimizer = kind([layer.weight], **options)
    return layer.weight, RegrownAdam({"layer": layer}, ReplicatedWeights(optimizer), interval), optimizer


def change(regrown, mask, update):
    layer = regrown.layers["layer"]
    layer.storage.replace(mask, regrown.engine, stamp=(regrown.born["layer"], update))
    regrown.changed("layer")


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("beta2", [0.999, 0.95])
def test_each_regrown_link_steps_as_if_training_began_with_it(kind, beta2):
    decay = 0.1 if kind is torch.optim.AdamW else 0.0
    weight, regrown, optimizer = one_layer(
        [[1.0, 0.0, 0.0], [0.5, 0.0, -2.0]], INTERVAL, kind, betas=(0.9, beta2), weight_decay=decay
    )
    mask = weight.detach() != 0
    births = {(0, 1): 1, (1, 1): 2, (0, 2): 2}  # the update that regrows each; the other links are from the start
    draws = torch.randn(20, 2, 3, generator=torch.Generator().manual_seed(0))
    rates = [1e-2 / (step + 1) for step in range(20)]
    for step in range(1, 21):
        optimizer.param_groups[0]["lr"] = rates[step - 1]
        weight.grad = draws[step - 1] * mask
        optimizer.step()
        regrown.correct(step)
        if step % INTERVAL == 0:
            after = mask.clone()
            for link, update in births.items():
                if update == step // INTERVAL:
                    after[link] = True
            change(regrown, after, step // INTERVAL)
            mask = after
    for row in range(2):
        for column in range(3):
            link = (row, column)
            start = {(0, 0): 1.0, (1, 0): 0.5, (1, 2): -2.0}.get(link, 0.0)
            since = births.get(link, 0) * INTERVAL
            gradients = draws[since:, row, column].tolist()
            wanted = adam_of_one_link(gradients, rates[since:], (0.9, beta2), 1e-8, decay, start)
            assert weight[link].item() == pytest.approx(wanted, rel=1e-5, abs=1e-7)


def test_a_link_that_left_and_came_back_begins_again():
    _, regrown, _ = one_layer([[1.0, 1.0, 1.0]], INTERVAL)
    masks = [torch.tensor([bits], dtype=torch.bool) for bits in ([1, 1, 0], [1, 0, 1], [1, 1, 1], [1, 1, 0])]
    births = []
    regrown.layers["layer"].set_mask(masks[0])
    for update, mask in enumerate(masks[1:], start=1):
        change(regrown, mask, update)
        births.append(regrown.born["layer"].tolist()[0])
    assert births == [[0, 0, 1], [0, 2, 1], [0, 2, 0]]


def test_the_first_steps_of_a_regrown_link_are_no_larger_than_the_rate():
    def largest_step(corrected):
        weight, regrown, optimizer = one_layer([[0.0]], 1000, lr=1.0, weight_decay=0)
        weight.grad = torch.zeros(1, 1)
        for _ in range(1000):
            optimizer.step()
        change(regrown, torch.ones(1, 1, dtype=torch.bool), 1)
        steps = []
        for step in range(1001, 1031):
            before = weight.item()
            weight.grad = torch.ones(1, 1)
            optimizer.step()
            if corrected:
                regrown.correct(step)
            steps.append(abs(weight.item() - before))
        return max(steps)

    assert largest_step(True) == pytest.approx(1.0, rel=1e-4)
    # (1 − 0.9^n) / √(1 − 0.999^n) is highest at n = 12; v̂ over all 1012 steps is smaller by √0.637
    assert largest_step(False) > 5


def per_weight(directory, method="chtss", model=None, **changes):
    return SparseTrainer(
        model=model or tiny_llama(),
        args=arguments(directory, **changes),
        sparsity=case_config(method, regrown_adam="per_weight_steps"),
        train_dataset=random_blocks(),
    )


def test_births_are_kept_for_links_alone_and_resumed(tmp_path):
    whole = per_weight(tmp_path, "set")
    whole.train()
    again = per_weight(tmp_path, "set", model=tiny_llama(seed=5))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert losses(again) == losses(whole)
    for name, born in whole.evolver.adam.born.items():
        assert again.evolver.adam.born[name].equal(born)
        assert born.max() >= 3
        assert not born[~whole.sparse.layers[name].mask].any()


def test_it_changes_the_run_and_only_after_the_first_update(tmp_path):
    seen = []
    for regrown_adam in ("global_steps", "per_weight_steps"):
        run = SparseTrainer(
            model=tiny_llama(),
            args=arguments(tmp_path, save_strategy="no"),
            sparsity=case_config("set", regrown_adam=regrown_adam),
            train_dataset=random_blocks(),
        )
        run.train()
        seen.append(losses(run))
    assert seen[0][:5] == seen[1][:5]  # the loss of step 6 is the first that a step on regrown links has changed
    assert seen[0][5:] != seen[1][5:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"optim": "sgd"}, "torch.optim.sgd.SGD"), ({"optim": "adafactor"}, "Adafactor")],
)
def test_other_optimizers_are_refused(tmp_path, changes, message):
    run = per_weight(tmp_path, **changes)
    before = weights(run)
    with pytest.raises(ValueError, match=message):
        run.train()
    assert same_weights(before, weights(run))


def test_amsgrad_and_too_many_updates_are_refused():
    weight = torch.nn.Parameter(torch.zeros(1, 1))
    with pytest.raises(ValueError, match="amsgrad"):
        RegrownAdam.check(torch.optim.AdamW([weight], amsgrad=True))
    with pytest.raises(ValueError, match="32768: raise update_interval"):
        one_layer([[0.0]], 1)[1].check_updates(32768)


@pytest.mark.parametrize("restart", [True, False])
def test_steps_of_a_regrown_link_grow_to_their_full_size(restart):
    def steps(warmup):
        weight, regrown, optimizer = one_layer([[0.0]], 10, lr=1.0, weight_decay=0)
        regrown.restart, regrown.warmup = restart, warmup
        weight.grad = torch.zeros(1, 1)
        for _ in range(10):
            optimizer.step()
        change(regrown, torch.ones(1, 1, dtype=torch.bool), 1)
        taken = []
        for step in range(11, 31):
            before = weight.item()
            weight.grad = torch.ones(1, 1)
            optimizer.step()
            regrown.correct(step)
            taken.append(before - weight.item())
        return taken

    plain, warmed = steps(0), steps(15)
    assert warmed == pytest.approx([step * min(1, n / 15) for n, step in enumerate(plain, start=1)], rel=1e-4)


def test_smet_scales_the_rate_by_density_from_the_first_step(tmp_path):
    def rates(**fields):
        run = SparseTrainer(
            model=tiny_llama(),
            args=arguments(tmp_path, save_strategy="no", update_warmup_steps=None),
            sparsity=case_config("smet", sparsity=0.75, **fields),
            train_dataset=random_blocks(),
        )
        run.train()
        return [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]

    assert rates() == pytest.approx([2 * rate for rate in rates(rate_by_density="none")])
    with pytest.raises(ValueError, match="rate_by_density is 'inverse_sqrt', but the schedule .*reduce"):
        SparseTrainer(
            model=tiny_llama(),
            args=arguments(
                tmp_path,
                lr_scheduler_type="reduce_lr_on_plateau",
                update_warmup_steps=0,
                eval_steps=1,
                eval_strategy="steps",
            ),
            sparsity=case_config("smet"),
            train_dataset=random_blocks(),
            eval_dataset=random_blocks(8),
        ).train()
