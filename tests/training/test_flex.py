import os
import shutil

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from schemas.errors import ConfigError
from training.attention import Plan, attend
from training.flex import block_mask
from training.masks import ALIASES, dense_mask

CPU = torch.device("cpu")
MASKS = [*ALIASES, "scene_causal"]


@pytest.mark.parametrize(
    "lengths",
    [((20, 30, 10), (150, 130, 281)), ((128, 128), (256, 128)), ((300, 0), (70, 5)), ((2,), (3,))],
)
@pytest.mark.parametrize("name", MASKS)
def test_block_mask_is_the_one_torch_finds_token_by_token(name, lengths):
    found = block_mask(name, *lengths, CPU)
    tokens = sum(map(sum, lengths))
    expected = create_block_mask(found.mask_mod, None, None, tokens, tokens, device="cpu")
    assert found.shape == expected.shape
    assert torch.equal(found.to_dense(), expected.to_dense())
    assert torch.equal(found.kv_num_blocks, expected.kv_num_blocks)
    assert torch.equal(found.full_kv_num_blocks, expected.full_kv_num_blocks)
    index = torch.arange(tokens)
    allowed = found.mask_mod(index[:1], index[:1], index[:, None], index[None, :])
    mask = dense_mask(name, *lengths)
    assert torch.equal(allowed, mask if mask is not None else torch.ones_like(allowed))


@pytest.mark.slow  # runs the C++ compiler
@pytest.mark.usefixtures("without_lazy_modules")
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("lengths", "batch"),
    [(((4, 3), (9, 5)), 1), (((2, 3, 1), (50, 130, 81)), 3), (((2,) * 5, (3, 4, 5, 6, 7)), 1)],
)
def test_equals_the_dense_oracle(lengths, batch):
    torch.compiler.reset()
    for name in MASKS:
        plan = Plan(name, *lengths, "flex")
        generator = torch.Generator().manual_seed(0)
        tensors = torch.randn(3, batch, 2, plan.tokens, 16, generator=generator).unbind()
        expected = attend(*tensors, Plan(name, *lengths, "dense"))
        assert (attend(*tensors, plan) - expected).norm() <= 1e-6 * expected.norm()


def test_on_cpu_it_is_refused_where_it_would_fail():
    plan = Plan("v2", (2, 2), (5, 5), "flex")
    tensors = torch.randn(3, 1, 2, 14, 16).unbind()
    with pytest.raises(ConfigError, match="no backward pass on CPU"):
        attend(*(x.clone().requires_grad_() for x in tensors), plan)
    with pytest.raises(ConfigError, match="float64"):
        attend(*(x.double() for x in tensors), plan)


def test_on_cpu_it_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    plan = Plan("v2", (2, 2), (6, 5), "flex")
    with pytest.raises(ConfigError, match=r"C\+\+ compiler"):
        attend(*torch.randn(3, 1, 2, 15, 16).unbind(), plan)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", MASKS)
def test_on_cuda_equals_the_dense_oracle_backward_too(name):
    plan = Plan(name, (20, 30, 10), (150, 130, 281), "flex")
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(4, 2, 2, plan.tokens, 64, generator=generator)
    *exact, weight = made.unbind()
    exact = [x.clone().requires_grad_() for x in exact]
    rounded = [x.detach().cuda().bfloat16().requires_grad_() for x in exact]
    expected = attend(*exact, Plan(name, plan.text_lengths, plan.video_lengths, "dense"))
    found = attend(*rounded, plan)
    for a, b in zip(
        [found, *torch.autograd.grad(found, rounded, weight.cuda().bfloat16())],
        [expected, *torch.autograd.grad(expected, exact, weight)],
        strict=True,
    ):
        assert (a.cpu().float() - b).norm() <= 2e-2 * b.norm()
