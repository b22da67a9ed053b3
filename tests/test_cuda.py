"""A GPU computes what the CPU does. `SWIRL_TEST_DEVICE=cpu` tries these tests without one."""
import copy
import json
import os

import pytest
import torch
from conftest import EOS, Net, Recorder, greedy, logprobs, relative, sample, tiny_llama
from test_train import SMALL
from transformers import AutoModelForCausalLM

import grpo
import lm
import train
from models import adapters, tiny

DEVICE = os.environ.get("SWIRL_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU is visible"
)
PREFIXES = [[1, 2, 3, 4], [5, 6]]
ROWS = [[3, 4, EOS], [2, EOS], [7, 8, 1, EOS], [6, EOS]]
OWNER = [0, 0, 1, 1]


@pytest.fixture
def both(model):
    """(a model on the CPU, the same on the device)."""
    return model, copy.deepcopy(model).to(DEVICE)


def test_log_probs_are_those_of_the_cpu(both):
    cpu, gpu = (logprobs(net, PREFIXES, ROWS, OWNER).detach().cpu() for net in both)
    assert cpu.abs().sum() > 1 and torch.allclose(cpu, gpu, atol=1e-4)


def test_greedy_rows_are_those_of_the_cpu(both):
    cpu, gpu = (greedy(net, PREFIXES, 12) for net in both)
    assert cpu == gpu


def test_a_sampled_row_is_scored_as_it_was_drawn(both):
    _, net = both
    generator = torch.Generator(DEVICE).manual_seed(0)
    rows, logps = sample(net, PREFIXES, 8, 10, generator=generator)
    owner = [n // 8 for n in range(16)]
    scored = logprobs(net, PREFIXES, rows, owner).detach().cpu()
    for row, drawn, found in zip(rows, logps, scored):
        assert drawn == pytest.approx(found[:len(row)].tolist(), abs=1e-4)


def test_a_grpo_step_has_the_cpus_gradient(both):
    gradients = []
    for net in both:
        logps = [row[row != 0].tolist() for row in logprobs(net, PREFIXES, ROWS, OWNER)]
        rollouts = grpo.Rollouts(PREFIXES, ROWS, logps, lm.Options(EOS))
        R = torch.tensor([[1.0, 2.0], [0.0, -3.0]])
        recorder, policy = Recorder(net), Net(net)
        ref = lm.frozen(policy)
        grpo.step(policy, ref, [recorder], rollouts, R, grpo.Phase(beta=0.1), 1e-3)
        gradients.append(recorder.seen[0].cpu())
    assert gradients[0].norm() > 0 and relative(gradients[1], gradients[0]) < 1e-3


def test_bfloat16_products_are_near_float32():
    net = tiny_llama(factor=2.0).to(DEVICE)
    exact = logprobs(net, PREFIXES, ROWS, OWNER)
    rounded = logprobs(net, PREFIXES, ROWS, OWNER, half=True)
    assert 0 < (exact - rounded).abs().max() < 0.05


def test_a_fresh_adapter_is_its_base():
    pytest.importorskip("peft")
    net = tiny_llama()
    wanted = logprobs(net, PREFIXES, ROWS, OWNER).detach()
    for adapter in adapters.pair(net, 4):
        adapter.to(DEVICE)
        found = logprobs(adapter, PREFIXES, ROWS, OWNER)
        assert found.requires_grad and torch.allclose(found.detach().cpu(), wanted, atol=1e-4)


def test_a_run_ends_and_its_models_load_on_the_cpu(small_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "FOLDER", small_folder)
    out = tmp_path / "run"
    assert train.main([*SMALL, "--device", DEVICE, "--out", str(out)]) == 0
    assert len(json.loads((out / "results.json").read_text())["stages"]) == 4
    assert AutoModelForCausalLM.from_pretrained(out / "fwm").device.type == "cpu"
