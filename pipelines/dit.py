"""DiT (class-conditional): every block has its own embedding of the noise level, 9 % of all parameters together.

Its pipeline puts the unconditional half (class 1000) of a batch last.
"""

from dqtk.sites import Adapter, CfgLayout

ADAPTER = Adapter(
    classes=("DiTTransformer2DModel",),
    roles=(("transformer_blocks.*.norm1.emb.*", "modulation"),),
    cfg_layout=CfgLayout(batched=("cond", "uncond")),
)
