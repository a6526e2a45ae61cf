"""Pieces of HTML: escaped text, numbers with units, tables, figures as inline SVG, the page around them."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape

import matplotlib as mpl
from matplotlib.figure import Figure

from prelora.analysis import drawing
from prelora.analysis.stylesheet import CSS

NOTHING = "–"

THEME = {
    drawing.INK: "var(--ink)",
    drawing.MUTED: "var(--muted)",
    drawing.GRID: "var(--grid)",
    drawing.BANDS["full"]: "var(--band-full)",
    drawing.BANDS["warmup"]: "var(--band-warmup)",
    drawing.BANDS["lora"]: "var(--band-lora)",
}
"""Colours of a figure that follow the page, so that it can be read in light and in dark."""


class Html(str):
    """Text that is HTML already; any other string is escaped where it enters the page."""

    __slots__ = ()


def to_html(value: object) -> Html:
    """``value`` as HTML: escaped, unless it is HTML already."""
    return value if isinstance(value, Html) else Html(escape(str(value)))


def paragraph(*parts: object, kind: str = "") -> Html:
    """A paragraph of the parts; ``kind`` is its class."""
    opening = f'<p class="{kind}">' if kind else "<p>"
    return Html(f"{opening}{''.join(map(to_html, parts))}</p>\n")


def section(title: str, *parts: str) -> Html:
    """A heading and what stands under it; nothing at all where that is nothing."""
    body = "".join(map(to_html, parts))
    return Html(f"<section>\n<h2>{escape(title)}</h2>\n{body}</section>\n" if body else "")


def number(value: float | None, digits: int = 3, unit: str = "") -> str:
    """``value`` to significant digits with thousands separated; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return NOTHING
    places = max(0, digits - 1 - (math.floor(math.log10(abs(value))) if value else 0))
    return f"{value:,.{places}f}{unit}".replace("-", "−")


def percent(share: float | None) -> str:
    """A share of 1 in percent, to a tenth below ten."""
    if share is None or not math.isfinite(share):
        return NOTHING
    return f"{100 * share:.{1 if abs(share) < 0.0995 else 0}f} %"


def size(count: float | None) -> str:
    """Bytes in the binary unit that suits them."""
    if count is None:
        return NOTHING
    unit, name = drawing.byte_unit(abs(count))
    return number(count / unit, 3, f" {name}") if count else "0"


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], text_columns: Sequence[int] = (0,)) -> Html:
    """A table whose first column heads its rows; columns not among ``text_columns`` are numbers, set to the right.

    A column in which no row has anything is left out.
    """
    shown = [column for column in range(len(headers)) if column == 0 or any(row[column] != "" for row in rows)]
    kinds = [("" if column == 0 else ' class="text"') if column in text_columns else ' class="num"' for column in shown]
    heads = [headers[column] for column in shown]
    head = "".join(f'<th scope="col"{kind}>{to_html(text)}</th>' for kind, text in zip(kinds, heads, strict=True))
    body = "".join(f"<tr>{_row([row[column] for column in shown], kinds)}</tr>\n" for row in rows)
    return Html(f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n')


def _row(row: Sequence[object], kinds: Sequence[str]) -> str:
    cells = [f"<td{kind}>{to_html(cell)}</td>" for cell, kind in zip(row[1:], kinds[1:], strict=True)]
    return f'<th scope="row"{kinds[0]}>{to_html(row[0])}</th>{"".join(cells)}'


def pairs(title: str, values: Mapping[str, object]) -> Html:
    """A titled table of names and values."""
    rows = "".join(
        f'<tr><th scope="row">{to_html(name)}</th><td>{to_html(NOTHING if value is None else value)}</td></tr>\n'
        for name, value in values.items()
    )
    return Html(
        f'<div><h3>{escape(title)}</h3><div class="scroll"><table><tbody>\n{rows}</tbody></table></div></div>\n'
    )


def figure_html(figure: Figure, key: str, place: int, title: str, caption: str) -> Html:
    """A figure as inline SVG with its caption; ``key`` keeps its ids apart from other figures'."""
    return Html(
        f'<figure id="{escape(key)}">\n{_svg(figure, key, title)}'
        f"<figcaption><b>Figure {place}. {to_html(title)}.</b> {to_html(caption)}</figcaption></figure>\n"
    )


def _svg(figure: Figure, key: str, title: str) -> str:
    stream = io.StringIO()
    empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": key, "hatch.linewidth": 0.7}):
        figure.savefig(stream, format="svg", facecolor="none", metadata=empty)
    drawn = stream.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"\s*<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]*"', drawn)
    assert view is not None
    opening = f'<svg role="img" aria-label="{escape(title)}" {view.group()}>'
    drawn = re.sub(r"<svg[^>]*>", lambda _: opening, drawn, count=1)
    drawn = re.sub(r'<g id="[^"]*"', "<g", drawn)
    drawn = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 var(--sans)", drawn)
    for color, variable in THEME.items():
        drawn = drawn.replace(color, variable)
    return drawn


def page(title: str, body: str) -> str:
    """The whole page. Its policy forbids scripts and every request."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )
