"""``prelora replay``: a finished run's log through Algorithms 1 and 2 at other settings, without training."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from prelora.analysis.replay import Replay, changes_at, replay
from prelora.analysis.replay_costs import Costs, count_sizes, predict, replayed_ranks
from prelora.analysis.replay_figure import draw_grid, save_grid
from prelora.analysis.replay_log import NormLog, load_log
from prelora.analysis.replay_table import (
    Outcome,
    describe_costs,
    describe_grid,
    describe_ranks,
    describe_runs,
    describe_suggestions,
    describe_windows,
)
from prelora.analysis.replay_thresholds import Suggestion, grid, suggest_saving, suggest_switch
from prelora.config import Aggregate, Criterion, Freeze, Normalize, Switch, Window
from prelora.errors import PreLoRAWarning

INTEGERS = ("k", "m", "r_min", "r_max", "warmup_epochs", "monitor_from", "min_epoch")
CHOICES: dict[str, tuple[str, ...]] = {
    "freeze": get_args(Freeze),
    "criterion": get_args(Criterion),
    "aggregate": get_args(Aggregate),
    "window": get_args(Window),
    "normalize": get_args(Normalize),
    "switch": get_args(Switch),
}


def main(arguments: Sequence[str]) -> str:
    """What the command line asks for, as text.

    Raises:
        ValueError: a log, a setting or a wish that cannot be met.
        SystemExit: on help, or on arguments that do not parse.
    """
    options = _parser().parse_args(arguments)
    if len(options.runs) > 1 and (options.grid or options.suggest_switch or options.suggest_saving is not None):
        raise ValueError(f"{len(options.runs)} RUNs: accepted is one with --grid, --suggest-switch, --suggest-saving")
    outcomes = [_outcome(load_log(path), options) for path in options.runs]
    first = outcomes[0].replayed
    searched = options.grid or options.suggest_switch or options.suggest_saving is not None
    if searched and first.config.criterion != "norm":
        raise ValueError("--grid, --suggest-switch and --suggest-saving are about tau: accepted is --criterion norm")
    if searched and first.config.switch == "per_group":
        raise ValueError("--grid, --suggest-switch and --suggest-saving look for one switch: accepted is together")
    suggested = _suggestions(first, options)
    taus, zetas = options.grid or ([], [])
    epochs = grid(first, taus, zetas)
    pictures = _draw(first, options, epochs) if options.grid else []
    if options.json:
        drawn = {"tau": taus, "zeta": zetas, "switch_epoch": epochs, "pictures": list(map(str, pictures))}
        return _json(outcomes, suggested, drawn if options.grid else None)
    lines = describe_runs(outcomes)
    if len(outcomes) == 1:
        lines += describe_windows(first) + describe_costs(outcomes[0].costs)
    for outcome in outcomes if options.ranks or len(outcomes) == 1 else []:
        lines += describe_ranks(outcome, every=options.ranks)
    if suggested:
        lines += describe_suggestions(suggested)
    if options.grid:
        lines += [*describe_grid(taus, zetas, epochs), *map(str, pictures)]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prelora replay",
        description="Where a finished run's log switches at any setting, why not before, and to which ranks.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, its metrics.jsonl, or a CSV")
    settings = parser.add_argument_group(
        "settings of PreLoRAConfig (default: the run's own; of a CSV, the paper's Exp2)"
    )
    for name in INTEGERS:
        settings.add_argument(_flag(name), type=int, metavar="N")
    settings.add_argument("--tau", type=float, help="percent")
    settings.add_argument("--zeta", type=float, help="percent")
    settings.add_argument("--update-rank-max", type=float, help="stable rank, with --criterion update_rank")
    settings.add_argument("--deadline", type=_or_none(int), help="epochs, or none")
    settings.add_argument("--budget", type=_or_none(float), help="trainable share in (0, 1], or none")
    for name, accepted in CHOICES.items():
        settings.add_argument(_flag(name), choices=accepted)
    parser.add_argument("--ranks", action="store_true", help="every target's rank, not only the groups'")
    parser.add_argument(
        "--grid",
        nargs=2,
        type=_thresholds,
        metavar=("TAUS", "ZETAS"),
        help="switch epochs over tau × zeta, as a table and a picture: 0.25,0.5,1 or LOW:HIGH:COUNT, evenly by ratio",
    )
    parser.add_argument("--out", type=Path, help="the picture's path without suffix (default: replay-grid in the run)")
    parser.add_argument(
        "--suggest-switch", type=_epochs, metavar="A-B", help="thresholds that switch after A to B epochs"
    )
    parser.add_argument(
        "--suggest-saving", type=float, metavar="S", help="the smallest thresholds that save this share of all FLOPs"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _outcome(log: NormLog, options: argparse.Namespace) -> Outcome:
    names = [*INTEGERS, "tau", "zeta", "update_rank_max", "deadline", "budget", *CHOICES]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    given = {name: None if value == "none" else value for name, value in given.items()}
    config = dataclasses.replace(log.config, **given)
    replayed = replay(log, config)
    if replayed.switch_epoch is None:
        return Outcome(replayed, {}, None)
    sizes = count_sizes(log, config)
    ranks = replayed_ranks(log, config, replayed.changes, sizes)
    if log.run is None or sizes is None or config.switch == "per_group":
        return Outcome(replayed, ranks, None)
    return Outcome(replayed, ranks, predict(log.run, config, sizes, replayed.switch_epoch, ranks))


def _suggestions(replayed: Replay, options: argparse.Namespace) -> list[Suggestion]:
    found = suggest_switch(replayed, *options.suggest_switch) if options.suggest_switch else []
    if options.suggest_saving is None:
        return found
    log, config = replayed.log, replayed.config
    sizes = count_sizes(log, config)
    if log.run is None or sizes is None:
        raise ValueError(
            f"suggest-saving of {log.name}: needs a run's folder with config.yaml, by which FLOPs are counted"
        )
    run, counted = log.run, sizes

    def saved_at(epoch: int) -> float:
        with warnings.catch_warnings():  # of ranks that are only weighed here
            warnings.simplefilter("ignore", PreLoRAWarning)
            ranks = replayed_ranks(log, config, changes_at(log, config, epoch), counted)
        return predict(run, config, counted, epoch, ranks).flops_saved

    return [*found, suggest_saving(replayed, options.suggest_saving, saved_at)]


def _draw(replayed: Replay, options: argparse.Namespace, epochs: list[list[int | None]]) -> list[Path]:
    log, source = replayed.log, options.runs[0]
    folder = log.folder if log.folder is not None else source.parent
    stem = "replay-grid" if log.folder is not None else f"{source.stem}-replay-grid"
    taus, zetas = options.grid
    figure = draw_grid(log.name, taus, zetas, epochs, len(log.losses))
    return save_grid(figure, options.out or folder / stem)


def _json(outcomes: Sequence[Outcome], suggested: Sequence[Suggestion], drawn: dict[str, Any] | None) -> str:
    runs = [_plain(outcome) for outcome in outcomes]
    written = {"runs": runs, "suggestions": [dataclasses.asdict(one) for one in suggested], "grid": drawn}
    return json.dumps(written, indent=2, allow_nan=False)


def _plain(outcome: Outcome) -> dict[str, Any]:
    replayed, costs = outcome.replayed, outcome.costs
    windows = [
        {
            "epoch": window.epoch,
            "changes": {group: _finite(change) for group, change in window.by_group.items()},
            "loss_change": _finite(window.loss),
            "held_back": {what: _finite(points) for what, points in window.held_back(replayed.config).items()},
        }
        for window in replayed.windows
    ]
    run = replayed.log.run
    return {
        "name": replayed.log.name,
        "config": dataclasses.asdict(replayed.config),
        "full_epochs": len(replayed.log.losses),
        "switch_epoch": replayed.switch_epoch,
        "switch_epochs": replayed.switch_epochs,
        "recorded_switch_epoch": run.switch.epoch if run is not None and run.switch is not None else None,
        "reason": replayed.reason,
        "log_ends": replayed.log.stopped_by,
        "windows": windows,
        "ranks": outcome.ranks,
        "costs": None if costs is None else _costs(costs),
    }


def _costs(costs: Costs) -> dict[str, Any]:
    return {**dataclasses.asdict(costs), "flops_saved": costs.flops_saved, "all_full_seconds": costs.baseline}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parsed(text: str) -> Any:
        return text if text == "none" else kind(text)

    return parsed


def _thresholds(text: str) -> list[float]:
    """``0.25,0.5,1`` or ``LOW:HIGH:COUNT``; percent."""
    try:
        if ":" in text:
            low, high, count = text.split(":")
            values = np.geomspace(float(low), float(high), int(count)).tolist()
        else:
            values = sorted(float(part) for part in text.split(","))
    except ValueError:
        values = []
    if not values or not all(math.isfinite(value) and value > 0 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}: accepted are 0.25,0.5,1 and LOW:HIGH:COUNT, all above 0")
    return values


def _epochs(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not (dash and first.isdigit() and last.isdigit() and int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r}: accepted is A-B, epochs, A at most B")
    return int(first), int(last)
