"""Surgery leaves the function as it was, does exactly what the plan says, and gives a plain model back."""

import copy

import models
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prelora import PreLoRA, PreLoRAConfig, Target, TargetError, find_targets, surgery
from prelora.controller import parameter_counts
from prelora.nn import LoRALinear
from prelora.surgery import freeze, inject, is_lora, merged_state_dict, realised_ranks, strip


def plan(targets):
    """Unequal ranks, so that no two neighbours could be swapped unnoticed."""
    return {target.name: 1 + i % 5 for i, target in enumerate(targets)}


def injected(family="vit", **options):
    model = models.FAMILIES[family]()
    targets = find_targets(model)
    inject(model, targets, plan(targets), **options)
    return model, targets


def trained(family="vit", **options):
    """Injected, and with a B that is not zero."""
    model, targets = injected(family, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_lora(name):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model, targets


@pytest.fixture(params=models.FAMILIES)
def family(request):
    return request.param


@pytest.mark.parametrize("training", [False, True])
def test_injection_leaves_the_logits_bit_equal(family, training):
    model, x = models.FAMILIES[family]().train(training), models.images()
    before = models.logits(model, x)

    targets = find_targets(model)
    inject(model, targets, plan(targets))

    assert torch.equal(models.logits(model, x), before)
    assert before.any()


def test_injection_leaves_the_gradients_as_they_were():
    model, x, y = models.tiny_vit(), models.images(), models.labels()
    F.cross_entropy(model(x), y).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    targets = find_targets(model)
    inject(model, targets, plan(targets))
    F.cross_entropy(model(x), y).backward()

    grads = {name: p.grad for name, p in model.named_parameters()}
    for name, grad in before.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6 * float(grad.abs().max()))
    # B is zero: it has a gradient from the first step on, and A only from the second.
    assert all(grads[name].any() == name.endswith("lora_B") for name in grads if is_lora(name))


def test_the_realised_ranks_are_the_plans(family):
    model, targets = injected(family)

    assert realised_ranks(model, targets) == plan(targets)
    for target in targets:
        layer = model.get_submodule(target.path)
        assert type(layer) is LoRALinear
        assert layer.lora_A.shape == (sum(layer.rank), layer.in_features)


def test_a_slices_rank_is_that_of_its_own_rows():
    model = models.tiny_vit()
    targets = find_targets(model)
    inject(model, targets[::-1], {target.name: {"q": 2, "k": 3, "v": 5}.get(target.group, 1) for target in targets})

    layer = model.blocks[1].attn.qkv
    assert (layer.rank, layer.rows) == ((2, 3, 5), (64, 64, 64))


def test_the_new_parameters_are_named_with_the_weights_that_they_adapt(family):
    model = models.FAMILIES[family]()
    before, targets = dict(model.named_parameters()), find_targets(model)

    added = inject(model, targets, plan(targets))

    after = dict(model.named_parameters())
    assert set(after) - set(before) == set(added)
    assert added == {f"{t.path}.lora_{part}": f"{t.path}.weight" for t in targets for part in "AB"}
    assert all(after[name] is parameter for name, parameter in before.items())


def test_alpha_and_dropout_reach_every_layer():
    model, targets = injected(alpha=6.0, dropout=0.2)

    layers = [model.get_submodule(target.path) for target in targets]
    assert all((layer.dropout, layer.scaling[0]) == (0.2, 6.0 / layer.rank[0]) for layer in layers)


@pytest.mark.parametrize("change", ["another", "missing", "extra"])
def test_a_plan_for_other_layers_is_refused_before_anything_changes(change):
    model = models.tiny_vit()
    targets = find_targets(model)
    ranks = plan(targets)
    if change != "extra":
        del ranks["blocks.0.mlp.fc1"]
    if change != "missing":
        ranks["module.blocks.0.mlp.fc1"] = 4

    with pytest.raises(ValueError, match=r"plan and targets differ in .*blocks\.0\.mlp\.fc1"):
        inject(model, targets, ranks)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_injecting_twice_is_refused():
    model, targets = injected()

    with pytest.raises(RuntimeError, match=r"blocks\.0\.attn\.qkv carries LoRA already"):
        inject(model, targets, plan(targets))


def test_a_is_drawn_from_seed_and_path_alone():
    model, targets = injected(seed=1)
    torch.manual_seed(1234)
    other = models.tiny_vit(seed=9)
    inject(other, targets[::-1], plan(targets), seed=1)

    for target in targets:
        assert torch.equal(model.get_submodule(target.path).lora_A, other.get_submodule(target.path).lora_A)


def test_every_seed_and_path_has_an_a_of_its_own():
    drawn = [
        model.get_submodule(f"blocks.{i}.attn.proj").lora_A[0, 0].item()
        for model, _ in (injected(seed=0), injected(seed=1))
        for i in range(3)
    ]

    assert len(set(drawn)) == 6


def test_the_stream_is_the_same_in_every_process_and_release():
    assert surgery.stream(0, "blocks.0.attn.qkv") == 500484467788002459


def test_injection_moves_no_global_random_state():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    injected()

    assert torch.equal(torch.get_rng_state(), before)


def test_injection_that_changed_the_function_is_an_error(monkeypatch):
    monkeypatch.setattr(LoRALinear, "reset_lora_parameters", lambda layer, *_: nn.init.ones_(layer.lora_B))

    with pytest.raises(RuntimeError, match=r"blocks\.0\.attn\.qkv: injection changed the function"):
        injected()


def test_a_rank_that_was_not_realised_is_an_error(monkeypatch):
    original = LoRALinear.from_linear
    monkeypatch.setattr(LoRALinear, "from_linear", lambda linear, ranks, **kw: original(linear, [8] * len(ranks), **kw))

    with pytest.raises(RuntimeError, match=r"blocks\.0\.attn\.qkv\[q\]: realised rank 8, planned 1"):
        injected()


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_parameters_not_of_the_layers_ranks_are_an_error(part):
    model, targets = injected()
    setattr(model.blocks[2].mlp.fc1, part, nn.Parameter(torch.zeros(7, 64)))

    with pytest.raises(RuntimeError, match=r"blocks\.2\.mlp\.fc1: A .* is not of ranks"):
        realised_ranks(model, targets)


def test_there_are_no_realised_ranks_without_lora():
    model = models.tiny_vit()

    assert realised_ranks(model, find_targets(model)) == {}


@pytest.mark.parametrize("scope", ["targets", "all"])
def test_freezing_stops_exactly_its_scope(family, scope):
    model, targets = injected(family)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    names = {name for name, _ in model.named_parameters()}
    base = {f"{target.path}.{part}" for target in targets for part in ("weight", "bias")} & names
    expected = base if scope == "targets" else {name for name in names if not name.endswith(("lora_A", "lora_B"))}

    frozen = freeze(model, targets, scope)

    assert set(frozen) == expected
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == expected
    assert {name for name, p in model.named_parameters() if p.grad is None} == expected


def test_freezing_again_or_what_never_trained_is_no_news():
    model, targets = injected()
    model.blocks[0].mlp.fc1.weight.requires_grad_(False)

    assert "blocks.0.mlp.fc1.weight" not in freeze(model, targets)
    assert freeze(model, targets) == []


def test_freezing_before_injecting_is_refused_before_anything_changes():
    model = models.tiny_vit()

    with pytest.raises(RuntimeError, match=r"blocks\.0\.attn\.qkv carries no LoRA: inject\(\) before freeze\(\)"):
        freeze(model, find_targets(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("merged", [False, True])
def test_the_merged_state_dict_makes_a_stock_model_of_the_same_function(family, merged):
    model, targets = trained(family, alpha=3.0)
    x, stock = models.images(), models.FAMILIES[family](seed=7)
    expected = models.logits(model.eval(), x)
    if merged:
        model.get_submodule(targets[0].path).merge()

    state = merged_state_dict(model)
    stock.load_state_dict(state, strict=True)

    assert not any(tensor.requires_grad for tensor in state.values())
    torch.testing.assert_close(models.logits(stock.eval(), x), expected, rtol=0, atol=1e-5)
    # The update is far above the tolerance: the test would see it missing.
    stock.load_state_dict({name: t for name, t in model.state_dict().items() if not is_lora(name)})
    assert (models.logits(stock, x) - expected).abs().max() > 1e-2


def test_the_merged_state_dict_leaves_the_model_alone():
    model, _ = trained()
    before = copy.deepcopy(model.state_dict())
    merged_state_dict(model)

    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_merged_state_dict_of_a_single_layer_is_that_of_its_linear():
    layer = LoRALinear(6, 4, rank=2)
    nn.init.ones_(layer.lora_B)

    state = merged_state_dict(layer)

    assert set(state) == {"weight", "bias"}
    assert torch.equal(state["weight"], layer.merged_weight())


def test_strip_gives_plain_linears_of_the_same_function(family):
    model, targets = trained(family)
    x = models.images()
    expected, paths = models.logits(model.eval(), x), list(dict.fromkeys(target.path for target in targets))

    stripped = strip(model)

    assert sorted(stripped) == sorted(paths)
    assert {type(model.get_submodule(path)) for path in paths} == {nn.Linear}
    assert list(model.state_dict()) == list(models.FAMILIES[family]().state_dict())
    torch.testing.assert_close(models.logits(model, x), expected, rtol=0, atol=1e-5)


def test_vit_large_at_rank_64_trains_30_43_of_304_33_million():
    model = models.meta("vit_large_patch16_224")
    targets = find_targets(model)
    inject(model, targets, dict.fromkeys((target.name for target in targets), 64))
    freeze(model, targets, "targets")

    trainable, total = parameter_counts(model)

    assert f"{trainable / 1e6:.2f} of {total / 1e6:.2f} M, {trainable / total:.2%}" == "30.43 of 304.33 M, 10.00%"


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scope", ["targets", "all"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_frozen_weights_are_bit_identical_after_any_steps(optimizer, scope, set_to_none):
    model = models.tiny_vit()
    config = PreLoRAConfig(k=2, m=1, tau=1e6, zeta=1e6, r_min=2, r_max=8, warmup_epochs=1, freeze=scope)
    pre = PreLoRA(model, OPTIMIZERS[optimizer](model.parameters()), config)

    def steps(count):
        for _ in range(count):
            F.cross_entropy(pre.model(models.images(4)), models.labels(4)).backward()
            pre.optimizer.step()
            pre.optimizer.zero_grad(set_to_none=set_to_none)

    while pre.phase != "lora":
        steps(2)
        pre.end_epoch(1.0)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    training = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    steps(3)

    after = dict(model.named_parameters())
    assert "blocks.0.attn.qkv.weight" in frozen
    assert all(torch.equal(after[name], value) and after[name].grad is None for name, value in frozen.items())
    assert not any(torch.equal(after[name], value) for name, value in training.items())


def test_a_target_that_is_gone_is_an_error():
    model = models.tiny_vit()
    targets = [*find_targets(model), Target("blocks.3.mlp.fc1", "mlp_in", 3)]

    with pytest.raises(TargetError, match=r"'blocks\.3\.mlp\.fc1' matches no module"):
        inject(model, targets, plan(targets))


def test_lora_fa_freezes_every_a_with_the_base():
    model = models.tiny_vit()
    targets = find_targets(model)
    inject(model, targets, plan(targets))

    frozen = freeze(model, targets, train_lora_a=False)

    adapters = {name: p.requires_grad for name, p in model.named_parameters() if is_lora(name)}
    assert all(trains == name.endswith("lora_B") for name, trains in adapters.items())
    assert {name for name in adapters if name.endswith("lora_A")} <= set(frozen)


# Layers that the plan leaves without LoRA.


def test_a_plan_of_zeros_injects_nothing_and_freezes_all_targets(family):
    model, x = models.FAMILIES[family](), models.images()
    before, names = models.logits(model, x), [name for name, _ in model.named_parameters()]
    targets = find_targets(model)
    zeros = dict.fromkeys((target.name for target in targets), 0)

    added = inject(model, targets, zeros)
    frozen = freeze(model, targets, without_lora=set(zeros))

    assert added == {}
    assert [name for name, _ in model.named_parameters()] == names
    assert {f"{target.path}.weight" for target in targets} <= set(frozen)
    assert torch.equal(models.logits(model, x), before)


def test_a_linear_of_which_only_some_slices_have_rank_zero_is_refused():
    model = models.tiny_vit()
    targets = find_targets(model)
    ranks = {target.name: 0 if target.group == "q" else 2 for target in targets}

    with pytest.raises(ValueError, match="every rank must be at least 1"):
        inject(model, targets, ranks)


def test_a_layer_of_rank_zero_stays_a_linear_beside_those_with_lora():
    model = models.tiny_vit()
    targets = find_targets(model)
    ranks = {target.name: 0 if target.group == "mlp_in" else 2 for target in targets}

    inject(model, targets, ranks)

    kinds = {target.group: type(model.get_submodule(target.path)) for target in targets}
    assert kinds.pop("mlp_in") is nn.Linear
    assert set(kinds.values()) == {LoRALinear}
    assert realised_ranks(model, targets) == {name: rank for name, rank in ranks.items() if rank}
