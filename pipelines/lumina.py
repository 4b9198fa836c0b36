"""Lumina-Next (Lumina 1). Its pipeline puts the unconditional half of a batch last, and gives the denoiser 1 - sigma."""

from dqtk.sites import Adapter, CfgLayout

ADAPTER = Adapter(classes=("LuminaNextDiT2DModel",), reversed_time=True, cfg_layout=CfgLayout(batched=("cond", "uncond")))
