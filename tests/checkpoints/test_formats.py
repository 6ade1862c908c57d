"""Names and settings of every format against the libraries that own them."""

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from transformers import UMT5Config, UMT5EncoderModel

from ospnext.checkpoints.encoders import t5_native_name, t5_settings, vae_native_name, vae_settings
from ospnext.checkpoints.formats import (
    DEFAULTS,
    FAMILIES,
    diffusers_name,
    infer_settings,
    is_image_weight,
    name_map,
    native_name,
    read_settings,
    write_settings,
)
from ospnext.models.transformer import OSPNextTransformer3DModel

WAN_1_3B = {
    "_class_name": "WanModel",
    "_diffusers_version": "0.30.0",
    "dim": 1536,
    "eps": 1e-06,
    "ffn_dim": 8960,
    "freq_dim": 256,
    "in_dim": 16,
    "model_type": "t2v",
    "num_heads": 12,
    "num_layers": 30,
    "out_dim": 16,
    "text_len": 512,
}
DIFFUSERS_14B = {
    "_class_name": "WanTransformer3DModel",
    "_diffusers_version": "0.33.0.dev0",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "ffn_dim": 13824,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "num_attention_heads": 40,
    "num_layers": 40,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}
OSP_14B = {
    "_class_name": "OSPNextModel",
    "_diffusers_version": "0.35.1",
    "dim": 5120,
    "eps": 1e-06,
    "ffn_dim": 13824,
    "freq_dim": 256,
    "in_dim": 16,
    "model_type": "t2v",
    "num_full_blocks": 8,
    "num_heads": 40,
    "num_layers": 40,
    "out_dim": 16,
    "sparse_ratio": 2,
    "text_len": 512,
    "skiparse_model_type": "dual_end",
    "quant": "hif8",
    "quant_attn": None,
    "scale_max_forward": 15.0,
    "scale_max_backward": 224.0,
    "window_size": [-1, -1],
}


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_transformer_names_are_diffusers_one_to_one() -> None:
    with torch.device("meta"):
        ours = OSPNextTransformer3DModel(dim=32, ffn_dim=48, num_heads=2, num_layers=2, text_dim=8)
        theirs = WanTransformer3DModel(
            num_layers=2, num_attention_heads=2, attention_head_dim=16, ffn_dim=48, text_dim=8
        )
    assert {diffusers_name(name): shape for name, shape in shapes_of(ours).items()} == shapes_of(theirs)


def test_transformer_names_agree_with_diffusers_own_converter(transformer) -> None:
    names = {name: torch.full((1,), i) for i, name in enumerate(transformer.state_dict())}
    converted = convert_wan_transformer_to_diffusers(dict(names))
    assert {diffusers_name(name): value for name, value in names.items()} == converted


def test_vae_native_names_are_what_diffusers_converts() -> None:
    with torch.device("meta"):
        names = list(AutoencoderKLWan(base_dim=4).state_dict())
    native = {vae_native_name(name): name for name in names}
    assert len(native) == len(names)
    converted = convert_wan_vae_to_diffusers(dict(native))  # from native names, by the library
    assert all(name == value for name, value in converted.items())
    assert "decoder.upsamples.3.time_conv.weight" in native
    assert "decoder.upsamples.14.residual.6.bias" in native


@pytest.mark.parametrize(
    "settings",
    [
        {"base_dim": 4},
        {"base_dim": 4, "dim_mult": [1, 2, 4], "num_res_blocks": 1, "temperal_downsample": [True, True]}
        | {"patch_size": 2, "in_channels": 12, "out_channels": 12},
        {"base_dim": 6, "decoder_base_dim": 4, "dim_mult": [2, 2], "num_res_blocks": 3, "temperal_downsample": [False]}
        | {"scale_factor_temporal": 1, "scale_factor_spatial": 2},
    ],
)
@pytest.mark.parametrize("native", [True, False])
def test_vae_settings_are_read_from_shapes(settings: dict, native: bool) -> None:
    with torch.device("meta"):
        vae = AutoencoderKLWan(**settings)
    blocks = vae.config.num_res_blocks
    rename = (lambda name: vae_native_name(name, blocks)) if native else native_name
    name_of, found = vae_settings({rename(name): shape for name, shape in shapes_of(vae).items()})
    assert [name_of(name) for name in vae.state_dict()] == [rename(name) for name in vae.state_dict()]
    expected = {key: vae.config[key] for key in found} | {"decoder_base_dim": found["decoder_base_dim"]}
    assert found == expected
    with torch.device("meta"):
        assert shapes_of(AutoencoderKLWan(**found)) == shapes_of(vae)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["blocks.0.self_attn.q.weight"], "not the weights of a Wan2.1 video autoencoder"),
        (["encoder.conv1.weight", "encoder.downsamples.0.downsamples.0.residual.0.gamma"], "Wan2.2"),
        (["encoder.conv1.weight"], "down-sampling"),
        (["encoder.conv1.weight", "encoder.downsamples.2.resample.1.weight"], "conv2.weight is missing"),
    ],
)
def test_vae_settings_refuse_other_weights(names: list[str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        vae_settings(dict.fromkeys(names, (4, 3, 3, 3, 3)))


def test_t5_names_and_settings() -> None:
    sizes = {"vocab_size": 99, "d_model": 24, "d_kv": 16, "d_ff": 40, "num_layers": 3, "num_heads": 4}
    with torch.device("meta"):
        encoder = UMT5EncoderModel(UMT5Config(**sizes))
    shapes = shapes_of(encoder)
    del shapes["encoder.embed_tokens.weight"]  # tied
    native = {t5_native_name(name): shape for name, shape in shapes.items()}
    block = [name.removeprefix("blocks.2.") for name in native if name.startswith("blocks.2.")]
    assert sorted(block) == sorted(
        [f"attn.{layer}.weight" for layer in "qkvo"]
        + ["norm1.weight", "norm2.weight", "pos_embedding.embedding.weight"]
        + ["ffn.gate.0.weight", "ffn.fc1.weight", "ffn.fc2.weight"]
    )
    assert native.keys() - {f"blocks.{i}.{name}" for i in range(3) for name in block} == {
        "token_embedding.weight",
        "norm.weight",
    }
    assert t5_settings(native) == sizes | {"relative_attention_num_buckets": 32}
    with pytest.raises(ValueError, match=r"token_embedding\.weight"):
        t5_settings({"norm.weight": (4,)})


@pytest.mark.parametrize(("raw", "family"), [(WAN_1_3B, "wan"), (DIFFUSERS_14B, "diffusers"), (OSP_14B, "osp")])
def test_published_configs_are_read(raw: dict, family: str) -> None:
    found, settings = read_settings(raw)
    assert found == family
    assert settings["num_heads"] * 128 == settings["dim"]
    assert settings["num_layers"] == raw["num_layers"]
    assert settings.get("num_full_blocks") == (8 if family == "osp" else None)
    assert settings.keys() <= DEFAULTS.keys()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "varied",
    [
        {"skiparse_model_type": "dual_end", "num_full_blocks": 4, "num_layers": 8, "skiparse_pattern": "1d"},
        {"text_len": 128, "text_dim": 24, "patch_size": (1, 1, 2), "cross_attn_norm": False, "in_dim": 3, "eps": 1e-5},
        {},
    ],
)
def test_settings_survive_every_format(family: str, varied: dict) -> None:
    settings = DEFAULTS | varied
    found, read = read_settings(write_settings(settings, family))
    assert found == family
    assert DEFAULTS | read == settings


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (WAN_1_3B | {"model_type": "i2v"}, "text-to-video"),
        (WAN_1_3B | {"vace_layers": [0]}, "vace_layers"),
        (DIFFUSERS_14B | {"image_dim": 1280, "added_kv_proj_dim": 5120}, "image_dim, added_kv_proj_dim are set"),
        (OSP_14B | {"moe": 2}, "moe"),
        (OSP_14B | {"num_layers": "40"}, "num_layers is '40': it should be of type int"),
        (DIFFUSERS_14B | {"in_channels": None}, "in_channels is None"),
        ({"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
        ({}, "_class_name is None"),
    ],
)
def test_foreign_configs_are_refused(raw: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        read_settings(raw)


@pytest.mark.parametrize("family", ["osp", "diffusers"])
def test_settings_are_inferred_from_shapes(transformer, family: str) -> None:
    name_of = name_map(family)
    shapes = {name_of(name): shape for name, shape in shapes_of(transformer).items()}
    found = infer_settings(shapes, name_of)
    assert found == {key: transformer.config[key] for key in found}
    assert DEFAULTS.keys() - found.keys() == {
        *("num_heads", "eps", "text_len", "skiparse_model_type", "sparse_ratio", "num_full_blocks", "skiparse_pattern")
    }
    assert infer_settings({}, name_of) == {}


def test_image_weights_are_known_in_every_format() -> None:
    assert is_image_weight("img_emb.proj.0.weight")
    assert is_image_weight("blocks.0.cross_attn.k_img.weight")
    assert is_image_weight("blocks.0.attn2.add_k_proj.weight")
    assert not is_image_weight("blocks.0.cross_attn.k.weight")
