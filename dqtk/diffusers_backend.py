"""diffusers integration: the only file that touches its quantizer registries.

diffusers has no registration for third-party quantizers; its two mappings are plain dictionaries, and writing into both makes
``from_pretrained`` and ``save_pretrained`` work end to end (checked with diffusers 0.42; a test fails if that changes). Traps that
this file answers: ``quant_method`` must be an enum member; the config needs its own ``to_diff_dict`` and ``__repr__``; floating
tensors are cast to the load dtype before the quantizer sees them, so scales are taken from ``state_dict``.
"""

import enum
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.activations import GEGLU, GELU
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from .checkpoint import (
    METHOD,
    config_of,
    file_metadata,
    install,
    install_attention,
    install_correction,
    quantized_layers,
    read_attention,
    read_config,
    replace_layer,
    verify_files,
)
from .nn import Books, Quantized, forget_books
from .nn.activated import FUSED, fuses
from .nn.attention import check_packages, remove_blocks
from .nn.correction import remove_correction
from .nn.noise import forget
from .nn.steps import forget_steps
from .numerics.storage import is_stored


class Method(enum.StrEnum):
    """diffusers reads ``quant_method.value``."""

    DQTK = METHOD


class DqtkConfig(QuantizationConfigMixin):
    """``quantization_config`` of a component; see ``checkpoint``. Unknown keys are kept, as the ecosystem adds its own."""

    def __init__(self, **fields: Any):
        fields.pop("quant_method", None)
        self.quant_method = Method.DQTK  # type: ignore[assignment]  # their enum is closed
        read_config(fields)
        self.fields = fields

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, **self.fields}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def __repr__(self) -> str:
        return f"DqtkConfig(recipe={self.fields.get('recipe')!r}, {len(self.fields['modules'])} layers, hash={self.fields['hash']})"


class DqtkQuantizer(DiffusersQuantizer):
    """Loads and saves dqtk checkpoints. Quantizing happens in ``dqtk.quantize``, not while loading."""

    use_keep_in_fp32_modules = True
    requires_calibration = True
    quantization_config: Any  # a DqtkConfig

    def validate_environment(self, *args, **kwargs) -> None:
        """Every device runs; only offloading to disk while loading is refused: it bypasses the quantizer and rounds scales."""
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "from_pretrained: device_map must place quantized layers in memory, got 'disk'. "
                "Load on the CPU and call enable_group_offload(offload_to_disk_path=...)."
            )

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        verify_files(checkpoint_files, "from_pretrained")
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs) -> None:
        install(model, read_config(self.quantization_config.fields), "from_pretrained")
        check_packages(read_attention(self.quantization_config.fields, "from_pretrained").values(), "from_pretrained")
        install_attention(model, self.quantization_config.fields, "from_pretrained")
        install_correction(model, self.quantization_config.fields, "from_pretrained")

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        return model

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        if missing_keys:
            raise ValueError(
                f"from_pretrained: checkpoint must hold every tensor of {type(model).__name__}, got none for {missing_keys[0]} "
                f"and {len(missing_keys) - 1} more. Was the model class or its config changed?"
            )
        return missing_keys

    def check_if_quantized_param(self, model, param_value, param_name: str, state_dict, **kwargs) -> bool:
        path, _, name = param_name.rpartition(".")
        holder = model.get_submodule(path)
        return isinstance(holder, Books) or (is_stored(name) and isinstance(holder, Quantized))

    def check_quantized_param_shape(self, param_name: str, current_param, loaded_param) -> None:
        raise ValueError(
            f"from_pretrained: {param_name} must have shape {tuple(current_param)}, got {tuple(loaded_param.shape)}. "
            "Config and weights belong to different models."
        )

    def create_quantized_param(  # type: ignore[override]
        self, model, param_value, param_name, target_device, state_dict, unexpected_keys=None, **kwargs
    ) -> None:
        path, _, name = param_name.rpartition(".")
        layer = model.get_submodule(path)
        exact = state_dict[param_name]  # param_value was rounded to the load dtype
        wanted = getattr(layer, name)
        if exact.dtype != wanted.dtype:
            raise ValueError(
                f"from_pretrained: {param_name} must be {wanted.dtype}, got {exact.dtype}. "
                "Config and weights belong to different models."
            )
        layer._buffers[name] = exact.to(target_device)

    def get_state_dict_and_metadata(self, state_dict, safe_serialization: bool = True):
        return state_dict, file_metadata(state_dict)

    @property
    def supports_safetensors_serialization(self) -> bool:
        return True

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False  # codes have no gradient; adapters on top (LoRA) train

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: Any) -> nn.Module:
        for path, layer in quantized_layers(model).items():
            replace_layer(model, path, layer.plain())
        remove_blocks(model)
        remove_correction(model)
        forget_books(model)
        forget(model)
        forget_steps(model)
        # diffusers leaves the entry in the config, and a plain model saved with it cannot be loaded.
        model._internal_dict = FrozenDict({key: value for key, value in model.config.items() if key != "quantization_config"})
        return model


def register() -> None:
    """Make ``quant_method: dqtk`` known to diffusers."""
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = DqtkQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = DqtkConfig


def attach(model: Any, recipe: str) -> None:
    """Make a model whose layers were replaced in memory saveable by ``save_pretrained``."""
    config = DqtkConfig(**config_of(model, recipe))
    model.register_to_config(quantization_config=config)
    model.hf_quantizer = DqtkQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = Method.DQTK


# --- activations behind a linear layer, computed in its kernel -------------------------------------------------------------------


class FusedGELU(GELU):
    """diffusers' GELU (projection, then activation) whose projection is quantized; same modules, same names."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not fuses(self.proj):
            return super().forward(hidden_states)
        return self.proj(hidden_states, "gelu_tanh" if self.approximate == "tanh" else "gelu")


class FusedGEGLU(GEGLU):
    """diffusers' GEGLU whose projection is quantized: the second half of its outputs is the gate."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if args or kwargs or not fuses(self.proj):
            return super().forward(hidden_states, *args, **kwargs)
        hidden_states, gate = self.proj(hidden_states, "gelu", self.proj.out_features // 2).chunk(2, dim=-1)
        return hidden_states * gate


FUSED.update({GELU: FusedGELU, GEGLU: FusedGEGLU})


# --- what loading and saving do to names and dtypes, for files that are written without a model in memory -----------------------

WEIGHTS = "diffusion_pytorch_model"
"""How files of weights are called."""


def source_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Name of a tensor in the model -> its name in the files that ``from_pretrained`` reads."""
    names = OrderedDict((name, name) for name in stored)
    model._fix_state_dict_keys_on_load(names)  # moves what it finds under an old name; never looks at the values
    return dict(names)


def written_names(model: Any, state: Mapping[str, Any]) -> dict[str, str]:
    """Name of a tensor in the model -> its name in the files that ``save_pretrained`` writes: the same."""
    return {name: name for name in state}


def loaded_dtypes(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """dtype of every tensor, if it is a floating one, after ``from_pretrained(dtype=dtype)``."""
    kept = model._keep_in_fp32_modules or []
    kept = {kept} if isinstance(kept, str) else set(kept)
    return {name: torch.float32 if kept & set(name.split(".")) else dtype for name in model.state_dict()}


def save_config(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write ``config.json`` as ``save_pretrained`` does."""
    model.save_config(folder)


register()
