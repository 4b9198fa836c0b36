"""Native kernels of a level that is asked for, and none at all."""

import os
import re
from pathlib import Path

import pytest

from dqtk.kernels import attention_check
from dqtk.native import library


@pytest.fixture
def native_level(monkeypatch):
    """Function (level) -> native kernels of that level from now on, or a skipped test where this machine has none; "off": none."""

    def use(level):
        monkeypatch.setenv("DQTK_NATIVE", level)
        library.forget()
        if library.load() is None and level != "off":
            pytest.skip(library.describe()[1])

    yield use
    monkeypatch.undo()
    library.forget()


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """Function (**variables) -> decide about native kernels again in that environment, with an empty cache folder."""

    def change(**variables):
        for name in ("DQTK_NATIVE", "CXX", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in ({"DQTK_CACHE_DIR": str(tmp_path / "cache")} | variables).items():
            monkeypatch.setenv(name, value)
        library.forget()
        library._version.cache_clear()

    yield change
    monkeypatch.undo()
    library.forget()


@pytest.fixture
def compiler(tmp_path):
    """Function (what it does) -> path of a stand-in for a compiler, whose ``$out`` is the file to make."""

    def make(body):
        path = tmp_path / "compiler"
        path.write_text(
            '#!/bin/sh\ncase "$*" in *--version) echo stand-in 1.0; exit 0;; esac\n'
            f'echo call >> {tmp_path}/calls\nwhile [ "$1" != -o ]; do shift; done\nout=$2\n{body}\n'
        )
        path.chmod(0o755)
        return str(path)

    return make


@pytest.fixture
def built():
    """Path of a library that works here; skips where none can be made."""
    library.forget()
    if library.load() is None:
        pytest.skip(library.describe()[1])
    return os.fspath(library.load()._name)


@pytest.fixture
def peak_memory():
    """Function (call) -> bytes by which the largest memory of the process grew meanwhile; skips where Linux does not say it."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def read(name):
        return int(re.search(rf"^{name}:\s*(\d+) kB", status.read_text(), re.MULTILINE)[1]) << 10

    def measure(call):
        call()
        try:
            reset.write_text("5")
        except OSError as error:
            pytest.skip(f"the largest memory of this process cannot be reset: {error}")
        before = read("VmRSS")
        call()
        return read("VmHWM") - before

    return measure


@pytest.fixture
def look_again():
    """Kernels of attention are looked at anew at their first calls of this test, and after it."""
    attention_check.forget()
    yield
    attention_check.forget()
