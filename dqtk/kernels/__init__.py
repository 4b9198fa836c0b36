"""dqtk:: ops. Importing this package registers them; ``op_of`` says which op a spec runs as, ``report_of`` which kernel that is."""

from dqtk.ops import op_of, report_of

from .attention import attention
from .block_attention import block_attention, block_attention_reference
from .conv import conv_int8, conv_int8_reference, from_matrix, to_matrix
from .decoded import Decoding, decode_reference, decode_weight, linear_decoded
from .decoding import Decodes, decoding_of
from .linear import ACTIVATIONS, activated, linear_fp8, linear_int8, linear_int8_reference, linears_int8
from .trellis import TrellisDecoding, decode_trellis, decode_trellis_reference, encode_trellis, linear_trellis

__all__ = [
    "ACTIVATIONS",
    "Decodes",
    "Decoding",
    "TrellisDecoding",
    "activated",
    "attention",
    "block_attention",
    "block_attention_reference",
    "conv_int8",
    "conv_int8_reference",
    "decode_reference",
    "decode_trellis",
    "decode_trellis_reference",
    "decode_weight",
    "decoding_of",
    "encode_trellis",
    "from_matrix",
    "linear_decoded",
    "linear_fp8",
    "linear_int8",
    "linear_int8_reference",
    "linear_trellis",
    "linears_int8",
    "op_of",
    "report_of",
    "to_matrix",
]
