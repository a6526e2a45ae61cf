"""The report's figures, in order, with their captions."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from prelora.analysis import figures
from prelora.analysis.markup import Html, figure_html, paragraph, section
from prelora.analysis.records import Run

FIGURES: tuple[tuple[Callable[[Run], Figure], bool, str, str], ...] = (
    (
        figures.loss_and_accuracy,
        False,
        "Loss and accuracy",
        "Mean training loss as optimised, and evaluations on held-out images.",
    ),
    (
        figures.norms_by_group,
        False,
        "Weight norms by group",
        "Frobenius norm of the effective weight W + s·B·A, mean over layers.",
    ),
    (figures.norms_by_layer, False, "Weight norms by layer", "The same norm for every layer; scales differ by panel."),
    (
        figures.window_changes,
        False,
        "Convergence test",
        "Largest change between consecutive windows, at every epoch of FULL that was tested; the test passes once no "
        "group's is above τ and the loss's is not above ζ. Logarithmic.",
    ),
    (figures.rank_map, True, "Ranks", "Rank of every target as read back from the model."),
    (
        figures.lora_norms,
        True,
        "Base and LoRA after the switch",
        "Frobenius norms, mean over layers. From the freeze on the base stands still.",
    ),
    (
        figures.throughput,
        False,
        "Throughput by phase",
        "A dot is an epoch, ordered in time from top to bottom; the upright line is the median, the bar spans the "
        "quartiles. The dotted line is what FLOPs allow: the median of FULL times the phase's ceiling.",
    ),
    (
        figures.memory,
        False,
        "Memory by phase",
        "Left: static memory by item, as trained with in the phase's last epoch. Right: the phase's peak, activations "
        "included, on its own scale.",
    ),
    (figures.updates, False, "Relative update norm", "Change of the weights over an epoch, mean over layers."),
    (figures.learning_rate, False, "Learning rate", "At the end of each epoch."),
)
"""Function, whether it needs a switch, title, caption."""


def figure_section(run: Run) -> Html:
    """Every figure for which the run has data."""
    if not run.epochs:
        return Html("")
    chosen = [entry for entry in FIGURES if run.switch is not None or not entry[1]]
    drawn = [
        figure_html(draw(run), draw.__name__, place, title, caption)
        for place, (draw, _, title, caption) in enumerate(chosen, start=1)
    ]
    note = (
        "Shaded bands are the phases; the dashed line is the switch, the solid line the freeze. "
        "Gaps in a line are epochs without a finite value."
    )
    return section("Figures", paragraph(note, kind="note"), *drawn)
