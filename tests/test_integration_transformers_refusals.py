"""What PreLoRATrainer cannot take through a switch is refused when it is built, with what to do instead."""

import pytest
import torch
from torch import nn
from transformers import ViTForImageClassification
from transformers_runs import arguments, build, images, vit

from prelora import OptimizerError, TargetError
from prelora.integrations.transformers import PreLoRATrainer


class Peft(ViTForImageClassification):
    peft_config = None


class Quantised(ViTForImageClassification):
    is_quantized = True


class Sharded(ViTForImageClassification):
    is_distributed_loading_by_transformers = True


def tied():
    model = vit()
    model.vit.layers[1].mlp.fc1.weight = model.vit.layers[0].mlp.fc1.weight
    return model


def compiled():
    return {"model": torch.compile(vit(), backend="eager")}


class Unknown(nn.Module):
    def forward(self, pixel_values, labels):
        raise NotImplementedError


def lbfgs():
    model = vit()
    return {"model": model, "optimizers": (torch.optim.LBFGS(model.parameters()), None)}


GREEDY = {"lr_scheduler_type": "greedy", "eval_strategy": "epoch", "metric_for_best_model": "loss"}
REFUSED = {
    "a PEFT model": (lambda: {"model": vit(cls=Peft)}, TypeError, r"merge them first \(merge_and_unload\)"),
    "a quantised model": (lambda: {"model": vit(cls=Quantised)}, TypeError, "load it without quantization"),
    "a model sharded by transformers": (lambda: {"model": vit(cls=Sharded)}, TypeError, "without distributed_config"),
    "a compiled model": (compiled, TypeError, "pass the plain model.*torch_compile"),
    "DataParallel": (lambda: {"model": nn.DataParallel(vit())}, TypeError, "wrap the model in DistributedDataParallel"),
    "tied weights": (lambda: {"model": tied()}, TargetError, "untie it first"),
    "a model of no known family": (lambda: {"model": Unknown()}, TargetError, "register_targets"),
    "targets that match nothing": (lambda: {"targets": {"q": "vit.no"}}, TargetError, "matches no module"),
    "LBFGS": (lbfgs, OptimizerError, "accepted is any torch.optim.Optimizer whose state is kept per parameter"),
    "LOMO": (lambda: {"optim": "lomo"}, OptimizerError, "accepted are adamw_torch, adamw_torch_fused, sgd"),
    "greedy": (lambda: GREEDY, OptimizerError, "accepted are all others"),
    "auto_find_batch_size": (lambda: {"auto_find_batch_size": True}, ValueError, "set the batch size"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_at_construction(case, tmp_path):
    options, error, message = REFUSED[case]

    with pytest.raises(error, match=message):
        build(tmp_path, **options())


def test_many_gpus_in_one_process_are_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 4

    with pytest.raises(TypeError, match=r"DataParallel.*torchrun --nproc-per-node=4"):
        PreLoRATrainer(vit(), args, train_dataset=images())


def test_a_dataset_without_a_length_is_refused(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(images())

    with pytest.raises(ValueError, match=r"Stream without a length.*accepted is a dataset with __len__"):
        PreLoRATrainer(vit(), arguments(tmp_path, max_steps=8), train_dataset=Stream())
