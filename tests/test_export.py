"""The export is the stock model's own state dict, with the run's function."""

import dataclasses
import json

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_run import tiny

from prelora.checkpoint import checkpoints
from prelora.cli import main
from prelora.train.__main__ import train
from prelora.train.export import export_merged


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = tiny(tmp_path_factory.mktemp("export") / "run")
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, keep_last=9))
    assert train(config) == 0
    return config.output


@pytest.mark.parametrize("phase", ["full", "warmup", "lora"])
def test_every_phase_exports_the_function_it_had(run, phase, tmp_path):
    chosen = next(path for path in checkpoints(run / "checkpoints") if phase_of(path) == phase)

    path, difference = export_merged(run, tmp_path / "merged.safetensors", checkpoint=chosen)

    assert difference < 1e-5
    assert not [name for name in load_file(path) if "lora" in name]


def phase_of(path):
    return json.loads((path / "manifest.json").read_text())["about"]["phase"]


def test_timm_loads_it_strictly(run, tmp_path):
    path, _ = export_merged(run, tmp_path / "merged.safetensors")
    stock = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=32, depth=2, num_heads=2, in_chans=1, num_classes=10
    )

    assert not any(stock.load_state_dict(load_file(path), strict=True))


def test_the_average_is_another_model(run, tmp_path):
    weights, _ = export_merged(run, tmp_path / "weights.safetensors")
    average, _ = export_merged(run, tmp_path / "average.safetensors", ema=True)

    assert not torch.equal(load_file(weights)["head.weight"], load_file(average)["head.weight"])


def test_metadata_says_where_it_comes_from(run, tmp_path):
    path, _ = export_merged(run, tmp_path / "merged.safetensors", use_best=True)

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["model"] == "vit_tiny_patch16_224"
    assert metadata["phase"] in ("full", "warmup", "lora")


def test_a_merge_that_changes_the_function_leaves_no_file(run, tmp_path, monkeypatch):
    from prelora.nn import LoRALinear

    monkeypatch.setattr(LoRALinear, "merged_weight", lambda self: self.weight.detach() * 1.01)

    with pytest.raises(ValueError, match="merged logits differ"):
        export_merged(run, tmp_path / "merged.safetensors")
    assert not list(tmp_path.iterdir())


def test_transformers_runs_export_for_the_stock_class(tmp_path):
    config = tiny(tmp_path / "run", model={"library": "transformers"}, ema_decay=None)
    train(config)

    assert main(["export", str(config.output)]) == 0


@pytest.mark.parametrize("arguments", [["export"], ["report"]])
def test_a_folder_without_a_run_is_refused(arguments, tmp_path, capsys):
    assert main([*arguments, str(tmp_path)]) in (2, 4)

    assert str(tmp_path) in capsys.readouterr().err


def test_a_run_without_average_cannot_export_one(tmp_path, capsys):
    config = tiny(tmp_path / "run", epochs=1, ema_decay=None)
    train(config)

    assert main(["export", str(config.output), "--ema"]) == 2

    assert "kept no EMA" in capsys.readouterr().err


def test_the_report_follows_the_run(run, capsys):
    assert main(["report", str(run)]) == 0

    assert (run / "report.html").stat().st_size > 10_000
