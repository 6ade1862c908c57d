"""``ospnext rl``: Mix-GRPO on an adapter (LoRA) of the sparse model.

    ospnext rl configs/rl/shapes.yaml
    torchrun --nproc-per-node 8 -m ospnext rl configs/rl/osp_14b.yaml

An epoch rolls out videos of some prompts (``rollout``), has them scored, and trains on the random steps that led to
them (``update``); the base model stays as it is. Everything that can be wrong is found before weights are loaded. An
epoch is a function of the adapter and of its number alone, and states are saved between epochs: a resumed run is the
run that was never interrupted.
"""

import json
import math
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ospnext.assemble import Crew
from ospnext.checkpoints.fill import progress_bar as loading_bar
from ospnext.checkpoints.lora import alphas_of, describe_adapter
from ospnext.config import dump_yaml
from ospnext.device import device_label, dtype_label, resolve_dtype
from ospnext.generate.manifest import write_text
from ospnext.ops.attention import describe_kernel
from ospnext.parallel.apply import describe
from ospnext.parallel.circle import Circle
from ospnext.parallel.fsdp import forget_gathered
from ospnext.parallel.guidance import SplitGuidance
from ospnext.parallel.launch import Launch, agree, any_of, gather_objects
from ospnext.parallel.state import StateWriter
from ospnext.quant.apply import describe as describe_eight_bits
from ospnext.train.clipping import AdaptiveClipper
from ospnext.train.folder import open_folder, write_settings
from ospnext.train.log import Log
from ospnext.train.loop import LoopSettings, finishing, progress_bar, termination
from ospnext.train.optim import MovingAverage, adamw, learning_rate
from ospnext.train.rl.grpo import advantages, best_and_worst, mixed_advantages, most_varied, zero_variance_share
from ospnext.train.rl.held_out import HeldOut, read_lines, suspicions
from ospnext.train.rl.parts import Job, arrange, load, make_rewards, settle
from ospnext.train.rl.policy import Policy
from ospnext.train.rl.progress import SPAN, Progress
from ospnext.train.rl.rollout import Roller, Rollouts, StoppedError, Videos, Worth
from ospnext.train.rl.save import resume_from, save_checkpoint
from ospnext.train.rl.settings import GRPOConfig, RLConfig
from ospnext.train.rl.update import Updater
from ospnext.train.rl.why import not_finite, why_unscored
from ospnext.train.state import ALPHAS, TrainState, latest
from ospnext.train.trackers import open_trackers, tracker_names

REWARDS = "rewards.jsonl"


def run(config: RLConfig, launch: Launch | None = None) -> str | None:
    """Train the adapter.

    Args:
        config: what is asked for.
        launch: this process among those of the run; all of them call this.

    Returns:
        A line that says where the adapter is; None in all processes but the first.

    Raises:
        ValueError: the configuration asks for what cannot be had, before anything is rolled out; or the run stopped
            itself, in words that say why.
    """
    launch = launch or Launch()
    torch.use_deterministic_algorithms(config.deterministic_training)
    job = agree(launch, lambda: settle(config, launch))
    names, said = agree(launch, lambda: tracker_names(config))
    with ExitStack() as stack:
        changed = agree(launch, lambda: open_folder(stack, config, "rl") if launch.first else [])
        crew = arrange(config, job)
        with loading_bar() if launch.first else nullcontext() as progress:
            pipe = agree(launch, lambda: load(config, job, crew, progress))
        rewards = agree(launch, lambda: make_rewards(config, job))
        videos = Videos(pipe, job.config, rewards, Circle(crew.mesh), job.negative)
        stack.callback(videos.close)
        if launch.first:
            report(config, job, pipe.transformer, [*config.notices, *job.notices, *said, *changed])
        return Training(config, job, crew, launch, videos, names).train()


class Training:
    """A run, from its state to its end.

    Args:
        config, job: what is asked for, and what was settled.
        crew, launch: who does it.
        videos: from noise to scores.
        trackers: their names.
    """

    def __init__(
        self, config: RLConfig, job: Job, crew: Crew, launch: Launch, videos: Videos, trackers: list[str]
    ) -> None:
        self.config, self.c, self.job, self.launch, self.videos = config, job.config, job, launch, videos
        self.folder, self.transformer = Path(config.output_dir), videos.pipe.transformer
        split = crew.mesh is not None and crew.mesh.sizes.cfg == 2
        halves = SplitGuidance(crew.mesh) if split and crew.mesh else None
        policy = Policy(self.transformer, self.c, job.plan.dtypes.transformer, halves)
        rank, ranks = (0, 1) if crew.mesh is None else (crew.mesh.group, crew.mesh.sizes.dp)
        shift = job.plan.sampling.shift
        self.roller = Roller(self.c, videos, policy, job.prompts, shift, config.seed, launch, rank, ranks)
        self.held_out = HeldOut(
            self.c, videos, policy, job.eval_prompts, shift, config.seed, self.folder, launch, rank, ranks, trackers
        )
        self.progress, self.trackers = Progress(), trackers
        self.state = make_state(config, self.transformer, self.progress)
        self.settings = step_settings(config)
        self.rate = config.optimizer_config.lr  # the highest of a schedule
        exact = job.plan.dtypes.transformer == torch.float32 and job.plan.eight_bits == "none"
        self.updater = Updater(self.c, policy, self.state, self.settings, launch, exact)
        self.say: Callable[[str], None] = print if launch.first else lambda text: None

    def train(self) -> str | None:
        """Epoch after epoch, to the last, the end of the time budget or SIGTERM; then save."""
        config, state, progress = self.config, self.state, self.progress
        self.resume()
        agree(self.launch, lambda: write_settings(config) if self.launch.first else None)
        opened = open_trackers(self.trackers, config, state) if self.launch.first else []
        log = Log(self.folder, self.launch, opened, None, self.job.device, state.step)
        writer = StateWriter(self.folder, config.keep_checkpoints)
        deadline = time.monotonic() + 60 * (config.time_budget_minutes or float("inf"))
        saved = ""
        with finishing(writer, self.launch), termination() as asked, progress_bar(self.launch.first) as bar:
            task = bar.add_task("reinforcement learning", total=config.num_epochs, completed=progress.epoch)

            def check() -> None:
                if any_of(self.launch, asked.is_set()):
                    raise StoppedError

            with suppress(StoppedError):  # in the midst of an epoch: what counts is the state before it
                self.evaluate(log, first=True)
                while progress.epoch < config.num_epochs:
                    if any_of(self.launch, asked.is_set() or time.monotonic() >= deadline):
                        break
                    bar.update(task, description=self.epoch(log, check), completed=progress.epoch + 1)
                    progress.epoch += 1
                    done = progress.epoch == config.num_epochs
                    if progress.epoch % self.c.eval_freq == 0 or done or time.monotonic() >= deadline:
                        self.evaluate(log)
                    if progress.epoch % config.save_interval == 0 and not done:
                        writer.finish()
                        self.checkpoint()  # before the state: a run that is killed between comes back to this epoch
                    if progress.epoch % config.state_interval == 0 or done:
                        state.save(writer)
                state.save(writer)
                writer.finish()
                saved = f"; adapter in {self.checkpoint()}"
            writer.finish()
        log.finish()
        end = f"epoch {progress.epoch} of {config.num_epochs}, step {state.step}"
        stopped = progress.epoch < config.num_epochs
        self.say(f"stopped at {end}: start again to go on" if stopped else f"done: {end}")
        return f"log in {self.folder / 'train_log.jsonl'}{saved}" if self.launch.first else None

    def resume(self) -> None:
        """Go on from the newest state in the folder, else from ``lora_path``'s if it has one."""
        self.find_state()
        if self.launch.first:  # what a killed run noted of epochs that come again is taken out
            kept = [line for line in read_lines(self.folder / REWARDS) if line["epoch"] < self.progress.epoch]
            write_text(self.folder / REWARDS, "".join(json.dumps(line) + "\n" for line in kept))

    def find_state(self) -> None:
        """``resume`` without the logs."""
        config, path = self.config, self.config.lora_config.lora_path
        if (newest := latest(self.folder)) is not None:
            self.state.load(newest, self.launch)
            self.say(f"resumed from {newest}: epoch {self.progress.epoch} of {config.num_epochs}")
        elif path is not None and Path(path).is_dir():
            epoch = agree(self.launch, lambda: resume_from(Path(path), self.state, self.launch))
            if epoch is None:
                return
            self.progress.epoch = epoch if config.resume_epoch is None else config.resume_epoch
            self.say(f"goes on from {path}: epoch {self.progress.epoch}, step {self.state.step}")
        else:
            return
        optimiser = config.optimizer_config
        if optimiser.resume_override_lr and optimiser.resume_lr is not None:
            self.rate = optimiser.resume_lr
            set_rate(self.state, self.rate)

    def epoch(self, log: Log, check: Callable[[], None]) -> str:
        """Roll out and train once; returns the bar's description."""
        if (schedule := self.config.lr_schedule) != "constant":  # which a state keeps by itself
            set_rate(self.state, learning_rate(self.progress.epoch, self.rate, schedule, 0, self.config.num_epochs))
        rollouts, worth = self.roller.roll(self.progress.epoch, check)
        forget_gathered(self.transformer)
        start = time.perf_counter()
        if not bool(worth.rewards.isfinite().any()):
            part, steps = list(range(min(rollouts.batch, len(rollouts.samples)))), range(rollouts.levels.random)
            unsound = not_finite(self.c, self.updater.policy, rollouts, [part], steps) if worth.unsound else None
            unsound = next(filter(None, gather_objects(self.launch, unsound)), None)
            self.refuse(
                f"not one of epoch {self.progress.epoch}'s {len(worth.rewards)} videos could be scored: "
                f"{why_unscored(self.c, worth, unsound)}; the newest state is untouched"
            )
        everyone = advantages_of(self.c, worth)
        own = torch.tensor(rollouts.samples)
        places = places_to_train(self.c, worth.rewards[own])
        facts = self.facts(worth, everyone)
        self.updater.update(rollouts, places, everyone[own], facts, log, check)
        seconds = self.roller.seconds | {"training": time.perf_counter() - start}
        self.note(worth, rollouts)
        self.progress.seconds += sum(seconds.values())
        log.add_facts(
            {f"{name}_seconds": value for name, value in seconds.items()} | {"ratio_before": self.updater.deviation}
        )
        log.write(self.state)
        reward = worth.rewards[worth.rewards.isfinite()].mean().item()
        self.progress.add(reward)
        self.look_for_decline()
        return f"reinforcement learning, reward {reward:.4f}"

    def look_for_decline(self) -> None:
        """Warn, once in a while, where training makes things worse.

        Raises:
            ValueError: it does, and the run is to stop then.
        """
        if (fallen := self.progress.decline) is None:
            return
        videos = self.c.train_batch_size * self.config.gradient_accumulation_steps
        line = (
            f"the reward of rollouts fell from {fallen[0]:.4g} to {fallen[1]:.4g} (means of {SPAN} epochs): updates do "
            f"more harm than good. Lower optimizer_config.lr ({self.config.optimizer_config.lr:g}), or learn from more "
            f"than {videos} videos an update (gradient_accumulation_steps)"
        )
        self.progress.last = []  # to be filled anew before it is said again
        self.say(f"warning: {line}")
        if self.c.watch_stop:
            self.refuse(f"{line}; stopped (rl_config.watch_stop); the newest state is untouched")

    def facts(self, worth: Worth, everyone: Tensor) -> dict[str, float]:
        """What the log says of an epoch besides the steps."""
        groups = torch.arange(len(worth.rewards)) // self.c.group_size
        known = worth.rewards[worth.rewards.isfinite()]
        facts = {
            "epoch": float(self.progress.epoch),
            "reward": known.mean().item(),
            "reward_std": known.std(correction=0).item(),
            "zero_variance_share": zero_variance_share(worth.rewards, groups),
            "advantage_size": everyone.abs().mean().item(),
            "unscored": float(len(worth.rewards) - len(known)),
        }
        for name, values in worth.each.items():
            there = values[values.isfinite()]
            if len(there):
                facts |= {f"reward_{name}": there.mean().item(), f"reward_{name}_std": there.std(correction=0).item()}
        return facts | {f"failures_{name}": float(n) for name, n in worth.failures.items() if n}

    def note(self, worth: Worth, rollouts: Rollouts) -> None:
        """A line in ``rewards.jsonl``: the rewards of every prompt."""
        if not self.launch.first:
            return
        size = self.c.group_size
        line = {
            "epoch": self.progress.epoch,
            "window": [rollouts.levels.first, rollouts.levels.random],
            "prompts": [
                {
                    "prompt": self.job.prompts[int(worth.prompts[i])].text,
                    "rewards": [
                        round(r, 5) if math.isfinite(r) else None for r in worth.rewards[i : i + size].tolist()
                    ],
                }
                for i in range(0, len(worth.rewards), size)
            ],
        }
        with (self.folder / REWARDS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def evaluate(self, log: Log, first: bool = False) -> None:
        """Evaluate the averaged adapter on prompts that are not trained on, and look for signs of cheating.

        Raises:
            ValueError: one is found, and the run is to stop then.
        """
        progress = self.progress
        if not self.job.eval_prompts or (first and progress.baseline):
            return
        self.state.average.swap()
        forget_gathered(self.transformer)
        means, videos = self.held_out.evaluate(progress.epoch, self.state.step, progress.seconds)
        self.state.average.swap()
        forget_gathered(self.transformer)
        if not progress.baseline:
            progress.baseline = means
        log.videos("eval", videos, self.state.step)
        log.numbers({f"eval/{name}": value for name, value in means.items() if value == value}, self.state.step)
        self.say(f"evaluation after {progress.epoch} epochs: " + ", ".join(f"{k} {v:.4g}" for k, v in means.items()))
        for line in suspicions(means, progress.baseline, self.c):
            self.say(f"warning: {line}; look at {self.folder / 'eval'}")
            if self.c.watch_stop:
                self.refuse(f"{line}: stopped (rl_config.watch_stop); the newest state is untouched")

    def refuse(self, problem: str) -> NoReturn:
        """End the run on all processes, which have found the same."""

        def fail() -> None:
            raise ValueError(problem)

        agree(self.launch, fail)
        raise AssertionError("all have failed")

    def checkpoint(self) -> Path:
        """Write the lora-checkpoint folders."""
        return save_checkpoint(self.folder, self.state, self.progress.epoch, dump_yaml(self.config), self.launch)


def make_state(config: RLConfig, transformer: torch.nn.Module, progress: Progress) -> TrainState:
    """The adapter, its optimiser and average, at the start."""
    modules, o = {"transformer": transformer}, config.optimizer_config
    return TrainState(
        modules,
        adamw(modules, o.lr, o.betas, o.eps, o.weight_decay),
        MovingAverage(modules, config.ema_decay),
        AdaptiveClipper(config.init_max_grad_norm),
        progress,
        {ALPHAS: alphas_of(transformer)},
    )


def step_settings(config: RLConfig) -> LoopSettings:
    """What a step of the optimiser needs to know."""
    return LoopSettings(
        output_dir=Path(config.output_dir),
        iterations=config.num_epochs,
        lr=config.optimizer_config.lr,
        accumulation_steps=config.gradient_accumulation_steps,
        ema_update_interval=config.ema_update_interval,
    )


def set_rate(state: TrainState, rate: float) -> None:
    """Give all parameters a learning rate."""
    for group in state.optimiser.param_groups:
        group["lr"] = rate


def advantages_of(c: GRPOConfig, worth: Worth) -> Tensor:
    """Of all samples of an epoch, the same on all processes."""
    options: dict[str, Any] = {
        "per_group": c.per_prompt_stat_tracking,
        "global_std": c.global_std,
        "most": c.adv_clip_max,
    }
    if c.reward_mixing == "sum":
        return advantages(worth.rewards, worth.prompts, **options)
    rewards = torch.stack([worth.each[name] for name in c.reward_fn], 1)
    weights = torch.tensor(list(c.reward_fn.values()), dtype=torch.float64)
    return mixed_advantages(rewards, weights, worth.prompts, **options)


def places_to_train(c: GRPOConfig, rewards: Tensor) -> list[int]:
    """Which of this rank's videos of an epoch, by their rewards, are trained on; as many on every rank."""
    groups = torch.arange(len(rewards)) // c.group_size
    places = torch.arange(len(rewards))
    if c.train_groups is not None:
        places = most_varied(rewards, groups, c.train_groups)
    if c.best_of_n is not None:
        places = places[best_and_worst(rewards[places], groups[places], c.best_of_n)]
    return places.tolist()


def report(config: RLConfig, job: Job, transformer: Any, notices: list[str]) -> None:
    """Say what will really run."""
    for line in notices:
        print(f"note: {line}")
    c, sizes, dtype = job.config, job.plan.sizes, resolve_dtype(dtype_label(job.plan.dtypes.transformer))
    videos = c.num_batches_per_epoch * c.sample_batch_size * c.sample_time_per_prompt * sizes.sizes.dp
    window = f"{c.random_steps} of {c.num_inference_steps} steps random ({c.window}, {c.noise} {c.level:g})"
    print(
        f"reinforcement learning of {describe_adapter(transformer)} in float32 on a base in {dtype_label(dtype)}; "
        f"8 bits: {describe_eight_bits(transformer)}; {device_label(job.device)}; attention: "
        f"{describe_kernel(config.attention_kernel, job.device, dtype)}; {describe(*sizes)}\n"
        f"{len(job.prompts)} prompts, {len(job.eval_prompts)} of evaluation; an epoch has {videos} videos of "
        f"{c.num_frames} frames of {c.width} x {c.height} in groups of {c.group_size}; {window}, shift "
        f"{job.plan.sampling.shift:g}, guidance {c.guidance_scale:g}; rewards: "
        f"{', '.join(f'{weight:g} {name}' for name, weight in c.reward_fn.items())}"
    )
