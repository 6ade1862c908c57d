"""``ospnext export``: a pipeline folder for sampling, or the adapter, from any state of a training run.

ospnext export runs/osp_14b/iter_000002000 out/pipeline
ospnext export runs/osp_14b/iter_000002000 out/pipeline weights=live vae_path=Wan2.1_VAE.pth
ospnext export runs/osp_14b_lora/iter_000002000 out/adapter
ospnext export runs/osp_14b_lora/iter_000002000 out/pipeline merge=true
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from ospnext.checkpoints.load import load_text_encoder, load_tokenizer, load_vae
from ospnext.checkpoints.lora import adapter_from
from ospnext.checkpoints.lora_files import Adapter, write_adapter
from ospnext.checkpoints.merge import merged_transformer
from ospnext.config import Config, ConfigError, load_config, read_yaml
from ospnext.config_keys import key_rules
from ospnext.device import resolve_dtype
from ospnext.generate.pipeline import OSPNextPipeline
from ospnext.generate.sampler import make_scheduler
from ospnext.models.text import WAN_NEGATIVE_PROMPT
from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.parallel.state import RECORD, StateError, read, read_record
from ospnext.quant.apply import quantize
from ospnext.quant.settings import read_keys, recipe
from ospnext.train.folder import SETTINGS
from ospnext.train.job import Sources, constructor_settings, find_sources
from ospnext.train.settings import TrainConfig
from ospnext.train.state import ALPHAS

# How the small models of the shapes world are sampled unless a call says otherwise, and those of Wan's size.
SMALL: dict[str, Any] = {"shift": 3.0, "num_inference_steps": 20, "guidance_scale": 4.0}
LARGE: dict[str, Any] = {"shift": 7.0, "num_inference_steps": 50, "guidance_scale": 5.0}


class ExportConfig(Config):
    """``ospnext export``: a state of a training run as a pipeline folder."""

    state: str = Field(min_length=1, description="iter_ folder of a run, beside its config.yaml")
    dst: str = Field(min_length=1, description="folder to write")
    weights: Literal["average", "live"] = Field("average", description="the moving average, or the weights themselves")
    merge: bool = Field(False, description="of a run with lora_config: the whole pipeline with the adapter merged in")
    vae_path: str | None = Field(None, description="VAE, if not the one of the run's config.yaml")
    text_encoder_path: str | None = Field(None, description="text encoder, if not that one")
    tokenizer_path: str | None = Field(None, description="tokenizer, if not that one")


def run(config: ExportConfig) -> str:
    """Write the pipeline; returns a line that says where it is.

    Raises:
        ValueError: the state is damaged, something that belongs to a pipeline is missing, or ``dst`` is there already.
    """
    state, to = Path(config.state), Path(config.dst)
    if to.exists():
        raise ConfigError(f"{to} is there already: choose another dst, or remove it")
    if not (state / RECORD).is_file():
        raise ConfigError(f"{state}: no state of a training run (there is no {RECORD}): name an iter_ folder")
    snapshot = state.parent / SETTINGS
    if not snapshot.is_file():
        raise ConfigError(f"{snapshot}: not there; a state is exported with the configuration beside it")
    if "rl_config" in read_yaml(snapshot):
        raise ConfigError(
            f"{state} is a state of reinforcement learning, whose adapters are in lora-checkpoint-*/ beside it: use "
            "one as lora_path, or `ospnext merge-lora`"
        )
    own = load_config(TrainConfig, snapshot, [], key_rules("train"))
    text = {"checkpoint_path": config.text_encoder_path, "text_tokenizer_path": config.tokenizer_path}
    text = {key: path for key, path in text.items() if path is not None}
    own = own.model_copy(
        update={
            "vae_config": own.vae_config.model_copy(update={"vae_path": config.vae_path or own.vae_config.vae_path}),
            "text_encoder_config": own.text_encoder_config.model_copy(update=text),
        }
    )
    if config.merge and not trained_adapter(state):
        raise ConfigError(f"merge is true, but {state} is no state of an adapter: leave it out")
    if trained_adapter(state) and not config.merge:
        export_adapter(own, state, to, config.weights)
    else:
        export_pipeline(own, state, to, config.weights)
    return f"saved {to}: the {config.weights} weights of {state}"


def trained_adapter(state: Path) -> bool:
    """Whether a state is of a run with ``lora_config``."""
    return ALPHAS in read_record(state).get("about", {})


def export_adapter(config: TrainConfig, state: Path, to: Path, weights: str = "average") -> None:
    """Save the adapter of a state as PEFT does; arguments and errors as ``export_pipeline``."""
    base = config.model or config.transformer_config.pretrained_model_dir_or_checkpoint
    write_adapter(adapter_in(state, weights), to, base=base)


def adapter_in(state: Path, weights: str) -> Adapter:
    """The adapter that a state holds.

    Raises:
        ValueError: the state is damaged.
    """
    return adapter_from(read(state, f"{weights}.transformer."), read_record(state)["about"][ALPHAS])


def export_pipeline(config: TrainConfig, state: Path, to: Path, weights: str = "average") -> None:
    """Save a state as one pipeline folder that samples as it was trained: the VAE in its own dtype, all else in
    ``weight_dtype``.

    Args:
        config: of the run.
        state: one of its states.
        to: the folder to write.
        weights: ``average`` or ``live``.

    Raises:
        ValueError: the state is damaged, or something is missing.
    """
    about = read_record(state).get("about", {})
    sources = _sources_of(config, state, about)
    assert sources.vae is not None
    small = config.data_config.dataset_name == "shapes"
    clip, sampling = config.data_config.dataset_config, SMALL if small else LARGE
    pipeline = OSPNextPipeline(
        _transformer_of(config, state, weights, about, sources.transformer),
        load_vae(sources.vae, resolve_dtype(config.vae_config.dtype)),
        _text_encoder_of(config, state, weights, about, sources.text_encoder),
        ByT5Tokenizer() if sources.tokenizer is None else load_tokenizer(sources.tokenizer),
        make_scheduler("euler", sampling["shift"]),
        # For small models what the dropped captions of training were; Wan's weights know Wan's.
        negative_prompt="" if small else WAN_NEGATIVE_PROMPT,
        defaults={
            "height": clip.sample_height,
            "width": clip.sample_width,
            "num_frames": clip.sample_num_frames,
            "num_inference_steps": sampling["num_inference_steps"],
            "guidance_scale": sampling["guidance_scale"],
        },
    )
    pipeline.save_pretrained(to)


def _sources_of(config: TrainConfig, state: Path, about: Mapping[str, Any]) -> Sources:
    """Where the parts of the pipeline come from that the state does not hold; all that are needed are named.

    Raises:
        ValueError: no state of a transformer's training, or a part is missing.
    """
    if "transformer" not in about:
        raise StateError(f"{state}: not the state of a transformer's training")
    sources, _ = find_sources(config)
    encoded = config.data_config.dataset_name == "latents"  # else the default of training is the tokenizer's, too
    needed = ["vae", *(["text_encoder"] * ("text_encoder" not in about)), *(["tokenizer"] * encoded)]
    if missing := [key for key in needed if getattr(sources, key) is None]:
        raise ConfigError(f"{', '.join(missing)} not named in the run's configuration: give {missing[0]}_path")
    return sources


def _transformer_of(
    config: TrainConfig, state: Path, weights: str, about: Mapping[str, Any], base: Path | None
) -> OSPNextTransformer3DModel:
    """The transformer of a state; of an adapter's, the ``base`` it was trained on with the adapter merged in."""
    dtype = resolve_dtype(config.weight_dtype)
    if ALPHAS in about:
        assert base is not None
        overrides = {"relayout": config.convert_layouts} | config.architecture()
        transformer = merged_transformer(base, adapter_in(state, weights), dtype, overrides)
    else:
        with torch.device("meta"):
            transformer = OSPNextTransformer3DModel(**constructor_settings(about["transformer"]))
        fill_from(transformer, read(state, f"{weights}.transformer."), dtype)
    eight_bits = recipe(read_keys(about["transformer"], state), torch.device("cpu"))
    if eight_bits is not None:
        quantize(transformer, eight_bits)  # its config.json says so
        transformer.load_state_dict(read(state, "running.transformer."), strict=False)
    return transformer


def _text_encoder_of(
    config: TrainConfig, state: Path, weights: str, about: Mapping[str, Any], source: Path | None
) -> UMT5EncoderModel:
    """The text encoder of a state, or where it was not trained, its ``source``."""
    dtype = resolve_dtype(config.weight_dtype)
    if "text_encoder" not in about:
        assert source is not None
        return load_text_encoder(source, dtype)
    with torch.device("meta"):
        encoder = UMT5EncoderModel(UMT5Config.from_dict(about["text_encoder"]))
    fill_from(encoder, read(state, f"{weights}.text_encoder."), dtype)
    encoder.tie_weights()
    return encoder


def fill_from(module: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Give a module on meta its parameters.

    Raises:
        StateError: they are not all there.
    """
    tied = set(getattr(module, "_tied_weights_keys", None) or {})
    expected = {name: p.shape for name, p in module.named_parameters()}
    differing = [name for name in expected if name not in tensors and name not in tied]
    differing += [name for name in tensors if name not in expected or tensors[name].shape != expected[name]]
    if differing:
        raise StateError(f"the state does not hold all of this {type(module).__name__}: {', '.join(differing[:3])}")
    module.load_state_dict({name: t.to(dtype) for name, t in tensors.items()}, strict=False, assign=True)
    module.eval()
