"""DiT (class-conditional): every block has its own embedding of the noise level, 9 % of all parameters together."""

from dqtk.sites import Adapter

ADAPTER = Adapter(classes=("DiTTransformer2DModel",), roles=(("transformer_blocks.*.norm1.emb.*", "modulation"),))
