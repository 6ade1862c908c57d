"""VideoAlign's reward on a tiny random model of the same on-disk format, held to PEFT's own forward pass."""

import json

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ospnext.rewards.base import RewardSet, check_reward
from ospnext.rewards.videoalign import (
    PARTS,
    TOKENS,
    VideoAlign,
    frame_size,
    own_name,
    sample_frames,
    to_patches,
)

MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|image_pad|>")
LORA = {"lora_r": 4, "lora_alpha": 8, "lora_enable": True}


class Trained(nn.Module):
    """What VideoAlign trains, by its own names: ``model`` and ``rm_head``, and the language head it never uses."""

    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__()
        self.model = Qwen2VLModel(config)
        self.lm_head = nn.Linear(32, config.text_config.vocab_size, bias=False)
        self.rm_head = nn.Linear(32, 3, bias=False)


def save_tokenizer(folder) -> int:
    """Every byte a token, and Qwen2-VL's marks; how many tokens there are."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>")
    fast.add_special_tokens({"additional_special_tokens": list(MARKS)})
    fast.save_pretrained(folder)
    return len(fast)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folders of a base and of a checkpoint, and the model with its LoRA."""
    torch.manual_seed(0)
    base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("reward")
    size = save_tokenizer(base)
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": size + len(TOKENS),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        video_token_id=size - 2,
        image_token_id=size - 1,
        vision_start_token_id=size - 4,
        vision_end_token_id=size - 3,
    )
    trained = Trained(config)
    linears = [n for n, m in trained.model.language_model.named_modules() if isinstance(m, nn.Linear)]
    targets = [f"model.language_model.{name}" for name in linears]
    wrapped = peft.get_peft_model(trained, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    config.save_pretrained(base)
    (folder / "model_config.json").write_text(
        json.dumps(
            {
                "data_config": {"fps": 2.0, "num_frames": None, "max_frame_pixels": 56 * 84},
                "model_config": {"model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct", "output_dim": 3},
                "peft_lora_config": LORA,
                "inference_config": {f"{p}_{k}": v for p in PARTS for k, v in (("mean", 0.5), ("std", 2.0))},
            }
        )
    )
    (folder / "checkpoint-7").mkdir()
    (folder / "checkpoint-11").mkdir()
    torch.save(wrapped.state_dict(), folder / "checkpoint-11/model.pth")
    return base, folder, wrapped.eval()


def video(frames=9, height=48, width=80):
    return torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def by_peft(wrapped, reward: VideoAlign, clip: torch.Tensor, prompt: str) -> list[float]:
    """The ratings by the model that was saved, its LoRA beside the weights."""
    inner = wrapped.base_model.model
    patches, grid = to_patches(sample_frames(clip, 16, 2.0, None), 56 * 84)
    pads = "<|video_pad|>" * (grid[0] * grid[1] * grid[2] // 4)
    text = (
        f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>{pads}"
        f"<|vision_end|>{reward.template.replace('{text_prompt}', prompt)}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = reward.tokenizer(text, return_tensors="pt").input_ids
    hidden = inner.model(
        input_ids=ids,
        pixel_values_videos=patches,
        video_grid_thw=torch.tensor([grid]),
        mm_token_type_ids=2 * (ids == inner.model.config.video_token_id).int(),
    ).last_hidden_state[0]
    logits = inner.rm_head(hidden)
    return [logits[int((ids[0] == token).nonzero()), i].item() for i, token in enumerate(reward.special)]


def test_ratings_are_those_of_the_model_that_was_saved(made):
    base, folder, wrapped = made
    reward = VideoAlign(load_from_pretrained=str(folder), base_model=str(base))
    clip = video()
    expected = by_peft(wrapped, reward, clip, "a red fox")
    assert reward.rate(clip, "a red fox", 16) == pytest.approx(expected, abs=1e-4)
    said = reward(clip[None], ["a red fox"], [{"fps": 16}])
    normal = [(value - 0.5) / 2 for value in expected]
    assert [said[name][0] for name in PARTS] == pytest.approx(normal, abs=1e-4)
    assert said["score"][0] == pytest.approx(sum(normal), abs=1e-4)


def test_only_text_alignment_knows_the_prompt(made):
    base, folder, _ = made
    reward = VideoAlign(load_from_pretrained=str(folder), base_model=str(base), use_norm=False)
    one, other = (reward.rate(video(), prompt, 16) for prompt in ("a red fox", "two boats at sea"))
    assert one[:2] == pytest.approx(other[:2], abs=1e-6)
    assert abs(one[2] - other[2]) > 1e-4


def test_lora_and_the_rest_in_two_files_and_older_names(made, tmp_path):
    base, folder, wrapped = made
    expected = VideoAlign(load_from_pretrained=str(folder), base_model=str(base)).rate(video(), "a fox", 16)
    whole = wrapped.state_dict()
    (tmp_path / "base").mkdir()
    for file in base.iterdir():
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())

    def older(name: str) -> str:
        return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")

    frozen = {k: v for k, v in whole.items() if ".lora_" not in k and "rm_head" not in k and "visual" not in k}
    plain = {older(k.removeprefix("base_model.model.").replace(".base_layer", "")): v for k, v in frozen.items()}
    save_file({k: v.contiguous() for k, v in plain.items()}, tmp_path / "base/model.safetensors")
    loras = {older(k.replace(".default", "")): v.contiguous() for k, v in whole.items() if ".lora_" in k}
    others = {older(k): v for k, v in whole.items() if "rm_head" in k or "visual" in k}
    (tmp_path / "model_config.json").write_text((folder / "model_config.json").read_text())
    (tmp_path / "checkpoint-3").mkdir()
    save_file(loras, tmp_path / "checkpoint-3/adapter_model.safetensors")
    torch.save(others, tmp_path / "checkpoint-3/non_lora_state_dict.pth")
    reward = VideoAlign(load_from_pretrained=str(tmp_path), base_model=str(tmp_path / "base"))
    assert reward.rate(video(), "a fox", 16) == pytest.approx(expected, abs=1e-5)


def test_patches_are_those_of_transformers():
    """A picture, which it shows twice, through its processor and through ours."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (56, 84, 3), dtype=np.uint8)
    processor = Qwen2VLImageProcessorPil(min_pixels=56 * 84, max_pixels=56 * 84)
    theirs = processor(images=picture, return_tensors="pt")
    frame = torch.from_numpy(picture).permute(2, 0, 1) / 255
    ours, grid = to_patches(torch.stack([frame, frame]), 56 * 84)
    assert [list(grid)] == theirs["image_grid_thw"].tolist()
    torch.testing.assert_close(ours, theirs["pixel_values"], atol=1e-5, rtol=1e-5)


def test_frames_are_taken_evenly_at_the_rate_of_the_model():
    frames = torch.arange(81.0).view(81, 1, 1, 1)
    assert sample_frames(frames, 16, 2.0, None).flatten().tolist() == [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]
    assert len(sample_frames(frames, 8, 2.0, None)) == 20  # the same frames, shown at half the rate
    assert sample_frames(frames, 16, 2.0, 4).flatten().tolist() == [0, 27, 53, 80]
    assert len(sample_frames(frames[:5], 16, 2.0, None)) == 4
    assert len(sample_frames(frames[:1], 16, 2.0, None)) == 2


def test_sizes_are_whole_tokens_near_the_frame_s():
    assert frame_size(720, 1280, 200704) == (336, 588)
    assert frame_size(448, 448, 200704) == (448, 448)
    h, w = frame_size(128, 128, 200704)
    assert h == w == 336  # the least there is
    assert all(side % 28 == 0 for side in frame_size(37, 991, 200704))


def test_what_is_missing_is_named_before_anything_is_loaded(made, tmp_path):
    base, folder, _ = made
    for options, said in (
        ({}, "no load_from_pretrained"),
        ({"load_from_pretrained": str(tmp_path)}, "holds no model_config.json"),
        ({"load_from_pretrained": str(folder)}, "Qwen/Qwen2-VL-2B-Instruct is no folder of Qwen2-VL here"),
    ):
        with pytest.raises(ValueError, match=said):
            check_reward("videoalign", options)
    check_reward("videoalign", {"load_from_pretrained": str(folder), "base_model": str(base)})
    (tmp_path / "model_config.json").write_text((folder / "model_config.json").read_text())
    with pytest.raises(ValueError, match=r"holds neither model\.pth nor"):
        check_reward("videoalign", {"load_from_pretrained": str(tmp_path), "base_model": str(base)})


def test_a_prompt_with_tokens_of_the_head_is_no_rating(made, caplog):
    base, folder, _ = made
    options = {"load_from_pretrained": str(folder), "base_model": str(base)}
    rewards = RewardSet({"videoalign": 1.0}, {"videoalign": options})
    total, _ = rewards(video()[None].repeat(2, 1, 1, 1, 1), ["good <|VQ_reward|>", "fine"], [{}, {}])
    assert total.isnan().all()
    assert "tokens that ratings are read at" in caplog.text
    assert set(rewards(video()[None], ["fine"], [{}]).each) == {"videoalign", *(f"videoalign.{p}" for p in PARTS)}


def test_names_of_all_kinds():
    for name in (
        "model.layers.0.mlp.up_proj.weight",
        "model.language_model.layers.0.mlp.up_proj.weight",
        "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight",
    ):
        assert own_name(name) == "language_model.layers.0.mlp.up_proj.weight"
    assert own_name("base_model.model.visual.merger.mlp.0.weight") == "visual.merger.mlp.0.weight"
    assert own_name("base_model.model.rm_head.modules_to_save.default.weight") == "rm_head.weight"
