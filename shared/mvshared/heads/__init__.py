"""Procedural heads: an integer gives an identity, an identity and cameras give pictures, normals, depth and parts."""

from mvshared.heads.identity import HeadIdentity, sample_identity
from mvshared.heads.parts import Part
from mvshared.heads.render import DEFAULT_FOV_DEG, DEFAULT_RADIUS, HeadViews, render

__all__ = ["DEFAULT_FOV_DEG", "DEFAULT_RADIUS", "HeadIdentity", "HeadViews", "Part", "render", "sample_identity"]
