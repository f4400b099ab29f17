"""Multi-scene generation: text, denoising with guidance and conditions, decoding per scene.

Shapes: B stories, S scenes, F latent frames per scene, T frames per scene, C latent channels, H W
latent height and width, L text tokens, D text width.

Source: the Mask2DiT paper (arXiv 2503.19881), sections 3.2 to 3.4; schedulers and model layout are
CogVideoX's as in diffusers. We differ from the official code in that conditions stay clean latents,
any scene may be a condition, a batch may hold several stories, and guidance <= 1 runs a single
pass.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.outputs import BaseOutput
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from inference.sampler import SCHEDULERS, Scheduler, denoise_step, denoising_timesteps
from schemas.errors import GenerationError
from training.base_model import load_components
from training.noise import initial_noise, scene_generator
from training.transformer import Mask2DiTTransformer3DModel

log = logging.getLogger(__name__)

OnStep = Callable[[int, int], None]
"""Called after every denoising step with (steps done, steps in all)."""


@dataclass
class Mask2DiTOutput(BaseOutput):
    """What a call gives back.

    Attributes:
        latents: Final latents of every scene, (B, S, F, C, H, W), float32, in the transformer's
            scale.
        frames: Decoded video, (B, S, T, height, width, 3) uint8, or None for
            ``output_type="latent"``.
    """

    latents: Tensor
    frames: NDArray[np.uint8] | None = None


class Mask2DiTPipeline(DiffusionPipeline):
    """Text to multi-scene video.

    Args:
        tokenizer: T5 or ByT5 tokenizer.
        text_encoder: T5 encoder. Padding is not masked: CogVideoX treats pad tokens as real tokens.
        vae: CogVideoX VAE; 4 x in time, 8 x in space at CogVideoX's settings.
        transformer: The masked diffusion transformer (v prediction).
        scheduler: CogVideoX DDIM or DPM++ scheduler.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    tokenizer: PreTrainedTokenizerBase
    text_encoder: T5EncoderModel
    vae: AutoencoderKLCogVideoX
    transformer: Mask2DiTTransformer3DModel
    scheduler: Scheduler

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: T5EncoderModel,
        vae: AutoencoderKLCogVideoX,
        transformer: Mask2DiTTransformer3DModel,
        scheduler: Scheduler,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            transformer=transformer,
            scheduler=scheduler,
        )

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]  # narrower on purpose
        cls, folder: str | os.PathLike[str], *, torch_dtype: torch.dtype = torch.float32
    ) -> Mask2DiTPipeline:
        """Load a local folder in diffusers' CogVideoX layout, ours or CogVideoX-2B or -5B.

        Raises:
            CheckpointError: A piece is missing, or its weights do not fit exactly.
        """
        pieces = load_components(Path(folder), torch_dtype)
        return cls(**{field.name: getattr(pieces, field.name) for field in fields(pieces)})

    @property
    def text_tokens(self) -> int:
        """Text tokens per scene, L."""
        return int(self.transformer.config["max_text_seq_length"])

    @property
    def time_compression(self) -> int:
        """Frames per latent frame (after the first)."""
        return int(self.vae.config["temporal_compression_ratio"])

    @property
    def space_compression(self) -> int:
        """Pixels per latent cell along height and width."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    def set_scheduler(self, name: Literal["ddim", "dpm"]) -> None:
        """Use DDIM or DPM++ with the noise schedule of the model folder."""
        self.register_modules(scheduler=SCHEDULERS[name].from_config(self.scheduler.config))

    def truncated_prompts(self, prompts: Sequence[str]) -> list[str]:
        """Those prompts that have more tokens than the model takes, and so lose their end."""
        ids = cast("list[list[int]]", self.tokenizer(list(prompts))["input_ids"])
        return [p for p, tokens in zip(prompts, ids, strict=True) if len(tokens) > self.text_tokens]

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[Sequence[str]]) -> Tensor:
        """Text tokens of every scene.

        Args:
            prompts: S prompts for each of B stories.

        Returns:
            (B, S, L, D). Longer prompts are cut to L tokens (with a warning), shorter ones padded.
        """
        flat = [text for story in prompts for text in story]
        for text in dict.fromkeys(self.truncated_prompts(flat)):
            log.warning("prompt cut max_tokens=%d prompt=%r", self.text_tokens, text)
        ids = self.tokenizer(
            flat,
            padding="max_length",
            max_length=self.text_tokens,
            truncation=True,
            return_tensors="pt",
        )["input_ids"]
        hidden = self.text_encoder(cast("Tensor", ids).to(self._execution_device))[0]
        return hidden.unflatten(0, (len(prompts), len(prompts[0])))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Decode latents, every scene on its own as in training.

        The CogVideoX decoder returns 1 + 4 (F - 1) frames only for odd F. For even F the last
        latent frame is repeated and the frames it adds are dropped (the decoder is causal in time
        but for its group norms).

        Args:
            latents: (B, S, F, C, H, W).

        Returns:
            Frames, (B, S, T, height, width, 3) uint8, with T = 1 + 4 (F - 1).
        """
        num_latent = latents.shape[2]
        num_frames = 1 + self.time_compression * (num_latent - 1)
        stories: list[NDArray[np.uint8]] = []
        for story in latents:
            scenes: list[NDArray[np.uint8]] = []
            for scene in story:
                z = scene if num_latent % 2 else torch.cat([scene, scene[-1:]])
                z = z.transpose(0, 1)[None].to(self.vae.device, self.vae.dtype)
                z = z / float(self.vae.config["scaling_factor"])
                video = cast("Tensor", self.vae.decode(z, return_dict=False)[0])[0, :, :num_frames]
                pixels = (video.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
                scenes.append(pixels.permute(1, 2, 3, 0).cpu().numpy())
            stories.append(np.stack(scenes))
        return np.stack(stories)

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str] | Sequence[Sequence[str]],
        *,
        frames: int,
        height: int,
        width: int,
        negative_prompt: str = "",
        num_inference_steps: int = 50,
        guidance_scale: float = 6.0,
        seed: int | Sequence[int] = 0,
        conditions: Mapping[int, Tensor] | None = None,
        first_scene: int = 0,
        output_type: Literal["np", "latent"] = "np",
        on_step: OnStep | None = None,
    ) -> Mask2DiTOutput:
        """Generate the scenes of one story or of a batch of stories.

        Args:
            prompts: One prompt per scene of a story, or a list of such lists of equal length.
            frames: Frames per scene, 1 + a multiple of 4.
            height: Pixels, a multiple of 16.
            width: Pixels, a multiple of 16.
            negative_prompt: What guidance leads away from; the same for every scene.
            num_inference_steps: Denoising steps.
            guidance_scale: Classifier-free guidance; 1 or less leaves out the second pass.
            seed: Seed of a story, or one per story. A single seed serves every story of the batch.
            conditions: Clean latents (B, F, C, H, W) of scenes that are given, by index in
                ``prompts``. They condition the others and come back untouched.
            first_scene: Index of the first of these scenes in its story; the noise depends on it.
            output_type: "np" decodes to uint8 frames; "latent" does not decode.
            on_step: Progress callback.

        Returns:
            Latents of all scenes (given ones included), and frames.

        Raises:
            GenerationError: The arguments do not fit together or the result is not finite.
        """
        stories = _as_stories(prompts)
        num_scenes = len(stories[0])
        seeds = [seed] * len(stories) if isinstance(seed, int) else list(seed)
        scene_shape = self._scene_shape(frames, height, width)
        given = dict(conditions or {})
        _check_batch(stories, seeds, given, (len(stories), *scene_shape))

        device = self._execution_device
        story_scenes = list(range(first_scene, first_scene + num_scenes))
        latents = initial_noise(seeds, story_scenes, scene_shape).to(device)
        for index, clean in given.items():
            latents[:, index] = clean.to(latents)
        text = self._guided_text(stories, negative_prompt, guidance_scale)
        new = [i for i in range(num_scenes) if i not in given]
        generated = None
        if given:
            generated = torch.zeros(len(stories), num_scenes, dtype=torch.bool, device=device)
            generated[:, new] = True

        noise = [scene_generator(s, story_scenes[i], "sampler") for s in seeds for i in new]
        steps = denoising_timesteps(self.scheduler, num_inference_steps, device)
        previous: Tensor | None = None
        for done, t in enumerate(steps, start=1):
            velocity = self._predict(latents, text, t, generated, guidance_scale)
            before = steps[done - 2] if done > 1 else None
            stepped, previous = denoise_step(
                self.scheduler,
                velocity[:, new].flatten(0, 1),
                previous,
                t,
                before,
                latents[:, new].flatten(0, 1),
                noise,
            )
            latents[:, new] = stepped.unflatten(0, (len(stories), len(new)))
            if on_step is not None:
                on_step(done, len(steps))
        self._check_finite(latents, num_inference_steps)
        decoded = self.decode(latents) if output_type == "np" else None
        return Mask2DiTOutput(latents=latents, frames=decoded)

    def _scene_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(F, C, H, W) of one scene."""
        cell = self.space_compression * int(self.transformer.config["patch_size"])
        if frames < 1 or (frames - 1) % self.time_compression or height % cell or width % cell:
            raise GenerationError(
                "this video size does not fit the model",
                found=f"{frames} frames of {width} x {height}",
                expected=f"1 + {self.time_compression} n frames; sides a multiple of {cell}",
                do="change training.model.frames, height_px and width_px",
            )
        return (
            (frames - 1) // self.time_compression + 1,
            int(self.transformer.config["in_channels"]),
            height // self.space_compression,
            width // self.space_compression,
        )

    def _guided_text(
        self, stories: Sequence[Sequence[str]], negative_prompt: str, guidance: float
    ) -> Tensor:
        """Text tokens (B, S, L, D); under guidance (2B, S, L, D), the negative prompt first."""
        text = self.encode_text(stories)
        if guidance <= 1:
            return text
        negative = self.encode_text([[negative_prompt]]).expand_as(text)
        return torch.cat([negative, text])

    def _predict(
        self, latents: Tensor, text: Tensor, t: Tensor, generated: Tensor | None, guidance: float
    ) -> Tensor:
        """The v prediction (B, S, F, C, H, W), guided if ``guidance`` > 1, in float32."""
        passes = 2 if guidance > 1 else 1
        num_stories, num_scenes, num_latent = latents.shape[:3]
        output = self.transformer(
            hidden_states=latents.flatten(1, 2)
            .repeat(passes, 1, 1, 1, 1)
            .to(self.transformer.dtype),
            encoder_hidden_states=text.to(self.transformer.dtype),
            timestep=t.expand(passes * num_stories),
            scene_frames=[num_latent] * num_scenes,
            generated=None if generated is None else generated.repeat(passes, 1),
        )
        velocity = output.float().unflatten(1, (num_scenes, num_latent))
        if passes == 1:
            return velocity
        negative, positive = velocity.chunk(2)
        return negative + guidance * (positive - negative)

    def _check_finite(self, latents: Tensor, steps: int) -> None:
        if not bool(torch.isfinite(latents).all()):
            raise GenerationError(
                "the latents are not finite numbers",
                found=f"{int((~torch.isfinite(latents)).sum())} NaN or infinite values",
                where=f"after {steps} steps of {type(self.scheduler).__name__}",
                do="check that training converged (metrics.jsonl) or lower generation.guidance",
            )


def _as_stories(prompts: Sequence[str] | Sequence[Sequence[str]]) -> list[list[str]]:
    """One story or several as a list of stories."""
    if isinstance(prompts, str):
        raise GenerationError(
            "prompts is one text", found=prompts, expected="a list with one prompt per scene"
        )
    if all(isinstance(p, str) for p in prompts):
        return [list(cast("Sequence[str]", prompts))]
    return [list(story) for story in prompts]


def _check_batch(
    stories: Sequence[Sequence[str]],
    seeds: Sequence[int],
    given: Mapping[int, Tensor],
    condition_shape: tuple[int, ...],
) -> None:
    num_scenes = len(stories[0])
    if not num_scenes or any(len(s) != num_scenes for s in stories):
        raise GenerationError(
            "the stories of one batch need the same number of scenes, at least one",
            found=[len(s) for s in stories],
        )
    if len(seeds) != len(stories):
        raise GenerationError(
            "one seed per story is needed",
            found=f"{len(seeds)} seeds",
            expected=f"{len(stories)} (or a single number)",
        )
    for index, clean in given.items():
        if not 0 <= index < num_scenes or tuple(clean.shape) != condition_shape:
            raise GenerationError(
                "a given scene does not fit the story",
                where=f"scene {index} of {num_scenes}",
                found=f"latents of shape {tuple(clean.shape)}",
                expected=f"an index below {num_scenes} and shape {condition_shape}",
            )
    if len(given) == num_scenes:
        raise GenerationError("every scene is given, so there is nothing to generate")
