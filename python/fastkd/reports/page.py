"""Format a report as one self-contained page of HTML."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from fastkd.reports import plots, tables

if TYPE_CHECKING:
    from fastkd.reports import Report

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
.wide, figure { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
.verdict { font-size: 1.15rem; margin: .6rem 0 0; overflow-wrap: anywhere; }
.warning { margin: .6rem 0 0; padding: .5rem .8rem; border-left: 4px solid #e07b39;
  background: var(--card); overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem 1.2rem; text-align: right; vertical-align: top; white-space: nowrap; }
th:first-child { text-align: left; font-weight: 450; color: var(--muted); position: sticky; left: 0;
  background: var(--card); }
thead th { border-bottom: 1px solid var(--line); }
tbody tr + tr > * { border-top: 1px solid var(--line); }
td small { display: block; line-height: 1.2; }
.dot { display: inline-block; width: .6rem; height: .6rem; border-radius: 50%; margin-right: .4rem;
  background: var(--color); }
figure { margin: 0 0 1rem; padding: 1rem 1.2rem; }
figure svg { display: block; width: 100%; height: auto; }
svg.narrow { display: none; }
figure svg text { font-family: inherit !important; }
figcaption { color: var(--muted); font-size: .85rem; margin-top: .5rem; }
@media (max-width: 40rem) {
  main { padding: 1.25rem .75rem; }
  th, td { padding: .45rem .6rem; }
  th:first-child { white-space: normal; min-width: 6.5rem; }
  figure { padding: .75rem; }
  svg.broad { display: none; }
  svg.narrow { display: block; }
}
@media print { body { background: none; } main { padding: 0; } }
"""


def make_page(report: Report) -> str:
    """Return the HTML of a report's page."""
    colors = plots.choose_colors(report)
    names, rows = "", ""
    for model, color in zip(report.models, colors, strict=True):
        dot = f'<span class="dot" style="--color: {color}"></span>'
        names += f'<th scope="col">{dot}{escape(model.name)}</th>'
    for row in tables.make_rows(report):
        cells = "".join(
            f"<td>{escape(text)}{f'<small>{escape(note)}</small>' if note else ''}</td>"
            for text, note in row.cells
        )
        rows += f'<tr><th scope="row">{escape(row.label)}</th>{cells}</tr>\n'
    narrow, pictures = plots.draw_figures(report, plots.NARROW), ""
    for name, figure in plots.draw_figures(report).items():
        pictures += (
            f"<figure>{plots.render_svg(figure, name, 'broad')}"
            f"{plots.render_svg(narrow[name], f'{name}-narrow', 'narrow')}"
            f"<figcaption>{plots.CAPTIONS[name]}</figcaption></figure>"
        )
    title, environment = escape(report.title), escape(tables.describe_environment(report))
    warnings = "".join(f'<p class="warning">{escape(text)}</p>' for text in report.warnings)
    # The policy lets browsers load nothing but the styles in the page, so no request is sent.
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{title}</h1>
<p class="verdict">{escape(tables.summarize(report))}</p>
{warnings}
</header>
<section class="wide"><table>
<thead><tr><th></th>{names}</tr></thead>
<tbody>{rows}</tbody>
</table></section>
<section class="pictures">{pictures}</section>
<footer class="muted"><p>{escape(tables.describe_method(report))}</p>
<p>{environment}</p></footer>
</main>
</body>
</html>
"""
