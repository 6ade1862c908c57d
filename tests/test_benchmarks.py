"""The benchmarks run on the CPU at tiny sizes, say what they promise to, and compare like with like."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import ByT5Tokenizer

from ospnext.generate.pipeline import OSPNextPipeline
from ospnext.generate.sampler import make_scheduler
from ospnext.models.text import small_text_encoder
from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.ops.layout import Grid, Layout
from ospnext.train.video_vae import VAEArchitecture

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = ("--model", "tiny", "--size", "tiny", "--device", "cpu")


def records(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a benchmark's module by name, as its scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        return import_module(name)

    return load


def test_steps_are_timed_side_by_side_and_drawn(tmp_path: Path, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--cases", "peer,full,skiparse,skiparse_masked", "--layers", "5")
    command = [sys.executable, str(BENCHMARKS / "dit_step.py"), *TINY, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = records(done.stdout)
    steps = {line["case"]: line for line in lines if line["benchmark"] == "dit_step"}
    assert list(steps) == ["peer", "full", "skiparse", "skiparse_masked"]
    for line in steps.values():
        assert line["finite"]
        assert (line["tokens"], line["layers"], line["layers_in_model"]) == (70, 5, 10)
        assert 0 < line["fastest"] <= line["ms"] <= line["slowest"]
        assert line["ms_all_layers"] == pytest.approx(2 * line["ms"], rel=1e-3)
        assert line["floor_ms"] == pytest.approx(line["floor_attention_ms"] + line["floor_linears_ms"], rel=1e-3)
        assert line["speedup"] == pytest.approx(steps["peer"]["ms"] / line["ms"], rel=1e-3)
        assert min(line["attention_ms"], line["linears_ms"], line["rest_ms"]) > 0
        assert any("attention" in name for name in line["attention_kernels"])
    assert steps["full"]["pflop"] == steps["peer"]["pflop"] > steps["skiparse"]["pflop"]
    masked = steps["skiparse_masked"]
    assert masked["pflop"] == steps["skiparse"]["pflop"], "padding is no work of the model"
    assert masked["padded_tokens"] == 2 * 8 * 8
    assert masked["error_to_skiparse"] < 1e-5, "padding and masking changes the cost, not the result"
    assert {line["op"] for line in lines if line["benchmark"] == "ceiling"} == {"Product", "SoftmaxAttention"}
    assert "| skiparse_masked |" in done.stdout.splitlines()[-1]

    (tmp_path / "step.jsonl").write_text(done.stdout)
    monkeypatch.setattr(sys, "argv", ["chart.py", str(tmp_path / "step.jsonl"), "--out", str(tmp_path / "step.png")])
    module("chart").main()
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_a_video_from_end_to_end(module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    end_to_end = module("end_to_end")
    ways = ("--steps", "2", "--total-steps", "10", "--decode", "tiled-fp32,auto-bf16")
    monkeypatch.setattr(sys, "argv", ["end_to_end.py", *TINY, *ways])
    end_to_end.main()
    tiled, whole = records(capsys.readouterr().out)
    assert (tiled["decoded"], whole["decoded"]) == ("tiled, float32", "whole, bfloat16")
    for line in (tiled, whole):
        assert line["finite"]
        assert line["decode_finite"]
        assert (line["start"], line["layers"], line["recompiled"]) == ("only", 10, 0)
        assert line["total_is"] == "extrapolated from 2 steps"
        assert line["step_s"] == pytest.approx(sum(line["steps_s"]) / 2, rel=1e-3)
        assert line["total_s"] == pytest.approx(line["text_s"] + 10 * line["step_s"] + line["decode_s"], rel=1e-3)
        assert line["decode_share"] == pytest.approx(line["decode_s"] / line["total_s"], rel=1e-3)


def test_operations_agree_with_float64(
    module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    ops = module("ops")
    monkeypatch.setattr(sys, "argv", ["ops.py", *TINY])
    lines = ops.run(ops.parse_arguments())
    assert lines == records(capsys.readouterr().out)
    assert len(lines) == 24
    for line in lines:
        # Three bits of mantissa: an error of a thirty-second at most, of its root mean square 2.7%.
        assert line["relative_error"] < (0.03 if "HiF8" in line["op"] else 1e-6), line["op"]
        assert bool(line["bytes"]) != bool(line["flops"])
        assert line["share"] == pytest.approx(line["ceiling_ms"] / line["ms"], rel=1e-3)


def test_blocks_are_trained(module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    dit_step = module("dit_step")
    arguments = ["dit_step.py", *TINY, "--cases", "peer,skiparse,skiparse_masked", "--train"]
    monkeypatch.setattr(sys, "argv", arguments)
    lines = dit_step.run(dit_step.parse_arguments())
    assert lines == records(capsys.readouterr().out)
    assert [line["layout"] for line in lines] == ["full", "token", "token"]
    assert all(line["finite"] and line["layers"] == 1 for line in lines)


def test_a_case_that_fails_is_reported_and_the_rest_goes_on(
    module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    dit_step = module("dit_step")
    timed = dit_step.step

    def step(case: str, *rest: Any) -> dict[str, Any]:
        if case == "peer":
            raise torch.OutOfMemoryError("out of memory\nand a long story")
        return timed(case, *rest)

    monkeypatch.setattr(dit_step, "step", step)
    monkeypatch.setattr(sys, "argv", ["dit_step.py", *TINY, "--cases", "peer,full"])
    peer, ours = dit_step.run(dit_step.parse_arguments())
    assert peer["error"] == "OutOfMemoryError: out of memory"
    assert ours["ms"] > 0
    assert ours["speedup"] is None


def on_two_processes(script: str, *options: str) -> list[dict[str, Any]]:
    """The lines of a benchmark of many devices."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*torchrun, str(BENCHMARKS / script), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return records(done.stdout)


def test_many_devices_are_timed_beside_one() -> None:
    one, sparse, guided = on_two_processes(
        "scaling.py", *TINY, "--layers", "5", "--meshes", "one,1x2x1,2x1x1", "--repeats", "2"
    )
    assert [line["mesh"] for line in (one, sparse, guided)] == ["one", "1x2x1", "2x1x1"]
    assert [line["collectives"] for line in (one, sparse, guided)] == [
        0,
        4 + 2 * 2 + 1,
        1,
    ]  # switches, two in each dense block, the output
    assert sparse["sent_mb"] > 0
    assert guided["sent_mb"] == pytest.approx(16 * 2 * 10 * 14 * 4 / 1e6, rel=1e-3), "one velocity, float32"
    assert max(sparse["error_to_one"], guided["error_to_one"]) < 1e-6
    for line in (sparse, guided):
        assert line["exposed_ms"] == pytest.approx(line["ms"] - line["without_exchanges_ms"], abs=0.01)
        assert line["speedup"] == pytest.approx(one["ms"] * line["passes"] / line["ms"], rel=1e-3)


@pytest.mark.long
def test_gradients_of_many_devices_are_held_to_one() -> None:
    one, *meshes = on_two_processes("scaling.py", *TINY, "--check-gradients")
    assert one["mesh"] == "one"
    assert [line["mesh"] for line in meshes] == ["1x1x2", "1x2x1"]
    for line in meshes:
        assert line["parameters"] == 285
        assert max(line["worst_error"], line["loss_error"]) < 1e-5


@pytest.mark.long
def test_what_travels_is_counted() -> None:
    ulysses, *switches, sparse, dense = on_two_processes("traffic.py", "--size", "tiny")
    assert (ulysses["collectives"], sparse["collectives"], dense["collectives"]) == (2, 0, 2)
    assert ulysses["of_ulysses"] == 1
    assert len(switches) == 4
    for line in switches:
        assert line["collectives"] == 1
        assert 0 < line["of_ulysses"] < 0.5
        assert line["of_shards"] <= 0.5 + 1 / 70


def test_fewer_layers_keep_the_share_of_dense_ones(module: Any) -> None:
    network = module("work").NETWORKS["14b"]
    assert network.depths() == [5, 10, 15, 20, 25, 30, 35, 40]
    assert [layout.value for layout in network.layouts(5)] == ["full", "token", "group", "token", "group"]
    for layers in network.depths():
        layouts = network.layouts(layers)
        assert len(layouts) == layers == 5 * layouts.count(Layout.FULL)
    with pytest.raises(ValueError, match="use one of 5, 10"):
        network.layouts(7)


def test_work_of_the_14b_model_at_720p(module: Any) -> None:
    work = module("work")
    grid = work.VIDEOS["720p"].grid
    assert (grid, grid.tokens) == (Grid(21, 45, 80), 75600)
    counted = work.work_of(work.NETWORKS["14b"], grid, (Layout.FULL,) * 40)
    n, dim, ffn, text = 75600, 5120, 13824, 512
    block = 2 * n * dim * (6 * dim + 2 * ffn) + 4 * text * dim * dim + 4 * n * dim * (n + text)
    outside = 4 * n * 64 * dim + 2 * text * dim * (4096 + dim)
    assert work.flops(counted) == 40 * block + outside


@pytest.mark.parametrize("grid", [Grid(2, 5, 7), Grid(1, 8, 4), Grid(3, 9, 10)], ids=str)
def test_padded_tokens_come_back_where_they_were(module: Any, grid: Grid) -> None:
    padded = module("padded")
    plan = padded.PaddedPlan(grid, (Layout.FULL, Layout.TOKEN, Layout.GROUP), 2, torch.device("cpu"))
    x = torch.randn(2, grid.tokens, 3)
    token = plan.scatter(x, Layout.TOKEN)
    group = plan.switch(token, Layout.TOKEN, Layout.GROUP)
    torch.testing.assert_close(group, plan.scatter(x, Layout.GROUP), rtol=0, atol=0)
    torch.testing.assert_close(plan.gather(group, Layout.GROUP), x, rtol=0, atol=0)
    for layout in (Layout.TOKEN, Layout.GROUP):
        ones = plan.scatter(torch.ones(grid.tokens, 1), layout).flatten()
        torch.testing.assert_close(ones.bool(), plan.mask[layout].flatten())
        assert set(plan.segments(layout)) == {plan.padded.tokens // 4}
    assert plan.padded == padded.padded_grid(grid, 2)
    assert F.pad(torch.ones(grid), (0, 0)).sum() == plan.mask[Layout.TOKEN].sum()


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64>>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention)", "attention"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNT", "linears"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "linears"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>", "linears"),
        ("triton_red_fused__scaled_dot_product_cudnn_attention_add_mul_3", "rest"),
        ("triton_poi_fused_addmm_gelu_2", "rest"),
        ("void at::native::vectorized_gather_kernel<16, long>", "rest"),
        ("Memcpy DtoD (Device -> Device)", "rest"),
    ],
)
def test_kernels_are_told_apart_by_name(module: Any, kernel: str, kind: str) -> None:
    assert module("measure").kind_of(kernel) == kind


def save_pipeline(folder: Path) -> None:
    """A tiny random model."""
    torch.manual_seed(0)
    sizes = {"dim": 32, "ffn_dim": 64, "freq_dim": 16, "text_dim": 32, "text_len": 128, "num_heads": 2, "num_layers": 4}
    transformer = OSPNextTransformer3DModel(**sizes)
    torch.nn.init.normal_(transformer.head.head.weight, std=0.1)  # else it would draw nothing
    OSPNextPipeline(
        transformer,
        VAEArchitecture(base_dim=8, dim_mult=(1, 1, 1)).build(),
        small_text_encoder(32, len(ByT5Tokenizer())),
        ByT5Tokenizer(),
        make_scheduler("euler", 3.0),
        negative_prompt="",
        defaults={"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 3.0},
    ).save_pretrained(folder)


def small_training() -> list[str]:
    """Words that make a training recipe of the shapes world tiny."""
    clip, data = "data_config.dataset_config", {"sample_height": 64, "sample_width": 64, "sample_num_frames": 5}
    changed = [f"{clip}.{key}={value}" for key, value in (data | {"num_clips": 4}).items()]
    changed += ["data_config.batch_size=2", "model_config.num_full_blocks=0", "weight_dtype=fp32"]
    return [word for setting in changed for word in ("--set", setting)]


def test_dense_becomes_sparse_in_pieces(tmp_path: Path) -> None:
    save_pipeline(tmp_path / "start")
    words = ["--out", str(tmp_path / "out"), "--model", str(tmp_path / "start"), "--device", "cpu"]
    words += ["--videos", "3", "--sampling-steps", "1", "--batch", "2", "--dense-steps", "1", "--steps", "0,1,2"]
    words += small_training()

    def run(*more: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(BENCHMARKS / "dense_to_sparse.py"), *words, *more]
        return subprocess.run(command, capture_output=True, text=True, timeout=200)

    assert run("--seconds", "0").returncode == 3
    done = run()
    assert done.returncode == 0, done.stderr
    lines = records(done.stdout)
    cases = [line["case"] for line in lines if "case" in line]
    assert cases == ["dense", "sparse_0", "sparse_0.5_1", "sparse_0.5_2", "sparse_0_1", "sparse_0_2"]
    assert [line["weight"] for line in lines if line.get("piece") == "result"] == [0.5, 0.0]
    assert all(line["videos"] == 3 and line["difference_95"][0] <= 0 for line in lines if "case" in line)
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    again = run()
    assert again.returncode == 0, again.stderr
    assert not [line for line in records(again.stdout) if "training" in line.get("piece", "")], "nothing is done twice"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files


def test_reinforcement_learning_goes_on_and_tells_its_curve(tmp_path: Path) -> None:
    save_pipeline(tmp_path / "start")
    sizes = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 4, "sde_steps": 2, "eval_num_steps": 2}
    sizes |= {"sample_batch_size": 4, "num_batches_per_epoch": 1, "num_image_per_prompt": 2, "best_of_n": 2}
    sizes |= {"train_groups": 2}
    words = [word for k, v in sizes.items() for word in ("--set", f"rl_config.{k}={v}")]
    given = {"weight_dtype": "fp32", "vae_config.dtype": "fp32", "state_interval": 1, "num_epochs": 2}
    for key, value in given.items():
        words += ["--set", f"{key}={value}"]
    words += ["--set", "reward_config.options.shapes.workers=1", "--set", "rl_config.prompt_file=shapes:large:8"]
    command = [sys.executable, str(BENCHMARKS / "rl_shapes.py"), "--out", str(tmp_path / "out")]
    command += ["--model", str(tmp_path / "start")]
    command += ["--prompts", "2", "--device", "cpu", *words]

    def run(variants: str, minutes: str) -> subprocess.CompletedProcess:
        words = ("--variants", variants, "--minutes", minutes)
        return subprocess.run([*command, *words], capture_output=True, text=True, timeout=200)

    assert run("leading", "0.0001").returncode in (0, 3)  # next to nothing
    done = run("leading,mix", "60")  # all epochs are over long before: then it is the next one's turn
    assert done.returncode == 0, done.stderr
    assert {line["variant"] for line in records(done.stdout) if line.get("piece") == "result"} == {"leading", "mix"}
    again = run("leading,mix", "60")
    assert again.returncode == 0
    assert not [line for line in records(again.stdout) if "reinforcement" in line.get("piece", "")], (
        "nothing is done twice"
    )
    lines = [line for line in records(done.stdout) if line.get("variant") == "leading"]
    curve = [line for line in lines if "share" in line]
    assert [line["epoch"] for line in curve] == sorted({line["epoch"] for line in curve})
    assert curve[0]["epoch"] == 0
    assert curve[0]["share_95"][1] > 60  # of two videos
    (result,) = (line for line in lines if line.get("piece") == "result")
    assert result["ratio_before"] < 1e-4
    assert result["seconds_an_epoch"] > 0
    assert result["gain_points"] == pytest.approx(curve[-1]["share"] - curve[0]["share"], abs=0.02)
    assert result["gain_95"][0] <= result["gain_points"] <= result["gain_95"][1]


def test_the_quality_of_hif8_is_compared_in_pieces(tmp_path: Path) -> None:
    save_pipeline(tmp_path / "start")
    words = ["--out", str(tmp_path / "out"), "--model", str(tmp_path / "start"), "--device", "cpu", "--videos", "3"]
    words += ["--sampling-steps", "1", "--batch", "2", "--training-steps", "2"]
    words += small_training()

    def run(*more: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(BENCHMARKS / "hif8_quality.py"), *words, *more]
        return subprocess.run(command, capture_output=True, text=True, timeout=200)

    assert run("--seconds", "0").returncode == 3
    done = run()
    assert done.returncode == 0, done.stderr
    lines = records(done.stdout)
    compared = {line["case"]: line for line in lines if "case" in line}
    assert list(compared) == ["post", "running", "tuned", "crossed", "kernels"]
    assert ["hif8: " in line["settings"][1] for line in compared.values()] == [True, True, True, False, True]
    assert "scale by running" in compared["running"]["settings"][1]
    assert not any("hif8: " in line["settings"][0] for line in compared.values())
    assert all(line["videos"] == 3 and math.isfinite(line["psnr"]) for line in compared.values())
    losses = {line["piece"]: line["loss"] for line in lines if "piece" in line}
    assert losses["training in bf16"] != losses["training in hif8"]
    assert losses["training in bf16"] == pytest.approx(losses["training in hif8"], rel=0.05)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert run().returncode == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == kept, "nothing is done twice"


@pytest.mark.parametrize(
    ("without", "said"), [("recipee", "names recipee, which are none of recipe"), ("recipe,all", "name one by --start")]
)
def test_half_an_hour_without_what_it_needs_is_refused(tmp_path: Path, without: str, said: str) -> None:
    command = [sys.executable, str(BENCHMARKS / "half_hour.py"), "--out", str(tmp_path / "out"), "--without", without]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_half_an_hour_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """All pieces with next to no work in them: stopped once, then to the end, then nothing is done again."""
    data = "data_config.dataset_config.num_clips=4 data_config.batch_size=2 weight_dtype=fp32"
    rl = {"num_inference_steps": 4, "sde_steps": 2, "eval_num_steps": 2, "sample_batch_size": 4}
    rl |= {"num_batches_per_epoch": 1, "num_image_per_prompt": 2, "best_of_n": 2, "train_batch_size": 4}
    rl |= {"train_groups": 2}
    rl_words = [f"rl_config.{key}={value}" for key, value in rl.items()]
    rl_words += ["weight_dtype=fp32", "vae_config.dtype=fp32", "reward_config.options.shapes.workers=1"]

    def changed(words: Sequence[str]) -> str:
        return " ".join(f"--set {word}" for word in words)

    few = "--videos 2 --sampling-steps 1 --batch 2"
    more = {
        "text": "num_captions=40 training_iteration=2 batch_size=4",
        "recipe": f"{data} vae_config.dtype=fp32 warmup_steps=1",
        "grade": "num_inference_steps=2 batch_size=2",
        "rl": f"--prompts 2 {changed(rl_words)}",
        "hif8": f"{few} --parts post {changed(data.split())}",
        "sparse": f"{few} --dense-steps 1 --steps 0 --weights 0 {changed(data.split())}",
    }
    words = ["--out", str(tmp_path), "--gpus", "", "--steps", "4", "--every", "2", "--first-state", "2"]
    words += ["--rl-minutes", "0.1", "--other-rl-minutes", "0.1", "--grade-prompts", "2", "--start-prompts", "2"]
    words += [word for key, value in more.items() for word in (f"--{key}", value)]

    def run(minutes: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(BENCHMARKS / "half_hour.py"), *words, "--minutes", minutes]
        return subprocess.run(command, capture_output=True, text=True, timeout=900)

    begun = run("0.3")
    assert begun.returncode == 3
    done = run("14")
    assert done.returncode == 0, done.stdout
    lines = records(begun.stdout) + records(done.stdout)  # a quick machine ends some of them at once
    ended = {line["piece"]: line["code"] for line in lines if line.get("event") == "ends"}
    assert {"recipe", "grade_4", "grade_2", "rl_mix", "rl_leading", "rl_all", "hif8", "sparse"} <= ended.keys()
    assert {line.get("variant") for line in lines} >= {"mix", "leading", "all"}
    assert any(line.get("case") == "post" for line in lines)
    words += ["--start", str(tmp_path / "step_2"), "--without", "recipe,leading,all,hif8,sparse"]
    (tmp_path / "rl_mix.done").unlink()
    shutil.rmtree(tmp_path / "rl")
    alone = run("14")
    assert alone.returncode == 0, alone.stdout
    assert [line["piece"] for line in records(alone.stdout) if line.get("event") == "ends"] == ["rl_mix"]
    again = run("14")
    assert again.returncode == 0
    assert not [line for line in records(again.stdout) if line.get("event")]
