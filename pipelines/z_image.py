"""Z-Image. Its pipeline puts the unconditional half of a batch last."""

from dqtk.sites import Adapter, CfgLayout

ADAPTER = Adapter(classes=("ZImageTransformer2DModel",), reversed_time=True, cfg_layout=CfgLayout(batched=("cond", "uncond")))
