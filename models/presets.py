"""Settings of a real model that no flag gives: from its parameters, the device and the data.

Claim: no setting here depends on a clock. Free memory decides `tokens`, which changes no gradient.

1. On a GPU the warm-up makes three epochs over the labelled half, and a phase makes one epoch over
   its share of the state-only pairs. The paper: SFT for several epochs, a phase for one.
2. On a CPU a row costs a second and more. So each stage trains on a fixed number of rows, which
   falls with the parameters, and both phases come once. `--minutes M` scales all of it.
3. The paper's batch of 128 is for 30,000 transitions. Where an epoch would have fewer than 200
   steps, the batch is halved, down to 8.
4. Smaller models get higher rates. `--lora` has ten times the rates (Schulman et al. 2025, LoRA
   Without Regret).
"""
import math

EPOCHS = 3
# Parameters up to, then the peak rates of the warm-up, Phase I and Phase II. The last row is the
# paper's; the first was tried with SmolLM2-135M
RATES = ((2e8, 2e-4, 3e-5, 2e-5), (1e9, 5e-5, 5e-6, 5e-6), (math.inf, 2e-5, 1e-6, 1e-6))
LORA = 10
# On a CPU: parameters times rows that a stage trains on, and parameters times test transitions
CPU_ROWS, CPU_TESTS = 1e11, 1.1e10

# Fixed for all real models: AdamW, and a reward for each token, since states are long
FIXED = {"muon": False, "reward_form": "mean", "floor": 10.0}
# 0: decided by `of_size` and `of_data`
PLANNED = dict.fromkeys((
    "warmup_lr", "lr_fwm", "lr_idm", "iterations", "eval_size", "validation_size", "batch",
    "warmup_batch", "warmup_batch_idm", "warmup_steps", "warmup_steps_idm", "bootstrap_steps",
    "phase1_steps", "phase2_steps", "tokens"), 0)
PRESET = FIXED | PLANNED


def is_open(cfg, name):
    """Whether a setting waits for its value."""
    return name in cfg.preset and not getattr(cfg, name)


def fill(cfg, values):
    """Give those settings their value that wait for it."""
    for name, value in values.items():
        if is_open(cfg, name):
            setattr(cfg, name, value)
            cfg.preset[name] = value


def of_size(n, on_cpu, lora=0):
    """{setting: value} for a model of n parameters."""
    times = LORA if lora else 1
    names = "warmup_lr", "lr_fwm", "lr_idm"
    rates = next(row[1:] for row in RATES if n <= row[0])
    tests = min(300, max(20, round(CPU_TESTS / n))) if on_cpu else 300
    sizes = {"eval_size": tests, "validation_size": tests // 3}
    sizes["iterations"] = 1 if on_cpu else 2
    return sizes | {name: times * rate for name, rate in zip(names, rates)}


def of_data(cfg, n, on_cpu, labels, pairs):
    """{setting: value} for so many labelled transitions and state-only pairs."""
    rows = EPOCHS * labels
    batch = cfg.warmup_batch or batch_for(labels)
    batch_idm = cfg.warmup_batch_idm or min(128, 2 * batch)
    steps_idm = math.ceil(rows / batch_idm)
    phase_batch = cfg.batch or (4 if on_cpu else batch_for(pairs))
    phase_steps = pairs // cfg.iterations // phase_batch
    if on_cpu:
        rows = min(rows, CPU_ROWS / n)
        steps_idm = min(steps_idm, math.ceil(rows / batch))
        phase_steps = min(phase_steps, round(rows / phase_batch / cfg.group_size))
    steps = math.ceil(rows / batch)
    phase_steps = max(1, phase_steps)
    return {
        "warmup_batch": batch,
        "warmup_batch_idm": batch_idm,
        "warmup_steps": steps,
        "warmup_steps_idm": steps_idm,
        "bootstrap_steps": math.ceil(0.75 * steps),
        "batch": phase_batch,
        "phase1_steps": phase_steps,
        "phase2_steps": phase_steps,
    }


def batch_for(rows):
    """8, or more as long as an epoch has 200 steps; the paper's 128 at most."""
    batch = 8
    while batch < 128 and rows >= 200 * 2 * batch:
        batch *= 2
    return batch
