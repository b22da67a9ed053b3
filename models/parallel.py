"""Several processes: `torchrun --nproc-per-node N train.py ...`, each with its own GPU (nccl) or
share of the CPU (gloo).

Claim: N processes take the step that one would take on the same rollouts. The rows of a step are
cut among the ranks, every rank divides by the number that all of them have together, and gradients
are SUMMED over the ranks before the norm is clipped.

1. Data parallel (the default): each rank holds everything; the gradients are summed by one
   all-reduce after the last micro-batch. That is the arithmetic of DistributedDataParallel without
   its hooks, which wait in every backward pass: ranks have unlike numbers of micro-batches, and
   none where no group has an advantage.
2. `--shard`, FSDP2 (`fully_shard`): the optimizer's weights (masters) and moments live in shards.
   Ranks draw rows of unlike lengths, so none can wait for another's layers within a forward pass,
   and a prefix that is cached for its rows needs its layers until the backward pass is over. So the
   weights are gathered once a step and every rank computes with all of them; gradients are summed
   into shards, clipped and applied there. In float32 with AdamW a trained parameter costs 8 + 12/N
   bytes (weight and gradient whole; master and moments in shards) in place of 16, a frozen one 4 +
   4/N in place of 4: from N = 3 it is less.
3. Every rank draws its own rollouts (generator: seed + rank) for its share of one batch. So N
   processes are another random run than one, of the same law. Muon agrees with one process to
   rounding.
4. What depends on a clock is decided by rank 0 (`agree`); validation and evaluation rows are cut
   among the ranks and gathered, so that all see one score. Rank 0 alone writes and prints, and
   computes the bounds at the end. Metrics of a step are those of all ranks, samples those of rank
   0.
5. Several machines must share the run's folder. A rank that fails ends all: torchrun sees to it,
   and adds a report of its own.
"""
import contextlib
import copy
import datetime
import os
import sys

import torch
import torch.distributed as dist

from envs import records


def start():
    """Join the other processes if torchrun started this one. All but rank 0 fall silent, but for
    errors."""
    if not dist.is_available() or not dist.is_torchelastic_launched() or dist.is_initialized():
        return
    try:
        cuda, local = torch.cuda.is_available(), int(os.environ["LOCAL_RANK"])
        if cuda and local < torch.cuda.device_count():
            torch.cuda.set_device(local)  # from now on "cuda" is this rank's own
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=1)
        )
    except (LookupError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        records.fail(f"the processes cannot meet ({reason}); start them with torchrun, or, if the "
                     "variables of an old torchrun are left, unset TORCHELASTIC_RUN_ID")
    if rank():
        sys.stdout = open(os.devnull, "w")


def too_many():
    """True if this machine has more processes than GPUs."""
    return world() > 1 and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count()


def rank():
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world():
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


# --- rows and numbers -----------------------------------------------------------------------------

def gather(value):
    """[value of rank 0, of rank 1, ..], on all ranks."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def total(number):
    return sum(gather(number))


def agree(value):
    """Rank 0's: for decisions that depend on the clock."""
    return gather(value)[0]


def share(rows):
    """This rank's rows of a list that all ranks have."""
    return rows[rank()::world()]


def divide(f, *lists):
    """f(*lists) -> a list as long as these, where each rank computes its share of the rows. f never
    sees an empty share."""
    if world() == 1:
        return f(*lists)
    mine = [share(rows) for rows in lists]
    parts = gather(list(f(*mine)) if mine[0] else [])
    return [parts[i % world()][i // world()] for i in range(len(lists[0]))]


def merge(log, B):
    """The log of a GRPO step of all ranks from each rank's, of B prompts: sums, the largest gap,
    means over all prompts."""
    if world() == 1:
        return log
    logs = gather((log, B))
    out = dict(log, **{k: sum(l[k] for l, _ in logs) for k in ("tokens", "loss")})
    logs = [(l, b) for l, b in logs if b]
    for k in ("reward", "reward_std", "kl", "truncated", "floored", "zero_std_groups"):
        out[k] = (
            None
            if logs[0][0][k] is None
            else sum(l[k] * b for l, b in logs) / sum(b for _, b in logs)
        )
    return out | {"gap": max(l["gap"] for l, _ in logs)}


# --- gradients ------------------------------------------------------------------------------------

@contextlib.contextmanager
def reduced(model):
    """Within, the gradients of `model` are the sum over all ranks, and its parameters those that
    the optimizers hold: shards, if it is sharded. Every rank must enter, also one that has no
    gradient."""
    if is_sharded(model):
        # A backward pass that adds nothing, in step on all ranks: FSDP2 sums what has been gathered
        # into shards, layer by layer
        model.set_requires_gradient_sync(True)
        (
            model(
                torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False
            ).logits.sum()
            * 0
        ).backward()
        model.set_requires_gradient_sync(False)
        with masters(model):
            yield
        return
    if world() > 1:
        params = [p for p in model.parameters() if p.requires_grad]
        for p in params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        flat = torch.cat([p.grad.flatten() for p in params])
        dist.all_reduce(flat)                              # SUM
        for p, g in zip(params, flat.split([p.numel() for p in params])):
            p.grad = g.view_as(p)
    yield


def shard(model):
    """Shard `model` in place with FSDP2, by layer. Outside `reduced` and `masters` it holds whole
    weights, as any model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh(model.device.type, (world(),))
    for module in [*next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), model]:
        fully_shard(module, mesh=mesh)
        # a sum, not a mean
        module.set_gradient_divide_factor(1.0)
        # gloo knows no other way
        module.set_force_sum_reduction_for_comms(True)
    model.set_reshard_after_forward(False)
    model.set_reshard_after_backward(False)
    model.set_requires_gradient_sync(False)
    for module in pieces(model):
        module.unshard()
    return model


def is_sharded(model):
    # what `fully_shard` adds
    return hasattr(model, "set_requires_gradient_sync")


def pieces(model):
    return [m for m in model.modules() if is_sharded(m)] if is_sharded(model) else []


@contextlib.contextmanager
def masters(model):
    """Within, the parameters of a sharded model are its shards (DTensors); afterwards the whole
    weights, gathered anew."""
    for module in pieces(model):
        module.reshard()
    yield
    for module in pieces(model):
        module.unshard()


def plain(model):
    """A copy that is not sharded."""
    if not is_sharded(model):
        return copy.deepcopy(model)
    with model.device:
        # FSDP2 derived its class from this one
        out = type(model).__bases__[1](model.config).eval()
    out.generation_config = copy.deepcopy(model.generation_config)
    for to, b in zip(out.buffers(), model.buffers()):
        to.data = b.clone()
    for to, p in zip(out.parameters(), model.parameters()):
        to.data = p.detach().clone()
    return out


def whole(tensor):
    """A tensor on the CPU; of all shards, if it is in shards: then every rank must call it."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().cpu()


def like(value, p):
    """A whole tensor in shards as those of the parameter p, if p is in shards and of its shape."""
    if not hasattr(p, "placements") or value.shape != p.shape:
        return value
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value.to(p.device), p.device_mesh, p.placements)


def norm(value):
    """A gradient norm as a number; over all shards, if it is in shards."""
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).item()
