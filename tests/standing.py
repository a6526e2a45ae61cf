"""Norms made up so that each group's stand still from an epoch of its own on."""

import dataclasses

from models import images, train

from prelora import monitor

PASSES = {"q": 2, "k": 3, "v": 2, "attn_out": 2, "mlp_in": 5, "mlp_out": 5}
"""The first epoch at which a group passes with k = 2 windows of an epoch."""
FIELDS = {"switch": "per_group", "tau": 1.0, "warmup_epochs": 2}


class Standing:
    """``monitor.measure`` with norms that grow by a tenth an epoch, and stand still from then on at which they pass."""

    def __init__(self, passes=None, epoch=0):
        self.measured = monitor.measure
        self.passes = passes or PASSES
        self.epoch = epoch

    def __call__(self, model, targets, snapshot=None):
        effective = {
            t.name: 1.1 ** min(self.epoch, self.passes[t.group] - 1) * (1 + 1e-4 * t.layer * self.epoch)
            for t in targets
        }
        return dataclasses.replace(self.measured(model, targets, snapshot), effective=effective)

    def epochs(self, pre, count):
        """The events of so many epochs of ``pre``."""
        events = []
        for _ in range(count):
            self.epoch = pre.epoch + 1
            events.append(pre.end_epoch(train(pre), probe=images()))
        return events
