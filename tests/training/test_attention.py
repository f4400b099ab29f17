import logging

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from schemas.errors import ConfigError
from training.attention import DENSE_TOKENS, Plan, attend, choose_backend
from training.masks import ALIASES, group_of_token, group_table

CPU = torch.device("cpu")
MASKS = [*ALIASES, "scene_causal"]
LENGTHS = [((2, 3, 1), (5, 3, 6)), ((1, 2), (4, 3))]


def inputs(plan: Plan, batch: int = 2, dtype: torch.dtype = torch.float64, heads: int = 2):
    generator = torch.Generator().manual_seed(0)
    shape = (3, batch, heads, plan.tokens, 8)
    made = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return [x.clone().requires_grad_() for x in made.unbind()]


def textbook(query, key, value, plan: Plan):
    """Attention written out: softmax over the allowed scores."""
    table = torch.tensor(group_table(plan.mask, len(plan.text_lengths)))
    group = group_of_token(plan.text_lengths, plan.video_lengths)
    scores = query @ key.mT / query.shape[-1] ** 0.5
    return scores.masked_fill(~table[group][:, group], -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", MASKS)
def test_dense_is_the_textbook(name, lengths):
    plan = Plan(name, *lengths, backend="dense")
    tensors = inputs(plan)
    expected = textbook(*tensors, plan)
    found = attend(*tensors, plan)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
    for a, b in zip(
        [found, *torch.autograd.grad(found, tensors, weight)],
        [expected, *torch.autograd.grad(expected, tensors, weight)],
        strict=True,
    ):
        assert (a - b).norm() <= 1e-12 * b.norm()


@pytest.mark.parametrize("backend", ["dense", "lse"])
@pytest.mark.parametrize("name", MASKS)
def test_one_layer_isolates_exactly_what_the_mask_says(name, backend):
    plan = Plan(name, (2, 1, 3), (3, 2, 1), backend)
    table = group_table(name, 3)
    group = group_of_token(plan.text_lengths, plan.video_lengths)
    tokens = torch.randn(1, 2, 12, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    # all three from the tokens themselves, so every way for influence to pass is open
    out = attend(tokens, tokens * 0.7, tokens * 1.3, plan)
    for i in range(6):
        (grad,) = torch.autograd.grad(out[:, :, group == i].square().sum(), tokens, retain_graph=1)
        reached = grad[0].abs().sum((0, 2)) > 0
        assert reached.tolist() == [table[i][j] for j in group.tolist()]


def test_v2_isolates_video_from_the_texts_of_other_scenes_but_not_from_their_video():
    table = group_table("v2", 3)
    for i in range(3):
        for j in range(3):
            assert table[i][3 + j] == table[3 + i][j] == (i == j)
            assert table[3 + i][3 + j]


@pytest.mark.slow  # loads the compiler
@pytest.mark.parametrize("backend", ["auto", "dense", "lse"])
def test_compiles_into_one_graph(backend):
    plan = Plan("v2", *LENGTHS[0], backend)
    tensors = inputs(plan)

    def layer(query, key, value):
        return attend(query * 2, key, value, plan).mT

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected, found = layer(*tensors), compiled(*tensors)
    weight = torch.ones_like(expected)
    for a, b in zip(
        [found, *torch.autograd.grad(found, tensors, weight)],
        [expected, *torch.autograd.grad(expected, tensors, weight)],
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["dense", "lse"])
def test_activation_checkpointing_changes_nothing(backend):
    plan = Plan("scene_causal", *LENGTHS[0], backend)
    tensors = inputs(plan)
    kept = attend(*tensors, plan)
    redone = checkpoint(attend, *tensors, plan, use_reentrant=False)
    weight = torch.ones_like(kept)
    for a, b in zip(
        torch.autograd.grad(kept, tensors, weight),
        torch.autograd.grad(redone, tensors, weight),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["dense", "lse"])
def test_autocast_casts_like_torchs_own_attention(backend):
    plan = Plan("v2", *LENGTHS[0], backend)
    query, key, value = inputs(plan, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        own = torch.nn.functional.scaled_dot_product_attention(query, key.bfloat16(), value)
        mixed = attend(query, key.bfloat16(), value, plan)
        exact = attend(*inputs(plan), plan)
    assert mixed.dtype == own.dtype == torch.bfloat16
    assert exact.dtype == torch.float64
    assert (mixed - exact).norm() <= 2e-2 * exact.norm()
    mixed.sum().backward()
    assert query.grad.dtype == key.grad.dtype == torch.float32


def test_auto_follows_its_rule():
    def chosen(plan, dtype=torch.float32, device=CPU):
        return choose_backend(plan, device, dtype, needs_grad=True, width=64)

    long, short = (DENSE_TOKENS // 3 + 1,) * 3, (20,) * 3
    assert chosen(Plan("v2", short, short))[:2] == ("dense", "no more than 512 tokens")
    assert chosen(Plan("v2", short, long)).backend == "lse"
    assert chosen(Plan("v2", short, long)).kernel == "cpu"
    assert chosen(Plan("v5", short, long))[:2] == ("dense", "nothing is masked")
    assert chosen(Plan("v2", (226,), (17550,)))[:2] == ("dense", "nothing is masked")
    assert chosen(Plan("v2", short, short, "lse")).backend == "lse"
    assert chosen(Plan("v2", short, long, "dense"))[:2] == ("dense", "asked for")
    # without a flash kernel there is the dense mask, and the reason says why
    choice = chosen(Plan("v2", short, long), device=torch.device("meta"))
    assert choice.backend == "dense"
    assert "meta" in choice.reason


@pytest.mark.parametrize(
    ("plan", "device", "message"),
    [
        (Plan("v2", (2, 2), (5, 5), "lse"), torch.device("meta"), "lse"),
        (Plan("v2", (2, 2), (5, 5), "flex"), CPU, "no backward"),
        (Plan("v2", (2, 2), (5, 5), "flax"), CPU, "auto, dense, lse or flex"),  # type: ignore[arg-type]
        (Plan("v6", (2, 2), (5, 5)), CPU, "scene_causal"),
    ],
)
def test_what_cannot_run_is_refused(plan, device, message):
    with pytest.raises(ConfigError, match=message):
        choose_backend(plan, device, torch.float32, needs_grad=True, width=64)


def test_the_choice_is_logged_once_for_each_plan(caplog):
    plan = Plan("v3", (2, 2, 7), (5, 5, 3), "lse")
    tensors = inputs(plan)
    with caplog.at_level(logging.INFO, "training.attention"):
        for _ in range(3):
            attend(*tensors, plan)
    (message,) = [r.getMessage() for r in caplog.records]
    assert "backend=lse kernel=cpu mask=v3 scenes=3 tokens=24 device=cpu" in message
