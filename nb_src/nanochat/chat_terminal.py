# %% [markdown]
# ## Talking to the model
#
# Three small problems stand between an engine that gives tokens and a person who reads an answer. A conversation grows
# and the context does not, so something must be forgotten, in whole turns, and the person must be told. Tokens are
# pieces of bytes, and a character may end in the next one. And what the model writes to its calculator is not part of
# what it says.
#
# The chat in the terminal below and the server of the next chapter share these solutions. The chat needs nothing but
# `input` and `print`, so it works in a notebook cell as well.

# %%
import codecs
import re
import secrets
import sys

from nanochat.engine import Engine, use_calculator
from nanochat.runtime import UserError, print0
from nanochat.tokenizer import check_conversation

# %% [markdown]
# ### `fit_conversation`
# What the model gets to see: the end of the conversation, as much of it as leaves room for an answer. Turns are
# forgotten in pairs of question and answer; instructions in a system message stay.


# %%
def fit_conversation(tokenizer, messages: list[dict], context: int, max_tokens: int) -> tuple[list[int], int]:
    """(prompt, left_out): the ids up to where the assistant begins to speak, and how many old messages are not in it.

    Of the `context` tokens a quarter is kept free for the answer, or max_tokens when that is less. Raises ValueError
    for a conversation that is not one (it names the message), UserError when its last message alone is too long.
    """
    check_conversation({"messages": messages})
    if messages[-1]["role"] != "user":
        raise ValueError(f"the last message has the role {messages[-1]['role']!r}; it must be the user's")
    system = messages[:1] if messages[0]["role"] == "system" else []
    turns, kept_free = messages[len(system) :], min(max_tokens, context // 4)
    assistant_start = tokenizer.encode_special("<|assistant_start|>")

    def ids_of(some: list[dict]) -> list[int]:
        return tokenizer.render_conversation({"messages": some}, max_tokens=sys.maxsize)[0]

    start = len(turns) - 1
    length = len(ids_of([*system, *turns[start:]])) + 1
    if length > context - kept_free:
        raise UserError(
            f"{'the system message and ' if system else ''}the last message{' have' if system else ' has'} {length} "
            f"tokens; the model's context is {context} and {kept_free} of them are kept for the answer. "
            f"Shorten the message to fit into {context - kept_free} tokens."
        )
    while start > 0:
        length += len(ids_of(turns[start - 2 : start])) - 1  # without <|bos|>
        if length > context - kept_free:
            break
        start -= 2
    prompt = ids_of([*system, *turns[start:]]) + [assistant_start]
    while len(prompt) > context - kept_free:  # joined with another message, the system message may split differently
        start += 2
        prompt = ids_of([*system, *turns[start:]]) + [assistant_start]
    return prompt, start


# %% [markdown]
# ### `AnswerReader`
# From tokens to what a person reads. Bytes wait until their character is complete. An expression for the calculator
# waits for its end and comes out as one call with its result. And text waits as long as it may still turn out to be the
# beginning of a string at which the answer is to stop.


# %%
class AnswerReader:
    """Reads an answer token by token; what can be shown comes back as text (str) and calculator calls (dict).

    text: all text so far. calls: the calls so far, {"expression", "result" (None: it had none), "position" (the index
    in `text` where the call stood)}. stopped: one of `stops` was written; the text ends before it.
    """

    def __init__(self, tokenizer, stops: tuple[str, ...] | list[str] = ()):
        self.tokenizer, self.stops = tokenizer, stops
        self.names = {number: name for name, number in tokenizer.special_ids.items()}
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text, self.calls, self.stopped = "", [], False
        self.held = ""  # may be the beginning of a stop string
        self.expression: list[int] | None = None  # tokens since <|python_start|>
        self.in_output = self.output_expected = False

    def read(self, token: int) -> list[str | dict]:
        """Take the next token of the answer (not the one that ends it)."""
        name = self.names.get(token)
        if self.stopped:
            return []
        if name is None and self.expression is not None:
            self.expression.append(token)
        elif name is None and not self.in_output:
            return self.say(self.decoder.decode(self.tokenizer.decode_single_token_bytes(token)))
        elif name is not None:
            return self.follow(name)
        return []

    def follow(self, name: str) -> list[str | dict]:
        """A special token: nothing of it is text, and a character that it interrupts will never be complete."""
        self.decoder.reset()
        expected, self.output_expected = self.output_expected, False
        if name == "<|python_start|>":
            self.expression = []
        elif name == "<|python_end|>" and self.expression is not None:
            return self.call()
        elif self.expression is not None:  # another one inside of an expression, which is no sum any more
            self.expression.append(self.tokenizer.encode_special(name))
        elif name == "<|output_start|>":
            self.in_output = expected  # otherwise the model made it up, and it is text like any other
        elif name == "<|output_end|>":
            self.in_output = False
        return []

    def call(self, finished: bool = True) -> list[str | dict]:
        """The end of an expression. The result is computed as the engine does it, which now forces it."""
        tokens, self.expression = self.expression, None
        result = use_calculator(self.tokenizer.decode(tokens)) if tokens and finished else None
        self.output_expected = result is not None
        shown = self.tokenizer.decode([token for token in tokens if token not in self.names])
        if not shown:
            return []
        events = self.say("", complete=True)
        call = {"expression": shown, "result": None if result is None else str(result)}
        call["position"] = len(self.text)
        self.calls.append(call)
        return [*events, call]

    def say(self, new: str, complete: bool = False) -> list[str | dict]:
        """Show new text, up to where a stop string begins or may begin. complete: nothing more will follow."""
        waiting = self.held + new
        found = [waiting.index(stop) for stop in self.stops if stop in waiting]
        if found:
            waiting, self.held, self.stopped = waiting[: min(found)], "", True
        else:
            longest = 0 if complete else max((len(stop) for stop in self.stops), default=1) - 1
            begins = range(max(0, len(waiting) - longest), len(waiting))
            cut = next((i for i in begins if any(stop.startswith(waiting[i:]) for stop in self.stops)), len(waiting))
            waiting, self.held = waiting[:cut], waiting[cut:]
        self.text += waiting
        return [waiting] if waiting else []

    def finish(self) -> list[str | dict]:
        """The answer is over: what waited for more. A call that was not finished has no result."""
        if self.stopped:
            return []
        return self.say("", complete=True) if self.expression is None else self.call(finished=False)


# %% [markdown]
# ### `answer_parts`
# The way back: an answer with its calls, as the model must see it when the conversation goes on.


# %%
def answer_parts(text: str, calls: list[dict]) -> list[dict]:
    """The content of an assistant's message from what an `AnswerReader` found, in the form that can be rendered."""
    parts, end = [], 0
    for call in calls:
        parts += [
            {"type": "text", "text": text[end : call["position"]]}, {"type": "python", "text": call["expression"]}
        ]  # fmt: skip
        if call["result"] is not None:
            parts.append({"type": "python_output", "text": call["result"]})
        end = call["position"]
    parts.append({"type": "text", "text": text[end:]})
    return [part for part in parts if part["text"]]


# %% [markdown]
# ### `chat_in_terminal`
# `clear` begins anew; `quit`, `exit`, the end of the input or Ctrl-C at the prompt end the chat. During an answer
# Ctrl-C ends only that answer.

# %%
TERMINAL_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what a terminal would obey instead of showing it


def print_answer_events(events: list[str | dict]) -> None:
    """Show text as it is and calculator calls in brackets, dimmed where the output is a terminal."""
    for event in events:
        if isinstance(event, dict):
            event = f"[{event['expression']}{'' if event['result'] is None else ' = ' + event['result']}]"
            event = TERMINAL_UNSAFE.sub("", event)
            event = f"\033[2m{event}\033[0m" if sys.stdout.isatty() else event
        else:
            event = TERMINAL_UNSAFE.sub("", event)
        print0(event, end="", flush=True)


def print_answer(engine: Engine, prompt: list[int], max_tokens: int, temperature: float, top_k: int) -> list[dict]:
    """Write one answer to the terminal while it is being generated; its content, to go on with. Ctrl-C ends it."""
    reader, seed = AnswerReader(engine.tokenizer), secrets.randbits(31)
    terminal = (engine.tokenizer.encode_special("<|assistant_end|>"), engine.tokenizer.get_bos_token_id())
    try:
        for column, _ in engine.generate(prompt, 1, max_tokens, temperature, top_k, seed):
            if column[0] in terminal:
                break
            print_answer_events(reader.read(column[0]))
    except KeyboardInterrupt:
        print0(" (stopped)", end="")
    print_answer_events(reader.finish())
    print0()
    return answer_parts(reader.text, reader.calls)


def chat_in_terminal(
    model, tokenizer, temperature: float = 0.6, top_k: int = 50, max_tokens: int = 512, prompt: str = ""
) -> None:
    """Talk to a chat model. prompt: answer this and return; "" asks for messages until the person has enough.

    top_k: 0 for all tokens. max_tokens bounds each answer. Raises UserError for a prompt that does not fit.
    Spec section 20.1.
    """
    engine, context = Engine(model, tokenizer), model.config.sequence_len
    messages, forgotten = [], 0
    if not prompt:
        print0("Write a message. clear begins anew, quit ends. Ctrl-C stops an answer.")
    while True:
        try:
            text = prompt or input("\nYou: ").strip()
        except (EOFError, KeyboardInterrupt):
            print0()
            return
        if text in ("quit", "exit") and not prompt:
            return
        if text == "clear" and not prompt:
            messages, forgotten = [], 0
            print0("A new conversation.")
            continue
        if not text:
            continue
        asked = [*messages, {"role": "user", "content": text}]
        try:
            ids, left_out = fit_conversation(tokenizer, asked, context, max_tokens)
        except UserError as error:
            if prompt:
                raise
            print0(f"✗ {error}")
            continue
        if left_out > forgotten:
            print0(f"(The oldest {left_out} messages no longer fit into the context of {context} tokens.)")
            forgotten = left_out
        if not prompt:
            print0("Model: ", end="", flush=True)
        content = print_answer(engine, ids, min(max_tokens, context - len(ids)), temperature, top_k)
        if prompt:
            return
        messages = [*asked, {"role": "assistant", "content": content}]


# %% [markdown]
# ### `sample_answers`
# What the model says to people who ask the usual things: a few lines that tell more about it than its marks.

# %%
SAMPLE_QUESTIONS = (
    "Hello! Who are you?",
    "Maria has 12 apples and buys 30 more. How many apples does she have now?",
    "How many r are in the word strawberry?",
    "Why is the sky blue?",
)


def sample_answers(model, tokenizer, max_tokens: int = 256) -> list[dict]:
    """[{"question", "answer"}]: the likeliest answers, with calculator calls as ⟦12+30 → 42⟧.

    A question that does not fit into the model's context is left out.
    """
    prompts, samples = [], []
    for question in SAMPLE_QUESTIONS:
        asked = [{"role": "user", "content": question}]
        try:
            prompts.append(fit_conversation(tokenizer, asked, model.config.sequence_len, max_tokens)[0])
        except UserError:
            continue
        samples.append({"question": question, "answer": ""})
    for index, tokens in Engine(model, tokenizer).generate_many(prompts, max_tokens):
        reader = AnswerReader(tokenizer)
        events = [event for token in tokens for event in reader.read(token)] + reader.finish()
        for event in events:
            if isinstance(event, dict):
                event = f"⟦{event['expression']}{'' if event['result'] is None else ' → ' + event['result']}⟧"
            samples[index]["answer"] += event
    return samples
