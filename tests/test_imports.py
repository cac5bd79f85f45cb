"""Packages import only packages above them, and importing r2ncli is quick."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import r2ncli

PACKAGE = Path(r2ncli.__file__).parent

# Each package or flat file may import any above it, none below.
ORDER = [
    *("errors", "architectures", "model", "files", "web", "openvino_import"),
    *("images", "sources", "weights", "hubconf", "torchvision_models", "engine", "options"),
    *("outputs", "predictor", "pipeline", "runs", "api"),
    *("bench", "cli", "__main__"),
]
WITH_TORCH = {
    *("model", "torchvision_models"),
    *("weights/structure", "weights/loading", "weights/verify"),
    *("weights/compare", "weights/convert"),
    *("engine/devices", "engine/folding", "engine/pytorch", "engine/cuda", "engine/graph"),
}
WITH_TORCHVISION = {"torchvision_models"}  # the one file that is for its users
WITH_TERMINAL = {"cli"}

FILES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix(): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def package(file: str) -> str:
    return file.partition("/")[0]


def imports(file: str, *, at_import_only: bool = False) -> Iterator[str]:
    """Every module that a file imports by its full name, in functions too unless told."""
    pending: list[ast.AST] = [ast.parse(FILES[file].read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively: say the whole name"
            assert node.module is not None
            yield node.module
            # `from r2ncli import weights` names a package where `import __version__` does not
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif at_import_only and (is_function(node) or is_for_type_checkers(node)):
            continue
        pending.extend(ast.iter_child_nodes(node))


def modules_of(test: Path) -> Iterator[str]:
    """The modules that a file of the tests imports."""
    for node in ast.walk(ast.parse(test.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def packages_of(modules: Iterator[str]) -> set[str]:
    parts = [module.split(".") for module in modules]
    return {part[1] for part in parts if part[0] == "r2ncli" and len(part) > 1} & set(ORDER)


def test_every_file_has_a_package() -> None:
    assert {package(file) for file in FILES} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("file", [file for file in FILES if file != "__init__"])
def test_a_file_imports_only_from_packages_above_it(file: str) -> None:
    own = ORDER.index(package(file))
    below = {other for other in packages_of(imports(file)) if ORDER.index(other) > own}
    assert below == set()
    if "/" not in file:
        assert package(file) not in packages_of(imports(file))


def test_the_package_itself_imports_no_other() -> None:
    assert packages_of(imports("__init__", at_import_only=True)) == set()


@pytest.mark.parametrize("file", list(FILES))
def test_only_what_runs_networks_imports_torch_at_once(file: str) -> None:
    libraries = {module.split(".")[0] for module in imports(file, at_import_only=True)}
    if file in WITH_TORCH:
        assert "torch" in libraries
    else:
        assert not libraries & {"torch", "torchvision", "timm"}


@pytest.mark.parametrize("file", list(FILES))
def test_only_the_command_line_imports_the_terminals_libraries(file: str) -> None:
    libraries = {module.split(".")[0] for module in imports(file)}
    assert "click" not in libraries  # typer may bring its own
    if package(file) not in WITH_TERMINAL:
        assert not libraries & {"typer", "rich"}


@pytest.mark.parametrize("file", list(FILES))
def test_torchvision_and_timm_are_never_needed(file: str) -> None:
    libraries = {module.split(".")[0] for module in imports(file)}
    assert "timm" not in libraries
    assert ("torchvision" in libraries) == (file in WITH_TORCHVISION)


@pytest.mark.parametrize("file", list(FILES))
def test_what_is_for_another_librarys_users_is_imported_by_them_alone(file: str) -> None:
    assert not packages_of(imports(file)) & {"hubconf", "torchvision_models"}


@pytest.mark.parametrize("statement", ["import r2ncli", "import r2ncli.cli.app", "dir(r2ncli)"])
def test_importing_is_quick(statement: str) -> None:
    program = f"import sys, r2ncli; {statement}; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert "r2ncli" in loaded
    assert not loaded & {"torch", "torchvision", "PIL", "numpy", "h5py", "safetensors"}


def test_importing_the_library_imports_no_terminals_libraries() -> None:
    program = "import sys, r2ncli; r2ncli.classify; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "r2ncli.pipeline" in done.stdout.split()
    assert not set(done.stdout.split()) & {"typer", "rich"}


def test_no_test_module_imports_another_one() -> None:
    tests = Path(__file__).parent
    folders = {path.name for path in tests.iterdir() if path.is_dir()} - {"support"}
    found = {}
    for file in tests.rglob("*.py"):
        parts = {part for module in modules_of(file) for part in module.split(".")}
        tops = {module.split(".")[0] for module in modules_of(file)}
        names = {part for part in parts if part == "conftest" or part.startswith("test_")}
        if wrong := names | tops & folders:
            found[str(file.relative_to(tests))] = wrong
    assert found == {}, "move what two test modules share to tests/support"


def test_no_library_is_held_back_from_its_next_release() -> None:
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())[
        "project"
    ]
    for requirement in project["dependencies"]:
        assert not any(held in requirement.partition(";")[0] for held in ("<", "==", "~="))


# --- the reading itself -------------------------------------------------------------------


def test_imports_within_functions_are_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(
        "from typing import TYPE_CHECKING\n"
        "import torch.nn as nn\n"
        "if TYPE_CHECKING:\n"
        "    from r2ncli.cli.app import app\n"
        "def f():\n"
        "    from r2ncli import weights\n"
        "    import rich\n"
    )
    monkeypatch.setitem(FILES, "x", tmp_path / "x.py")
    assert packages_of(imports("x")) == {"cli", "weights"}
    assert {"torch.nn", "rich"} <= set(imports("x"))
    assert packages_of(imports("x", at_import_only=True)) == set()
    assert "rich" not in set(imports("x", at_import_only=True))


# --- the size of the package ----------------------------------------------------------------


def edges() -> set[tuple[str, str]]:
    """Which package or flat file imports from which other one."""
    found = {(package(file), other) for file in FILES for other in packages_of(imports(file))}
    return {(one, other) for one, other in found if one != other}


def test_packages_and_flat_files_stay_few_and_loosely_coupled() -> None:
    names = {package(file) for file in FILES}
    flat = [file for file in FILES if "/" not in file]
    assert len(flat) <= 16
    assert len(names) <= 22
    assert len(edges()) <= 100


def test_no_file_is_long_and_no_package_is_crowded() -> None:
    lengths = {file: len(path.read_text("utf-8").splitlines()) for file, path in FILES.items()}
    assert [file for file, length in lengths.items() if length > 450] == []
    for name in {package(file) for file in FILES if "/" in file}:
        assert sum(package(file) == name for file in FILES) <= 12
