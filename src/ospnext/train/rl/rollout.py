"""Rollouts: an epoch's videos, the random steps that led to them, and what they are worth.

Videos are shared by prompt groups over the ``dp`` groups of processes; of a batch, the processes that share its videos
decode and score every n-th, so that each video is decoded and scored once. Scores go to all processes. All randomness
is a function of (seed, epoch, sample): rollouts do not depend on batches or on how many processes there are.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ospnext.flow.path import TIMESTEPS
from ospnext.flow.sample import denoise, sigma_schedule
from ospnext.flow.sde import Levels, Recorder, divergence, gaussian, rollout_levels
from ospnext.generate.pipeline import OSPNextPipeline
from ospnext.models.video_vae import decode_together
from ospnext.ops.fused import as_in_training
from ospnext.parallel.circle import Circle
from ospnext.parallel.launch import Launch, gather_objects
from ospnext.rewards.base import RewardSet, Scored
from ospnext.train.loop import seed_of
from ospnext.train.rl.policy import Policy, Text
from ospnext.train.rl.prompts import Prompt, groups_of_epoch, share_of
from ospnext.train.rl.settings import GRPOConfig

_FIRST_NOISE = 1  # tells the seeds of groups from those of samples


class Rollouts(NamedTuple):
    """What a rank has rolled out in an epoch, n samples.

    Attributes:
        samples: their numbers in the epoch.
        levels: of all of them.
        states: [n, C, t, h, w] before each random step and after the last.
        log_probs: [n] of each random step.
        text: of their prompts.
        batch: how many were rolled out together.
    """

    samples: list[int]
    levels: Levels
    states: list[Tensor]
    log_probs: list[Tensor]
    text: Text
    batch: int


class Worth(NamedTuple):
    """What all samples of an epoch are worth, the same on all processes; float64, NaN where nobody could say.

    Attributes:
        rewards: [S] weighted sums, less ``kl_reward`` times the divergence.
        each: [S] by name.
        prompts: [S] which prompt each belongs to.
        failures: attempts of rewards that failed since the run began, by name.
        unsound: samples whose videos hold NaN or infinity.
    """

    rewards: Tensor
    each: dict[str, Tensor]
    prompts: Tensor
    failures: dict[str, int]
    unsound: int = 0


class StoppedError(Exception):
    """The run was asked to end; nothing of the epoch counts."""


class Videos:
    """From noise to pixels and scores, on this process.

    Args:
        pipe: VAE, text encoder and what a model brings.
        config: sizes.
        rewards: this process's own.
        circle: the processes that share videos.
        negative: what to avoid.
    """

    def __init__(
        self, pipe: OSPNextPipeline, config: GRPOConfig, rewards: RewardSet, circle: Circle, negative: str
    ) -> None:
        self.pipe, self.config, self.rewards, self.circle, self.negative = pipe, config, rewards, circle, negative
        self._scoring = ThreadPoolExecutor(1)  # rewards compute while the next videos are sampled
        self._uncond: Tensor | None = None
        self.unsound = 0  # videos so far that hold NaN or infinity

    def noise(self, generators: Sequence[torch.Generator]) -> Tensor:
        """The initial noise of videos, a generator each."""
        c, vae = self.config, self.pipe.vae.config
        space, frames = vae.scale_factor_spatial, (c.num_frames - 1) // vae.scale_factor_temporal + 1
        shape = (self.pipe.transformer.config.in_dim, frames, c.height // space, c.width // space)
        return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators])

    def encode(self, prompts: Sequence[str]) -> Text:
        """Embeddings of prompts; the same ones are encoded once."""
        unique = list(dict.fromkeys(prompts))
        texts = [*unique, self.negative] if self.config.guided and self._uncond is None else unique
        encoded = self.pipe.encode_prompt(texts)
        if len(texts) > len(unique):
            self._uncond = encoded[-1:]
        rows = torch.tensor([unique.index(prompt) for prompt in prompts], device=encoded.device)
        uncond = None if self._uncond is None else self._uncond.expand(len(prompts), -1, -1)
        return Text(encoded[rows], uncond)

    def own(self, count: int) -> list[int]:
        """Which of a batch's ``count`` videos this process decodes and scores."""
        return list(range(self.circle.place, count, self.circle.count))

    @torch.no_grad()
    def pixels(self, latents: Tensor) -> Tensor:
        """Videos [B, F, C, H, W] in 0..1, where the VAE is."""
        with self.pipe.at_work("vae") as vae:
            video = decode_together(vae, latents)
        return (video.transpose(1, 2).float() / 2 + 0.5).clamp(0, 1)

    def score(self, videos: Tensor, prompts: Sequence[Prompt]) -> "Future[Scored]":
        """Have videos scored in the background; what is no number in a video makes its scores none."""
        sound = videos.flatten(1).isfinite().all(1).cpu()
        self.unsound += int((~sound).sum())
        metadata = [prompt.metadata | {"fps": self.config.save_fps} for prompt in prompts]
        texts = [prompt.text for prompt in prompts]
        return self._scoring.submit(self._score, videos.nan_to_num(0.0), texts, metadata, sound)

    def _score(
        self, videos: Tensor, texts: Sequence[str], metadata: Sequence[Mapping[str, Any]], sound: Tensor
    ) -> Scored:
        scored = self.rewards(videos, texts, metadata)
        each = {name: values.masked_fill(~sound, math.nan) for name, values in scored.each.items()}
        return Scored(scored.total.masked_fill(~sound, math.nan), each)

    def close(self) -> None:
        """Wait for what is being scored, and end the rewards."""
        self._scoring.shutdown()
        self.rewards.close()


class Roller:
    """Rolls out epochs.

    Args:
        config: the numbers.
        videos: from noise to scores.
        policy: what leads.
        prompts: all there are.
        shift: of the noise levels.
        seed: of everything.
        launch: this process.
        rank, ranks: this process's group among those that make different videos.
    """

    def __init__(
        self,
        config: GRPOConfig,
        videos: Videos,
        policy: Policy,
        prompts: Sequence[Prompt],
        shift: float,
        seed: int,
        launch: Launch,
        rank: int,
        ranks: int,
    ) -> None:
        self.config, self.videos, self.policy, self.prompts = config, videos, policy, list(prompts)
        self.shift, self.seed, self.launch, self.rank, self.ranks = shift, seed, launch, rank, ranks
        self.groups = config.num_batches_per_epoch * ranks * config.sample_batch_size // config.num_image_per_prompt
        self.window = config.sliding(seed)
        self.seconds = {"sampling": 0.0, "waiting": 0.0}  # of the last epoch

    def roll(self, epoch: int, check: Callable[[], None]) -> tuple[Rollouts, Worth]:
        """The rollouts of an epoch on this rank, and the worth of all; all processes call it together.

        Args:
            epoch: counted from 0.
            check: called before each batch; may raise ``StoppedError`` on all processes.
        """
        c = self.config
        start, unsound = time.perf_counter(), self.videos.unsound
        chosen = groups_of_epoch(epoch, self.groups, len(self.prompts), self.seed)
        samples = share_of(self.rank, self.ranks, self.groups, c.group_size)
        first, random = self.window.place(epoch, c.num_inference_steps)
        levels = rollout_levels(c.num_inference_steps, self.shift, first, random, c.flash)
        batches, pending = [], []
        for i in range(0, len(samples), c.sample_batch_size):
            check()
            some = samples[i : i + c.sample_batch_size]
            prompts = [self.prompts[chosen[s // c.group_size]] for s in some]
            with as_in_training(c.exact_rollouts):
                latents, rollouts, strayed = self._roll_batch(epoch, some, prompts, levels)
            own = self.videos.own(len(some))
            if own:
                scored = self.videos.score(self.videos.pixels(latents[own]), [prompts[k] for k in own])
                pending.append(([some[k] for k in own], [strayed[k] for k in own], scored))
            batches.append(rollouts)
        sampled = time.perf_counter()
        mine = [(numbers, strayed, scored.result()) for numbers, strayed, scored in pending]
        self.seconds = {"sampling": sampled - start, "waiting": time.perf_counter() - sampled}
        unsound = self.videos.unsound - unsound
        return _joined(batches), self._gather(mine, unsound, [p for p in chosen for _ in range(c.group_size)])

    @torch.no_grad()
    def _roll_batch(
        self, epoch: int, samples: list[int], prompts: Sequence[Prompt], levels: Levels
    ) -> tuple[Tensor, Rollouts, list[float]]:
        """Latents of a batch, how they came about, and each one's mean divergence from the base, if that counts."""
        c, device = self.config, self.videos.pipe._execution_device
        generators = [self._generator(device, epoch, s) for s in samples]
        shared = [self._generator(device, epoch, s // c.group_size, _FIRST_NOISE) for s in samples]
        noise = self.videos.noise(shared if c.same_noise else generators)
        text = self.videos.encode([prompt.text for prompt in prompts])

        def draw(x: Tensor) -> Tensor:
            return torch.stack([torch.randn(x.shape[1:], generator=g, device=x.device) for g in generators])

        times = TIMESTEPS * levels.sigmas.to(device)
        trained = self.policy.trained(text)
        told: dict[str, Any] = {}
        if not self.policy.trains_what_leads:
            told["policy"] = lambda i, x, v: trained(x, times[i].expand(len(x)))
        recorder = Recorder(levels, c.noise, c.level, draw, **told)
        latents = denoise(self.policy.leading(text), noise, levels.sigmas, recorder)
        rollouts = Rollouts(samples, levels, recorder.states, recorder.log_probs, text, len(samples))
        strayed = self._strayed(rollouts) if c.kl_reward else [0.0] * len(samples)
        return latents, rollouts, strayed

    def _generator(self, device: torch.device, *what: int) -> torch.Generator:
        return torch.Generator(device).manual_seed(seed_of(self.seed, *what))

    def _strayed(self, rollouts: Rollouts) -> list[float]:
        """The divergence of a batch's random steps from the base's, averaged over the steps."""
        sums = torch.zeros(len(rollouts.samples), device=rollouts.states[0].device)
        for step in range(rollouts.levels.random):
            moved = step_at(self.config, self.policy, rollouts, step, rollouts.text, rollouts.states[step])
            with self.policy.base():
                base = step_at(self.config, self.policy, rollouts, step, rollouts.text, rollouts.states[step])
            sums += divergence(moved.step, base.step, moved.sigma, moved.sigma_next, self.config.kl_convention)
        return (sums / rollouts.levels.random).tolist()

    def _gather(self, mine: list[tuple[list[int], list[float], Scored]], unsound: int, prompts: list[int]) -> Worth:
        failures = self.videos.rewards.failures
        everyone = gather_objects(self.launch, (mine, failures, unsound))
        names = sorted({name for part, *_ in everyone for _, _, scored in part for name in scored.each})
        count = len(prompts)
        rewards = torch.full((count,), math.nan, dtype=torch.float64)
        each = {name: rewards.clone() for name in names}
        for part, *_ in everyone:
            for numbers, strayed, scored in part:
                rewards[numbers] = scored.total - self.config.kl_reward * torch.tensor(strayed, dtype=torch.float64)
                for name, values in scored.each.items():
                    each[name][numbers] = values
        summed = {name: sum(counts.get(name, 0) for _, counts, _ in everyone) for name in failures}
        return Worth(rewards, each, torch.tensor(prompts), summed, sum(count for *_, count in everyone))


class At(NamedTuple):
    """A random step of samples: where it may lead, its levels, and the velocity [B, ...] that leads there."""

    step: Any  # flow.sde.Gaussian
    sigma: Tensor
    sigma_next: Tensor
    velocity: Tensor


def step_at(config: GRPOConfig, policy: Policy, rollouts: Rollouts, step: int, text: Text, x: Tensor) -> At:
    """Random step number ``step`` of a rollout, computed again from the states ``x`` [B, ...] before it.

    Args:
        config: which noise.
        policy: whose velocity; inside ``policy.base()`` the base's.
        rollouts: for the levels.
        step: counted from the first random one.
        text: of the samples.
        x: states.
    """
    sigmas = rollouts.levels.sigmas.to(x.device)
    i = rollouts.levels.first + step
    sigma, sigma_next = sigmas[i], sigmas[i + 1]
    v = policy.trained(text)(x, (TIMESTEPS * sigma).expand(len(x)))
    return At(gaussian(x, v, sigma, sigma_next, sigmas[1], config.noise, config.level), sigma, sigma_next, v)


@torch.no_grad()
def without_noise(
    videos: Videos, policy: Policy, prompts: Sequence[Prompt], seeds: Sequence[int], shift: float
) -> Tensor:
    """Latents of prompts as they are deployed: the ODE, ``eval_num_steps`` steps, a seed each."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = videos.noise(generators).to(videos.pipe._execution_device)
    text = videos.encode([prompt.text for prompt in prompts])
    return denoise(policy.leading(text), noise, sigma_schedule(videos.config.eval_num_steps, shift))


def _joined(batches: Sequence[Rollouts]) -> Rollouts:
    """All batches as one."""
    first = batches[0]
    samples = [s for batch in batches for s in batch.samples]
    cond, uncond = torch.cat([batch.text.cond for batch in batches]), first.text.uncond
    return Rollouts(
        samples,
        first.levels,
        [torch.cat(states) for states in zip(*(batch.states for batch in batches), strict=True)],
        [torch.cat(each) for each in zip(*(batch.log_probs for batch in batches), strict=True)],
        Text(cond, None if uncond is None else uncond[:1].expand(len(samples), -1, -1)),
        first.batch,
    )
