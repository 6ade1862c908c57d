"""What the tests of generating run in every process: the command, and the pipeline it makes, of the embedded model."""

from typing import Any

import processes
import torch

from ospnext.config import load_config
from ospnext.config_keys import key_rules
from ospnext.generate.run import arrange, run, settle
from ospnext.generate.settings import GenerateConfig
from ospnext.generate.sources import load_pipeline
from ospnext.generate.videos import hidden_bars, sample
from ospnext.parallel.fsdp import Sharding
from ospnext.parallel.launch import Launch

# 2 x 5 x 7 tokens: no size divides by anything.
WORDS = ("device=cpu", "num_frames=5", "height=80", "width=112", "scheduler_config.num_inference_steps=3", "seed=7")


def config_of(words: tuple[str, ...], **values: Any) -> GenerateConfig:
    """The configuration of the tests, changed."""
    return load_config(GenerateConfig, None, [*WORDS, *words, *values.items()], key_rules("generate"))


@processes.groups_forgotten()
def make(rank: int, world: int, words: tuple[str, ...], values: dict[str, Any]) -> str | None:
    """The command's run; what it says, or how it refuses."""
    config = config_of(words, **values)
    try:
        return run(config if world > 1 else config.alone(), Launch(rank, world, rank))
    except ValueError as error:
        return f"{type(error).__name__}: {error}"


@processes.groups_forgotten()
def frames(rank: int, world: int, words: tuple[str, ...], prompts: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Latents of a batch of prompts, and in one process of those that share it its frames."""
    config = config_of(words, prompt=prompts)
    launch = Launch(rank, world, rank)
    job = settle(config if world > 1 else config.alone(), launch)
    pipe = load_pipeline(config, job.plan, arrange(config, job))
    latents = sample(pipe, config, job.plan, job.tasks, hidden_bars())
    pipe.decode_modes = ("tiled",) if config.vae_tiling == "on" else ("whole", "chunked")
    if config.vae_tiling == "on":
        pipe.vae.enable_tiling(48, 48, 32, 32)  # several tiles
        pipe.vae.disable_tiling()
    decoded = pipe.decode(latents, "pt")
    return {"latents": latents} if decoded is None else {"latents": latents, "frames": decoded}


@processes.groups_forgotten()
def sharding(rank: int, world: int, words: tuple[str, ...], prompts: tuple[str, ...]) -> tuple[Sharding, str]:
    """How the transformer's weights are shared, and what the report notes."""
    config = config_of(words, prompt=prompts)
    job = settle(config, Launch(rank, world, rank))
    return arrange(config, job).sharding, job.report["notes"]
