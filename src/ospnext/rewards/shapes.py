"""The grader of the shapes world as a reward: what a prompt asked for, read back from pixels. Verifiable, no model.

A prompt's metadata hold its ``scene`` (``Scene.to_dict``). The score is the mean of two: the share of what was asked
(number, shape, colour, motion, ...) that is right, which tells half-right videos of a group apart, and whether all is.
With ``shape_softness`` the mark of the shape is a number: it rises before the shape is right, and goes on after.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ospnext.rewards.base import Metadata
from ospnext.shapes.grade import Grade
from ospnext.shapes.grading import Graders
from ospnext.shapes.scene import Scene

_NAMED = ("count", "shape", "colour", "motion")  # every prompt asks for these


class Shapes:
    """The grader, in processes of its own.

    Args:
        device: not used: it works on the CPU.
        workers: processes; None for as many as there are cores.
        all_right: how much of the score is for videos in which everything is right.
        shape_softness: in ``score`` the mark of the shape is 1 / (1 + exp(-margin / softness)), where the margin is
            ``Grade.shape_margin``, in IoU; None leaves it at right or wrong.

    Raises:
        ValueError: an option is out of range, or no number.
    """

    needs = ("scene",)

    def __init__(
        self,
        device: torch.device | str = "cpu",
        workers: int | None = None,
        all_right: float = 0.5,
        shape_softness: float | None = None,
    ) -> None:
        self.check(workers, all_right, shape_softness)
        self.graders, self.all_right, self.softness = Graders(workers), all_right, shape_softness

    @staticmethod
    def check(workers: Any = None, all_right: Any = 0.5, shape_softness: Any = None) -> None:
        """Refuse what will not do.

        Raises:
            ValueError: an option is out of range, or no number.
        """
        if not (workers is None or (_is_number(workers) and isinstance(workers, int) and workers >= 1)):
            raise _refused("workers", workers, "a whole number of processes, 1 or more; leave it out for one a core")
        if not (_is_number(all_right) and 0 <= all_right <= 1):
            raise _refused("all_right", all_right, "a share, 0 to 1")
        if not (shape_softness is None or (_is_number(shape_softness) and 0 < shape_softness < math.inf)):
            raise _refused(
                "shape_softness", shape_softness, "an overlap above 0, such as 0.05; leave it out for right or wrong"
            )

    def __call__(self, videos: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> dict[str, Any]:
        """``score``, ``everything``, each attribute's mark and ``shape_margin``, ``[B]``; all but the last in 0..1.

        Raises:
            ValueError: a prompt's metadata hold no scene.
        """
        if any("scene" not in one for one in metadata):
            raise ValueError("the reward shapes needs the scene of every prompt: use prompt_file=shapes:large")
        scenes = [Scene.from_dict(one["scene"]) for one in metadata]
        frames = (videos.float() * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()
        grades = self.graders(list(frames), scenes)
        parts: dict[str, list[float]] = {name: [float(bool(grade.marks[name])) for grade in grades] for name in _NAMED}
        everything = [float(grade.all_right) for grade in grades]
        margins = [grade.shape_margin for grade in grades]
        return {"score": list(map(self._score, grades)), "everything": everything, **parts, "shape_margin": margins}

    def _score(self, grade: Grade) -> float:
        marks = {name: float(mark) for name, mark in grade.marks.items() if mark is not None}
        if self.softness is not None:
            marks["shape"] = 0.5 + 0.5 * math.tanh(grade.shape_margin / (2 * self.softness))  # exp would overflow
        return (1 - self.all_right) * sum(marks.values()) / len(marks) + self.all_right * math.prod(marks.values())

    def close(self) -> None:
        """End the processes."""
        self.graders.close()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refused(name: str, value: Any, what: str) -> ValueError:
    return ValueError(f"reward_config.options.shapes.{name} is {value!r}: it must be {what}")
