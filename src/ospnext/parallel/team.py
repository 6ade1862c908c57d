"""Decoding shared by the processes of a video: they agree on the way, and the first of them gathers the pieces."""

import torch
import torch.distributed as dist
from torch import Tensor

from ospnext.parallel.mesh import Mesh


class VideoTeam:
    """The ``models.vae_pieces.Team`` of all processes that share a video.

    Args:
        mesh: of the run.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._group = mesh.video.get_group()
        self.count = mesh.sizes.video
        self.place = mesh.video.get_local_rank()

    def all(self, ok: bool) -> bool:
        """Whether all of them say ``ok``."""
        flag = torch.tensor(int(ok))
        dist.all_reduce(flag, dist.ReduceOp.MIN, self._group)
        return bool(flag)

    def collect(self, own: list[Tensor], count: int) -> list[Tensor] | None:
        """All ``count`` tensors to the first, which has number 0; the next one has number 1, and so on around."""
        shapes: list[list[torch.Size]] = [[]] * self.count
        dist.all_gather_object(shapes, [x.shape for x in own], group=self._group)
        if self.place > 0:
            for x in own:
                dist.send(x.contiguous(), group=self._group, group_dst=0)
            return None
        made = []
        for number in range(count):
            turn, member = divmod(number, self.count)
            if member == 0:
                made.append(own[turn])
                continue
            x = own[0].new_empty(shapes[member][turn])
            dist.recv(x, group=self._group, group_src=member)
            made.append(x.cpu())  # one piece at a time on the device
        return made
