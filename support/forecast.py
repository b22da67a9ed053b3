"""What a run of a real model will do: its settings, its memory and its minutes, before it begins.

1. `size_up` knows only the parameters and the free memory, and runs before the weights are loaded.
2. `make` knows the data and both models. It times a few calls, whose steps have the rate 0, and
   prints the plan. Minutes follow from counted tokens and measured seconds a token.
3. After the warm-up rollouts of a prompt are partly equal, and equal ones are computed once. So
   only a share of them is counted, DRAWN, and rows that are as long as the truth.

`support/plan.py` does the same for the tiny model, by timing whole steps.
"""
import dataclasses
import random
import time
import typing

import torch

import lm
import methods
import sft
from models import adapters, memory, optim, parallel, presets, pretrained
from models.batches import columns
from support import evaluate, loading, plan, rundir, tables

DRAWN = 0.6     # share of rollouts that differ, note 3
LEAST = 0.5     # of its even share of too few minutes the rest gets at least so much
GIB = 2**30


# --- before the weights are loaded ------------------------------------------------------------

def size_up(cfg, device):
    """Fill in the settings that follow from a real model's size, and the micro-batch. Returns the
    bytes that are free. Fails in one line if the run does not fit."""
    found = memory.free(device) // (parallel.world() if device == "cpu" else 1)
    if cfg.model == "tiny":
        return found
    try:
        config = pretrained.read_config(cfg.model)
        half = loading.in_half(cfg, device)
        held, token = memory.parts(config, cfg.lora, half, cfg.has_rivals())
        n = adapters.memory(config)[0]["gradients"] // 4
    except Exception as error:      # whatever a damaged file makes the loaders raise
        loading.refuse(cfg, error)
    on_cpu = device == "cpu"
    presets.fill(cfg, presets.of_size(n, on_cpu, cfg.lora))
    tokens = memory.micro_batch(held, token, found, on_cpu)
    # --shard divides what this arithmetic counts
    if not tokens and not cfg.shard and presets.is_open(cfg, "tokens"):
        refuse_size(cfg, config, half, found)
    presets.fill(cfg, {"tokens": tokens})
    return found


def refuse_size(cfg, config, half, found):
    """Fails with what the run needs, and what smaller runs need."""
    def needs(r, rivals):
        held, token = memory.parts(config, r, half, rivals)
        return f"{memory.peak(held, token, memory.LEAST) / memory.USED / GIB:.1f} GiB"

    smaller = []
    if cfg.has_rivals():
        smaller.append(f"--no-rivals needs {needs(cfg.lora, False)}")
    if not cfg.lora:
        smaller.append(f"--lora 32 needs {needs(32, cfg.has_rivals())}")
    smaller.append("or give a smaller --model")
    rundir.fail(f"--model {cfg.model}: the run needs {needs(cfg.lora, cfg.has_rivals())} of "
                f"memory, and {found / GIB:.1f} are free; {', '.join(smaller)}")


# --- what is counted --------------------------------------------------------------------------

class Sizes(typing.NamedTuple):
    """Mean tokens of the data."""
    P: float        # P's prompt
    y: float        # and its target
    Q: float        # Q's prompt
    z: float        # and its target

    @classmethod
    def of(cls, P, Q, triples):
        rows = [*columns(P.rows(triples)), *columns(Q.rows(triples))]
        return cls(*(sum(map(len, some)) / len(triples) for some in rows))


class Speed(typing.NamedTuple):
    """Measured seconds, and a size."""
    train: float    # a token, forward and backward
    step: float     # the optimizer's step
    score: float    # a token, forward
    nucleus: float  # the same, with the top-p of `evaluate.sampled`
    place: float    # the next token of all rows, whatever their number
    row: float      # the same, for each row
    cached: float   # tokens that the sampler holds at a time

    def draw(self, prompts, prompt, rows, longest, mean):
        """Seconds to draw so many rows: the prompts once, then token by token in batches."""
        prefill = prompts * prompt * self.score
        batches = max(1, rows * (prompt + longest) / self.cached)
        return prefill + batches * longest * self.place + rows * mean * self.row


def measure(P, lab):
    """The Speed of P, which is Q's: they are of one shape. Nothing moves."""
    rng = random.Random(lab.cfg.seed)
    some = P.rows(rng.sample(lab.labelled, min(len(lab.labelled), lab.cfg.warmup_batch)))
    prompts, targets = columns(some)
    tokens = sum(map(len, prompts + targets))
    lm.score_tokens(P.net, prompts[:1], targets[:1], [0], P.options)       # does not count

    optimizers = optim.make_optimizers(P.net, 0.0, lab.cfg.muon)
    train = seconds_of(P, lambda: sft.backward(P, some, tokens))
    begin = time.monotonic()
    optim.step(P.net, optimizers, 0.0)                     # the rate is 0
    step = time.monotonic() - begin
    paper = dataclasses.replace(P.options, **evaluate.PAPER)
    score, nucleus = (
        seconds_of(P, lambda: lm.score_tokens(P.net, prompts, targets, range(len(some)), options))
        for options in (P.options, paper))
    endless = dataclasses.replace(P.options, eos=-1)

    def a_place(rows):
        """Seconds of one more token of so many rows."""
        first = [prompts[i % len(prompts)] for i in range(rows)]
        one, more = (seconds_of(P, lambda: lm.sample(P.net, first, 1, T, endless)) for T in (1, 9))
        return max(0.0, more - one) / 8

    few, many = a_place(1), a_place(16)
    row = max(0.0, many - few) / 15
    return Speed(train / tokens, step, score / tokens, nucleus / tokens, max(0.0, few - row), row,
                 P.options.cached)


def seconds_of(P, f):
    """Seconds of a call; the lesser of two where it is short."""
    found = []
    while len(found) < 2 and sum(found) < 2:
        begin = time.monotonic()
        f()
        if P.net.device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.monotonic() - begin)
    return min(found)


# --- seconds of each part ---------------------------------------------------------------------

def seconds(cfg, lab, P, Q, s):
    """{part: seconds} at the Speed s, if GPUs share the work evenly. A key of `plan.STEPS` is one
    step; "FWM" and "IDM" are one evaluation each; "validate_P", "validate_Q" one validation."""
    size = Sizes.of(P, Q, lab.labelled)
    B, some = cfg.batch, DRAWN * cfg.group_size
    row_P, row_Q = size.P + size.y, size.Q + size.z
    tests = len(lab.test)

    def draw_P(n, k=1):
        return s.draw(n, size.P, n * k, P.longest, size.y)

    def draw_Q(n, k=1):
        return s.draw(n, size.Q, n * k, Q.longest, size.z)

    def fwm(n):
        return draw_P(n) + n * row_P * (s.score + s.nucleus)

    def idm(n):
        return draw_Q(n) + n * (size.Q + row_Q) * s.score

    # Phase I: Q guesses z, P draws, Q scores, P learns; Phase II: Q draws, P scores, Q learns
    train_P = B * (size.P + some * size.y) * s.train
    train_Q = B * (size.Q + some * size.z) * s.train
    by_Q = B * some * row_Q * s.score
    by_P = B * (size.P + some * (size.y + size.z)) * s.score
    to_ref = B * (size.Q + some * size.z) * s.score * (2 if Q.options.half else 1)
    best = evaluate.tests_of_best(lab)
    found = {
        "warmup_steps": cfg.warmup_batch * row_P * s.train + s.step,
        "warmup_steps_idm": cfg.warmup_batch_idm * row_Q * s.train + s.step,
        "bootstrap_steps": cfg.warmup_batch * row_P * s.train + s.step,
        "phase1_steps": draw_Q(B) + draw_P(B, some) + by_Q + train_P + s.step,
        "phase2_steps": draw_Q(B, some) + by_P + to_ref + train_Q + s.step,
        "FWM": fwm(tests),
        "IDM": idm(tests),
        "validate_P": draw_P(len(lab.validation)),
        "validate_Q": draw_Q(len(lab.validation)),
        "labels": draw_Q(min(1, methods.rows_taken(lab)) * len(methods.kept_pairs(lab))),
        "all_labels": draw_Q(len(methods.kept_pairs(lab))),
        "best_of_8": fwm(best) + idm(best) + draw_P(best, 8) + draw_Q(best, 8 * DRAWN)
        + best * 8 * (row_Q + DRAWN * (size.y + size.z)) * s.score,
        "bounds": draw_P(tests) + draw_Q(tests) + tests * (row_P + row_Q) * s.score
        + len(lab.validation) * row_P * s.nucleus,
    }
    many = parallel.world() if P.net.device.type == "cuda" else 1
    return {name: value / many for name, value in found.items()}


def parts_of(cfg, of):
    """{part of the plan: (seconds of its steps, other seconds)}, from `seconds`."""
    stages = methods.stages(cfg.method, cfg.iterations)
    sft_steps = cfg.warmup_steps * of["warmup_steps"]
    sft_steps += cfg.warmup_steps_idm * of["warmup_steps_idm"]
    out = {"SFT": (sft_steps, 4 * (of["validate_P"] + of["validate_Q"]))}
    if cfg.start:
        out["SFT"] = 0.0, 0.0
    for name, kind in (("Phase I", "phase1"), ("Phase II", "phase2")):
        out[name] = cost([stage for stage in stages if stage.kind == kind], cfg, of)
    others = [stage for stage in stages if stage.kind not in ("phase1", "phase2")]
    out[cfg.method] = cost(others, cfg, of)
    if cfg.has_rivals():
        steps, other = cost(methods.stages("bootstrap+swirl", 1), cfg, of)
        kinds = ["sft", "phase1", "phase2"]                # the first one scores both sides
        out["rivals"] = steps, other + of["best_of_8"] + scores(kinds, of)
    kinds = ["sft", *(stage.kind for stage in stages)]
    out["scores"] = 0.0, scores(kinds, of) + of["bounds"]
    return {name: times for name, times in out.items() if any(times) or name == "SFT"}


def cost(stages, cfg, of):
    """(seconds of steps, other seconds but for scores) of some stages."""
    wanted = {name: of[name] * getattr(cfg, name) for name in plan.STEPS}
    steps, _ = plan.cost(stages, cfg, wanted)
    labels = {"bootstrap": of["labels"], "continue": of["all_labels"], "merge": of["all_labels"]}
    other = sum(labels.get(stage.kind, 0.0) for stage in stages)
    likelihood = [stage for stage in stages if stage.kind not in ("phase1", "phase2")]
    return steps, other + 4 * len(likelihood) * of["validate_P"]


def scores(kinds, of):
    """Seconds of the scores after stages of these kinds; the side that stays has its own."""
    fwm = [kind for kind in kinds if kind != "phase2"]
    idm = [kind for kind in kinds if kind in ("sft", "phase2")]
    return len(fwm) * of["FWM"] + len(idm) * of["IDM"]


# --- the plan ---------------------------------------------------------------------------------

def make(P, Q, lab, bytes_free):
    """Fill in the settings that follow from the data, fit the steps into --minutes, print the
    plan. A run that goes on has its settings; only a line or two are printed then."""
    cfg = lab.cfg
    if cfg.model == "tiny":
        plan.fix_steps(cfg, P, Q, lab)
    if cfg.model == "tiny" or plan.saved(cfg):
        return tables.introduce(P, lab)
    pairs = len(methods.kept_pairs(lab))
    on_cpu = P.net.device.type == "cpu"
    values = presets.of_data(cfg, P.net.num_parameters(), on_cpu, len(lab.labelled), pairs)
    presets.fill(cfg, values)
    loading.check_processes(cfg, P.net.device.type)        # now that the batches are known
    held, used = in_memory(P, Q, lab, bytes_free)
    speed = measure(P, lab)
    found = parts_of(cfg, seconds(cfg, lab, P, Q, speed))
    if cfg.minutes:
        fit(cfg, found)
        found = parts_of(cfg, seconds(cfg, lab, P, Q, speed))
    show(P, lab, found)
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in held.items())
    print(f"  memory     {used / GIB:.1f} of {bytes_free / GIB:.1f} GiB that are free:\n"
          f"             {parts}", flush=True)
    return None


def fit(cfg, found):
    """Scale the steps, so that the run takes about cfg.minutes. Where these are few, the warm-up is
    cut last: without it the phases have nothing to improve."""
    steps, other = map(sum, zip(*found.values()))
    warm_up = found["SFT"][0]
    later = steps - warm_up
    room = max(0.0, cfg.minutes * 60 - other)
    rest = room / steps if steps else 1.0
    if rest < 1 and later:
        rest = max(LEAST * rest, (room - warm_up) / later)
    first = (room - rest * later) / warm_up if warm_up else 0.0
    for name in plan.STEPS:
        factor = parallel.agree(first if name.startswith("warmup") else rest)
        value = max(1, round(getattr(cfg, name) * factor))
        setattr(cfg, name, value)
        if name in cfg.preset:
            cfg.preset[name] = value


def in_memory(P, Q, lab, bytes_free):
    """({part: bytes}, bytes at the peak). Fails if the longest row does not fit."""
    cfg = lab.cfg
    held, token = memory.parts(P.net.config, cfg.lora, P.options.half, cfg.has_rivals())
    rows = P.rows(lab.labelled) + Q.rows(lab.labelled)
    longest = max(len(prompt) + len(target) for prompt, target in rows)
    work = max(longest, cfg.tokens) * token
    used = memory.peak(held, token, max(longest, cfg.tokens))
    if used > memory.USED * bytes_free and not cfg.shard:
        rundir.fail(f"a row of {longest} tokens needs {work / GIB:.1f} GiB beside the models, and "
                    "so much is not free; give --max-state or a smaller --model")
    return held | {f"{max(longest, cfg.tokens)} tokens": work}, used


def show(P, lab, found):
    """Print what the run will do, and the minutes of each part."""
    cfg = lab.cfg
    kind = P.net.device.type.upper()
    half = "bfloat16" if P.options.half else "float32"
    learn = f"LoRA of rank {cfg.lora}" if cfg.lora else "all weights learn"
    print(
        f"plan: SWIRL on {cfg.data or cfg.env} with {cfg.model}, "
        f"{P.net.num_parameters() / 1e6:.1f}M parameters, {learn}; {kind}, {half}; {cfg.out}\n"
        f"  data       {len(lab.labelled)} labelled, {len(lab.validation)} validation, "
        f"{len(lab.state_only)} state-only, {len(lab.test)} test transitions"
    )
    for name, times in found.items():
        print(f"  {name:10} {says(name, cfg, lab):76}{sum(times) / 60:7.1f} min")
    total = sum(map(sum, found.values()))
    how = f"--minutes {cfg.minutes:g}" if cfg.minutes else "--minutes M scales the steps"
    print(f"  {'in all':10} {how:76}{total / 60:7.1f} min")


def says(name, cfg, lab):
    """What the plan says of one part."""
    epochs = cfg.warmup_steps * cfg.warmup_batch / len(lab.labelled)
    epochs_Q = cfg.warmup_steps_idm * cfg.warmup_batch_idm / len(lab.labelled)
    group = f"{cfg.iterations} x {{}} steps of {cfg.batch} pairs, {cfg.group_size} rollouts each"
    return {
        "SFT": f"P {cfg.warmup_steps} steps of {cfg.warmup_batch} ({epochs:.1f} epochs), Q "
        f"{cfg.warmup_steps_idm} of {cfg.warmup_batch_idm} ({epochs_Q:.1f}), "
        f"rate {cfg.warmup_lr:.2g}",
        "Phase I": f"{group.format(cfg.phase1_steps)}, rate {cfg.lr_fwm:.2g}",
        "Phase II": f"{group.format(cfg.phase2_steps)}, rate {cfg.lr_idm:.2g}, beta {cfg.beta:g}",
        "rivals": f"best of 8 on {evaluate.tests_of_best(lab)} tests, Bootstrap "
        f"{cfg.bootstrap_steps} steps, then one Phase I and II",
        "scores": "greedy and log-probabilities of the tests after each stage, bounds",
    }.get(name, f"{cfg.bootstrap_steps} steps of {cfg.warmup_batch}")
