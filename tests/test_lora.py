"""Claims of `models/adapters.py`: an adapter is the full model W + 2 B A in values and gradients;
two of them share W, nothing else."""
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import (
    EOS,
    MAKERS,
    frozen,
    logprobs,
    naive,
    relative,
    sample,
    score,
    tiny_llama,
    without_times,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config

import train
from envs import records
from models import optim
from support import rundir

peft = pytest.importorskip("peft")
from models import adapters  # noqa: E402

RAGGED = [[5], [3, 1, 4, 1, 5, 2, 6], [2, 7], [1, 8, 2, 8]]
ROWS, OWNER = [[6, 2, EOS], [8, 3, 5, 7, EOS], [1, EOS], [4, 4, EOS], [2]], [0, 1, 1, 3, 2]


@pytest.fixture(params=list(MAKERS))
def make(request):
    return MAKERS[request.param]


def shake(adapter, seed):
    """B starts at 0, where half of all mistakes are invisible."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(.1 * torch.randn(p.shape, generator=g))
    return adapter


def shaken(base, r=3):
    P, Q = adapters.pair(base, r)
    return shake(P, 1), shake(Q, 2)


def by_hand(make, adapter):
    """(a plain model's call with W + 2 B A in place of W, the leaves A and B by name): autograd
    does the rest."""
    plain = make()
    leaves = {n: p.detach().clone().requires_grad_() for n, p in adapter.named_parameters()}
    W = dict(plain.named_parameters())
    for n in leaves:
        if ".lora_A." in n:
            layer = n.partition(".lora_A.")[0]
            BA = leaves[n.replace("lora_A", "lora_B")] @ leaves[n]
            W[layer + ".weight"] = W[layer + ".weight"] + 2 * (
                BA.T if "GPT2" in type(plain).__name__ else BA
            )
    return lambda *args, **kwargs: torch.func.functional_call(plain, W, args, kwargs), leaves


def grads(adapter):
    return torch.cat([p.grad.flatten() for p in adapter.parameters()])


def bits(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# --- values and gradients -------------------------------------------------------------------------

def test_adapter_equals_the_merged_model(make):
    P, Q = shaken(make())
    # P's last, with Q's in between
    for model in (Q, P):
        call, leaves = by_hand(make, model)
        logp = logprobs(model, RAGGED, ROWS, OWNER)
        logp.sum().backward()
        truth = [naive(call, RAGGED[o], row) for o, row in zip(OWNER, ROWS)]
        sum(t.sum() for t in truth).backward()
        assert all(
            torch.allclose(logp[n, : len(t)], t, atol=1e-5, rtol=1e-5) for n, t in enumerate(truth)
        )
        assert relative(grads(model), torch.cat([p.grad.flatten() for p in leaves.values()])) < 1e-5


def test_adapters_start_as_the_base_on_every_matrix(make):
    plain = make()
    P, Q = adapters.pair(make(), 3)
    assert torch.equal(logprobs(P, RAGGED, ROWS, OWNER), logprobs(plain, RAGGED, ROWS, OWNER))
    assert same(bits(P), bits(Q)) and all(
        p.requires_grad for p in (*P.parameters(), *Q.parameters())
    )
    matrices = {
        n.removesuffix(".weight")
        for n, p in plain.named_parameters()
        if p.ndim == 2 and ("layers." in n or ".h." in n)
    }
    assert {n.partition(".lora_")[0] for n, _ in P.named_parameters()} == matrices


def test_backward_reaches_only_its_own_adapter(make):
    P, Q = shaken(make())
    base, ref = P.base, frozen(P)
    logprobs(P, RAGGED, ROWS, OWNER).sum().backward()
    alone = grads(P)
    for p in P.parameters():
        p.grad = None
    loss = logprobs(P, RAGGED, ROWS, OWNER).sum()
    logprobs(Q, RAGGED, ROWS, OWNER).sum()
    sample(Q, RAGGED, 2, 4, EOS)
    score(ref, RAGGED, ROWS, OWNER)
    loss.backward()
    assert torch.equal(grads(P), alone) and alone.norm() > 1e-2
    assert all(p.grad is None for model in (Q, ref, base) for p in model.parameters())
    assert not any(p.requires_grad for p in base.parameters())


def test_sampler_and_trainer_agree_on_two_adapters(make):
    P, Q = shaken(make())
    for model in (P, Q, P):
        rows, sampled = sample(model, RAGGED, 4, 6, EOS, generator=torch.Generator().manual_seed(0))
        scored = logprobs(model, RAGGED, rows, [b for b in range(len(RAGGED)) for _ in range(4)])
        assert all(
            torch.allclose(torch.tensor(s), scored[n, : len(s)], atol=1e-4)
            for n, s in enumerate(sampled)
        )


# --- copies, optimizers, a phase ------------------------------------------------------------------

def test_reference_is_an_exact_copy_that_stays():
    P, Q = shaken(tiny_llama())
    ref, before = frozen(P), bits(P)
    assert (
        ref.base is P.base
        and same(bits(ref), before)
        and not any(p.requires_grad for p in ref.parameters())
    )
    assert not {p.data_ptr() for p in ref.parameters()} & {
        p.data_ptr() for m in (P, Q, P.base) for p in m.parameters()
    }
    base, opposite, optimizers = bits(P.base), bits(Q), optim.make_optimizers(P, .1)
    # Muon is for whole matrices
    assert len(optimizers) == 1
    logprobs(P, RAGGED, ROWS, OWNER).sum().backward()
    optim.step(P, optimizers, .1)
    assert same(bits(ref), before) and same(bits(P.base), base) and same(bits(Q), opposite)
    assert all(not torch.equal(p, before[n]) for n, p in P.named_parameters())


def test_loading_a_state_keeps_the_parameters():
    P, _ = shaken(tiny_llama())
    ref = frozen(P)
    shake(P, 3)
    own = P.parameters()
    P.load_state_dict(ref.state_dict())
    assert same(bits(P), bits(ref)) and all(a is b for a, b in zip(own, P.parameters()))


def test_a_state_of_another_rank_is_refused():
    P, _ = shaken(tiny_llama())
    with pytest.raises(ValueError):
        P.load_state_dict(adapters.pair(tiny_llama(), 2)[0].state_dict())


def test_what_would_change_the_numbers_is_refused():
    P, _ = shaken(tiny_llama())
    P.base.gradient_checkpointing_enable()
    with pytest.raises(AssertionError):
        logprobs(P, RAGGED, ROWS, OWNER)
    with pytest.raises(AttributeError):
        P.train()


# --- files ----------------------------------------------------------------------------------------

def test_saved_folder_is_a_plain_model_plus_adapter(make, tmp_path):
    P, Q = shaken(make())
    base, truth = bits(P.base), logprobs(P, RAGGED, ROWS, OWNER)
    P.save_pretrained(tmp_path / "fwm")
    make().save_pretrained(tmp_path / "plain")
    # the merge leaves no trace
    assert same(bits(P.base), base)
    sizes = [
        {n: w.shape for n, w in load_file(tmp_path / name / "model.safetensors").items()}
        for name in ("fwm", "plain")
    ]
    assert sizes[0] == sizes[1] and sorted(p.name for p in (tmp_path / "fwm").iterdir()) == [
        "adapter", "config.json", "generation_config.json", "model.safetensors"]
    for model in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "fwm", dtype=torch.float32),
        peft.PeftModel.from_pretrained(make(), tmp_path / "fwm" / "adapter")
        .eval()
        .base_model.model,
    ):
        assert torch.allclose(logprobs(model, RAGGED, ROWS, OWNER), truth, atol=1e-5, rtol=1e-5)
    Q.load(tmp_path / "fwm")
    assert same(bits(Q), bits(P))


def test_a_bfloat16_base_keeps_float32_adapters(tmp_path):
    P, _ = shaken(tiny_llama().to(torch.bfloat16))
    assert P.dtype == torch.bfloat16 and {p.dtype for p in P.parameters()} == {torch.float32}
    logprobs(P, RAGGED, ROWS, OWNER).sum().backward()
    assert grads(P).norm() > 0
    P.save_pretrained(tmp_path)
    assert {w.dtype for w in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}


SHORT = ["--lora", "2", "--warmup-steps", "4", "--warmup-steps-idm", "4", "--bootstrap-steps", "2",
         "--iterations", "1", "--phase1-steps", "2",
         "--phase2-steps", "2", "--group-size", "3", "--batch", "3", "--eval-size", "4",
         "--validation-size", "4", "--warmup-batch-idm", "8",
         "--threads", "1"]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The arguments of a short run."""
    path = tmp_path_factory.mktemp("data") / "t.jsonl"
    rows = [
        records.Transition(
            f"e{i}",
            t,
            f"lamp {'on' if t else 'off'}\ndoor {i % 3}",
            "press " + "ab"[i % 2],
            f"lamp {'off' if t else 'on'}\ndoor {i % 3}",
        )
        for i in range(16)
        for t in range(2)
    ]
    records.write(path, rows)
    return [*SHORT, "--data", str(path)]


@pytest.fixture(scope="module")
def resumed(short, tmp_path_factory):
    """A whole run and one that was cut in Phase II and went on: their folders and exit codes, and
    what the latter said."""
    step, calls, folder = train.swirl_idm.phase2_rollouts, [], tmp_path_factory.mktemp("runs")
    whole, cut, said = folder / "whole", folder / "cut", io.StringIO()

    def copied(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:  # the rivals made two
            shutil.copytree(whole, cut)
        return step(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.swirl_idm, "phase2_rollouts", copied)
        codes = [train.main([*short, "--out", str(whole)])]
        with contextlib.redirect_stdout(said):
            codes.append(train.main([*short, "--out", str(cut)]))
    return types.SimpleNamespace(whole=whole, cut=cut, codes=codes, said=said.getvalue())


def test_a_cut_run_goes_on_with_its_adapters(resumed):
    whole, cut = resumed.whole, resumed.cut
    assert resumed.codes == [0, 0] and "resuming after iteration1/phase1" in resumed.said
    a, b = (json.loads((folder / "results.json").read_text()) for folder in (whole, cut))
    assert without_times(a["stages"]) == without_times(b["stages"])
    assert without_times(a["baselines"]) == without_times(b["baselines"])
    for file in (
        "fwm/model.safetensors",
        "fwm/adapter/adapter_model.safetensors",
        "idm/adapter/adapter_model.safetensors",
    ):
        one, two = (load_file(folder / file) for folder in (whole, cut))
        assert same(one, two)
    assert any(w.abs().max() > 0 for n, w in two.items() if "lora_B" in n)


def test_a_run_counts_the_adapters_as_parameters(resumed):
    base = AutoModelForCausalLM.from_pretrained(resumed.whole / "fwm")
    sizes = json.loads((resumed.whole / "results.json").read_text())["sizes"]
    assert base.num_parameters() < sizes["parameters"]                             # W, and A and B


def test_fresh_deletes_adapters_but_no_foreign_file(short, resumed, tmp_path, capsys):
    shutil.copytree(resumed.whole, tmp_path / "run")
    fresh = train.parse([*short, "--out", str(tmp_path / "run"), "--fresh"])
    note = tmp_path / "run" / "fwm" / "adapter" / "note"
    note.write_text("mine")
    with pytest.raises(SystemExit):
        rundir.Run(fresh, 0.0)
    assert "note" in capsys.readouterr().err and note.read_text() == "mine"
    note.unlink()
    rundir.Run(fresh, 0.0)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.json", "lock"}


def test_bad_ranks_and_missing_peft_are_refused(
    short, tmp_path, monkeypatch, capsys
):
    def refused(argv):
        with pytest.raises(SystemExit) as e:
            train.main([*argv, "--out", str(tmp_path / "out")])
        err = capsys.readouterr().err
        assert (
            e.value.code == 2
            and err.startswith("error: ")
            and err.count("\n") == 1
            and not (tmp_path / "out").exists()
        )
        return err
    assert "--lora" in refused([*short, "--lora", "-1"])
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install peft" in refused(short)


# --- memory ---------------------------------------------------------------------------------------

def config(V=400, h=128, L=3, i=512, tied=True):
    return Qwen2Config(
        vocab_size=V,
        hidden_size=h,
        num_hidden_layers=L,
        num_attention_heads=max(2, h // 64),
        num_key_value_heads=2,
        intermediate_size=i,
        tie_word_embeddings=tied,
    )


@pytest.mark.parametrize("tied", [True, False])
def test_memory_counts_the_actual_parameters(tied):
    real = adapters.shape(*adapters.QWEN["0.5B"])
    assert adapters.memory(real)[0]["gradients"] == 4 * 494_032_768                # as published
    model = AutoModelForCausalLM.from_config(config(tied=tied))
    n = sum(p.numel() for p in model.parameters())
    P, _ = adapters.pair(model, 5)
    k = sum(p.numel() for p in P.parameters())
    full, lora = (adapters.memory(config(tied=tied), r, True)[0] for r in (0, 5))
    assert full == dict(
        weights=6 * n, gradients=4 * n, optimizer=8 * n, opposite=4 * n, reference=4 * n
    )
    assert lora == dict(
        weights=2 * n + 4 * k, gradients=4 * k, optimizer=8 * k, opposite=4 * k, reference=4 * k
    )


@pytest.mark.parametrize("r", [0, 4])
@pytest.mark.parametrize("half", [False, True])
def test_activation_memory_is_what_autograd_keeps(r, half, monkeypatch):

    def kept(T, **shape):
        model = AutoModelForCausalLM.from_config(
            config(**shape), dtype=torch.bfloat16 if half and r else torch.float32
        ).eval()
        model = adapters.pair(model, r)[0] if r else model
        weights = {
            p.untyped_storage().data_ptr()
            for m in (model, getattr(model, "base", model))
            for p in m.parameters()
        }
        seen = {}
        # alive, so that no address comes twice
        keep = lambda t: seen.update({t.untyped_storage().data_ptr(): t}) or t
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            # As in a phase: rows share a prefix
            logprobs(
                model,
                [[1, 2]] * 2,
                [[n, *[2] * (T - 1)] for n in (1, 2, 3, 4)],
                [0, 0, 1, 1],
                half=half,
            )
        return sum(
            t.untyped_storage().nbytes() for place, t in seen.items() if place not in weights
        )

    # without the weights' casts
    a_token = lambda **shape: (kept(128, **shape) - kept(64, **shape)) / 256
    says = lambda **shape: adapters.memory(config(**shape), r, half)[1]
    start = dict(h=256)
    for more in (dict(L=6), dict(i=1024), dict(h=512)):
        assert a_token(**start | more) - a_token(**start) == pytest.approx(
            says(**start | more) - says(**start), rel=0.1
        ), more


PEAK = """
import gc, sys, torch, lm
from conftest import Net
from models import adapters, optim
from test_lora import config
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
def rss(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def phase(shape, r, half, T):
    options = lm.Options(0, half=bool(half))
    dtype = torch.bfloat16 if half and r else torch.float32
    make = lambda: AutoModelForCausalLM.from_config(shape, dtype=dtype).eval()
    P, Q = adapters.pair(make(), r) if r else (make(), make())
    ref = lm.frozen(Net(P, half=bool(half))).net
    optimizers = optim.make_optimizers(P, 1e-4, muon=False)
    for _ in range(2):
        for _ in range(2):
            rows = [[n, *[3] * (T // 4 - 1)] for n in (1, 2, 3, 4)]
            (-lm.logprobs(P, [[1, 2]] * 2, rows, [0, 0, 1, 1], options).sum()).backward()
        optim.step(P, optimizers, 1e-4)

phase(config(), 4, False, 16)
shape = config(*map(int, sys.argv[1].split(",")))
for way in sys.argv[2:]:    # the larger peak last
    r, half, T = map(int, way.split(","))
    gc.collect()
    before = rss("VmRSS")
    phase(shape, r, bool(half), T)
    parts, token = adapters.memory(shape, r, bool(half))
    print((rss("VmHWM") - before) / (sum(parts.values()) + max(parts["gradients"], T * token)))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(),
    reason="reads Linux's count of the memory that a process held",
)
@pytest.mark.parametrize(
    "shape, ways",
    [
        ("8000,512,3,2048", ["16,0,128", "0,0,64"]),  # 16M parameters
        ("32000,768,12,3072", ["16,1,64", "16,0,256", "0,1,64", "0,0,64"]),
    ],  # 126M
    ids=["16M", "126M"],
)
def test_the_arithmetic_is_the_peak_of_a_process(shape, ways):
    """A fresh one, whose allocator gives back what is freed."""
    here = Path(__file__).parent
    env = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{here.parent}{os.pathsep}{here}",
    }
    done = subprocess.run(
        [sys.executable, "-c", PEAK, shape, *ways],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert [float(ratio) for ratio in done.stdout.split()] == pytest.approx(
        [1] * len(ways), abs=0.15
    )
