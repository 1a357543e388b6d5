"""experiments/benchmark_diffusers.py: the rate of the machine, of which steps reach a share."""

import pytest

from experiments import benchmark_diffusers
from experiments.benchmark_diffusers import make_probes, measure_rate


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still: clock[0] is the time that it shows."""
    now = [0.0]
    monkeypatch.setattr(benchmark_diffusers.time, "perf_counter", lambda: now[0])
    return now


def test_rate_is_that_of_the_fastest_repeat_of_the_fastest_layer(clock):
    def take(*durations):
        durations = list(durations)

        def work():
            clock[0] += durations.pop()

        return work

    slow = (take(4.0, 2.0, 5.0), 4e9)  # 2 GFLOP/s at best
    fast = (take(0.5, 0.25, 1.0), 1e9)  # 4 GFLOP/s at best
    slower = (take(1.0, 1.0, 1.0), 1e9)
    assert measure_rate([slow, fast, slower], repeats=3) == 4.0


def test_operations_of_the_probes_are_counted_right(monkeypatch):
    monkeypatch.setattr(benchmark_diffusers, "MATRICES", [8])
    monkeypatch.setattr(benchmark_diffusers, "CONVOLUTIONS", [(4, 3)])
    probes = make_probes("fp32")
    matrix = 2 * 8**3
    convolution = 2 * (4 * 9) * (2 * 4 * 3**2)  # of every number: inputs × 3 × 3
    assert [flop for _, flop in probes] == [matrix, matrix, convolution]
    assert [function().numel() for function, _ in probes] == [64, 64, 72]
