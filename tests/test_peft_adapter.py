"""LoRA as a PEFT adapter: block structure, exact paths, modules to save; what PEFT loads is what was meant."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import hf_vit, images, logits, tiny_vit
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from test_peft import with_lora
from torch import nn

from prelora import find_targets, surgery
from prelora.integrations.peft import from_peft, to_peft
from prelora.integrations.peft_adapter import check_loaded, make_adapter, modules_to_save, save_adapter
from prelora.nn import LoRALinear
from prelora.ops.slices import split_b

RANKS = {"q": 2, "k": 4, "v": 8, "attn_out": 3, "mlp_in": 4, "mlp_out": 1}
FAMILIES = {"vit": tiny_vit, "hf vit": hf_vit}


def with_our_lora(family="vit", ranks=RANKS, **options):
    """A model with LoRA that does something, its base frozen."""
    model = FAMILIES[family]() if isinstance(family, str) else family
    targets = find_targets(model)
    surgery.inject(model, targets, {target.name: ranks[target.group] for target in targets}, **options)
    surgery.freeze(model, targets)
    fill(model)
    return model


@torch.no_grad()
def fill(model):
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if surgery.is_lora(name):
            parameter.normal_(0, 0.1, generator=generator)


@torch.no_grad()
def evaluated(model):
    return logits(model.eval(), images())


# One adapter for several slices.

slices = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(slices, st.one_of(st.none(), st.floats(0.25, 32), st.integers(1, 32)), st.integers(1, 8))
def test_any_ranks_and_alpha_of_any_slices_are_the_same_update_in_peft(slices, alpha, in_features):
    rows, ranks = zip(*slices, strict=True)
    layer = LoRALinear(in_features, sum(rows), rank=ranks, rows=rows, alpha=alpha, dtype=torch.float64)
    model = nn.ModuleDict({"a": layer})
    fill(model)

    adapter = make_adapter(model)

    peft_model = get_peft_model(nn.ModuleDict({"a": nn.Linear(in_features, sum(rows)).double()}), adapter.config)
    set_peft_model_state_dict(peft_model, adapter.tensors)
    check_loaded(peft_model, adapter)
    theirs = peft_model.get_base_model()["a"]
    assert theirs.r["default"] == sum(ranks)
    torch.testing.assert_close(theirs.get_delta_weight("default"), layer.delta_weight(), rtol=1e-12, atol=1e-12)
    assert off_blocks(theirs.lora_B["default"].weight, rows, ranks).eq(0).all()


def blocks_of(b, rows, ranks):
    return [block for i, band in enumerate(b.split(rows)) for j, block in enumerate(band.split(ranks, 1)) if i == j]


def off_blocks(b, rows, ranks):
    bands = enumerate(b.split(rows))
    others = [block.flatten() for i, band in bands for j, block in enumerate(band.split(ranks, 1)) if i != j]
    return torch.cat(others) if others else b.new_zeros(1)


def test_slices_of_one_scaling_keep_their_b_bit_for_bit():
    model = with_our_lora()
    layer = model.blocks[0].attn.qkv

    b = make_adapter(model).tensors["base_model.model.blocks.0.attn.qkv.lora_B.weight"]

    pairs = zip(blocks_of(b, layer.rows, layer.rank), split_b(layer.lora_B, layer.rows, layer.rank), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert layer.rank == (2, 4, 8)


# What PEFT makes of it.


@pytest.mark.parametrize("alpha", [None, 8.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_on_the_stock_model_computes_what_ours_does_with_the_planned_ranks(family, alpha, tmp_path):
    model = with_our_lora(family, alpha=alpha)

    save_adapter(model, tmp_path)

    stock = FAMILIES[family](seed=5)
    stock.load_state_dict(load_file(tmp_path / "base.safetensors"), strict=True)
    peft_model = PeftModel.from_pretrained(stock, tmp_path)
    torch.testing.assert_close(evaluated(peft_model), evaluated(model), rtol=1e-4, atol=1e-5)
    realised = {path: m.r["default"] for path, m in stock.named_modules() if hasattr(m, "lora_magnitude_vector")}
    planned = {path: sum(m.rank) for path, m in model.named_modules() if isinstance(m, LoRALinear)}
    assert realised == planned
    assert set(realised.values()) == ({14, 3, 4, 1} if family == "vit" else {2, 4, 8, 3, 1})


def test_an_adapter_comes_in_and_goes_out_of_our_layers_as_it_was_written(tmp_path):
    save_adapter(with_our_lora(alpha=8.0), tmp_path / "first")
    peft_model = loaded(tmp_path / "first")
    expected = evaluated(peft_model)

    to_peft(from_peft(peft_model)).save_pretrained(tmp_path / "second")

    first, second = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    configs = [json.loads((tmp_path / folder / "adapter_config.json").read_text()) for folder in ("first", "second")]
    assert {key for key in configs[0] if configs[0][key] != configs[1][key]} == {"auto_mapping"}  # the model's class
    shutil.copy(tmp_path / "first" / "base.safetensors", tmp_path / "second")
    assert torch.equal(evaluated(loaded(tmp_path / "second")), expected)


def loaded(folder):
    """By PEFT, onto a stock timm ViT with the base beside it."""
    stock = tiny_vit(seed=5)
    stock.load_state_dict(load_file(folder / "base.safetensors"), strict=True)
    return PeftModel.from_pretrained(stock, folder)


def test_peft_trains_what_trained_here_but_for_what_no_module_can_hold(tmp_path):
    model = with_our_lora()
    adapter = save_adapter(model, tmp_path)

    peft_model = PeftModel.from_pretrained(tiny_vit(), tmp_path, is_trainable=True)

    ours = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    theirs = {
        name.removeprefix("base_model.model.").replace(".modules_to_save.default", "").replace(".default.weight", "")
        for name, parameter in peft_model.named_parameters()
        if parameter.requires_grad
    }
    assert adapter.base_only == ("cls_token", "pos_embed")
    assert theirs == ours - {"cls_token", "pos_embed"}


def test_hugging_face_s_embeddings_are_a_module_that_holds_all():
    adapter = make_adapter(with_our_lora("hf vit"))

    assert adapter.base_only == ()
    assert {"vit.embeddings", "vit.layernorm", "classifier"} <= set(adapter.config.modules_to_save)


def test_where_all_else_is_frozen_there_is_nothing_to_save_beside_lora():
    model = with_our_lora()
    surgery.freeze(model, find_targets(tiny_vit()), "all")

    adapter = make_adapter(model)

    assert adapter.config.modules_to_save is None
    assert adapter.base_only == ()
    assert all("lora_" in name for name in adapter.tensors)


# Exact paths.


class Nested(nn.Module):
    """A student and a teacher whose paths end alike, and names that a regular expression reads otherwise."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.xfc = nn.Linear(8, 8)
        self.teacher = nn.ModuleDict({"fc": nn.Linear(8, 8), "a+b": nn.Linear(8, 8), "aab": nn.Linear(8, 8)})
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.xfc(self.fc(x))
        for layer in self.teacher.values():
            x = layer(x)
        return self.head(self.norm(x))


def nested(*paths):
    torch.manual_seed(0)
    model = Nested()
    for rank, path in enumerate(paths, 1):
        model.set_submodule(path, LoRALinear.from_linear(model.get_submodule(path), rank))
        model.get_submodule(path).weight.requires_grad_(False)
    fill(model)
    return model


@pytest.mark.parametrize(
    "paths", [["fc"], ["teacher.fc"], ["fc", "teacher.fc"], ["teacher.a+b"], ["teacher.aab", "xfc"]]
)
def test_a_path_that_others_end_in_or_that_reads_as_a_pattern_matches_itself_alone(paths, tmp_path):
    model = nested(*paths)
    adapter = save_adapter(model, tmp_path, trained=())

    stock = Nested()
    stock.load_state_dict(load_file(tmp_path / "base.safetensors"))
    peft_model = PeftModel.from_pretrained(stock, tmp_path)

    check_loaded(peft_model, adapter)
    assert adapter.ranks == {path: rank for rank, path in enumerate(paths, 1)}
    x = torch.randn(3, 8)
    torch.testing.assert_close(peft_model(x), model.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("trained", "modules", "base_only"),
    [
        (["norm.weight", "norm.bias"], ["norm"], ()),
        (["norm.weight"], [], ("norm.weight",)),  # PEFT would train the bias, too
        (["head.weight", "head.bias", "fc.lora_A"], ["head"], ()),
        (["fc.weight", "fc.bias"], [], ()),  # what LoRA stands on
        (["xfc.weight", "xfc.bias"], ["xfc"], ()),
    ],
)
def test_a_module_is_saved_if_all_of_it_trained(trained, modules, base_only):
    assert modules_to_save(nested("fc"), set(trained)) == (modules, base_only)


def test_a_module_whose_name_others_end_in_is_left_to_the_base():
    trained = {"fc.weight", "fc.bias"}  # PEFT would take xfc and teacher.fc for it, too

    assert modules_to_save(nested("teacher.aab"), trained) == ([], ("fc.weight", "fc.bias"))


def test_modules_whose_names_end_alike_are_saved_if_all_of_them_trained():
    trained = {f"{path}.{part}" for path in ("fc", "xfc", "teacher.fc") for part in ("weight", "bias")}

    modules, base_only = modules_to_save(nested("teacher.aab"), trained)

    assert sorted(modules) == ["fc", "teacher.fc", "xfc"]
    assert base_only == ()


def test_a_module_whose_name_as_a_pattern_would_hide_lora_from_peft_is_left_to_the_base():
    trained = {"teacher.a+b.weight", "teacher.a+b.bias"}

    assert modules_to_save(nested("teacher.aab"), trained) == ([], ("teacher.a+b.weight", "teacher.a+b.bias"))
    assert modules_to_save(nested("teacher.fc"), trained) == (["teacher.a+b"], ())


# What is refused.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model.fc, "dropout", 0.5), r"layers of dropout \[0.0, 0.5\]: a LoraConfig has one"),
        (
            lambda model: setattr(model.head, "weight", model.fc.weight),
            r"fc shares a parameter \(.*head.weight\): untie",
        ),
        (lambda model: surgery.strip(model), r"the model has no LoRA layers, so there is no adapter to write"),
    ],
)
def test_what_peft_cannot_hold_is_refused(change, message):
    model = nested("fc", "xfc")
    change(model)

    with pytest.raises(ValueError, match=message):
        make_adapter(model)


def test_a_sharded_model_is_refused(tmp_path):
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = fully_shard(nested("fc"))
        with pytest.raises(ValueError, match=r"sharded over ranks, .*: export the run's checkpoint \(prelora export\)"):
            save_adapter(model, tmp_path / "adapter")
    finally:
        torch.distributed.destroy_process_group()
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: layer.r.update(default=7), r"PEFT realised rank 7 at blocks.0.attn.qkv, planned 4"),
        (lambda layer: nn.init.ones_(layer.lora_A["default"].weight), r"other numbers into .*blocks.0.attn.qkv.lora_A"),
        (
            lambda layer: layer.lora_A.clear(),
            r"PEFT's tensors are others than the adapter's: .*blocks.0.attn.qkv.lora_A",
        ),
    ],
)
def test_what_peft_loads_otherwise_is_noticed(change, message, tmp_path):
    adapter = save_adapter(from_peft(with_lora(modules_to_save=None)), tmp_path)
    peft_model = PeftModel.from_pretrained(tiny_vit(), tmp_path)
    check_loaded(peft_model, adapter)

    change(peft_model.get_base_model().blocks[0].attn.qkv)

    with pytest.raises(ValueError, match=message):
        check_loaded(peft_model, adapter)


# The example.


def test_the_example_runs_through_all_three_phases_and_back(tmp_path, capsys):
    script = Path(__file__).parents[1] / "examples" / "peft_roundtrip.py"

    runpy.run_path(str(script))["main"](tmp_path)

    printed = capsys.readouterr().out.splitlines()
    phases = [line.split()[2] for line in printed if line.startswith("epoch")]
    assert phases == ["full,", "warmup,", "warmup,", "lora,", "lora,", "lora,"]
    assert printed[-1] == f"saved by PEFT in {tmp_path}, and loaded: the same logits"
