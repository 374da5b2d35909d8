"""When requests come: arrival processes of a mean rate, seeded. No lengths here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from itertools import count
from math import cos, pi
from random import Random

from megatron_medha.core.errors import ConfigError


class ArrivalProcess(Enum):
    """Where arrival times come from."""

    AUTO = "auto"          # the trace's own where it has some, else poisson
    RECORDED = "recorded"  # the trace's own
    CONSTANT = "constant"  # one every 1 / qps seconds
    POISSON = "poisson"
    GAMMA = "gamma"        # independent gaps with a given coefficient of variation
    BURST = "burst"        # Poisson, with a higher rate at the beginning of every period
    DIURNAL = "diurnal"    # Poisson, with a rate that swings over a period as over a day


def arrival_times_s(
    kind: ArrivalProcess, qps: float, draw: Random, *,
    cv: float, burst_factor: float, burst_s: float, period_s: float, amplitude: float,
) -> Iterator[float]:  # fmt: skip
    """Endless arrival times, ascending from 0, at a mean of `qps` per second.

    cv: of gamma, standard deviation of gaps over their mean; 1 is Poisson. burst_factor: rate within a burst of
    burst_s over the mean rate. period_s: from the start of one burst or night to the next. amplitude: the share of its
    mean, 0 to 1, by which the diurnal rate swings.
    Raises ConfigError where bursts would need a negative rate between them.
    """
    match kind:
        case ArrivalProcess.CONSTANT:
            return (index / qps for index in count())
        case ArrivalProcess.POISSON:
            return _running_sum(lambda: draw.expovariate(qps))
        case ArrivalProcess.GAMMA:
            shape_parameter = 1.0 / cv**2
            return _running_sum(lambda: draw.gammavariate(shape_parameter, 1.0 / (shape_parameter * qps)))
        case ArrivalProcess.BURST:
            busy = burst_factor * burst_s / period_s  # share of arrivals that come in bursts
            if burst_s >= period_s or busy > 1.0:
                raise ConfigError(
                    f"workload.burst_factor={burst_factor:g}: bursts of workload.burst_s={burst_s:g} every "
                    f"workload.period_s={period_s:g} would bring more than all requests; at most "
                    f"period_s / burst_s = {period_s / burst_s:g}, with burst_s below period_s"
                )
            calm = (1.0 - busy) / (1.0 - burst_s / period_s)
            return _thinned(
                lambda at_s: qps * (burst_factor if at_s % period_s < burst_s else calm),
                qps * max(burst_factor, calm),
                draw,
            )
        case ArrivalProcess.DIURNAL:
            return _thinned(
                lambda at_s: qps * (1.0 - amplitude * cos(2.0 * pi * at_s / period_s)),
                qps * (1.0 + amplitude),
                draw,
            )
        case ArrivalProcess.AUTO | ArrivalProcess.RECORDED:
            raise AssertionError(f"{kind} draws nothing")


def _running_sum(gap_s: Callable[[], float]) -> Iterator[float]:
    now_s = 0.0
    while True:
        now_s += gap_s()
        yield now_s


def _thinned(rate: Callable[[float], float], max_rate: float, draw: Random) -> Iterator[float]:
    """An inhomogeneous Poisson process (Lewis and Shedler 1979): candidates at the highest rate, kept by the rate."""
    for at_s in _running_sum(lambda: draw.expovariate(max_rate)):
        if draw.random() * max_rate < rate(at_s):
            yield at_s
