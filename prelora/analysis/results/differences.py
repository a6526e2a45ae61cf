"""Differences of top-1 between variants, paired by seed, with their confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prelora.analysis import drawing
from prelora.analysis.results.loading import BASELINE, PRELORA, MissingDataError, Results
from prelora.analysis.results.series import present
from prelora.analysis.results.stats import Sample, paired_difference

ALTERNATIVES = ("lora_lr4", "lora_lr16", "wide_ranks", "lora_init", "per_group", "update_rank")


def controls(results: Results) -> Figure:
    """Top-1 of every variant less that of full training with the same seed, with its 95 % confidence interval."""
    others = [variant for variant in results.variants if variant != BASELINE]
    return _differences(results, others, BASELINE)


def alternatives(results: Results) -> Figure:
    """Top-1 of what might beat the defaults, less that of Exp2 with the same seed."""
    found = present(results, ALTERNATIVES)
    if not found:
        raise MissingDataError(f"no run of {' or '.join(ALTERNATIVES)}")
    return _differences(results, found, PRELORA)


def top1_difference(results: Results, variant: str, baseline: str) -> Sample | None:
    """Final top-1 of ``variant`` less ``baseline``'s, paired by seed, percentage points; None: no seed has both.

    Raises:
        MissingDataError: one of the two has no runs.
    """
    of, against = ({run.seed: run.final_top1 for run in results.of(name)} for name in (variant, baseline))
    return paired_difference(of, against)


def _differences(results: Results, variants: Sequence[str], baseline: str) -> Figure:
    found_by_variant = {variant: top1_difference(results, variant, baseline) for variant in variants}
    rows = [(results.title(variant), found) for variant, found in found_by_variant.items() if found is not None]
    if not rows:
        raise MissingDataError(f"no variant with top-1 in a seed of {baseline}")
    figure = drawing.new_figure(1.2 + 0.34 * len(rows))
    axes = figure.subplots()
    drawing.rows_axes(
        axes, f"top-1 less that of {results.title(baseline)}, same seed (percentage points)", [row[0] for row in rows]
    )
    axes.set_ylabel("")
    axes.axvline(0, color=drawing.INK, linewidth=0.9, zorder=1)
    for y, (_, found) in enumerate(rows):
        half = found.half_width if found.n > 1 else None
        axes.plot(found.values, [y + 0.24] * found.n, "o", color=drawing.MUTED, ms=3.5, mfc="white", mew=0.8, ls="")
        axes.errorbar(found.mean, y, xerr=half, color=drawing.STYLES[0][0], marker="D", ms=5, elinewidth=1.4, capsize=3)
        text = f"{found.told()}  (n = {found.n})"
        axes.annotate(text, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=drawing.INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9))
    axes.margins(x=0.06)
    drawing.write_below(
        figure,
        f"{results.name}. Diamonds: mean difference, paired by seed; whiskers: its 95 % t interval; small dots: seeds.",
    )
    return figure
