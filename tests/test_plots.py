"""`bench plot`: every figure in every format, what the curves are by hand, and what is refused."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from documentation import ROOT
from matplotlib.figure import Figure
from matplotlib.text import Text
from scipy.integrate import trapezoid
from sklearn.metrics import average_precision_score, roc_auc_score
from test_measures import fill, outcome
from test_results import failed
from test_statistics import DEMSAR, NAMES

from ganomaly_plugin import load_results
from ganomaly_plugin.core import Outcome
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.report.figures import FIGURES
from ganomaly_plugin.report.figures.curves import GRID, precision_at, precision_recall, roc_at
from ganomaly_plugin.report.figures.epochs import choices, epochs, table
from ganomaly_plugin.report.figures.histograms import binned, standardised
from ganomaly_plugin.report.figures.legend import clipped, columns
from ganomaly_plugin.report.figures.losses import loss_curves, thinned
from ganomaly_plugin.report.figures.ranks import draw
from ganomaly_plugin.report.figures.sheets import FRAME, by_class, samples, sheets
from ganomaly_plugin.report.figures.style import COLOURS, PAPER, Canvas, log_axis, new_figure, save, styled
from ganomaly_plugin.report.groups import groups, short_names
from ganomaly_plugin.report.statistics import friedman


def with_images(made: Outcome) -> Outcome:
    """The outcome with sample images: two of each kind, grey, with a reconstruction."""
    rng = np.random.default_rng(0)
    order = np.argsort(made.arrays["score"])
    position = np.r_[order[-2:], order[:2], order[:2], order[-2:]]
    pictures = rng.integers(0, 256, (8, 1, 8, 8), dtype=np.uint8)
    images = {"position": position, "kind": np.repeat(np.arange(4), 2), "input": pictures, "reconstruction": pictures // 2}
    return replace(made, images={**images, "map": pictures[:, 0], "map_scale": np.array(1.0)})


def with_oracle(made: Outcome, *aurocs: float) -> Outcome:
    record = replace(
        made.record,
        history=[{"loss": 1.0, "oracle_auroc": value} for value in aurocs],
        metrics={**made.record.metrics, "auroc": aurocs[-1], "auroc_oracle": max(aurocs)},
    )
    return replace(made, record=record)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    made = [
        with_oracle(outcome(d, str(c), s, shift=x), 0.5, 0.9, 0.8)
        for d, x in (("a[features=16]", 0.5), ("b$x$[features=16]", 2))
        for c in range(3)
        for s in (0, 1)
    ]
    return fill(tmp_path / "out", [*map(with_images, made), failed("c")]).folder


def test_every_figure_in_every_format(sweep: Path, bench, tmp_path: Path) -> None:
    for kind in FIGURES:
        if kind == "critical-difference":
            continue
        forms = FORMS if kind == "bars" else ("svg",)
        for form in forms:
            code, out, err = bench("plot", kind, sweep, "--out", tmp_path / f"{kind}.{form}")
            assert code == 0 and out.strip() and f"{kind}.{form}" in err, err
    svg = (tmp_path / "bars.svg").read_bytes()
    assert bench("plot", "bars", sweep, "--out", tmp_path / "again.svg")[0] == 0
    assert (tmp_path / "again.svg").read_bytes() == svg  # the same records, the same bytes
    pdf = (tmp_path / "bars.pdf").read_bytes()
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf  # fonts are embedded, as TrueType
    width = float(re.search(rb"/MediaBox \[ ?0 0 ([\d.]+)", pdf)[1])
    assert width / 72 == pytest.approx(3.3, abs=0.01)
    assert bench("plot", "bars", sweep, "--out", tmp_path / "again.pdf")[0] == 0
    assert (tmp_path / "again.pdf").read_bytes() == pdf


FORMS = ("pdf", "svg", "png")


def test_the_area_under_a_mean_curve_is_the_mean_area() -> None:
    rng = np.random.default_rng(0)
    for share in (0.02, 0.3):
        truth = rng.random(4000) < share
        score = np.round(rng.normal(truth, 1), 2)  # with ties
        assert trapezoid(roc_at(truth, score), GRID) == pytest.approx(roc_auc_score(truth, score), abs=0.002)
        area = precision_at(truth, score)[1:].mean()
        assert area == pytest.approx(average_precision_score(truth, score), abs=0.02)
    truth, score = np.array([False, True, False, True]), np.array([0.0, 1.0, 2.0, 3.0])
    assert roc_at(truth, score)[[0, 49, 50, 100]].tolist() == [0.5, 0.5, 1, 1]
    assert roc_at(truth, np.zeros(4))[[0, 50, 100]].tolist() == [0, 0.5, 1]
    assert precision_at(truth, score)[[0, 50, 51, 100]].tolist() == [1, 1, 2 / 3, 2 / 3]


def test_a_mean_with_missing_jobs_is_that_of_the_curves(tmp_path: Path) -> None:
    made = [outcome(d, str(c), s) for d in "ab" for c in range(2) for s in range(2)]
    (group,) = groups(load_results(fill(tmp_path / "out", made[:-1]).folder))  # one seed of b has both classes
    assert group.mean("a") == group.table.cells["a"]["mean"].mean and group.table.cells["b"]["mean"].n == 1
    assert group.mean("b") == pytest.approx(np.mean([each.record.metrics["auroc"] for each in made[4:7]]))
    assert group.missing("b") == 1 and [record.job.seed for record in group.jobs("b")] == [0, 1, 0]


def test_captions_speak_of_the_detectors_that_are_drawn(tmp_path: Path) -> None:
    made = [with_oracle(outcome(d, c), 0.5, 0.8) for d in ("a[k=1,n=2]", "a[k=1,n=3]") for c in "01"]
    best = outcome("b", shift=3.0)  # by its one job; it has no losses
    made.append(replace(best, record=replace(best.record, history=[])))
    (group,) = groups(load_results(fill(tmp_path / "out", made).folder))
    with styled(PAPER):
        captions = {kind: FIGURES[kind].draw([group], Canvas()).caption for kind in ("roc", "losses", "epochs")}
    assert "for b (1 job missing). Short names leave out k=1." in captions["roc"]
    assert all(captions[kind].count("missing") == 0 and "leave out k=1." in captions[kind] for kind in ("losses", "epochs"))


def test_chance_is_that_of_each_class_whoever_was_tested_on_it(tmp_path: Path) -> None:
    made = []
    for detector, classes in (("a", "01"), ("b", "0")):
        for its in (outcome(detector, category) for category in classes):
            normal = 30 if its.record.job.category == "0" else 270
            counts = {**its.record.counts, "test_normal": normal, "test_anomalous": 30}
            made.append(replace(its, record=replace(its.record, counts=counts)))
    (group,) = groups(load_results(fill(tmp_path / "out", made).folder))
    with styled(PAPER):
        assert "dotted: chance, 0.30." in precision_recall(group, Canvas()).caption


def test_histograms_lose_no_image() -> None:
    rng = np.random.default_rng(0)
    edges, normal, anomalous = binned(rng.normal(size=500), np.r_[rng.normal(3, 1, 99), 1e6])
    assert normal.sum() == pytest.approx(1) and anomalous.sum() == pytest.approx(1) and edges[-1] < 10
    assert binned(np.zeros(5), np.zeros(5))[1].sum() == 1


def test_histograms_take_no_rounding_for_a_scale() -> None:
    arrays = {"reference_score": np.array([0.1] * 3), "score": np.array([0.1, 0.6]), "is_anomaly": np.array([False, True])}
    assert arrays["reference_score"].std() > 0
    group = SimpleNamespace(jobs=lambda detector: [None], arrays=lambda record: arrays)
    assert standardised(group, "any")[1] == pytest.approx([0.5])
    arrays["reference_score"] = np.array([0.1] * 9 + [10.1])  # most alike, and yet they have a scale
    assert standardised(group, "any")[1] == pytest.approx([0.5 / 3])
    arrays["reference_score"] = np.array([0.0, 0.1, 0.2, 0.3, 1e15])  # one far out is no reason to show all as equal
    assert standardised(group, "any")[1] == pytest.approx([(0.6 - 0.2) / 0.2])


def test_short_names_keep_what_tells_detectors_apart() -> None:
    names = ["ganomaly[batchnorm=batch,features=16]", "ganomaly[features=16]", "vae[features=16]", "knn[standardise=false]"]
    assert list(short_names(names).values()) == ["ganomaly[batchnorm=batch]", "ganomaly", "vae", "knn[standardise=false]"]
    names = ["pca", "pca[standardise=false]", "knn[standardise=false]"]
    assert list(short_names(names).values()) == names


def test_the_best_seven_share_the_figure_of_epochs_and_no_colour(tmp_path: Path) -> None:
    made = [with_oracle(outcome(f"d{k}"), 0.5, 0.1 * k) for k in range(9)]
    plain = [outcome("p", shift=0.5)]  # has no epochs, and ranks among them
    (group,) = groups(load_results(fill(tmp_path / "out", [*made, *plain]).folder))
    assert 0 < group.colour("p") < 7
    assert [choice.detector for choice in choices(group)] == [f"d{k}" for k in range(8, -1, -1)]
    with styled(PAPER):
        drawing = epochs([group], Canvas())
        lines = [line for line in drawing.figure.axes[0].lines if "/" in str(line.get_label())]
    assert "The 7 with the highest mean AUROC of 9 detectors." in drawing.caption
    assert len({line.get_color() for line in lines}) == len(lines) == 7 and drawing.table.count("| cifar10") == 9


def test_long_names_widen_a_key_and_are_refused_beside_ranks(tmp_path: Path, bench) -> None:
    assert columns(["ae", "pca"], 3.3) > 2 > columns(["ganomaly_plus[w_turn=0.5,views=4]", "ae"], 3.3) == 1
    names = [f"ganomaly_plus[w_turn={x}]" for x in range(4)]
    store = fill(tmp_path / "out", [outcome(d, dataset=f"set{k}") for d in names for k in range(6)])
    words = ["plot", "critical-difference", store.folder, "--out", tmp_path / "cd.svg"]
    code, _, err = bench(*words)
    assert code == 2 and "do not fit beside a diagram of 3.3 inches. Give --width 4, or" in err
    assert bench(*words, "--width", 4)[0] == 0


def test_names_that_would_read_alike_when_clipped_are_whole(tmp_path: Path) -> None:
    names = [f"a[first_weight={x},features={y},last_weight=10]" for x in (1, 5) for y in (16, 32)]
    assert clipped([*names, "b"], 20)[0].replace("\n", "") == names[0] and clipped([names[0], "b"], 20)[0].count("…") == 1
    made = [with_oracle(outcome(d, f"the_first_half_{c}_of_a_class"), 0.5, 0.8) for d in [*names, "b"] for c in "xy"]
    (group,) = groups(load_results(fill(tmp_path / "out", made).folder))
    with styled(PAPER):
        for kind in ("roc", "pr", "bars", "histograms", "losses", "speed", "epochs"):
            figure = FIGURES[kind].draw([group], Canvas()).figure
            figure.draw_without_rendering()
            texts = [text.get_text() for text in figure.findobj(Text)]
            assert not [n for n in short_names(names).values() if not any(n in t.replace("\n", "") for t in texts)], kind
            if kind == "bars":
                assert len({text for text in texts if text.replace("\n", "").endswith("_of_a_class")}) == 2
                box = figure.axes[0].get_position()
                assert box.height * figure.get_figheight() > 1.4  # inches that are left to the bars


def test_ticks_of_many_decades_do_not_run_into_each_other() -> None:
    with styled(PAPER):
        figure = new_figure(3.3, 2)
        axes = figure.subplots(1, 2)[0]
        axes.plot([1, 1e4], [0, 1])
        log_axis(axes, "x")
        figure.draw_without_rendering()
        boxes = [each.get_window_extent() for each in axes.get_xticklabels() if each.get_text()]
    low, high = axes.bbox.x0 - 1, axes.bbox.x1 + 1
    shown = [box for box in boxes if low <= (box.x0 + box.x1) / 2 <= high]
    assert len(shown) > 1 and all(a.x1 + 2 < b.x0 for a, b in itertools.pairwise(shown))


def test_epoch_choice_by_hand(tmp_path: Path, bench) -> None:
    made = [with_oracle(outcome("a", "0"), 0.5, 0.9, 0.8), with_oracle(outcome("a", "1"), 0.7, 0.6, 0.7)]
    store = fill(tmp_path / "out", made)
    (group,) = groups(load_results(store.folder))
    (choice,) = choices(group)
    assert (choice.last, choice.best, choice.jobs) == (pytest.approx(0.75), pytest.approx(0.8), 2)
    np.testing.assert_allclose(choice.by_epoch, [0.6, 0.75, 0.75])
    _, out, _ = bench("plot", "epochs", store.folder, "--out", tmp_path / "e.svg")
    assert "| 2 | 0.750 | 0.800 | +0.050 |" in out
    late = fill(tmp_path / "late", [with_oracle(outcome("a"), 0.1, 0.8, 0.9)]).folder
    with styled(PAPER):
        (axes,) = epochs(groups(load_results(late)), Canvas()).figure.axes
    assert axes.get_ylim()[0] > 0.7  # the first third, which would flatten the rest, has no say
    plain = fill(tmp_path / "plain", [outcome("a")]).folder
    code, _, err = bench("plot", "epochs", plain, "--out", tmp_path / "e.svg")
    assert code == 2 and "No job here noted" in err


def test_the_published_table_of_epochs_is_what_its_records_give() -> None:
    folder = ROOT / "results" / "epoch_and_batchnorm"
    made = [choice for group in groups(load_results(folder)) for choice in choices(group)]
    assert len(made) == 4 and table(made) in (folder / "README.md").read_text()


def test_losses_of_stages_and_of_unequal_length(tmp_path: Path) -> None:
    one = outcome("a", "0")
    made = [
        replace(one, record=replace(one.record, history=[{"gan": 2.0}, {"gan": 1.0}, {"encoder": 0.5}])),
        outcome("a", "1"),  # {"loss": ...} for five epochs
    ]
    (group,) = groups(load_results(fill(tmp_path / "out", made).folder))
    curves = loss_curves(group, "a")
    assert {name: int((~np.isnan(each[0])).sum()) for name, each in curves.items()} == {"gan": 2, "encoder": 1, "loss": 5}
    assert curves["gan"][:, 0].tolist() == [2, 2, 2]


def test_a_criterion_on_held_out_images_is_no_training_loss(tmp_path: Path) -> None:
    one = outcome("a")
    one = replace(one, record=replace(one.record, history=[{"loss": 2.0, "validation": 1.0}] * 2))
    (group,) = groups(load_results(fill(tmp_path / "out", [one]).folder))
    figure = FIGURES["losses"].draw([group], Canvas()).figure
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["loss", "validation (held out)"]


def test_long_curves_are_thinned() -> None:
    assert thinned(3).tolist() == [0, 1, 2] and thinned(1).tolist() == [0]
    assert len(thinned(1000)) == 150 and thinned(1000)[[0, -1]].tolist() == [0, 999]


def test_sheets_show_truth_and_score(sweep: Path) -> None:
    (group,) = groups(load_results(sweep))
    record = group.jobs(group.detectors[0])[0]
    made = sheets(group, record)
    arrays = group.arrays(record)
    assert [sheet.kind for sheet in made] == ["most anomalous", "least anomalous", "missed anomalies", "false alarms"]
    assert made[0].score.max() == arrays["score"].max() and made[0].rows == ("input", "reconstruction", "map")
    assert made[0].pixels.shape == (3 * (8 + FRAME) + FRAME, 2 * (8 + FRAME) + FRAME, 3)
    firsts = by_class(group, group.detectors[0])
    assert {name: its.job.seed for name, its in firsts.items()} == {"0": 0, "1": 0, "2": 0}


def test_long_scores_below_sheets_do_not_run_into_each_other(tmp_path: Path) -> None:
    made = outcome("a")
    made = with_images(replace(made, arrays={**made.arrays, "score": made.arrays["score"] * 1e-5}))
    four = {name: array if array.ndim == 0 else np.repeat(array, 2, axis=0) for name, array in made.images.items()}
    with styled(PAPER):
        figure = samples(groups(load_results(fill(tmp_path / "out", [replace(made, images=four)]).folder))[0], Canvas()).figure
        figure.canvas.draw()
        for axes in figure.axes:
            boxes = [text.get_window_extent() for text in axes.get_xticklabels()]
            assert len(boxes) == 4 and all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))


def test_critical_difference_of_demsars_example(tmp_path: Path, bench) -> None:
    pytest.importorskip("scikit_posthocs")
    with styled(PAPER):
        drawing = draw(friedman(NAMES, DEMSAR, ties=False), "p", Canvas())
        texts = [text.get_text() for text in drawing.figure.axes[0].texts]
    assert "C4.5+m+cf (1.96)" in texts and "(3.14) C4.5" in texts and "CD = 1.25" in texts
    made = [outcome(d, "0", dataset=f"set{k}", shift=x) for d, x in (("a", 0), ("b", 2), ("c", 4)) for k in range(8)]
    store = fill(tmp_path / "out", made)
    code, out, _ = bench("plot", "critical-difference", store.folder, "--out", tmp_path / "cd.svg")
    assert code == 0 and "over 8 data sets" in out
    code, _, err = bench("plot", "critical-difference", store.folder, "--out", tmp_path / "no.svg", "--datasets", "set0,set1")
    assert code == 2 and "got 3 on 2" in err and not (tmp_path / "no.svg").exists()


def test_names_that_no_font_has_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with styled(PAPER):
        figure = new_figure(2, 1)
        figure.text(0.1, 0.5, "hole \U0010fffd")  # of the private characters, which no font of ours has
        save(figure, tmp_path / "a.png")
    said = capsys.readouterr().err
    assert "a.png: no font here has \U0010fffd, which are boxes there. Install one" in said and said.count("\n") == 1


def test_other_warnings_of_a_figure_are_passed_on(tmp_path: Path) -> None:
    with styled(PAPER):
        figure = Figure(figsize=(0.3, 0.3), layout="constrained")
        figure.subplots(3, 3)[0, 0].set_ylabel("a long label")
        with pytest.warns(UserWarning, match="axes sizes collapsed to zero"):
            save(figure, tmp_path / "a.png")


def test_what_plots_refuse(sweep: Path, bench, tmp_path: Path) -> None:
    out = tmp_path / "x.pdf"
    for words, text in (
        (("rocc", sweep, "--out", out), "Did you mean 'roc'?"),
        (("roc", sweep, "--out", tmp_path / "x.gif"), "ends in .pdf, .svg or .png"),
        (("roc", sweep, "--out", tmp_path / "no" / "x.pdf"), "There is no folder"),
        (("roc", sweep, "--out", out, "--detectors", "ab"), "Unknown detector 'ab'"),
        (("roc", sweep, "--out", out, "--classes", "7"), "Unknown class '7'"),
        (("roc", sweep, "--out", out, "--width", 0), "width must lie"),
        (("roc", sweep, "--out", out, "--detectors", "c"), "no finished job of these names"),
        (("roc", tmp_path, "--out", out), "not a results folder"),
    ):
        code, _, err = bench("plot", *words)
        assert code == 2 and text in err, err
    mixed = fill(tmp_path / "mixed", [outcome("a"), outcome("a", protocol="one-anomalous/strict-v1")]).folder
    code, _, err = bench("plot", "roc", mixed, "--out", out)
    assert code == 2 and "--protocols" in err
    assert bench("plot", "roc", mixed, "--out", out, "--protocols", "one-anomalous/strict-v1")[0] == 0
    code, _, err = bench("plot", "samples", mixed, "--out", out, "--protocols", "one-anomalous/strict-v1")
    assert code == 2 and "kept sample images" in err


def test_plots_of_hardly_any_and_of_very_many(tmp_path: Path) -> None:
    one = fill(tmp_path / "one", [outcome("a")]).folder
    many = fill(tmp_path / "many", [outcome(f"d{k:02}") for k in range(60)]).folder
    holes = fill(tmp_path / "holes", [outcome("a", "0"), outcome("a", "1"), outcome("b", "0"), failed("b", "1")]).folder
    with styled(PAPER):
        for folder, text in ((one, ""), (many, "of 60 detectors"), (holes, "")):
            there = groups(load_results(folder))
            for kind in ("roc", "pr", "bars", "histograms", "losses", "speed"):
                drawing = FIGURES[kind].draw(there, Canvas())
                assert text in drawing.caption
                assert ("do not compare, for b (1 job missing)." in drawing.caption) == (folder == holes)
                if folder == holes and kind == "roc":
                    texts = " ".join(each.get_text() for each in drawing.figure.legends[0].get_texts())
                    assert texts.count("missing") == 1 and "b (1 job missing)" in texts
        wide = fill(tmp_path / "wide", [outcome(d, str(c), n=9) for d in "ab" for c in range(60)])
        with pytest.raises(InvalidInput, match="too many for one figure"):
            FIGURES["bars"].draw(groups(load_results(wide.folder)), Canvas())


# Linear RGB as seen without one kind of cone: Machado, Oliveira, Fernandes, IEEE TVCG 15, 2009, severity 1.
VISION = np.array(
    [
        np.eye(3),
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ]
)
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colours: list[str]) -> np.ndarray:
    channels = np.array([[int(colour[k : k + 2], 16) for k in (1, 3, 5)] for colour in colours]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def test_colours_suit_every_vision_and_background() -> None:
    css = (resources.files("ganomaly_plugin.report") / "templates" / "report.css").read_text()
    blocks = [dict(re.findall(r"--(\w+): (#\w+);", block)) for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL)]
    for block in blocks:  # light, dark, print
        colours = [block[f"c{k}"] for k in range(len(COLOURS))]
        ground, ink, *shown = linear([block["paper"], block["ink"], *colours, block["muted"]]) @ TO_XYZ[1]
        contrast = [(max(each, ground) + 0.05) / (min(each, ground) + 0.05) for each in (*shown, ink)]
        assert min(contrast[:-2]) >= 3 and min(contrast[-2:]) >= 4.5, block  # of graphics, and of text
        seen = np.clip(np.einsum("mij,nj->mni", VISION, linear(colours)), 0, 1) @ TO_XYZ.T / [0.9505, 1, 1.089]
        f = np.where(seen > 0.008856, np.cbrt(seen), 7.787 * seen + 16 / 116)
        lab = np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)
        apart = np.linalg.norm(lab[:, :, None] - lab[:, None], axis=-1)[:, ~np.eye(len(colours), dtype=bool)]
        assert apart.min() > 20, block  # 2 is the least that an eye tells apart side by side
    assert tuple(blocks[0][f"c{k}"] for k in range(len(COLOURS))) == COLOURS == tuple(blocks[2][f"c{k}"] for k in range(7))
    assert len(blocks) == 3 and (PAPER.normal, PAPER.anomalous) == COLOURS[:2]
