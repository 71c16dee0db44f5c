"""CLIP's text and vision towers, after transformers' modeling_clip.py, and the Resampler of ImageDream.

The Resampler is that of IP-Adapter Plus (arXiv 2308.06721); ImageDream (arXiv 2312.02201) feeds it the states of the vision
tower's last layer but one.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mvshared.attention import FUSED, AttentionOptions
from mvshared.config import Activation, CLIPTextConfig, CLIPVisionConfig, ResamplerConfig
from mvshared.shapes import check_pictures, check_tokens
from mvtorch.attention import attention
from mvtorch.layers import gelu


class CLIPOutput(NamedTuple):
    """What a tower computes, by transformers' names.

    `hidden_states`: the embeddings (b, l, c) and the output of each layer, before the final norm. `last_hidden_state`: the last
    of them, for text after the final norm. `pooler_output` (b, c): the end token's, or the class token's after the final norm.
    `embeds` (b, projection_dim): the pooled state projected, None without a projection.
    """

    hidden_states: tuple[Tensor, ...]
    last_hidden_state: Tensor
    pooler_output: Tensor
    embeds: Tensor | None


class CLIPAttention(nn.Module):
    """Multi-head self-attention; `causal` hides later tokens."""

    def __init__(self, channels: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, *, options: AttentionOptions) -> Tensor:
        """(b, l, c) to (b, l, c)."""
        q, k, v = (_split_heads(proj(x), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(q, k, v, options=options, causal=self.causal).transpose(1, 2).flatten(2))


class CLIPMLP(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, channels: int, hidden: int, *, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(..., c) to (..., c)."""
        x = self.fc1(x)
        return self.fc2(gelu(x) if self.activation == "gelu" else x * torch.sigmoid(1.702 * x))


class CLIPEncoderLayer(nn.Module):
    """Self-attention and MLP, each with a norm before and a residual."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, *, causal: bool) -> None:
        super().__init__()
        channels, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = nn.LayerNorm(channels, eps=eps)
        self.self_attn = CLIPAttention(channels, config.num_attention_heads, causal=causal)
        self.layer_norm2 = nn.LayerNorm(channels, eps=eps)
        self.mlp = CLIPMLP(channels, config.intermediate_size, activation=config.hidden_act)

    def forward(self, x: Tensor, *, options: AttentionOptions) -> Tensor:
        """(b, l, c) to (b, l, c)."""
        x = x + self.self_attn(self.layer_norm1(x), options=options)
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    """The layers of a tower."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, *, causal: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CLIPEncoderLayer(config, causal=causal) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, *, options: AttentionOptions) -> tuple[Tensor, ...]:
        """The embeddings (b, l, c) and the output of each layer."""
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1], options=options))
        return tuple(states)


class CLIPTextEmbeddings(nn.Module):
    """Embeddings of tokens and of their positions."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (b, l) to (b, l, c)."""
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class CLIPTextModel(nn.Module):
    """The causal text tower."""

    def __init__(self, config: CLIPTextConfig, *, attention_options: AttentionOptions = FUSED) -> None:
        super().__init__()
        self.config = config
        self.attention_options = attention_options
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config, causal=True)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if config.projection_dim is not None:
            self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, ids: Tensor) -> CLIPOutput:
        """The states of token ids (b, l), whole numbers below vocab_size.

        The pooled state is that of the first end token; configs with `eos_token_id` 2, which is wrong and came with the first
        models, mean the token with the highest number. Raises OptionError for more tokens than there are positions.
        """
        check_tokens(tuple(ids.shape), longest=self.config.max_position_embeddings)
        states = self.encoder(self.embeddings(ids), options=self.attention_options)
        last = self.final_layer_norm(states[-1])
        ends = ids if self.config.eos_token_id == 2 else (ids == self.config.eos_token_id).int()
        pooled = last[torch.arange(len(ids), device=ids.device), ends.argmax(dim=1)]
        return CLIPOutput(states, last, pooled, None if self.config.projection_dim is None else self.text_projection(pooled))


class CLIPVisionEmbeddings(nn.Module):
    """A class token and patches, with their positions."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size, bias=False
        )
        self.position_embedding = nn.Embedding(config.tokens, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (b, h, w, 3) to (b, l, c)."""
        pixels = pixels.to(self.class_embedding.dtype)
        patches = self.patch_embedding(pixels.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)
        classes = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([classes, patches], dim=1) + self.position_embedding.weight


class CLIPVisionModel(nn.Module):
    """The vision tower; `pre_layrnorm` is spelled as in the checkpoints."""

    def __init__(self, config: CLIPVisionConfig, *, attention_options: AttentionOptions = FUSED) -> None:
        super().__init__()
        self.config = config
        self.attention_options = attention_options
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = CLIPEncoder(config, causal=False)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if config.projection_dim is not None:
            self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, pixels: Tensor) -> CLIPOutput:
        """The states of normalised pixels (b, image_size, image_size, 3). Raises OptionError for another shape."""
        check_pictures("pixels", tuple(pixels.shape), channels=self.config.num_channels, side=self.config.image_size)
        states = self.encoder(self.pre_layrnorm(self.embeddings(pixels)), options=self.attention_options)
        pooled = self.post_layernorm(states[-1][:, 0])
        embeds = None if self.config.projection_dim is None else self.visual_projection(pooled)
        return CLIPOutput(states, states[-1], pooled, embeds)


class PerceiverAttention(nn.Module):
    """Latents that attend to a picture's tokens and to themselves."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        inner = config.heads * config.dim_head
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(config.hidden_dim)
        self.norm2 = nn.LayerNorm(config.hidden_dim)
        self.to_q = nn.Linear(config.hidden_dim, inner, bias=False)
        self.to_kv = nn.Linear(config.hidden_dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, config.hidden_dim, bias=False)

    def forward(self, x: Tensor, latents: Tensor, *, options: AttentionOptions) -> Tensor:
        """Tokens (b, m, c) and latents (b, l, c) to (b, l, c)."""
        latents = self.norm2(latents)
        q = _split_heads(self.to_q(latents), self.heads)
        keys, values = self.to_kv(torch.cat([self.norm1(x), latents], dim=1)).chunk(2, dim=-1)
        out = attention(q, _split_heads(keys, self.heads), _split_heads(values, self.heads), options=options)
        return self.to_out(out.transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """A fixed number of image tokens from the vision tower's states. A layer is an attention and a feed-forward."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_dim, config.hidden_dim * config.ff_mult
        self.latents = nn.Parameter(torch.zeros(1, config.num_queries, width))
        self.proj_in = nn.Linear(config.embedding_dim, width)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(config), _feed_forward(width, hidden)]) for _ in range(config.depth)
        )
        self.proj_out = nn.Linear(width, config.output_dim)
        self.norm_out = nn.LayerNorm(config.output_dim)

    def forward(self, x: Tensor, *, options: AttentionOptions = FUSED) -> Tensor:
        """States (b, m, embedding_dim) to image tokens (b, num_queries, output_dim)."""
        x = self.proj_in(x.to(self.latents.dtype))
        latents = self.latents.expand(len(x), -1, -1)
        for attend, (norm, up, _, down) in self.layers:  # pyright: ignore[reportGeneralTypeIssues]
            latents = latents + attend(x, latents, options=options)
            latents = latents + down(gelu(up(norm(latents))))
        return self.norm_out(self.proj_out(latents))


def _feed_forward(width: int, hidden: int) -> nn.ModuleList:
    return nn.ModuleList(
        [nn.LayerNorm(width), nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False)]
    )


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
