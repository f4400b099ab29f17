import os
import shutil

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from schemas.errors import ConfigError
from tests.training.models import GRID, SHAPES, inputs, model
from tests.training.restatement import Restatement

torch.set_num_threads(1)


def diffusers_rotary(shape: str, frames: int, grid: tuple[int, int]):
    """What diffusers' own pipeline gives its transformer."""
    if shape == "2b":
        return None
    if shape == "5b":
        crop = get_resize_crop_region_for_grid(grid, GRID[1], GRID[0])
        return get_3d_rotary_pos_embed(16, crop, grid, frames)
    return get_3d_rotary_pos_embed(16, None, grid, frames // 2, grid_type="slice", max_size=GRID)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("frames", [4, 6])
@pytest.mark.parametrize("size", [(6, 8), (4, 8), (6, 4)], ids=str)
def test_one_scene_equals_diffusers(shape, frames, size):
    ours = model(shape)
    theirs = CogVideoXTransformer3DModel(**SHAPES[shape]).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    video, text, timestep = inputs(frames=frames, scenes=1, size=size)
    grid = (size[0] // 2, size[1] // 2)
    with torch.no_grad():
        expected = theirs(
            video, text[:, 0], timestep, image_rotary_emb=diffusers_rotary(shape, frames, grid)
        ).sample
        found = ours(video, text, timestep, [frames])
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


RESTATED = {
    "plain": ([2, 2, 2], [1, 1, 1], (6, 8)),
    "last_is_generated": ([2, 2, 2], [0, 0, 1], (4, 6)),
    "middle_is_generated_unequal": ([2, 4, 2], [0, 1, 0], (4, 8)),
}


@pytest.mark.parametrize("case", RESTATED)
@pytest.mark.parametrize("mask", ["v2", "v5"])
@pytest.mark.parametrize("shape", SHAPES)
def test_three_scenes_equal_the_slow_restatement(shape, mask, case):
    scene_frames, flags, size = RESTATED[case]
    ours = model(shape, mask=mask).double()
    video, text, timestep = inputs(batch=1, frames=sum(scene_frames), size=size)
    video, text = video.double(), text.double()
    slow = Restatement({**SHAPES[shape], "mask": mask}, ours.state_dict())
    generated = None if all(flags) else torch.tensor([flags], dtype=torch.bool)
    with torch.no_grad():
        expected = slow(video[0], text[0], int(timestep[0]), scene_frames, [bool(f) for f in flags])
        found = ours(video, text, timestep, scene_frames, generated)[0]
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize(
    "policy", [{"position_policy": "reset"}, {"position_policy": "gap", "position_gap": 3}], ids=str
)
@pytest.mark.parametrize("shape", SHAPES)
def test_other_position_policies_equal_the_slow_restatement(shape, policy):
    ours = model(shape, **policy).double()
    video, text, timestep = inputs(batch=1, frames=6, scenes=2)
    video, text = video.double(), text.double()
    slow = Restatement({**SHAPES[shape], "mask": "v2", **policy}, ours.state_dict())
    with torch.no_grad():
        expected = slow(video[0], text[0], int(timestep[0]), [2, 4], [True, True])
        found = ours(video, text, timestep, [2, 4])[0]
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


@given(
    shape=st.sampled_from(list(SHAPES)),
    scenes=st.lists(
        st.tuples(st.integers(1, 2), st.lists(st.booleans(), min_size=3, max_size=3)),
        min_size=1,
        max_size=5,
    ),
    batch=st.sampled_from([1, 3]),
)
@settings(max_examples=25)
def test_isolated_scenes_are_each_as_if_alone_at_their_own_time(shape, scenes, batch):
    """Any number and length of scenes and any set of conditions, another one in every sample."""
    ours = model(shape, mask="v1", position_policy="reset")
    scene_frames = [2 * length for length, _ in scenes]
    generated = torch.tensor([flags for _, flags in scenes]).T[:batch]
    video, text, timestep = inputs(batch, sum(scene_frames), len(scenes))
    with torch.no_grad():
        together = ours(video, text, timestep, scene_frames, generated).split(scene_frames, 1)
        for i, part in enumerate(video.split(scene_frames, 1)):
            time = torch.where(generated[:, i], timestep, 0)
            # the reset positions of 2B-like models are stretched to nothing, so alone is the same
            alone = ours(part, text[:, i, None], time, [scene_frames[i]])
            torch.testing.assert_close(together[i], alone, rtol=1e-4, atol=1e-4)


def test_full_mask_on_three_scenes_equals_one_long_scene():
    # With v5 only the positions could differ; RoPE runs on, so S scenes are one long scene.
    ours = model("5b", mask="v5")
    video, text, timestep = inputs()
    with torch.no_grad():
        three = ours(video, text, timestep, [3, 3, 3])
        long = ours(video, text.flatten(1, 2)[:, None], timestep, [9])
    torch.testing.assert_close(three, long)


@pytest.mark.parametrize("shape", ["2b", "5b"])
@pytest.mark.parametrize("mask", ["v2", "scene_causal"])
def test_batch_is_one_by_one_and_scenes_may_be_unequal(mask, shape):
    ours = model(shape, mask=mask)
    video, text, timestep = inputs(3)
    generated = torch.tensor([[False, True, True], [False, False, True], [True, True, True]])
    with torch.no_grad():
        both = ours(video, text, timestep, [2, 3, 4], generated)
        single = [
            ours(video[i, None], text[i, None], timestep[i, None], [2, 3, 4], generated[i, None])
            for i in range(3)
        ]
        plain = ours(video, text, timestep, [2, 3, 4])
    torch.testing.assert_close(both, torch.cat(single))
    torch.testing.assert_close(both[2], plain[2])


def reaches(mask: str, num_scenes: int = 3) -> torch.Tensor:
    """(2, S, S): whether the output of scene i depends on the video and on the text of scene j."""
    ours = model("5b", mask=mask)
    video, text, timestep = inputs(1, 2 * num_scenes, num_scenes)
    video.requires_grad_()
    text.requires_grad_()
    out = ours(video, text, timestep, [2] * num_scenes).split(2, 1)
    found = torch.zeros(2, num_scenes, num_scenes, dtype=torch.bool)
    for i, scene in enumerate(out):
        by_video, by_text = torch.autograd.grad(scene.sum(), (video, text), retain_graph=True)
        found[0, i] = by_video[0].unflatten(0, (num_scenes, 2)).flatten(1).abs().amax(1) > 0
        found[1, i] = by_text[0].flatten(1).abs().amax(1) > 0
    return found


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("v1", torch.eye(3, dtype=torch.bool)),
        ("scene_causal", torch.ones(3, 3).tril().bool()),
        ("v2", torch.ones(3, 3, dtype=torch.bool)),  # through the video tokens, over two layers
    ],
)
def test_gradients_of_the_whole_model_reach_exactly_the_scenes_they_may(mask, expected):
    assert torch.equal(reaches(mask), expected.expand(2, 3, 3))


def checkpointed(shape, every, arguments):
    """Runs of each block, bytes kept for the backward pass outside recomputed ones, gradients."""
    ours = model(shape).train()
    ours.checkpoint_every = every
    runs = [0, 0]
    for i, block in enumerate(ours.transformer_blocks):
        block.register_forward_pre_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    weights = {p.data_ptr() for p in ours.parameters()}
    kept = {}

    def note(x):
        if x.data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = ours(*arguments).square().mean()
    loss.backward()
    return runs, sum(kept.values()), [p.grad for p in ours.parameters()]


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("scene_frames", [[2, 2], [2, 4, 2], [2, 2, 4, 2, 2]], ids=len)
@pytest.mark.parametrize("shape", ["2b", "1.5"])
def test_checkpointing_recomputes_every_kth_block_and_changes_nothing(
    shape, scene_frames, batch, conditional
):
    video, text, timestep = inputs(batch, sum(scene_frames), len(scene_frames))
    generated = None
    if conditional:
        generated = torch.arange(len(scene_frames)).expand(batch, -1) % 2 == 1
    arguments = (video, text, timestep, scene_frames, generated)
    none, second, every = (checkpointed(shape, k, arguments) for k in (0, 2, 1))
    assert [none[0], second[0], every[0]] == [[1, 1], [2, 1], [2, 2]]
    assert none[1] > second[1] > every[1]
    for found in (second, every):
        torch.testing.assert_close(found[2], none[2], rtol=0, atol=0)


def test_the_switches_of_diffusers_are_all_blocks_or_none():
    ours = model("2b")
    assert not ours.is_gradient_checkpointing
    ours.enable_gradient_checkpointing()
    assert (ours.checkpoint_every, ours.is_gradient_checkpointing) == (1, True)
    ours.disable_gradient_checkpointing()
    assert (ours.checkpoint_every, ours.is_gradient_checkpointing) == (0, False)


@pytest.mark.slow  # runs the C++ compiler
@pytest.mark.usefixtures("without_lazy_modules")
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
def test_compiled_blocks_are_the_same_and_one_for_all_layers(monkeypatch):
    # more layers than graphs that torch would compile before it gives up
    monkeypatch.setitem(SHAPES, "deep", {**SHAPES["5b"], "num_layers": 10})
    torch.compiler.reset()
    counters.clear()
    video, text, timestep = inputs()
    generated = torch.tensor([[False, True, True], [False, False, True]])
    found = []
    for compiled in (False, True):
        ours = model("deep", attention_backend="lse").train()
        names = list(ours.state_dict())
        ours.checkpoint_every = 2
        if compiled:
            ours.compile_blocks()
        out = ours(video, text, timestep, [2, 3, 4], generated)
        out.square().mean().backward()
        assert list(ours.state_dict()) == names
        found.append([out.detach(), *(p.grad for p in ours.parameters())])
    assert counters["stats"]["unique_graphs"] == 1
    for compiled, eager in zip(found[1], found[0], strict=True):
        assert (compiled - eager).norm() <= 1e-5 * eager.norm()


@pytest.mark.parametrize("mask", ["v1", "v2", "scene_causal"])
def test_attention_backends_give_the_same_model(mask):
    video, text, timestep = inputs()
    found = []
    for backend in ("dense", "lse"):
        ours = model("5b", mask=mask, attention_backend=backend).double().train()
        out = ours(video.double(), text.double(), timestep, [2, 3, 4])
        out.square().mean().backward()
        found.append([out.detach(), *(p.grad for p in ours.parameters())])
    torch.testing.assert_close(found[0], found[1])


def test_autocast_is_close_to_float32():
    ours = model("5b")
    video, text, timestep = inputs()
    generated = torch.tensor([[False, False, True]]).expand(2, 3)
    with torch.no_grad():
        exact = ours(video, text, timestep, [3, 3, 3], generated)
        with torch.autocast("cpu", torch.bfloat16):
            cast = ours(video, text, timestep, [3, 3, 3], generated)
    assert (cast - exact).norm() <= 2e-2 * exact.norm()


def test_bfloat16_model_gives_bfloat16_close_to_float32():
    ours = model("2b")
    video, text, timestep = inputs()
    with torch.no_grad():
        exact = ours(video, text, timestep, [3, 3, 3])
        low = ours.bfloat16()(video.bfloat16(), text.bfloat16(), timestep, [3, 3, 3])
    assert low.dtype == torch.bfloat16
    assert (low.float() - exact).norm() <= 5e-2 * exact.norm()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ofs_embed_dim": 512}, "ofs_embed_dim=512"),
        ({"in_channels": 8}, "in_channels=8"),
        ({"mask": "v6"}, "v6"),
        ({"position_policy": "loop"}, "loop"),
        ({"position_gap": 2}, "position_gap=2"),
    ],
)
def test_what_the_model_cannot_do_is_refused(changes, message):
    from training.transformer import Mask2DiTTransformer3DModel

    with pytest.raises(ConfigError, match=message):
        Mask2DiTTransformer3DModel(**{**SHAPES["5b"], **changes})


def test_odd_scenes_do_not_fit_cogvideox_15():
    video, text, timestep = inputs(frames=6)
    with pytest.raises(ConfigError, match=r"\[1, 2, 3\]"):
        model("1.5")(video, text, timestep, [1, 2, 3])
