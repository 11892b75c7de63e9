"""The config's fractions as steps."""

import pytest

from hf_chts import SparsityConfig
from hf_chts.methods import METHODS


def test_updates_of_the_papers_60m_run():
    plan = SparsityConfig().plan(10_000)
    updates = [step for step in range(10_001) if plan.is_update(step)]
    assert updates == list(range(100, 7501, 100))
    assert plan.number_of_updates(99) == 0
    assert plan.number_of_updates(250) == 2
    assert plan.number_of_updates(10_000) == 75
    assert plan.decay_end == 3700  # half of 7500, at an update


@pytest.mark.parametrize("schedule", ["linear", "cubic", "sigmoid"])
@pytest.mark.parametrize(("interval", "steps"), [(7, 100), (10, 130), (100, 9999)])
def test_the_target_sparsity_is_reached_exactly_at_an_update(schedule, interval, steps):
    config = SparsityConfig(sparsity_schedule=schedule, update_interval=interval)
    plan = config.plan(steps)
    values = [plan.sparsity(step) for step in range(steps + 1) if plan.is_update(step)]
    assert values[-1] == config.sparsity
    assert values == sorted(values)
    assert values[0] > config.initial_sparsity
    assert plan.is_update(plan.decay_end)
    assert plan.sparsity(plan.decay_end) == config.sparsity


def test_drop_fraction_and_softness():
    plan = SparsityConfig(update_interval=100).plan(10_000)
    assert plan.drop_fraction(0) == pytest.approx(0.1)
    assert plan.drop_fraction(3750) == pytest.approx(0.05)
    assert plan.drop_fraction(7500) == pytest.approx(0.0)
    assert plan.temperature(100) == pytest.approx(1.0)  # δ = 0.5
    assert plan.temperature(3800) == pytest.approx(0.7 / 0.3)  # half way, δ = 0.7
    assert plan.temperature(7500) == pytest.approx(9.0)  # δ = 0.9
    steady = SparsityConfig(drop_schedule="constant", drop_fraction=0.3).plan(10_000)
    assert steady.drop_fraction(7000) == 0.3
    falling = SparsityConfig(drop_schedule="linear", drop_fraction=0.3).plan(10_000)
    assert falling.drop_fraction(3750) == pytest.approx(0.15)


def test_three_quarters_of_400_are_300():
    assert SparsityConfig(update_interval=100).plan(400).last_update == 300


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_plan(method):
    plan = SparsityConfig(method=method).plan(1000)
    assert (plan.last_update > 0) == (method not in ("dense", "static"))


@pytest.mark.parametrize(
    ("values", "steps", "message"),
    [
        ({"update_interval": 800}, 1000, "800 steps, but .* first 0.75 of 1000 steps.* at most 750"),
        ({"update_interval": 400}, 1000, "ends after 375 of 1000 steps, before the first topology update at step 400"),
    ],
)
def test_what_does_not_fit_is_refused(values, steps, message):
    with pytest.raises(ValueError, match=message):
        SparsityConfig(**values).plan(steps)
