"""Model families in small, random weights: from the folder through the probe, a step of each stage,
the save and the reload; and what is refused in one line."""
import json
import types

import pytest
import torch
from conftest import lamp_rows, sharpen
from safetensors.torch import load_file, save_file
from test_pretrained import real_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

import grpo
import lm
import sft
import swirl_fwm
import swirl_idm
from models import optim, parallel, pretrained, probe
from support import loading
from swirl_fwm import FWM
from swirl_idm import IDM

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=512)
HEAD = dict(head_dim=8)
WINDOW = dict(sliding_window=8)
GPT = dict(n_embd=32, n_layer=2, n_head=4)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
# model_type: its own settings; windows are shorter than the rows below
FAMILIES = {
    "llama": SIZES,
    "mistral": SIZES | WINDOW,
    "qwen2": SIZES | WINDOW | dict(use_sliding_window=True, max_window_layers=1),
    "qwen3": SIZES | HEAD,
    "gemma2": SIZES | HEAD | WINDOW,
    "gemma3_text": SIZES | HEAD | WINDOW | dict(sliding_window_pattern=2),
    "phi3": SIZES,
    "gpt2": GPT | dict(n_positions=512),
    "gpt_neox": SIZES,
    "olmo2": SIZES,
    "smollm3": SIZES,
    "granite": SIZES,
    "cohere": SIZES,
    "starcoder2": SIZES,
    "stablelm": SIZES,
    "falcon": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False,
                   max_position_embeddings=512),
    "gpt_oss": SIZES | HEAD | WINDOW | EXPERTS,
    "bloom": dict(hidden_size=32, n_layer=2, n_head=4),
    "mpt": dict(d_model=32, n_layers=2, n_heads=4, max_seq_len=512),
    "gpt_neo": dict(hidden_size=32, num_layers=2, num_heads=4, window_size=8,
                    attention_types=[[["global", "local"], 1]], max_position_embeddings=512),
    "falcon with alibi": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                              alibi=True),
}
REFUSED = {
    "mamba": dict(hidden_size=32, num_hidden_layers=2, state_size=4),
    "recurrent_gemma": SIZES | dict(lru_width=32, attention_window_size=8),
    "lfm2": SIZES | dict(full_attn_idxs=[1]),
}


def make_folder(kind, settings, folder):
    """A folder of random, sharpened weights with a tokenizer."""
    kind, tok = kind.split()[0], real_tokenizer()
    ids = dict(vocab_size=len(tok), eos_token_id=1, bos_token_id=1, pad_token_id=0)
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **ids | settings)
    net = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    pretrained.save(sharpen(net, 3.0), tok, folder)
    return folder


def few_tokens(net, tok):
    """Options under which random models end their rows."""
    allowed = torch.zeros(1, net.config.vocab_size, dtype=torch.bool)
    allowed[0, [tok.eos_token_id, 40, 41]] = True
    return lm.Options(tok.eos_token_id, allowed=allowed)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_goes_through_every_stage(kind, tmp_path):
    net, tok = pretrained.load(make_folder(kind, FAMILIES[kind], tmp_path / "model"))
    probe.check(net, len(tok), 60)
    rows = lamp_rows(4, 1)
    P, Q = FWM(net, tok, longest=20), IDM(parallel.plain(net).eval(), tok, longest=20)
    for model in (P, Q):
        optimizers = optim.make_optimizers(model.net, 1e-3, muon=False)
        losses = [sft.step(model, model.rows(rows), optimizers, 1e-3)[0] for _ in range(3)]
        assert losses[-1] < losses[0]

    few, every = few_tokens(net, tok), P.options
    pairs = [(x, y) for x, _, y in rows if x != y]
    generator = torch.Generator().manual_seed(0)
    phase = grpo.Phase(steps=1, group_size=3, beta=0.1)
    for draw, policy, other in ((swirl_fwm.phase1_rollouts, P, Q),
                                (swirl_idm.phase2_rollouts, Q, P)):
        policy.options, other.options = few, few if other is Q else every
        rollouts, R, _ = draw(policy, other, pairs, phase, generator)
        optimizers = optim.make_optimizers(policy.net, 1e-4, muon=False)
        log = grpo.step(policy, lm.frozen(policy), optimizers, rollouts, R, phase, 1e-4)
        assert log["gap"] < 1e-3 and log["grad_norm"] > 0

    pretrained.save(P.net, tok, tmp_path / "saved")
    again, tok = pretrained.load(tmp_path / "saved")
    x, z, y = rows[0]
    assert torch.equal(FWM(again, tok).logp([x], [z], [y]), P.logp([x], [z], [y]))


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_sampled_is_refused(kind, tmp_path):
    net, tok = pretrained.load(make_folder(kind, REFUSED[kind], tmp_path / "model"))
    with pytest.raises(ValueError, match="cannot be sampled|differ by"):
        probe.check(net, len(tok), 60)


def test_the_probe_finds_what_the_sampler_alone_does_wrong(tmp_path, monkeypatch):
    net, tok = pretrained.load(make_folder("llama", SIZES, tmp_path / "model"))
    right = lm.sample_batch

    def wrong(*args):
        rows, logps = right(*args)
        return rows, [[[logp + 0.1 for logp in row] for row in group] for group in logps]

    assert probe.gap(net, len(tok), 60) < 1e-3
    monkeypatch.setattr(lm, "sample_batch", wrong)
    assert probe.gap(net, len(tok), 60) > 0.09


def test_a_window_shorter_than_the_data_is_named(tmp_path, monkeypatch):
    net, tok = pretrained.load(make_folder("gpt_neo", FAMILIES["gpt_neo"], tmp_path / "model"))
    monkeypatch.setattr(probe, "gap", lambda *args: 0.75)
    with pytest.raises(ValueError, match="a window of 8"):
        probe.check(net, len(tok), 60)


# --- damaged and unusual folders ------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    return make_folder("llama", SIZES, tmp_path / "model")


def rewrite(folder, change):
    """model.safetensors with other weights."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize("change, found", [
    (lambda w: {n: p for n, p in w.items() if "mlp.down" not in n}, "2 of its weights are missing"),
    (lambda w: {"_orig_mod." + n: p for n, p in w.items()}, "such as _orig_mod."),
    (lambda w: w | {"model.norm.weight": torch.full((32,), torch.nan)}, "not finite"),
], ids=["dropped", "compiled", "nan"])
def test_missing_and_broken_weights_are_refused(folder, change, found):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=found):
        pretrained.load(folder)


def test_a_missing_shard_is_refused(folder):
    net, tok = pretrained.load(folder)
    (folder / "model.safetensors").unlink()
    net.save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1 and pretrained.load(folder)
    shards[-1].unlink()
    with pytest.raises((OSError, ValueError)):
        pretrained.load(folder)


def make_lora(folder, base):
    """A LoRA repository as peft writes it, and the model with its adapter."""
    peft = pytest.importorskip("peft")
    net, _ = pretrained.load(base)
    adapted = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                p.normal_()
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    return adapted.eval()


def test_a_lora_repository_is_merged_into_its_base(folder, tmp_path):
    adapted = make_lora(tmp_path / "lora", folder)
    net, tok = pretrained.load(tmp_path / "lora")
    ids = torch.tensor([[5, 6, 7, 8]])
    base, _ = pretrained.load(folder)
    assert torch.allclose(net(ids).logits, adapted(ids).logits, atol=1e-4)
    assert not torch.allclose(net(ids).logits, base(ids).logits, atol=1e-2)
    assert all(p.requires_grad for p in net.parameters())
    assert not any("lora" in name for name, _ in net.named_parameters())
    assert pretrained.read_config(tmp_path / "lora").model_type == "llama"


def test_a_pickled_adapter_is_refused(folder, tmp_path):
    make_lora(tmp_path / "lora", folder)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    torch.save(load_file(file), tmp_path / "lora" / "adapter_model.bin")
    file.unlink()
    with pytest.raises(OSError):
        pretrained.load(tmp_path / "lora")


def test_a_model_beside_an_adapter_is_refused(folder):
    config = {"base_model_name_or_path": "base", "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="give one of the two"):
        pretrained.load(folder)


def test_a_window_does_not_shorten_the_context(tmp_path):
    net, _ = pretrained.load(make_folder("gemma3_text", FAMILIES["gemma3_text"], tmp_path / "m"))
    assert pretrained.context(net) == 512 and pretrained.window(net) == 8


@pytest.mark.parametrize("supported, half", [(True, True), (False, False)])
def test_bfloat16_is_taken_where_it_is_no_emulation(monkeypatch, supported, half):
    def asked(including_emulation=True):
        return including_emulation or supported

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", asked)
    cfg = types.SimpleNamespace(dtype="auto", model="some/model")
    assert loading.in_half(cfg, "cuda") == half
    assert not loading.in_half(types.SimpleNamespace(dtype="auto", model="tiny"), "cuda")
