"""Figures of synthetic runs; ``write_run`` also serves the report's tests."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from prelora.analysis import figures
from prelora.analysis.records import load_run
from prelora.analysis.summary import rank_grid

GROUPS = ("q", "k", "v", "attn_out", "mlp_in", "mlp_out")
SPEED = {"full": 100.0, "warmup": 96.0, "lora": 130.0}
"""Median images per second of each phase."""
ACTIVATIONS = 30 << 20
OTHERS = 150_000
"""Parameters that are no target's."""
PARTS = {"data": 0.1, "forward": 0.3, "backward": 0.5, "communication": 0.0, "optimizer": 0.1}
FLOPS = {"full": 36.0e9, "warmup": 36.0e9, "lora": 26.0e9}


def _targets(layers, width):
    sizes = {"mlp_in": (width, 4 * width), "mlp_out": (4 * width, width)}
    paths = {"q": "attn.qkv", "k": "attn.qkv", "v": "attn.qkv", "attn_out": "attn.proj", "mlp_in": "mlp.fc1"}
    found = []
    for layer in range(layers):
        for index, group in enumerate(GROUPS):
            path = f"blocks.{layer}.{paths.get(group, 'mlp.fc2')}"
            sliced = group in ("q", "k", "v")
            inputs, outputs = sizes.get(group, (width, width))
            found.append(
                {
                    "name": f"{path}[{group}]" if sliced else path,
                    "path": path,
                    "rows": [index * width, (index + 1) * width] if sliced else None,
                    "group": group,
                    "layer": layer,
                    "in_features": inputs,
                    "out_features": outputs,
                }
            )
    return found


def _actions(full, warmup, lora):
    if not warmup:
        return {full: "switch+freeze"} if lora else {}
    return {full: "switch"} | ({full + warmup: "freeze"} if lora else {})


def _event(phase, action, ranks, tested, progress):
    norm, loss = 6 * math.exp(-3.5 * progress), 12 * math.exp(-2 * progress)
    passed = "every group and the loss passed"
    reason = {"switch": passed, "switch+freeze": passed, "freeze": "the warm-up is over"}.get(action, "")
    return {
        "phase": phase,
        "action": action,
        "reason": "mlp_out changed by more than tau = 0.5 %" if tested and not reason else reason,
        "norm_changes": {g: [norm * (1 + i / 6), -0.8 * norm] for i, g in enumerate(GROUPS)} if tested else {},
        "loss_changes": [-loss, -0.9 * loss] if tested else [],
        "ranks": ranks,
        "released": {},
        "trainable_share": 0.06,
        "plan_flops": FLOPS if ranks else None,
    }


def _scores(progress):
    return {
        "loss": 2.2 * math.exp(-3 * progress) + 0.3,
        "top1": 90 - 80 * math.exp(-4 * progress),
        "top5": 99 - 50 * math.exp(-6 * progress),
        "images": 500,
    }


def _norms(targets, progress):
    def size(target):
        return 12 + 6 * target["group"].startswith("mlp") + GROUPS.index(target["group"])

    grown = 1 - 0.6 * math.exp(-4 * progress)
    return {t["name"]: size(t) * grown * (1 - 0.3 * math.exp(-4 * progress) * t["layer"] / 24) for t in targets}


def _memory(parameters, dense, adapters):
    """Bytes by item, with ``dense`` trainable parameters beside the adapters."""
    return {
        "weights": 4 * parameters,
        "lora": 4 * adapters,
        "gradients": 4 * (dense + adapters),
        "optimizer": 8 * (dense + adapters),
        "ema": 4 * (parameters + adapters),
    }


def _line(epoch, phase, progress, norms, memory):
    """What of an epoch's line does not depend on the plan."""
    speed, switched = SPEED[phase] * (1 + 0.02 * ((epoch * 7) % 3 - 1)), phase != "full"
    return {
        "epoch": epoch,
        "step": epoch * 20,
        "phase": phase,
        "loss": 2.3 * math.exp(-3 * progress) + 0.2,
        "lr": 1e-3 * min(1, epoch / 5) * 0.5 * (1 + math.cos(math.pi * progress)),
        "images": 1280,
        "seconds": 1280 / speed,
        "parts": {part: share * 1280 / speed for part, share in PARTS.items()},
        "img_per_s": speed,
        "img_per_s_computing": speed / 0.9,
        "flop_per_s": 1e9 * speed,
        "peak_share": 0.5,
        "communication": {},
        "peak_memory_bytes": sum(memory.values()) + ACTIVATIONS,
        "memory": memory,
        "norms": norms,
        "base_norms": {name: 0.99 * norm for name, norm in norms.items()},
        "lora_norms": {name: 0.08 * norm * progress for name, norm in norms.items()} if switched else {},
        "update": {name: 0.05 * math.exp(-3 * progress) for name in norms},
        "eval": _scores(progress) if epoch % 2 == 0 or progress == 1 else None,
        "ema_eval": _scores(1.2) if progress == 1 else None,
        "skipped_steps": 0,
    }


def _run_json(targets, parameters, epochs, warmup):
    return {
        "prelora": "0.1.0",
        "torch": "2.14.1",
        "recipe": "digits_tiny",
        "model": "vit_tiny",
        "device": "cpu",
        "world_size": 1,
        "parameters": parameters,
        "classes": 10,
        "channels": 1,
        "targets": targets,
        "epochs": epochs,
        "global_batch": 64,
        "peak_flop_per_s": 4e11,
        "config": {"k": 3, "m": 3, "tau": 0.5, "zeta": 2.5, "r_min": 8, "r_max": 64, "warmup_epochs": warmup},
        "flops": {"full": FLOPS["full"]},
        "environment": {"cpu": "Some CPU", "cores": 2, "gpu": None, "precision": "fp32"},
    }


def write_run(folder, full=9, warmup=3, lora=6, *, planned=None, layers=3, width=128, nan_epochs=(), **info) -> Path:
    """A run's folder with this many epochs in each phase; ``info`` overrides fields of ``run.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    targets, total = _targets(layers, width), full + warmup + lora
    frozen = sum(t["in_features"] * t["out_features"] for t in targets)
    parameters = frozen + OTHERS
    run = _run_json(targets, parameters, total if planned is None else planned, warmup)
    (folder / "run.json").write_text(json.dumps(run | info))
    plan = {t["name"]: 8 << (5 * t["layer"] + 3 * GROUPS.index(t["group"])) % 4 for t in targets}
    size = sum(plan[t["name"]] * (t["in_features"] + t["out_features"]) for t in targets)
    actions, lines = _actions(full, warmup, lora), []
    for epoch in range(1, total + 1):
        phase = "full" if epoch <= full else "warmup" if epoch <= full + warmup else "lora"
        action, progress = actions.get(epoch, "none"), epoch / total
        after = {"switch": "warmup", "freeze": "lora", "switch+freeze": "lora"}.get(action, phase)
        dense, adapters = OTHERS if phase == "lora" else parameters, 0 if phase == "full" else size
        line = _line(epoch, phase, progress, _norms(targets, progress), _memory(parameters, dense, adapters))
        tested = phase == "full" and epoch >= 9 and epoch % 3 == 0
        event = _event(after, action, {} if after == "full" else plan, tested, epoch / max(full, 1))
        if "freeze" in action:
            event["released"] = {"gradients": 4 * frozen, "optimizer_state": 8 * frozen}
        lost = {"loss": None} if epoch in nan_epochs else {}
        lines.append(line | {"trainable": dense + adapters, "event": event} | lost)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_all_kinds(folder: Path) -> dict[str, Path]:
    """A run of each kind that the figures and the report must cope with."""
    cut = write_run(folder / "cut", 9, 2, 0, planned=30)
    with (cut / "metrics.jsonl").open("a") as stream:
        stream.write('{"epoch": 12, "step": 240, "pha')
    return {
        "whole": write_run(folder / "whole", nan_epochs=(7,)),
        "never": write_run(folder / "never", 12, 0, 0),
        "cut": cut,
        "single": write_run(folder / "single", 1, 0, 0, planned=5, nan_epochs=(1,)),
        "direct": write_run(folder / "direct", 3, 0, 2),
    }


ALL = (
    figures.norms_by_group,
    figures.norms_by_layer,
    figures.loss_and_accuracy,
    figures.rank_map,
    figures.window_changes,
    figures.throughput,
    figures.memory,
    figures.lora_norms,
    figures.learning_rate,
    figures.updates,
)
OVER_EPOCHS = (figures.norms_by_group, figures.norms_by_layer, figures.loss_and_accuracy, figures.learning_rate)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_all_kinds(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def runs(folders):
    return {kind: load_run(folder) for kind, folder in folders.items()}


def raw_lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def lines_by_label(axes):
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def upright_lines(axes):
    """Where lines that span the axes from foot to top stand, with their style."""
    found = [line for line in axes.lines if len(line.get_xdata()) == 2 and list(line.get_ydata()) == [0, 1]]
    return {float(line.get_xdata()[0]): line.get_linestyle() for line in found}


@pytest.mark.parametrize("draw", ALL, ids=lambda draw: draw.__name__)
@pytest.mark.parametrize("kind", ["whole", "never", "cut", "single", "direct"])
def test_every_figure_draws_every_run_and_names_its_axes(runs, draw, kind, tmp_path):
    figure = draw(runs[kind])
    if kind == "whole":  # the report's tests render the others
        target = tmp_path / "figure.png"
        figure.savefig(target, dpi=30)
        assert target.stat().st_size > 1000
    for axes in figure.axes:
        if axes.get_visible():
            assert axes.get_ylabel(), draw.__name__
            assert axes.get_xlabel() or axes.get_label() == "<colorbar>", draw.__name__


@pytest.mark.parametrize("draw", OVER_EPOCHS, ids=lambda draw: draw.__name__)
def test_time_plots_show_switch_dashed_and_freeze_solid(runs, draw):
    panels = [axes for axes in draw(runs["whole"]).axes if axes.get_xlabel() == "epoch"]
    for axes in panels:
        assert upright_lines(axes) == {9.5: "--", 12.5: "-"}
        bands = [tuple(patch.get_extents().transformed(axes.transData.inverted()).intervalx) for patch in axes.patches]
        assert bands == [pytest.approx((0.5, 9.5)), pytest.approx((9.5, 12.5)), pytest.approx((12.5, 18.5))]
    assert all(not upright_lines(axes) for axes in draw(runs["never"]).axes)


def test_switch_and_freeze_at_once_are_one_boundary(runs):
    (axes,) = figures.learning_rate(runs["direct"]).axes
    assert list(upright_lines(axes)) == [3.5]


def test_norms_are_the_means_over_layers(folders, runs):
    lines = lines_by_label(figures.norms_by_group(runs["whole"]).axes[0])
    raw = raw_lines(folders["whole"])
    for group in ("q", "mlp_out"):
        leaf = {"q": "attn.qkv[q]", "mlp_out": "mlp.fc2"}[group]
        means = [sum(line["norms"][f"blocks.{layer}.{leaf}"] for layer in range(3)) / 3 for line in raw]
        assert list(lines[group].get_ydata()) == pytest.approx(means)
        assert list(lines[group].get_xdata()) == list(range(1, 19))
    assert list(lines) == list(GROUPS)


def test_groups_differ_without_colour(runs):
    lines = lines_by_label(figures.norms_by_group(runs["whole"]).axes[0]).values()
    assert len({line.get_marker() for line in lines}) == len(GROUPS)
    assert len({str(line._unscaled_dash_pattern) for line in lines}) == len(GROUPS)


def test_layers_have_a_line_each(folders, runs):
    panels = [axes for axes in figures.norms_by_layer(runs["whole"]).axes if axes.get_xlabel() == "epoch"]
    assert [axes.get_title(loc="left") for axes in panels] == list(GROUPS)
    fc1 = [line["norms"]["blocks.1.mlp.fc1"] for line in raw_lines(folders["whole"])]
    assert list(panels[4].lines[1].get_ydata()) == pytest.approx(fc1)


def test_lost_losses_are_gaps_marked_at_the_foot(runs):
    upper, lower = figures.loss_and_accuracy(runs["whole"]).axes
    lines = lines_by_label(upper)
    losses = lines["training"].get_ydata()
    assert [epoch for epoch, loss in enumerate(losses, start=1) if math.isnan(loss)] == [7]
    assert list(lines["training not finite"].get_xdata()) == [7]
    assert list(lines_by_label(lower)["top-1"].get_xdata()) == [2, 4, 6, 8, 10, 12, 14, 16, 18]


def test_rank_map_is_the_plan(folders, runs):
    plan = raw_lines(folders["whole"])[-1]["event"]["ranks"]
    targets = json.loads((folders["whole"] / "run.json").read_text())["targets"]
    axes = figures.rank_map(runs["whole"]).axes[0]
    written = {(t.get_position()[0] - 0.5, t.get_position()[1] - 0.5): int(t.get_text()) for t in axes.texts}
    assert written == {(t["layer"], GROUPS.index(t["group"])): plan[t["name"]] for t in targets}
    assert [label.get_text() for label in axes.get_yticklabels()] == list(GROUPS)
    shades = axes.collections[0].get_array().ravel()
    shown = dict(zip([rank for row in rank_grid(runs["whole"])[2] for rank in row], shades, strict=True))
    assert sorted(shown) == [8, 16, 32, 64] == sorted(shown, key=shown.get)


def test_a_group_with_two_targets_in_a_layer_has_two_rows(tmp_path):
    folder = write_run(tmp_path / "paper")
    info = json.loads((folder / "run.json").read_text())
    for target in info["targets"]:
        if target["group"] in ("attn_out", "mlp_out"):
            target["group"] = "output"
    (folder / "run.json").write_text(json.dumps(info))
    run = load_run(folder)
    labels, layers, grid = rank_grid(run)
    assert labels == ["q", "k", "v", "output 1", "output 2", "mlp_in"]
    assert layers == [0, 1, 2]
    assert grid[3] == [run.ranks[f"blocks.{layer}.attn.proj"] for layer in layers]
    assert grid[4] == [run.ranks[f"blocks.{layer}.mlp.fc2"] for layer in layers]


def test_convergence_test_stands_against_its_thresholds(folders, runs):
    left, right = figures.window_changes(runs["never"]).axes
    raw = {line["epoch"]: line["event"] for line in raw_lines(folders["never"]) if line["event"]["norm_changes"]}
    q = lines_by_label(left)["q"]
    assert dict(zip(q.get_xdata(), q.get_ydata(), strict=True)) == pytest.approx(
        {epoch: max(map(abs, event["norm_changes"]["q"])) for epoch, event in raw.items()}
    )
    loss = lines_by_label(right)["loss"].get_ydata()
    assert list(loss) == pytest.approx([max(map(abs, event["loss_changes"])) for event in raw.values()])
    assert {text.get_text() for axes in (left, right) for text in axes.texts} >= {"τ = 0.5 %", "ζ = 2.5 %"}
    assert any(list(line.get_ydata()) == [0.5, 0.5] for line in left.lines)


def test_throughput_shows_medians_and_what_flops_allow(runs):
    (axes,) = figures.throughput(runs["whole"]).axes
    texts = {text.get_text() for text in axes.texts}
    assert {"100", "96", "130", "FLOP ceiling 100", "FLOP ceiling 138.5"} <= texts
    upright = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2]
    assert [36 / 26 * 100] * 2 in [pytest.approx(list(x)) for x in upright]


def test_throughput_without_a_ceiling_shows_none(runs):
    (axes,) = figures.throughput(runs["never"]).axes
    assert not any("ceiling" in text.get_text() for text in axes.texts)


def test_memory_bars_are_the_items(folders, runs):
    left, right = figures.memory(runs["whole"]).axes
    assert left.get_xlabel() == "static memory (MiB)"
    assert right.get_xlabel() == "peak memory (MiB)"
    last = raw_lines(folders["whole"])[-1]
    widths = [container[2].get_width() for container in left.containers]
    assert widths == pytest.approx([size / 2**20 for size in last["memory"].values()])
    assert right.containers[0][2].get_width() == pytest.approx(last["peak_memory_bytes"] / 2**20)


def test_lora_stands_beside_its_base(folders, runs):
    base, lora, ratio = figures.lora_norms(runs["whole"]).axes
    assert list(lines_by_label(lora)["q"].get_xdata()) == list(range(10, 19))
    last = raw_lines(folders["whole"])[-1]
    names = [f"blocks.{layer}.attn.qkv[q]" for layer in range(3)]
    expected = [sum(last[kind][name] for name in names) / 3 for kind in ("base_norms", "lora_norms")]
    shown = [lines_by_label(axes)["q"].get_ydata()[-1] for axes in (base, lora)]
    assert shown == pytest.approx(expected)
    assert lines_by_label(ratio)["q"].get_ydata()[-1] == pytest.approx(100 * expected[1] / expected[0])


def test_a_run_that_never_switched_says_so_in_the_figure(runs):
    for draw in (figures.rank_map, figures.lora_norms):
        assert all(axes.texts[-1].get_text() == figures.NO_SWITCH for axes in draw(runs["never"]).axes)


def test_analysis_needs_neither_pyplot_nor_the_trainer():
    code = (
        "import sys, prelora.analysis.report, prelora.analysis.plan;"
        "print([m for m in sys.modules if m == 'matplotlib.pyplot' or m.startswith('prelora.train')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
