# %% [markdown]
# ## Spelling
#
# A model reads tokens, not letters: "strawberry" is a few numbers to it, and nothing in them says how many r's there
# are. From enough examples it can learn the letters of each token by heart, and that makes two tasks. The simple one is
# to spell a word. The other one is to count a letter: spell, go through the letters one by one, and then let Python
# count as well.
#
# The layout matters. A comma or a colon before each letter makes it a token of its own, always the same one; with a
# space before it, it would be another.

# %%
import random
import string
from pathlib import Path

from nanochat.runtime import UserError
from tasks.common import Task, require_choice
from tasks.gsm8k import evaluate_final_answer
from tasks.hub import task_file

# %% [markdown]
# ### The words
# All English words there are, or those of the offline corpus. Each example has a random generator of its own, so the
# words of the test come in another order than those of the training, and example 17 is the same whatever the size.

# %%
WORD_LIST_FILE = "words_alpha.txt"
WORD_LIST_URL = f"https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/{WORD_LIST_FILE}"
FIRST_TEST_SEED = 10_000_000
FEWEST_WORDS = 5


def spelling_words(data_dir: str | None = None) -> list[str]:
    """The word list, in the order of its file: in data_dir, or fetched into the base directory. Raises UserError."""
    path = task_file(WORD_LIST_FILE, WORD_LIST_URL, data_dir)
    words = [word.strip() for word in Path(path).read_text(encoding="utf-8", errors="replace").split("\n")]
    if words[-1] == "":
        words.pop()  # the last line ends, too
    for number, word in enumerate(words, start=1):
        if not (word.isascii() and word.isalpha() and word.islower()):
            raise UserError(
                f"{path}:{number}: {word[:40]!r} is not a word of the letters a to z. Delete the file to have it "
                "made or fetched again."
            )
    if len(words) < FEWEST_WORDS:
        raise UserError(f"{path} has {len(words)} words; at least {FEWEST_WORDS} are needed, one on each line.")
    return words


class SpellingTask(Task):
    """What both tasks share: the words, a size, and a generator for each example."""

    def __init__(self, size: int = 1000, split: str = "train", data_dir: str | None = None, **view):
        super().__init__(**view)
        require_choice(type(self).__name__, "split", split, ("train", "test"))
        if not 0 <= size <= FIRST_TEST_SEED:
            raise ValueError(f"size is {size}; it can be 0 to {FIRST_TEST_SEED:,}")
        self.size, self.split = size, split
        self.words = spelling_words(data_dir)

    def num_examples(self) -> int:
        return self.size

    def example_rng(self, index: int) -> random.Random:
        return random.Random(index if self.split == "train" else FIRST_TEST_SEED + index)


# %% [markdown]
# ### `SimpleSpelling`
# Most of what the model must know to count letters, in a fraction of the tokens.


# %%
class SimpleSpelling(SpellingTask):
    """Spell a word. Spec section 15.3."""

    def __init__(self, size: int = 1000, split: str = "train", data_dir: str | None = None, **view):
        super().__init__(size, split, data_dir, **view)
        random.Random(42).shuffle(self.words)

    def get_example(self, index: int) -> dict:
        word = self.example_rng(index).choice(self.words)
        return {
            "messages": [
                {"role": "user", "content": f"Spell the word: {word}"},
                {"role": "assistant", "content": f"{word}:{','.join(word)}"},
            ]
        }

    def evaluate(self, conversation: dict, completion: str) -> int:
        return int(completion.strip() == conversation["messages"][-1]["content"])


# %% [markdown]
# ### Ways to ask
# People ask for the same thing in many ways and languages, quote or do not, shout or mumble, and forget the question
# mark.

# %%
SPELLING_QUESTIONS = (
    "How many times does {letter} occur in {word}",
    "How often does {letter} appear in the word {word}?",
    "Count the letter {letter} in {word}",
    "What is the number of {letter} in {word}",
    "Tell me how many {letter} the word {word} has",
    "How many {letter} are there in {word}?",
    "In {word}, how many {letter} do you find",
    "Find every {letter} in {word} and count them",
    "{word}: how many {letter}",
    "Please count how often {letter} is used in {word}",
    "How many of the letters of {word} are {letter}",
    "What is the count of {letter} in {word}?",
    "Give me the number of {letter} inside {word}",
    "Look at {word} and count its {letter}",
    "Could you count each {letter} in {word}",
    "I need to know how many {letter} {word} contains",
    "Does {word} contain {letter}, and how many times",
    "How many {letter} would I write when spelling {word}",
    "Spell {word} and tell me how many {letter} it has",
    "Can you say how many {letter} are in the word {word}?",
    "Number of {letter} in {word}",
    "How frequently does {letter} show up in {word}",
    "Going through {word} letter by letter, how many {letter} come up",
    "Work out how many times {word} uses {letter}",
    "Of all letters in {word}, how many are {letter}?",
    "How many times must I type {letter} to write {word}",
    "If I spell out {word}, how many {letter} will there be",
    "Quick question: how many {letter} in {word}",
    "Letter count: {letter} in {word}",
    "What do you get when you count {letter} in {word}",
    # Spanish
    "¿Cuántas veces aparece {letter} en {word}?",
    "Cuenta las letras {letter} de la palabra {word}",
    "Cuántas {letter} hay en {word}",
    "Dime cuántas veces se escribe {letter} en {word}",
    # Chinese
    "{word}里有几个{letter}",
    "单词{word}中字母{letter}出现了多少次",
    "请数一数{word}里的{letter}",
    "{letter}在{word}中一共出现几次？",
    # Korean
    "{word}에 {letter}가 몇 개 있나요?",
    "{word}에서 {letter}는 몇 번 나오나요",
    "단어 {word} 안에 {letter}가 몇 번 들어 있어요",
    "{word}에 있는 {letter}의 개수를 세어 주세요",
    # French
    "Combien de fois la lettre {letter} figure-t-elle dans {word} ?",
    "Combien y a-t-il de {letter} dans {word}",
    "Compte les {letter} du mot {word}",
    # German
    "Wie oft kommt {letter} in {word} vor?",
    "Wie viele {letter} hat das Wort {word}",
    "Zähle die {letter} in {word}",
    # Japanese
    "{word}に{letter}は何回出てきますか",
    "{word}の中に{letter}はいくつありますか？",
    "単語{word}に含まれる{letter}の数を教えてください",
)


def spelling_question(rng: random.Random, word: str, letter: str) -> str:
    """Ask for the number of a letter in a word, in a way that `rng` draws."""
    template = rng.choice(SPELLING_QUESTIONS)
    if rng.random() < 0.3:
        template = template.lower()
    letter_quote, word_quote = rng.choice(["", "'", '"']), rng.choice(["", "'", '"'])
    question = template.format(letter=letter_quote + letter + letter_quote, word=word_quote + word + word_quote)
    mark_wanted = rng.random() < 0.5
    return question + "?" if mark_wanted and not question.endswith(("?", "？")) else question


# %% [markdown]
# ### `SpellingBee`
# The final answer stands where that of a word problem does, and is judged in the same way.


# %%
def spelling_answer(word: str, letter: str) -> list[dict]:
    """The parts of the assistant's message: counted by hand, counted by Python, and the final answer."""
    lines, count = [], 0
    for number, character in enumerate(word, start=1):
        hit = character == letter
        count += hit
        lines.append(f"{number}:{character}" + f" hit! count={count}" * hit)
    manual = (
        f"How many '{letter}' are in '{word}'? First I count by hand and spell the word:\n\n"
        f"{word}:{','.join(word)}\n\nNow I look at each letter:\n\n" + "\n".join(lines) + f"\n\nThat makes {count}."
    )
    return [
        {"type": "text", "text": manual},
        {"type": "text", "text": "\n\nLet me check with Python:\n\n"},
        {"type": "python", "text": f"'{word}'.count('{letter}')"},
        {"type": "python_output", "text": str(count)},
        {"type": "text", "text": f"\n\nPython counts {count}.\n\n#### {count}"},
    ]


class SpellingBee(SpellingTask):
    """Count a letter in a word, which nine times out of ten is in it. Spec sections 15.3 and 21.45."""

    def get_example(self, index: int) -> dict:
        rng = self.example_rng(index)
        word = rng.choice(self.words)
        letter = rng.choice(word) if rng.random() < 0.9 else rng.choice(string.ascii_lowercase)
        return {
            "messages": [
                {"role": "user", "content": spelling_question(rng, word, letter)},
                {"role": "assistant", "content": spelling_answer(word, letter)},
            ]
        }

    def evaluate(self, conversation: dict, completion: str) -> int:
        return evaluate_final_answer(conversation, completion)

    def reward(self, conversation: dict, completion: str) -> float:
        return float(self.evaluate(conversation, completion))
