"""Choices as data: JSON both ways, what is refused and with which words."""

import dataclasses
import json

import pytest

from dqtk.spec import (
    MSE,
    RTN,
    AbsMax,
    Dynamic,
    Float,
    Int,
    LayerSpec,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    TensorSpec,
    TwoLevel,
    canonical,
    describe,
    did_you_mean,
    from_json,
    to_json,
)

W8 = TensorSpec(format=Int(bits=8), granularity=PerChannel())
W4_GROUP = TensorSpec(format=Int(bits=4, symmetric=False), granularity=PerGroup(size=64), range=MSE())
W4_TWO_LEVEL = TensorSpec(format=Int(bits=4), granularity=TwoLevel(size=64))
WFP8 = TensorSpec(format=Float(), granularity=PerChannel())
A8 = TensorSpec(format=Int(bits=8), granularity=PerToken(), range=Dynamic())
A8_STATIC = TensorSpec(format=Int(bits=8, symmetric=False), granularity=PerTensor())
AFP8 = TensorSpec(format=Float(), granularity=PerToken(), range=Dynamic())

EVERY_TYPE = [
    Int(bits=3, symmetric=False),
    Float(),
    PerTensor(),
    PerChannel(),
    PerToken(),
    PerGroup(size=32),
    TwoLevel(size=128),
    AbsMax(),
    MSE(steps=5, least=0.25),
    Dynamic(),
    RTN(),
    W4_GROUP,
    LayerSpec(weight=W4_GROUP),
    LayerSpec(weight=W4_TWO_LEVEL, input=A8),
    LayerSpec(weight=W8, input=A8_STATIC),
    LayerSpec(weight=WFP8, input=AFP8),
]


@pytest.mark.parametrize("spec", EVERY_TYPE, ids=lambda spec: type(spec).__name__)
def test_json_text_round_trip(spec):
    assert from_json(json.loads(json.dumps(to_json(spec)))) == spec


def test_json_writes_every_field_so_that_a_changed_default_cannot_change_a_file():
    assert to_json(LayerSpec(weight=W8)) == {
        "type": "LayerSpec",
        "weight": {
            "type": "TensorSpec",
            "format": {"type": "Int", "bits": 8, "symmetric": True},
            "granularity": {"type": "PerChannel"},
            "range": {"type": "AbsMax"},
        },
        "input": None,
        "solver": {"type": "RTN"},
    }


def test_canonical_text_is_golden():
    assert canonical(A8) == (
        '{"format":{"bits":8,"type":"Int"},"granularity":{"type":"PerToken"},"range":{"type":"Dynamic"},"type":"TensorSpec"}'
    )
    assert canonical(None) == "null"
    assert canonical(LayerSpec(weight=W8)) != canonical(LayerSpec(weight=W8, input=A8))


def test_a_field_at_its_default_is_not_in_the_canonical_text():
    """Old hashes stay valid when a later dqtk gives a spec one more field."""

    def solver(**fields):
        made = dataclasses.make_dataclass("RTN", [(name, int, dataclasses.field(default=0)) for name in fields], frozen=True)
        return made(**fields)

    assert canonical(solver()) == canonical(solver(seed=0)) == canonical(RTN())
    assert canonical(solver(seed=1)) != canonical(RTN())
    assert "symmetric" in json.dumps(to_json(W8))  # what is stored names every field


def test_specs_are_keys_and_cannot_be_changed():
    assert {LayerSpec(weight=W8): 1}[LayerSpec(weight=W8)] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        W8.format = Int(bits=4)


def weight_with(**changes):
    data = to_json(LayerSpec(weight=W8))
    data["weight"] |= changes
    return data


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"type": "Itn", "bits": 4}, r"spec: type must be one of .*, got 'Itn'\. Did you mean 'Int'\?"),
        ({"bits": 4}, r"spec: type must be one of .*, got None\."),
        ({"type": ["Int"], "bits": 4}, r"spec: type must be one of .*, got \['Int'\]\."),
        ({"type": "Int", "bit": 4}, r"spec: Int: field must be one of bits, symmetric, got 'bit'\. Did you mean 'bits'\?"),
        ({"type": "Int"}, r"spec: Int must have bits, got \[\]\. Add the field\."),
        ({"type": "Int", "bits": "4"}, r"spec\.bits: value must be int, got '4'\."),
        ({"type": "Int", "bits": 4.0}, r"spec\.bits: value must be int, got 4\.0\."),
        ({"type": "Int", "bits": 4, "symmetric": 1}, r"spec\.symmetric: value must be bool, got 1\."),
        ({"type": "Int", "bits": 9}, r"spec: Int: bits must be an integer from 2 to 8, got 9\."),
        ({"type": "Float", "exponent": 5, "mantissa": 2}, r"spec: Float: \(exponent, mantissa\) must be \(4, 3\), got \(5, 2\)"),
        ({"type": "MSE", "least": "0.5"}, r"spec\.least: value must be float or int, got '0\.5'\."),
        ({"type": "LayerSpec", "wieght": {}}, r"spec: LayerSpec: field must be one of .*Did you mean 'weight'\?"),
        (weight_with(granularity={"type": "PerChanel"}), r"spec\.weight\.granularity: type .*Did you mean 'PerChannel'\?"),
        (weight_with(granularity={"type": "PerGroup", "size": 7}), r"spec\.weight\.granularity: PerGroup: size must be a positive"),
        (weight_with(granularity={"type": "MSE"}), r"spec\.weight\.granularity: value must be PerTensor or PerChannel or .*, got"),
        (weight_with(format=None), r"spec\.weight\.format: value must be Int or Float, got None\."),
        (weight_with(range={"type": "Dynamic"}), r"spec: LayerSpec: weight must be static"),
        ({"type": "LayerSpec", "weight": None}, r"spec\.weight: value must be TensorSpec, got None\."),
        ({"type": "LayerSpec", "weight": to_json(W8), "input": "A8"}, r"spec\.input: value must be TensorSpec or None, got 'A8'\."),
        ("w8a8", r"spec: value must be an object with a type, got 'w8a8'\."),
        (None, r"spec: value must be an object with a type, got None\."),
    ],
)
def test_json_is_strict_and_says_where(data, text):
    with pytest.raises(ValueError, match=text):
        from_json(data)


def test_json_errors_start_at_the_given_place():
    with pytest.raises(ValueError, match=r"^plan\.json: specs\.s0\.bits: value must be int"):
        from_json({"type": "Int", "bits": "8"}, "plan.json: specs.s0")


@pytest.mark.parametrize("bits", [1, 9, 0, -4, True, 4.0, "4"])
def test_int_refuses(bits):
    with pytest.raises(ValueError, match=r"Int: bits must be an integer from 2 to 8, got .*Use None"):
        Int(bits=bits)


@pytest.mark.parametrize("kind", [PerGroup, TwoLevel])
@pytest.mark.parametrize("size", [0, 4, 12, -8, 64.0])
def test_group_sizes_are_multiples_of_eight(kind, size):
    with pytest.raises(ValueError, match=rf"{kind.__name__}: size must be a positive multiple of 8, got {size}\..*32, 64 and 128"):
        kind(size=size)


@pytest.mark.parametrize("arguments", [{"steps": 1}, {"least": 0.0}, {"least": 1.0}, {"least": float("nan")}, {"steps": 2.5}])
def test_mse_refuses(arguments):
    with pytest.raises(ValueError, match=r"MSE: steps must be at least 2 and least in \(0, 1\)"):
        MSE(**arguments)


@pytest.mark.parametrize(
    ("weight", "given", "text"),
    [
        (A8, None, r"weight must be static .* got PerToken\(\) with Dynamic\(\)\. Weights have no tokens"),
        (TensorSpec(format=Int(bits=8), granularity=PerTensor(), range=Dynamic()), None, "weight must be static"),
        (
            TensorSpec(format=Int(bits=8), granularity=TwoLevel()),
            None,
            r"TwoLevel .* at most 4 bits, got Int\(bits=8.*Use PerGroup",
        ),
        (TensorSpec(format=Int(bits=4, symmetric=False), granularity=TwoLevel()), None, "TwoLevel granularity must be symmetric"),
        (TensorSpec(format=Float(), granularity=TwoLevel()), None, "TwoLevel granularity must be symmetric Int"),
        (W8, TensorSpec(format=Int(bits=8), granularity=PerToken()), "input must be PerToken with Dynamic range or PerTensor"),
        (W8, TensorSpec(format=Int(bits=8), granularity=PerTensor(), range=Dynamic()), "input must be PerToken with Dynamic range"),
        (W8, TensorSpec(format=Int(bits=8), granularity=PerChannel()), "input granularity must be PerToken or PerTensor"),
        (W8, AFP8, "weight and input must both be Int or both Float"),
        (WFP8, A8, "weight and input must both be Int or both Float"),
        (W8, TensorSpec(format=Int(bits=4), granularity=PerToken(), range=Dynamic()), "input Int must have 8 bits, got 4"),
        (
            TensorSpec(format=Int(bits=4), granularity=PerGroup()),
            A8,
            r"must be PerTensor, PerChannel or TwoLevel, got PerGroup\. Use TwoLevel\(size=64\)",
        ),
        (
            TensorSpec(format=Float(), granularity=PerGroup()),
            AFP8,
            r"must be PerTensor or PerChannel, got PerGroup\. Use PerChannel\(\)",
        ),
        (
            TensorSpec(format=Int(bits=4, symmetric=False), granularity=PerChannel()),
            A8,
            r"must be symmetric, got .*Use Int\(bits=4, symmetric=True\)",
        ),
    ],
)
def test_impossible_layers(weight, given, text):
    with pytest.raises(ValueError, match=f"LayerSpec: .*{text}"):
        LayerSpec(weight=weight, input=given)


def test_only_static_inputs_need_calibration():
    assert LayerSpec(weight=W8, input=A8_STATIC).needs_stats
    assert not LayerSpec(weight=W8, input=A8).needs_stats
    assert not LayerSpec(weight=W8).needs_stats


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (None, "16 bit"),
        (LayerSpec(weight=W8), "W8 per channel, A16"),
        (LayerSpec(weight=W4_GROUP), "W4 group 64 asym, A16"),
        (LayerSpec(weight=W4_TWO_LEVEL, input=A8), "W4 group 64 two-level, A8 per token"),
        (LayerSpec(weight=W8, input=A8_STATIC), "W8 per channel, A8 per tensor asym"),
        (LayerSpec(weight=WFP8, input=AFP8), "WFP8 per channel, AFP8 per token"),
    ],
)
def test_short_names(spec, text):
    assert describe(spec) == text


def test_suggestions():
    assert did_you_mean("w8a9", ["w8a8", "fp8"]) == " Did you mean 'w8a8'?"
    assert did_you_mean("zzz", ["w8a8", "fp8"]) == ""
