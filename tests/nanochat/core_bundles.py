"""Small bundles for the tests of CORE, and a small model that answers some of their questions."""

import json
from pathlib import Path

import torch

from nanochat.gpt import GPT, GPTConfig

COUNTING = " the of and to in is for be that"  # each one token in a vocabulary of 400
WORDS = ("lamp", "river", "naïve", "Straße", "日本", "🙂 smile", "x = 1", "don't", "the", "a quiet evening by the sea")


def choice_questions(n: int = 8) -> list[dict]:
    """Choices of different lengths, one that begins another, two that are equal, letters beyond ASCII."""
    questions = []
    for i in range(n):
        a, b, c = (WORDS[(i + k) % len(WORDS)] for k in range(3))
        choices = [[a, b, c, a + " " + b], [a, a + " " + c], [b, a, b, c], [c, c]][i % 4]
        questions.append(
            {"query": f"Question {i}: what comes after {b}?", "choices": choices, "gold": i % len(choices)}
        )
    return questions


def schema_questions(n: int = 8) -> list[dict]:
    """Contexts of different lengths; equal ones; words beyond ASCII."""
    questions = []
    for i in range(n):
        a, b = WORDS[i % len(WORDS)], WORDS[(i + 3) % len(WORDS)]
        contexts = [
            f"They put the {a} beside the {b} because the {a}",
            f"They put the {a} beside the {b} because the {b}",
        ]
        if i % 4 == 3:
            contexts = contexts[:1] * 2
        questions.append({"context_options": contexts, "continuation": f"was heavy {i}.", "gold": i % 2})
    return questions


def writing_questions(n: int = 8) -> list[dict]:
    """Words in order, to be continued by one to three more; every third time by the wrong ones."""
    words, questions = COUNTING.split(), []
    for i in range(n):
        answer = words[1 + i % 6 :][: 1 + i % 3]
        context = f" Row {i}: {' '.join(words[: 1 + i % 6])} \n"  # white space that has to be trimmed
        questions.append({"context": context, "continuation": " ".join(answer if i % 3 else answer + words[:1])})
    return questions


SMALL_TASKS = (  # label, type, shots, delimiter, baseline, questions
    ("choices0", "multiple_choice", 0, None, "25", choice_questions()),
    ("choices3", "multiple_choice", 3, "\nAnswer: ", "25", choice_questions()),
    ("schema0", "schema", 0, None, "50", schema_questions()),
    ("schema3", "schema", 3, None, "50", schema_questions()),
    ("writing0", "language_modeling", 0, None, "0", writing_questions()),
    ("writing3", "language_modeling", 3, "\nAnswer: ", "0", writing_questions()),
)


def write_core_bundle(folder, tasks=SMALL_TASKS) -> Path:
    """A bundle in the layout of the real one."""
    folder = Path(folder)
    (folder / "eval_data" / "some").mkdir(parents=True, exist_ok=True)
    entries, rows = [], ["Eval Task,Task Category,Random baseline,Description"]
    for label, kind, shots, delimiter, baseline, questions in tasks:
        entry = f"- label: {label}\n  dataset_uri: some/{label}.jsonl\n"
        entry += f"  num_fewshot:\n  - {shots}\n  icl_task_type: {kind}\n"
        entries.append(entry + (f"  continuation_delimiter: {json.dumps(delimiter)}\n" if delimiter else ""))
        rows.append(f'{label},any,{baseline},"a, b"')
        lines = [json.dumps(question, ensure_ascii=False) for question in questions]
        (folder / "eval_data" / "some" / f"{label}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "core.yaml").write_text("icl_tasks:\n" + "".join(entries), encoding="utf-8")
    (folder / "eval_meta_data.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def small_gpt(tokenizer, sequence_len: int = 64) -> GPT:
    """Random weights, so that every layer has a say, and a head that knows the order of COUNTING."""
    torch.manual_seed(0)
    config = GPTConfig(sequence_len, tokenizer.get_vocab_size(), 3, 2, 2, 64, "SL")
    model = GPT(config)
    model.init_weights()
    with torch.no_grad():
        torch.nn.init.normal_(model.lm_head.weight, std=0.02)
        for block in model.transformer["h"]:
            torch.nn.init.normal_(block.attn.c_proj.weight, std=0.06)
            torch.nn.init.normal_(block.mlp.c_proj.weight, std=0.03)
        ids = tokenizer.encode(COUNTING)
        for before, after in zip(ids[:-1], ids[1:], strict=True):
            model.lm_head.weight[after] += 0.3 * model.transformer["wte"].weight[before]
    return model.eval()
