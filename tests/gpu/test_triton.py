"""The Triton kernels under Triton's interpreter, in a process of its own; and who decides whether they run."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import types
from pathlib import Path

import pytest
import torch
from triton_cases import ATTENTION, CASES, KINDS, attends, attention_inputs, drawn_blocks, layer, moved, near, seeded, weight_only

from dqtk import gpu
from dqtk.gpu import table
from dqtk.gpu.tiles import INT8, Pass, by_rows, default_pass
from dqtk.kernels import linear, linear_int8_reference, report_of
from dqtk.ops import EMULATED, report_of_attention
from dqtk.spec import AttentionSpec, Float, Int, PerTile, Radial

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def interpreted():
    """Case -> what went wrong under the interpreter, or nothing."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "DQTK_TRITON": ""}
    command = [sys.executable, "-W", "error", str(HERE / "triton_cases.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500, check=False)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_under_the_interpreter(name, interpreted):
    assert not interpreted[name], interpreted[name]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_on_the_device(name):
    CASES[name]("cuda")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Function (capability or None, hip, **environment) -> decide again on such a machine."""

    def change(capability=None, hip=None, **environment):
        for name in ("DQTK_TRITON", "TRITON_INTERPRET", "CC"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "NVIDIA Some (Card)")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
        (tmp_path / "include").mkdir(exist_ok=True)
        (tmp_path / "include" / "Python.h").touch()
        monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path / "include")})
        monkeypatch.setattr(shutil, "which", lambda name: name)
        gpu.forget()

    monkeypatch.setenv("DQTK_CACHE_DIR", str(tmp_path / "cache"))
    yield change
    monkeypatch.undo()
    gpu.forget()


CUDA = torch.device("cuda", 0)


def test_machines_without_triton_kernels_say_why(machine, monkeypatch):
    for how, reason in (
        ({}, "no CUDA device here"),
        ({"capability": (7, 5)}, "this device has compute capability 7.5, below 8.0"),
        ({"capability": (9, 0), "hip": "6.4"}, "nobody has tried them on ROCm"),
        ({"capability": (9, 0), "DQTK_TRITON": "off"}, "switched off by DQTK_TRITON"),
    ):
        machine(**how)
        assert not gpu.serves(CUDA)
        assert gpu.describe() == (False, f"Triton kernels: {reason}")
        assert report_of("linear_int8", "cuda") == f"integer matmul through torch._int_mm (Triton kernels: {reason})"
    machine(capability=(9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    gpu.forget()
    assert gpu.describe() == (False, "Triton kernels: triton is not installed")


def test_what_launches_kernels_must_be_compiled(machine, monkeypatch, tmp_path):
    machine(capability=(9, 0))
    (tmp_path / "include" / "Python.h").unlink()
    assert gpu.describe() == (False, "Triton kernels: Triton needs Python's C headers, and Python.h is not installed")
    machine(capability=(9, 0))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    missing = "Triton kernels: Triton needs a C compiler and found none (looked for gcc, clang; CC names another)"
    assert gpu.describe() == (False, missing)
    machine(capability=(9, 0), CC="tcc")
    assert gpu.serves(CUDA)


def test_machines_with_triton_kernels(machine):
    machine(capability=(8, 0))
    assert gpu.serves(CUDA)
    assert not gpu.serves(torch.device("cpu"))
    assert report_of("linear_int8", "cuda") == "integer matmul, Triton kernels"


def test_fp8_where_torch_multiplies_it(machine):
    for how, report in (
        ({"capability": (8, 9)}, "FP8 matmul through torch._scaled_mm"),
        ({"capability": (9, 0), "DQTK_TRITON": "off"}, "FP8 matmul through torch._scaled_mm"),
        ({"capability": (8, 6)}, EMULATED),
        ({"capability": (9, 4), "hip": "6.4"}, EMULATED),
        ({}, EMULATED),
    ):
        machine(**how)
        assert report_of("linear_fp8", "cuda") == report


def test_wrong_switch_is_an_error(machine):
    machine(capability=(9, 0), DQTK_TRITON="on")
    with pytest.raises(ValueError, match="DQTK_TRITON must be off or unset, got 'on'"):
        gpu.serves(CUDA)


def test_without_triton_torch_serves_the_op(machine, monkeypatch):
    """The path of a CUDA device that Triton does not serve, and of dtypes that its kernels do not take."""
    monkeypatch.setattr(gpu, "linear_int8", None)  # an error if it is called
    monkeypatch.setattr(gpu, "linear_decoded", None)
    machine(capability=(7, 5))
    for dtype in gpu.TYPES:
        x, arguments = seeded(3, 24).to(dtype), (*layer(7, 24, bits=4, size=8), None, "gelu", 3)
        assert torch.equal(linear.linear_int8_on_cuda(x, *arguments), linear_int8_reference(x, *arguments))
        for kind in KINDS:
            near(x, weight_only(7, 24, kind), "cpu", kind)
    machine(TRITON_INTERPRET="1")
    assert gpu.serves(torch.device("cpu"))
    x, arguments = seeded(3, 24).double(), moved(layer(7, 24), "cpu")
    assert torch.equal(linear.linear_int8_on_cuda(x, *arguments), linear_int8_reference(x, *arguments))


def test_attention_says_what_runs(machine):
    sparse, codes = Radial(density=0.3), {"qk": Int(bits=8), "pv": Int(bits=8)}
    specs = {
        "dense": AttentionSpec(),
        "16": AttentionSpec(mask=sparse),
        "8": AttentionSpec(mask=sparse, **codes),
        "tile": AttentionSpec(mask=sparse, scale=PerTile(), **codes),
        "odd": AttentionSpec(mask=sparse, block=(64, 48)),
        "fp8": AttentionSpec(mask=sparse, qk=Int(bits=8), pv=Float()),
    }

    def reports():
        return {name: report_of_attention(spec, "cuda") for name, spec in specs.items()}

    machine(capability=(9, 0))
    assert reports() == {
        "dense": "torch's own attention: all of it, as it is",
        "16": "live blocks, Triton kernels",
        "8": "live blocks, Triton kernels",
        "tile": f"{EMULATED} (Triton kernels take no blocks of 64 by 64 like these)",
        "odd": "live blocks gathered for torch's own attention (Triton kernels take no blocks of 64 by 48 like these)",
        "fp8": f"{EMULATED} (Triton kernels take no blocks of 64 by 64 like these)",
    }
    machine(capability=(7, 5))
    why = "(Triton kernels: this device has compute capability 7.5, below 8.0)"
    assert reports()["8"] == f"{EMULATED} {why}"
    assert reports()["16"] == f"live blocks gathered for torch's own attention {why}"


def test_attention_without_triton(machine, monkeypatch):
    monkeypatch.setattr(gpu, "block_attention", None)  # an error if it is called
    shape = ATTENTION[2]
    for how, bits, mode, block in (({"capability": (7, 5)}, 8, "row", 64), ({"TRITON_INTERPRET": "1"}, 8, "tile", 64)):
        machine(**how)
        arguments = None, drawn_blocks((*shape[:5], block, 128), 0.5), None, block, 128, 0.2, bits, bits, mode, "k"
        attends(attention_inputs(shape, torch.float32), arguments, "cpu", f"{how}")


def test_a_pass_for_attention(machine):
    q = torch.empty(1, 1, 4608, 128, dtype=torch.bfloat16)
    machine(capability=(9, 0))
    assert table.chosen_pass(q, q, 64, 64, 16, 16) == Pass(4, 2)
    assert table.chosen_pass(q, q, 128, 64, 8, 8) == Pass(8, 3)
    assert default_pass(64, 1 << 20, table.SMALLEST) == Pass(4, 1)
    rows = [table.Row("attention16-64", 4608, 64, 128, Pass(8, 3, True)), table.Row("attention8-64", 4608, 64, 128, Pass(4, 3))]
    table.save(table.path_of("NVIDIA Some (Card)"), rows)
    assert table.load(table.path_of("NVIDIA Some (Card)")) == rows
    there = torch.empty(1, 1, 9000, 128, device="meta", dtype=torch.bfloat16)
    there_too = types.SimpleNamespace(device=CUDA, shape=there.shape, dtype=there.dtype, element_size=lambda: 2)
    assert table.chosen_pass(there_too, there_too, 64, 64, 16, 16) == Pass(8, 3, True)
    assert table.chosen_pass(there_too, there_too, 64, 64, 4, 8) == Pass(4, 3)


def test_weights_that_the_kernel_does_not_take_are_decoded_by_torch(machine, monkeypatch):
    machine(TRITON_INTERPRET="1")
    for x, stored in ((seeded(3, 24), weight_only(7, 24, "int4")), (seeded(3, 24).bfloat16(), weight_only(7, 24, "int3"))):
        assert gpu.linear_decoded(x, None, *stored) is None
        near(x, stored, "cpu", str(x.dtype))


def test_tables_choose_the_nearest_rows(machine, tmp_path):
    machine(capability=(9, 0))
    assert table.chosen("int8", 300, 64, 32, CUDA) == by_rows(300, INT8)
    rows = [table.Row("int8", 16, 64, 32, INT8[1]), table.Row("int8", 256, 64, 32, None), table.Row("int4", 16, 64, 32, None)]
    table.save(table.path_of("NVIDIA Some (Card)"), rows)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["gpu-nvidia-some-card.json"]
    assert table.load(tmp_path / "cache" / "gpu-nvidia-some-card.json") == rows
    assert [table.chosen("int8", t, 64, 32, CUDA) for t in (1, 60, 70, 9999)] == [INT8[1], INT8[1], None, None]
    assert table.chosen("int8", 16, 32, 64, CUDA) == by_rows(16, INT8)
    assert table.chosen("int8", 16, 64, 32, torch.device("cpu")) == by_rows(16, INT8)
    by = "Triton kernels (or torch's, where gpu-nvidia-some-card.json has them faster)"
    assert report_of("linear_int8", "cuda") == f"integer matmul, {by}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '{"version": 2, "rows": []}',
        '{"version": 1, "rows": [{"kind": "int8", "t": 1, "n": 1, "k": 1, "tile": [3, 3, 3, 3, 3]}]}',
    ],
)
def test_files_that_are_no_tables(text, tmp_path):
    path = tmp_path / "gpu-x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"gpu-x.json: it must be a table of version 1, got another file. Remove it"):
        table.load(path)


def test_a_table_may_say_that_torch_is_faster(machine, monkeypatch):
    machine(TRITON_INTERPRET="1")
    monkeypatch.setattr(gpu, "chosen", lambda *shape: None)
    x, arguments = seeded(3, 24), layer(7, 24)
    assert gpu.linear_int8(x, *arguments, None, "none", 0) is None
    assert torch.equal(linear.linear_int8_on_cuda(x, *arguments), linear_int8_reference(x, *arguments))
    assert gpu.linear_decoded(x.bfloat16(), None, *weight_only(7, 24, "int4")) is None
