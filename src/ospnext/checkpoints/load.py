"""Load the models from any of the formats users have, strictly, without a network and with one shard of host memory.

    transformer = load_transformer("checkpoints/osp_next_14b", dtype=torch.bfloat16, device="cuda")
    transformer = load_transformer("merged.pt", dim=1536, num_layers=30, skiparse_model_type="dual_end")
    vae = load_vae("checkpoints/Wan2.1-T2V-14B/Wan2.1_VAE.pth", dtype=torch.float16, device="cuda")

A model is built without memory, every name and shape in the files is compared with it, and only then are tensors read,
one file at a time, each cast and moved on its own. The models come back in eval mode.

Where many processes share the weights, ``shard`` says how: it is called with the model before anything is read, and
every process then reads only its own part.

    model = load_transformer(folder, dtype=torch.float32, device=device,
                             shard=lambda model: parallelise(model, mesh, weights, options))
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKLWan
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from ospnext.checkpoints.encoders import t5_native_name, t5_settings, vae_settings
from ospnext.checkpoints.fill import ProgressCallback, fill, fill_shards
from ospnext.checkpoints.formats import (
    DEFAULTS,
    KNOWN_HEADS,
    SPARSE_KEYS,
    NameMap,
    infer_settings,
    is_image_weight,
    name_map,
    native_name,
    read_settings,
)
from ospnext.checkpoints.lora import WithAdapter, adapter_names, base_name, inject, put_adapter, start
from ospnext.checkpoints.quantised import check_stored, put_recipe, refuse_idle, said_of
from ospnext.checkpoints.read import CheckpointError, Weights, list_names, open_weights, read_json, sound_settings
from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.quant.apply import quantize
from ospnext.quant.settings import recipe

VAE_FILE = "Wan2.1_VAE.pth"
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER_FOLDER = "google/umt5-xxl"
SPARSE = ("skiparse_model_type", "sparse_ratio", "num_full_blocks", "skiparse_pattern")
"""Settings that say which layouts the blocks are in, and nothing about weights."""


Shard = Callable[[Any], object]
"""Shards a model on meta in place, such as ``parallel.apply.parallelise`` with all its arguments but the model."""


class TransformerFiles(NamedTuple):
    """A transformer checkpoint, opened but not read: complete settings, the weights, and how they are called there."""

    settings: dict[str, Any]
    weights: Weights
    name_of: NameMap


def load_transformer(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    progress: ProgressCallback | None = None,
    shard: Shard | None = None,
    quant: Mapping[str, Any] | None = None,
    trainable: bool = False,
    adapters: Sequence[WithAdapter] = (),
    relayout: bool = False,
    **overrides: Any,
) -> OSPNextTransformer3DModel:
    """The transformer from a release folder of OSP-Next, Wan2.1's or diffusers' folder, our own, or a flat file.

    Args:
        path: a folder with config.json and weights, a folder that holds one such folder (``transformer/``, or the only
            one), or a ``.safetensors``, ``.pt``, ``.pth`` file.
        dtype: of the weights in memory; None keeps the file's.
        device: where they go; ``meta`` checks settings, names and shapes, and reads no tensor.
        progress: called while loading with a label, bytes done and bytes in all.
        shard: how processes share the weights; ``device`` is then where they are kept (``fsdp.storage_device``).
        quant: keys of ``quant.settings.QuantKeys``; they win over what the folder's config.json says.
        trainable: hold weights that are stored in 8 bits in plain numbers, to train them.
        adapters: LoRAs to put on; the weights themselves are frozen then.
        relayout: let the sparse settings among ``overrides`` win over the folder's: the weights are then to be trained
            for other layouts than they know.
        **overrides: constructor arguments. For a file they say what its shapes do not (``num_heads``, the sparse
            settings); for a folder they may only add what its config.json leaves open, such as sparse settings for
            Wan2.1's weights. Weights for which nobody names sparse settings run dense.

    Raises:
        CheckpointError: unreadable files, names or shapes that differ, settings that contradict each other.
        OutOfMemoryError: the weights do not fit on the device.
    """
    settings, weights, name_of = open_transformer(path, relayout, **overrides)
    said, given, device = said_of(weights.source), dict(quant or {}), torch.device(device)
    config = recipe(said | given, device)
    if config is None:
        refuse_idle(given, weights)
    with sound_settings(weights.source), torch.device("meta"):
        model = OSPNextTransformer3DModel(**settings)
    weights, ignore, later = put_recipe(model, weights, said, config, trainable, shared=shard is not None)
    if shard is None:
        fill(model, weights, name_of, dtype, device, progress, ignore=ignore)
        check_stored(model, weights.source)
        if later is not None:
            quantize(model, later)
        for adapter in adapters:
            put_adapter(model, *adapter)
    else:
        assert later is None
        fill(model, weights, name_of, dtype, torch.device("meta"), ignore=ignore)
        for adapter in adapters:
            inject(model, *adapter)
        shard(model)
        names: NameMap = lambda name: name_of(base_name(name))  # noqa: E731
        fill_shards(model, weights, names, device, progress, ignore, adapter_names(model))
        check_stored(model, weights.source)
        for adapter in adapters:
            start(model, adapter.source, adapter.name)
    return model.eval()


def open_transformer(path: str | Path, relayout: bool = False, **overrides: Any) -> TransformerFiles:
    """Settings and weights of a transformer checkpoint, without reading a tensor; arguments as ``load_transformer``."""
    unknown = sorted(overrides.keys() - DEFAULTS.keys())
    if unknown:
        raise CheckpointError(f"{', '.join(unknown)}: no setting of the transformer; it has {', '.join(DEFAULTS)}")
    place = find_transformer(Path(path))
    weights = open_weights(place)
    image = [name for name in weights.tensors if is_image_weight(name)]
    if image:
        raise CheckpointError(f"{place}: image-to-video weights ({image[0]} ...): only text-to-video is supported")
    adapter = [name for name in weights.tensors if "lora_" in name]
    if adapter:
        beside = any(".base_layer." in name or name.startswith("patch_embedding.") for name in weights.tensors)
        raise CheckpointError(
            f"{place}: {'holds a LoRA beside the weights' if beside else 'a LoRA, not the weights of a model'} "
            f"({adapter[0]} ...): "
            + ("save the model with it merged in" if beside else "name it as lora_path, and its model here")
        )
    fixed = {key: value for key, value in overrides.items() if not (relayout and key in SPARSE)}
    if place.is_dir():
        family, said = _folder_settings(place)
        name_of = name_map(family)
        _agree(said, f"{place}/config.json", fixed)
    else:
        name_of = name_map("diffusers" if "proj_out.weight" in weights.tensors else "osp")
        said = {}
    inferred = infer_settings(weights.shapes, name_of)
    if place.is_file():
        _agree({key: value for key, value in inferred.items() if key != "num_layers"}, f"{place}", overrides)
    settings = DEFAULTS | inferred | said | overrides
    if "num_heads" not in said | overrides:
        if settings["dim"] not in KNOWN_HEADS:
            raise CheckpointError(
                f"{place}: weights of dim {settings['dim']} do not tell: give num_heads (model_config.num_heads)"
            )
        settings["num_heads"] = KNOWN_HEADS[settings["dim"]]
    return TransformerFiles(settings, weights, name_of)


def find_transformer(path: Path) -> Path:
    """The file, or the folder with config.json, that holds the transformer: ``path`` itself or one below it.

    Raises:
        CheckpointError: there is none, or several.
    """
    if path.is_file() or (path / "config.json").is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder")
    if (path / "transformer").is_dir():
        return find_transformer(path / "transformer")
    below = sorted(config.parent for config in path.glob("*/config.json"))
    if len(below) == 1:
        return below[0]
    if below:
        raise CheckpointError(f"{path}: several models below: name one of {', '.join(p.name for p in below)}")
    raise CheckpointError(
        f"{path}: no config.json here or one folder below; for a single file of weights, name the file"
    )


def load_vae(
    path: str | Path,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    progress: ProgressCallback | None = None,
) -> AutoencoderKLWan:
    """The video autoencoder from ``Wan2.1_VAE.pth``, a safetensors file, or a folder.

    Args:
        path: the file, a diffusers folder, or a folder that holds ``vae/`` or ``Wan2.1_VAE.pth``.
        dtype: of every weight, float16 and bfloat16 included; None keeps the file's.
        device: where the weights go.
        progress: as in ``load_transformer``.

    Raises:
        CheckpointError, OutOfMemoryError: as in ``load_transformer``.
    """
    place = _find(Path(path), "vae", VAE_FILE, lambda raw: raw.get("_class_name") == "AutoencoderKLWan")
    weights = open_weights(place)
    name_of: NameMap = native_name
    if place.is_dir():
        raw = read_json(place / "config.json")
        settings = {key: value for key, value in raw.items() if not key.startswith("_")}
        unknown = sorted(settings.keys() - inspect.signature(AutoencoderKLWan.__init__).parameters.keys())
        if unknown:
            raise CheckpointError(f"{place}/config.json: {', '.join(unknown)}: no setting of AutoencoderKLWan")
    else:
        try:
            name_of, settings = vae_settings(weights.shapes)
        except ValueError as error:
            raise CheckpointError(f"{place}: {error}") from error
    with sound_settings(place), torch.device("meta"):
        vae = AutoencoderKLWan(**settings)
        _check_vae(vae)
    fill(vae, weights, name_of, dtype, torch.device(device), progress)
    return vae.eval()


def load_text_encoder(
    path: str | Path,
    dtype: torch.dtype | None = torch.bfloat16,
    device: str | torch.device = "cpu",
    progress: ProgressCallback | None = None,
    shard: Shard | None = None,
) -> UMT5EncoderModel:
    """The UMT5 text encoder from ``models_t5_umt5-xxl-enc-bf16.pth`` or a transformers folder.

    Args:
        path: the file, a transformers folder, or a folder that holds ``text_encoder/`` or Wan2.1's file.
        dtype: of the weights; None keeps the file's. In float16 the feed-forward's last layer stays float32, as in
            transformers: UMT5's activations overflow there.
        device: where the weights go.
        progress, shard: as in ``load_transformer``.

    Raises:
        CheckpointError, OutOfMemoryError: as in ``load_transformer``.
    """
    place = _find(Path(path), "text_encoder", TEXT_ENCODER_FILE, lambda raw: raw.get("model_type") == "umt5")
    weights = open_weights(place)
    name_of: NameMap = t5_native_name
    ignore: set[str] = set()
    if place.is_file():
        try:
            settings = t5_settings(weights.shapes)
        except ValueError as error:
            raise CheckpointError(f"{place}: {error}") from error
    else:
        settings = read_json(place / "config.json")
        name_of, ignore = _embedding_names(weights)
    with sound_settings(place), torch.device("meta"):
        encoder = UMT5EncoderModel(UMT5Config.from_dict(settings))
    wide = encoder._keep_in_fp32_modules or ()
    if shard is None:
        fill(encoder, weights, name_of, dtype, torch.device(device), progress, wide, ignore)
        encoder.tie_weights()
    else:
        fill(encoder, weights, name_of, dtype, torch.device("meta"), None, wide, ignore)
        encoder.tie_weights()
        shard(encoder)
        fill_shards(encoder, weights, name_of, torch.device(device), progress, ignore)
    return encoder.eval()


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a local folder, such as ``google/umt5-xxl/`` or one saved by transformers; never the network.

    Raises:
        CheckpointError: the folder is missing or holds no tokenizer.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such folder: give the local tokenizer folder ({TOKENIZER_FOLDER}/ of Wan2.1)"
        )
    if not any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
        raise CheckpointError(f"{folder}: no tokenizer (tokenizer_config.json or tokenizer.json)")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder}: the tokenizer cannot be read: {' '.join(str(error).split())[:200]}"
        ) from error


def _check_vae(vae: AutoencoderKLWan) -> None:
    """Raise ValueError for a VAE of another kind, or one that compresses otherwise than its config says."""
    if vae.config.is_residual:
        raise ValueError("this is Wan2.2's autoencoder: use Wan2.1's")
    halvings = vae.config.temperal_downsample
    scales = 2 ** sum(halvings), (vae.config.patch_size or 1) * 2 ** len(halvings)
    said = vae.config.scale_factor_temporal, vae.config.scale_factor_spatial
    if said != scales:
        raise ValueError(f"scale_factor_temporal and _spatial are {said}, but its layers compress by {scales}")


def _folder_settings(folder: Path) -> tuple[str, dict[str, Any]]:
    try:
        return read_settings(read_json(folder / "config.json"))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{folder}/config.json: {error}") from error


def _agree(said: Mapping[str, Any], where: str, overrides: Mapping[str, Any]) -> None:
    """Refuse overrides that contradict what a checkpoint says of itself."""
    clashes = {
        key: f"{key} is {said[key]!r} there but {value!r} was asked for"
        for key, value in overrides.items()
        if key in said and said[key] != (tuple(value) if isinstance(value, list) else value)
    }
    if clashes:
        layouts = ", or train them for it (`ospnext train` with convert_layouts=true)"
        raise CheckpointError(
            f"{where}: {list_names(list(clashes.values()))}: take these settings out, or name other weights"
            f"{layouts if clashes.keys() <= set(SPARSE_KEYS) else ''}"
        )


def _find(path: Path, folder: str, file: str, is_config: Callable[[Mapping[str, Any]], bool]) -> Path:
    """A component's file or folder: ``path`` itself, or what a pipeline folder or Wan2.1's folder calls it."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder")
    if (path / "config.json").is_file() and is_config(read_json(path / "config.json")):
        return path
    if (path / folder / "config.json").is_file():
        return _find(path / folder, folder, file, is_config)
    if (path / file).is_file():
        return path / file
    raise CheckpointError(f"{path}: no {folder}/ with a fitting config.json, and no {file}")


def _embedding_names(weights: Weights) -> tuple[NameMap, set[str]]:
    """Names in a transformers folder: the embedding is stored under one of its two names, or under both."""
    shared, tied = "shared.weight", "encoder.embed_tokens.weight"
    if shared in weights.tensors:
        return native_name, {tied} & weights.tensors.keys()
    return lambda name: tied if name == shared else name, set()
