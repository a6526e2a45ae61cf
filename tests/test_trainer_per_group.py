"""A trainer's run whose groups switch one after another: its log, its report, its checkpoints and its replay."""

import json

import pytest
from standing import Standing
from tiny_runs import finished, metrics

from prelora import monitor
from prelora.analysis.records import load_run
from prelora.analysis.replay_command import main as replay_command
from prelora.analysis.report import write_report
from prelora.analysis.summary import released_memory, speed_ups
from prelora.checkpoint import checkpoints, load_checkpoint
from prelora.train.export_merged import export_merged

PASSES = {"q": 2, "k": 3, "v": 2, "attn_out": 2, "mlp_in": 4, "mlp_out": 4}
SETTINGS = {"switch": "per_group", "tau": 1.0, "warmup_epochs": 1}


class EveryCall(Standing):
    """Made-up norms of a run that measures once an epoch."""

    def __call__(self, *arguments):
        self.epoch += 1
        return super().__call__(*arguments)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitor, "measure", EveryCall(PASSES))
        return finished(tmp_path_factory.mktemp("groups") / "run", prelora=SETTINGS, checkpoint={"keep_last": 9})


def test_the_log_says_which_groups_switched_and_froze(run):
    events = [line["event"] for line in metrics(run)]

    switched = [event["switched_groups"] for event in events]
    assert switched == [[], ["attn_out"], ["q", "k", "v"], ["mlp_in", "mlp_out"], [], []]
    assert [event["frozen_groups"] for event in events] == [[], [], *switched[1:4], []]
    assert [line["phase"] for line in metrics(run)] == ["full", "full", "warmup", "warmup", "warmup", "lora"]
    assert [event["plan_flops"] is not None for event in events] == [False] * 3 + [True] * 3


def test_an_epochs_flops_are_those_of_its_mixture(run):
    flops = [line["flops_per_image"] for line in metrics(run)]

    # Merged, joint training costs nothing per image: what falls is what is frozen.
    assert flops[0] == flops[1] == flops[2] > flops[3] > flops[4] > flops[5]
    assert flops[5] == metrics(run)[5]["event"]["plan_flops"]["lora"]


def test_the_report_tells_of_every_switch_and_holds_speed_to_what_was_trained(run):
    read = load_run(run)

    text = write_report(run).read_text()

    told = "Its groups switched to LoRA one after another: attn_out after epoch 2; q, k, v after epoch 3; "
    assert told + "mlp_in, mlp_out after epoch 4." in text
    flops = [line["flops_per_image"] for line in metrics(run)]
    ceilings = {speed.phase: speed.ceiling for speed in speed_ups(read)}
    assert ceilings["warmup"] == pytest.approx(flops[0] / (sum(flops[2:5]) / 3))
    assert ceilings["run"] == pytest.approx(6 * flops[0] / sum(flops))
    released = {saving.item: saving.measured for saving in released_memory(read)}
    assert released == {item: sum(line["event"]["released"].get(item, 0) for line in metrics(run)) for item in released}
    assert read.freeze.epoch == 5


def test_a_checkpoint_of_a_mixture_is_exported(run, tmp_path):
    mixed = []
    for path in checkpoints(run / "checkpoints"):
        tree = load_checkpoint(path)
        if tree["phase"] == "warmup" and len(tree["ranks"]) < len(tree["targets"]):
            mixed.append(path)
            _, difference = export_merged(run, tmp_path / f"{path.name}.safetensors", checkpoint=path)
            assert difference < 1e-4
    assert mixed


def test_the_log_replayed_switches_first_where_the_run_did(run):
    one = json.loads(replay_command([str(run), "--json"]))["runs"][0]

    assert one["switch_epochs"] == {"attn_out": 2}
    live = metrics(run)[1]["event"]
    assert one["ranks"] == live["ranks"]
    assert one["costs"] is None
    assert "run, per group: q -, k -, v -, attn_out 2, mlp_in -, mlp_out -." in replay_command([str(run)])
    with pytest.raises(ValueError, match="look for one switch: accepted is together"):
        replay_command([str(run), "--grid", "1", "1"])
