"""The cache of keys and values while rows are drawn: room to append, and branches.

Claim: it holds what `DynamicCache` of transformers holds, without copying all of it for each token.
"""
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer


def new_cache(net):
    """An empty cache for `net`."""
    cache = DynamicCache(config=net.config)
    kinds = {type(layer) for layer in cache.layers}
    assert kinds <= {DynamicLayer, DynamicSlidingWindowLayer}, "only attention can branch"
    cache.layers = [Room() for _ in cache.layers]
    return cache


class Room(DynamicLayer):
    """Keys and values of one layer, (B, heads, L, D) each, with room behind them. DynamicLayer
    copies everything to append a token. This layer copies only where the room is full."""

    def update(self, key_states, value_states, *args, **kwargs):
        if torch.is_grad_enabled() or not self.is_initialized:
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys = append(self.keys, key_states)
        self.values = append(self.values, value_states)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        if torch.is_grad_enabled() or not self.get_seq_length():
            return super().batch_select_indices(indices)
        self.keys = with_room(self.keys, indices)
        self.values = with_room(self.values, indices)


def with_room(old, indices=None, T=0):
    """old[indices] (default: all of it), in memory for a quarter more tokens than it has, or than
    T."""
    B, H, L, D = old.shape
    T = max(L, T)
    B = B if indices is None else len(indices)
    whole = old.new_empty(B, H, T + T // 4 + 32, D)
    if indices is None:
        whole[:, :, :L] = old
    else:
        torch.index_select(old, 0, indices, out=whole[:, :, :L])
    return whole[:, :, :L]


def append(old, new):
    """cat([old, new], 2), in place where there is room behind `old`."""
    B, H, L, D = old.shape
    T = L + new.shape[2]
    if old.stride(2) != D or old.stride(1) < T * D:
        old = with_room(old, T=T)
    whole = old.as_strided((B, H, T, D), old.stride())
    whole[:, :, L:] = new
    return whole
