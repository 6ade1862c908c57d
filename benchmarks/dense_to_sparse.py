"""How many steps make a dense model sparse? The shapes model converted, with and without a teacher, graded in pairs.

    python benchmarks/dense_to_sparse.py --out runs/dense_to_sparse

Pieces, each of which is kept in ``--out`` and not done twice, so that the same command goes on where it was stopped:
a dense model is made of the embedded (sparse) one by the recipe's reverse, then graded; for every weight of the teacher
the sparse model is trained from it, and its averaged weights are graded after each of ``--steps`` steps, on the same
prompts and seeds as the dense one. Prints a JSON line each with the paired difference of the scores (everything right)
in points and its 95% interval (Newcombe 1998, method 10), and a table last.
"""

import argparse
import importlib.machinery
import json
import math
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

RECIPE = Path(__file__).parents[1] / "configs/shapes/dense_to_sparse.yaml"
MARGIN = -2.0  # points the interval is to stay above


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of all pieces")
    parser.add_argument("--model", default="shapes", help="where the dense model starts from: a pipeline folder")
    parser.add_argument("--videos", type=int, default=2000, help="held-out prompts of every grading")
    parser.add_argument("--sampling-steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=200, help="videos at once")
    parser.add_argument("--dense-steps", type=int, default=400, help="training steps of the dense model")
    parser.add_argument("--steps", default="0,25,50,100,200,400", help="steps after which the sparse model is graded")
    parser.add_argument("--weights", default="0.5,0", help="weights of the teacher; 0: without one")
    parser.add_argument("--compile", action="store_true", help="compile training: pays off from about 1,000 steps")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=1, help="of prompts and noise")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further piece after this time")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe")
    return parser.parse_args()


class Run:
    """One command: its options, its clock, and the pieces that are there."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.began = args, time.monotonic()
        self.steps = sorted({int(n) for n in args.steps.split(",")})
        self.weights = [float(w) for w in args.weights.split(",")]
        self.dense = args.out / "dense"

    @property
    def left(self) -> float:
        """Seconds in which a piece may begin."""
        return self.args.seconds - (time.monotonic() - self.began)

    def sparse(self, weight: float) -> Path:
        """Where the sparse model learns."""
        return self.args.out / f"sparse_{weight:g}"

    def marks(self, weight: float | None, step: int) -> Path:
        """The file with every video's mark; None is the dense model."""
        name = "dense" if weight is None or step < 0 else f"sparse_{weight:g}_{step}" if step else "sparse_0"
        return self.args.out / f"marks_{name}.json"


def recipe(run: Run, **settings: Any) -> Any:
    """The recipe's configuration, changed by ``settings`` and by ``--set``; dots of keys are written as __."""
    from ospnext.config import load_config
    from ospnext.config_keys import key_rules
    from ospnext.train.settings import TrainConfig

    given = {"compile": run.args.compile, "device": run.args.device, "trackers": "[]"} | settings
    words = [f"{key.replace('__', '.')}={value}" for key, value in given.items()] + run.args.set
    return load_config(TrainConfig, str(RECIPE), words, key_rules("train")).alone()


def train(run: Run, folder: Path, **settings: Any) -> bool:
    """Train by the recipe, changed; whether it came to its end."""
    from ospnext.train.sft import run as start

    done = folder / "done.json"
    if done.exists():
        return True
    if run.left <= 0:
        return False
    if math.isfinite(run.left):
        settings["time_budget_minutes"] = run.left / 60
    config, began = recipe(run, output_dir=folder, **settings), time.monotonic()
    start(config)
    log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    finished = log[-1]["step"] >= config.training_iteration
    say(
        benchmark="dense_to_sparse",
        piece=f"training {folder.name}",
        steps=log[-1]["step"],
        loss=log[-1]["loss"],
        batch=config.data_config.batch_size,
        lr=config.optimizer_config.lr,
        clips=config.data_config.dataset_config.num_clips,
        seconds_per_step=log[-1]["seconds_per_step"],
        seconds=round(time.monotonic() - began, 1),
    )
    if finished:
        done.write_text("{}")
    return finished


class Grading:
    """Asks models for the same prompts with the same noise; grades while the next one generates."""

    def __init__(self, run: Run, graders: Any) -> None:
        import torch

        from ospnext.device import resolve_device, working_dtype
        from ospnext.evaluate.shapes import held_out

        self.run, self.graders = run, graders
        self.asked = held_out("large", run.args.videos, run.args.seed)
        self.device = resolve_device(run.args.device)
        self.dtype = working_dtype("bf16", self.device, asked=False)
        self.vae_dtype = torch.float32 if self.device.type == "cpu" else torch.float16
        self.waiting: list[tuple[Path, list, float]] = []

    def pipeline(self, **layouts: Any) -> Any:
        """The dense model's pipeline, in other layouts if they are given."""
        from ospnext.generate.pipeline import OSPNextPipeline

        pipe = OSPNextPipeline.from_pretrained(
            self.run.dense / "pipeline",
            torch_dtype={"default": self.dtype, "vae": self.vae_dtype},
            device=self.device,
            relayout=bool(layouts),
            **layouts,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def ask(self, pipe: Any, path: Path) -> None:
        """Generate all videos and begin to grade them; their marks will be at ``path``."""
        from ospnext.evaluate.shapes import generate_some

        began, gradings = time.monotonic(), []
        for i in range(0, len(self.asked.prompts), self.run.args.batch):
            some = slice(i, i + self.run.args.batch)
            seed = self.run.args.seed + i
            videos = generate_some(pipe, self.asked.prompts[some], seed, self.run.args.sampling_steps, None)
            gradings += self.graders.begin(videos, self.asked.scenes[some])
        self.waiting.append((path, gradings, time.monotonic() - began))
        while len(self.waiting) > 1:
            self.write()

    def write(self) -> None:
        """Wait for the oldest grading and keep its marks."""
        path, gradings, seconds = self.waiting.pop(0)
        marks = [bool(grading.result().all_right) for grading in gradings]
        path.write_text(json.dumps({"seconds_of_generating": round(seconds, 1), "marks": marks}))
        say(**figures(self.run, path))


def figures(run: Run, path: Path) -> dict[str, Any]:
    """What a file of marks says, beside the dense model's."""
    from ospnext.evaluate.paired import paired_difference
    from ospnext.shapes.share import share

    record = json.loads(path.read_text())
    found, dense = record["marks"], json.loads(run.marks(None, -1).read_text())["marks"]
    if len(found) != run.args.videos or len(dense) != run.args.videos:
        raise SystemExit(f"{path} is of {len(found)} videos, not {run.args.videos}: give another --out, or --videos")
    own, pair = share(found), paired_difference(dense, found)
    return {
        "benchmark": "dense_to_sparse",
        "case": path.stem.removeprefix("marks_"),
        "videos": own.asked,
        "right": own.right,
        "share": round(100 * own.right / own.asked, 2),
        "share_95": [round(100 * own.low, 2), round(100 * own.high, 2)],
        "difference_points": round(100 * pair.difference, 2),
        "difference_95": [round(100 * pair.low, 2), round(100 * pair.high, 2)],
        "right_in_dense_only": pair.only_first,
        "right_in_this_only": pair.only_second,
        "sampling_steps": run.args.sampling_steps,
        "seconds_of_generating": record["seconds_of_generating"],
    }


def say(**line: Any) -> None:
    """Print a JSON line."""
    print(json.dumps(line), flush=True)


def convert(run: Run, grading: Grading, weight: float) -> bool:
    """Train one sparse model and grade it at every step asked for; whether all of it is there."""
    import torch

    from ospnext.checkpoints.load import SPARSE
    from ospnext.parallel.state import read

    while grading.waiting:  # the start is the same for every weight
        grading.write()
    last, folder = max(run.steps), run.sparse(weight)
    every = math.gcd(*(step for step in run.steps if step)) if last else 1
    finished = not last or train(
        run,
        folder,
        model=run.dense / "pipeline",
        distillation_config__weight=weight,
        training_iteration=last,
        save_interval=every,
    )
    missing = [step for step in run.steps if not run.marks(weight, step).exists()]
    if not missing:
        for step in run.steps:
            say(**figures(run, run.marks(weight, step)))
        return True
    layouts = {key: value for key, value in recipe(run).architecture().items() if key in SPARSE}
    pipe = grading.pipeline(**layouts)
    for step in missing:
        state = folder / f"iter_{step:09d}"
        if run.left <= 0 or (step and not state.exists()):
            return False
        if step:
            tensors = read(state, "average.transformer.")
            with torch.no_grad():
                pipe.transformer.load_state_dict({k: v.to(grading.dtype) for k, v in tensors.items()})
        grading.ask(pipe, run.marks(weight, step))
    return finished


def table(run: Run) -> None:
    """The curve, and the first step from which on the interval is above the margin."""
    print("\n| teacher's weight | step | right | minus dense, points | 95% interval |\n|---|---|---|---|---|")
    for weight in run.weights:
        lines = [(step, figures(run, run.marks(weight, step))) for step in run.steps]
        for step, line in lines:
            low, high = line["difference_95"]
            print(f"| {weight:g} | {step} | {line['share']}% | {line['difference_points']:+} | {low} to {high} |")
        above = [step for i, (step, _) in enumerate(lines) if all(x["difference_95"][0] > MARGIN for _, x in lines[i:])]
        said = f"from step {above[0]} on" if above else f"not in {lines[-1][0]} steps"
        say(benchmark="dense_to_sparse", piece="result", weight=weight, interval_above=MARGIN, reached=said)


def main() -> int:
    """All pieces; 0 once all are there, 3 where the time was up before."""
    run = Run(options())
    spare_what_reads_files()
    from ospnext.shapes.grading import VIDEOS_PER_PROCESS, Graders, cores

    run.args.out.mkdir(parents=True, exist_ok=True)
    dense = {"model": run.args.model, "model_config__skiparse_model_type": "full", "distillation_config__weight": 0}
    dense |= {"training_iteration": run.args.dense_steps, "save_interval": 10**6, "lr_schedule": "cosine"}
    with Graders(max(1, min(cores(), run.args.videos // VIDEOS_PER_PROCESS))) as graders:
        complete = train(run, run.dense, **dense)
        if complete:
            grading = Grading(run, graders)
            if not run.marks(None, -1).exists():
                grading.ask(grading.pipeline(), run.marks(None, -1))
                grading.write()
            for weight in run.weights:
                complete = convert(run, grading, weight) and complete
            while grading.waiting:
                grading.write()
    if not complete:
        print("the time is up: the same command goes on")
        return 3
    table(run)
    return 0


def spare_what_reads_files() -> None:
    """Let PyAV and LMDB be missing: clips are rendered here, and no video is read or written."""
    for name in ("av", "av.video", "av.video.reformatter", "lmdb"):
        if name.partition(".")[0] in sys.modules or find_spec(name.partition(".")[0]) is None:
            sys.modules.setdefault(name, MagicMock(__spec__=importlib.machinery.ModuleSpec(name, None), __path__=[]))


if __name__ == "__main__":
    sys.exit(main())
