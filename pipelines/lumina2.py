"""Lumina-Image 2.0."""

from dqtk.sites import Adapter

ADAPTER = Adapter(classes=("Lumina2Transformer2DModel",), reversed_time=True)
