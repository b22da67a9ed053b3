"""What one GRPO step costs: ours, TRL's GRPOTrainer and a plain Hugging Face loop, on the same
work, in one run.

    python bench.py                  every case, then cost against G and against P
    python bench.py --cases P128-T32-G8 --repeats 3 --json bench.json --picture bench.png

A step samples G rollouts y_hat of T tokens for each of B prompts of P tokens, rewards them by log
Q(z | x, y_hat) under a frozen opposite (z: 8 tokens), scores them under the reference, and takes
one AdamW step on sum(-A ratio + .1 k3). Each contestant has a process of its own, so that its peak
memory is its own, and they take turns, one step each: what disturbs the machine disturbs all three.
A ratio is theirs / ours of the least CPU time over all threads; above 1, ours is faster.

What is not equal
1. Every rollout has T tokens, so ours cannot drop finished rows; random models repeat nothing, so
   no rollout is scored once for several. Both save time in training.
2. TRL also computes the entropy, logs metrics, decodes the text, and on a CPU puts every position,
   not only the scored ones, through the head (on CUDA it does not). `pip install trl` is optional;
   without it its column is empty.
3. Ours and the plain loop sum over tokens and divide by B*G; TRL's "dr_grpo" also divides by T: a
   smaller gradient, which the clip at norm 1 notices and AdamW does not.
4. All run on the CPU, in float32.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import grpo
import lm
from envs import records
from models import batches, optim

# name: (B, P, T, G, width, layers, V). Tools and pixels are the project's own: a step of the tools
# world, and of images of 128 codes. With gqa, heads share keys as in real models (16 on 2)
CASES = {
    "P128-T32-G8": (4, 128, 32, 8, 256, 4, 2048), "P272-T16-G8": (4, 272, 16, 8, 256, 4, 2048),
    "P32-T48-G8": (4, 32, 48, 8, 256, 4, 2048), "tools-P40-T41-G16": (8, 40, 41, 16, 128, 4, 671),
    "pixels-P144-T128-G8": (4, 144, 128, 8, 128, 4, 1024),
    "P128-T32-G8-gqa": (4, 128, 32, 8, 512, 4, 2048),
    "P272-T64-G8-gqa": (4, 272, 64, 8, 512, 4, 2048)}
Z, BETA, LR, EOS = 8, 0.1, 1e-4, 0


def make_model(width, layers, V, seed=0, kv_heads=None):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            num_key_value_heads=kv_heads or width // 32,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=EOS,
        )
    ).eval()


def make_work(B, P, V):
    """(prompts (B lists of P ids), z (Z ids)), none of them the end."""
    ids = torch.randint(1, V, (B * P + Z,), generator=torch.Generator().manual_seed(1)).tolist()
    return [ids[b * P:(b + 1) * P] for b in range(B)], ids[B * P:]


# --- the contestants: each returns a function that takes one step ---------------------------------

def ours(policy, ref, Q, prompts, z, T, G):
    """Ours. No token ends a row, so that each holds T tokens."""
    options = lm.Options(eos=-1)
    P, pi_ref, gen = Net(policy), Net(ref), torch.Generator().manual_seed(0)
    optimizers = optim.make_optimizers(policy, LR, muon=False)
    phase = grpo.Phase(group_size=G, beta=BETA, kl="loss")

    def step():
        rows, logps = lm.sample(policy, prompts, G, T, options, gen)
        rollouts = grpo.Rollouts(prompts, rows, logps, options)
        asked = [[*prompt, *row] for prompt, row in zip(batches.repeat(prompts, G), rows)]
        shared = [len(prompt) for prompt in batches.repeat(prompts, G)]
        R = lm.score(Q, asked, [z] * len(rows), options, shared)
        grpo.step(P, pi_ref, optimizers, rollouts, R.view(-1, G), phase, LR)

    return step


class Net:
    """What `grpo.step` and `lm.frozen` use of an FWM."""

    def __init__(self, net):
        self.net, self.options = net, lm.Options(eos=-1)


def plain(policy, ref, Q, prompts, z, T, G):
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.0, fused=True)
    ids, B = torch.tensor(prompts), len(prompts)                                   # (B, P)

    def step():
        with torch.no_grad():
            rows = policy.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                # (B*G, P+T)
                min_new_tokens=T,
                max_new_tokens=T,
                num_return_sequences=G,
            )
            R = (
                token_logps(
                    Q, torch.cat([rows, torch.tensor([z]).expand(len(rows), -1)], 1), len(z)
                )
                .sum(1)
                .view(B, G)
            )
            logp_ref = token_logps(ref, rows, T)                                   # (B*G, T)
        logp, A = token_logps(policy, rows, T), (R - R.mean(1, keepdim=True)).view(-1, 1)
        loss = -(logp - logp.detach()).exp() * A + BETA * (
            (logp_ref - logp).exp() - 1 - (logp_ref - logp)
        )
        (loss.sum() / (B * G)).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def token_logps(model, rows, n):
    """(N, n) log-probs of the last n ids of rows (N, L), by one whole forward pass."""
    logits = model(rows, attention_mask=torch.ones_like(rows), logits_to_keep=n + 1).logits[:, :-1]
    return -F.cross_entropy(logits.flatten(0, 1), rows[:, -n:].flatten(), reduction="none").view(
        -1, n
    )


def train_trl(policy, Q, prompts, z, T, G, folder, around):
    """TRL takes its steps by itself: `begin` and `end` are called around each."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    words = Tokenizer(
        models.WordLevel({f"w{i}": i for i in range(policy.config.vocab_size)}, unk_token="w0")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0")

    def reward(prompts, completion_ids, **_):
        rows = torch.tensor([tok(x)["input_ids"] + y + z for x, y in zip(prompts, completion_ids)])
        with torch.no_grad():
            return token_logps(Q, rows, len(z)).sum(1).tolist()

    begin, end = around

    class Turn(TrainerCallback):
        def on_step_begin(self, *_, **__):
            begin()

        def on_step_end(self, *_, **__):
            end()

    args = GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=len(prompts) * G,
        gradient_accumulation_steps=1,
        num_generations=G,
        max_steps=10**6,
        max_completion_length=T,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        beta=BETA,
        scale_rewards="none",
        loss_type="dr_grpo",
        use_bias_correction_kl=False,
        learning_rate=LR,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        shuffle_dataset=False,
        generation_kwargs={"min_new_tokens": T},
    )
    data = Dataset.from_dict({"prompt": [" ".join(f"w{i}" for i in p) for p in prompts]})
    GRPOTrainer(
        model=policy,
        reward_funcs=reward,
        args=args,
        train_dataset=data,
        processing_class=tok,
        callbacks=[Turn()],
    ).train()


# --- a contestant in a process of its own ---------------------------------------------------------

def memory(what):
    """MB of this process: "VmRSS" now, "VmHWM" the peak. 0 where /proc is not there (macOS,
    Windows)."""
    status = Path("/proc/self/status")
    return (
        next(
            (
                int(line.split()[1]) / 1024
                for line in status.read_text().splitlines()
                if line.startswith(what)
            ),
            0.0,
        )
        if status.exists()
        else 0.0
    )


def worker(name, case, folder):
    """Take a step for every line on standard input, and answer it with what the step cost, as a
    line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    # what libraries print goes elsewhere
    os.dup2(2, 1)
    B, P, T, G, _, _, V = CASES[case]
    # a copy: in memory, not in a mapped file
    load = lambda: lm.frozen(
        Net(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32))
    ).net
    policy, Q, (prompts, z), start = load().requires_grad_(), load(), make_work(B, P, V), {}

    def begin():
        if not sys.stdin.readline():
            os._exit(0)
        # all models loaded, nothing done yet
        start.setdefault("memory", memory("VmRSS"))
        if Path("/proc/self/clear_refs").exists():
            # the peak starts anew
            Path("/proc/self/clear_refs").write_text("5")
        start.update(cpu=time.process_time(), wall=time.perf_counter())

    def end():
        print(
            json.dumps(
                {
                    "cpu": time.process_time() - start["cpu"],
                    "wall": time.perf_counter() - start["wall"],
                    "peak": memory("VmHWM") - start["memory"],
                }
            ),
            file=answers,
            flush=True,
        )

    # it reads its reference from the folder
    if name == "trl":
        return train_trl(policy, Q, prompts, z, T, G, folder, (begin, end))
    step = {"ours": ours, "plain": plain}[name](policy, load(), Q, prompts, z, T, G)
    while True:
        begin()
        step()
        end()


def race(case, names, repeats):
    """{name: C} as in the JSON file: `repeats` steps of each contestant, in turns, after one that
    does not count."""
    with tempfile.TemporaryDirectory() as folder:
        kv_heads = 2 if "gqa" in case else None
        make_model(*CASES[case][4:], kv_heads=kv_heads).save_pretrained(folder)
        run = {
            name: subprocess.Popen(
                [sys.executable, __file__, "--worker", name, case, folder],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=open(Path(folder) / name, "w"),
                text=True,
            )
            for name in names
        }
        costs = {name: [] for name in names}
        for turn in range(repeats + 1):
            for name in names:
                run[name].stdin.write("go\n")
                run[name].stdin.flush()
                answer = run[name].stdout.readline()
                if not answer:
                    sys.exit(
                        f"error: {name} stopped in {case}: "
                        + (Path(folder) / name).read_text()[-2000:]
                    )
                if turn:
                    costs[name].append(json.loads(answer))
        for process in run.values():
            process.stdin.close()
            process.wait()
    return {
        name: {
            f"{kind}_s_{how.__name__}": how(c[kind] for c in cost)
            for kind in ("cpu", "wall")
            for how in (min, statistics.median)
        }
        | {"peak_mb_above_models": max(c["peak"] for c in cost)}
        for name, cost in costs.items()
    }


# --- what the machine gives, and how cost grows ---------------------------------------------------

def gemm(n=1024, repeats=10):
    """float32 operations of an n x n matrix product a second of wall time, and a second of CPU
    time: the best of some."""
    a, b, costs = torch.randn(n, n), torch.randn(n, n), []
    for _ in range(repeats):
        begin = time.perf_counter(), time.process_time()
        a @ b
        costs.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    return tuple(2 * n**3 / min(cost) for cost in zip(*costs))


def forward_flop(B, P, T, N, width, layers, V, scored):
    """Float operations of a forward pass with nothing computed twice: B prefixes of P tokens, N
    rows of T, attention to what lies before, the head on `scored` tokens. (A layer of `make_model`
    holds 13 width^2 weights in matrices.)"""
    # pairs of positions
    attended = B * P * P / 2 + N * T * (P + T / 2)
    return (
        2 * 13 * width**2 * layers * (B * P + N * T)
        + 4 * width * layers * attended
        + 2 * width * V * scored
    )


def step_flop(B, P, T, G, width, layers, V):
    """Those of a whole step: sample, reference and update (forward 1, backward 2) see the same
    tokens; the reward Z more."""
    N = B * G
    return 5 * forward_flop(B, P, T, N, width, layers, V, N * T) + forward_flop(
        B, P, T + Z, N, width, layers, V, N * Z
    )


def policy_pass_share(B, P, T, G, width, layers, V, repeats=5):
    """Share of the machine's rate, measured in turn with it, that forward and backward of
    `grpo.step` reach."""
    model, (prompts, _) = make_model(width, layers, V), make_work(B, P, V)
    rows, owner = make_work(B * G, T, V)[0], list(range(B)) * G        # all different
    options = lm.Options(-1)

    def both():
        for part in batches.chunks(prompts, rows, owner, lm.budget(model, options)):
            some = batches.take(prompts, rows, owner, part)
            lm.logprobs(model, *some, options).sum().backward()

    seconds, rates = zip(*((least_seconds(both, 1), gemm(repeats=3)[0]) for _ in range(repeats)))
    return 3 * forward_flop(B, P, T, B * G, width, layers, V, B * G * T) / min(seconds) / max(rates)


def least_seconds(f, repeats):
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        f()
        times.append(time.perf_counter() - begin)
    return min(times)


def growth(repeats=2):
    """[{"P", "T", "G", "ours_s", "plain_s", "P+GT", "G(P+T)"}]: G from 1 to 64 at P 256 T 16, then
    P from 32 to 1024 at T 16 G 8."""
    out = []
    # of a group of one
    warnings.filterwarnings("ignore", message="std")
    for P, T, G in [(256, 16, 2**k) for k in range(7)] + [(2**k, 16, 8) for k in range(5, 11)]:
        policy = make_model(*CASES["P128-T32-G8"][4:])
        prompts, z = make_work(1, P, policy.config.vocab_size)
        steps = [
            f(
                policy,
                lm.frozen(Net(policy)).net,
                lm.frozen(Net(policy)).net,
                prompts,
                z,
                T,
                G,
            )
            for f in (ours, plain)
        ]
        seconds = [least_seconds(step, repeats) for step in steps]
        out.append(
            {
                "P": P,
                "T": T,
                "G": G,
                "ours_s": seconds[0],
                "plain_s": seconds[1],
                "P+GT": P + G * T,
                "G(P+T)": G * (P + T),
            }
        )
    return out


def draw(rows, file):
    """The growth table as a picture (needs matplotlib)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    for axis, key, part in zip(axes, "GP", (rows[:7], rows[7:])):
        for name, style in (("ours", "o-"), ("plain", "s--")):
            axis.loglog([r[key] for r in part], [r[f"{name}_s"] for r in part], style, label=name)
        axis.set(
            xlabel={
                "G": "G rollouts a prompt (P 256, T 16)",
                "P": "P tokens of the prompt (T 16, G 8)",
            }[key]
        )
    axes[0].set(ylabel="seconds a step")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main(argv=None):
    parser = argparse.ArgumentParser(description="One GRPO step: ours, TRL's and a plain loop's.")
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, help="these only, and no cost against G and P"
    )
    parser.add_argument(
        "--repeats", type=int, default=7, help="steps of each contestant that count"
    )
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--picture", help="draw cost against G and against P into this file")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parser.error = records.fail
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats cannot be {args.repeats}; give at least 1")
    transformers.utils.logging.disable_progress_bar()
    if args.worker:
        return worker(*args.worker)
    if args.picture and importlib.util.find_spec("matplotlib") is None:
        parser.error("--picture needs matplotlib: pip install -r requirements-extra.txt")
    names = ["ours", "plain"] + ["trl"] * (importlib.util.find_spec("trl") is not None)
    rate, cpu_rate = gemm()
    print(
        f"{torch.get_num_threads()} threads; float32 matrix products at {rate / 1e9:.0f} GFLOP/s, "
        f"{cpu_rate / 1e9:.0f} a CPU second"
        + ("" if "trl" in names else "; trl is not installed")
    )
    result = {"gemm_gflops": rate / 1e9, "cases": []}
    for case in args.cases or CASES:
        B, P, T, G, *_ = CASES[case]
        costs = race(case, names, args.repeats)
        ratio = lambda name: (
            costs[name]["cpu_s_min"] / costs["ours"]["cpu_s_min"] if name in costs else None
        )
        least, share = step_flop(*CASES[case]) / cpu_rate, policy_pass_share(*CASES[case])
        result["cases"].append(
            {
                "name": case,
                "trl": None,
                **costs,
                "ratio_trl": ratio("trl"),
                "ratio_plain": ratio("plain"),
                "least_cpu_s": least,
                "policy_pass_gemm_share": share,
            }
        )
        print(
            f"\n{case:22s} {'CPU s: min':>10} {'median':>7} {'wall s: min':>12} {'median':>7} "
            f"{'peak MB':>8} {'tokens/s':>9} {'ours is':>9}"
        )
        for name, c in costs.items():
            print(
                f"  {name:20s} {c['cpu_s_min']:10.2f} {c['cpu_s_median']:7.2f} "
                f"{c['wall_s_min']:12.2f} {c['wall_s_median']:7.2f} "
                f"{c['peak_mb_above_models']:8.0f} {B * G * T / c['wall_s_min']:9.0f} "
                f"{ratio(name):8.1f}x"
            )
        print(
            f"  {'matrix products only':20s} {least:10.2f}{'':48} "
            f"{least / costs['ours']['cpu_s_min']:8.1f}x"
            f"\n  our policy pass: {share:.0%} of the machine's rate"
        )
    result["policy_pass_gemm_share"] = policy_pass_share(4, 272, 32, 8, 512, 6, 4096)
    print(f"\npolicy pass, 20M parameters: {result['policy_pass_gemm_share']:.0%} of the rate\n")
    if not args.cases or args.picture:
        result["growth"] = growth()
        print(f"{'P':>6} {'T':>4} {'G':>4} {'ours s':>8} {'plain s':>8} {'P+GT':>6} {'G(P+T)':>7}")
        for r in result["growth"]:
            print(
                f"{r['P']:6d} {r['T']:4d} {r['G']:4d} {r['ours_s']:8.2f} {r['plain_s']:8.2f} "
                f"{r['P+GT']:6d} {r['G(P+T)']:7d}"
            )
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))
    if args.picture:
        draw(result["growth"], args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
