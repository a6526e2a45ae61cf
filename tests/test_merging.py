"""W_eff is built once where that is asked for, at once for all layers, and is never stale."""

import copy
import pickle

import models
import pytest
import torch
import torch.nn.functional as F

from prelora.nn import LoRALinear, merge_once
from prelora.nn.merging import GROUPED_DEVICES
from prelora.ops import lora_merge
from prelora.surgery import inject, strip
from prelora.targets import find_targets


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(**options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = LoRALinear(24, 48, rank=(3, 12, 1), rows=(16, 16, 16), **options)
        torch.nn.init.normal_(made.lora_B, std=0.3)
    return made


def vit():
    model = models.tiny_vit()
    targets = find_targets(model)
    inject(model, targets, {target.name: 4 for target in targets})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(draw(*parameter.shape) * 0.1)
    return model


@pytest.fixture
def merges(monkeypatch):
    """How many layers each call of lora_merge took."""
    counts = []
    choose = lora_merge.chosen

    def counting(weights, *rest):
        counts.append(len(weights))
        return choose(weights, *rest)

    monkeypatch.setattr(lora_merge, "chosen", counting)
    return counts


def value(module, x):
    """What the module's parameters say that it computes."""
    return F.linear(x, module.merged_weight(), module.bias)


# The attacks: each changes what the layer computes, and the next forward must know.


def optimizer_step(module):
    module.lora_A.grad = torch.ones_like(module.lora_A)
    torch.optim.SGD([module.lora_A], lr=0.5).step()


def load_state_dict(module):
    module.load_state_dict(layer(alpha=None).state_dict() | {"lora_B": draw(*module.lora_B.shape, seed=7)})


def write_in_place(module):
    with torch.no_grad():
        module.lora_B.mul_(2)


def write_to_the_base(module):
    with torch.no_grad():
        module.weight.add_(1)


def replace_data(module):
    module.lora_A.data = draw(*module.lora_A.shape, seed=3)


def replace_the_parameter(module):
    module.lora_B = torch.nn.Parameter(draw(*module.lora_B.shape, seed=4))


def swap_tensors(module):
    torch.utils.swap_tensors(module.lora_B, torch.nn.Parameter(draw(*module.lora_B.shape, seed=5)))


def swap_in_an_average(module):
    average = [draw(*parameter.shape, seed=6) for parameter in module.parameters()]
    for parameter, mean in zip(module.parameters(), average, strict=True):
        parameter.data, _ = mean, parameter.data


def write_through_data(module):
    module.lora_B.data.mul_(3)


def half_precision_and_back(module):
    module.half().float()


SEEN = [optimizer_step, load_state_dict, write_in_place, write_to_the_base, replace_data, replace_the_parameter]
SEEN += [swap_tensors, swap_in_an_average, half_precision_and_back]
by_name = pytest.mark.parametrize("attack", [*SEEN, write_through_data], ids=lambda attack: attack.__name__)


@by_name
@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_a_change_between_two_forwards_is_seen(attack, mode):
    module, x = layer(execution="merged").train(mode == "training"), draw(9, 24)
    module(x)
    attack(module)

    torch.testing.assert_close(module(x), value(module, x))


@by_name
def test_a_change_between_two_blocks_is_seen(attack):
    module, x = layer(execution="merged"), draw(9, 24)
    with merge_once(module):
        module(x)
    attack(module)

    with merge_once(module):
        torch.testing.assert_close(module(x), value(module, x))


@pytest.mark.parametrize("attack", SEEN, ids=lambda attack: attack.__name__)
def test_a_change_inside_a_block_is_seen_but_through_data(attack):
    module, x = layer(execution="merged"), draw(9, 24)
    with merge_once(module):
        module(x)
        attack(module)
        torch.testing.assert_close(module(x), value(module, x))


def test_new_data_at_the_address_of_the_old_is_seen():
    module, x = layer(execution="merged"), draw(9, 24)
    with merge_once(module):
        for seed in range(20):
            module(x)
            module.lora_A.data = torch.empty(0)  # its memory is free for what comes next
            module.lora_A.data = draw(16, 24, seed=seed)

            torch.testing.assert_close(module(x), value(module, x))


def test_a_change_before_backward_does_not_reach_the_forward_that_was():
    module, x = layer(execution="merged"), draw(9, 24).requires_grad_()
    module.weight.requires_grad_(False)
    expected = module.merged_weight().sum(0).expand(9, 24)
    y = module(x)
    write_through_data(module)

    y.sum().backward()

    torch.testing.assert_close(x.grad, expected)


# Once, and all at once


def test_micro_batches_share_one_merge_of_all_layers(merges):
    model, x = vit(), models.images()
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.execution = "merged"

    with merge_once(model):
        for _ in range(3):
            model(x).sum().backward()

    assert merges == [12]


def test_a_layer_that_chooses_by_size_merges_at_its_first_micro_batch_only(merges):
    module, x = layer(), draw(5000, 24)

    with merge_once(module):
        module(x)
        module(x)

    assert merges == [1]
    assert module.last_plan.execution == "merged"


def test_accumulated_gradients_are_those_of_separate_merges():
    shared, apart, x = vit(), vit(), models.images()
    with merge_once(shared):
        for part in x.split(2):
            shared(part).square().sum().backward()
    for part in x.split(2):
        apart(part).square().sum().backward()

    for mine, other in zip(shared.parameters(), apart.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)


def test_outside_a_block_every_forward_merges_anew(merges):
    module, x = layer(execution="merged"), draw(9, 24)
    module(x)
    module(x)

    assert merges == [1, 1]


def test_blocks_nest_and_the_outer_one_counts(merges):
    module, x = layer(execution="merged"), draw(9, 24)
    with merge_once(module):
        with merge_once(module):
            module(x)
        module(x)
    module(x)

    assert merges == [1, 1]


def test_the_block_ends_with_an_error_too(merges):
    module, x = layer(execution="merged"), draw(9, 24)
    with pytest.raises(RuntimeError, match="mat1"), merge_once(module):
        module(draw(9, 23))
    write_through_data(module)

    torch.testing.assert_close(module(x), value(module, x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_made_inside_a_block_takes_nothing_along(copied):
    module, x = layer(execution="merged"), draw(9, 24)
    with merge_once(module):
        module(x)
        twin = copied(module)
    write_through_data(twin)

    torch.testing.assert_close(twin(x), value(twin, x))


def test_under_another_dtype_the_layer_merges_for_that_dtype():
    module, x = layer(execution="merged"), draw(9, 24)
    with merge_once(module):
        wide = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            narrow = module(x)

    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(narrow.float(), wide, rtol=2e-2, atol=2e-2)


def test_nothing_is_left_on_the_layers_after_the_block():
    model = vit()
    with torch.autocast("cpu", torch.bfloat16), merge_once(model):
        model(models.images())

    assert all(module._shared is None for module in model.modules() if isinstance(module, LoRALinear))


# Where launches are dear


@pytest.fixture
def cpu_launches_are_dear(monkeypatch):
    monkeypatch.setattr("prelora.nn.merging.GROUPED_DEVICES", ("cpu",))


def test_launches_are_grouped_on_cuda():
    assert GROUPED_DEVICES == ("cuda",)


@pytest.mark.usefixtures("cpu_launches_are_dear")
class TestGroupedForward:
    def test_one_forward_merges_all_layers_at_once_and_keeps_nothing(self, merges):
        model, x = vit(), models.images()
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
            model(x)

        assert merges == [12, 12]
        assert all(module._shared is None for module in model.modules() if isinstance(module, LoRALinear))

    def test_the_function_is_that_of_separate_merges(self, monkeypatch):
        model, x = vit(), models.images()
        with torch.autocast("cpu", torch.bfloat16):
            together = model(x)
            monkeypatch.setattr("prelora.nn.merging.GROUPED_DEVICES", ())
            apart = model(x)

        assert torch.equal(together, apart)

    def test_a_copy_of_the_model_merges_its_own_layers(self):
        model, x = vit(), models.images()
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                if name.endswith("lora_B"):
                    parameter.zero_()

        with torch.autocast("cpu", torch.bfloat16):
            expected = models.tiny_vit()(x)
            assert torch.equal(twin(x), expected)

    def test_a_forward_that_fails_lets_go_of_its_merge(self):
        model = vit()
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(AssertionError, match="Input height"):
            model(torch.zeros(1, 3, 7, 7))

        assert all(module._shared is None for module in model.modules() if isinstance(module, LoRALinear))

    def test_inside_a_block_of_its_own_it_leaves_the_block_its_merge(self, merges):
        model, x = vit(), models.images()
        with torch.autocast("cpu", torch.bfloat16), merge_once(model):
            model(x)
            model(x)

        assert merges == [12]

    def test_a_stripped_model_has_no_hooks_of_ours(self):
        model = vit()
        strip(model)

        assert not model._forward_pre_hooks
        assert not model._forward_hooks
        assert not model._forward_hooks_always_called
