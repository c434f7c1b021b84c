"""The pieces that the networks are made of. Attribute names are those of the published state dicts."""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(
    timesteps: Tensor, dim: int, *, flip_sin_to_cos: bool = False, freq_shift: float = 0, max_period: float = 10_000
) -> Tensor:
    """Sinusoidal embedding of diffusion timesteps (Vaswani et al. 2017, sec. 3.5; Ho et al. 2020, app. B).

    Args:
        timesteps: (N,), any real dtype.
        dim: width of the embedding, at least 2.
        flip_sin_to_cos: cosines before sines.
        freq_shift: subtracted from the number of frequencies in the exponent's denominator.

    Returns:
        (N, dim) float32.
    """
    half = dim // 2
    exponent = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps[:, None].float() * torch.exp(exponent / (half - freq_shift))
    first, second = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return F.pad(torch.cat([first, second], dim=-1), (0, dim % 2))


class TimestepEmbedding(nn.Module):
    """Two-layer perceptron on a sinusoidal embedding; ``cond_proj`` adds a guidance embedding (LCM, sec. 4.2)."""

    def __init__(self, in_channels: int, time_embed_dim: int, cond_proj_dim: int | None = None):
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, time_embed_dim)
        if cond_proj_dim is not None:
            self.cond_proj = nn.Linear(cond_proj_dim, in_channels, bias=False)
        self.linear_2 = nn.Linear(time_embed_dim, time_embed_dim)

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        """(N, in_channels), optionally (N, cond_proj_dim) -> (N, time_embed_dim)."""
        if condition is not None:
            sample = sample + self.cond_proj(condition)
        return self.linear_2(F.silu(self.linear_1(sample)))


class ResnetBlock2D(nn.Module):
    """GroupNorm-SiLU-convolution twice, the timestep added in between, around a residual connection."""

    def __init__(self, in_channels: int, out_channels: int, temb_channels: int | None, groups: int, eps: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb_channels, out_channels) if temb_channels else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """(N, in_channels, H, W), ``temb`` (N, temb_channels) after its SiLU -> (N, out_channels, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None and temb is not None:
            h = h + self.time_emb_proj(temb)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample2D(nn.Module):
    """Strided convolution that halves height and width; ``padding=0`` pads right and bottom only (the VAE's way)."""

    def __init__(self, channels: int, padding: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H/2, W/2)."""
        return self.conv(x if self.conv.padding != (0, 0) else F.pad(x, (0, 1, 0, 1)))


class Upsample2D(nn.Module):
    """Nearest-neighbour enlargement, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(N, C, H, W) -> (N, C, 2H, 2W), or to ``size`` where the skip connection has an odd size."""
        x = F.interpolate(x, scale_factor=2.0) if size is None else F.interpolate(x, size=size)
        return self.conv(x)


class Prompts(NamedTuple):
    """What cross-attention sees when pictures are prompts too.

    Attributes:
        text: (N, M, cross_attention_dim).
        images: one tensor an IP-Adapter, (N, tokens, cross_attention_dim).
    """

    text: Tensor
    images: tuple[Tensor, ...]


Context: TypeAlias = Tensor | Prompts
"""What cross-attention attends to: text alone (N, M, cross_attention_dim), or with pictures."""


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017); cross-attention when ``cross_attention_dim`` is given.

    ``upcast`` computes the attention in float32, which SD 2.x's large logits need in half precision. ``image`` is the
    slot of IP-Adapters (`ip_adapter.ImageAttention`), None without any.
    """

    def __init__(
        self, query_dim: int, heads: int, head_dim: int, cross_attention_dim: int | None = None, upcast: bool = False
    ):
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.upcast = upcast
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(cross_attention_dim or query_dim, inner, bias=False)
        self.to_v = nn.Linear(cross_attention_dim or query_dim, inner, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(inner, query_dim)])
        self.image: nn.Module | None = None

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """(N, L, query_dim), ``context`` (N, M, cross_attention_dim), perhaps with pictures -> (N, L, query_dim)."""
        images: tuple[Tensor, ...] = ()
        if isinstance(context, Prompts):
            context, images = context
        context = x if context is None else context
        q, k, v = (split_heads(y, self.heads) for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        if self.upcast:
            q, k = q.float(), k.float()
        out = F.scaled_dot_product_attention(q, k, v.to(q.dtype))  # (N, heads, L, head_dim)
        if images and self.image is not None:
            out = self.image(out, q, images)
        return self.to_out[0](merge_heads(out.to(x.dtype)))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(N, L, heads * d) -> (N, heads, L, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(N, heads, L, d) -> (N, L, heads * d)."""
    return x.transpose(1, 2).flatten(2)


class GEGLU(nn.Module):
    """Linear layer gated by the GELU of its other half (Shazeer 2020)."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) -> (…, inner)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Gated perceptron of four times the width. ``net.1`` is the published layout's dropout, here an identity."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) -> (…, dim)."""
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each behind a LayerNorm and a residual connection."""

    def __init__(self, dim: int, heads: int, cross_attention_dim: int, upcast: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads, dim // heads, upcast=upcast)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, dim // heads, cross_attention_dim, upcast=upcast)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(N, L, dim), ``context`` as in `Attention.forward` -> (N, L, dim)."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nn.Module):
    """Transformer blocks over the pixels of a feature map (Rombach et al. 2022, sec. 3.3).

    ``proj_in`` and ``proj_out`` are 1x1 convolutions (SD 1.5) or linear layers (``use_linear``: SD 2.x, SDXL).
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        depth: int,
        cross_attention_dim: int,
        groups: int,
        use_linear: bool = False,
        upcast: bool = False,
    ):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if use_linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, heads, cross_attention_dim, upcast) for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels) if use_linear else nn.Conv2d(channels, channels, 1)
        self.use_linear = use_linear

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(N, C, H, W), ``context`` as in `Attention.forward` -> (N, C, H, W)."""
        height, width = x.shape[-2:]
        h = self.norm(x)
        if self.use_linear:
            h = self.proj_in(h.flatten(2).transpose(1, 2))  # (N, H*W, C)
        else:
            h = self.proj_in(h).flatten(2).transpose(1, 2)  # (N, H*W, C)
        for block in self.transformer_blocks:
            h = block(h, context)
        if self.use_linear:
            h = self.proj_out(h).transpose(1, 2).unflatten(2, (height, width))
        else:
            h = self.proj_out(h.transpose(1, 2).unflatten(2, (height, width)))
        return h + x
