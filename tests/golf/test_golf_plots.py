import io
import math

import numpy as np
import PIL.Image
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from golf.golf_plots import (
    RECORD_A_REFERENCE,
    plot_depths,
    plot_golf_schedule,
    plot_quantization,
    plot_score_order,
    plot_scores,
    plot_sizes,
    seconds_text,
    short_role,
    size_parts,
    spread_apart,
)
from golf.golf_scoring import scoring_windows
from nanochat.plots import LiveChart, figure_png


def size_rows(*sizes):
    return [dict(role=f"blocks.*.part{i}.weight", bytes=float(size), bits=6) for i, size in enumerate(sizes)]


def error_table(layers):
    rows = [dict(name="tok_emb.weight", bits=8, sigmas=20, nearest=0.0, gptq=0.0)]
    for layer in range(layers):
        rows.append(dict(name=f"blocks.{layer}.mlp.fc.weight", bits=6, sigmas=12, nearest=4e-3, gptq=1e-3))
    return rows


SCORES = [("plain", 2.5, 1.0), ("a label that is rather long for the room it has", 2.25, None), ("TTT", 2.375, 40.0)]
DEPTHS = [(depth, 3 + abs(depth - 4) / 8, depth in (3, 4)) for depth in range(1, 9)]
WINDOWS = scoring_windows(32, 16, 4)
FIGURES = {
    "schedule": lambda: plot_golf_schedule([(s, 50.0 * s, min(1.0, (100 - s) / 40), 0.9) for s in range(100)]),
    "sizes": lambda: plot_sizes(size_rows(*[1000] * 12), 16_000, 3000),
    "far too large": lambda: plot_sizes(size_rows(9e6, 1, 1, 1), 100),
    "far too small": lambda: plot_sizes(size_rows(60, 50, 40, 30)),
    "quantization": lambda: plot_quantization(error_table(12)),
    "scores": lambda: plot_scores(SCORES),
    "one score": lambda: plot_scores(SCORES[:1]),
    "diverged": lambda: plot_scores([*SCORES, ("TTT", math.nan, 12345.0)]),
    "depths": lambda: plot_depths(DEPTHS),
    "deep": lambda: plot_depths([(depth, 9 / depth, depth == 16) for depth in range(1, 33)]),
    "order": lambda: plot_score_order(WINDOWS, [(3, 0, 24)]),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_picture_is_crisp_small_and_inside_its_frame(name):
    """A report of megabytes, or labels cut off at the border (anything but white in the outermost pixels)."""
    png = figure_png(FIGURES[name]())
    assert len(png) < 80_000
    pixels = np.asarray(PIL.Image.open(io.BytesIO(png)).convert("L"))
    assert pixels.shape[1] == 1600 and pixels.min() < 128
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert border.min() > 235


@pytest.mark.parametrize("name", FIGURES)
def test_no_two_labels_touch(name):
    """Numbers printed over each other, which nobody can read."""
    figure = FIGURES[name]()
    FigureCanvasAgg(figure).draw()
    for axes in figure.axes:
        texts = [text for text in axes.texts if text.get_text()]
        ticks = [*axes.get_xticklabels(), *axes.get_yticklabels()] if axes.axison else []
        titles = [text for text in (axes.title, axes._left_title, figure._suptitle) if text and text.get_text()]
        boxes = [(text.get_text(), text.get_window_extent()) for text in [*texts, *ticks, *titles] if text.get_text()]
        if legend := axes.get_legend():
            boxes.append(("legend", legend.get_window_extent()))
        for i, (first, box) in enumerate(boxes):
            for second, other in boxes[i + 1 :]:
                assert not box.padded(-1).overlaps(other.padded(-1)), (first, second)


def test_the_record_is_the_published_one():
    """A reference in another unit, or points of the wrong run, beside the reader's own curve."""
    points = RECORD_A_REFERENCE["val_bpb"]
    nats = {
        0: 6.936, 1000: 2.3036, 2000: 2.2111, 3000: 2.1566, 4000: 2.1202, 5000: 2.1047, 6000: 2.0783, 7000: 2.0582,
        8000: 2.0286, 8394: 2.0227,
    }  # fmt: skip
    assert points.keys() == nats.keys()
    for step, bpb in points.items():
        assert bpb == pytest.approx(nats[step] * 62_021_632 / (math.log(2) * 151_080_363), rel=3e-6)
    assert points[8394] == pytest.approx(1.1980, abs=5e-5)


def test_reference_fits_the_live_chart():
    """A chart that fails, or that draws nothing beside the run."""
    drawn = LiveChart(100, "golf", reference=RECORD_A_REFERENCE).figure().axes[1].collections[0].get_offsets()
    assert drawn.tolist() == [[step, bpb] for step, bpb in RECORD_A_REFERENCE["val_bpb"].items()]


def test_schedule_shows_steps_and_seconds():
    """The multiplier over the wrong axis, or milliseconds called seconds."""
    points = [(0, 0.0, 1.0, 0.85), (1, 4000.0, 0.5, 0.9), (2, 6000.0, 0.25, 0.95)]
    by_step, by_clock, momentum = ([list(data) for data in axes.lines[0].get_data()] for axes in
                                   plot_golf_schedule(points).axes)  # fmt: skip
    assert by_step == [[0, 1, 2], [1.0, 0.5, 0.25]]
    assert by_clock == [[0, 4, 6], [1.0, 0.5, 0.25]]
    assert momentum == [[0, 1, 2], [0.85, 0.9, 0.95]]


def test_sizes_add_up_to_the_file():
    """Parts that are left out, so that a file over the limit seems to fit."""
    rows = size_rows(500, 10_000, 20_000, 3, 2)
    assert size_parts(rows, 700) == [
        ("the code", 700, 0), ("part2", 20_000, 6), ("part1", 10_000, 6), ("part0", 500, 6), ("all others", 5, 0),
    ]  # fmt: skip
    assert sum(size for _, size, _ in size_parts(size_rows(*range(1, 40)), 0)) == sum(range(1, 40))
    figure = plot_sizes(rows, 31_000, 700)
    bars = [(bar.get_x(), bar.get_width()) for bar in figure.axes[0].patches]
    assert bars == [(0, 700), (700, 20_000), (20_700, 10_000), (30_700, 500), (31_200, 5)]
    assert figure.get_suptitle() == "31,205 bytes, 205 TOO MANY"
    assert plot_sizes(rows, 32_000, 700).get_suptitle() == "31,205 bytes, 795 free"


def test_labels_move_apart_but_stay_inside():
    """Labels over each other, out of the picture, or in another order than their parts."""
    for places in ([0.0, 0.0, 0.0], [0.5, 0.5, 0.51], [1.0, 1.0, 1.0], [0.1, 0.5, 0.9], [0.4]):
        spread = spread_apart(places, 0.25, 0.1, 0.9)
        assert all(0.1 - 1e-12 <= place <= 0.9 + 1e-12 for place in spread)
        assert all(b - a >= 0.25 - 1e-12 for a, b in zip(spread, spread[1:], strict=False))
    assert spread_apart([0.1, 0.5, 0.9], 0.25, 0.1, 0.9) == [0.1, 0.5, 0.9]


def test_quantization_shows_both_errors_and_the_gain():
    """GPTQ and plain rounding confused, or a gain that is not that of the points."""
    figure = plot_quantization(error_table(2))
    axes = figure.axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["tok_emb", "mlp.fc"] == [short_role("tok_emb.weight"), short_role("blocks.11.mlp.fc.weight")]
    nearest, gptq = (each.get_offsets()[:, 0].tolist() for each in axes.collections[-2:])
    assert nearest == [4e-3, 4e-3] and gptq == [1e-3, 1e-3]
    gains = [label.get_text() for label in axes.child_axes[0].get_yticklabels()]
    assert gains == ["", "−75%"]
    floor = axes.get_xlim()[0]
    assert 0 < floor < 1e-3 and axes.collections[1].get_offsets()[0, 0] == pytest.approx(floor)


def test_scores_compare_with_the_last_number():
    """A gain against the wrong row, a loss shown as a gain, or a crash on a run that diverged."""
    figure = plot_scores([("a", 2.5, 1.0), ("b", 2.25, None), ("c", math.inf, 3.0), ("d", 2.375, 0.0123)])
    axes, columns = figure.axes
    texts = [text.get_text() for text in columns.texts[:12]]
    assert texts == ["2.5000", "", "1.0 s", "2.2500", "−0.2500", "", "inf", "", "3.0 s", "2.3750", "+0.1250", "0.012 s"]
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(2.5, -0.25), (2.25, 0.125)]
    assert len({bar.get_facecolor() for bar in axes.patches}) == 2
    assert seconds_text(12345.6) == "12,346 s"


def test_untrained_depths_are_hollow():
    """An untrained depth that looks as if it could be quoted."""
    axes = plot_depths([*DEPTHS, (9, math.nan, False)]).axes[0]
    points = [line for line in axes.lines[1:] if len(line.get_xdata())]
    faces = {line.get_xdata()[0]: line.get_markerfacecolor() for line in points}
    assert sorted(faces) == list(range(1, 9))
    assert {depth for depth, face in faces.items() if face != "white"} == {3, 4}
    labels = {text.xy[0]: text.get_text() for text in axes.texts}
    assert labels == {depth: f"{loss:.3f}" for depth, loss, _ in DEPTHS}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["trained depth", "untrained depth"]


@pytest.mark.parametrize(
    "updates, names",
    [
        ([(3, 0, 24)], ["score", "score", "score", "train", "score", "score"]),
        ([(3, 0, 25)], ["score", "score", "score", "train too early", "score", "score"]),
        ([(0, 0, 1), (5, 0, 32)], ["train too early", *["score"] * 5, "train"]),
    ],
)
def test_an_update_on_unscored_targets_is_seen(updates, names):
    """A picture that vouches for an order that breaks the rule."""
    axes = plot_score_order(WINDOWS, updates).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    assert ("too early" in axes.get_title(loc="left")) == ("train too early" in names)


def test_every_target_is_blue_once():
    """Context shown as scored."""
    axes = plot_score_order(WINDOWS, [(3, 0, 24)]).axes[0]
    blue = [bar for bar in axes.patches if bar.get_facecolor() == axes.patches[1].get_facecolor()]
    scored = [t for bar in blue for t in range(round(bar.get_x()), round(bar.get_x() + bar.get_width()))]
    assert scored == list(range(32))
