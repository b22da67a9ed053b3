"""Every malformed input is read, or refused in one line (`fuzz.py`)."""
import fuzz
import pytest


@pytest.mark.parametrize("name", fuzz.shares(1))
def test_malformed_inputs_end_in_one_line(name):
    assert fuzz.run_all({name: fuzz.shares(1200)[name]}) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [*fuzz.shares(1), "size", "process"])
def test_ten_thousand_malformed_inputs_end_in_one_line(name):
    assert fuzz.run_all({name: fuzz.wanted(10_000)[name]}) == []


@pytest.mark.parametrize("code, said, why", [
    (0, "", "Traceback"), (1, "", ""), (2, "", ""), (2, "error: a\nerror: b\n", ""), (2, "a\n", ""),
    (0, "noise\n", ""),
])
def test_a_fault_is_seen(code, said, why):
    assert fuzz.fault("check", code, said, why)
    assert not fuzz.fault("check", 2, "error: a\n", "")
    assert not fuzz.fault("check", 0, "warning: a\n", "")


def test_every_target_says_when_time_or_memory_runs_out(monkeypatch):
    def hungry(rng, folder):
        return lambda: [bytearray(2**27), sum(range(9_000_000))] and 0

    monkeypatch.setitem(fuzz.TARGETS, "hungry", (hungry, 0))
    assert "MB for 0 bytes" in fuzz.one("hungry", 0)[1] or fuzz.peak() is None
    monkeypatch.setattr(fuzz, "SECONDS", 0.01)
    assert "CPU seconds" in fuzz.one("hungry", 0)[1]
