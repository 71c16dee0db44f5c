"""Checks of the shapes that come into the upscaler's network, the same for both backends."""

from mvshared.config import KUNetConfig
from mvshared.errors import OptionError
from mvshared.shapes import Shape


def check_context(config: KUNetConfig, *, context: Shape | None) -> None:
    """Raise OptionError unless a text (b, l, cross_attention_dim) is given exactly if the config attends to one."""
    if config.cross_attention_dim is None:
        if context is not None:
            raise OptionError("context", expected="None for an upscaler without text", got=context)
    elif context is None or len(context) != 3 or 0 in context or context[2] != config.cross_attention_dim:
        raise OptionError("context", expected=f"of shape (b, l, {config.cross_attention_dim})", got=context)


def check_inputs(config: KUNetConfig, *, sample: Shape, noise: Shape, condition: Shape, attended: int | None) -> None:
    """Raise OptionError unless the shapes fit each other and the config.

    sample (b, v, h, w, in_channels) with h and w multiples of `config.downscale` and at least two at the coarsest level, noise
    (b,), condition (b, time_cond_proj_dim), `attended` the number b of texts, None exactly if the config has none.
    """
    if len(sample) != 5 or 0 in sample or sample[4] != config.in_channels:
        raise OptionError("sample", expected=f"of shape (b, v, h, w, {config.in_channels})", got=sample)
    batch, _, height, width, _ = sample
    if height % config.downscale or width % config.downscale or min(height, width) < 2 * config.downscale:
        expected = f"of a height and width that are multiples of {config.downscale}, at least {2 * config.downscale}"
        raise OptionError("sample", expected=expected, got=sample)
    if noise != (batch,):
        raise OptionError("noise", expected=f"of shape {(batch,)}", got=noise)
    if condition != (batch, config.time_cond_proj_dim):
        raise OptionError("condition", expected=f"of shape {(batch, config.time_cond_proj_dim)}", got=condition)
    if (attended is None) != (config.cross_attention_dim is None) or attended not in (None, batch):
        raise OptionError("text", expected=f"of {batch} texts, none for an upscaler without text", got=attended)
