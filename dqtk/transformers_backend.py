"""transformers integration (text encoders), through its official registration. Counterpart of ``diffusers_backend``."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checkpoint import METHOD, config_of, file_metadata, install, quantized_layers, read_config, replace_layer, verify_files
from .nn import forget_books


class DqtkTextConfig(QuantizationConfigMixin):
    """``quantization_config`` of a text encoder; see ``checkpoint``."""

    def __init__(self, **fields: Any):
        fields.pop("quant_method", None)
        self.quant_method = METHOD  # type: ignore[assignment]  # a registered name is enough
        read_config(fields)
        self.fields = fields

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs: bool = False, **kwargs):
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, **self.fields}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def __repr__(self) -> str:
        fields = self.fields
        return f"DqtkTextConfig(recipe={fields.get('recipe')!r}, {len(fields['modules'])} layers, hash={fields['hash']})"


class DqtkTextQuantizer(HfQuantizer):
    """Loads and saves dqtk checkpoints of transformers models."""

    requires_calibration = True
    quantization_config: Any  # a DqtkTextConfig

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files=None, **kwargs) -> None:
        digests = verify_files(checkpoint_files or [], "from_pretrained")
        install(model, read_config(self.quantization_config.fields), "from_pretrained")
        names = set(model.state_dict())
        missing = sorted(names - set(digests))
        if missing and names > set(digests):  # else the checkpoint uses older names, which transformers translates
            raise ValueError(
                f"from_pretrained: checkpoint must hold every tensor of {type(model).__name__}, got none for {missing[0]} "
                f"and {len(missing) - 1} more. Was the model class or its config changed?"
            )

    def get_state_dict_and_metadata(self, model):
        # Digests go by the names in the file: a model that was loaded under older names is saved under these again.
        return None, file_metadata(revert_weight_conversion(model, model.state_dict()))

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: nn.Module, dtype=None) -> nn.Module:
        for path, layer in quantized_layers(model).items():
            replace_layer(model, path, layer.plain())
        forget_books(model)
        return model


def register() -> None:
    """Make ``quant_method: dqtk`` known to transformers."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(DqtkTextConfig)
        register_quantizer(METHOD)(DqtkTextQuantizer)


def attach(model: Any, recipe: str) -> None:
    """Make a model whose layers were replaced in memory saveable by ``save_pretrained``."""
    config = DqtkTextConfig(**config_of(model, recipe))
    model.config.quantization_config = config
    model.hf_quantizer = DqtkTextQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = METHOD


# --- what loading and saving do to names and dtypes, for files that are written without a model in memory -----------------------

WEIGHTS = "model"
"""How files of weights are called."""


def source_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Name of a tensor in the model -> its name in the files that ``from_pretrained`` reads.

    The model remembers, as it does when it is loaded, which older names it met: ``written_names`` gives them back.

    Raises:
        ValueError: tensors that transformers merges or splits while loading.
    """
    conversions, state = get_model_conversion_mapping(model), model.state_dict()
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    names = {}
    for name in stored:
        mine, merged = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if mine not in state and name in state:
            mine, merged = name, None
        if merged is not None:
            raise ValueError(
                f"quantize: tensors of {type(model).__name__} must be stored as it holds them, got {name}, which transformers "
                "converts while loading. Quantize this model in memory."
            )
        names[mine] = name
    model._weight_conversions = [entry for entry in conversions if entry.was_used()]
    return names


def written_names(model: Any, state: Mapping[str, Any]) -> dict[str, str]:
    """Name of a tensor in the model -> its name in the files that ``save_pretrained`` writes."""
    marks = {name: torch.empty(0, device="meta") for name in state}  # tied tensors are one object under two names
    mine = {id(mark): name for name, mark in marks.items()}
    reverted = revert_weight_conversion(model, marks)
    return {mine[id(mark)]: name for name, mark in reverted.items()}


def loaded_dtypes(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """dtype of every tensor, if it is a floating one, after ``from_pretrained(dtype=dtype)``. ``model`` was built in that dtype."""
    kept = model._get_dtype_plan(dtype)
    pattern = build_glob_alternation(list(kept))[0] if kept else None
    return {
        name: torch.float32 if pattern is not None and pattern.search(name) else tensor.dtype
        for name, tensor in model.state_dict().items()
    }


def save_config(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write ``config.json`` as ``save_pretrained`` does."""
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)


register()
