"""TensorBoard, Weights & Biases and MLflow mirror ``metrics.jsonl``: every epoch once, also over a resume."""

import functools
import json
import shutil
import signal
import struct
import sys
import warnings

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import TINY, copied, drop_newest, metrics, outcome, tiny, train

from prelora.train import loop
from prelora.train.config import from_dict, to_dict
from prelora.train.loggers import NEEDED, Mirrors, event_text, scalars

ALL = ("tensorboard", "wandb", "mlflow")
EPOCHS = list(range(1, TINY.epochs + 1))


@pytest.fixture(scope="module", autouse=True)
def environment():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT", "WANDB_DIR"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A run without any logger, and without their libraries."""
    output = tmp_path_factory.mktemp("bare") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for module in (*(name for needed in NEEDED.values() for name in needed), "torch.utils.tensorboard"):
            patch.setitem(sys.modules, module, None)
        assert train(tiny(output, loggers=())) == 0
    return output


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A run with all three, stopped by a signal at the end of epoch 4 and resumed."""
    output = tmp_path_factory.mktemp("resumed") / "run"
    end_epoch = loop.Trainer._end_epoch

    def interrupted(trainer):
        if trainer.progress.epoch == 3:
            signal.raise_signal(signal.SIGTERM)
        end_epoch(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "_end_epoch", interrupted)
        assert train(tiny(output, loggers=ALL)) == 75
    assert len(metrics(output)) == 3
    assert train(tiny(output, loggers=ALL, resume="auto")) == 0
    return output


@pytest.fixture(scope="module")
def redone(resumed, tmp_path_factory):
    """The same once more from its last checkpoint but one: its loggers hold an epoch that is trained again."""
    output = copied(resumed, tmp_path_factory.mktemp("redone") / "run")
    drop_newest(output)
    assert train(tiny(output, loggers=ALL, resume="auto")) == 0
    return output


def records(file):
    """What an offline run of W&B sent, in order; its file is a log of LevelDB's in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)  # after four bytes of checksum
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def wandb_history(output):
    """W&B's ids of the run, and its rows."""
    import wandb

    wandb.teardown()  # waits for its service, which may write the file only after finish() has returned
    files = sorted(output.glob("wandb/offline-run-*/run-*.wandb"))
    sent = [record for file in files for record in records(file)]
    rows = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in sent
        if record.WhichOneof("record_type") == "history"
    ]
    return {record.run.run_id for record in sent if record.WhichOneof("record_type") == "run"}, rows


@functools.cache
def client(database):
    import mlflow

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SQLAlchemy's of MLflow
        return mlflow.MlflowClient(f"sqlite:///{database}")


def mlflow_runs(database):
    held = client(database)
    return held.search_runs([experiment.experiment_id for experiment in held.search_experiments()])


def expected(output):
    """By tag and epoch, what a mirror of the metrics holds."""
    facts = json.loads((output / "run.json").read_text())
    return {line["epoch"]: scalars(line, facts) for line in metrics(output)}


def test_loggers_leave_the_training_as_it_is_also_over_a_resume(bare, resumed):
    assert outcome(resumed) == outcome(bare)


def test_without_loggers_nothing_of_theirs_is_written(bare):
    left = {path.name for path in bare.iterdir()}

    assert left == {"checkpoints", "config.yaml", "loggers.json", "metrics.jsonl", "run.json"}


@pytest.mark.parametrize("run", ["resumed", "redone"])
def test_wandb_holds_every_epoch_once_in_one_run(run, request):
    output = request.getfixturevalue(run)

    ids, rows = wandb_history(output)

    assert ids == {json.loads((output / "loggers.json").read_text())["wandb"]["id"]}
    assert [row["_step"] for row in rows] == EPOCHS


def test_wandb_holds_the_numbers_of_the_metrics(resumed):
    _, rows = wandb_history(resumed)

    for row in rows:
        held = {tag: value for tag, value in row.items() if not tag.startswith("_") and tag != "event"}
        assert held == pytest.approx(expected(resumed)[row["_step"]])


@pytest.mark.parametrize("run", ["resumed", "redone"])
def test_mlflow_holds_every_epoch_once_in_one_run(run, request):
    output = request.getfixturevalue(run)

    (held,) = mlflow_runs(output / "mlflow.db")

    assert held.info.status == "FINISHED"
    assert held.info.run_name == "run"
    for tag in held.data.metrics:
        history = client(output / "mlflow.db").get_metric_history(held.info.run_id, tag)
        epochs = [metric.step for metric in history]
        assert epochs == [epoch for epoch in EPOCHS if tag in {mlflow_tag(name) for name in expected(output)[epoch]}]


def mlflow_tag(tag):
    return tag.replace("[", "/").replace("]", "")


def test_mlflow_holds_the_numbers_and_the_config(resumed):
    (held,) = mlflow_runs(resumed / "mlflow.db")

    assert held.data.metrics == pytest.approx(
        {mlflow_tag(tag): value for tag, value in expected(resumed)[TINY.epochs].items()}
    )
    assert held.data.params["prelora.warmup_epochs"] == "2"
    assert held.data.params["model.embed_dim"] == "32"


def test_switch_and_freeze_stand_in_every_logger_with_their_reasons(resumed):
    events = {line["epoch"]: event_text(line["event"]) for line in metrics(resumed)}
    acted = {epoch: text for epoch, text in events.items() if text is not None}
    board = EventAccumulator(str(resumed / "tensorboard")).Reload()
    _, rows = wandb_history(resumed)
    (held,) = mlflow_runs(resumed / "mlflow.db")

    assert [text.split(":")[0] for text in acted.values()] == ["switch, now warmup", "freeze, now lora"]
    texts = board.Tensors("event/text_summary")
    assert {text.step: text.tensor_proto.string_val[0].decode() for text in texts} == acted
    assert {row["_step"]: row["event"] for row in rows if "event" in row} == acted
    tags = {name: value for name, value in held.data.tags.items() if name.startswith("event")}
    assert tags == {f"event.epoch_{epoch:04d}": text for epoch, text in acted.items()}


def test_tensorboard_holds_every_epoch_once_over_a_redone_epoch(redone):
    board = EventAccumulator(str(redone / "tensorboard")).Reload()

    assert [scalar.step for scalar in board.Scalars("train/loss")] == EPOCHS


def test_norms_by_group_are_means_over_layers_and_the_share_is_of_what_trained(resumed):
    line, values = metrics(resumed)[-1], expected(resumed)[TINY.epochs]
    facts = json.loads((resumed / "run.json").read_text())
    of_q = [line["norms"][f"blocks.{block}.attn.qkv[q]"] for block in range(2)]

    assert values["norm_by_group/q"] == pytest.approx(sum(of_q) / 2)
    assert values["train/trainable_share"] == line["trainable"] / facts["parameters"] < 1


def test_a_logger_chosen_later_gets_the_epochs_before_it(bare, tmp_path):
    output = copied(bare, tmp_path / "run")
    drop_newest(output)

    assert train(tiny(output, loggers=("wandb",), resume="auto")) == 0

    _, rows = wandb_history(output)
    assert [row["_step"] for row in rows] == EPOCHS


def test_mlflow_goes_to_the_tracking_uri_and_a_new_run_is_one_of_its_own(resumed, tmp_path, monkeypatch):
    shutil.copy(resumed / "mlflow.db", tmp_path / "other.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    config = tiny(tmp_path, loggers=("mlflow",))
    (tmp_path / "loggers.json").write_text((resumed / "loggers.json").read_text())  # of a run that has lost its log

    Mirrors(config, {}, []).close(done=False)

    assert not (tmp_path / "mlflow.db").exists()
    assert sorted(run.info.status for run in mlflow_runs(tmp_path / "other.db")) == ["FINISHED", "KILLED"]


@pytest.mark.parametrize("name", ALL)
def test_a_logger_that_is_not_installed_is_an_error_with_the_command(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, NEEDED[name][0], None)

    code = train(tiny(tmp_path / "run", loggers=(name,)))

    extra = {"tensorboard": "train"}.get(name, name)
    assert code == 2
    assert f"loggers = {name}: {name} not installed; pip install 'prelora[{extra}]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_logger_twice_is_refused():
    with pytest.raises(ValueError, match=r"loggers = wandb wandb: each at most once"):
        tiny("run", loggers=("wandb", "wandb"))


def test_loggers_are_read_back_from_yaml_and_unknown_ones_refused():
    values = to_dict(tiny("run", loggers=ALL))

    assert from_dict(values).loggers == ALL
    with pytest.raises(TypeError, match="loggers"):
        from_dict({**values, "loggers": ["comet"]})
