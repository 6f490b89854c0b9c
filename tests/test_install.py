"""What people install: the wheel and the sdist, built from a clone with links and from one without.

On systems without symbolic links git writes ``passes`` and ``patterns`` as text files; the package
must build the same there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PROBE = """
import importlib, pathlib, pkgutil, sys
import fxquant
folder = pathlib.Path(fxquant.__file__).parent
assert folder.parent == pathlib.Path(sys.argv[1]), folder
assert (folder / "py.typed").is_file()
for module in pkgutil.walk_packages(fxquant.__path__, "fxquant."):
    importlib.import_module(module.name)
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command, give what it printed, and fail with all it said."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module", params=["true", "false"], ids=["links", "no-links"])
def clone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh clone of the last commit, with and without symbolic links."""
    folder = tmp_path_factory.mktemp("clone")
    settings = folder / "gitconfig"
    # A checkout owned by another user is cloned all the same, and no user's setting leaks in.
    settings.write_text("[safe]\n\tdirectory = *\n")
    command = ("git", "clone", "-q", "-c", f"core.symlinks={request.param}", ROOT, "checkout")
    run(*command, cwd=folder, GIT_CONFIG_GLOBAL=str(settings))
    return folder / "checkout"


@pytest.fixture(scope="module")
def built(clone: Path) -> Path:
    """The folder with the sdist, and the wheel that was built from that sdist."""
    out = clone.parent / "dist"
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=clone)
    return out


def test_the_clone_has_the_kind_of_links_it_should_have(
    clone: Path, request: pytest.FixtureRequest
) -> None:
    linked = "no-links" not in request.node.name
    assert (clone / "passes").is_symlink() is linked
    assert linked or (clone / "passes").read_text() == "fxquant/passes"


def test_wheel_holds_the_package_and_nothing_else(clone: Path, built: Path) -> None:
    (wheel,) = built.glob("fxquant-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        entry_points = archive.read("fxquant-0.1.0.dist-info/entry_points.txt").decode()
        licenses = [name for name in archive.namelist() if name.endswith("LICENSE")]
    tracked = run("git", "-c", "safe.directory=*", "ls-files", "fxquant", cwd=clone).split()
    assert names == set(tracked)
    assert "fxquant = fxquant.cli:main" in entry_points
    assert len(licenses) == 1


def test_sdist_holds_the_sources_and_no_links(built: Path) -> None:
    (sdist,) = built.glob("fxquant-*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    names = {member.name.partition("/")[2] for member in members}
    assert {"pyproject.toml", "README.md", "LICENSE", "fxquant/py.typed"} <= names
    assert [member.name for member in members if not (member.isfile() or member.isdir())] == []
    folders = {name.split("/")[0] for name in names if "/" in name}
    assert folders == {"fxquant", "fxquant.egg-info"}


def test_installed_wheel_imports_outside_the_checkout(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("fxquant-*.whl")
    target = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps")
    run(*pip, "--target", target, wheel, cwd=tmp_path)
    run(sys.executable, "-c", PROBE, target, cwd=tmp_path, PYTHONPATH=str(target))
