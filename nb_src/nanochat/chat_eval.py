# %% [markdown]
# ## Chat evaluation
#
# Six exams. Three are multiple choice: the model reads the question and we look only at which of the letters it finds
# likeliest, so one forward pass over a batch of questions grades them all. Three are written: the model generates an
# answer, with its calculator, and the answer is compared, or run when it is a program.
#
# The written exams cost almost all of the time, and almost all of that is waiting: one row of a batch costs as much as
# thirty-two. So problems share a batch although their prompts have different lengths, and a problem that is done
# leaves its place to the next. The answers are those that each problem would have got alone.

# %%
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from tqdm import tqdm

from nanochat.engine import Engine
from nanochat.execution import sandbox_level
from nanochat.runtime import UserError, get_dist_info, is_ddp_initialized, print0
from nanochat.settings import chosen_chat_tasks
from tasks.arc import ARC
from tasks.common import require_examples
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.spellingbee import SpellingBee

# %% [markdown]
# ### The exams
# A model that knows nothing gets a quarter of the multiple-choice questions right and none of the others.

# %%
CHAT_TASKS = {  # name -> task, given the folder of its data and the permission that only HumanEval needs
    "ARC-Easy": lambda data_dir, _: ARC("ARC-Easy", "test", data_dir=data_dir),
    "ARC-Challenge": lambda data_dir, _: ARC("ARC-Challenge", "test", data_dir=data_dir),
    "MMLU": lambda data_dir, _: MMLU("all", "test", data_dir=data_dir),
    "GSM8K": lambda data_dir, _: GSM8K("main", "test", data_dir=data_dir),
    "HumanEval": lambda data_dir, allow_weak: HumanEval(data_dir, allow_weak),
    "SpellingBee": lambda data_dir, _: SpellingBee(size=256, split="test", data_dir=data_dir),
}
CHAT_CHANCE = {"ARC-Easy": 0.25, "ARC-Challenge": 0.25, "MMLU": 0.25}  # 0 for the others
D12_CHAT_REFERENCE = {  # the original's fine-tuned d12, spec section 0.7
    "ARC-Easy": 803 / 2376, "ARC-Challenge": 348 / 1172, "MMLU": 4254 / 14042, "GSM8K": 6 / 1319, "HumanEval": 9 / 164,
    "SpellingBee": 250 / 256,
}  # fmt: skip


def chat_tasks_to_run(names: str, allow_weak_sandbox: bool = False) -> tuple[list[str], str]:
    """The tasks of "ARC-Easy|GSM8K" (all for "") that can be run here, and a sentence about the sandbox."""
    chosen = chosen_chat_tasks(names)
    if "HumanEval" not in chosen:
        return chosen, "No exam runs programs that the model writes."
    level, sentence = sandbox_level()
    if level == "full" or allow_weak_sandbox:
        return chosen, sentence
    chosen.remove("HumanEval")
    return chosen, f"{sentence} HumanEval is left out; allow_weak_sandbox=True runs it all the same."


# %% [markdown]
# ### `ChatResult`
# What an exam leaves behind: the mark, and some of the papers, because a mark alone does not say what went wrong.

# %%
CHAT_PAPERS = 8


@dataclass(frozen=True)
class ChatResult:
    """The outcome of one task over all processes. `papers` are the first few of rank 0: question, answer, passed."""

    task: str
    passed: int
    total: int
    new_tokens: int  # generated; 0 for multiple choice
    seconds: float
    papers: list

    @property
    def accuracy(self) -> float:
        return self.passed / self.total

    @property
    def centered(self) -> float:
        """0 for guessing, 1 for a perfect score."""
        chance = CHAT_CHANCE.get(self.task, 0.0)
        return (self.accuracy - chance) / (1 - chance)

    def plain(self) -> dict:
        return asdict(self)


def shared_problems(task, max_problems: int) -> range:
    """This process's share of the first `max_problems` (0: all): every world_size-th."""
    _, rank, _, world_size = get_dist_info()
    return range(rank, min(max_problems or len(task), len(task)), world_size)


def summed_over_ranks(device, *counts: int) -> list[int]:
    """Each count, added up over all processes."""
    totals = torch.tensor(counts, dtype=torch.int64, device=device)
    if is_ddp_initialized():
        dist.all_reduce(totals)
    return totals.tolist()


def chat_papers(conversations: list[dict], answers: list[str], verdicts: list[bool]) -> list[dict]:
    """The first few questions with the model's answer and whether it passed."""
    questions = [conversation["messages"][-2]["content"] for conversation in conversations[:CHAT_PAPERS]]
    return [
        {"question": question, "answer": answer, "passed": passed}
        for question, answer, passed in zip(questions, answers, verdicts, strict=False)
    ]


# %% [markdown]
# ### `run_categorical_eval`
# No text is generated: among the letters on offer, which does the model want to say first? Questions of similar length
# share a batch, so little of it is padding.


# %%
@torch.no_grad()
def run_categorical_eval(name: str, task, model, tokenizer, batch_size: int = 8, max_problems: int = 0) -> ChatResult:
    """Grade a multiple-choice task. Spec section 17.

    Raises UserError when an answer letter is not one token of this tokenizer. Every rank must call it.
    """
    started, device = time.perf_counter(), model.get_device()
    problems = shared_problems(task, max_problems)
    conversations = [task[i] for i in problems]
    prompts = [tokenizer.render_for_completion(conversation) for conversation in conversations]
    letter_ids = {}
    for letter in sorted({letter for conversation in conversations for letter in conversation["letters"]}):
        ids = tokenizer.encode(letter)
        if len(ids) != 1:
            raise UserError(f"{name}: the answer {letter!r} is {len(ids)} tokens; multiple choice needs exactly one.")
        letter_ids[letter] = ids[0]

    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers, verdicts = [""] * len(prompts), [False] * len(prompts)
    with tqdm(total=len(order), desc=name, file=sys.stdout, mininterval=1, disable=get_dist_info()[1] != 0) as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            lengths = torch.tensor([len(prompts[i]) for i in batch])
            ids = torch.full((len(batch), int(lengths.max())), tokenizer.get_bos_token_id(), dtype=torch.long)
            for row, i in zip(ids, batch, strict=True):
                row[: len(prompts[i])] = torch.tensor(prompts[i])
            hidden = model.trunk(ids.to(device), ends=lengths.to(device))  # (B, 1, C)
            logits = model.head(hidden[:, 0]).cpu()
            for row, i in zip(logits, batch, strict=True):
                letters = conversations[i]["letters"]
                answers[i] = letters[int(row[[letter_ids[letter] for letter in letters]].argmax())]
                verdicts[i] = bool(task.evaluate(conversations[i], answers[i]))
            bar.update(len(batch))
    papers = chat_papers(conversations, answers, verdicts)
    passed, total = summed_over_ranks(device, sum(verdicts), len(verdicts))
    return ChatResult(name, passed, total, 0, time.perf_counter() - started, papers)


# %% [markdown]
# ### `run_generative_eval`
# Answers are graded on two other threads while the next ones are being written; for programs that is the sandbox's
# waiting time, saved.


# %%
def run_generative_eval(
    name: str, task, model, tokenizer, batch_size: int = 32, max_problems: int = 0, num_samples: int = 1,
    max_new_tokens: int = 512, temperature: float = 0.0, top_k: int | None = 50, seed: int = 42,
) -> ChatResult:  # fmt: skip
    """Grade a task whose answers are written; a problem is passed when any of its samples is right. Spec section 17.

    Every rank must call it.
    """
    started, device = time.perf_counter(), model.get_device()
    problems = shared_problems(task, max_problems)
    conversations = [task[i] for i in problems]
    prompts = [tokenizer.render_for_completion(conversation) for conversation in conversations]
    repeated = [prompt for prompt in prompts for _ in range(num_samples)]
    answers, verdicts, new_tokens = [""] * len(repeated), [None] * len(repeated), 0
    generated = Engine(model, tokenizer).generate_many(repeated, max_new_tokens, temperature, top_k, seed, batch_size)
    with (
        ThreadPoolExecutor(max_workers=2) as graders,
        tqdm(total=len(repeated), desc=name, file=sys.stdout, mininterval=1, disable=get_dist_info()[1] != 0) as bar,
    ):
        for index, tokens in generated:
            answers[index] = tokenizer.decode(tokens)
            verdicts[index] = graders.submit(task.evaluate, conversations[index // num_samples], answers[index])
            new_tokens += len(tokens)
            bar.update()
        right = [bool(verdict.result()) for verdict in verdicts]
    passed = [any(right[i : i + num_samples]) for i in range(0, len(right), num_samples)]
    papers = chat_papers(conversations, answers[::num_samples], passed)
    n_passed, total, new_tokens = summed_over_ranks(device, sum(passed), len(passed), new_tokens)
    return ChatResult(name, n_passed, total, new_tokens, time.perf_counter() - started, papers)


# %% [markdown]
# ### `run_chat_eval`
# One task by its name, whichever kind it is.


# %%
def run_chat_eval(
    name: str, model, tokenizer, data_dir=None, max_problems: int = 0, batch_size: int = 32, max_new_tokens: int = 512,
    num_samples: int = 1, temperature: float = 0.0, top_k: int | None = 50, allow_weak: bool = False,
) -> ChatResult:  # fmt: skip
    """Evaluate one task of CHAT_TASKS and print its mark.

    data_dir: a folder of task data, None for the hub's. max_problems: 0 for all. allow_weak: see `HumanEval`. Raises
    UserError for a task without problems. Every rank must call it.
    """
    task = CHAT_TASKS[name](data_dir, allow_weak)
    require_examples(task)
    if task.eval_type == "categorical":
        result = run_categorical_eval(name, task, model, tokenizer, batch_size, max_problems)
    else:
        result = run_generative_eval(
            name, task, model, tokenizer, batch_size, max_problems, num_samples, max_new_tokens, temperature, top_k
        )
    print0(f"{name} accuracy: {100 * result.accuracy:.2f}% ({result.passed}/{result.total}, {result.seconds:.1f}s)")
    return result


# %% [markdown]
# ### `chatcore_metric`
# One number for all: how far from guessing to perfect, on average. SpellingBee is a skill that the model was drilled
# in, with the same words, so the number without it says more about general ability; both are given.


# %%
def chatcore_metric(results: dict[str, ChatResult], with_spelling: bool = True) -> float | None:
    """Mean centered accuracy over all tasks (with or without SpellingBee); None unless every one of them was run."""
    wanted = [name for name in CHAT_TASKS if with_spelling or name != "SpellingBee"]
    if any(name not in results for name in wanted):
        return None
    return sum(results[name].centered for name in wanted) / len(wanted)
