"""Test the outputs of fastkd.report: text, JSON, Markdown, files, and a page in a browser."""

import errno
import html.parser
import importlib
import io
import itertools
import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from stacks import digit_loader
from torch import nn

import fastkd
from fastkd import reports
from fastkd.reports import measure, plots, tables

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

LOADER = digit_loader()
HOSTILE = "<script>alert(1)</script> | **a** $x_2$ {title} & [link](https://example.org)"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")


# ---- reports of up to ten models


def make_report(count: int, speedup: float | None = 3650.0) -> fastkd.Report:
    """Make a report of ``count`` models; all after the second have nearly equal figures."""
    models = []
    for index in range(count):
        name = ["teacher", "alone", "distilled"][index] if index < 3 else f"exported as {index}"
        accuracy = [0.98, 0.9, 0.95][index] if index < 3 else 0.949
        interval = measure.compute_wilson_interval(accuracy, 1000)
        bins = (measure.Bin(0, 0.0, 0.0),) * 14 + (measure.Bin(1000, 0.97, accuracy),)
        answers = measure.Answers(1000, accuracy, *interval, 0.1, accuracy, 0.01, bins)
        size = measure.Size(None if index > 2 else 100, 59_000 if index == 0 else 1000)
        latency = measure.Latency(1e-3 if index == 0 else 1e-5, 1e-3, 1e3, 100, speedup)
        models.append(reports.Model(name, size, answers, {"cpu": {1: latency}}))
    warnings = () if speedup else ("CPU, batch 1: speed ratios are withheld; it was busy.",)
    return fastkd.Report("Ten", tuple(models), {"threads": "1"}, warnings)


def test_the_verdict_compares_student_and_teacher():
    result = make_report(4)
    expected = (
        "distilled keeps 96.9 % of the teacher's accuracy at 1/59 of its size, 3,650x faster on "
        "CPU; 5.0 points above training alone."
    )
    assert tables.summarize(result) == expected
    assert expected in Page(result.html()).text and f"**{expected}**" in result.markdown()
    withheld = tables.summarize(make_report(4, None))
    assert withheld == expected.replace(", 3,650x faster on CPU", "")
    teacher, alone, distilled, *_ = result.models
    small = alone.answers._replace(accuracy=0.949, accuracy_high=0.96)
    close = result._replace(models=(teacher, alone._replace(answers=small), distilled))
    assert tables.summarize(close).endswith(
        "; 0.1 points above training alone, a difference within the intervals."
    )
    better = alone.answers._replace(accuracy=0.97, accuracy_low=0.96)
    worse = result._replace(models=(teacher, alone._replace(answers=better), distilled))
    assert worse.models[1].name == "alone" and "; 2.0 points below" in tables.summarize(worse)
    # The best student trained alone is compared, and is never shown as a distilled student.
    copies = result._replace(
        models=(teacher, alone, alone._replace(name="alone int8", answers=better), distilled)
    )
    assert tables.summarize(copies) == tables.summarize(worse)
    only = tables.summarize(result._replace(models=(teacher, alone)))
    assert only.startswith("alone keeps 91.8 %") and "training alone" not in only


@pytest.mark.parametrize("count", [2, 4, 10])
@pytest.mark.parametrize("speedup", [3650.0, None])
def test_text_fits_eighty_columns(count, speedup):
    result = make_report(count, speedup)
    text, words = str(result), " ".join(str(result).split())
    assert max(map(len, text.splitlines())) <= 80
    for model in result.models:
        assert model.name in words
    assert words.count("3,650x faster") == (count if speedup else 0)
    assert words.count("withheld") == (0 if speedup else count)
    assert ("speed ratios are withheld" in words) == (speedup is None)


def test_unknown_parameters_are_a_dash():
    result = make_report(4)
    row = next(line for line in result.markdown().splitlines() if "parameters" in line)
    assert row == "| parameters | 100 | 100 (the same) | 100 (the same) | \u2013 |"
    assert (
        ">\u2013<" in result.html() and json.loads(result.json())["models"][3]["parameters"] is None
    )


@pytest.mark.parametrize("width", [plots.WIDE, plots.NARROW])
@pytest.mark.parametrize("count", [2, 10])
@pytest.mark.parametrize("speedup", [3650.0, None])
def test_labels_of_a_plot_never_overlap(count, width, speedup):
    figure = plots.draw_figures(make_report(count, speedup), width)["tradeoff"]
    canvas = importlib.import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    canvas.draw()
    axes = figure.axes[0]
    names = [text for text in axes.texts if text.get_text()]
    assert len(names) == count
    ticks = [
        tick.label1
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        if axis.get_view_interval()[0] <= tick.get_loc() <= axis.get_view_interval()[1]
    ]
    assert len(ticks) >= 4
    # Text.get_window_extent leaves out the line between an annotation and its point.
    extent = importlib.import_module("matplotlib.text").Text.get_window_extent
    boxes = [extent(text) for text in (*names, *ticks, axes.xaxis.label)]
    for box, other_box in itertools.combinations(boxes, 2):
        assert not box.overlaps(other_box)


def test_pictures_suit_light_and_dark_pages(tmp_path):
    image = pytest.importorskip("PIL.Image")
    make_report(3).save(tmp_path)
    for path in tmp_path.glob("*.png"):
        with image.open(path) as picture:
            assert picture.mode == "RGBA" and picture.getpixel((0, 0))[3] == 0

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for paper in ("#ffffff", "#0d1117"):  # GitHub's page colors
        low, high = sorted([luminance(paper), luminance(plots.INK)])
        assert (high + 0.05) / (low + 0.05) > 4.1


# ---- output


def test_a_report_is_printed(models, capsys):
    result = fastkd.report(*models, LOADER[:2], seconds=0)
    shown = capsys.readouterr().out
    for text in ("teacher", "alone", "distilled", "accuracy", "calibration error", "p95"):
        assert text in shown and text in str(result)
    assert f"{100 * result.models[1].answers.agreement:.1f} %" in shown


def test_json_has_every_figure(report):
    result = json.loads(report.json())
    assert [m["name"] for m in result["models"]] == ["teacher", "alone", "distilled"]
    first = result["models"][0]
    assert first["parameters"] == 64 * 128 + 128 + 1280 + 10
    assert first["latency"]["cpu"]["32"]["p95"] == report.models[0].latency["cpu"][32].p95
    assert len(first["bins"]) == 15 and first["accuracy"] == report.models[0].answers.accuracy


def test_markdown_is_one_table(report, tmp_path):
    lines = [line for line in report.markdown().splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(tables.make_rows(report))
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {5}
    report.save(tmp_path)
    for name in re.findall(r"\]\((.*?)\)", report.markdown()):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_numbers_are_formatted_with_units():
    counts = [tables.format_count(n) for n in (0, 7, 999, 1000, 99_960, 999_600, 10**9, 10**13)]
    assert counts == ["0", "7", "999", "1.00k", "100k", "1.00M", "1.00G", "10.0T"]
    assert tables.format_size(999) == "999 B" and tables.format_size(1_000_000) == "1.00 MB"
    assert tables.format_duration(1.5) == "1.50 s" and tables.format_duration(0.012) == "12.0 ms"


@pytest.mark.parametrize("name", ["teachers", "report"])
def test_the_documentation_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (pathlib.Path(__file__).parents[1] / "docs" / f"{name}.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    exec("\n".join(blocks), {})


class Page(html.parser.HTMLParser):
    """Collect the tags, links and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.links, self.text, self.open = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "content"):
                self.links.append((tag, value))
            self.links += [(tag, link) for link in re.findall(r"url\((.*?)\)", value or "")]

    def handle_data(self, data):
        self.text += data


def test_the_page_has_no_external_references(report):
    text = report.html()
    page = Page(text)
    assert "://" not in text and "@import" not in text and "//" not in text.replace("</", "")
    assert not {"script", "link", "iframe", "img", "object", "base"} & set(page.tags)
    assert all(link.startswith("#") for tag, link in page.links if tag != "meta")
    assert "default-src 'none'" in text
    assert page.tags.count("svg") == 2 * len(plots.draw_figures(report)) == 4
    ids = re.findall(r'\bid="(.*?)"', text)
    assert len(ids) > 20 and {link[1:] for tag, link in page.links if tag != "meta"} <= set(ids)


def test_hostile_names_are_shown_as_text(models, tmp_path):
    teacher, students = models
    named = {HOSTILE: students["alone"]}
    result = fastkd.report(teacher, named, LOADER[:1], seconds=0, title=HOSTILE, show=False)
    page = Page(result.html())
    assert "script" not in page.tags and "a" not in page.tags
    assert page.text.count(HOSTILE) >= 4  # title, heading, sentence, table
    assert "<script" not in re.sub(r"\\<", "", result.markdown())
    assert HOSTILE.split()[0] in str(result)
    result.save(tmp_path)


@pytest.mark.parametrize("title", ["eval of [/data/run1]", "[bold]a[/bold] :smile: \\[b]"])
def test_titles_and_names_are_printed_as_text(models, capsys, title):
    teacher, students = models
    named = {title: students["alone"]}
    result = fastkd.report(teacher, named, LOADER[:1], seconds=0, title=title)
    shown = capsys.readouterr().out
    # Title, column and sentence, and on a busy machine warnings.
    assert shown.count(title) == str(result).count(title) >= 3


def test_a_title_must_be_text():
    with pytest.raises(TypeError, match=r"^title must be text; got int"):
        fastkd.report(nn.Linear(64, 10), nn.Linear(64, 10), [], title=3)


@pytest.mark.parametrize(
    "written", [*(pytest.param(n, marks=pytest.mark.slow) for n in range(4)), 4]
)
def test_a_full_disk_leaves_no_partial_report(report, tmp_path, monkeypatch, written):
    write, done = pathlib.Path.write_bytes, []

    def fill_disk(path, data):
        if len(done) == written:
            write(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        done.append(write(path, data))

    earlier = report.save(tmp_path / "whole")
    before = {file.name: file.read_bytes() for file in earlier.iterdir()}
    assert len(before) == 5
    changed = report._replace(title="another")
    for folder, expected in ((tmp_path / "new", {}), (earlier, before)):
        done.clear()
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(pathlib.Path, "write_bytes", fill_disk)
            changed.save(folder)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == expected


@pytest.mark.skipif(sys.platform == "win32", reason="this system has no limits of file sizes")
def test_a_limited_file_size_leaves_no_partial_report(report, tmp_path):
    # A limit of the file size, unlike a patched write, raises the system's own error.
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            report.save(tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "new").iterdir())


def browse(page, *options: str) -> subprocess.CompletedProcess:
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--disable-background-networking", f"--user-data-dir={page.parent / 'profile'}"]
    return subprocess.run(
        [*command, *options, page.as_uri()], capture_output=True, timeout=120, check=True
    )


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_draws_the_page(report, tmp_path, dark):
    image = pytest.importorskip("PIL.Image")
    page, picture = tmp_path / "report.html", tmp_path / "page.png"
    page.write_text(report.html(), encoding="utf-8")
    scheme = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    browse(page, *scheme, "--window-size=1000,1700", f"--screenshot={picture}")
    with image.open(io.BytesIO(picture.read_bytes())) as shot:
        drawn = shot.convert("RGB")
    assert (sum(drawn.getpixel((2, 2))) < 150) == dark
    counts = {colour: n for n, colour in drawn.getcolors(2**24)}
    for colour in plots.choose_colors(report):
        rgb = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
        near = [
            n
            for result, n in counts.items()
            if max(abs(a - b) for a, b in zip(result, rgb, strict=True)) < 30
        ]
        assert sum(near) > 500, colour
    # Text in the pictures is light on dark, or dark on light.
    plot = drawn.crop((60, 650, 940, 1000)).convert("L")
    darkest, lightest = plot.getextrema()
    assert lightest > 200 and darkest < 80


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_parses_the_page(report, tmp_path):
    page = tmp_path / "report.html"
    page.write_text(report.html(), encoding="utf-8")
    shown = Page(browse(page, "--dump-dom").stdout.decode())
    assert shown.tags.count("svg") == 4 and shown.tags.count("tr") == 1 + len(
        tables.make_rows(report)
    )
    assert "distilled" in shown.text and "calibration error" in shown.text


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_the_page_fits_a_phone(tmp_path):
    # The page shows its narrow figures, and is as wide as the phone, 390 pixels.
    (tmp_path / "report.html").write_text(make_report(10).html(), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        """<iframe src="report.html" style="width: 390px; height: 800px"></iframe><script>
        onload = () => {
          const page = document.querySelector("iframe").contentDocument;
          const shown = [...page.querySelectorAll("svg")].filter(svg => svg.clientWidth > 0);
          document.title = [page.documentElement.scrollWidth, ...shown.map(svg => svg.classList)];
        };</script>"""
    )
    done = browse(frame, "--allow-file-access-from-files", "--dump-dom").stdout.decode()
    assert "<title>390,narrow,narrow</title>" in done
