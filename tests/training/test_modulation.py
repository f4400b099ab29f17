import pytest
import torch
from diffusers.models.normalization import AdaLayerNorm, CogVideoXLayerNormZero

from training.attention import Plan
from training.modulation import add_gated, modulate, modulate_out, scene_times

WIDTH = 8
LENGTHS = {"equal": (6, 6, 6), "unequal": (3, 6, 9), "one_each": (1, 1, 1)}


def layers():
    torch.manual_seed(0)
    zero, out = CogVideoXLayerNormZero(4, WIDTH), AdaLayerNorm(4, output_dim=2 * WIDTH, chunk_dim=1)
    for p in [*zero.parameters(), *out.parameters()]:
        torch.nn.init.normal_(p)
    return zero.double(), out.double()


def tensors(lengths):
    generator = torch.Generator().manual_seed(1)
    plan = Plan(mask="v2", text_lengths=(2, 2, 2), video_lengths=lengths)
    sizes = ((2, sum(lengths), WIDTH), (2, 6, WIDTH), (2, 4), (1, 4))
    video, text, noisy, clean = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes
    )
    return plan, video, text, noisy, clean


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_every_scene_is_modulated_as_diffusers_modulates_it_alone(lengths):
    zero, out = layers()
    plan, video, text, noisy, clean = tensors(lengths)
    generated = torch.tensor([[False, True, False], [True, True, False]])
    times = scene_times(noisy, clean, generated)
    found_video, found_text, gate, text_gate = modulate(zero, video, text, times, plan)
    found_out = modulate_out(out, video, times, plan).split(lengths, 1)
    residual = torch.ones_like(video)
    gated = add_gated(residual, gate, video, lengths).split(lengths, 1)
    text_gated = add_gated(torch.ones_like(text), text_gate, text, (2, 2, 2)).split(2, 1)
    for i, (v, t) in enumerate(zip(video.split(lengths, 1), text.split(2, 1), strict=True)):
        for b in range(2):
            time = noisy[b, None] if generated[b, i] else clean
            expected = zero(v[b, None], t[b, None], time)
            torch.testing.assert_close(found_video.split(lengths, 1)[i][b, None], expected[0])
            torch.testing.assert_close(found_text.split(2, 1)[i][b, None], expected[1])
            torch.testing.assert_close(gated[i][b, None], 1 + expected[2] * v[b, None])
            torch.testing.assert_close(text_gated[i][b, None], 1 + expected[3] * t[b, None])
            torch.testing.assert_close(found_out[i][b, None], out(v[b, None], temb=time))


@pytest.mark.parametrize("lengths", [(64, 64, 64), (32, 64, 96)], ids=["equal", "unequal"])
def test_conditions_save_no_modulation_of_the_size_of_the_video(lengths):
    zero, _ = layers()
    plan, video, text, noisy, clean = tensors(lengths)
    saved = {}
    for name, generated in (("plain", None), ("conditional", torch.tensor([[0, 1, 0], [1, 1, 0]]))):
        elements = []

        def note(x, elements=elements):
            elements.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            times = scene_times(noisy, clean, generated)
            out, _, gate, _ = modulate(zero, video.requires_grad_(), text, times, plan)
            add_gated(video, gate, out, lengths)
        saved[name] = sum(elements)
    rows = 2 * 3 * (6 + 6) * WIDTH  # batch x scenes x modulations, a few times over
    assert saved["conditional"] - saved["plain"] < rows < video.numel()
