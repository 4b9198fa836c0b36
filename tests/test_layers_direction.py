"""Who may import whom, read from the sources. docs/architecture.md, section 2, has the same table and the reasons.

Only what runs at import time counts: an import inside a function is a choice to be lazy and is looked at separately.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGINE, PIPELINES, METRICS = ROOT / "dqtk", ROOT / "pipelines", ROOT / "metrics"

# Top may import below; rooms of one row may not import each other.
ORDER = """
__main__
cli
arguments | wanted
jobs | bench
report | diffusers_backend | transformers_backend
streaming | allocate
quantize
checks
stages
solved
processes | shards | journal
installed | sources | prompt_sets
recipes
policy
correct | refine
methods
attention
calibrate
checkpoint
nn
kernels
explain
ops
gpu
native
costs
decide
fit
plan
calls
resolve
sites
numerics
spec
hosts
"""
ROWS = [[room.strip() for room in row.split("|")] for row in ORDER.strip().splitlines()]
HEIGHT = {room: -i for i, row in enumerate(ROWS) for room in row}


def modules(folder):
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def imports(path, name, lazy):
    """Absolute names that a module imports: at import time, or (lazy) inside its functions."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]

    def visit(node, inside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import) and inside == lazy:
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and inside == lazy:
                parents = package.split(".")
                base = ".".join(parents[: len(parents) - child.level + 1]) if child.level else ""
                source = ".".join(part for part in (base, child.module) if part)
                yield source
                yield from (f"{source}.{alias.name}" for alias in child.names)
            yield from visit(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False)


def name_of(path, folder, package):
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join((package, *(part for part in parts if part != "__init__")))


def engine_imports(path, lazy=False):
    """Rooms of the engine that a module of the engine imports."""
    for found in imports(path, name_of(path, ENGINE, "dqtk"), lazy):
        parts = found.split(".")
        if parts[0] == "dqtk" and len(parts) > 1:
            yield parts[1]


def room_of(path):
    return path.relative_to(ENGINE).with_suffix("").parts[0]


def test_every_room_stands_somewhere():
    rooms = {room_of(path) for path in modules(ENGINE)} - {"__init__"}
    assert rooms - set(HEIGHT) == set()


@pytest.mark.parametrize("path", modules(ENGINE), ids=lambda path: str(path.relative_to(ENGINE)))
def test_imports_point_downwards(path):
    here = room_of(path)
    if here == "__init__":
        return  # the front door
    for there in engine_imports(path):
        if there in HEIGHT and there != here:
            assert HEIGHT[there] < HEIGHT[here], f"{here} imports {there}"


def test_lazy_imports_upwards_are_these():
    """A lazy import that points up is a cycle in disguise; each is here because a user-facing method asks for it."""
    upwards = {
        (room_of(path), there)
        for path in modules(ENGINE)
        for there in engine_imports(path, lazy=True)
        if there in HEIGHT and room_of(path) in HEIGHT and HEIGHT[there] >= HEIGHT[room_of(path)] and there != room_of(path)
    }
    assert upwards == {("plan", "explain")}  # Plan.explain()


def test_engine_finds_families_and_metrics_lazily():
    for path in modules(ENGINE):
        for found in imports(path, name_of(path, ENGINE, "dqtk"), lazy=False):
            assert not found.startswith(("dqtk.pipelines", "dqtk.metrics")), f"{path} imports {found}"
        lazily = [f for f in imports(path, name_of(path, ENGINE, "dqtk"), lazy=True) if f.startswith("dqtk.")]
        if [f for f in lazily if f.startswith(("dqtk.pipelines", "dqtk.metrics"))]:
            assert path.name in ("resolve.py", "scores.py"), f"{path} imports {lazily}"


def test_host_libraries_are_imported_by_their_backends_only():
    """At import time. Elsewhere they come through ``importlib`` when a verb needs them."""
    for path in modules(ENGINE):
        found = {name.split(".")[0] for name in imports(path, name_of(path, ENGINE, "dqtk"), lazy=False)}
        allowed = {"diffusers_backend.py": {"diffusers"}, "transformers_backend.py": {"transformers"}}.get(path.name, set())
        allowed = {"triton"} if path.parent.name == "gpu" else allowed  # which nobody imports at import time: tests/test_imports.py
        assert found & {"diffusers", "transformers", "triton", "peft", "open_clip"} <= allowed, path


def test_metrics_do_not_know_the_engine():
    for path in modules(METRICS):
        for lazy in (False, True):
            for found in imports(path, name_of(path, METRICS, "dqtk.metrics"), lazy):
                assert not found.startswith("dqtk") or found.startswith("dqtk.metrics"), f"{path} imports {found}"


def test_metrics_import_each_other_relatively():
    """So that the folder works by whatever name it is installed."""
    for path in modules(METRICS):
        absolute = [n.module for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and not n.level]
        assert not any((module or "").startswith("dqtk") for module in absolute), f"{path} imports {absolute}"


def test_families_know_only_the_words():
    for path in modules(PIPELINES):
        if path.parent != PIPELINES:
            continue
        for found in imports(path, name_of(path, PIPELINES, "dqtk.pipelines"), lazy=False):
            if found.startswith("dqtk."):
                assert found.split(".")[1] in ("sites", "plan", "spec", "pipelines"), f"{path} imports {found}"
            else:
                assert found.split(".")[0] in sys.stdlib_module_names, f"{path} imports {found}"


def test_the_table_is_that_of_the_docs():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert f"```{ORDER}```" in text


def test_the_reader_reads(tmp_path):
    """The tests above are only as good as ``imports``."""
    file = tmp_path / "x.py"
    file.write_text(
        "import a.b\nfrom . import c\nfrom ..d import e\nfrom f import g\n"
        "if TYPE_CHECKING:\n    import hidden\nclass C:\n    import h\n"
        "try:\n    import i\nexcept ImportError:\n    pass\ndef f():\n    import late\n    class D:\n        from . import later\n"
    )
    now = {"a.b", "dqtk.p", "dqtk.p.c", "dqtk.d", "dqtk.d.e", "f", "f.g", "h", "i"}
    assert set(imports(file, "dqtk.p.x", lazy=False)) == now
    assert set(imports(file, "dqtk.p.x", lazy=True)) == {"late", "dqtk.p", "dqtk.p.later"}
