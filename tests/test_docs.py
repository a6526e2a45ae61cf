"""The pages build without a warning, fetch nothing when they are read, and what they show runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import adamw, images, labels, tiny_vit
from torch import nn

import prelora
import prelora.nn
import prelora.ops
from prelora import targets
from prelora.train.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
WITH_CODE = ("README.md", "docs/quickstart.md", "docs/kernels.md")
"""Pages whose Python is about prelora alone."""
PUBLIC = [
    *(f"prelora.{name}" for name in prelora.__all__),
    *(f"prelora.nn.{name}" for name in prelora.nn.__all__),
    *(f"prelora.ops.{name.removesuffix('_backward')}.{name}" for name in prelora.ops.__all__ if name[-1] != "_"),
    *(f"prelora.train.recipes.{name}" for name in RECIPES),
    "prelora.train.config.TrainConfig",
    "prelora.checkpoint.load_checkpoint",
    "prelora.registry.use_provider",
    "prelora.integrations.accelerate.AcceleratedPreLoRA",
    "prelora.integrations.lightning.PreLoRACallback",
    "prelora.integrations.peft.from_peft",
    "prelora.integrations.peft_adapter.save_adapter",
    "prelora.integrations.transformers.PreLoRATrainer",
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocstrings", reason="the docs extra is not installed: pip install 'prelora[docs]'")
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return target


@pytest.fixture(scope="module")
def reference(site):
    return "".join(page.read_text(encoding="utf-8") for page in site.glob("api/*.html"))


def test_the_reference_has_every_public_name(reference):
    assert [name for name in PUBLIC if f'id="{name}"' not in reference] == []


def test_the_reference_shows_what_docstrings_say_of_arguments_results_and_errors(reference):
    for kind in ("Parameters", "Returns", "Raises"):
        assert f'<span class="doc-section-title">{kind}:</span>' in reference
    assert re.search(r"<p>(?:Args|Returns|Raises):", reference) is None


def test_pages_fetch_nothing(site):
    tag = re.compile(
        r"""<(?:script|img|iframe|source)\b[^>]*\bsrc="(?:https?:)?//|<link\b[^>]*\bhref="(?:https?:)?//"""
    )
    pages = {page: page.read_text(encoding="utf-8") for page in site.rglob("*.html")}

    assert len(pages) > 20
    assert [page for page, text in pages.items() if tag.search(text)] == []
    assert [sheet for sheet in site.rglob("*.css") if re.search(r"url\([\"']?(?:https?:)?//", sheet.read_text())] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_outside_of_the_site_lead_to_files(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))

    assert [link for link in links if not (ROOT / link).exists()] == []


class MyViT(nn.Module):
    """What a user's own model may look like."""

    def __init__(self):
        super().__init__()
        attention = nn.ModuleDict({"qkv": nn.Linear(32, 96)})
        mlp = nn.ModuleDict({"up": nn.Linear(32, 64), "down": nn.Linear(64, 32)})
        self.layers = nn.ModuleList([nn.ModuleDict({"attn": attention, "mlp": mlp})])


@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_on_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(targets, "_families", dict(targets._families))
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    model, batches = tiny_vit(), [(images(), labels())]
    given = {
        "torch": torch, "prelora": prelora, "MyViT": MyViT, "model": model, "optimizer": adamw(model.parameters()),
        "criterion": nn.CrossEntropyLoss(), "loader": batches, "micro_batches": batches, "epochs": 2, "mean_loss": 1.0,
    }  # fmt: skip

    exec("\n".join(blocks), given)

    if "pre" in given:
        tiny_vit(seed=1).load_state_dict(torch.load("model.pt"), strict=True)
    if "register_targets" in "".join(blocks):
        assert {target.group for target in prelora.find_targets(MyViT())} == {"q", "k", "v", "mlp_in", "mlp_out"}


def test_the_picture_of_the_phases_shows_the_plans_figures():
    table = (DOCS / "scale.md").read_text(encoding="utf-8")
    picture = (DOCS / "phases.svg").read_text(encoding="utf-8")
    shown = re.findall(r'font-size="13" font-weight="600"[^>]*>([\d.]+)<', picture)

    def row(name):
        cells = next(line for line in table.splitlines() if line.startswith(f"| {name}")).split("|")
        return [float(cells[column]) for column in (2, 4, 7)]  # FULL, and rank 30 in WARMUP and LORA

    held = zip(*(row(name) for name in ("weights", "LoRA", "gradients, in", "AdamW's moments")), strict=True)
    assert shown == [
        *(f"{millions:.2f}" for millions in row("trainable, M")),
        *(f"{sum(items):.2f}" for items in held),
        *(f"{sent:.3f}" for sent in row("all-reduced a step")),
        *(f"{flops:.1f}" for flops in row("GFLOP an image")),
    ]
