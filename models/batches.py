"""Rows of unlike length as batches: padding, equal rows, chunks that fit into memory.

Claim: nothing here changes a number. A row is scored the same in every batch, up to rounding.
"""
import torch


def pad(rows, side, device):
    """(N, T) ids, padded with 0, and the (N, T) 0/1 mask of their lengths."""
    T = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        gap, ones = [0] * (T - len(row)), [1] * len(row)
        ids.append(gap + list(row) if side == "left" else list(row) + gap)
        mask.append(gap + ones if side == "left" else ones + gap)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def columns(rows, n=None):
    """The columns of rows, as lists: xs, zs, ys of [(x, z, y)]. n: their number, if there may be no
    rows."""
    if not rows and n:
        return [[] for _ in range(n)]
    return [list(column) for column in zip(*rows)]


def dicts(**columns):
    """The rows of named columns."""
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def repeat(values, n):
    """Each value n times, side by side."""
    return [value for value in values for _ in range(n)]


def groups(values, n):
    """Lists of n values that stand side by side: n rollouts of each prompt."""
    return [values[i:i + n] for i in range(0, len(values), n)]


def take_best(values, R):
    """Of each group of n values the one with the highest R (B, n)."""
    best = R.argmax(1).tolist()
    return [group[k] for group, k in zip(groups(values, R.shape[1]), best)]


def distinct(keys):
    """(the number of the first of each kind of key, which kind each key is)."""
    kinds, first, where = {}, [], []
    for n, key in enumerate(keys):
        if key not in kinds:
            kinds[key] = len(kinds)
            first.append(n)
        where.append(kinds[key])
    return first, where


def chunks(prefixes, rows, owner, budget):
    """Split the row numbers into lists of about `budget` tokens, padding included. Sorted by length
    to save padding; rows of one prefix stand side by side, so that it is computed once."""
    _, kind = distinct(zip(owner, map(tuple, rows)))
    whole = len(set(owner)) == len(rows)                   # then prefix and row are padded as one

    def length(n):
        prefix, row = len(prefixes[owner[n]]), len(rows[n])
        return (prefix + row,) if whole else (prefix, owner[n], row, kind[n])

    parts, owners, kinds, prefix, row = [], set(), set(), 0, 0
    for n in sorted(range(len(rows)), key=length):
        # What the last part costs with row n; a single prefix, and an equal row, cost nothing
        prefix, row = max(prefix, len(prefixes[owner[n]])), max(row, len(rows[n]))
        n_owners = len(owners) + (owner[n] not in owners)
        n_kinds = len(kinds) + (kind[n] not in kinds)
        cost = row * n_kinds + (prefix * n_owners if n_owners > 1 else 0)
        if not parts or cost > budget:
            parts.append([])
            owners, kinds = set(), set()
            prefix, row = len(prefixes[owner[n]]), len(rows[n])
        parts[-1].append(n)
        owners.add(owner[n])
        kinds.add(kind[n])
    return parts


def take(prefixes, rows, owner, part):
    """The rows of a part with only the prefixes that they need: (prefixes, rows, owner)."""
    used = sorted({owner[n] for n in part})
    new = {o: i for i, o in enumerate(used)}
    return [prefixes[o] for o in used], [rows[n] for n in part], [new[owner[n]] for n in part]


def scored_mask(rows, n_scored, T, device):
    """(N, T) bool: the last n_scored[n] of the len(rows[n]) tokens."""
    t = torch.arange(T, device=device)
    length = torch.tensor([len(row) for row in rows], device=device)[:, None]
    scored = torch.tensor(n_scored, device=device)[:, None]
    return (t < length) & (t >= length - scored)


def places(scored):
    """(N, T) bool -> (M,) the place of each scored token among those of its row."""
    return (scored.cumsum(1) - 1)[scored]


def as_tensor(lists):
    """(N, T) numbers, 0 behind the end of each list, and the (N, T) bool mask of their lengths."""
    T = max(map(len, lists))
    values = torch.tensor([list(row) + [0.0] * (T - len(row)) for row in lists])
    length = torch.tensor([[len(row)] for row in lists])
    return values, torch.arange(T) < length


def as_lists(ids, logps, eos):
    """(N, T) ids and log-probs as lists that end with the first eos."""
    rows = [row[:row.index(eos) + 1] if eos in row else row for row in ids.tolist()]
    return rows, [logp[:len(row)] for row, logp in zip(rows, logps.tolist())]
