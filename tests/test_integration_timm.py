"""timm's own loop with PreLoRA in it, as the example has it: three phases, resume, and files that timm loads."""

import importlib.util

import pytest
import timm
import torch
from launching import EXAMPLES, assert_equal, run_example
from models import config, images, labels, start, tiny_vit, until
from safetensors.torch import save_file
from timm import utils
from timm.models import load_checkpoint, model_parameters
from timm.optim import create_optimizer_v2
from tiny_runs import TINY, finished
from torch import nn

from prelora import PreLoRA, cli, surgery
from prelora.nn import LoRALinear

PHASES = ["full", "warmup", "warmup", "lora", "lora"]
"""After each epoch of the fixture's run; each has a checkpoint."""


def load_example():
    spec = importlib.util.spec_from_file_location("timm_train", EXAMPLES / "timm_train.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


example = load_example()


def train(output, *options):
    """The example in this process, on 100 images: two updates an epoch."""
    sizes = ["--train-images", "100", "--batch-size", "50", "--epochs", "5", "--lr", "0.002", "--device", "cpu"]
    return example.main([*sizes, "--output", str(output), *options])


def read(path):
    return torch.load(path, weights_only=True)


def stock(**options):
    return timm.create_model("vit_tiny_patch16_224", **example.MODEL, **options).eval()


@torch.no_grad()
def assert_same_logits(one, other):
    x = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = other.eval()(x)
    torch.testing.assert_close(one.eval()(x), expected)
    assert expected.std() > 0.05  # not a comparison of nothing with nothing


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run and all its checkpoints."""
    folder = tmp_path_factory.mktemp("timm")
    return folder, train(folder, "--checkpoint-hist", "100")


@pytest.fixture(scope="module")
def states(whole):
    return [read(whole[0] / f"checkpoint-{epoch}.pth.tar") for epoch in range(len(PHASES))]


def test_the_loop_goes_through_all_three_phases(whole, states):
    _, pre = whole

    assert [state["optimizer"]["phase"] for state in states] == PHASES
    assert pre.step == 2 * len(PHASES)


def test_every_layer_has_its_planned_rank(whole):
    _, pre = whole

    assert surgery.realised_ranks(pre.base_model, pre.targets) == pre.ranks


def test_a_frozen_weight_stays_as_it_was_and_lora_trains(states):
    first, last = (state["optimizer"]["model"] for state in (states[3], states[4]))

    for path in ("blocks.0.attn.qkv", "blocks.1.mlp.fc2"):
        assert torch.equal(first[f"{path}.weight"], last[f"{path}.weight"])
        assert not torch.equal(first[f"{path}.lora_B"], last[f"{path}.lora_B"])


@pytest.mark.parametrize("epoch", [0, 1, 2, 3])
def test_a_resumed_run_equals_the_uninterrupted_one(whole, epoch, tmp_path):
    folder, pre = whole

    resumed = train(tmp_path, "--resume", str(folder / f"checkpoint-{epoch}.pth.tar"))

    assert_equal(resumed.state_dict(), pre.state_dict())


def test_the_saver_rotates_its_files_and_the_last_one_resumes(whole, tmp_path):
    _, pre = whole
    train(tmp_path, "--checkpoint-hist", "2")
    best = read(tmp_path / "model_best.pth.tar")["metric"]

    resumed = train(tmp_path, "--checkpoint-hist", "2", "--resume", str(tmp_path / "last.pth.tar"))

    kept = sorted(path.name for path in tmp_path.iterdir())
    assert len(kept) == 5
    assert {"last.pth.tar", "model_best.pth.tar", "merged.pth"} < set(kept)
    assert max(read(tmp_path / name)["metric"] for name in kept if name.startswith("checkpoint")) == best
    assert_equal(resumed.state_dict(), pre.state_dict())


@pytest.mark.parametrize("epoch", [0, 2, 4])
def test_timm_loads_every_checkpoint_of_its_saver(states, whole, epoch):
    path = whole[0] / f"checkpoint-{epoch}.pth.tar"
    trained = stock()
    state = states[epoch]["optimizer"]
    if state["ranks"]:
        surgery.inject(trained, whole[1].targets, state["ranks"])

    trained.load_state_dict(state["ema"])
    assert_same_logits(stock(checkpoint_path=path), trained)  # timm takes the average if there is one

    weights = stock()
    load_checkpoint(weights, path, use_ema=False)
    trained.load_state_dict(state["model"])
    assert_same_logits(weights, trained)


@pytest.mark.parametrize("name", ["merged.pth", "merged.safetensors"])
def test_timm_loads_the_merged_model(whole, tmp_path, name):
    _, pre = whole
    merged = pre.merged_state_dict()
    (save_file if name.endswith("safetensors") else torch.save)(merged, tmp_path / name)

    assert_same_logits(stock(checkpoint_path=tmp_path / name), pre.base_model)


def test_timm_loads_what_the_command_exports(tmp_path):
    run = finished(tmp_path / "run", prelora={"alpha": 8.0}, optim={"lr": 5e-3})
    assert cli.main(["export", str(run), "--to", "merged"]) == 0
    sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2}

    model = timm.create_model(
        TINY.model.name, **sizes, num_classes=10, checkpoint_path=run / "export" / "merged.safetensors"
    )

    assert not any(isinstance(layer, LoRALinear) for layer in model.modules())


# The scaler: it runs backward, clips and steps in one call.


def until_warmup(**options):
    pre = start(tiny_vit, **options)
    until(pre, "warmup")
    return pre


def scaled_step(pre, **options):
    loss = nn.functional.cross_entropy(pre.model(images(4)), labels(4))
    utils.NativeScaler(device="cpu")(loss, pre.optimizer, parameters=model_parameters(pre.model), **options)


def test_the_scaler_clips_lora_with_the_rest():
    pre = until_warmup()

    scaled_step(pre, clip_grad=1e-3)

    grads = [parameter.grad for parameter in pre.model.parameters()]
    assert torch.stack([grad.norm() for grad in grads]).norm() == pytest.approx(1e-3, rel=1e-3)
    adapted = [layer for layer in pre.model.modules() if isinstance(layer, LoRALinear)]
    assert all((layer.lora_B.grad != 0).any() for layer in adapted)


def test_deferred_gradients_are_made_within_the_scalers_step():
    deferred, plain = until_warmup(defer_lora_grads=True), until_warmup()

    for pre in (deferred, plain):
        scaled_step(pre)

    ours, theirs = (dict(pre.base_model.named_parameters()) for pre in (deferred, plain))
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name], parameter)


def test_the_scaler_refuses_the_optimizer_that_was_replaced():
    model = tiny_vit()
    old = create_optimizer_v2(model, opt="adamw", lr=1e-3)
    pre = PreLoRA(model, old, config())
    until(pre, "warmup")
    pre.optimizer = old

    with pytest.raises(RuntimeError, match=r"was replaced at the switch: use pre\.optimizer"):
        scaled_step(pre)


# The command, on two ranks.


def test_the_example_runs_on_two_ranks(tmp_path):
    sizes = ["--train-images", "200", "--batch-size", "50", "--device", "cpu"]

    lines = run_example("timm_train.py", "--output", str(tmp_path), *sizes, ranks=2).splitlines()

    assert list(dict.fromkeys(line.split()[2] for line in lines if line.startswith("epoch"))) == list(
        dict.fromkeys(PHASES)
    )
    assert "in a stock vit_tiny_patch16_224: logits differ by" in lines[-1]
    assert read(tmp_path / "last.pth.tar")["optimizer"]["phase"] == "lora"
