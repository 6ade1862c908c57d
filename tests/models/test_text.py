"""Prompt cleaning, and text embeddings that do not depend on padding."""

import pytest
import torch
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from ospnext.models.text import WAN_NEGATIVE_PROMPT, clean_wan, encode_prompts


@pytest.fixture(scope="module")
def encoder() -> UMT5EncoderModel:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return UMT5EncoderModel(UMT5Config(vocab_size=384, **sizes)).eval()


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a   red\n\tsquare ", "a red square"),
        ("Tom &amp;amp; Jerry", "Tom & Jerry"),
        ("caf\u00c3\u00a9", "café"),
        ("A Red BALL", "A Red BALL"),
        ("", ""),
    ],
)
def test_cleaning(raw: str, clean: str) -> None:
    assert clean_wan(raw) == clean


def test_the_chinese_negative_prompt_survives_cleaning() -> None:
    clean = clean_wan(WAN_NEGATIVE_PROMPT)
    assert "最差质量" in clean
    assert len(clean) == len(WAN_NEGATIVE_PROMPT)


@torch.no_grad()
def test_padding_is_zero_and_changes_nothing(encoder: UMT5EncoderModel) -> None:
    tokenizer = ByT5Tokenizer()
    prompts = ["red", "a blue star", ""]
    short, long = (encode_prompts(tokenizer, encoder, prompts, n, "cpu") for n in (16, 40))
    assert long.shape == (3, 40, 16)
    torch.testing.assert_close(long[:, :16], short)
    tokens = [len(p) + 1 for p in prompts]  # bytes and the end token
    for row, n in zip(long, tokens, strict=True):
        assert row[:n].abs().min() > 0
        assert not row[n:].any()
    alone = encode_prompts(tokenizer, encoder, ["a blue star"], 12, "cpu")
    torch.testing.assert_close(long[1:2, :12], alone)


@torch.no_grad()
def test_long_prompts_are_cut(encoder: UMT5EncoderModel) -> None:
    assert encode_prompts(ByT5Tokenizer(), encoder, ["x" * 99], 20, "cpu").shape == (1, 20, 16)
