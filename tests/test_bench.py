"""The benchmarks' own logic: turns, paired ratios, bounds, the gate, equal functions and sets, the report."""

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # bench is not installed; at the end, where our kernels/ shadows nothing

from bench import bounds, gate, interleave, others, report  # noqa: E402
from bench.interleave import Interleaved, NotRun, Variant  # noqa: E402
from bench.rows import Row, Spread, summarize  # noqa: E402
from bench.table import markdown_table, plain_table  # noqa: E402
from prelora.errors import ProviderError  # noqa: E402
from prelora.nn import LoRALinear  # noqa: E402
from prelora.ops.cases import LinearCase, linear_tensors  # noqa: E402

CPU = torch.device("cpu")
CASE = LinearCase(20, 12, (8, 8, 8), (4, 1, 2))


# Turns


def test_variants_take_turns_part_by_part():
    calls = []
    variants = [
        Variant("a", {"forward": lambda: calls.append("a1"), "backward": lambda: calls.append("a2")}),
        NotRun("left out", "for a reason"),
        Variant("b", {"forward": lambda: calls.append("b1")}, "peer"),
    ]
    interleaved = Interleaved(variants, CPU)

    for _ in range(3):
        interleaved.round()

    assert calls == ["a1", "a2", "b1"] * 3
    assert {name: [*parts] for name, parts in interleaved.samples.items()} == {
        "a": ["forward", "backward", "both"],
        "b": ["forward"],
    }
    parts = interleaved.samples["a"]
    assert [*map(sum, zip(parts["forward"], parts["backward"], strict=True))] == pytest.approx(parts["both"])


def test_what_is_short_is_repeated_within_one_timing(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(interleave.time, "perf_counter", lambda: next(clock) * 1e-4)
    calls = []
    interleaved = Interleaved([Variant("short", {"call": lambda: calls.append(0)})], CPU)

    interleaved.warm_up(turns=2)
    calls.clear()
    interleaved.round()

    assert len(calls) == 20  # of 0.1 ms, in 2 ms
    assert interleaved.samples["short"]["call"] == [pytest.approx(1e-4)]


def test_a_variant_that_its_provider_refuses_is_not_run_and_says_why():
    def refuse():
        raise ProviderError("there is no such device")

    interleaved = Interleaved([Variant("far", {"call": refuse}), Variant("near", {"call": int}, "peer")], CPU)
    interleaved.warm_up()
    interleaved.round()

    far, near = summarize("suite", "cell", interleaved.variants, interleaved.samples)
    assert (far.value, far.not_run) == (None, "there is no such device")
    assert near.value is not None


# Ratios


def variants_and_samples():
    bound = bounds.Bound("frozen", {"forward": 1.0, "backward": 2.0, "both": 1.5}, "FLOPs")
    parts = {"forward": int, "backward": int}
    variants = [
        Variant("frozen", parts, "peer"),
        Variant("ours", parts, bound=bound, note=lambda: "provider cpu"),
        Variant("share", {"merge": int}, within_whole=True),
        NotRun("compiled", "takes minutes", "peer"),
    ]
    # The machine slows down by ten in the second round, for all alike.
    samples = {
        "frozen": {"forward": [1.0, 10.0, 1.0], "backward": [1.0, 10.0, 1.0], "both": [2.0, 20.0, 2.0]},
        "ours": {"forward": [1.0, 10.0, 1.0], "backward": [3.0, 30.0, 3.0], "both": [4.0, 40.0, 4.0]},
        "share": {"merge": [0.2, 2.0, 0.2]},
    }
    return variants, samples


def test_ratios_are_paired_within_a_round():
    summarized = {(row.variant, row.part): row for row in summarize("suite", "cell", *variants_and_samples())}

    ours = summarized["ours", "backward"]
    assert ours.peers == {"frozen": Spread(3.0, 3.0, 3.0)}  # a slow round has slow peers
    assert ours.bound == Spread(1.5, 1.5, 1.5)
    assert ours.value == Spread(3e3, 3e3, 16.5e3)
    assert summarized["ours", "both"].bound.median == pytest.approx(4 / 3)
    assert summarized["frozen", "both"].peers == {}
    assert summarized["share", "merge"].peers["frozen"].median == pytest.approx(0.1)  # of the peer's whole
    assert summarized["compiled", ""].not_run == "takes minutes"


def test_of_two_bounds_the_larger_counts_in_each_round():
    by_copy = bounds.byte_bound("copy", {"merge": 200}, 100)
    variants = [Variant("ours", {"merge": int}, bound=bounds.roofline(by_copy, "gemm", {"merge": 300}, 100))]
    samples = {"copy": {"copy": [1.0, 4.0]}, "gemm": {"gemm": [1.0, 1.0]}, "ours": {"merge": [6.0, 6.0]}}

    (row,) = summarize("suite", "cell", variants, samples)

    assert row.bound == Spread.of([6 / 3, 6 / 8])


def test_rows_survive_json():
    for row in summarize("suite", "cell", *variants_and_samples()):
        assert Row.from_dict(json.loads(json.dumps(asdict(row)))) == row


# Bounds


def test_a_layers_bounds_are_its_flops():
    case = LinearCase(100, 64, (96,), (16,))
    gemm, through_a, through_b = 2 * 100 * 64 * 96, 2 * 100 * 16 * 64, 2 * 100 * 16 * 96

    of = bounds.layer_bounds(case, "frozen")

    assert of["full"].factors == {"forward": 1, "backward": 2, "both": 1.5}
    assert of["lora"].factors["both"] == pytest.approx((2 * gemm + 2 * through_a + 2 * through_b) / (2 * gemm))
    assert of["lora, A frozen"].factors["forward"] == pytest.approx((gemm + through_a) / gemm)
    assert of["lora, A frozen"].factors["both"] == pytest.approx((2 * gemm + through_a + through_b) / (2 * gemm))


def test_the_copy_moves_what_it_says_and_no_more_than_fits():
    copy, moved = bounds.copy_of(8000, CPU)
    copy()

    assert moved == 8000
    assert bounds.byte_bound("copy", {"merge": 16000}, moved).factors == {"merge": 2.0}


# The gate


@pytest.mark.parametrize(
    ("body", "green", "said"),
    [
        ("def test_op(): pass\ndef test_other(): assert False", True, "1 passed, 1 deselected"),
        ("def test_op(): assert False", False, "FAILED"),
        ("def test_other(): pass", False, "1 deselected"),
    ],
    ids=["green", "red", "no such test"],
)
def test_only_green_tests_open_the_gate(tmp_path, body, green, said):
    file = tmp_path / "test_it.py"
    file.write_text(body, encoding="utf-8")

    verdict = gate.verdict("op", file)

    assert verdict.green == green
    assert said in verdict.summary


# Equal work


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_variants_of_a_layer_compute_the_same_function(precision):
    pytest.importorskip("peft")
    from bench import layers, peers
    from bench.precision import PRECISIONS, autocast

    tensors = linear_tensors(CASE, PRECISIONS[precision], torch.float32)
    modules = [
        peers.peft_layer(CASE, tensors, False),
        peers.Accumulate(CASE, tensors),
        peers.Reference(CASE, tensors),
        layers.lora_layer(CASE, tensors),
        layers.lora_layer(CASE, tensors, execution="two_path"),
    ]
    delta = peers.block_diagonal(CASE, tensors) @ tensors.lora_a
    expected = tensors.x.float() @ (tensors.weight + delta).t() + tensors.bias
    dx = tensors.dy.float() @ (tensors.weight + delta)
    da = peers.block_diagonal(CASE, tensors).t() @ tensors.dy.float().t() @ tensors.x.float()
    exact = {"rtol": 1e-4, "atol": 1e-4} if precision == "fp32" else {"rtol": 0.1, "atol": 0.2}

    for module in modules:
        x = tensors.x.clone().requires_grad_()
        with autocast(precision):
            y = module(x)
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        lora_a = next(p for name, p in trained.items() if "lora_a" in name.lower())
        grads = torch.autograd.grad(y, [x, lora_a], tensors.dy)
        torch.testing.assert_close(y.float(), expected, **exact)
        torch.testing.assert_close(grads[0].float(), dx, **exact)
        torch.testing.assert_close(grads[1], da, **exact)
        assert len(trained) == 2  # A and B, wherever the base is frozen


def test_every_variant_of_a_layer_runs():
    pytest.importorskip("peft")
    from bench.layers import layer_variants

    with ExitStack() as opened:
        interleaved = Interleaved(layer_variants(CASE, "fp32", "not here", opened), CPU)
        interleaved.round()
        named = {row.variant: row for row in summarize("s", "c", interleaved.variants, interleaved.samples)}

    assert {"full", "frozen", "PEFT", "PEFT compiled", "accumulate", "prelora merged"} <= named.keys()
    assert named["PEFT compiled"].not_run == "not here"
    assert named["prelora merged"].peers.keys() == {"full", "frozen", "PEFT", "PEFT joint", "accumulate", "reference"}


@pytest.fixture(scope="module")
def tiny_base():
    pytest.importorskip("peft")
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    return timm_vit.VisionTransformer(img_size=32, patch_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=10)


@pytest.mark.parametrize("qkv", ["sliced", "fused"])
def test_peft_and_prelora_train_the_same_parameters(tiny_base, qkv):
    from bench import models

    cell = models.StepCell("tiny", 2, 4, "fp32", qkv)
    trains, lora = {}, {}
    for way in models.WAYS:
        named = models.build(way, cell, tiny_base).named_parameters()
        kept = {models.plain_name(name): p for name, p in named if p.requires_grad}
        trains[way] = {name for name in kept if "lora_" not in name}
        lora[way] = sum(p.numel() for name, p in kept.items() if "lora_" in name)

    assert trains[models.FROZEN] == trains[models.PEFT] == trains[models.LORA] == trains[models.B_ONLY]
    assert trains[models.FULL] == trains[models.PEFT_JOINT] == trains[models.WARMUP]
    assert {"head.weight", "norm.weight", "pos_embed"} <= trains[models.LORA]
    assert not any("qkv" in name or "mlp" in name for name in trains[models.LORA])
    per_block = 4 * (32 + 32) + 2 * 4 * (32 + 128)  # attn_out, mlp_in and mlp_out
    ours, theirs = {"fused": (4 * (32 + 96),) * 2, "sliced": (3 * 4 * (32 + 32), 12 * (32 + 96))}[qkv]
    assert lora[models.LORA] == 2 * (per_block + ours)
    assert lora[models.PEFT] == 2 * (per_block + theirs)


def test_all_ways_share_the_bases_memory_and_moments(tiny_base):
    from bench import models, steps

    cell = models.StepCell("tiny", 2, 4, "bf16", "sliced")
    interleaved = Interleaved(steps.step_variants(cell, tiny_base, "not here"), CPU)
    interleaved.round()
    full, joint = (models.trained(way, cell, tiny_base, image_size=32) for way in (models.FULL, models.PEFT_JOINT))
    moments = models.Moments()
    for run in (full, joint):
        run.step()
        moments.share(run.model, run.optimizer)

    assert all(parameter.grad is None for parameter in full.model.parameters())
    theirs = {models.plain_name(name): p for name, p in joint.model.named_parameters()}
    for name, parameter in full.model.named_parameters():
        assert theirs[name].data_ptr() == parameter.data_ptr()
        assert joint.optimizer.state[theirs[name]]["exp_avg"] is full.optimizer.state[parameter]["exp_avg"]
    found = summarize("train_step", cell.name, interleaved.variants, interleaved.samples)
    by_name = {row.variant: row for row in found}
    assert by_name[models.LORA].peers.keys() == {models.FULL, models.FROZEN, models.PEFT, models.PEFT_JOINT}
    assert "layers" in by_name[models.LORA].note
    assert by_name["full compiled"].not_run == "not here"


def test_memory_is_counted_by_item(tiny_base):
    from bench import memory, models

    cell = models.StepCell("tiny", 3, 4, "fp32", "sliced")
    runs = {
        way: models.trained(way, cell, tiny_base, image_size=32) for way in (models.FULL, models.LORA, models.B_ONLY)
    }
    items = {way: memory.probe(run) for way, run in runs.items()}
    weights = sum(parameter.nbytes for parameter in tiny_base.parameters())
    layers = [module for module in runs[models.LORA].model.modules() if isinstance(module, LoRALinear)]

    assert items[models.FULL] == {
        "weights": weights,
        "LoRA": 0,
        "gradients": weights,
        "optimizer": 2 * weights + 4 * len([*tiny_base.parameters()]),  # two moments, and a step each
        "activations": items[models.FULL]["activations"],
        "W_eff or cast weights": 0,
    }
    assert items[models.LORA]["W_eff or cast weights"] == sum(
        layer.weight.nbytes for layer in layers if layer.last_plan.execution == "merged"
    )
    assert items[models.LORA]["gradients"] < items[models.FULL]["gradients"]
    assert items[models.B_ONLY]["activations"] < items[models.LORA]["activations"]


# The report


def saved(tmp_path, tests=None, others=0.0):
    measured = summarize("train_step", "ViT-S", *variants_and_samples())
    full = {row.variant: row for row in measured}["frozen"]
    steps = [
        Row("train_step", "ViT-S", "step", "full", "peer", value=full.value, rounds=3),
        Row("train_step", "ViT-S", "step", "prelora LORA", value=full.value, rounds=3,
            peers={"full": Spread(0.83, 0.8, 0.86)}, bound=Spread(1.1, 1.0, 1.2), note="at best 0.73 of full"),
        Row("memory", "ViT-S", "peak", "full", "peer", "MiB", Spread(900.0, 900.0, 900.0), 1,
            items={"weights": 300.0, "activations": 500.0}),
    ]  # fmt: skip
    cells = [
        {"extra_info": {"rows": [asdict(replace(row, others=others)) for row in group], "tests": tests}}
        for group in (measured, steps)
    ]
    path = tmp_path / "out.json"
    content = {"machine_info": {"environment": {"cpu": "a CPU", "threads": 2}}, "benchmarks": cells}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_the_report_is_a_table_and_a_picture(tmp_path, capsys):
    path = saved(tmp_path, {"lora_linear": "300 passed"})

    assert report.main([str(path), "--output", str(tmp_path / "report")]) == 0

    printed = capsys.readouterr().out
    assert "- ViT-S, prelora LORA: 0.83 ± 0.03 of full; 1.10 ± 0.10 of its bound (at best 0.73 of full)" in printed
    assert "not run: takes minutes" in printed
    assert "- tests of lora_linear: 300 passed" in printed
    assert "Not to be trusted" not in printed
    written = {file.name: file for file in (tmp_path / "report").iterdir()}
    assert written.keys() == {"bench.md", "bench.png", "bench.svg"}
    assert written["bench.md"].read_text(encoding="utf-8").strip() == printed.strip()
    assert written["bench.png"].stat().st_size > 10_000


def test_the_headline_holds_no_times(tmp_path):
    text = report.markdown([report.load(saved(tmp_path, {"lora_linear": "300 passed"}))])

    assert " ms" not in text[: text.index("|")]


def test_forward_and_backward_alone_are_shown_when_asked_for(tmp_path, capsys):
    path = saved(tmp_path, {"lora_linear": "300 passed"})

    report.main([str(path)])
    assert "| backward " not in capsys.readouterr().out
    report.main([str(path), "--all-parts"])
    assert "| backward " in capsys.readouterr().out


@pytest.mark.parametrize(("content", "said"), [("{}", "is not what"), (None, "without a record of green")])
def test_what_cannot_be_reported_is_refused(tmp_path, capsys, content, said):
    path = saved(tmp_path)
    if content is not None:
        path.write_text(content, encoding="utf-8")

    assert report.main([str(path)]) == 2
    assert said in capsys.readouterr().err


def test_a_disturbed_measurement_makes_no_headline(tmp_path):
    text = report.markdown([report.load(saved(tmp_path, {"lora_linear": "300 passed"}, others=0.4))])

    assert "No training steps were measured undisturbed" in text
    assert "**Not to be trusted**, since other processes took so much of the cores: train_step ViT-S (40%)." in text
    assert ", others 40%" in text


def test_what_others_take_is_seen():
    with others.watched() as nothing_else:
        time.sleep(0.05)
    assert nothing_else.share is None or 0 <= nothing_else.share <= 1
    assert "other" in str(nothing_else)


def test_table_columns_line_up():
    lines = markdown_table(summarize("suite", "cell", *variants_and_samples())).splitlines()

    assert len({line.index("|", 20) for line in lines}) == 1
    assert "**ours**" in lines[5]
    assert "÷ bound" in plain_table(summarize("suite", "cell", *variants_and_samples()))
