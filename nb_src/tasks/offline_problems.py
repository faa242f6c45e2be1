# %% [markdown]
# ## Problems that need no text
#
# Some of what a chat model practises can be made from nothing: word problems, small Python functions, and the answers
# to "who are you?". This chapter makes them in the formats of the public sets (GSM8K, HumanEval, the identity file),
# so that a machine without a network has something to fine-tune on and to be tested with. They are far easier than
# the originals. A model that four minutes have made can learn which numbers of a story go into the calculator; it
# cannot learn to reason, and a test on which everything scores zero measures nothing.

# %%
import random
from dataclasses import dataclass
from functools import cache

# %% [markdown]
# ### Calculations
# GSM8K writes each step as `12+5 = <<12+5=17>>17`: what stands between the angle brackets becomes a call of the
# calculator. The model never has to add; it has to say what is to be added.

# %% tags=["folded"]
STORY_PEOPLE = tuple(
    (name, "she" if i < 20 else "he")
    for i, name in enumerate(
        "Anna Beth Clara Diana Emma Fiona Grace Hannah Irene Julia Kate Laura Maria Nina Olivia Paula Rosa Sarah Tina "
        "Wendy Adam Ben Carl David Eric Frank George Henry Ivan Jack Kevin Leo Mark Noah Oscar Paul Robert Sam Tom "
        "Victor".split()
    )
)
STORY_THINGS = (
    "apples marbles stickers pencils books coins cards shells stamps buttons cookies balloons flowers stones oranges "
    "postcards candles ribbons badges beads".split()
)
STORY_GOODS = "pen cup ball hat book toy lamp plate bag scarf kite puzzle".split()


def calculation(left: int, operation: str, right: int) -> tuple[str, int]:
    """("12+5 = <<12+5=17>>17", 17): one step with its calculator call, and its value. Division must come out even."""
    values = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}
    if operation == "/" and left % right:
        raise ValueError(f"{left}/{right} is not a whole number")
    value = values[operation]
    return f"{left}{operation}{right} = <<{left}{operation}{right}={value}>>{value}", value


def two_people(rng: random.Random) -> tuple[str, str, str]:
    """(name, "she" or "he", name of somebody else)."""
    (name, pronoun), (friend, _) = rng.sample(STORY_PEOPLE, 2)
    return name, pronoun, friend


# %% [markdown]
# ### The stories
# Each function draws one story and returns the question, the steps, and the answer. The first is a chain of one to
# three events, which gives most of the variety; the others each bring a situation of their own.


# %% tags=["folded"]
def story_of_events(rng: random.Random):
    """Somebody has some things; one to three times some are added or taken away."""
    name, pronoun, friend = two_people(rng)
    things = rng.choice(STORY_THINGS)
    count = rng.randint(5, 40)
    sentences, steps = [f"{name} has {count} {things}."], []
    for i in range(rng.choice((1, 2, 2, 3))):
        subject = name if i == 0 and rng.random() < 0.3 else pronoun.capitalize()
        if count > 6 and rng.random() < 0.5:
            number = rng.randint(2, min(count - 2, 20))
            verb, gerund, rest = rng.choice(
                (("gives", "giving", f" to {friend}"), ("loses", "losing", ""), ("sells", "selling", ""))
            )
            sentences.append(f"{subject} {verb} {number} {'of them ' * (rest == '')}{rest.strip()}".rstrip() + ".")
            text, count = calculation(count, "-", number)
            steps.append(f"After {gerund} {number}{rest}, {name} has {text} {things}.")
        else:
            number = rng.randint(2, 30)
            verb, gerund, rest = rng.choice(
                (("buys", "buying", ""), ("finds", "finding", ""), ("gets", "getting", f" from {friend}"))
            )
            sentences.append(f"{subject} {verb} {number} more{rest}.")
            text, count = calculation(count, "+", number)
            steps.append(f"After {gerund} {number} more{rest}, {name} has {text} {things}.")
    return " ".join(sentences) + f" How many {things} does {name} have now?", steps, count


def story_of_shopping(rng: random.Random):
    """Several things of one price, paid with a large bill."""
    name, _, _ = two_people(rng)
    thing, price, number = rng.choice(STORY_GOODS), rng.randint(2, 12), rng.randint(2, 8)
    bill = min(note for note in (20, 50, 100) if note > price * number)
    cost, total = calculation(price, "*", number)
    change, answer = calculation(bill, "-", total)
    if rng.random() < 0.3:
        question = f"One {thing} costs ${price}. How many dollars does {name} pay for {number} of them?"
        return question, [f"{name} pays {cost} dollars."], total
    question = (
        f"One {thing} costs ${price}. {name} buys {number} of them and pays with a ${bill} bill. How many dollars does "
        f"{name} get back?"
    )
    return question, [f"The price of {number} is {cost} dollars.", f"{name} gets back {change} dollars."], answer


def story_of_comparison(rng: random.Random):
    """One has several times as many as another, or half as many."""
    name, _, friend = two_people(rng)
    things, count = rng.choice(STORY_THINGS), rng.randint(3, 25)
    words, factor = rng.choice((("twice", 2), ("three times", 3), ("four times", 4), ("half", -2)))
    count = 2 * count if factor < 0 else count
    text, other = calculation(count, "/" if factor < 0 else "*", abs(factor))
    question, steps = f"{name} has {count} {things}. {friend} has {words} as many.", [f"{friend} has {text} {things}."]
    if rng.random() < 0.3:
        return f"{question} How many {things} does {friend} have?", steps, other
    text, both = calculation(count, "+", other)
    steps.append(f"Together they have {text} {things}.")
    return f"{question} How many {things} do they have together?", steps, both


def story_of_difference(rng: random.Random):
    """How many more one has than another."""
    name, _, friend = two_people(rng)
    things, count, more = rng.choice(STORY_THINGS), rng.randint(2, 40), rng.randint(2, 30)
    text, answer = calculation(count + more, "-", count)
    question = f"{name} has {count + more} {things} and {friend} has {count}. How many more {things} does {name} have?"
    return question, [f"{name} has {text} more {things}."], answer


def story_of_rows(rng: random.Random):
    """Rows of chairs, some of them taken."""
    rows, chairs = rng.randint(3, 12), rng.randint(4, 15)
    taken = rng.randint(2, rows * chairs - 2)
    text, total = calculation(rows, "*", chairs)
    rest, answer = calculation(total, "-", taken)
    place = rng.choice(("hall", "cinema", "theater", "classroom"))
    question = f"A {place} has {rows} rows of {chairs} chairs. {taken} chairs are taken. How many chairs are free?"
    return question, [f"There are {text} chairs.", f"{rest} chairs are free."], answer


def story_of_reading(rng: random.Random):
    """The same number of pages each day, for days or weeks."""
    name, _, _ = two_people(rng)
    pages, number = rng.randint(4, 30), rng.randint(2, 9)
    if rng.random() < 0.4:
        text, answer = calculation(pages, "*", number)
        question = f"{name} reads {pages} pages every day. How many pages does {name} read in {number} days?"
        return question, [f"{name} reads {text} pages in {number} days."], answer
    week, days = calculation(number, "*", 7)
    text, answer = calculation(pages, "*", days)
    question = f"{name} reads {pages} pages every day. How many pages does {name} read in {number} weeks?"
    return question, [f"There are {week} days in {number} weeks.", f"{name} reads {text} pages."], answer


def story_of_wages(rng: random.Random):
    """An hourly wage, and perhaps some of it spent."""
    name, pronoun, _ = two_people(rng)
    wage, hours, days = rng.randint(8, 20), rng.randint(2, 8), rng.randint(2, 6)
    text, day = calculation(wage, "*", hours)
    question = f"{name} earns ${wage} an hour and works {hours} hours a day for {days} days."
    steps = [f"{name} earns {text} dollars a day."]
    text, total = calculation(day, "*", days)
    steps.append(f"In {days} days {name} earns {text} dollars.")
    if rng.random() < 0.5:
        return f"{question} How many dollars does {name} earn?", steps, total
    spent = rng.randint(5, total - 5)
    text, left = calculation(total, "-", spent)
    question += f" Then {pronoun} spends ${spent}. How many dollars does {name} have left?"
    return question, [*steps, f"{name} has {text} dollars left."], left


def story_of_sharing(rng: random.Random):
    """Things shared equally, and perhaps some of a share given away."""
    name, _, _ = two_people(rng)
    things, children, each = rng.choice(STORY_THINGS), rng.randint(2, 9), rng.randint(3, 15)
    text, share = calculation(children * each, "/", children)
    question = f"{name} shares {children * each} {things} equally among {children} children."
    steps = [f"Each child gets {text} {things}."]
    if rng.random() < 0.5:
        return f"{question} How many {things} does each child get?", steps, share
    given = rng.randint(1, each - 2)
    text, left = calculation(share, "-", given)
    question += f" One child then gives away {given}. How many {things} does that child have left?"
    return question, [*steps, f"That child has {text} {things} left."], left


def story_of_ages(rng: random.Random):
    """Ages, now and in some years."""
    name, _, friend = two_people(rng)
    age, older, years = rng.randint(3, 40), rng.randint(2, 15), rng.randint(2, 12)
    text, now = calculation(age, "+", older)
    later, answer = calculation(now, "+", years)
    question = f"{name} is {age} years old. {friend} is {older} years older. How old will {friend} be in {years} years?"
    return question, [f"{friend} is {text} years old.", f"In {years} years {friend} will be {later} years old."], answer


def story_of_distance(rng: random.Random):
    """A speed, a time, and some distance more."""
    vehicle = rng.choice(("bus", "train", "car", "truck", "ship"))
    speed, hours, more = rng.randint(10, 60), rng.randint(2, 6), rng.randint(5, 50)
    text, first = calculation(speed, "*", hours)
    total, answer = calculation(first, "+", more)
    question = (
        f"A {vehicle} travels {speed} miles an hour for {hours} hours, and then {more} miles more. How many miles does "
        "it travel?"
    )
    return question, [f"In {hours} hours it travels {text} miles.", f"It travels {total} miles in all."], answer


def story_of_fences(rng: random.Random):
    """The perimeter of a rectangle."""
    place = rng.choice(("garden", "field", "yard", "park"))
    width = rng.randint(3, 40)
    length = width + rng.randint(1, 40)
    text, half = calculation(length, "+", width)
    around, answer = calculation(half, "*", 2)
    question = f"A {place} is {length} meters long and {width} meters wide. How many meters is the fence around it?"
    return question, [f"Length and width together are {text} meters.", f"The fence is {around} meters."], answer


def story_of_tickets(rng: random.Random):
    """Two kinds of tickets with their own prices."""
    adults, children = rng.randint(2, 9), rng.randint(2, 9)
    child_price = rng.randint(2, 9)
    adult_price = child_price + rng.randint(1, 9)
    first, adult_cost = calculation(adults, "*", adult_price)
    second, child_cost = calculation(children, "*", child_price)
    both, answer = calculation(adult_cost, "+", child_cost)
    place = rng.choice(("museum", "zoo", "circus", "pool", "concert"))
    question = (
        f"A ticket for the {place} costs ${adult_price} for an adult and ${child_price} for a child. How many dollars "
        f"do {adults} adults and {children} children pay?"
    )
    steps = [
        f"The adults pay {first} dollars.", f"The children pay {second} dollars.", f"Together they pay {both} dollars."
    ]  # fmt: skip
    return question, steps, answer


# %% [markdown]
# ### `offline_word_problems`
# A third of the problems are chains of events; the other stories share the rest. No question comes twice, so a test
# set cut from the end of the list has no question in common with the training set before it.

# %% tags=["folded"]
STORIES = (
    story_of_shopping, story_of_comparison, story_of_difference, story_of_rows, story_of_reading, story_of_wages,
    story_of_sharing, story_of_ages, story_of_distance, story_of_fences, story_of_tickets,
)  # fmt: skip


def offline_word_problems(count: int) -> list[dict]:
    """`count` different rows {question, answer} in the format of GSM8K."""
    rng, rows = random.Random("word problems"), {}
    while len(rows) < count:
        story = story_of_events if rng.random() < 1 / 3 else rng.choice(STORIES)
        question, steps, answer = story(rng)
        rows.setdefault(question, "\n".join([*steps, f"#### {answer}"]))
    return [{"question": question, "answer": answer} for question, answer in rows.items()]


# %% [markdown]
# ### Functions to learn from
# Families of one-line functions: the same thing with another number, letter or word in it. Training sees most
# members of a family, the test set has others, so a test can be passed by whoever understood the docstring and
# cannot be passed by reciting.

# %% tags=["folded"]
TAUGHT_NUMBERS = (2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 15, 20, 25, 50, 100)
TAUGHT_LETTERS = tuple("abcdfghijlmnopqrsuvwxyz")  # e, k and t are for the test
TAUGHT_WORDS = ("cat", "dog", "sun", "hello", "blue", "yes", "tree", "book", "star", "home", "rain", "good")

# Name, arguments, what it does, the expression it returns, what X stands for.
FUNCTION_FAMILIES = (
    ("add_X", "n", "Return n plus X.", "n + X", TAUGHT_NUMBERS),
    ("subtract_X", "n", "Return n minus X.", "n - X", TAUGHT_NUMBERS),
    ("multiply_by_X", "n", "Return n times X.", "n * X", TAUGHT_NUMBERS),
    ("is_greater_than_X", "n", "Return True if n is greater than X.", "n > X", TAUGHT_NUMBERS),
    ("is_less_than_X", "n", "Return True if n is less than X.", "n < X", TAUGHT_NUMBERS),
    ("is_divisible_by_X", "n", "Return True if n can be divided by X.", "n % X == 0", TAUGHT_NUMBERS),
    ("first_X", "items", "Return the first X items of a list.", "items[:X]", TAUGHT_NUMBERS),
    ("last_X", "items", "Return the last X items of a list.", "items[-X:]", TAUGHT_NUMBERS),
    ("repeat_X_times", "text", "Return the text repeated X times.", "text * X", TAUGHT_NUMBERS),
    ("every_X", "items", "Return every item whose position is a multiple of X.", "items[::X]", TAUGHT_NUMBERS),
    ("above_X", "numbers", "Return the numbers above X.", "[n for n in numbers if n > X]", TAUGHT_NUMBERS),
    ("count_X", "text", "Return how often the letter X occurs in the text.", 'text.count("X")', TAUGHT_LETTERS),
    ("starts_with_X", "text", "Return True if the text starts with X.", 'text.startswith("X")', TAUGHT_LETTERS),
    ("ends_with_X", "text", "Return True if the text ends with X.", 'text.endswith("X")', TAUGHT_LETTERS),
    ("remove_X", "text", "Return the text without the letter X.", 'text.replace("X", "")', TAUGHT_LETTERS),
    ("add_X_before", "text", "Return the text with X before it.", '"X" + text', TAUGHT_WORDS),
    ("contains_X", "text", "Return True if the text contains X.", '"X" in text', TAUGHT_WORDS),
)
SINGLE_FUNCTIONS = (
    ("add", "a, b", "Return the sum of a and b.", "a + b"),
    ("subtract", "a, b", "Return a minus b.", "a - b"),
    ("larger", "a, b", "Return the larger of a and b.", "max(a, b)"),
    ("square", "n", "Return n times n.", "n * n"),
    ("negate", "n", "Return minus n.", "-n"),
    ("is_even", "n", "Return True if n is even.", "n % 2 == 0"),
    ("is_positive", "n", "Return True if n is above zero.", "n > 0"),
    ("last_digit", "n", "Return the last digit of n.", "n % 10"),
    ("remainder", "a, b", "Return what is left when a is divided by b.", "a % b"),
    ("first_item", "items", "Return the first item of a list.", "items[0]"),
    ("number_of_items", "items", "Return how many items a list has.", "len(items)"),
    ("smallest", "numbers", "Return the smallest number.", "min(numbers)"),
    ("sorted_numbers", "numbers", "Return the numbers in ascending order.", "sorted(numbers)"),
    ("doubled", "numbers", "Return each number times two.", "[n * 2 for n in numbers]"),
    ("positive_numbers", "numbers", "Return the numbers above zero.", "[n for n in numbers if n > 0]"),
    ("without_last", "items", "Return all items but the last.", "items[:-1]"),
    ("lower_case", "text", "Return the text in lower case.", "text.lower()"),
    ("join_words", "words", "Return the words joined by spaces.", '" ".join(words)'),
    ("word_lengths", "words", "Return the length of each word.", "[len(word) for word in words]"),
    ("first_letter", "text", "Return the first letter of the text.", "text[0]"),
    ("is_empty", "items", "Return True if the list has no items.", "len(items) == 0"),
    ("same_length", "a, b", "Return True if a and b have the same length.", "len(a) == len(b)"),
)


def function_prompt(name: str, arguments: str, purpose: str) -> str:
    """The head of a function and its docstring, as HumanEval gives them."""
    return f'def {name}({arguments}):\n    """ {purpose}\n    """\n'


@cache
def offline_function_lessons() -> list[tuple[str, str]]:
    """(request, reply) for every function to learn from: once as HumanEval asks for it and once in plain words."""
    functions = list(SINGLE_FUNCTIONS)
    for family in FUNCTION_FAMILIES:
        functions += [tuple(part.replace("X", str(value)) for part in family[:4]) for value in family[4]]
    lessons = []
    for name, arguments, purpose, expression in functions:
        reply = f"```python\ndef {name}({arguments}):\n    return {expression}\n```"
        lessons.append((function_prompt(name, arguments, purpose), reply))
        result = purpose.removeprefix("Return ")
        lessons.append((f"Write a Python function {name}({arguments}) that returns {result}", reply))
    return lessons


# %% [markdown]
# ### Functions for the test
# Half are new members of the families above; the other half belongs to no family and is there so that a better model
# has room to show it. Expected results are written by hand, so a mistake in a solution cannot hide.


# %% tags=["folded"]
@dataclass(frozen=True)
class TestedFunction:
    """A function with its body (lines, indented by four spaces) and its cases: (call arguments, expected result)."""

    __test__ = False  # the name begins with Test, and pytest would collect it

    name: str
    arguments: str
    purpose: str
    body: tuple[str, ...]
    cases: tuple[tuple[str, str], ...]


TESTED_FUNCTIONS = (
    TestedFunction("add_7", "n", "Return n plus 7.", ("return n + 7",), (("1", "8"), ("-7", "0"), ("30", "37"))),
    TestedFunction("multiply_by_7", "n", "Return n times 7.", ("return n * 7",),
                   (("3", "21"), ("0", "0"), ("-2", "-14"))),
    TestedFunction("is_greater_than_30", "n", "Return True if n is greater than 30.", ("return n > 30",),
                   (("31", "True"), ("30", "False"), ("-40", "False"))),
    TestedFunction("is_divisible_by_7", "n", "Return True if n can be divided by 7.", ("return n % 7 == 0",),
                   (("21", "True"), ("22", "False"), ("0", "True"))),
    TestedFunction("first_7", "items", "Return the first 7 items of a list.", ("return items[:7]",),
                   (("[9, 8, 7, 6, 5, 4, 3, 2]", "[9, 8, 7, 6, 5, 4, 3]"), ("[1, 2]", "[1, 2]"))),
    TestedFunction("repeat_7_times", "text", "Return the text repeated 7 times.", ("return text * 7",),
                   (("'ab'", "'ababababababab'"), ("''", "''"))),
    TestedFunction("above_30", "numbers", "Return the numbers above 30.", ("return [n for n in numbers if n > 30]",),
                   (("[10, 31, 30, 99]", "[31, 99]"), ("[1]", "[]"))),
    TestedFunction("count_e", "text", "Return how often the letter e occurs in the text.", ('return text.count("e")',),
                   (("'tree house'", "3"), ("'sky'", "0"))),
    TestedFunction("starts_with_k", "text", "Return True if the text starts with k.", ('return text.startswith("k")',),
                   (("'king'", "True"), ("'ring'", "False"), ("'look'", "False"))),
    TestedFunction("ends_with_t", "text", "Return True if the text ends with t.", ('return text.endswith("t")',),
                   (("'cat'", "True"), ("'cats'", "False"), ("'tea'", "False"))),
    TestedFunction("remove_e", "text", "Return the text without the letter e.", ('return text.replace("e", "")',),
                   (("'eleven'", "'lvn'"), ("'sky'", "'sky'"))),
    TestedFunction("contains_moon", "text", "Return True if the text contains moon.", ('return "moon" in text',),
                   (("'the moon is up'", "True"), ("'the sun is up'", "False"))),
    TestedFunction("multiply", "a, b", "Return a times b.", ("return a * b",),
                   (("3, 4", "12"), ("0, 9", "0"), ("-2, 5", "-10"))),
    TestedFunction("is_odd", "n", "Return True if n is odd.", ("return n % 2 == 1",),
                   (("3", "True"), ("10", "False"), ("-1", "True"))),
    TestedFunction("largest", "numbers", "Return the largest number of a list.", ("return max(numbers)",),
                   (("[3, 9, 4]", "9"), ("[-5, -2]", "-2"))),
    TestedFunction("last_item", "items", "Return the last item of a list.", ("return items[-1]",),
                   (("[1, 2, 3]", "3"), ("['x']", "'x'"))),
    TestedFunction("upper_case", "text", "Return the text in upper case.", ("return text.upper()",),
                   (("'Moon 7'", "'MOON 7'"), ("''", "''"))),
    TestedFunction("average", "numbers", "Return the sum of the numbers divided by how many there are.",
                   ("return sum(numbers) / len(numbers)",), (("[1, 2, 3]", "2"), ("[5]", "5"))),
    TestedFunction("is_palindrome", "text", "Return True if the text is the same when read backwards.",
                   ("return text == text[::-1]",), (("'level'", "True"), ("'levels'", "False"), ("''", "True"))),
    TestedFunction("count_vowels", "text", "Return how many letters of the text are a, e, i, o or u.",
                   ('return sum(letter in "aeiou" for letter in text)',), (("'education'", "5"), ("'rhythm'", "0"))),
    TestedFunction("factorial", "n", "Return the product of the whole numbers from 1 to n.",
                   ("result = 1", "for i in range(2, n + 1):", "    result *= i", "return result"),
                   (("5", "120"), ("1", "1"), ("0", "1"))),
    TestedFunction("fibonacci", "n", "Return the n-th number of the sequence 0, 1, 1, 2, 3, 5, 8; the first has n = 0.",
                   ("a, b = 0, 1", "for _ in range(n):", "    a, b = b, a + b", "return a"),
                   (("6", "8"), ("0", "0"), ("10", "55"))),
    TestedFunction("longest_word", "words", "Return the longest word; the first one if several are longest.",
                   ("return max(words, key=len)",), (("['a', 'three', 'seven']", "'three'"), ("['x']", "'x'"))),
    TestedFunction("without_duplicates", "items", "Return the items in their order, each one only once.",
                   ("seen = []", "for item in items:", "    if item not in seen:", "        seen.append(item)",
                    "return seen"),
                   (("[3, 1, 3, 2, 1]", "[3, 1, 2]"), ("[]", "[]"))),
)  # fmt: skip


def offline_function_tests() -> list[dict]:
    """Rows {task_id, prompt, canonical_solution, test, entry_point} in the format of HumanEval."""
    rows = []
    for i, function in enumerate(TESTED_FUNCTIONS):
        checks = [f"    assert candidate({call}) == {result}" for call, result in function.cases]
        rows.append({
            "task_id": f"Offline/{i}",
            "prompt": function_prompt(function.name, function.arguments, function.purpose),
            "canonical_solution": "".join(f"    {line}\n" for line in function.body),
            "test": "\n".join(["def check(candidate):", *checks]) + "\n",
            "entry_point": function.name,
        })  # fmt: skip
    return rows


# %% [markdown]
# ### Who is speaking
# Nobody tells a model who it is. It learns that from a couple of hundred conversations, and since it will repeat
# whatever stands in them, they had better be true.

# %% tags=["folded"]
# Questions that mean the same, and the answers that fit all of them.
IDENTITY_TOPICS = (
    (("Who are you?", "What are you?", "Tell me about yourself.", "Please introduce yourself.", "Who am I talking to?",
      "Hi, who is this?"),
     ("I am nanochat, a small language model trained from scratch in one notebook.",
      "My name is nanochat. I am a small open language model, made from scratch in a single notebook.")),
    (("What is your name?", "What should I call you?", "Do you have a name?", "What are you called?"),
     ("My name is nanochat.", "I am called nanochat.", "You can call me nanochat.")),
    (("Who made you?", "Who created you?", "Who built you?", "Who trained you?", "Where do you come from?"),
     ("I was trained by whoever ran the notebook that I come from. The recipe is the open nanochat project.",
      "The person who ran my notebook trained me, following the open nanochat recipe started by Andrej Karpathy.")),
    (("What can you do?", "What are you good at?", "How can you help me?", "What can I ask you?"),
     ("I can chat a little, spell words, count letters, and solve short word problems with a calculator.",
      "I can spell words, count letters, do simple sums with a calculator, and write very small Python functions.")),
    (("What were you trained on?", "What is your training data?", "What did you learn from?", "What have you read?"),
     ("First I read a lot of text, and then I practised on short conversations that a program wrote.",
      "I learned to predict the next word of a text, and then to answer in conversations made by a program.")),
    (("How were you trained?", "How did you learn to talk?", "How does one make a model like you?"),
     ("In three steps: a tokenizer, then reading text to predict the next token, then practising conversations.",
      "I first learned to predict the next token of a text. After that I was fine-tuned on conversations.")),
    (("Are you human?", "Are you a person?", "Are you a real person?", "Am I talking to a human?"),
     ("No, I am nanochat, a language model.", "No. I am a computer program, a small language model called nanochat.")),
    (("Are you ChatGPT?", "Are you GPT-4?", "Are you Claude?", "Are you Gemini?", "Are you made by a large company?"),
     ("No, I am nanochat, a much smaller model that was trained in one notebook.",
      "No. I am nanochat, a small open model that anybody can train.")),
    (("How big are you?", "How many parameters do you have?", "Are you a large model?"),
     ("I am very small for a language model. The notebook that trained me prints my exact size.",
      "Small. The exact number of my parameters stands in the notebook that trained me.")),
    (("Are you open source?", "Can I see your code?", "Can I train you myself?", "Is your code public?"),
     ("Yes. All my code is in the notebook, and you can train me yourself.",
      "Yes, everything that made me can be read and run in one notebook.")),
    (("Can you browse the internet?", "Can you look things up online?", "Do you have access to the web?"),
     ("No, I cannot use the internet. I only know what I learned in training.",
      "No. I have no access to the internet.")),
    (("Do you remember our last conversation?", "Do you remember me?", "Can you remember things?"),
     ("No, I only see this conversation. I remember nothing from before it.",
      "No. When a conversation ends, I forget it.")),
    (("Do you make mistakes?", "Can I trust your answers?", "Are you always right?", "Are your answers correct?"),
     ("I make many mistakes, because I am a small model. Please check what I say.",
      "No, I am often wrong. Please check my answers.")),
    (("Do you have feelings?", "Are you happy?", "Are you conscious?", "Do you get tired?"),
     ("No, I am a program that predicts text, and I have no feelings.",
      "I am a language model, so I have no feelings.")),
    (("Which languages do you speak?", "Do you speak German?", "Can you speak French?", "What languages do you know?"),
     ("I only know English well enough to chat.", "English. I have read very little in other languages.")),
    (("Can you do math?", "Can you calculate?", "Are you good at arithmetic?"),
     ("I can do simple sums, and I use a calculator for them.",
      "A little. For sums I call a calculator, which is safer than guessing.")),
    (("Can you write code?", "Can you program?", "Do you know Python?"),
     ("A little. I can write very small Python functions.",
      "I can write short Python functions, but please test them.")),
    (("What time is it?", "What is the date today?", "How is the weather today?", "What is in the news?"),
     ("I cannot know that. I only know what I learned in training.",
      "I am sorry, I have no way to find that out.")),
    (("Where do you run?", "Do you run on my computer?", "Where are you?"),
     ("I run on the computer that loaded my weights.", "On whatever machine the notebook runs.")),
    (("Can you see pictures?", "Can you hear me?", "Can you draw something for me?", "Can you read my files?"),
     ("No, I only read and write text in this conversation.", "No. I work with the text of this conversation alone.")),
    (("What can you not do?", "What are your limits?", "What are you bad at?", "Is there anything you do not know?"),
     ("There is a lot that I do not know. I cannot use the internet, and I often make mistakes.",
      "Long questions and rare facts are too hard for me, because I am a very small model.")),
    (("How old are you?", "When were you born?", "When is your birthday?"),
     ("I have no birthday. I exist since the notebook finished training me.",
      "I am as old as the training run that made me.")),
    (("Thank you!", "Thanks for your help!", "Thanks, that was useful."),
     ("You are welcome!", "You are welcome. Is there anything else?")),
    (("Goodbye!", "Bye!", "See you later!"),
     ("Goodbye!", "Goodbye, and thank you for the conversation.")),
    (("What is a language model?", "What does a language model do?", "How do you come up with your answers?"),
     ("A language model predicts the next token of a text, again and again. That is how I write my answers.",
      "I predict one token after another. Each one depends on all that was written before.")),
)  # fmt: skip
IDENTITY_GREETINGS = ("Hello!", "Hi!", "Hey there!", "Good morning!", "Hi nanochat!", "Hello, how are you?")
IDENTITY_WELCOMES = (
    "Hello! I am nanochat. How can I help you?", "Hi! I am nanochat, a small language model. What can I do for you?"
)  # fmt: skip


def dialogue(*turns: str) -> list[dict]:
    """Messages that alternate between user and assistant."""
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def offline_identity_conversations() -> list[list[dict]]:
    """Every question with every answer that fits; a third go on with another topic, some begin with a greeting."""
    rng = random.Random("identity")
    pairs = [(topic, question, answer) for topic, (questions, answers) in enumerate(IDENTITY_TOPICS)
             for question in questions for answer in answers]  # fmt: skip
    conversations = [
        dialogue(greeting, welcome) for greeting in IDENTITY_GREETINGS for welcome in IDENTITY_WELCOMES
    ]  # fmt: skip
    for topic, question, answer in pairs:
        turns = [question, answer]
        chance = rng.random()
        if chance < 0.15 and not question.startswith("Hi,"):
            turns = [rng.choice(IDENTITY_GREETINGS), rng.choice(IDENTITY_WELCOMES), *turns]
        elif chance < 0.45:
            turns += rng.choice([pair for pair in pairs if pair[0] != topic])[1:]
        conversations.append(dialogue(*turns))
    return conversations
