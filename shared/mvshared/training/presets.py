"""The recipes that `mvmlx train --family` follows: GAF is trained as arXiv 2412.10209 says.

What the paper does not say is this project's choice, and said in docs/gaf.md.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mvshared.backend import parse_dtype
from mvshared.checkpoint import find_model, model_name, read_model_config
from mvshared.errors import OptionError
from mvshared.training.config import DataConfig, OptimizerConfig, TrainConfig


def gaf(source: Path | str, data: Path | str) -> TrainConfig:
    """GAF's training of the model in `source` on the captures in `data`.

    Raises OptionError for a model that is no GAF, CheckpointError for a folder that holds none.
    """
    folder = find_model(source)
    model = read_model_config(folder)
    if model.family != "gaf":
        expected = "the folder of a GAF model"
        hint = "make one with: mvmlx init gaf"
        raise OptionError("from", expected=expected, got=f"{source}, of the family {model.family}", hint=hint)
    return TrainConfig(
        stage="unet",
        family="gaf",
        init_from=model_name(source),
        steps=20_000,
        batch_size=64,
        gradient_checkpointing=True,
        # a constant rate: a run that is made longer is then the same as one that was long from the start
        optimizer=OptimizerConfig(learning_rate=1e-4, final_learning_rate=1e-4),
        data=DataConfig(folder=str(Path(data).resolve()), mirror=False, reference_dropout=0.1, normals_dropout=0.1),
    )


PRESETS: dict[str, Callable[[Path | str, Path | str], TrainConfig]] = {"gaf": gaf}


def preset(family: str, *, source: Path | str, data: Path | str, changes: Mapping[str, Any]) -> TrainConfig:
    """The recipe of a family with some fields changed, each by the name that it has in TrainConfig or DataConfig.

    `learning_rate` is also the final one. Raises OptionError for a family without a recipe and for values that are not
    allowed, and what the recipe raises.
    """
    if family not in PRESETS:
        expected = f"one of {', '.join(PRESETS)}"
        raise OptionError("family", expected=expected, got=family, hint="other models are trained by a TOML file")
    config, changes = PRESETS[family](source, data), dict(changes)
    if "learning_rate" in changes:
        rate = changes.pop("learning_rate")
        if not math.isfinite(rate):
            raise OptionError("learning_rate", expected="a finite number above 0", got=rate)
        changes["optimizer"] = replace(config.optimizer, learning_rate=rate, final_learning_rate=rate)
    parse_dtype(changes.get("dtype"), default=config.dtype)
    of_data = {field.name for field in fields(DataConfig)} & changes.keys()
    data_config = replace(config.data, **{name: changes.pop(name) for name in of_data})
    return replace(config, data=data_config, **changes)
