"""Checkpoints of four ranks go on on four, two and one, in any wrapper; a damaged or half-written one does not."""

import errno
import json
import shutil

import pytest
import torch
from fsdp_runs import RANKS, ddp, end, fsdp, hybrid, plain, start, train
from two_ranks import running

from prelora import CheckpointError, checkpoint, distributed
from prelora.checkpoint import checkpoints, load_checkpoint, newest_valid, read_manifest, save_checkpoint, sweep
from prelora.sharded_checkpoint import save_together

PHASES = {"full": 1, "warmup": 3, "lora": 4}
"""Epochs after which a checkpoint is taken, in the middle of the next one."""
SHARDS = [
    f"{entry}.shard-{rank:05d}.safetensors"
    for entry in ("ema", "model", "optimizer", "snapshot")
    for rank in range(RANKS)
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with running(tmp_path_factory.mktemp("ranks"), RANKS) as started:
        yield started


def go_on(pre):
    """What comes after the checkpoint: the rest of its epoch, its end, and a step of the next."""
    losses, _ = train(pre, 1)
    event = end(pre, losses)
    later, _ = train(pre, 1)
    return {"losses": losses + later, "norms": event.norms, "phase": event.phase}


def written(wrap, root):
    """A run that saves in each phase, in the middle of an epoch; what came after each."""
    pre, after = start(wrap), {}
    for phase, epochs in PHASES.items():
        while pre.epoch < epochs:
            end(pre, train(pre)[0])
        train(pre, 1)
        assert pre.phase == phase
        save_together(root / phase / "step-000000001", pre.state_dict(), {"phase": phase})
        after[phase] = go_on(pre)
    return after


def resumed(wrap, path):
    pre = start(wrap)
    pre.load_state_dict(load_checkpoint(path))
    return go_on(pre)


@pytest.fixture(scope="module")
def sharded(ranks, tmp_path_factory):
    """Where four ranks in FSDP2 saved, by phase, and what each then saw."""
    root = tmp_path_factory.mktemp("sharded")
    return root, ranks(written, fsdp, root)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same by this process on a plain model."""
    root = tmp_path_factory.mktemp("whole")
    return root, [written(plain, root)]


@pytest.mark.parametrize("phase", PHASES)
def test_on_as_many_ranks_a_run_goes_on_bit_for_bit(phase, ranks, sharded):
    root, after = sharded
    assert ranks(resumed, fsdp, root / phase / "step-000000001") == [mine[phase] for mine in after]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("world", "wrap"), [(1, plain), (2, fsdp), (2, ddp), (4, hybrid)])
def test_on_other_ranks_and_in_other_wrappers_the_losses_and_norms_are_the_same(phase, world, wrap, ranks, sharded):
    root, after = sharded
    for found in ranks.only(world, resumed, wrap, root / phase / "step-000000001"):
        assert_alike(found, after[0][phase])


@pytest.mark.parametrize("phase", PHASES)
def test_a_plain_checkpoint_goes_on_in_fsdp2(phase, ranks, whole):
    root, after = whole
    for found in ranks.only(2, resumed, fsdp, root / phase / "step-000000001"):
        assert_alike(found, after[0][phase])


def assert_alike(found, expected):
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-8)
    assert found["phase"] == expected["phase"]
    for kind in ("base", "effective", "lora", "update"):
        assert getattr(found["norms"], kind) == pytest.approx(getattr(expected["norms"], kind), rel=1e-8)


# What stands on the disk.


def test_every_rank_writes_its_own_shards_alone_and_all_are_in_the_manifest(sharded, whole):
    path, plain_path = (root / "warmup" / "step-000000001" for root, _ in (sharded, whole))
    files = read_manifest(path).files
    assert sorted(name for name in files if ".shard-" in name) == SHARDS
    assert {file.name for file in path.iterdir()} == {*files, "manifest.json"}
    assert read_manifest(path).about == {"phase": "warmup"}
    sizes = [files[f"model.shard-{rank:05d}.safetensors"]["bytes"] for rank in range(RANKS)]
    everything = (plain_path / "model.safetensors").stat().st_size
    assert max(sizes) < 0.4 * everything < sum(sizes)


def test_read_back_the_tensors_are_whole_and_those_of_the_plain_run(sharded, whole):
    ours, plains = (load_checkpoint(root / "lora" / "step-000000001") for root, _ in (sharded, whole))
    for entry in ("model", "ema", "snapshot"):
        assert ours[entry].keys() == plains[entry].keys()
        for name, tensor in ours[entry].items():
            torch.testing.assert_close(tensor, plains[entry][name], rtol=1e-6, atol=1e-9)


@pytest.fixture
def copy(sharded, tmp_path):
    """A checkpoint to be damaged, with a valid older one beside it."""
    source = sharded[0] / "warmup" / "step-000000001"
    shutil.copytree(source, tmp_path / "step-000000001")
    shutil.copytree(source, tmp_path / "step-000000002")
    return tmp_path / "step-000000002"


@pytest.mark.parametrize("name", [SHARDS[5], SHARDS[-1], "state.json"])
def test_a_flipped_bit_in_any_ranks_file_is_refused_and_the_older_checkpoint_taken(name, copy):
    data = bytearray((copy / name).read_bytes())
    data[-9] ^= 4
    (copy / name).write_bytes(data)

    with pytest.raises(CheckpointError, match=f"{name} does not match its SHA-256"):
        load_checkpoint(copy)
    assert newest_valid(copy.parent)[0] == copy.parent / "step-000000001"


def test_a_missing_shard_is_refused_by_name(copy):
    (copy / SHARDS[6]).unlink()

    with pytest.raises(CheckpointError, match=f"incomplete: {SHARDS[6]} is missing"):
        load_checkpoint(copy)


def test_shards_that_do_not_make_the_tensor_are_refused(copy):
    tree = json.loads((copy / "state.json").read_text())
    name, leaf = next((name, leaf) for name, leaf in tree["model"].items() if leaf.get("$shape", [0])[0] > 20)
    leaf["$shape"][0] += 1
    (copy / "state.json").write_text(json.dumps(tree))
    manifest = read_manifest(copy)
    facts = checkpoint._facts(copy / "state.json")
    (copy / "manifest.json").write_text(
        checkpoint._manifest_text(manifest.about, manifest.files | {"state.json": facts})
    )

    with pytest.raises(CheckpointError, match=f"the shards of {name} make"):
        load_checkpoint(copy)


# Complete or not at all.


def failing(wrap, root, stage, bad):
    """One rank cannot write, in the second checkpoint; what every rank is told, and what it sees on the disk."""
    pre = start(wrap, average=False)
    save_together(root / "step-000000001", pre.state_dict())
    original = getattr(checkpoint, stage)

    def full_disk(*arguments):
        if distributed.rank() == bad:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments)

    setattr(checkpoint, stage, full_disk)
    try:
        save_together(root / "step-000000002", pre.state_dict())
        said = "saved"
    except CheckpointError as error:
        said = str(error)
    finally:
        setattr(checkpoint, stage, original)
    again = save_together(root / "step-000000003", pre.state_dict())
    return said, sorted(path.name for path in root.iterdir()), sorted(again.files)


@pytest.mark.parametrize(
    ("wrap", "stage", "bad"),
    [(fsdp, "save_file", 1), (fsdp, "save_file", 0), (fsdp, "_manifest_text", 0), (ddp, "save_file", 0)],
)
def test_a_rank_that_cannot_write_makes_all_raise_alike_and_leaves_nothing(wrap, stage, bad, ranks, tmp_path):
    first, second = ranks.only(2, failing, wrap, tmp_path, stage, bad)
    said, names, files = first

    assert said.startswith(f"cannot write checkpoint {tmp_path / 'step-000000002'}: rank {bad}: [Errno 28]")
    assert second == first
    assert names == ["step-000000001", "step-000000003"]
    assert len(files) == (3 if wrap is fsdp else 2)
    assert newest_valid(tmp_path) == (tmp_path / "step-000000003", [])


def test_what_killed_ranks_left_behind_is_swept(copy):
    (copy / "manifest.json").unlink()
    left = copy.rename(copy.with_name("step-000000002.part-4711"))

    assert sweep(copy.parent) == [left]
    assert checkpoints(copy.parent) == [copy.parent / "step-000000001"]


def same_name_again(root):
    pre = start(fsdp, average=False)
    save_together(root / "last", pre.state_dict(), {"run": 1})
    return save_together(root / "last", pre.state_dict(), {"run": 2}).about


def test_a_checkpoint_of_the_same_name_is_replaced_by_all_ranks(ranks, tmp_path):
    assert ranks.only(2, same_name_again, tmp_path) == [{"run": 2}] * 2
    assert read_manifest(tmp_path / "last").about == {"run": 2}


def alone_with_shards(root):
    try:
        save_checkpoint(root / "step-000000001", start(fsdp, average=False).state_dict())
    except TypeError as error:
        return str(error)
    return "saved"


def test_one_rank_alone_does_not_save_what_is_spread_over_ranks(ranks, tmp_path):
    for said in ranks.only(2, alone_with_shards, tmp_path):
        assert said == "tensors of model are spread over ranks: call save_together on every rank"
    assert list(tmp_path.iterdir()) == []
