# %% [markdown]
# ## CORE: the results
#
# A number needs neighbours. The scores of GPT-2 in its four sizes are published, and the run that this notebook
# retraces, 12 layers trained for 77 minutes on one A100, has a score for every task. It stands a little above GPT-2's
# smallest model.

# %%
from collections.abc import Mapping
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from nanochat.plots import PLOT_BLUE, PLOT_LINE, PLOT_ORANGE, PLOT_STYLE
from nanochat.runtime import get_base_dir, get_dist_info, write_atomic

# %% [markdown]
# ### The neighbours
# For GPT-2 only the mean over all 22 tasks is known.

# %%
GPT2_CORE = {"GPT-2 124M": 0.1139, "GPT-2 355M": 0.1849, "GPT-2 774M": 0.2146, "GPT-2 1.6B": 0.256525}
ORIGINAL_D12_CORE = 0.1251
ORIGINAL_D12_CENTERED = {  # one example at a time; spec section 0.4
    "hellaswag_zeroshot": 0.090752,
    "jeopardy": 0.006141,
    "bigbench_qa_wikidata": 0.303774,
    "arc_easy": 0.332772,
    "arc_challenge": 0.010239,
    "copa": 0.2000,
    "commonsense_qa": 0.108313,
    "piqa": 0.243743,
    "openbook_qa": 0.0720,
    "lambada_openai": 0.266641,
    "hellaswag": 0.0943,
    "winograd": 0.1355,
    "winogrande": 0.0371,
    "bigbench_dyck_languages": 0.1110,
    "agi_eval_lsat_ar": 0.0870,
    "bigbench_cs_algorithms": 0.4023,
    "bigbench_operators": 0.1381,
    "bigbench_repeat_copy_logic": 0.0000,
    "squad": 0.0559,
    "coqa": 0.1110,
    "boolq": -0.2345,
    "bigbench_language_identification": 0.1806,
}

# %% [markdown]
# ### `write_core_csv`
# In the columns of the original, so that old and new files can be laid side by side.


# %%
def core_csv(outcome: Mapping) -> str:
    """The results of `evaluate_core` as text. Spec section 13.6."""
    lines = [f"{'Task':<35}, {'Accuracy':<10}, {'Centered':<10}"]
    for label, accuracy in outcome["results"].items():
        lines.append(f"{label:<35}, {accuracy:<10.6f}, {outcome['centered_results'][label]:<10.6f}")
    lines.append(f"{'CORE':<35}, {'':<10}, {outcome['core_metric']:<10.6f}")
    return "\n".join(lines) + "\n"


def write_core_csv(outcome: Mapping, slug: str) -> str:
    """Write `<base>/base_eval/<slug>.csv` on rank 0; returns its path. slug: base_model_001785, or a hub path."""
    path = Path(get_base_dir()) / "base_eval" / f"{slug.replace('/', '-')}.csv"
    if get_dist_info()[1] == 0:
        write_atomic(path, core_csv(outcome))
    return str(path)


# %% [markdown]
# ### `core_table`
# One row for each task, and the mean below.


# %%
def core_table(outcome: Mapping) -> tuple[list[tuple], tuple]:
    """(rows, header) for `show_table`, the mean in the last row; the original's column only if it had these tasks."""
    compared = any(label in ORIGINAL_D12_CENTERED for label in outcome["results"])
    rows = []
    for label, accuracy in outcome["results"].items():
        seconds = f"{outcome['seconds'][label]:.1f}"
        row = (label, outcome["questions"][label], accuracy, outcome["centered_results"][label])
        rows.append((*row, ORIGINAL_D12_CENTERED.get(label), seconds) if compared else (*row, seconds))
    totals = ("CORE", sum(outcome["questions"].values()), None, outcome["core_metric"])
    whole = set(outcome["results"]) == set(ORIGINAL_D12_CENTERED)
    seconds = f"{sum(outcome['seconds'].values()):.1f}"
    rows.append((*totals, ORIGINAL_D12_CORE if whole else None, seconds) if compared else (*totals, seconds))
    header = ("task", "questions", "accuracy", "centered", "original d12", "seconds")
    return rows, header if compared else header[:4] + header[5:]


# %% [markdown]
# ### `plot_core`
# Above, task by task; below, the means. A mean over other tasks than the 22 cannot be held against theirs: then there
# is no below.


# %%
@rc_context(PLOT_STYLE)
def plot_core(outcome: Mapping, name: str = "this model") -> Figure:
    """Centred accuracy of each task beside the original d12 run, and CORE beside it and GPT-2."""
    centered = outcome["centered_results"]
    labels = sorted(centered, key=centered.get, reverse=True)
    means = {**GPT2_CORE, "original d12": ORIGINAL_D12_CORE, name: outcome["core_metric"]}
    means = dict(sorted(means.items(), key=lambda item: item[1]))
    comparable = set(labels) == set(ORIGINAL_D12_CENTERED)
    figure = Figure(figsize=(8, 1.2 + 0.3 * len(labels) + 0.34 * len(means) * comparable))
    if comparable:
        top, bottom = figure.subplots(2, 1, height_ratios=[len(labels) + 1, 1.1 * len(means)])
    else:
        top = figure.subplots()

    bars = top.barh(labels, [centered[label] for label in labels], height=0.62, color=PLOT_BLUE, label=name)
    top.bar_label(bars, [f"{centered[label]:.3f}" for label in labels], padding=4, fontsize=8)
    known = [label for label in labels if label in ORIGINAL_D12_CENTERED]
    if known:
        scores = [ORIGINAL_D12_CENTERED[label] for label in known]
        top.scatter(scores, known, marker="|", s=130, linewidth=2.2, color=PLOT_ORANGE, zorder=3, label="original d12")
        top.legend(loc="lower right")
    top.axvline(0, color=PLOT_LINE, linewidth=0.8)
    top.set_title("centred accuracy: 0 is guessing, 1 is perfect")
    top.margins(x=0.12, y=0.02)
    top.invert_yaxis()

    if comparable:
        colors = [PLOT_BLUE if key == name else PLOT_ORANGE if key == "original d12" else "#BDBDBD" for key in means]
        bars = bottom.barh(list(means), list(means.values()), height=0.68, color=colors)
        bottom.bar_label(bars, [f"{value:.4f}" for value in means.values()], padding=5, fontsize=9)
        bottom.set_title("CORE, the mean (GPT-2 is published as a mean only)")
        bottom.margins(x=0.12)
    for axes in figure.axes:
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    return figure
