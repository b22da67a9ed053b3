"""SWIRL, Algorithm 1, straight down the page: warm up on labels, then Phase I and Phase II in turn on state-only pairs.

    python train.py                                 the tools world, a pretrained tiny model, some minutes of a laptop
    python train.py --env physics --seed 1
    python train.py --data transitions.jsonl.gz     your own (x, z, y); half of the training episodes lose their z
    torchrun --nproc-per-node 4 train.py --shard    four GPUs, or four processes on the CPU (`parallel.py`)

Splits are by episode. Half of the training episodes keep their actions, for the warm-up. The other half lose them for good:
Phase I, Phase II and Bootstrap get their pairs (x, y) and nothing else. Test episodes are apart. Every stage has a fixed number
of steps, and no number depends on a clock. The same command again resumes an unfinished run.

Departures from the paper: the models are tiny, and pretrained on made-up worlds only (`pretrain.py`); a phase is some dozens of
steps, not an epoch over 30k pairs. See `swirl_fwm.py`, `swirl_idm.py`, `grpo.py` and `sft.py` for the rest.
"""
import copy
import dataclasses
import functools
import platform
import random
import sys
import time
from pathlib import Path

import torch
import transformers

from support import aside
import grpo
import lm
from support import loading
import mi_bounds
from models import parallel
from support import plan
from models import pretrained
from support import rundir
import sft
import swirl_fwm
import swirl_idm
from envs import records
from support.evaluate import best_of_8, evaluate, evaluate_P, evaluate_Q
from evals import metrics
from settings import parse


LATER = 0.2     # of its rate a phase takes from the second iteration on, as in the paper (1e-6, then 2e-7)


def train(cfg):
    """Algorithm 1: warm up on labels, then Phase I and Phase II in turn on pairs (x, y)."""
    started = time.monotonic()
    if not cfg.fresh and (Path(cfg.out) / "results.json").is_file():
        return rundir.report(rundir.Run(cfg, started).load("results.json"))
    device = begin(cfg)
    P, Q, lab = loading.open_lab(cfg, device)
    plan.fix_steps(cfg, steps_to_time(P, Q, lab, device) if cfg.minutes else {})          # --minutes sets the steps
    run = lab.run = rundir.Run(cfg, started)                           # nothing is written before this
    P, Q = settle(P, Q, lab, device, run.progress["folder"])
    introduce(P, lab)

    # Warm-up: SFT of both directions on the labelled half
    if not run.done("sft"):
        since = time.monotonic()
        job = aside.start(cfg, warm_up_Q, Q, lab)
        P = warm_up_P(P, lab)
        Q = job.result()
        loading.restrict(P, Q, lab.tok, lab.labelled[0][0])
        end_stage("sft", P, Q, lab, since, "warmup", cfg.warmup_steps)
        run.keep("sft", P, Q, lab.tok)

    # The rivals start from the same P and Q, beside Algorithm 1
    job = aside.start(cfg, rivals, cfg) if cfg.rivals else None
    P, Q = alternate(P, Q, lab, cfg.iterations)
    beside = job.result() if job else {}
    return finish(P, Q, lab, beside) if parallel.rank() == 0 else 0


def alternate(P, Q, lab, iterations):
    """Phase I and Phase II in turn, each iteration on state-only pairs of its own where there are enough."""
    cfg, run = lab.cfg, lab.run
    reward = dict(view=cfg.view, form=cfg.reward_form, floor=cfg.floor)
    pairs = [(x, y) for x, y in lab.state_only if x != y or not cfg.skip_unchanged]
    for i in range(1, iterations + 1):
        # Phase I: theta moves, phi is frozen (Eq. 3, Theorem 3.1)
        name = f"iteration{i}/phase1"
        if not run.done(name):
            since = time.monotonic()
            lr = cfg.lr_fwm * (1 if i == 1 else LATER)
            settings = phase_settings(cfg, cfg.phase1_steps, beta=cfg.beta_fwm, lr=lr, max_new=lab.max_y,
                                      temperature=cfg.temperature_fwm, min_p=cfg.min_p_fwm)
            step = functools.partial(swirl_fwm.phase1_step, max_z=lab.max_z, **reward)
            run_phase(name, step, P, Q, share_of(pairs, i, cfg, cfg.phase1_steps), settings, lab, rows_of_P(lab))
            end_stage(name, P, Q, lab, since, "phase1", cfg.phase1_steps)
        # Phase II: phi moves, theta is frozen (Eq. 5, Theorem 3.2)
        name = f"iteration{i}/phase2"
        if not run.done(name):
            since = time.monotonic()
            lr = cfg.lr_idm * (1 if i == 1 else LATER)
            settings = phase_settings(cfg, cfg.phase2_steps, beta=cfg.beta, lr=lr, max_new=lab.max_z,
                                      temperature=cfg.temperature)
            step = functools.partial(swirl_idm.phase2_step, **reward)
            run_phase(name, step, Q, P, share_of(pairs, i, cfg, cfg.phase2_steps), settings, lab, rows_of_Q(lab))
            end_stage(name, P, Q, lab, since, "phase2", cfg.phase2_steps)
    return P, Q


def share_of(pairs, i, cfg, steps):
    """The pairs of iteration i: its own share, or all of them where a share is less than the phase takes."""
    size = len(pairs) // cfg.iterations
    return pairs[(i - 1) * size:i * size] if size >= steps * cfg.batch else pairs


def phase_settings(cfg, steps, **own):
    """Settings of one phase: its own, and those that both share."""
    return grpo.GRPO(steps=steps, group_size=cfg.group_size, top_p=cfg.top_p, top_k=cfg.top_k, scale=cfg.scale, kl=cfg.kl,
                     updates=cfg.updates, clip=cfg.clip, **own)


def run_phase(name, step, policy, frozen, pairs, settings, lab, rows):
    """GRPO steps of `policy` against `frozen` on pairs (x, y); rows [(prompt, target)] are replayed if `--replay` says so.
    The rate rises for ten steps and falls to 0 with the last one."""
    cfg, run, steps, peak = lab.cfg, lab.run, settings.steps, settings.lr
    rng = random.Random(f"{cfg.seed} {name}")
    batch = sft.batches(pairs, cfg.batch, rng)
    generator = torch.Generator(policy.device).manual_seed(rng.randrange(2**31) + parallel.rank())
    ref, optimizers = lm.freeze(policy), lm.make_optimizers(policy, peak, muon=False)          # pi_ref: pi as the phase begins
    before = [p.detach().to("cpu", copy=True) for p in frozen.parameters()]
    replay = functools.partial(sft.replay, policy, rows, cfg.replay, rng) if cfg.replay else None
    iteration, kind = name.removeprefix("iteration").split("/")
    bar, taught, floored = run.bar(run.label + name, steps), 0, []
    for t in range(1, steps + 1):
        since = time.monotonic()
        settings.lr = peak * min(1, t / 10) * (1 - (t - 1) / steps)
        need_ref = settings.beta or t % 10 == 1                                    # without beta the KL is only logged
        log, examples = step(policy, frozen, ref if need_ref else None, optimizers, lab.tok, parallel.share(next(batch)),
                             settings, generator=generator, replay=replay)
        if log is None:                                                            # Q read no action: nothing to learn
            run.log("metrics.jsonl", phase=kind, iteration=int(iteration), step=t, seconds=run.elapsed(), reward=None)
            continue
        if not taught and settings.top_p == 1 and settings.top_k == 0:
            check_gap(log["gap"], settings.min_p)
        taught += log["zero_std_groups"] < 1
        floored.append(log["floored"])
        log["tokens_per_second"] = log.pop("tokens") / (time.monotonic() - since)
        run.log("metrics.jsonl", phase=kind, iteration=int(iteration), step=t, seconds=run.elapsed(), **log)
        bar.show(t, reward=log["reward"], kl=log["kl"])
        for example in examples if t in (1, steps) else []:
            run.log("samples.jsonl", stage=name, **example)
    bar.close()
    assert all(torch.equal(a, b.cpu()) for a, b in zip(before, frozen.parameters())), "the frozen model moved"
    if not taught:
        print(f"warning: {name} could learn nothing: in no step did the rollouts of a group differ in reward")
    elif sum(floored) > len(floored) / 2:
        print(f"warning: {name}: {sum(floored) / len(floored):.0%} of the rewards lie on the floor; give --reward-form mean "
              "or --floor 0")


def check_gap(gap, min_p):
    """Sampler and trainer must see the same distribution."""
    if not gap < (2.0 if lm.HALF else 1e-3) + min_p:
        raise RuntimeError(f"sampler and trainer disagree by {gap} nats a token")


# --- the warm-up and the rivals -----------------------------------------------------------------------------------------

def rows_of_P(lab):
    return swirl_fwm.warmup_rows(lab.tok, lab.labelled)


def rows_of_Q(lab):
    return swirl_idm.warmup_rows(lab.tok, lab.labelled, lab.cfg.view, lab.cfg.spoiled, random.Random(lab.cfg.seed))


def validate_P(P, lab):
    """Share of the validation futures that are right, greedily."""
    xs, zs, ys = map(list, zip(*lab.validation))
    y_hat = parallel.divide(lambda *rows: swirl_fwm.predict(P, lab.tok, *rows, lab.max_y), xs, zs)
    return metrics.exact(y_hat, ys)


def validate_Q(Q, lab):
    """Share of the validation actions that are read right, greedily."""
    xs, zs, ys = map(list, zip(*lab.validation))
    z_hat = parallel.divide(lambda *rows: swirl_idm.predict(Q, lab.tok, *rows, lab.max_z, lab.cfg.view), xs, ys)
    return metrics.exact(z_hat, zs)


def warm_up_P(P, lab):
    cfg = lab.cfg
    return sft.fit(P, "FWM", rows_of_P(lab), cfg.warmup_batch, cfg.warmup_steps, lab, validate_P)


def warm_up_Q(Q, lab):
    cfg = lab.cfg
    return sft.fit(Q, "IDM", rows_of_Q(lab), cfg.warmup_batch_idm, cfg.warmup_steps_idm, lab, validate_Q)


def rivals(cfg):
    """What else the same P, Q and pairs are good for: best of 8, Bootstrap, and Bootstrap followed by one
    iteration of Algorithm 1. Lives in DIR/rivals, as a run of its own; returns {"baselines": .., "stages": ..}."""
    started, folder = time.monotonic(), str(Path(cfg.out) / "rivals")
    device = begin(cfg)
    P, Q, lab = loading.open_lab(cfg, device)
    run = lab.run = rundir.Run(dataclasses.replace(cfg, out=folder, fresh=False), started, "bootstrap, ")
    P, Q = settle(P, Q, lab, device, run.progress["folder"] or "../sft")

    if "best_of_8" not in run.progress["baselines"]:
        few = lab.test[:60]                                                        # sampling 8 is dear
        same = {"fwm": evaluate_P(P, lab, few)[0], "idm": evaluate_Q(Q, lab, few)[0]}
        run.progress["baselines"] = {"best_of_8": best_of_8(P, Q, lab, few) | {"sft": same}}
        run.save_progress()
    if not run.done("bootstrap"):
        since = time.monotonic()
        P = sft.bootstrap(P, Q, lab, validate_P)
        end_stage("bootstrap", P, Q, lab, since, "bootstrap", cfg.bootstrap_steps)
    alternate(P, Q, lab, iterations=1)
    return {"baselines": run.progress["baselines"], "stages": run.progress["stages"]}


# --- the beginning, the end of a stage, the end -------------------------------------------------------------------------

def steps_to_time(P, Q, lab, device):
    """{stage: f() takes one step of it}, on copies of the models: what `--minutes` measures."""
    cfg, tok = lab.cfg, lab.tok
    P, Q = copy.deepcopy(P).to(device), copy.deepcopy(Q).to(device)
    loading.restrict(P, Q, tok, lab.labelled[0][0])
    frozen_P, frozen_Q = lm.freeze(P), lm.freeze(Q)
    rng = random.Random(cfg.seed)
    rows_p, rows_q = (sft.batches(rows, size, rng) for rows, size in
                      ((rows_of_P(lab), cfg.warmup_batch), (rows_of_Q(lab), cfg.warmup_batch_idm)))
    pairs = sft.batches([(x, y) for x, y in lab.state_only if x != y], cfg.batch, rng)
    optimizers = {model: lm.make_optimizers(model, cfg.warmup_lr, cfg.muon) for model in (P, Q)}
    one = phase_settings(cfg, 1, beta=cfg.beta_fwm, lr=0.0, max_new=lab.max_y, temperature=cfg.temperature_fwm)
    two = phase_settings(cfg, 1, beta=cfg.beta, lr=0.0, max_new=lab.max_z, temperature=cfg.temperature)
    few = lab.test[:64]
    return {"warmup_steps": lambda: sft.step(P, next(rows_p), optimizers[P], cfg.warmup_lr),
            "bootstrap_steps": lambda: sft.step(P, next(rows_p), optimizers[P], cfg.warmup_lr),
            "warmup_steps_idm": lambda: sft.step(Q, next(rows_q), optimizers[Q], cfg.warmup_lr),
            "phase1_steps": lambda: swirl_fwm.phase1_step(P, frozen_Q, None, optimizers[P], tok, next(pairs), one, cfg.view,
                                                          max_z=lab.max_z),
            "phase2_steps": lambda: swirl_idm.phase2_step(Q, frozen_P, frozen_Q, optimizers[Q], tok, next(pairs), two, cfg.view),
            "evaluate": lambda: (evaluate_P(P, lab, few), evaluate_Q(Q, lab, few))}


def begin(cfg):
    """Threads, seed; returns the device."""
    torch.set_num_threads(cfg.threads)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    loading.check_processes(cfg, device)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(cfg.seed)
    return device


def settle(P, Q, lab, device, folder):
    """P and Q of a folder of the run, if there is one, on their device and, under --shard, among the processes."""
    run, cfg = lab.run, lab.cfg
    if folder:
        last = run.dir / folder
        folders = [last / side if (last / side).exists() else run.dir / side for side in ("fwm", "idm")]
        if cfg.lora:
            P.load(folders[0]), Q.load(folders[1])                     # on the base that open_lab has loaded
        else:
            (P, _), (Q, _) = map(pretrained.load, folders)
    if run.progress["stages"]:
        print(f"resuming after {run.label}{run.progress['stages'][-1]['name']}")
    P, Q = P.to(device), Q.to(device)
    if cfg.shard:
        P, Q = parallel.shard(P), parallel.shard(Q)
    loading.restrict(P, Q, lab.tok, lab.labelled[0][0])
    return P, Q


def introduce(P, lab):
    """What the run is about to do, in three lines."""
    cfg = lab.cfg
    print(f"SWIRL on {cfg.data or cfg.env}: {len(lab.labelled)} labelled, {len(lab.validation)} validation, "
          f"{len(lab.state_only)} state-only, {len(lab.test)} test transitions")
    print(f"  {P.num_parameters() / 1e6:.2f}M parameters a model; {cfg.threads} thread(s) a process"
          + (", two processes where stages are independent" if aside.possible(cfg) else "") + f"; {lab.run.dir}")
    print(f"  steps: warm-up {cfg.warmup_steps} (FWM) and {cfg.warmup_steps_idm} (IDM), then {cfg.iterations} times "
          f"Phase I {cfg.phase1_steps} and Phase II {cfg.phase2_steps}"
          + (f"; Bootstrap {cfg.bootstrap_steps}" if cfg.rivals else ""))
    if lab.book and not cfg.vq and parallel.rank() == 0:
        with records.whole(lab.run.dir / "codebook.npz") as file:
            lab.book.save(file)


def end_stage(name, P, Q, lab, since, what, steps):
    """Score the stage on held-out transitions, save it, print it."""
    run, seconds = lab.run, time.monotonic() - since
    run.spend(what, since)
    since = time.monotonic()
    moved = {"phase1": ("fwm",), "bootstrap": ("fwm",), "phase2": ("idm",)}.get(what, ("fwm", "idm"))
    scores, sample = evaluate(P, Q, lab, name, moved)
    iteration = int(name.removeprefix("iteration").split("/")[0]) if name.startswith("iteration") else 0
    run.log("metrics.jsonl", phase="eval", stage=name, iteration=iteration, step=0, seconds=run.elapsed(), **scores)
    run.spend("eval", since)
    run.finish_stage({"name": name, **scores, "steps": steps, "seconds": seconds}, P, Q, lab.tok)
    print(f"{run.label}{name}: {rundir.show(scores)}  [{run.elapsed() / 60:.1f} min]\n{rundir.show_sample(sample)}", flush=True)


def finish(P, Q, lab, beside):
    """Both bounds by sampling, results.json, the last models in fwm/ and idm/, the table."""
    cfg, tok, run = lab.cfg, lab.tok, lab.run
    generator = torch.Generator(Q.device).manual_seed(cfg.seed)
    rng, n = random.Random(cfg.seed), min(256, len(lab.state_only), len(lab.labelled))
    some, true = rng.sample(lab.state_only, n), [z for _, z, _ in rng.sample(lab.labelled, n)]
    xs, ys = map(list, zip(*some))
    with swirl_idm.no_refusal(Q, tok):
        rows = lm.sample_all(Q, [swirl_idm.prompt(tok, x, y, cfg.view) for x, y in some], 1, lab.max_z, tok.eos_token_id,
                             generator)
    z_hat = [swirl_idm.read(tok, row) for row in rows]
    y_hat = swirl_fwm.futures(P, tok, xs, z_hat, 1, lab.max_y, generator)
    logq = swirl_idm.logp(Q, tok, xs, z_hat, y_hat, cfg.view).cpu()
    trained = [i for i in range(n) if xs[i] != ys[i]] or list(range(n))            # as Phase I takes them
    eq3 = mi_bounds.barber_agakov_from_samples(logq[trained])
    stages, seconds = run.progress["stages"], run.progress["seconds"]
    xs_test, ys_test = [x for x, _, _ in lab.test], [y for _, _, y in lab.test]
    results = {
        "version": 2, "env": cfg.data or cfg.env, "model": cfg.model, "seed": cfg.seed,
        "hardware": (f"{parallel.world()} processes, " if parallel.world() > 1 else "") + (
            torch.cuda.get_device_name() if P.device.type == "cuda" else
            f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"),
        "seconds": {"total": run.elapsed()} | {k: seconds.get(k, 0.0) for k in ("warmup", "phase1", "phase2", "eval")},
        "splits": {"labelled": len(lab.labelled), "state_only": len(lab.state_only), "test": len(lab.test)},
        "baselines": {"copy_x": metrics.copy_x(xs_test, ys_test)} | rundir.rivals_of(beside),
        "stages": stages + [stages[-1] | {"name": "swirl"}],
        "bounds": {"eq3": eq3.mean, "eq3_standard_error": eq3.standard_error,      # E log Q(z|x,y_hat), and
                   "eq5_reward": swirl_fwm.logp(P, tok, xs, z_hat, ys).mean().item()},   # E log P(y|x,z), in nats
        "collapse": mi_bounds.collapse(z_hat, true),
        "presets": {"bleu": "mirrorapi (characters, method3, mean)", "rouge_l": "rouge_score, no stemmer",
                    "sampled": "temperature .75, top-p .96: the chance of y"},
        "sizes": {"parameters": P.num_parameters(), "peak_rss_mb": rundir.peak_rss_mb(),
                  "peak_gpu_mb": torch.cuda.max_memory_allocated() / 2**20 if P.device.type == "cuda" else None}}
    run.finish(results)
    return rundir.report(results)


def main(argv=None):
    parallel.start()
    cfg = parse(argv)
    try:
        return train(cfg)
    except records.BadData as e:
        rundir.fail(e)
    except KeyboardInterrupt:
        if parallel.rank() == 0:
            print(f"\ninterrupted; finished stages are saved in {cfg.out}: the same command (without --fresh) "
                  "resumes after the last one", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
