import torch


def scored_mask(rows, n_scored, T, device):
    mask = torch.zeros(len(rows), T, dtype=torch.bool, device=device)
    for row, n, line in zip(rows, n_scored, mask):
        line[len(row) - n:len(row)] = True
    return mask
