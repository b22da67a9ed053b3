"""The end of a stage and the end of a run: scores, saved models, results.json, the table."""
import platform
import random
import sys
import time

import torch

import mi_bounds
from evals import metrics
from models import parallel
from models.batches import columns
from support import curves, report, tables
from support.evaluate import evaluate, sampled


def end_stage(stage, P, Q, lab, since, steps):
    """Score the stage on held-out transitions, save both models, print it. Its last step has been
    saved before."""
    run, name = lab.run, stage.name
    since -= run.earlier
    seconds = time.monotonic() - since
    run.spend("warmup" if stage.kind == "sft" else stage.kind, since)
    since = time.monotonic()
    scores, sample = evaluate(P, Q, lab, name, moved(stage, P, Q))
    run.log("metrics.jsonl", phase="eval", stage=name, iteration=stage.iteration, step=0,
            seconds=run.elapsed(), **scores)
    run.spend("eval", since)
    row = {"name": name, **scores, "steps": steps, **lab.tally, "seconds": seconds}
    lab.tally.clear()
    run.finish_stage(row, P, Q)
    tables.show_scores(run.label + name, scores, run.elapsed() / 60)
    tables.show_sample(sample, Q.changes)
    curves.update(run)


def moved(stage, P, Q):
    """The sides that a stage moves; the other one keeps its scores."""
    if stage.kind == "sft" or P.net is Q.net:
        return "fwm", "idm"
    return ("idm",) if stage.kind == "phase2" else ("fwm",)


def finish(P, Q, lab, beside):
    """Both bounds by sampling, results.json, the last models in fwm/ and idm/, the table."""
    cfg, run = lab.cfg, lab.run
    validation = {"sampled": sampled(P, lab.validation)}   # of all processes
    if parallel.rank():
        return 0
    stages = run.progress["stages"]
    results = {
        "version": 2,
        "env": cfg.data or cfg.env,
        "model": cfg.model,
        "seed": cfg.seed,
        "hardware": hardware(P.net.device),
        "seconds": spent(run),
        "splits": {
            "labelled": len(lab.labelled),
            "state_only": len(lab.state_only),
            "test": len(lab.test),
        },
        "baselines": baselines(lab, beside),
        "validation": validation,
        "code": run.progress["code"],
        "stages": stages + [stages[-1] | {"name": cfg.method}],
        **bounds(P, Q, lab),
        "presets": {
            "bleu": "mirrorapi (characters, method3, mean)",
            "rouge_l": "rouge_score, no stemmer",
            "sampled": "temperature .75, top-p .96: the chance of y",
        },
        "sizes": sizes(P.net),
    }
    run.finish(results)
    report.update(run)
    if run.sinks:
        run.sinks.close()
    return tables.report(results)


def spent(run):
    """{"total", "warmup", "phase1", "phase2", "eval"}: seconds of the whole run and of its
    parts."""
    seconds = {"total": run.elapsed()}
    for part in ("warmup", "phase1", "phase2", "eval"):
        seconds[part] = run.progress["seconds"].get(part, 0.0)
    return seconds


def baselines(lab, beside):
    """The copy of x and, from the rows of `train.rivals`, best of 8 and Bootstrap."""
    xs = [x for x, _, _ in lab.test]
    ys = [y for _, _, y in lab.test]
    copy_x = metrics.copy_x(xs, ys)
    if not beside:
        return {"copy_x": copy_x}
    first, *then = beside["stages"]
    last = then[-1]
    return {
        "copy_x": copy_x,
        **beside["baselines"],
        "bootstrap": {key: first[key] for key in ("fwm", "steps", "seconds")},
        "bootstrap_swirl": {"fwm": last["fwm"], "idm": last["idm"], "stages": then},
    }


def bounds(P, Q, lab):
    """E log Q(z | x, y_hat) (Eq. 3) and E log P(y | x, z) (the reward of Eq. 5) on state-only
    pairs, in nats, and whether the latent actions collapse."""
    rng = random.Random(lab.cfg.seed)
    generator = torch.Generator(Q.net.device).manual_seed(lab.cfg.seed)
    most = 256 if lab.cfg.model == "tiny" else len(lab.test)               # drawing is slow
    n = min(most, len(lab.state_only), len(lab.labelled))
    xs, ys = columns(rng.sample(lab.state_only, n))
    true = [z for _, z, _ in rng.sample(lab.labelled, n)]
    zs = Q.sample(xs, ys, 1, generator)
    y_hats = P.sample(xs, zs, 1, generator)
    logq = Q.logp(xs, zs, y_hats).cpu()
    # Like Phase I, without pairs in which nothing changes
    changed = [i for i in range(n) if xs[i] != ys[i]]
    eq3 = mi_bounds.barber_agakov_from_samples(logq[changed] if changed else logq)
    found = {
        "eq3": eq3.mean,
        "eq3_standard_error": eq3.standard_error,
        "eq5_reward": P.logp(xs, zs, ys).mean().item(),
    }
    return {"bounds": found, "collapse": mi_bounds.collapse(zs, true)}


def hardware(device):
    """The hardware of the run, in words."""
    many = f"{parallel.world()} processes, " if parallel.world() > 1 else ""
    if device.type == "cuda":
        return many + torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    return f"{many}{name} CPU, {torch.get_num_threads()} threads"


def sizes(net):
    """Parameters of a model and the peak of memory, in MB."""
    peak_gpu = None
    if net.device.type == "cuda":
        peak_gpu = torch.cuda.max_memory_allocated() / 2**20
    return {
        "parameters": net.num_parameters(),
        "peak_rss_mb": peak_rss_mb(),
        "peak_gpu_mb": peak_gpu,
    }


def peak_rss_mb():
    """The most memory that the process held; None if the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    units_a_mb = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units_a_mb
