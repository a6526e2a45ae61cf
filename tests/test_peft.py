"""PEFT's LoRA layers as LoRALinear and back: the same parameters, the same function, nothing lost on the way."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from models import hf_vit, images, labels, logits, tiny_vit
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraVariant
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from prelora.integrations.peft import from_peft, to_peft
from prelora.nn import LoRALinear

TARGETS = {"vit": ["qkv", "fc1"], "hf vit": ["q_proj", "fc1"]}
MODELS = {"vit": tiny_vit, "hf vit": hf_vit}


def lora_config(family="vit", **fields):
    """Ranks and alphas that differ between layers, a head that trains along."""
    head = "head" if family == "vit" else "classifier"
    return LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 6,
            "target_modules": TARGETS[family],
            "rank_pattern": {"fc1": 3},
            "alpha_pattern": {"fc1": 5},
            "modules_to_save": [head],
        }
        | fields
    )


def with_lora(family="vit", seed=0, **fields):
    """A PeftModel whose B is not zero; the same every time."""
    model = get_peft_model(MODELS[family](), lora_config(family, **fields))
    randomise(model, seed)
    return model


def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1, generator=generator)


def layers_of(model, kind):
    return {path: module for path, module in model.named_modules() if isinstance(module, kind)}


@torch.no_grad()
def evaluated(model):
    return logits(model.eval(), images())


def files(model, folder):
    """What PEFT saves: the adapter's bytes and its config."""
    model.save_pretrained(folder)
    return (folder / "adapter_model.safetensors").read_bytes(), json.loads((folder / "adapter_config.json").read_text())


# There.


@pytest.mark.parametrize("family", MODELS)
def test_the_function_stays_the_same(family):
    peft_model = with_lora(family)
    before = evaluated(peft_model)
    with peft_model.disable_adapter():
        assert (before - evaluated(peft_model)).abs().max() > 1e-2  # LoRA does something

    model = from_peft(peft_model)

    torch.testing.assert_close(evaluated(model), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", MODELS)
def test_every_lora_linear_becomes_ours_with_its_own_rank_alpha_and_dropout(family):
    peft_model = with_lora(family, lora_dropout=0.25)
    wrapped = layers_of(peft_model.get_base_model(), PeftLinear)

    model = from_peft(peft_model)

    ours = layers_of(model, LoRALinear)
    assert ours.keys() == wrapped.keys()
    assert len(ours) == 6
    assert not layers_of(model, PeftLinear)
    for path, layer in ours.items():
        assert (layer.rank, layer.alpha) == (((3,), 5) if "fc1" in path else ((4,), 6)), path
        assert layer.scaling == (wrapped[path].scaling["default"],)
        assert layer.dropout == 0.25


def test_no_parameter_is_copied():
    peft_model = with_lora()
    before = {id(parameter): parameter.requires_grad for parameter in peft_model.parameters()}

    model = from_peft(peft_model)

    assert {id(parameter): parameter.requires_grad for parameter in model.parameters()} == before


def test_an_optimizer_from_before_trains_on_as_peft_would():
    def step(model, optimizer):
        for _ in range(3):
            F.cross_entropy(logits(model.train(), images(4)), labels(4)).backward()
            optimizer.step()
            optimizer.zero_grad()

    theirs, peft_model = with_lora(), with_lora()
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad]) for m in (theirs, peft_model)]

    ours = from_peft(peft_model)
    step(theirs, optimizers[0])
    step(ours, optimizers[1])

    torch.testing.assert_close(evaluated(ours), evaluated(theirs), rtol=1e-4, atol=1e-5)
    before = with_lora().get_base_model().blocks[0].attn.qkv.lora_A["default"].weight
    assert not torch.equal(ours.blocks[0].attn.qkv.lora_A, before)


def test_conversion_draws_no_random_number():
    peft_model = with_lora()
    state = torch.get_rng_state()

    from_peft(peft_model)

    assert torch.equal(torch.get_rng_state(), state)


def test_hooks_of_the_base_layer_go_along():
    peft_model = with_lora()
    seen = []
    handle = peft_model.get_base_model().blocks[0].mlp.fc1.base_layer.register_forward_hook(lambda *_: seen.append(1))

    evaluated(from_peft(peft_model))
    handle.remove()

    assert seen == [1]


def test_adapters_in_fp32_on_a_bf16_base_compute_the_same():
    peft_model = get_peft_model(tiny_vit().bfloat16(), lora_config(modules_to_save=None))
    randomise(peft_model)
    layer = peft_model.get_base_model().blocks[0].mlp.fc1
    assert (layer.lora_A["default"].weight.dtype, layer.base_layer.weight.dtype) == (torch.float32, torch.bfloat16)
    x = images(dtype=torch.bfloat16)
    before = peft_model.eval()(x)

    after = from_peft(peft_model).eval()(x)

    assert (after - before).abs().max() <= 0.05 * before.abs().max()


# And back.


@pytest.mark.parametrize("family", MODELS)
def test_out_in_and_out_again_is_the_same_bit_for_bit(family, tmp_path):
    files(with_lora(family, lora_dropout=0.1), tmp_path / "first")
    peft_model = PeftModel.from_pretrained(MODELS[family](), tmp_path / "first", is_trainable=True)
    before, before_config = files(peft_model, tmp_path / "second")
    parameters, logits_before = list(map(id, peft_model.parameters())), evaluated(peft_model)

    back = to_peft(from_peft(peft_model))

    assert back is peft_model
    after, after_config = files(back, tmp_path / "third")
    assert after == before == (tmp_path / "first" / "adapter_model.safetensors").read_bytes()
    assert after_config == before_config
    assert list(map(id, back.parameters())) == parameters
    assert torch.equal(evaluated(back), logits_before)


def test_what_was_trained_in_between_is_saved(tmp_path):
    peft_model = with_lora()
    model = from_peft(peft_model)
    F.cross_entropy(model(images()), labels()).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    trained = evaluated(model)

    to_peft(model).save_pretrained(tmp_path)

    again = PeftModel.from_pretrained(tiny_vit(), tmp_path)
    torch.testing.assert_close(evaluated(again), trained, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model(images()),
        lambda model: model.state_dict(),
        lambda model: list(model.parameters()),
        lambda model: model.train(),
        lambda model: model.disable_adapter().__enter__(),
        lambda model: model.merge_and_unload(),
        lambda model: model.save_pretrained("nowhere"),
        lambda model: from_peft(model),
    ],
)
def test_the_peft_model_raises_in_between(use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    peft_model = with_lora()
    from_peft(peft_model)

    with pytest.raises(RuntimeError, match="from_peft took this PeftModel apart"):
        use(peft_model)


@pytest.mark.parametrize("inject", ["peft", "transformers"])
def test_injected_adapters_without_a_peft_model_go_there_and_back(inject):
    model = hf_vit()
    inject_adapter_in_model(lora_config("hf vit", modules_to_save=None), model)
    if inject == "transformers":
        model._hf_peft_config_loaded = True  # what its add_adapter does beyond injecting
    randomise(model)
    before, names = evaluated(model), list(model.state_dict())

    assert from_peft(model) is model
    assert not hasattr(model, "peft_config")
    assert not model._hf_peft_config_loaded
    torch.testing.assert_close(evaluated(model), before, rtol=1e-5, atol=1e-5)
    assert to_peft(model) is model

    assert torch.equal(evaluated(model), before)
    assert list(model.state_dict()) == names
    assert model._hf_peft_config_loaded == (inject == "transformers")
    assert list(model.peft_config) == ["default"]


def test_another_adapter_waits_aside():
    peft_model = with_lora()
    peft_model.add_adapter("other", LoraConfig(r=2, target_modules=["qkv", "attn.proj"]))
    randomise(peft_model, seed=1)
    by_adapter = {}
    for adapter in ("default", "other"):
        peft_model.set_adapter(adapter)
        by_adapter[adapter] = evaluated(peft_model)
    peft_model.set_adapter("default")

    model = from_peft(peft_model)
    assert len(layers_of(model, LoRALinear)) == 6
    torch.testing.assert_close(evaluated(model), by_adapter["default"], rtol=1e-5, atol=1e-5)
    back = to_peft(model)

    for adapter, expected in by_adapter.items():
        back.set_adapter(adapter)
        assert torch.equal(evaluated(back), expected)


def test_a_copy_goes_back_on_its_own(tmp_path):
    peft_model = with_lora()
    expected = files(peft_model, tmp_path / "first")
    model = from_peft(peft_model)

    copied = to_peft(copy.deepcopy(model))

    assert copied is not peft_model
    assert files(copied, tmp_path / "second") == expected
    assert layers_of(model, LoRALinear)  # the original is as it was


def test_parameters_that_were_exchanged_go_back_too():
    model = from_peft(with_lora())
    model.load_state_dict({name: 2 * tensor for name, tensor in model.state_dict().items()}, assign=True)
    expected = evaluated(model)

    torch.testing.assert_close(evaluated(to_peft(model)), expected, rtol=1e-4, atol=1e-4)


# What is refused, and nothing is changed then.


class Int8Linear(nn.Linear):
    """As bitsandbytes has it: integers, and a forward of its own."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.weight = nn.Parameter(torch.zeros_like(linear.weight, dtype=torch.int8), requires_grad=False)


class PackedLinear(nn.Module):
    """As GPTQ and AWQ have it: packed integers in a buffer, no weight."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(linear.out_features, 4, dtype=torch.int32))


class DoubledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def on_base(cls):
    def model():
        peft_model = with_lora()
        layer = peft_model.get_base_model().blocks[1].mlp.fc1
        layer.base_layer = cls(layer.base_layer)
        return peft_model

    return model


def of_a_subclass():
    model = tiny_vit()
    model.blocks[1].mlp.fc1 = DoubledLinear(64, 256)
    return get_peft_model(model, lora_config())


def convolution():
    return with_lora(target_modules=["qkv", "patch_embed.proj"])


class TomorrowVariant(LoraVariant):
    """One that PEFT does not have yet."""


def of_tomorrow():
    peft_model = with_lora()
    peft_model.get_base_model().blocks[1].mlp.fc1.lora_variant["default"] = TomorrowVariant()
    return peft_model


def scaled():
    peft_model = with_lora()
    peft_model.get_base_model().blocks[1].mlp.fc1.set_scale("default", 3)
    return peft_model


def two_active():
    peft_model = with_lora(modules_to_save=None)
    peft_model.add_adapter("other", LoraConfig(r=2, target_modules=["qkv"]))
    peft_model.base_model.set_adapter(["default", "other"])
    return peft_model


def none_active():
    peft_model = with_lora(modules_to_save=None)
    for layer in layers_of(peft_model, PeftLinear).values():
        layer._active_adapter = "other"
    return peft_model


def merged():
    peft_model = with_lora()
    peft_model.merge_adapter()
    return peft_model


def disabled():
    peft_model = with_lora()
    peft_model.base_model.disable_adapter_layers()
    return peft_model


def tied():
    model = tiny_vit()
    model.blocks[2].mlp.fc1.weight = model.blocks[1].mlp.fc1.weight
    return get_peft_model(model, lora_config())


def hooked():
    peft_model = with_lora()
    layer = peft_model.get_base_model().blocks[1].mlp.fc1.base_layer
    layer.forward = layer.forward
    return peft_model


def ia3():
    from peft import IA3Config

    return get_peft_model(tiny_vit(), IA3Config(target_modules=["qkv"], feedforward_modules=[]))


def injected_ia3():
    from peft import IA3Config

    return inject_adapter_in_model(IA3Config(target_modules=["qkv"], feedforward_modules=[]), tiny_vit())


REFUSED = {
    "DoRA": (lambda: with_lora(use_dora=True), r"DoRA is more than .*: fold it .* with merge_and_unload\(\)"),
    "a new variant": (of_tomorrow, r"blocks.1.mlp.fc1: TomorrowVariant is more than .*train it as plain LoRA"),
    "rsLoRA": (lambda: with_lora(use_rslora=True), r"rsLoRA scales by alpha/√rank.*use_rslora=False and alpha 12 "),
    "set_scale": (scaled, r"blocks.1.mlp.fc1: its scaling is 5, not alpha/rank = 1.66667: undo .*give it alpha 15 "),
    "lora_bias": (lambda: with_lora(lora_bias=True), r"a bias of its own: .*, or train with lora_bias=False"),
    "int8 base": (on_base(Int8Linear), r"blocks.1.mlp.fc1: its base .*Int8Linear is quantised: load the base in a"),
    "packed base": (on_base(PackedLinear), r"its base .*PackedLinear is quantised: load the base in a floating-point"),
    "subclass": (of_a_subclass, r"on .*DoubledLinear: accepted is lora.Linear on torch.nn.Linear; leave it out"),
    "convolution": (convolution, r"patch_embed.proj: .*lora.*Conv2d on .*Conv2d: accepted is lora.Linear"),
    "two active": (two_active, r"active adapters \['default', 'other'\]: .*set_adapter with one of them, or"),
    "none active": (none_active, r"no layer has the active adapter 'other': call set_adapter with one that has LoRA"),
    "merged": (merged, r"default is merged: call unmerge_adapter\(\) first"),
    "disabled": (disabled, r"its adapters are disabled: call enable_adapter_layers\(\) first"),
    "tied": (tied, r"blocks.1.mlp.fc1 shares a parameter \(.*blocks.2.mlp.fc1.*\): untie it, or leave it out"),
    "replaced forward": (hooked, r"its forward was replaced, as by accelerate's device_map: load it whole"),
    "IA3": (ia3, r"a PeftModel of IA3Model is not of LoRA: fold it into the base with merge_and_unload"),
    "injected IA3": (injected_ia3, r"blocks.0.attn.qkv: peft.*ia3.* is not LoRA: fold it"),
    "no LoRA": (tiny_vit, r"the model carries no layers of PEFT; accepted is a PeftModel with LoRA"),
    "wrapped": (lambda: nn.Sequential(with_lora()), r"a model in Sequential: give the plain model or the PeftModel"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_ours_cannot_compute_is_refused_and_left_alone(case):
    build, message = REFUSED[case]
    model = build()
    before = {path: type(module) for path, module in model.named_modules()}

    with pytest.raises(ValueError, match=message):
        from_peft(model)

    assert {path: type(module) for path, module in model.named_modules()} == before


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_model_in_ddp_is_refused(alone):
    with pytest.raises(ValueError, match=r"a model in DistributedDataParallel: give the plain model or the PeftModel"):
        from_peft(DistributedDataParallel(with_lora()))


def test_a_sharded_model_is_refused_there_and_back(alone):
    from torch.distributed.fsdp import fully_shard

    peft_model, converted = with_lora(), from_peft(with_lora())
    fully_shard(peft_model.get_base_model())
    fully_shard(converted)

    for convert, model in ((from_peft, peft_model), (to_peft, converted)):
        with pytest.raises(
            ValueError, match=r"sharded over ranks, .*: convert it before fully_shard, or on what PreLoRA"
        ):
            convert(model)


def merge_a_layer(model):
    model.blocks[0].mlp.fc1.merge()


def make_plain(model):
    model.blocks[0].mlp.fc1 = model.blocks[0].mlp.fc1.to_linear()


def change_rank(model):
    model.blocks[0].mlp.fc1 = LoRALinear(64, 256, rank=7)


def change_scaling(model):
    model.blocks[0].mlp.fc1 = LoRALinear(64, 256, rank=3, alpha=6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (merge_a_layer, r"blocks.0.mlp.fc1 is merged: call its unmerge\(\) first"),
        (make_plain, r"LoRA layers came or went since from_peft: blocks.0.mlp.fc1"),
        (change_rank, r"blocks.0.mlp.fc1 has ranks \(7,\) and scalings .*, PEFT's layer \(3,\) and"),
        (change_scaling, r"blocks.0.mlp.fc1 has ranks \(3,\) and scalings \(2.0,\), PEFT's layer .*: put a layer"),
    ],
)
def test_layers_that_are_not_peft_s_any_more_are_refused(change, message):
    model = from_peft(with_lora())
    change(model)

    with pytest.raises(ValueError, match=message):
        to_peft(model)

    assert layers_of(model, LoRALinear)


def test_a_model_that_did_not_come_from_peft_is_refused():
    with pytest.raises(ValueError, match=r"to_peft undoes from_peft, .*save_adapter writes any model's LoRA"):
        to_peft(tiny_vit())
