"""Schedules: their ends, what is between, and which pairs of them leave nothing to train on."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abkd_megatron.errors import ConfigError
from abkd_megatron.losses.schedule import COUNTS, Progress, Schedule, both_zero

values = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 10**9)


def test_linear_and_cosine():
    linear, cosine = (make(1.0, 0.2, start=100, end=200) for make in (Schedule.linear, Schedule.cosine))
    for schedule in (linear, cosine):
        assert [schedule.value(count) for count in (0, 99, 100)] == [1.0] * 3
        assert [schedule.value(count) for count in (200, 201, 10**12)] == [0.2] * 3
        assert schedule.value(150) == pytest.approx(0.6)
    assert linear.value(125) == pytest.approx(0.8)
    assert cosine.value(125) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)


def test_piecewise_and_its_jumps():
    schedule = Schedule.piecewise([(10, 4.0), (20, 2.0), (20, 1.0), (40, 3.0)])
    assert [schedule.value(count) for count in (0, 10, 15, 20, 30, 40, 50)] == [4.0, 4.0, 3.0, 1.0, 2.0, 3.0, 3.0]
    assert schedule.value(19) == pytest.approx(2.2)


def test_what_is_counted():
    progress = Progress(1, 8, 256)
    assert [Schedule.linear(0.0, 512.0, end=512, by=by)(progress) for by in COUNTS[:3]] == [1.0, 8.0, 256.0]
    assert Schedule.of(3.0)(progress) == 3.0
    assert Schedule.of(Schedule.of(3.0)) == Schedule("constant", ((0, 3.0),))


def test_fractions_of_the_run():
    late = Schedule.linear(1.0, 0.2, start=0.5, end=1.0, by="fraction")
    in_steps = Schedule.linear(1.0, 0.2, start=50, end=100)
    for step in range(101):
        by_steps = Progress.of_run(step, 8 * step, 32, iterations=100, total_samples=None)
        assert (by_steps.samples, by_steps.tokens) == (8 * step, 256 * step)
        assert late(by_steps) == pytest.approx(in_steps(by_steps), rel=1e-12)
    assert (late(Progress(fraction=0.0)), late.first, late(Progress(fraction=0.5))) == (1.0, 1.0, 1.0)
    assert late(Progress(fraction=1.0)) == 0.2

    # A run that counts samples is at its part of them, whatever its batch sizes were.
    grown = Progress.of_run(3, 600, 32, iterations=4, total_samples=800)
    assert grown.fraction == 0.75 and late(grown) == pytest.approx(0.6)
    # A length that was changed counts from now on; what is over stays at the end.
    assert Progress.of_run(50, 400, 32, iterations=200, total_samples=None).fraction == 0.25
    assert Progress.of_run(50, 400, 32, iterations=40, total_samples=None).fraction == 1.0
    assert Progress.of_run(0, 0, 32, iterations=0, total_samples=None).fraction == 1.0

    with pytest.raises(ConfigError, match="length of the run"):
        late(Progress(5, 40, 1280))
    assert Schedule("constant", ((0, 3.0),), "fraction")(Progress(5)) == 3.0
    assert Schedule.piecewise([(0, 1.0), (0.25, 1.0), (0.25, 2.0)], by="fraction").value(0.25) == 2.0


@given(kind=st.sampled_from(["linear", "cosine"]), first=values, last=values, start=counts, length=counts, count=counts)
def test_stays_between_its_ends(kind, first, last, start, length, count):
    schedule = Schedule(kind, ((start, first), (start + length + 1, last)))
    low, high = sorted((first, last))
    assert schedule.lowest == low <= schedule.value(count) <= high
    assert schedule.value(start) == first and schedule.value(start + length + 1) == last


@given(kind=st.sampled_from(["linear", "cosine"]), ends=st.tuples(values, values), steps=st.integers(2, 200))
def test_goes_one_way(kind, ends, steps):
    low, high = sorted(ends)
    up = Schedule(kind, ((0, low), (steps, high)))
    taken = [up.value(count) for count in range(steps + 1)]
    assert taken == sorted(taken)


@given(points=st.lists(st.tuples(counts, values), min_size=1, max_size=6), count=counts)
def test_piecewise_stays_between_its_neighbors(points, count):
    points.sort()
    schedule = Schedule.piecewise(points)
    before = [value for at, value in points if at <= count][-1:] or [points[0][1]]
    after = [value for at, value in points if at > count][:1] or [points[-1][1]]
    assert min(before + after) <= schedule.value(count) <= max(before + after)


@given(value=values, count=counts)
def test_equal_ends_are_that_number(value, count):
    assert Schedule.cosine(value, value, end=1000).value(count) == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("straight", ((0, 1.0),)), "schedule.*constant, linear, cosine, piecewise, got 'straight'"),
        (("constant", ((0, 1.0),), "epoch"), "by.*iteration, samples, tokens, fraction, got 'epoch'"),
        (("linear", ((0.5, 1.0), (1.5, 2.0)), "fraction"), "from 0 to 1, got 1.5"),
        (("linear", ((0.5, 1.0), (5, 2.0))), "whole number"),
        (("linear", ((0, 1.0), (9, math.nan))), "finite"),
        (("linear", ((9, 1.0), (9, 2.0))), "an end after the start"),
        (("cosine", ((0, 1.0), (5, 2.0), (9, 2.0))), "an end after the start"),
        (("constant", ((0, 1.0), (9, 2.0))), "one value"),
        (("piecewise", ()), "points"),
        (("piecewise", ((5, 1.0), (4, 1.0))), "in order"),
        (("piecewise", ((-1, 1.0),)), "at least 0"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Schedule(*arguments)


@given(
    pair=st.tuples(
        *[st.lists(st.tuples(st.integers(0, 20), st.sampled_from([0.0, 0.0, 1.0])), min_size=1, max_size=5)] * 2
    )
)
def test_both_zero_is_found_wherever_it_is(pair):
    one, other = (Schedule.piecewise(sorted(points, key=lambda point: point[0])) for points in pair)
    found = both_zero(one, other) is not None
    assert found == any(one.value(count) == other.value(count) == 0 for count in range(25))
