"""`support/gpu_check.py` measures what it says, and is ready without a GPU."""
import json
import time

import pytest
import torch

from models import adapters
from support import gpu_check


def test_speed_is_steps_over_seconds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def step():
        now[0] += 9 if now == [0.0] else 2                 # the first does not count

    for seconds, steps in ((0, 2), (5, 3)):
        now[0] = 0.0
        found = gpu_check.measured(lambda: step, "cpu", seconds, 0)
        assert found["steps_a_second"] == 0.5 and now == [9 + 2 * steps]


def test_a_stage_without_room_is_told():
    def begin():
        raise torch.OutOfMemoryError

    assert gpu_check.measured(begin, "cpu", 0, 0) == {"why": "out of memory"}


def test_the_peak_of_a_process_is_what_it_held():
    before = gpu_check.resident("VmRSS")
    if not before:
        pytest.skip("no /proc")
    peak = gpu_check.Peak("cpu", before)
    held = torch.ones(2**25)                               # 128 MiB
    size = held.nbytes
    del held
    assert peak.bytes() == pytest.approx(size, rel=0.1)


def test_a_command_ends_when_its_time_is_up():
    assert gpu_check.call(["-c", "import time; time.sleep(60)"], 1) == (124, "the time is up")
    assert gpu_check.call(["-c", "print(7)"], 60) == (0, "7\n")


def test_the_shapes_are_those_of_the_memory_table():
    assert {shape for shape, _ in gpu_check.cases(False)} == set(adapters.QWEN)
    assert gpu_check.shape_of("0.5B") is not None
    assert gpu_check.shape_of("3B").hidden_size == adapters.QWEN["3B"][0]


def test_a_row_divides_the_peak_by_the_plan():
    row = {"shape": "3B", "lora": 32, "sft": {"steps_a_second": 2.0, "peak": 3 * 2**30,
                                              "planned": 4 * 2**30},
           "phase1": {"why": "out of memory", "planned": 2**30}}
    assert gpu_check.case_rows([row, {"shape": "3B", "lora": 0, "why": "no room"}]) == [
        "| 3B | LoRA 32 | sft | 2.00 | 3.00 | 4.00 | 0.75 |",
        "| 3B | LoRA 32 | phase1 | out of memory | | 1.00 | |",
        "| 3B | all | no room | | | | |"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible")
def test_without_a_gpu_it_says_so(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        gpu_check.main([])
    assert error.value.code == 2 and "--device cpu --small" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_whole_check_in_small(tmp_path):
    argv = ["--device", "cpu", "--small", "--seconds", "0", "--out",
            str(tmp_path / "gpu")]
    assert gpu_check.main(argv) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["tests"]["rc"] == 0 and "passed" in found["tests"]["said"]
    for row, r in zip(found["cases"], (4, 0), strict=True):
        assert row["lora"] == r
        for stage in ("sft", "phase1", "phase2"):
            assert row[stage]["steps_a_second"] > 0
            assert 0.5 < row[stage]["peak"] / row[stage]["planned"] < 3
    assert set(found["worlds"]) == {"tools", "physics", "web", "pixels"}
    assert all(0 <= share <= 1 for row in found["worlds"].values() for share in row["sampled"])
    assert (tmp_path / "gpu.md").read_text().count("\n| small |") == 6
