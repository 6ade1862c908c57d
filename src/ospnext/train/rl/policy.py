"""The transformer as reinforcement learning asks it: what leads a rollout, what is trained, and the base beside it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ospnext.checkpoints.lora import adapter_disabled
from ospnext.flow.sample import BothHalves, ConditionalVelocity, GuidanceMode, Halves, Velocity, guided
from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.train.rl.settings import GRPOConfig


class Text(NamedTuple):
    """Embeddings of prompts [B, L, D], and of what they avoid; None where there is no guidance."""

    cond: Tensor
    uncond: Tensor | None

    def rows(self, places: slice | list[int]) -> "Text":
        """Those of some samples."""
        return Text(self.cond[places], None if self.uncond is None else self.uncond[places])


class Policy:
    """Velocities of the model with its adapter, and of the base without.

    Args:
        transformer: with an adapter.
        config: which guidance, and how much of it is trained.
        dtype: of the base; below float32 the adapter's float32 weights are cast to it by autocast.
        halves: how both halves of guidance are had where processes share them; None: as the configuration says.
    """

    def __init__(
        self,
        transformer: OSPNextTransformer3DModel,
        config: GRPOConfig,
        dtype: torch.dtype,
        halves: BothHalves | None = None,
    ) -> None:
        self.transformer, self.config, self.dtype = transformer, config, dtype
        self._halves: GuidanceMode | BothHalves = halves or config.guidance_mode
        self._trained = self._halves
        if config.cfg_gradient == "detached":
            self._trained = _Detached(halves)
            self._halves = halves or "sequential"  # in the same shapes as it is trained in

    @property
    def trains_what_leads(self) -> bool:
        """Whether the velocity that is trained is the one that leads rollouts."""
        return not self.config.guided or self.config.use_cfg_in_train

    def leading(self, text: Text) -> Velocity:
        """The velocity of rollouts."""
        return guided(self._ask, text.cond, text.uncond, self.config.guidance_scale, self._halves)

    def trained(self, text: Text) -> Velocity:
        """The velocity whose density is made larger or smaller."""
        scale = self.config.guidance_scale if self.config.use_cfg_in_train else 1.0
        return guided(self._ask, text.cond, text.uncond, scale, self._trained)

    @contextmanager
    def base(self) -> Iterator[None]:
        """Inside, all velocities are those of the model without its adapter, without gradients."""
        with torch.no_grad(), adapter_disabled(self.transformer):
            yield

    def _ask(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.transformer(x, t, condition, return_dict=False)[0]


class _Detached:
    """Both halves of guidance, the unconditional one without a gradient (OSP-Next): g · dv(c), which is biased."""

    def __init__(self, halves: BothHalves | None) -> None:
        self._halves = halves

    def __call__(self, velocity: ConditionalVelocity, x: Tensor, t: Tensor, uncond: Tensor, cond: Tensor) -> Halves:
        """v(∅) and v(c)."""
        if self._halves is not None:
            both = self._halves(velocity, x, t, uncond, cond)
            return Halves(both.uncond.detach(), both.cond)
        with torch.no_grad():
            without = velocity(x, t, uncond).float()
        return Halves(without, velocity(x, t, cond).float())
