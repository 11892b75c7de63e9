"""The config's fractions as steps."""

import pytest

from hf_chts import SparsityConfig


def test_updates_of_the_papers_60m_run():
    plan = SparsityConfig().plan(10_000)
    updates = [step for step in range(10_001) if plan.is_update(step)]
    assert updates == list(range(100, 7500, 100))  # t < T_end, for at T_end ζ is 0
    assert plan.number_of_updates(99) == 0
    assert plan.number_of_updates(250) == 2
    assert plan.number_of_updates(10_000) == 75
    assert (plan.latest_update(99), plan.latest_update(250), plan.latest_update(10_000)) == (0, 200, 7400)
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
    assert SparsityConfig(update_interval=100).plan(400).window_end == 300


def updates(plan):
    return [step for step in range(plan.max_steps + 1) if plan.is_update(step)]


def last(method="set", steps=400, **values):
    plan = SparsityConfig(method=method, update_interval=100, **values).plan(steps)
    assert plan.last_update == updates(plan)[-1]
    return plan.last_update


def test_an_update_that_could_change_nothing_is_none():
    assert last("set") == last("rigl") == last("chts", drop_schedule="linear") == 200
    assert last(drop_schedule="constant") == 300
    assert last("gmp") == 300  # ζ has no part in it: weights grow past each other
    assert last("granet") == last("mest") == 300  # sparsity ends there
    assert last("granet", sparsity_schedule_until=0.5) == 200
    assert last(allocation="global") == last(percolation=True) == 300  # links move without ζ
    # what is regrown after the last step is never trained
    assert last(drop_schedule="constant", update_until=1.0) == 300
    assert last("granet", update_until=1.0) == 400
    assert updates(SparsityConfig(method="set", drop_fraction=0.0).plan(1000)) == []
    # without ζ only the steps of MEST's sparsity are left: 0.05 below it, 0.025 below it, and itself
    mest = SparsityConfig(method="mest", drop_fraction=0.0, update_interval=10).plan(400)
    assert updates(mest) == [180, 300]


def test_a_drop_fraction_that_rounds_to_no_link_is_0():
    # at step 700 of 1,000, T_end being 750, ζ is 0.05·(1 + cos(π·700/750)) = 0.00109: 0.5 of 458 links
    few, many = (SparsityConfig(method="set").plan(1000, links=lambda sparsity, n=n: [100, n]) for n in (450, 470))
    assert (few.last_update, many.last_update) == (600, 700)


def test_what_is_left_out_changes_no_other_update():
    plan = SparsityConfig(method="chts", update_interval=100).plan(1200)
    assert plan.last_update == 800
    assert plan.window_end == 900
    assert plan.temperature(500) == pytest.approx(0.7 / 0.3)  # δ is halfway from step 100 to 900
    assert [plan.number_of_updates(step) for step in (800, 899, 900, 1200)] == [8, 8, 9, 9]


@pytest.mark.parametrize(
    ("values", "steps", "message"),
    [
        ({"update_interval": 800}, 1000, "800 steps, but .* first 0.75 of 1000 steps.* at most 749"),
        ({"method": "set", "update_interval": 750}, 1000, "750 steps, but .* it never would be: .* at most 749"),
        ({"update_interval": 400}, 1000, "ends after 375 of 1000 steps, before the first topology update at step 400"),
    ],
)
def test_what_does_not_fit_is_refused(values, steps, message):
    with pytest.raises(ValueError, match=message):
        SparsityConfig(**values).plan(steps)


def test_an_interval_below_1_is_a_fraction_of_the_run():
    config = SparsityConfig("set", update_interval=0.01, update_until=1.0, drop_schedule="constant")
    plan = config.plan(187_500)
    assert plan.interval == 1875
    # links regrown after the last step are never trained
    assert updates(plan) == list(range(1875, 187_500, 1875))
    assert plan.number_of_updates(4000) == 2
    assert config.plan(40).interval == 1  # never below a step
    assert SparsityConfig("set", update_interval=0.25).plan(10).interval == 2  # 2.5 rounds to even
    assert SparsityConfig(update_interval=100.0).update_interval == 100
    assert isinstance(SparsityConfig(update_interval=100.0).update_interval, int)


def test_a_schedule_that_starts_later_stays_dense_without_updates_until_then():
    config = SparsityConfig("gmp", sparsity=0.9, initial_sparsity=0.0, sparsity_schedule_from=0.25)
    plan = config.plan(2000)
    assert (plan.decay_start, plan.decay_end) == (500, 1500)
    assert [plan.sparsity(step) for step in (0, 500, 1500)] == [0.0, 0.0, 0.9]
    assert plan.sparsity(1000) == pytest.approx(0.9 - 0.9 * 0.5**3)
    assert [step for step in range(1, 2001) if plan.is_update(step)][:2] == [600, 700]
    # 600 steps dense, then by the updates of each 100 steps, and 500 at the end
    density = [0.1 + 0.9 * (1 - n / 10) ** 3 for n in range(1, 10)]
    assert plan.average(lambda sparsity: 1 - sparsity) == pytest.approx((600 + 100 * sum(density) + 50) / 2000)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "gmp", "sparsity_schedule_from": 0.8}, "sparsity_schedule_from is 0.8 .* sparsity_schedule_until"),
        ({"method": "mest", "sparsity_schedule_from": 0.2}, "no beginning of its own"),
        ({"method": "set", "sparsity_schedule_from": 0.2}, "no beginning of its own"),
    ],
)
def test_beginnings_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SparsityConfig(**fields)


def test_no_update_between_beginning_and_end_is_refused():
    with pytest.raises(ValueError, match="no topology update between them"):
        SparsityConfig("gmp", sparsity_schedule_from=0.72, update_interval=100).plan(1000)
