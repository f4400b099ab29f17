"""Multi-scene generation: text, denoising with guidance and conditions, decoding per scene.

Scenes may have different lengths, so what belongs to scenes travels as a list with one tensor per
scene; the transformer sees them one after the other along the frames.

Shapes: B stories, S scenes, F latent frames of a scene, T frames of a scene, C latent channels, H W
latent height and width, L text tokens, D text width.

Source: the Mask2DiT paper (arXiv 2503.19881), sections 3.2 to 3.4; schedulers, model layout and the
conventions of the call are those of diffusers' CogVideoXPipeline. We differ from the official code
in that conditions stay clean latents (its noise is an option), any scene may be a condition, every
scene has its own negative prompt, seed and length, a batch may hold several stories, and guidance
<= 1 runs a single pass.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.outputs import BaseOutput
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from inference.arguments import (
    Seeds,
    Texts,
    as_stories,
    check_conditions,
    check_embeds,
    check_names,
    spread_frames,
    spread_seeds,
    spread_texts,
)
from inference.guidance import dynamic_guidance, guide
from inference.sampler import Scheduler, check_scheduler, denoising_timesteps, make_scheduler
from inference.scenes import NoisyScenes
from inference.step_caches import start_step_cache
from schemas.errors import GenerationError
from training.base_model import load_scheduler, load_text_encoder, load_tokenizer, load_vae
from training.diffusion import Denoiser
from training.latents import encode_frames, in_pairs
from training.transformer import Mask2DiTTransformer3DModel
from training.weights import load_transformer

log = logging.getLogger(__name__)

OnStepEnd = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]]
"""diffusers' callback: (pipeline, step, timestep, tensors) to the tensors that it changed."""


@dataclass
class Mask2DiTOutput(BaseOutput):
    """What a call gives back.

    Attributes:
        latents: Final latents of each of S scenes, (B, F, C, H, W), float32, in the transformer's
            scale. Given scenes are among them, untouched.
        frames: Decoded video of each scene, (B, T, height, width, 3) uint8, or None for
            ``output_type="latent"``.
    """

    latents: list[Tensor]
    frames: list[NDArray[np.uint8]] | None = None


class Mask2DiTPipeline(DiffusionPipeline):
    """Text to multi-scene video.

    Args:
        tokenizer: T5 or ByT5 tokenizer.
        text_encoder: T5 encoder, or None where every call gets encoded texts. Padding is not
            masked: CogVideoX treats pad tokens as real tokens.
        vae: CogVideoX VAE; 4 x in time, 8 x in space at CogVideoX's settings.
        transformer: The masked diffusion transformer (v prediction).
        scheduler: CogVideoX DDIM or DPM++ scheduler.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components: ClassVar = ["text_encoder"]
    _callback_tensor_inputs: ClassVar = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    tokenizer: PreTrainedTokenizerBase
    text_encoder: T5EncoderModel | None
    vae: AutoencoderKLCogVideoX
    transformer: Mask2DiTTransformer3DModel
    scheduler: Scheduler

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: T5EncoderModel | None,
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
        self._guidance_scale = 1.0
        self._num_timesteps = 0
        self._current_timestep: Tensor | None = None
        self._interrupt = False

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]  # narrower on purpose
        cls,
        folder: str | os.PathLike[str],
        *,
        torch_dtype: torch.dtype = torch.float32,
        text_encoder: bool = True,
    ) -> Mask2DiTPipeline:
        """Load a local folder in diffusers' CogVideoX layout, ours or CogVideoX-2B or -5B.

        Args:
            folder: The model folder.
            torch_dtype: Type of all weights.
            text_encoder: Whether to load the text encoder too, which is most of the memory of a
                CogVideoX model.

        Raises:
            CheckpointError: A piece is missing, or its weights do not fit exactly.
        """
        path = Path(folder)
        return cls(
            transformer=load_transformer(path, dtype=torch_dtype),
            vae=load_vae(path, torch_dtype),
            text_encoder=load_text_encoder(path, torch_dtype) if text_encoder else None,
            tokenizer=load_tokenizer(path),
            scheduler=load_scheduler(path),
        )

    # diffusers' properties, which its callbacks and step caches read and write
    @property
    def guidance_scale(self) -> float:
        """Guidance of the running call, before dynamic guidance."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the negative prompt is computed too."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Steps of the running call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        """Timestep of the running step."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Whether the steps still to come are left out; a callback sets ``_interrupt``."""
        return self._interrupt

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
        """Use DDIM or DPM++ with the noise schedule of the model folder.

        Raises:
            ConfigError: Another name, or a schedule that gives wrong videos.
        """
        self.register_modules(scheduler=make_scheduler(name, self.scheduler.config))

    def truncated_prompts(self, prompts: Sequence[str]) -> list[str]:
        """Those prompts that have more tokens than the model takes, and so lose their end."""
        ids = cast("list[list[int]]", self.tokenizer(list(prompts))["input_ids"])
        return [p for p, tokens in zip(prompts, ids, strict=True) if len(tokens) > self.text_tokens]

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Text tokens (N, L, D) of N texts.

        Longer texts are cut to L tokens (with a warning), shorter ones padded.

        Raises:
            GenerationError: The pipeline has no text encoder.
        """
        if self.text_encoder is None:
            raise GenerationError(
                "there is no text encoder to encode prompts with",
                expected="prompt_embeds, and negative_prompt_embeds where guidance is above 1",
                do="load the pipeline with text_encoder=True",
            )
        for text in self.truncated_prompts(list(dict.fromkeys(texts))):
            log.warning("prompt cut max_tokens=%d prompt=%r", self.text_tokens, text)
        ids = self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=self.text_tokens,
            truncation=True,
            return_tensors="pt",
        )["input_ids"]
        return self.text_encoder(cast("Tensor", ids).to(self._execution_device))[0]

    @torch.no_grad()
    def encode_video(self, frames: NDArray[np.uint8]) -> Tensor:
        """Latents (F, C, H, W) of (T, height, width, 3) uint8 frames, T = 1 + a multiple of 4.

        The mode of the VAE's posterior, so that the same frames always give the same latents
        (the official inference draws from it without a seed); float32 on the CPU, in the
        transformer's scale.
        """
        mean, _ = encode_frames(self.vae, frames, self._execution_device)
        return mean.float() * float(self.vae.config["scaling_factor"])

    @torch.no_grad()
    def decode_scene(self, latents: Tensor) -> NDArray[np.uint8]:
        """Decode one scene of every story, on its own as in training.

        The CogVideoX decoder returns 1 + 4 (F - 1) frames only for odd F. For even F the last
        latent frame is repeated and the frames it adds are dropped (the decoder is causal in time
        but for its group norms).

        Args:
            latents: (B, F, C, H, W).

        Returns:
            Frames, (B, T, height, width, 3) uint8, with T = 1 + 4 (F - 1).
        """
        num_latent = latents.shape[1]
        num_frames = 1 + self.time_compression * (num_latent - 1)
        z = latents if num_latent % 2 else torch.cat([latents, latents[:, -1:]], 1)
        z = z.transpose(1, 2).to(self._execution_device, self.vae.dtype)
        z = z / float(self.vae.config["scaling_factor"])
        decoded = cast("Tensor", self.vae.decode(in_pairs(self.vae, z), return_dict=False)[0])
        video = decoded[: len(z), :, :num_frames]
        pixels = (video.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 4, 1).cpu().numpy()

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str] | Sequence[Sequence[str]],
        *,
        frames: int | Sequence[int],
        height: int,
        width: int,
        negative_prompt: Texts = "",
        num_inference_steps: int = 50,
        guidance_scale: float = 6.0,
        use_dynamic_cfg: bool = False,
        guidance_rescale: float = 0.0,
        scene_guidance: bool = False,
        seed: Seeds = 0,
        conditions: Mapping[int, Tensor] | None = None,
        condition_noise: bool = False,
        first_scene: int = 0,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        denoiser: Denoiser | None = None,
        output_type: Literal["np", "latent"] = "np",
        callback_on_step_end: OnStepEnd | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Mask2DiTOutput:
        """Generate the scenes of one story or of a batch of stories.

        Args:
            prompts: One prompt per scene of a story, or a list of such lists of equal length.
            frames: Frames of a scene, 1 + a multiple of 4; one number, or one per scene.
            height: Pixels, a multiple of 16.
            width: Pixels, a multiple of 16.
            negative_prompt: What guidance leads away from: one text, one per scene, or a list of
                those per story.
            num_inference_steps: Denoising steps.
            guidance_scale: Classifier-free guidance; 1 or less leaves out the second pass.
            use_dynamic_cfg: CogVideoX's dynamic guidance (:func:`dynamic_guidance`).
            guidance_rescale: Share rescaled as in arXiv 2305.08891 (:func:`guide`), scene by scene.
            scene_guidance: Let guidance lead away from the scene as it would be by itself: its
                negative pass (the transformer's own) computes every generated scene apart. Nothing
                changes where there is one scene.
            seed: One seed, one per story, or a list per story with one per scene. The noise of a
                scene depends on its seed and its index in the story, and on nothing else.
            conditions: Clean latents (B, F, C, H, W) of scenes that are given, by index in
                ``prompts``. They condition the others and come back untouched.
            condition_noise: Show them to the transformer with the noise of the schedule's first
                level, as the official inference does.
            first_scene: Index of the first of these scenes in its story.
            prompt_embeds: The encoded prompts, (B, S, L, D); then ``prompts`` are not encoded.
            negative_prompt_embeds: The encoded negative prompts, likewise.
            denoiser: Called in place of the transformer, with the same arguments.
            output_type: "np" decodes to uint8 frames; "latent" does not decode.
            callback_on_step_end: diffusers' callback. "latents" are those of all scenes, (B, frames
                of all scenes, C, H, W).
            callback_on_step_end_tensor_inputs: What it gets, of ``_callback_tensor_inputs``.

        Returns:
            Latents of all scenes (given ones included), and frames.

        Raises:
            GenerationError: The arguments do not fit together or the result is not finite.
            ConfigError: The scheduler cannot sample this model, or the frames do not fit it.
        """
        check_names("output_type", [output_type], ["np", "latent"])
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        on_step_end = cast("OnStepEnd | None", callback_on_step_end)
        inputs = list(callback_on_step_end_tensor_inputs)
        check_names("callback_on_step_end_tensor_inputs", inputs, self._callback_tensor_inputs)
        stories = as_stories(prompts)
        batch, num_scenes = len(stories), len(stories[0])
        shapes = self._scene_shapes(spread_frames(frames, num_scenes), height, width)
        given = dict(conditions or {})
        check_conditions(given, [(batch, *shape) for shape in shapes])
        seeds = spread_seeds(seed, batch, num_scenes)
        negatives = spread_texts(negative_prompt, batch, num_scenes)
        check_scheduler(self.scheduler)

        device = self._execution_device
        self._guidance_scale = guidance_scale
        self._interrupt = False
        guided = self.do_classifier_free_guidance
        scene_guided = scene_guidance and guided and num_scenes > 1
        start_step_cache(self.transformer, guided=guided, scene_guided=scene_guided)
        prompt_embeds = self._embeds("prompt_embeds", prompt_embeds, stories)
        if guided:
            negative_prompt_embeds = self._embeds(
                "negative_prompt_embeds", negative_prompt_embeds, negatives
            )
        scenes = NoisyScenes(
            self.scheduler,
            shapes,
            seeds,
            first_scene,
            given,
            condition_noise=condition_noise,
            device=device,
        )
        steps = denoising_timesteps(self.scheduler, num_inference_steps, device)
        self._num_timesteps = len(steps)
        with cast("Any", self).progress_bar(total=len(steps)) as bar:  # diffusers' types are off
            for i, t in enumerate(steps):
                if self.interrupt:
                    continue
                self._current_timestep = t
                scale = self.guidance_scale
                if use_dynamic_cfg:
                    scale = dynamic_guidance(scale, int(t), num_inference_steps)
                negative = negative_prompt_embeds if self.do_classifier_free_guidance else None
                beside = None if scene_guided else negative
                velocity = self._predict(denoiser, scenes, prompt_embeds, beside, t)
                if scene_guided and negative is not None:
                    apart = self._predict_apart(scenes, negative, t)
                    velocity = [torch.cat(pair) for pair in zip(apart, velocity, strict=True)]
                if negative is not None:
                    velocity = [
                        guide(away, towards, scale, guidance_rescale)
                        for away, towards in (v.chunk(2) for v in velocity)
                    ]
                scenes.step(velocity, t, steps[i - 1] if i else None)
                if on_step_end is not None:
                    tensors: dict[str, Any] = {
                        "latents": scenes.joined,
                        "prompt_embeds": prompt_embeds,
                        "negative_prompt_embeds": negative_prompt_embeds,
                    }
                    tensors |= on_step_end(self, i, t, {k: tensors[k] for k in inputs})
                    scenes.joined = tensors["latents"]
                    prompt_embeds = cast("Tensor", tensors["prompt_embeds"])
                    negative_prompt_embeds = tensors["negative_prompt_embeds"]
                bar.update()
        self._current_timestep = None

        latents = scenes.finished()
        self._check_finite(latents, num_inference_steps)
        decoded = None
        if output_type == "np":
            decoded = [self.decode_scene(scene) for scene in latents]
        self.maybe_free_model_hooks()
        return Mask2DiTOutput(latents=latents, frames=decoded)

    def _scene_shapes(
        self, frames: Sequence[int], height: int, width: int
    ) -> list[tuple[int, int, int, int]]:
        """(F, C, H, W) of every scene."""
        step = self.time_compression
        cell = self.space_compression * int(self.transformer.config["patch_size"])
        if any(n < 1 or (n - 1) % step for n in frames) or height % cell or width % cell:
            raise GenerationError(
                "this video size does not fit the model",
                found=f"{', '.join(str(n) for n in frames)} frames of {width} x {height}",
                expected=f"1 + {step} n frames; sides a multiple of {cell}",
                do="change the frames of the scene, or training.model.frames, height_px and "
                "width_px",
            )
        lengths = [(n - 1) // step + 1 for n in frames]
        self.transformer.patched_frames(lengths)  # CogVideoX 1.5 takes no odd ones
        channels = int(self.transformer.config["in_channels"])
        size = (height // self.space_compression, width // self.space_compression)
        return [(length, channels, *size) for length in lengths]

    def _embeds(self, name: str, embeds: Tensor | None, texts: Sequence[Sequence[str]]) -> Tensor:
        """Encoded texts (B, S, L, D), given or made here, every text encoded once."""
        if embeds is None:
            unique = list(dict.fromkeys(text for story in texts for text in story))
            encoded = dict(zip(unique, self.encode_text(unique), strict=True))
            embeds = torch.stack([torch.stack([encoded[t] for t in story]) for story in texts])
        width = int(self.transformer.config["text_embed_dim"])
        check_embeds(name, embeds, (len(texts), len(texts[0]), self.text_tokens, width))
        return embeds.to(self._execution_device, self.transformer.dtype)

    def _predict(
        self,
        denoiser: Denoiser | None,
        scenes: NoisyScenes,
        text: Tensor,
        negative: Tensor | None,
        t: Tensor,
    ) -> list[Tensor]:
        """The v prediction of every scene in float32; (2B, F, C, H, W), negative first, or B."""
        passes = 1 if negative is None else 2
        joined = scenes.joined.to(self.transformer.dtype).repeat(passes, 1, 1, 1, 1)
        arguments: dict[str, Any] = {
            "hidden_states": joined,
            "encoder_hidden_states": text if negative is None else torch.cat([negative, text]),
            "timestep": t.expand(len(joined)),
            "scene_frames": [latents.shape[1] for latents in scenes.latents],
        }
        if scenes.generated is not None:
            arguments["generated"] = scenes.generated.repeat(passes, 1)
        with self.transformer.cache_context("cond_uncond"):
            velocity = (denoiser or self.transformer)(**arguments)
        assert velocity.shape == joined.shape, "a denoiser predicts every frame of every pass"
        return scenes.split(velocity.float())

    def _predict_apart(self, scenes: NoisyScenes, text: Tensor, t: Tensor) -> list[Tensor]:
        """The v prediction of every generated scene as if it were alone, at its place in time.

        Returns:
            S tensors (B, F, C, H, W), float32; zeros for scenes that are given.
        """
        model, new = self.transformer, scenes.new
        whole = model.timeline(scenes.lengths)
        places = torch.tensor(whole.positions).split(model.patched_frames(scenes.lengths))
        positions = tuple(int(place) for i in new for place in places[i])
        lengths = [scenes.lengths[i] for i in new]
        joined = torch.cat([scenes.latents[i] for i in new], 1).to(model.dtype)
        velocity = model(
            joined,
            text[:, new],
            t.expand(len(joined)),
            lengths,
            timeline=replace(whole, positions=positions),
            mask="v1",
        )
        alone = dict(zip(new, velocity.float().split(lengths, 1), strict=True))
        return [alone.get(i, torch.zeros_like(x)) for i, x in enumerate(scenes.latents)]

    def _check_finite(self, latents: Sequence[Tensor], steps: int) -> None:
        bad = [i for i, scene in enumerate(latents) if not bool(torch.isfinite(scene).all())]
        if bad:
            raise GenerationError(
                "the latents are not finite numbers",
                found=f"NaN or infinite values in scenes {bad} of {len(latents)}",
                where=f"after {steps} steps of {type(self.scheduler).__name__}",
                do="check that training converged (metrics.jsonl) or lower generation.guidance",
            )
