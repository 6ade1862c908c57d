"""The video autoencoder, the text encoder and the tokenizer from native files and from library folders."""

import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer, UMT5EncoderModel

from ospnext.checkpoints.encoders import t5_native_name, vae_native_name
from ospnext.checkpoints.load import load_text_encoder, load_tokenizer, load_vae
from ospnext.checkpoints.read import CheckpointError

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def native_vae(vae: AutoencoderKLWan) -> dict[str, torch.Tensor]:
    return {vae_native_name(name): tensor for name, tensor in vae.state_dict().items()}


def native_t5(encoder: UMT5EncoderModel, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    state = {name: tensor for name, tensor in encoder.state_dict().items() if name != "encoder.embed_tokens.weight"}
    return {t5_native_name(name): tensor.to(dtype) for name, tensor in state.items()}


def assert_weights(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor.to(loaded[name].dtype)) for name, tensor in state.items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_wan_vae_file(vae, tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save(native_vae(vae), tmp_path / "Wan2.1_VAE.pth")
    for place in (tmp_path, tmp_path / "Wan2.1_VAE.pth"):
        loaded = load_vae(place, dtype)
        assert {tensor.dtype for tensor in loaded.state_dict().values()} == {dtype}
        assert loaded.config.latents_mean == vae.config.latents_mean
        assert_weights(loaded, vae.state_dict())


def test_wan_vae_computes_the_same(vae, tmp_path: Path) -> None:
    torch.save(native_vae(vae), tmp_path / "Wan2.1_VAE.pth")
    video = torch.rand(1, 3, 5, 16, 16)
    with torch.no_grad():
        expected = vae.encode(video).latent_dist.mode()
        assert torch.equal(load_vae(tmp_path).encode(video).latent_dist.mode(), expected)


def test_vae_safetensors_and_folders(vae, tmp_path: Path) -> None:
    save_file(native_vae(vae), tmp_path / "native.safetensors")
    save_file(vae.state_dict(), tmp_path / "diffusers.safetensors")
    vae.save_pretrained(tmp_path / "pipe" / "vae")
    for place in ("native.safetensors", "diffusers.safetensors", "pipe/vae", "pipe"):
        loaded = load_vae(tmp_path / place, torch.float16)
        assert_weights(loaded, vae.state_dict())
        assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float16}


def test_vae_is_strict(vae, tmp_path: Path) -> None:
    state = native_vae(vae)
    del state["decoder.head.2.bias"]
    torch.save(state | {"extra": torch.zeros(1)}, tmp_path / "Wan2.1_VAE.pth")
    with pytest.raises(CheckpointError, match=r"1 missing: decoder\.head\.2\.bias; 1 unexpected: extra"):
        load_vae(tmp_path)
    torch.save({"x": torch.zeros(1)}, tmp_path / "Wan2.1_VAE.pth")
    with pytest.raises(CheckpointError, match=r"Wan2\.1_VAE\.pth: no encoder\.conv1"):
        load_vae(tmp_path)
    vae.save_pretrained(tmp_path / "vae")
    config = tmp_path / "vae" / "config.json"
    config.write_text(config.read_text().replace('"z_dim"', '"zdim"'))
    with pytest.raises(CheckpointError, match=r"config\.json: zdim: no setting of AutoencoderKLWan"):
        load_vae(tmp_path)
    shutil.rmtree(tmp_path / "vae")
    (tmp_path / "Wan2.1_VAE.pth").unlink()
    with pytest.raises(CheckpointError, match=r"no vae/ with a fitting config.json, and no Wan2\.1_VAE\.pth"):
        load_vae(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load_vae(tmp_path / "nowhere.pth")


@pytest.mark.parametrize("dtype", DTYPES)
def test_wan_text_encoder_file(text_encoder, tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save(native_t5(text_encoder, torch.float32), tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    for place in (tmp_path, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth"):
        loaded = load_text_encoder(place, dtype)
        assert_weights(loaded, text_encoder.state_dict())
        assert loaded.encoder.embed_tokens.weight is loaded.shared.weight
        wide = {name.split(".")[-2] for name, tensor in loaded.state_dict().items() if tensor.dtype != dtype}
        assert wide == ({"wo"} if dtype == torch.float16 else set())


def test_wan_text_encoder_computes_the_same(text_encoder, tmp_path: Path) -> None:
    torch.save(native_t5(text_encoder, torch.float32), tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    loaded = load_text_encoder(tmp_path, torch.float32)
    ids, mask = torch.tensor([[5, 9, 1, 0]]), torch.tensor([[1, 1, 1, 0]])
    with torch.no_grad():
        expected = text_encoder(ids, attention_mask=mask).last_hidden_state
        assert torch.equal(loaded(ids, attention_mask=mask).last_hidden_state, expected)
    assert load_text_encoder(tmp_path, None).dtype == torch.float32


def test_text_encoder_folder(text_encoder, tmp_path: Path) -> None:
    folder = tmp_path / "text_encoder"
    text_encoder.save_pretrained(folder, max_shard_size="20KB")
    assert_weights(load_text_encoder(tmp_path, torch.float32), text_encoder.state_dict())
    text_encoder.save_pretrained(tmp_path / "whole")
    file = tmp_path / "whole" / "model.safetensors"
    state = load_file(file)
    embedding = state.pop("shared.weight")
    for names in (["encoder.embed_tokens.weight"], ["encoder.embed_tokens.weight", "shared.weight"]):
        save_file(state | {name: embedding.clone() for name in names}, file)
        loaded = load_text_encoder(tmp_path / "whole", torch.float32)
        assert_weights(loaded, text_encoder.state_dict())
        assert loaded.encoder.embed_tokens.weight is loaded.shared.weight
    save_file(state, file)
    with pytest.raises(CheckpointError, match=r"1 missing: encoder\.embed_tokens\.weight"):
        load_text_encoder(tmp_path / "whole")


def test_text_encoder_is_strict(text_encoder, tmp_path: Path) -> None:
    state = native_t5(text_encoder)
    state["blocks.1.ffn.fc9.weight"] = state.pop("blocks.1.ffn.fc2.weight")
    torch.save(state, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    with pytest.raises(
        CheckpointError, match=r"missing: blocks\.1\.ffn\.fc2\.weight; 1 unexpected: blocks\.1\.ffn\.fc9"
    ):
        load_text_encoder(tmp_path)
    torch.save({"x": torch.zeros(1)}, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    with pytest.raises(CheckpointError, match=r"not the weights of Wan2.1's UMT5"):
        load_text_encoder(tmp_path)


def test_byte_tokenizer(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("a red circle").input_ids == ByT5Tokenizer()("a red circle").input_ids


def test_sentencepiece_tokenizer(tmp_path: Path) -> None:
    """A folder such as google/umt5-xxl/: spiece.model and a tokenizer_config.json that names T5Tokenizer."""
    (tmp_path / "text").write_text("\n".join(f"a red circle moves {i} steps to the left of a box" for i in range(50)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    folder = tmp_path / "google" / "umt5-xxl"
    folder.mkdir(parents=True)
    (tmp_path / "spiece.model").rename(folder / "spiece.model")
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "eos_token": "</s>", "pad_token": "<pad>", '
        '"unk_token": "<unk>", "model_max_length": 512}'
    )
    tokenizer = load_tokenizer(folder)
    encoded = tokenizer("a red circle", padding="max_length", max_length=24, truncation=True)
    assert tokenizer.decode(encoded.input_ids, skip_special_tokens=True) == "a red circle"
    assert encoded.input_ids[sum(encoded.attention_mask) - 1] == 1
    assert set(encoded.input_ids[sum(encoded.attention_mask) :]) == {0}


def test_missing_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder: give the local tokenizer folder"):
        load_tokenizer("google/umt5-xxl")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="the tokenizer cannot be read") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
