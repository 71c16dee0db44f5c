"""`mvmlx render-normals`."""

import sys
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from mvshared.arguments import SIZE_RANGE_PX, view_poses
from mvshared.camera import doubt_of
from mvshared.checkpoint import find_model, read_model_config
from mvshared.commands.generate import poses_in
from mvshared.errors import OptionError, warn
from mvshared.mesh import NormalRenderer, fit_mesh, load_mesh
from mvshared.messages import print_json
from mvshared.normals import check_free, write_normals
from mvshared.numbers import whole


def render_normal_maps(path: Path, options: dict[str, Any]) -> None:
    """`mvmlx render-normals`."""
    output: Path = options["output"]
    space = options["space"]
    if space not in ("camera", "world"):
        raise OptionError("space", expected="camera or world", got=space)
    check_free(output, force=options["force"])
    config = read_model_config(find_model(options["model"]))
    size_px = whole("size", config.defaults.size_px if options["size"] is None else options["size"], *SIZE_RANGE_PX)
    fov_deg = config.camera.fov_deg
    poses = view_poses(
        config,
        views=options["views"],
        azimuths_deg=options["azimuths"],
        elevation_deg=options["elevation"],
        cameras=None if options["cameras"] is None else poses_in(options["cameras"], config),
    )
    mesh = load_mesh(path, up=options["up"])
    if options["fit"]:
        mesh = fit_mesh(mesh, poses, fov_deg=fov_deg, framing=config.framing)
    views = tqdm(poses, desc="rendering", unit="view", disable=None, file=sys.stderr)
    maps = NormalRenderer(mesh).render_all(views, size_px=size_px, fov_deg=fov_deg, space=space)
    if options["cameras"] is not None and (doubt := doubt_of(poses)):
        warn(doubt)
    write_normals(output, maps, poses, fov_deg=fov_deg, space=space, force=options["force"])
    if options["as_json"]:
        facts = {"views": len(maps), "size_px": size_px, "triangles": len(mesh.faces), "space": space}
        print_json({"event": "saved", "folder": str(output), **facts})
    else:
        click.echo(f"{len(maps)} normal maps of {len(mesh.faces)} triangles in {output}")
