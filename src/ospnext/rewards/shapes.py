"""The grader of the shapes world as a reward: what a prompt asked for, read back from pixels. Verifiable, no model.

A prompt's metadata hold its ``scene`` (``Scene.to_dict``). The score is the mean of two: the share of what was asked
(number, shape, colour, motion, ...) that is right, which tells half-right videos of a group apart, and whether all is.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ospnext.rewards.base import Metadata
from ospnext.shapes.grade import Grade
from ospnext.shapes.grading import Graders
from ospnext.shapes.scene import Scene


class Shapes:
    """The grader, in processes of its own.

    Args:
        device: not used: it works on the CPU.
        workers: processes; None for as many as there are cores.
        all_right: how much of the score is for videos in which everything is right.
    """

    needs = ("scene",)

    def __init__(self, device: torch.device | str = "cpu", workers: int | None = None, all_right: float = 0.5) -> None:
        self.graders, self.all_right = Graders(workers), all_right

    def __call__(self, videos: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> dict[str, Any]:
        """``score``, ``everything`` and each attribute's mark, ``[B]`` in 0..1.

        Raises:
            ValueError: a prompt's metadata hold no scene.
        """
        if any("scene" not in one for one in metadata):
            raise ValueError("the reward shapes needs the scene of every prompt: use prompt_file=shapes:large")
        scenes = [Scene.from_dict(one["scene"]) for one in metadata]
        frames = (videos.float() * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()
        grades = self.graders(list(frames), scenes)
        parts: dict[str, list[float]] = {
            name: [_mark(grade, name) for grade in grades] for name in ("count", "shape", "colour", "motion")
        }
        everything = [float(grade.all_right) for grade in grades]
        score = [(1 - self.all_right) * _share(g) + self.all_right * float(g.all_right) for g in grades]
        return {"score": score, "everything": everything, **parts}

    def close(self) -> None:
        """End the processes."""
        self.graders.close()


def _mark(grade: Grade, name: str) -> float:
    return float(bool(getattr(grade, name)))


def _share(grade: Grade) -> float:
    """The share of what was asked that is right."""
    marks = [mark for mark in asdict(grade).values() if mark is not None]
    return sum(marks) / len(marks)
