"""What is installed: from the tree as it is worked on, and from a wheel built of it."""

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import prelora

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"prelora": "prelora", "kernels": "prelora/kernels"}
"""Where the package's sources stand in the tree, and where in a wheel."""


def run(command, cwd, **environment):
    """What ``command`` prints, which must succeed."""
    result = subprocess.run(
        [*map(str, command)], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def pip(*arguments, cwd, **environment):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, "--no-deps", "--no-index"]
    run(command, cwd, **environment)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a copy of the tree, so that nothing of the build lands in it."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("the files of the tree are taken from git, which is not here")
    copy, built = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], ROOT).split("\0"):
        if name and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    pip("wheel", "--no-build-isolation", "-w", built, ".", cwd=copy, PRELORA_CUDA="0")  # nvcc would take a minute
    (path,) = built.iterdir()
    return path


@pytest.fixture(scope="module")
def members(wheel):
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(archive.read(name))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the wheel in it and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--target", target, wheel, cwd=target)
    return target


def modules_on_disk():
    """``prelora/x.py`` and ``kernels/y.py`` as they are named in a wheel."""
    return {
        f"{inside}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }


# The tree as it is worked on.


def test_prelora_kernels_is_the_folder_kernels_of_the_tree(tmp_path):
    where = run([sys.executable, "-c", "import prelora.kernels as k; print(k.__file__)"], tmp_path)

    assert Path(where.strip()) == ROOT / "kernels" / "__init__.py"


# The wheel.


def test_the_wheel_holds_every_module_of_every_subpackage(members):
    on_disk = modules_on_disk()

    assert {"prelora/__init__.py", "prelora/train/loop.py", "prelora/kernels/__init__.py"} <= on_disk
    assert on_disk - members == set()


def test_the_wheel_holds_nothing_else_but_its_marker_and_metadata(members):
    others = {name for name in members - modules_on_disk() if not re.search(r"\.(so|pyd)$", name)}

    assert {name for name in others if ".dist-info/" not in name} == {"prelora/py.typed"}
    assert {name.split("/")[0] for name in members} == {"prelora", f"prelora-{prelora.__version__}.dist-info"}


def test_the_wheel_holds_the_extension_for_any_python(wheel, members):
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ to build it")

    assert {name for name in members if name.endswith(".so")} == {"prelora/_C.abi3.so"}
    assert "-cp310-abi3-" in wheel.name


def test_the_wheel_carries_the_licence(wheel, members):
    (name,) = [name for name in members if name.endswith("/LICENSE")]

    assert zipfile.ZipFile(wheel).read(name) == (ROOT / "LICENSE").read_bytes()


def test_the_metadata_agree_with_the_package(metadata):
    assert metadata["Version"] == prelora.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    extras = {"train", "dali-cu12", "dali-cu13", "peft", "transformers", "lightning", "dev"}
    assert set(metadata.get_all("Provides-Extra")) == extras


def test_what_the_core_needs_is_torch_numpy_and_safetensors(metadata):
    core = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]

    assert {re.match(r"[\w-]+", line)[0] for line in core} == {"torch", "numpy", "safetensors"}
    assert "torch>=2.8" in core


# The wheel, installed.


def test_every_subpackage_imports_from_the_installed_wheel(installed, tmp_path):
    packages = sorted({name.rpartition("/")[0].replace("/", ".") for name in modules_on_disk()})
    code = f"import importlib; print(*[importlib.import_module(name).__file__ for name in {packages}], sep='\\n')"

    found = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(installed)).splitlines()

    assert found == [str(installed / name.replace(".", "/") / "__init__.py") for name in packages]


def test_the_installed_extension_loads(installed, tmp_path):
    code = "from prelora import _ext; print(_ext.reason(), _ext.__file__)"

    shown = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(installed)).split()

    assert shown == ["None", str(installed / "prelora" / "_ext.py")]


def test_the_installed_command_runs(installed, tmp_path):
    shown = run([installed / "bin" / "prelora", "--help"], tmp_path, PYTHONPATH=str(installed))
    version = run([installed / "bin" / "prelora", "--version"], tmp_path, PYTHONPATH=str(installed))

    assert [command for command in ("train", "export", "report") if command not in shown] == []
    assert version == f"prelora {prelora.__version__}\n"


@pytest.mark.parametrize(("command", "extra"), [("train", "tyro"), ("export x", "yaml")])
def test_a_command_without_its_extra_says_what_to_install(command, extra, tmp_path):
    code = f"import sys; sys.modules[{extra!r}] = None; from prelora.cli import main; sys.exit(main({command.split()}))"

    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert result.returncode == 2
    assert result.stderr.startswith("prelora: error: ")
    assert extra in result.stderr
    assert "pip install 'prelora[train" in result.stderr


def test_an_installed_wheel_trains(installed, tmp_path):
    options = "--epochs 1 --optim.warmup-epochs 0 --model.depth 1 --model.image-size 8 --data.batch-size 700"

    shown = run(
        [installed / "bin" / "prelora", "train", *options.split(), "--output", "run"],
        tmp_path,
        PYTHONPATH=str(installed),
        OMP_NUM_THREADS="1",
    )

    assert "\nepoch   1/1 full" in shown
    assert (tmp_path / "run" / "metrics.jsonl").is_file()
