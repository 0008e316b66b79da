"""What is timed when: in turn, after a warm-up, within a budget. The clock is injected."""

from __future__ import annotations

import pytest

from rep_backbones.export.latency import Latency, measure, measure_apart, rounds


class Clock:
    """Seconds that pass only when something is called."""

    def __init__(self) -> None:
        self.now = 0.0
        self.called: list[str] = []

    def __call__(self) -> float:
        return self.now

    def taking(self, name: str, *seconds: float) -> object:
        left = list(seconds)

        def call() -> None:
            self.called.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_calls_are_timed_in_turn_after_the_warm_up() -> None:
    clock = Clock()
    calls = {"a": clock.taking("a", 9.0, 0.001, 0.004, 0.002), "b": clock.taking("b", 9.0, 0.020, 0.010, 0.060)}
    found = measure(calls, runs=3, warmup=1, seconds=99, clock=clock)  # type: ignore[arg-type]
    assert clock.called == ["a", "b"] * 4
    assert found["a"] == Latency(*(pytest.approx(ms) for ms in (2.0, 1.0, 4.0)), runs=3)
    assert found["b"] == Latency(*(pytest.approx(ms) for ms in (20.0, 10.0, 60.0)), runs=3)


@pytest.mark.parametrize(("seconds", "warm", "timed"), [(0.0, 1, 3), (2.5, 1, 3), (4.5, 2, 3), (7.5, 2, 6), (99.0, 2, 10)])
def test_the_budget_ends_it_but_each_call_is_timed_three_times(seconds: float, warm: int, timed: int) -> None:
    clock = Clock()
    calls = {"a": clock.taking("a", 0.5), "b": clock.taking("b", 0.5)}
    found = measure(calls, runs=10, warmup=2, seconds=seconds, clock=clock)  # type: ignore[arg-type]
    assert clock.called == ["a", "b"] * (warm + timed)
    assert found["a"].runs == found["b"].runs == timed


def test_rounds_keep_every_run_and_tell_of_each_round() -> None:
    clock = Clock()
    calls = {("a", 1): clock.taking("a", 9.0, 0.001, 0.004), ("b", 2): clock.taking("b", 9.0, 0.020, 0.010)}
    taken = rounds(calls, runs=2, warmup=1, seconds=99, clock=clock, each=lambda: clock.called.append("round"))  # type: ignore
    assert taken == {
        ("a", 1): [pytest.approx(1.0), pytest.approx(4.0)],
        ("b", 2): [pytest.approx(20.0), pytest.approx(10.0)],
    }
    assert clock.called == ["a", "b", "round"] * 3


def test_no_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="runs=0"):
        measure({"a": int}, runs=0)
    with pytest.raises(ValueError, match="runs=0"):
        measure_apart({"a": lambda: int}, runs=0)


def test_what_is_opened_apart_is_timed_in_turn_without_its_opening() -> None:
    clock = Clock()
    alive: list[str] = []

    class Opened:
        def __init__(self, name: str, call: object) -> None:
            assert not alive, "one at a time"
            alive.append(name)
            clock.now += 100.0
            self.call = call

        def __call__(self) -> None:
            self.call()  # type: ignore[operator]

        def __del__(self) -> None:
            alive.pop()

    calls = {"a": clock.taking("a", 9.0, 0.003, 9.0, 0.001, 9.0, 0.002), "b": clock.taking("b", 0.020)}
    openers = {name: lambda name=name: Opened(name, calls[name]) for name in calls}
    found = measure_apart(openers, runs=3, clock=clock)  # type: ignore[arg-type]
    assert clock.called == ["a", "a", "b", "b"] * 3
    assert found["a"] == Latency(*(pytest.approx(ms) for ms in (2.0, 1.0, 3.0)), runs=3)
    assert found["b"] == Latency(*(pytest.approx(ms) for ms in (20.0, 20.0, 20.0)), runs=3)
