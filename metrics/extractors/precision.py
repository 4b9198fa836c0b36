"""Convolutions in whole float32: what a feature is must not depend on the device it was computed on.

cuDNN convolves float32 in TF32 unless told otherwise: ten bits of mantissa, so that features of a GPU and of a CPU differ in the
fourth digit. The Inception is all convolutions; CLIP's and DINO's transformers begin with one (the patches).
"""

from contextlib import AbstractContextManager

import torch


def whole_float32() -> AbstractContextManager[None]:
    """Inside: no TF32 in convolutions. (Matmuls are in whole float32 unless somebody asks for less.)"""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
