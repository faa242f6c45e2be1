# %% [markdown]
# ## Pictures
#
# A table of 512 numbers tells you that packing works; one picture shows you. Every function here returns a figure and
# displays nothing: `show_figure` does that, and files the same picture in the report. So the notebook, the plain
# script and the tests all draw with the same code.
#
# One style for all of them: few lines, direct labels instead of legends where they fit, and colours that remain
# distinguishable with colour-blind eyes (Okabe and Ito's palette).

# %%
import html
import io
import lzma
import math
import sys
import time
import zlib

import PIL.Image
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Polygon
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter

from nanochat.runtime import get_base_dir, get_dist_info, print0, write_atomic

# %% [markdown]
# ### The style
# Applied inside each drawing function, so that importing this chapter leaves your own matplotlib settings alone.

# %%
PLOT_BLUE, PLOT_SKY, PLOT_ORANGE, PLOT_GREEN, PLOT_RED = "#0072B2", "#56B4E9", "#E69F00", "#009E73", "#D55E00"
PLOT_INK, PLOT_LINE = "#222222", "#9A9A9A"

PLOT_STYLE = {
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "text.color": PLOT_INK,
    "axes.facecolor": "white",
    "axes.edgecolor": PLOT_LINE,
    "axes.labelcolor": PLOT_INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "xtick.color": PLOT_LINE,
    "ytick.color": PLOT_LINE,
    "xtick.labelcolor": PLOT_INK,
    "ytick.labelcolor": PLOT_INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}

# %% [markdown]
# ### Notebook or script?
# A kernel can show pictures and replace them in place; a script has only lines of text.


# %%
def in_notebook() -> bool:
    """True inside a Jupyter or Colab kernel (papermill included), False in a script or a terminal's IPython."""
    ipython = sys.modules.get("IPython")  # a kernel has imported it already, a script need not have it at all
    shell = ipython.get_ipython() if ipython else None
    return getattr(shell, "kernel", None) is not None


def notebook_image(png: bytes, figure: Figure):
    """The PNG for a notebook, at 100 CSS pixels to the inch: half its own resolution, so it is sharp."""
    from IPython.display import Image

    return Image(data=png, format="png", width=round(figure.get_figwidth() * 100))


# %% [markdown]
# ### `show_figure`
# The picture goes into the report and, in a notebook, below the cell.


# %%
@rc_context(PLOT_STYLE)
def figure_png(figure: Figure) -> bytes:
    """The figure as a PNG of 200 dots per inch."""
    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    # A palette of 128 colours takes away two thirds of the size and nothing that one can see.
    PIL.Image.open(buffer).convert("RGB").quantize(128, dither=PIL.Image.Dither.NONE).save(small, "png", optimize=True)
    return small.getvalue()


def show_figure(figure: Figure, name: str) -> None:
    """Save `figure` as `<base>/report/<name>.png` and display it in a notebook. Does nothing on ranks above 0."""
    if get_dist_info()[1] != 0:
        return
    png = figure_png(figure)
    write_atomic(f"{get_base_dir()}/report/{name}.png", png)
    if in_notebook():
        from IPython.display import display

        display(notebook_image(png, figure))


def show_html(source: str) -> None:
    """Display HTML in a notebook; a script has no use for it and prints nothing."""
    if in_notebook():
        from IPython.display import HTML, display

        display(HTML(source))


def show_markdown(source: str) -> None:
    """Display Markdown in a notebook, print it as it is in a script."""
    if in_notebook():
        from IPython.display import Markdown, display

        display(Markdown(source))
    else:
        print0(source)


# %% [markdown]
# ### `show_table`
# Numbers line up on the right, whether the table ends up in a notebook or in a terminal.


# %%
def table_cell(value) -> str:
    """Numbers as the report writes them: thousands separated, four decimals; None as an empty cell."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.4f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def numeric_columns(rows, header) -> list[bool]:
    """For each column, whether it holds numbers alone (empty cells aside)."""
    columns = [[row[i] for row in rows if row[i] is not None] for i in range(len(header))]
    return [bool(column) and all(isinstance(value, (int, float)) for value in column) for column in columns]


def table_text(rows, header, caption: str = "") -> str:
    """The table as aligned plain text."""
    cells = [[str(name) for name in header]] + [[table_cell(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numeric = numeric_columns(rows, header)
    lines = []
    for row in cells:
        padded = [c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric, strict=True)]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(([caption] if caption else []) + lines)


def table_html(rows, header, caption: str = "") -> str:
    """The table as HTML whose colours come from the page, so that it reads well on light and on dark."""
    numeric = numeric_columns(rows, header)
    line = "border-bottom:1px solid rgba(128,128,128,{})"

    def row_html(tag, values, opacity):
        style = f"padding:.25em .9em;background:none;white-space:pre-line;{line.format(opacity)};text-align:"
        sides = ["right;font-variant-numeric:tabular-nums" if right else "left" for right in numeric]
        cells = zip(values, sides, strict=True)
        return "<tr>" + "".join(f'<{tag} style="{style}{side}">{html.escape(v)}</{tag}>' for v, side in cells) + "</tr>"

    body = "".join(row_html("td", [table_cell(value) for value in row], 0.25) for row in rows)
    title = f'<caption style="text-align:left;padding:.3em .9em;color:inherit">{html.escape(caption)}</caption>'
    head = row_html("th", [str(name) for name in header], 0.7)
    return f'<table style="border-collapse:collapse;margin:.5em 0">{title if caption else ""}{head}{body}</table>'


def show_table(rows, header, caption: str = "") -> None:
    """A table: HTML in a notebook, aligned text on rank 0 of a script. rows: sequences as long as `header`."""
    if in_notebook():
        show_html(table_html(rows, header, caption))
    else:
        print0(table_text(rows, header, caption))


# %% [markdown]
# ### `tokens_html`
# What the model reads. Each tint is one token; spaces, tabs and line breaks are drawn, because to a tokenizer they are
# characters like any other. Hover over a token to see its id. Bytes that are not a whole character show as `\xf0`.
#
# The tints are translucent and the letters keep the page's own colour, so it reads on light and on dark.


# %%
def token_display_text(tokenizer, token_id: int) -> str:
    """The token with its whitespace made visible and its incomplete UTF-8 bytes escaped."""
    if hasattr(tokenizer, "decode_single_token_bytes"):
        text = tokenizer.decode_single_token_bytes(token_id).decode("utf-8", errors="backslashreplace")
    else:
        text = tokenizer.decode([token_id])
    return text.replace(" ", "·").replace("\t", "⇥").replace("\r", "␍").replace("\n", "↵\n")


def tinted_tokens(tokenizer, ids: list[int], tints: list[str], caption: str) -> str:
    """Tokens side by side as HTML, each on its "red,green,blue"."""
    spans = []
    for token_id, tint in zip(ids, tints, strict=True):
        shown = html.escape(token_display_text(tokenizer, token_id))
        style = f"background:rgba({tint},.32);border-radius:3px;padding:1px 0"
        spans.append("<wbr>" if shown.startswith("·") else "")  # with its spaces drawn, a line has no place to break
        spans.append(f'<span title="{token_id}" style="{style}">{shown}</span>')
    return (
        '<div style="font-family:monospace;font-size:14px;line-height:1.9;white-space:pre-wrap;'
        'overflow-wrap:anywhere;color:inherit">'
        f"{''.join(spans)}</div>"
        f'<div style="font-size:12px;opacity:.7;color:inherit">{caption}</div>'
    )


def tokens_html(tokenizer, text: str) -> str:
    """`text` cut into tokens, as HTML."""
    tints = ("0,114,178", "230,159,0", "0,158,115", "204,121,167")
    ids, n_bytes = tokenizer.encode(text), len(text.encode("utf-8"))
    ratio = f", {n_bytes / len(ids):.2f} bytes each" if ids else ""
    colors = [tints[i % len(tints)] for i in range(len(ids))]
    return tinted_tokens(tokenizer, ids, colors, f"{len(ids)} tokens, {n_bytes} bytes{ratio}")


def conversation_html(tokenizer, ids: list[int], mask: list[int]) -> str:
    """A rendered conversation as HTML: green is what the model learns to say (mask 1), grey what it only reads."""
    caption = f"{len(ids)} tokens, {sum(mask)} of them (green) are learned"
    return tinted_tokens(tokenizer, ids, ["0,158,115" if one else "140,140,140" for one in mask], caption)


# %% [markdown]
# ### `plot_packing`
# Every row starts with a document and is full to the last token. The price is that some documents are cut: the hatched
# ones lose whatever did not fit.


# %%
def frame_token_rows(axes, n_rows: int, row_length: int) -> None:
    """Axes for rows of tokens: the first row on top, no frame but a scale of tokens."""
    axes.set_xlim(0, row_length)
    axes.set_ylim(n_rows - 0.5, -0.5)
    axes.set_yticks(range(n_rows))
    axes.set_xlabel("token of the row")
    axes.set_ylabel("row")
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


@rc_context(PLOT_STYLE)
def plot_packing(rows) -> Figure:
    """How documents fill rows of tokens.

    rows: for each row the list of its (doc_id, length, cropped), as `pack_rows_preview` returns it; length in tokens.
    """
    colors = ("#A9CDE8", "#F6D79A", "#A6DCCB", "#EBC6DA")
    row_length = max(sum(length for _, length, _ in row) for row in rows)
    figure = Figure(figsize=(8, 0.9 + 0.34 * len(rows)))
    axes = figure.subplots()
    drawn = 0
    for y, row in enumerate(rows):
        x = 0
        for _, length, cropped in row:
            hatch = {"hatch": "////", "edgecolor": "white"} if cropped else {}
            axes.barh(y, length, left=x, height=0.8, color=colors[drawn % len(colors)], linewidth=0, **hatch)
            axes.plot([x, x], [y - 0.4, y + 0.4], color=PLOT_INK, linewidth=1.2, solid_capstyle="butt", clip_on=False)
            if length >= 0.05 * row_length:
                axes.text(x + length / 2, y, f"{length:,}", ha="center", va="center", fontsize=8)
            x, drawn = x + length, drawn + 1
    n_cropped = sum(cropped for row in rows for _, _, cropped in row)
    axes.set_title(f"{drawn} documents in {len(rows)} rows of {row_length:,} tokens, {n_cropped} of them cut")
    frame_token_rows(axes, len(rows), row_length)
    whole, cut = Patch(facecolor=colors[0], label="whole"), Patch(facecolor=colors[0], hatch="////", label="cut")
    cut.set_edgecolor("white")
    axes.legend(handles=[whole, cut], loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2)
    return figure


# %% [markdown]
# ### `plot_conversations`
# The same for conversations. They are never cut, so rows end in padding; and only a part of each is learned.


# %%
@rc_context(PLOT_STYLE)
def plot_conversations(rows) -> Figure:
    """How conversations fill rows of tokens, and which share of each is learned.

    rows: (segments, padding) as `preview_sft_rows` returns them; a segment is (conversation, tokens, learned tokens).
    """
    row_length = sum(tokens for _, tokens, _ in rows[0][0]) + rows[0][1]
    figure = Figure(figsize=(8, 0.9 + 0.34 * len(rows)))
    axes = figure.subplots()
    for y, (segments, padding) in enumerate(rows):
        x = 0
        for _, tokens, learned in segments:
            axes.barh(y, tokens, left=x, height=0.8, color="#E0E0E0", edgecolor=PLOT_INK, linewidth=0.8)
            axes.barh(y, learned, left=x + tokens - learned, height=0.8, color="#A6DCCB", linewidth=0)
            x += tokens
        axes.barh(y, padding, left=x, height=0.8, color="white", edgecolor=PLOT_LINE, hatch="////", linewidth=0)
    tokens, learned = (sum(segment[i] for segments, _ in rows for segment in segments) for i in (1, 2))
    n, total = sum(len(segments) for segments, _ in rows), len(rows) * row_length
    axes.set_title(
        f"{n} conversations in {len(rows)} rows: {learned / total:.0%} learned, {(tokens - learned) / total:.0%} read, "
        f"{1 - tokens / total:.0%} padding"
    )
    frame_token_rows(axes, len(rows), row_length)
    return figure


# %% [markdown]
# ### `plot_windows`
# Each square is the attention mask of one layer: rows are queries, columns are keys, coloured where a query may look.
# Narrow bands are cheap; the few full triangles carry information across the whole context.


# %%
@rc_context(PLOT_STYLE)
def plot_windows(window_sizes, sequence_len: int) -> Figure:
    """The attention mask of every layer.

    window_sizes: for each layer (left, right). A query at i sees the keys from i - left to i; negative left, all of
    them. Spec section 1.3.
    """
    n_columns = min(len(window_sizes), 6 if len(window_sizes) <= 12 else 8)
    n_lines = math.ceil(len(window_sizes) / n_columns)
    figure = Figure(figsize=(max(1.05 * n_columns, 4.2), 1.38 * n_lines + 0.2), layout="compressed")
    grid = figure.subplots(n_lines, n_columns, squeeze=False)
    T, seen = sequence_len, 0
    for axes in grid.flat[len(window_sizes) :]:
        axes.set_visible(False)
    for layer, (left, _) in enumerate(window_sizes):
        axes = grid.flat[layer]
        band = min(left, T - 1) if left >= 0 else T - 1
        seen += sum(min(i, band) + 1 for i in range(T))
        corners = [(0, 0), (T, T), (T - 1 - band, T), (0, band + 1)]
        full = band == T - 1
        axes.add_patch(Polygon(corners, facecolor=PLOT_ORANGE if full else PLOT_BLUE, linewidth=0))
        axes.set_title(f"layer {layer}", fontsize=9, fontweight="normal", pad=3)
        axes.set_xlabel(f"all {T:,}" if full else f"last {left + 1:,}", fontsize=9, labelpad=2)
        axes.set(xlim=(0, T), ylim=(T, 0), xticks=[], yticks=[], aspect="equal", facecolor="#F3F3F3")
        for spine in axes.spines.values():
            spine.set_visible(False)
    share = seen / (len(window_sizes) * T * (T + 1) / 2)
    figure.suptitle(f"{share:.0%} of the work of full attention", x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


# %% [markdown]
# ### `plot_schedules`
# Three numbers change while the model trains. Seeing them side by side explains most bends of a loss curve.


# %%
@rc_context(PLOT_STYLE)
def plot_schedules(iterations: int, lr_multiplier, momentum, weight_decay) -> Figure:
    """Learning-rate multiplier, Muon momentum and Muon weight decay; each a callable of the step."""
    stride = max(1, iterations // 1000)
    steps = sorted({*range(0, iterations, stride), iterations})
    panels = [
        ("learning rate", lr_multiplier, PLOT_BLUE, "× initial"),
        ("Muon momentum", momentum, PLOT_GREEN, ""),
        ("Muon weight decay", weight_decay, PLOT_RED, ""),
    ]
    figure = Figure(figsize=(8, 2.3))
    for axes, (name, schedule, color, unit) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        values = [schedule(step) for step in steps]
        axes.plot(steps, values, color=color, clip_on=False)
        if min(values) >= 0 and min(values) < 0.5 * max(values):
            axes.set_ylim(bottom=0)
        axes.set_title(name)
        axes.set_xlim(0, iterations)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.yaxis.set_major_locator(MaxNLocator(5))
    return figure


# %% [markdown]
# ### Model against compressor
# A language model is a compressor: bits per byte is how small it could make the text. So `zlib` and `xz` are honest
# baselines that need no training at all.


# %%
def compressor_bpb(data: bytes) -> dict[str, float]:
    """Bits per byte that two general compressors need for `data`, which must not be empty."""
    packed = {
        "zlib -9": zlib.compress(data, level=9),
        "xz -9e": lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    }
    return {name: 8 * len(small) / len(data) for name, small in packed.items()}


@rc_context(PLOT_STYLE)
def plot_bpb_bars(bits_per_byte: dict[str, float]) -> Figure:
    """Bits per byte by name, from top to bottom in the order given; the last entry stands out."""
    names, values = list(bits_per_byte), list(bits_per_byte.values())
    figure = Figure(figsize=(8, 0.75 + 0.36 * len(names)))
    axes = figure.subplots()
    bars = axes.barh(names, values, height=0.68, color=["#BDBDBD"] * (len(names) - 1) + [PLOT_BLUE])
    axes.bar_label(bars, [f"{value:.3f}" for value in values], padding=5, fontsize=10)
    axes.get_yticklabels()[-1].set_fontweight("bold")
    axes.set_title("bits per byte of validation text (less is better)")
    axes.set_xlim(0, 1.12 * max(values))
    axes.invert_yaxis()
    axes.grid(False)
    axes.spines[["bottom", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=10)
    axes.set_xticks([])
    return figure


# %% [markdown]
# ### `plot_marks`
# An exam without a line for guessing is an exam that one cannot read.


# %%
@rc_context(PLOT_STYLE)
def plot_marks(tasks: list[str], chance: list[float], marks: dict[str, list[float | None]]) -> Figure:
    """Accuracy (0 to 1) of each task as bars, one for each candidate, with a mark where guessing would be.

    marks: candidate -> one value for each task, None where it did not sit the exam; the last candidate stands out.
    """
    figure = Figure(figsize=(8, 1.1 + 0.3 * len(tasks) * (0.4 + len(marks))))
    axes = figure.subplots()
    height = 0.8 / len(marks)
    colors = [*("#BDBDBD", PLOT_SKY, "#D9D9D9")[: len(marks) - 1], PLOT_BLUE]
    for i, (candidate, values) in enumerate(marks.items()):
        middles = [y - 0.4 + (i + 0.5) * height for y in range(len(tasks))]
        widths = [value or 0.0 for value in values]
        bars = axes.barh(middles, widths, height=0.9 * height, color=colors[i], label=candidate)
        labels = ["" if value is None else f"{value:.1%}" for value in values]
        for label in axes.bar_label(bars, labels, padding=4, fontsize=9, zorder=4):  # above the line for guessing
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8})
    for y, guess in enumerate(chance):
        label = "guessing" if y == 0 else None
        axes.plot([guess, guess], [y - 0.45, y + 0.45], color=PLOT_RED, linewidth=1.4, label=label)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_xlim(0, 1.08)
    axes.set_ylim(len(tasks) - 0.45, -0.55)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=10)
    axes.set_title("share of problems solved", pad=22)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(marks) + 1, borderaxespad=0.2)
    return figure


# %% [markdown]
# ### `training_log_line`
# The line that the original prints for every step. Records are dataclasses here and may be plain dicts elsewhere.


# %%
def record_field(record, name: str, default=None):
    """`record.name` or `record["name"]`; `default` when it is missing."""
    return record.get(name, default) if isinstance(record, dict) else getattr(record, name, default)


def training_log_line(record, total_steps: int) -> str:
    """One line for one optimizer step, in the shape of spec section 14.4; what the record does not know is left out."""
    loss, smooth_loss = record_field(record, "loss"), record_field(record, "smooth_loss")
    fields = [
        ("loss: {:.6f}", loss if smooth_loss is None else smooth_loss, 1),
        ("lrm: {:.2f}", record_field(record, "lr_multiplier"), 1),
        ("dt: {:.2f}ms", record_field(record, "seconds"), 1000),
        ("tok/sec: {:,.0f}", record_field(record, "tokens_per_second"), 1),
        ("mfu: {:.2f}", record_field(record, "mfu"), 100),
        ("epoch: {}", record_field(record, "epoch"), 1),
        ("total time: {:.2f}m", record_field(record, "total_seconds"), 1 / 60),
        ("eta: {:.1f}m", record_field(record, "eta_seconds"), 1 / 60),
    ]
    shown = [template.format(value * factor) for template, value, factor in fields if value is not None]
    step, progress = record_field(record, "step"), record_field(record, "progress")
    done = step / total_steps if progress is None else progress  # of one pass the number of steps is an estimate
    return " | ".join([f"step {step:05d}/{total_steps:05d} ({100 * done:.2f}%)", *shown])


# %% [markdown]
# ### `draw_throughput`
# A flat line is a healthy run. The first steps are slow (compiling, warming caches), so the median is the number to
# quote.


# %%
def draw_throughput(axes, steps: list, speeds: list) -> None:
    """Tokens per second over steps, with the median as a dashed line and in the title."""
    axes.plot(steps, speeds, color=PLOT_GREEN, linewidth=1.2, marker="." if len(speeds) == 1 else None)
    if speeds:
        median = sorted(speeds)[len(speeds) // 2]
        axes.axhline(median, color=PLOT_INK, linewidth=0.8, linestyle=(0, (4, 3)))
        # A step after a pause can look absurdly fast or slow; the median decides what fits on the page.
        axes.set_ylim(0, min(1.15 * max(speeds), 2 * median))
        axes.set_title(f"tokens per second (median {median:,.0f})")
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}")


# %% [markdown]
# ### `LiveChart`
# Watching the loss fall is half of the fun, and the fastest way to see that something is wrong. In a notebook one
# picture is replaced in place; a script prints the classic log line. Training waits while the chart is drawn, so the
# chart measures what a drawing costs and spends at most two percent of the time on it.
#
# `D12_REFERENCE` are points that the original published for its depth-12 model (on an A100, with FlashAttention 2).
# A run with the same settings should pass close to them.

# %%
D12_REFERENCE = {
    "name": "the original d12",
    "loss": {
        0: 10.397, 1: 10.650, 2: 10.493, 3: 10.320, 4: 9.912, 5: 9.567, 6: 9.208,
        748: 3.3147, 749: 3.3130, 750: 3.3187, 751: 3.3218, 1700: 3.010,
    },
    "val_bpb": {0: 3.175621, 750: 1.013885, 1785: 0.920155},
}  # fmt: skip


class LiveChart:
    """Loss, validation bits per byte and throughput of a run while it trains.

    `add(record)` after every step, `finish()` at the end. A record has, as attributes or keys, step and loss, and where
    known smooth_loss, val_bpb (None unless evaluated), tokens_per_second, eta_seconds and the rest of the log line.
    reference: dict with `name`, `loss` and `val_bpb` (each step -> value) to draw beside the run, see `D12_REFERENCE`.
    every_seconds: the shortest time between two drawings. prints: False when somebody else prints the lines.
    """

    def __init__(
        self, total_steps: int, title: str, reference: dict | None = None, every_seconds: float = 2.0, prints=True
    ):
        self.total_steps, self.title, self.reference = total_steps, title, reference
        self.every_seconds, self.prints = every_seconds, prints
        self.losses, self.smooth, self.val_bpb, self.speeds = {}, {}, {}, {}  # step -> value
        self.eta_seconds = None
        self.ema, self.n_averaged = 0.0, 0
        self.next_drawing = 0.0
        self.display_handle = None

    def add(self, record) -> None:
        """Take in one step; redraw when it is time (notebook) or print its line (script)."""
        step, val_bpb = record_field(record, "step"), record_field(record, "val_bpb")
        loss, speed = record_field(record, "loss"), record_field(record, "tokens_per_second")
        self.eta_seconds = record_field(record, "eta_seconds")
        if val_bpb is not None:
            self.val_bpb[step] = val_bpb
        if speed:
            self.speeds[step] = speed
        if loss is not None:
            self.losses[step] = loss
            self.ema, self.n_averaged = 0.9 * self.ema + 0.1 * loss, self.n_averaged + 1
            smooth = record_field(record, "smooth_loss")
            self.smooth[step] = self.ema / (1 - 0.9**self.n_averaged) if smooth is None else smooth
        if in_notebook():
            if time.monotonic() >= self.next_drawing:
                self.redraw()
            return
        if not self.prints or record_field(record, "replayed"):  # an earlier process printed it
            return
        if val_bpb is not None:
            print0(f"Step {step:05d} | Validation bpb: {val_bpb:.6f}")
        if loss is not None:
            print0(training_log_line(record, self.total_steps))

    def redraw(self, final: bool = False) -> None:
        """Replace the displayed picture. The `final` one is sharper, and saved."""
        if get_dist_info()[1] != 0:
            return
        started = time.monotonic()
        figure = self.figure(final)
        if final:
            png = figure_png(figure)
            write_atomic(f"{get_base_dir()}/report/{self.file_name()}.png", png)
        else:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=100)
            png = buffer.getvalue()
        if in_notebook():
            from IPython.display import display

            if self.display_handle is None:
                self.display_handle = display(notebook_image(png, figure), display_id=True)
            else:
                self.display_handle.update(notebook_image(png, figure))
        ended = time.monotonic()
        self.next_drawing = ended + max(self.every_seconds, 50 * (ended - started))

    def file_name(self) -> str:
        """The title as a file name."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())

    def finish(self) -> None:
        """Show the last state and save it as `<base>/report/<title-in-lower-case>.png`."""
        self.redraw(final=True)

    @rc_context(PLOT_STYLE)
    def figure(self, final: bool = True) -> Figure:
        """The chart as it stands now."""
        figure = Figure(figsize=(9, 3.7), layout="none")  # fixed margins: fitting them doubles the time of a drawing
        margins = {"left": 0.05, "right": 0.985, "top": 0.835, "bottom": 0.13}
        halves = figure.add_gridspec(1, 2, **margins, width_ratios=(1.25, 1), wspace=0.14)
        right = halves[1].subgridspec(2, 1, height_ratios=(2, 1), hspace=0.4)
        loss_axes, bpb_axes, speed_axes = (figure.add_subplot(place) for place in (halves[0], right[0], right[1]))
        self.draw_curve(loss_axes, "training loss", "loss", self.smooth, faint=self.losses)
        self.draw_curve(bpb_axes, "validation bits per byte", "val_bpb", self.val_bpb, marker="o", markersize=4)
        draw_throughput(speed_axes, list(self.speeds), list(self.speeds.values()))
        for axes in (loss_axes, bpb_axes, speed_axes):
            axes.set_title(axes.get_title(loc="left"), fontsize=10, fontweight="normal")
            axes.set_xlim(-0.015 * self.total_steps, 1.015 * self.total_steps)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        bpb_axes.tick_params(labelbottom=False)
        loss_axes.set_xlabel("step")
        speed_axes.set_xlabel("step")
        figure.suptitle(self.headline(final), x=0.012, y=0.975, ha="left", fontsize=11, fontweight="bold")
        return figure

    def headline(self, final: bool) -> str:
        """Title, progress and, while it runs, the time left."""
        step = max([*self.losses, *self.val_bpb], default=0)
        words = f"{self.title}: step {step:,} of {self.total_steps:,}"
        if self.eta_seconds and not final:
            minutes, seconds = divmod(round(self.eta_seconds), 60)
            words += f", {minutes} min {seconds:02d} s to go" if minutes < 60 else f", {minutes / 60:.1f} h to go"
        return words

    def draw_curve(self, axes, title: str, key: str, curve: dict, faint: dict | None = None, **style) -> None:
        """One quantity over steps, with its reference points."""
        if faint:
            axes.plot(list(faint), list(faint.values()), color=PLOT_SKY, linewidth=0.8, alpha=0.6)
        dot = {"marker": "."} if len(curve) == 1 else {}  # a line needs two points to be seen
        axes.plot(list(curve), list(curve.values()), color=PLOT_BLUE, **dot | style)
        points = (self.reference or {}).get(key, {})
        if points:
            circles = {"s": 26, "facecolor": "none", "edgecolor": PLOT_RED, "zorder": 3, "clip_on": False}
            axes.scatter(list(points), list(points.values()), label=self.reference["name"], **circles)
            axes.legend(loc="upper right", handletextpad=0.2, borderaxespad=0)
        axes.set_title(f"{title}: {list(curve.values())[-1]:.3f}" if curve else title)
        values = [value for value in [*curve.values(), *(faint or {}).values(), *points.values()] if value > 0]
        if not values or not math.isfinite(sum(values)):
            return
        # Logarithmic, because on a linear axis the plunge of the first steps would flatten all that follows.
        axes.set_yscale("log")
        axes.set_ylim(min(values) / 1.08, max(values) * 1.08)
        ticks = FixedLocator([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16, 20])
        axes.yaxis.set_major_locator(ticks if max(values) > 1.8 * min(values) else MaxNLocator(5))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
