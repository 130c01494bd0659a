"""What a long loop says of itself, on a clock that the test turns."""

from __future__ import annotations

import logging

import pytest

from iprox import progress
from iprox.progress import clock, loops, throughput, track


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    monkeypatch.setattr(progress, "_bars", False)
    return found


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00:00"),
        (59.4, "0:00:59"),
        (59.6, "0:01:00"),
        (3723, "1:02:03"),
        (400_000, "111:06:40"),
        (-3, "0:00:00"),
        (float("nan"), "-"),
        (float("inf"), "-"),
    ],
)
def test_times_are_hours_minutes_seconds(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_a_line_at_intervals_with_rate_and_time_left(
    time: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with track(100, "examples", "scoring") as loop:
        for _ in range(4):  # 25 examples of 40 tokens in 10 s each
            time.now += 10
            loop.advance(25, tokens=1000, note="loss 1.5")
    assert caplog.messages == [
        "scoring: 50/100 examples, 100 tokens/s, 0:00:20 left, loss 1.5",
        "scoring: 100/100 examples, 100 tokens/s, 0:00:00 left, loss 1.5",
        "scoring: 100/100 examples, 100 tokens/s, took 0:00:40",
    ]


def test_bytes_are_megabytes_and_an_unknown_total_has_no_time_left(time: Clock) -> None:
    with track(0, "bytes", "download") as loop:
        time.now += 2
        loop.advance(3_000_000)
        assert loop.line() == "download: 3.0 MB, - left"
    with track(12_000_000, "bytes", "download") as loop:
        time.now += 2
        loop.advance(3_000_000)
        assert loop.line() == "download: 3.0/12.0 MB, 0:00:06 left"


def test_a_loop_that_has_not_begun_knows_no_time_left(time: Clock) -> None:
    with track(5, "steps", "training") as loop:
        assert loop.line() == "training: 0/5 steps, - left"
        loop.advance(5)


def test_rates_are_over_the_loops_that_passed_tokens(time: Clock) -> None:
    with loops() as ended:
        with track(2, "files", "report") as loop:
            time.now += 1000
            loop.advance(2)
        with track(10, "queries", "a") as loop:
            time.now += 4
            loop.advance(10, tokens=300)
        time.now += 50  # saving
        with track(3, "steps", "b") as loop:
            time.now += 6
            loop.advance(3, tokens=200, examples=20)
    assert throughput(ended) == {"tokens_per_s": 50.0, "examples_per_s": 3.0, "loop_s": 10.0}
    assert throughput(ended[:1]) == {}


def test_a_loop_that_failed_does_not_count(time: Clock) -> None:
    with loops() as ended:
        with pytest.raises(ValueError, match="stop"), track(1, "queries", "a"):
            raise ValueError("stop")
    assert ended == []
    with track(1, "queries", "outside") as loop:
        loop.advance(1, tokens=1)
    assert ended == []
