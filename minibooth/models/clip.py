"""CLIP's text encoder (Radford et al. 2021), which turns a prompt into what the UNet attends to. `vision` has its layers too.

SD 1 has OpenAI's ViT-L/14 (12 layers, quick GELU), SD 2 OpenCLIP's ViT-H/14 (GELU), published with 23 of its 24 layers:
its last state here is the penultimate one that SD 2 is conditioned on, so the final LayerNorm simply follows in both.

Shapes: B prompts, N tokens (77), D width.
"""

import torch
from torch import Tensor, nn

from minibooth.models import ops
from minibooth.models.config import CLIPTextConfig, TransformerConfig


class SelfAttention(nn.Module):
    """Multi-head attention of each token to all, or to itself and those before it."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.k_proj = nn.Linear(width, width // heads * heads)  # heads that do not divide the width fit no weights
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(ops.attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, self.causal))


class MLP(nn.Module):
    """Two linear layers, with an activation in between."""

    def __init__(self, width: int, inner: int, activation: str):
        super().__init__()
        self.activation = ops.ACTIVATIONS[activation]
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """Attention, then MLP; each normalised before and added."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.self_attn = SelfAttention(width, config.num_attention_heads, config.CAUSAL)
        self.layer_norm1 = nn.LayerNorm(width, eps)
        self.mlp = MLP(width, config.intermediate_size, config.hidden_act)
        self.layer_norm2 = nn.LayerNorm(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    """A vector per token plus a vector per position."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class Encoder(nn.Module):
    """The layers, one after the other."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The states before and after the last layer."""
        for layer in self.layers:
            before, x = x, layer(x)
        return before, x


class TextModel(nn.Module):
    """The published files keep everything under one more name, `text_model`."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.end = config.eos_token_id
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The state before the last layer [B, N, D], not normalised; the last one [B, N, D]; that at the end token [B, D].

        The end token is the first eos_token_id; where that is 2, as in published files, or no number, the largest.
        """
        penultimate, last = self.encoder(self.embeddings(ids))
        last = self.final_layer_norm(last)
        ends = ((ids == self.end).int() if type(self.end) is int and self.end != 2 else ids).argmax(dim=1)
        return penultimate, last, last[torch.arange(len(ids), device=ids.device), ends]


class CLIPText(nn.Module):
    """text_encoder(token ids [B, N]) -> [B, N, D]; XL takes `states_and_pooled` instead."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.config = config
        self.text_model = TextModel(config)
        if "CLIPTextModelWithProjection" in config.architectures:
            self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.text_model(ids)[1]

    def states_and_pooled(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The state before the last layer [B, N, D], and the one at the end token [B, D], projected [B, P] where XL does so."""
        states, _, pooled = self.text_model(ids)
        return states, self.text_projection(pooled) if hasattr(self, "text_projection") else pooled
