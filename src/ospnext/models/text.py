"""From prompts to text embeddings: a thin face of transformers' tokenizers and UMT5 encoder."""

import html
import re

import ftfy
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

# What Wan2.1's weights were published with, and the default wherever a model brings nothing of its own. In English:
# garish colours, overexposed, static, blurred details, subtitles, style, artwork, painting, picture, still, greyish
# overall, worst quality, low quality, JPEG artefacts, ugly, incomplete, extra fingers, badly drawn hands, badly drawn
# face, deformed, disfigured, malformed limbs, fused fingers, motionless picture, cluttered background, three legs,
# many people in the background, walking backwards.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


def clean_wan(text: str) -> str:
    """Wan's prompt cleaning: broken Unicode mended, HTML entities resolved twice, whitespace collapsed.

    Letters keep their case and every script survives; full-width punctuation becomes plain.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: UMT5EncoderModel,
    prompts: list[str],
    text_len: int,
    device: torch.device | str,
) -> Tensor:
    """Text embeddings of prompts, padded or cut to ``text_len`` tokens.

    The encoder never attends to padding, and what it writes there is zeroed: without the mask UMT5's output is wrong.

    Args:
        tokenizer: UMT5's or ByT5's.
        text_encoder: must already be on ``device``; gradients flow if the caller lets them.
        prompts: B of them, already cleaned.
        text_len: tokens per prompt.
        device: where to compute.

    Returns:
        [B, text_len, text_dim] on ``device`` in the encoder's dtype.
    """
    tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=text_len, return_tensors="pt")
    return encode_tokens(text_encoder, tokens.input_ids.to(device), tokens.attention_mask.to(device))


def encode_tokens(text_encoder: UMT5EncoderModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Embeddings [B, L, text_dim] of token ids [B, L], zero where ``mask`` [B, L] is."""
    hidden = text_encoder(ids, attention_mask=mask).last_hidden_state
    return hidden.masked_fill(mask[..., None] == 0, 0)


def small_text_encoder(width: int, vocabulary: int) -> UMT5EncoderModel:
    """A new two-layer UMT5 encoder for short captions."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary,
            d_model=width,
            d_kv=32,
            d_ff=2 * width,
            num_layers=2,
            num_heads=width // 32,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
