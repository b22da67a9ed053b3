"""Optimizers: AdamW, and Muon for the weight matrices of a small model.

Claim: `Muon` takes the step of torch.optim.Muon(adjust_lr_fn="match_rms_adamw"), in float32.
"""
import math

import torch

from models import parallel


def make_optimizers(net, lr, muon=True, decay=0.0):
    """AdamW; with `muon`, the weight matrices of the layers get Muon instead, which trains a small
    model in a third of the steps. Both take the same rate and weight decay."""
    with parallel.masters(net):
        named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    matrices, others = [], []
    for name, p in named:
        in_layer = p.ndim == 2 and "layers." in name and ".lora_" not in name
        (matrices if muon and in_layer else others).append(p)
    adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=decay, fused=True)
    if not matrices:
        return [adamw]
    return [adamw, Muon(matrices, dict(lr=lr, weight_decay=decay))]


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum (Jordan et al. 2024), for all matrices of one shape at once. torch's
    own computes in bfloat16, which is slow on a CPU without such products."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for params in self.alike(group["params"]):
                updates = torch.stack([self.nesterov(p) for p in params])
                for p, update in zip(params, orthogonal(updates)):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-0.2 * max(p.shape) ** 0.5 * group["lr"])

    @staticmethod
    def alike(params):
        """The parameters with a gradient in lists of one shape; a shard (DTensor) stays alone."""
        kinds = {}
        for p in params:
            if p.grad is not None:
                kinds.setdefault((p.shape, p if hasattr(p, "to_local") else None), []).append(p)
        return kinds.values()

    def nesterov(self, p, momentum=0.95):
        """The gradient with Nesterov's momentum."""
        if not self.state[p]:
            self.state[p]["momentum"] = torch.zeros_like(p.grad)
        average = self.state[p]["momentum"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(average, momentum)


def orthogonal(M):
    """(N, a, b) with the singular values of M brought near 1 by five Newton-Schulz steps."""
    X = M.mT if M.shape[1] > M.shape[2] else M
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        S = X @ X.mT
        # 3.4445 X - 4.7750 S X + 2.0315 S S X
        X = torch.baddbmm(X, torch.baddbmm(S, S, S, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
    return X.mT if M.shape[1] > M.shape[2] else X


def step(net, optimizers, lr, clip=1.0):
    """Sum the gradient over all ranks, clip its norm, step at rate `lr`, clear the gradient.
    Returns the norm before clipping. If that is not finite, no step is taken."""
    with parallel.reduced(net):
        norm = parallel.norm(torch.nn.utils.clip_grad_norm_(net.parameters(), clip))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            if math.isfinite(norm):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return norm
