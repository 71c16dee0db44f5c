"""CLIP's towers and the Resampler of both backends against transformers and diffusers with the same random weights."""

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from helpers import BACKENDS, FLOAT16_RMS, FLOAT32_RMS, Backend, assert_close, copy_weights, from_numpy, randomise, set_dtype

import mvmlx.clip
import mvtorch.clip
from mvshared.attention import AttentionOptions
from mvshared.config import CLIPTextConfig, CLIPVisionConfig, ResamplerConfig
from mvshared.errors import OptionError

TEXT = CLIPTextConfig(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=16,
    eos_token_id=59,
)
TEXTS = {
    "OpenCLIP-H": TEXT,
    "CLIP-L": replace(TEXT, hidden_act="quick_gelu"),
    "with projection": replace(TEXT, projection_dim=20),
    "the first models' end token": replace(TEXT, eos_token_id=2),
    "another eps": replace(TEXT, layer_norm_eps=1e-2, num_attention_heads=1),
}
VISION = CLIPVisionConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14
)
VISIONS = {
    "ViT-H/14": VISION,
    "ViT-L/14": replace(VISION, hidden_act="quick_gelu", projection_dim=24),
    "ViT-B/32": replace(VISION, patch_size=32, image_size=64, projection_dim=24),
    "patches that leave a rest": replace(VISION, image_size=60),
}
RESAMPLER = ResamplerConfig(embedding_dim=40, output_dim=24, hidden_dim=32, depth=2, heads=3, dim_head=8, num_queries=5)
PLAIN = AttentionOptions(implementation="plain")
SLICED = AttentionOptions(implementation="sliced", budget_bytes=3 * 16 * 4)


def make(kind: str, config: Any, backend: Backend, **arguments: Any) -> Any:
    """The module called `kind` of both clip.py with random weights, the same on both backends."""
    model = getattr(mvtorch.clip, kind)(config, **arguments)
    randomise(model)
    return model if backend == "torch" else copy_weights(model, getattr(mvmlx.clip, kind)(config, **arguments))


def text_oracle(config: CLIPTextConfig) -> Any:
    given = {name: value for name, value in asdict(config).items() if value is not None}
    kind = transformers.CLIPTextModel if config.projection_dim is None else transformers.CLIPTextModelWithProjection
    return load(kind(transformers.CLIPTextConfig(**given)), make("CLIPTextModel", config, "torch"), "text_model.")


def vision_oracle(config: CLIPVisionConfig) -> Any:
    given = {name: value for name, value in asdict(config).items() if value is not None}
    kind = transformers.CLIPVisionModel if config.projection_dim is None else transformers.CLIPVisionModelWithProjection
    return load(kind(transformers.CLIPVisionConfig(**given)), make("CLIPVisionModel", config, "torch"), "vision_model.")


def load(oracle: Any, model: torch.nn.Module, prefix: str) -> Any:
    """Give the oracle our weights, exactly; only the models with a projection of transformers 5 keep the prefix."""
    prefixed = any(name.startswith(prefix) for name in oracle.state_dict())
    weights = {
        prefix + name if prefixed and not name.endswith("projection.weight") else name: value
        for name, value in model.state_dict().items()
    }
    oracle.load_state_dict(weights, strict=True)
    return oracle.eval()


def token_ids(config: CLIPTextConfig, *, length: int = 16) -> np.ndarray:
    ids = np.random.default_rng(0).integers(3, config.vocab_size - 1, (3, length))
    ids[0, length - 4 :] = config.eos_token_id  # padded with the end token: the first one counts
    ids[1, length - 1] = ids[2, 2] = config.eos_token_id
    return ids


def run(model: Any, x: np.ndarray) -> Any:
    with torch.no_grad():
        return model(from_numpy(model, x))


def assert_outputs_close(actual: Any, expected: Any, *, embeds: str, rms: float = FLOAT32_RMS) -> None:
    """Compare all the hidden states, the last and the pooled one, and the projection called `embeds`, if there is one."""
    assert len(actual.hidden_states) == len(expected.hidden_states) == 4
    for state, oracle in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert_close(state, oracle, rms=rms)
    assert_close(actual.last_hidden_state, expected.last_hidden_state, rms=rms)
    if hasattr(expected, embeds):
        assert_close(actual.embeds, getattr(expected, embeds), rms=rms)
    else:
        assert actual.embeds is None
        assert_close(actual.pooler_output, expected.pooler_output, rms=rms)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TEXTS)
def test_text_states_are_those_of_transformers(name: str, backend: Backend) -> None:
    config, ids = TEXTS[name], token_ids(TEXTS[name])
    with torch.no_grad():
        expected = text_oracle(config)(input_ids=torch.from_numpy(ids), output_hidden_states=True)
    assert_outputs_close(run(make("CLIPTextModel", config, backend), ids), expected, embeds="text_embeds")


@pytest.mark.parametrize("backend", BACKENDS)
def test_fewer_tokens_than_positions(backend: Backend) -> None:
    ids = token_ids(TEXT, length=5)
    with torch.no_grad():
        expected = text_oracle(TEXT)(input_ids=torch.from_numpy(ids), output_hidden_states=True)
    assert_outputs_close(run(make("CLIPTextModel", TEXT, backend), ids), expected, embeds="text_embeds")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_final_norm_of_the_penultimate_layer_is_that_of_transformers(backend: Backend) -> None:
    ids = token_ids(TEXT)
    oracle, model = text_oracle(TEXT), make("CLIPTextModel", TEXT, backend)
    with torch.no_grad():
        states = oracle(input_ids=torch.from_numpy(ids), output_hidden_states=True).hidden_states
        expected = getattr(oracle, "text_model", oracle).final_layer_norm(states[-2])
        actual = model.final_layer_norm(run(model, ids).hidden_states[-2])
    assert_close(actual, expected, rms=FLOAT32_RMS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [PLAIN, SLICED], ids=["plain", "sliced"])
def test_causal_attention_is_the_same_written_out_and_in_pieces(options: AttentionOptions, backend: Backend) -> None:
    ids = token_ids(TEXT)
    fused = run(make("CLIPTextModel", TEXT, backend), ids)
    other = run(make("CLIPTextModel", TEXT, backend, attention_options=options), ids)
    assert_close(other.last_hidden_state, fused.last_hidden_state, rms=FLOAT32_RMS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_changes_nothing_before_it(backend: Backend) -> None:
    ids = token_ids(TEXT)
    changed = ids.copy()
    changed[:, 9] = 1
    model = make("CLIPTextModel", TEXT, backend)
    before, after = (np.asarray(run(model, x).last_hidden_state) for x in (ids, changed))
    assert (before[:, :9] == after[:, :9]).all()
    assert (before[:, 9:] != after[:, 9:]).any(axis=-1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", VISIONS)
def test_vision_states_are_those_of_transformers(name: str, backend: Backend) -> None:
    config = VISIONS[name]
    pixels = np.random.default_rng(0).standard_normal((2, config.image_size, config.image_size, 3), dtype=np.float32)
    with torch.no_grad():
        expected = vision_oracle(config)(torch.from_numpy(pixels).permute(0, 3, 1, 2), output_hidden_states=True)
    assert_outputs_close(run(make("CLIPVisionModel", config, backend), pixels), expected, embeds="image_embeds")


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_states_stay_close_to_float32(backend: Backend) -> None:
    pixels = np.random.default_rng(0).standard_normal((2, 56, 56, 3), dtype=np.float32)
    for kind, config, x in (("CLIPTextModel", TEXT, token_ids(TEXT)), ("CLIPVisionModel", VISION, pixels)):
        expected = run(make(kind, config, "torch"), x)
        actual = run(set_dtype(make(kind, config, backend), "float16"), x)
        assert_close(actual.last_hidden_state, expected.last_hidden_state, rms=FLOAT16_RMS)
        assert_close(actual.pooler_output, expected.pooler_output, rms=FLOAT16_RMS)


def resampler_oracle(config: ResamplerConfig) -> IPAdapterPlusImageProjection:
    """diffusers' Resampler with our weights: other names, keys and values apart."""
    oracle = IPAdapterPlusImageProjection(
        embed_dims=config.embedding_dim,
        output_dims=config.output_dim,
        hidden_dims=config.hidden_dim,
        depth=config.depth,
        dim_head=config.dim_head,
        heads=config.heads,
        num_queries=config.num_queries,
        ffn_ratio=config.ff_mult,
    )
    renamed = {"0.norm1": "ln0", "0.norm2": "ln1", "0.to_q": "attn.to_q", "0.to_out": "attn.to_out.0"}
    renamed |= {"1.0": "ff.0", "1.1": "ff.1.net.0.proj", "1.3": "ff.1.net.2"}
    weights = {}
    for name, value in make("Resampler", config, "torch").state_dict().items():
        parts = name.split(".")
        if parts[0] != "layers":
            weights[name] = value
        elif parts[3] == "to_kv":
            weights[f"layers.{parts[1]}.attn.to_k.weight"], weights[f"layers.{parts[1]}.attn.to_v.weight"] = value.chunk(2)
        else:
            weights[f"layers.{parts[1]}.{renamed['.'.join(parts[2:4])]}.{parts[4]}"] = value
    oracle.load_state_dict(weights, strict=True)
    return oracle.eval()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_image_tokens_are_those_of_diffusers(dtype: str, backend: Backend) -> None:
    states = np.random.default_rng(0).standard_normal((2, 11, RESAMPLER.embedding_dim), dtype=np.float32)
    with torch.no_grad():
        expected = resampler_oracle(RESAMPLER)(torch.from_numpy(states))
    actual = run(set_dtype(make("Resampler", RESAMPLER, backend), dtype), states)
    assert_close(actual, expected, rms=FLOAT32_RMS if dtype == "float32" else FLOAT16_RMS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_does_not_fit_is_refused(backend: Backend) -> None:
    text, vision = make("CLIPTextModel", TEXT, backend), make("CLIPVisionModel", VISION, backend)
    for ids in (np.zeros((1, 17), np.int64), np.zeros((1, 0), np.int64), np.zeros(4, np.int64)):
        with pytest.raises(OptionError, match="token ids must be of shape"):
            run(text, ids)
    for shape in ((1, 64, 64, 3), (1, 56, 56, 4), (56, 56, 3)):
        with pytest.raises(OptionError, match=r"pixels must be of shape \(n, 56, 56, 3\)"):
            run(vision, np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (CLIPTextConfig, {"hidden_size": 100}),
        (CLIPTextConfig, {"num_hidden_layers": 0}),
        (CLIPTextConfig, {"hidden_act": "relu"}),
        (CLIPVisionConfig, {"image_size": 7}),
        (CLIPVisionConfig, {"layer_norm_eps": 0.0}),
        (ResamplerConfig, {"heads": 0}),
    ],
)
def test_configurations_that_make_no_sense_cannot_be_made(kind: type[Any], values: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as caught:
        kind(**values)
    assert caught.value.name in values


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_above_the_end_token_are_not_the_end(backend: Backend) -> None:
    """Concepts of textual inversion have numbers behind it."""
    config = replace(TEXT, eos_token_id=TEXT.vocab_size - 5)
    ids = np.random.default_rng(0).integers(3, config.eos_token_id, (2, 12))
    ids[:, 4], ids[:, 8] = config.vocab_size - 2, config.eos_token_id
    with torch.no_grad():
        expected = text_oracle(config)(input_ids=torch.from_numpy(ids), output_hidden_states=True)
    assert_outputs_close(run(make("CLIPTextModel", config, backend), ids), expected, embeds="text_embeds")
