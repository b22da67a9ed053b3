"""SWIRL, Algorithm 1, straight down the page: warm up on labels, then Phase I and Phase II in turn on state-only pairs.

    python train.py                                 the tools world, a tiny model from scratch, ten minutes of a laptop
    python train.py --env physics --seed 1
    python train.py --data transitions.jsonl.gz     your own (x, z, y); half of the training episodes lose their z
    torchrun --nproc-per-node 4 train.py --shard    four GPUs, or four processes on the CPU (`parallel.py`)

Splits are by episode. Half of the training episodes keep their actions (warm-up, and `--replay` rows in the phases), the
other half, of pixels five times as many, lose them for good: GRPO gets their pairs (x, y) and nothing else. Test episodes are apart. The same command
again resumes an unfinished run.

Departures from the paper: the models are tiny and start from random weights with an induction head written in
(`tiny.write_induction_head`), in place of pretraining; their warm-up has weight decay and keeps a running mean of the weights;
labelled rows are replayed in the phases; Phase I is 250 steps (of pixels 300) and Phase II 60, not an epoch over 30k pairs;
a phase that validates clearly worse than its start, on labelled rows, is undone. See `swirl_fwm.py`,
`swirl_idm.py`, `grpo.py` for the rest.
"""
import platform
import random
import sys
import time
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import adapters
import grpo
import lm
import mi_bounds
import parallel
import pictures
import pretrained
import rundir
import sft
import swirl_fwm
import swirl_idm
import tiny
from envs import codebook, images, load_splits, pixels, records, test_episodes
from evals import metrics, rollout
from settings import WARMUPS, parse

# --- data ---------------------------------------------------------------------------------------------------------------

def load_models(cfg, labelled, state_only):
    """(P, Q, tok). Tiny models get a tokenizer fitted on the run's own training text; images add their codes to any."""
    states = [s for x, _, y in labelled for s in (x, y)] + [s for pair in state_only for s in pair]
    book = codebook(cfg)
    added = images.vocabulary(states, book.size if book else 0)
    if added and (cfg.lora or cfg.max_state):
        rundir.fail("leave out --lora, which cannot learn the tokens of images, new to every model, and --max-state, which would cut images")
    if cfg.model != "tiny":
        try:
            P, tok = pretrained.load(cfg.model, torch.bfloat16 if cfg.lora and lm.HALF else torch.float32)   # a base does not learn
            P, Q = adapters.pair(P, cfg.lora) if cfg.lora else (P, lm.freeze(P).requires_grad_())
            lm.score(P, [[0, 0]], [[0]])                              # says now if its layers cannot do what `lm` does with them
        except Exception as e:                                        # whatever a damaged file or template makes the loaders raise
            rundir.fail(f"--model {cfg.model}: {str(e).partition(chr(10))[0]}; give tiny, smollm2, a Hub id, a folder with safetensors "
                        "or a .gguf file")
        if tok.eos_token_id is None:
            rundir.fail(f"--model {cfg.model}: its tokenizer has no end token; give a causal language model")
        if tok.add_tokens(added):
            for model in (P, Q):
                model.resize_token_embeddings(max(len(tok), model.config.vocab_size))
        return P, Q, tok
    tok = tiny.make_tokenizer(["\n" + s for s in states if not added] + [" " + z for _, z, _ in labelled]
                              + ["\n- \n+ \nnext:\naction: " + swirl_idm.IMPOSSIBLE] * 100)
    tok.add_tokens(added)
    P, Q = tiny.make_model(tok, seed=cfg.seed, induction=not added), tiny.make_model(tok, seed=cfg.seed)      # of texts one start, as in the paper
    if added:
        codes, places = (tok.convert_tokens_to_ids([token for token in added if mark in token]) for mark in ("<c", ","))
        looks = torch.tensor(book.features()) if hasattr(book, "features") else None
        seen, _ = (tiny.embed_images(model, codes, places, looks) for model in (P, Q))
        tiny.write_copy_heads(P, seen, len(lm.encode(tok, "\n" + states[0])))
    if cfg.lora:
        P, Q = adapters.pair(P, cfg.lora)
    return P, Q, tok


def restrict(P, Q, tok, x):
    """Of images P may draw codes alone, as many as x has, and Q words alone (`lm.restrict`)."""
    if images.is_image(x):
        P.allowed, Q.allowed = swirl_fwm.codes_only(P, tok, x).to(P.device), swirl_idm.words_only(Q, tok).to(Q.device)


# --- evaluation ---------------------------------------------------------------------------------------------------------

def evaluate_P(P, tok, data, longest):
    """(scores as `fwm` in results.json, y_hat): greedy futures of held-out (x, z, y)."""
    xs, zs, ys = map(list, zip(*data))
    y_hat = parallel.divide(lambda xs, zs: swirl_fwm.predict(P, tok, xs, zs, longest), xs, zs)
    logp = parallel.divide(lambda *rows: swirl_fwm.logp(P, tok, *rows).tolist(), xs, zs, ys)
    return metrics.fwm_scores(xs, y_hat, ys, logp), y_hat


def evaluate_Q(Q, tok, data, longest, view):
    """(scores as `idm` in results.json, z_hat), likewise."""
    xs, zs, ys = map(list, zip(*data))
    z_hat = parallel.divide(lambda xs, ys: swirl_idm.predict(Q, tok, xs, ys, longest, view), xs, ys)
    logp = parallel.divide(lambda *rows: swirl_idm.logp(Q, tok, *rows, view).tolist(), xs, zs, ys)
    return metrics.idm_scores(z_hat, zs, logp), z_hat


def roll_out(P, tok, steps, longest, run, book):
    """What P makes of the windows `steps` when it reads its own output: {"rollout": the scores of T = 1..6, ..} ({} without windows)."""
    if not steps:
        return {}
    y_hat = rollout.rollout(lambda xs, zs: parallel.divide(lambda *rows: swirl_fwm.predict(P, tok, *rows, longest), xs, zs), steps, 6)
    if book:
        first = [[window[0][0], *(y for _, _, y in window)] for window in steps[:3]]
        rows = [([z for _, z, _ in window], images.frames(book, truth), images.frames(book, [row[i] for row in y_hat]))
                for i, (window, truth) in enumerate(zip(steps, first))]
        run.picture(pictures.rollouts, "rollout.png", rows)
        run.picture(pictures.animation, "rollout.gif", [rows[0][1][0], *rows[0][2]])
    scores = rollout.score(y_hat, steps)
    return {"rollout": [step["score"] for step in scores], "rollout_exact": [step["exact"] for step in scores],
            "rollout_changed": [step["changed"] for step in scores]}


def look(run, book, name, data, y_hat):
    """Draw some predictions of frames; {"kinds": scores by kind of sentence, and of the kinds of motion together}."""
    xs, zs, ys = map(list, zip(*data))
    some = [i for i in range(len(data)) if xs[i] != ys[i]][:6]
    x, y, predicted = (images.frames(book, [states[i] for i in some]) for states in (xs, ys, y_hat))
    run.picture(pictures.predictions, f"picture-{name.replace('/', '-')}.png", list(zip(x, [zs[i] for i in some], y, predicted)))
    kinds = [pixels.kind(z) for z in zs]
    return {"kinds": metrics.by_group(kinds, xs, y_hat, ys) | metrics.by_group(
        ["motion" if kind in pixels.MOTION else "edits" for kind in kinds], xs, y_hat, ys)}


def best_of_8(P, Q, tok, data, cfg, limits):
    """Test-time verification with the warm-up's models, in both directions."""
    xs, zs, ys = map(list, zip(*data))
    gen = torch.Generator(P.device).manual_seed(cfg.seed + parallel.rank())
    y_hat = parallel.divide(lambda xs, zs: swirl_fwm.best_of_n(P, Q, tok, xs, zs, limits[0], cfg.view, 8, gen), xs, zs)
    z_hat = parallel.divide(lambda xs, ys: swirl_idm.best_of_n(Q, P, tok, xs, ys, limits[1], cfg.view, 8, gen), xs, ys)
    return {"fwm": metrics.fwm_scores(xs, y_hat, ys), "idm": metrics.idm_scores(z_hat, zs)}


# --- the job ------------------------------------------------------------------------------------------------------------

def train(cfg):
    started = time.time()
    if not cfg.fresh and (Path(cfg.out) / "results.json").is_file():
        return rundir.report(rundir.Run(cfg, started).load("results.json"))
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    check_processes(cfg, device)
    torch.manual_seed(cfg.seed)
    set_precision(cfg, device)
    labelled, validation, state_only, test = load_splits(cfg)
    P, Q, tok = load_models(cfg, labelled, state_only)
    labelled, validation, state_only, test = shorten(tok, (labelled, validation, state_only, test), cfg.max_state)
    limits = check_data(P, tok, labelled, validation, state_only, test, cfg)
    test = affordable(tok, test)
    run = rundir.Run(cfg, started)                                    # nothing is written before the input has been checked
    if run.progress["folder"]:
        last = run.dir / run.progress["folder"]
        folders = [last / side if (last / side).exists() else run.dir / side for side in ("fwm", "idm")]
        if cfg.lora:
            P.load(folders[0]), Q.load(folders[1])                    # on the base that load_models has loaded anew
        else:
            (P, tok), (Q, _) = map(pretrained.load, folders)
        print(f"resuming after {run.progress['stages'][-1]['name']}")
    P, Q = P.to(device), Q.to(device)
    if cfg.shard:
        P, Q = parallel.shard(P), parallel.shard(Q)
    restrict(P, Q, tok, labelled[0][0])
    budget = cfg.minutes * 54 if cfg.minutes else float("inf")         # the rest: installing, what cannot be planned
    print(f"SWIRL on {cfg.data or cfg.env}: {len(labelled)} labelled, {len(validation)} validation, {len(state_only)} "
          f"state-only, {len(test)} test transitions; {P.num_parameters()/1e6:.2f}M parameters a model; "
          f"{run.dir}" + (f"; plans to end within {cfg.minutes:g} minutes" if cfg.minutes else ""))

    book = codebook(cfg)                                               # None for text
    if book and not cfg.vq and parallel.rank() == 0:
        with records.whole(run.dir / "codebook.npz") as file:
            book.save(file)
    windows = []                                                       # of frames most; of a real model on texts none, evals/rollout.py makes them: T decodings one after the other
    if book or cfg.model == "tiny":
        windows = rollout.windows(shorten(tok, test_episodes(cfg), cfg.max_state), 6, every=1)[:max(4, len(test) * 2 // 3 if book else len(test) // 10)]
    held_out = {}                                                      # side: (its scores, its predictions), until it moves

    def stage_ends(name, since, what):
        run.spend(what, since)
        since = time.time()
        if what != "phase2" or "fwm" not in held_out:
            held_out["fwm"] = evaluate_P(P, tok, test, limits[0])
            held_out["fwm"][0].update(roll_out(P, tok, windows, limits[0], run, book))
            if book:
                held_out["fwm"][0].update(look(run, book, name, test, held_out["fwm"][1]))
        if what != "phase1" or "idm" not in held_out:
            held_out["idm"] = evaluate_Q(Q, tok, test, limits[1], cfg.view)
        scores = {side: score for side, (score, _) in held_out.items()}
        samples = [dict(x=x, z=z, y=y, y_hat=y_hat, z_hat=z_hat) for (x, z, y), y_hat, z_hat in
                   zip(test, held_out["fwm"][1], held_out["idm"][1])]
        few = samples[:20]
        R = swirl_idm.logp(Q, tok, *([s[k] for s in few] for k in ("x", "z", "y_hat")), cfg.view)    # log Q(z | x, y_hat)
        for s, r in zip(few, R.tolist()):
            run.log("samples.jsonl", stage=name, **s, reward=r)
        iteration = 0 if name == "sft" else int(name.removeprefix("iteration").split("/")[0])
        run.log("metrics.jsonl", phase="eval", stage=name, iteration=iteration, step=0, seconds=run.elapsed(), **scores)
        print(f"{name}: {rundir.show(scores)}  [{run.elapsed()/60:.1f} min]\n{rundir.show_sample(samples[0])}", flush=True)
        run.spend("eval", since)
        run.progress["eval_seconds"] = max(run.progress["eval_seconds"], time.time() - since)      # of both sides
        run.finish_stage(name, scores, P, Q, tok)

    # Warm-up: SFT of both directions on the labelled half
    rows_Q = swirl_idm.warmup_rows(tok, labelled, cfg.view, cfg.spoiled, random.Random(cfg.seed))
    rows_P = [(swirl_fwm.prompt(tok, x, z), swirl_fwm.target(tok, y)) for x, z, y in labelled]
    xs, zs, ys = map(list, zip(*validation))
    validate_P = lambda P: metrics.exact(parallel.divide(lambda *rows: swirl_fwm.predict(P, tok, *rows, limits[0]), xs, zs), ys)
    validate_Q = lambda Q: metrics.exact(parallel.divide(
        lambda *rows: swirl_idm.predict(Q, tok, *rows, limits[1], cfg.view), xs, ys), zs)
    if not run.done("sft"):
        since = time.time()
        sft.warm_up(Q, "IDM", rows_Q, cfg.warmup_batch_idm, cfg.warmup_decay_idm, validate_Q, cfg, run, cfg.share_idm * budget)
        sft.warm_up(P, "FWM", rows_P, cfg.warmup_batch, cfg.warmup_decay, validate_P, cfg, run, (WARMUPS - cfg.share_idm) * budget)
        stage_ends("sft", since, "warmup")
    if "best_of_8" not in run.progress["baselines"]:
        since = time.time()
        part = parallel.agree(min(1, 0.02 * budget / run.progress["eval_seconds"]))              # sampling 8 is dear
        few = test[:max(10, int(len(test) * part))]
        run.progress["baselines"] = {"copy_x": metrics.copy_x([x for x, _, _ in test], [y for _, _, y in test]),
                                     "best_of_8": best_of_8(P, Q, tok, few, cfg, limits)}
        run.spend("eval", since)
        run.save_progress()

    # Algorithm 1
    reward = dict(view=cfg.view, form=cfg.reward_form, floor=cfg.floor)
    for i in range(1, cfg.iterations + 1):
        left = 2 * (cfg.iterations - i) + 2                                        # phases to come
        # Phase I: theta moves, phi is frozen (Eq. 3, Theorem 3.1)
        if not run.done(f"iteration{i}/phase1"):
            since = time.time()
            settings = phase_settings(cfg, cfg.beta_fwm, cfg.lr_fwm, cfg.temperature_fwm, limits[0], cfg.min_p_fwm)
            pairs = [(x, y) for x, y in state_only if x != y or not cfg.skip_unchanged]
            phase(run, cfg, f"iteration{i}/phase1", P, Q, validate_P, pairs, rows_P, settings, cfg.phase1_steps,
                  time_share(run, budget, left), lambda ref, opt, pairs, gen, replay: swirl_fwm.phase1_step(
                      P, Q, ref, opt, tok, pairs, settings, **reward, max_z=limits[1], generator=gen, replay=replay, take=cfg.batch), pool=cfg.pool)
            stage_ends(f"iteration{i}/phase1", since, "phase1")
        # Phase II: phi moves, theta is frozen (Eq. 5, Theorem 3.2)
        if not run.done(f"iteration{i}/phase2"):
            since = time.time()
            settings = phase_settings(cfg, cfg.beta, cfg.lr_idm, cfg.temperature, limits[1])
            phase(run, cfg, f"iteration{i}/phase2", Q, P, validate_Q, state_only, rows_Q, settings, cfg.phase2_steps,
                  time_share(run, budget, left - 1), lambda ref, opt, pairs, gen, replay: swirl_idm.phase2_step(
                      Q, P, ref, opt, tok, pairs, settings, **reward, generator=gen, replay=replay))
            stage_ends(f"iteration{i}/phase2", since, "phase2")
    if parallel.rank():
        return 0
    return finish(run, cfg, P, Q, tok, state_only, labelled, test, limits, device)


def shorten(tok, splits, longest):
    """The splits with `pretrained.shorten` applied to every state; says how many it cut."""
    if not longest:
        return splits
    states = {s for rows in splits for row in rows for s in (row[0], row[-1])}
    short = {s: pretrained.shorten(tok, s, longest) for s in states}
    cut = sum(short[s] != s for s in states)
    if cut:
        lost = sum(row[0] != row[-1] and short[row[0]] == short[row[-1]] for rows in splits for row in rows)
        print(f"{cut} of {len(states)} states have more than {longest} tokens: the middle of each is left out (--max-state), and with it "
              f"all that changes in {lost} of {sum(map(len, splits))} transitions")
    return tuple([(short[row[0]], *row[1:-1], short[row[-1]]) for row in rows] for rows in splits)


def set_precision(cfg, device):
    lm.TOKENS, lm.HALF = cfg.tokens, cfg.dtype == "bfloat16" or (
        cfg.dtype == "auto" and cfg.model != "tiny" and device == "cuda" and torch.cuda.is_bf16_supported())


def check_processes(cfg, device):
    """Fails if torchrun started more processes than there are GPUs or rows of a batch."""
    world = parallel.world()
    if device == "cuda" and parallel.too_many():
        rundir.fail(f"more processes than GPUs ({torch.cuda.device_count()}) on a machine; give torchrun fewer, or --device cpu")
    if cfg.shard and cfg.lora:
        rundir.fail("--shard and --lora exclude each other: an adapter is small; give one of the two")
    if cfg.shard and world == 1:
        rundir.fail("--shard needs several processes: torchrun --nproc-per-node N train.py --shard ...")
    for name in ("batch", "warmup_batch", "warmup_batch_idm"):
        if getattr(cfg, name) < world:
            rundir.fail(f"--{name.replace('_', '-')} {getattr(cfg, name)} cannot be divided among {world} processes; "
                        f"give at least {world}, or start fewer")


def affordable(tok, test):
    """The first of the test transitions: as many as hold 30,000 tokens of y, to be decoded at every evaluation; at least 20."""
    return test[:max(20, 30000 * len(test) // sum(len(lm.encode(tok, "\n" + y)) for _, _, y in test))]


def check_data(P, tok, labelled, validation, state_only, test, cfg):
    """(longest y, longest z) to sample, in tokens: the longest in training and a margin (images are of one size). Fails if a split is empty or a
    prompt and its completion do not fit the model."""
    name, few = cfg.data or cfg.env, "no" if parallel.world() == 1 else f"fewer than {parallel.world()} (one a process)"
    for what, rows in (("labelled", labelled), ("validation", validation), ("state-only", state_only), ("test", test)):
        if sum(row[0] != row[-1] for row in rows) < parallel.world():
            rundir.fail(f"{name}: {few} {what} transition with y != x; give more episodes")
    longest_z = lambda rows: max(len(lm.encode(tok, " " + z)) for _, z, _ in rows) + 8
    frame = len(pretrained.frame(tok).head) + len(pretrained.frame(tok).tail) + 16
    n = {s: len(lm.encode(tok, "\n" + s)) for rows in (labelled, validation, state_only, test) for row in rows
         for s in (row[0], row[-1])}
    shown = [images.patches(s) or [] for s in n if images.is_image(s)]
    if shown and (not all(shown) or len({len(patches) for patches in shown}) > 1 or len(shown) < len(n) or not set().union(*shown) <= set(tok.get_added_vocab())):
        rundir.fail(f"{name}: where a state is an image, all are: {images.spell([['0', '1'], ['2', '3']])}, rows as long as columns, all of one "
                    "size, every code seen in training")
    y = max(n[s] for rows in (labelled, state_only) for row in rows for s in (row[0], row[-1])) + (1 if shown else 16)      # an image's end
    longest = max(n, key=n.get)
    marks = 6 * (1 + longest.count("\n")) + longest.count("<c") if cfg.view == "diff" else 0     # what Q reads beside codes and lines
    if n[longest] + max(y, n[longest]) + marks + 2 * longest_z(labelled + validation + test) + frame > pretrained.context(P):
        rundir.fail(f"{name}: a state of {n[longest]} tokens ({longest[:40]!r}...) is longer than the model takes "
             f"({pretrained.context(P)} tokens for x, z and y together); give --max-state, shorten the states or choose another --model")
    lost = sum(swirl_fwm.read(tok, swirl_fwm.target(tok, s)) != s for s in n)
    if lost:
        print(f"warning: {name}: the tokenizer does not give {lost} of {len(n)} states back as they are; P cannot predict these exactly")
    return y, longest_z(labelled)


def time_share(run, budget, phases_left):
    """Seconds that the next phase may take: what is left after what comes at its end and at the run's, reckoned in evaluations of
    both sides (.8 a phase: of one side, and two validations; .5 for the bounds), Phase I taking four times Phase II's share
    (its rollouts are whole states)."""
    left = max(2.0, budget - run.elapsed() - run.progress["eval_seconds"] * (0.8 * phases_left + 0.5))
    return left * (4 if phases_left % 2 == 0 else 1) / (5 * ((phases_left + 1) // 2) - (4 if phases_left % 2 else 0))


def phase_settings(cfg, beta, lr, temperature, max_new, min_p=0.0):
    return grpo.GRPO(group_size=cfg.group_size, max_new=max_new, temperature=temperature, min_p=min_p, top_p=cfg.top_p,
                     top_k=cfg.top_k, scale=cfg.scale, beta=beta, kl=cfg.kl, updates=cfg.updates, clip=cfg.clip, lr=lr)


def phase(run, cfg, name, policy, frozen, validate, pairs, rows, settings, steps, seconds, take_step, pool=1):
    """`steps` GRPO steps of `policy` against `frozen`, or as many as `seconds` hold, each given `--batch` times `pool` pairs; labelled `rows`
    are replayed in each.
    A phase that lowers the validation score by more than `cfg.undo` is undone (`--undo 1`: never, as in the paper)."""
    begin, rng = time.time(), random.Random(f"{cfg.seed} {name}")
    batch = sft.batches(pairs, cfg.batch * pool, rng)
    gen = torch.Generator(policy.device).manual_seed(rng.randrange(2**31) + parallel.rank())
    ref, optimizers = lm.freeze(policy), lm.make_optimizers(policy, settings.lr, muon=False)   # the reference: pi at the start
    before = [p.detach().to("cpu", copy=True) for p in frozen.parameters()]        # the device has no room for it
    iteration, kind = name.removeprefix("iteration").split("/")
    bar = tqdm(range(1, steps + 1), desc=name, leave=False, disable=parallel.rank() > 0 or None)
    checked, kl, peak, side = False, 0.0, settings.lr, "fwm" if kind == "phase1" else "idm"
    heldout = f"{run.progress['stages'][-1][side]['exact']:.3f}"                   # at the last evaluation

    def replay():                                                                  # mean of -log pi(row | prompt)
        chosen = parallel.share(rng.choices(rows, k=cfg.replay))
        if not chosen:                                                             # fewer rows than processes
            return torch.zeros((), requires_grad=True)
        prompts, targets = zip(*chosen)
        return -lm.logprobs(policy, prompts, targets, range(len(chosen))).sum() / cfg.replay

    for step in bar:
        if parallel.agree(step > 1 and time.time() - begin > seconds * (step - 1) / step):     # the next one would not fit
            step -= 1
            break
        part, since = parallel.share(next(batch)), time.time()
        late = parallel.agree(0 if step == 1 else max((step - 1) / steps, min(1.0, (since - begin) / seconds)))
        settings.lr = peak * min(1, step / 10) * (1 - late)
        need_ref = settings.beta or step % 10 == 1                                 # without beta the KL is only logged
        log, examples = take_step(ref if need_ref else None, optimizers, part, gen, replay if cfg.replay else None)
        if log is None:                                                            # Q read no action: nothing to learn
            run.log("metrics.jsonl", phase=kind, iteration=int(iteration), step=step, seconds=run.elapsed(), reward=None)
            continue
        if not checked and not log["gap"] < (2.0 if lm.HALF else 1e-3) + settings.min_p and settings.top_p == 1 and settings.top_k == 0:
            raise RuntimeError(f"sampler and trainer disagree by {log['gap']} nats a token")
        checked = checked or log["gap"] > 0                                        # 0: no rollout had an advantage
        kl = kl if log["kl"] is None else log["kl"]
        log["tokens_per_second"] = log.pop("tokens") / (time.time() - since)
        run.log("metrics.jsonl", phase=kind, iteration=int(iteration), step=step, seconds=run.elapsed(), **log)
        bar.set_postfix(reward=f"{log['reward']:.3f}", kl=f"{kl:.3f}", heldout=heldout)
    bar.close()
    for example in examples:
        run.log("samples.jsonl", stage=name, **example)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(before, frozen.parameters())), "the frozen model moved"
    was, now = validate(ref), validate(policy)
    undone = now < was - cfg.undo
    if undone:
        parallel.load(policy, ref.state_dict())
    run.log("metrics.jsonl", phase="eval", stage=name, iteration=int(iteration), step=step, seconds=run.elapsed(),
            validation_start=was, validation_end=now, undone=undone)
    print(f"  {name}: {step} steps" + (f" (planned {steps}, the budget held {step})" if step < steps else "")
          + f", {kind[-1] == '1' and 'Q' or 'P'} frozen and unchanged; validation {was:.3f} to {now:.3f}"
          + (", undone" if undone else ""))


# --- the end ------------------------------------------------------------------------------------------------------------

def finish(run, cfg, P, Q, tok, state_only, labelled, test, limits, device):
    gen = torch.Generator(Q.device).manual_seed(cfg.seed)
    rng, n = random.Random(cfg.seed), min(256, max(20, len(test) // 2), len(state_only), len(labelled))   # half an evaluation, as `time_share` plans
    some, true = rng.sample(state_only, n), [z for _, z, _ in rng.sample(labelled, n)]
    z_hat = [swirl_idm.read(tok, row) for row in lm.sample_all(
        Q, [swirl_idm.prompt(tok, x, y, cfg.view) for x, y in some], 1, limits[1], tok.eos_token_id, gen)]
    xs, ys = map(list, zip(*some))
    y_hat = swirl_fwm.futures(P, tok, xs, z_hat, 1, limits[0], gen)
    logq = swirl_idm.logp(Q, tok, xs, z_hat, y_hat, cfg.view).cpu()
    trained = [i for i in range(n) if xs[i] != ys[i] and z_hat[i] != swirl_idm.IMPOSSIBLE] or list(range(n))   # as Phase I may take
    eq3 = mi_bounds.barber_agakov_from_samples(logq[trained])
    progress, seconds = run.progress, run.progress["seconds"]
    results = {
        "version": 1, "env": cfg.data or cfg.env, "model": cfg.model, "seed": cfg.seed,
        "hardware": (f"{parallel.world()} processes, " if parallel.world() > 1 else "") + (
            torch.cuda.get_device_name() if device == "cuda" else
            f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"),
        "seconds": {"total": run.elapsed()} | {k: seconds.get(k, 0.0) for k in ("warmup", "phase1", "phase2", "eval")},
        "splits": {"labelled": len(labelled), "state_only": len(state_only), "test": len(test)},
        "baselines": progress["baselines"],
        "stages": progress["stages"] + [progress["stages"][-1] | {"name": "swirl"}],
        "bounds": {"eq3": eq3.mean, "eq3_standard_error": eq3.standard_error,      # E log Q(z|x,y_hat), no floor, and
                   "eq5_reward": swirl_fwm.logp(P, tok, xs, z_hat, ys).mean().item()},   # E log P(y|x,z), in nats
        "collapse": mi_bounds.collapse(z_hat, true),
        "presets": {"bleu": "mirrorapi (characters, method3, mean)", "rouge_l": "rouge_score, no stemmer"},
        "sizes": {"parameters": P.num_parameters(), "peak_rss_mb": rundir.peak_rss_mb(),
                  "peak_gpu_mb": torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None}}
    run.finish(results)
    return rundir.report(results)


def main(argv=None):
    parallel.start()
    cfg = parse(argv)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
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
