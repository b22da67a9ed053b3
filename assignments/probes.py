"""What the claims call in the student's process: it calls the student's functions on tiny models
and hands back plain values. The grader uses the same tiny models on its side."""
import importlib
import random
import threading
import types
from collections import Counter
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import grpo
import lm
import sft
from models import tiny
from swirl_fwm import FWM
from swirl_idm import IDM

EOS = 0                     # and padding
LOCK = threading.Lock()     # torch has one seed for all threads
TEXTS = ["\nlamp is on\ndoor is shut", "\nlamp is off\ndoor is open", " turn off", " open the door",
         "\n- lamp is on\n+ lamp is off", "\nnext:", "\naction:"] * 3


def net(seed, V=6):
    """A random Llama of V tokens whose next token depends on the context and on its place."""
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    with LOCK:
        torch.manual_seed(seed)
        return sharpen(LlamaForCausalLM(config).eval(), 10.0)


@torch.no_grad()
def sharpen(model, factor):
    for p in model.parameters():
        if p.ndim > 1:
            p.mul_(factor)
    return model


def ending(model, eos, bias=4.0):
    """The model, sharpened, with rows that end early, late or not at all."""
    sharpen(model, 6.0)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    model.lm_head.bias.data[eos] = bias
    return model


class Model:
    """What `grpo` uses of an FWM or IDM."""

    def __init__(self, seed, temperature=1.0):
        self.net, self.options = net(seed), lm.Options(EOS, temperature)


def models(seed):
    """(P, Q) with random weights and a tokenizer of some 300 pieces."""
    tok, size = tiny.make_tokenizer(TEXTS, vocab_size=300), dict(width=32, layers=2, context=512)
    with LOCK:
        net_P = ending(tiny.make_model(tok, **size, seed=seed), tok.eos_token_id)
        net_Q = ending(tiny.make_model(tok, **size, seed=seed + 100), tok.eos_token_id)
    return FWM(net_P, tok, longest=4), IDM(net_Q, tok, longest=12)


def grads(model):
    """(all parameters,)"""
    flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([g.flatten() for g in flat])


def function(name):
    module, _, name = name.rpartition(".")
    return getattr(importlib.import_module(module), name)


# --- grpo -------------------------------------------------------------------------------------

def gradient(name, args, at):
    """(value, gradient of its sum in args[at])"""
    args[at] = args[at].clone().requires_grad_()
    value = function(name)(*args)
    value.sum().backward()
    return value, args[at].grad


def loss_sum(logps, A, live, phase):
    """(loss, its gradient in logp). logps: logp, logp_old, logp_ref."""
    logp = logps[0].clone().requires_grad_()
    old, ref, phase = logps[1], logps[2], grpo.Phase(**phase)
    objective = grpo.surrogate(logp, old, A[:, None], phase.clip)
    loss = grpo.loss_sum(objective, logp, ref, live, phase)
    loss.backward()
    return loss, logp.grad


def rollouts_of(drawn, phase):
    """grpo.Rollouts of (prompts, rows, logps)"""
    return grpo.Rollouts(*drawn, lm.Options(EOS, phase.temperature, min_p=phase.min_p))


def backward(seed, drawn, A, logp_ref, parts, phase):
    """(loss, gap, gradient)"""
    model, phase = net(seed), grpo.Phase(**phase)
    rollouts = rollouts_of(drawn, phase)
    loss, gap = grpo.backward(model, rollouts, A, logp_ref, parts, phase)
    return loss, gap, grads(model)


def with_kl(seeds, drawn, R, phase):
    """What grpo.with_kl returns; seeds: of pi and of ref (None: no ref)."""
    phase = grpo.Phase(**phase)
    policy, ref = [None if seed is None else Model(seed, phase.temperature) for seed in seeds]
    rollouts = rollouts_of(drawn, phase)
    return grpo.with_kl(policy, ref, rollouts, R, phase)


# --- lm ---------------------------------------------------------------------------------------

def counted(model):
    """A list that gets the number of tokens of each pass through the model."""
    fed = []

    def count(module, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        fed.append(ids.numel())

    model.register_forward_pre_hook(count, with_kwargs=True)
    return fed


def run_whole(seed, prefixes, rows, n_scored, weight):
    """(logits, targets, t, gradient of the weighted log-probs, tokens of each pass)"""
    model = net(seed)
    fed = counted(model)
    return scores(model, lm.run_whole(model, prefixes, rows, n_scored), weight, fed)


def run_shared(seed, prefixes, rows, owner, n_scored, weight):
    """The same of run_shared."""
    model = net(seed)
    fed = counted(model)
    return scores(model, lm.run_shared(model, prefixes, rows, owner, n_scored), weight, fed)


def scores(model, found, weight, fed):
    logits, targets, t = found
    logp = logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (logp * weight).sum().backward()
    return logits, targets, t, grads(model), fed


def sample_batch(seed, prefixes, n, u, temperature=1.0, allowed=None):
    """(rows, logps, tokens of each pass). allowed: of lm.Options."""
    model = net(seed)
    fed = counted(model)
    options = lm.Options(EOS, temperature, allowed=allowed)
    rows, logps = lm.sample_batch(model, prefixes, n, u, options)
    return rows, logps, fed


def rescored(seed, prefixes, n, u, temperature):
    """(rows, logps, lm.logprobs of the rows)"""
    rows, logps, _ = sample_batch(seed, prefixes, n, u, temperature)
    flat = [row for group in rows for row in group]
    owner = [i // n for i in range(len(flat))]
    again = lm.logprobs(net(seed), prefixes, flat, owner, lm.Options(EOS, temperature))
    return rows, logps, again


# --- the two phases ---------------------------------------------------------------------------

def phase1(seed, pairs, phase, draw):
    """phase1_rollouts of random P and Q, and all that was drawn from a model on the way."""
    P, Q = models(seed)
    return phase_of("swirl_fwm.phase1_rollouts", P, Q, pairs, phase, draw)


def phase2(seed, pairs, phase, draw):
    """The same of phase2_rollouts."""
    P, Q = models(seed)
    return phase_of("swirl_idm.phase2_rollouts", Q, P, pairs, phase, draw)


def phase_of(name, policy, frozen, pairs, phase, draw):
    phase = grpo.Phase(**phase)
    drawn, sample = [], lm.sample

    def recorded(model, prefixes, n, longest, options, generator=None):
        rows, logps = sample(model, prefixes, n, longest, options, generator)
        who = "policy" if model is policy.net else "frozen"
        drawn.append({"who": who, "prompts": prefixes, "n": n, "rows": rows})
        return rows, logps

    pairs = [tuple(pair) for pair in pairs]
    generator = torch.Generator().manual_seed(draw)
    with mock.patch.object(lm, "sample", recorded):
        found = function(name)(policy, frozen, pairs, phase, generator)
    if found is None:
        return None
    rollouts, R, examples = found
    return {
        "prompts": rollouts.prompts,
        "rows": rollouts.rows,
        "logps": rollouts.logps,
        "temperature": rollouts.options.temperature,
        "min_p": rollouts.options.min_p,
        "R": R,
        "needs_grad": R.requires_grad,
        "examples": examples,
        "drawn": drawn,
    }


def silent(pairs, phase):
    """phase1_rollouts with a Q that reads no action in any pair."""
    P, Q = models(0)
    Q.label = lambda pairs, generator=None: []
    return function("swirl_fwm.phase1_rollouts")(P, Q, pairs, grpo.Phase(**phase), None)


def reward(name, seed, xs, zs, ys):
    """phase1_reward or phase2_reward of random models; phase 1 gets the ids of z."""
    P, Q = models(seed)
    if name == "phase1_reward":
        return function("swirl_fwm.phase1_reward")(Q, xs, list(map(Q.target, zs)), ys)
    return function("swirl_idm.phase2_reward")(P, xs, zs, ys)


# --- the alternation --------------------------------------------------------------------------

class Quiet:
    """Stands for a run's folder: takes everything, keeps nothing."""
    label = ""

    def __init__(self, finished=()):
        self.finished = finished

    def done(self, name):
        return name in self.finished

    def elapsed(self):
        return 0.0

    def steps(self, name, n, *state):
        return range(1, n + 1)

    def logged(self, name):
        return []

    def __getattr__(self, name):
        return lambda *args, **options: Quiet()


def lab_of(**more):
    """Stands for what `loading.open_lab` gives."""
    cfg = types.SimpleNamespace(seed=0, iterations=1, skip_unchanged=True, warmup_batch=4,
                                warmup_steps=3, bootstrap_steps=5, warmup_lr=0.1, muon=False,
                                phase1=lambda i: f"phase1 {i}", phase2=lambda i: f"phase2 {i}")
    return types.SimpleNamespace(cfg=cfg, run=Quiet(), tally=Counter(), **more)


def stages(method, iterations):
    """[(kind, iteration)]"""
    found = function("methods.stages")(method, iterations)
    return [(stage.kind, stage.iteration) for stage in found]


def follow(kinds, finished):
    """[what `follow` calls] for stages [(kind, iteration)], and what it returns."""
    import methods
    import train
    calls = []

    def run_phase(draw, policy, frozen, phase, stage, lab):
        calls.append(["run_phase", draw.__name__, policy, frozen, phase, stage.name])
        return 7

    def likelihood(stage, P, Q, lab):
        calls.append(["likelihood", P, Q, stage.name])
        return P + "'", Q + "'", 5

    def end_stage(stage, P, Q, lab, since, steps):
        calls.append(["end_stage", stage.name, P, Q, steps])

    lab = lab_of()
    lab.run = Quiet(finished)
    stages = [methods.Stage(*kind) for kind in kinds]
    with (mock.patch.object(train, "run_phase", run_phase),
          mock.patch.object(train, "end_stage", end_stage),
          mock.patch.object(methods, "likelihood", likelihood)):
        return calls, train.follow(stages, "P", "Q", lab)


def run_phase(phase, silent_at=(), moves=False, shared=False):
    """What `run_phase` does: {"ref", "policy", "frozen": their embeddings in each step, "rates",
    "batches", "optimizers", "generator", "returned", "start", "end"}.
    silent_at: steps in which nothing can be drawn; moves: the frozen model is changed on the way;
    shared: both are one network."""
    import methods
    import train
    policy, frozen = Model(1), Model(2)
    if shared:
        frozen.net = policy.net
    start = [weight(policy), weight(frozen)]
    phase = grpo.Phase(**phase)
    seen = {"ref": [], "policy": [], "frozen": [], "rates": [], "batches": [], "optimizers": [],
            "generator": []}
    kept = []
    rng, step = random.Random(0), grpo.step

    def draw(a, b, pairs, its_phase, generator):
        assert a.net is policy.net and its_phase is phase
        seen["batches"].append(pairs)
        seen["policy"].append(weight(a))
        seen["frozen"].append(weight(b))
        seen["generator"].append(generator.get_state().tolist())
        if moves:
            b.net.lm_head.weight.data.add_(1)
        if len(seen["batches"]) in silent_at:
            return None
        prompts, longest = [[1, 2], [3]], 3
        rows, logps = lm.sample(a.net, prompts, 2, longest, a.options, generator)
        rollouts = grpo.Rollouts(prompts, rows, logps, a.options)
        return rollouts, torch.tensor([[rng.random(), rng.random()] for _ in prompts]), []

    def recorded(policy, ref, optimizers, rollouts, R, phase, lr):
        seen["rates"].append(lr)
        kept.extend(optimizer for optimizer in optimizers if optimizer not in kept)
        seen["optimizers"] = [type(optimizer).__name__ for optimizer in kept]
        seen["ref"].append(None if ref is None else weight(ref))
        return step(policy, ref, optimizers, rollouts, R, phase, lr)

    lab = lab_of(state_only=[(f"x{i}", f"y{i}") for i in range(12)])
    stage = methods.Stage("phase1", 1)
    with mock.patch.object(grpo, "step", recorded):
        seen["returned"] = train.run_phase(draw, policy, frozen, phase, stage, lab)
    return seen | {"start": start, "end": [weight(policy), weight(frozen)]}


def weight(model):
    """A copy of the embeddings: they move with every step."""
    return model.net.lm_head.weight.detach().clone()


# --- the rival --------------------------------------------------------------------------------

def likelihood(name, labelled, state_only, batches, some=None):
    """What a stage of methods.py trains on: {"rows" of some batches, "steps", "net", "returned"}.
    Q reads "z of x, y". some: pairs that pseudo_labels is to label."""
    import methods
    seen = {}

    def fit(model, stage_name, endless, steps, validate, lab):
        seen["rows"] = [next(endless) for _ in range(batches)]
        seen["steps"], seen["net"], seen["name"] = steps, model.net, stage_name
        return model

    P = types.SimpleNamespace(rows=list, net=types.SimpleNamespace(device="cpu"))
    Q = types.SimpleNamespace(predict=lambda xs, ys: [f"z of {x}, {y}" for x, y in zip(xs, ys)])
    lab = lab_of(labelled=[tuple(row) for row in labelled],
                 state_only=[tuple(pair) for pair in state_only],
                 fresh_net=lambda device: "fresh")
    if name == "pseudo_labels":
        return methods.pseudo_labels(Q, lab, *([some] if some else []))
    with mock.patch.object(sft, "fit", fit):
        found = function("methods." + name)(P, Q, lab, methods.Stage(name))
    kept = found[0] is P and found[1] is Q
    net = "fresh" if seen["net"] == "fresh" else "same"
    return seen | {"net": net, "kept": kept, "returned": found[2]}


# --- what the grader measures -----------------------------------------------------------------

def kept(pairs, skip):
    """methods.kept_pairs"""
    lab = lab_of(state_only=[tuple(pair) for pair in pairs])
    lab.cfg.skip_unchanged = skip
    return function("methods.kept_pairs")(lab)


def shape(R, rows, phase):
    """grpo.shape"""
    return grpo.shape(R, rows, grpo.Phase(**phase))


def own_world(n, busy):
    """The names of envs/mine.py, and n episodes."""
    world = importlib.import_module("envs.mine")
    names = {name: getattr(world, name) for name in ("EPISODES", "STEPS", "STATE_ONLY", "PRESET")}
    return names | {"episodes": [world.episode(random.Random(i), busy=busy) for i in range(n)]}
