"""A checkpoint is whole, or it is refused by name; a complete one is never lost to its successor's failure."""

import ast
import errno
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

import prelora
from prelora import CheckpointError, checkpoint
from prelora.checkpoint import (
    best,
    checkpoint_path,
    checkpoints,
    load_checkpoint,
    newest_valid,
    prune,
    read_manifest,
    save_checkpoint,
    set_aside_newer,
    sweep,
    verify_checkpoint,
)

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
WHOLE = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
TREE = {
    "model": {"weight": torch.arange(12.0).reshape(3, 4), "bias": torch.ones(3)},
    "optimizer": {"state": {"weight": {"step": torch.tensor(7.0)}}, "groups": [{"lr": 0.1, "params": ["weight"]}]},
    "train": {"epoch": 3, "history": [0.1, None, "text", True]},
}
FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


def save(root, step, metric=None, evaluating=False):
    path = checkpoint_path(root, step, evaluating)
    save_checkpoint(path, TREE, {"step": step, "metric": metric})
    return path


def flip(file, bit):
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def damage(path):
    flip(path / "model.safetensors", 8 * (path / "model.safetensors").stat().st_size - 1)
    return path


def contents(root):
    """Every file under ``root`` with its bytes."""
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def assert_same(one, other):
    """Equal to the bit: tensors in dtype, shape and bytes, NaN equal to NaN."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        raw = [t.contiguous().flatten().view(torch.uint8) for t in (one, other)]
        assert torch.equal(*raw)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        assert one == other or (math.isnan(one) and math.isnan(other))


# What is saved comes back.


def test_a_nested_tree_comes_back_as_it_was(tmp_path):
    save_checkpoint(tmp_path / "c", TREE)

    assert sorted(contents(tmp_path / "c")) == sorted(FILES)
    assert_same(load_checkpoint(tmp_path / "c"), TREE)


@pytest.mark.parametrize("dtype", [*FLOATS, *WHOLE], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5, 3)], ids=str)
def test_a_tensor_of_any_dtype_and_shape_comes_back_bit_for_bit(dtype, shape, tmp_path):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(9).to(dtype)
    tree = {"model": {"tensor": tensor}}

    save_checkpoint(tmp_path / "c", tree)

    assert_same(load_checkpoint(tmp_path / "c"), tree)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_infinity_and_minus_zero_come_back_bit_for_bit(dtype, tmp_path):
    tree = {"model": {"tensor": torch.tensor([math.nan, -math.nan, math.inf, -math.inf, -0.0, 0.0], dtype=dtype)}}

    save_checkpoint(tmp_path / "c", tree)

    assert_same(load_checkpoint(tmp_path / "c"), tree)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.1, 5e-324, 2**70, "ü\n", None, [], {}, True])
def test_a_plain_value_comes_back_as_it_was(value, tmp_path):
    save_checkpoint(tmp_path / "c", {"train": {"value": value}})

    assert_same(load_checkpoint(tmp_path / "c")["train"]["value"], value)


def test_views_that_share_or_skip_storage_come_back_as_tensors_of_their_own(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    views = {"turned": base.T, "row": base[1], "strided": base[:, ::2], "wide": base[:1].expand(3, 6)}
    tree = {"model": {"all": base, **views}}

    save_checkpoint(tmp_path / "c", tree)

    assert_same(load_checkpoint(tmp_path / "c"), tree)


def test_a_parameter_that_requires_gradients_comes_back_as_a_plain_tensor(tmp_path):
    save_checkpoint(tmp_path / "c", {"model": {"weight": torch.nn.Parameter(torch.ones(2))}})

    assert_same(load_checkpoint(tmp_path / "c")["model"]["weight"], torch.ones(2))


def test_tensors_whose_keys_join_to_the_same_text_stay_apart(tmp_path):
    tree = {"model": {"a/b": torch.tensor(1), "a": {"b": torch.tensor(2)}, "a~1b": torch.tensor(3)}}

    save_checkpoint(tmp_path / "c", tree)

    assert_same(load_checkpoint(tmp_path / "c"), tree)


def test_what_is_saved_is_a_copy_of_that_moment(tmp_path):
    weight = torch.zeros(3)
    save_checkpoint(tmp_path / "c", {"model": {"weight": weight}})
    weight.add_(1)

    assert torch.equal(load_checkpoint(tmp_path / "c")["model"]["weight"], torch.zeros(3))


def test_what_the_writer_noted_reads_without_the_tensors(tmp_path):
    about = {"step": 5, "metric": 91.5, "phase": "warmup", "none": None}
    save_checkpoint(tmp_path / "c", TREE, about)

    assert read_manifest(tmp_path / "c").about == about


# No pickle.


@pytest.mark.parametrize("file", sorted(Path(prelora.__file__).parent.rglob("*.py")), ids=lambda file: file.name)
def test_no_module_reads_or_writes_pickle(file):
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.append(f"{node.value.id}.{node.attr}")

    pickling = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch.load", "torch.save",
                "np.load", "numpy.load", "dist.broadcast_object_list", "dist.all_gather_object"}  # fmt: skip
    assert not pickling & set(found)


# Damage is refused, and named.


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0], ids=["first", "middle", "last"])
def test_a_flipped_bit_is_refused_naming_the_file(name, where, tmp_path):
    file = save(tmp_path, 1) / name
    flip(file, round(where * (8 * file.stat().st_size - 1)))

    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(file.parent)


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    return save(tmp_path_factory.mktemp("intact"), 1, metric=0.30000000000000004)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_single_flipped_bit_anywhere_is_refused(intact, data):
    file = intact / data.draw(st.sampled_from(FILES))
    bit = data.draw(st.integers(0, 8 * file.stat().st_size - 1))
    flip(file, bit)
    try:
        with pytest.raises(CheckpointError):
            load_checkpoint(intact)
    finally:
        flip(file, bit)


def test_a_flipped_bit_in_any_byte_of_a_manifest_is_refused(intact):
    file = intact / "manifest.json"
    for bit in range(0, 8 * file.stat().st_size, 9):
        flip(file, bit)
        with pytest.raises(CheckpointError):
            read_manifest(intact)
        flip(file, bit)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99], ids=["empty", "half", "almost"])
def test_a_truncated_file_is_refused_by_name(name, keep, tmp_path):
    file = save(tmp_path, 1) / name
    os.truncate(file, int(keep * file.stat().st_size))

    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(file.parent)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused_by_name(name, tmp_path):
    file = save(tmp_path, 1) / name
    file.unlink()

    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load_checkpoint(file.parent)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', '{"format": 1, "about": {}, "files": []}'])
def test_a_garbled_manifest_is_refused(text, tmp_path):
    path = save(tmp_path, 1)
    (path / "manifest.json").write_text(text)

    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        load_checkpoint(path)


def test_another_format_is_refused_naming_both(tmp_path):
    path = save(tmp_path, 1)
    raw = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**raw, "format": 2}))

    with pytest.raises(CheckpointError, match="format 2; this prelora reads format 1"):
        load_checkpoint(path)


@pytest.mark.parametrize("path", ["nothing", "file"])
def test_what_is_no_folder_is_refused(path, tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(CheckpointError, match=path):
        load_checkpoint(tmp_path / path)


def test_a_disk_that_fails_to_read_counts_as_damage(tmp_path, monkeypatch):
    save(tmp_path, 1)
    latest = save(tmp_path, 2)

    def fails(file):
        if file.parent == latest:
            raise OSError(errno.EIO, "Input/output error")
        return digest(file)

    digest = checkpoint._sha256
    monkeypatch.setattr(checkpoint, "_sha256", fails)

    assert newest_valid(tmp_path)[0] == checkpoint_path(tmp_path, 1)


# The newest intact one is found; what is damaged is passed over and said.


def test_checkpoints_stand_newest_first_and_an_evaluating_one_before_its_successor(tmp_path):
    for step, evaluating in [(9, False), (10, True), (10, False), (2, False), (123456789, False)]:
        save(tmp_path, step, evaluating=evaluating)

    order = [path.name for path in checkpoints(tmp_path)]

    ten = ["step-000000010", "step-000000010-evaluating"]
    assert order == ["step-123456789", *ten, "step-000000009", "step-000000002"]


def test_folders_and_files_of_other_names_are_no_checkpoints(tmp_path):
    for name in ["step-1", "step-000000001.part-7", "step-000000001.damaged", "step-000000001-other", "notes"]:
        (tmp_path / name).mkdir()
    (tmp_path / "step-000000002").write_text("a file")

    assert checkpoints(tmp_path) == []


def test_a_folder_that_is_not_there_holds_no_checkpoint(tmp_path):
    assert newest_valid(tmp_path / "nothing") == (None, [])


def test_a_damaged_latest_gives_way_to_the_one_before_and_is_named(tmp_path):
    before = save(tmp_path, 1)
    damage(save(tmp_path, 2))

    found, faults = newest_valid(tmp_path)

    assert found == before
    assert len(faults) == 1
    assert "step-000000002 is damaged: model.safetensors" in faults[0]


def test_where_all_are_damaged_none_is_found_and_each_is_named(tmp_path):
    for step in (1, 2):
        damage(save(tmp_path, step))

    found, faults = newest_valid(tmp_path)

    assert found is None
    assert [f"step-00000000{step}" in fault for step, fault in zip((2, 1), faults, strict=True)] == [True, True]


def test_damaged_ones_are_set_aside_so_that_the_chosen_one_is_the_newest(tmp_path):
    chosen = save(tmp_path, 1)
    damaged = contents(damage(save(tmp_path, 2)))

    aside = set_aside_newer(tmp_path, chosen)

    assert checkpoints(tmp_path) == [chosen]
    assert [path.name for path in aside] == ["step-000000002.damaged"]
    assert contents(aside[0]) == damaged


def test_setting_aside_again_replaces_what_was_set_aside_before(tmp_path):
    chosen = save(tmp_path, 1)
    for _ in range(2):
        damage(save(tmp_path, 2))
        set_aside_newer(tmp_path, chosen)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000001", "step-000000002.damaged"]


# Old ones leave, but never before the newest verifies.


def test_the_last_n_and_the_best_stay(tmp_path):
    for step, metric in enumerate([50.0, 90.0, 80.0, None, 70.0, 60.0]):
        save(tmp_path, step, metric)

    removed = prune(tmp_path, keep_last=2)

    assert checkpoints(tmp_path) == [checkpoint_path(tmp_path, step) for step in (5, 4, 1)]
    assert removed == [checkpoint_path(tmp_path, step) for step in (3, 2, 0)]


def test_what_is_removed_leaves_nothing_behind(tmp_path):
    for step in range(3):
        save(tmp_path, step)

    prune(tmp_path, keep_last=1)

    assert [path.name for path in tmp_path.iterdir()] == ["step-000000002"]


def test_the_newest_of_equally_good_ones_is_the_best(tmp_path):
    for step, metric in enumerate([90.0, 95.0, 95.0, 80.0, None]):
        save(tmp_path, step, metric)

    assert best(tmp_path) == checkpoint_path(tmp_path, 2)


def test_without_a_metric_there_is_no_best(tmp_path):
    save(tmp_path, 1)

    assert best(tmp_path) is None


def test_the_best_is_not_looked_for_behind_a_damaged_manifest(tmp_path):
    save(tmp_path, 1, metric=80.0)
    flip(save(tmp_path, 2, metric=90.0) / "manifest.json", 100)

    assert best(tmp_path) == checkpoint_path(tmp_path, 1)


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_removed_while_the_newest_is_damaged(name, tmp_path):
    for step in range(4):
        save(tmp_path, step)
    flip(checkpoint_path(tmp_path, 3) / name, 99)
    before = contents(tmp_path)

    with pytest.raises(CheckpointError, match=name):
        prune(tmp_path, keep_last=1)

    assert contents(tmp_path) == before


# Writing is all or nothing.


def test_a_checkpoint_of_the_same_name_is_replaced(tmp_path):
    path = save(tmp_path, 1)

    save_checkpoint(path, {"model": {"other": torch.zeros(1)}})

    assert_same(load_checkpoint(path), {"model": {"other": torch.zeros(1)}})
    assert [left.name for left in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("at", ["the old one steps aside", "the new one takes its place", "the old one is removed"])
def test_a_writer_killed_while_it_replaces_a_checkpoint_leaves_one_to_load(at, tmp_path, monkeypatch):
    path, newer = save(tmp_path, 1), {"model": {"other": torch.zeros(1)}}
    renames = {"the old one steps aside": 0, "the new one takes its place": 1, "the old one is removed": 2}[at]
    rename, remove = Path.rename, shutil.rmtree

    def killed(self, target):
        nonlocal renames
        if renames == 0:
            raise KeyboardInterrupt
        renames -= 1
        return rename(self, target)

    def removes(folder, **options):  # a killed process cleans nothing up
        if renames == 0:
            raise KeyboardInterrupt
        remove(folder, **options)

    monkeypatch.setattr(Path, "rename", killed)
    monkeypatch.setattr(shutil, "rmtree", removes)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, newer)
    monkeypatch.undo()

    assert_same(load_checkpoint(path), newer if at == "the old one is removed" else TREE)
    shutil.rmtree(next(tmp_path.glob("*.part-*"), tmp_path / "none"), ignore_errors=True)  # this process's, by its id
    save_checkpoint(path, newer)
    assert_same(load_checkpoint(path), newer)


def test_a_damaged_one_of_the_same_step_is_written_anew(tmp_path):
    path = damage(save(tmp_path, 1))

    save_checkpoint(path, TREE)

    assert_same(load_checkpoint(path), TREE)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), SafetensorError("No space left")], ids=repr)
@pytest.mark.parametrize("function", ["save_file", "_sha256", "_manifest_text", "_sync"])
def test_a_write_that_fails_says_so_and_leaves_all_as_it_was(function, error, tmp_path, monkeypatch):
    def fails(*_):
        raise error

    save(tmp_path, 1)
    before = contents(tmp_path)
    monkeypatch.setattr(checkpoint, function, fails)

    with pytest.raises(CheckpointError, match=r"step-000000002.*No space left"):
        save(tmp_path, 2)

    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from prelora import CheckpointError
from prelora.checkpoint import save_checkpoint

resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
plain, tensors = ["text" * 10_000], {"weight": torch.zeros(10_000)}
try:
    save_checkpoint(Path(sys.argv[1]), {"model": tensors if sys.argv[2] == "tensors" else plain})
except CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize("what", ["tensors", "plain"])
def test_a_disk_that_takes_no_more_bytes_is_a_checkpoint_error(what, tmp_path):
    save(tmp_path, 1)
    before = contents(tmp_path)

    child = [sys.executable, "-c", FULL_DISK, str(checkpoint_path(tmp_path, 2)), what]
    said = subprocess.run(child, capture_output=True, text=True, check=True).stdout

    assert "cannot write checkpoint" in said
    assert "File too large" in said
    assert contents(tmp_path) == before


@pytest.mark.parametrize("root", ["{tmp}/file", "/proc/checkpoints"], ids=["under a file", "read-only"])
def test_where_nothing_can_be_written_it_is_a_checkpoint_error_naming_the_path(root, tmp_path):
    (tmp_path / "file").write_text("no folder")
    path = Path(root.format(tmp=tmp_path)) / "step-000000001"

    with pytest.raises(CheckpointError, match=f"cannot write checkpoint {path}"):
        save_checkpoint(path, TREE)


def test_what_a_killed_writer_left_is_no_checkpoint_and_is_swept(tmp_path):
    whole = save(tmp_path, 1)
    part = tmp_path / "step-000000002.part-4711"
    shutil.copytree(whole, part)
    (part / "manifest.json").unlink()

    assert newest_valid(tmp_path) == (whole, [])
    assert sweep(tmp_path) == [part]
    assert list(tmp_path.iterdir()) == [whole]
    verify_checkpoint(whole)


def test_a_value_that_json_does_not_know_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "c", {"train": {"value": object()}})

    assert list(tmp_path.iterdir()) == []
