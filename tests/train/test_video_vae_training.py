"""``ospnext train-vae``: the losses are their formulas, a tiny VAE learns, resumes exactly, and comes out usable."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from saved_states import read_state

from ospnext.checkpoints import memory
from ospnext.checkpoints.load import load_vae
from ospnext.cli import main
from ospnext.config import ConfigError, load_config
from ospnext.models.video_vae import decode_whole, encode_whole
from ospnext.train.clips import ClipSize, render_pool, sample_scenes, to_video
from ospnext.train.optim import adamw
from ospnext.train.video_vae import (
    VAEArchitecture,
    VAETrainConfig,
    channels_last,
    edges,
    finish,
    reconstruction_losses,
)

CPU = torch.device("cpu")
TINY = [
    "device=cpu",
    "autocast_dtype=fp32",
    "architecture.base_dim=8",
    "architecture.dim_mult=[1, 1, 1]",
    "architecture.z_dim=4",
    "num_clips=6",
    "num_frames=5",
    "height=32",
    "width=48",
    "crop=16",
    "crop_batch_size=4",
    "batch_size=2",
    "training_iteration=6",
    "warmup_steps=2",
    "save_interval=4",
    "log_interval=2",
]


def train(folder: Path, *words: str) -> int:
    return main(["train-vae", *TINY, f"output_dir={folder}", *words])


def test_losses_are_their_formulas(tiny_vae):
    video = torch.rand(2, 3, 5, 16, 16) * 2 - 1
    moments = encode_whole(tiny_vae, video)
    mean, log_variance = moments.detach().chunk(2, dim=1)
    noise = torch.randn(mean.shape)
    got = reconstruction_losses(tiny_vae, video, moments, noise, edge_weight=3.0, kl_weight=0.5)
    error = (decode_whole(tiny_vae, mean + noise * (log_variance / 2).exp()) - video).detach()
    weight = (1 + 3.0 * edges(video)) / (1 + 3.0 * edges(video)).mean()
    normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(got["kl"], kl, check_dtype=False)
    torch.testing.assert_close(got["l1"], (weight * error.abs()).mean())
    torch.testing.assert_close(got["mse"], error.square().mean())
    expected = (weight * error.abs()).mean() + 2 * (weight * error.square()).mean() + 0.5 * kl
    torch.testing.assert_close(got["loss"], expected)


def test_edges_are_near_a_jump_and_nowhere_else():
    video = torch.full((1, 3, 1, 12, 12), -1.0)
    video[..., 6:] = 0.5  # a jump between columns 5 and 6
    found = edges(video)[0, 0, 0]
    assert found.shape == (12, 12)
    assert found.any(0).nonzero().flatten().tolist() == [3, 4, 5, 6, 7]
    assert not edges(torch.zeros(1, 3, 2, 12, 12)).any()


def test_without_edges_the_weight_is_one(tiny_vae):
    video = torch.zeros(1, 3, 5, 16, 16)
    moments = encode_whole(tiny_vae, video)
    noise = torch.zeros_like(moments[:, :4])
    one, other = (reconstruction_losses(tiny_vae, video, moments, noise, edge_weight=w) for w in (0.0, 9.0))
    torch.testing.assert_close(one["loss"], other["loss"])


def test_reconstruction_improves_within_a_few_steps(tiny_vae):
    scenes = sample_scenes("simple", 4, seed=0)
    video = to_video(render_pool(scenes, ClipSize(5, 32, 32), CPU))
    optimiser = adamw({"vae": tiny_vae}, 3e-3, (0.9, 0.99), 1e-8, 0.0)
    history = []
    for _ in range(25):
        moments = encode_whole(tiny_vae, video)
        losses = reconstruction_losses(tiny_vae, video, moments, torch.zeros_like(moments[:, :4]))
        losses["loss"].backward()
        optimiser.step()
        optimiser.zero_grad()
        history.append(losses["mse"].item())
    assert history[-1] < 0.5 * history[0]


def test_channels_last_changes_memory_only(tiny_vae):
    video = torch.rand(1, 3, 5, 16, 16)
    before = encode_whole(tiny_vae, video)
    assert channels_last(tiny_vae) is tiny_vae
    assert tiny_vae.encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(encode_whole(tiny_vae, video), before, atol=1e-5, rtol=1e-4)


def test_the_end_normalises_latents(tiny_vae, tmp_path, capsys):
    pool = render_pool(sample_scenes("simple", 10, seed=0), ClipSize(5, 32, 32), CPU)
    finish(tiny_vae, pool, tmp_path)
    vae = load_vae(tmp_path / "vae")
    mean = encode_whole(vae, to_video(pool)).chunk(2, dim=1)[0].detach()
    scaled = (mean - torch.tensor(vae.config.latents_mean).view(-1, 1, 1, 1)) / torch.tensor(
        vae.config.latents_std
    ).view(-1, 1, 1, 1)
    torch.testing.assert_close(scaled.mean((0, 2, 3, 4)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(scaled.std((0, 2, 3, 4)), torch.ones(4), atol=1e-3, rtol=0)
    said = capsys.readouterr().out
    error = (decode_whole(vae, mean).detach().clamp(-1, 1) - to_video(pool)).square().mean((1, 2, 3, 4))
    assert f"PSNR {(10 * torch.log10(4 / error)).mean():.2f} dB on 10 clips" in said


def test_the_command_resumes_exactly(tmp_path, capsys):
    assert train(tmp_path / "whole") == 0
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == [
        "iter_000000004",
        "iter_000000006",
        "train_log.jsonl",
        "vae",
    ]
    assert train(tmp_path / "pieces", "time_budget_minutes=1e-6") == 0
    assert "stopped at step 0 of 6" in capsys.readouterr().out
    whole, pieces = tmp_path / "whole/iter_000000004", tmp_path / "pieces/iter_000000004"
    shutil.copytree(whole, pieces)  # as if it had been killed after this step
    assert train(tmp_path / "pieces") == 0
    assert f"resumed from {pieces}: step 4 of 6" in capsys.readouterr().out
    one, other = (read_state(tmp_path / run / "iter_000000006", "") for run in ("whole", "pieces"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    configs = [json.loads((tmp_path / run / "vae/config.json").read_text()) for run in ("whole", "pieces")]
    assert configs[0] == configs[1]
    log = [json.loads(line) for line in (tmp_path / "pieces/train_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [6]  # what this folder itself has seen
    assert log[0].keys() >= {"loss", "l1", "mse", "kl"}


def test_an_unfinished_run_leaves_a_vae_that_loads(tmp_path):
    assert train(tmp_path / "run", "time_budget_minutes=1e-6") == 0
    vae = load_vae(tmp_path / "run/vae")
    assert (vae.config.scale_factor_spatial, vae.config.scale_factor_temporal) == (8, 4)
    assert decode_whole(vae, torch.zeros(1, 4, 2, 2, 2)).shape == (1, 3, 5, 16, 16)


def test_the_default_architecture_compresses_as_documented():
    architecture = VAEArchitecture()
    assert (architecture.space, architecture.time) == (8, 4)
    wide = VAEArchitecture(patch_size=1, dim_mult=(1, 2, 4, 4), temperal_downsample=(False, True, True))
    assert (wide.space, wide.time) == (8, 4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_frames=32", "num_frames is 32: this architecture needs 4k"),
        ("height=100", "height is 100: this architecture needs a multiple of 8"),
        ("crop=60", "crop is 60"),
        ("crop=256", "crop is 256, larger than a frame of 128 x 128"),
        ("architecture.temperal_downsample=[true]", "temperal_downsample has 1 entries for 3 levels"),
        ("world=small", "world is 'small'"),
        ("architecture.depth=3", "unknown key 'architecture.depth'"),
    ],
)
def test_bad_settings_are_named(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(VAETrainConfig, None, [override])


def test_a_pool_that_does_not_fit_in_memory_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**6)
    assert train(tmp_path / "run", "num_clips=1000") == 2
    error = capsys.readouterr().err
    assert "a pool of 1000 clips: needs" in error
    assert "use a smaller num_clips" in error


def test_bad_input_is_one_line_and_loses_nothing(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert train(tmp_path / "file") == 2
    assert "output_dir" in capsys.readouterr().err
    assert train(tmp_path / "run") == 0
    before = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert train(tmp_path / "run", "architecture.z_dim=8", "training_iteration=9") == 2
    error = capsys.readouterr().err
    assert "iter_000000006 is the state of another run" in error
    assert error.count("\n") == 1
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == before
