"""What a step takes beside what is there already."""

from pathlib import Path

import pytest
import torch

from dqtk.bench import memory
from dqtk.bench.memory import NotMeasured, available, rise

CPU, MIB = torch.device("cpu"), 2**20
linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of resident memory is set back on Linux only"
)


def touched(size):
    return torch.ones(size, dtype=torch.uint8)


@linux
def test_the_rise_is_what_was_taken_at_once():
    kept = touched(64 * MIB)  # lies there before: not counted

    def two_after_each_other():
        for _ in range(2):
            touched(48 * MIB)

    assert 44 * MIB < rise(two_after_each_other, CPU) < 64 * MIB
    assert 92 * MIB < rise(lambda: (touched(48 * MIB), touched(48 * MIB)), CPU) < 112 * MIB
    assert kept.numel() == 64 * MIB


@linux
def test_memory_that_was_freed_before_counts_again():
    """glibc keeps blocks that were freed: a step that takes them again would seem to need nothing.

    Some pages stay between blocks that are in use, more of them after a long run of other tests: half must show.
    """
    blocks = [touched(MIB // 16) for _ in range(3200)]
    del blocks
    assert rise(lambda: [touched(MIB // 16) for _ in range(3200)], CPU) > 100 * MIB


@linux
def test_threads_and_errors_reach_the_step():
    seen = []
    before = torch.get_num_threads()
    rise(lambda: seen.append(torch.get_num_threads()), CPU)
    assert seen == [before]

    def fails():
        raise RuntimeError("of the step")

    with pytest.raises(RuntimeError, match="of the step"):
        rise(fails, CPU)


def test_where_the_system_does_not_say(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "no" / "clear_refs")
    with pytest.raises(NotMeasured, match="does not set the peak of resident memory back"):
        rise(lambda: None, CPU)


def test_available_memory_is_a_number_of_bytes_or_nothing():
    free = available(CPU)
    assert free is None or 2**20 < free < 2**50
