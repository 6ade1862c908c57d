"""Whole pipeline folders: ours, diffusers' Wan, Wan2.1's own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from transformers import ByT5Tokenizer

from ospnext.checkpoints.components import find_components, load_pipeline_components
from ospnext.checkpoints.encoders import t5_native_name, vae_native_name
from ospnext.checkpoints.read import CheckpointError
from ospnext.checkpoints.save import save_transformer


def write_pipeline(folder: Path, transformer, vae, text_encoder, index: dict) -> None:
    vae.save_pretrained(folder / "vae")
    text_encoder.save_pretrained(folder / "text_encoder")
    ByT5Tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.fixture
def ours(transformer, vae, text_encoder, tmp_path: Path) -> Path:
    index = {
        "_class_name": ["ospnext.generate.pipeline", "OSPNextPipeline"],
        "_diffusers_version": "0.42.0",
        "negative_prompt": "blurry",
        "defaults": {"num_frames": 33},
        "sizes": [1, 2],
        "transformer": ["ospnext.models.transformer", "OSPNextTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "ByT5Tokenizer"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    write_pipeline(tmp_path / "ours", transformer, vae, text_encoder, index)
    transformer.save_pretrained(tmp_path / "ours" / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=4.0).save_pretrained(tmp_path / "ours" / "scheduler")
    return tmp_path / "ours"


def edit_index(folder: Path, **changes: object) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | changes))


def test_our_folder(ours: Path, transformer) -> None:
    parts = load_pipeline_components(
        ours, transformer_dtype=torch.bfloat16, vae_dtype=torch.float16, text_encoder_dtype=torch.float32
    )
    assert parts.transformer.layouts == transformer.layouts
    dtypes = [part.dtype for part in (parts.transformer, parts.vae, parts.text_encoder)]
    assert dtypes == [torch.bfloat16, torch.float16, torch.float32]
    assert isinstance(parts.scheduler, FlowMatchEulerDiscreteScheduler)
    assert parts.scheduler.config.shift == 4.0
    assert parts.settings == {"negative_prompt": "blurry", "defaults": {"num_frames": 33}, "sizes": [1, 2]}
    assert parts.tokenizer("ab").input_ids == [100, 101, 1]


def test_diffusers_wan_folder(dense, vae, text_encoder, tmp_path: Path) -> None:
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": "0.33.0.dev0",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    write_pipeline(tmp_path, dense, vae, text_encoder, index)
    save_transformer(dense, tmp_path / "transformer", "diffusers")
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.save_pretrained(tmp_path / "scheduler")
    parts = load_pipeline_components(tmp_path, skiparse_model_type="dual_end")
    assert parts.transformer.config.skiparse_model_type == "dual_end"
    assert isinstance(parts.scheduler, UniPCMultistepScheduler)
    assert parts.scheduler.config.flow_shift == 3.0
    assert parts.settings == {}
    UniPCMultistepScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(CheckpointError, match="not for flow matching"):
        load_pipeline_components(tmp_path)


def test_wan_native_folder(dense, vae, text_encoder, tmp_path: Path) -> None:
    save_transformer(dense, tmp_path / "wan", "wan")
    folder = tmp_path / "wan"
    torch.save({vae_native_name(name): t for name, t in vae.state_dict().items()}, folder / "Wan2.1_VAE.pth")
    state = {name: t for name, t in text_encoder.state_dict().items() if not name.endswith("embed_tokens.weight")}
    encoder_file = folder / "models_t5_umt5-xxl-enc-bf16.pth"
    torch.save({t5_native_name(name): t.bfloat16() for name, t in state.items()}, encoder_file)
    with pytest.raises(CheckpointError, match=r"missing .*google/umt5-xxl"):
        load_pipeline_components(folder)
    ByT5Tokenizer().save_pretrained(folder / "google" / "umt5-xxl")
    parts = load_pipeline_components(folder)
    dtypes = [part.dtype for part in (parts.transformer, parts.vae, parts.text_encoder)]
    assert dtypes == [torch.float32, torch.float32, torch.bfloat16]
    assert parts.scheduler is None
    assert find_components(folder).vae == folder / "Wan2.1_VAE.pth"


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(ours: Path, part: str) -> None:
    shutil.rmtree(ours / part)
    with pytest.raises(CheckpointError, match=f"missing .*{part}"):
        load_pipeline_components(ours)


def test_other_pipelines_are_refused(ours: Path, tmp_path: Path) -> None:
    edit_index(ours, transformer_2=["diffusers", "WanTransformer3DModel"])
    with pytest.raises(CheckpointError, match="has transformer_2 too"):
        load_pipeline_components(ours)
    edit_index(ours, _class_name="WanImageToVideoPipeline")
    with pytest.raises(CheckpointError, match="a WanImageToVideoPipeline; only OSPNextPipeline and WanPipeline"):
        load_pipeline_components(ours)
    (ours / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match=r"neither model_index\.json nor"):
        load_pipeline_components(ours)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_pipeline_components(tmp_path / "nowhere")


def test_other_schedulers_are_refused(ours: Path) -> None:
    (ours / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    with pytest.raises(CheckpointError, match="'DDIMScheduler' is not known"):
        load_pipeline_components(ours)
