"""``OSPNextPipeline``: prompts to videos, with diffusers' argument names, semantics and folder layout.

    pipe = OSPNextPipeline.from_pretrained("path/to/folder", torch_dtype=torch.bfloat16).to("cuda")
    frames = pipe("a red square moves left", generator=torch.Generator().manual_seed(0)).frames[0]

The latents are float32 from the first noise to the decoder, whatever the dtype of the weights.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKLWan
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from ospnext.checkpoints.components import load_pipeline_components, pipeline_folder
from ospnext.checkpoints.fill import ProgressCallback
from ospnext.checkpoints.save import saving
from ospnext.flow.sample import BothHalves, GuidanceMode, StopSampling, denoise, guided
from ospnext.generate.inputs import (
    CALLBACK_TENSORS,
    Conditioning,
    Generators,
    as_list,
    check_call,
    initial_latents,
)
from ospnext.generate.lora import LoraMethods
from ospnext.generate.placement import MODULES, PlacedPipeline
from ospnext.generate.sampler import Scheduler, make_sampler, make_scheduler, sampler_name, sampler_shift
from ospnext.generate.settings import WAN_SAMPLING, read_model_settings
from ospnext.generate.size import SizeStep, VideoSize, fit_size, size_step
from ospnext.models.text import WAN_NEGATIVE_PROMPT, clean_wan, encode_prompts
from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.models.vae_pieces import Team
from ospnext.models.video_vae import DECODE_MODES, DecodeMode, decode

_CLEANING: dict[str, Callable[[str], str]] = {"wan": clean_wan, "none": lambda text: text}

OnStepEnd = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


class OSPNextPipeline(LoraMethods, PlacedPipeline):
    """Text to video with the sparse transformer.

    Args:
        transformer, vae, text_encoder, tokenizer: the components.
        scheduler: FlowMatchEulerDiscreteScheduler (the Euler sampler) or UniPCMultistepScheduler; holds the shift.
        negative_prompt: what the model avoids when a call names nothing.
        prompt_cleaning: wan (see ``models.text.clean_wan``) or none; for prompts and negative prompts alike.
        defaults: what a call samples with where it does not say: height, width, num_frames, num_inference_steps,
            guidance_scale; Wan's where the model says nothing either.

    The last three are stored with the model, in model_index.json.

    Attributes:
        decode_modes: ways the VAE may decode, best first; see ``models.video_vae.decode``.
        decode_mode: the way the last call took.
        offload, sharded: which components move when, and which never; see ``placement``.
        halves: how to get both halves of guidance, in place of a call's ``guidance_mode``.
        team: who decodes along; then frames come out in the first of them alone, None in the others.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = CALLBACK_TENSORS

    def __init__(
        self,
        transformer: OSPNextTransformer3DModel,
        vae: AutoencoderKLWan,
        text_encoder: UMT5EncoderModel,
        tokenizer: PreTrainedTokenizerBase,
        scheduler: Scheduler,
        negative_prompt: str = WAN_NEGATIVE_PROMPT,
        prompt_cleaning: str = "wan",
        defaults: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if prompt_cleaning not in _CLEANING:
            raise ValueError(f"prompt_cleaning {prompt_cleaning!r} is not known: use {' or '.join(_CLEANING)}")
        self.register_modules(
            transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler
        )
        self.register_to_config(
            negative_prompt=negative_prompt, prompt_cleaning=prompt_cleaning, defaults=dict(defaults or {})
        )
        self.video_processor = VideoProcessor(vae_scale_factor=vae.config.scale_factor_spatial)
        self.decode_modes: Sequence[DecodeMode] = DECODE_MODES
        self.decode_mode: DecodeMode | None = None
        self.halves: BothHalves | None = None
        self.team: Team | None = None
        self._lora_weights: dict[str, float] = {}
        self._unfused: dict[str, Tensor] | None = None
        self._guidance_scale = 0.0
        self._num_timesteps = 0
        self._interrupt = False

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        torch_dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
        device: torch.device | str = "cpu",
        progress: ProgressCallback | None = None,
        **overrides: Any,
    ) -> Self:
        """The pipeline in a local folder of ours, diffusers' Wan or Wan2.1's own layout; every key must match.

        Args:
            pretrained_model_name_or_path: the folder, or ``shapes`` for the embedded model; never the network.
            torch_dtype: of transformer and text encoder, or one per component (``transformer``, ``vae``,
                ``text_encoder``, ``default``); None keeps the files'. The VAE is float32 unless named: it suffers
                from less.
            device: where all components go, tensor by tensor: host memory holds one file at most.
            progress: called while loading with a label, bytes done and bytes in all.
            **overrides: transformer settings that the folder leaves open, such as ``skiparse_model_type``.

        Raises:
            CheckpointError, OutOfMemoryError: see ``checkpoints.load``; both are ValueErrors.
        """
        named = dict(torch_dtype) if isinstance(torch_dtype, Mapping) else {"default": torch_dtype}
        unknown = sorted(named.keys() - {"default", *MODULES})
        if unknown:
            raise ValueError(f"torch_dtype names {', '.join(unknown)}: the components are {', '.join(MODULES)}")
        parts = load_pipeline_components(
            pipeline_folder(pretrained_model_name_or_path),
            transformer_dtype=named.get("transformer", named.get("default")),
            vae_dtype=named.get("vae", torch.float32),
            text_encoder_dtype=named.get("text_encoder", named.get("default")),
            device=device,
            progress=progress,
            **overrides,
        )
        return cls.from_parts(*parts)

    @classmethod
    def from_parts(
        cls,
        transformer: OSPNextTransformer3DModel,
        vae: AutoencoderKLWan,
        text_encoder: UMT5EncoderModel,
        tokenizer: PreTrainedTokenizerBase,
        scheduler: Scheduler | None,
        settings: Mapping[str, Any],
    ) -> Self:
        """From loaded components and what a model_index.json says besides; other pipelines' settings are left out.

        Weights that bring no scheduler get that of ``WAN_SAMPLING``.
        """
        scheduler = scheduler or make_scheduler(WAN_SAMPLING.sampler, WAN_SAMPLING.shift)
        return cls(transformer, vae, text_encoder, tokenizer, scheduler, **read_model_settings(settings))

    # ── what the model brings ─────────────────────────────────────────────────────────────────────────────────────────

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """Sizes, steps, guidance, shift and sampler of a call that says nothing, by field name of ``Sampling``."""
        stored = {name: value for name, value in (self.config.defaults or {}).items() if name in WAN_SAMPLING._fields}
        chosen = {"shift": sampler_shift(self.scheduler), "sampler": sampler_name(self.scheduler)}
        return WAN_SAMPLING._asdict() | stored | chosen

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write the pipeline as a diffusers folder that `from_pretrained` reads back exactly.

        Raises:
            ValueError: the transformer carries adapters, whose keys a plain folder cannot hold.
        """
        if getattr(self.transformer, "peft_config", None):
            raise ValueError("the transformer carries a LoRA adapter: merge or unload it before saving the pipeline")
        with saving(Path(save_directory)):
            super().save_pretrained(str(save_directory), **kwargs)

    # ── text ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str], max_sequence_length: int | None = None) -> Tensor:
        """Clean and encode prompts: [B, L, text_dim] on the execution device, L the transformer's ``text_len``."""
        clean = [_CLEANING[self.config.prompt_cleaning](text) for text in prompts]
        length = max_sequence_length or self.transformer.config.text_len
        with self.at_work("text_encoder") as encoder:
            return encode_prompts(self.tokenizer, encoder, clean, length, self._execution_device)

    def _encode(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        max_sequence_length: int | None,
    ) -> Conditioning:
        """Embeddings of a call, a row per prompt; those given are taken as they are.

        Raises:
            ValueError: prompts and embeddings are both given or both missing, or their numbers differ.
        """
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give either prompt or prompt_embeds")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("give either negative_prompt or negative_prompt_embeds")
        prompts, negatives = as_list(prompt), []
        rows = len(prompts) if prompt_embeds is None else len(prompt_embeds)
        if self._guidance_scale > 1 and negative_prompt_embeds is None:
            negatives = as_list(self.config.negative_prompt if negative_prompt is None else negative_prompt)
        if rows == 0 or len(negatives) not in (0, 1, rows):
            raise ValueError(
                f"{len(negatives)} negative prompts for {rows} prompts: give some prompt, and one or as many"
            )
        encoded = torch.empty(0)
        if prompts or negatives:  # together: the encoder moves only once
            length = max_sequence_length if prompt_embeds is None else prompt_embeds.shape[1]
            encoded = self.encode_prompt([*prompts, *negatives], length)
        cond = encoded[: len(prompts)] if prompt_embeds is None else prompt_embeds.to(self._execution_device)
        if self._guidance_scale <= 1:
            return Conditioning(cond, None)
        if negative_prompt_embeds is None:
            return Conditioning(cond, encoded[len(prompts) :].expand(rows, -1, -1))
        if negative_prompt_embeds.shape != cond.shape:
            raise ValueError(
                f"negative_prompt_embeds are {list(negative_prompt_embeds.shape)}, but the prompts' {list(cond.shape)}"
            )
        return Conditioning(cond, negative_prompt_embeds.to(self._execution_device))

    # ── latents ───────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def size_step(self) -> SizeStep:
        """What sizes of video this model makes."""
        return size_step(self.vae.config, self.transformer.config)

    def prepare_latents(
        self, batch: int, size: VideoSize, generator: Generators = None, latents: Tensor | None = None
    ) -> Tensor:
        """The initial noise [B, C, t, h, w] of videos of ``size``: see ``inputs.initial_latents``."""
        config = self.vae.config
        shape = (
            self.transformer.config.in_dim,
            (size.num_frames - 1) // config.scale_factor_temporal + 1,
            size.height // config.scale_factor_spatial,
            size.width // config.scale_factor_spatial,
        )
        return initial_latents(batch, shape, generator, latents, self._execution_device)

    def decode(self, latents: Tensor, output_type: str = "np") -> Any:
        """Videos from normalised latents, in the form of ``output_type``; see `__call__`."""
        with self.at_work("vae") as vae:
            decoded = decode(vae, latents, self.decode_modes, self.team)
        self.decode_mode = decoded.mode
        if decoded.video is None:
            return None
        return self.video_processor.postprocess_video(decoded.video, output_type=output_type)

    # ── the call ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the running call; a callback may change ``_guidance_scale``."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Steps of the running call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set ``_interrupt`` to end the denoising early."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: OnStepEnd | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        guidance_mode: GuidanceMode = "batched",
    ) -> WanPipelineOutput | tuple[Any]:
        """Make videos. None stands for the model's own value (``defaults``, ``negative_prompt``, ``text_len``).

        Args:
            prompt, negative_prompt: one or a list; an empty negative prompt is honoured.
            height, width, num_frames: rounded to what the model can make, with a warning.
            num_inference_steps: denoising steps.
            guidance_scale: classifier-free guidance; off at 1 and below.
            num_videos_per_prompt: videos of each prompt, next to each other in the result.
            generator: one for all videos, or one each.
            latents: initial noise in place of the generator's, [B, C, t, h, w].
            prompt_embeds, negative_prompt_embeds: [prompts, L, text_dim] in place of text.
            output_type: np float [B, T, H, W, 3] in 0..1, pt [B, T, 3, H, W], pil, or latent (normalised, float32).
            return_dict: an output with ``frames`` if true, else a tuple.
            callback_on_step_end: called as (pipe, step, timestep, tensors) and may return changed tensors.
            callback_on_step_end_tensor_inputs: which of latents, prompt_embeds, negative_prompt_embeds it is given.
            max_sequence_length: text tokens.
            guidance_mode: both guidance passes batched, or sequential in less memory.

        Raises:
            ValueError: arguments that do not go together, or a size that cannot be made.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        check_call(output_type, num_videos_per_prompt, callback_on_step_end_tensor_inputs)
        given: dict[str, Any] = {"num_frames": num_frames, "height": height, "width": width}
        given |= {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        asked = self.sampling_defaults | {name: value for name, value in given.items() if value is not None}
        size = fit_size(VideoSize(*(asked[name] for name in VideoSize._fields)), self.size_step)
        self._num_timesteps, self._guidance_scale = asked["num_inference_steps"], asked["guidance_scale"]
        self._interrupt = False

        text = self._encode(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, max_sequence_length)
        text = text.repeated(num_videos_per_prompt)
        x = self.prepare_latents(len(text.cond), size, generator, latents)
        x = self._denoise(x, text, guidance_mode, callback_on_step_end, callback_on_step_end_tensor_inputs)
        frames = x if output_type == "latent" else self.decode(x, output_type)
        return WanPipelineOutput(frames=frames) if return_dict else (frames,)

    def _denoise(
        self,
        x: Tensor,
        text: Conditioning,
        mode: GuidanceMode,
        on_step_end: OnStepEnd | None,
        tensor_inputs: Sequence[str],
    ) -> Tensor:
        """From noise to latents, with diffusers' callback after every step."""
        with self.at_work("transformer") as transformer, self.progress_bar(total=self._num_timesteps) as bar:

            def model(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
                return transformer(x, t, condition, return_dict=False)[0]

            def velocity(x: Tensor, t: Tensor) -> Tensor:
                # Put together at every step: a callback may change the embeddings and the scale.
                return guided(model, text.cond, text.uncond, self._guidance_scale, self.halves or mode)(x, t)

            def callback(step: int, timestep: Tensor, x: Tensor) -> Tensor:
                bar.update()
                if on_step_end is not None:
                    tensors: dict[str, Any] = dict(zip(CALLBACK_TENSORS, (x, text.cond, text.uncond), strict=True))
                    changed = on_step_end(self, step, timestep, {name: tensors[name] for name in tensor_inputs}) or {}
                    x, text.cond, text.uncond = (changed.get(name, tensor) for name, tensor in tensors.items())
                if self._interrupt:
                    raise StopSampling(x)
                return x

            _, patch_h, patch_w = self.transformer.config.patch_size
            frame_tokens = x.shape[-2] * x.shape[-1] // (patch_h * patch_w)
            sampler = make_sampler(self.scheduler, self._num_timesteps, frame_tokens, x.device)
            return denoise(velocity, x, sampler.sigmas, sampler.step, callback, sampler.timesteps)
