"""transformers integration (text encoders), through its official registration. Counterpart of ``diffusers_backend``."""

from typing import Any

from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checkpoint import METHOD, config_of, file_metadata, install, quantized_layers, read_config, replace_layer, verify_files


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


register()
