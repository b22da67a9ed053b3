"""One GPU in at most 12 minutes: what a step of each stage takes in time and memory, beside what
`models/adapters.py` plans; the default run of each world; the tests that need a GPU.

    python -m support.gpu_check                         writes gpu.json and gpu.md
    python -m support.gpu_check --device cpu --small    the same with small shapes: is it ready?

1. The shapes are those of Qwen2.5 with random weights, so nothing is downloaded. States and actions
   are those of the tools world, in the tokens of the tiny model.
2. Random weights end no row, so each row is as long as it may be: the times are the longest, and so
   is the memory. No action that Q draws is whole, so the true one takes its place after the draw.
3. Each case runs in a process of its own. On a GPU the peak is that of its allocator; on a CPU it
   is that of the process, above what it held without models.
4. The worlds run side by side, with what time is left, and disturb each other.
5. Both files are written after each part: a machine that is taken away leaves what was measured.
"""
import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo
import lm
import settings
import sft
import swirl_fwm
import swirl_idm
from envs import WORLDS, load_splits, records
from models import adapters, memory, optim, parallel, tiny
from models.batches import columns
from support import loading, rundir

ROOT = Path(__file__).parents[1]
TEST_SECONDS, CASE_SECONDS = 120, 100                      # at most, on a GPU
GIB = 2**30
# On a CPU what is freed goes back at once, so that the peak is what was needed
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
SMALL = 128, 2, 4, 2, 512, 2048                            # the sizes of the shape "small"
# What both ways of a shape are measured with
FLAGS = ["--env", "tools", "--episodes", "24", "--no-muon", "--warmup-lr", "2e-5", "--reward-form",
         "mean", "--floor", "10", "--warmup-batch", "32"]
SMALL_RUN = ["--episodes", "8", "--warmup-steps", "6", "--warmup-steps-idm", "4", "--iterations",
             "1", "--bootstrap-steps", "4", "--phase1-steps", "3", "--phase2-steps", "2", "--batch",
             "6", "--group-size", "4", "--eval-size", "6", "--validation-size", "6"]


def cases(small):
    """[(shape, rank of LoRA)]; 0: all weights."""
    shapes = ["small"] if small else list(adapters.QWEN)
    rank = 4 if small else 32
    return [(shape, r) for shape in shapes for r in (rank, 0)]


def shape_of(name):
    """The config of a shape."""
    return adapters.shape(*(SMALL if name == "small" else adapters.QWEN[name]))


# --- one case, in a process of its own --------------------------------------------------------

class Peak:
    """The most memory since it was made, in bytes above `before`."""

    def __init__(self, device, before=0):
        self.cuda, self.before = device == "cuda", before
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            gc.collect()
            clear = Path("/proc/self/clear_refs")
            if clear.exists():
                clear.write_text("5")

    def bytes(self):
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        return resident("VmHWM") - self.before


def resident(what):
    """Bytes of this process: "VmRSS" now, "VmHWM" at the peak. 0 where Linux's /proc is not."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith(what)]
    return found[0] if found else 0


def case(shape, r, device, tokens, seconds):
    """{"sft", "phase1", "phase2": what a step takes} of a shape."""
    few = ["--warmup-batch", "4", "--batch", "2"] if shape == "small" else []
    cfg = settings.parse([*FLAGS, *few, "--device", device, "--tokens", str(tokens)])
    half = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    config = shape_of(shape)
    parts, token = adapters.memory(config, r, half)
    out = {"shape": shape, "lora": r, "half": half, "tokens": tokens}
    total = memory.peak(parts, token, tokens)
    room = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else total
    if total > room:
        return out | {"why": f"the plan needs {total / GIB:.0f} GiB of {room / GIB:.0f}"}
    before = resident("VmRSS")
    P, Q, lab = models(config, r, half, cfg, device)
    for name, make in steps(P, Q, lab).items():
        plan = total - (parts["reference"] if name == "sft" else 0)
        out[name] = measured(make, device, seconds, before) | {"planned": plan}
    return out


def models(config, r, half, cfg, device):
    """(P, Q, lab) with random weights."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if r and half else torch.float32
    with torch.device(device):
        net = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    nets = adapters.pair(net, r) if r else (net, parallel.plain(net).eval())
    nets = [net.to(device) for net in nets]
    tok = AutoTokenizer.from_pretrained(tiny.FOLDER, trust_remote_code=False)
    splits = load_splits(cfg)
    longest = loading.check_data(nets[0], tok, splits, cfg)
    P, Q = loading.wrap(*nets, tok, cfg, half, longest, splits[0][0][0])
    return P, Q, loading.Lab(cfg, *splits, windows=[], book=None)


def steps(P, Q, lab):
    """{stage: function that begins it and returns a function that takes a step}."""
    cfg, rng = lab.cfg, random.Random(0)
    changed = [(x, z, y) for x, z, y in lab.labelled if x != y]
    actions = {(x, y): z for x, z, y in changed}
    label = Q.label

    def with_true_action(pairs, generator=None):
        label(pairs, generator)
        return [(x, Q.target(actions[x, y]), y) for x, y in pairs]

    Q.label = with_true_action

    def warm_up():
        rows = sft.shuffled(P.rows(lab.labelled), cfg.warmup_batch, rng)
        optimizers = optim.make_optimizers(P.net, cfg.warmup_lr, muon=False)
        return lambda: sft.step(P, next(rows), optimizers, cfg.warmup_lr)

    def phase(draw, policy, frozen, settings):
        pairs = sft.shuffled(changed, settings.batch, rng)
        optimizers = optim.make_optimizers(policy.net, settings.peak, muon=False)
        generator = torch.Generator(policy.net.device).manual_seed(0)
        ref = lm.frozen(policy)

        def step():
            xs, _, ys = columns(next(pairs))
            rollouts, R, _ = draw(policy, frozen, list(zip(xs, ys)), settings, generator)
            some_ref = ref if settings.beta else None
            grpo.step(policy, some_ref, optimizers, rollouts, R, settings, settings.peak)

        return step

    return {
        "sft": warm_up,
        "phase1": lambda: phase(swirl_fwm.phase1_rollouts, P, Q, cfg.phase1(1)),
        "phase2": lambda: phase(swirl_idm.phase2_rollouts, Q, P, cfg.phase2(1)),
    }


def measured(make, device, seconds, before):
    """{"steps_a_second", "peak" in bytes} of a stage, or {"why"}: a step that does not count, then
    at least two."""
    peak = Peak(device, before)
    try:
        step = make()
        step()
        wait(device)
        n, begin = 0, time.monotonic()
        while n < 2 or time.monotonic() - begin < seconds:
            step()
            wait(device)
            n += 1
        took = time.monotonic() - begin
    except torch.OutOfMemoryError:
        return {"why": "out of memory"}
    finally:
        step = None                                        # and with it optimizer and reference
        gc.collect()
    return {"steps_a_second": n / took, "peak": peak.bytes()}


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


# --- the parts, one after the other -----------------------------------------------------------

def call(command, seconds, **env):
    """(exit code, standard output) of a command in the repository; 124 if the time is up."""
    try:
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env=os.environ | env,
            timeout=max(1, seconds),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except subprocess.TimeoutExpired:
        return 124, "the time is up"
    return done.returncode, done.stdout


def limit(seconds, args, left):
    """A part's own limit, which a CPU does not have, within the time that is left."""
    return min(left, seconds) if args.device == "cuda" else left


def last_line(said):
    return (said.strip().splitlines() or [""])[-1]


def run_tests(args, left):
    """{"rc", "said"} of tests/test_cuda.py."""
    command = ["-m", "pytest", "-q", "tests/test_cuda.py"]
    seconds = limit(TEST_SECONDS, args, left)
    rc, said = call(command, seconds, SWIRL_TEST_DEVICE=args.device)
    return {"rc": rc, "said": last_line(said)}


def run_case(shape, r, args, left):
    """`case` in a process of its own."""
    what = json.dumps([shape, r, args.device, args.tokens, args.seconds])
    command = ["-m", "support.gpu_check", "--case", what]
    rc, said = call(command, limit(CASE_SECONDS, args, left), **GIVES_BACK)
    if rc:
        return {"shape": shape, "lora": r, "why": last_line(said)}
    return json.loads(last_line(said))


def run_worlds(args, left):
    """{world: minutes and scores} of the default runs, side by side."""
    with tempfile.TemporaryDirectory() as folder:
        running = {}
        for world in args.worlds:
            command = ["train.py", "--env", world, "--device", args.device, "--out",
                       f"{folder}/{world}", *(SMALL_RUN if args.small else [])]
            with open(f"{folder}/{world}.txt", "w") as said:
                running[world] = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=said,
                                                  stderr=said)
        wait_for(running.values(), left)
        return {world: world_row(Path(folder), world) for world in running}


def wait_for(processes, seconds):
    """Until all have ended; those that have not by then are killed."""
    end = time.monotonic() + seconds
    try:
        for process in processes:
            process.wait(max(1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()


def world_row(folder, world):
    """What a run left behind."""
    path = folder / world / "results.json"
    if not path.is_file():
        said = last_line((folder / f"{world}.txt").read_text())
        return {"why": f"not finished; it last said: {said}"}
    results = json.loads(path.read_text())
    first, last = results["stages"][0], results["stages"][-1]
    return {
        "seconds": results["seconds"],
        "hardware": results["hardware"],
        "sampled": [first["fwm"]["sampled"], last["fwm"]["sampled"]],
    }


# --- what is written --------------------------------------------------------------------------

def markdown(found):
    """The tables of gpu.md."""
    out = [
        f"{found['device']}, torch {found['torch']}, commit {found['commit']}, "
        f"{found['minutes']:.1f} minutes",
        f"Tests: {found.get('tests', {}).get('said', 'not run')}",
        "| shape | weights that learn | stage | steps a second | peak, GiB | planned | ratio |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n" + "\n".join(case_rows(found["cases"])),
        "| world | minutes | SFT | Phase I | Phase II | scores | sampled: SFT, last |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n" + "\n".join(world_rows(found["worlds"])),
    ]
    return "\n\n".join(out) + "\n"


def case_rows(found):
    """A row for each stage of each case."""
    rows = []
    for row in found:
        head = f"| {row['shape']} | {'LoRA ' + str(row['lora']) if row['lora'] else 'all'} |"
        if "why" in row:
            rows.append(f"{head} {row['why']} | | | | |")
        for stage in ("sft", "phase1", "phase2"):
            cost = row.get(stage, {})
            if "why" in cost:
                rows.append(f"{head} {stage} | {cost['why']} | | {cost['planned'] / GIB:.2f} | |")
            elif cost:
                peak, plan = cost["peak"] / GIB, cost["planned"] / GIB
                rows.append(f"{head} {stage} | {cost['steps_a_second']:.2f} | {peak:.2f} | "
                            f"{plan:.2f} | {peak / plan:.2f} |")
    return rows


def world_rows(found):
    """A row for each world."""
    rows = []
    for world, row in found.items():
        if "why" in row:
            rows.append(f"| {world} | {row['why']} | | | | | |")
            continue
        minutes = [row["seconds"][part] / 60
                   for part in ("total", "warmup", "phase1", "phase2", "eval")]
        cells = " | ".join(f"{m:.1f}" for m in minutes)
        first, last = row["sampled"]
        rows.append(f"| {world} | {cells} | {first:.1%}, {last:.1%} |")
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="small shapes and runs")
    parser.add_argument("--minutes", type=float, default=12, help="no part goes on for longer [12]")
    parser.add_argument("--seconds", type=float, default=4, help="steps of a stage [4]")
    parser.add_argument("--tokens", type=int, default=1024, help="of a micro-batch [1024]")
    parser.add_argument("--worlds", nargs="*", choices=WORLDS, default=list(WORLDS))
    parser.add_argument("--out", default="gpu", help="writes OUT.json and OUT.md [gpu]")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.error = records.fail
    args = parser.parse_args(argv)
    if args.case:
        print(json.dumps(case(*json.loads(args.case))))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        records.fail("no GPU is visible; --device cpu --small tries the script without one")
    return check(args)


def check(args):
    """All parts, within args.minutes."""
    begin = time.monotonic()
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    found = {"device": device, "torch": torch.__version__, "commit": rundir.git_revision(),
             "cases": [], "worlds": {}}

    def left():
        return args.minutes * 60 - (time.monotonic() - begin)

    def keep():
        found["minutes"] = (time.monotonic() - begin) / 60
        Path(args.out + ".json").write_text(json.dumps(found, indent=1))
        Path(args.out + ".md").write_text(markdown(found))

    found["tests"] = run_tests(args, left())
    keep()
    for shape, r in cases(args.small):
        found["cases"].append(run_case(shape, r, args, left()))
        keep()
    found["worlds"] = run_worlds(args, left())
    keep()
    print(markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
