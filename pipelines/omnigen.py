"""OmniGen. Its pipeline puts the unconditional half of a batch last; time goes from 0, noise, to 1 (``invert_sigmas``)."""

from dqtk.sites import Adapter, CfgLayout

ADAPTER = Adapter(classes=("OmniGenTransformer2DModel",), reversed_time=True, cfg_layout=CfgLayout(batched=("cond", "uncond")))
