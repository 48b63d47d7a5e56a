"""Imports run downward only, what is heavy loads late, and every public name is documented."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cuflash

ROOT = Path(cuflash.__file__).parent

# Each module imports only from layers before its own, or from its own package; "cuflash" is the top.
LAYERS = (
    ("errors", "emulator"),
    ("layout", "dlpack", "vjp"),
    ("masks", "plan.kernel"),
    ("plan.arch", "plan.config", "plan.params", "plan.gpus"),
    ("problem", "options"),
    ("plan",),
    ("check", "records", "jit", "cpu"),
    ("io_model", "device", "reference"),
    ("arrays", "tile_lists"),
    ("packing",),
    ("forward",),
    ("backward", "tokens", "hashing"),
    ("attention", "merge", "paged", "paging", "sparse"),
    ("",),  # cuflash itself
    ("cli",),
    ("__main__",),
)


def modules() -> dict[str, Path]:
    """Modules of the package by dotted name without "cuflash."."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> list[tuple[str, bool]]:
    """Every module named by an import, and whether only type checkers see it; `from a import b` counts as a.b."""
    found = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in for_types) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(f"{node.module}.{alias.name}", id(node) in for_types) for alias in node.names]
    return found


def layer_of(module: str) -> int:
    """The layer whose entry is the longest prefix of the module's name."""
    matching = [
        (len(entry), i)
        for i, layer in enumerate(LAYERS)
        for entry in layer
        if module == entry or (entry and module.startswith(entry + "."))
    ]
    assert matching, f"{module} has no layer"
    return max(matching)[1]


def own_imports(path: Path) -> set[str]:
    """Modules of cuflash that a file imports at run time."""
    known = modules()
    names = set()
    for name, for_types in imports(path):
        if for_types or not (name == "cuflash" or name.startswith("cuflash.")):
            continue
        parts = name.split(".")[1:]
        while ".".join(parts) not in known:
            parts.pop()
        names.add(".".join(parts))
    return names


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_run_downward(module: str) -> None:
    for imported in own_imports(modules()[module]):
        package = module.partition(".")[0]
        same_package = imported.partition(".")[0] == package and layer_of(imported) == layer_of(module)
        assert same_package or layer_of(imported) < layer_of(module), f"{module or 'cuflash'} imports {imported}"


def test_no_module_imports_itself_in_a_ring() -> None:
    """Within a layer too: the run-time imports form no cycle."""
    graph = {module: own_imports(path) - {module} for module, path in modules().items() if module}
    for imported in graph.values():
        imported.discard("")
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way, module))
        if module not in done:
            for following in graph.get(module, ()):
                visit(following, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_only_the_cuda_device_imports_cupy() -> None:
    users = {
        module
        for module, path in modules().items()
        for name, _ in imports(path)
        if name.partition(".")[0] in ("cupy", "cupyx")
    }
    assert users == {"device.cuda"}


def test_the_emulator_imports_nothing_else_of_cuflash() -> None:
    for module, path in modules().items():
        if module.partition(".")[0] == "emulator":
            assert all(name.partition(".")[0] == "emulator" for name in own_imports(path)), module
            outside = {name.partition(".")[0] for name, _ in imports(path)} - {"cuflash", *sys.stdlib_module_names}
            assert outside <= {"numpy", "ml_dtypes"}, module


def in_subprocess(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT.parent
    ).stdout.strip()


def test_import_is_light() -> None:
    """No CuPy, no CUDA bindings, no framework; the late modules stay out as well."""
    heavy = ("cupy", "cuda", "torch", "jax", "scipy", "filelock", "rich", "cuflash.emulator", "cuflash.reference")
    loaded = in_subprocess(f"import sys, cuflash; print([name for name in {heavy} if name in sys.modules])")
    assert loaded == "[]"


def test_a_call_on_the_cpu_imports_no_cupy() -> None:
    code = (
        "import sys, numpy as np, cuflash; x = np.ones((3, 8)); cuflash.attention(x, x, x); "
        "cuflash.merge_states([x], [x[:, 0]]); print('cupy' in sys.modules, 'cuda' in sys.modules)"
    )
    assert in_subprocess(code) == "False False"


def test_import_takes_little_time() -> None:
    """Under 0.3 s of the processor beyond NumPy; the best of three, since the machine may be busy."""
    code = "import numpy, ml_dtypes, time; t = time.process_time(); import cuflash; print(time.process_time() - t)"
    assert min(float(in_subprocess(code)) for _ in range(3)) < 0.3


def test_late_modules() -> None:
    names = in_subprocess("import cuflash; print(cuflash.reference.__name__, cuflash.io_model.__name__)")
    assert names == "cuflash.reference cuflash.io_model"
    with pytest.raises(AttributeError, match="module 'cuflash' has no attribute 'atention'"):
        cuflash.atention  # noqa: B018
    assert set(cuflash.__all__) <= set(dir(cuflash))


@pytest.mark.parametrize("name", cuflash.__all__)
def test_public_names_are_documented(name: str) -> None:
    value = getattr(cuflash, name)
    text = inspect.getdoc(value)
    assert text
    assert text[0].isupper() or text.startswith("cuflash")
    if inspect.isfunction(value):
        for parameter in inspect.signature(value).parameters:
            assert parameter in text, f"{name}: {parameter}"
        for section in ("Parameters", "Returns", "Raises"):
            assert section in text or (section == "Returns" and "Yields" in text), f"{name}: {section}"


def test_docstrings_of_cuflash_run() -> None:
    """The examples of the public docstrings, as they stand."""
    import doctest

    names = "attention", "attention_varlen", "paged_attention", "PagedKVCache", "BlockPool", "merge_states", "vjp"
    for name in names:
        function = getattr(cuflash, name)
        runner = doctest.DocTestRunner()
        for test in doctest.DocTestFinder().find(function, name, globs={"np": np, "cuflash": cuflash}):
            runner.run(test)
        assert runner.tries > 0
        assert runner.failures == 0
