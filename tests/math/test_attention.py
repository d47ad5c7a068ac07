"""The plain attention that receipts are measured with, against loops in float64."""

from __future__ import annotations

import torch

from farkv.math.attention import align_mask, measure_mass, weigh_keys
from farkv.math.logits import Logits

B, HKV, G, S, D = 2, 2, 3, 9, 4


def test_weights_are_a_softmax_per_query_head() -> None:
    q, k = torch.randn(B, HKV * G, 2, D), torch.randn(B, HKV, S, D)
    visible = torch.rand(B, 2, S) > 0.3
    visible[..., -1] = True
    for softcap in (None, 2.0):
        got = weigh_keys(q, k, visible, Logits(0.5, softcap))
        for b in range(B):
            for head in range(HKV * G):
                logits = q[b, head].double() @ k[b, head // G].double().T * 0.5
                logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
                exact = logits.masked_fill(~visible[b], -torch.inf).softmax(-1)
                # float32 keeps 24 bits of each of D products and of S exponentials.
                assert torch.allclose(got[b, head // G, head % G].double(), exact, rtol=1e-5, atol=1e-7)


def test_mass_is_what_the_choice_holds() -> None:
    weights = torch.rand(B, HKV, G, 1, S).softmax(-1)
    positions = torch.stack([torch.randperm(S)[:4] for _ in range(B * HKV)]).view(B, HKV, 4)
    valid = torch.tensor([True, True, True, False]).expand(B, HKV, 4)
    for flags in (None, valid):
        got = measure_mass(weights, positions, flags)
        for b in range(B):
            for h in range(HKV):
                kept = positions[b, h].tolist()[: 4 if flags is None else 3]
                expected = weights[b, h, :, 0].double().mean(0)[kept].sum()
                assert abs(got[b, h].item() - expected.item()) < 1e-6
    everything = torch.arange(S).expand(B, HKV, S)
    assert torch.allclose(measure_mass(weights, everything, None), torch.ones(B, HKV))


def test_a_mask_follows_the_chosen_records() -> None:
    positions = torch.stack([torch.randperm(S)[:4] for _ in range(B * HKV)]).view(B, HKV, 4)
    mask = torch.rand(B, 1, 1, S) > 0.4
    valid = torch.rand(B, HKV, 4) > 0.3
    assert align_mask(None, positions, None, G) is None
    got = align_mask(mask, positions, valid, G)
    assert got is not None
    for b in range(B):
        for head in range(HKV * G):
            for j in range(4):
                at = positions[b, head // G, j]
                assert got[b, head, 0, j] == (mask[b, 0, 0, at] & valid[b, head // G, j])
    alone = align_mask(None, positions, valid, G)
    assert alone is not None
    assert torch.equal(alone[:, ::G, 0], valid)
