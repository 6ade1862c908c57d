"""``ospnext train-text``: labels are what captions say, a small encoder learns to read, the command runs for real."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from saved_states import read_state
from torch import nn
from transformers import ByT5Tokenizer

from ospnext.checkpoints.load import load_text_encoder
from ospnext.cli import main
from ospnext.models.text import small_text_encoder
from ospnext.shapes.captions import caption
from ospnext.train.clips import sample_scenes
from ospnext.train.loop import fit
from ospnext.train.text import UNSAID, VOCABULARIES, TextTrainConfig, loop_settings, make_captions, reading_losses

CPU = torch.device("cpu")
TINY = ["device=cpu", "text_dim=32", "num_captions=60", "batch_size=8", "training_iteration=6", "log_interval=2"]


def test_labels_are_what_the_captions_say():
    config = TextTrainConfig(num_captions=300, seed=4)
    ids, labels = make_captions(ByT5Tokenizer(), config, CPU)
    texts = ByT5Tokenizer().batch_decode(ids, skip_special_tokens=True)
    rng, scenes = np.random.default_rng(4), sample_scenes("simple", 300, 4)
    assert texts == [caption(scene, rng) for scene in scenes]
    for i, (text, scene) in enumerate(zip(texts, scenes, strict=True)):
        words = text.lower().rstrip(".").replace(",", "").split()
        for name in ("shape", "colour", "motion"):
            assert VOCABULARIES[name][labels[name][i]] == getattr(scene.things[0], name)
        said = {"small": "small", "little": "small", "large": "large", "big": "large"}
        sizes = [said[word] for word in words if word in said]
        assert ([VOCABULARIES["size"][labels["size"][i]]] if labels["size"][i] != UNSAID else []) == sizes
        mentioned = "background" in words or "backdrop" in words
        assert (labels["background"][i] != UNSAID) == mentioned
        if mentioned:
            assert VOCABULARIES["background"][labels["background"][i]] == scene.background.colour
    assert all((label == UNSAID).any() == (name in ("size", "background")) for name, label in labels.items())


def test_captions_repeat_with_their_seed():
    one, same, other = (
        make_captions(ByT5Tokenizer(), TextTrainConfig(num_captions=20, seed=seed), CPU)[0] for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert one.shape != other.shape or not torch.equal(one, other)


def make_reader(width: int = 32) -> tuple[nn.Module, nn.ModuleDict]:
    torch.manual_seed(0)
    encoder = small_text_encoder(width, len(ByT5Tokenizer()))
    return encoder, nn.ModuleDict({name: nn.Linear(width, len(words)) for name, words in VOCABULARIES.items()})


def test_the_loss_sums_cross_entropies_of_what_is_said():
    encoder, heads = make_reader()
    ids, labels = make_captions(ByT5Tokenizer(), TextTrainConfig(num_captions=40), CPU)
    got = reading_losses(encoder, heads, ids, labels)
    mask = (ids != 0)[..., None].float()
    hidden = encoder(ids, attention_mask=mask[..., 0]).last_hidden_state
    mean = (hidden * mask).sum(1) / mask.sum(1)
    expected = sum(
        nn.functional.cross_entropy(head(mean), labels[name], ignore_index=UNSAID) for name, head in heads.items()
    )
    torch.testing.assert_close(got["loss"], expected, rtol=1e-5, atol=1e-5)
    for name, head in heads.items():
        said = labels[name] != UNSAID
        right = (head(mean).argmax(-1) == labels[name])[said].float().mean()
        assert got[name].item() == pytest.approx(right.item())


def test_padding_changes_nothing():
    encoder, heads = make_reader()
    ids, labels = make_captions(ByT5Tokenizer(), TextTrainConfig(num_captions=10), CPU)
    wide = nn.functional.pad(ids, (0, 20))
    one, other = (reading_losses(encoder, heads, some, labels)["loss"] for some in (ids, wide))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_nobody_says_costs_nothing():
    encoder, heads = make_reader()
    ids, labels = make_captions(ByT5Tokenizer(), TextTrainConfig(num_captions=10), CPU)
    labels["size"] = torch.full_like(labels["size"], UNSAID)
    got = reading_losses(encoder, heads, ids, labels)
    got["loss"].backward()
    assert got["loss"].isfinite()
    assert got["size"] == 0
    assert not heads["size"].weight.grad.any()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


def test_a_small_encoder_learns_to_read(tmp_path):
    config = TextTrainConfig(output_dir=str(tmp_path), num_captions=40, training_iteration=110, log_interval=35)
    encoder, heads = make_reader()
    ids, labels = make_captions(ByT5Tokenizer(), config, CPU)

    def losses(generator: torch.Generator, step: int):
        chosen = torch.randint(len(ids), (16,), generator=generator)
        return reading_losses(encoder, heads, ids[chosen], {name: label[chosen] for name, label in labels.items()})

    fit({"text_encoder": encoder, "heads": heads}, losses, loop_settings(config), CPU)
    log = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert log[-1]["colour"] > 2 * log[0]["colour"]


def test_the_command_in_a_process_of_its_own(tmp_path):
    words = [*TINY, f"output_dir={tmp_path / 'run'}"]
    done = subprocess.run([sys.executable, "-m", "ospnext", "train-text", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "read right: shape " in done.stdout
    assert f"saved {tmp_path / 'run/text_encoder'}" in done.stdout
    encoder = load_text_encoder(tmp_path / "run/text_encoder", dtype=None)
    assert encoder.config.d_model == 32
    average = read_state(tmp_path / "run/iter_000000006", "average.text_encoder.")
    assert all(torch.equal(p, average[name]) for name, p in encoder.named_parameters())


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return read_state(folder / "iter_000000006", "live.text_encoder.")


def test_the_command_in_pieces(tmp_path, capsys):
    assert main(["train-text", *TINY, f"output_dir={tmp_path / 'whole'}"]) == 0
    assert main(["train-text", *TINY, f"output_dir={tmp_path / 'pieces'}", "time_budget_minutes=1e-6"]) == 0
    assert "stopped at step 0 of 6" in capsys.readouterr().out
    assert main(["train-text", *TINY, f"output_dir={tmp_path / 'pieces'}"]) == 0
    one, other = saved(tmp_path / "whole"), saved(tmp_path / "pieces")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("text_dim=100", "text_dim is 100"),
        ("num_captions=5", "num_captions is 5"),
        ("lr=0", "lr is 0"),
        ("batchsize=8", "did you mean 'batch_size'?"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, word, said):
    assert main(["train-text", *TINY, f"output_dir={tmp_path / 'run'}", word]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_another_width_is_another_run(tmp_path, capsys):
    assert main(["train-text", *TINY, f"output_dir={tmp_path}"]) == 0
    capsys.readouterr()
    assert main(["train-text", *TINY, f"output_dir={tmp_path}", "text_dim=64"]) == 2
    assert "iter_000000006 is the state of another run" in capsys.readouterr().err
