import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training import lse_attention as module
from training.attention import Plan, attend
from training.lse_attention import choose_kernel, lse_attention, lse_attention_backward
from training.masks import ALIASES

MASKS = [*ALIASES, "scene_causal"]
LENGTHS = [
    pytest.param(((2, 3), (4, 5)), id="two"),
    pytest.param(((3, 3, 3), (6, 6, 6)), id="three"),
    pytest.param(((1, 4, 2), (7, 1, 5)), id="three_unequal"),
    pytest.param(((2,) * 5, (3, 4, 5, 6, 7)), id="five"),
    pytest.param(((4, 0, 2), (5, 6, 0)), id="some_empty"),
]
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def both(plan: Plan, tensors: list[torch.Tensor], weight: torch.Tensor):
    """Output and gradients of the dense oracle and of the plan's own backend."""
    for backend in ("dense", plan.backend):
        out = attend(*tensors, Plan(plan.mask, plan.text_lengths, plan.video_lengths, backend))
        yield [out.detach(), *torch.autograd.grad(out, tensors, weight.to(out.dtype))]


def inputs(plan: Plan, batch: int, dtype=torch.float64, heads: int = 3, width: int = 8):
    generator = torch.Generator().manual_seed(0)
    shape = (4, batch, heads, plan.tokens, width)
    made = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    *tensors, weight = made.unbind()
    return [x.requires_grad_() for x in tensors], weight


def assert_close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", MASKS)
def test_equals_the_dense_oracle(name, lengths, batch):
    plan = Plan(name, *lengths, "lse")
    expected, found = both(plan, *inputs(plan, batch))
    assert_close(found, expected, 1e-12)


lengths = st.integers(1, 5).flatmap(
    lambda s: st.tuples(*[st.lists(st.integers(0, 20), min_size=s, max_size=s)] * 2)
)


@given(st.sampled_from(MASKS), lengths.filter(lambda two: sum(map(sum, two)) > 0))
def test_equals_the_dense_oracle_for_any_lengths(name, lengths):
    plan = Plan(name, tuple(lengths[0]), tuple(lengths[1]), "lse")
    expected, found = both(plan, *inputs(plan, 1, heads=1))
    assert_close(found, expected, 1e-12)


@pytest.mark.parametrize("name", MASKS)
def test_bfloat16_stays_near_float32(name):
    plan = Plan(name, (9, 17, 5), (70, 33, 129), "lse")
    exact, weight = inputs(plan, 2, torch.float32, width=64)
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    expected, _ = both(plan, exact, weight)
    _, found = both(plan, rounded, weight)
    assert_close(found, expected, 2e-2)


@pytest.mark.parametrize("text_key", [100.0, -100.0, 0.0])
def test_large_scores_do_not_overflow(text_key):
    # scores of thousands, and blocks whose log-sum-exps lie thousands apart
    plan = Plan("v2", (2, 3), (4, 5), "lse")
    (query, key, value), weight = inputs(plan, 1)
    with torch.no_grad():
        query[..., 0] = key[..., 0] = 100.0
        key[:, :, :5, 0] = text_key
    expected, found = both(plan, [query, key, value], weight)
    assert all(x.isfinite().all() for x in found)
    assert_close(found, expected, 1e-9)  # a score of 3500 is itself rounded to 4e-13


@pytest.mark.parametrize("name", MASKS)
def test_heads_in_several_calls_equal_all_at_once(name, monkeypatch):
    plan = Plan(name, (1, 4, 2), (7, 1, 5), "lse")
    tensors, weight = inputs(plan, 2, heads=5)
    _, at_once = both(plan, tensors, weight)
    monkeypatch.setattr(module, "_SMALL_BYTES", 0)
    _, in_turns = both(plan, tensors, weight)
    assert_close(in_turns, at_once, 1e-14)


def test_memory_orders_of_the_inputs_do_not_matter():
    # as they come: (B, L, N, E) seen as (B, N, L, E); and an outer gradient without strides
    plan = Plan("v2", (2, 3), (4, 5), "lse")
    tensors, _ = inputs(plan, 2)
    turned = [x.detach().mT.contiguous().mT.requires_grad_() for x in tensors]
    swapped = [
        x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in tensors
    ]
    ones = torch.ones(()).double().expand(tensors[0].shape)
    expected, found = both(plan, tensors, ones)
    assert_close(found, expected, 1e-12)
    for other in (turned, swapped):
        _, again = both(plan, other, ones)
        assert_close(again, found, 1e-14)


def test_the_next_layer_flattens_the_output_without_a_copy():
    plan = Plan("v2", (2, 3), (4, 5), "lse")
    tensors, _ = inputs(plan, 2)
    out = attend(*tensors, plan)
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


@pytest.mark.slow  # loads the compiler
@pytest.mark.parametrize("name", ["v1", "v2", "v5"])
def test_is_a_well_behaved_operator(name):
    plan = Plan(name, (2, 3), (4, 5), "lse")
    tensors, _ = inputs(plan, 2)
    rest = (name, [2, 3], [4, 5], "cpu")
    torch.library.opcheck(lse_attention, (*tensors, *rest))
    turned = [x.detach().mT.contiguous().mT for x in tensors]
    out, lse = lse_attention(*turned, *rest)
    torch.library.opcheck(lse_attention_backward, (turned[0], *turned, out, lse, *rest))


def test_second_derivatives_are_refused():
    plan = Plan("v2", (2, 3), (4, 5), "lse")
    tensors, _ = inputs(plan, 1)
    (grad,) = torch.autograd.grad(attend(*tensors, plan).sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        ("meta", torch.bfloat16, "meta"),
        ("cuda", torch.float32, "float32"),
        ("cpu", torch.int32, "int32"),
    ],
)
def test_no_kernel_comes_with_a_reason(device, dtype, reason):
    kernel, why = choose_kernel(torch.device(device), dtype, 64)
    assert kernel is None
    assert reason in why


@on_cuda
@pytest.mark.parametrize("kernel", ["flash", "cudnn"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", MASKS)
def test_cuda_kernels_equal_the_dense_oracle(name, lengths, kernel):
    best, _ = choose_kernel(torch.device("cuda"), torch.bfloat16, 64)
    if best is None or (kernel == "cudnn" and best != "cudnn"):
        pytest.skip(f"this GPU's kernel is {best}")
    text, video = ([37 * n for n in part] for part in lengths)
    plan = Plan(name, tuple(text), tuple(video))
    exact, weight = inputs(plan, 2, torch.float32, heads=5, width=64)
    expected, _ = both(Plan(name, tuple(text), tuple(video), "dense"), exact, weight)
    rounded = [x.detach().cuda().bfloat16().requires_grad_() for x in exact]
    out, _ = lse_attention(*rounded, name, text, video, kernel)
    grads = torch.autograd.grad(out, rounded, weight.cuda().bfloat16())
    assert_close([x.cpu() for x in (out.detach(), *grads)], expected, 2e-2)
