"""Where a pipeline's components are, and when they move: diffusers' methods, and no hooks.

pipe.to("cuda")
pipe.enable_model_cpu_offload()
pipe.place("cuda", offload=["text_encoder"])
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ospnext.device import resolve_device

MODULES = ("transformer", "vae", "text_encoder")
"""The components that have weights."""


class PlacedPipeline(DiffusionPipeline):
    """A pipeline whose components can wait on the CPU until they are at work.

    Attributes:
        offload: names of components that go back to the CPU when their work is done.
        sharded: names of components whose weights processes share; they are never moved.
    """

    def __init__(self) -> None:
        super().__init__()
        self.offload: frozenset[str] = frozenset()
        self.sharded: frozenset[str] = frozenset()
        self._device: torch.device | None = None

    @property
    def _execution_device(self) -> torch.device:
        return self._device or self.transformer.device

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move (or cast) every component, as diffusers does; ends any offloading."""
        self._device, self.offload = None, frozenset()
        return super().to(*args, **kwargs)

    def place(self, device: torch.device | str, offload: Iterable[str] = ()) -> None:
        """Compute on ``device``, but keep the components named in ``offload`` on the CPU while they are idle."""
        self._device, self.offload = torch.device(device), frozenset(offload)
        for name in set(MODULES) - self.sharded:
            getattr(self, name).to("cpu" if name in self.offload else self._device)

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Hold every component on the CPU but for the one at work: the least device memory, at some time per call.

        Args:
            gpu_id: index of the accelerator.
            device: the accelerator; default: the one of this machine, or the CPU where there is none.
        """
        if device is None:
            found = resolve_device("auto")
            device = found if gpu_id is None else torch.device(found.type, gpu_id)
        self.place(device, MODULES)

    @contextmanager
    def at_work(self, name: str) -> Iterator[nn.Module]:
        """The component on the execution device, and back on the CPU afterwards if it is one to be offloaded."""
        module = getattr(self, name)
        if name in self.sharded:
            yield module
            return
        if module.device != self._execution_device:
            module.to(self._execution_device)
        try:
            yield module
        finally:
            if name in self.offload and self._execution_device.type != "cpu":
                module.to("cpu")
                torch.accelerator.empty_cache()
