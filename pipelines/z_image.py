"""Z-Image."""

from dqtk.sites import Adapter

ADAPTER = Adapter(classes=("ZImageTransformer2DModel",), reversed_time=True)
