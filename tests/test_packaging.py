"""What is installed is the whole library, with ``kernels/`` as ``prelora.kernels``."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("prelora", "kernels", "pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, source]
    subprocess.run(build, check=True, capture_output=True)
    return next(out.glob("prelora-*.whl"))


def test_wheel_holds_every_module_of_the_tree(wheel):
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "prelora").rglob("*.py")}
    kernels = {f"prelora/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}

    files = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}

    assert files == modules | kernels


def test_wheel_holds_licence_and_type_marker(wheel):
    names = zipfile.ZipFile(wheel).namelist()

    assert "prelora/py.typed" in names
    assert any(name.endswith("LICENSE") for name in names)


def test_unpacked_wheel_imports_away_from_the_tree(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import prelora, prelora.kernels; print(prelora.__file__, prelora.kernels.__file__)"

    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd="/", env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip

    assert done.stdout.split() == [str(tmp_path / "prelora/__init__.py"), str(tmp_path / "prelora/kernels/__init__.py")]


def test_editable_install_takes_kernels_from_the_tree():
    import prelora.kernels

    assert Path(prelora.kernels.__file__).parent == ROOT / "kernels"
