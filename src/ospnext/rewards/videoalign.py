"""VideoAlign's reward: Qwen2-VL with a head that rates visual quality (VQ), motion quality (MQ), text alignment (TA).

Liu et al., "Improving Video Generation with Human Feedback" (2025); weights: KwaiVGI/VideoReward. Frames come straight
from memory at the rate at which videos are deployed: nothing is encoded or written. The prompt in
``assets/videoalign_prompt.txt`` is the text the model was trained with (KwaiVGI/VideoAlign, MIT licence). It ends each
rating with a token of its own, where the head is read; the prompt's own text comes last, so VQ and MQ do not know it.

The folder ``load_from_pretrained`` holds ``model_config.json`` and ``checkpoint-*/`` with ``model.pth``, or with
``adapter_model.safetensors`` and ``non_lora_state_dict.pth``; ``base_model`` is the folder of Qwen2-VL it was made of.
Both are local: nothing is downloaded.
"""

import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ospnext.rewards.base import Metadata

TOKENS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
PARTS = ("VQ", "MQ", "TA")
PATCH, MERGE, FRAMES = 14, 2, 2  # pixels and frames of a patch, patches of a token along each side
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
_LEAST_PIXELS, _LEAST_FRAMES = 128 * 28 * 28, 4  # what Qwen2-VL's own preparation of videos never goes below
_CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>{video}"
    "<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
)


class Files(NamedTuple):
    """Where a checkpoint's parts are."""

    settings: dict[str, Any]
    weights: Path | None  # all of them, or None
    adapter: Path | None  # else LoRA's, and what was trained beside it
    others: Path | None
    base: Path


def find_files(load_from_pretrained: str | None = None, base_model: str | None = None) -> Files:
    """The parts of a checkpoint.

    Raises:
        ValueError: one is missing; says how to name it.
    """
    way_out = "name its folder in reward_config.options.videoalign"
    if load_from_pretrained is None:
        raise ValueError(f"reward videoalign has no load_from_pretrained, the folder of KwaiVGI/VideoReward: {way_out}")
    folder = Path(load_from_pretrained)
    if not (folder / "model_config.json").is_file():
        raise ValueError(f"reward videoalign: load_from_pretrained {folder} holds no model_config.json: {way_out}")
    settings = json.loads((folder / "model_config.json").read_text(encoding="utf-8"))
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    places = [folder] if not found else [found[-1]]
    weights, adapter, others = (
        next((p / name for p in places if (p / name).is_file()), None)
        for name in ("model.pth", "adapter_model.safetensors", "non_lora_state_dict.pth")
    )
    if weights is None and (adapter is None or others is None):
        raise ValueError(
            f"reward videoalign: {places[0]} holds neither model.pth nor adapter_model.safetensors with "
            f"non_lora_state_dict.pth: {way_out}"
        )
    base = Path(base_model or settings["model_config"]["model_name_or_path"])
    if not (base / "config.json").is_file():
        raise ValueError(
            f"reward videoalign: {base} is no folder of Qwen2-VL here (no config.json), and nothing is downloaded: "
            "name one as base_model in reward_config.options.videoalign"
        )
    return Files(settings, weights, adapter, others, base)


class VideoAlign:
    """The reward.

    Args:
        device: where the model computes.
        load_from_pretrained, base_model: see the module.
        dtype: of the weights; None for bfloat16, and float32 on a CPU.
        use_norm: shift and scale each rating as the checkpoint says, so that 0 is a usual video.
        VQ, MQ, TA: weights of the three in the score.

    Raises:
        ValueError: a part is missing, or weights do not fit.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        load_from_pretrained: str | None = None,
        base_model: str | None = None,
        dtype: str | None = None,
        use_norm: bool = True,
        VQ: float = 1.0,
        MQ: float = 1.0,
        TA: float = 1.0,
    ) -> None:
        from transformers import AddedToken, AutoTokenizer

        found = find_files(load_from_pretrained, base_model)
        self.device = torch.device(device)
        self.weights = dict(zip(PARTS, (VQ, MQ, TA), strict=True))
        self.data: dict[str, Any] = found.settings["data_config"]
        self.norm: Mapping[str, float] | None = found.settings.get("inference_config") if use_norm else None
        self.tokenizer = AutoTokenizer.from_pretrained(found.base, local_files_only=True)
        self.tokenizer.add_tokens([AddedToken(token, special=True) for token in TOKENS], special_tokens=True)
        self.special = self.tokenizer.convert_tokens_to_ids(list(TOKENS))
        usual = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self.model, self.head = load_model(found, usual if dtype is None else getattr(torch, dtype))
        self.model.to(self.device)
        self.head.to(self.device)
        self.template = files("ospnext").joinpath("assets/videoalign_prompt.txt").read_text(encoding="utf-8")

    @staticmethod
    def check(load_from_pretrained: str | None = None, base_model: str | None = None, **others: Any) -> None:
        """Find out whether the files are there before anything is loaded."""
        find_files(load_from_pretrained, base_model)

    @torch.no_grad()
    def __call__(self, videos: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> dict[str, list[float]]:
        """``score`` and its three parts; a video's frames per second are its metadata's ``fps``."""
        parts: dict[str, list[float]] = {name: [] for name in ("score", *PARTS)}
        for video, prompt, about in zip(videos, prompts, metadata, strict=True):
            rated = dict(zip(PARTS, self.rate(video, prompt, float(about.get("fps", 16))), strict=True))
            if self.norm is not None:
                rated = {k: (v - self.norm[f"{k}_mean"]) / self.norm[f"{k}_std"] for k, v in rated.items()}
            for name, value in rated.items():
                parts[name].append(value)
            parts["score"].append(sum(self.weights[name] * value for name, value in rated.items()))
        return parts

    def rate(self, video: Tensor, prompt: str, fps: float) -> list[float]:
        """The three ratings of a video [F, C, H, W] in 0..1, as the head gives them.

        Raises:
            ValueError: the prompt holds one of the head's tokens.
        """
        frames = sample_frames(video.to(self.device), fps, self.data.get("fps"), self.data.get("num_frames"))
        patches, grid = to_patches(frames, int(self.data.get("max_frame_pixels", 448 * 448)))
        pads = "<|video_pad|>" * (math.prod(grid) // MERGE**2)
        text = _CHAT.format(video=pads, text=self.template.replace("{text_prompt}", prompt))
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.to(self.device)
        places = torch.isin(ids[0], torch.tensor(self.special, device=self.device)).nonzero().flatten()
        if ids[0, places].tolist() != self.special:
            raise ValueError(f"the prompt holds tokens that ratings are read at: {prompt[:80]!r}")
        hidden = self.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values_videos=patches.to(self.model.dtype),
            video_grid_thw=torch.tensor([grid], device=self.device),
            mm_token_type_ids=2 * (ids == self.model.config.video_token_id).int(),
            use_cache=False,
        ).last_hidden_state
        return self.head(hidden[0, places]).float().diagonal().tolist()


# ── frames ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def sample_frames(video: Tensor, fps: float, wanted_fps: float | None, count: int | None) -> Tensor:
    """Frames evenly over a video [F, C, H, W]: ``count``, or as ``wanted_fps`` makes; even, and at least four."""
    total = len(video)
    if count is None:
        most = total // FRAMES * FRAMES
        count = round(min(max(total / fps * (wanted_fps or 2.0), _LEAST_FRAMES), most) / FRAMES) * FRAMES
    count = max(FRAMES, count)
    return video[torch.linspace(0, total - 1, count, device=video.device).round().long()]


def frame_size(height: int, width: int, most: int) -> tuple[int, int]:
    """The size near a frame's that whole tokens make, of at most ``most`` pixels and not too few."""
    unit = PATCH * MERGE
    h, w = (max(unit, round(side / unit) * unit) for side in (height, width))
    if h * w > most:
        by = math.sqrt(height * width / most)
        return tuple(max(unit, math.floor(side / by / unit) * unit) for side in (height, width))  # type: ignore[return-value]
    if h * w < min(_LEAST_PIXELS, most):
        by = math.sqrt(min(_LEAST_PIXELS, most) / (height * width))
        return tuple(math.ceil(side * by / unit) * unit for side in (height, width))  # type: ignore[return-value]
    return h, w


def to_patches(frames: Tensor, most_pixels: int) -> tuple[Tensor, tuple[int, int, int]]:
    """Frames [F, 3, H, W] in 0..1 to Qwen2-VL's patches [t * h * w, 3 * 2 * 14 * 14] and their grid (t, h, w).

    Patches of one token (2 x 2) are neighbours.
    """
    size = frame_size(frames.shape[-2], frames.shape[-1], most_pixels)
    pixels = (frames.float() * 255).round()
    pixels = (
        F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False).round().clamp(0, 255) / 255
    )
    mean, std = (torch.tensor(values, device=frames.device).view(1, 3, 1, 1) for values in (_MEAN, _STD))
    x = (pixels - mean) / std
    t, h, w = len(x) // FRAMES, size[0] // PATCH, size[1] // PATCH
    x = x.reshape(t, FRAMES, 3, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH)
    return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1), (t, h, w)


# ── weights ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def load_model(found: Files, dtype: torch.dtype) -> tuple[Any, nn.Linear]:
    """Qwen2-VL without its language head, LoRA merged, and the head that rates.

    Raises:
        ValueError: weights are missing, too many, or of another shape.
    """
    from transformers import Qwen2VLConfig, Qwen2VLModel

    tensors = read_weights(found)
    head = tensors.pop("rm_head.weight", None)
    embedding = tensors.get("language_model.embed_tokens.weight")
    if head is None or embedding is None:
        raise ValueError(f"{found.weights or found.adapter}: holds no rm_head or no embeddings: not VideoAlign's")
    config = Qwen2VLConfig.from_pretrained(found.base, local_files_only=True)
    config.text_config.vocab_size = len(embedding)  # with the three tokens of its own
    model, info = Qwen2VLModel.from_pretrained(
        None,
        config=config,
        state_dict={name: tensor.to(dtype) for name, tensor in tensors.items()},
        dtype=dtype,
        attn_implementation="sdpa",
        output_loading_info=True,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise ValueError(f"{found.weights or found.adapter}: {kind.replace('_', ' ')}: {sorted(info[kind])[:3]}")
    linear = nn.Linear(head.shape[1], head.shape[0], bias=False, dtype=dtype)
    linear.weight = nn.Parameter(head.to(dtype), requires_grad=False)
    return model.eval().requires_grad_(False), linear


def read_weights(found: Files) -> dict[str, Tensor]:
    """All weights under the names of transformers' ``Qwen2VLModel``, LoRA merged; nothing is unpickled but tensors."""
    from safetensors.torch import load_file

    if found.weights is not None:
        given = torch.load(found.weights, map_location="cpu", weights_only=True, mmap=True)
    else:
        assert found.others is not None
        assert found.adapter is not None
        given = {}
        for file in sorted(found.base.glob("*.safetensors")):
            given |= load_file(file)
        given |= torch.load(found.others, map_location="cpu", weights_only=True)
        given |= load_file(found.adapter)
    tensors: dict[str, Tensor] = {}
    loras: dict[str, Tensor] = {}
    for name, tensor in given.items():
        if ".original_module." in name or name.endswith("lm_head.weight"):
            continue
        plain = own_name(name)
        (loras if ".lora_" in plain else tensors)[plain] = tensor
    lora = found.settings.get("peft_lora_config", {})
    rank, alpha = lora.get("lora_r", 1), lora.get("lora_alpha", 1)
    scale = alpha / (math.sqrt(rank) if lora.get("use_rslora") else rank)
    for name, down in loras.items():
        if not name.endswith(".lora_A.weight"):
            continue
        target = name.replace(".lora_A.weight", ".weight")
        up = loras[name.replace(".lora_A.", ".lora_B.")]
        tensors[target] = (tensors[target].float() + scale * up.float() @ down.float()).to(tensors[target].dtype)
    return tensors


def own_name(name: str) -> str:
    """A weight's name in ``Qwen2VLModel``, or ``rm_head.weight``, from PEFT's and from older transformers'."""
    name = name.removeprefix("base_model.model.")
    for part in (".base_layer", ".modules_to_save.default", ".modules_to_save"):
        name = name.replace(part, "")
    name = name.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.")
    name = name.removeprefix("model.")
    older = name.startswith(("layers.", "embed_tokens.", "norm."))
    return f"language_model.{name}" if older else name
