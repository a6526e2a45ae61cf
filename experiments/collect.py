"""The finished runs' logs as small tables under ``results/``: what ``prelora figures`` and docs/results.md are made of.

``python -m experiments.collect`` writes all; ``run.py`` does so after each run. Rows of runs whose folders are not on
this machine stay as they are.
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.declaration import ROOT, Dataset, Variant, load_grid
from experiments.step_times import read_times
from prelora.analysis.records import Epoch, Run
from prelora.analysis.replay import replay
from prelora.analysis.replay_log import load_log
from prelora.analysis.results.loading import BASELINE, Identity
from prelora.analysis.summary import group_means
from prelora.train import run_dir
from prelora.train.config import TrainConfig, load_yaml
from prelora.train.fork import forked_after

RESULTS = ROOT / "results"
PACKAGES = ("torch", "timm", "numpy", "prelora")


def collected(dataset: Dataset) -> set[Identity]:
    """The runs that the tables have."""
    return {_key(row) for row in _read(RESULTS / dataset.name / "runs.csv")}


def collect(dataset: Dataset) -> None:
    """Write the tables of a data set's finished runs; without any, nothing."""
    tables: dict[str, list[dict[str, Any]]] = {"runs": [], "epochs": [], "norms": [], "layers": [], "ranks": []}
    here: dict[Identity, Run] = {}
    for variant, seed in dataset.runs:
        run = dataset.finished(variant, seed)
        if run is None:
            continue
        here[variant.name, seed] = run
        folder = dataset.folder(variant, seed)
        config, prefix = load_yaml(folder / run_dir.CONFIG), forked_after(folder)
        key = {"variant": variant.name, "seed": seed}
        predicted = _predicted_switch(config, dataset.folder(dataset.variant(BASELINE), seed))
        tables["runs"].append(key | _run_row(variant, run, config, prefix) | {"predicted_switch_epoch": predicted})
        tables["epochs"] += [key | row for row in _epoch_rows(run, prefix)]
        tables["norms"] += [key | row for row in _norm_rows(run, prefix)]
        if run.ranks:
            changes = replay(load_log(folder), config.prelora).changes
            tables["ranks"] += [key | row for row in _rank_rows(run, changes)]
        if variant.name == BASELINE:
            tables["layers"] += _layer_rows(run, seed)
    if not here:
        return
    out = RESULTS / dataset.name
    out.mkdir(parents=True, exist_ok=True)
    for table, rows in tables.items():
        _write(out / f"{table}.csv", rows, set(here), dataset)
    times = read_times(dataset)
    _write(out / "timing.csv", times, {_key(row) for row in times}, dataset)
    environment = _environment(dataset, next(iter(here.values())))
    (out / "environment.json").write_text(json.dumps(environment, indent=1) + "\n")
    print(f"{out}: {len(collected(dataset))} of {len(dataset.runs)} runs", flush=True)


def _run_row(variant: Variant, run: Run, config: TrainConfig, prefix: int) -> dict[str, Any]:
    switches = config.method == "prelora"
    evaluated = [epoch.evaluation for epoch in run.epochs if epoch.evaluation is not None]
    last = run.epochs[-1]
    return {
        "title": variant.title,
        "epochs": run.info.epochs,
        "switch_epoch": run.switch.epoch if run.switch is not None else None,
        "freeze_epoch": run.freeze.epoch if run.freeze is not None else None,
        "prefix_epochs": prefix,
        "final_top1": evaluated[-1].top1,
        "best_top1": max(evaluation.top1 for evaluation in evaluated),
        "final_loss": last.loss,
        "eval_loss": evaluated[-1].loss,
        "step_seconds": sum(epoch.seconds for epoch in run.epochs),
        "flops": sum(_flops(run, epoch) for epoch in run.epochs),
        "parameters": run.info.parameters,
        "trainable": last.trainable,
        "lora_parameters": sum(
            run.ranks[target.name] * (target.in_features + target.out_features)
            for target in run.info.targets
            if run.ranks
        ),
        "tau": config.prelora.tau if switches else None,
        "zeta": config.prelora.zeta if switches else None,
    }


def _predicted_switch(config: TrainConfig, full: Path) -> int | None:
    """The first switch that ``prelora replay`` finds for a run's settings in the full-rank run's log.

    None where there is none, or the log has not what the settings test.
    """
    if config.method == "full" or config.prelora.criterion != "norm":
        return None
    return replay(load_log(full), config.prelora).switch_epoch


def _epoch_rows(run: Run, prefix: int) -> Iterable[dict[str, Any]]:
    for epoch in run.epochs[prefix:]:
        memory = epoch.memory
        yield {
            "epoch": epoch.epoch,
            "phase": epoch.phase,
            "images": epoch.images,
            "lr": epoch.lr,
            "train_loss": epoch.loss,
            "top1": epoch.evaluation.top1 if epoch.evaluation is not None else None,
            "eval_loss": epoch.evaluation.loss if epoch.evaluation is not None else None,
            "seconds": epoch.seconds,
            "img_per_s": epoch.img_per_s,
            "flops": _flops(run, epoch),
            "trainable": epoch.trainable,
            "memory_parameters": memory["weights"] + memory["lora"],
            "memory_gradients": memory["gradients"],
            "memory_optimizer": memory["optimizer"],
            "memory_other": memory["w_eff"] + memory["ema"],
            "peak_memory": epoch.peak_memory,
        }


def _flops(run: Run, epoch: Epoch) -> float:
    """Of the whole epoch; logs from before the field count by phase, in which their groups were all."""
    of_image = epoch.flops_per_image
    return epoch.images * (of_image if math.isfinite(of_image) else run.flops[epoch.phase])


def _norm_rows(run: Run, prefix: int) -> Iterable[dict[str, Any]]:
    norm = group_means(run, lambda epoch: epoch.norms)
    base = group_means(run, lambda epoch: epoch.base_norms)
    lora = group_means(run, lambda epoch: epoch.lora_norms)
    update = group_means(run, lambda epoch: epoch.updates)
    for place, epoch in enumerate(run.epochs):
        for group in run.info.groups if place >= prefix else ():
            values = {"norm": norm, "base_norm": base, "lora_norm": lora, "update": update}
            row = {name: by_group[group][place] for name, by_group in values.items()}
            yield {"epoch": epoch.epoch, "group": group} | row


def _layer_rows(run: Run, seed: int) -> Iterable[dict[str, Any]]:
    for epoch in run.epochs:
        for target in run.info.targets:
            where = {"seed": seed, "epoch": epoch.epoch, "group": target.group, "layer": target.layer}
            yield where | {"norm": epoch.norms[target.name]}


def _rank_rows(run: Run, changes: Mapping[str, Mapping[str, float]]) -> Iterable[dict[str, Any]]:
    for target in run.info.targets:
        change = changes.get(target.group, {}).get(target.name)
        yield {"group": target.group, "layer": target.layer, "rank": run.ranks[target.name], "change": change}


def _environment(dataset: Dataset, run: Run) -> dict[str, Any]:
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {
        "cpu": run.info.environment["cpu"],
        "cores": run.info.environment["cores"],
        "threads": dataset.threads,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "collected_at": revision.stdout.strip(),
        "command": f"python -m experiments.run --dataset {dataset.name}",
    }


def _write(path: Path, rows: list[dict[str, Any]], here: set[Identity], dataset: Dataset) -> None:
    """Replace a table's rows of the runs ``here``; all stand in the declared order."""
    rows = [*(row for row in _read(path) if _key(row) not in here), *rows]
    order = [variant.name for variant in dataset.variants]
    rows.sort(key=lambda row: (order.index(_key(row)[0]), _key(row)[1]))
    columns = dict.fromkeys(column for row in rows for column in row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({column: _cell(value) for column, value in row.items()} for row in rows)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _key(row: Mapping[str, Any]) -> Identity:
    return row.get("variant", BASELINE), int(row["seed"])


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else ""
    return "" if value is None else value


def main() -> int:
    """Run the command line; returns 0."""
    for dataset in load_grid():
        collect(dataset)
    return 0


if __name__ == "__main__":
    sys.exit(main())
