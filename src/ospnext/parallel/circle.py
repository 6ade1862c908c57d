"""The processes that share a video, handing each other what one of them has made."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ospnext.parallel.mesh import Mesh


class Circle:
    """All processes that share this process's video.

    Args:
        mesh: of the run; None in one process.

    Attributes:
        count: how many they are.
        place: of this process among them.
    """

    def __init__(self, mesh: Mesh | None) -> None:
        self._group = None if mesh is None else mesh.video.get_group()
        self.count = 1 if mesh is None else mesh.sizes.video
        self.place = 0 if mesh is None else mesh.video.get_local_rank()

    def gather(self, value: Any) -> list[Any]:
        """What every process gives, in order of place."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self._group)
        return values

    def hand_round(
        self, owner: int, own: Sequence[Tensor] | None, shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype],
        device: torch.device,
    ) -> list[Tensor]:  # fmt: skip
        """The owner's tensors, on all of them.

        Args:
            owner: its place.
            own: in the owner, its tensors on ``device``.
            shapes, dtypes: of them.
            device: of this process.
        """
        if self.count == 1 or owner == self.place:
            assert own is not None
            tensors = [x.contiguous() for x in own]
        else:
            tensors = [torch.empty(*s, dtype=d, device=device) for s, d in zip(shapes, dtypes, strict=True)]
        if self.count > 1:
            for x in tensors:
                dist.broadcast(x, group=self._group, group_src=owner)
        return tensors
