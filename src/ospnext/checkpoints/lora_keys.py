"""How the files of this field call the parts of a LoRA, as a pure table: any style's key to (linear, part).

==========  =================================================================  ==================================
style       a key                                                              alpha
==========  =================================================================  ==================================
peft        ``base_model.model.blocks.0.self_attn.q.lora_A.weight``            in adapter_config.json
diffusers   ``transformer.blocks.0.attn1.to_q.lora_A.weight``                  in the file's metadata, else = rank
comfyui     ``diffusion_model.blocks.0.self_attn.q.lora_A.weight``             ``....q.alpha``, else = rank
kohya       ``lora_unet_blocks_0_self_attn_q.lora_down.weight``                ``....q.alpha``
plain       ``blocks.0.self_attn.q.lora_A.default.weight``, ``... .lora_up``   = rank
==========  =================================================================  ==================================

comfyui is also diffusion-pipe's and, with ``lora_down``, ``diff`` and ``diff_b``, LightX2V's; kohya is musubi-tuner's,
plain DiffSynth's. Wan2.1's and diffusers' names of linears are taken in every style, and so are all words for A and B.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ospnext.checkpoints.formats import module_aliases

Style = str
STYLES = ("peft", "diffusers", "comfyui", "kohya", "plain")
ALWAYS_WITH_ALPHA = ("peft", "kohya")
"""Styles whose readers know no alpha of their own; in the others it is the rank where nothing is said."""

DOWN, UP, ALPHA, WEIGHT_DIFF, BIAS_DIFF = "down", "up", "alpha", "diff", "diff_b"

_PREFIXES = (
    ("base_model.model.", "peft"),
    ("model.diffusion_model.", "comfyui"),
    ("diffusion_model.", "comfyui"),
    ("transformer.", "diffusers"),
    ("lora_unet_", "kohya"),
    ("lora_transformer_", "kohya"),
    ("pipe.dit.", "plain"),
    ("module.", "plain"),
    ("model.", "plain"),
)
_MATRIX = re.compile(r"^(?P<module>.+)\.lora[._](?P<part>A|B|down|up)(?:\.(?P<adapter>[^.]+))?\.weight$")
_OTHER = re.compile(r"^(?P<module>.+)\.(?P<part>alpha|diff|diff_b)$")
_PARTS = {"A": DOWN, "down": DOWN, "B": UP, "up": UP}
_BLOCK = re.compile(r"blocks[._](\d+)[._]")
_OTHER_METHODS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_w": "LoHa",
    "lokr_w": "LoKr",
    "lora_mid": "LoCon",
    ".oft_": "OFT",
}
MOST_BLOCKS = 1000  # of any model of this family, and far more


class Part(NamedTuple):
    """What a key holds: a part of the adapter of a module of the transformer."""

    module: str
    part: str
    adapter: str


class Keys(NamedTuple):
    """All keys of a file, sorted out.

    Attributes:
        parts: by key.
        foreign: keys that name nothing this family of transformers has.
        style: what most of it looks like.
    """

    parts: dict[str, Part]
    foreign: list[str]
    style: Style


def read_keys(keys: Iterable[str]) -> Keys:
    """Sort out the keys of a file, whatever its style.

    Raises:
        ValueError: it is another method than LoRA.
    """
    keys = list(keys)
    for key in keys:
        if method := next((name for word, name in _OTHER_METHODS.items() if word in key), None):
            raise ValueError(f"{key} is of {method}, which is not supported: only LoRA is")
    blocks = max((int(found[1]) for key in keys if (found := _BLOCK.search(key))), default=-1) + 1
    aliases = module_aliases(min(blocks, MOST_BLOCKS))
    flat = {alias.replace(".", "_"): name for alias, name in aliases.items()}
    parts: dict[str, Part] = {}
    styles: dict[Style, int] = {}
    for key in keys:
        rest, style = _without_prefix(key)
        part = _part(rest, flat if style == "kohya" else aliases)
        if part is not None:
            parts[key] = part
            styles[style] = styles.get(style, 0) + 1
    style = max(styles, key=lambda name: styles[name], default="plain")
    if style == "plain" and any(".attn1." in key or ".attn2." in key for key in parts):
        style = "diffusers"
    return Keys(parts, [key for key in keys if key not in parts], style)


def _without_prefix(key: str) -> tuple[str, Style]:
    style = "plain"
    while found := next(((p, s) for p, s in _PREFIXES if key.startswith(p)), None):
        key = key.removeprefix(found[0])
        style = found[1] if style == "plain" else style
    return key, style


def _part(key: str, names: Mapping[str, str]) -> Part | None:
    if (found := _MATRIX.match(key)) is not None:
        module = names.get(found["module"])
        return None if module is None else Part(module, _PARTS[found["part"]], found["adapter"] or "")
    if (found := _OTHER.match(key)) is not None:
        module = names.get(found["module"])
        return None if module is None else Part(module, found["part"], "")
    return None
