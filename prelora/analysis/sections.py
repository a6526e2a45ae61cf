"""The report's sections. A speed-up or a saving stands beside its bound, or its place says why there is none."""

from __future__ import annotations

import math

from prelora.analysis.markup import NOTHING, Html, number, pairs, paragraph, percent, section, size, table
from prelora.analysis.records import Epoch, Run
from prelora.analysis.summary import (
    FEW_EPOCHS,
    Saving,
    SpeedUp,
    Spread,
    item_name,
    peak_saving,
    released_memory,
    speed_ups,
    summarize_phases,
)
from prelora.units import PHASES

NAMES = {"full": "FULL", "warmup": "WARMUP", "lora": "LORA", "run": "Whole run"}

EXCEEDS = Html(
    '<span class="flag">Exceeds its FLOP ceiling.</span> FLOPs cannot explain it: noise, or what they do not count '
    "(optimizer step, memory traffic, communication, waiting for images, other load on the machine), as on small "
    "models."
)


def alerts(run: Run) -> Html:
    """What a reader must know first: an incomplete run, one that never switched, odd files."""
    found = list(run.notes)
    done = run.epochs[-1].epoch if run.epochs else 0
    if done < run.info.epochs:
        where = f" It stopped in {NAMES[run.epochs[-1].event.phase]}." if run.epochs else ""
        found.insert(0, f"This run is incomplete: {done} of {run.info.epochs} planned epochs are finished.{where}")
    if run.epochs and run.switch is None:
        found.append(f"It never switched. {run.epochs[-1].event.reason}")
    lost = [epoch.epoch for epoch in run.epochs if not math.isfinite(epoch.loss)]
    if lost:
        found.append(f"The training loss was not finite in {_epochs(len(lost))}, first in epoch {lost[0]}.")
    return Html(f'<div class="alert">{"".join(paragraph(text) for text in found)}</div>\n' if found else "")


def story(run: Run) -> Html:
    """What happened, in words."""
    if not run.epochs:
        return paragraph("No epoch was finished, so there is nothing to tell.", kind="lead")
    phases = [f"{len(run.in_phase(p))} in {NAMES[p]}" for p in PHASES if run.in_phase(p)]
    last = run.epochs[-1]
    told = [f"{run.info.model} was trained for {_epochs(last.epoch)}: {', '.join(phases)}."]
    if run.switch is not None:
        ranks = sorted(run.ranks.values())
        mean = number(sum(ranks) / len(ranks)) if ranks else ""
        told.append(_switches(run))
        told.append(
            f"{len(ranks)} targets have ranks from {ranks[0]} to {ranks[-1]}, {mean} on average." if ranks else ""
        )
    if run.freeze is not None:
        told.append(f"The base was frozen after epoch {run.freeze.epoch}{_left_trainable(run)}.")
    elif run.switch is not None:
        told.append("The base has not been frozen.")
    told.append(_result(run))
    return paragraph(" ".join(filter(None, told)), kind="lead")


def _switches(run: Run) -> str:
    switches = [epoch for epoch in run.epochs if epoch.event.switched]
    if len(switches) == 1:
        return f"After epoch {switches[0].epoch} it switched to LoRA ({switches[0].event.reason.rstrip('.')})."
    each = [f"{', '.join(epoch.event.switched_groups)} after epoch {epoch.epoch}" for epoch in switches]
    return f"Its groups switched to LoRA one after another: {'; '.join(each)}."


def _left_trainable(run: Run) -> str:
    lora = next((summary for summary in summarize_phases(run) if summary.phase == "lora"), None)
    if lora is None:
        return ""
    share = f"{percent(lora.share)} of the model's {run.info.parameters:,}"
    return f", which left {lora.trainable:,} parameters trainable, {share}"


def _result(run: Run) -> str:
    loss = run.epochs[-1].loss
    told = f"The last training loss is {number(loss, 4) if math.isfinite(loss) else 'not finite'}"
    evaluated = [epoch for epoch in run.epochs if epoch.evaluation or epoch.ema_evaluation]
    if not evaluated:
        return f"{told}; no evaluation was made."
    last = evaluated[-1]
    found = [f"top-1 {number(last.evaluation.top1)} %"] if last.evaluation else []
    found += [f"{number(last.ema_evaluation.top1)} % with EMA weights"] if last.ema_evaluation else []
    return f"{told}; the last evaluation, after epoch {last.epoch}, gave {' and '.join(found)}."


def speed_section(run: Run) -> Html:
    """Every measured speed-up beside the ceiling that FLOPs set."""
    title = "Speed-up over FULL"
    found = speed_ups(run)
    if not found:
        return section(title, paragraph("None is shown: only FULL was trained, and a speed-up needs a second phase."))
    several = any(speed.communication is not None for speed in found)
    bound = ["Communication bound"] if several else []
    headers = ["", "Measured", "FLOP ceiling", *bound, "Measured / ceiling", "Share of possible gain", "Remark"]
    rows = [
        [
            NAMES[speed.phase],
            Html(f"<strong>{_times(speed.measured)}</strong>"),
            _times(speed.ceiling),
            *([_times(speed.communication)] if several else []),
            percent(speed.of_ceiling),
            percent(speed.of_gain),
            _speed_remark(speed),
        ]
        for speed in found
    ]
    counted = ", ".join(f"{NAMES[p]} {number(run.flops[p] / 1e9)}" for p in PHASES if p in run.flops)
    note = (
        "Measured: ratio of the medians over epochs of this run. Ceiling: ratio of the FLOPs per image, forward and "
        f"backward, with the realised ranks ({counted} GFLOP): what one compute-bound device can give. "
        "Share of possible gain: (measured − 1) / (ceiling − 1). "
        "The whole run is compared with as many epochs at FULL's median pace."
    )
    if several:
        note += (
            " Communication bound: ratio of the bytes between ranks in a step, what a run that waits for nothing but "
            "its network can gain; between the two bounds lies what both together allow."
        )
    return section(title, table(headers, rows, text_columns=(0, len(headers) - 1)), paragraph(note, kind="note"))


def _times(ratio: float | None) -> str:
    return NOTHING if ratio is None else f"{ratio:.2f}×"


def _speed_remark(speed: SpeedUp) -> Html | str:
    if speed.why:
        return f"Not shown: {speed.why}."
    full, here = speed.epochs
    few = f" Few epochs ({full} of FULL, {here} here): the medians say little." if min(full, here) < FEW_EPOCHS else ""
    if speed.exceeds:
        return Html(EXCEEDS + few)
    wasted = speed.measured is not None and speed.ceiling is not None and speed.measured < 1 < speed.ceiling
    return ("Slower than FULL: overheads outweigh the FLOPs saved." if wasted else "") + few


def phase_section(run: Run) -> Html:
    """What each phase cost."""
    headers = ["", "Epochs", "Images/s", "Seconds/epoch", "Trainable parameters", "of the model's", "Peak memory"]
    rows = [
        [
            NAMES[summary.phase],
            summary.epochs,
            _spread(summary.images_per_second),
            _spread(summary.seconds),
            f"{summary.trainable:,}",
            percent(summary.share),
            size(summary.peak_memory) if summary.peak_memory else "not measured",
        ]
        for summary in summarize_phases(run)
    ]
    note = (
        "Images per second and seconds per epoch are medians over the phase's epochs, with quartiles in brackets, "
        "evaluation not included. The share is of the model's own parameters, LoRA's not among them, so WARMUP "
        "exceeds 100 %."
    )
    return section("Phases", table(headers, rows), paragraph(note, kind="note")) if rows else Html("")


def _spread(spread: Spread | None) -> Html | str:
    if spread is None:
        return "not measured"
    span = f' <span class="small">({number(spread.low)} – {number(spread.high)})</span>' if spread.count > 1 else ""
    return Html(number(spread.median) + span)


def memory_section(run: Run) -> Html:
    """Static memory by item and phase; what the freeze released, beside the most it could."""
    summaries = summarize_phases(run)
    if not summaries:
        return Html("")
    items = list(dict.fromkeys(item for summary in summaries for item in summary.memory))
    rows = [
        [NAMES[s.phase], *(size(s.memory.get(item)) for item in items), size(sum(s.memory.values()))] for s in summaries
    ]
    itemised = table(["", *(_heading(item) for item in items), "Total"], rows)
    savings = [*released_memory(run), *filter(None, [peak_saving(run)])]
    if not savings:
        why = "No saving is shown: the base was not frozen, and only that releases memory."
        return section("Memory", itemised, paragraph(why))
    headers = ["Released at the freeze", "Measured", "Bound", "Measured / bound", "Remark"]
    released = table(headers, [_saving_row(saving) for saving in savings], text_columns=(0, 4))
    note = (
        "Bound of an item: what FULL held of it, times the share of it that belongs to parameters now frozen. Bound of "
        "the peak: gradients and optimizer state of those; activations are not freed, since dA needs every input."
    )
    on_cpu = (
        " Without a GPU the peak is the process's resident memory." if run.info.environment.get("gpu") is None else ""
    )
    return section("Memory", itemised, released, paragraph(note, on_cpu, kind="note"))


def _saving_row(saving: Saving) -> list[object]:
    name = "Peak, FULL to LORA" if saving.item == "peak" else _heading(saving.item)
    if saving.bound is None:
        return [name, NOTHING, NOTHING, NOTHING, "Not shown: it has no bound without what FULL and LORA hold of it."]
    remark = ""
    if saving.measured < 0:
        remark = "A rise: LORA's peak lies above FULL's."
    elif saving.measured > saving.bound * 1.001:
        remark = "Exceeds its bound: something else became smaller too."
    share = percent(saving.measured / saving.bound) if saving.bound and saving.measured >= 0 else NOTHING
    return [name, size(saving.measured), size(saving.bound), share, remark]


def _heading(item: str) -> str:
    name = item_name(item)
    return name[:1].upper() + name[1:]


def log_section(run: Run) -> Html:
    """The epochs at which something was decided or went wrong."""
    headers = ["Epoch", "Trained in", "Decided", "Largest norm change", "Loss change", "Reason"]
    rows, previous = [], None
    for epoch in run.epochs:
        verdict = (epoch.event.norm_changes, epoch.event.loss_changes)
        tested = any(verdict) and verdict != previous
        previous = verdict if any(verdict) else previous
        if tested or epoch.event.action != "none" or epoch.skipped_steps or not math.isfinite(epoch.loss):
            rows.append(_log_row(epoch, tested))
    if not rows:
        return section("Event log", paragraph("Nothing was decided and no convergence test was made."))
    return section("Event log", table(headers, rows, text_columns=(0, 1, 2, 5)))


def _log_row(epoch: Epoch, tested: bool) -> list[object]:
    event, reasons = epoch.event, [epoch.event.reason]
    if not math.isfinite(epoch.loss):
        reasons.append("The training loss was not finite.")
    if epoch.skipped_steps:
        reasons.append(f"{epoch.skipped_steps} optimizer steps were skipped.")
    largest = {group: max(map(abs, changes), default=math.nan) for group, changes in event.norm_changes.items()}
    worst = max(largest, key=lambda group: (math.isnan(largest[group]), largest[group]), default=None)
    norm = f"{number(largest[worst])} % ({worst})" if tested and worst is not None else ""
    loss = f"{number(max(map(abs, event.loss_changes)))} %" if tested and event.loss_changes else ""
    decided = Html(f"<strong>{event.action}</strong>") if event.action in _ACTIONS else event.action
    return [epoch.epoch, NAMES[epoch.phase], "" if event.action == "none" else decided, norm, loss, " ".join(reasons)]


_ACTIONS = ("switch", "freeze", "switch+freeze")


def setup_section(run: Run) -> Html:
    """The configuration and where it ran."""
    info = run.info
    ran = {
        "recipe": info.recipe,
        "model": info.model,
        "parameters": f"{info.parameters:,}",
        "targets": f"{len(info.targets)} in {len(info.groups)} groups",
        "global batch": info.global_batch,
        "device": info.device,
        "world size": info.world_size,
        **info.environment,
        **info.versions,
    }
    both = pairs("Configuration", info.config) + pairs("Environment", ran)
    return section("Setup", Html(f'<div class="pairs">{both}</div>\n'))


def _epochs(count: int) -> str:
    return f"{count} epoch{'s' * (count != 1)}"
