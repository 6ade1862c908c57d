"""Two settings side by side: paired intervals, likeness of videos, and the command from end to end."""

import json
import math

import numpy as np
import pytest
import torch

from ospnext.checkpoints.lora_files import Adapter, Pair, write_adapter
from ospnext.cli import main
from ospnext.evaluate.paired import mean_of, paired_difference, psnr, ssim
from ospnext.shapes.share import share


def pairs(both: int, only_first: int, only_second: int, neither: int) -> tuple[list[bool], list[bool]]:
    rows = [(True, True)] * both + [(True, False)] * only_first + [(False, True)] * only_second
    return tuple(map(list, zip(*rows + [(False, False)] * neither, strict=True)))


def test_a_difference_by_hand():
    found = paired_difference(*pairs(80, 10, 5, 5))
    assert found[:6] == (100, 90, 85, 10, 5, pytest.approx(-0.05))
    first, second = share([True] * 90 + [False] * 10), share([True] * 85 + [False] * 15)
    phi = (80 * 5 - 10 * 5 - 50) / math.sqrt(90 * 10 * 85 * 15)
    down, up = 0.85 - second.low, first.high - 0.90
    assert found.low == pytest.approx(-0.05 - math.sqrt(down**2 - 2 * phi * down * up + up**2))
    assert found.low < -0.05 < found.high


def test_exchanging_the_settings_mirrors_the_interval():
    one, other = paired_difference(*pairs(50, 7, 3, 20)), paired_difference(*pairs(50, 3, 7, 20))
    assert (one.difference, one.low, one.high) == pytest.approx((-other.difference, -other.high, -other.low))


@pytest.mark.parametrize("marks", [pairs(40, 0, 0, 10), pairs(30, 0, 0, 0), pairs(0, 0, 0, 30)])
def test_settings_that_agree_differ_by_nothing_with_room_on_both_sides(marks):
    found = paired_difference(*marks)
    assert found.low < 0 == found.difference < found.high
    assert found.low == pytest.approx(-found.high)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng, held, runs = np.random.default_rng(0), 0, 600
    chances = np.array([0.86, 0.05, 0.03, 0.06])  # both, only the first, only the second, neither
    for _ in range(runs):
        found = paired_difference(*pairs(*rng.multinomial(300, chances)))
        held += found.low <= -0.02 <= found.high
    assert 0.93 <= held / runs <= 0.98  # 0.95 within what 600 runs say


def test_pairs_say_more_than_two_shares():
    narrow, wide = paired_difference(*pairs(850, 20, 10, 120)), paired_difference(*pairs(757, 113, 103, 27))
    assert narrow.difference == wide.difference == pytest.approx(-0.01)
    assert narrow.high - narrow.low < 0.6 * (wide.high - wide.low)


def test_marks_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="3 and 2 marks"):
        paired_difference([True] * 3, [True] * 2)
    with pytest.raises(ValueError, match="at least one"):
        paired_difference([], [])


def video(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (2, 16, 14, 3), dtype=np.uint8)


def test_likeness_by_hand():
    one, other = video(0), video(1)
    assert psnr(one, one) == math.inf
    assert ssim(one, one) == pytest.approx(1)
    grey = np.full((2, 16, 14, 3), 100, np.uint8)
    assert psnr(grey, grey + 10) == pytest.approx(20 * math.log10(255 / 10), rel=1e-6)
    c1 = (0.01 * 255) ** 2  # without contrast only the means count
    assert ssim(grey, grey + 10) == pytest.approx((2 * 100 * 110 + c1) / (100**2 + 110**2 + c1), rel=1e-4)
    line = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    window = np.outer(line, line) / line.sum() ** 2
    values, c2 = [], (0.03 * 255) ** 2
    for t, c, y, x in np.ndindex(2, 3, 6, 4):
        a, b = (v[t, y : y + 11, x : x + 11, c].astype(float) for v in (one, other))
        ma, mb = (window * a).sum(), (window * b).sum()
        va, vb = (window * a * a).sum() - ma**2, (window * b * b).sum() - mb**2
        cov = (window * a * b).sum() - ma * mb
        values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    assert ssim(one, other) == pytest.approx(np.mean(values), abs=1e-5)


def test_means_take_equal_videos_as_the_best_of_the_others():
    mean = mean_of([30.0, 32.0, math.inf])
    assert mean.value == pytest.approx(94 / 3)
    assert mean.low < mean.value < mean.high
    assert mean_of([math.inf, math.inf]).value == math.inf


def test_the_command_compares_a_model_with_itself_and_with_other_settings(model, tmp_path, capsys):
    words = [f"model={model}", "num_prompts=5", "batch_size=2", "device=cpu", "weight_dtype=fp32"]

    def compare(name: str, *other: str) -> dict:
        assert main(["compare-shapes", *words, f"output_dir={tmp_path / name}", *other]) == 0
        assert "second minus first" in capsys.readouterr().out
        return json.loads((tmp_path / name / "compare.json").read_text())

    same = compare("same")
    assert same["equal"] == same["score"]["asked"] == len(same["prompts"]) == 5
    assert same["score"]["difference"] == 0
    assert same["ssim"]["value"] == pytest.approx(1)
    pairs = {f"blocks.{i}.self_attn.v": Pair(torch.randn(2, 32), torch.randn(32, 2), 2.0) for i in range(2)}
    lora = write_adapter(Adapter(pairs), tmp_path / "lora")
    for name, other in (
        ("steps", "other.num_inference_steps=1"),
        ("lora", f"other.lora_path={lora}"),
        ("quant", "other.quant=hif8"),
        ("layouts", "other.skiparse_model_type=uniform"),
    ):
        changed = compare(name, other)
        assert changed["equal"] == 0
        assert 0 < changed["ssim"]["value"] < 1
        assert changed["psnr"]["low"] <= changed["psnr"]["value"] < 100


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "other.model=shapes",
            "makes 5 frames of 64 x 64, but shapes makes 33 frames of 128 x 128: name models of one",
        ),
        ("other.quant_scaling=token", "quant_scaling is 'token', but nothing runs in HiF8: give quant=hif8"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_made(model, tmp_path, capsys, word, said):
    assert main(["compare-shapes", f"model={model}", word, f"output_dir={tmp_path / 'out'}", "device=cpu"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "out").iterdir())
