"""CORE on a CPU beside the plain one-question-at-a-time reference of the tests, in fp32, measured in turns in one run.

    python benchmarks/core_eval.py [--bundle FOLDER] [--questions 24] [--rounds 3] [--profile]

Each task is asked by both, three times in turns; medians. Both get the same model and tokenizer, made here: 4 layers,
width 256, 4096 tokens, trained for a few steps so that its answers are not all the same. Without --bundle the
questions are made of the same text, in the shapes and lengths of the real ones. Answers that differ are counted: 0.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "nb_src"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "nanochat"))

from core_reference import answer, exam, fewshot_examples

from helpers import english_documents
from nanochat.core_bundle import load_core_tasks
from nanochat.core_eval import score_examples
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import device_name_of, keep_freed_memory
from nanochat.tokenizer import RustBPETokenizer

SHAPES = (  # label, type, shots, delimiter, words in the question, words in an answer, number of answers
    ("10-shot 4 choices", "multiple_choice", 10, "\nAnswer: ", 22, 4, 4),
    ("10-shot 2 long choices", "multiple_choice", 10, "\nAnswer: ", 8, 18, 2),
    ("0-shot 4 choices", "multiple_choice", 0, " ", 12, 4, 4),
    ("0-shot schema", "schema", 0, " ", 14, 6, 2),
    ("10-shot schema", "schema", 10, " ", 14, 6, 2),
    ("0-shot language modeling", "language_modeling", 0, " ", 70, 1, 1),
    ("10-shot language modeling", "language_modeling", 10, "\nAnswer: ", 20, 2, 1),
)


def made_bundle(folder: Path, words: list[str]) -> Path:
    """A bundle of questions out of consecutive words, lengths varying by half."""
    rng = random.Random(0)

    def text(n_words: int) -> str:
        start, n = rng.randrange(len(words) - 500), max(1, round(n_words * rng.uniform(0.5, 1.5)))
        return " ".join(words[start : start + n])

    (folder / "eval_data").mkdir()
    entries = []
    for index, (label, kind, shots, delimiter, n_question, n_answer, n_answers) in enumerate(SHAPES):
        questions = []
        for _ in range(400):
            options, gold = [text(n_answer) for _ in range(n_answers)], rng.randrange(n_answers)
            if kind == "multiple_choice":
                questions.append({"query": text(n_question), "choices": options, "gold": gold})
            elif kind == "schema":
                before, names = text(n_question), (text(1), text(1))
                contexts = [f"{before} {name}" for name in names]
                questions.append({"context_options": contexts, "continuation": text(n_answer), "gold": gold})
            else:
                questions.append({"context": text(n_question), "continuation": options[0]})
        (folder / "eval_data" / f"{index}.jsonl").write_text("\n".join(map(json.dumps, questions)), encoding="utf-8")
        entries.append(
            {"label": label, "dataset_uri": f"{index}.jsonl", "num_fewshot": [shots], "icl_task_type": kind,
             "continuation_delimiter": delimiter}
        )  # fmt: skip
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": entries}))  # JSON is YAML
    rows = [f'"{label}",0' for label, *_ in SHAPES]
    (folder / "eval_meta_data.csv").write_text("\n".join(["Eval Task,Random baseline", *rows]) + "\n")
    return folder


def made_model(tokenizer, texts: list[str], steps: int = 30) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(512, tokenizer.get_vocab_size(), 4, 4, 4, 256, "L"))
    model.init_weights()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    ids = torch.tensor([token for text in texts for token in tokenizer.encode(text, prepend="<|bos|>")])
    for _ in range(steps):
        batch = torch.stack([ids[start : start + 257] for start in torch.randint(0, len(ids) - 257, (8,))])
        model(batch[:, :-1], batch[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


def plain_answers(model, tokenizer, task, n: int) -> list:
    data = exam(task.path, n)
    return [
        answer(
            model, tokenizer, "cpu", task.task_type, item, fewshot_examples(data, i, task.num_fewshot), task.delimiter
        )
        for i, item in enumerate(data)
    ]


def timed(function, *args):
    started = time.perf_counter()
    return function(*args), time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", help="a CORE bundle; by default one is made")
    parser.add_argument("--tasks", default="", help="labels, separated by commas; by default all")
    parser.add_argument("--questions", type=int, default=24, help="of each task; at least 11")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="also print where our time goes")
    args = parser.parse_args()

    keep_freed_memory()
    texts = english_documents()
    tokenizer = RustBPETokenizer.train_from_iterator(iter(texts), 4096)
    model = made_model(tokenizer, texts)
    print(
        f"\n{device_name_of(torch.device('cpu'))}; torch {torch.__version__}; fp32; {args.questions} questions a task"
    )
    print(f"\n{'task':30}{'plain s':>9}{'ours s':>9}{'faster':>8}{'differ':>8}")
    with tempfile.TemporaryDirectory() as folder:
        tasks = load_core_tasks(args.bundle or made_bundle(Path(folder), " ".join(texts).split()))
        for task in tasks:
            if args.tasks and task.label not in args.tasks.split(","):
                continue
            plain_times, our_times = [], []
            for _ in range(args.rounds):
                plain, seconds = timed(plain_answers, model, tokenizer, task, args.questions)
                plain_times.append(seconds)
                ours, seconds = timed(score_examples, model, tokenizer, task, "cpu", args.questions)
                our_times.append(seconds)
            differ = sum((a.correct, a.choice) != (b[0], b[1]) for a, b in zip(ours, plain, strict=True))
            plain_time, our_time = statistics.median(plain_times), statistics.median(our_times)
            print(
                f"{task.label:30}{plain_time:>9.2f}{our_time:>9.2f}{plain_time / our_time:>8.1f}{differ:>8}", flush=True
            )
            if args.profile:
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
                    score_examples(model, tokenizer, task, "cpu", args.questions)
                table = recorded.key_averages().table
                print(table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=44))


if __name__ == "__main__":
    main()
