"""Sensitivity logs and sizes as YAML, in MixDQ's form (arXiv 2405.17873): ``{layer: [score at each width]}``, ``{layer: size}``.

A score says how good the output is when only this layer is quantized; higher is better (dB of SQNR, SSIM). Reading is strict: a
layer that silently went missing would silently stay as it was.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dqtk.spec import did_you_mean

WIDTHS = (2, 4, 8)  # bits of the columns of MixDQ's logs


def read_sensitivity(path: str | Path, widths: Sequence[int] = WIDTHS) -> dict[str, dict[int, float]]:
    """Layer -> bits -> score.

    Args:
        path: YAML file.
        widths: bits of the columns, in their order.
    Raises:
        ValueError: naming file and layer: no YAML, a layer twice, another number of scores, a score that is no finite number.
    """
    found = {}
    for layer, scores in _read(path, "a list of scores").items():
        if not isinstance(scores, list) or len(scores) != len(widths):
            got = f"{len(scores)} scores" if isinstance(scores, list) else repr(scores)
            raise ValueError(
                f"allocate: {layer} in {path} must be a list of {len(widths)} scores, for {_words(widths)} bits, got {got}. "
                "Say which bits the columns are for."
            )
        found[layer] = {
            bits: _number(score, f"score of {layer} at {bits} bits in {path}") for bits, score in zip(widths, scores, strict=True)
        }
    return found


def read_sizes(path: str | Path, layers: Collection[str]) -> dict[str, float]:
    """Layer -> number of weights (or of input elements), of these layers.

    Raises:
        ValueError: as ``read_sensitivity``; a size that is not above 0; a layer without a size, or a size of no layer.
    """
    found = {layer: _number(size, f"size of {layer} in {path}") for layer, size in _read(path, "a size").items()}
    for layer, size in found.items():
        if size <= 0:
            raise ValueError(f"allocate: size of {layer} in {path} must be above 0, got {size:g}. It is a number of weights.")
    for name, here, there in (("with a size", layers, found), ("of the sensitivity log", found, layers)):
        lost = [layer for layer in here if layer not in there]
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise ValueError(
                f"allocate: every layer must be one {name}, got {lost[0]}{more} in only one of the files (sizes: {path})."
                f"{did_you_mean(lost[0], there) or ' Write both files from one model.'}"
            )
    return {layer: found[layer] for layer in layers}


def write_sensitivity(path: Path, scores: Mapping[str, Mapping[int, float]]) -> None:
    """The inverse of ``read_sensitivity``: columns in order of bits, which every layer must have alike."""
    _write(path, {layer: [row[bits] for bits in sorted(row)] for layer, row in scores.items()})


def write_sizes(path: Path, sizes: Mapping[str, float]) -> None:
    """The inverse of ``read_sizes``."""
    _write(path, dict(sizes))


def _write(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(yaml.safe_dump(dict(data), default_flow_style=None, sort_keys=False, width=1000), encoding="utf-8")


class _Strict(yaml.SafeLoader):
    """Refuses a key that comes twice, of which YAML's loader keeps the last."""


def _mapping(loader: _Strict, node: yaml.MappingNode) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in found:
            raise yaml.YAMLError(f"{key} twice, again in line {key_node.start_mark.line + 1}")
        found[key] = loader.construct_object(value_node, deep=True)
    return found


_Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _read(path: str | Path, what: str) -> dict[str, Any]:
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), _Strict)
    except FileNotFoundError:
        raise ValueError(f"allocate: file must exist, got {path}. Check the path.") from None
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:  # TypeError: a key that is a list
        said = " ".join(str(error).split())
        raise ValueError(f"allocate: {path} must be YAML that maps each layer to {what}, got: {said}. Mend the file.") from error
    if not isinstance(data, dict) or not data or not all(isinstance(layer, str) for layer in data):
        got = f"the keys {list(data)[:3]}" if isinstance(data, dict) and data else type(data).__name__
        raise ValueError(f"allocate: {path} must be YAML that maps each layer's name to {what}, got {got}. Mend the file.")
    return data


def _number(value: Any, what: str) -> float:
    if isinstance(value, str):  # 1e-5 is a number in YAML 1.2 and JSON, and text to PyYAML
        try:
            value = float(value)
        except ValueError:
            value = repr(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"allocate: {what} must be a finite number, got {value}. Measure this layer again.")
    return float(value)


def _words(widths: Sequence[int]) -> str:
    return ", ".join(map(str, widths))
