"""``ospnext train-text``: a small text encoder learns to read captions before any video asks it to.

It names what each caption of the moving-shapes world says (shape, colour, motion, size, background of a one-object
scene) from the mean of its embeddings. A transformer trained on top then only has to learn what the words look like.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn
from transformers import ByT5Tokenizer

from ospnext.checkpoints.drafts import new_folder
from ospnext.checkpoints.save import saving
from ospnext.config import Config
from ospnext.device import device_label, resolve_device
from ospnext.generate.run import make_folder
from ospnext.models.text import encode_tokens, small_text_encoder
from ospnext.shapes.captions import caption
from ospnext.shapes.world import BACKGROUNDS, COLOURS, MOTIONS, RADII, REACH, Scene
from ospnext.train.clips import sample_scenes
from ospnext.train.log import Losses
from ospnext.train.loop import LoopSettings, fit
from ospnext.train.settings import LearningRate

VOCABULARIES = {
    "shape": tuple(REACH),
    "colour": tuple(COLOURS),
    "motion": tuple(MOTIONS),
    "size": tuple(RADII),
    "background": tuple(BACKGROUNDS),
}
UNSAID = -100  # what a caption leaves out is not asked of it


class TextTrainConfig(Config):
    """``ospnext train-text``: how large, on how many captions, for how long."""

    output_dir: str = Field("./runs/shapes_text", description="states while training, text_encoder/ at the end")
    seed: int = Field(42, ge=0, description="of weights and captions")
    device: str = Field("auto", description="auto | cpu | cuda | npu | mps")
    text_dim: int = Field(128, ge=32, multiple_of=32, description="width of the encoder")
    text_len: int = Field(128, ge=16, description="most tokens (bytes) of a caption")
    num_captions: int = Field(
        40_000, ge=10, le=10**6, description="captions of the pool; a tenth, 2000 at most, to measure on"
    )
    batch_size: int = Field(128, ge=1, description="captions of a step")
    training_iteration: int = Field(3000, ge=1, description="optimiser steps in all")
    time_budget_minutes: float | None = Field(None, gt=0, description="save and stop after it; start again to go on")
    lr: LearningRate = Field(2e-3, description="peak learning rate")
    log_interval: int = Field(100, ge=1, description="steps between log lines")


def run(config: TextTrainConfig) -> None:
    """Train, report how well captions that were kept back are read, and save the averaged encoder.

    Raises:
        ValueError: the output cannot be written, or see ``loop.fit``.
    """
    make_folder(Path(config.output_dir))
    device = resolve_device(config.device)
    torch.manual_seed(config.seed)
    tokenizer = ByT5Tokenizer()
    encoder = small_text_encoder(config.text_dim, len(tokenizer)).to(device)
    heads = nn.ModuleDict({name: nn.Linear(config.text_dim, len(v)) for name, v in VOCABULARIES.items()}).to(device)
    print(f"{sum(p.numel() for p in encoder.parameters()) / 1e6:.2f}M parameters on {device_label(device)}")
    ids, labels = make_captions(tokenizer, config, device)
    held = min(len(ids) // 10, 2000)  # kept back to measure on

    def losses(generator: torch.Generator, step: int) -> Losses:
        chosen = torch.randint(held, len(ids), (config.batch_size,), generator=generator, device=device)
        return reading_losses(encoder, heads, ids[chosen], {name: v[chosen] for name, v in labels.items()})

    state = fit({"text_encoder": encoder, "heads": heads}, losses, loop_settings(config), device)
    if state.terminated:
        return
    state.average.swap()
    with torch.no_grad():
        measured = reading_losses(encoder.eval(), heads, ids[:held], {name: v[:held] for name, v in labels.items()})
    print("read right: " + ", ".join(f"{name} {measured[name]:.1%}" for name in VOCABULARIES))
    folder = Path(config.output_dir) / "text_encoder"
    with new_folder(folder.resolve()) as draft, saving(draft):
        encoder.save_pretrained(draft)
    print(f"saved {folder}")


def make_captions(
    tokenizer: ByT5Tokenizer, config: TextTrainConfig, device: torch.device
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Token ids ``[N, L]`` of random captions and, per attribute, the class each one names or ``UNSAID``."""
    rng = np.random.default_rng(config.seed)
    scenes = sample_scenes("simple", config.num_captions, config.seed)
    texts = [caption(scene, rng) for scene in scenes]
    batch = tokenizer(texts, padding=True, max_length=config.text_len, truncation=True, return_tensors="pt")
    labels = {
        name: torch.tensor([_label(scene, text, name) for scene, text in zip(scenes, texts, strict=True)]).to(device)
        for name in VOCABULARIES
    }
    return batch.input_ids.to(device), labels


def _label(scene: Scene, text: str, name: str) -> int:
    thing = scene.things[0]
    if name == "background":
        said = any(word in text for word in ("background", "backdrop"))
        return VOCABULARIES[name].index(scene.background.colour) if said else UNSAID
    if name == "size" and not any(f" {w} " in f" {text.lower()}" for w in ("small", "little", "tiny", "large", "big")):
        return UNSAID
    return VOCABULARIES[name].index(getattr(thing, name))


def reading_losses(
    encoder: nn.Module, heads: nn.ModuleDict, ids: torch.Tensor, labels: dict[str, torch.Tensor]
) -> Losses:
    """Cross-entropy summed over attributes, and under each attribute's name the share that was read right.

    Args:
        ids: ``[B, L]``, 0 for padding.
        labels: by attribute ``[B]``; what no caption of the batch says costs nothing.
    """
    mask = ids != 0
    mean = encode_tokens(encoder, ids, mask).sum(1) / mask.sum(1, keepdim=True)
    result = {}
    total = mean.new_zeros(())
    for name, head in heads.items():
        logits, wanted = head(mean).float(), labels[name]
        said = wanted != UNSAID
        count = said.sum().clamp(min=1)
        total = total + F.cross_entropy(logits, wanted, ignore_index=UNSAID, reduction="sum") / count
        result[name] = ((logits.argmax(-1) == wanted) & said).sum() / count
    return {"loss": total, **result}


def loop_settings(config: TextTrainConfig) -> LoopSettings:
    """The loop's settings of this recipe."""
    return LoopSettings(
        output_dir=Path(config.output_dir),
        iterations=config.training_iteration,
        lr=config.lr,
        lr_schedule="cosine",
        warmup_steps=100,
        log_interval=config.log_interval,
        time_budget_minutes=config.time_budget_minutes,
        seed=config.seed,
        dtype=torch.float32,
    )
