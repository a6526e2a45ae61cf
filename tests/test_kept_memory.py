"""Memory of the CPU's effective weights goes from one step to the next, and never while somebody holds it."""

import pytest
import torch

from prelora import _ext
from prelora.nn import LoRALinear, merge_once

pytestmark = pytest.mark.skipif(_ext.reason() is not None, reason=str(_ext.reason()))
MIB = 2**20


@pytest.fixture(autouse=True)
def nothing_kept():
    _ext.release_memory()
    yield
    _ext.release_memory()


def empty(mebibytes):
    return torch.ops.prelora_C.empty_kept(mebibytes, MIB // 4, torch.float32)


def test_memory_of_a_dead_result_is_handed_out_again():
    first = empty(3)
    address = first.data_ptr()
    del first

    assert empty(3).data_ptr() == address


@pytest.mark.parametrize(
    "hold", [torch.Tensor.t, torch.Tensor.detach, lambda x: x[:, 1:], lambda x: x.untyped_storage()]
)
def test_memory_that_a_view_holds_is_not(hold):
    first = empty(1)
    address = first.data_ptr()
    view = hold(first)
    del first

    assert empty(1).data_ptr() != address
    del view


def test_never_more_is_kept_than_was_out_at_one_time():
    for mebibytes in (1, 2, 3, 4):
        empty(mebibytes)

    assert _ext.release_memory() == 4 * MIB


def test_released_memory_is_no_longer_kept():
    first, second = empty(2), empty(1)
    del first

    assert _ext.release_memory() == 2 * MIB
    assert _ext.release_memory() == 0
    del second
    assert _ext.release_memory() == MIB


def test_a_merge_leaves_the_weights_of_a_graph_that_is_alive():
    layer = LoRALinear(1024, 512, rank=4, execution="merged")
    layer.weight.requires_grad_(False)
    x = torch.randn(3, 1024, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = torch.ones(3, 512) @ layer.merged_weight()

    with merge_once(layer):
        y = layer(x)
    layer.lora_B = torch.nn.Parameter(torch.ones(512, 4))
    with merge_once(layer):
        layer(x)
    y.sum().backward()

    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("size", [(-1, 4), (4, -1)])
def test_a_size_below_zero_is_refused(size):
    with pytest.raises(ValueError, match="-1"):
        torch.ops.prelora_C.empty_kept(*size, torch.float32)
