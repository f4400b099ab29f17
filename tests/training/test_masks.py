import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import ConfigError
from training.masks import (
    ALIASES,
    MASKS,
    dense_mask,
    group_of_token,
    group_table,
    groups,
    pieces,
    predicate,
)

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
def test_group_table_is_the_predicate_and_an_alias_its_mask(name):
    table = group_table(name, 3)
    allowed = predicate(name)
    for (i, q), (j, k) in itertools.product(enumerate(groups(3)), repeat=2):
        assert table[i][j] is allowed(q, k)
    assert table == group_table(ALIASES.get(name, name), 3)


def test_groups_follow_the_sequence():
    assert group_of_token((1, 0, 2), (2, 1, 0)).tolist() == [0, 2, 2, 3, 3, 4]
    assert [(g.scene, g.video) for g in groups(2)] == [
        (0, False),
        (1, False),
        (0, True),
        (1, True),
    ]


with_empty = st.lists(st.integers(0, 3), min_size=1, max_size=5)


@given(st.sampled_from(sorted(TABLE)), with_empty, st.data())
def test_pieces_tile_the_mask(name, text, data):
    video = data.draw(
        st.lists(st.integers(0, 3), min_size=len(text), max_size=len(text)), label="video"
    )
    plan = (name, tuple(text), tuple(video))
    tokens = sum(text) + sum(video)
    times = torch.zeros(tokens, tokens, dtype=torch.int)
    for piece in pieces(*plan):
        rows, columns = slice(*piece.rows), slice(*piece.columns)
        touched = times[rows].any(1)
        assert piece.first == (not touched.any())
        times[rows, columns] += 1
    expected = brute_force(*plan).reshape(tokens, tokens)
    assert torch.equal(times, expected.int())


@pytest.mark.parametrize("scenes", [2, 3, 10])
def test_pieces_of_v2_keep_all_video_in_one_call(scenes):
    text, video = (2,) * scenes, (5,) * scenes
    first, *others = pieces("v2", text, video)
    assert first.rows == first.columns == (2 * scenes, 7 * scenes)
    assert len(others) == 3 * scenes
    assert len(pieces("v5", text, video)) == len(pieces("v2", (2,), (5,))) == 1


def test_unknown_mask_is_refused():
    with pytest.raises(ConfigError, match="scene_causal"):
        predicate("v6")
