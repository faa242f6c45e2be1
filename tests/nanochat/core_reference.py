"""CORE one example at a time, as plainly as section 13 of the specification can be written down.

Independent of the chapter that it checks: it shares no code with it, reads the files itself, pads all choices of a
question into one forward pass over whole sequences and computes every logit.
"""

import json
import random

import torch
import torch.nn.functional as F


def read_examples(path) -> list[dict]:
    with open(path, encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


def exam(path, max_per_task: int = -1) -> list[dict]:
    """The questions of a file as they are asked."""
    data = read_examples(path)
    random.Random(1337).shuffle(data)
    return data[:max_per_task] if max_per_task > 0 else data


def fewshot_examples(data: list[dict], index: int, count: int) -> list[dict]:
    others = [i for i in range(len(data)) if i != index]
    return [data[i] for i in random.Random(1234 + index).sample(others, count)]


def prompts_of(kind: str, item: dict, shots: list[dict], delimiter: str) -> list[str]:
    text = ""
    if kind == "multiple_choice":
        for shot in shots:
            text += shot["query"] + delimiter + shot["choices"][shot["gold"]] + "\n\n"
        return [text + item["query"] + delimiter + choice for choice in item["choices"]]
    if kind == "schema":
        for shot in shots:
            text += shot["context_options"][shot["gold"]] + delimiter + shot["continuation"] + "\n\n"
        return [text + context + delimiter + item["continuation"] for context in item["context_options"]]
    for shot in shots:
        text += shot["context"].strip() + delimiter + shot["continuation"] + "\n\n"
    text += item["context"].strip() + delimiter
    return [text.strip(), text + item["continuation"]]


def tokens_and_spans(kind: str, prompts: list[str], tokenizer):
    tokens = [tokenizer.encode(prompt, prepend=tokenizer.get_bos_token_id()) for prompt in prompts]
    shortest = min(len(row) for row in tokens)
    if kind == "language_modeling":
        without, whole = tokens
        assert len(without) < len(whole) and whole[: len(without)] == without
        return [whole], [len(without)], [len(whole)]
    if kind == "multiple_choice":
        start = 0
        while start < shortest and all(row[start] == tokens[0][start] for row in tokens):
            start += 1
        return tokens, [start] * len(tokens), [len(row) for row in tokens]
    suffix = 0
    while suffix < shortest and all(row[-1 - suffix] == tokens[0][-1 - suffix] for row in tokens):
        suffix += 1
    return tokens, [len(row) - suffix for row in tokens], [len(row) for row in tokens]


@torch.no_grad()
def answer(model, tokenizer, device, kind: str, item: dict, shots: list[dict], delimiter: str, max_seq_len=None):
    """(correct, choice, mean losses) of one question; choice and losses are None for language modeling."""
    tokens, starts, ends = tokens_and_spans(kind, prompts_of(kind, item, shots, delimiter), tokenizer)
    if max_seq_len is not None:
        for i, row in enumerate(tokens):
            cut = max(0, len(row) - max_seq_len)
            tokens[i], starts[i], ends[i] = row[cut:], starts[i] - cut, ends[i] - cut
            assert starts[i] >= 0
    longest = max(len(row) for row in tokens)
    bos = tokenizer.get_bos_token_id()
    ids = torch.tensor([row + [bos] * (longest - len(row)) for row in tokens], device=device)
    logits = model(ids)
    targets = torch.roll(ids, shifts=-1, dims=1)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(ids.shape)
    losses[:, -1] = float("nan")
    predictions = logits.argmax(dim=-1)
    if kind == "language_modeling":
        predicted = predictions[0, starts[0] - 1 : ends[0] - 1]
        return bool((predicted == ids[0, starts[0] : ends[0]]).all()), None, None
    means = [losses[i, starts[i] - 1 : ends[i] - 1].mean().item() for i in range(len(tokens))]
    choice = means.index(min(means))
    return choice == item["gold"], choice, means


def reference_answers(model, tokenizer, device, kind, path, num_fewshot, delimiter=" ", max_per_task=-1, limit=None):
    """`answer` for every question of a file, in the order in which they are asked; the first `limit` if given."""
    data = exam(path, max_per_task)
    return [
        answer(model, tokenizer, device, kind, item, fewshot_examples(data, index, num_fewshot), delimiter)
        for index, item in enumerate(data[:limit])
    ]
