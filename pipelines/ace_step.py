"""ACE-Step 1.5 (music). Its pipeline puts the unconditional half of a batch last."""

from dqtk.sites import Adapter, CfgLayout

ADAPTER = Adapter(classes=("AceStepTransformer1DModel",), cfg_layout=CfgLayout(batched=("cond", "uncond")))
