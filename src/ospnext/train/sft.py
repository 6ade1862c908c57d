"""``ospnext train``: the transformer learns the velocity of the straight path from noise to video latents.

    ospnext train configs/train/osp_1_3b.yaml
    torchrun --nproc-per-node 8 -m ospnext train configs/train/osp_14b.yaml

Everything that can be wrong is found before weights are loaded. In one process the weights are float32 and the
arithmetic ``weight_dtype`` by autocast; on many, weights are float32 shards that are gathered in ``weight_dtype``. The
run ends with a pipeline folder of the averaged weights, ready for ``ospnext generate model=...``; with ``lora_config``
weights are frozen in ``weight_dtype``, and it ends with the averaged adapter.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ospnext.checkpoints.lora import alphas_of, describe_adapter
from ospnext.device import device_label, dtype_label, resolve_dtype
from ospnext.flow.path import TIMESTEPS
from ospnext.models.text import encode_tokens
from ospnext.ops.attention import describe_kernel
from ospnext.parallel.apply import describe, describe_checkpointing
from ospnext.parallel.launch import Launch, agree
from ospnext.quant.apply import describe as describe_eight_bits
from ospnext.train.distil import Teacher, build_teacher, check_teacher
from ospnext.train.export import export_adapter, export_pipeline, output_of, spare_sources
from ospnext.train.feed import Feed
from ospnext.train.flops import peak_flops, training_flops
from ospnext.train.folder import open_folder, write_settings
from ospnext.train.foreign import check_foreign, started_from, take_over
from ospnext.train.job import Job, settle
from ospnext.train.log import Log, Losses, Meter
from ospnext.train.loop import LoopSettings, Surroundings, fit
from ospnext.train.networks import Components, arrange, build, open_feed, vae_dtype
from ospnext.train.noise import Noisy
from ospnext.train.settings import TrainConfig
from ospnext.train.state import ALPHAS, TrainState, latest
from ospnext.train.trackers import open_trackers, tracker_names
from ospnext.train.validate import ask, open_validation

LEVELS = 4  # ranges of the noise level that the loss is logged for


def run(config: TrainConfig, launch: Launch | None = None) -> None:
    """Train, then save the averaged weights as ``output_dir/pipeline``.

    Args:
        config: what is asked for.
        launch: this process among those of the run; all of them call this.

    Raises:
        ValueError: the configuration asks for what cannot be had, before anything is trained.
    """
    launch = launch or Launch()
    torch.use_deterministic_algorithms(config.deterministic_training)
    given, config = config, agree(launch, lambda: started_from(config))
    agree(launch, lambda: spare_sources(config))
    job = agree(launch, lambda: settle(config, launch))
    agree(launch, lambda: check_foreign(config, job))
    agree(launch, lambda: check_teacher(config, job))
    names, said = agree(launch, lambda: tracker_names(config))
    asked = agree(launch, lambda: ask(config))
    with ExitStack() as folder:
        changed = agree(launch, lambda: open_folder(folder, given, "train") if launch.first else [])
        crew = arrange(config, job)
        parts = agree(launch, lambda: build(config, job, crew))
        teacher = agree(launch, lambda: build_teacher(config, job, crew))
        feed = agree(launch, lambda: open_feed(config, job, parts, crew))
        if launch.first:
            report(config, job, parts, [*job.notices, *said, *([] if teacher is None else [str(teacher)]), *changed])
        validation = agree(launch, lambda: open_validation(config, job, parts, crew, launch, asked, names))
        meter = Meter(peak_flops(job.device, resolve_dtype(config.weight_dtype)))
        around = Surroundings(
            launch,
            feed,
            (lambda state: open_trackers(names, config, state)) if launch.first else (lambda state: ()),
            meter,
            feed.prepare,
            after_all(folder.enter_context(profiled(config, launch)), validation),
            about(config, job, parts),
            None if (old := config.import_checkpoint) is None else lambda state: take_over(Path(old), state),
            lambda: agree(launch, lambda: write_settings(given) if launch.first else None),
        )
        losses = make_losses(config, job, parts, feed, meter, teacher)
        state = fit(trained(config, parts), losses, loop_settings(config, crew.mesh is None), job.device, around)
        if launch.first and not state.terminated:
            finish(config)
        elif launch.first and state.step >= config.training_iteration:
            print("all steps are done: start again to make the pipeline, or the adapter, of the state")


def trained(config: TrainConfig, parts: Components) -> dict[str, torch.nn.Module]:
    """What is trained, by name."""
    modules: dict[str, torch.nn.Module] = {"transformer": parts.transformer}
    if config.train_text_encoder:
        assert parts.text_encoder is not None
        modules["text_encoder"] = parts.text_encoder
    return modules


def about(config: TrainConfig, job: Job, parts: Components) -> dict[str, Any]:
    """The settings of what is trained, which a state keeps so that it can be exported."""
    own: dict[str, Any] = {"transformer": json_values(parts.transformer.config)}
    if job.adapter is not None:
        own[ALPHAS] = alphas_of(parts.transformer)
    if config.train_text_encoder:
        assert parts.text_encoder is not None
        own["text_encoder"] = parts.text_encoder.config.to_dict()
    return own


def json_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A network's settings in plain values."""
    known = ((k, list(v) if isinstance(v, tuple) else v) for k, v in settings.items() if not k.startswith("_"))
    return dict(known)


def make_losses(
    config: TrainConfig, job: Job, parts: Components, feed: Feed, meter: Meter, teacher: Teacher | None = None
) -> Callable[[torch.Generator, int], Losses]:
    """The losses of one micro-batch, for ``loop.fit``."""
    shared = job.sizes.sizes.ssp * job.sizes.sizes.ulysses
    layouts = parts.transformer.layouts

    def losses(generator: torch.Generator, step: int) -> Losses:
        fed = feed.take()
        text_len, frozen = job.transformer["text_len"], job.adapter is not None
        tokens, flops = training_flops(job.transformer, layouts, fed.shape[1:], text_len, frozen)
        flops += 0 if teacher is None else teacher.flops(fed.shape[1:])
        meter.add(fed.shape[0] * tokens / shared, fed.shape[0] * flops / shared)
        text = embed(config, job, parts, fed.text)
        return velocity_loss(parts.transformer, fed.noisy, text, teacher)

    return losses


def embed(config: TrainConfig, job: Job, parts: Components, text: torch.Tensor) -> torch.Tensor:
    """Embeddings of what a feed gives, which may be embeddings already."""
    if text.is_floating_point():
        return text
    assert parts.text_encoder is not None
    assert job.tokenizer is not None
    with torch.set_grad_enabled(config.train_text_encoder):
        return encode_tokens(parts.text_encoder, text, text != job.tokenizer.pad_token_id)


def velocity_loss(
    transformer: torch.nn.Module, noisy: Noisy, text: torch.Tensor, teacher: Teacher | None = None
) -> Losses:
    """Mean squared error of the velocity at points of the path from noise to latents.

    With a teacher the loss is (1 - w) |v - (ε - x_0)|² + w |v - v_teacher|², w its weight, all at the same x_t, σ and
    text; the two are in ``loss_flow`` and ``loss_distillation``.

    Beside ``loss`` there is one for each quarter of the noise levels, as a pair (sum, count).
    """
    x_t, velocity, sigma = noisy
    predicted = transformer(x_t, TIMESTEPS * sigma, text, return_dict=False)[0]
    losses: dict[str, torch.Tensor] = {"loss": F.mse_loss(predicted, velocity)}
    if teacher is not None:
        losses |= {
            "loss_flow": losses["loss"],
            "loss_distillation": F.mse_loss(predicted, teacher(x_t, TIMESTEPS * sigma, text)),
        }
        losses["loss"] = torch.lerp(losses["loss_flow"], losses["loss_distillation"], teacher.weight)
    each = (predicted.detach() - velocity).square().flatten(1).mean(1)
    for level in range(LEVELS):
        here = ((sigma * LEVELS).ceil().clamp(1, LEVELS) == level + 1).to(each.dtype)
        name = f"loss_sigma_{level / LEVELS:.2f}_{(level + 1) / LEVELS:.2f}"
        losses[name] = torch.stack([(each * here).sum(), here.sum()])
    return losses


def loop_settings(config: TrainConfig, autocast: bool) -> LoopSettings:
    """The loop's settings of this recipe; without ``autocast`` the model itself sees to its arithmetic."""
    optimiser = config.optimizer_config
    return LoopSettings(
        output_dir=Path(config.output_dir),
        iterations=config.training_iteration,
        lr=optimiser.lr,
        lr_schedule=config.lr_schedule,
        warmup_steps=config.warmup_steps,
        weight_decay=optimiser.weight_decay,
        betas=optimiser.betas,
        eps=optimiser.eps,
        max_grad_norm=config.init_max_grad_norm,
        accumulation_steps=config.gradient_accumulation_steps,
        ema_decay=config.ema_decay,
        ema_update_interval=config.ema_update_interval,
        log_interval=config.log_interval,
        save_interval=config.save_interval,
        keep=config.keep_checkpoints,
        time_budget_minutes=config.time_budget_minutes,
        seed=config.seed,
        dtype=resolve_dtype(config.weight_dtype) if autocast else torch.float32,
    )


def after_all(*hooks: Callable[[TrainState, Log], None] | None) -> Callable[[TrainState, Log], None]:
    """One hook of several, for ``Surroundings.after_step``."""

    def call(state: TrainState, log: Log) -> None:
        for hook in hooks:
            if hook is not None:
                hook(state, log)

    return call


@contextmanager
def profiled(config: TrainConfig, launch: Launch) -> Iterator[Callable[[TrainState, Log], None]]:
    """Writes a trace of steps 3 to 5 of this start to ``output_dir/trace_RANK.json``, where the configuration says so.

    What it gives is to be called after each step.
    """
    if not config.profiling:
        yield lambda state, log: None
        return
    path = Path(config.output_dir) / f"trace_{launch.rank}.json"
    with torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    ) as profiler:
        yield lambda state, log: profiler.step()


def report(config: TrainConfig, job: Job, parts: Components, notices: list[str]) -> None:
    """Say what will really run."""
    device, dtype = job.device, resolve_dtype(config.weight_dtype)
    for line in notices:
        print(f"note: {line}")
    networks = trained(config, parts).items()
    sizes = ", ".join(f"{name} {sum(p.numel() for p in m.parameters()) / 1e6:.2f}M" for name, m in networks)
    if job.adapter is not None:
        sizes = f"{describe_adapter(parts.transformer)}, in {sizes} with it, frozen in {dtype_label(dtype)},"
    learnt = "weights" if job.adapter is None else "adapter"
    latents = "read from files" if parts.vae is None else f"in {dtype_label(vae_dtype(config, device))}"
    clips = config.data_config.batch_size * config.gradient_accumulation_steps * job.sizes.sizes.dp
    print(
        f"training {sizes} on {device_label(device)}; float32 {learnt}, {dtype_label(dtype)} arithmetic; "
        f"latents {latents}; attention: {describe_kernel(config.attention_kernel, device, dtype)}; "
        f"8 bits: {describe_eight_bits(parts.transformer)}; "
        f"{describe(job.sizes.sizes, job.sizes.copies)}; blocks "
        f"{describe_checkpointing(config.checkpointed)}, "
        f"{'compiled' if config.compile and device.type != 'cpu' else 'not compiled'}; {clips} clips a step"
    )


def finish(config: TrainConfig) -> None:
    """Write what the newest state's average makes: the adapter, or a pipeline folder.

    The latter only if the run knows all that belongs to one.
    """
    state, to = latest(Path(config.output_dir)), output_of(config)
    assert state is not None
    if to is None:
        print(f"no pipeline: VAE, text encoder and tokenizer are not named; `ospnext export {state} DST` makes one")
    elif config.lora_config is not None:
        export_adapter(config, state, to)
        print(f"saved {to}; `ospnext export {state} DST merge=true` makes a pipeline with it")
    else:
        export_pipeline(config, state, to)
        print(f"saved {to}")
