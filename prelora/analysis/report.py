"""One self-contained HTML page about a run: no script, no request, in light, in dark and on paper."""

from __future__ import annotations

from pathlib import Path

from prelora.analysis import sections
from prelora.analysis.gallery import figure_section
from prelora.analysis.markup import Html, page, paragraph, to_html
from prelora.analysis.records import Run, load_run
from prelora.analysis.step_section import step_section
from prelora.files import replace_text


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of the run in ``run_dir``, by default to ``report.html`` there; return where it is.

    The page is replaced in one step: a reader sees the former page or this one, whole.

    Raises:
        FileNotFoundError: no ``run.json`` in ``run_dir``.
        ValueError: the run's files do not follow their schema.
    """
    out = run_dir / "report.html" if out is None else out
    text = render(load_run(run_dir))
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(out, text)
    return out


def render(run: Run) -> str:
    """The page as text."""
    info = run.info
    title = f"PreLoRA: {info.model}"
    subject = " · ".join([info.recipe, run.name, f"{info.device} × {info.world_size}", f"{info.epochs} epochs planned"])
    body = [
        Html(f"<header><h1>{to_html(title)}</h1></header>\n"),
        paragraph(subject, kind="sub"),
        sections.alerts(run),
        sections.story(run),
        sections.speed_section(run),
        sections.phase_section(run),
        step_section(run),
        sections.memory_section(run),
        figure_section(run),
        sections.log_section(run),
        sections.setup_section(run),
        Html(f"<footer>prelora {to_html(info.versions['prelora'])}, from run.json and metrics.jsonl</footer>\n"),
    ]
    return page(title, "".join(body))
