"""`bench report`: a whole, escaped, scriptless page that stays the same, also of hardly any results; and the LaTeX tables."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_measures import fill, outcome
from test_plots import with_images, with_oracle
from test_results import failed

from ganomaly_plugin import load_results
from ganomaly_plugin.report import page as page_module
from ganomaly_plugin.report.comparisons import compare
from ganomaly_plugin.report.figures.sheets import png
from ganomaly_plugin.report.groups import groups
from ganomaly_plugin.report.html import report_html, write_report
from ganomaly_plugin.store import Store

VOID = {"meta", "img", "wbr", "br", "link", "input"}
EVIL = 'x"><script>alert(1)</script>$'


class Page(HTMLParser):
    """Checks that tags are balanced, and collects what tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def check(text: str) -> Page:
    """The page, after what must hold of any."""
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert len(page.ids) == len(set(page.ids)), [each for each, n in Counter(page.ids).items() if n > 1]
    assert page.tags["script"] == 0 and page.tags["h1"] == 1 and page.tags["caption"] == page.tags["table"]
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("href", "src", "xlink:href"):
            assert value.startswith(("#", "data:image/png;base64,")), value[:80]
        if name in ("aria-labelledby", "href", "xlink:href") and not value.startswith("data:"):
            assert value.removeprefix("#") in page.ids, value
    for target in re.findall(r"url\(#([^)]+)\)", text):
        assert target in page.ids
    described = sum(tag == "img" and name == "alt" and bool(value) for tag, name, value in page.attributes)
    assert described == page.tags["img"]
    assert not re.search(r"#fe0[12]|@import|https?://(?!www\.w3\.org)", text)
    assert set(re.findall(r"<text[^>]*font-family: ([^;\"]*)", text)) <= {"'DejaVu Sans', sans-serif"}  # none of this machine
    return page


def sweep(folder: Path, *, detectors: int = 2, classes: int = 2, seeds: int = 2) -> Store:
    names = [EVIL, *(f"d{k}" for k in range(1, detectors))]
    made = [
        with_images(with_oracle(outcome(d, str(c), s, shift=1.0 + k), 0.5, 0.9, 0.8))
        for k, d in enumerate(names)
        for c in range(classes)
        for s in range(seeds)
    ]
    return fill(folder, [*made, failed("c")])


def test_a_page_is_whole_escaped_and_the_same_again(tmp_path: Path, bench) -> None:
    store = sweep(tmp_path / "out")
    code, out, err = bench("report", store.folder)
    assert code == 0 and "report.html (0." in out, err
    path = store.folder / "report.html"
    text = path.read_text(encoding="utf-8")
    page = check(text)
    assert "alert(1)</script>" in page.text  # the name, as text
    assert "<b>no luck</b>" in page.text and page.tags["b"] == 0
    for word in (
        "most anomalous",
        "false alarms",
        "ROC curves",
        "Precision–recall",
        "Provenance",
        "oracle",
    ):
        assert word in text
    assert page.tags["svg"] >= 10 and page.tags["img"] == 2 * 2 * 4  # detectors × classes × kinds
    assert bench("report", store.folder, "--out", tmp_path / "again.html")[0] == 0
    assert (tmp_path / "again.html").read_bytes() == path.read_bytes()
    assert bench("tables", store.folder)[0] == 0  # the page beside the records is in nobody's way
    os.mkfifo(tmp_path / "pipe")
    for place in ("no/x.html", "pipe"):
        code, _, err = bench("report", store.folder, "--out", tmp_path / place)
        assert code == 2 and ("Cannot write" in err or "There is no folder" in err)
    assert (tmp_path / "pipe").is_fifo()


def test_the_heads_of_columns_may_break(tmp_path: Path) -> None:
    text = report_html(load_results(fill(tmp_path / "out", [outcome("a", "n" * 90)]).folder))
    rule = re.search(r"^thead span {(.*)}", text, re.MULTILINE)[1]
    assert f'<th scope="col"><span>{"n" * 90}</span></th>' in text
    assert "max-width" in rule and "white-space: normal" in rule and "overflow-wrap: anywhere" in rule


def test_sample_images_keep_to_their_budget(tmp_path: Path) -> None:
    (group,) = groups(load_results(sweep(tmp_path / "out", classes=3, seeds=1).folder))
    whole, left = page_module.examples(group, budget := [10**6])
    used = 10**6 - budget[0]
    assert left == 0 and [len(each) for each in whole.values()] == [3, 3] and 0 < used < 10**5
    some, left = page_module.examples(group, [6 * used // 10])  # the first class of all detectors, then the next
    assert left == 3 and [[each.category for each in mine] for mine in some.values()] == [["0", "1"], ["0"]]
    assert page_module.examples(group, [0]) == ({}, 6)


@pytest.mark.parametrize("leader", ["a", "b"])
def test_the_verdict_counts_the_classes_of_the_leader(tmp_path: Path, leader: str) -> None:
    made = []
    for name in "ab":
        for k in range(6):
            its = outcome(name, str(k))
            value = 0.6 if name != leader else 0.7 if k else 0.5
            made.append(replace(its, record=replace(its.record, metrics={**its.record.metrics, "auroc": value})))
    (group,) = groups(load_results(fill(tmp_path / "out", made).folder))
    verdict = page_module._verdict(group, compare(group.results.store, group.records, group.table, {}))
    assert verdict[1].startswith("it is better in 5 of 6 classes (Wilcoxon, Holm: p = ")


def test_pages_of_hardly_any_results(tmp_path: Path, bench) -> None:
    empty = Store(tmp_path / "empty", create=True).folder
    code, _, err = bench("report", empty)
    assert code == 2 and "has no record yet" in err and not (empty / "report.html").exists()
    only_failures = fill(tmp_path / "failed", [failed("a"), failed("b")])
    page = check(report_html(load_results(only_failures.folder)))
    assert "2 jobs failed" in page.text and page.tags["section"] == 3
    odd = fill(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")), [outcome("a")])  # no text in UTF-8
    write_report(load_results(odd.folder), tmp_path / "one.html")
    one = check((tmp_path / "one.html").read_text(encoding="utf-8"))
    assert (
        "one seed: another seed may turn the order around" in one.text
        and "no paired tests" in one.text
        and ".." not in one.text
        and "caf\\udce9" in one.text
    )
    level = [outcome("a", shift=50), outcome("b", shift=50)]
    page = check(report_html(load_results(fill(tmp_path / "level", level).folder)))
    assert "a, b share the highest mean AUROC, 1.000" in page.text and "better in" not in page.text
    holes = [outcome("a", "0"), outcome("a", "1"), outcome("b", "0"), failed("b", "1")]
    holes += [outcome("a", protocol="one-anomalous/strict-v1")]
    page = check(report_html(load_results(fill(tmp_path / "holes", holes).folder)))
    assert page.text.count("a has a mean AUROC of 0.") == 2 and page.text.count("and no rival") == 2
    assert "1 of 2 detectors lacks jobs" in page.text and "b (1 job missing)" in page.text
    assert page.text.count("no test over data sets") == 2 and page.tags["h2"] == 6  # two protocols, two sections


@pytest.mark.slow
def test_a_page_of_sixty_detectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "PANELS", 2)
    page = check(report_html(load_results(fill(tmp_path / "many", [outcome(f"d{k:02}") for k in range(60)]).folder)))
    assert "d59" in page.text and "The 7 with the highest mean AUROC of 60 detectors" in page.text
    assert "The 2 best of 60 detectors" in page.text


def test_bars_that_a_phone_has_no_room_for_are_missed_there_alone(tmp_path: Path) -> None:
    text = report_html(load_results(fill(tmp_path / "out", [outcome("a", str(c), n=9) for c in range(55)]).folder))
    check(text)
    assert re.search(r'<figure class="wide"><svg[^>]*aria-labelledby="g1-bars-text"', text)
    assert re.search(r'<p class="none tall" id="g1-bars-tall-text">55 classes × 1 detectors make .* bench plot bars', text)


def test_the_literature_stands_beside_ours_where_protocols_agree(tmp_path: Path) -> None:
    store = fill(tmp_path / "out", [outcome(d, "bird") for d in ("ganomaly", "pca")])
    text = report_html(load_results(store.folder))
    assert "GANomaly (published)" in text and "take no part in ranks" in text


def test_provenance_is_counted(tmp_path: Path) -> None:
    store = fill(tmp_path / "out", [outcome("a"), outcome("a", protocol="one-anomalous/strict-v1")])
    results = load_results(store.folder)
    assert [count for count, _ in page_module.machines(results.records)] == [2] and page_module.commands(results.records) == []


def test_a_bar_is_no_dash_in_latex(tmp_path: Path, bench) -> None:
    store = fill(tmp_path / "out", [outcome("a|b")])
    assert bench("tables", store.folder)[0] == 0
    assert r"a\textbar{}b" in (store.folder / "auc.tex").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex (Debian: texlive-latex-recommended)")
def test_latex_tables_compile(tmp_path: Path, bench) -> None:
    made = [outcome(d, c) for d in ("ganomaly[features=16]", r"50%_&#{}~^\$<é>|") for c in ("bird", "frog")]
    store = fill(tmp_path / "out", made)
    code, latex, _ = bench("tables", store.folder, "--format", "latex", "--against", "published", "--metrics", "auroc,fpr95")
    assert code == 0
    document = "\n".join(
        [r"\documentclass{article}", r"\usepackage{booktabs,graphicx}", r"\begin{document}", latex, r"\end{document}"]
    )
    (tmp_path / "x.tex").write_text(document, encoding="utf-8")
    words = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "x.tex"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert not re.search(r"Overfull|Missing character|undefined", done.stdout), done.stdout[-2000:]


@pytest.mark.parametrize("colours", [200, 300])
def test_pictures_keep_their_pixels(colours: int) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (colours, 3), dtype=np.uint8)[rng.integers(0, colours, (40, 30))]
    with Image.open(io.BytesIO(png(pixels))) as image:
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), pixels)
