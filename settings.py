"""Every setting of `train.py`, with the paper's value where ours differs. Each is a flag: `lr_fwm`
is `--lr-fwm`.

A preset replaces some defaults: of a world (its file), of your own file (`envs/records.py`), of a
real model (`models/presets.py`; some wait, as 0, for its size and the data). A flag wins over it.
"""
import argparse
import dataclasses
from pathlib import Path

import torch

import grpo
import methods
from envs import WORLDS, records
from models import presets
from support import rundir, sinks


def setting(default, text, choices=None, group=None):
    """group: the heading in --help of this setting and of those behind it."""
    metadata = {"help": text, "choices": choices, "group": group}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Config:
    """Every setting, in the groups of --help."""
    method: str = setting("swirl", "what follows the warm-up (methods.py)",
                          choices=list(methods.METHODS), group="Algorithm 1")
    iterations: int = setting(2, "times that both phases alternate; paper: up to 3")
    phase1_steps: int = setting(50, "steps of each Phase I")
    phase2_steps: int = setting(40, "steps of each Phase II")
    batch: int = setting(8, "pairs (x, y) a step, B; paper: 64 to 128")
    group_size: int = setting(8, "rollouts a prompt, G; paper: 8, 16 recommended")
    lr_fwm: float = setting(1e-4, "rate of Phase I, later a fifth; paper: 1e-6 for 3B to 7B models")
    lr_idm: float = setting(5e-5, "rate of Phase II, later a fifth; paper: 1e-6")
    scale: str = setting("std", "advantage: std (released), mean (Eq. 4), loo (leave-one-out)",
                         choices=["mean", "std", "loo"])
    beta: float = setting(0.1, "KL to the reference in Phase II; paper: .1; 1 is the exact ELBO")
    beta_fwm: float = setting(0.0, "KL in Phase I; Eq. 3 has none; released scripts: .04")
    kl: str = setting("reward", "KL in the reward (exact) or k3 in the loss (released)",
                      choices=["reward", "loss"])
    temperature: float = setting(1.0, "of rollouts and their scores; paper: .75")
    min_p: float = setting(0.0, "rollouts drop tokens this much less likely than the likeliest")
    reward_form: str = setting("sum", "sum of token log-probs (theorems) or mean (released)",
                               choices=["sum", "mean"])
    floor: float = setting(0.0, "least reward is -floor; 0: none (theorems); released: 10")
    skip_unchanged: bool = setting(True, "no method uses pairs with y = x; paper: all pairs")
    view: str = setting("diff", "Q reads the changed lines (diff) or x and y (full; the paper)",
                        choices=["diff", "full"])

    warmup_steps: int = setting(600, "steps of P, and of methods that begin again",
                                group="warm-up and rivals")
    warmup_steps_idm: int = setting(200, "steps of Q")
    warmup_batch: int = setting(8, "transitions a step of P; paper: 128")
    warmup_batch_idm: int = setting(32, "transitions a step of Q; paper: 128")
    warmup_lr: float = setting(3e-3, "peak rate, of Bootstrap too; paper: 2e-5")
    muon: bool = setting(True, "Muon on weight matrices, and weight decay .1; paper: AdamW")
    spoiled: float = setting(0.0, "share of Q's pairs with a wrong y and no action; paper: 0")
    rivals: bool = setting(True, "best of 8, Bootstrap, and Bootstrap followed by SWIRL, too")
    bootstrap_steps: int = setting(450, "steps of Bootstrap and of other stages of methods.py")

    env: str = setting("tools", "built-in world", choices=sorted(WORLDS), group="data")
    data: str = setting("", "transitions file (JSONL, .gz) instead of a world")
    episodes: int = setting(0, "training episodes of a world (0: its own number)")
    labelled: int = setting(0, "labelled transitions that are kept (0: all)")
    state_only: int = setting(0, "pairs (x, y) that are kept (0: all)")
    busy: float = setting(0.5, "share of training transitions in which somebody else acts, too")
    eval_size: int = setting(300, "test transitions that are scored; fewer if states are long")
    validation_size: int = setting(100, "labelled transitions that are held back, at most")
    max_state: int = setting(0, "a longer state loses its middle; in tokens (0: none does)")

    model: str = setting("tiny", "tiny, smollm2, a Hub id, a folder or a .gguf file", group="model")
    start: str = setting("", "a run whose SFT models take the place of the warm-up")
    lora: int = setting(0, "rank of LoRA adapters on one frozen base (0: all weights learn)")

    seed: int = setting(0, "everything that is random", group="run and machine")
    out: str = setting("", "folder of the run (default: runs/NAME-MODEL-SEED)")
    fresh: bool = setting(False, "start over: delete what an earlier run wrote to --out")
    save_every: float = setting(2.0, "minutes between saved states of a stage (0: each step)")
    dry_run: bool = setting(False, "print the plan of the run and write nothing")
    minutes: float = setting(0.0, "measure, then fix the steps of all stages for so many minutes")
    device: str = setting("auto", "where to compute", choices=["auto", "cpu", "cuda"])
    dtype: str = setting("auto", "of products; auto: bfloat16 for real models where it is native",
                         choices=["auto", "float32", "bfloat16"])
    threads: int = setting(0, "CPU threads (0: for tiny two processes of one thread each)")
    tokens: int = setting(0, "tokens of a micro-batch: bounds memory, changes no gradient")
    shard: bool = setting(False, "under torchrun: FSDP2 (models/parallel.py)")
    tensorboard: bool = setting(False, "send the metrics to TensorBoard, too (support/sinks.py)")
    wandb: bool = setting(False, "send the metrics to wandb, too")

    preset: dict = dataclasses.field(default_factory=dict)     # what a preset has set

    def has_rivals(self):
        """Whether the rivals run, too: they are those of SWIRL."""
        return self.rivals and self.method == "swirl"

    def phase1(self, iteration):
        """The settings of Phase I."""
        return grpo.Phase(steps=self.phase1_steps, peak=self.lr_fwm * later(iteration),
                          beta=self.beta_fwm, **self.both())

    def phase2(self, iteration):
        """The settings of Phase II."""
        return grpo.Phase(steps=self.phase2_steps, peak=self.lr_idm * later(iteration),
                          beta=self.beta, **self.both())

    def both(self):
        """What both phases share."""
        return dict(batch=self.batch, group_size=self.group_size, scale=self.scale, kl=self.kl,
                    temperature=self.temperature, min_p=self.min_p,
                    form=self.reward_form, floor=self.floor)


def later(iteration):
    """Share of its rate that a phase takes: a fifth from the second iteration on, as in the paper
    (1e-6, then 2e-7)."""
    return 1.0 if iteration == 1 else 0.2


def parse(argv=None):
    """A Config from flags; bad ones end the program with one line."""
    parser = make_parser()
    given = parser.parse_args(argv)
    if given.model != "tiny":
        preset = presets.PRESET
        if given.env == "pixels" and not given.data:
            preset = preset | {"busy": 0.0}
    elif given.data:
        preset = records.PRESET
    else:
        preset = WORLDS[given.env].PRESET
    parser.set_defaults(**preset)
    values = vars(parser.parse_args(argv))
    cfg = Config(**values, preset={k: v for k, v in preset.items() if values[k] == v})
    check(cfg)
    cfg.episodes = cfg.episodes or WORLDS[cfg.env].EPISODES
    name = Path(cfg.data).name.split(".")[0] or cfg.env
    method = "" if cfg.method == "swirl" else f"-{cfg.method}"
    cfg.out = cfg.out or f"runs/{name}-{Path(cfg.model).name}-{cfg.seed}{method}"
    return cfg


def make_parser():
    """A flag for each setting, in groups."""
    parser = argparse.ArgumentParser(
        description="SWIRL: self-improving world modelling with latent actions.")
    parser.error = rundir.fail
    for f in dataclasses.fields(Config):
        if f.name == "preset":
            continue
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        kind = dict(type=f.type, choices=f.metadata["choices"])
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        text = f"{f.metadata['help']} [{f.default}]".replace("%", "%%")
        group.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=text, **kind)
    return parser


def check(cfg):
    """Fails in one line on a value that makes no sense."""
    positive = ("temperature", "warmup_lr", "lr_fwm", "lr_idm")
    at_least_1 = (
        "eval_size", "validation_size", "warmup_steps", "warmup_steps_idm", "warmup_batch",
        "warmup_batch_idm", "bootstrap_steps", "iterations", "phase1_steps", "phase2_steps",
        "batch")
    not_negative = ("labelled", "state_only", "floor", "minutes", "beta", "beta_fwm", "lora",
                    "tokens", "threads", "save_every")
    shares = ("spoiled", "busy")
    fine = {
        "group_size": cfg.group_size >= 2, "min_p": 0 <= cfg.min_p < 1,
        "episodes": cfg.episodes == 0 or cfg.episodes >= 4, "seed": 0 <= cfg.seed < 2**32,
        "max_state": cfg.max_state == 0 or cfg.max_state >= 16}
    fine |= {name: 0 < getattr(cfg, name) < float("inf") for name in positive}
    fine |= {name: getattr(cfg, name) >= 1 for name in at_least_1}
    fine |= {name: True for name in fine if presets.is_open(cfg, name)}
    fine |= {name: 0 <= getattr(cfg, name) < float("inf") for name in not_negative}
    fine |= {name: 0 <= getattr(cfg, name) <= 1 for name in shares}
    most = {f.name: 2**32 for f in dataclasses.fields(cfg) if f.type is int}
    most |= {"iterations": 1000, "threads": 1000}
    for name in most | fine:
        value = getattr(cfg, name)
        if not fine.get(name, True) or value > most.get(name, value):
            rundir.fail(f"--{name.replace('_', '-')} cannot be {value}; see --help")
    if cfg.method == "oracle" and cfg.data:
        rundir.fail("--method oracle needs the true actions of the state-only half; take a world")
    if cfg.method in ("share", "sft-merge") and (cfg.lora or cfg.shard):
        rundir.fail(f"--method {cfg.method} begins again from the pretrained model; leave out "
                    "--lora and --shard")
    if cfg.busy and cfg.env == "pixels" and not cfg.data:
        rundir.fail("--busy is for the text worlds; leave it out with --env pixels")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        rundir.fail("--device cuda: no GPU is visible; use --device cpu")
    sinks.check(cfg)
