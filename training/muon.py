"""Muon for many small matrices: momentum made orthogonal by Newton-Schulz steps, batched by shape.

In: matrices with gradients. Out: updated matrices. The rule is that of `torch.optim.Muon` (Jordan
et al. 2024), for all matrices of one shape at once.
"""

from __future__ import annotations

import torch
from forward import DTYPE

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def make_orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of each matrix (n, rows <= columns) close to 1."""
    a, b, c = COEFFICIENTS
    x = x.to(DTYPE)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.float()


class BatchedMuon(torch.optim.Optimizer):
    """Nesterov momentum made orthogonal, times sqrt(max(1, rows / columns)), decoupled decay."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list] = {}
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])
                wide = update.T if update.shape[0] > update.shape[1] else update
                shapes.setdefault(tuple(wide.shape), []).append((p, wide))
            for pairs in shapes.values():
                done = make_orthogonal(torch.stack([w for _, w in pairs]))
                for (p, _), u in zip(pairs, done, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    turned = u if u.shape == p.shape else u.T
                    p.add_(turned, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)
