from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import multiprocessing

from schemas.errors import ConfigError
from tests.training.models import SHAPES
from training.attention import Plan
from training.masks import group_of_token
from training.modulation import add_gated, modulate
from training.transformer import Mask2DiTTransformer3DModel
from training.ulysses import Sharing, even_parts, own_part, to_heads, to_tokens

torch.set_num_threads(1)
RANKS = 4
NOBODY: Any = None  # a group that is never asked for anything


def shares(text: tuple[int, ...], video: tuple[int, ...], ranks: int) -> list[Plan]:
    """The plan of every rank."""
    parts = even_parts(sum(text + video), ranks)
    return [Plan("v2", text, video, sharing=Sharing(NOBODY, r, parts)) for r in range(ranks)]


SCENES = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 40)), min_size=1, max_size=5)


@given(SCENES, st.integers(1, 8))
def test_every_token_is_of_one_rank_and_keeps_its_scene(scenes, ranks):
    text, video = zip(*scenes, strict=True)
    plans = shares(text, video, ranks)
    found = torch.cat([group_of_token(*plan.own_lengths) for plan in plans])
    assert torch.equal(found, group_of_token(text, video))
    sizes = {cast("Sharing", plan.sharing).own for plan in plans}
    assert max(sizes) - min(sizes) <= 1


@given(SCENES, st.integers(1, 8))
def test_the_parts_of_all_ranks_are_the_sequence(scenes, ranks):
    text, video = zip(*scenes, strict=True)
    whole = torch.arange(sum(text + video))
    tokens = whole[None, :, None]
    starts = []
    for plan in shares(text, video, ranks):
        sharing = cast("Sharing", plan.sharing)
        own = own_part(tokens[:, : sum(text)], tokens[:, sum(text) :], whole, sharing)
        assert own[2] is not None
        assert torch.equal(torch.cat(own[:2], 1)[0, :, 0], own[2])
        assert [own[0].shape[1], own[1].shape[1]] == [sum(n) for n in plan.own_lengths]
        starts.append(own[2])
    assert torch.equal(torch.cat(starts), whole)


@given(SCENES, st.integers(1, 8), st.booleans())
@settings(max_examples=30, deadline=None)
def test_a_part_is_modulated_as_in_the_whole(scenes, ranks, conditional):
    text_lengths, video_lengths = zip(*scenes, strict=True)
    torch.manual_seed(0)
    norm = model("2b").transformer_blocks[0].norm1
    tokens = torch.randn(2, sum(text_lengths + video_lengths), 64, dtype=torch.float64)
    times = torch.randn(2, len(scenes) if conditional else 1, 16, dtype=torch.float64)

    def run(text, video, plan):
        video, text, video_gate, text_gate = modulate(cast("Any", norm), video, text, times, plan)
        own_text, own_video = plan.own_lengths
        gated = (
            add_gated(text, text_gate, text, own_text),
            add_gated(video, video_gate, video, own_video),
        )
        return torch.cat(gated, 1)

    split = [sum(text_lengths), sum(video_lengths)]
    expected = run(*tokens.split(split, 1), Plan("v2", text_lengths, video_lengths))
    found = []
    for plan in shares(text_lengths, video_lengths, ranks):
        text, video, _ = own_part(*tokens.split(split, 1), None, cast("Sharing", plan.sharing))
        found.append(run(text, video, plan))
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=1e-12)


def model(shape: str, **changes: Any) -> Mask2DiTTransformer3DModel:
    """A seeded model with a head per rank."""
    torch.manual_seed(0)
    config = {**SHAPES[shape], "num_attention_heads": RANKS, **changes}
    made = Mask2DiTTransformer3DModel(**config).double().train()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return made


MASKS = ("v1", "v2", "v3", "v4", "v5", "scene_causal")
# shape, mask, frames of each scene, latent size, a row of generated scenes per sample, and the rest
CASES: list[tuple[Any, ...]] = [
    *((shape, "v2", [2, 2, 2], (4, 6), None, {}) for shape in SHAPES),
    # scenes of unequal length, conditions; 69 tokens in 2b and 5b
    *(
        (shape, mask, frames, (6, 6), [[0, 0, 1], [0, 1, 1]], {})
        for shape, frames in (("2b", [1, 2, 3]), ("5b", [1, 2, 3]), ("1.5", [2, 4, 2]))
        for mask in MASKS
    ),
    # so little video that the first ranks have text alone
    ("5b", "v2", [1, 2], (2, 2), [[0, 1], [1, 1]], {}),
    ("2b", "v2", [2, 3], (6, 8), None, {"attention_backend": "lse"}),
    ("5b", "scene_causal", [2, 3], (6, 6), [[0, 1], [0, 1]], {"attention_backend": "lse"}),
    ("5b", "v2", [1, 2, 3], (4, 6), [[0, 0, 1], [1, 1, 1]], {"checkpoint_every": 1}),
    ("1.5", "v2", [2, 4], (4, 6), None, {"checkpoint_every": 2}),
]


def output_and_gradients(ours: Mask2DiTTransformer3DModel, case: Any, sample: int):
    """Of one sample, whose loss weighs every output differently."""
    shape, _, scene_frames, size, generated, _ = case
    generator = torch.Generator().manual_seed(sample)
    video, weight = torch.randn(
        2, 2, sum(scene_frames), 4, *size, generator=generator, dtype=torch.float64
    )
    text = torch.randn(2, len(scene_frames), 5, 8, generator=generator, dtype=torch.float64)
    flags = None if generated is None else torch.tensor(generated, dtype=torch.bool)
    out = ours(video, text, torch.tensor([37, 900]), scene_frames, flags)
    ours.zero_grad()
    ((out - weight) ** 2).mean().backward()
    grads = {}
    for name, p in ours.named_parameters():
        assert p.grad is not None, f"{shape}: no gradient of {name}"
        grads[name] = p.grad.clone()
    return out.detach(), grads


def check_case(case: Any, ranks: int, group: dist.ProcessGroup) -> None:
    """Compare with one process: the output of a group, and the mean gradient of all groups."""
    shape, mask, *_, rest = case
    checkpoint_every = rest.get("checkpoint_every", 0)
    ours = model(shape, mask=mask, **{k: v for k, v in rest.items() if k != "checkpoint_every"})
    ours.checkpoint_every = checkpoint_every
    sample = dist.get_rank() // ranks
    alone = [output_and_gradients(ours, case, i) for i in range(RANKS // ranks)]
    ours.set_sequence_group(group)
    out, grads = output_and_gradients(ours, case, sample)
    torch.testing.assert_close(out, alone[sample][0], rtol=0, atol=1e-10, msg=f"{case}")
    together = torch.cat([grad.flatten() for grad in grads.values()])
    dist.all_reduce(together)
    found = (together / RANKS).split([grad.numel() for grad in grads.values()])
    noise = 1e-12 * together.norm() / RANKS  # a bias of keys that are not turned has no gradient
    for name, mean in zip(grads, found, strict=True):
        expected = sum(one[name].flatten() for _, one in alone) / len(alone)
        error = (mean - expected).norm()
        assert error <= 1e-10 * expected.norm() + noise, f"{case}: {name}, {error}"


def check_exchange(dtype: torch.dtype, group: dist.ProcessGroup) -> None:
    """Between the two exchanges a rank has its heads of all tokens; after them all is as before."""
    numbers = torch.arange(2 * RANKS * 7 * 3).reshape(2, RANKS, 7, 3)  # 7 tokens for 4 ranks
    whole = numbers.to(dtype)
    sharing = Sharing.of(group, 7)
    own = whole[:, :, slice(*sharing.span)]
    heads = to_heads(own, 2 * own, -own, sharing)
    for found, factor in zip(heads, (1, 2, -1), strict=True):
        assert torch.equal(found, factor * whole[:, [sharing.rank]])
        assert torch.equal(to_tokens(found, sharing), factor * own)


def check_rank(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    three = dist.new_group([0, 1, 2])
    everyone = cast("dist.ProcessGroup", dist.group.WORLD)
    for dtype in (torch.bfloat16, torch.float32):
        check_exchange(dtype, everyone)
    for case in CASES:
        check_case(case, 2, pairs[rank // 2])
        check_case(case, 4, everyone)

    ours = model("2b")
    if rank < 3:
        with pytest.raises(ConfigError, match="4 heads for 3 ranks"):
            ours.set_sequence_group(three)
    ours.set_sequence_group(everyone)
    with pytest.raises(ConfigError, match="cannot share a sequence"):
        ours.compile_blocks()
    ours.set_sequence_group(None)
    ours.compile_blocks()
    with pytest.raises(ConfigError, match="cannot share a sequence"):
        ours.set_sequence_group(everyone)
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_shared_sequence_gives_the_output_and_the_gradients_of_one_process(tmp_path):
    """On 2 x 2 ranks with another sample for each pair, and on all 4 with the same."""
    store = f"file://{tmp_path / 'store'}"
    # the ranks are forks of a process that imports torch once
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    multiprocessing.start_processes(  # raises what a rank raises
        check_rank, args=(store,), nprocs=RANKS, start_method="forkserver"
    )
