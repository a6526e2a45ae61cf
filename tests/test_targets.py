"""Targets are found by exact path and row slice, and nothing that cannot carry LoRA passes for one."""

import re

import models
import pytest
import torch
from torch import nn

import prelora.targets
from prelora import Target, TargetError, find_targets, register_targets
from prelora.ranks import LayerShape
from prelora.targets import by_group, by_module, target_shape

SIX = ["q", "k", "v", "attn_out", "mlp_in", "mlp_out"]


@pytest.fixture
def registry(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(prelora.targets, "_families", dict(prelora.targets._families))


def timm_targets(depth, width):
    """The six groups of a timm ViT, written out."""
    thirds = {"q": (0, width), "k": (width, 2 * width), "v": (2 * width, 3 * width)}
    whole = {"attn_out": "attn.proj", "mlp_in": "mlp.fc1", "mlp_out": "mlp.fc2"}
    return (
        *(Target(f"blocks.{i}.attn.qkv", group, i, rows) for group, rows in thirds.items() for i in range(depth)),
        *(Target(f"blocks.{i}.{path}", group, i) for group, path in whole.items() for i in range(depth)),
    )


def hf_targets(depth, paths):
    return tuple(Target(path.format(i), group, i) for group, path in paths.items() for i in range(depth))


HF_5 = {
    "q": "layers.{}.attention.q_proj",
    "k": "layers.{}.attention.k_proj",
    "v": "layers.{}.attention.v_proj",
    "attn_out": "layers.{}.attention.o_proj",
    "mlp_in": "layers.{}.mlp.fc1",
    "mlp_out": "layers.{}.mlp.fc2",
}
HF_4 = {
    "q": "encoder.layer.{}.attention.attention.query",
    "k": "encoder.layer.{}.attention.attention.key",
    "v": "encoder.layer.{}.attention.attention.value",
    "attn_out": "encoder.layer.{}.attention.output.dense",
    "mlp_in": "encoder.layer.{}.intermediate.dense",
    "mlp_out": "encoder.layer.{}.output.dense",
}


def tree(paths, leaf=lambda: nn.Linear(4, 4)):
    """A module tree with a Linear at every path; numbered children stand in a ModuleList."""
    children: dict[str, list[str]] = {}
    for path in paths:
        head, _, tail = path.partition(".")
        children.setdefault(head, []).extend([tail] if tail else [])
    built = {name: tree(below, leaf) if below else leaf() for name, below in children.items()}
    module = nn.ModuleList(built.values()) if all(name.isdigit() for name in built) else nn.Module()
    if not isinstance(module, nn.ModuleList):
        for name, child in built.items():
            module.add_module(name, child)
    return module


@pytest.mark.parametrize(
    ("name", "depth", "width"),
    [
        ("vit_tiny_patch16_224", 12, 192),
        ("vit_large_patch16_224", 24, 1024),
        ("deit_tiny_distilled_patch16_224", 12, 192),
        ("deit3_small_patch16_224", 12, 384),
    ],
)
def test_a_timm_vit_has_six_groups_with_qkv_in_three_row_slices(name, depth, width):
    assert find_targets(models.meta(name)) == timm_targets(depth, width)


@pytest.mark.parametrize("family", ["vit", "vit without qkv bias", "vit with layer scale", "deit"])
def test_every_timm_variant_has_the_same_targets(family):
    assert find_targets(models.FAMILIES[family]()) == timm_targets(3, 64)


def test_transformers_vit_for_classification_has_its_targets_below_vit():
    expected = hf_targets(3, {group: f"vit.{path}" for group, path in HF_5.items()})

    assert find_targets(models.hf_vit()) == expected


def test_transformers_vit_model_has_the_same_targets_without_the_prefix():
    assert find_targets(models.hf_vit().vit) == hf_targets(3, HF_5)


@pytest.mark.parametrize(("cls", "prefix"), [("ViTModel", ""), ("ViTForImageClassification", "vit.")])
def test_transformers_4_naming_is_known_too(cls, prefix):
    targets = hf_targets(2, {group: prefix + path for group, path in HF_4.items()})
    model = tree([target.path for target in targets])
    model.__class__ = type(cls, (nn.Module,), {"__module__": "transformers.models.vit.modeling_vit"})

    assert find_targets(model) == targets


@pytest.mark.parametrize("family", models.FAMILIES)
def test_head_patch_embedding_and_pooler_are_never_targets(family):
    model = models.FAMILIES[family]()
    linears = {name for name, module in model.named_modules() if type(module) is nn.Linear}

    left = linears - {target.path for target in find_targets(model)}

    assert left == {"deit": {"head", "head_dist"}, "hf vit": {"classifier"}}.get(family, {"head"})


def test_the_pooler_is_no_target():
    from transformers import ViTConfig, ViTModel

    model = ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))

    assert find_targets(model) == hf_targets(1, HF_5)
    assert isinstance(model.pooler.dense, nn.Linear)


def test_the_papers_preset_joins_both_outputs_to_one_group():
    groups = by_group(find_targets(models.tiny_vit(), "paper"))

    paths = {group: [target.path for target in members] for group, members in groups.items()}
    assert paths == {
        **{name: [f"blocks.{i}.attn.qkv" for i in range(3)] for name in ("query", "key", "value")},
        "output": [*(f"blocks.{i}.attn.proj" for i in range(3)), *(f"blocks.{i}.mlp.fc2" for i in range(3))],
        "dense": [f"blocks.{i}.mlp.fc1" for i in range(3)],
    }
    assert [target.layer for target in groups["output"]] == [0, 1, 2, 3, 4, 5]


def test_names_are_unique_and_a_slice_says_its_group():
    targets = find_targets(models.tiny_vit())

    assert len({target.name for target in targets}) == len(targets) == 18
    assert [targets[0].name, targets[9].name] == ["blocks.0.attn.qkv[q]", "blocks.0.attn.proj"]


def test_a_slices_shape_is_that_of_its_rows():
    model = models.tiny_vit()
    shapes = [target_shape(model, target) for target in find_targets(model)]

    assert shapes == [LayerShape(64, 64)] * 12 + [LayerShape(64, 256)] * 3 + [LayerShape(256, 64)] * 3


def test_by_module_puts_slices_in_row_order():
    shuffled = [Target("a", "v", 0, (4, 6)), Target("b", "q", 0), Target("a", "q", 0, (0, 4))]

    assert by_module(shuffled) == {"a": [shuffled[2], shuffled[0]], "b": [shuffled[1]]}


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("fc", ["fc"]),
        ("layers.*", ["layers.0", "layers.1"]),
        ("blocks.*.mlp.*.fc", [f"blocks.{i}.mlp.{j}.fc" for i in range(2) for j in range(2)]),
    ],
)
def test_a_star_stands_for_every_index(pattern, paths):
    found = find_targets(tree(paths), {"g": pattern})

    assert found == tuple(Target(path, "g", i) for i, path in enumerate(paths))


def test_a_star_may_come_first():
    assert find_targets(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), {"g": "*"}) == (
        Target("0", "g", 0),
        Target("1", "g", 1),
    )


def test_a_group_may_have_several_patterns():
    found = find_targets(tree(["a", "b"]), {"g": ["b", "a"]})

    assert found == (Target("b", "g", 0), Target("a", "g", 1))


def test_explicit_targets_are_taken_as_they_are():
    targets = [Target("fc", "low", 7, (0, 1)), Target("fc", "high", 3, (1, 4))]

    assert find_targets(tree(["fc"]), targets) == tuple(targets)


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(4, 4)}) for _ in range(3))
        self.head = nn.Linear(4, 2)


def test_an_unknown_models_error_shows_how_to_register_it_and_lists_its_linears():
    with pytest.raises(TargetError) as caught:
        find_targets(Unknown())

    message = str(caught.value)
    assert "prelora.register_targets(Unknown, {'q': " in message
    assert message.endswith("Its Linear layers: layers.*.fc, head")
    assert "timm.models.vision_transformer.VisionTransformer" in message


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("key", [Unknown, f"{__name__}.Unknown"], ids=["class", "name"])
def test_a_registered_family_is_known_and_inherited(key):
    register_targets(key, {"in": "layers.*.fc"})

    expected = tuple(Target(f"layers.{i}.fc", "in", i) for i in range(3))
    assert find_targets(Unknown()) == find_targets(type("Child", (Unknown,), {})()) == expected


@pytest.mark.usefixtures("registry")
def test_the_first_registered_layout_that_fits_is_taken():
    register_targets(Unknown, {"in": "layers.*.gone"}, {"in": "head"}, {"in": "layers.*.fc"})

    assert find_targets(Unknown()) == (Target("head", "in", 0),)


@pytest.mark.usefixtures("registry")
def test_a_model_without_its_familys_layout_says_what_each_misses():
    register_targets(Unknown, {"in": "layers.*.gone"}, {"in": "nowhere.*.fc"})

    with pytest.raises(TargetError, match=r"'layers\.0\.gone' matches no module.*/.*there is no 'nowhere'.*targets="):
        find_targets(Unknown())


@pytest.mark.parametrize("layouts", [(), ({},), ({"q": "a"}, {})])
def test_registering_nothing_is_refused(layouts):
    with pytest.raises(ValueError, match=r"register_targets\(a\.B\): give at least one layout"):
        register_targets("a.B", *layouts)


def fused(*spans):
    return [Target("fc", f"g{i}", 0, span) for i, span in enumerate(spans)]


def tied():
    model = tree(["fc", "other"])
    model.other.weight = model.fc.weight
    return model


def tied_bias():
    model = tree(["fc", "other"])
    model.other.bias = model.fc.bias
    return model


def integer():
    model = tree(["fc"])
    model.fc.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return model


def weight_norm():
    model = tree(["fc"])
    del model.fc._parameters["weight"]
    model.fc.weight = torch.ones(4, 4)
    return model


class TransformersOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(4, 2)


@pytest.mark.parametrize(
    ("model", "targets", "message"),
    [
        (lambda: tree(["fc"]), "papers", "targets = 'papers': accepted are None, 'paper'"),
        (lambda: tree(["fc"]), [], "targets is empty"),
        (lambda: tree(["fc"]), {}, "targets is empty"),
        (lambda: tree(["fc"]), {"q": "fc[3/2"}, "target pattern 'fc[3/2': accepted is"),
        (
            lambda: tree(["a.fc"]),
            {"q": "b.fc"},
            "'b.fc' matches no module; Linear layers with a like name: a.fc",
        ),
        (lambda: tree(["a.fc"]), {"q": "module.a.fc"}, "target 'module.a.fc' matches no module"),
        (lambda: tree(["a.fc"]), {"q": "fc"}, "target 'fc' matches no module"),
        (lambda: tree(["fc"]), {"q": "layers.*.fc"}, "there is no 'layers'"),
        (lambda: tree(["fc.in"]), {"q": "fc.*.in"}, "'fc' has no numbered children"),
        (lambda: tree(["l.0.fc", "l.1.odd"]), {"q": "l.*.fc"}, "target 'l.1.fc' matches no module"),
        (lambda: tree(["fc"]), {"q": "fc", "k": "fc"}, "target 'fc' is matched more than once: q, k"),
        (lambda: tree(["fc"]), {"q": ["fc", "fc"]}, "target 'fc' is matched more than once: q, q"),
        (lambda: tree(["fc"]), {"q": ["fc[0/2]", "fc[1/2]"]}, "in groups ['q', 'q']; each needs a group of its own"),
        (lambda: tree(["fc"]), {"q": "fc[0/3]"}, "target 'fc[0/3]': 4 rows have no slice 0 of 3"),
        (lambda: tree(["fc"]), {"q": "fc[2/2]"}, "target 'fc[2/2]': 4 rows have no slice 2 of 2"),
        (lambda: tree(["fc"]), {"q": "fc[0/2]"}, "target 'fc': slices [(0, 2)] must cover its 4 rows exactly"),
        (lambda: tree(["fc"]), fused((0, 2), (3, 4)), "slices [(0, 2), (3, 4)] must cover"),
        (lambda: tree(["fc"]), fused((0, 3), (2, 4)), "slices [(0, 3), (2, 4)] must cover"),
        (lambda: tree(["fc"]), fused((1, 2), (2, 4)), "slices [(1, 2), (2, 4)] must cover"),
        (lambda: tree(["fc"]), fused((0, 2), (2, 5)), "slices [(0, 2), (2, 5)] must cover"),
        (lambda: tree(["fc"]), fused((0, 0), (0, 4)), "slices [(0, 0), (0, 4)] must cover"),
        (lambda: tree(["fc"]), fused((0, 6), (6, 4)), "slices [(0, 6), (6, 4)] must cover"),
        (lambda: tree(["fc"]), fused(None, (0, 2)), "must cover its 4 rows exactly, without overlap"),
        (TransformersOut, {"q": "attn.out_proj"}, "'attn.out_proj' is a torch.nn.modules.linear.NonDynamically"),
        (
            lambda: tree(["fc"], lambda: nn.Conv1d(4, 4, 1)),
            {"q": "fc"},
            "'fc' is a torch.nn.modules.conv.Conv1d",
        ),
        (tied, {"q": "fc"}, "target 'fc' shares a parameter with others (fc.weight, other.weight)"),
        (tied_bias, {"q": "fc"}, "target 'fc' shares a parameter with others (fc.bias, other.bias)"),
        (integer, {"q": "fc"}, "target 'fc' has a torch.int8 weight"),
        (weight_norm, {"q": "fc"}, "target 'fc' computes its weight"),
    ],
)
def test_what_cannot_be_a_target_is_one_error_naming_it(model, targets, message):
    with pytest.raises(TargetError, match=re.escape(message)):
        find_targets(model(), targets)


def test_a_block_repeated_in_a_list_is_refused():
    block = nn.ModuleDict({"fc": nn.Linear(4, 4)})

    with pytest.raises(TargetError, match="shares a parameter"):
        find_targets(nn.Sequential(block, block), {"q": "*.fc"})
