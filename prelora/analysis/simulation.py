"""A training step of each phase as one of many GPUs would take it, run on fake tensors without any of them.

The model, DDP around it, the optimizer, the surgery of the switch and DDP around its result are the real ones; only
the tensors hold no numbers, and the process group reaches no one. What needs numbers is left out: the norms, the test
and the comparison of all ranks' bits.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore

from prelora import distributed, optim, surgery
from prelora.analysis.activations import DEVICE, fake_batch, step_loss
from prelora.analysis.hollow import hollow_copy
from prelora.analysis.live_bytes import LiveBytes, RealIntegers
from prelora.analysis.plan import planned_execution
from prelora.config import PreLoRAConfig
from prelora.nn.deferred_grads import defer_lora_grads, lora_grads_from_weights
from prelora.targets import Target


@dataclass(frozen=True)
class SimulatedPhase:
    """What one GPU held and sent in one step; bytes."""

    parameters: int
    optimizer: int
    gradients: int
    """Between steps, in DDP's buckets or beside them, and those of A and B that no bucket holds."""
    forward: int
    """Held for backward when forward ends, beside all of the above: activations, W_eff, autocast's copies."""
    workspace: int
    """By how much backward goes beyond what forward left."""
    peak: int
    """The most that was held at one time until the optimizer's step."""
    per_image: int
    """By how much the peak grows with an image more in the batch."""
    buckets: tuple[int, ...]
    """Bytes of each all-reduce, in order."""

    def largest_batch(self, batch: int, memory: float) -> int:
        """Images that fit into ``memory`` bytes, from the peak with ``batch`` of them; 0 where not one does."""
        return max(0, batch + int((memory - self.peak) // self.per_image))


def simulate(
    model: nn.Module,
    targets: Sequence[Target],
    ranks: Mapping[str, int],
    config: PreLoRAConfig,
    *,
    image: Sequence[int],
    batch: int,
    precision: str,
    gpus: int,
    build_optimizer: Callable[[nn.Module], Optimizer],
    bucket_view: bool = True,
) -> dict[str, SimulatedPhase]:
    """Take steps in FULL, WARMUP and LORA as rank 0 of ``gpus``.

    Args:
        model: the plain model without LoRA, on the meta device; it is not touched.
        image: [channels, height, width].
        batch: images per GPU.
        build_optimizer: over the model that it is given.

    Raises:
        RuntimeError: this process is in a process group already.
    """
    simulated = {}
    with _fake_group(gpus), FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live, RealIntegers():
        base = hollow_copy(model, DEVICE)
        sent: list[int] = []
        ddp = DistributedDataParallel(base, gradient_as_bucket_view=bucket_view)
        ddp.register_comm_hook(sent, _count_bucket)
        wrapped: nn.Module = ddp
        optimizer = build_optimizer(base)
        run = _Run(image, batch, precision, live, sent)
        simulated["full"] = run(wrapped, optimizer)
        added = surgery.inject(base, targets, ranks, dropout=config.lora_dropout, execution=planned_execution(config))
        optimizer, _ = optim.rebuild_optimizer(optimizer, base, added=added)
        deferred = defer_lora_grads(base)
        wrapped = distributed.rewrap(wrapped, unreduced=deferred)
        simulated["warmup"] = run(wrapped, optimizer)
        dropped = surgery.freeze(base, targets, config.freeze, train_lora_a=config.train_lora_a)
        optimizer, _ = optim.rebuild_optimizer(optimizer, base, dropped=dropped)
        defer_lora_grads(base, False)
        wrapped = distributed.rewrap(wrapped, reduced=deferred)
        simulated["lora"] = run(wrapped, optimizer)
    return simulated


@dataclass(frozen=True)
class _Held:
    """Bytes held before forward, after it, at the peak, and after backward."""

    before: int
    forward: int
    peak: int
    after: int


@dataclass(frozen=True)
class _Run:
    """Takes two steps of a phase and measures the second."""

    image: Sequence[int]
    batch: int
    precision: str
    live: LiveBytes
    sent: list[int]

    def __call__(self, model: nn.Module, optimizer: Optimizer) -> SimulatedPhase:
        # The first step builds the optimizer's state and tells DDP in which order gradients come.
        larger = self._backward(model, 2 * self.batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.sent.clear()
        usual = self._backward(model, self.batch)
        optimizer.zero_grad(set_to_none=True)
        parameters = sum(parameter.nbytes for parameter in model.parameters())
        states = sum(optim.state_bytes(optimizer).values())
        return SimulatedPhase(
            parameters=parameters,
            optimizer=states,
            gradients=usual.after - parameters - states,
            forward=usual.forward - usual.before,
            workspace=usual.peak - usual.forward,
            peak=usual.peak,
            per_image=(larger.peak - larger.before - usual.peak + usual.before) // self.batch,
            buckets=tuple(self.sent),
        )

    def _backward(self, model: nn.Module, images: int) -> _Held:
        before = self.live.now
        self.live.restart_peak()
        loss = step_loss(model, fake_batch(images, self.image), self.precision)
        forward = self.live.now
        loss.backward()
        del loss
        lora_grads_from_weights(distributed.unwrap(model))
        return _Held(before, forward, self.live.peak, self.live.now)


@contextlib.contextmanager
def _fake_group(gpus: int) -> Iterator[None]:
    """A process group of ``gpus`` ranks of which only rank 0 exists."""
    if dist.is_initialized():
        raise RuntimeError("simulate() in a process that is in a process group already: run it in one of its own")
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _count_bucket(sent: list[int], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Instead of the all-reduce: note its bytes."""
    sent.append(bucket.buffer().nbytes)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done
