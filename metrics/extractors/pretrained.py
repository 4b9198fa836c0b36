"""A model of transformers loaded completely or not at all, in float32, from a folder.

``from_pretrained`` fills weights that a file lacks with random numbers and says so in the log; a feature from such a model is
plausible noise. And it takes the stored dtype: features of fp16 weights differ between CPU and GPU.
"""

from pathlib import Path
from typing import Any

import torch
import transformers

from .hub import find_weights_in
from .weights import readable, sha256_of

FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
VERSION = f"transformers {transformers.__version__}"


def load_pretrained(where: str, kind: Any, folder: Path, **kwargs: Any) -> tuple[Any, str]:
    """``kind.from_pretrained(folder)`` in float32 and evaluation mode, and the SHA-256 of the weights.

    Tensors that the model has no use for are ignored (a checkpoint's head). Raises ``MissingWeights`` for a folder without
    weights, ``ValueError`` for damaged weights and for weights that lack a tensor of the model or have it in another shape.
    """
    paths = find_weights_in(where, folder, FILES)
    with readable(where, folder, f"readable weights of {kind.__name__}"):
        model, report = kind.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=paths[0].suffix == ".safetensors",
            output_loading_info=True,
            **kwargs,
        )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{where}: {folder} must hold all weights of {kind.__name__}, got {len(missing)} missing, such as {missing[0]}. "
            "It is another model's folder, or the download was cut short."
        )
    return model.eval().requires_grad_(False), sha256_of(*paths)
