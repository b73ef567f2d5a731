"""A report as one page of HTML that asks nothing of anyone."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from fastkd.reports import plots, tables

if TYPE_CHECKING:
    from fastkd.reports import Report

# No request can leave: a browser refuses everything but the styles that are in the page.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header>
<h1>{title}</h1>
<p class="muted">{environment}</p>
</header>
<section class="cards">{cards}</section>
<section class="wide"><table>
<thead><tr><th></th>{names}</tr></thead>
<tbody>{rows}</tbody>
</table></section>
<section class="pictures">{pictures}</section>
<footer class="muted"><p>{method}</p></footer>
</main>
</body>
</html>
"""
STYLE = """
:root { --paper: #f6f7f9; --card: #ffffff; --ink: #1c2430; --muted: #5d6878; --line: #dfe3e9; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #12161c; --card: #1b212a; --ink: #e6eaf0; --muted: #9aa5b4; --line: #303a47; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans",
  sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; }
.muted, small { color: var(--muted); font-size: .85rem; }
header p { margin: 0; }
section { margin-top: 1.5rem; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); }
.card, .wide, figure { background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; }
.card { padding: 1rem 1.2rem; border-top: 4px solid var(--colour); }
.card h2 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
.card .figure { font-size: 2rem; font-weight: 650; line-height: 1.3; }
.card p { margin: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem 1.2rem; text-align: right; vertical-align: top; white-space: nowrap; }
th:first-child { text-align: left; font-weight: 450; color: var(--muted); }
thead th { border-bottom: 1px solid var(--line); }
tbody tr + tr > * { border-top: 1px solid var(--line); }
td small { display: block; line-height: 1.2; }
.dot { display: inline-block; width: .6rem; height: .6rem; border-radius: 50%; margin-right: .4rem;
  background: var(--colour); }
figure { margin: 0 0 1rem; padding: 1rem 1.2rem; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { color: var(--muted); font-size: .85rem; margin-top: .5rem; }
@media (max-width: 40rem) {
  th, td { padding: .45rem .7rem; }
  th:first-child { white-space: normal; }
}
@media print { body { background: none; } main { padding: 0; } }
"""


def html(report: Report) -> str:
    """The page."""
    colours = plots.colours(report)
    names = "".join(
        f'<th scope="col"><span class="dot" style="--colour: {colour}"></span>'
        f"{escape(model.name)}</th>"
        for model, colour in zip(report.models, colours, strict=True)
    )
    rows = "".join(
        f'<tr><th scope="row">{escape(row.label)}</th>'
        + "".join(_cell(cell) for cell in row.cells)
        + "</tr>\n"
        for row in tables.rows(report)
    )
    pictures = "".join(
        f"<figure>{plots.svg(figure, name)}<figcaption>{plots.CAPTIONS[name]}</figcaption></figure>"
        for name, figure in plots.figures(report).items()
    )
    environment = " · ".join(f"{key} {value}" for key, value in report.environment.items())
    return PAGE.format(
        title=escape(report.title),
        style=STYLE,
        environment=escape(environment),
        cards=_cards(report, colours),
        names=names,
        rows=rows,
        pictures=pictures,
        method=escape(tables.method(report)),
    )


def _cell(cell: tables.Cell) -> str:
    note = f"<small>{escape(cell.note)}</small>" if cell.note else ""
    return f"<td>{escape(cell.text)}{note}</td>"


def _cards(report: Report, colours: list[str]) -> str:
    """Each model's headline."""
    found = []
    for model, colour in zip(report.models, colours, strict=True):
        share, name = tables.quality(model)
        found.append(
            f'<div class="card" style="--colour: {colour}"><h2>{escape(model.name)}</h2>'
            f'<p class="figure">{share}</p>'
            f'<p class="muted">{name}, {escape(tables.headline(report, model))}</p></div>'
        )
    return "".join(found)
