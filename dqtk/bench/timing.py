"""Times in rounds: each method once per round, in an order drawn anew; medians, and ratios within a round."""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        if len(values) == 1:
            return Spread(median=values[0], low=values[0], high=values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median=median, low=low, high=high)


def times_faster(base: Sequence[float], other: Sequence[float]) -> Spread:
    """How many times faster ``other`` is than ``base``: ratios within a round, so that a slow moment slows both."""
    return Spread.of([a / b for a, b in zip(base, other, strict=True)])


def interleaved(
    methods: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    wait: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    seed: int = 0,
    done: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of every method in every round, after one call of each that is not timed.

    Args:
        methods: name -> what is timed.
        repeats: rounds.
        wait: makes the device finish; called before and after every method.
        clock: seconds.
        seed: of the orders.
        done: called behind every method.
    """
    orders, times = random.Random(seed), {name: [] for name in methods}  # type: ignore[var-annotated]
    for call in methods.values():
        call()
        done()
    for _ in range(repeats):
        for name in orders.sample(list(methods), len(methods)):
            wait()
            start = clock()
            methods[name]()
            wait()
            times[name].append(clock() - start)
            done()
    return times


def waiter(device: torch.device) -> Callable[[], object]:
    """What makes a device finish what it was given."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


def stopwatch(device: torch.device) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """``mark()`` -> a moment in the device's own order of work, and ``seconds(start, end)`` between two of them.

    On CUDA marks are events: nothing waits while a model runs; synchronize before asking for seconds.
    """
    if device.type != "cuda":
        return time.perf_counter, lambda start, end: end - start

    def mark() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return mark, lambda start, end: start.elapsed_time(end) / 1e3


@contextmanager
def threads(num: int | None) -> Iterator[None]:
    """torch's threads inside; None leaves them."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(num or before)
        yield
    finally:
        torch.set_num_threads(before)
