"""What a run holds in memory, and how many tokens fit beside it.

Claim: a run's peak is  weights + gradients + optimizer + opposite + reference + idle + work.  All
but the last follow from the parameters (`adapters.memory`). The work is the activations of one
micro-batch, or the sampler's keys and values, whichever is larger: both are bounded by `tokens`.
"""
import os
from pathlib import Path

import torch

from models import adapters

USED = 0.9              # share of the free memory that is planned with
LEAST = 128             # tokens of the smallest micro-batch that makes sense
UNKNOWN = 8 * 2**30     # where the system does not say what is free


def free(device):
    """Bytes that this process may still take on a device ("cpu", "cuda")."""
    if device == "cuda":
        inside = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + inside
    found = [available(Path("/proc/meminfo"))]
    found.append(left(Path("/sys/fs/cgroup")))             # of a container
    if not any(found) and hasattr(os, "sysconf"):          # macOS: half of all
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    return min(filter(None, found), default=UNKNOWN)


def available(meminfo):
    """Bytes that Linux says are available; None elsewhere."""
    try:
        lines = meminfo.read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        return 1024 * int(line.split()[1])
    except (OSError, StopIteration):
        return None


def left(group):
    """Bytes that a control group leaves; None without a limit."""
    try:
        most = int((group / "memory.max").read_text())
        return most - int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return None


def parts(config, r=0, half=False, rivals=False):
    """({part: bytes}, bytes a token of a micro-batch) of a run. r: rank of LoRA. rivals: both
    models of the warm-up wait, idle, while the rivals run."""
    held, token = adapters.memory(config, r, half)
    if rivals:
        weights = held["weights"] if r else 2 * held["opposite"]
        held = held | {"idle": weights}
    return held, token


def micro_batch(held, token, bytes_free, on_cpu):
    """Tokens of a micro-batch beside what is held; 0 if less than LEAST fit. A CPU gains nothing
    from more than 1024, a GPU hardly from more than 16384."""
    room = USED * bytes_free - sum(held.values())
    if room < held["gradients"]:                           # see `adapters.memory`
        return 0
    tokens = min(int(room / token), 1024 if on_cpu else 16384)
    return tokens if tokens >= LEAST else 0


def peak(held, token, tokens):
    """Bytes at the peak of a run with micro-batches of so many tokens."""
    return sum(held.values()) + max(tokens * token, held["gradients"])


def cached(config, tokens, longest, r=0, half=False):
    """Tokens of keys and values that the sampler may hold in the memory of a micro-batch. longest:
    tokens that a row grows by. The cache is copied as it grows and branches; the distribution of
    the next token is held several times, some of them in float64."""
    _, token = adapters.memory(config, r, half)
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = 2 * config.num_hidden_layers * heads * size * (2 if half else 4)
    vocabulary = 40 * config.vocab_size / (2 * longest)
    return max(1, int(tokens * token / (2.5 * keys + vocabulary)))
