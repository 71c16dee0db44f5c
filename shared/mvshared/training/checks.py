"""What captures and settings must have for the model that learns, looked at before anything is loaded or encoded."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from mvshared.camera import azimuth_elevation, doubt_of
from mvshared.captures import Capture, load_capture, size_px
from mvshared.config import ModelConfig
from mvshared.errors import DatasetError, ImageError, OptionError, warn
from mvshared.normals import NormalMaps, load_normals
from mvshared.training.ahead import ahead
from mvshared.training.config import DataConfig, TrainConfig

MAPS_OF, MAPS = 8, 8  # captures at most, and views of each, whose normal maps are decoded


def check_captures(
    named: Sequence[tuple[str, list[Path]]], config: DataConfig, model: ModelConfig, *, with_detail: bool
) -> list[Capture]:
    """The captures of named lists, looked at: sizes, numbers of views, normal maps. Pictures are opened, not decoded,
    but for a few normal maps of a few captures.

    Raises DatasetError for captures that cannot be learned from, and warns (MvWarning) of those that are left out, of
    views without normal maps, of maps that are none, and of cameras that stand or look as those of views never do.
    """
    places = [(name, folder) for name, folders in named for folder in folders]
    loaded = ahead(load_capture, [folder for _, folder in places])
    captures = [(name, folder, capture) for (name, folder), capture in zip(places, loaded, strict=True)]
    everything = [capture for *_, capture in captures]
    factor = model.vae.downscale * model.unet.downscale
    check_sizes(everything, factor=factor, normals=config.normals, details=with_detail)
    for name, folders in named:
        own = [(folder, capture) for part, folder, capture in captures if part == name]
        left_out = [folder for folder, capture in own if not _is_usable(capture, config)]
        lack = f"no view within +-{config.reference_max_azimuth_deg:g} degrees of the front with {config.targets} others"
        if folders and len(left_out) == len(folders):
            raise DatasetError(f"the {name} captures have {lack}", path=config.folder)
        if left_out:
            text = f"{left_out[0]} and {len(left_out) - 1} more" if left_out[1:] else str(left_out[0])
            warn(f"not learned from, for there is {lack}: {text}")
    doubts = [(folder, doubt) for _, folder, capture in captures if (doubt := doubt_of(capture.poses))]
    if doubts:
        (folder, doubt), more = doubts[0], f" (and {len(doubts) - 1} more captures)" if doubts[1:] else ""
        warn(f"{folder}: {doubt}{more}")
    if model.unet.normal_channels and config.normals and model.family == "gaf":
        _check_normals(everything, folder=config.folder)
        _warn_of_maps(everything, fov_deg=model.camera.fov_deg)
    return everything


def check_sizes(
    captures: list[Capture], *, factor: int, smallest: int = 0, normals: bool = False, details: bool = False
) -> None:
    """Raise DatasetError unless all pictures, and the normal and detail maps that are used, have one size, a multiple of
    `factor` pixels, and no side below `smallest`."""
    expected = None
    for sizes in ahead(partial(_sizes_px, normals=normals, details=details), captures):
        for path, size in sizes:
            if expected is None and (size[0] % factor or size[1] % factor):
                reason = f"width and height must be multiples of {factor} for this model, got {size[0]} x {size[1]} pixels"
                raise DatasetError(reason, path=path)
            if expected is None and min(size) < smallest:
                reason = f"width and height must be at least {smallest} for this model, got {size[0]} x {size[1]} pixels"
                raise DatasetError(reason, path=path)
            expected = expected or size
            if size != expected:
                reason = f"all pictures must have one size, got {size[0]} x {size[1]} after {expected[0]} x {expected[1]}"
                raise DatasetError(reason, path=path)


def check_details(captures: list[Capture], *, folder: str) -> None:
    """Raise DatasetError if no view has a detail map."""
    if not any(path for capture in captures for path in capture.detail_paths):
        raise DatasetError(
            "no view has a detail map (detail_file_path in transforms.json), and detail_weight is not 0",
            path=folder,
            hint="heads rendered into a new folder have them",
        )


def _sizes_px(capture: Capture, *, normals: bool, details: bool) -> list[tuple[Path, tuple[int, int]]]:
    maps = (*(capture.normal_paths if normals else ()), *(capture.detail_paths if details else ()))
    paths = [*capture.image_paths, *(path for path in maps if path is not None)]
    return [(path, size_px(path)) for path in paths]


def _is_usable(capture: Capture, config: DataConfig) -> bool:
    azimuths = azimuth_elevation(capture.poses).azimuths_deg
    return len(azimuths) > config.targets and bool(config.may_be_references(azimuths).any())


def _check_normals(captures: list[Capture], *, folder: str) -> None:
    views = [path for capture in captures for path in capture.normal_paths]
    missing = views.count(None)
    if missing == len(views):
        raise DatasetError(
            "no view has a normal map (normal_file_path in transforms.json), and they are what a GAF model is for",
            path=folder,
            hint="a TOML file with normals = false in its table data trains without",
        )
    if missing:
        warn(f"{missing} of {len(views)} views have no normal map and are learned without")


def _warn_of_maps(captures: Sequence[Capture], *, fov_deg: float) -> None:
    """Warn of the first capture whose normal maps `generate` would refuse: in world space, or no maps at all. Of a few views of
    a few captures only, since pictures are decoded; `fov_deg` is for those that do not say theirs."""
    mapped = [capture for capture in captures if any(capture.normal_paths)]
    for capture in mapped[:: -(-len(mapped) // MAPS_OF)]:
        named = [(view, path) for view, path in enumerate(capture.normal_paths) if path is not None]
        views, paths = zip(*named[:: -(-len(named) // MAPS)], strict=True)
        width, height = size_px(paths[0])
        if width != height:  # which training takes and `generate` does not
            continue
        maps = NormalMaps(paths, fovs_deg=(capture.fov_deg,) * len(paths), space="camera")
        try:
            load_normals(maps, capture.poses[list(views)], fov_deg=fov_deg, size_px=width)
        except ImageError as refused:
            warn(f"normal maps are learned that generate would refuse: {refused}; a capture needs them in camera space")
            return


def check_frozen(config: TrainConfig, names: Iterable[str]) -> None:
    """Raise OptionError for a beginning that no weight's name has: what was to stay would be trained; also if all have one."""
    known = tuple(names)
    if config.frozen and all(name.startswith(config.frozen) for name in known):
        raise OptionError("frozen", expected="beginnings that leave some weights to train", got=list(config.frozen))
    for beginning in config.frozen:
        if not any(name.startswith(beginning) for name in known):
            raise OptionError("frozen", expected=f"beginnings of names of weights, as of {known[0]}", got=beginning)
