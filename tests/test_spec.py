"""Choices as data: JSON both ways, what is refused and with which words."""

import dataclasses
import json
import re
from dataclasses import replace

import pytest

import dqtk.spec
from dqtk.numerics.codebook import bitmod, log_grid, nf4
from dqtk.spec import (
    GPTQ,
    GROUPS,
    MSE,
    RTN,
    AbsMax,
    Adaptive,
    AdaRound,
    AttentionMass,
    AttentionSpec,
    BeamSearch,
    BestFloat,
    ByLevel,
    Codebook,
    ConstantToken,
    DiscreteSteps,
    Distill,
    Dynamic,
    E4M3Group,
    E8M0Group,
    FinalLatents,
    Fixed,
    Float,
    Hadamard,
    Incoherence,
    Int,
    LayerSpec,
    LowRank,
    MostSensitive,
    OfRoles,
    OutputError,
    PerChannel,
    PerGroup,
    PerLevel,
    PerTensor,
    PerTile,
    PerToken,
    PooledBlocks,
    Radial,
    RankDecay,
    Recall,
    Reconstruct,
    RowInTile,
    Sage,
    ShortcutSplit,
    SkipSoftmax,
    SlidingTile,
    Smooth,
    SmoothBoth,
    SmoothKeys,
    StaticBlocks,
    TensorSpec,
    Trellis,
    TwoLevel,
    VectorCodebook,
    WeightedSum,
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
A8_LEVELS = replace(A8_STATIC, granularity=PerLevel())
AFP8 = TensorSpec(format=Float(), granularity=PerToken(), range=Dynamic())

E2M1 = Float(exponent=2, mantissa=1)
NVFP4 = TensorSpec(format=E2M1, granularity=E4M3Group(), range=MSE())
MXFP4 = TensorSpec(format=E2M1, granularity=E8M0Group())
ANVFP4 = TensorSpec(format=E2M1, granularity=E4M3Group(), range=Dynamic())
AMXFP8 = TensorSpec(format=Float(), granularity=E8M0Group(), range=Dynamic())
A4_GROUP = TensorSpec(format=Int(bits=4), granularity=PerGroup(), range=Dynamic())
EVERYTHING = LayerSpec(
    weight=NVFP4,
    input=ANVFP4,
    solver=GPTQ(damping=0.05, act_order=False),
    transforms=(Smooth(alpha=0.5), Hadamard(block=64, regular=True, seed=3)),
    low_rank=LowRank(rank=16, iterations=2),
    correct_bias=True,
)
W4A8 = LayerSpec(weight=W4_TWO_LEVEL, input=A8)

EVERY_TYPE = [
    Recall(),
    Incoherence(),
    WeightedSum(alpha=0.25),
    StaticBlocks(density=0.3, groups=2, edges=(0.25, 0.5), computed=0.31),
    SlidingTile(density=0.3),
    Radial(density=0.3),
    PooledBlocks(density=0.3),
    SkipSoftmax(threshold=1e-2),
    RowInTile(),
    PerTile(),
    Fixed(),
    SmoothKeys(),
    SmoothBoth(),
    Sage(),
    AttentionMass(),
    OutputError(limit=0.05),
    Adaptive(error=0.1, per_head=False),
    AttentionSpec(
        order=Recall(),
        mask=StaticBlocks(density=0.3),
        block=(128, 64),
        qk=Int(bits=4),
        pv=Int(bits=8),
        smooth=SmoothBoth(),
        layout=(1, 2, 3, 4, 5),
        orders=(0, 1),
        adapt=Adaptive(),
        qk_bits=(4, 16),
        pv_bits=(8, 8),
    ),
    OfRoles(),
    MostSensitive(share=0.5),
    RankDecay(rank=4),
    DiscreteSteps(share=0.02, every=3),
    Distill(iterations=3, rank=8),
    FinalLatents(prompts=("a", "b"), seed=3),
    Distill(guidance=4.5, influence=(1.0, 0.5), layers=OfRoles(roles=("conv",)), decay=RankDecay()),
    Distill(judge=FinalLatents(prompts=("a",))),
    Reconstruct(drop=0.25),
    Int(bits=3, symmetric=False),
    Float(),
    Float(exponent=3, mantissa=5, signed=False),
    BestFloat(bits=6, signed=False),
    nf4(),
    bitmod(3),
    log_grid(4, base=1.3),
    Codebook(tables=((0.0, 0.1, 0.2, 1e30),)),
    VectorCodebook(words=64, length=2),
    VectorCodebook(books=3),
    Trellis(bits=3, state_bits=16),
    E8M0Group(size=64, saturate=False),
    E4M3Group(size=8),
    PerTensor(),
    PerLevel(),
    PerLevel(most=3, edges=(1.5, 20.0)),
    PerChannel(),
    PerToken(),
    PerGroup(size=32),
    TwoLevel(size=128),
    AbsMax(),
    MSE(steps=5, least=0.25),
    MSE(most=1.5),
    Dynamic(),
    RTN(),
    GPTQ(damping=1, act_order=False),
    AdaRound(iterations=7),
    BeamSearch(beam=4, tolerance=0.1, rounds=3, damping=1),
    Smooth(),
    Smooth(alpha=0, power_of_two=True),
    Hadamard(),
    Hadamard(block=16, regular=True, seed=5),
    ConstantToken(),
    ShortcutSplit(),
    ShortcutSplit(at=(64,)),
    LowRank(),
    W4_GROUP,
    NVFP4,
    EVERYTHING,
    LayerSpec(weight=MXFP4, input=AMXFP8, solver=AdaRound(), transforms=(Hadamard(),)),
    LayerSpec(weight=W4_GROUP),
    LayerSpec(weight=W4_TWO_LEVEL, input=A8),
    LayerSpec(weight=W8, input=A8_STATIC),
    LayerSpec(weight=WFP8, input=AFP8),
    ByLevel(specs=(LayerSpec(weight=W8), LayerSpec(weight=W8, input=A8)), shares=(0.5,)),
    ByLevel(specs=(LayerSpec(weight=W8), W4A8), shares=(0.25,), edges=(0.5,), rising=True, num_steps=20),
]


@pytest.mark.parametrize("spec", EVERY_TYPE, ids=lambda spec: type(spec).__name__)
def test_json_text_round_trip(spec):
    assert from_json(json.loads(json.dumps(to_json(spec)))) == spec


def test_every_type_round_trips():
    """Nothing is public and not in the list above."""
    public = {kind for name in dqtk.spec.__all__ if isinstance(kind := getattr(dqtk.spec, name), type)}
    assert {type(spec) for spec in EVERY_TYPE} == public
    assert {kind for kind in public if hasattr(kind, "size")} == set(GROUPS)


@pytest.mark.parametrize("spec", EVERY_TYPE, ids=lambda spec: type(spec).__name__)
def test_specs_are_one_text_and_one_key_each(spec):
    """Made twice, also by way of JSON, they are the same, and no two of the list are."""
    again = from_json(json.loads(json.dumps(to_json(spec))))
    assert canonical(again) == canonical(spec)
    assert hash(again) == hash(spec)
    assert sum(canonical(other) == canonical(spec) for other in EVERY_TYPE) == 1


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
        "transforms": [],
        "low_rank": None,
        "correct_bias": False,
    }
    assert to_json(EVERYTHING)["transforms"] == [
        {"type": "Smooth", "alpha": 0.5, "power_of_two": False},
        {"type": "Hadamard", "block": 64, "regular": True, "seed": 3},
    ]
    assert to_json(Codebook(tables=((0.0, 1.0, 2.0, 4.0),))) == {"type": "Codebook", "tables": [[0.0, 1.0, 2.0, 4.0]], "name": ""}


def test_canonical_text_is_golden():
    assert canonical(A8) == (
        '{"format":{"bits":8,"type":"Int"},"granularity":{"type":"PerToken"},"range":{"type":"Dynamic"},"type":"TensorSpec"}'
    )
    assert canonical(LayerSpec(weight=W8, transforms=(Smooth(), Hadamard(block=8)))) == (
        '{"transforms":[{"type":"Smooth"},{"block":8,"type":"Hadamard"}],"type":"LayerSpec",'
        '"weight":{"format":{"bits":8,"type":"Int"},"granularity":{"type":"PerChannel"},"type":"TensorSpec"}}'
    )
    assert canonical(E2M1) == '{"exponent":2,"mantissa":1,"type":"Float"}'
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


def layer_with(**changes):
    return to_json(LayerSpec(weight=W8)) | changes


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
        (
            {"type": "Float", "exponent": 5, "mantissa": 3},
            r"spec: Float: \(exponent, mantissa\) must be .*, got \(5, 3\)\. For example",
        ),
        ({"type": "Float", "exponent": True}, r"spec\.exponent: value must be int, got True\."),
        ({"type": "Codebook", "tables": [0, 1]}, r"spec\.tables\[0\]: value must be a list, got 0\."),
        ({"type": "Codebook", "tables": 3}, r"spec\.tables: value must be a list, got 3\."),
        ({"type": "Codebook", "tables": [[0, 1, 2, "3"]]}, r"spec\.tables\[0\]\[3\]: value must be float or int, got '3'\."),
        ({"type": "Codebook", "tables": [[0, 1, 2, True]]}, r"spec\.tables\[0\]\[3\]: value must be float or int, got True\."),
        ({"type": "Codebook", "tables": [[0, 1, 2]]}, r"spec: Codebook: tables must be .* got .*sizes \[3\]\."),
        ({"type": "GTPQ"}, r"spec: type must be one of .*Did you mean 'GPTQ'\?"),
        ({"type": "LowRank", "rank": 0}, r"spec: LowRank: rank must be a positive integer, got 0\."),
        (
            {"type": "LowRank", "rnak": 4},
            r"spec: LowRank: field must be one of rank, iterations, shared, got 'rnak'\. Did you mean 'rank'\?",
        ),
        (layer_with(transforms=None), r"spec\.transforms: value must be a list, got None\."),
        (layer_with(transforms=[{"type": "Smoth"}]), r"spec\.transforms\[0\]: type must be one of .*Did you mean 'Smooth'\?"),
        (layer_with(transforms=[{"type": "RTN"}]), r"spec\.transforms\[0\]: value must be Smooth or Hadamard or .*, got"),
        (
            layer_with(transforms=[{"type": "Smooth"}, {"type": "Hadamard", "block": 2}]),
            r"spec\.transforms\[1\]: Hadamard: block must",
        ),
        (
            layer_with(transforms=[{"type": "Smooth"}, {"type": "Smooth"}]),
            r"spec: LayerSpec: transforms must be of different kinds",
        ),
        (layer_with(solver={"type": "Smooth"}), r"spec\.solver: value must be RTN or GPTQ or AdaRound or BeamSearch, got"),
        (layer_with(low_rank=32), r"spec\.low_rank: value must be LowRank or None, got 32\."),
        (layer_with(correct_bias=1), r"spec\.correct_bias: value must be bool, got 1\."),
        ({"type": "MSE", "least": "0.5"}, r"spec\.least: value must be float or int, got '0\.5'\."),
        ({"type": "LayerSpec", "wieght": {}}, r"spec: LayerSpec: field must be one of .*Did you mean 'weight'\?"),
        (weight_with(granularity={"type": "PerChanel"}), r"spec\.weight\.granularity: type .*Did you mean 'PerChannel'\?"),
        (weight_with(granularity={"type": "PerGroup", "size": 7}), r"spec\.weight\.granularity: PerGroup: size must be a positive"),
        (weight_with(granularity={"type": "MSE"}), r"spec\.weight\.granularity: value must be PerTensor or PerLevel or .*, got"),
        (weight_with(format=None), r"spec\.weight\.format: value must be Int or Float or BestFloat or Codebook or .*, got None\."),
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


@pytest.mark.parametrize(
    ("exponent", "mantissa", "signed"),
    [
        (0, 3, True),
        (1, 0, True),
        (4, 4, True),
        (3, -1, True),
        (2, 0, False),
        (4, 5, False),
        (8, 0, False),
        (2.0, 1, True),
        (True, 2, True),
    ],
)
def test_float_refuses(exponent, mantissa, signed):
    text = rf"Float: \(exponent, mantissa\) must be at least \(1, 0\), .* got \({exponent}, {mantissa}\)\. For example"
    with pytest.raises(ValueError, match=text):
        Float(exponent=exponent, mantissa=mantissa, signed=signed)


def test_bits_of_formats():
    assert (Float().bits, E2M1.bits, Float(exponent=2, mantissa=1, signed=False).bits) == (8, 4, 3)
    assert (nf4().bits, bitmod(3).bits, log_grid(8, 1.1).bits) == (4, 3, 8)
    assert TensorSpec(format=BestFloat(bits=6), granularity=PerTensor()).bits == 6
    splits = BestFloat(bits=4).splits
    assert [(f.exponent, f.mantissa) for f in splits] == [(3, 0), (2, 1), (1, 2)]
    assert [(f.exponent, f.mantissa) for f in BestFloat(bits=8).splits] == [(5, 2), (4, 3), (3, 4), (2, 5), (1, 6)]
    assert [(f.exponent, f.mantissa, f.signed) for f in BestFloat(bits=3, signed=False).splits] == [
        (3, 0, False),
        (2, 1, False),
        (1, 2, False),
    ]
    for bits in range(3, 9):
        for signed in (True, False):
            assert {(f.bits, f.signed) for f in BestFloat(bits=bits, signed=signed).splits} == {(bits, signed)}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: BestFloat(bits=2), r"BestFloat: bits must be an integer from 3 to 8, got 2\. Use BestFloat\(bits=4\)"),
        (lambda: BestFloat(bits=4.0), r"BestFloat: bits must be an integer from 3 to 8, got 4\.0\."),
        (
            lambda: Codebook(tables=()),
            r"Codebook: tables must be 1 to 16 ascending lists .* got .*sizes \[\]\. For",
        ),
        (lambda: Codebook(tables=((0.0, 1.0, 1.0, 2.0),)), r"Codebook: tables must be 1 to 16 ascending lists"),
        (lambda: Codebook(tables=((0.0, 1.0, float("nan"), 2.0),)), r"Codebook: tables must be 1 to 16 ascending lists"),
        (lambda: Codebook(tables=((0.0, 1.0, 2.0, 3.0), tuple(range(8)))), r"Codebook: tables .* got .*sizes \[4, 8\]"),
        (lambda: Codebook(tables=(tuple(range(4)),) * 17), r"Codebook: tables must be 1 to 16 ascending lists"),
        (lambda: Codebook(tables=(tuple(range(512)),)), r"Codebook: tables .* got .*sizes \[512\]"),
        (lambda: GPTQ(damping=0), r"GPTQ: damping must be in \(0, 1\], got 0\. The usual value is 0\.01"),
        (lambda: AdaRound(iterations=0), r"AdaRound: iterations must be a positive integer, got 0\. The usual number is 2500"),
        (lambda: AdaRound(iterations=1.5), r"AdaRound: iterations must be a positive integer, got 1\.5"),
        (lambda: Smooth(alpha=1.1), r"Smooth: alpha must be from 0 to 1 or None, got 1\.1\. None searches it"),
        (lambda: Hadamard(block=3), r"Hadamard: block must be an integer of at least 4 or None, got 3\. Usual: 64 to 256"),
        (lambda: LowRank(rank=0), r"LowRank: rank must be a positive integer, got 0\. No branch is low_rank=None"),
        (lambda: LowRank(iterations=0), r"LowRank: iterations must be a positive integer, got 0"),
        (lambda: MSE(most=0.9), r"MSE: most must be from 1 to 2, got 0\.9\. Use MSE\(\)"),
        (lambda: MSE(most=2.1), r"MSE: most must be from 1 to 2, got 2\.1\."),
    ],
)
def test_parts_refuse(call, text):
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize("kind", GROUPS)
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
            r"TwoLevel .* at most 7 bits, got Int\(bits=8.*Use PerGroup",
        ),
        (TensorSpec(format=Int(bits=4, symmetric=False), granularity=TwoLevel()), None, "TwoLevel granularity must be symmetric"),
        (TensorSpec(format=Float(), granularity=TwoLevel()), None, "TwoLevel granularity must be symmetric Int"),
        (
            TensorSpec(format=Float(exponent=2, mantissa=2, signed=False), granularity=PerChannel()),
            None,
            r"weight must be a signed format, got Float\(.*Unsigned floats are for inputs",
        ),
        (TensorSpec(format=BestFloat(signed=False), granularity=PerChannel()), None, "weight must be a signed format"),
        (TensorSpec(format=nf4(), granularity=TwoLevel()), None, "TwoLevel granularity must be symmetric Int"),
        (
            TensorSpec(format=Int(bits=4, symmetric=False), granularity=E8M0Group()),
            None,
            r"weight with E8M0Group must be a signed Float or a symmetric Int, got Int\(.*Use PerGroup",
        ),
        (
            TensorSpec(format=nf4(), granularity=E4M3Group()),
            None,
            r"weight with E4M3Group must be a signed Float or a symmetric Int",
        ),
        (
            TensorSpec(format=bitmod(4), granularity=PerChannel()),
            None,
            r"weight with several tables must be PerGroup, got PerChannel\(\)\. Every group chooses",
        ),
        (
            W8,
            TensorSpec(format=Int(bits=8), granularity=PerToken()),
            "input must be PerTensor or PerLevel with a calibrated range, PerToken or in groups",
        ),
        (
            W8,
            TensorSpec(format=E2M1, granularity=E4M3Group()),
            r"input must be .* got E4M3Group\(size=16\) with AbsMax\(\)\. A token's",
        ),
        (W8, TensorSpec(format=E2M1, granularity=PerGroup(), range=MSE()), r"input must be .* with MSE\("),
        (
            W8,
            TensorSpec(format=Int(bits=8), granularity=PerTensor(), range=Dynamic()),
            "input must be PerTensor or PerLevel with a calibrated range",
        ),
        (
            W8,
            TensorSpec(format=Int(bits=8), granularity=PerChannel()),
            "input granularity must be PerToken, PerTensor, PerLevel or a group of inputs",
        ),
        (
            W8,
            TensorSpec(format=Int(bits=4), granularity=TwoLevel(), range=Dynamic()),
            "input granularity must be PerToken, PerTensor, PerLevel or",
        ),
        (
            W8,
            TensorSpec(format=BestFloat(bits=8), granularity=PerToken(), range=Dynamic()),
            r"input format under a Dynamic range must be a fixed one, got BestFloat\(.*Use Float",
        ),
        (
            W8,
            TensorSpec(format=Float(signed=False), granularity=E8M0Group(), range=Dynamic()),
            "input with E8M0Group must be a signed Float or a symmetric Int",
        ),
        (
            W8,
            TensorSpec(format=Int(bits=4, symmetric=False), granularity=E4M3Group(), range=Dynamic()),
            "input with E4M3Group must be a signed Float or a symmetric Int",
        ),
        (
            W8,
            TensorSpec(format=bitmod(4), granularity=PerGroup(), range=Dynamic()),
            r"input with a Dynamic range must have one table, got several\.",
        ),
    ],
)
def test_impossible_layers(weight, given, text):
    with pytest.raises(ValueError, match=f"LayerSpec: .*{text}"):
        LayerSpec(weight=weight, input=given)


def test_the_same_kind_of_transform_twice():
    with pytest.raises(ValueError, match=r"LayerSpec: transforms must be a tuple, got \[Hadamard"):
        LayerSpec(weight=W8, transforms=[Hadamard()])
    with pytest.raises(ValueError, match=r"LayerSpec: transforms must be of different kinds, got \(Hadamard\(.*Drop one"):
        LayerSpec(weight=W8, transforms=(Hadamard(), Hadamard(block=64)))


A16, MORE = LayerSpec(weight=W8), LayerSpec(weight=W8, input=A8)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"specs": (A16,)}, "specs must be at least two, neighbours different, got 1"),
        ({"specs": (A16, A16)}, "specs must be at least two, neighbours different, got 2"),
        ({"shares": ()}, "shares or edges must be given, 1 for 2 specs, got [] and []"),
        ({"shares": (0.2, 0.5)}, "shares or edges must be given, 1 for 2 specs"),
        ({"shares": (0.0,)}, "shares must ascend between 0 and 1, got [0.0]"),
        ({"specs": (A16, MORE, A16), "shares": (0.5, 0.5)}, "shares must ascend between 0 and 1"),
        ({"specs": (A16, MORE, A16), "shares": (), "edges": (1.0, 2.0)}, "edges must be finite and descend along the run"),
        ({"specs": (A16, MORE, A16), "shares": (), "edges": (2.0, 1.0), "rising": True}, "edges must be finite and ascend"),
        ({"specs": (A16, MORE, A16), "shares": (), "edges": (2.0, float("nan"))}, "edges must be finite and descend"),
        (
            {"specs": (LayerSpec(weight=W8, input=A8_STATIC), LayerSpec(weight=W8, input=replace(A8_STATIC, range=MSE())))},
            "specs with one weight must have at most one calibrated input, got W8 per channel, A8 per tensor",
        ),
        ({"specs": (replace(A16, correct_bias=True), MORE)}, "correct_bias must be False, got True"),
    ],
)
def test_impossible_policies(fields, text):
    with pytest.raises(ValueError, match=f"ByLevel: {re.escape(text)}"):
        ByLevel(**({"specs": (A16, MORE), "shares": (0.5,)} | fields))


def test_kinds_and_weights_of_a_policy():
    spec = ByLevel(specs=(A16, MORE, W4A8, A16), shares=(0.1, 0.2, 0.9), edges=(9.0, 8.0, 1.0))
    assert spec.kinds == (A16, MORE, W4A8)
    assert spec.weights == ((MORE, A16), (W4A8,))
    assert spec.ascending == ((1.0, 8.0, 9.0), (0, 2, 1, 0))
    assert replace(spec, edges=(1.0, 8.0, 9.0), rising=True).ascending == ((1.0, 8.0, 9.0), (0, 1, 2, 0))
    assert spec.longest == W4A8
    joined = spec.each(lambda part: MORE if part == A16 else part)
    assert (joined.specs, joined.shares, joined.edges) == ((MORE, W4A8, MORE), (0.2, 0.9), (8.0, 1.0))
    assert spec.each(lambda part: A16) == A16
    with pytest.raises(ValueError, match="ByLevel: shares must be known to weigh its specs"):
        _ = replace(spec, shares=()).longest


@pytest.mark.parametrize("weight", [W8, W4_GROUP, W4_TWO_LEVEL, WFP8, NVFP4, MXFP4], ids=lambda w: str(LayerSpec(weight=w)))
@pytest.mark.parametrize(
    "given",
    [
        *(A8, A8_STATIC, AFP8, ANVFP4, AMXFP8, A4_GROUP),
        TensorSpec(format=Int(bits=4, symmetric=False), granularity=PerToken(), range=Dynamic()),
        TensorSpec(format=Float(exponent=3, mantissa=4, signed=False), granularity=PerTensor(), range=MSE()),
        TensorSpec(format=BestFloat(bits=8), granularity=PerTensor()),
        TensorSpec(format=log_grid(4), granularity=PerTensor()),
    ],
    ids=lambda given: str(LayerSpec(weight=W8, input=given)),
)
def test_formats_of_weight_and_input_combine_freely(weight, given):
    """What no kernel takes is emulated."""
    spec = LayerSpec(weight=weight, input=given)
    assert from_json(to_json(spec)) == spec


@pytest.mark.parametrize(
    ("spec", "ranges", "inputs"),
    [
        (LayerSpec(weight=W8), False, False),
        (LayerSpec(weight=W8, input=A8), False, False),
        (LayerSpec(weight=NVFP4, input=ANVFP4), False, False),
        (LayerSpec(weight=W8, input=A8_STATIC), True, False),
        (LayerSpec(weight=WFP8, input=TensorSpec(format=Float(), granularity=PerTensor())), True, False),
        (LayerSpec(weight=W8, input=TensorSpec(format=Int(bits=8), granularity=PerTensor(), range=MSE())), True, True),
        (LayerSpec(weight=W8, input=TensorSpec(format=BestFloat(bits=8), granularity=PerTensor())), True, True),
        (LayerSpec(weight=W8, solver=GPTQ()), False, True),
        (LayerSpec(weight=W8, solver=AdaRound()), False, True),
        (LayerSpec(weight=W8, transforms=(Smooth(alpha=0.5),)), False, True),
        (LayerSpec(weight=W8, transforms=(Hadamard(),)), False, False),
        (LayerSpec(weight=W8, low_rank=LowRank()), False, True),
        (LayerSpec(weight=W8, correct_bias=True), False, True),
        (LayerSpec(weight=W8, input=A8_STATIC, solver=GPTQ()), True, True),
    ],
    ids=str,
)
def test_what_calibration_must_find(spec, ranges, inputs):
    assert (spec.needs_ranges, spec.needs_inputs, spec.needs_stats) == (ranges, inputs, ranges or inputs)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (None, "16 bit"),
        (LayerSpec(weight=W8), "W8 per channel, A16"),
        (LayerSpec(weight=W4_GROUP), "W4 group 64 asym, A16"),
        (LayerSpec(weight=W4_TWO_LEVEL, input=A8), "W4 group 64 two-level, A8 per token"),
        (LayerSpec(weight=W8, input=A8_STATIC), "W8 per channel, A8 per tensor asym"),
        (LayerSpec(weight=W8, input=A8_LEVELS), "W8 per channel, A8 per noise level asym"),  # its intervals are to be found
        (
            LayerSpec(weight=W8, input=replace(A8_LEVELS, granularity=PerLevel(edges=(100.0, 300.0)))),
            "W8 per channel, A8 per noise level (3 intervals) asym",
        ),
        (LayerSpec(weight=WFP8, input=AFP8), "WFP8 E4M3 per channel, AFP8 E4M3 per token"),
        (LayerSpec(weight=NVFP4, input=ANVFP4), "WFP4 E2M1 group 16 E4M3, AFP4 E2M1 group 16 E4M3"),
        (LayerSpec(weight=MXFP4, input=AMXFP8), "WFP4 E2M1 group 32 E8M0, AFP8 E4M3 group 32 E8M0"),
        (LayerSpec(weight=TensorSpec(format=BestFloat(), granularity=PerTensor())), "WFP4 per tensor, A16"),
        (LayerSpec(weight=TensorSpec(format=nf4(), granularity=PerGroup())), "W4 NF4 group 64, A16"),
        (LayerSpec(weight=TensorSpec(format=bitmod(3), granularity=PerGroup(size=128))), "W3 BitMoD group 128, A16"),
        (
            LayerSpec(weight=TensorSpec(format=Codebook(tables=((-2, -1, 1, 2),)), granularity=PerChannel())),
            "W2 codebook per channel, A16",
        ),
        (
            LayerSpec(weight=W8, input=TensorSpec(format=Float(exponent=3, mantissa=4, signed=False), granularity=PerTensor())),
            "W8 per channel, AFP7 UE3M4 per tensor",
        ),
        (EVERYTHING, "WFP4 E2M1 group 16 E4M3, AFP4 E2M1 group 16 E4M3, smooth 0.5, rotated 64 regular, rank 16, GPTQ, bias"),
        (
            LayerSpec(weight=W8, transforms=(Hadamard(), Smooth()), solver=AdaRound()),
            "W8 per channel, A16, rotated, smooth, AdaRound",
        ),
        (LayerSpec(weight=W8, transforms=(Smooth(power_of_two=True),)), "W8 per channel, A16, shift"),
        (
            ByLevel(specs=(A16, MORE, A16), shares=(0.1, 0.95)),
            "W8 per channel, A16 to 10 % / A8 per token to 95 % / A16",
        ),
        (
            ByLevel(specs=(W4A8, A16), edges=(200.0,)),
            "W4 group 64 two-level, A8 per token to time 200; then W8 per channel, A16",
        ),
    ],
)
def test_short_names(spec, text):
    assert describe(spec) == text
    assert spec is None or str(spec) == text


def test_suggestions():
    assert did_you_mean("w8a9", ["w8a8", "fp8"]) == " Did you mean 'w8a8'?"
    assert did_you_mean("zzz", ["w8a8", "fp8"]) == ""


GOOD = {"weight": TensorSpec(format=Int(bits=8), granularity=PerChannel())}


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: LayerSpec(**GOOD, solver=GPTQ),
            r"LayerSpec: solver must be RTN or GPTQ or AdaRound or BeamSearch, got .*\. Write GPTQ\(\.\.\.\)\.",
        ),
        (lambda: LayerSpec(**GOOD, solver="gptq"), "LayerSpec: solver must be RTN or GPTQ or AdaRound or BeamSearch, got 'gptq'"),
        (lambda: LayerSpec(weight="int4"), "LayerSpec: weight must be TensorSpec, got 'int4'"),
        (lambda: LayerSpec(weight=Int(bits=4)), r"LayerSpec: weight must be TensorSpec, got Int\(bits=4"),
        (lambda: LayerSpec(**GOOD, input=Int(bits=8)), "LayerSpec: input must be TensorSpec or None, got Int"),
        (lambda: LayerSpec(**GOOD, low_rank=16), "LayerSpec: low_rank must be LowRank or None, got 16"),
        (
            lambda: LayerSpec(**GOOD, transforms=(Smooth,)),
            r"LayerSpec: transforms must be Smooth or Hadamard or .*, got .* Write Smooth\(",
        ),
        (lambda: LayerSpec(**GOOD, correct_bias="yes"), "LayerSpec: correct_bias must be bool, got 'yes'"),
        (lambda: TensorSpec(format=Int, granularity=PerChannel()), r"TensorSpec: format must be Int or .* Write Int\("),
        (lambda: TensorSpec(format=Int(bits=4), granularity=PerGroup), r"TensorSpec: granularity must be .* Write PerGroup\("),
        (lambda: TensorSpec(format=Int(bits=4), granularity=PerGroup(), range=MSE), r"TensorSpec: range must be .* Write MSE\("),
        (lambda: GPTQ(damping="a"), "GPTQ: damping must be float or int, got 'a'"),
        (lambda: GPTQ(act_order="no"), "GPTQ: act_order must be bool, got 'no'"),
        (lambda: Smooth(alpha="auto"), "Smooth: alpha must be float or None or int, got 'auto'"),
        (lambda: MSE(least="a"), "MSE: least must be float or int, got 'a'"),
        (lambda: Hadamard(seed="x"), "Hadamard: seed must be int, got 'x'"),
        (lambda: AdaRound(iterations=True), "AdaRound: iterations must be int, got True"),
        (lambda: Codebook(tables=(("a", "b", "c", "d"),)), "Codebook: tables must be float or int, got 'a'"),
        (lambda: PerLevel(edges=[1.0]), r"PerLevel: edges must be a tuple, got \[1\.0\]"),
        (lambda: PerLevel(most=1), "PerLevel: most must be an integer from 2 to 64, got 1"),
        (lambda: PerLevel(edges=(2.0, 1.0)), "PerLevel: edges must be finite and ascending"),
    ],
)
def test_fields_of_a_wrong_type_are_refused_where_they_are_written(make, text):
    with pytest.raises(ValueError, match=text):
        make()
