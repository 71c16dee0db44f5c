"""Checks of the shapes that come into the networks, the same for both backends."""

import numpy as np
from numpy.typing import NDArray

from mvshared.config import UNetConfig
from mvshared.errors import OptionError

Shape = tuple[int, ...]


def check_pictures(name: str, shape: Shape, *, channels: int, multiple: int = 1, side: int | None = None) -> None:
    """Raise OptionError unless `shape` is (n, h, w, channels), not empty, h and w multiples of `multiple`, or both `side`."""
    if side is not None and shape[1:] != (side, side, channels):
        raise OptionError(name, expected=f"of shape (n, {side}, {side}, {channels})", got=shape)
    if len(shape) != 4 or shape[3] != channels or 0 in shape or shape[1] % multiple or shape[2] % multiple:
        expected = f"of shape (n, h, w, {channels})" + (f" with h and w multiples of {multiple}" if multiple > 1 else "")
        raise OptionError(name, expected=expected, got=shape)


def check_tokens(shape: Shape, *, longest: int) -> None:
    """Raise OptionError unless token ids have the shape (b, l), not empty, l at most `longest`."""
    if len(shape) != 2 or 0 in shape or shape[1] > longest:
        raise OptionError("token ids", expected=f"of shape (b, l) with l at most {longest}", got=shape)


def checked_token_ids(ids: NDArray[np.int64], *, vocab_size: int) -> NDArray[np.int64]:
    """Token ids as both array libraries take them: int64, in plain order in memory. Raises OptionError unless they are whole
    numbers that a text encoder knows."""
    if ids.dtype.kind not in "iu" or (ids.size and not 0 <= ids.min() <= ids.max() < vocab_size):
        got = f"{ids.dtype} from {ids.min()} to {ids.max()}" if ids.size else str(ids.dtype)
        raise OptionError("token ids", expected=f"whole numbers from 0 to {vocab_size - 1}", got=got)
    return np.asarray(ids, dtype=np.int64, order="C")


def check_step(config: UNetConfig, *, x: Shape, normals: Shape | None) -> None:
    """Raise OptionError unless latents x (v, h, w, c) can be denoised, with latents of normal maps (b, v, h, w, c) or none."""
    check_pictures("latents", x, channels=config.out_channels, multiple=config.downscale)
    if normals is None:
        return
    if not config.normal_channels:
        raise OptionError("normals", expected="None for a model without normal maps", got=normals)
    if normals[1:] != (*x[:3], config.normal_channels):
        raise OptionError("normals", expected=f"of shape {(*x[:3], config.normal_channels)}", got=normals[1:])


def check_same(name: str, shape: Shape, expected: Shape) -> None:
    """Raise OptionError unless the shapes are the same."""
    if shape != expected:
        raise OptionError(name, expected=f"of shape {expected}", got=shape)


def check_unet_inputs(
    config: UNetConfig,
    *,
    sample: Shape,
    times: Shape,
    attended: int | None,
    camera: Shape | None,
    reference: Shape | None,
) -> None:
    """Raise OptionError unless the shapes fit each other and the config; `check_conditions` has seen those of the conditions.

    sample (b, v, h, w, in_channels) with h and w multiples of `config.downscale`, times (b, time_embed_dim), `attended` the
    number of objects whose keys and values are given, exactly if the config has cross-attention, camera (b, v, camera_dim),
    reference (b, r, h, w, out_channels). That number is b, or any if b is 1: the objects then have all else in common.
    """
    if len(sample) != 5 or 0 in sample or sample[4] != config.in_channels:
        raise OptionError("sample", expected=f"of shape (b, v, h, w, {config.in_channels})", got=sample)
    batch, views, height, width, _ = sample
    if height % config.downscale or width % config.downscale:
        raise OptionError("sample", expected=f"of a height and width that are multiples of {config.downscale}", got=sample)
    if times != (batch, config.time_embed_dim):
        raise OptionError("times", expected=f"of shape {(batch, config.time_embed_dim)}, one per object", got=times)
    if (attended is None) != (config.cross_attention_dim is None):
        expected = "None for a model without cross-attention" if attended else "given: this model has cross-attention"
        raise OptionError("cross", expected=expected, got=attended)
    if attended not in (None, batch) and batch != 1:
        raise OptionError("cross", expected=f"of {batch} objects, or the sample of one", got=attended)
    if camera is not None and camera[:2] != (batch, views):
        raise OptionError("camera", expected=f"of shape {(batch, views, config.camera_dim)}", got=camera)
    if reference is not None and (reference[0], *reference[2:4]) != (batch, height, width):
        expected = f"of shape ({batch}, r, {height}, {width}, {config.out_channels})"
        raise OptionError("reference", expected=expected, got=reference)


def check_conditions(
    config: UNetConfig,
    *,
    context: Shape | None,
    image_states: Shape | None,
    camera: Shape | None,
    reference: Shape | None,
    reference_scale: float,
) -> None:
    """Raise OptionError unless a U-Net with this config can be conditioned on what has these shapes.

    context (b, l, cross_attention_dim) exactly if the config has cross-attention; image_states (b, r, m, embedding_dim) of r
    pictures only if it has a resampler, camera (b, v, camera_dim) only if it has a camera, reference (b, r, h, w, out_channels)
    of r pictures only if it has a reference frame; a `reference_scale` of at least 0, and 1 without such a frame.
    """
    _check_context(config, context=context, image_states=image_states)
    if camera is not None:
        if config.camera_dim is None:
            raise OptionError("camera", expected="None for a model without a camera embedding", got=camera)
        if len(camera) != 3 or 0 in camera or camera[2] != config.camera_dim:
            raise OptionError("camera", expected=f"of shape (b, v, {config.camera_dim})", got=camera)
    if not reference_scale >= 0:
        raise OptionError("reference_scale", expected="at least 0", got=reference_scale)
    if reference_scale != 1 and not config.reference_frame:
        raise OptionError("reference_scale", expected="1: this model has no reference frame", got=reference_scale)
    if reference is not None:
        if not config.reference_frame:
            raise OptionError("reference", expected="None for a model without a reference frame", got=reference)
        if len(reference) != 5 or 0 in reference or reference[4] != config.out_channels:
            raise OptionError("reference", expected=f"of shape (b, r, h, w, {config.out_channels})", got=reference)


def _check_context(config: UNetConfig, *, context: Shape | None, image_states: Shape | None) -> None:
    if config.cross_attention_dim is None:
        if context is not None:
            raise OptionError("context", expected="None for a model without cross-attention", got=context)
    elif context is None or len(context) != 3 or 0 in context or context[2] != config.cross_attention_dim:
        raise OptionError("context", expected=f"of shape (b, l, {config.cross_attention_dim})", got=context)
    if image_states is None:
        return
    if config.resampler is None or context is None:
        raise OptionError("image_states", expected="None for a model without image tokens", got=image_states)
    batch, width = context[0], config.resampler.embedding_dim
    if len(image_states) != 4 or 0 in image_states or (image_states[0], image_states[3]) != (batch, width):
        raise OptionError("image_states", expected=f"of shape ({batch}, r, m, {width})", got=image_states)
