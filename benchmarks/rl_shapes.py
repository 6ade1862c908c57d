"""What reinforcement learning makes of a shapes model that was trained too little, window by window.

    python benchmarks/rl_shapes.py --out runs/rl_shapes --variants mix,leading,all --minutes 8

Pieces, each of which is kept in ``--out`` and goes on where it was stopped when the same command is given again:

1. Without ``--model``: a new transformer is trained from scratch, with the embedded model's VAE and text encoder, for
   ``--undertrained-steps`` steps: about half of its videos are to be fully right.
   With ``--weaken 0.35`` it is the embedded model instead, with noise of that share of each block weight's deviation:
   a start that takes no training, to try rates with.
2. For every variant: ``configs/rl/shapes.yaml`` to its last epoch, or for ``--minutes`` if those end first. Before,
   along the way and after, the averaged adapter draws ``--prompts`` held-out prompts, with the same seeds each time.

Prints a JSON line for each point of a curve: share of videos in which everything is right with its 95% Wilson
interval, seconds of reinforcement learning so far; and one for each variant with the time of an epoch and the gain in
points, paired, with Newcombe's 95% interval.
``--draw`` makes pictures of a finished folder (on a machine with PyAV and matplotlib) and does nothing else.
"""

import argparse
import json
import math
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

ROOT = Path(__file__).parents[1]
VARIANTS: dict[str, dict[str, Any]] = {
    "mix": {},  # Mix-GRPO's window, that of the recipe
    "progressive": {"window": "progressive", "sde_steps": 4, "window_interval": 25},
    "random": {"window": "random", "sde_steps": 4, "window_interval": 1},
    "leading": {"window": "leading", "sde_steps": 4},  # the window of OSP-Next: 10 of 25 steps
    "all": {"window": "leading", "sde_steps": 10},  # every step but the last, as Flow-GRPO
    "flash": {"window": "leading", "sde_steps": 4, "flash": 0.4},
}


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of all pieces")
    parser.add_argument("--model", help="a pipeline folder to start from; default: one is trained too little")
    parser.add_argument("--weaken", type=float, help="start from the embedded model with so much noise on its weights")
    parser.add_argument("--undertrained-steps", type=int, default=4700, help="steps of that training, batches of 320")
    parser.add_argument("--variants", default="mix", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--minutes", type=float, default=8.0, help="of rolling out and training, at most, by variant")
    parser.add_argument("--prompts", type=int, default=512, help="held-out prompts of an evaluation")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop this command after it; give it again")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the RL recipe")
    parser.add_argument("--train-set", action="append", default=[], metavar="KEY=VALUE", help="change the training's")
    parser.add_argument("--draw", action="store_true", help="pictures of a finished folder")
    return parser.parse_args()


class Clock:
    """How long this command may still run."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()


def say(**line: Any) -> None:
    """Print a JSON line."""
    print(json.dumps({"benchmark": "rl_shapes", **line}), flush=True)


def undertrained(args: argparse.Namespace, clock: Clock) -> Path | None:
    """A model that was trained too little; None where the time was up before."""
    from ospnext.checkpoints.components import EMBEDDED
    from ospnext.config import load_config
    from ospnext.config_keys import key_rules
    from ospnext.train.settings import TrainConfig
    from ospnext.train.sft import run

    folder = args.out / "undertrained"
    if (folder / "done.json").exists():
        return folder / "pipeline"
    given = {
        "output_dir": folder,
        "device": args.device,
        "vae_config.vae_path": EMBEDDED / "vae",
        "text_encoder_config.checkpoint_path": EMBEDDED / "text_encoder",
        "text_encoder_config.text_tokenizer_path": EMBEDDED / "tokenizer",
        "train_text_encoder": False,
        "training_iteration": args.undertrained_steps,
        "save_interval": 10**6,
        "trackers": "[]",
    }
    if math.isfinite(clock.left):
        given["time_budget_minutes"] = max(clock.left, 1) / 60
    words = [f"{key}={value}" for key, value in given.items()] + args.train_set
    recipe = ROOT / "configs/shapes/transformer.yaml"
    began = time.monotonic()
    run(load_config(TrainConfig, recipe, words, key_rules("train")).alone())
    last = lines(folder / "train_log.jsonl")[-1]
    say(piece="undertrained", step=last["step"], loss=last["loss"], seconds=round(time.monotonic() - began, 1))
    if last["step"] < args.undertrained_steps:
        return None
    (folder / "done.json").write_text("{}")
    return folder / "pipeline"


def weakened(args: argparse.Namespace) -> Path:
    """The embedded model with noise on the weights of its blocks, the same every time."""
    import torch
    from safetensors.torch import load_file, save_file

    from ospnext.checkpoints.components import EMBEDDED

    folder = args.out / f"weakened_{args.weaken:g}"
    if folder.exists():
        return folder
    draft = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(EMBEDDED, draft)
    (path,) = (draft / "transformer").glob("*.safetensors")
    tensors, generator = load_file(path), torch.Generator().manual_seed(0)
    for name, weight in tensors.items():
        if weight.ndim >= 2 and "blocks" in name:
            noise = torch.randn(weight.shape, generator=generator)
            tensors[name] = (weight.float() + args.weaken * weight.float().std() * noise).to(weight.dtype)
    save_file(tensors, path, {"format": "pt"})
    return draft.rename(folder)


def reinforce(args: argparse.Namespace, clock: Clock, model: Path | str, variant: str) -> bool:
    """One variant until its minutes or the recipe's epochs are over; whether they are."""
    from ospnext.config import load_config
    from ospnext.config_keys import key_rules
    from ospnext.train.rl.run import run
    from ospnext.train.rl.settings import RLConfig

    folder = args.out / variant
    given = {
        "output_dir": folder,
        "device": args.device,
        "model": model,
        "trackers": "[]",
        "rl_config.eval_prompt_file": f"shapes:large:{args.prompts}",
        **{f"rl_config.{key}": value for key, value in VARIANTS[variant].items()},
    }

    def asked(minutes: float) -> RLConfig:
        words = [f"{key}={value}" for key, value in {**given, "time_budget_minutes": minutes}.items()] + args.set
        return load_config(RLConfig, ROOT / "configs/rl/shapes.yaml", words, key_rules("rl")).alone()

    def complete() -> bool:  # the last epoch is not begun when the time is up
        return epochs(folder) >= asked(1.0).num_epochs or spent(folder) >= 60 * args.minutes * 0.95

    left = 60 * args.minutes - spent(folder)
    if not complete() and left > 0 and clock.left > 0:
        began = time.monotonic()
        run(asked(min(left, clock.left) / 60))
        say(piece=f"reinforcement learning, {variant}", seconds=round(time.monotonic() - began, 1))
    tell(folder, variant)
    return complete()


def epochs(folder: Path) -> int:
    """How many epochs the newest state knows of."""
    from ospnext.parallel.state import newest, read_record

    state = newest(folder) if folder.is_dir() else None
    return 0 if state is None else read_record(state)["data"]["epoch"]


def spent(folder: Path) -> float:
    """Seconds of rolling out and training that the newest state knows of, evaluations included."""
    from ospnext.parallel.state import newest, read_record

    state = newest(folder) if folder.is_dir() else None
    evaluating = sum(line.get("evaluation_seconds", 0.0) for line in lines(folder / "evaluations.jsonl"))
    return 0.0 if state is None else read_record(state)["data"]["seconds"] + evaluating


def tell(folder: Path, variant: str) -> None:
    """The curve of a variant, and what it came to."""
    from ospnext.evaluate.paired import paired_difference
    from ospnext.shapes.share import share

    curve, log = lines(folder / "evaluations.jsonl"), lines(folder / "train_log.jsonl")
    if not curve:
        return
    all_marks = []
    for line in curve:
        scores = json.loads((folder / "eval" / f"epoch_{line['epoch']:06d}" / "scores.json").read_text())
        marks = [bool(video["shapes.everything"]) for video in scores["videos"]]
        all_marks.append(marks)
        found = share(marks)
        say(
            variant=variant,
            epoch=line["epoch"],
            step=line["step"],
            seconds=line["seconds"],
            right=found.right,
            videos=found.asked,
            share=round(100 * found.right / found.asked, 2),
            share_95=[round(100 * found.low, 2), round(100 * found.high, 2)],
            **{key: line[key] for key in ("reward", "flicker", "sharpness") if key in line},
            **{name: line[f"shapes.{name}"] for name in ("count", "shape", "colour", "motion")},
        )
    if log:
        gain = paired_difference(all_marks[0], all_marks[-1])
        parts = ("sampling", "waiting", "training")
        seconds = {part: round(sum(line[f"{part}_seconds"] for line in log) / len(log), 3) for part in parts}
        say(
            variant=variant,
            piece="result",
            epochs=len(log),
            updates=log[-1]["step"],
            seconds_an_epoch=round(sum(seconds.values()), 3),
            **{f"{part}_seconds": value for part, value in seconds.items()},
            training_reward=[round(log[0]["reward"], 4), round(log[-1]["reward"], 4)],
            ratio_before=max(line["ratio_before"] for line in log),
            clip_fraction=round(sum(line["clip_fraction"] for line in log) / len(log), 4),
            zero_variance_share=round(sum(line["zero_variance_share"] for line in log) / len(log), 4),
            memory_gib=log[-1]["memory_gib"],
            gain_points=round(100 * gain.difference, 2),
            gain_95=[round(100 * gain.low, 2), round(100 * gain.high, 2)],
        )


def lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def draw(args: argparse.Namespace) -> None:
    """``curve.png`` of all variants, and of each ``before_after.mp4``: a prompt a row, first and last evaluation."""
    import matplotlib.pyplot as plt
    import numpy as np

    from ospnext.media import video_grid, write_video

    figure, axes = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
    for variant in args.variants.split(","):
        folder = args.out / variant
        curve = lines(folder / "evaluations.jsonl")
        axes.plot([x["seconds"] for x in curve], [100 * x["shapes.everything"] for x in curve], "o-", label=variant)
        paths = []
        for number in range(6):
            for line in (curve[0], curve[-1]):
                path = folder / "eval" / f"epoch_{line['epoch']:06d}" / f"video_{number}.mp4"
                if not path.exists() and path.with_suffix(".npy").exists():
                    write_video(path, np.load(path.with_suffix(".npy")))
                paths.append(path)
        if kept := [path for path in paths if path.exists()]:
            video_grid(kept, folder / "before_after.mp4", columns=2)
    axes.set(xlabel="seconds of reinforcement learning", ylabel="everything right, %")
    figure.legend(loc="outside right upper", frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(args.out / "curve.png", dpi=110)


def main() -> int:
    """All pieces; 0 once all are there, 3 where the time was up before."""
    args = options()
    if args.draw:
        draw(args)
        return 0
    if find_spec("lmdb") is None:  # the store of real clips, which nothing here reads
        sys.modules["lmdb"] = MagicMock()
    clock = Clock(args.seconds)
    args.out.mkdir(parents=True, exist_ok=True)
    model = args.model or (undertrained(args, clock) if args.weaken is None else weakened(args))
    complete = model is not None and all(reinforce(args, clock, model, variant) for variant in args.variants.split(","))
    if not complete:
        print("the time is up: the same command goes on")
    return 0 if complete else 3


if __name__ == "__main__":
    sys.exit(main())
