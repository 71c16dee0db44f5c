"""Configurations from the shapes of tensors, and as diffusers and transformers write them.

Shapes do not tell everything: how many heads there are, and which activation, is known of the public models only.
"""

from collections.abc import Mapping
from typing import Any

from mvshared.config import (
    CLIPImageConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    ResamplerConfig,
    SchedulerConfig,
    UNetConfig,
    VAEConfig,
)
from mvshared.errors import CheckpointError
from mvshared.upscaling.config import SigmaConfig

Shapes = Mapping[str, tuple[int, ...]]

HEAD_WIDTH = 64  # of every public U-Net with linear projections, and of CLIP but for the two towers below
SD15_HEADS = 8
VIT_H_WIDTH, VIT_H_LAYERS = 1024, 24  # of OpenCLIP's text tower
VISION_HEADS = {1280: 16, 1664: 16}  # ViT-H and ViT-bigG by their width
DIFFUSERS_VERSION = "0.23.1"  # the one of the public MVDream and ImageDream folders


def ldm_unet_config(shapes: Shapes, *, reference_frame: bool = True) -> UNetConfig:
    """The U-Net whose tensors have LDM's names. Raises CheckpointError if they are no U-Net's."""
    channels: list[int] = []
    layers: list[int] = []
    depths: list[int] = []
    count, number, depth, width = 0, 1, 0, _shape(shapes, "input_blocks.0.0.weight")[0]
    while f"input_blocks.{number}.0.out_layers.3.weight" in shapes or f"input_blocks.{number}.0.op.weight" in shapes:
        block = f"input_blocks.{number}"
        if f"{block}.0.op.weight" in shapes:
            channels.append(width)
            layers.append(count)
            depths.append(depth)
            count = depth = 0
        else:
            count, width = count + 1, shapes[f"{block}.0.out_layers.3.weight"][0]
            depth = _count(shapes, f"{block}.1.transformer_blocks.{{}}.norm1.weight")
        number += 1
    channels.append(width)
    layers.append(count)
    depths.append(depth)
    mid_depth = _count(shapes, "middle_block.1.transformer_blocks.{}.norm1.weight")
    depths[-1] = depths[-1] or mid_depth
    attends = tuple(f"input_blocks.{1 + sum(layers[:level]) + level}.1.norm.weight" in shapes for level in range(len(channels)))
    proj_in = next((shape for name, shape in shapes.items() if name.endswith(".1.proj_in.weight")), (1, 1))
    context = next((shape for name, shape in shapes.items() if name.endswith(".attn2.to_k.weight")), None)
    linear, camera = len(proj_in) == 2, shapes.get("camera_embed.0.weight")
    resampler = _resampler(shapes)
    return UNetConfig(
        in_channels=_shape(shapes, "input_blocks.0.0.weight")[1],
        out_channels=_shape(shapes, "out.2.weight")[0],
        block_out_channels=tuple(channels),
        layers_per_block=tuple(layers),
        transformer_layers_per_block=tuple(depth or 1 for depth in depths),
        attention_levels=attends,
        mid_attention=mid_depth > 0,
        num_attention_heads=None if linear else (SD15_HEADS,) * len(channels),
        attention_head_dim=HEAD_WIDTH,
        cross_attention_dim=None if context is None else context[1],
        use_linear_projection=linear,
        camera_dim=None if camera is None else camera[1],
        resampler=resampler,
        reference_frame=resampler is not None and reference_frame,
    )


def _resampler(shapes: Shapes) -> ResamplerConfig | None:
    if "image_embed.latents" not in shapes:
        return None
    inner = _shape(shapes, "image_embed.layers.0.0.to_q.weight")[0]
    return ResamplerConfig(
        embedding_dim=_shape(shapes, "image_embed.proj_in.weight")[1],
        output_dim=_shape(shapes, "image_embed.proj_out.weight")[0],
        hidden_dim=_shape(shapes, "image_embed.proj_in.weight")[0],
        depth=_count(shapes, "image_embed.layers.{}.0.to_q.weight"),
        heads=max(1, inner // HEAD_WIDTH),
        dim_head=min(inner, HEAD_WIDTH),
        num_queries=_shape(shapes, "image_embed.latents")[1],
        ff_mult=_shape(shapes, "image_embed.layers.0.1.1.weight")[0] // _shape(shapes, "image_embed.proj_in.weight")[0],
    )


def ldm_vae_config(shapes: Shapes, *, sample_size: int) -> VAEConfig:
    """The VAE whose tensors have LDM's names, with the scale of Stable Diffusion's. Raises CheckpointError if they have not."""
    levels = _count(shapes, "encoder.down.{}.block.0.conv1.weight")
    return VAEConfig(
        in_channels=_shape(shapes, "encoder.conv_in.weight")[1],
        out_channels=_shape(shapes, "decoder.conv_out.weight")[0],
        latent_channels=_shape(shapes, "post_quant_conv.weight")[0],
        block_out_channels=tuple(_shape(shapes, f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(levels)),
        layers_per_block=_count(shapes, "encoder.down.0.block.{}.conv1.weight"),
        mid_block_add_attention="encoder.mid.attn_1.q.weight" in shapes,
        sample_size=sample_size,
    )


def open_clip_text_config(shapes: Shapes) -> CLIPTextConfig:
    """Stable Diffusion 2's text tower in OpenCLIP's tensors, with the layers of `open_clip_text_layers`, no projection."""
    vocab, width = _shape(shapes, "token_embedding.weight")
    return CLIPTextConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=_shape(shapes, "transformer.resblocks.0.mlp.c_fc.weight")[0],
        num_hidden_layers=open_clip_text_layers(shapes),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        max_position_embeddings=_shape(shapes, "positional_embedding")[0],
        hidden_act="gelu",
        eos_token_id=vocab - 1,
    )


def open_clip_text_layers(shapes: Shapes) -> int:
    """How many layers are taken of a text tower in OpenCLIP's tensors: those before ViT-H's 24th. Towers of other widths are
    whole if they have their projection; then their last layer is left out."""
    layers = _count(shapes, "transformer.resblocks.{}.ln_1.weight")
    if _shape(shapes, "token_embedding.weight")[1] == VIT_H_WIDTH:
        return min(layers, VIT_H_LAYERS - 1)
    return layers - ("text_projection" in shapes)


def open_clip_vision_config(shapes: Shapes) -> CLIPVisionConfig:
    """The vision tower in OpenCLIP's tensors, without their prefix `visual.`, without projection."""
    width, colours, patch = _shape(shapes, "conv1.weight")[:3]
    side = round((_shape(shapes, "positional_embedding")[0] - 1) ** 0.5)
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=_shape(shapes, "transformer.resblocks.0.mlp.c_fc.weight")[0],
        num_hidden_layers=_count(shapes, "transformer.resblocks.{}.ln_1.weight"),
        num_attention_heads=VISION_HEADS.get(width, max(1, width // HEAD_WIDTH)),
        num_channels=colours,
        image_size=side * patch,
        patch_size=patch,
        hidden_act="gelu",
    )


def clip_text_config(shapes: Shapes) -> CLIPTextConfig:
    """The text tower of transformers' tensors: Stable Diffusion 1's, CLIP ViT-L/14, or another of OpenAI's."""
    vocab, width = _shape(shapes, "embeddings.token_embedding.weight")
    projection = shapes.get("text_projection.weight")
    return CLIPTextConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=_shape(shapes, "encoder.layers.0.mlp.fc1.weight")[0],
        num_hidden_layers=_count(shapes, "encoder.layers.{}.layer_norm1.weight"),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        max_position_embeddings=_shape(shapes, "embeddings.position_embedding.weight")[0],
        hidden_act="gelu" if width >= 1024 else "quick_gelu",
        projection_dim=None if projection is None else projection[0],
        eos_token_id=vocab - 1,
    )


def clip_vision_config(shapes: Shapes) -> CLIPVisionConfig:
    """The vision tower of transformers' tensors: OpenCLIP's ViT-H and ViT-bigG by their width, or one of OpenAI's."""
    width, colours, patch = _shape(shapes, "embeddings.patch_embedding.weight")[:3]
    projection = shapes.get("visual_projection.weight")
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=_shape(shapes, "encoder.layers.0.mlp.fc1.weight")[0],
        num_hidden_layers=_count(shapes, "encoder.layers.{}.layer_norm1.weight"),
        num_attention_heads=VISION_HEADS.get(width, max(1, width // HEAD_WIDTH)),
        num_channels=colours,
        image_size=round((_shape(shapes, "embeddings.position_embedding.weight")[0] - 1) ** 0.5) * patch,
        patch_size=patch,
        hidden_act="gelu" if width in VISION_HEADS else "quick_gelu",
        projection_dim=None if projection is None else projection[0],
    )


def _shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise CheckpointError(f"the tensor {name!r} is missing")
    return shapes[name]


def _count(shapes: Shapes, pattern: str) -> int:
    """How many tensors there are of a pattern, numbered from 0."""
    count = 0
    while pattern.format(count) in shapes:
        count += 1
    return count


# Documents


def ldm_unet_document(config: UNetConfig, *, image_size: int) -> dict[str, Any]:
    """The config of the public MVDream and ImageDream folders: `MultiViewUNetModel`, with LDM's fields."""
    width = config.block_out_channels[0]
    document: dict[str, Any] = {
        "_class_name": "MultiViewUNetModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "image_size": image_size,
        "in_channels": config.in_channels,
        "model_channels": width,
        "out_channels": config.out_channels,
        "num_res_blocks": _one_or_all(config.layers_per_block),
        "attention_resolutions": [2**level for level, attends in enumerate(config.attention_levels) if attends],
        "channel_mult": [channels // width for channels in config.block_out_channels],
        "transformer_depth": _one_or_all(config.transformer_layers_per_block),
        "context_dim": config.cross_attention_dim,
    }
    if config.num_attention_heads is None:
        document["num_head_channels"] = config.attention_head_dim
    else:
        document |= {"num_head_channels": -1, "num_heads": config.num_attention_heads[0]}
    if not config.use_linear_projection:
        document["use_linear_in_transformer"] = False
    if config.camera_dim is not None:
        document["camera_dim"] = config.camera_dim
    if config.resampler is not None:
        document |= {"ip_dim": config.resampler.num_queries, "ip_weight": 1.0}
        if config.resampler.heads != 12:
            document["resampler_heads"] = config.resampler.heads
        if config.resampler.embedding_dim != 1280:
            document["resampler_embedding_dim"] = config.resampler.embedding_dim
        if not config.reference_frame:
            document["reference_frame"] = False
    return document


def diffusers_unet_document(config: UNetConfig, *, sample_size: int) -> dict[str, Any]:
    """The config of diffusers' UNet2DConditionModel."""
    down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in config.attention_levels]
    up = ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(config.attention_levels)]
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "attention_head_dim": _one_or_all(tuple(config.heads(level) for level in range(len(down)))),
        "block_out_channels": list(config.block_out_channels),
        "cross_attention_dim": config.cross_attention_dim,
        "down_block_types": down,
        "in_channels": config.in_channels,
        "layers_per_block": _one_or_all(config.layers_per_block),
        "norm_eps": config.norm_eps,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": config.out_channels,
        "sample_size": sample_size,
        "transformer_layers_per_block": _one_or_all(config.transformer_layers_per_block),
        "up_block_types": up,
        "use_linear_projection": config.use_linear_projection,
    }


def vae_document(config: VAEConfig) -> dict[str, Any]:
    """The config of diffusers' AutoencoderKL."""
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "silu",
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "mid_block_add_attention": config.mid_block_add_attention,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": config.out_channels,
        "sample_size": config.sample_size,
        "scaling_factor": config.scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def clip_document(config: CLIPTextConfig | CLIPVisionConfig) -> dict[str, Any]:
    """The config of transformers' CLIPTextModel or CLIPVisionModel, with its projection if it has one."""
    kind = "text" if isinstance(config, CLIPTextConfig) else "vision"
    name = f"CLIP{kind.title()}Model{'' if config.projection_dim is None else 'WithProjection'}"
    fields = {name: value for name, value in vars(config).items() if value is not None}
    document = {"architectures": [name], "model_type": f"clip_{kind}_model", **fields}
    if isinstance(config, CLIPTextConfig):
        pad = 1 if config.hidden_act == "quick_gelu" else 0
        document |= {"bos_token_id": config.vocab_size - 2, "pad_token_id": pad}
    return document


def image_processor_document(config: CLIPImageConfig) -> dict[str, Any]:
    """The config of transformers' CLIPImageProcessor."""
    return {
        "crop_size": {"height": config.crop_size, "width": config.crop_size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(config.image_mean),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(config.image_std),
        "resample": config.resample,
        "rescale_factor": config.rescale_factor,
        "size": dict.fromkeys(("height", "width") if config.squeeze else ("shortest_edge",), config.shortest_edge),
    }


def upscaler_document(shapes: Shapes) -> dict[str, Any]:
    """The config of diffusers' UNet2DConditionModel for the upscaler whose tensors have k-diffusion's names."""
    levels = _count(shapes, "inner_model.u_net.d_blocks.{}.1.main.2.weight")
    attends = [f"inner_model.u_net.d_blocks.{level}.2.q_proj.weight" in shapes for level in range(levels)]
    itself = [f"inner_model.u_net.d_blocks.{level}.2.qkv_proj.weight" in shapes for level in range(levels)]
    down = ["KCrossAttnDownBlock2D" if a or b else "KDownBlock2D" for a, b in zip(attends, itself, strict=True)]
    channels = [_shape(shapes, f"inner_model.u_net.d_blocks.{level}.1.main.6.weight")[0] for level in range(levels)]
    context = next((shape[1] for name, shape in shapes.items() if name.endswith(".kv_proj.weight")), None)
    places = [int(name.split(".")[4]) for name in shapes if name.startswith("inner_model.u_net.d_blocks.0.")]
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "gelu",
        "attention_head_dim": HEAD_WIDTH,
        "block_out_channels": channels,
        "conv_in_kernel": 1,
        "conv_out_kernel": 1,
        "cross_attention_dim": context,
        "down_block_types": down,
        "in_channels": _shape(shapes, "inner_model.proj_in.weight")[1],
        "layers_per_block": max(places),
        "mid_block_type": None,
        "norm_num_groups": None,
        "only_cross_attention": [not each for each in itself],
        "out_channels": _shape(shapes, "inner_model.proj_out.weight")[0],
        "resnet_time_scale_shift": "scale_shift",
        "time_cond_proj_dim": _shape(shapes, "inner_model.mapping_cond.weight")[1],
        "time_embedding_type": "fourier",
        "timestep_post_act": "gelu",
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
    }


def scheduler_document(config: SchedulerConfig) -> dict[str, Any]:
    """The config of diffusers' DDIMScheduler."""
    document = {"_class_name": "DDIMScheduler", "_diffusers_version": DIFFUSERS_VERSION, "clip_sample": False}
    return document | {name: value for name, value in vars(config).items() if name != "karras_ends"}  # which is Euler's


def euler_document(config: SigmaConfig) -> dict[str, Any]:
    """The config of diffusers' EulerDiscreteScheduler, as the upscaler needs it."""
    document = {"_class_name": "EulerDiscreteScheduler", "_diffusers_version": DIFFUSERS_VERSION, "prediction_type": "sample"}
    return document | vars(config)


def _one_or_all(values: tuple[int, ...]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else list(values)
