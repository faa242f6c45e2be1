import base64
import bz2
import io
import json
import lzma
import math
import random
import re
import subprocess
import sys
import types
import zlib
from pathlib import Path

import nbformat
import numpy as np
import papermill
import PIL.Image
import pytest

from nanochat import plots
from nanochat.plots import (
    D12_REFERENCE,
    LiveChart,
    compressor_bpb,
    conversation_html,
    figure_png,
    in_notebook,
    plot_bpb_bars,
    plot_conversations,
    plot_marks,
    plot_packing,
    plot_schedules,
    plot_windows,
    show_figure,
    show_html,
    show_table,
    table_html,
    table_text,
    tokens_html,
    training_log_line,
)

NB_SRC = Path(plots.__file__).parents[1]


@pytest.fixture(autouse=True)
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.delenv("RANK", raising=False)


class ByteTokenizer:
    """Every byte is a token."""

    def encode(self, text):
        return list(text.encode("utf-8"))

    def decode_single_token_bytes(self, token_id):
        return bytes([token_id])


class WordTokenizer:
    """Pieces of four characters; has no access to raw bytes."""

    def encode(self, text):
        self.pieces = [text[i : i + 4] for i in range(0, len(text), 4)]
        return list(range(len(self.pieces)))

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)


def training_records(n, every=100):
    noise = random.Random(0)
    for step in range(n + 1):
        yield {
            "step": step,
            "loss": 3 + 7 * math.exp(-step / 45) + 0.05 * noise.gauss(0, 1) if step < n else None,
            "tokens_per_second": 10_000 * (1 + 0.02 * noise.gauss(0, 1)) if step else 900.0,
            "val_bpb": 1 + 2 * math.exp(-step / 90) if step % every == 0 or step == n else None,
            "eta_seconds": (n - step) * 1.5 if step > 10 else None,
        }


def packed_example():
    lengths, rows, doc = random.Random(1), [], 0
    for _ in range(8):
        room, row = 2049, []
        while room:
            wanted = int(lengths.lognormvariate(5.5, 1)) + 2
            row.append((doc, min(wanted, room), wanted > room))
            room, doc = room - min(wanted, room), doc + 1
        rows.append(row)
    return rows


def chart_after(n=300, **options):
    chart = LiveChart(n, "pretraining d4", **options)
    for one in training_records(n):
        chart.add(one)
    return chart


FIGURES = {
    "packing": lambda: plot_packing(packed_example()),
    "windows": lambda: plot_windows([(1024, 0), (1024, 0), (1024, 0), (2048, 0)] * 6 + [(-1, 0)], 2048),
    "schedules": lambda: plot_schedules(1785, lambda s: 1 - s / 1785, lambda s: 0.95, lambda s: 0.2),
    "bars": lambda: plot_bpb_bars({"zlib -9": 2.4, "xz -9e": 1.84, "this model": 1.7}),
    "conversations": lambda: plot_conversations([([(i, 60, 20), (i, 300, 250), (i, 100, 9)], 53) for i in range(8)]),
    "marks": lambda: plot_marks(["ARC-Easy", "GSM8K"], [0.25, 0.0], {"base": [0.2, None], "tuned": [0.4, 1.0]}),
    "live": lambda: chart_after(1785, reference=D12_REFERENCE).figure(),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_picture_is_crisp_small_and_inside_its_frame(name):
    """A report of megabytes, or titles cut off at the border (anything but white in the outermost pixels)."""
    png = figure_png(FIGURES[name]())
    assert len(png) < 80_000
    pixels = np.asarray(PIL.Image.open(io.BytesIO(png)).convert("L"))
    assert pixels.shape[1] >= 800 and pixels.min() < 128
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert border.min() > 240


def test_import_and_drawing_leave_the_readers_matplotlib_alone():
    """Importing the chapter, or one call, would restyle every plot that the reader draws afterwards."""
    code = (
        "import matplotlib, sys; before = matplotlib.rcParams.copy(); import nanochat.plots as p;"
        "p.figure_png(p.plot_bpb_bars({'a': 1.0})); p.LiveChart(3, 't').figure();"
        "assert matplotlib.rcParams.copy() == before; assert 'matplotlib.pyplot' not in sys.modules;"
        "assert 'IPython' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=NB_SRC)


def test_windows_show_what_attention_sees():
    """An off-by-one in the band: left=n means n + 1 keys, and left < 0 or left >= T - 1 means all of them."""
    T = 8
    figure = plot_windows([(2, 0), (7, 0), (-1, 0), (8, 0)], T)
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert labels == ["last 3", "all 8", "all 8", "all 8"]
    for axes, left in zip(figure.axes, (2, 7, -1, 8), strict=True):
        shape = axes.patches[0].get_path()
        for query in range(T):
            # a quarter below the middle of the row, so that no point lies exactly on an edge
            seen = [key for key in range(T) if shape.contains_point((key + 0.5, query + 0.75))]
            assert seen == [key for key in range(query + 1) if left < 0 or query - key <= left]
    brute = sum(j <= i and (left < 0 or i - j <= left) for left in (2, 7, -1, 8) for i in range(T) for j in range(T))
    assert f"{brute / (4 * T * (T + 1) / 2):.0%}" in figure.get_suptitle()


def test_packing_counts_documents_and_cuts():
    """A picture that contradicts its own title."""
    figure = plot_packing([[(0, 5, False), (1, 4, True)], [(2, 9, False)]])
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "3 documents in 2 rows of 9 tokens, 1 of them cut"
    assert [(bar.get_x(), bar.get_width(), bool(bar.get_hatch())) for bar in axes.patches] == [
        (0, 5, False), (5, 4, True), (0, 9, False),
    ]  # fmt: skip


def test_conversations_show_what_is_learned_and_what_is_empty():
    """A title that adds up to something other than the picture."""
    figure = plot_conversations([([(7, 6, 3), (2, 2, 0)], 2), ([(1, 9, 5)], 1)])
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "3 conversations in 2 rows: 40% learned, 45% read, 15% padding"
    bars = [(bar.get_x(), bar.get_width()) for bar in axes.patches]
    assert bars == [(0, 6), (3, 3), (6, 2), (8, 0), (8, 2), (0, 9), (4, 5), (9, 1)]


def test_marks_without_an_exam_have_no_bar():
    """A missing mark that is drawn as a zero, or a line for guessing in the wrong place."""
    figure = plot_marks(["A", "B"], [0.25, 0.0], {"base": [None, 0.5], "tuned": [0.125, 1.0]})
    axes = figure.axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0, 0.5, 0.125, 1.0]
    assert [text.get_text() for text in axes.texts] == ["", "50.0%", "12.5%", "100.0%"]
    assert [line.get_xdata()[0] for line in axes.lines] == [0.25, 0.0]


def test_schedules_are_drawn_as_given():
    """Sampling must include the first and the last step, where the schedules bend."""
    figure = plot_schedules(5000, lambda s: s, lambda s: 2 * s, lambda s: 1.0)
    for axes, scale in zip(figure.axes[:2], (1, 2), strict=True):
        x, y = axes.lines[0].get_data()
        assert x[0] == 0 and x[-1] == 5000 and len(x) < 1500
        assert list(y) == [scale * step for step in x]


def test_compressors_match_their_tools():
    """Comparing the model with a weaker setting of the compressor than the label says."""
    data = (Path(__file__).read_text() * 3).encode()
    result = compressor_bpb(data)
    assert result == {
        "zlib -9": 8 * len(zlib.compress(data, 9)) / len(data),
        "xz -9e": 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data),
    }
    assert result["xz -9e"] < 8 * len(bz2.compress(data)) / len(data) < 8


def test_tokens_html_shows_whitespace_ids_and_partial_characters():
    """Invisible spaces, broken markup from `<`, or replacement characters where a token is half a letter."""
    source = tokens_html(ByteTokenizer(), "a <b>\té\n")
    titles = [int(title) for title in re.findall(r'title="(\d+)"', source)]
    assert titles == list("a <b>\té\n".encode())
    assert "&lt;" in source and "<b>" not in source
    for shown in ("·", "⇥", "↵\n", "\\xc3", "\\xa9"):
        assert f">{shown}<" in source
    assert "9 tokens, 9 bytes, 1.00 bytes each" in source
    assert "abcd</span>" in tokens_html(WordTokenizer(), "abcdefgh")
    assert "0 tokens, 0 bytes<" in tokens_html(ByteTokenizer(), "")


def test_conversation_html_tells_learned_from_read():
    """The colours are the only sign of the mask: swapped, they teach the opposite."""
    source = conversation_html(ByteTokenizer(), list(b"ab"), [0, 1])
    assert re.findall(r"rgba\(([\d,]+),", source) == ["140,140,140", "0,158,115"]
    assert "2 tokens, 1 of them (green) are learned" in source


def test_tokens_html_has_no_fixed_text_or_page_colour():
    """Black letters on a dark page cannot be read."""
    source = tokens_html(ByteTokenizer(), "hello")
    assert set(re.findall(r"(?<![-\w])color:([^;\"]+)", source)) == {"inherit"}
    assert re.findall(r"background:(\w+)", source) == ["rgba"] * 5


def test_tables_in_a_terminal_and_in_a_notebook(capsys):
    """Numbers that do not line up, unescaped text, or a crash on a missing value."""
    rows = [("zlib -9", 2.4, 12345), ("a <b>", None, 7)]
    assert table_text(rows, ("what", "bpb", "n"), "sizes").splitlines() == [
        "sizes",
        "what        bpb       n",
        "───────  ──────  ──────",
        "zlib -9  2.4000  12,345",
        "a <b>                 7",
    ]
    source = table_html(rows, ("what", "bpb", "n"), "sizes")
    assert "a &lt;b&gt;" in source and source.count("text-align:right") == 6 and "12,345" in source
    show_table(rows, ("what", "bpb", "n"))
    assert capsys.readouterr().out.startswith("what")
    assert table_text([], ("a", "b")).splitlines()[0] == "a  b"


def test_a_script_gets_files_and_lines_only(tmp_path, capsys):
    """A plain run would print object representations, or lose its pictures."""
    assert not in_notebook()
    show_figure(plot_bpb_bars({"this model": 1.7}), "bars")
    show_html("<b>no</b>")
    assert capsys.readouterr().out == ""
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["bars.png"]


def test_other_ranks_stay_silent(tmp_path, monkeypatch, capsys):
    """Eight ranks would write the same file at once and print every line eight times."""
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    show_figure(plot_bpb_bars({"this model": 1.7}), "bars")
    chart_after(20).finish()
    show_table([(1,)], ("n",))
    assert capsys.readouterr().out == "" and not (tmp_path / "report").exists()


def test_log_line_is_the_originals():
    """Tools that parse the original's log would find nothing."""
    record = types.SimpleNamespace(
        step=748, loss=3.2, smooth_loss=3.314679, lr_multiplier=1.0, seconds=2.58212, tokens_per_second=203045.2,
        mfu=0.522, epoch=1, total_seconds=31.76 * 60, eta_seconds=44.6 * 60, val_bpb=None,
    )  # fmt: skip
    assert training_log_line(record, 1785) == (
        "step 00748/01785 (41.90%) | loss: 3.314679 | lrm: 1.00 | dt: 2582.12ms | tok/sec: 203,045 | mfu: 52.20 | "
        "epoch: 1 | total time: 31.76m | eta: 44.6m"
    )
    record.mfu = record.eta_seconds = None
    assert "mfu" not in training_log_line(record, 1785) and "eta" not in training_log_line(record, 1785)


def test_live_chart_in_a_script_prints_each_step_and_saves_once(tmp_path, capsys):
    """A run under torchrun would be blind, or would write a picture at every step."""
    chart = chart_after(20)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Step 00000 | Validation bpb: 3.000000"
    assert re.fullmatch(r"step 00000/00020 \(0\.00%\) \| loss: 10\.\d{6} \| tok/sec: 900", lines[1])
    assert len(lines) == 20 + 2 and lines[-1].startswith("Step 00020 | Validation bpb: ")
    assert not (tmp_path / "report").exists()
    chart.add({"step": 3, "loss": 1.0, "val_bpb": 2.0, "replayed": True})
    assert capsys.readouterr().out == "" and chart.losses[3] == 1.0, "what an earlier process printed is only drawn"
    chart.finish()
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["pretraining-d4.png"]


def test_live_chart_smooths_like_the_original():
    """A biased average starts near zero and shows a loss that never was."""
    chart = LiveChart(3, "t")
    for step, loss in enumerate((10.0, 20.0)):
        chart.add({"step": step, "loss": loss})
    assert chart.smooth[0] == pytest.approx(10)
    assert chart.smooth[1] == pytest.approx((0.09 * 10 + 0.1 * 20) / (1 - 0.81))
    chart.add({"step": 2, "loss": 5.0, "smooth_loss": 7.0})
    assert chart.smooth[2] == 7.0 and chart.losses[2] == 5.0


@pytest.mark.parametrize(
    "records",
    [[], [{"step": 0, "loss": 3.0}], [{"step": 0, "loss": 3.0}, {"step": 1, "loss": math.nan, "val_bpb": math.inf}]],
)
def test_live_chart_draws_whatever_there_is(records):
    """A diverged or just started run would end in a plotting error instead of a picture of it."""
    chart = LiveChart(10, "t", reference=None)
    for one in records:
        chart.add(one)
    assert len(figure_png(chart.figure())) > 1000


def test_d12_reference_is_drawn():
    """The comparison with the published run would silently be missing."""
    points = [axes.collections[0].get_offsets() for axes in chart_after(50, reference=D12_REFERENCE).figure().axes[:2]]
    assert points[0].tolist() == [[step, loss] for step, loss in D12_REFERENCE["loss"].items()]
    assert points[1].tolist() == [[0, 3.175621], [750, 1.013885], [1785, 0.920155]]


def test_executed_notebook_holds_one_live_picture(tmp_path):
    """papermill would store dozens of pictures of one training, or none, or a plain log beside them."""
    cells = [
        f"import sys; sys.path.insert(0, {str(NB_SRC)!r})\nfrom nanochat.plots import *",
        "chart = LiveChart(30, 'pretraining d4', every_seconds=0.0)\n"
        "for step in range(31):\n"
        "    chart.next_drawing = 0.0 if step % 10 == 0 else 1e99\n"
        "    chart.add({'step': step, 'loss': 9 / (1 + step), 'tokens_per_second': 100.0})\n"
        "chart.finish()",
        "show_figure(plot_bpb_bars({'xz': 1.84, 'this model': 1.7}), 'bars')",
        "show_table([('a', 1)], ('name', 'n'))\nshow_html('<i>x</i>')",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(notebook, tmp_path / "in.ipynb")
    papermill.execute_notebook(
        str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb"), progress_bar=False, kernel_name="python3"
    )
    outputs = [cell.outputs for cell in nbformat.read(tmp_path / "out.ipynb", as_version=4).cells]
    assert [len(each) for each in outputs] == [0, 1, 1, 2]
    for each, name in ((outputs[1], "pretraining-d4"), (outputs[2], "bars")):
        assert each[0].output_type == "display_data"
        shown = base64.b64decode(each[0].data["image/png"])
        assert shown == (tmp_path / "report" / f"{name}.png").read_bytes(), "the last picture shown is the one saved"
        width = PIL.Image.open(io.BytesIO(shown)).width
        assert each[0].metadata["image/png"]["width"] == width // 2
    assert "<table" in outputs[3][0].data["text/html"] and "<i>x</i>" in outputs[3][1].data["text/html"]
    assert "Validation" not in json.dumps(outputs)
