"""Building and loading the native kernels: once, whole or not at all, and never silent about it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dqtk.kernels import linear_int8, linear_int8_reference, report_of
from dqtk.native import library

ROOT = Path(__file__).parents[2]
NO_COMPILER = "no C++ compiler found (looked for c++, g++, clang++; CXX names another)"


def layer():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 24, generator=generator)
    qweight = torch.randint(-127, 128, (7, 24), generator=generator, dtype=torch.int8)
    return x, qweight, torch.full((7, 1), 0.01), None, None, None, None, 8


def runs_right():
    return torch.equal(linear_int8(*layer()), linear_int8_reference(*layer()))


def kept(tmp_path):
    folder = tmp_path / "cache"
    return sorted(path.name for path in folder.rglob("*")) if folder.exists() else []


def test_importing_compiles_nothing(tmp_path):
    code = "import dqtk, dqtk.kernels; print(dqtk.kernels.report_of('linear_int8', 'cpu'))"
    call = [sys.executable, "-c", code]
    environment = {"PATH": "/usr/bin:/bin", "DQTK_CACHE_DIR": str(tmp_path / "cache"), "DQTK_NATIVE": "generic"}
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120, check=True)
    assert done.stdout.strip() in (
        "integer matmul, native (generic), compiled at first use",
        f"integer matmul through torch._int_mm (native kernels: {NO_COMPILER})",
    )
    assert kept(tmp_path) == []


def test_a_library_is_built_once(tmp_path, environment, compiler, built, capfd):
    environment(CXX=compiler(f"cp {built} $out"))
    assert report_of("linear_int8", "cpu").endswith("compiled at first use")
    assert runs_right()
    assert "compiled at first use" not in report_of("linear_int8", "cpu")
    assert capfd.readouterr().err == f"dqtk: compiling native kernels into {tmp_path}/cache (once, a minute or two)\n"
    library.forget()
    assert runs_right()
    assert capfd.readouterr().err == ""
    files = sum(name.endswith(".cpp") for name in library.SOURCES)
    assert (tmp_path / "calls").read_text() == "call\n" * (files + 1)  # one by one, then all together
    assert len(kept(tmp_path)) == 1


def test_other_flags_and_compilers_are_other_libraries(environment, compiler, built, tmp_path):
    for given in (compiler(f"cp {built} $out"), compiler(f"cp {built} $out") + " -DOTHER"):
        environment(CXX=given)
        assert runs_right()
    assert len(kept(tmp_path)) == 2


def test_without_a_compiler_torch_serves(environment, monkeypatch, capfd):
    environment(PATH="/nowhere")
    assert report_of("linear_int8", "cpu") == f"integer matmul through torch._int_mm (native kernels: {NO_COMPILER})"
    assert runs_right()
    assert runs_right()
    assert report_of("weight_only", "cpu").endswith(f"torch's own matmul (native kernels: {NO_COMPILER})")
    assert capfd.readouterr().err == f"dqtk: no native kernels, torch's own are used: {NO_COMPILER}\n"  # said once


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo half > $out; echo oh no >&2; exit 3", "failed with status 3 and said: oh no"),
        ("echo half > $out; kill -9 $$", "failed with status -9 and said: nothing"),
        ("echo nothing is made", "failed with status 0 and said: nothing"),
        ("echo no library > $out", "was compiled but does not load"),
    ],
)
def test_a_failed_build_is_reported(environment, compiler, tmp_path, body, reason):
    environment(CXX=compiler(body))
    assert runs_right()
    calls = (tmp_path / "calls").read_text()
    assert runs_right()
    assert reason in report_of("linear_int8", "cpu")
    assert (tmp_path / "calls").read_text() == calls  # not tried again at every call


def test_an_interrupted_build_leaves_nothing(environment, compiler, tmp_path):
    environment(CXX=compiler("echo half > $out; kill -9 $$"))
    assert runs_right()
    assert kept(tmp_path) == []


def test_a_broken_file_is_built_again(environment, compiler, tmp_path, built):
    environment(CXX=compiler(f"cp {built} $out"))
    path = library._wanted()[1]
    path.parent.mkdir()
    path.write_bytes(b"\x7fELF half a file")
    assert runs_right()
    assert "native (" in report_of("linear_int8", "cpu")
    assert path.read_bytes() == Path(built).read_bytes()


def test_two_processes_build_at_once(environment, compiler, tmp_path, built):
    code = "from dqtk.native import library; assert library.load() is not None, library.describe(); print('yes')"
    environment(CXX=compiler(f"head -c 1000 {built} > $out; sleep 1; cp {built} $out"))
    call = [sys.executable, "-c", code]
    both = [subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert out == "yes\n", err
    assert len(kept(tmp_path)) == 1


def test_a_folder_that_cannot_be_written(environment, compiler, tmp_path, built):
    (tmp_path / "file").write_text("")
    environment(CXX=compiler(f"cp {built} $out"), DQTK_CACHE_DIR=str(tmp_path / "file" / "cache"))
    assert runs_right()
    assert "cannot build in" in report_of("linear_int8", "cpu")
    assert "Set DQTK_CACHE_DIR to a folder that can be written" in report_of("linear_int8", "cpu")


def test_cache_folders(environment, tmp_path, monkeypatch):
    environment()
    assert library.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("DQTK_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/where")
    assert library.cache_folder() == Path("/some/where/dqtk")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert library.cache_folder() == Path("~/.cache/dqtk").expanduser()


def test_switched_off(environment, capfd):
    environment(DQTK_NATIVE="off")
    assert runs_right()
    assert report_of("conv_int8", "cpu") == "integer matmul through torch._int_mm (native kernels: switched off by DQTK_NATIVE)"
    assert capfd.readouterr().err == ""


def test_unknown_levels_are_errors(environment):
    environment(DQTK_NATIVE="sse9")
    with pytest.raises(
        ValueError,
        match=r"DQTK_NATIVE must be off, amx, avx512-bf16, avx512-vnni, avx2, generic or unset, got 'sse9'\. Unset it",
    ):
        linear_int8(*layer())


def test_levels_that_the_cpu_lacks(environment, monkeypatch):
    monkeypatch.setattr(library, "cpu_flags", lambda: frozenset({"avx2", "fma"}))
    environment(DQTK_NATIVE="avx2")
    assert library.describe() == (False, "native kernels: this CPU has no f16c, which DQTK_NATIVE=avx2 needs")
    environment()
    assert not library.describe()[0]
    assert "this CPU has neither AVX2 nor AVX512-VNNI" in report_of("linear_int8", "cpu")
    assert runs_right()


@pytest.mark.parametrize(("granted", "level"), [(True, "amx"), (False, "avx512-bf16")])
def test_tiles_are_used_where_the_system_grants_them(environment, monkeypatch, granted, level):
    monkeypatch.setattr(library, "cpu_flags", lambda: library.LEVELS[0].needs)
    monkeypatch.setattr(library, "_may_use_tiles", lambda: granted)
    environment()
    assert report_of("linear_int8", "cpu") == f"integer matmul, native ({level}), compiled at first use"


def test_a_compiler_that_is_not_there(environment):
    environment(CXX="/no/such/compiler -O1")
    assert library.describe() == (False, "native kernels: the C++ compiler that CXX names was not found: /no/such/compiler")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
def test_there_is_one_pool_of_threads(native_level):
    """Native kernels run in the threads that torch's operators have started, and bring no OpenMP runtime of their own."""
    native_level("generic")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        a = torch.ones(512, 512)
        torch.mm(a, a).exp_()
        started = len(list(Path("/proc/self/task").iterdir()))
        for _ in range(3):
            linear_int8(torch.ones(300, 64), torch.ones(300, 64, dtype=torch.int8), torch.ones(1, 1), None, None, None, None, 8)
            torch.mm(a, a).exp_()
        assert len(list(Path("/proc/self/task").iterdir())) == started
    finally:
        torch.set_num_threads(before)


def test_wheels_hold_the_sources():
    """pyproject's package data names every file that is compiled."""
    import tomllib

    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "dqtk.native" in data["packages"]
    folder = ROOT / "dqtk" / "native"
    listed = {path.name for pattern in data["package-data"]["dqtk.native"] for path in folder.glob(pattern)}
    assert listed == set(library.SOURCES)
