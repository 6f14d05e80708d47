import math
import time

import pytest

from quantlab import memory
from quantlab.memory import MemoryTimeline, current_rss_bytes

on_linux = pytest.mark.skipif(current_rss_bytes() is None, reason="the system does not tell what a process occupies")


@on_linux
def test_memory_that_was_taken_and_given_back_is_seen():
    with MemoryTimeline() as timeline:
        timeline.begin("small")
        before = current_rss_bytes()
        timeline.begin("large")
        block = bytearray(b"x") * (64 << 20)
        time.sleep(0.3)
        del block
        timeline.begin("small again")
        time.sleep(0.3)
    record = timeline.record()
    assert max(record["bytes"]) > before + (60 << 20)
    assert record["bytes"][-1] < before + (40 << 20)
    assert list(record["stages"]) == ["small", "large", "small again"]
    assert 0 <= record["stages"]["small"] <= record["stages"]["large"] <= record["stages"]["small again"] - 0.3


def test_long_work_is_seen_in_longer_intervals_without_losing_a_peak():
    timeline = MemoryTimeline()
    for second in range(1000):
        timeline._note(float(second), 5000 if second == 333 else 100 + second)
    record = timeline.record()
    assert len(record["bytes"]) == math.ceil(1000 / record["interval_s"]) <= memory._MOST_INTERVALS
    assert record["bytes"][int(333 / record["interval_s"])] == 5000
    assert sorted(record["bytes"])[-2] == 1099
    assert record["bytes"][0] == 107  # at 7 s; nobody looked between 6 s and then, and the interval ends at 6.4 s


def test_nothing_is_seen_where_the_system_does_not_tell(monkeypatch):
    monkeypatch.setattr(memory, "current_rss_bytes", lambda: None)
    with MemoryTimeline() as timeline:
        pass
    assert timeline.record()["bytes"] == []
