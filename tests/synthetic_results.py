"""A small folder of collected results whose every number is known: the shapes of ``prelora figures``' input."""

import csv
import json
import math
import random
from pathlib import Path

GROUPS = ("q", "k", "v", "attn_out", "mlp_in", "mlp_out")
EPOCHS, IMAGES, BATCH, LAYERS = 30, 12_800, 64, 6
FULL_FLOPS = 4.0e12
PHASE_FLOPS = {"full": 1.0, "warmup": 1.05, "lora": 0.72}
PHASE_SECONDS = {"full": 0.050, "warmup": 0.053, "lora": 0.041}
PARAMETERS = 2_700_000
VARIANTS = {
    # variant: (title, tau, zeta, switch epoch, warm-up epochs, top-1 less full's)
    "full": ("full training", None, None, None, 0, 0.0),
    "exp1": ("Exp1", 4.0, 20.0, 12, 2, -0.55),
    "exp2": ("Exp2", 2.0, 10.0, 15, 2, -0.25),
    "exp3": ("Exp3", 1.0, 5.0, 20, 2, -0.1),
    "w1": ("w = 1", 2.0, 10.0, 15, 1, -0.3),
    "w3": ("w = 3", 2.0, 10.0, 15, 3, -0.22),
    "w5": ("w = 5", 2.0, 10.0, 15, 5, -0.2),
    "w10": ("w = 10", 2.0, 10.0, 15, 10, -0.1),
    "w15": ("w = 15", 2.0, 10.0, 15, 15, -0.05),
    "compressed": ("full, shorter", None, None, None, 0, -0.35),
    "stop_decay": ("decay stopped", None, None, None, 0, 0.05),
    "freeze_only": ("frozen, no LoRA", None, None, 15, 0, -1.3),
    "uniform": ("uniform ranks", None, None, 15, 2, -0.3),
    "reversed": ("reversed ranks", None, None, 15, 2, -0.4),
    "fixed_quarter": ("switch at a quarter", None, None, 8, 2, -0.9),
    "fixed_half": ("switch at half", None, None, 15, 2, -0.25),
    "lora_lr4": ("LoRA's rate × 4", 2.0, 10.0, 15, 2, 0.4),
    "lora_init": ("A from the last window", 2.0, 10.0, 15, 2, -0.2),
    "per_group": ("switch by group", 2.0, 10.0, 13, 2, -0.3),
    "update_rank": ("criterion: update rank", None, None, 17, 2, -0.15),
}
TIMED = ("exp1", "exp2", "exp3", "freeze_only")
SHORTER = 26
"""Epochs of ``compressed``."""


def phase_of(variant, epoch):
    """The phase that an epoch was trained in."""
    _, _, _, switch, warmup, _ = VARIANTS[variant]
    if switch is None or epoch <= switch:
        return "full"
    return "warmup" if epoch <= switch + warmup else "lora"


def length_of(variant):
    return SHORTER if variant == "compressed" else EPOCHS


def prefix_of(variant):
    """Epochs shared with ``full``: up to the switch."""
    return VARIANTS[variant][3] or 0


def top1(variant, seed, epoch):
    """Percent; every seed has its own level, every variant its own distance to full at the end."""
    share = epoch / length_of(variant)
    after = max(0.0, epoch - prefix_of(variant)) / max(1, length_of(variant) - prefix_of(variant))
    noise = random.Random(f"{variant}-{seed}").uniform(-0.12, 0.12)
    return 89 + 0.3 * seed - 30 * math.exp(-6 * share) + (VARIANTS[variant][5] + noise) * after


def loss(variant, seed, epoch):
    share = epoch / length_of(variant)
    behind = max(0, epoch - prefix_of(variant)) / EPOCHS if VARIANTS[variant][3] else 0.0
    return 0.45 + 1.8 * math.exp(-4 * share) - 0.05 * share + 0.01 * seed + 0.04 * behind


def write_results(folder, variants=tuple(VARIANTS), seeds=(0, 1, 2), timed=TIMED, environment=True) -> Path:
    """Write every CSV file of a data set into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = [(variant, seed) for variant in variants for seed in seeds]
    write_csv(folder / "runs.csv", [run_row(variant, seed) for variant, seed in runs])
    write_csv(
        folder / "epochs.csv",
        [
            epoch_row(variant, seed, epoch)
            for variant, seed in runs
            for epoch in range(prefix_of(variant) + 1, length_of(variant) + 1)
        ],
    )
    write_csv(folder / "norms.csv", [row for variant, seed in runs for row in norm_rows(variant, seed)])
    write_csv(folder / "layers.csv", [row for seed in seeds for row in layer_rows(seed)])
    ranks = [row for variant, seed in runs if VARIANTS[variant][3] for row in rank_rows(variant, seed)]
    times = [row for variant in timed if variant in variants for row in timing_rows(variant, seeds[0])]
    for name, rows in (("ranks.csv", ranks), ("timing.csv", times)):
        if rows:
            write_csv(folder / name, rows)
    if environment:
        said = {"cpu": "Some CPU 9000", "cores": 2, "versions": {"torch": "2.14.1"}}
        (folder / "environment.json").write_text(json.dumps(said))
    return folder


def write_csv(path, rows):
    """Rows of one shape; None is an empty cell."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def run_row(variant, seed):
    title, tau, zeta, switch, warmup, _ = VARIANTS[variant]
    epochs = length_of(variant)
    phases = [phase_of(variant, epoch) for epoch in range(1, epochs + 1)]
    return {
        "variant": variant,
        "seed": seed,
        "title": title,
        "epochs": epochs,
        "switch_epoch": switch,
        "freeze_epoch": None if switch is None else switch + warmup,
        "prefix_epochs": prefix_of(variant),
        "final_top1": top1(variant, seed, epochs),
        "best_top1": top1(variant, seed, epochs) + 0.05,
        "final_loss": loss(variant, seed, epochs),
        "eval_loss": loss(variant, seed, epochs) + 0.1,
        "step_seconds": sum(1.3 * PHASE_SECONDS[phase] * IMAGES / BATCH for phase in phases),
        "flops": sum(FULL_FLOPS * PHASE_FLOPS[phase] for phase in phases),
        "parameters": PARAMETERS,
        "trainable": PARAMETERS * (0.07 if phases[-1] == "lora" else 1),
        "lora_parameters": PARAMETERS * 0.05 if switch else 0,
        "tau": tau,
        "zeta": zeta,
        "commit": "abcdef0",
    }


def epoch_row(variant, seed, epoch):
    phase = phase_of(variant, epoch)
    dense = 0.02 if phase == "lora" else 1.0
    adapters = 0.0 if phase == "full" else 0.05
    evaluated = epoch % 2 == 0 or epoch == length_of(variant)
    return {
        "variant": variant,
        "seed": seed,
        "epoch": epoch,
        "phase": phase,
        "images": IMAGES,
        "lr": 1e-3,
        "train_loss": loss(variant, seed, epoch),
        "top1": top1(variant, seed, epoch) if evaluated else None,
        "eval_loss": loss(variant, seed, epoch) + 0.1 if evaluated else None,
        "seconds": 1.3 * PHASE_SECONDS[phase] * IMAGES / BATCH,
        "img_per_s": BATCH / PHASE_SECONDS[phase] / 1.3,
        "flops": FULL_FLOPS * PHASE_FLOPS[phase],
        "trainable": PARAMETERS * (dense + adapters),
        "memory_parameters": 4 * PARAMETERS * (1 + adapters),
        "memory_gradients": 4 * PARAMETERS * (dense + adapters),
        "memory_optimizer": 8 * PARAMETERS * (dense + adapters),
        "memory_other": 100_000,
        "memory_saved": 90_000_000 if phase == "lora" else 95_000_000,
        "peak_memory": 180_000_000 if phase == "lora" else 220_000_000,
    }


def norm_rows(variant, seed):
    for epoch in range(prefix_of(variant) + 1, length_of(variant) + 1):
        since = epoch - prefix_of(variant)
        for index, group in enumerate(GROUPS):
            base = (8 + 2 * index) * (1 - 0.6 * math.exp(-epoch / 6)) + 0.05 * seed
            lora = None if phase_of(variant, epoch) == "full" else 0.3 * (1 - math.exp(-since / 4)) * (1 + 0.1 * index)
            yield {
                "variant": variant,
                "seed": seed,
                "epoch": epoch,
                "group": group,
                "norm": base + (lora or 0) ** 2,
                "base_norm": None if lora is None else base + 0.01 * (len(variant) % 3),
                "lora_norm": lora,
                "update": 0.1 * math.exp(-epoch / 8),
            }


def layer_rows(seed):
    for epoch in range(1, EPOCHS + 1):
        for layer in range(LAYERS):
            norm = (7 + 0.6 * layer) * (1 - 0.5 * math.exp(-epoch / (5 + layer))) + 0.05 * seed
            yield {"seed": seed, "epoch": epoch, "group": "q", "layer": layer, "norm": norm}


def rank_rows(variant, seed):
    draws = random.Random(f"ranks-{seed}")
    for group in GROUPS:
        for layer in range(LAYERS):
            rank = draws.choice((4, 8, 16, 32))
            yield {"variant": variant, "seed": seed, "group": group, "layer": layer, "rank": rank, "change": rank / 10}


def timing_rows(variant, seed):
    """Nine rounds, each slower or faster as a whole, so that only ratios within a round are exact."""
    draws = random.Random(f"timing-{variant}")
    for index in range(9):
        pace = draws.uniform(0.97, 1.06)
        for phase, seconds in PHASE_SECONDS.items():
            yield {
                "variant": variant,
                "seed": seed,
                "phase": phase,
                "round": index,
                "seconds": seconds * pace,
                "batch": BATCH,
            }
