"""Claims of `progress.py`: away from a terminal a plain line every half a minute, with the time
that is left."""
import itertools
import sys
import time

import pytest

from support import progress


@pytest.fixture
def clock(monkeypatch):
    """[seconds] that a test may set."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_line_comes_after_30_s_and_none_before(clock, capsys):
    bar = progress.Bar("warm-up", 60)
    for step, seconds in ((1, 1.0), (10, 29.9)):
        clock[0] = 100 + seconds
        bar.show(step, loss=2.0)
    assert capsys.readouterr().out == ""
    clock[0] = 130.0
    bar.show(20, loss=1.5)
    line = "  warm-up: step 20 of 60, loss 1.500, 60 s left in this stage\n"
    assert capsys.readouterr().out == line
    clock[0] = 159.0  # the next 30 s have begun
    bar.show(30, loss=1.0)
    assert capsys.readouterr().out == ""
    clock[0] = 160.0
    bar.show(45, loss=1.0)
    bar.close()
    line = "  warm-up: step 45 of 60, loss 1.000, 20 s left in this stage\n"
    assert capsys.readouterr().out == line


def test_a_resumed_stage_counts_its_own_steps(clock, capsys):
    bar = progress.Bar("warm-up", 600)
    for step in range(501, 511):
        clock[0] += 3.0
        bar.show(step, loss=1.0)
    assert "step 510 of 600, loss 1.000, 270 s left" in capsys.readouterr().out


def test_a_number_that_is_none_keeps_its_last_value(clock, capsys):
    bar = progress.Bar("warm-up", 60)
    bar.show(1, loss=2.0, validation=0.25)
    clock[0] += 30
    bar.show(2, loss=1.0, validation=None)
    assert "loss 1.000, validation 0.250," in capsys.readouterr().out


def test_a_silent_bar_says_nothing(monkeypatch, clock, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    bar = progress.Bar("warm-up", 3, silent=True)
    for step, clock[0] in zip((1, 2, 3), itertools.count(200, 100)):
        bar.show(step, loss=1.0)
    bar.close()
    out, err = capsys.readouterr()
    assert out == err == ""


def test_a_terminal_gets_a_bar(monkeypatch, clock, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    bar = progress.Bar("warm-up", 3)
    clock[0] += 50
    bar.show(2, loss=1.0)
    bar.close()
    out, err = capsys.readouterr()
    assert out == "" and "warm-up" in err
