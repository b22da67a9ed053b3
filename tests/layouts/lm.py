import torch

from lm import prefill
from models.batches import as_lists, groups
from models.next_token import draw, log_policy


def run_whole(net, prefixes, rows, n_scored):
    logits, targets, t = [], [], []
    for prefix, row, n in zip(prefixes, rows, n_scored):
        ids = torch.tensor([list(prefix) + list(row)], device=net.device)
        out = net(ids, use_cache=False).logits[0]
        logits.append(out[ids.shape[1] - n - 1:-1])
        targets += row[len(row) - n:]
        t += range(n)
    device = net.device
    whole = torch.cat(logits)
    return whole, torch.tensor(targets, device=device), torch.tensor(t, device=device)


def run_shared(net, prefixes, rows, owner, n_scored):
    """One prefix after the other."""
    found = {}
    for o in sorted(set(owner)):
        mine = [i for i, other in enumerate(owner) if other == o]
        T = max(len(rows[i]) for i in mine)
        cache, mask, last, position = prefill(net, [prefixes[o]])
        cache.batch_select_indices(torch.zeros(len(mine), dtype=torch.long))
        ids = torch.zeros(len(mine), T, dtype=torch.long)
        for line, i in zip(ids, mine):
            line[:len(rows[i])] = torch.tensor(rows[i])
        fed = torch.cat([last.expand(len(mine), 1), ids[:, :-1]], 1)
        seen = torch.cat([mask.expand(len(mine), -1), torch.ones_like(fed)], 1)
        places = position + torch.arange(T)[None].expand(len(mine), -1)
        out = net(fed, attention_mask=seen, position_ids=places, cache=cache, use_cache=True)
        for k, i in enumerate(mine):
            found[i] = out.logits[k, len(rows[i]) - n_scored[i]:len(rows[i])]
    logits = torch.cat([found[i] for i in range(len(rows))])
    targets = [v for row, n in zip(rows, n_scored) for v in row[len(row) - n:]]
    t = [i for n in n_scored for i in range(n)]
    return logits, torch.tensor(targets), torch.tensor(t)


@torch.no_grad()
def sample_batch(net, prefixes, n, u, options):
    """Every rollout is a row of the batch, to the end."""
    N, longest = u.shape
    cache, mask, last, position = prefill(net, prefixes)
    owner = torch.arange(len(prefixes)).repeat_interleave(n)
    cache.batch_select_indices(owner)
    mask, token, position = mask[owner], last[owner], position[owner]
    ids, logps = [], []
    for t in range(longest):
        mask = torch.cat([mask, torch.ones(N, 1, dtype=mask.dtype)], 1)
        out = net(token, attention_mask=mask, position_ids=position + t, cache=cache,
                  use_cache=True)
        logp = log_policy(out.logits[:, -1], torch.tensor(t), options)
        at = torch.arange(N)
        new = draw(logp, at, u[:, t]) if options.temperature else logp.argmax(-1)
        ids.append(new)
        logps.append(logp[at, new])
        token = new[:, None]
    rows, said = as_lists(torch.stack(ids, 1), torch.stack(logps, 1), options.eos)
    return groups(rows, n), groups(said, n)
