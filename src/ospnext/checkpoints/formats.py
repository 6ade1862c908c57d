"""Checkpoint formats as pure tables: how the same parameters and settings are called in each of them.

Every map goes from a name of the model's to the name in a file. Loading inverts it over the names the model has, so one
map serves both ways and a name that no map gives is never accepted.

=============  ============================================  =================================================
family         what it is                                    ``_class_name`` in config.json
=============  ============================================  =================================================
``osp``        OSP-Next's release folder, and our own        ``OSPNextModel``, ``OSPNextTransformer3DModel``
``wan``        Wan2.1's release folder                       ``WanModel``, or none
``diffusers``  diffusers' Wan folder                         ``WanTransformer3DModel``
=============  ============================================  =================================================

Sources: Wan2.1 (wan/modules/{model,vae,t5}.py) for the native names; diffusers and transformers for theirs.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.quant.settings import SAVED

NameMap = Callable[[str], str]

FAMILIES = ("osp", "wan", "diffusers")
DEFAULTS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(OSPNextTransformer3DModel.__init__).parameters.items()
    if parameter.default is not inspect.Parameter.empty
}
"""Every setting of the transformer with its default."""

SPARSE_KEYS = ("skiparse_model_type", "sparse_ratio", "num_full_blocks", "skiparse_pattern")
KNOWN_HEADS = {1536: 12, 2048: 16, 5120: 40}
"""Heads of the widths that Wan2.1 and OSP-Next publish: the one size no weight's shape tells."""

# Settings that are no part of the network: how it is quantised (``quantised`` reads them), and options never used.
_OSP_IGNORED = {
    *("window_size", *SAVED),
    *("skiparse_1d", "skiparse_2d", "num_register_tokens", "lock_main_parameters", "training_with_full"),
}
_WAN_IGNORED = {"window_size"}
_DIFFUSERS_IGNORED = {"rope_max_seq_len", "window_size", "add_img_emb", "qk_norm"}  # qk_norm: the weights tell
_DIFFUSERS_SETTINGS = {
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "num_heads": "num_attention_heads",
    **{
        name: name for name in ("patch_size", "text_dim", "freq_dim", "ffn_dim", "num_layers", "cross_attn_norm", "eps")
    },
}
_IMAGE_KEYS = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len")
_IMAGE_WEIGHTS = ("img_emb", "k_img", "v_img", "image_embedder", "add_k_proj", "add_v_proj")

_TRANSFORMER_MODULES = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head": "",  # only its modulation: scale_shift_table stands at the top
}
_BLOCK_MODULES = {
    "": "",
    "norm3": "norm2",  # the norm before cross-attention; the other two have no parameters
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{
        f"{ours}.{layer}": f"{theirs}.{named}"
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for layer, named in (
            *(("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")),
            *(("norm_q", "norm_q"), ("norm_k", "norm_k")),
        )
    },
}


def native_name(name: str) -> str:
    """Wan2.1's names are the model's own."""
    return name


def diffusers_name(name: str) -> str:
    """diffusers' name (``WanTransformer3DModel``) of a parameter of the transformer."""
    module, _, leaf = name.rpartition(".")
    leaf = "scale_shift_table" if leaf == "modulation" else leaf
    if module.startswith("blocks."):
        _, index, *rest = module.split(".")
        parts = ["blocks", index, _BLOCK_MODULES[".".join(rest)], leaf]
    else:
        parts = [_TRANSFORMER_MODULES[module], leaf]
    return ".".join(part for part in parts if part)


def module_aliases(num_layers: int) -> dict[str, str]:
    """The transformer's own name of every module with weights, by its name in any family."""
    own = [name for name in _TRANSFORMER_MODULES if name != "head"]
    own += [f"blocks.{index}.{module}" for index in range(num_layers) for module in _BLOCK_MODULES if module]
    return {diffusers_name(f"{name}.weight").removesuffix(".weight"): name for name in own} | {n: n for n in own}


def name_map(family: str) -> NameMap:
    """The map from the transformer's names to the names in files of a family of ``FAMILIES``."""
    return diffusers_name if family == "diffusers" else native_name


def is_image_weight(name: str) -> bool:
    """Whether a weight, by its name in any family, belongs to the image branch of an image-to-video model."""
    return any(part in _IMAGE_WEIGHTS for part in name.split("."))


def read_settings(raw: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Family and transformer settings of a config.json.

    Args:
        raw: the parsed file.

    Returns:
        The family and the settings the file gives, under our names; absent ones are not filled in.

    Raises:
        ValueError: another class, an image-to-video or two-stage model, or a setting that is not known.
    """
    name = raw.get("_class_name", "WanModel" if "model_type" in raw else None)
    if raw.get("model_type", "t2v") != "t2v":
        raise ValueError(f"model_type is {raw['model_type']!r}: only text-to-video (t2v) weights are supported")
    given = {key: value for key, value in raw.items() if not key.startswith("_") and key != "model_type"}
    if name in ("OSPNextModel", "OSPNextTransformer3DModel"):
        return "osp", _known(given, {key: key for key in DEFAULTS}, _OSP_IGNORED)
    if name == "WanModel":
        return "wan", _known(given, {key: key for key in DEFAULTS}, _WAN_IGNORED)
    if name == "WanTransformer3DModel":
        return "diffusers", _from_diffusers(given)
    raise ValueError(
        f"_class_name is {name!r}: use a folder of OSPNextModel, OSPNextTransformer3DModel, WanModel or "
        "WanTransformer3DModel"
    )


def write_settings(settings: Mapping[str, Any], family: str) -> dict[str, Any]:
    """The config.json of a family for complete transformer settings.

    Wan2.1 and diffusers know no sparse attention: the sparse settings of a sparse model are kept as further keys, which
    those two programs ignore, and which ``read_settings`` reads back.
    """
    full = dict(settings) | {"patch_size": list(settings["patch_size"])}
    if family == "osp":
        # The release leaves out what it does not vary; leaving out our own key lets the reference system read it.
        absent = {key for key in ("patch_size", "qk_norm", "cross_attn_norm", "text_dim") if _is_default(key, full)}
        absent |= {"skiparse_pattern"} if _is_default("skiparse_pattern", full) else set()
        return {
            "_class_name": "OSPNextModel",
            "model_type": "t2v",
            **{k: v for k, v in full.items() if k not in absent},
        }
    is_dense = full["skiparse_model_type"] == "full"
    sparse = {} if is_dense else {key: full[key] for key in SPARSE_KEYS}
    if family == "wan":
        varied = {key: full[key] for key in ("patch_size", "text_dim", "qk_norm", "cross_attn_norm")}
        varied = {key: value for key, value in varied.items() if not _is_default(key, full)}
        plain = ("dim", "eps", "ffn_dim", "freq_dim", "in_dim", "num_heads", "num_layers", "out_dim", "text_len")
        return {"_class_name": "WanModel", "model_type": "t2v", **{key: full[key] for key in plain}, **varied, **sparse}
    return {
        "_class_name": "WanTransformer3DModel",
        **{theirs: full[ours] for ours, theirs in _DIFFUSERS_SETTINGS.items()},
        "attention_head_dim": full["dim"] // full["num_heads"],
        "qk_norm": "rms_norm_across_heads" if full["qk_norm"] else None,
        "rope_max_seq_len": 1024,
        **dict.fromkeys(_IMAGE_KEYS),
        **({} if _is_default("text_len", full) else {"text_len": full["text_len"]}),
        **sparse,
    }


def infer_settings(shapes: Mapping[str, tuple[int, ...]], name_of: NameMap) -> dict[str, Any]:
    """The settings that the shapes of a transformer's weights determine; of weights that are absent, nothing.

    Args:
        shapes: shape by name in the file.
        name_of: map from the transformer's names to those in the file.
    """
    patch = shapes.get(name_of("patch_embedding.weight"))
    found: dict[str, Any] = {}
    if patch is not None and len(patch) == 5:
        found |= {"dim": patch[0], "in_dim": patch[1], "patch_size": tuple(patch[2:])}
        head = shapes.get(name_of("head.head.bias"))
        if head is not None:
            found["out_dim"] = head[0] // (patch[2] * patch[3] * patch[4])
    for setting, name, axis in (
        ("ffn_dim", "blocks.0.ffn.0.weight", 0),
        ("freq_dim", "time_embedding.0.weight", 1),
        ("text_dim", "text_embedding.0.weight", 1),
    ):
        shape = shapes.get(name_of(name))
        if shape is not None and len(shape) == 2:
            found[setting] = shape[axis]
    blocks = {int(name.split(".")[1]) for name in shapes if name.startswith("blocks.") and name.split(".")[1].isdigit()}
    if blocks:
        found["num_layers"] = max(blocks) + 1
        found["qk_norm"] = name_of("blocks.0.self_attn.norm_q.weight") in shapes
        found["cross_attn_norm"] = name_of("blocks.0.norm3.weight") in shapes
    return found


def _is_default(key: str, settings: Mapping[str, Any]) -> bool:
    value = settings[key]
    return (tuple(value) if isinstance(value, list) else value) == DEFAULTS[key]


def _known(given: Mapping[str, Any], names: Mapping[str, str], ignored: set[str]) -> dict[str, Any]:
    """Settings under our names; ``names`` maps ours to the file's."""
    ours = {theirs: name for name, theirs in names.items()}
    unknown = sorted(set(given) - set(ours) - ignored)
    if unknown:
        raise ValueError(f"settings {', '.join(unknown)} are not known, so these weights may need another network")
    found = {ours[k]: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k in ours}
    for name, value in found.items():
        kind = type(DEFAULTS[name])
        if not isinstance(value, (int, float) if kind is float else kind):
            raise ValueError(f"{names[name]} is {value!r}: it should be of type {kind.__name__}")
    return found


def _from_diffusers(given: Mapping[str, Any]) -> dict[str, Any]:
    image = [key for key in _IMAGE_KEYS if given.get(key) is not None]
    if image:
        raise ValueError(f"{', '.join(image)} are set: image-to-video weights are not supported, use text-to-video")
    if given.get("out_channels", 0) is None:  # diffusers: as many as in_channels
        given = {**given, "out_channels": given.get("in_channels", DEFAULTS["in_dim"])}
    names = _DIFFUSERS_SETTINGS | {key: key for key in (*SPARSE_KEYS, "text_len")}
    found = _known(given, names, _DIFFUSERS_IGNORED | set(_IMAGE_KEYS) | {"attention_head_dim"})
    if "num_heads" in found and isinstance(given.get("attention_head_dim"), int):
        found["dim"] = found["num_heads"] * given["attention_head_dim"]
    return found
