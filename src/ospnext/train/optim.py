"""How a step changes the weights: the learning-rate schedule, AdamW's parameter groups, the moving average."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ospnext.parallel.fsdp import shard_of

Schedule = Literal["constant", "cosine"]

_DECAYING = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def learning_rate(step: int, peak: float, schedule: Schedule, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of a step, counted from 0: a linear warm-up, then constant or a half cosine down to zero."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def adamw(
    modules: Mapping[str, nn.Module], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over every trainable parameter; only the weights of linear, convolution and embedding layers decay.

    Norms, biases and modulations set a scale; pulling it to zero would fight what they are there for.
    """
    trained = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    layers = (m for module in modules.values() for m in module.modules() if isinstance(m, _DECAYING))
    weights = {id(m.weight) for m in layers}
    groups = [
        {"params": [p for p in trained if id(p) in weights], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in weights], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cuda", "cpu") for p in trained)
    # None lets torch choose: one kernel for many tensors (foreach) where a fused step is not available.
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused or None)


def moments(optimiser: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """AdamW's state of every parameter by the parameter's name, made now and not at the first step.

    So there is always the same to save and to fill, whether a step was taken or not.
    """
    fused = bool(optimiser.defaults.get("fused"))
    for p in named.values():
        state = optimiser.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if fused else "cpu")
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(p, memory_format=torch.preserve_format)
    return {name: optimiser.state[p] for name, p in named.items()}


class MovingAverage:
    """Exponential moving average of parameters that are trained, in float32, sharded as they are, on their device.

    Attributes:
        live: the parameters by ``module.parameter``.
        shadow: their averages.
        updates: how many there were.

    The decay grows from 0.1 as (1 + n) / (10 + n) until it reaches ``decay``, so that the average of a short run does
    not remember its random start.
    """

    def __init__(self, modules: Mapping[str, nn.Module], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.live = {
            f"{name}.{key}": p for name, m in modules.items() for key, p in m.named_parameters() if p.requires_grad
        }
        self.shadow = {key: p.detach().float().clone() for key, p in self.live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """shadow += (1 - decay) (parameter - shadow)."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        live = [shard_of(p).values.detach().float() for p in self.live.values()]
        torch._foreach_lerp_([shard_of(shadow).values for shadow in self.shadow.values()], live, 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averaged and the live values: once to evaluate the average, once more to train on."""
        for key, p in self.live.items():
            own, averaged = shard_of(p).values, shard_of(self.shadow[key]).values
            kept = own.detach().clone()
            own.copy_(averaged)
            averaged.copy_(kept)
