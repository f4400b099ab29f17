"""Muon in float32: held against PyTorch's own, which is in bfloat16, and against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.tiny.muon import Muon, orthogonalized


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)])
def test_singular_values_come_near_one_and_directions_stay(shape: tuple[int, int]):
    generator = torch.Generator().manual_seed(0)
    u, s, vh = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    matrix = u @ torch.linspace(0.2, 30, len(s)).diag() @ vh
    found = u.T @ orthogonalized(matrix) @ vh.T
    values = found.diagonal()
    assert ((values > 0.6) & (values < 1.3)).all()
    assert torch.allclose(found, values.diag(), atol=1e-4)


def test_steps_are_those_of_pytorch_but_for_its_rounding():
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 16), (8, 40), (40, 8)]
    ours = [nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    settings = {"lr": 0.02, "weight_decay": 0.1}
    one = Muon(ours, **settings)
    other = torch.optim.Muon(theirs, **settings, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        one.step()
        other.step()
    for p, q, before in zip(ours, theirs, start, strict=True):
        assert (p - q).norm() < 0.02 * (q - before).norm()


def test_a_parameter_without_gradient_stays():
    still = nn.Parameter(torch.ones(2, 2))
    Muon([still], lr=1, weight_decay=1).step()
    assert torch.equal(still, torch.ones(2, 2))
