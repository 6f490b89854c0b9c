"""The shape of the tree: what lies where, how large it is, and what the front door offers."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import fxquant

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fxquant"
LINKS = ("passes", "patterns")
REQUIRED = {
    ".ci", ".gitignore", "CHANGELOG.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md",
    "benchmarks", "fxquant", "passes", "patterns", "pyproject.toml", "tests",
}  # fmt: skip
ALLOWED = REQUIRED | {"docs", "examples"}
MAX_LINES = 400
MAX_PUBLIC_NAMES = 20
# What changes a torch.fx graph; only the one writer may call these.
GRAPH_WRITERS = {
    "erase_node", "eliminate_dead_code", "graph_copy", "inserting_after", "inserting_before",
    "insert_arg", "node_copy", "replace_all_uses_with", "replace_input_with", "update_arg",
    "update_kwarg",
}  # fmt: skip
FX_CODE = {"graph/edit.py", "graph/answers.py", "graph/tracer.py"}


def git(*arguments: str) -> list[str]:
    """The lines that git prints; a checkout owned by another user is read all the same."""
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def sources() -> Iterator[Path]:
    """Every source file of the package."""
    return (path for path in sorted(PACKAGE.rglob("*.py")) if "__pycache__" not in path.parts)


def test_top_level_holds_the_agreed_entries_only() -> None:
    tracked = {line.split("/", 1)[0] for line in git("ls-files")}
    assert tracked - ALLOWED == set()
    assert REQUIRED - tracked == set()


@pytest.mark.parametrize("name", LINKS)
def test_link_is_tracked_as_a_relative_symlink(name: str) -> None:
    (entry,) = git("ls-files", "-s", "--", name)
    mode, blob = entry.split()[:2]
    assert mode == "120000"
    assert git("cat-file", "blob", blob) == [f"fxquant/{name}"]


@pytest.mark.parametrize("statement", ["import passes", "import patterns", "import patterns.rule"])
def test_importing_through_a_link_says_what_to_import(statement: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", statement], cwd=ROOT, capture_output=True, text=True, check=False
    )
    name = statement.split()[1].split(".")[0]
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert f"import 'fxquant.{name}' instead" in last


def test_every_folder_with_sources_is_a_package() -> None:
    folders = {path.parent for path in sources()}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_files_stay_short() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources()
    }
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


def test_one_pass_per_file() -> None:
    passes = {
        path.name: [
            node.name
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.ClassDef)
            and any(isinstance(base, ast.Name) and base.id == "Pass" for base in node.bases)
        ]
        for path in (PACKAGE / "passes").glob("*.py")
        if path.name not in ("__init__.py", "base.py")
    }
    assert passes
    assert {name: found for name, found in passes.items() if len(found) != 1} == {}


def test_only_the_writer_changes_a_graph() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.func.attr}"
        for path in sources()
        if path.relative_to(PACKAGE).as_posix() not in FX_CODE
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in GRAPH_WRITERS
    ]
    assert found == []


def test_the_version_is_told_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert fxquant.__version__ == project["version"]


def test_public_names_are_few_and_exist() -> None:
    assert 1 <= len(fxquant.__all__) <= MAX_PUBLIC_NAMES
    assert len(set(fxquant.__all__)) == len(fxquant.__all__)
    assert [name for name in fxquant.__all__ if not hasattr(fxquant, name)] == []


@pytest.mark.parametrize("name", sorted(fxquant.__all__))
def test_public_name_is_documented_and_typed(name: str) -> None:
    thing = getattr(fxquant, name)
    assert inspect.getdoc(thing)
    assert thing.__module__.startswith("fxquant.")
    signature = inspect.signature(thing)
    untyped = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.annotation is inspect.Parameter.empty
    ]
    assert untyped == []
    if inspect.isfunction(thing):
        assert signature.return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize("switch", ["enable", "disable"])
def test_import_leaves_the_collector_as_it_was(switch: str) -> None:
    code = f"import gc, torch; gc.{switch}(); import fxquant; print(gc.isenabled())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(switch == "enable")


_WAITS = (
    "networkx.classes",
    "jinja2.environment",
    "torch._dynamo",
    "torch._inductor",
    "torch.onnx",
)
"""What takes a tenth of a second or more, and nobody needs who only imports the package."""


def test_importing_the_package_loads_nothing_that_can_wait() -> None:
    ask = (
        "import sys, torch; old = set(sys.modules); import fxquant; print(*set(sys.modules) - old)"
    )
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    new = done.stdout.split()
    assert "fxquant.api" in new
    assert [name for name in _WAITS if name in new] == []
    # Whatever else comes along is the package's own, or stands among its dependencies.
    others = {name.split(".")[0] for name in new if not name.startswith("torch.")}
    known = {"fxquant", "networkx", "jinja2", "markupsafe", "tabulate"}
    assert others - known <= set(sys.stdlib_module_names)
