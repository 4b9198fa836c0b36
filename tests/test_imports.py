"""What ``import dqtk`` costs and does: no host library, no compiler, no GPU; and a registration that waits for its library."""

import importlib
import subprocess
import sys

import dqtk.hosts as hosts

LEAN = """
import sys
import dqtk
heavy = sorted({"diffusers", "transformers", "triton", "peft", "torchmetrics", "open_clip", "PIL", "dqtk.pipelines", "dqtk.metrics"}
               & set(sys.modules))
import torch
print(heavy, torch.cuda.is_initialized(), [type(f).__name__ for f in sys.meta_path].count("_AfterImport"))
dqtk.plan(torch.nn.Sequential(torch.nn.Linear(64, 64)), "w8a8")
print(sorted({"diffusers", "transformers", "triton"} & set(sys.modules)))
"""


def test_import_is_lean():
    """In a new process: nothing heavy, not even after planning a bare module, and exactly one waiting hook."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", LEAN], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines() == ["[] False 1", "[]"]


def test_hook_registers_once_and_leaves(monkeypatch, tmp_path):
    """A library that is imported after dqtk: its registry runs first, then the backend, and the hook is gone."""
    (tmp_path / "somelib_registry.py").write_text("entries = {}\n")
    (tmp_path / "somelib_backend.py").write_text("import somelib_registry\nsomelib_registry.entries['dqtk'] = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(hosts, "REGISTRIES", {"somelib_registry": "somelib_backend"})
    before = len(sys.meta_path)
    hosts.register_with_hosts()
    assert len(sys.meta_path) == before + 1
    registry = importlib.import_module("somelib_registry")
    assert registry.entries == {"dqtk": 1}
    assert len(sys.meta_path) == before
    assert "somelib_backend" in sys.modules


def test_backend_imported_before_its_library(monkeypatch, tmp_path):
    """The backend itself imports the registry, whose hook imports the backend: it must not be used half-made."""
    (tmp_path / "otherlib_registry.py").write_text("entries = {}\n")
    (tmp_path / "otherlib_backend.py").write_text(
        "import otherlib_registry\ndef register():\n    otherlib_registry.entries['dqtk'] = 1\nregister()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(hosts, "REGISTRIES", {"otherlib_registry": "otherlib_backend"})
    hosts.register_with_hosts()
    importlib.import_module("otherlib_backend")
    assert sys.modules["otherlib_registry"].entries == {"dqtk": 1}


def test_real_registries_know_dqtk():
    from diffusers.quantizers import auto
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    from dqtk import diffusers_backend, transformers_backend

    assert auto.AUTO_QUANTIZER_MAPPING["dqtk"] is diffusers_backend.DqtkQuantizer
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["dqtk"] is diffusers_backend.DqtkConfig
    assert AUTO_QUANTIZER_MAPPING["dqtk"] is transformers_backend.DqtkTextQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["dqtk"] is transformers_backend.DqtkTextConfig
    diffusers_backend.register()  # again: no complaint
    transformers_backend.register()
