"""All figures of the shapes world that need training, in half an hour of four GPUs, or of two with less in it.

    python benchmarks/half_hour.py --out runs/half_hour

What runs, in processes with a log each in ``--out``:

- on GPU 0 ``ospnext train-text`` and ``ospnext train configs/shapes/transformer.yaml``, then the grade of what
  came of it on ``--grade-prompts`` held-out prompts;
- on GPUs 1 and 2 ``hif8_quality.py`` and ``dense_to_sparse.py``, which stand still while
- ``rl_shapes.py`` has a GPU for itself: it starts from the state of the recipe in which the share of right videos is
  nearest one half, with ``mix`` on GPU 3, ``leading`` on 1 and ``all`` on 2.

With ``--start MODEL`` reinforcement learning waits for nothing: it begins from that pipeline folder. ``--without``
names pieces to leave out, so that ``--start MODEL --without recipe,hif8,sparse`` is reinforcement learning alone.
With fewer GPUs the last one does what others would do; then ``leading`` and ``all`` come after ``mix``, side by side.
Every piece keeps what it has done, so that the same command goes on where it was stopped or where its ``--minutes``
were over. Prints a JSON line when a piece begins or ends, and last what the pieces have found.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
EMBEDDED = ROOT / "src/ospnext/assets/shapes"
PIECES = ("recipe", "hif8", "sparse", "mix", "leading", "all")
GRACE = 40.0  # seconds that a piece has to save and end
SPENT = 3  # exit code of a variant whose last epoch would not have ended in its minutes
HALF = 0.46, 0.54  # shares of right videos that are near enough


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of all pieces")
    parser.add_argument("--minutes", type=float, default=28.0, help="then everything saves and ends")
    parser.add_argument("--gpus", default="0,1,2,3", help="numbers; none: the CPU")
    parser.add_argument("--start", type=Path, help="a pipeline folder that is half right; default: of the recipe")
    parser.add_argument("--without", default="", help=f"pieces to leave out, of {', '.join(PIECES)}")
    parser.add_argument("--steps", type=int, default=12000, help="of the recipe")
    parser.add_argument("--first-state", type=int, default=4500, help="the first that is graded for RL to start from")
    parser.add_argument("--every", type=int, default=500, help="steps between states")
    parser.add_argument("--rl-minutes", type=float, default=8.2, help="of mix")
    parser.add_argument("--other-rl-minutes", type=float, default=8.2, help="of leading and of all")
    parser.add_argument("--grade-prompts", type=int, default=2048, help="held-out prompts that the recipe is graded on")
    parser.add_argument("--start-prompts", type=int, default=256, help="that its states are")
    for name in ("text", "recipe", "grade", "rl", "hif8", "sparse"):
        parser.add_argument(f"--{name}", default="", metavar="WORDS", help=f"more words for {name}'s command")
    args = parser.parse_args()
    args.without = [name for name in args.without.split(",") if name]
    if unknown := [name for name in args.without if name not in PIECES]:
        parser.error(f"--without names {', '.join(unknown)}, which are none of {', '.join(PIECES)}")
    if "recipe" in args.without and args.start is None and {"mix", "leading", "all"} - set(args.without):
        parser.error("--without recipe leaves reinforcement learning no model: name one by --start")
    return args


class OutOfTimeError(Exception):
    """The minutes are over."""


class Run:
    """Pieces in processes of their own.

    Args:
        args: the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.end = args, time.monotonic() + 60 * args.minutes
        self.gpus = [gpu for gpu in args.gpus.split(",") if gpu]
        self.device = "cuda" if self.gpus else "cpu"
        cores = sorted(os.sched_getaffinity(0))
        share = max(1, len(cores) // 4)  # training needs few: grading is what needs many
        self.cores = [cores[:share], cores[share:] or cores]
        self.free = threading.Event()  # what may stand still goes on
        self.free.set()
        self.broken = threading.Event()  # there will be no further states

    def do(self, name: str, command: Sequence[str], place: int, yields: bool = False) -> None:
        """Run a piece to its end.

        Args:
            name: of its log; a name that was done is not done again.
            command: its words.
            place: number of the GPU; the last one stands for those that are not there.
            yields: it stands still while ``alone``.

        Raises:
            OutOfTimeError: the minutes are over; it was asked to save.
            RuntimeError: it failed.
        """
        done = self.args.out / f"{name}.done"
        if done.exists() or name.removeprefix("rl_") in self.args.without:
            return
        if time.monotonic() >= self.end:
            raise OutOfTimeError
        say(piece=name, event="begins")
        began = time.monotonic()
        here = ["taskset", "-c", ",".join(map(str, self.cores[place > 0]))]
        if self.gpus:
            here += ["env", f"CUDA_VISIBLE_DEVICES={self.gpus[min(place, len(self.gpus) - 1)]}"]
        with (self.args.out / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*here, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,
            )
        code, asked = self._wait(process, yields)
        say(piece=name, event="ends", code=code, seconds=round(time.monotonic() - began, 1))
        if asked:
            raise OutOfTimeError
        if code not in (0, SPENT):
            last = (self.args.out / f"{name}.log").read_text(errors="replace").splitlines()[-1:]
            raise RuntimeError(f"{name} failed with code {code}: {' '.join(last)}")
        done.touch()

    def _wait(self, process: subprocess.Popen, yields: bool) -> tuple[int, bool]:
        """The exit code, and whether the process was asked to end."""
        still = False
        while process.poll() is None:
            if yields and still == self.free.is_set():
                still = not self.free.is_set()
                os.killpg(process.pid, signal.SIGSTOP if still else signal.SIGCONT)
            if time.monotonic() >= self.end:
                os.killpg(process.pid, signal.SIGCONT)
                process.terminate()
                try:
                    return process.wait(GRACE), True
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    return process.wait(), True
            time.sleep(0.2)
        return process.returncode, False

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, pieces that yield stand still."""
        self.free.clear()
        try:
            yield
        finally:
            self.free.set()


def say(**line: object) -> None:
    """Print a JSON line, in one piece: several threads do."""
    text = json.dumps({"benchmark": "half_hour", "time": time.strftime("%H:%M:%S"), **line})
    print(f"{text}\n", end="", flush=True)


def ospnext(*words: object) -> list[str]:
    """A command of ospnext."""
    return [sys.executable, "-m", "ospnext", *map(str, words)]


def script(run: Run, name: str, out: Path, more: str, *words: object) -> list[str]:
    """A script beside this one."""
    command = [sys.executable, ROOT / "benchmarks" / name, "--out", out, "--device", run.device, *words]
    return [*map(str, command), *shlex.split(more)]


def recipe(run: Run) -> None:
    """The shapes recipe from the beginning, and its grade."""
    args = run.args
    if "recipe" in args.without:
        return
    text, out = args.out / "text", args.out / "recipe"
    words = [f"output_dir={text}", f"device={run.device}", *shlex.split(args.text)]
    run.do("text", ospnext("train-text", ROOT / "configs/shapes/text.yaml", *words), 0)
    given = {
        "output_dir": out,
        "device": run.device,
        "vae_config.vae_path": EMBEDDED / "vae",
        "text_encoder_config.checkpoint_path": text / "text_encoder",
        "text_encoder_config.text_tokenizer_path": EMBEDDED / "tokenizer",
        "training_iteration": args.steps,
        "save_interval": args.every,
        "keep_checkpoints": "",
        "trackers": "[]",
    }
    words = [f"{key}={value}" for key, value in given.items()] + shlex.split(args.recipe)
    try:
        run.do("recipe", ospnext("train", ROOT / "configs/shapes/transformer.yaml", *words), 0)
    except RuntimeError:
        run.broken.set()
        raise
    share = grade(run, args.steps, args.grade_prompts, 0)
    say(piece="recipe", steps=args.steps, share=share)


def state(run: Run, step: int) -> Path:
    """Where the recipe leaves a state."""
    return run.args.out / "recipe" / f"iter_{step:09d}"


def grade(run: Run, step: int, prompts: int, place: int) -> float:
    """The share of right videos of a state's averaged weights, which become a pipeline folder ``step_N``."""
    model, graded = run.args.out / f"step_{step}", run.args.out / f"grade_{step}"
    if not (run.args.out / f"export_{step}.done").exists():
        shutil.rmtree(model, ignore_errors=True)  # of an export that was cut short
    run.do(f"export_{step}", ospnext("export", state(run, step), model), place)
    given = {"model": model, "num_prompts": prompts, "batch_size": 128, "keep_videos": 0, "output_dir": graded}
    words = [f"{key}={value}" for key, value in (given | {"device": run.device}).items()]
    run.do(f"grade_{step}", ospnext("evaluate-shapes", *words, *shlex.split(run.args.grade)), place)
    found = json.loads((graded / "shapes.json").read_text())["result"]["everything"]
    return found["right"] / found["asked"]


def others(run: Run) -> None:
    """What stands still while reinforcement learning has the GPUs."""
    out, args = run.args.out, run.args
    pieces = {
        "hif8": script(run, "hif8_quality.py", out / "hif8", args.hif8, "--sampling-steps", 10),
        "sparse": script(run, "dense_to_sparse.py", out / "sparse", args.sparse, "--dense-steps", 1500),
    }
    together(
        [partial(run.do, name, command, place, yields=True) for place, (name, command) in enumerate(pieces.items(), 1)],
        len(run.gpus) > 2,
    )


def reinforcement(run: Run) -> None:
    """The variants of the window, from the same start."""
    if {"mix", "leading", "all"} <= set(run.args.without):
        return
    start = half_right(run) if run.args.start is None else run.args.start.resolve()
    mix, *rest = (
        partial(run.do, f"rl_{name}", variant(run, name, start, minutes), place)
        for name, minutes, place in (
            ("mix", run.args.rl_minutes, 3),
            ("leading", run.args.other_rl_minutes, 1),
            ("all", run.args.other_rl_minutes, 2),
        )
    )
    with run.alone():
        if len(run.gpus) > 3:
            together([mix, *rest])
        else:
            mix()
    together(rest)


def together(pieces: Sequence[Callable[[], None]], at_once: bool = True) -> None:
    """Do pieces side by side, or one after the other; the first that fails is told of when all have ended."""
    with ThreadPoolExecutor(len(pieces) if at_once else 1) as lanes:
        doing = [lanes.submit(piece) for piece in pieces]
    for one in doing:
        one.result()


def variant(run: Run, name: str, start: Path, minutes: float) -> list[str]:
    """The command of a variant."""
    words = ("--model", start, "--variants", name, "--minutes", minutes)
    return script(run, "rl_shapes.py", run.args.out / "rl", run.args.rl, *words)


def half_right(run: Run) -> Path:
    """The state of the recipe that is nearest to one half right, as a pipeline folder."""
    args = run.args
    shares: dict[int, float] = {}

    def measure(step: int) -> float:
        with run.alone() if len(run.gpus) < 4 else nullcontext():
            shares[step] = grade(run, step, args.start_prompts, 3)
        say(piece="start", step=step, share=shares[step])
        return shares[step]

    for step in range(args.first_state, args.steps, args.every):
        while not state(run, step).exists():
            if time.monotonic() >= run.end:
                raise OutOfTimeError
            if run.broken.is_set():
                raise RuntimeError(f"no state {step} of the recipe to start from")
            time.sleep(0.2)
        if measure(step) >= HALF[0]:
            break
    if shares[args.first_state] > HALF[1]:
        for step in range(args.first_state - args.every, 0, -args.every):
            if measure(step) <= HALF[1]:
                break
    chosen = min(shares, key=lambda step: abs(shares[step] - 0.5))
    say(piece="start", chosen=chosen, share=shares[chosen])
    return args.out / f"step_{chosen}"


def found(folder: Path) -> Iterator[dict]:
    """What the scripts have printed."""
    for name in ("hif8", "sparse", "rl_mix", "rl_leading", "rl_all"):
        log = folder / f"{name}.log"
        for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
            if line.startswith("{"):
                yield json.loads(line)


def main() -> int:
    """0 once all pieces are there, 3 where the time was up before, 1 where one failed."""
    args = options()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    run, code = Run(args), 0
    with ThreadPoolExecutor() as lanes:
        for lane in [lanes.submit(work, run) for work in (recipe, others, reinforcement)]:
            try:
                lane.result()
            except OutOfTimeError:
                code = max(code, 3)
            except Exception as error:
                say(error=str(error))
                code = 1 if code == 0 else code
    for line in found(args.out):
        print(json.dumps(line), flush=True)
    print({0: "all is there", 3: "the time is up: the same command goes on"}.get(code, "a piece failed"))
    return code


if __name__ == "__main__":
    sys.exit(main())
