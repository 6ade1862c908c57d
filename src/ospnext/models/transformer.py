"""The sparse text-to-video transformer: Wan2.1's network with a layout for every block.

It has Wan2.1's parameters, names and arithmetic and adds none, so Wan2.1 weights load one to one; with every block
FULL it *is* Wan2.1. What is sparse is only which tokens attend to each other (``ops/layout.py``). The two seams,
``switch`` between blocks and ``attend`` inside them, have no parameters and can be replaced from outside; nothing
here knows of processes or number formats.

The module path ``ospnext.models.transformer`` is written into saved pipelines: it is part of the file format.
"""

import math
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ospnext.ops.attention import Attend, check_kernel
from ospnext.ops.fused import add, add_norm, embed_patches, linear_gelu, norm, norm_rope, rms_norm
from ospnext.ops.layout import Grid, Leave, Switch, block_layouts
from ospnext.ops.rope import apply_rope, rope_table


class RMSNorm(nn.RMSNorm):
    """RMS norm over the last axis, computed in float32 whatever the dtype of input and weight."""

    eps: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, N, dim]`` to the same."""
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Projections, query-key norm and the ``attend`` seam, shared by self- and cross-attention."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        # Over all heads together, before they are split: Wan's choice.
        self.norm_q = RMSNorm(dim, eps=eps) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(dim, eps=eps) if qk_norm else nn.Identity()
        self.attend = Attend()

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, N, dim] -> [B, N, heads, head_dim]``."""
        return x.unflatten(-1, (self.num_heads, -1))


class SelfAttention(Attention):
    """Attention of every token to its segment, with rotary positions."""

    def forward(self, x: torch.Tensor, rope: torch.Tensor, segments: tuple[int, ...]) -> torch.Tensor:
        """``x [B, N, dim]``, ``rope [N, head_dim]`` and segment lengths, all in the same token order."""
        q = self.rotated(self.q(x), self.norm_q, rope)
        k = self.rotated(self.k(x), self.norm_k, rope)
        return self.o(self.attend(q, k, self.heads(self.v(x)), segments).flatten(-2))

    def rotated(self, x: torch.Tensor, norm: nn.Module, rope: torch.Tensor) -> torch.Tensor:
        """Queries or keys ``[B, N, dim]`` normalised and rotated: ``[B, N, heads, head_dim]``."""
        if isinstance(norm, RMSNorm):
            return norm_rope(x, norm.weight, rope, norm.eps)
        return apply_rope(self.heads(x), rope)


class CrossAttention(Attention):
    """Attention of every token to the whole text; token order does not matter."""

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """``x [B, N, dim]``, ``text [B, L, dim]``; padding is attended to, as in Wan2.1."""
        q = self.heads(self.norm_q(self.q(x)))
        k = self.heads(self.norm_k(self.k(text)))
        return self.o(self.attend(q, k, self.heads(self.v(text))).flatten(-2))


class FeedForward(nn.Sequential):
    """Linear, GELU, linear: a sequence, so that its parameters have the names they have in Wan."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, N, dim]`` to the same."""
        return self[2](linear_gelu(x, self[0]))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, modulated by the time embedding."""

    def __init__(
        self, dim: int, ffn_dim: int, num_heads: int, qk_norm: bool, cross_attn_norm: bool, eps: float
    ) -> None:
        super().__init__()
        self.eps = eps
        self.self_attn = SelfAttention(dim, num_heads, qk_norm, eps)
        self.norm3 = nn.LayerNorm(dim, eps) if cross_attn_norm else nn.Identity()
        self.cross_attn = CrossAttention(dim, num_heads, qk_norm, eps)
        self.ffn = FeedForward(dim, ffn_dim)
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))
        self.recomputed = True  # where gradient checkpointing is on

    def forward(
        self,
        x: torch.Tensor,
        time: torch.Tensor,
        text: torch.Tensor,
        rope: torch.Tensor,
        segments: tuple[int, ...],
        leave: Leave | None = None,
    ) -> torch.Tensor:
        """One block.

        Args:
            x: hidden states ``[B, N, dim]`` in the block's layout.
            time: float32 ``[B, 6, dim]``, shift, scale and gate of self-attention, then of the feed-forward.
            text: ``[B, L, dim]``.
            rope: ``[N, head_dim]`` in the block's layout.
            segments: segment lengths of the layout.
            leave: of ``Switch.leave``; the result is then in the layout it leads to.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.float() + time).chunk(6, dim=1)
        # The residual stays in x's dtype; norms, modulation and the sums compute in float32.
        y = self.self_attn(norm(x, 1 + scale1, shift1, self.eps), rope, segments)
        if isinstance(self.norm3, nn.LayerNorm):
            x, h = add_norm(x, y, gate1, self.norm3.weight, self.norm3.bias, self.eps)
        else:
            x = h = add(x, y, gate1)
        x, h = add_norm(x, self.cross_attn(h, text), None, 1 + scale2, shift2, self.eps)
        if leave is not None:
            return leave(lambda x, h: add(x, self.ffn(h), gate2), x, h)
        return add(x, self.ffn(h), gate2)


class Head(nn.Module):
    """Modulated norm and the projection back to patches of the latent video."""

    def __init__(self, dim: int, patch_channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.head = nn.Linear(dim, patch_channels)
        self.modulation = nn.Parameter(torch.empty(1, 2, dim))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """``x [B, N, dim]`` and the float32 time embedding ``[B, dim]`` to ``[B, N, patch_channels]``."""
        shift, scale = (self.modulation.float() + time[:, None]).chunk(2, dim=1)
        return self.head(norm(x, 1 + scale, shift, self.eps))


class OSPNextTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Text-conditioned velocity of a latent video, with Skiparse attention.

    Args:
        patch_size: latent frames, rows and columns of one token.
        text_len: length text is padded to; kept for those who prepare it.
        in_dim, out_dim: latent channels.
        dim: width, ``num_heads`` times an even head size.
        ffn_dim: width of the feed-forward.
        freq_dim: size of the sinusoidal time embedding, even.
        text_dim: width of the text encoder.
        num_heads, num_layers: attention heads and blocks.
        eps: of all norms.
        qk_norm, cross_attn_norm: Wan2.1 has both.
        skiparse_model_type, sparse_ratio, num_full_blocks, skiparse_pattern: see ``ops.layout.block_layouts``.

    Raises:
        ValueError: sizes that do not go together.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("TransformerBlock",)
    _repeated_blocks = ("TransformerBlock",)

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        text_len: int = 512,
        in_dim: int = 16,
        dim: int = 2048,
        ffn_dim: int = 8192,
        freq_dim: int = 256,
        text_dim: int = 4096,
        out_dim: int = 16,
        num_heads: int = 16,
        num_layers: int = 32,
        eps: float = 1e-6,
        qk_norm: bool = True,
        cross_attn_norm: bool = True,
        skiparse_model_type: str = "full",
        sparse_ratio: int = 2,
        num_full_blocks: int = 0,
        skiparse_pattern: str = "2d",
    ) -> None:
        super().__init__()
        if dim % num_heads or dim // num_heads % 2:
            raise ValueError(f"dim {dim} must be num_heads ({num_heads}) times an even head size")
        if freq_dim % 2:
            raise ValueError(f"freq_dim {freq_dim} must be even: as many sines as cosines")
        if min(patch_size) < 1:
            raise ValueError(f"patch_size {list(patch_size)} must be whole numbers from 1")
        self.layouts = block_layouts(num_layers, skiparse_model_type, sparse_ratio, num_full_blocks, skiparse_pattern)
        self.switch = Switch()
        frames, rows, columns = patch_size  # a list where the config was read from JSON
        patch = (frames, rows, columns)
        self.patch_embedding = nn.Conv3d(in_dim, dim, kernel_size=patch, stride=patch)
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, ffn_dim, num_heads, qk_norm, cross_attn_norm, eps) for _ in range(num_layers)
        )
        self.head = Head(dim, out_dim * math.prod(patch), eps)
        self.gradient_checkpointing = False
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise every parameter for training from scratch; the output starts at zero velocity."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm | nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, TransformerBlock | Head):
                nn.init.normal_(module.modulation, std=self.config.dim**-0.5)
        for layer in (*self.text_embedding, *self.time_embedding):
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    @property
    def attention_kernel(self) -> str:
        """Name of the attention kernel asked for; ``ops.attention.describe_kernel`` says what it means here."""
        return next(module.attend.kernel for module in self.modules() if isinstance(module, Attention))

    def set_attention_kernel(self, name: str) -> None:
        """Choose the attention kernel of every block by a name of ``ops.attention.KERNEL_NAMES``."""
        check_kernel(name)
        for module in self.modules():
            if isinstance(module, Attention):
                module.attend.kernel = name

    def embed_time(self, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps ``[B]`` in 0..1000 to float32 ``[B, dim]`` for the head and ``[B, 6, dim]`` for the blocks."""
        # In the weights' dtype, not float32: what the published sparse weights were trained with.
        dtype = next(self.time_embedding.parameters()).dtype
        embedding = self.time_embedding(sinusoid(timestep, self.config.freq_dim).to(dtype))
        return embedding.float(), self.time_projection(embedding).unflatten(1, (6, -1)).float()

    def grid(self, hidden_states: torch.Tensor) -> Grid:
        """Token grid of latents ``[B, C, T, H, W]``.

        Raises:
            ValueError: the latents are no whole number of patches.
        """
        sizes = tuple(hidden_states.shape[2:])
        if any(n % p or not n for n, p in zip(sizes, self.config.patch_size, strict=True)):
            raise ValueError(f"latents of {sizes} (T, H, W) are no multiple of the patch {self.config.patch_size}")
        return Grid(*(n // p for n, p in zip(sizes, self.config.patch_size, strict=True)))

    def unpatchify(self, patches: torch.Tensor, grid: Grid) -> torch.Tensor:
        """``[B, N, pt * ph * pw * C]`` in row-major order to latents ``[B, C, T, H, W]``."""
        (t, h, w), (pt, ph, pw), channels = grid, self.config.patch_size, self.config.out_dim
        x = patches.view(-1, t, h, w, pt, ph, pw, channels).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.reshape(-1, channels, t * pt, h * ph, w * pw)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        return_dict: bool = True,
    ) -> Any:
        """Velocity of the flow at a noisy latent video.

        Args:
            hidden_states: latents ``[B, C, T, H, W]``.
            timestep: ``[B]``, 1000 times the noise level σ.
            encoder_hidden_states: text ``[B, L, text_dim]``, zero where padded.
            return_dict: a ``Transformer2DModelOutput`` if true, else a tuple.

        Returns:
            ``sample``: float32 velocity ``[B, C, T, H, W]``.
        """
        grid = self.grid(hidden_states)
        plan = self.switch.plan(grid, self.layouts, self.config.sparse_ratio, hidden_states.device)
        table = rope_table(grid, self.config.dim // self.config.num_heads, hidden_states.device)
        rope = {layout: plan.scatter(table, layout) for layout in set(self.layouts)}
        dtype = self.patch_embedding.weight.dtype
        time, modulation = self.embed_time(timestep)
        text = self.text_embedding(encoder_hidden_states.to(dtype))

        here = self.layouts[0]
        x = plan.scatter(embed_patches(hidden_states.to(dtype), self.patch_embedding), here)
        for block, layout, there in zip(self.blocks, self.layouts, (*self.layouts[1:], self.layouts[-1]), strict=True):
            # Between blocks, not inside: never compiled or recomputed with them.
            x = self.switch(x, plan, here, layout)
            leave = self.switch.leave(plan, layout, there)
            x = self.run_block(block, x, modulation, text, rope[layout], plan.segments(layout), leave)
            here = layout if leave is None else there
        velocity = self.unpatchify(plan.gather(self.head(x, time), here), grid).float()
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def checkpoint_blocks(self, share: float) -> None:
        """Turn gradient checkpointing on for a share of the blocks, evenly spread; the others keep what is in them."""
        self.enable_gradient_checkpointing()
        for i, block in enumerate(self.blocks):
            chosen: Any = block
            chosen.recomputed = int((i + 1) * share) > int(i * share)

    def run_block(self, block: nn.Module, *args: Any) -> torch.Tensor:
        """Call a block, recomputing it in the backward pass when gradient checkpointing is on."""
        if self.gradient_checkpointing and block.recomputed and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)


def sinusoid(timestep: torch.Tensor, dim: int) -> torch.Tensor:
    """Sinusoidal embedding of timesteps ``[B]``: float32 ``[B, dim]``, cosines first, computed in float64."""
    half = dim // 2
    dtype = torch.float32 if timestep.device.type == "mps" else torch.float64  # MPS has no float64
    frequency = 10000.0 ** (-torch.arange(half, dtype=dtype, device=timestep.device) / half)
    angle = torch.outer(timestep.to(dtype), frequency)
    return torch.cat([angle.cos(), angle.sin()], dim=1).float()


OSPNextModel = OSPNextTransformer3DModel  # the name in released checkpoints
