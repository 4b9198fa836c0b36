"""Stable Cascade, prior and decoder. Their pipelines put the unconditional half of a batch last."""

from dqtk.sites import Adapter, CfgLayout

ADAPTER = Adapter(classes=("StableCascadeUNet",), cfg_layout=CfgLayout(batched=("cond", "uncond")))
