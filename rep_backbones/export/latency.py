"""How long things take, measured in turn, so that a slow moment of the machine meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

K = TypeVar("K")


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call: the median, the smallest and the largest of so many runs."""

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int


def measure(
    calls: Mapping[str, Callable[[], object]],
    *,
    runs: int = 10,
    warmup: int = 2,
    least: int = 3,
    seconds: float = 3.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Latency]:
    """The latency of each of `calls`; arguments and errors as `rounds`."""
    taken = rounds(calls, runs=runs, warmup=warmup, least=least, seconds=seconds, clock=clock)
    return {name: latency(ms) for name, ms in taken.items()}


def rounds(
    calls: Mapping[K, Callable[[], object]],
    *,
    runs: int = 10,
    warmup: int = 2,
    least: int = 3,
    seconds: float = 3.0,
    clock: Callable[[], float] = time.perf_counter,
    each: Callable[[], object] = lambda: None,
) -> dict[K, list[float]]:
    """Time each of `calls` once per round; the milliseconds of each, by round.

    Args:
        calls: each must end with its result ready: what runs on a GPU waits for it.
        runs: rounds at most.
        warmup: untimed rounds before, at most; a second one begins only within a third of `seconds`.
        least: rounds that are timed however long they take: a median with a spread needs some.
        seconds: after so many, no other round begins.
        clock: gives seconds.
        each: is called after each round, untimed ones too.

    Raises:
        ValueError: `runs` is below 1.
    """
    _refuse_none(runs)
    begin = clock()
    for done in range(warmup):
        if done and clock() >= begin + seconds / 3:
            break
        for call in calls.values():
            call()
        each()
    taken: dict[K, list[float]] = {name: [] for name in calls}
    for done in range(runs):
        if done >= least and clock() >= begin + seconds:
            break
        for name, call in calls.items():
            start = clock()
            call()
            taken[name].append((clock() - start) * 1e3)
        each()
    return taken


def measure_apart(
    openers: Mapping[str, Callable[[], Callable[[], object]]],
    *,
    runs: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Latency]:
    """As `measure`, for what has no room side by side: each round opens one after the other, and keeps none.

    Args:
        openers: each gives the call that is timed, after an untimed one.
        runs: rounds.

    Raises:
        ValueError: `runs` is below 1.
    """
    _refuse_none(runs)
    taken: dict[str, list[float]] = {name: [] for name in openers}
    for _ in range(runs):
        for name, opened in openers.items():
            call = opened()
            call()
            start = clock()
            call()
            taken[name].append((clock() - start) * 1e3)
            del call  # before the next one is opened
    return {name: latency(ms) for name, ms in taken.items()}


def latency(ms: list[float]) -> Latency:
    """Of the milliseconds of each run."""
    return Latency(statistics.median(ms), min(ms), max(ms), len(ms))


def _refuse_none(runs: int) -> None:
    if runs < 1:
        raise ValueError(f"runs={runs} is not accepted; give a whole number from 1")
