"""What a run writes at its end and ``ospnext export`` at any time: whole or not at all, and over nothing it reads."""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_sft import words
from transformers import UMT5EncoderModel

from ospnext.checkpoints.lora_files import Adapter, Pair, write_adapter
from ospnext.cli import main
from ospnext.config import load_config
from ospnext.config_keys import key_rules
from ospnext.train.export import export_pipeline
from ospnext.train.settings import TrainConfig


def train(folder: Path, vae: Path | None, **settings: object) -> int:
    """A run of one step, if nothing else is said."""
    return main(["train", *words(folder, vae, **({"training_iteration": 1, "trackers": "[]"} | settings))])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Files that grow beyond it cannot be written, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_export_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path, vae_folder, capsys):
    assert train(tmp_path / "run", vae_folder) == 0
    command = ["export", str(tmp_path / "run/iter_000000001"), str(tmp_path / "out/pipeline")]
    capsys.readouterr()
    with largest_file(30_000):
        assert main(command) == 2
    assert capsys.readouterr().err == f"ospnext: error: {tmp_path}/out/pipeline: {os.strerror(errno.EFBIG)}\n"
    assert names(tmp_path / "out") == []
    assert main(command) == 0


def test_an_adapter_that_cannot_be_written_is_one_line_too(tmp_path):
    adapter = Adapter({"blocks.0.self_attn.q": Pair(torch.zeros(4, 2000), torch.zeros(8, 4), 4.0)})
    for to in ("peft", "diffusers"):
        with largest_file(30_000), pytest.raises(OSError, match=os.strerror(errno.EFBIG)) as raised:
            write_adapter(adapter, tmp_path / "out", to)
        assert str(raised.value.filename).startswith(str(tmp_path / "out"))
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_interrupted_export_leaves_nothing(tmp_path, vae_folder, monkeypatch):
    assert train(tmp_path / "run", vae_folder) == 0
    state, to = tmp_path / "run/iter_000000001", tmp_path / "out/pipeline"
    save, seen = UMT5EncoderModel.save_pretrained, []

    def interrupted(encoder, folder, **more):
        save(encoder, folder, **more)
        seen.extend(path.name for path in Path(folder).parent.iterdir())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(UMT5EncoderModel, "save_pretrained", interrupted)
        assert main(["export", str(state), str(to)]) == 130
    assert {"transformer", "vae", "text_encoder"} & set(seen), "it had begun"
    assert names(to.parent) == []
    assert main(["export", str(state), str(to)]) == 0


def test_a_pipeline_is_replaced_as_a_whole_or_stays(tmp_path, vae_folder):
    run, pipeline = tmp_path / "run", tmp_path / "run/pipeline"
    weights = ["text_encoder/model.safetensors", "transformer/diffusion_pytorch_model.safetensors"]

    def files() -> dict[str, bytes]:
        return {str(path.relative_to(pipeline)): path.read_bytes() for path in pipeline.rglob("*") if path.is_file()}

    assert train(run, vae_folder) == 0
    before = files()
    config = load_config(TrainConfig, run / "config.yaml", [], key_rules("train"))
    sizes = sorted(len(before[name]) for name in weights)
    assert sizes[0] < sizes[1]
    with largest_file(sizes[1] - 1), pytest.raises(OSError, match=os.strerror(errno.EFBIG)):  # one of them is written
        export_pipeline(config, run / "iter_000000001", pipeline)
    assert files() == before
    assert train(run, vae_folder, training_iteration=2) == 0
    after = files()
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in weights)
    assert not any(b".tmp" in content for name, content in after.items() if name.endswith(".json"))
    assert not [name for name in names(run) if name.startswith(".")]


def test_a_pipeline_replaces_nothing_else(tmp_path, vae_folder, capsys):
    (tmp_path / "run/pipeline/videos").mkdir(parents=True)
    assert train(tmp_path / "run", vae_folder) == 2
    assert f"{tmp_path}/run/pipeline: holds videos, no part of the pipeline" in capsys.readouterr().err
    assert names(tmp_path / "run") == ["pipeline"]


def test_a_linked_pipeline_is_written_where_the_link_leads(tmp_path, vae_folder):
    (tmp_path / "run").mkdir()
    (tmp_path / "disk").mkdir()
    (tmp_path / "run/pipeline").symlink_to(tmp_path / "disk")
    assert train(tmp_path / "run", vae_folder) == 0
    assert (tmp_path / "run/pipeline").is_symlink()
    assert (tmp_path / "disk/model_index.json").is_file()


def test_a_link_that_leads_nowhere_is_named(tmp_path, vae_folder, capsys):
    assert train(tmp_path / "run", vae_folder) == 0
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run/iter_000000001"), str(link)]) == 2
    assert f"{link} is a link to {tmp_path}/nowhere, where nothing is" in capsys.readouterr().err


def test_a_run_does_not_overwrite_what_it_reads(tmp_path, vae_folder, capsys):
    run, link = tmp_path / "run", tmp_path / "link"
    assert train(run, vae_folder) == 0
    link.symlink_to(run / "pipeline/vae")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    frozen = {"train_text_encoder": "false"}
    text = {"text_encoder_config__checkpoint_path": vae_folder}  # not read before it is refused
    for key, path, more in (
        ("model", run / "pipeline", {}),
        ("vae_config.vae_path", link, {}),
        ("text_encoder_config.checkpoint_path", run / "pipeline/text_encoder", frozen),
        ("model_config.pretrained_model_dir_or_checkpoint", run / "pipeline/transformer", {}),
        ("distillation_config.teacher", run / "pipeline", frozen | text | {"distillation_config__weight": 0.5}),
    ):
        capsys.readouterr()
        assert train(run, None if "vae" in key else vae_folder, **more, **{key.replace(".", "__"): path}) == 2
        said = capsys.readouterr().err
        assert f"{key}: {path} is in {run}/pipeline, which this run overwrites" in said
        assert said.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert train(tmp_path / "other", vae_folder, model=run / "pipeline") == 0
