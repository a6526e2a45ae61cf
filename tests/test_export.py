"""``prelora export``: a run's checkpoint as the stock library's own model, whole or not at all."""

import dataclasses
import errno
import json
import math

import pytest
import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tiny_runs import TINY, copied, damage, finished, metrics
from transformers import ViTConfig, ViTForImageClassification

import prelora
from prelora import PreLoRAWarning, surgery
from prelora.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from prelora.cli import EXIT_BAD_INPUT, EXIT_CHECKPOINT, main
from prelora.controller import logits
from prelora.targets import Target
from prelora.train import export
from prelora.train import export_merged as merged_form
from prelora.train.export_merged import export_merged
from prelora.train.model import build_model

EPOCHS = {"full": 1, "warmup": 3, "lora": 6}
"""Of the phase's checkpoint that is exported."""


def stock(library):
    """The library's own model of the size of ``TINY``, by the library's own names."""
    if library == "timm":
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=8, patch_size=4, in_chans=1, embed_dim=32, depth=2, num_heads=2,
            num_classes=10,
        ).eval()  # fmt: skip
    return ViTForImageClassification(
        ViTConfig(
            image_size=8, patch_size=4, num_channels=1, hidden_size=32, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2, num_labels=10,
        )
    ).eval()  # fmt: skip


def trained(tree, library, weights="model"):
    """The model of a checkpoint as it was trained: base and LoRA apart."""
    model = build_model(dataclasses.replace(TINY.model, library=library), classes=10, channels=1)
    if tree["ranks"]:
        targets = [Target(**{**target, "rows": target["rows"] and tuple(target["rows"])}) for target in tree["targets"]]
        surgery.inject(model, targets, tree["ranks"], alpha=tree["config"]["alpha"])
    model.load_state_dict(tree[weights])
    return model.eval()


def images():
    return torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def assert_same_logits(one, other):
    expected = logits(other(images()))
    torch.testing.assert_close(logits(one(images())), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.05  # not a comparison of nothing with nothing


def of_each_library(tmp_path_factory, **prelora):
    """A run of each library, every checkpoint kept, LoRA scaled by more than 1."""
    return {
        library: finished(
            tmp_path_factory.mktemp(library) / "run",
            model={"library": library},
            ema_decay=0.8,
            prelora={"alpha": 8.0, **prelora},
            checkpoint={"keep_last": 10},
            optim={"lr": 5e-3},
        )
        for library in ("timm", "transformers")
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return of_each_library(tmp_path_factory)


@pytest.fixture
def run(runs):
    return runs["timm"]


def of_phase(run, phase):
    found = [path for path in checkpoints(run / "checkpoints") if load_checkpoint(path)["epoch"] == EPOCHS[phase]]
    assert load_checkpoint(found[0])["phase"] == phase
    return found[0]


# What is written.


@pytest.mark.parametrize("weights", ["model", "ema"])
@pytest.mark.parametrize("phase", EPOCHS)
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_the_stock_model_loads_it_strictly_and_computes_what_was_trained(library, phase, weights, runs, tmp_path):
    path = of_phase(runs[library], phase)

    out, _ = export_merged(runs[library], tmp_path / "m.safetensors", checkpoint=path, ema=weights == "ema")

    model = stock(library)
    model.load_state_dict(load_file(out), strict=True)
    assert_same_logits(model, trained(load_checkpoint(path), library, weights))


def test_lora_is_in_what_was_merged(run, tmp_path):
    out, _ = export_merged(run, tmp_path / "m.safetensors")

    base = load_checkpoint(checkpoints(run / "checkpoints")[0])["model"]["blocks.0.attn.qkv.weight"]
    assert not torch.allclose(load_file(out)["blocks.0.attn.qkv.weight"], base, atol=1e-3)


def test_the_average_differs_from_the_weights(run, tmp_path):
    weights, _ = export_merged(run, tmp_path / "weights.safetensors")

    average, _ = export_merged(run, tmp_path / "average.safetensors", ema=True)

    assert not torch.equal(load_file(weights)["head.weight"], load_file(average)["head.weight"])


def test_the_header_says_what_it_is(run, tmp_path):
    newest = checkpoints(run / "checkpoints")[0]

    out, _ = export_merged(run, tmp_path / "m.safetensors", ema=True)

    with safe_open(out, "pt") as file:
        about = file.metadata()
    assert json.loads(about.pop("ranks")) == metrics(run)[5]["event"]["ranks"] != {}
    assert about == {
        "format": "pt",
        "prelora": prelora.__version__,
        "library": "timm",
        "model": TINY.model.name,
        "checkpoint": newest.name,
        "phase": "lora",
        "epoch": "6",
        "ema": "true",
    }


# Which checkpoint.


def exported(arguments, capsys):
    """The name of the checkpoint that ``prelora export`` took."""
    assert main(["export", *map(str, arguments)]) == 0
    path = capsys.readouterr().out.partition(": loads strict=True")[0]
    with safe_open(path, "pt") as file:
        return file.metadata()["checkpoint"]


def test_the_command_takes_the_newest_the_best_or_the_one_named(run, tmp_path, capsys):
    by_epoch = {load_checkpoint(path)["epoch"]: path for path in checkpoints(run / "checkpoints")}
    scores = [line["eval"]["top1"] for line in metrics(run)]
    best = by_epoch[6 - scores[::-1].index(max(scores))]
    out = ["--out", tmp_path / "m.safetensors"]

    assert exported([run, *out], capsys) == by_epoch[6].name
    assert exported([run, *out, "--best"], capsys) == best.name
    assert exported([run, *out, "--checkpoint", by_epoch[2]], capsys) == by_epoch[2].name


def test_without_a_file_named_it_goes_into_the_run(run, tmp_path, capsys):
    ours = copied(run, tmp_path / "run")

    assert main(["export", str(ours), "--to", "merged"]) == 0
    assert main(["export", str(ours), "--ema"]) == 0

    assert sorted(path.name for path in (ours / "export").iterdir()) == ["merged.safetensors", "merged_ema.safetensors"]


def test_a_damaged_newest_gives_way_to_the_one_before_and_says_so(run, tmp_path):
    damaged = copied(run, tmp_path / "run")
    latest, before = checkpoints(damaged / "checkpoints")[:2]
    damage(latest)

    with pytest.warns(PreLoRAWarning, match=f"passed over a damaged checkpoint for {before.name}: .*{latest.name}"):
        out, _ = export_merged(damaged)

    with safe_open(out, "pt") as file:
        assert file.metadata()["checkpoint"] == before.name


# What is refused.


def test_a_damaged_checkpoint_exits_with_4_naming_the_file_and_writes_nothing(run, tmp_path, capsys):
    damaged = copied(run, tmp_path / "run")
    path = checkpoints(damaged / "checkpoints")[2]
    damage(path)

    assert main(["export", str(damaged), "--checkpoint", str(path)]) == EXIT_CHECKPOINT

    assert f"checkpoint {path} is damaged: model.safetensors" in capsys.readouterr().err
    assert not (damaged / "export").exists()


def test_a_run_without_an_intact_checkpoint_exits_with_4(run, tmp_path, capsys):
    damaged = copied(run, tmp_path / "run")
    for path in checkpoints(damaged / "checkpoints"):
        damage(path)

    assert main(["export", str(damaged)]) == EXIT_CHECKPOINT

    assert f"no intact checkpoint under {damaged / 'checkpoints'} (6 found)" in capsys.readouterr().err


def test_a_folder_that_is_no_run_exits_with_4(tmp_path, capsys):
    assert main(["export", str(tmp_path / "nothing")]) == EXIT_CHECKPOINT

    assert f"no intact checkpoint under {tmp_path / 'nothing' / 'checkpoints'} (0 found)" in capsys.readouterr().err


def test_a_checkpoint_of_another_trainer_exits_with_4(tmp_path, capsys):
    save_checkpoint(tmp_path / "run" / "checkpoints" / "step-000000001", {"model": {"weight": torch.ones(2)}})

    assert main(["export", str(tmp_path / "run")]) == EXIT_CHECKPOINT

    assert "step-000000001 was not written by prelora's trainer" in capsys.readouterr().err


def test_a_run_without_an_average_exits_with_2(tmp_path, capsys):
    run = finished(tmp_path / "run", epochs=1, optim={"warmup_epochs": 0})

    assert main(["export", str(run), "--ema"]) == EXIT_BAD_INPUT

    assert f"{run} kept no EMA" in capsys.readouterr().err
    assert not (run / "export").exists()


def test_best_and_a_checkpoint_together_are_refused(run, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["export", str(run), "--best", "--checkpoint", "x"])

    assert stop.value.code == EXIT_BAD_INPUT
    assert "not allowed with" in capsys.readouterr().err


def test_an_unknown_form_is_refused_naming_the_known_one(run, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["export", str(run), "--to", "onnx"])

    assert stop.value.code == EXIT_BAD_INPUT
    assert "merged" in capsys.readouterr().err


# Complete or absent.


def no_space(*_, **__):
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def half_a_file(_, path, **__):
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("write", [no_space, half_a_file])
@pytest.mark.parametrize("former", [None, b"the one before"])
def test_a_full_disk_exits_with_2_and_leaves_what_was_there(write, former, run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out" / "m.safetensors"
    if former is not None:
        out.parent.mkdir()
        out.write_bytes(former)
    monkeypatch.setattr(merged_form, "save_file", write)

    assert main(["export", str(run), "--out", str(out)]) == EXIT_BAD_INPUT

    assert "No space left on device" in capsys.readouterr().err
    assert [path.read_bytes() for path in out.parent.iterdir()] == ([] if former is None else [former])


@pytest.mark.parametrize("difference", [2e-4, math.nan])
def test_a_model_whose_logits_differ_is_not_left_behind(difference, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "logit_difference", lambda *_: difference)

    assert main(["export", str(run), "--out", str(tmp_path / "m.safetensors")]) == EXIT_BAD_INPUT

    assert "merged logits differ" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_merge_is_caught_by_the_logits(run, tmp_path, monkeypatch):
    merge = surgery.merged_state_dict

    def without_one_target(model):
        return merge(model) | {"blocks.1.mlp.fc2.weight": model.blocks[1].mlp.fc2.weight.detach()}

    monkeypatch.setattr(surgery, "merged_state_dict", without_one_target)

    with pytest.raises(ValueError, match="merged logits differ by"):
        export_merged(run, tmp_path / "m.safetensors")


def test_a_file_that_cannot_be_written_exits_with_2(run, tmp_path, capsys):
    (tmp_path / "file").touch()

    assert main(["export", str(run), "--out", str(tmp_path / "file" / "m.safetensors")]) == EXIT_BAD_INPUT

    assert str(tmp_path / "file") in capsys.readouterr().err
