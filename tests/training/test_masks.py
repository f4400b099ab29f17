import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import ConfigError
from training.attention import Plan, attend
from training.masks import ALIASES, MASKS, Tokens, dense_mask, predicate

# What a text and a video token of a scene see, as in the table of the facts: for each kind of key,
# "own" scene, "all" scenes, or "past" (own and earlier ones).
TABLE = {
    "v1": {("text", "text"): "own", ("text", "video"): "own", ("video", "video"): "own"},
    "v2": {("text", "text"): "own", ("text", "video"): "own", ("video", "video"): "all"},
    "v3": {("text", "text"): "all", ("text", "video"): "own", ("video", "video"): "all"},
    "v4": {("text", "text"): "all", ("text", "video"): "all", ("video", "video"): "all"},
    "v5": {("text", "text"): "all", ("text", "video"): "all", ("video", "video"): "all"},
    "scene_causal": {
        ("text", "text"): "own",
        ("text", "video"): "own",
        ("video", "video"): "past",
    },
}
for name, row in TABLE.items():
    row["video", "text"] = "all" if name == "v5" else "own"


def brute_force(name: str, text: tuple[int, ...], video: tuple[int, ...]) -> torch.Tensor:
    tokens = [(s, "text") for s, n in enumerate(text) for _ in range(n)]
    tokens += [(s, "video") for s, n in enumerate(video) for _ in range(n)]
    reach = {
        "own": lambda q, k: k == q,
        "all": lambda q, k: True,
        "past": lambda q, k: k <= q,
    }
    rows = [[reach[TABLE[name][qk, kk]](qs, ks) for ks, kk in tokens] for qs, qk in tokens]
    return torch.tensor(rows)


lengths = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(st.sampled_from(sorted(TABLE)), lengths, st.data())
def test_dense_mask_is_the_table(name, text, data):
    video = data.draw(
        st.lists(st.integers(1, 4), min_size=len(text), max_size=len(text)), label="video"
    )
    mask = dense_mask(name, tuple(text), tuple(video))
    expected = brute_force(name, tuple(text), tuple(video))
    if mask is None:
        assert expected.all()
    else:
        assert torch.equal(mask, expected)
        assert not expected.all()


@pytest.mark.parametrize("name", [*ALIASES, *MASKS])
def test_predicates_work_on_plain_values(name):
    f = predicate(name)
    kinds = itertools.product(range(3), (False, True))
    tokens = [Tokens(scene, video) for scene, video in kinds]
    mask = dense_mask(name, (1, 1, 1), (1, 1, 1))
    for q, k in itertools.product(tokens, tokens):
        expected = (
            True if mask is None else bool(mask[q.video * 3 + q.scene, k.video * 3 + k.scene])
        )
        assert bool(f(q, k)) == expected


def test_unknown_mask_is_refused():
    with pytest.raises(ConfigError, match="scene_causal"):
        predicate("v6")


@pytest.mark.parametrize("name", sorted(TABLE))
def test_gradient_flows_exactly_where_the_mask_allows(name):
    plan = Plan(name, (2, 1, 3), (3, 2, 1))
    expected = brute_force(name, plan.text_lengths, plan.video_lengths)
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 12, 8, generator=generator, dtype=torch.float64)
    value.requires_grad_()
    out = attend(query, key, value, plan)
    for row in range(12):
        (grad,) = torch.autograd.grad(out[:, :, row].sum(), value, retain_graph=True)
        assert torch.equal(grad[0, 0].abs().sum(-1) > 0, expected[row])
