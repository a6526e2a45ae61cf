"""``prelora export --to peft``: what stock PEFT computes from it on the stock model, whole or not at all."""

import errno
import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from test_export import assert_same_logits, of_each_library, of_phase, stock, trained
from test_trainer_per_group import PASSES, SETTINGS, EveryCall
from tiny_runs import copied, finished, metrics

from prelora import PreLoRAWarning, monitor
from prelora.checkpoint import checkpoints, load_checkpoint
from prelora.cli import EXIT_BAD_INPUT, main
from prelora.integrations import peft_adapter
from prelora.train import export
from prelora.train.export_merged import export_merged
from prelora.train.export_peft import export_peft

FILES = ["adapter_config.json", "adapter_model.safetensors", "base.safetensors"]
WARM = pytest.mark.filterwarnings("ignore:.*is of the warm-up:prelora.PreLoRAWarning")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return of_each_library(tmp_path_factory, lora_dropout=0.1)


@pytest.fixture
def run(runs):
    return runs["timm"]


def loaded(folder, library="timm"):
    """As a user loads it: the stock model by the library's own names, its base, the adapter by PEFT."""
    model = stock(library)
    model.load_state_dict(load_file(folder / "base.safetensors"), strict=True)
    return PeftModel.from_pretrained(model, folder).eval()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# What is written.


@WARM
@pytest.mark.parametrize("weights", ["model", "ema"])
@pytest.mark.parametrize("phase", ["warmup", "lora"])
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_stock_peft_on_the_stock_model_computes_what_was_trained(library, phase, weights, runs, tmp_path):
    path = of_phase(runs[library], phase)

    out, difference, _ = export_peft(runs[library], tmp_path / "adapter", checkpoint=path, ema=weights == "ema")

    assert names(out) == FILES
    assert_same_logits(loaded(out, library), trained(load_checkpoint(path), library, weights))
    assert difference < 1e-5


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_peft_realises_the_ranks_of_the_plan(library, runs, tmp_path):
    plan = metrics(runs[library])[5]["event"]["ranks"]
    by_path = {}
    for target, rank in plan.items():
        path = target.partition("[")[0]
        by_path[path] = by_path.get(path, 0) + rank

    out, _, _ = export_peft(runs[library], tmp_path / "adapter")

    layers = loaded(out, library).get_base_model().named_modules()
    assert {path: layer.r["default"] for path, layer in layers if isinstance(layer, LoraLayer)} == by_path
    assert len(by_path) == (8 if library == "timm" else 12)
    assert len(set(plan.values())) > 1


def test_each_slice_of_a_fused_linear_keeps_its_own_rank(run, tmp_path):
    plan = metrics(run)[5]["event"]["ranks"]

    out, _, _ = export_peft(run, tmp_path / "adapter")

    layer = loaded(out).get_base_model().blocks[0].attn.qkv
    ranks = [plan[f"blocks.0.attn.qkv[{group}]"] for group in "qkv"]
    delta = layer.get_delta_weight("default").detach().split(32)
    assert [int(torch.linalg.matrix_rank(rows, rtol=1e-4)) for rows in delta] == ranks


def test_merged_by_peft_it_is_the_merged_export(run, tmp_path):
    merged, _ = export_merged(run, tmp_path / "merged.safetensors")
    out, _, _ = export_peft(run, tmp_path / "adapter")

    by_peft = loaded(out).merge_and_unload().state_dict()

    ours = load_file(merged)
    assert by_peft.keys() == ours.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(by_peft[name], tensor, rtol=1e-5, atol=1e-6)


def test_the_base_is_frozen_and_the_adapter_alone_differs_between_two_epochs(run, tmp_path):
    def exported(epoch):
        path = next(p for p in checkpoints(run / "checkpoints") if load_checkpoint(p)["epoch"] == epoch)
        out, _, adapter = export_peft(run, tmp_path / f"{epoch}", checkpoint=path)
        return load_file(out / "base.safetensors"), adapter

    (fifth, adapter), (sixth, _) = exported(5), exported(6)

    saved = {name.removeprefix("base_model.model.") for name in adapter.tensors}
    assert {name for name in fifth if not torch.equal(fifth[name], sixth[name])} <= saved | {"cls_token", "pos_embed"}


def test_the_config_names_every_layer_exactly(run, tmp_path):
    out, _, adapter = export_peft(run, tmp_path / "adapter")

    config = LoraConfig.from_pretrained(out)
    assert config.target_modules == "|".join(path.replace(".", r"\.") for path in adapter.ranks)
    assert config.rank_pattern == {"^" + path.replace(".", r"\."): rank for path, rank in adapter.ranks.items()}
    assert config.alpha_pattern.keys() == config.rank_pattern.keys()
    assert config.lora_dropout == 0.1
    assert {"norm", "head", "patch_embed.proj", "blocks.1.norm2"} <= set(config.modules_to_save)
    assert adapter.base_only == ("cls_token", "pos_embed")


def test_the_header_of_the_base_says_what_it_is(run, tmp_path):
    out, _, _ = export_peft(run, tmp_path / "adapter", ema=True)

    with safe_open(out / "base.safetensors", "pt") as file:
        about = file.metadata()
    assert json.loads(about["ranks"]) == metrics(run)[5]["event"]["ranks"]
    assert (about["phase"], about["epoch"], about["ema"]) == ("lora", "6", "true")


def test_groups_that_have_not_switched_are_saved_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "measure", EveryCall(PASSES))
    run = finished(tmp_path / "run", epochs=3, prelora=SETTINGS)
    tree = load_checkpoint(checkpoints(run / "checkpoints")[0])
    switched = {name.partition("[")[0] for name in tree["ranks"]}
    waiting = {target["path"] for target in tree["targets"]} - switched
    assert {path.rpartition(".")[2] for path in waiting} == {"fc1", "fc2"}

    with pytest.warns(PreLoRAWarning, match=r"is of the warm-up: the bases of 2 layers still trained beside"):
        out, _, adapter = export_peft(run)

    assert waiting <= set(adapter.config.modules_to_save)
    assert set(adapter.ranks) == switched
    ours = export.load_trained(run, checkpoint=None, use_best=False, ema=False).model
    assert_same_logits(loaded(out), ours.eval())


def test_of_a_run_that_froze_all_else_only_lora_is_in_the_adapter(tmp_path):
    run = finished(tmp_path / "run", epochs=3, prelora={"freeze": "all", "warmup_epochs": 0})

    out, _, adapter = export_peft(run)

    assert LoraConfig.from_pretrained(out).modules_to_save is None
    assert adapter.base_only == ()
    assert all("lora_" in name for name in load_file(out / "adapter_model.safetensors"))
    assert_same_logits(loaded(out), trained(load_checkpoint(checkpoints(run / "checkpoints")[0]), "timm"))


# The command.


@WARM
def test_the_command_writes_into_the_run_and_says_what_the_adapter_lacks(run, tmp_path, capsys):
    ours = copied(run, tmp_path / "run")

    assert main(["export", str(ours), "--to", "peft"]) == 0
    assert main(["export", str(ours), "--to", "peft", "--ema"]) == 0
    assert main(["export", str(ours), "--to", "peft", "--best", "--out", str(tmp_path / "best")]) == 0

    printed = capsys.readouterr().out
    assert f"{ours / 'export' / 'peft'}: PEFT loads 8 adapted layers onto base.safetensors in the stock" in printed
    assert "in base.safetensors alone, for PEFT has no place for them: cls_token, pos_embed" in printed
    assert names(ours / "export") == ["peft", "peft_ema"]
    assert names(ours / "export" / "peft") == names(tmp_path / "best") == FILES


def test_a_checkpoint_without_lora_exits_with_2_and_says_what_to_do(run, tmp_path, capsys):
    path = of_phase(run, "full")

    assert (
        main(["export", str(run), "--to", "peft", "--checkpoint", str(path), "--out", str(tmp_path / "a")])
        == EXIT_BAD_INPUT
    )

    message = capsys.readouterr().err
    assert f"{path} has no adapter: phase full has no LoRA yet. Export it --to merged, or give another" in message
    assert not (tmp_path / "a").exists()


def test_a_plan_of_ranks_0_exits_with_2_and_says_what_to_do(tmp_path, capsys):
    run = finished(tmp_path / "run", epochs=2, prelora={"assignment": "none"})

    assert main(["export", str(run), "--to", "peft"]) == EXIT_BAD_INPUT

    assert "has no adapter: the plan gives every layer rank 0. Export it --to merged" in capsys.readouterr().err


def test_a_run_without_an_average_exits_with_2(tmp_path, capsys):
    run = finished(tmp_path / "run", epochs=1, optim={"warmup_epochs": 0})

    assert main(["export", str(run), "--to", "peft", "--ema"]) == EXIT_BAD_INPUT

    assert f"{run} kept no EMA" in capsys.readouterr().err


# Complete or absent.


def no_space(*_, **__):
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def half_a_file(_, path, **__):
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(params=[False, True], ids=["nothing", "an export"])
def place(request, run, tmp_path):
    """A folder to export to, with nothing or an earlier export at it, and what stands there."""
    out = tmp_path / "out" / "adapter"
    if request.param:
        export_peft(run, out, ema=True)
    else:
        out.parent.mkdir()
    return out, contents(out.parent)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("write", [no_space, half_a_file])
def test_a_full_disk_exits_with_2_and_leaves_what_was_there(write, run, place, capsys, monkeypatch):
    out, before = place
    monkeypatch.setattr(peft_adapter, "save_file", write)

    assert main(["export", str(run), "--to", "peft", "--out", str(out)]) == EXIT_BAD_INPUT

    assert "No space left on device" in capsys.readouterr().err
    assert contents(out.parent) == before


@pytest.mark.parametrize("difference", [2e-4, math.nan])
def test_an_adapter_whose_logits_differ_is_not_left_behind(difference, run, place, capsys, monkeypatch):
    out, before = place
    monkeypatch.setattr(export, "logit_difference", lambda *_: difference)

    assert main(["export", str(run), "--to", "peft", "--out", str(out)]) == EXIT_BAD_INPUT

    assert "PEFT's logits differ" in capsys.readouterr().err
    assert contents(out.parent) == before


def test_an_earlier_export_is_replaced(run, tmp_path):
    out, _, _ = export_peft(run, tmp_path / "adapter", ema=True)
    average = contents(out)

    export_peft(run, out)

    assert contents(out).keys() == average.keys()
    assert contents(out) != average
    assert names(tmp_path) == ["adapter"]


def test_a_folder_that_holds_anything_else_is_never_replaced(run, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("\\begin{document}")

    assert main(["export", str(run), "--to", "peft", "--out", str(tmp_path)]) == EXIT_BAD_INPUT

    assert f"{tmp_path} holds other files, as thesis.tex: give another folder" in capsys.readouterr().err
    assert names(tmp_path) == ["thesis.tex"]


def test_a_file_is_no_folder(run, tmp_path, capsys):
    (tmp_path / "file").touch()

    assert main(["export", str(run), "--to", "peft", "--out", str(tmp_path / "file")]) == EXIT_BAD_INPUT

    assert f"{tmp_path / 'file'} is a file: give a folder" in capsys.readouterr().err


def test_a_wrong_adapter_is_caught(run, tmp_path, monkeypatch):
    one_b = peft_adapter._one_b
    monkeypatch.setattr(peft_adapter, "_one_b", lambda layer: one_b(layer).flip(0))

    with pytest.raises(ValueError, match=r"PEFT's logits differ by"):
        export_peft(run, tmp_path / "adapter")

    assert list(tmp_path.iterdir()) == []
