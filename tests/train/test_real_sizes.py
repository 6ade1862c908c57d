"""Every recipe, and the older system's own file, settled at real sizes on eight processes: no weight is read.

The weights are files with a true header and a hole behind it.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from ospnext.config import load_config, refuse_placeholders
from ospnext.config_keys import key_rules
from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.parallel.launch import Launch
from ospnext.prepare.plan_recipe import SPARSE, UMT5_XXL, WAN
from ospnext.train.distil import check_teacher
from ospnext.train.job import settle
from ospnext.train.rl.parts import settle as settle_rl
from ospnext.train.rl.settings import RLConfig
from ospnext.train.settings import TrainConfig

ROOT = Path(__file__).parents[2]
RECIPES = [*sorted((ROOT / "configs/train").glob("*.yaml")), ROOT / "tests/data/seed_train.yaml"]


def write_hollow(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A safetensors file of bfloat16 tensors whose values take no room."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both transformers, sparse and dense, Wan2.1's autoencoder, UMT5-XXL and a tokenizer."""
    folder = tmp_path_factory.mktemp("real")
    for size, settings in WAN.items():
        for name, sparse in (("sparse", SPARSE), ("dense", {})):
            with torch.device("meta"):
                model = OSPNextTransformer3DModel(**settings, **sparse)
            path = folder / f"{name}_{size}"
            path.mkdir()
            raw = dict(model.config) if sparse else {"model_type": "t2v", **settings}
            raw |= {"_class_name": "OSPNextModel" if sparse else "WanModel"}
            (path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k != "_name_or_path"}))
            write_hollow(path / "diffusion_pytorch_model.safetensors", dict(model.named_parameters()))
    with torch.device("meta"):
        vae, encoder = AutoencoderKLWan(), UMT5EncoderModel(UMT5Config(**UMT5_XXL, feed_forward_proj="gated-gelu"))
    for part, module, file in (("vae", vae, "diffusion_pytorch_model"), ("text_encoder", encoder, "model")):
        (folder / part).mkdir()
        module.save_config(folder / part) if part == "vae" else module.config.save_pretrained(folder / part)
        names = {name: p for name, p in module.named_parameters() if name != "encoder.embed_tokens.weight"}
        write_hollow(folder / part / f"{file}.safetensors", names)
    ByT5Tokenizer().save_pretrained(folder / "tokenizer")
    return folder


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_settled_on_eight_processes(recipe: Path, folder: Path, tmp_path: Path) -> None:
    size = "1.3B" if "1_3b" in recipe.stem else "14B"
    kind = "dense" if "from_wan" in recipe.stem else "sparse"
    paths = {
        "model_config.pretrained_model_dir_or_checkpoint": folder / f"{kind}_{size}",
        "vae_config.vae_path": folder / "vae",
        "text_encoder_config.checkpoint_path": folder / "text_encoder",
        "text_encoder_config.text_tokenizer_path": folder / "tokenizer",
        "data_config.dataset_name": "t2v_random",
        "data_config.dataset_config.metafile_or_dir_path": "null",
        "data_config.num_workers": 0,
        "output_dir": tmp_path / "run",
        "device": "cpu",
    }
    if recipe.stem == "seed_train":
        paths["data_config.dataset_config.text_tokenizer_path"] = paths.pop("text_encoder_config.text_tokenizer_path")
    words = [f"{key}={value}" for key, value in paths.items()]
    config = load_config(TrainConfig, str(recipe), words, key_rules("train"))
    refuse_placeholders(config)
    job = settle(config, Launch(5, 8, 5))
    check_teacher(config, job)
    assert tuple(job.sizes.sizes) == (2, 1, 4, 1)
    assert tuple(job.sizes.copies) == (1, 8)
    assert job.latents == (16, 21, 90, 160)
    assert job.transformer["num_layers"] == WAN[size]["num_layers"]
    assert job.transformer["skiparse_model_type"] == "dual_end"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", [ROOT / "configs/rl/osp_14b.yaml", ROOT / "tests/data/seed_rl.yaml"], ids=str)
def test_reinforcement_learning_is_settled_on_sixteen_processes(
    recipe: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ospnext.generate.memory.free_memory", lambda device: 80 * 2**30)  # of an accelerator
    (tmp_path / "prompts.txt").write_text("A red fox.\nTwo boats at sea.\n")
    paths = {
        "model_config.pretrained_model_dir_or_checkpoint": folder / "sparse_14B",
        "vae_config.vae_path": folder / "vae",
        "text_encoder_config.checkpoint_path": folder / "text_encoder",
        "text_encoder_config.text_tokenizer_path": folder / "tokenizer",
        "rl_config.prompt_file": tmp_path / "prompts.txt",
        "rl_config.eval_prompt_file": tmp_path / "prompts.txt",
        "rl_config.reward_fn": "{motion: 1.0}",
        "reward_config.options": "{}",
        "output_dir": tmp_path / "run",
        "device": "cpu",
    }
    if recipe.stem == "seed_rl":
        paths["data_config.dataset_config.text_tokenizer_path"] = folder / "tokenizer"
    config = load_config(RLConfig, str(recipe), [f"{key}={value}" for key, value in paths.items()], key_rules("rl"))
    refuse_placeholders(config)
    job = settle_rl(config, Launch(5, 16, 5))
    assert tuple(job.plan.sizes.sizes) == (4, 1, 4, 1)
    assert tuple(job.plan.sizes.copies) == (1, 16)
    assert job.plan.sampling.shift == 7.0
    assert job.plan.dtypes.transformer == torch.bfloat16
    assert (job.config.random_steps, job.config.num_inference_steps) == (4 if "configs" in str(recipe) else 10, 25)
