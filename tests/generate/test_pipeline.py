"""The pipeline's call: diffusers' semantics, and the mathematics it must come down to."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import UniPCMultistepScheduler

from ospnext.flow.sample import sigma_schedule
from ospnext.generate.pipeline import OSPNextPipeline
from ospnext.generate.sampler import make_scheduler

Build = Callable[..., OSPNextPipeline]


def seeds(*values: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(value) for value in values]


def latents_of(pipe: OSPNextPipeline, prompt: str | list[str] = "a red square", **settings: Any) -> torch.Tensor:
    return pipe(prompt, output_type="latent", **({"generator": seeds(1)} | settings)).frames


# ── the mathematics ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_euler_is_the_formula(pipe: OSPNextPipeline) -> None:
    text, negative = pipe.encode_prompt(["a red square", "ugly"]).split(1)
    x = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(1))
    sigmas = sigma_schedule(4, 3.0)
    with torch.no_grad():
        for now, after in itertools.pairwise(sigmas):
            cond, uncond = (pipe.transformer(x, 1000 * now[None], e, return_dict=False)[0] for e in (text, negative))
            x = x + (after - now) * (uncond + 2.5 * (cond - uncond))
    out = latents_of(pipe, num_inference_steps=4, guidance_scale=2.5)
    torch.testing.assert_close(out, x, atol=1e-4, rtol=1e-4)


def test_unipc_is_diffusers_own_loop(build_pipeline: Build) -> None:
    pipe = build_pipeline(scheduler=make_scheduler("unipc", 5.0))
    text, negative = pipe.encode_prompt(["a red square", "ugly"]).split(1)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    scheduler.set_timesteps(6)
    x = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for t in scheduler.timesteps:
            cond, uncond = (pipe.transformer(x, t[None], e, return_dict=False)[0] for e in (text, negative))
            x = scheduler.step(uncond + 3.0 * (cond - uncond), t, x, return_dict=False)[0]
    for _ in range(2):  # the solver's memory is cleared between calls
        torch.testing.assert_close(latents_of(pipe, num_inference_steps=6), x, atol=1e-4, rtol=1e-4)


def test_guidance_modes_agree_and_off_means_no_negative(pipe: OSPNextPipeline) -> None:
    batched, sequential = (latents_of(pipe, guidance_mode=mode) for mode in ("batched", "sequential"))
    torch.testing.assert_close(batched, sequential, atol=1e-5, rtol=1e-5)
    off = latents_of(pipe, guidance_scale=1.0)
    assert not torch.allclose(batched, off, atol=1e-3)
    torch.testing.assert_close(latents_of(pipe, guidance_scale=0.0, negative_prompt="other"), off)


def test_latents_stay_float32_under_bfloat16_weights(pipe: OSPNextPipeline) -> None:
    pipe.transformer.to(torch.bfloat16)
    pipe.text_encoder.to(torch.bfloat16)
    seen = []

    def watch(_: Any, step: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        seen.append((tensors["latents"].dtype, tensors["prompt_embeds"].dtype))

    out = latents_of(pipe, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    assert set(seen) == {(torch.float32, torch.bfloat16)}
    assert out.dtype == torch.float32
    assert not torch.equal(out, out.to(torch.bfloat16).float())


# ── seeds and batches ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_video_does_not_depend_on_its_batch(pipe: OSPNextPipeline) -> None:
    prompts = ["a red square", "two blue stars"]
    both = latents_of(pipe, prompts, generator=seeds(5, 6))
    for i, prompt in enumerate(prompts):
        alone = latents_of(pipe, prompt, generator=seeds(5 + i))
        torch.testing.assert_close(both[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_several_videos_of_a_prompt_lie_next_to_each_other(pipe: OSPNextPipeline) -> None:
    four = latents_of(pipe, ["one", "two"], num_videos_per_prompt=2, generator=seeds(1, 2, 3, 4))
    torch.testing.assert_close(four[1:2], latents_of(pipe, "one", generator=seeds(2)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(four[2:3], latents_of(pipe, "two", generator=seeds(3)), atol=1e-5, rtol=1e-5)


def test_one_generator_and_given_latents(pipe: OSPNextPipeline) -> None:
    first = latents_of(pipe, ["a", "b"], generator=seeds(3)[0])
    noise = torch.randn(2, 16, 2, 4, 6, generator=seeds(3)[0])
    torch.testing.assert_close(latents_of(pipe, ["a", "b"], latents=noise, generator=None), first)
    with pytest.raises(ValueError, match="latents are"):
        latents_of(pipe, "a", latents=noise)
    with pytest.raises(ValueError, match="3 generators for 1 videos"):
        latents_of(pipe, "a", generator=seeds(1, 2, 3))


# ── text ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_negative_prompt_is_the_models_own_unless_given(pipe: OSPNextPipeline) -> None:
    own = latents_of(pipe)
    torch.testing.assert_close(latents_of(pipe, negative_prompt="ugly"), own)
    empty = latents_of(pipe, negative_prompt="")
    assert not torch.allclose(empty, own, atol=1e-4)
    two = latents_of(pipe, ["a red square"] * 2, negative_prompt=["ugly", ""], generator=seeds(1, 1))
    torch.testing.assert_close(two, torch.cat([own, empty]), atol=1e-5, rtol=1e-5)


def test_prompts_are_cleaned_as_the_model_says(build_pipeline: Build) -> None:
    messy, clean = "  a  red\nsquare ", "a red square"
    wan, plain = build_pipeline(), build_pipeline(prompt_cleaning="none")
    torch.testing.assert_close(wan.encode_prompt([messy]), wan.encode_prompt([clean]))
    assert not torch.equal(plain.encode_prompt([messy]), plain.encode_prompt([clean]))
    with pytest.raises(ValueError, match="prompt_cleaning 'lower'"):
        build_pipeline(prompt_cleaning="lower")


def test_embeddings_in_place_of_text(pipe: OSPNextPipeline) -> None:
    text, negative = pipe.encode_prompt(["a red square", "ugly"]).split(1)
    own = latents_of(pipe)
    settings = {"prompt_embeds": text, "generator": seeds(1), "output_type": "latent"}
    torch.testing.assert_close(pipe(**settings, negative_prompt_embeds=negative).frames, own)
    settings["generator"] = seeds(1)
    torch.testing.assert_close(pipe(**settings).frames, own)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": None}, "either prompt or prompt_embeds"),
        ({"prompt": []}, "for 0 prompts"),
        ({"prompt": ["a", "b"], "negative_prompt": ["x"] * 3}, "3 negative prompts for 2 prompts"),
        ({"output_type": "gif"}, "output_type 'gif'"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt is 0"),
        ({"callback_on_step_end_tensor_inputs": ["mask"]}, "mask"),
        ({"height": 0}, "cannot be made"),
        ({"num_frames": -3}, "cannot be made"),
    ],
)
def test_bad_arguments_are_named(pipe: OSPNextPipeline, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(**({"prompt": "a"} | settings))


# ── what comes out ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_output_types(pipe: OSPNextPipeline) -> None:
    def make(output_type: str) -> Any:
        return pipe("a", generator=seeds(1), output_type=output_type).frames

    frames = make("np")
    assert isinstance(frames, np.ndarray)
    assert frames.shape == (1, 5, 32, 48, 3)
    assert frames.min() >= 0
    assert frames.max() <= 1
    np.testing.assert_allclose(make("pt").permute(0, 1, 3, 4, 2).numpy(), frames)
    picture = make("pil")[0][2]
    assert isinstance(picture, PIL.Image.Image)
    np.testing.assert_allclose(np.asarray(picture), frames[0, 2] * 255, atol=0.51)
    assert make("latent").shape == (1, 16, 2, 4, 6)
    assert pipe.decode_mode == "whole"
    as_tuple = pipe("a", generator=seeds(1), return_dict=False)
    np.testing.assert_allclose(as_tuple[0], frames)


def test_sizes_are_rounded_with_a_warning(pipe: OSPNextPipeline, caplog: pytest.LogCaptureFixture) -> None:
    assert latents_of(pipe, height=40, width=50, num_frames=6).shape == (1, 16, 2, 6, 6)
    assert "become 5 of 48 and 48" in caplog.text


# ── callbacks ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_callback_sees_and_changes_tensors(pipe: OSPNextPipeline) -> None:
    steps = []

    def swap(p: OSPNextPipeline, step: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        steps.append((step, round(t.item())))
        assert set(tensors) == {"latents", "prompt_embeds"}
        p._guidance_scale = 0.0
        return {"latents": torch.zeros_like(tensors["latents"]), "prompt_embeds": tensors["prompt_embeds"] + 1}

    out = latents_of(pipe, callback_on_step_end=swap, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    assert steps == [(0, 1000), (1, 857), (2, 600)]
    assert not out.any()


def test_callback_can_interrupt(pipe: OSPNextPipeline) -> None:
    steps = []

    def stop(p: OSPNextPipeline, step: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        steps.append(tensors["latents"].clone())
        p._interrupt = step == 1
        return {}

    out = latents_of(pipe, callback_on_step_end=stop)
    assert len(steps) == 2
    torch.testing.assert_close(out, steps[-1])
    latents_of(pipe, callback_on_step_end=stop)
    assert len(steps) == 4  # the next call starts afresh
