"""CLIP's text transformer (Radford et al. 2021), also in OpenCLIP's sizes, as the text encoder of Stable Diffusion."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import CLIPTextConfig, CLIPVisionConfig
from ..loading import Model
from .layers import merge_heads, split_heads


class CLIPTextOutput(NamedTuple):
    """What the encoder gives.

    Attributes:
        last_hidden_state: (N, L, D) after the final layer norm.
        hidden_states: the embeddings and every layer's output, (N, L, D) each, without the final layer norm.
        pooled: (N, D) the last state at the end-of-text token, (N, projection_dim) where the model projects it.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...]
    pooled: Tensor


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI CLIP's approximation of GELU: ``x * sigmoid(1.702 x)`` (Hendrycks & Gimpel 2016)."""
    return x * torch.sigmoid(1.702 * x)


class Embeddings(nn.Module):
    """Token embeddings plus learnt positions."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(N, L) -> (N, L, D)."""
        return self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases; ``causal`` hides later positions from earlier ones."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, D) -> (N, L, D)."""
        q, k, v = (split_heads(project(x), self.heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)))


class MLP(nn.Module):
    """Two linear layers around the model's activation."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig):
        super().__init__()
        self.act = quick_gelu if config.hidden_act == "quick_gelu" else F.gelu
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, D) -> (N, L, D)."""
        return self.fc2(self.act(self.fc1(x)))


class EncoderLayer(nn.Module):
    """Attention and perceptron, each behind a layer norm and a residual connection."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, causal: bool):
        super().__init__()
        self.self_attn = SelfAttention(config.hidden_size, config.num_attention_heads, causal)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, D) -> (N, L, D)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The stack of layers; text is read causally, a picture is not."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, causal: bool):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config, causal) for _ in range(config.num_hidden_layers))


class TextTransformer(nn.Module):
    """Embeddings, layers, final layer norm."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, causal=True)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(N, L) -> the normalised last state (N, L, D) and every raw state."""
        states = [self.embeddings(input_ids)]
        for layer in self.encoder.layers:
            states.append(layer(states[-1]))
        return self.final_layer_norm(states[-1]), tuple(states)


def end_of_text(input_ids: Tensor, eos_token_id: int | None) -> Tensor:
    """Position (N,) of each prompt's end-of-text token.

    Checkpoints whose ``eos_token_id`` is the historical 2 mean the token with the highest id; others mean the first
    token with that id.
    """
    if eos_token_id is None or eos_token_id == 2:
        return input_ids.argmax(dim=-1)
    return (input_ids == eos_token_id).int().argmax(dim=-1)


class CLIPTextModel(Model):
    """Text encoder of SD 1.5 and 2.x, and the first one of SDXL."""

    config_class = CLIPTextConfig
    renames = ((r"^(?!text_model\.|text_projection\.)", "text_model."),)
    # A buffer of old exports, and the projection of full CLIP exports that this model does not use.
    ignored: tuple[str, ...] = (r"embeddings\.position_ids$", r"^text_projection\.")

    def __init__(self, config: CLIPTextConfig):
        super().__init__(config)
        self.config: CLIPTextConfig = config
        self.text_model = TextTransformer(config)

    def forward(self, input_ids: Tensor) -> CLIPTextOutput:
        """Token ids (N, L), int64, L <= max_position_embeddings -> states and the pooled text."""
        last, states = self.text_model(input_ids)
        rows = torch.arange(input_ids.shape[0], device=input_ids.device)
        return CLIPTextOutput(last, states, last[rows, end_of_text(input_ids, self.config.eos_token_id)])


class CLIPTextModelWithProjection(CLIPTextModel):
    """Second text encoder of SDXL (OpenCLIP bigG): its pooled text goes through a projection."""

    ignored = (r"embeddings\.position_ids$",)

    def __init__(self, config: CLIPTextConfig):
        super().__init__(config)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim or config.hidden_size, bias=False)

    def forward(self, input_ids: Tensor) -> CLIPTextOutput:
        """As `CLIPTextModel.forward`; ``pooled`` is (N, projection_dim)."""
        output = super().forward(input_ids)
        return output._replace(pooled=self.text_projection(output.pooled))
