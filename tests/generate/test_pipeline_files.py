"""The pipeline on disk: what is saved comes back, in the dtype asked for, and nothing less than all of it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from ospnext.generate.pipeline import OSPNextPipeline
from ospnext.generate.sampler import make_scheduler
from ospnext.generate.settings import WAN_SAMPLING
from ospnext.models.text import WAN_NEGATIVE_PROMPT

Build = Callable[..., OSPNextPipeline]


def latents_of(pipe: OSPNextPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red square", generator=torch.Generator().manual_seed(1), output_type="latent").frames


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_round_trip_is_exact(build_pipeline: Build, tmp_path: Path, sampler: str) -> None:
    pipe = build_pipeline(scheduler=make_scheduler(sampler, 4.0), negative_prompt="模糊", prompt_cleaning="none")
    pipe.save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["transformer"] == ["ospnext.models.transformer", "OSPNextTransformer3DModel"]
    back = OSPNextPipeline.from_pretrained(tmp_path / "model")
    for name in ("transformer", "vae", "text_encoder"):
        saved, loaded = getattr(pipe, name).state_dict(), getattr(back, name).state_dict()
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(saved[key], loaded[key]) for key in saved)
        assert not getattr(back, name).training
    for name in ("negative_prompt", "prompt_cleaning", "defaults"):
        assert back.config[name] == pipe.config[name]
    assert back.sampling_defaults == pipe.sampling_defaults
    assert back.sampling_defaults["sampler"] == sampler
    torch.testing.assert_close(latents_of(back), latents_of(pipe), rtol=0, atol=0)


def test_dtypes_are_per_component(pipe: OSPNextPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    half = OSPNextPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert (half.transformer.dtype, half.text_encoder.dtype, half.vae.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )
    named = OSPNextPipeline.from_pretrained(
        tmp_path, torch_dtype={"vae": torch.float16, "transformer": torch.bfloat16, "default": torch.float32}
    )
    assert {p.dtype for p in named.vae.parameters()} == {torch.float16}
    assert (named.transformer.dtype, named.text_encoder.dtype) == (torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match="vea"):
        OSPNextPipeline.from_pretrained(tmp_path, torch_dtype={"vea": torch.float16})


def test_a_pipeline_that_says_nothing_has_wans_prompts(build_pipeline: Build, tmp_path: Path) -> None:
    build_pipeline().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    for name in ("negative_prompt", "prompt_cleaning", "defaults"):
        del index[name]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    pipe = OSPNextPipeline.from_pretrained(tmp_path)
    assert pipe.config.negative_prompt == WAN_NEGATIVE_PROMPT
    assert pipe.config.prompt_cleaning == "wan"


def test_weights_without_a_scheduler_get_wans(pipe: OSPNextPipeline) -> None:
    parts = (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.tokenizer)
    bare = OSPNextPipeline.from_parts(*parts, None, {})
    assert bare.sampling_defaults == WAN_SAMPLING._asdict()


def test_missing_and_renamed_weights_are_refused(pipe: OSPNextPipeline, tmp_path: Path) -> None:
    linear = pipe.transformer.blocks[1].ffn[0]
    linear.scale = torch.nn.Parameter(linear.weight.detach().clone())
    del linear.weight
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.0\.weight.*blocks\.1\.ffn\.0\.scale"):
        OSPNextPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="nowhere"):
        OSPNextPipeline.from_pretrained(tmp_path / "nowhere")


def test_an_adapter_is_not_saved_as_a_model(pipe: OSPNextPipeline, tmp_path: Path) -> None:
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["self_attn.q"]))
    with pytest.raises(ValueError, match="LoRA"):
        pipe.save_pretrained(tmp_path)


def test_placing_moves_nothing_on_a_cpu_and_changes_no_result(pipe: OSPNextPipeline) -> None:
    before = latents_of(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert pipe.offload == {"transformer", "vae", "text_encoder"}
    torch.testing.assert_close(latents_of(pipe), before)
    pipe.to("cpu")
    assert not pipe.offload


def test_the_embedded_model_has_a_name() -> None:
    pipe = OSPNextPipeline.from_pretrained("shapes", device="meta")
    assert pipe.transformer.config.num_layers >= 12
    assert pipe.sampling_defaults["num_frames"] >= 33
