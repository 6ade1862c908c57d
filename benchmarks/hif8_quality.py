"""What HiF8 costs in quality: the shapes model sampled in it, trained in it, and beside it in bf16.

    python benchmarks/hif8_quality.py --out runs/hif8_quality

Pieces, each of which is kept in ``--out`` and not done twice, so that the same command goes on where it was stopped:

1. ``post``: the model in HiF8 against the model in bf16; ``running``: the same with running scales, measured by
   ``ospnext quantize`` on a few prompts; ``kernels``: as ``post`` with FP8 attention, which is for longer sequences
   than these, one launch a video and step: fewer videos.
2. ``train``: the model is trained further, in bf16 and in HiF8, from the same weights on the same clips and noise.
3. ``tuned``: what was trained in HiF8, sampled in HiF8, against what was trained in bf16, sampled in bf16; ``crossed``:
   what was trained in HiF8, sampled in bf16, against the latter.

Every comparison is that of ``ospnext compare-shapes``: the same prompts and noise, paired differences of the share of
videos in which everything is right, PSNR and SSIM between the videos. Prints a JSON line for each, and the curves' last
values. ``--draw`` overlays the curves of training (on a machine with matplotlib) and does nothing else.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dense_to_sparse import spare_what_reads_files

ROOT = Path(__file__).parents[1]
EIGHT_BITS = ("quant", "quant_attn")
KINDS = ("bf16", "hif8")


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of all pieces")
    parser.add_argument("--model", default="shapes", help="a pipeline folder to start from")
    parser.add_argument("--videos", type=int, default=2000, help="held-out prompts of every comparison")
    parser.add_argument("--kernel-videos", type=int, default=400, help="of the comparison with FP8 attention")
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=200, help="videos at once")
    parser.add_argument("--training-steps", type=int, default=300)
    parser.add_argument("--parts", default="post,running,train,tuned,crossed,kernels", help="which pieces")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further piece after this time")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the training's recipe")
    parser.add_argument("--draw", action="store_true", help="the picture of a finished folder")
    return parser.parse_args()


def say(**line: Any) -> None:
    """Print a JSON line."""
    print(json.dumps({"benchmark": "hif8_quality", **line}), flush=True)


def compare(args: argparse.Namespace, name: str, first: Path | str, **other: Any) -> None:
    """One comparison, unless it is there; its figures."""
    from ospnext.config import load_config
    from ospnext.evaluate.compare import CompareShapesConfig, run

    folder, began = args.out / name, time.monotonic()
    if not (folder / "compare.json").exists():
        given = {"model": first, "num_prompts": args.videos, "batch_size": args.batch, "device": args.device}
        given |= {"num_inference_steps": args.sampling_steps, "output_dir": folder}
        given |= {f"other.{key}": value for key, value in other.items()}
        run(load_config(CompareShapesConfig, None, [f"{key}={value}" for key, value in given.items()]))
    record = json.loads((folder / "compare.json").read_text())
    score = record["score"]
    say(
        case=name,
        settings=record["settings"],
        videos=score["asked"],
        right=[score["first"], score["second"]],
        difference_points=round(100 * score["difference"], 2),
        difference_95=[round(100 * score["low"], 2), round(100 * score["high"], 2)],
        right_in_one_only=[score["only_first"], score["only_second"]],
        psnr=round(record["psnr"]["value"], 3),
        ssim=round(record["ssim"]["value"], 5),
        equal=record["equal"],
        seconds=round(time.monotonic() - began, 1),
    )


def compare_kernels(args: argparse.Namespace, **other: Any) -> None:
    """``post`` with attention on FP8 tensor cores, however short sequences are."""
    from ospnext.ops import attention8

    usual, attention8.SHORTEST = attention8.SHORTEST, 0
    fewer = argparse.Namespace(**vars(args) | {"videos": min(args.videos, args.kernel_videos)})
    compare(fewer, "kernels", args.model, **other)
    attention8.SHORTEST = usual


def calibrated(args: argparse.Namespace) -> Path:
    """The model in 8 bits with running scales."""
    from ospnext.config import load_config
    from ospnext.prepare.quantize import QuantizeConfig, run

    folder = args.out / "calibrated"
    if not folder.exists():
        words = [f"src={args.model}", f"dst={folder}", "model_config.quant_scaling=running"]
        words += [f"calibration.{k}={v}" for k, v in (("device", args.device), ("num_prompts", 8))]
        words.append(f"calibration.prompts={ROOT / 'configs/generate/shapes_prompts.txt'}")
        print(run(load_config(QuantizeConfig, None, words)))
    return folder


def train(args: argparse.Namespace, kind: str) -> None:
    """Train the model further in one kind of numbers, unless that is done."""
    from ospnext.config import load_config
    from ospnext.config_keys import key_rules
    from ospnext.train.settings import TrainConfig
    from ospnext.train.sft import run

    folder = args.out / kind
    if not (folder / "done.json").exists():
        given = {"output_dir": folder, "model": args.model, "device": args.device, "trackers": "[]"}
        given |= {"training_iteration": args.training_steps, "save_interval": 10**6, "log_interval": 5}
        # A finished model that is to learn something more; its rate falls to zero, lest noise be compared.
        given |= {"distillation_config.weight": 0, "optimizer_config.lr": 1e-4, "lr_schedule": "cosine"}
        given |= {f"model_config.{key}": "hif8" for key in EIGHT_BITS if kind == "hif8"}
        words = [f"{key}={value}" for key, value in given.items()] + args.set
        run(load_config(TrainConfig, ROOT / "configs/shapes/dense_to_sparse.yaml", words, key_rules("train")).alone())
        (folder / "done.json").write_text("{}")
    log = lines(folder / "train_log.jsonl")
    late = log[-len(log) // 3 :]
    say(
        piece=f"training in {kind}",
        steps=log[-1]["step"],
        loss=round(sum(line["loss"] for line in late) / len(late), 6),
        grad_norm=round(sum(line["grad_norm"] for line in late) / len(late), 5),
        seconds_per_step=log[-1]["seconds_per_step"],
        skipped=log[-1]["skipped"],
    )


def lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def draw(args: argparse.Namespace) -> None:
    """``curves.png``: both losses, and their difference."""
    import matplotlib.pyplot as plt

    logs = {kind: lines(args.out / kind / "train_log.jsonl") for kind in KINDS}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for kind, log in logs.items():
        left.plot([line["step"] for line in log], [line["loss"] for line in log], label=kind, alpha=0.8)
    differences = [100 * (b["loss"] / a["loss"] - 1) for a, b in zip(logs["bf16"], logs["hif8"], strict=True)]
    right.plot([line["step"] for line in logs["bf16"]], differences)
    left.set(xlabel="step", ylabel="loss")
    left.legend(frameon=False)
    right.set(xlabel="step", ylabel="HiF8's above bf16's, %")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.out / "curves.png", dpi=110)


def main() -> int:
    """All pieces; 0 once all are there, 3 where the time was up before."""
    args = options()
    if args.draw:
        draw(args)
        return 0
    spare_what_reads_files()
    end = time.monotonic() + args.seconds
    args.out.mkdir(parents=True, exist_ok=True)
    tuned = {kind: args.out / kind / "pipeline" for kind in KINDS}
    eight, plain = dict.fromkeys(EIGHT_BITS, "hif8"), dict.fromkeys(EIGHT_BITS, "none")
    pieces: dict[str, list[Callable[[], None]]] = {
        "post": [lambda: compare(args, "post", args.model, **eight)],
        "running": [lambda: compare(args, "running", args.model, model=calibrated(args))],
        "train": [lambda: train(args, "bf16"), lambda: train(args, "hif8")],
        "tuned": [lambda: compare(args, "tuned", tuned["bf16"], model=tuned["hif8"])],
        "kernels": [lambda: compare_kernels(args, **eight)],
        "crossed": [lambda: compare(args, "crossed", tuned["bf16"], model=tuned["hif8"], **plain)],
    }
    for piece in [one for name in args.parts.split(",") for one in pieces[name]]:
        if time.monotonic() >= end:
            print("the time is up: the same command goes on")
            return 3
        piece()
    return 0


if __name__ == "__main__":
    sys.exit(main())
