"""Rewards without a model: what pixels say by themselves. For tests, and to watch what no reward asks for."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ospnext.rewards.base import Metadata


class Brightness:
    """The mean of all pixels."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        pass

    def __call__(self, videos: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """``[B, F, C, H, W]`` to ``[B]`` in 0..1."""
        return videos.float().flatten(1).mean(1)


class Motion:
    """How much pixels change from frame to frame: the mean absolute difference."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        pass

    def __call__(self, videos: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """``[B, F, C, H, W]`` to ``[B]`` in 0..1; a single frame has none."""
        if videos.shape[1] < 2:
            return videos.new_zeros(len(videos))
        return videos.float().diff(dim=1).abs().flatten(1).mean(1)


class Flicker:
    """How little pixels jump to and fro: 1 less the mean absolute second difference over time."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        pass

    def __call__(self, videos: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """``[B, F, C, H, W]`` to ``[B]``, 1 for none."""
        if videos.shape[1] < 3:
            return videos.new_ones(len(videos))
        return 1 - videos.float().diff(n=2, dim=1).abs().flatten(1).mean(1)


class Sharpness:
    """Fine structure: the mean absolute Laplacian of frames. It falls when pictures blur and rises with grain."""

    either_way = True  # where it is watched, neither is wanted

    def __init__(self, device: torch.device | str = "cpu") -> None:
        pass

    def __call__(self, videos: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """``[B, F, C, H, W]`` to ``[B]``."""
        x = videos.float()
        middle = 4 * x[..., 1:-1, 1:-1]
        around = x[..., :-2, 1:-1] + x[..., 2:, 1:-1] + x[..., 1:-1, :-2] + x[..., 1:-1, 2:]
        return (middle - around).abs().flatten(1).mean(1)
