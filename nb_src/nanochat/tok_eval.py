# %% [markdown]
# ## How good is the tokenizer?
#
# A good tokenizer says the same text in fewer tokens: the model then sees more text in the same window and pays for
# fewer steps. The measure is bytes per token. The yardsticks are raw bytes (1 by definition) and the vocabularies of
# GPT-2 (50,257 entries) and GPT-4 (100,277).
#
# Expect ours to be close where the text resembles what it was trained on, and far behind on Korean, which it hardly
# saw. A vocabulary is a budget, and this shows where it went.

# %%
import threading
import time

import tiktoken

from nanochat.dataset import Corpus, read_row_group

# %% [markdown]
# ### Five kinds of text
# Short, and as different as text gets. News has typographic quotes, Korean needs three bytes for a syllable, code
# lives from its indentation, and science from symbols that are rare everywhere else.

# %%
NEWS_TEXT = """
HARBOUR CITY — The last ferry to the northern islands left on Tuesday evening with eleven passengers, two bicycles
and a crate of seedlings, ending a service that had run without a break since 1931. “We knew it was coming,” said
Marta Lindqvist, who has sold tickets at the pier for 27 years. “Still, you don’t believe it until somebody locks
the door.”

The operator, a company owned by the three island councils, announced in January that it could no longer afford the
repairs its two ships needed. A new hull alone would have cost $14.6 million, roughly four times the yearly income
from fares. Councillors voted 9–4 against a loan. “It wasn’t a question of wanting,” the council’s chair, Peter
Oduya, told reporters. “It was a question of arithmetic.”

From next week a bus will cross the bridge that opened last autumn, six times a day on weekdays and four times on
Sundays. The journey takes 35 minutes instead of 80. Many islanders welcome that: the school on the mainland is
suddenly close, and the clinic even closer. Others worry about what a bridge brings with it. House prices on the
largest island have risen by a fifth since construction began, according to the regional statistics office, and the
baker’s lease wasn’t renewed.

Ms Lindqvist will keep the ticket booth. She has bought it from the company for one krona and plans to sell coffee
there. “People will come to look at the water,” she said. “They always have. They just won’t be in such a hurry
anymore.”
""".strip()

KOREAN_TEXT = """
지난 주말 남쪽 바닷가의 작은 마을에서 오래된 등대를 도서관으로 바꾸는 공사가 끝났다. 1962년에 세워진 이 등대는 십여 년
전부터 불이 꺼져 있었고, 마을 사람들은 건물을 허물지 말고 함께 쓸 수 있는 곳으로 만들자고 뜻을 모았다. 주민 여든세 명이
조금씩 돈을 냈고, 나머지는 군청이 보탰다.

1층에는 어린이를 위한 그림책 방이, 꼭대기에는 바다를 내려다보며 책을 읽을 수 있는 자리가 마련되었다. 개관식에서 이장은
“예전에는 배를 위해 불을 밝혔지만 이제는 사람을 위해 불을 밝힌다”고 말했다. 도서관은 월요일을 제외하고 매일 오전 10시에
문을 연다. 책은 한 번에 다섯 권까지 두 주 동안 빌릴 수 있으며, 돌려주는 날짜를 넘기면 바닷가에서 쓰레기 한 봉지를
주워 오는 것이 벌이라고 한다.
""".strip()

CODE_TEXT = '''
import heapq
from collections import defaultdict


class RoadMap:
    """Towns joined by roads; finds the shortest way between two of them."""

    def __init__(self):
        self.roads = defaultdict(dict)

    def add_road(self, start, end, km, one_way=False):
        if km < 0:
            raise ValueError(f"a road cannot be {km} km long")
        self.roads[start][end] = min(km, self.roads[start].get(end, km))
        if not one_way:
            self.add_road(end, start, km, one_way=True)

    def shortest_path(self, start, goal):
        best = {start: 0.0}
        came_from = {}
        queue = [(0.0, start)]
        while queue:
            distance, town = heapq.heappop(queue)
            if town == goal:
                path = [goal]
                while path[-1] != start:
                    path.append(came_from[path[-1]])
                return distance, path[::-1]
            if distance > best[town]:
                continue  # an older, longer way to the same town
            for neighbour, km in self.roads[town].items():
                candidate = distance + km
                if candidate < best.get(neighbour, float("inf")):
                    best[neighbour] = candidate
                    came_from[neighbour] = town
                    heapq.heappush(queue, (candidate, neighbour))
        return None


roads = RoadMap()
for a, b, km in [("A", "B", 4), ("A", "C", 2), ("C", "B", 1), ("B", "D", 5)]:
    roads.add_road(a, b, km)
print(roads.shortest_path("A", "D"))  # (8.0, ['A', 'C', 'B', 'D'])
'''.strip()

MATH_TEXT = r"""
\begin{theorem}
For every integer $n \ge 1$,
\[
  \sum_{k=1}^{n} k^3 = \left( \frac{n(n+1)}{2} \right)^{2}.
\]
\end{theorem}
\begin{proof}
We use induction on $n$. For $n = 1$ both sides equal $1$. Suppose the identity holds for some $n$. Then
\begin{align*}
  \sum_{k=1}^{n+1} k^3 &= \left( \frac{n(n+1)}{2} \right)^{2} + (n+1)^3 \\
                       &= (n+1)^2 \left( \frac{n^2}{4} + n + 1 \right)
                        = \frac{(n+1)^2 (n+2)^2}{4},
\end{align*}
which is the statement for $n+1$.
\end{proof}

\begin{lemma}
Let $(a_n)_{n \in \mathbb{N}}$ satisfy $a_0 = 0$ and $a_{n+1} = \sqrt{2 + a_n}$. Then $0 \le a_n < 2$ for all $n$, the
sequence is increasing, and $\lim_{n \to \infty} a_n = 2$.
\end{lemma}
\begin{proof}
If $0 \le a_n < 2$ then $a_{n+1}^2 = 2 + a_n < 4$, so $a_{n+1} < 2$. Moreover
$a_{n+1}^2 - a_n^2 = (2 - a_n)(1 + a_n) > 0$, hence $a_{n+1} > a_n$. A bounded increasing sequence converges; its limit
$L$ satisfies $L^2 = L + 2$, that is, $(L-2)(L+1) = 0$. Since $L \ge 0$ we get $L = 2$. \qedhere
\end{proof}
""".strip()

SCIENCE_TEXT = """
In oxygenic photosynthesis the manganese cluster Mn₄CaO₅ of photosystem II passes through five states (S₀ → S₄)
while it takes four electrons from two molecules of water: 2 H₂O → O₂ + 4 H⁺ + 4 e⁻. The resulting proton gradient
(ΔpH ≈ 2.5, or about 150 mV at 25 °C) drives ATP synthase, which releases roughly one ATP for every 4.7 H⁺ in
chloroplasts. Carbon is then fixed by Rubisco, whose modest turnover of 3–10 s⁻¹ and whose confusion of CO₂ with O₂
(a specificity factor of 80–100 in C₃ plants) explain why it makes up as much as half of the soluble protein in a
leaf. Isotope ratios record this choice: δ¹³C is near −27 ‰ in C₃ plants, but near −13 ‰ in C₄ plants, where
phosphoenolpyruvate carboxylase accepts HCO₃⁻ first. Above 10⁻³ mol·m⁻²·s⁻¹ of photons, excess excitation is
quenched as heat in less than 10⁻⁹ s by carotenoids (λₘₐₓ ≈ 505 nm).
""".strip()

# %% [markdown]
# ### `load_baseline_encodings`
# tiktoken downloads its vocabularies and waits for as long as the network lets it. Here it gets a few seconds; what
# has not come by then is missing from the table and from nothing else. `TIKTOKEN_CACHE_DIR` may hold copies.

# %%
BASELINE_ENCODINGS = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}


def load_baseline_encodings(patience_seconds: float = 6.0) -> tuple[dict, dict[str, str]]:
    """(label → tiktoken.Encoding, label → why it is unavailable) of `BASELINE_ENCODINGS`, within `patience_seconds`."""
    loaded: dict[str, tiktoken.Encoding] = {}
    reasons: dict[str, str] = {}

    def load(label: str, encoding_name: str) -> None:
        try:
            loaded[label] = tiktoken.get_encoding(encoding_name)
        except Exception as error:  # whatever the network thinks of: no route, a proxy's web page, a full disk
            reasons[label] = f"{encoding_name} could not be loaded ({type(error).__name__})"

    deadline = time.monotonic() + patience_seconds
    threads = [threading.Thread(target=load, args=item, daemon=True) for item in BASELINE_ENCODINGS.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    available = {label: loaded[label] for label in BASELINE_ENCODINGS if label in loaded}
    too_late = "{} could not be downloaded within {:g} seconds"
    unavailable = {
        label: reasons.get(label, too_late.format(encoding_name, patience_seconds))
        for label, encoding_name in BASELINE_ENCODINGS.items()
        if label not in available
    }
    return available, unavailable


# %% [markdown]
# ### `evaluate_tokenizer`
# To the five texts come the first documents of the training data and of the validation data. A tokenizer that does
# not give back exactly what it was given is broken, and nothing it counts would mean anything.


# %%
def tokenizer_evaluation_texts(corpus: Corpus, source: str) -> dict[str, str]:
    """Name → text: five fixed ones, and the first row groups of the first training file and of the validation file."""
    texts = {"news": NEWS_TEXT, "korean": KOREAN_TEXT, "code": CODE_TEXT, "math": MATH_TEXT, "science": SCIENCE_TEXT}
    for suffix, path in (("train", corpus.train_files[0]), ("val", corpus.val_file)):
        texts[f"{source}-{suffix}"] = "\n".join(read_row_group(path, 0, corpus.text_column))
    return texts


def evaluate_tokenizer(tokenizer, corpus: Corpus, patience_seconds: float = 6.0) -> dict:
    """Tokens of each text under our tokenizer and under the baselines that can be loaded. Spec section 6.

    Returns {"texts": [{"name", "bytes", "tokens": {"ours": n, "GPT-2": n, ...}}], "vocab_sizes": {"ours": V, ...},
    "unavailable": {label: reason}}, JSON-able. Raises AssertionError when a text does not survive encoding.
    """
    baselines, unavailable = load_baseline_encodings(patience_seconds)
    encoders = {"ours": tokenizer.encode}
    decoders = {"ours": tokenizer.decode}
    vocab_sizes = {"ours": tokenizer.get_vocab_size()}
    for label, encoding in baselines.items():
        encoders[label], decoders[label] = encoding.encode_ordinary, encoding.decode
        vocab_sizes[label] = encoding.n_vocab
    source = {"fineweb-edu": "fwe"}.get(corpus.name, corpus.name.rstrip("/").split("/")[-1])
    rows = []
    for name, text in tokenizer_evaluation_texts(corpus, source).items():
        tokens = {}
        for label, encode in encoders.items():
            ids = encode(text)
            if decoders[label](ids) != text:
                raise AssertionError(f"the {label} tokenizer does not give back the text {name!r} that it encoded")
            tokens[label] = len(ids)
        rows.append({"name": name, "bytes": len(text.encode("utf-8")), "tokens": tokens})
    return {"texts": rows, "vocab_sizes": vocab_sizes, "unavailable": unavailable}


# %% [markdown]
# ### Tables
# One compact table to look at, and the full ones for the report. A positive difference means that ours needs fewer
# tokens.


# %%
def token_saving_percent(baseline_tokens: int, our_tokens: int) -> float:
    """Relative difference in percent of the baseline; positive when ours is shorter."""
    return 100 * (baseline_tokens - our_tokens) / baseline_tokens if baseline_tokens else 0.0


def tokenizer_summary_table(evaluation: dict) -> str:
    """A markdown table for the notebook: bytes, our tokens, bytes per token, and the saving against each yardstick."""
    header = ["text", "bytes", "our tokens", "bytes/token", "vs raw bytes", *(f"vs {b}" for b in BASELINE_ENCODINGS)]
    lines = [header]
    for row in evaluation["texts"]:
        tokens, n_bytes = row["tokens"], row["bytes"]
        ours = tokens["ours"]
        line = [row["name"], f"{n_bytes:,}", f"{ours:,}", f"{n_bytes / max(ours, 1):.2f}"]
        line.append(f"{token_saving_percent(n_bytes, ours):+.1f} %")
        for label in BASELINE_ENCODINGS:
            line.append(f"{token_saving_percent(tokens[label], ours):+.1f} %" if label in tokens else "unavailable")
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    table = []
    for name, *numbers in lines:
        cells = [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True))]
        table.append("| " + " | ".join(cells) + " |")
    notes = [f"{label}: {reason}." for label, reason in evaluation["unavailable"].items()]
    return "\n".join(table + ([""] + notes if notes else []))


def tokenizer_report_tables(evaluation: dict) -> str:
    """Markdown for the report: one table for each baseline, then one against raw bytes. Spec section 6."""
    sections = []
    for base in [*BASELINE_ENCODINGS, "raw bytes"]:
        lines = [f"### Comparison with {base}", ""]
        if base in evaluation["unavailable"]:
            lines += [f"Not available: {evaluation['unavailable'][base]}.", ""]
            sections.append("\n".join(lines))
            continue
        lines += [
            f"| Text Type | Bytes | {base} Tokens | {base} Ratio | Ours Tokens | Ours Ratio | Relative Diff % |",
            "|-----------|-------|--------------|--------------|-------------|------------|-----------------|",
        ]
        for row in evaluation["texts"]:
            n_bytes, ours = row["bytes"], row["tokens"]["ours"]
            theirs = n_bytes if base == "raw bytes" else row["tokens"][base]
            ratios = [n_bytes / max(theirs, 1), n_bytes / max(ours, 1)]
            lines.append(
                f"| {row['name']} | {n_bytes} | {theirs} | {ratios[0]:.2f} | {ours} | {ratios[1]:.2f} | "
                f"{token_saving_percent(theirs, ours):+.1f}% |"
            )
        sections.append("\n".join(lines + [""]))
    return "\n".join(sections)
