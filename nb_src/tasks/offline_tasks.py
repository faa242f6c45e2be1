# %% [markdown]
# ## Tasks without a network
#
# Fine-tuning and chat evaluation read half a dozen data sets from the hub. A machine without a network gets them
# here: files in the same folders, with the same columns, under the same names, so that whoever reads them cannot tell
# the difference and no other chapter has a second way of loading anything. The questions are easier and fewer than
# the originals, and a score on them says nothing about a score on those.
#
# Half of the material is the training corpus itself: its sentences are continued, repeated, reordered and turned into
# multiple-choice questions. Training sets are made of training text and test sets of validation text, so a test asks
# about sentences that no stage has trained on. Where a question has no text in it ("which of these is an animal?"),
# the test asks it in other words than training did.

# %%
import json
import os
import random
import re
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from nanochat.dataset import Corpus, parquets_iter_batched
from nanochat.offline_corpus import ENGLISH_SMALL_WORDS
from nanochat.runtime import UserError, atomic_path, get_base_dir, print0, write_atomic
from nanochat.stages import fingerprint_of
from tasks.offline_problems import (
    STORY_PEOPLE,
    dialogue,
    offline_function_lessons,
    offline_function_tests,
    offline_identity_conversations,
    offline_word_problems,
)

OFFLINE_TASK_RULES = 1  # raise it when a rule of this chapter changes: folders of the old rules are then built anew

# %% [markdown]
# ### Sentences
# Documentation is full of things that are no sentences: signatures, lists, formulas, examples. What follows keeps
# only what would pass in a book, and is strict about it, because there is more text than is needed. Short sentences
# such as "This method is called when a connection has been closed." stand in many places; one that is in the training
# text is no material for a test.

# %% tags=["folded"]
MATERIAL_CHARACTERS = {"train": 20_000_000, "val": 3_000_000}
PROSE_SENTENCE = re.compile(r"[A-Z][a-z]*[ ,][A-Za-z ,;:'-]+\.")
DOCUMENTED_NAME = re.compile(r"[A-Za-z_][\w.]*")


def prose_sentences(paragraph: str) -> list[str | None]:
    """The sentences of a paragraph in order, None in place of one that is not plain English of 6 to 24 words.

    Marks of emphasis are left out. Nothing when the paragraph is indented or laid out in columns.
    """
    if re.search(r"^ |  | $", paragraph, flags=re.MULTILINE):
        return []
    sentences = []
    for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", re.sub("[*`]+", "", paragraph).replace("\n", " ")):
        words = sentence.split()
        is_plain = PROSE_SENTENCE.fullmatch(sentence) and not re.search("[a-z][A-Z]|--", sentence)
        small = sum(word.lower() in ENGLISH_SMALL_WORDS for word in words)
        sentences.append(sentence if is_plain and 6 <= len(words) <= 24 and small >= 2 else None)
    return sentences


def plain_words(sentence: str) -> list[str]:
    """The words of a sentence in lower case, without punctuation."""
    return [word for word in re.sub("[^a-z' -]", " ", sentence.lower()).split() if word.strip("'-")]


@dataclass
class OfflineMaterial:
    """What the questions of one split are made of, in the order of the text and without repetitions."""

    sentences: list[str] = field(default_factory=list)
    pairs: list[tuple[str, str]] = field(default_factory=list)  # a sentence and the one after it
    entries: list[tuple[str, str, str]] = field(default_factory=list)  # module, name, first sentence about it
    counts: Counter = field(default_factory=Counter)  # words of 3 to 10 letters in sentences
    words: list[str] = field(default_factory=list)  # the same, the most frequent first, without ENGLISH_SMALL_WORDS
    long_words: list[str] = field(default_factory=list)  # the thousand most frequent ones of four or more letters


def add_document(material: OfflineMaterial, document: str) -> None:
    """Take a document apart. A corpus of documentation has the module's name in its first line."""
    paragraphs = re.split(r"\n\s*\n", document)
    module = paragraphs[0] if DOCUMENTED_NAME.fullmatch(paragraphs[0]) else ""
    for i, paragraph in enumerate(paragraphs):
        sentences = prose_sentences(paragraph)
        for sentence, following in zip(sentences, sentences[1:] + [None], strict=False):
            if sentence is None:
                continue
            material.sentences.append(sentence)
            material.counts.update(re.findall(r"\b[a-z]{3,10}\b", sentence))
            if following is not None:
                material.pairs.append((sentence, following))
        if module and i > 1 and sentences and sentences[0] and DOCUMENTED_NAME.fullmatch(paragraphs[i - 1]):
            material.entries.append((module, paragraphs[i - 1], sentences[0]))


def read_material(corpus: Corpus, split: str, known: OfflineMaterial | None = None) -> OfflineMaterial:
    """What the beginning of a split ("train" or "val") has to offer, without sentences that `known` has too.

    Raises UserError when that is too little.
    """
    material, characters = OfflineMaterial(), 0
    for documents in parquets_iter_batched(split, corpus=corpus):
        for document in documents:
            add_document(material, document)
            characters += len(document)
        if characters >= MATERIAL_CHARACTERS[split]:
            break
    excluded = set(known.sentences) if known else set()
    for name in ("sentences", "pairs", "entries"):  # the sentence is the last item of an entry, and the first of a pair
        found = dict.fromkeys(getattr(material, name))
        setattr(material, name, [item for item in found if not excluded & {item, item[0], item[-1]}])
    ranked = sorted(material.counts, key=lambda word: (-material.counts[word], word))
    material.words = [word for word in ranked if word not in ENGLISH_SMALL_WORDS]
    material.long_words = [word for word in material.words if len(word) >= 4][:1000]
    if len(material.sentences) < 15 or len(material.long_words) < 50:
        raise UserError(
            f"the {split} text of {corpus.name} has only {len(material.sentences)} plain English sentences of its own, "
            "too few to make questions of. Use the tasks of the hub, or a corpus with more English prose."
        )
    return material


# %% [markdown]
# ### Multiple choice: words and numbers
# These questions need no text. Each kind has several wordings; the first one is kept for the test. A wrong answer
# must be wrong beyond doubt, so no word stands in two of the lists below.

# %% tags=["folded"]
WORD_CATEGORIES = {
    "an animal": "dog cat horse cow sheep goat mouse lion tiger bear wolf rabbit snake frog elephant monkey",
    "a color": "red blue green yellow black white brown gray purple pink",
    "a fruit": "apple pear banana cherry grape lemon mango melon strawberry blueberry",
    "a day of the week": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "a month": "January February April June July August September October November December",
    "a part of the body": "head arm leg foot nose ear eye finger knee shoulder mouth neck",
    "a tool": "hammer saw drill shovel screwdriver wrench axe rake",
    "a piece of clothing": "shirt coat hat shoe sock glove dress skirt jacket scarf",
    "a musical instrument": "piano violin guitar drum flute trumpet cello harp",
    "a vehicle": "car bus train truck bicycle ship airplane tractor",
    "something to drink": "water milk coffee tea juice lemonade beer wine",
    "a member of the family": "mother father sister brother uncle aunt daughter grandmother",
    "a country": "France Germany Italy Spain Japan China India Brazil Canada Egypt Norway Mexico",
    "a job": "teacher doctor farmer baker pilot nurse lawyer carpenter",
    "a piece of furniture": "table chair bed sofa desk shelf bench cupboard",
}
OPPOSITES = (
    "hot cold, big small, up down, open closed, fast slow, happy sad, old new, light dark, left right, early late, "
    "full empty, hard soft, long short, rich poor, strong weak, wet dry, clean dirty, near far, true false, "
    "first last, always never, day night, more less, begin end, give take, buy sell, push pull, win lose, "
    "inside outside, before after, love hate, question answer, wide narrow, safe dangerous, north south, east west, "
    "summer winter, friend enemy, war peace, laugh cry, remember forget, easy difficult, cheap expensive, smooth rough"
)
SEQUENCES = {
    "day": WORD_CATEGORIES["a day of the week"].split(),
    "month": "January February March April May June July August September October November December".split(),
    "number": "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen".split(),
    "letter": list("abcdefghijklmnopqrstuvwxyz"),
}


def choose_wording(rng: random.Random, fresh: bool, wordings: tuple[str, ...]) -> str:
    """The wording that is kept for the test (the first), or one of the others."""
    return wordings[0] if fresh else rng.choice(wordings[1:])


def category_question(rng: random.Random, material: OfflineMaterial, fresh: bool):
    """One word of a category among three that belong to others."""
    right, *wrong = rng.sample(list(WORD_CATEGORIES), 4)
    wordings = (
        "Which of these is X?", "Which word names X?", "One of these is X. Which one?", "Find the word for X.",
        "Which word stands for X?",
    )  # fmt: skip
    right_word, *wrong_words = (rng.choice(WORD_CATEGORIES[name].split()) for name in (right, *wrong))
    return choose_wording(rng, fresh, wordings).replace("X", right), right_word, wrong_words


def odd_one_out_question(rng: random.Random, material: OfflineMaterial, fresh: bool):
    """Three words of one category and one of another."""
    odd, common = rng.sample(list(WORD_CATEGORIES), 2)
    wordings = (
        "Which word does not belong with the others?", "Three of these words belong together. Which one does not?",
        "Which word is different from the other three?", "Find the word that does not fit.",
    )  # fmt: skip
    wrong = rng.sample(WORD_CATEGORIES[common].split(), 3)
    return choose_wording(rng, fresh, wordings), rng.choice(WORD_CATEGORIES[odd].split()), wrong


def opposite_question(rng: random.Random, material: OfflineMaterial, fresh: bool):
    """The opposite of a word among three words that are the opposite of others."""
    (word, right), *others = (pair.split() for pair in rng.sample(OPPOSITES.split(", "), 4))
    if rng.random() < 0.5:
        word, right = right, word
    wordings = (
        'What is the opposite of "X"?', 'Which word means the opposite of "X"?', 'Find the opposite of "X".',
        'Which word says the opposite of "X"?',
    )  # fmt: skip
    return choose_wording(rng, fresh, wordings).replace("X", word), right, [rng.choice(pair) for pair in others]


def sequence_question(rng: random.Random, material: OfflineMaterial, fresh: bool):
    """What comes right after or before a day, a month, a number or a letter."""
    name = rng.choice(list(SEQUENCES))
    members = SEQUENCES[name]
    place, step = rng.randrange(1, len(members) - 1), rng.choice((1, -1))
    wordings = (
        'Which NAME comes right SIDE "X"?', 'Which NAME is the next one SIDE "X"?', 'What is the NAME just SIDE "X"?',
        'Name the NAME SIDE "X".',
    )  # fmt: skip
    question = choose_wording(rng, fresh, wordings).replace("NAME", name).replace("X", members[place])
    wrong = rng.sample([member for i, member in enumerate(members) if i not in (place, place + step)], 3)
    return question.replace("SIDE", "after" if step == 1 else "before"), members[place + step], wrong


def pattern_question(rng: random.Random, material: OfflineMaterial, fresh: bool):
    """One word is written differently from the others, or begins with the letter that is asked for."""
    right, *wrong = rng.sample(material.words[:600], 4)
    kind = rng.choice(("digits", "capitals", "letter"))
    if kind == "digits":
        right, wrong = str(rng.randint(2, 999)), [word for word in wrong if word not in SEQUENCES["number"]]
        wordings = ("Which of these is a number?", "Which one is a number?", "Find the number.", "Which has digits?")
    elif kind == "capitals":
        right = right.upper()
        wordings = (
            "Which of these words is in capital letters?", "Which word is written in capital letters?",
            "Find the word in upper case.", "One word has only capital letters. Which one?",
        )  # fmt: skip
    else:
        wordings = (
            'Which of these words begins with the letter "X"?', 'Which word starts with "X"?',
            'Find the word that begins with "X".', 'The first letter is "X". Which word is it?',
        )  # fmt: skip
        wrong = [word for word in wrong if word[0] != right[0]]
    return choose_wording(rng, fresh, wordings).replace("X", right[0]), right, wrong


def alphabet_question(rng: random.Random, material: OfflineMaterial, fresh: bool):
    """Which of four words stands first in a dictionary."""
    right, *wrong = sorted(rng.sample(material.words[:600], 4))
    wordings = (
        "Which of these words comes first in a dictionary?", "Which word is first in the alphabet?",
        "Sort these words by the alphabet. Which one is first?", "Which word stands first in alphabetical order?",
    )  # fmt: skip
    return choose_wording(rng, fresh, wordings), right, [word for word in wrong if word[0] != right[0]]


def comparison_question(rng: random.Random, material: OfflineMaterial, fresh: bool):
    """The largest or the smallest of four numbers."""
    numbers = sorted(rng.sample(range(1, rng.choice((20, 100, 1000))), 4))
    name = rng.choice(("largest", "smallest"))
    wordings = (
        "Which of these numbers is the X?", "Which number is the X?", "Find the X number.", "What is the X number here?"
    )  # fmt: skip
    right = numbers.pop(-1 if name == "largest" else 0)
    return choose_wording(rng, fresh, wordings).replace("X", name), str(right), [str(number) for number in numbers]


def arithmetic_question(rng: random.Random, material: OfflineMaterial, fresh: bool):
    """A sum, a difference or a product, among its neighbours."""
    a, b = rng.randint(2, 20), rng.randint(2, 20)
    sign, right = rng.choice((("plus", a + b), ("minus", max(a, b) - min(a, b)), ("times", a * b)))
    a, b = (max(a, b), min(a, b)) if sign == "minus" else (a, b)
    near = [right + i for i in (-10, -3, -2, -1, 1, 2, 3, 10) if right + i >= 0]
    return f"What is {a} {sign} {b}?", str(right), [str(number) for number in rng.sample(near, 3)]


# %% [markdown]
# ### Multiple choice: sentences
# Wrong words are about as frequent as the right one, wrong sentences are real ones from elsewhere; without that,
# whoever knows which words are common would need no understanding.


# %% tags=["folded"]
def words_of_like_frequency(rng: random.Random, ranked: list[str], word: str, excluded, count: int) -> list[str]:
    """`count` words that stand near `word` in a list ordered by frequency; none from `excluded`."""
    place = ranked.index(word)
    near = [other for other in ranked[max(0, place - 40) : place + 40] if other not in excluded and other != word]
    return rng.sample(near, count)


def choose_content_word(rng: random.Random, ranked: list[str], sentence: str, skip: int = 0) -> str | None:
    """A word of the list that occurs once in a sentence, after its first `skip` words; None when there is none."""
    words = sentence.rstrip(".").split()
    return rng.choice([word for word in words[skip:] if word in ranked and words.count(word) == 1] or [None])


def word_recall_question(rng: random.Random, material: OfflineMaterial, fresh: bool):
    """Which word occurs in a sentence."""
    sentence, ranked = rng.choice(material.sentences), material.long_words
    word = choose_content_word(rng, ranked, sentence)
    if word is None:
        return None
    wrong = words_of_like_frequency(rng, ranked, word, plain_words(sentence), 3)
    wordings = ('Which of these words is in the sentence "X"?', 'Which word occurs in this sentence: "X"',
                'Read this: "X" Which word is in it?', 'Find the word that is in "X"')  # fmt: skip
    return choose_wording(rng, fresh, wordings).replace("X", sentence), word, wrong


def missing_word_question(rng: random.Random, material: OfflineMaterial, fresh: bool):
    """Which word was taken out of a sentence."""
    sentence, ranked = rng.choice(material.sentences), material.long_words
    word = choose_content_word(rng, ranked, sentence, skip=2)
    if word is None:
        return None
    wrong = words_of_like_frequency(rng, ranked, word, plain_words(sentence), 3)
    gap = re.sub(rf"(?<= ){word}(?=[ ,;:.])", "___", sentence)
    wordings = ('Which word is missing in "X"?', 'Fill the gap: "X"', 'Which word fits here: "X"', 'Complete this: "X"')
    return choose_wording(rng, fresh, wordings).replace("X", gap), word, wrong


def next_sentence_question(rng: random.Random, material: OfflineMaterial, fresh: bool):
    """Which sentence follows another one."""
    if len(material.pairs) < 4:
        return None
    (sentence, right), *others = rng.sample(material.pairs, 4)
    wordings = ('Which sentence comes after "X"?', 'What is said next after "X"', 'Continue: "X"')
    return choose_wording(rng, fresh, wordings).replace("X", sentence), right, [following for _, following in others]


# %% [markdown]
# ### `offline_questions`
# Easy questions can be answered by looking at the choices or at a short sentence; hard ones ask for some knowledge of
# the language, or for arithmetic, and are mostly beyond a model of this size.

# %% tags=["folded"]
EASY_QUESTIONS = {
    "categories": category_question, "patterns": pattern_question, "opposites": opposite_question,
    "word_recall": word_recall_question,
}  # fmt: skip
HARD_QUESTIONS = {
    "missing_word": missing_word_question, "next_sentence": next_sentence_question, "alphabet": alphabet_question,
    "number_comparison": comparison_question, "arithmetic": arithmetic_question, "odd_one_out": odd_one_out_question,
    "sequences": sequence_question,
}  # fmt: skip


@dataclass(frozen=True)
class OfflineQuestion:
    """A question with four choices; `answer` is the index of the right one."""

    subject: str
    question: str
    choices: tuple[str, ...]
    answer: int


def offline_questions(
    name: str, kinds: dict, count: int, material: OfflineMaterial, taken: set, asked: set | None = None
) -> list[OfflineQuestion]:
    """Up to `count` different questions, the right answer equally often in each place.

    name: seeds the draws. taken: (question, sorted choices) of all questions so far; grows. asked: question texts of
    the training sets, none of which is used again; None means that this is a training set.
    """
    rng, questions = random.Random(name), []
    for _ in range(20 * count):
        if len(questions) == count:
            break
        subject = rng.choice(list(kinds))
        drawn = kinds[subject](rng, material, asked is not None)
        if drawn is None:
            continue
        question, right, wrong = drawn
        key = (question, tuple(sorted([right, *wrong])))
        if len({right, *wrong}) != 4 or key in taken or (asked is not None and question in asked):
            continue
        taken.add(key)
        place = len(questions) % 4
        questions.append(OfflineQuestion(subject, question, (*wrong[:place], right, *wrong[place:]), place))
    rng.shuffle(questions)
    return questions


# %% [markdown]
# ### Requests about a few words
# The bread and butter of the conversations: do something with these words. What comes out can be checked by eye, and
# copying words from the question is the first thing a small model learns.

# %% tags=["folded"]
# Wordings, the same as a second question about the same words, the reply.
TEXT_REQUESTS = (
    (("Repeat after me: X", "Please repeat: X", "Say this again: X"), "Please repeat it.", " ".join),
    (("Write this in capital letters: X", "Change this to upper case: X"), "And in capital letters?",
     lambda words: " ".join(words).upper()),
    (("Write these words in reverse order: X", "Say these words backwards: X"), "And in reverse order?",
     lambda words: " ".join(reversed(words))),
    (('What is the first word of "X"?', "Give me the first word of this: X"), "What is its first word?",
     lambda words: f'The first word is "{words[0]}".'),
    (('What is the last word of "X"?', "Give me the last word of this: X"), "What is its last word?",
     lambda words: f'The last word is "{words[-1]}".'),
    (('How many words are in "X"?', "Count the words: X"), "How many words are there?",
     lambda words: ", ".join(f"{i} {word}" for i, word in enumerate(words, 1)) + f": there are {len(words)} words."),
    (('Which word is the longest in "X"?', "Find the longest word: X"), "Which word is the longest?",
     lambda words: f'The longest word is "{max(words, key=len)}".'),
    (("Write the first letter of each word: X", 'What are the first letters of the words in "X"?'),
     "What are the first letters?", lambda words: " ".join(word[0] for word in words)),
    (("Put these words in alphabetical order: X", "Sort these words: X"), "And in alphabetical order?",
     lambda words: " ".join(sorted(words))),
)  # fmt: skip
SYSTEM_MESSAGES = (
    ("Answer in capital letters.", str.upper),
    ("Begin every answer with: Of course.", lambda reply: f"Of course. {reply}"),
    ("End every answer with: Have a nice day.", lambda reply: f"{reply} Have a nice day."),
    ("You are a helpful assistant.", lambda reply: reply),
)


def text_conversation(rng: random.Random, material: OfflineMaterial, fresh: bool) -> list[dict]:
    """One to three requests about the same three to seven words, sometimes under a system message."""
    words = []
    while len(words) < 3 or sum(len(word) == max(map(len, words)) for word in words) > 1:  # one word is the longest
        words = plain_words(rng.choice(material.sentences))
        start = rng.randrange(max(1, len(words) - 3))
        words = list(dict.fromkeys(words[start : start + rng.randint(3, 7)]))
    turns = []
    for wordings, follow_up, reply in rng.sample(TEXT_REQUESTS, rng.choice((1, 1, 1, 2, 3))):
        question = follow_up if turns else rng.choice(wordings).replace("X", " ".join(words))
        turns += [question, reply(words)]
    if rng.random() < 0.75:
        return dialogue(*turns)
    system, change = rng.choice(SYSTEM_MESSAGES)
    turns[1::2] = [change(reply) for reply in turns[1::2]]
    return [{"role": "system", "content": system}, *dialogue(*turns)]


# %% [markdown]
# ### Conversations about the text
# To go on with a sentence, and to say what a documented thing does and where it belongs. Only a corpus of
# documentation has the second kind.


# %% tags=["folded"]
def continuation_conversation(rng: random.Random, material: OfflineMaterial, fresh: bool) -> list[dict]:
    """The second half of a sentence, or the sentence after it."""
    if material.pairs and rng.random() < 0.3:
        sentence, following = rng.choice(material.pairs)
        wording = rng.choice(("What comes after this sentence? X", "Continue this text: X"))
        return dialogue(wording.replace("X", sentence), following)
    words = rng.choice(material.sentences).split()
    cut = rng.randint(3, len(words) - 2)
    wording = rng.choice(("Continue this sentence: X", "Complete the sentence: X", "How does this go on? X"))
    return dialogue(wording.replace("X", " ".join(words[:cut])), " ".join(words[cut:]))


def documentation_conversation(rng: random.Random, material: OfflineMaterial, fresh: bool) -> list[dict]:
    """What a documented name does, or which module and package it belongs to."""
    if not material.entries:
        return continuation_conversation(rng, material, fresh)
    module, name, sentence = rng.choice(material.entries)
    what = (rng.choice((f"What does {name} in {module} do?", f"What is {name} in {module}?",
                        f"Describe {name} from {module}.")), sentence)  # fmt: skip
    where = (f'Which module is this about? "{name}: {sentence}"', f"It is about {module}.")
    package = ("And which package is that?", f"It is part of {module.split('.')[0]}.")
    return dialogue(*rng.choice((what, what, where, where + package)))


# %% [markdown]
# ### Small talk, facts and sums
# A chat model is asked who it is, what things are, and what twelve and seven make. The facts are few and plain. They
# are not there to teach the world, but to show what an answer looks like.

# %% tags=["folded"]
PLAIN_FACTS = {
    "a prime number": "A prime number is a whole number above one that only one and itself divide.",
    "an even number": "An even number is a whole number that two divides without a rest.",
    "a triangle": "A triangle is a shape with three straight sides and three corners.",
    "a circle": "A circle is a round line whose points all have the same distance from the center.",
    "a square": "A square is a shape with four equal sides and four right angles.",
    "a week": "A week is a period of seven days.",
    "a year": "A year is the time that the earth takes to go around the sun, about 365 days.",
    "a decade": "A decade is a period of ten years.",
    "a century": "A century is a period of one hundred years.",
    "a computer": "A computer is a machine that stores and processes data by following a program.",
    "a program": "A program is a list of instructions that a computer can follow.",
    "a file": "A file is a named collection of data on a computer.",
    "a variable": "A variable is a name that stands for a value in a program.",
    "a function": "A function is a piece of a program that takes some values and returns a result.",
    "a loop": "A loop is a part of a program that is repeated.",
    "a list": "A list is a collection of items in a fixed order.",
    "a bug": "A bug is a mistake in a program.",
    "an algorithm": "An algorithm is a step by step method to solve a problem.",
    "a byte": "A byte is a unit of data that consists of eight bits.",
    "a bit": "A bit is the smallest unit of data; it is zero or one.",
    "a matrix": "A matrix is a table of numbers in rows and columns.",
    "a vector": "A vector is a quantity that has a size and a direction.",
    "a graph": "A graph is a set of nodes that are connected by edges.",
    "a string": "A string is a sequence of characters.",
    "a library": "A library is a collection of books, or of code that programs can use.",
    "a dictionary": "A dictionary is a book that explains words; in Python it maps keys to values.",
    "a verb": "A verb is a word for an action or a state, such as run or be.",
    "a noun": "A noun is a word for a person, a place or a thing.",
    "a sentence": "A sentence is a group of words that says something complete.",
    "a vowel": "A vowel is one of the letters a, e, i, o and u.",
    "an island": "An island is a piece of land with water all around it.",
    "a river": "A river is a large stream of water that flows to a lake or to the sea.",
    "a mountain": "A mountain is a very high piece of land.",
    "a desert": "A desert is a large area of land with hardly any rain.",
    "the moon": "The moon is the body that goes around the earth about once a month.",
    "the sun": "The sun is the star that the earth goes around.",
    "ice": "Ice is water that has become solid because it is cold.",
    "steam": "Steam is water that has become a gas because it is hot.",
    "a doctor": "A doctor is a person who treats people when they are ill.",
    "a teacher": "A teacher is a person who helps others to learn.",
    "a bird": "A bird is an animal with feathers, two wings and two legs.",
    "a fish": "A fish is an animal that lives in water and breathes with gills.",
    "a tree": "A tree is a tall plant with a trunk made of wood.",
    "Python": "Python is a programming language that is known for code that is easy to read.",
    "a language model": "A language model is a program that predicts the next piece of a text.",
}


def fact_conversation(rng: random.Random, material: OfflineMaterial, fresh: bool) -> list[dict]:
    """What something is, in one sentence; sometimes a second one."""
    wordings = (
        "Can you explain to me what X is?", "What is X?", "Explain what X is.", "Tell me what X is.",
        "Please tell me in one sentence what X is.", "I would like to know what X is.",
    )  # fmt: skip
    names = rng.sample(list(PLAIN_FACTS), rng.choice((1, 1, 2)))
    turns = [choose_wording(rng, fresh, wordings).replace("X", names[0]), PLAIN_FACTS[names[0]]]
    for name in names[1:]:
        turns += [f"And what is {name}?", PLAIN_FACTS[name]]
    return dialogue(*turns)


def greeting_conversation(rng: random.Random, material: OfflineMaterial, fresh: bool) -> list[dict]:
    """A greeting with a name, which the assistant may be asked about afterwards."""
    name = rng.choice(STORY_PEOPLE)[0]
    wordings = (
        "Hello there! My name is X.", "Hello, I am X.", "Hi, my name is X.", "Good morning! I am X.", "Hey, X here.",
        "Hello! You can call me X.", "Good evening, my name is X.", "Hi there, this is X.",
    )  # fmt: skip
    turns = [choose_wording(rng, fresh, wordings).replace("X", name), f"Hello {name}! How can I help you?"]
    if rng.random() < 0.4:
        question, reply = rng.choice((("What is my name?", "Your name is X."), ("Thank you!", "You are welcome, X!")))
        turns += [question, reply.replace("X", name)]
    return dialogue(*turns)


def sum_conversation(rng: random.Random, material: OfflineMaterial, fresh: bool) -> list[dict]:
    """A small sum or difference, or the larger of two numbers."""
    a, b = rng.sample(range(1, 31), 2)
    large, small = max(a, b), min(a, b)
    return dialogue(*rng.choice((
        (f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."),
        (f"What is {large} minus {small}?", f"{large} minus {small} is {large - small}."),
        (f"Which is larger, {a} or {b}?", f"{large} is larger than {small}."),
        (f"Which number comes after {a}?", f"{a + 1} comes after {a}."),
    )))  # fmt: skip


def function_conversation(rng: random.Random, material: OfflineMaterial, fresh: bool) -> list[dict]:
    """A small Python function. The functions of the test are not among them."""
    return dialogue(*rng.choice(offline_function_lessons()))


# %% [markdown]
# ### `offline_conversations`
# The mixture. Nothing comes twice, and a test conversation never opens as a training conversation does.

# %% tags=["folded"]
# What share of the conversations each kind has, in percent.
CONVERSATION_SHARES = {
    text_conversation: 46, continuation_conversation: 13, documentation_conversation: 12, function_conversation: 11,
    fact_conversation: 8, sum_conversation: 6, greeting_conversation: 4,
}  # fmt: skip


def opening_of(conversation: list[dict]) -> str:
    """What the user says first."""
    return next(message["content"] for message in conversation if message["role"] == "user")


def offline_conversations(
    name: str, count: int, material: OfflineMaterial, opened: set | None = None
) -> list[list[dict]]:
    """Up to `count` conversations that all open differently.

    name: seeds the draws. opened: first user messages of the training set, none of which is used again; None means
    that this is the training set.
    """
    rng, conversations = random.Random(name), {}
    for _ in range(20 * count):
        if len(conversations) == count:
            break
        kind = rng.choices(list(CONVERSATION_SHARES), CONVERSATION_SHARES.values())[0]
        conversation = kind(rng, material, opened is not None)
        if opened is None or opening_of(conversation) not in opened:
            conversations.setdefault(opening_of(conversation), conversation)
    return list(conversations.values())


# %% [markdown]
# ### Files
# The layout that the hub loader keeps its downloads in: a folder for each split, parquet files, and a manifest that is
# written last. Columns and types are those of the originals, down to the key `train` under which one copy of the MMLU
# training questions is nested.

# %% tags=["folded"]
CONVERSATION_SCHEMA = pa.schema({
    "messages": pa.list_(pa.struct({"content": pa.string(), "role": pa.string()})), "source": pa.string()
})  # fmt: skip
MMLU_FIELDS = {"question": pa.string(), "subject": pa.string(), "choices": pa.list_(pa.string()), "answer": pa.int64()}
ARC_SCHEMA = pa.schema({
    "id": pa.string(), "question": pa.string(),
    "choices": pa.struct({"text": pa.list_(pa.string()), "label": pa.list_(pa.string())}), "answerKey": pa.string(),
})  # fmt: skip
GSM8K_SCHEMA = pa.schema({"question": pa.string(), "answer": pa.string()})
HUMANEVAL_SCHEMA = pa.schema(
    dict.fromkeys(("task_id", "prompt", "canonical_solution", "test", "entry_point"), pa.string())
)


def write_hub_split(data_dir, repo: str, subset: str, split: str, rows: list[dict], schema: pa.Schema) -> None:
    """Write rows as <repo with -- for />/<subset>/<split>/00000.parquet and a manifest.json."""
    folder = Path(data_dir) / repo.replace("/", "--") / subset / split
    with atomic_path(folder / "00000.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema), temporary, compression="zstd")
    size = (folder / "00000.parquet").stat().st_size
    files = [{"name": "00000.parquet", "bytes": size, "rows": len(rows)}]
    manifest = {"repo": repo, "subset": subset, "split": split, "files": files, "rows": len(rows)}
    write_atomic(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")


def mmlu_row(question: OfflineQuestion) -> dict:
    return {"question": question.question, "subject": question.subject, "choices": list(question.choices),
            "answer": question.answer}  # fmt: skip


def arc_row(question: OfflineQuestion, index: int) -> dict:
    """Labels are A to D; in every fortieth row 1 to 4, as in some rows of the original."""
    labels = list("1234" if index % 40 == 39 else "ABCD")
    choices = {"text": list(question.choices), "label": labels}
    return {"id": f"offline_{question.subject}_{index}", "question": question.question, "choices": choices,
            "answerKey": labels[question.answer]}  # fmt: skip


# %% [markdown]
# ### `prepare_offline_folder`
# The folder is built under another name and renamed when all of it is there, so whoever finds it finds it complete.


# %% tags=["folded"]
def offline_folder_is_complete(folder: Path, fingerprint: str) -> bool:
    """Whether a finished build with these inputs lies there, with every file in its size."""
    try:
        record = json.loads((folder / "complete.json").read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in record["file_bytes"]}
        return record["fingerprint"] == fingerprint and sizes == record["file_bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def prepare_offline_folder(name: str, inputs: dict, build) -> str:
    """The path of <base>/<name>, filled by build(folder) unless that was done with the same inputs before.

    inputs: JSON values on which the content depends. Every process may call it; one does the work.
    """
    folder, fingerprint = Path(get_base_dir()) / name, fingerprint_of(inputs)
    with FileLock(f"{folder}.lock"):
        if not offline_folder_is_complete(folder, fingerprint):
            building = folder.with_name(f".{name}.building")
            shutil.rmtree(building, ignore_errors=True)  # of a run that was killed
            building.mkdir()
            build(building)
            files = sorted(path for path in building.rglob("*") if path.is_file())
            sizes = {path.relative_to(building).as_posix(): path.stat().st_size for path in files}
            record = {"fingerprint": fingerprint, "file_bytes": sizes}
            write_atomic(building / "complete.json", json.dumps(record, indent=1) + "\n")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(building, folder)
            print0(f"{name}: {len(sizes)} files, {sum(sizes.values()) / 1e6:.1f} MB, written to {folder}")
    return str(folder)


# %% [markdown]
# ### `prepare_offline_tasks`
# The one call that the pipeline makes. It takes a few seconds, most of them for drawing questions.

# %% tags=["folded"]
# Examples of each split. A small corpus may not have enough text for all of them.
OFFLINE_SIZES = {
    "smoltalk": {"train": 5000, "test": 400},
    "mmlu": {"auxiliary_train": 2400, "validation": 120, "dev": 40, "test": 400},
    "ARC-Easy": {"train": 1600, "validation": 150, "test": 400},
    "ARC-Challenge": {"train": 900, "validation": 100, "test": 300},
    "gsm8k": {"train": 4000, "test": 300},
}
OFFLINE_WORDS = 3000

OFFLINE_TASKS_README = """\
Questions and conversations made by a program, to fine-tune and test chat models without a network.

Each folder has the layout, columns and split names of the data set on the hub that it stands in for, and none of its
content: the questions here are fewer and much easier, and scores on them cannot be compared with scores on those.
Training sets use training text of the corpus, the other splits its validation text.

HuggingFaceTB--smol-smoltalk   general conversations: requests about a few words, continuations, facts, small functions
cais--mmlu                     multiple choice of all kinds; the kind is the subject
allenai--ai2_arc               multiple choice; ARC-Easy the plainer kinds, ARC-Challenge the others
openai--gsm8k                  word problems with calculator calls
openai--openai_humaneval       Python functions with tests; half resemble functions in the conversations
identity_conversations.jsonl   who the assistant is, one JSON array of messages a line
words_alpha.txt                the most frequent words of 3 to 10 letters, for spelling

The sentences come from the corpus "{corpus}"; the licences of its sources apply to them.
"""


def build_offline_tasks(corpus: Corpus, folder: Path) -> None:
    """Write every file of the offline tasks into `folder`."""
    train = read_material(corpus, "train")
    val = read_material(corpus, "val", known=train)
    repo, sizes = "HuggingFaceTB/smol-smoltalk", OFFLINE_SIZES["smoltalk"]
    conversations = offline_conversations("smoltalk train", sizes["train"], train)
    opened = set(map(opening_of, conversations))
    splits = {"train": conversations, "test": offline_conversations("smoltalk test", sizes["test"], val, opened)}
    for split, conversations in splits.items():
        rows = [{"messages": conversation, "source": "offline"} for conversation in conversations]
        write_hub_split(folder, repo, "default", split, rows, CONVERSATION_SCHEMA)

    taken, questions = set(), {}
    kinds = {"mmlu": EASY_QUESTIONS | HARD_QUESTIONS, "ARC-Easy": EASY_QUESTIONS, "ARC-Challenge": HARD_QUESTIONS}
    for name in kinds:
        split = next(iter(OFFLINE_SIZES[name]))  # the one to train on
        drawn = offline_questions(f"{name} {split}", kinds[name], OFFLINE_SIZES[name][split], train, taken)
        questions[name, split] = drawn
    asked = {question.question for drawn in questions.values() for question in drawn}
    for name in kinds:
        for split, count in list(OFFLINE_SIZES[name].items())[1:]:
            questions[name, split] = offline_questions(f"{name} {split}", kinds[name], count, val, taken, asked)
    for (name, split), drawn in questions.items():
        if name == "mmlu":
            rows = list(map(mmlu_row, drawn))
            write_hub_split(folder, "cais/mmlu", "all", split, rows, pa.schema(MMLU_FIELDS))
            if split == "auxiliary_train":
                nested = pa.schema({"train": pa.struct(MMLU_FIELDS)})
                write_hub_split(folder, "cais/mmlu", split, "train", [{"train": row} for row in rows], nested)
        else:
            rows = [arc_row(question, index) for index, question in enumerate(drawn)]
            write_hub_split(folder, "allenai/ai2_arc", name, split, rows, ARC_SCHEMA)

    sizes = OFFLINE_SIZES["gsm8k"]
    problems = offline_word_problems(sum(sizes.values()))
    for split, rows in (("train", problems[: sizes["train"]]), ("test", problems[sizes["train"] :])):
        write_hub_split(folder, "openai/gsm8k", "main", split, rows, GSM8K_SCHEMA)
    functions = offline_function_tests()
    write_hub_split(folder, "openai/openai_humaneval", "openai_humaneval", "test", functions, HUMANEVAL_SCHEMA)

    lines = [json.dumps(conversation) for conversation in offline_identity_conversations()]
    write_atomic(folder / "identity_conversations.jsonl", "\n".join(lines) + "\n")
    write_atomic(folder / "words_alpha.txt", "\n".join(sorted(train.words[:OFFLINE_WORDS])) + "\n")
    write_atomic(folder / "README.txt", OFFLINE_TASKS_README.format(corpus=corpus.name))


def prepare_offline_tasks(corpus: Corpus) -> str:
    """Write the offline twin of every data set of spec section 15 into <base>/offline_tasks, once; returns that path.

    The same corpus gives the same bytes. Raises UserError when the corpus has next to no English sentences.
    """
    inputs = dict(corpus=corpus.fingerprint(), rules=OFFLINE_TASK_RULES, sizes=OFFLINE_SIZES, words=OFFLINE_WORDS)
    return prepare_offline_folder("offline_tasks", inputs, lambda folder: build_offline_tasks(corpus, folder))
