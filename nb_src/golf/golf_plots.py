# %% [markdown]
# ## Golf pictures
#
# Where the bytes go, what each ingredient is worth, and in which order targets are scored and learned from: the
# arguments of the two golf notebooks, as pictures. They share the style of all pictures here; what is worth reading
# stands beside what it belongs to, and labels move aside for each other.

# %%
import math
import textwrap

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from golf.golf_gpt import role_of
from golf.golf_settings import ARTIFACT_LIMIT_BYTES
from nanochat.plots import PLOT_BLUE, PLOT_GREEN, PLOT_INK, PLOT_LINE, PLOT_ORANGE, PLOT_RED, PLOT_SKY, PLOT_STYLE

# %% [markdown]
# ### The published run
# Validation points for the live chart, from the logs of the record "Training Opt Seq4096 v1" in openai/parameter-golf.
# It has three seeds, none with all points. Where seed 1337 has none, the point is of seed 1339, whose steps took nearly
# as long, so that its learning rate began to fall at about the same step.


# %%
def golf_reference(name: str, nats: dict[int, float], bytes_per_token: float) -> dict:
    """A reference for `LiveChart` out of validation losses: step → nats per token. Golf spec section 3.2."""
    return {
        "name": name,
        "loss": {},
        "val_bpb": {step: loss / (math.log(2) * bytes_per_token) for step, loss in nats.items()},
    }


RECORD_A_REFERENCE = golf_reference(
    "the record",
    {
        0: 6.936, 1000: 2.3036, 2000: 2.2111, 3000: 2.1566, 4000: 2.1202, 5000: 2.1047, 6000: 2.0783, 7000: 2.0582,
        8000: 2.0286, 8394: 2.0227,
    },
    bytes_per_token=2.43593,
)  # fmt: skip

# %% [markdown]
# ### `plot_golf_schedule`
# The learning rate follows the clock, so it can only be drawn after the fact: over steps, it bends where the machine
# was slower than before; over time, it is a straight line to zero.


# %%
@rc_context(PLOT_STYLE)
def plot_golf_schedule(points) -> Figure:
    """What a run did. points: (step, train_ms, learning-rate multiplier, Muon momentum) of each GolfRecord."""
    steps, train_ms, multipliers, momenta = zip(*points, strict=True)
    panels = [
        ("learning rate, by step", steps, multipliers, PLOT_BLUE, "step"),
        ("learning rate, by the clock", [ms / 1000 for ms in train_ms], multipliers, PLOT_BLUE, "seconds of training"),
        ("Muon momentum", steps, momenta, PLOT_GREEN, "step"),
    ]
    figure = Figure(figsize=(8, 2.3))
    for axes, (name, x, y, color, unit) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        axes.plot(x, y, color=color, clip_on=False, marker="." if len(x) == 1 else None)
        if color == PLOT_BLUE:
            axes.set_ylim(0, 1.05)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(unit)
        axes.set_xlim(0, max(x) or 1)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.5g}"))
        axes.yaxis.set_major_locator(MaxNLocator(5))
    figure.axes[0].set_ylabel("× base")
    return figure


# %% [markdown]
# ### `plot_sizes`
# One bar is the whole file and the red line is the limit. Labels that would overlap are moved apart and
# keep a line to their part.


# %%
def short_role(name: str) -> str:
    """A parameter's role in few letters: blocks.3.mlp.fc.weight → mlp.fc"""
    return role_of(name).removeprefix("blocks.*.").removesuffix(".weight")


def spread_apart(places: list[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending places, moved as little as needed to lie `gap` apart within low..high (which must have the room)."""
    spread = []
    for i, place in enumerate(places):
        spread.append(max(place, spread[-1] + gap if i else low))
    for i in reversed(range(len(spread))):
        spread[i] = min(spread[i], spread[i + 1] - gap if i + 1 < len(spread) else high)
    return spread


def size_parts(rows: list[dict], code_bytes: int, shown: int = 7) -> list[tuple[str, float, int]]:
    """(label, bytes, bits) of the code, the largest roles and the sum of all others. bits is 0 for what has none."""
    rows = sorted(rows, key=lambda row: -row["bytes"])
    large = [row for row in rows[:shown] if row["bytes"] >= 0.01 * sum(row["bytes"] for row in rows)]
    parts = [("the code", float(code_bytes), 0)] if code_bytes else []
    parts += [(short_role(row["role"]), row["bytes"], row["bits"]) for row in large]
    if rest := rows[len(large) :]:
        parts.append(("all others", sum(row["bytes"] for row in rest), 0))
    return parts


@rc_context(PLOT_STYLE)
def plot_sizes(rows: list[dict], limit_bytes: int = ARTIFACT_LIMIT_BYTES, code_bytes: int = 0) -> Figure:
    """The file as one bar against its limit. rows: `artifact_size_rows`. code_bytes: of the script counted with it."""
    parts = size_parts(rows, code_bytes)
    total = sum(n_bytes for _, n_bytes, _ in parts)
    width = 1.02 * max(total, limit_bytes)
    figure = Figure(figsize=(8, 1.75), layout="none")
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.82))
    colors = (PLOT_BLUE, PLOT_SKY, PLOT_ORANGE, PLOT_GREEN, "#CC79A7", "#F0E442", "#8DA0CB", "#BDBDBD", "#7F7F7F")
    lefts = [sum(n_bytes for _, n_bytes, _ in parts[:i]) for i in range(len(parts))]
    middles = [left + n_bytes / 2 for left, (_, n_bytes, _) in zip(lefts, parts, strict=True)]
    labels_at = spread_apart(middles, 0.108 * width, 0.054 * width, 0.946 * width)
    for (label, n_bytes, bits), left, middle, at, color in zip(
        parts, lefts, middles, labels_at, colors[: len(parts)], strict=True
    ):
        axes.barh(0, n_bytes, left=left, height=1, color=color, edgecolor="white", linewidth=0.5)
        axes.plot([middle, middle, at], [-0.5, -0.62, -0.95], color=PLOT_LINE, linewidth=0.8)
        axes.plot([at], [-1], "s", color=color, markersize=6)
        words = [label, f"{n_bytes:,.0f}", f"{n_bytes / total:.1%}" + (f" · {bits} bit" if bits else "")]
        axes.text(at, -1.15, "\n".join(words), ha="center", va="top", fontsize=8)
    axes.plot([limit_bytes] * 2, [-0.6, 0.7], color=PLOT_RED, linewidth=1.8, solid_capstyle="butt")
    side = "right" if limit_bytes > width / 2 else "left"
    axes.text(limit_bytes, 0.75, f"limit {limit_bytes:,}", ha=side, va="bottom", fontsize=9, color=PLOT_RED)
    axes.set(xlim=(0, width), ylim=(-2.2, 1.2))
    axes.axis("off")
    left_over = limit_bytes - total
    verdict = f"{left_over:,.0f} free" if left_over >= 0 else f"{-left_over:,.0f} TOO MANY"
    figure.suptitle(f"{total:,.0f} bytes, {verdict}", x=0.01, y=0.96, ha="left", fontsize=11, fontweight="bold")
    return figure


# %% [markdown]
# ### `plot_quantization`
# One line for each matrix, from the error of plain rounding to that of GPTQ, the matrices of a role side by side.


# %%
@rc_context(PLOT_STYLE)
def plot_quantization(table: list[dict]) -> Figure:
    """Output errors of both roundings on a logarithmic scale. table: of `quantize_state`."""
    roles = {}
    for row in table:
        roles.setdefault(short_role(row["name"]), []).append((row["nearest"], row["gptq"]))
    pitch = 0.13 if len(table) <= 30 else 0.09  # inches for a matrix
    positive = [error for row in table for error in (row["nearest"], row["gptq"]) if error > 0]
    floor = min(positive, default=1e-9) / 1.5  # an error of exactly zero is drawn at the edge
    figure = Figure(figsize=(8, 0.95 + pitch * len(table) + 0.16 * len(roles)))
    axes = figure.subplots()
    y, middles, gains = 0.0, [], []
    for pairs in roles.values():
        places = [y + i * pitch for i in range(len(pairs))]
        nearest, gptq = ([max(error, floor) for error in errors] for errors in zip(*pairs, strict=True))
        axes.hlines(places, gptq, nearest, color=PLOT_LINE, linewidth=1)
        hollow = {"facecolor": "white", "edgecolor": PLOT_RED, "linewidth": 1.3}
        style = {"s": 22, "zorder": 3, "clip_on": False}
        axes.scatter(nearest, places, label=None if middles else "to nearest", **style, **hollow)
        axes.scatter(gptq, places, label=None if middles else "GPTQ", color=PLOT_BLUE, **style)
        before, after = (sum(errors) for errors in zip(*pairs, strict=True))
        gains.append(f"{after / before - 1:+.0%}".replace("-", "−") if before else "")
        middles.append((places[0] + places[-1]) / 2)
        y = places[-1] + pitch + 0.16
    bottom, top = y - 0.16 - pitch / 2 + 0.06, -pitch / 2 - 0.06
    axes.set_xscale("log")
    axes.set(xlim=(floor, 1.5 * max(positive, default=1e-8)), ylim=(bottom, top))
    axes.set_yticks(middles, list(roles))
    axes.xaxis.set_minor_formatter("")
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0, pad=8)
    axes.set_xlabel("squared error of the output, relative to the squared output")
    gain_axes = axes.secondary_yaxis("right")
    gain_axes.set_yticks(middles, gains)
    gain_axes.tick_params(length=0, labelcolor=PLOT_BLUE)
    gain_axes.spines["right"].set_visible(False)
    axes.set_title("what rounding costs")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2, handletextpad=0.2)
    return figure


# %% [markdown]
# ### `plot_scores`
# From the plain model to the number that is handed in, step by step: what each step gains and what it costs.


# %%
def seconds_text(seconds: float | None) -> str:
    """Two digits at least, and the unit."""
    if seconds is None:
        return ""
    digits = 0 if seconds >= 9.95 else 1 if seconds >= 0.95 else 3
    return f"{seconds:,.{digits}f} s"


@rc_context(PLOT_STYLE)
def plot_scores(rows) -> Figure:
    """A ladder of scores. rows: (label, bits per byte, seconds or None) in order, each compared with the one before."""
    height = 0.85 + 0.36 * len(rows)
    figure = Figure(figsize=(8, height), layout="none")  # fixed columns, whatever the labels and numbers are
    bottom, top = 0.32 / height, 1 - 0.53 / height
    axes, columns = (figure.add_axes((x, bottom, width, top - bottom)) for x, width in ((0.27, 0.4), (0.7, 0.29)))
    finite = [bpb for _, bpb, _ in rows if math.isfinite(bpb)]
    low, high = min(finite, default=0), max(finite, default=1)
    margin = 0.06 * (high - low) or 0.01
    before, above = None, 0  # the last score that is a number, and its row
    for y, (_, bpb, seconds) in enumerate(rows):
        if not math.isfinite(bpb):
            texts, color = (str(bpb), "", seconds_text(seconds)), PLOT_RED
        else:
            change = "" if before is None else f"{bpb - before:+.4f}".replace("-", "−")
            color = PLOT_INK if before in (None, bpb) else PLOT_GREEN if bpb < before else PLOT_RED
            if before is not None:
                axes.plot([before, before], [above, y], color=PLOT_LINE, linewidth=0.8)
                axes.barh(y, bpb - before, left=before, height=0.4, color=color, alpha=0.45, linewidth=0)
            axes.plot([bpb], [y], "o", color=color, markersize=6, clip_on=False, zorder=3)
            texts = (f"{bpb:.4f}", change, seconds_text(seconds))
            before, above = bpb, y
        for x, text, text_color in zip((0.3, 0.65, 1), texts, (PLOT_INK, color, PLOT_INK), strict=True):
            columns.text(x, y, text, ha="right", va="center", color=text_color)
    for x, text in ((0.3, "bits/byte"), (0.65, "change"), (1, "cost")):
        columns.text(x, -0.7, text, ha="right", va="center", fontsize=9, fontweight="bold")
    for each in (axes, columns):
        each.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(low - margin, high + margin)
    axes.set_yticks(range(len(rows)), [textwrap.fill(label, 27, max_lines=2) for label, _, _ in rows])
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    columns.set_xlim(0, 1)
    columns.axis("off")
    figure.suptitle(
        "bits per byte, step by step (less is better)", x=0.01, y=1 - 0.09 / height, ha="left", fontsize=11,
        fontweight="bold",
    )  # fmt: skip
    return figure


# %% [markdown]
# ### `plot_depths`
# The same weights, run more often or less often than in training. Hollow points are depths that no training step has
# ever seen.


# %%
@rc_context(PLOT_STYLE)
def plot_depths(rows) -> Figure:
    """Loss over the number of rounds. rows: (depth, nats per token, whether that depth was trained), by depth."""
    figure = Figure(figsize=(8, 3.2))
    axes = figure.subplots()
    shown = [row for row in rows if math.isfinite(row[1])]
    axes.plot([depth for depth, _, _ in shown], [loss for _, loss, _ in shown], color=PLOT_LINE, linewidth=1.2)
    labelled, room = [], math.ceil(len(shown) / 16)  # depths that a label takes up
    for depth, loss, trained in sorted(shown, key=lambda row: (not row[2], row[1])):
        axes.plot(
            [depth], [loss], "o", color=PLOT_BLUE, markerfacecolor=PLOT_BLUE if trained else "white", markersize=7,
            clip_on=False, zorder=4,
        )  # fmt: skip
        if all(abs(depth - other) >= room for other in labelled):
            labelled.append(depth)
            label = axes.annotate(f"{loss:.3f}", (depth, loss), (0, 7), textcoords="offset points", ha="center")
            label.set(fontsize=8, fontweight="bold" if trained else "normal", zorder=3)
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8})
    for face, name in ((PLOT_BLUE, "trained depth"), ("white", "untrained depth")):
        axes.plot([], [], "o", color=PLOT_BLUE, markerfacecolor=face, markersize=7, label=name)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2, handletextpad=0.2)
    axes.margins(x=0.04, y=0.14)
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    axes.set_xlabel("rounds")
    axes.set_title("nats per token, by depth")
    return figure


# %% [markdown]
# ### `plot_score_order`
# The rule of the challenge in one picture; time runs downwards. What a window scores (blue) is final. Training may
# use it from the next line on, and never anything to the right of it.


# %%
@rc_context(PLOT_STYLE)
def plot_score_order(windows, updates) -> Figure:
    """In which order a small stream is scored and learned from; an update that comes too early is red.

    windows: (start, first, end) as of `scoring_windows`, in order. updates: (scored, start, end): after `scored`
    windows the model is trained on the targets start..end − 1.
    """
    events = []
    for i in range(len(windows) + 1):
        events += [(False, start, start, end) for scored, start, end in updates if scored == i]
        events += [(True, *window) for window in windows[i : i + 1]]
    figure = Figure(figsize=(8, 1.0 + 0.26 * len(events)))
    axes = figure.subplots()
    seen, names = 0, []
    for y, (is_window, start, first, end) in enumerate(events):
        if is_window:
            axes.barh(y, first - start, left=start, height=0.72, color="#DCDCDC", linewidth=0)
            axes.barh(y, end - first, left=first, height=0.72, color=PLOT_BLUE, linewidth=0)
            seen = max(seen, end)
            names.append("score")
        else:
            names.append("train" if end <= seen else "train too early")
            color = PLOT_ORANGE if end <= seen else PLOT_RED
            axes.barh(y, end - start, left=start, height=0.3, color=color, linewidth=0)
    axes.set_xlim(0, max(event[3] for event in events))
    axes.set_ylim(len(events) - 0.4, -0.6)
    axes.set_yticks(range(len(events)), names)
    axes.set_xlabel("target")
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    early = "train too early" in names
    axes.set_title("some learned from too early" if early else "scored first, then learned from")
    colors = {"context": "#DCDCDC", "scored": PLOT_BLUE, "learned from": PLOT_ORANGE}
    handles = [Patch(facecolor=color, label=name) for name, color in colors.items()]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.2)
    return figure
