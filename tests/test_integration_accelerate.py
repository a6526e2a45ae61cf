"""A loop of one's own under accelerate: the switch, save_state and load_state in each phase, also on two ranks."""

import dataclasses
import os
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, ParallelismConfig
from launching import assert_equal, run_example
from models import adamw, config, images, labels, tiny_vit
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, TensorDataset
from two_ranks import running

from prelora import OptimizerError, distributed, surgery
from prelora.checkpoint import load_checkpoint
from prelora.integrations.accelerate import AcceleratedPreLoRA, check_accelerator

BATCHES, ACCUMULATE, EPOCHS = 4, 2, 4
CONFIG = config(r_max=4, lora_lr_mult=2.0)
PHASES = ["full", "warmup", "lora", "lora"]


class Progress:
    def __init__(self):
        self.epoch = self.batches = 0
        self.loss_sum = 0.0

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        vars(self).update(state)


def vit():
    return tiny_vit(depth=2, embed_dim=32, proj_drop_rate=0.1)


class Run:
    """Four micro-batches an epoch on each rank, two of them a step; saved after each step into ``output/<step>``."""

    def __init__(self, others=()):
        AcceleratorState._reset_state(True)  # each run stands for a process of its own
        GradientState._reset_state()
        torch.manual_seed(7)
        loading = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE, dataloader_config=loading)
        model = vit()
        optimizer = adamw(model.parameters())
        count = 4 * BATCHES * distributed.world_size()
        # A generator of its own: a loader begun anew in a loaded epoch does not move what dropout draws from.
        data, own = TensorDataset(images(count), labels(count)), torch.Generator()
        loader = DataLoader(data, batch_size=4, shuffle=True, generator=own)
        scheduler = LinearLR(optimizer, 0.1, total_iters=20)
        self.others = self.accelerator.prepare(*others) if others else None
        prepared = self.accelerator.prepare(model, optimizer, loader, scheduler)
        self.model, self.optimizer, self.loader, self.scheduler = prepared
        self.pre = AcceleratedPreLoRA(self.accelerator, self.model, self.optimizer, CONFIG, scheduler=self.scheduler)
        self.progress = Progress()
        self.accelerator.register_for_checkpointing(self.progress)
        self.events = []
        self.rates = []

    def train(self, output=None):
        accelerator, pre, progress = self.accelerator, self.pre, self.progress
        while progress.epoch < EPOCHS:
            self.loader.set_epoch(progress.epoch)
            for batch, targets in accelerator.skip_first_batches(self.loader, progress.batches):
                with accelerator.accumulate(pre.model):
                    loss = F.cross_entropy(pre.model(batch), targets)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(pre.model.parameters(), 1.0)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
                progress.loss_sum += accelerator.reduce(loss.detach(), "mean").item()
                progress.batches += 1
                if accelerator.sync_gradients:
                    self.rates.append(self.scheduler.get_last_lr())
                if accelerator.sync_gradients and progress.batches < BATCHES:
                    self.save(output)
            self.events.append(pre.end_epoch(progress.loss_sum / progress.batches))
            progress.epoch, progress.batches, progress.loss_sum = progress.epoch + 1, 0, 0.0
            self.save(output)
        return self

    def save(self, output):
        if output is not None:
            self.accelerator.save_state(f"{output}/{self.pre.step}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    return Run().train(output), output


def test_all_phases_are_taken_and_the_plan_is_realised(whole):
    run, _ = whole

    assert [event.phase for event in run.events] == PHASES
    assert surgery.realised_ranks(run.pre.base_model, run.pre.targets) == run.pre.ranks
    assert len(set(run.pre.ranks.values())) > 1


def test_what_was_prepared_stays_valid_and_steps_what_is_current(whole):
    run, _ = whole

    assert run.optimizer.optimizer is run.pre.optimizer
    assert run.scheduler.scheduler is run.pre.scheduler
    assert run.accelerator._optimizers == [run.optimizer]
    assert run.accelerator._schedulers == [run.scheduler]
    assert run.pre.step == EPOCHS * BATCHES // ACCUMULATE


def test_the_schedule_goes_on_and_loras_rate_is_its_multiple(whole):
    run, _ = whole
    warm = [1e-3 * (0.1 + 0.9 * step / 20) for step in range(1, 9)]

    assert [rates[0] for rates in run.rates[:6]] == pytest.approx(warm[:6])
    assert [*run.rates[4], *run.rates[5]] == pytest.approx([rate * factor for rate in warm[4:6] for factor in (1, 2)])


# FULL within an epoch and at its end; switched at an end; WARMUP; frozen at an end; LORA.
@pytest.mark.parametrize("step", [1, 2, 4, 5, 6, 7])
def test_a_loaded_run_is_the_uninterrupted_one_bit_for_bit(step, whole):
    run, output = whole
    resumed = Run()

    resumed.accelerator.load_state(f"{output}/{step}")
    assert resumed.pre.step == step
    resumed.train()

    assert resumed.events == run.events[step // ACCUMULATE :]
    assert_equal(ordered(resumed.pre.state_dict()), ordered(run.pre.state_dict()))


def ordered(tree):
    """Dicts by key: what was loaded may have them in another order."""
    if isinstance(tree, dict):
        return {key: ordered(tree[key]) for key in sorted(tree)}
    return [ordered(item) for item in tree] if isinstance(tree, list) else tree


def test_the_weights_are_saved_once(whole):
    _, output = whole

    assert not (output / "5" / "model.safetensors").exists()
    assert (output / "5" / "prelora" / "model.safetensors").is_file()


def test_another_model_of_the_same_accelerator_is_saved_and_loaded_as_ever(tmp_path):
    run = Run(others=[nn.Linear(2, 2)])
    before = run.others.weight.detach().clone()
    run.accelerator.save_state(str(tmp_path))
    with torch.no_grad():
        run.others.weight.zero_()

    run.accelerator.load_state(str(tmp_path))

    assert torch.equal(run.others.weight, before)
    assert_equal(load_checkpoint(tmp_path / "prelora")["model"], dict(run.pre.base_model.state_dict()))


def test_a_folder_saved_into_again_holds_the_newer_state(tmp_path):
    run = Run()
    run.accelerator.save_state(str(tmp_path))
    with torch.no_grad():
        run.pre.base_model.head.bias.fill_(5.0)
    run.accelerator.save_state(str(tmp_path))

    assert (load_checkpoint(tmp_path / "prelora")["model"]["head.bias"] == 5.0).all()


def test_a_model_that_was_freed_for_another_is_neither_saved_nor_loaded(tmp_path):
    run = Run()
    run.accelerator.free_memory()
    other = run.accelerator.prepare(nn.Linear(2, 2))

    run.accelerator._custom_objects.clear()
    run.accelerator.save_state(str(tmp_path))
    run.accelerator.load_state(str(tmp_path))

    assert (tmp_path / "model.safetensors").is_file()
    assert not (tmp_path / "prelora").exists()
    assert isinstance(other, nn.Linear)


def test_a_gradient_scaler_goes_on_over_the_switch():
    """With one, accelerate's wrapper keeps the optimizer's own ``step``, which must be the new one's."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(vit())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = AcceleratedOptimizer(adamw(model.parameters()), scaler=scaler)
    pre = AcceleratedPreLoRA(accelerator, model, optimizer, CONFIG)
    phases = []
    for epoch in range(4):
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        scaler.scale(F.cross_entropy(pre.model(images(4, seed=epoch)), labels(4))).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not optimizer.step_was_skipped
        still = [name for name in before if torch.equal(before[name], model.get_parameter(name))]
        assert [name for name in still if not name.endswith("lora_A")] == []  # A moves once B is no longer 0
        phases.append(pre.end_epoch(1.0 + epoch).phase)

    assert phases == PHASES
    assert pre.step == 4


# What is refused.


def accelerator_of(kind, **parallelism):
    return SimpleNamespace(distributed_type=DistributedType(kind), parallelism_config=ParallelismConfig(**parallelism))


@pytest.mark.parametrize(
    ("accelerator", "message"),
    [
        (accelerator_of("FSDP"), "FSDP through accelerate is not supported.*fully_shard the model and give it to"),
        (accelerator_of("DEEPSPEED"), "DEEPSPEED is not supported: its engine owns.*accepted are one process"),
        (accelerator_of("MEGATRON_LM"), "MEGATRON_LM is not supported"),
        (accelerator_of("XLA"), "XLA is not supported"),
        (accelerator_of("MULTI_GPU", tp_size=2), "splits the model or its inputs over ranks"),
    ],
)
def test_what_owns_the_model_itself_is_refused(accelerator, message):
    with pytest.raises(TypeError, match=message):
        check_accelerator(accelerator)


@pytest.mark.parametrize("kind", ["NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU"])
def test_one_process_and_ddp_are_accepted(kind):
    check_accelerator(accelerator_of(kind))


def test_what_was_not_prepared_is_refused():
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    model = vit()
    optimizer = adamw(model.parameters())

    with pytest.raises(OptimizerError, match=r"AdamW was not prepared: give what accelerator\.prepare returned"):
        AcceleratedPreLoRA(accelerator, model, optimizer, CONFIG)
    with pytest.raises(TypeError, match="VisionTransformer was not prepared"):
        AcceleratedPreLoRA(accelerator, model, accelerator.prepare(optimizer), CONFIG)


# Two gloo ranks.


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with running(tmp_path_factory.mktemp("ranks")) as started:
        yield started


def environment_of_a_rank():
    rank, world = distributed.rank(), distributed.world_size()
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{world}", "LOCAL_WORLD_SIZE": f"{world}"}


def on_a_rank(output, resume):
    environment_of_a_rank()
    run = Run()
    if resume:
        run.accelerator.load_state(f"{output}/{resume}")
    run.train(None if resume else output)
    return {
        "fingerprint": distributed.fingerprint(run.pre.base_model),
        "events": [dataclasses.asdict(event) for event in run.events],
        "wrapped": isinstance(run.pre.model, DistributedDataParallel),
        "prepared twice": run.accelerator.prepare(run.pre.model) is run.pre.model,
    }


def evaluated_before(_):
    """A model prepared for evaluation, then given to prepare() again."""
    environment_of_a_rank()
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare_model(vit(), evaluation_mode=True)
    model, optimizer = accelerator.prepare(model, adamw(model.parameters()))
    with pytest.raises(TypeError, match="in no DistributedDataParallel on 2 processes"):
        AcceleratedPreLoRA(accelerator, model, optimizer, CONFIG)


@pytest.fixture(scope="module")
def on_two(ranks, tmp_path_factory):
    output = str(tmp_path_factory.mktemp("two"))
    return output, ranks(on_a_rank, output, None)


def test_two_ranks_end_with_the_same_bits(on_two):
    _, (one, other) = on_two

    assert one["fingerprint"] == other["fingerprint"]
    assert [event["phase"] for event in one["events"]] == PHASES
    assert one["wrapped"]
    assert one["prepared twice"]


@pytest.mark.parametrize("step", [3, 5, 7])
def test_two_ranks_load_and_go_on_bit_for_bit(step, on_two, ranks):
    output, (whole, _) = on_two

    for resumed in ranks(on_a_rank, output, step):
        assert resumed["fingerprint"] == whole["fingerprint"]
        assert resumed["events"][-1] == whole["events"][-1]


def test_ranks_whose_gradients_nothing_would_reduce_are_refused(ranks):
    ranks(evaluated_before, None)


# The example.


def test_the_example_takes_all_phases_on_two_ranks(tmp_path):
    said = run_example("accelerate_train.py", "--output", str(tmp_path), ranks=2)

    assert re.findall(r"epoch \d: (\w+)", said) == ["full", "full", "warmup", "lora", "lora"]
    assert (tmp_path / "final" / "model.safetensors").is_file()
