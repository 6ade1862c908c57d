"""The mesh of processes: data parallel x guidance x sparse sequence parallel x Ulysses.

A video's tokens are shared by ``ssp * ulysses`` processes, a *sequence*. With ``cfg = 2`` two sequences work on the
same video, one on the conditional half of guidance and one on the unconditional; ``dp`` of these groups work on
different videos.
Sparse blocks need no communication between the ``ssp`` sub-groups of a sequence, for a sub-group owns whole segments;
within a sub-group, and in dense blocks within the whole sequence, attention exchanges heads for tokens (Ulysses).

Sizes are checked before anything is built: ``fit_sizes`` needs no process but its own.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


class Sizes(NamedTuple):
    """Processes along each axis of the mesh; neighbouring ranks are neighbours along the last axis first."""

    dp: int
    cfg: int
    ssp: int
    ulysses: int

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.dp * self.video

    @property
    def video(self) -> int:
        """Processes that share a video."""
        return self.cfg * self.ssp * self.ulysses


class Sharing(NamedTuple):
    """How one process shares a video's tokens with others: numbers and names, so that what holds it can be copied."""

    ssp: int  # sub-groups, each of which owns whole segments
    ulysses: int  # processes of a sub-group
    rank: int  # this process among them: sub-group * ulysses + place in the sub-group
    group: str  # name of the process group of all of them
    subgroup: str  # name of the process group of this process's sub-group


@dataclass(frozen=True)
class Mesh:
    """The processes of a run, arranged; made by ``build_mesh``."""

    sizes: Sizes
    devices: DeviceMesh  # axes dp, cfg, ssp, ulysses
    sequence: DeviceMesh  # the axes ssp and ulysses as one
    video: DeviceMesh  # all axes but dp as one

    @property
    def group(self) -> int:
        """Which of the ``dp`` groups this process is in."""
        return self.devices["dp"].get_local_rank()

    @property
    def sharing(self) -> Sharing:
        """This process's part in its sequence."""
        group, subgroup = (axis.get_group().group_name for axis in (self.sequence, self.devices["ulysses"]))
        return Sharing(self.sizes.ssp, self.sizes.ulysses, self.sequence.get_local_rank(), group, subgroup)


def fit_sizes(world: int, ssp: int, ulysses: int, segments: int, cfg: int = 1) -> Sizes:
    """The mesh of a number of processes: what a video leaves over goes to data parallelism.

    Args:
        world: processes in all.
        ssp: sub-groups of a sequence.
        ulysses: processes of a sub-group.
        segments: attention segments of the model's sparse blocks, see ``ownership.segment_count``.
        cfg: sequences that share the guidance of a video, 1 or 2.

    Raises:
        ValueError: the numbers do not go together; the message names those that do.
    """
    if world < 1:
        raise ValueError(f"world size is {world}: it must be at least 1")
    if cfg not in (1, 2) or world % cfg:
        fits = "1" if world % 2 else "1 or 2"
        raise ValueError(f"cfg_parallel_size {cfg} does not fit {world} processes. What fits: {fits}")
    if min(ssp, ulysses) < 1 or segments % ssp or world // cfg % (ssp * ulysses):
        beside = f" with cfg_parallel_size {cfg}" if cfg > 1 else ""
        raise ValueError(
            f"ssp {ssp} x ulysses {ulysses} (skiparse_sp_size x sp_size) does not fit {world} processes{beside} and "
            f"{segments} attention segments: ssp must divide the segments, and ssp x ulysses the processes"
            f"{' of each half' if cfg > 1 else ''}. What fits: {_choices(world // cfg, segments)}"
        )
    return Sizes(world // (cfg * ssp * ulysses), cfg, ssp, ulysses)


def check_segments(sizes: Sizes, segments: int) -> None:
    """Hold a mesh to a model.

    Raises:
        ValueError: the model's sparse blocks have a number of segments that ``ssp`` does not divide.
    """
    fit_sizes(sizes.world, sizes.ssp, sizes.ulysses, segments, sizes.cfg)


def build_mesh(sizes: Sizes, device_type: str) -> Mesh:
    """Arrange the processes of this run; every one of them calls it.

    The default process group is used where there is one, else torch makes it from torchrun's variables.

    Args:
        sizes: of ``fit_sizes``.
        device_type: ``cuda``, ``cpu``, ...

    Raises:
        ValueError: the run has another number of processes.
    """
    if dist.is_initialized() and dist.get_world_size() != sizes.world:
        raise ValueError(f"a mesh of {tuple(sizes)} needs {sizes.world} processes, but {dist.get_world_size()} run")
    devices = init_device_mesh(device_type, sizes, mesh_dim_names=Sizes._fields)
    return Mesh(
        sizes,
        devices,
        devices["ssp", "ulysses"]._flatten("sequence"),
        devices["cfg", "ssp", "ulysses"]._flatten("video"),
    )


def _choices(world: int, segments: int) -> str:
    """``ssp 1 with ulysses 1, 2 or 4; ssp 2 with ulysses 1 or 2; ...``"""
    choices = []
    for ssp in _divisors(segments):
        if world % ssp == 0:
            *most, last = (str(n) for n in _divisors(world // ssp))
            choices.append(f"ssp {ssp} with ulysses {' or '.join([', '.join(most), last] if most else [last])}")
    return "; ".join(choices)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
