"""transformers integration (text encoders), through its official registration. Counterpart of ``diffusers_backend``."""

from typing import Any

from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checkpoint import METHOD, config_of, file_metadata, install, quantized_layers, read_config, replace_layer, verify_files


class DqtkTextConfig(QuantizationConfigMixin):
    """``quantization_config`` of a text encoder; see ``checkpoint``."""

    def __init__(self, **fields: Any):
        fields.pop("quant_method", None)
        self.quant_method = METHOD
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
        return f"DqtkTextConfig(recipe={self.fields.get('recipe')!r}, {len(self.fields['modules'])} layers, hash={self.fields['hash']})"


class DqtkTextQuantizer(HfQuantizer):
    """Loads and saves dqtk checkpoints of transformers models."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files=None, **kwargs) -> None:
        verify_files(checkpoint_files or [], "from_pretrained")
        install(model, read_config(self.quantization_config.fields), "from_pretrained")

    def get_state_dict_and_metadata(self, model):
        return None, file_metadata(model.state_dict())

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
