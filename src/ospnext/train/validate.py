"""Videos along the way: fixed prompts and seeds every so many steps, from the averaged weights.

They lie in ``output_dir/validation/step_*/``, trackers show them (``pictures``), and where the world is shapes and
nobody named prompts they are of held-out scenes and graded; the figures are in ``output_dir/validation.jsonl``.

All processes sample together: each group that shares a video takes every ``dp``-th one, and all make as many calls. The
average is exchanged with the weights and back, bit by bit; noise has generators of its own; so training goes on as if
nothing had been.
"""

import json
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ospnext.assemble import Crew
from ospnext.checkpoints.load import load_text_encoder, load_tokenizer, load_vae
from ospnext.config import ConfigError
from ospnext.device import resolve_dtype, working_dtype
from ospnext.generate.pipeline import OSPNextPipeline
from ospnext.generate.sampler import make_scheduler
from ospnext.generate.settings import prompts_in
from ospnext.generate.videos import to_uint8
from ospnext.media import write_video
from ospnext.models.text import WAN_NEGATIVE_PROMPT
from ospnext.parallel.fsdp import forget_gathered
from ospnext.parallel.launch import Launch, gather_objects
from ospnext.parallel.team import VideoTeam
from ospnext.shapes.captions import caption
from ospnext.shapes.grade import Grade, grade
from ospnext.shapes.share import share
from ospnext.shapes.world import Scene, World, sample_scene
from ospnext.train.export import LARGE, SMALL
from ospnext.train.job import Job
from ospnext.train.log import Log, cut_log
from ospnext.train.networks import Components, shares_text_encoder, vae_dtype
from ospnext.train.pictures import Shown, shown
from ospnext.train.settings import TrainConfig
from ospnext.train.state import TrainState

FILE = "validation.jsonl"


class Asked(NamedTuple):
    """What is asked for: prompts, and the scenes they are of where they can be graded."""

    prompts: list[str]
    scenes: list[Scene] | None


class Made(NamedTuple):
    """A video of this process, once it is written or not."""

    number: int
    shown: Shown | None
    grade: Grade | None
    problem: str


def ask(config: TrainConfig) -> Asked | None:
    """The prompts of a run; None where it makes no videos.

    Raises:
        ConfigError: there are none, or what is to make videos of them is missing.
        FileNotFoundError, PermissionError: the file of prompts cannot be read.
    """
    validation, data = config.validation_config, config.data_config
    if validation.interval is None:
        return None
    if data.dataset_name == "latents" and config.model is None:
        named = config.vae_config.vae_path, *_text_paths(config)
        if None in named:
            raise ConfigError(
                "validation_config.interval is set, but encoded clips need no VAE, text encoder or tokenizer: name "
                "vae_config.vae_path, text_encoder_config.checkpoint_path and text_tokenizer_path too"
            )
    if validation.prompts is not None:
        prompts = prompts_in("validation_config.prompts", validation.prompts)
        return Asked(prompts[: validation.num_videos], None)
    if data.dataset_name != "shapes":
        raise ConfigError("validation_config.interval is set, but validation_config.prompts is missing: name a file")
    name = data.dataset_config.world
    world: World = World.full() if name == "both" else getattr(World, name)()
    rng = np.random.default_rng(validation.seed)
    scenes = [sample_scene(rng, world, held_out=True) for _ in range(validation.num_videos)]
    return Asked([caption(scene, rng) for scene in scenes], scenes)


def _text_paths(config: TrainConfig) -> tuple[str | None, str | None]:
    return config.text_encoder_config.checkpoint_path, config.text_encoder_config.text_tokenizer_path


@dataclass
class Validation:
    """Makes the videos of a run; made by ``open_validation``."""

    config: TrainConfig
    asked: Asked
    pipe: OSPNextPipeline
    launch: Launch
    crew: Crew
    size: dict[str, Any]
    trackers: Collection[str]

    def __call__(self, state: TrainState, log: Log) -> None:
        """After a step: videos of the average, if it is time; all processes call it together."""
        interval, last = self.config.validation_config.interval, self.config.training_iteration
        assert interval is not None
        if state.step % interval and state.step != last:
            return
        began = time.monotonic()
        folder = Path(self.config.output_dir) / "validation" / f"step_{state.step:09d}"
        modules = [self.pipe.transformer, self.pipe.text_encoder]
        training = [module.training for module in modules]
        state.average.swap()
        try:
            for module in modules:
                forget_gathered(module.eval())
            made = self.make(folder)
        finally:
            state.average.swap()
            for module, was in zip(modules, training, strict=True):
                forget_gathered(module.train(was))
        everyone = [one for some in gather_objects(self.launch, made) for one in some]
        if self.launch.first:
            self.show(sorted(everyone, key=lambda one: one.number), state.step, log)
        log.leave_out(time.monotonic() - began)

    def make(self, folder: Path) -> list[Made]:
        """Sample, decode, write and grade this process's videos."""
        groups = 1 if self.crew.mesh is None else self.crew.mesh.sizes.dp
        group = 0 if self.crew.mesh is None else self.crew.mesh.group
        made, count = [], len(self.asked.prompts)
        for first in range(0, count, groups):
            number = first + group
            frames = self.sample(min(number, count - 1))  # one that is over helps the others to gather weights
            if frames is not None and number < count:
                made.append(self.keep(number, frames, folder))
        return made

    def sample(self, number: int) -> torch.Tensor | None:
        """Frames uint8 ``[T, H, W, 3]`` of a prompt, in the first process of those that share the video."""
        validation, device = self.config.validation_config, self.crew.device
        dtype = resolve_dtype(self.config.weight_dtype)
        # Without shards the weights are float32, and computed with as in training; compiled blocks would compile anew.
        autocast = torch.autocast(device.type, dtype, enabled=self.crew.mesh is None and dtype != torch.float32)
        with torch.no_grad(), autocast, torch.compiler.set_stance("force_eager"):
            (latents,) = self.pipe(
                self.asked.prompts[number],
                num_inference_steps=validation.num_inference_steps,
                guidance_scale=validation.guidance_scale,
                generator=torch.Generator().manual_seed(validation.seed + number),
                output_type="latent",
                return_dict=False,
                **self.size,
            )
        with torch.no_grad():
            frames = self.pipe.decode(latents.nan_to_num(), "pt")
        return None if frames is None else to_uint8(frames[0]).cpu()

    def keep(self, number: int, frames: torch.Tensor, folder: Path) -> Made:
        """Write a video and grade it; what goes wrong with the file is said later, and no more."""
        path, fps = folder / f"video_{number}.mp4", self.config.validation_config.save_fps
        problem, video = "", frames.numpy()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_video(path, video, fps)
        except OSError as error:
            problem = f"{path}: {error.strerror or error}"
        scenes = self.asked.scenes
        marks = None if scenes is None or len(video) < 2 else grade(video, scenes[number])
        return Made(number, shown(number, video, fps, None if problem else path, self.trackers), marks, problem)

    def show(self, made: Sequence[Made], step: int, log: Log) -> None:
        """Videos and figures to the trackers and the file, in the first process."""
        problems = [one.problem for one in made if one.problem]
        if problems:
            print(f"warning: {len(problems)} of {len(made)} validation videos not written, such as {problems[0]}")
        grades = [one.grade for one in made if one.grade is not None]
        record: dict[str, Any] = {"step": step, "videos": len(made)} | figures(grades)
        try:
            cut_log(path := Path(self.config.output_dir) / FILE, step - 1)
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            print(f"warning: {error.filename}: {error.strerror}")
        log.videos("validation", [one.shown for one in made if one.shown is not None], step)
        numbers = {name: value for name, value in record.items() if name not in ("step", "videos")}
        if numbers:
            log.numbers({f"validation/{name}": value for name, value in numbers.items()}, step)


def figures(grades: Sequence[Grade]) -> dict[str, float]:
    """Share right in everything with its 95% Wilson interval, and of every attribute; nothing where none is graded."""
    if not grades:
        return {}
    whole = share(one.all_right for one in grades)
    found: dict[str, float] = {"everything": whole.right / whole.asked, "low": whole.low, "high": whole.high}
    for name in ("count", "shape", "colour", "motion", "relation", "pan"):
        marks = [mark for one in grades if (mark := getattr(one, name)) is not None]
        if marks:
            found[name] = sum(marks) / len(marks)
    return {name: round(value, 6) for name, value in found.items()}


def open_validation(
    config: TrainConfig,
    job: Job,
    parts: Components,
    crew: Crew,
    launch: Launch,
    asked: Asked | None,
    trackers: Collection[str],
) -> Validation | None:
    """What makes the videos, of the networks that are trained; loads those that training does without.

    ``trackers``: names of those that show them.

    Raises:
        CheckpointError, OutOfMemoryError: as ``checkpoints.load``.
    """
    if asked is None:
        return None
    device, cpu = job.device, torch.device("cpu")
    rendered = config.data_config.dataset_name == "shapes"
    vae, encoder, tokenizer = parts.vae, parts.text_encoder, job.tokenizer
    offload = config.encoder_cpu_offload and not rendered
    if vae is None or encoder is None or tokenizer is None:
        offload, text = True, config.text_encoder_config
        assert job.sources.vae is not None
        assert job.sources.text_encoder is not None
        assert job.sources.tokenizer is not None
        vae = load_vae(job.sources.vae, vae_dtype(config, device), cpu).requires_grad_(False)
        dtype = working_dtype(text.dtype or "bf16", device, text.dtype is not None)
        encoder = load_text_encoder(job.sources.text_encoder, dtype, cpu).requires_grad_(False)
        tokenizer = load_tokenizer(job.sources.tokenizer)
    sampling = SMALL if rendered else LARGE
    pipe = OSPNextPipeline(
        parts.transformer,
        vae,
        encoder,
        tokenizer,
        make_scheduler("euler", config.validation_config.shift or sampling["shift"]),
        negative_prompt="" if rendered else WAN_NEGATIVE_PROMPT,
        defaults={name: sampling[name] for name in ("num_inference_steps", "guidance_scale")},
    )
    pipe.set_progress_bar_config(disable=True)
    shared = parts.text_encoder is not None and shares_text_encoder(config, job)
    pipe.sharded = frozenset(("transformer", "text_encoder") if shared else ("transformer",))  # these stay in place
    pipe.place(device, ("vae", "text_encoder") if offload else ())
    if crew.mesh is not None and crew.mesh.sizes.video > 1:
        pipe.team = VideoTeam(crew.mesh)
    frames, space = vae.config.scale_factor_temporal, vae.config.scale_factor_spatial
    _, t, h, w = job.latents
    size = {"num_frames": frames * (t - 1) + 1, "height": space * h, "width": space * w}
    return Validation(config, asked, pipe, launch, crew, size, trackers)
