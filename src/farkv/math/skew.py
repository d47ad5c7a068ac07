"""The skew: a change of basis per KV head that concentrates the scores in few columns.

In: post-RoPE queries and keys. Out: A_q and A_k with (q A_q) . (k A_k) = q . k, best columns first. Only the index
is skewed; model weights and records are not. Accumulates moments, runs no model.

Source: InfiniGen §4.2 (SVD of Q, `solve_svd`); the bilinear form is ours (docs/papers/infinigen.md, deviation 2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from farkv._axes import Bool, Float, Float32, Tensor

# Ridge relative to the mean eigenvalue of the Gram matrices, so that few tokens still give full rank.
RIDGE = 1e-4


@dataclass
class Gram:
    """Second moments of one layer's queries and keys, per sequence (or summed over them) and KV head.

    All are sums over tokens; `n_keys` is the number of tokens.
    """

    queries: Float32[Tensor, "b Hkv D D"]
    keys: Float32[Tensor, "b Hkv D D"]
    key_sum: Float32[Tensor, "b Hkv D"]
    n_keys: Float32[Tensor, " b"]

    def add(self, other: Gram) -> Gram:
        """Return the sum of both."""
        return Gram(
            self.queries + other.queries,
            self.keys + other.keys,
            self.key_sum + other.key_sum,
            self.n_keys + other.n_keys,
        )

    def sum_batch(self) -> Gram:
        """Return the moments summed over sequences, with a batch axis of 1."""
        return Gram(
            self.queries.sum(0, True), self.keys.sum(0, True), self.key_sum.sum(0, True), self.n_keys.sum(0, True)
        )


def measure_gram(
    q: Float[Tensor, "B Hq Tq D"], k: Float[Tensor, "B Hkv T D"], valid: Bool[Tensor, "B T"] | None
) -> Gram:
    """Sum q q^T over each KV head's query group and k k^T over its keys.

    Args:
        q: post-RoPE queries, any sample of the tokens; padding among them must be zeroed by the caller.
        k: post-RoPE keys.
        valid: False on padding.

    Cost: 2 (Hq Tq + Hkv T) D^2 operations.
    """
    batch, kv_heads, _, dim = k.shape
    q = q.float().reshape(batch, kv_heads, -1, dim)
    k = k.float()
    if valid is not None:
        k = k * valid[:, None, :, None]
        n = valid.sum(-1).float()
    else:
        n = torch.full((batch,), float(k.shape[2]), device=k.device, dtype=torch.float32)
    return Gram(q.mT @ q, k.mT @ k, k.sum(2), n)


def _ridged(moment: Tensor) -> Tensor:
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(moment.shape[-1], device=moment.device, dtype=moment.dtype)
    return moment + (RIDGE * mean + 1e-30) * eye


def solve_bilinear(gram: Gram) -> tuple[Tensor, Tensor, Tensor]:
    """Return A_q, A_k and the key mean of the best rank-R score, all D columns in order of weight.

    With C_q = L_q L_q^T and the keys' covariance C_k = L_k L_k^T, and SVD(L_q^T L_k) = U S V^T,
    A_q = L_q^-T U S^1/2 and A_k = L_k^-T V S^1/2 minimise E[(q . (k - mean) - (q A_q) . ((k - mean) A_k))^2] for
    every number of leading columns. The mean can be left out because it shifts all scores of a query equally.

    Returns:
        A_q, A_k: float32 [b, Hkv, D, D]; mean: float32 [b, Hkv, 1, D].

    Cost: two Cholesky factorisations and one SVD of D x D per KV head.
    """
    n = gram.n_keys.clamp_min(1)[:, None, None].double()
    mean = gram.key_sum.double() / n
    c_k = gram.keys.double() - n[..., None] * mean[..., :, None] * mean[..., None, :]
    l_q = torch.linalg.cholesky(_ridged(gram.queries.double()))
    # By rounding, a covariance of few tokens may be slightly indefinite: the ridge is that of the uncentred moment.
    floor = _ridged(gram.keys.double()) - gram.keys.double()
    l_k = torch.linalg.cholesky(c_k + floor)
    u, s, vh = torch.linalg.svd(l_q.mT @ l_k)
    root = s.sqrt()[..., None, :]
    a_q = torch.linalg.solve_triangular(l_q.mT, u * root, upper=True)
    a_k = torch.linalg.solve_triangular(l_k.mT, vh.mT * root, upper=True)
    return a_q.float(), a_k.float(), mean[:, :, None].float()


def solve_white(gram: Gram) -> tuple[Tensor, Tensor, Tensor]:
    """Return A_q, A_k and the key mean where queries have unit variance in every direction: there an error of a key
    counts alike in all columns, the keys' widest first.

    With C_q = L L^T and the keys' covariance C_k, L^T C_k L = V W V^T: A_q = L^-T V, A_k = L V, A_q A_k^T = 1.

    Returns:
        A_q, A_k: float32 [b, Hkv, D, D]; mean: float32 [b, Hkv, 1, D].

    Cost: a Cholesky factorisation and an eigendecomposition of D x D per KV head.
    """
    n = gram.n_keys.clamp_min(1)[:, None, None].double()
    mean = gram.key_sum.double() / n
    c_k = gram.keys.double() / n[..., None] - mean[..., :, None] * mean[..., None, :]
    lower = torch.linalg.cholesky(_ridged(gram.queries.double()))
    # Of unit variance but for the number of queries: what is the same in all columns changes no code.
    _, vectors = torch.linalg.eigh(lower.mT @ c_k @ lower)
    widest = vectors.flip(-1)
    a_q = torch.linalg.solve_triangular(lower.mT, widest, upper=True)
    return a_q.float(), (lower @ widest).float(), mean[:, :, None].float()


def solve_safely(gram: Gram, solve: Callable[[Gram], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], bool]:
    """Return what `solve` makes of the moments, and whether a head got an unskewed basis because its have none.

    Of queries and keys that are not finite, or whose squares overflow, nothing is learned. Every sequence and head is
    judged by itself.

    Cost: that of `solve`; it waits for the device.
    """
    moments = (gram.queries, gram.keys, gram.key_sum)
    known = torch.stack([moment.isfinite().flatten(2).all(-1) for moment in moments]).all(0)
    for known_now in (known, torch.zeros_like(known)):
        try:
            found = solve(_leave_unskewed(gram, known_now))
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
            continue
        if all(bool(part.isfinite().all()) for part in found):
            return found, not bool(known_now.all())
    raise AssertionError("the identity has a basis")


def _leave_unskewed(gram: Gram, known: Bool[Tensor, "b Hkv"]) -> Gram:
    """Return moments in which unknown heads have those of white queries and keys, whose basis is the identity."""
    one = torch.eye(gram.queries.shape[-1], dtype=gram.queries.dtype, device=gram.queries.device)
    wide = known[..., None, None]
    return Gram(
        torch.where(wide, gram.queries, one),
        torch.where(wide, gram.keys, one),
        torch.where(known[..., None], gram.key_sum, 0.0),
        gram.n_keys,
    )


def solve_svd(gram: Gram) -> Tensor:
    """Return the paper's skew: the right singular vectors of the stacked group queries, largest first.

    Returns:
        A: float32 orthogonal [b, Hkv, D, D]; the eigenvectors of sum q q^T are V of SVD(Q).
    """
    _, vectors = torch.linalg.eigh(gram.queries.double())
    return vectors.flip(-1).float()
