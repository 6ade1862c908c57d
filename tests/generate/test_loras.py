"""LoRAs in the pipeline and in ``ospnext generate``: loaded, weighed, swapped, fused, taken off, and merged before."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ospnext.checkpoints.lora import NewAdapter, linear_shapes
from ospnext.checkpoints.lora_files import Adapter, Pair, read_adapter, write_adapter
from ospnext.cli import main
from ospnext.generate.pipeline import OSPNextPipeline
from ospnext.media import read_video
from ospnext.quant.apply import quantize
from ospnext.quant.config import QuantConfig

ONE, OTHER = (("self_attn.q", "cross_attn.v", "ffn.0"), 1), (("self_attn.q", "ffn.2"), 2)
SMALL = ["num_frames=5", "height=64", "width=96", "scheduler_config.num_inference_steps=2", "seed=7", "device=cpu"]


def random_adapter(pipe: OSPNextPipeline, targets: tuple[str, ...], seed: int, std: float = 0.3) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    shapes = linear_shapes(pipe.transformer)
    pairs = {}
    for name in NewAdapter(3, 6.0, targets, 0).sizes(shapes):
        down = std * torch.randn(3, shapes[name][1], generator=generator)
        pairs[name] = Pair(down, std * torch.randn(shapes[name][0], 3, generator=generator), 6.0)
    return Adapter(pairs)


def video(pipe: OSPNextPipeline) -> torch.Tensor:
    """Latents of a short video."""
    return pipe(
        "a red star", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent"
    ).frames


def test_loaded_scaled_swapped_and_unloaded(pipe: OSPNextPipeline, tmp_path: Path) -> None:
    one, other = random_adapter(pipe, *ONE), random_adapter(pipe, *OTHER)
    write_adapter(one, tmp_path / "one", torch_file=True)
    plain = video(pipe)
    weights = {name: p.clone() for name, p in pipe.transformer.named_parameters()}

    pipe.load_lora_weights(tmp_path / "one")
    first = video(pipe)
    assert not torch.allclose(first, plain, atol=1e-3)
    pipe.load_lora_weights(write_adapter(other, tmp_path / "x.safetensors", "comfyui"), adapter_name="other")
    assert pipe.get_active_adapters() == ["default_0", "other"]
    assert pipe.get_list_adapters() == {"transformer": ["default_0", "other"]}
    both = video(pipe)
    assert not torch.allclose(both, first, atol=1e-3)

    pipe.set_adapters("default_0")
    assert torch.equal(video(pipe), first)
    pipe.set_adapters(["other", "default_0"], [1.0, 1.0])
    assert torch.allclose(video(pipe), both, atol=1e-5)
    pipe.set_adapters(["default_0", "other"], 0.0)
    assert torch.equal(video(pipe), plain)
    pipe.set_adapters(["default_0", "other"], [0.5, 2.0])
    scaled = video(pipe)
    assert not torch.allclose(scaled, both, atol=1e-3)
    pipe.disable_lora()
    assert torch.equal(video(pipe), plain)
    pipe.enable_lora()
    assert torch.equal(video(pipe), both)

    pipe.delete_adapters("other")
    assert torch.equal(video(pipe), first)
    pipe.load_lora_weights(tmp_path, adapter_name="other", weight_name="x.safetensors")
    assert torch.equal(video(pipe), both)
    pipe.delete_adapters("other")
    pipe.load_lora_weights(load_file(tmp_path / "x.safetensors"), adapter_name="other")
    assert torch.equal(video(pipe), both)
    pipe.unload_lora_weights()
    assert pipe.get_list_adapters() == {}
    assert torch.equal(video(pipe), plain)
    after = dict(pipe.transformer.named_parameters())
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], p) for name, p in weights.items())
    pipe.save_pretrained(tmp_path / "saved")


def test_a_scale_is_a_factor_of_the_product(pipe: OSPNextPipeline, build_pipeline) -> None:
    adapter = random_adapter(pipe, *ONE)
    pipe.load_lora_weights(adapter, adapter_name="x")
    pipe.set_adapters("x", 0.25)
    by_hand = build_pipeline()
    with torch.no_grad():
        for name, pair in adapter.pairs.items():
            by_hand.transformer.get_submodule(name).weight += 0.25 * 2 * pair.up @ pair.down
    assert torch.allclose(video(pipe), video(by_hand), atol=1e-4)


def test_fused_it_is_the_same_and_comes_out_exactly(pipe: OSPNextPipeline, tmp_path: Path) -> None:
    pipe.transformer.bfloat16()
    weights = {name: p.clone() for name, p in pipe.transformer.named_parameters()}
    plain = video(pipe)
    pipe.load_lora_weights(random_adapter(pipe, *ONE), adapter_name="one")
    pipe.load_lora_weights(random_adapter(pipe, *OTHER), adapter_name="other")
    pipe.set_adapters(["one", "other"], [0.5, 1.0])
    apart = video(pipe)
    pipe.fuse_lora()
    fused = video(pipe)
    assert (fused - apart).norm() < 0.05 * (apart - plain).norm()  # bfloat16's rounding
    for method in (pipe.fuse_lora, pipe.disable_lora, lambda: pipe.load_lora_weights(tmp_path)):
        with pytest.raises(ValueError, match="LoRAs are fused: unfuse_lora first, then"):
            method()
    with pytest.raises(ValueError, match="carries a LoRA adapter"):
        pipe.save_pretrained(tmp_path / "saved")
    pipe.unfuse_lora()
    assert torch.equal(video(pipe), apart)
    pipe.fuse_lora(adapter_names=["one"])
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    after = dict(pipe.transformer.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in weights.items())
    with pytest.raises(ValueError, match="unfuse_lora: nothing is fused"):
        pipe.unfuse_lora()

    pipe.load_lora_weights(random_adapter(pipe, *ONE))
    pipe.fuse_lora()
    fused = video(pipe)
    pipe.unload_lora_weights()  # now it is in the weights for good
    pipe.save_pretrained(tmp_path / "saved")
    again = OSPNextPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(video(again), fused)


def test_beside_hif8_but_not_fused_into_eight_bits(pipe: OSPNextPipeline) -> None:
    config = QuantConfig()
    quantize(pipe.transformer, config, [f"blocks.{i}.{n}" for i in range(4) for n in ("self_attn.q", "ffn.2")])
    plain = video(pipe)
    pipe.load_lora_weights(random_adapter(pipe, *OTHER))
    assert not torch.allclose(video(pipe), plain, atol=1e-3)
    with pytest.raises(ValueError, match=r"8 weights are in 8 bits, such as blocks.0.self_attn.q, .*: leave it beside"):
        pipe.fuse_lora()
    pipe.disable_lora()
    assert torch.equal(video(pipe), plain)


def test_what_is_wrong_is_said(pipe: OSPNextPipeline, tmp_path: Path) -> None:
    adapter = random_adapter(pipe, *ONE)
    foreign = Adapter({"blocks.9.self_attn.q": next(iter(adapter.pairs.values()))}, source="x")
    for call, words in (
        (lambda: pipe.load_lora_weights(tmp_path / "none"), "none: no such file or folder"),
        (lambda: pipe.load_lora_weights(foreign), "x: no adapter of this model; 1 for linears it does not have"),
        (lambda: pipe.load_lora_weights(adapter, adapter_name="a.b"), "must not hold a dot"),
        (lambda: pipe.set_adapters("mine"), "no adapter is called mine: loaded are none"),
        (lambda: pipe.delete_adapters("mine"), "no adapter is called mine: loaded are none"),
        (pipe.fuse_lora, "no LoRA is in use: load_lora_weights first"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    pipe.load_lora_weights(adapter, adapter_name="mine")
    with pytest.raises(ValueError, match="'mine' is taken"):
        pipe.load_lora_weights(adapter, adapter_name="mine")
    with pytest.raises(ValueError, match="2 adapter_weights for the adapters mine"):
        pipe.set_adapters("mine", [1.0, 2.0])
    pipe.sharded = frozenset(("transformer",))
    with pytest.raises(ValueError, match="processes share the weights: name the LoRA in lora_path"):
        pipe.load_lora_weights(adapter)


# ── the command ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the embedded model."""
    shapes = OSPNextPipeline.from_pretrained("shapes")
    return write_adapter(random_adapter(shapes, *ONE, std=0.08), tmp_path_factory.mktemp("lora") / "adapter")


def generate(folder: Path, *words: object) -> int:
    return main(["generate", "--prompt", "a red star", *map(str, words), *SMALL, f"output_dir={folder}"])


def test_merged_before_is_loaded_beside(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"  # in float32: merged into bfloat16 weights an adapter is rounded with them
    OSPNextPipeline.from_pretrained("shapes", torch_dtype=torch.float32).save_pretrained(base)
    assert main(["merge-lora", str(base), str(lora), str(tmp_path / "merged"), "scale=0.5"]) == 0
    capsys.readouterr()
    assert generate(tmp_path / "plain") == 0
    assert "lora  " not in capsys.readouterr().out
    assert generate(tmp_path / "beside", f"lora_path={lora}", "lora_scale=0.5") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "linears, rank 3, alpha 6), scale 0.5" in said
    assert generate(tmp_path / "inside", f"model={tmp_path / 'merged'}") == 0
    names = ("plain", "beside", "inside")
    videos = (read_video(tmp_path / name / "video_0.mp4").frames for name in names)
    plain, beside, inside = (torch.from_numpy(frames).float() for frames in videos)
    assert (beside - inside).abs().mean() < 0.2  # of 255: rounding, of which the files make more
    assert (beside - plain).abs().mean() > 2
    record = json.loads((tmp_path / "beside/manifest.json").read_text())
    assert '"scale": 0.5' in json.dumps(record)
    assert read_adapter(lora).fingerprint() in json.dumps(record)


def test_several_and_another_scale_is_another_run(lora: Path, tmp_path: Path, capsys) -> None:
    assert generate(tmp_path / "x", f"lora_path=[{lora},{lora}]", "lora_scale=[0.25,0.25]") == 0
    capsys.readouterr()
    assert generate(tmp_path / "x", f"lora_path=[{lora},{lora}]", "lora_scale=[0.25,0.5]") == 2
    assert "lora" in capsys.readouterr().err
    shapes = OSPNextPipeline.from_pretrained("shapes")
    newer = write_adapter(random_adapter(shapes, *OTHER), tmp_path / "lora")  # trained on, in the same place
    assert generate(tmp_path / "x", f"lora_path=[{newer},{lora}]", "lora_scale=[0.25,0.25]") == 2
    assert "lora" in capsys.readouterr().err
    same = write_adapter(read_adapter(lora), tmp_path / "same.safetensors", "comfyui")  # the same under other names
    assert generate(tmp_path / "x", f"lora_path=[{same},{lora}]", "lora_scale=[0.25,0.25]") == 0
    assert "(0 new" in capsys.readouterr().out


def test_the_older_place_is_read_and_mistakes_are_refused(lora: Path, tmp_path: Path, capsys) -> None:
    assert generate(tmp_path / "x", f"lora_config.lora_path={lora}", "lora_config.rank=3", "lora_scale=[1,2]") == 2
    assert "lora_scale has 2 numbers for 1 of lora_path" in capsys.readouterr().err
    assert generate(tmp_path / "x", f"lora_path={tmp_path / 'none'}") == 2
    assert "none: no such file or folder" in capsys.readouterr().err
    shapes = OSPNextPipeline.from_pretrained("shapes")
    adapter = random_adapter(shapes, ("self_attn.q",), 0)
    wrong = Adapter({f"blocks.{90 + i}.self_attn.q": pair for i, pair in enumerate(adapter.pairs.values())})
    assert generate(tmp_path / "x", f"lora_path={write_adapter(wrong, tmp_path / 'wrong')}") == 2
    assert "no adapter of this model" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
