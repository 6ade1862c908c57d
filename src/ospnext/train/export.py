"""``ospnext export``: a pipeline folder for sampling, or the adapter, from any state of a training run.

ospnext export runs/osp_14b/iter_000002000 out/pipeline
ospnext export runs/osp_14b/iter_000002000 out/pipeline weights=live vae_path=Wan2.1_VAE.pth
ospnext export runs/osp_14b_lora/iter_000002000 out/adapter
ospnext export runs/osp_14b_lora/iter_000002000 out/pipeline merge=true
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKLWan
from pydantic import Field
from torch import Tensor, nn
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from ospnext.checkpoints.components import pipeline_folder
from ospnext.checkpoints.drafts import new_folder
from ospnext.checkpoints.load import load_text_encoder, load_tokenizer, load_vae
from ospnext.checkpoints.lora import adapter_from
from ospnext.checkpoints.lora_files import Adapter, write_adapter
from ospnext.checkpoints.merge import merged_transformer
from ospnext.checkpoints.read import list_names
from ospnext.config import Config, ConfigError, load_config, read_yaml
from ospnext.config_keys import key_rules
from ospnext.data.buckets import Bucket
from ospnext.data.latents import INDEX, read_index, settings_fingerprint
from ospnext.device import resolve_dtype
from ospnext.generate.pipeline import OSPNextPipeline
from ospnext.generate.sampler import make_scheduler
from ospnext.models.text import WAN_NEGATIVE_PROMPT
from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.parallel.state import RECORD, StateError, read, read_record
from ospnext.quant.apply import quantize
from ospnext.quant.settings import read_keys, recipe
from ospnext.train.folder import SETTINGS
from ospnext.train.job import Sources, constructor_settings, find_sources, vae_fingerprint
from ospnext.train.settings import TrainConfig
from ospnext.train.state import ALPHAS

# How the small models of the shapes world are sampled unless a call says otherwise, and those of Wan's size.
SMALL: dict[str, Any] = {"shift": 3.0, "num_inference_steps": 20, "guidance_scale": 4.0}
LARGE: dict[str, Any] = {"shift": 7.0, "num_inference_steps": 50, "guidance_scale": 5.0}

_PIPELINE = ("model_index.json", "transformer", "vae", "text_encoder", "tokenizer", "scheduler")  # what is in one


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
    if to.is_symlink():
        raise ConfigError(f"{to} is a link to {to.readlink()}, where nothing is: choose another dst, or remove it")
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


def output_of(config: TrainConfig) -> Path | None:
    """What a run writes at its end: an adapter, or a pipeline folder; None where it does not know all parts of one."""
    if config.lora_config is not None:
        return Path(config.output_dir) / "adapter"
    text = config.text_encoder_config
    parts = config.vae_config.vae_path, text.checkpoint_path, text.text_tokenizer_path
    if config.model is None and config.data_config.dataset_name == "latents" and None in parts:
        return None
    return Path(config.output_dir) / "pipeline"


def spare_sources(config: TrainConfig) -> None:
    """Refuse a run that would overwrite at its end what it starts from, and reads again whenever it goes on.

    Raises:
        ConfigError: what is read, or something else, lies where the result is written; or as ``find_sources``.
    """
    to = output_of(config)
    if to is None:
        return
    if config.lora_config is None:
        _check_replaceable(to)
    own = [
        *("model_config.pretrained_model_dir_or_checkpoint", "vae_config.vae_path"),
        *("text_encoder_config.checkpoint_path", "text_encoder_config.text_tokenizer_path"),
    ]
    found = zip(own if config.model is None else ["model"] * len(own), find_sources(config)[0], strict=True)
    teacher, lora = config.distillation_config.teacher, config.lora_config
    read = [
        ("model", None if config.model is None else pipeline_folder(config.model)),
        *found,
        ("distillation_config.teacher", None if teacher is None else pipeline_folder(teacher)),
        ("lora_config.lora_path", None if lora is None or lora.lora_path is None else Path(lora.lora_path)),
    ]
    for key, path in read:
        if path is not None and to.resolve() in (path.resolve(), *path.resolve().parents):
            raise ConfigError(
                f"{key}: {path} is in {to}, which this run overwrites at its end: give another output_dir, or move it"
            )


def _check_replaceable(to: Path) -> None:
    """Raise ConfigError where a pipeline would replace anything but a pipeline, or what was left of one."""
    if to.exists() and not to.is_dir():
        raise ConfigError(f"{to}: is a file, where a pipeline folder is to be written: move it")
    inside = sorted(path.name for path in to.iterdir() if not path.name.startswith(".")) if to.is_dir() else []
    if foreign := [name for name in inside if name not in _PIPELINE]:
        raise ConfigError(f"{to}: holds {list_names(foreign, 3)}, no part of the pipeline that replaces it: move it")


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
        to: the folder to write, whole or not at all; a pipeline that is there is replaced.
        weights: ``average`` or ``live``.

    Raises:
        ValueError: the state is damaged, something is missing, or the VAE is not that of the clips.
        OSError: it cannot be written.
    """
    _check_replaceable(to)
    about = read_record(state).get("about", {})
    sources = _sources_of(config, state, about)
    assert sources.vae is not None
    small = config.data_config.dataset_name == "shapes"
    sampling, clips = SMALL if small else LARGE, _encoded_clips(config, state)
    vae = _vae_of(config, sources.vae, clips)
    pipeline = OSPNextPipeline(
        _transformer_of(config, state, weights, about, sources.transformer),
        vae,
        _text_encoder_of(config, state, weights, about, sources.text_encoder),
        ByT5Tokenizer() if sources.tokenizer is None else load_tokenizer(sources.tokenizer),
        make_scheduler("euler", sampling["shift"]),
        # For small models what the dropped captions of training were; Wan's weights know Wan's.
        negative_prompt="" if small else WAN_NEGATIVE_PROMPT,
        defaults={
            **_size_of(config, clips),
            "num_inference_steps": sampling["num_inference_steps"],
            "guidance_scale": sampling["guidance_scale"],
        },
    )
    with new_folder(to.resolve()) as draft:  # where it is a link, beside what it leads to
        pipeline.save_pretrained(draft)


def _encoded_clips(config: TrainConfig, state: Path) -> dict[str, Any] | None:
    """The index of the encoded clips that a state was trained on; None for other data, or where they are gone."""
    data = config.data_config
    if data.dataset_name != "latents":
        return None
    folder = Path(str(data.dataset_config.metafile_or_dir_path))
    index = read_index(folder) if (folder / INDEX).is_file() else None
    read = str((read_record(state).get("data") or {}).get("data"))
    if index is None or settings_fingerprint(index["settings"]) not in read:  # others have taken their place
        return None
    return index


def _vae_of(config: TrainConfig, path: Path, clips: Mapping[str, Any] | None) -> AutoencoderKLWan:
    """The VAE.

    Raises:
        ConfigError: it is not the one that made the clips, in whichever numbers they were made.
    """
    dtype = resolve_dtype(config.vae_config.dtype)
    if clips is not None:
        folder = Path(str(config.data_config.dataset_config.metafile_or_dir_path))
        if vae_fingerprint(path, dtype, folder) != clips["settings"]["vae"]:
            raise ConfigError(
                f"{path} is not the VAE that made {folder}, from whose latents this state learnt: give that one as "
                "vae_path"
            )
    return load_vae(path, dtype)


def _size_of(config: TrainConfig, clips: Mapping[str, Any] | None) -> dict[str, int]:
    """Height, width and number of frames of the largest samples; nothing where it is not known any more."""
    clip = config.data_config.dataset_config
    if config.data_config.dataset_name != "latents":
        return Bucket(clip.sample_num_frames, clip.sample_height, clip.sample_width)._asdict()
    if clips is None:
        return {}
    shapes = (clips["settings"]["buckets"][group] for _, group, _ in clips["clips"])
    return Bucket(*max(shapes, key=math.prod))._asdict()


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
