"""A step's time is shared out to its parts, and held against what the machine can do."""

import pytest
import torch

from prelora.train import accounting, peak, timing
from prelora.train.timing import PARTS, StepClock

CPU = torch.device("cpu")


@pytest.fixture
def passing(monkeypatch):
    """A clock that only moves when told: ``passing(seconds)``."""
    now = [100.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_the_time_between_two_marks_goes_to_the_second(passing):
    clock = StepClock(CPU)
    clock.start()
    for part, seconds in [("data", 1), ("forward", 2), ("data", 4), ("forward", 8), ("optimizer", 16)]:
        passing(seconds)
        clock.mark(part)

    assert clock.take() == dict.fromkeys(PARTS, 0) | {"data": 5, "forward": 10, "optimizer": 16}


def test_what_lies_between_two_steps_belongs_to_none(passing):
    clock = StepClock(CPU)
    clock.start()
    passing(1)
    clock.mark("forward")
    clock.take()
    passing(100)
    clock.start()
    passing(2)
    clock.mark("forward")

    assert sum(clock.take().values()) == 2


def test_waiting_for_other_ranks_at_the_end_of_backward_is_not_counted_as_backward(passing):
    weight = torch.ones(1, requires_grad=True)
    # As DDP does it: what is waited for is queued from within the backward pass.
    weight.register_hook(
        lambda _: passing(2) or torch.autograd.Variable._execution_engine.queue_callback(lambda: passing(30))
    )
    clock = StepClock(CPU)
    clock.start()
    loss = weight.sum()
    clock.mark_when_computed(loss, "backward")
    loss.backward()
    clock.mark("communication")

    parts = clock.take()

    assert (parts["backward"], parts["communication"]) == (2, 30)


def test_rates_leave_out_the_wait_for_images():
    rates = accounting.rates(
        images=100,
        seconds=10.0,
        parts=dict.fromkeys(PARTS, 0.0) | {"data": 5.0, "forward": 5.0},
        flops_per_image=3e9,
        peak=1.2e11,
    )

    assert (rates["img_per_s"], rates["img_per_s_computing"]) == (10, 20)
    assert (rates["flop_per_s"], rates["peak_share"]) == (6e10, 0.5)


def test_the_peak_is_the_best_of_a_few_products(monkeypatch):
    seconds = iter([4.0, 2.0, 8.0, 3.0, 5.0])
    monkeypatch.setattr(peak, "_seconds", lambda *_: next(seconds))

    assert peak.measure_peak(CPU, "fp32") == 2 * peak.SIDES["cpu"] ** 3 / 2.0
