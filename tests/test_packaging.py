"""What is installed: from the tree as it is worked on, and from a wheel built of the sdist that is built of it."""

import email
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import prelora
from prelora.cli import main

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


def pip(*arguments, cwd, python=sys.executable, **environment):
    command = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", *arguments]
    run([*command, "--no-deps", "--no-index"], cwd, **environment)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Built from a copy of the tree, so that nothing of the build lands in it."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("the files of the tree are taken from git, which is not here")
    copy, built = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("sdist")
    for name in run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], ROOT).split("\0"):
        if name and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    run([sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", built], copy)
    (path,) = built.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the sdist, as pip does for whoever installs from that."""
    built = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "-w", built, sdist, cwd=built, PRELORA_CUDA="0")  # nvcc would take a minute
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


def distributions(names, left_out):
    """What is installed here of ``names``, and of whatever those require on this machine."""
    found = {}
    while names:
        name = re.sub(r"[-_.]+", "-", names.pop()).lower()
        if name in found or name in left_out:
            continue
        found[name] = importlib.metadata.distribution(name)
        required = map(Requirement, found[name].requires or [])
        names += [each.name for each in required if each.marker is None or each.marker.evaluate({"extra": ""})]
    return found.values()


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    """The interpreter of a venv with torch, numpy, safetensors, what these require but triton, and the wheel."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip())
    for distribution in distributions(["torch", "numpy", "safetensors"], {"triton"}):
        for file in distribution.files:
            depth = 2 if file.parts[0] == "nvidia" else 1  # DALI is in there, too
            link = site.joinpath(*file.parts[:depth])
            if ".." not in file.parts and not link.exists():
                link.parent.mkdir(exist_ok=True)
                link.symlink_to(Path(distribution.locate_file("")).joinpath(*file.parts[:depth]))
    pip("install", wheel, cwd=folder, python=python)
    return python


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
    extras = {"train", "dali-cu12", "dali-cu13", "peft", "transformers", "accelerate", "lightning", "wandb", "mlflow"}
    assert set(metadata.get_all("Provides-Extra")) == extras | {"docs", "dev"}


def test_what_the_core_needs_is_torch_numpy_and_safetensors(metadata):
    core = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]

    assert {re.match(r"[\w-]+", line)[0] for line in core} == {"torch", "numpy", "safetensors"}
    assert "torch>=2.8" in core


def test_the_sdist_holds_sources_types_and_licence(sdist):
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}

    assert {"prelora/py.typed", "kernels/__init__.py", "csrc/bindings.cpp", "setup.py", "LICENSE", "README.md"} <= held
    assert [name for name in held if name.endswith((".so", ".pyc"))] == []


# The wheel, in a venv with the core's requirements alone.

OPTIONAL = (
    "timm", "peft", "transformers", "lightning", "accelerate", "triton", "nvidia.dali", "matplotlib", "sklearn", "yaml",
    "tyro", "tensorboard", "wandb", "mlflow",
)  # fmt: skip
USE = f"""
import contextlib, importlib.util, io, json
from pathlib import Path
assert [name for name in {OPTIONAL} if importlib.util.find_spec(name)] == []
import torch, prelora, prelora.nn
from prelora import _ext, cli
from prelora.checkpoint import load_checkpoint, save_checkpoint

def start():
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 16))
    config = prelora.PreLoRAConfig(k=2, m=1, tau=1e6, zeta=1e6, r_min=2, r_max=4, warmup_epochs=1)
    return prelora.PreLoRA(model, torch.optim.AdamW(model.parameters()), config, targets={{"up": "0", "down": "2"}})

pre, phases = start(), []
for _ in range(5):
    pre.model(torch.randn(8, 16)).square().mean().backward()
    pre.optimizer.step()
    pre.optimizer.zero_grad()
    phases.append(pre.phase)
    pre.end_epoch(1.0)
save_checkpoint(Path("saved"), pre.state_dict())
again = start()
again.load_state_dict(load_checkpoint(Path("saved")))
commands = {{}}
for command in ("train", "export x"):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        commands[command] = [cli.main(command.split()), said.getvalue()]
print(json.dumps([prelora.__file__, _ext.reason(), phases, again.phase, commands]))
"""


@pytest.fixture(scope="module")
def used(bare, tmp_path_factory):
    """Where prelora lies, why its extension does not load, phases gone through, the one loaded, what commands say."""
    shown = run([bare, "-c", USE], tmp_path_factory.mktemp("use"), OMP_NUM_THREADS="1", PYTHONPATH="")
    return json.loads(shown)


def test_without_any_extra_a_model_goes_through_all_phases_and_a_checkpoint(used, bare):
    file, extension, phases, loaded, _ = used

    assert Path(file).is_relative_to(bare.parents[1])
    assert extension is None
    assert phases == ["full", "full", "warmup", "lora", "lora"]
    assert loaded == "lora"


@pytest.mark.parametrize("command", ["train", "export x"])
def test_a_command_without_its_extra_says_what_to_install(command, used):
    code, said = used[4][command]

    assert code == 2
    assert said.startswith("prelora: error: No module named ")
    assert "pip install 'prelora[train" in said


def test_the_installed_command_shows_its_help_without_any_extra(bare, tmp_path):
    shown = run([bare.with_name("prelora"), "--help"], tmp_path, PYTHONPATH="")

    assert [command for command in ("train", "export", "report") if command not in shown] == []


USER = """\
import prelora

reveal_type(prelora.PreLoRAConfig().tau)
reveal_type(prelora.PreLoRA.end_epoch)
prelora.PreLoRAConfig(tau="much")
"""


def test_a_users_mypy_sees_the_types(bare, tmp_path):
    pytest.importorskip("mypy", reason="the dev extra is not installed: pip install 'prelora[dev]'")
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-torch.*,numpy.*,safetensors.*]\nfollow_imports = skip\n")
    command = [sys.executable, "-m", "mypy", "--python-executable", bare, "--cache-dir", tmp_path / "cache", "user.py"]

    result = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, check=False)

    assert result.stdout.splitlines() == [
        'user.py:3: note: Revealed type is "float"',
        'user.py:4: note: Revealed type is "def (self: prelora.controller.PreLoRA, loss: float | Any, probe: Any =) -> '
        'prelora.events.Event"',
        'user.py:5: error: Argument "tau" to "PreLoRAConfig" has incompatible type "str"; expected "float"  [arg-type]',
        "Found 1 error in 1 file (checked 1 source file)",
    ]


# The wheel, installed beside everything.


def test_from_an_installed_wheel_every_subpackage_imports_and_the_trainer_trains(installed, tmp_path):
    packages = sorted({name.rpartition("/")[0].replace("/", ".") for name in modules_on_disk()})
    options = (
        "--output run --epochs 1 --optim.warmup-epochs 0 --model.depth 1 --model.image-size 8 --data.batch-size 700"
    )
    code = f"""
import importlib, sys
print(*[importlib.import_module(name).__file__ for name in {packages}], sep="\\n")
from prelora.cli import main
sys.exit(main(["train", *"{options}".split()]))
"""

    shown = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(installed), OMP_NUM_THREADS="1").splitlines()

    assert shown[: len(packages)] == [str(installed / name.replace(".", "/") / "__init__.py") for name in packages]
    assert any(line.startswith("epoch   1/1 full") for line in shown)
    assert (tmp_path / "run" / "metrics.jsonl").is_file()


def test_the_command_says_its_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])

    assert capsys.readouterr().out == f"prelora {prelora.__version__}\n"
