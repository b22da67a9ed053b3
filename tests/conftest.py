"""Tiny random models, and the two oracles that everything is held against: one row, no cache, no
padding."""

import random

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lm
import sft
from envs import records, tools
from models import images, optim, pretrained, tiny
from models.next_token import uniform
from support import curves
from swirl_fwm import FWM
from swirl_idm import IDM

torch.set_num_threads(1)

EOS = 0  # of the small vocabularies, and their padding too
TEXTS = ["\nlamp is on\ndoor is shut", "\nlamp is off\ndoor is open", " turn off", " open the door",
         "\n- lamp is on\n+ lamp is off", "\nnext:", "\naction:"] * 3


def sharpen(model, factor):
    """Scale the weights up: the next token then depends on the context and on its position."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(factor)
    return model


def tiny_llama(V=9, seed=0, factor=12.0):
    """Rotary positions, grouped heads, tied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    return sharpen(LlamaForCausalLM(config).eval(), factor)


def tiny_gpt2(V=9, seed=0, factor=12.0):
    """Learned absolute positions: a padded prompt with wrong positions gives wrong numbers."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=V,
        n_positions=256,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    return sharpen(GPT2LMHeadModel(config).eval(), factor)


MAKERS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


@pytest.fixture(params=list(MAKERS))
def model(request):
    """A fresh model with 9 tokens, pad == eos == 0."""
    return MAKERS[request.param]()


@pytest.fixture(scope="session")
def tok():
    return tiny.make_tokenizer(TEXTS, vocab_size=300)


def random_tiny(tok, seed):
    """`tiny.make_model` as Llama's own random weights leave it, sharpened: rows of a group then
    differ."""
    return sharpen(tiny.make_model(tok, width=32, layers=2, context=512, seed=seed), 8.0)


@pytest.fixture
def P(tok):
    return FWM(random_tiny(tok, 1), tok, longest=5)


@pytest.fixture
def Q(tok):
    return IDM(random_tiny(tok, 2), tok, longest=24)


# --- `lm` with its options as keywords ---------------------------------------------------------

def sample(net, prefixes, n, longest, eos=EOS, temperature=1.0, generator=None, **options):
    """`lm.sample`; with `guess`, `images.settle`."""
    guess = options.pop("guess", None)
    options = lm.Options(eos, temperature, **options)
    if guess is not None:
        u = uniform((len(prefixes), n, longest), net.device, generator)
        return images.settle(net, prefixes, guess, n, u.flatten(0, 1), options=options)
    return lm.sample(net, prefixes, n, longest, options, generator=generator)


def greedy(net, prefixes, longest, eos=EOS, **options):
    return sample(net, prefixes, 1, longest, eos, temperature=0, **options)[0]


def logprobs(net, prefixes, rows, owner, n_scored=None, temperature=1.0, **options):
    return lm.logprobs(
        net, prefixes, rows, owner, lm.Options(EOS, temperature, **options), n_scored=n_scored
    )


def frozen(net):
    return lm.frozen(Net(net)).net


def score(net, prefixes, rows, owner=None, n_scored=None, temperature=1.0, **options):
    """(N,) sums of `lm.score_tokens`, or without `owner` `lm.score`."""
    options = lm.Options(EOS, temperature, **options)
    if owner is None:
        return lm.score(net, prefixes, rows, options, n_scored)
    return lm.score_tokens(net, prefixes, rows, owner, options, n_scored=n_scored).sum(1)


def ending(model, eos, bias):
    """Add `bias` to the logit of eos: a random model then ends its rows early, late or (-1e4)
    never."""
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    model.lm_head.bias.data[eos] = bias
    return model


def naive(model, prefix, row, temperature=1.0, min_p=0.0):
    """(T,) log p(row_t | prefix, row_<t) from one full forward pass; differentiable."""
    ids = torch.tensor([[*prefix, *row]])
    # (T, V)
    logp = (model(ids, use_cache=False).logits[0].float() / temperature).log_softmax(-1)[
        len(prefix) - 1 : -1
    ]
    row, p = torch.tensor(row)[:, None], logp.exp()
    out = (p < min_p * p.amax(1, keepdim=True)).scatter(1, row, False)
    return logp.gather(1, row)[:, 0] - (
        logp.masked_fill(out, -torch.inf).logsumexp(1) if min_p else 0
    )


@torch.no_grad()
def naive_greedy(model, prefix, max_new, eos):
    """The likeliest row, token by token, the whole text anew for each."""
    row = []
    while len(row) < max_new and eos not in row:
        ids = torch.tensor([[*prefix, *row]])
        row.append(model(ids, use_cache=False).logits[0, -1].argmax().item())
    return row


def grads(model):
    """One long vector; a parameter without gradient counts as 0."""
    flat = [
        (torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()
    ]
    return torch.cat(flat)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


class Net:
    """What `grpo` and `sft` use of an FWM or IDM."""

    def __init__(self, net, **options):
        self.net, self.options = net, lm.Options(EOS, **options)


class Recorder:
    """An optimizer that keeps the gradient and changes nothing."""

    def __init__(self, model):
        self.model, self.param_groups, self.seen = model, [{"lr": 0.0}], []

    def step(self):
        self.seen.append(grads(self.model))

    def zero_grad(self, set_to_none=True):
        self.model.zero_grad(set_to_none=set_to_none)


@pytest.fixture(scope="session", autouse=True)
def no_curves():
    """A picture takes as long as a small run; test_report.py draws some."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "draw", lambda folder: None)
        yield


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory):
    """What whole runs take in place of data/tiny: one layer that has seen some rows, so that they
    end and differ."""
    return make_small(tmp_path_factory.mktemp("small") / "model")


def make_small(folder):
    """The same in a folder of one's own."""
    triples = [row for seed in range(6) for row in tools.episode(random.Random(seed))] + lamp_rows()
    texts = [text for x, z, _ in triples
             for text in ("\n" + x, " " + z, "\nnext:", "\naction: " + z, "\n- ", "\n+ ")]
    tok = tiny.make_tokenizer(texts, vocab_size=500)
    model = tiny.make_model(tok, width=32, layers=1, context=1024)
    P = FWM(model, tok)
    rows = P.rows(triples) + IDM(model, tok).rows(triples)
    batch, optimizers = sft.shuffled(rows, 8, random.Random(0)), optim.make_optimizers(model, 0.01)
    for n in range(60):
        sft.step(P, next(batch), optimizers, 0.01 * (1 - n / 60))
    pretrained.save(model, tok, folder)
    return folder


def without_times(results):
    """results.json but for what a clock or a machine decides."""
    if isinstance(results, dict):
        return {key: without_times(value) for key, value in results.items()
                if key not in ("seconds", "hardware", "sizes")}
    return [without_times(value) for value in results] if isinstance(results, list) else results


def lamp_rows(n=16, steps=3):
    """[(x, z, y)] of short states, `steps` an episode."""
    rng, rows = random.Random(0), []

    def shown(on):
        return "\n".join(f"{name} is {'on' if name in on else 'off'}" for name in "abcd")

    for _ in range(n):
        on = set(rng.sample("abcd", 2))
        for _ in range(steps):
            z, x = rng.choice("abcd"), on
            on = x ^ {z} if rng.random() < 0.8 else x
            rows.append((shown(x), f"turn {z}", shown(on)))
    return rows


def write_lamps(path, steps=3):
    """`lamp_rows` as a transitions file."""
    rows = enumerate(lamp_rows(steps=steps))
    records.write(path, [records.Transition(f"e{i // steps}", i % steps, *row) for i, row in rows])
    return path
