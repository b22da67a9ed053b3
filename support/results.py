"""The end of a stage and the end of a run: scores, saved models, results.json, the table."""
import platform
import random
import time

import torch

import mi_bounds
from evals import metrics
from models import parallel
from support import rundir
from support.evaluate import evaluate

# What a stage moves (by default both sides); the other side keeps its scores
MOVED = {"phase1": ("fwm",), "phase2": ("idm",), "bootstrap": ("fwm",)}


def end_stage(stage, P, Q, lab, since, steps):
    """Score the stage on held-out transitions, save it, print it."""
    run, name = lab.run, stage.name
    seconds = time.monotonic() - since
    run.spend("warmup" if stage.kind == "sft" else stage.kind, since)
    since = time.monotonic()
    scores, sample = evaluate(P, Q, lab, name, MOVED.get(stage.kind, ("fwm", "idm")))
    run.log("metrics.jsonl", phase="eval", stage=name, iteration=stage.iteration, step=0,
            seconds=run.elapsed(), **scores)
    run.spend("eval", since)
    row = {"name": name, **scores, "steps": steps, "seconds": seconds}
    run.finish_stage(row, P, Q)
    minutes = run.elapsed() / 60
    print(f"{run.label}{name}: {rundir.show(scores)}  [{minutes:.1f} min]", flush=True)
    print(rundir.show_sample(sample, Q.changes), flush=True)


def finish(P, Q, lab, beside):
    """Both bounds by sampling, results.json, the last models in fwm/ and idm/, the table."""
    cfg, run = lab.cfg, lab.run
    stages, seconds = run.progress["stages"], run.progress["seconds"]
    xs, ys = [x for x, _, _ in lab.test], [y for _, _, y in lab.test]
    spent = {name: seconds.get(name, 0.0) for name in ("warmup", "phase1", "phase2", "eval")}
    baselines = {"copy_x": metrics.copy_x(xs, ys)} | rundir.rivals_of(beside)
    results = {
        "version": 2, "env": cfg.data or cfg.env, "model": cfg.model, "seed": cfg.seed,
        "hardware": hardware(P.net.device),
        "seconds": {"total": run.elapsed()} | spent,
        "splits": {"labelled": len(lab.labelled), "state_only": len(lab.state_only),
                   "test": len(lab.test)},
        "baselines": baselines,
        "stages": stages + [stages[-1] | {"name": "swirl"}],
        **bounds(P, Q, lab),
        "presets": {"bleu": "mirrorapi (characters, method3, mean)",
                    "rouge_l": "rouge_score, no stemmer",
                    "sampled": "temperature .75, top-p .96: the chance of y"},
        "sizes": sizes(P.net)}
    run.finish(results)
    return rundir.report(results)


def bounds(P, Q, lab):
    """E log Q(z | x, y_hat) (Eq. 3) and E log P(y | x, z) (the reward of Eq. 5) on state-only
    pairs, in nats, and whether the latent actions collapse."""
    rng = random.Random(lab.cfg.seed)
    generator = torch.Generator(Q.net.device).manual_seed(lab.cfg.seed)
    n = min(256, len(lab.state_only), len(lab.labelled))
    xs, ys = map(list, zip(*rng.sample(lab.state_only, n)))
    true = [z for _, z, _ in rng.sample(lab.labelled, n)]
    zs = Q.sample(xs, ys, 1, generator)
    y_hats = P.sample(xs, zs, 1, generator)
    logq = Q.logp(xs, zs, y_hats).cpu()
    # As Phase I takes them
    changed = [i for i in range(n) if xs[i] != ys[i]] or list(range(n))
    eq3 = mi_bounds.barber_agakov_from_samples(logq[changed])
    return {"bounds": {"eq3": eq3.mean, "eq3_standard_error": eq3.standard_error,
                       "eq5_reward": P.logp(xs, zs, ys).mean().item()},
            "collapse": mi_bounds.collapse(zs, true)}


def hardware(device):
    """What computed, in words."""
    many = f"{parallel.world()} processes, " if parallel.world() > 1 else ""
    if device.type == "cuda":
        return many + torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    return f"{many}{name} CPU, {torch.get_num_threads()} threads"


def sizes(net):
    """Parameters of a model and the memory at the peak."""
    on_gpu = net.device.type == "cuda"
    return {"parameters": net.num_parameters(), "peak_rss_mb": rundir.peak_rss_mb(),
            "peak_gpu_mb": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None}
