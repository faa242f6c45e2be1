import math
import random
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.engine import (
    CALCULATOR_MAX_CHARS,
    DecodeBatch,
    Engine,
    KVCache,
    PromptRow,
    sample_next_token,
    sample_rows,
    use_calculator,
)
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import UserError

SPECIAL = {"<|bos|>": 128, "<|assistant_end|>": 129, "<|python_start|>": 130, "<|python_end|>": 131}
SPECIAL |= {"<|output_start|>": 132, "<|output_end|>": 133}
BOS, END, PYTHON_START, PYTHON_END, OUTPUT_START, OUTPUT_END = SPECIAL.values()
PROMPT = [BOS, *b"hi"]


class AsciiTokenizer:
    """One token for each ASCII character."""

    def encode(self, text):
        return list(text.encode("ascii"))

    def decode(self, ids):
        return bytes(ids).decode("ascii")

    def encode_special(self, name):
        return SPECIAL[name]

    def get_bos_token_id(self):
        return BOS


class ScriptedModel:
    """Says, row by row, what the script says, whatever it hears; keeps what it heard."""

    compute_dtype = torch.float32

    def __init__(self, *scripts, sequence_len=100):
        self.config = SimpleNamespace(sequence_len=sequence_len, n_kv_head=1, head_dim=2, n_layer=1)
        self.scripts, self.heard, self.caches = scripts, [], []

    def get_device(self):
        return torch.device("cpu")

    def __call__(self, ids, kv_cache):
        assert kv_cache.get_pos() + ids.size(1) <= kv_cache.k_cache.size(2), "the cache overflows"
        kv_cache.advance(ids.size(1))
        self.heard.append(ids.tolist())
        self.caches.append(kv_cache)
        step = len(self.heard) - 1
        logits = torch.full((ids.size(0), ids.size(1), 134), -1e4)
        for row in range(ids.size(0)):
            script = self.scripts[row]
            logits[row, -1, script[min(step, len(script) - 1)]] = 1e4
        return logits


pytestmark = pytest.mark.usefixtures("one_thread")


def run(model, prompt=PROMPT, **kwargs):
    return list(Engine(model, AsciiTokenizer()).generate(prompt, temperature=0, **kwargs))


# The calculator


@pytest.mark.parametrize(
    "expression,result",
    [
        ("1+2*3", 7), ("(1+2)*3", 9), ("8/2", 4.0), ("7/2", 3.5), ("1-2-3", -4), ("100/10/5", 2.0), ("-5", -5),
        ("--5", 5), ("2*-3", -6), ("-(2+3)*2", -10), ("+4", 4), ("1.5+.5", 2.0), ("3.", 3.0), ("1,234 + 1", 1235),
        ("1,234,567*2", 2469134), (" ( 2 ) ", 2), ("00", 0), ("0.1+0.2", 0.30000000000000004),
        ("10*0.07", 0.7000000000000001), ("12/0", None), ("1/(2-2)", None), ("", None), (" ", None), ("()", None),
        ("1 2", None), ("1+", None), ("*1", None), ("(1", None), ("1)", None), ("2**3", None), ("7//2", None),
        ("2(3)", None), ("1.2.3", None), ("05", None), ("1e5", None), (",", None), ("x", None), ("1_000", None),
        ("٣+1", None), ("1\n", None), ("5%2", None), ("9"*400+".0*"+"9"*10, None), ("'strawberry'.count('r')", 3),
        ('"strawberry".count("rr")', 1), ("'it'.count(\"i\")", 1), ("'abc'.count('')", 4), ("''.count('a')", 0),
        ("'a,b,c'.count(',')", 2), (" 'x y' . count( ' ' ) ", 1), ("'über'.count('ü')", 1),
        ("'important'.count('t')", 2), ("'a\"b'.count('\"')", 1), ("'abc'.upper()", None),
        ("'a'.count('a').real", None), ("'a\\n'.count('a')", None), ("'a'.count(1)", None), ("a.count('a')", None),
        ("'it's'.count('s')", None), ("'a'.count('a')+1", None), ("'''a'''.count('a')", None),
        ("f'{1}'.count('1')", None), ("'a'.count('a','b')", None),
    ],
)  # fmt: skip
def test_calculator(expression, result):
    """A wrong result is put into the model's mouth as fact; the text "4" and the text "4.0" are different answers."""
    answer = use_calculator(expression)
    assert answer == result and type(answer) is type(result) and str(answer) == str(result)


numbers = st.one_of(
    st.integers(0, 10**12).map(str), st.floats(0, 1e6).map("{:.3f}".format), st.sampled_from(["0", ".5", "2.", "00"])
)
sums = st.recursive(
    numbers,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", " + ", "- -", " /+"]), inner).map("".join),
        inner.map("({})".format),
        inner.map("-{}".format),
    ),
    max_leaves=12,
)


@given(sums)
@settings(max_examples=300, deadline=None)
def test_sums_are_what_python_says(text):
    """Precedence, association and int or float: each is easy to get wrong in a hand-written parser."""
    try:
        expected = eval(text)  # digits, operators and parentheses from the strategy above
    except ArithmeticError:
        expected = None
    if isinstance(expected, float) and not math.isfinite(expected):
        expected = None
    if len(text) <= CALCULATOR_MAX_CHARS:
        assert repr(use_calculator(text)) == repr(expected)


@given(st.one_of(st.text(), st.text("0123456789+-*/(). ,'\"count\\_"), st.text("'a.count()", min_size=10)))
@settings(max_examples=500, deadline=None)
def test_no_text_raises(text):
    """An exception in the calculator would end the whole evaluation because of one strange sample."""
    result = use_calculator(text)
    assert result is None or type(result) in (int, float)


HOSTILE = {
    "long sum": "1+" * 10**6 + "1",
    "deep nesting": "(" * 10**6 + "1" + ")" * 10**6,
    "nesting at the limit of length": "(" * 249 + "1" + ")" * 249,
    "unclosed nesting": "(" * 500,
    "signs": "-" * 499 + "1",
    "power tower": "9**9**9**9",
    "huge product": "*".join(["9" * 60] * 8),
    "huge factors": "9" * 249 + "*" + "9" * 250,
    "huge number": "9" * 10**7,
    "huge to float": "9" * 400 + "/" + "3.0",
    "repetition": "'9'*10**6",
    "repetition in parentheses": "('a'*10**9).count('a')",
    "quadratic count": "'" + "a" * 10**6 + "'.count('" + "a" * 5 * 10**5 + "b')",
    "count at the limit of length": "'" + "a" * 240 + "'.count('" + "a" * 120 + "b')",
    "backtracking quotes": "'" * 500,
    "backtracking spaces": "'a'" + " " * 400 + ".count",
    "numbers without end": "1." * 250,
    "commas": "," * 10**7,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_expressions_end_at_once(name):
    """The text comes from the model; one expression that takes minutes stops an evaluation of thousands."""
    seconds = []
    for _ in range(5):
        began = time.thread_time()
        result = use_calculator(HOSTILE[name])
        seconds.append(time.thread_time() - began)
    assert min(seconds) < 0.05  # they take well under a millisecond
    if name == "signs":
        assert result == -1
    elif name in ("huge product", "huge factors"):
        assert result == eval(HOSTILE[name])
    elif name == "count at the limit of length":
        assert result == 0
    else:
        assert result is None


# The cache and sampling


def test_cache_prefill_shares_one_row_out():
    """A sample that begins with another sample's keys continues a text that nobody wrote."""
    small, large = KVCache(1, 2, 3, 4, 5, "cpu", torch.bfloat16), KVCache(3, 2, 8, 4, 5, "cpu", torch.bfloat16)
    small.k_cache.normal_()
    small.v_cache.normal_()
    small.advance(2)
    large.prefill(small)
    assert large.get_pos() == 2 and large.cache_seqlens.tolist() == [2, 2, 2]
    assert large.cache_seqlens.dtype == torch.int32
    assert large.lengths.tolist() == [2, 2, 2], "known on the host too"
    for row in range(3):
        assert torch.equal(large.k_cache[:, row, :2], small.k_cache[:, 0, :2])
        assert torch.equal(large.v_cache[:, row, :2], small.v_cache[:, 0, :2])
    assert large.k_cache[:, :, 2:].abs().sum() == 0
    k, v = large.get_layer_cache(4)
    assert k.shape == v.shape == (3, 8, 2, 4) and k.data_ptr() == large.k_cache[4].data_ptr()
    with pytest.raises(ValueError, match="empty"):
        large.prefill(small)
    large.reset()
    assert large.get_pos() == 0


def test_cache_rows_are_copied_with_their_own_lengths():
    """A row that takes the length of another reads keys that belong to nobody, or forgets its own."""
    source = KVCache(3, 2, 6, 4, 5, "cpu", torch.float32)
    source.k_cache.normal_()
    source.v_cache.normal_()
    source.set_lengths([2, 5, 3])
    with pytest.raises(ValueError, match="different numbers"):
        source.get_pos()
    copy = KVCache(4, 2, 4, 4, 5, "cpu", torch.float32)
    copy.write_rows(range(4), source, [2, 0, 0, 2])
    assert copy.cache_seqlens.tolist() == [3, 2, 2, 3] and copy.longest() == 3
    for row, (origin, length) in enumerate([(2, 3), (0, 2), (0, 2), (2, 3)]):
        assert torch.equal(copy.k_cache[:, row, :length], source.k_cache[:, origin, :length])
        assert torch.equal(copy.v_cache[:, row, :length], source.v_cache[:, origin, :length])
    copy.write_rows([1], source, [2])
    assert copy.cache_seqlens.tolist() == copy.lengths.tolist() == [3, 3, 2, 3] and copy.bounds() == (2, 3)
    assert torch.equal(copy.v_cache[:, 1, :3], source.v_cache[:, 2, :3])
    with pytest.raises(ValueError, match="do not fit"):
        copy.write_rows([0], source, [1])


def test_the_first_rows_of_a_cache_share_its_memory():
    """What a step writes into a copy is lost at the next one."""
    cache = KVCache(3, 2, 6, 4, 5, "cpu", torch.float32)
    part = cache.part(0, 2)
    part.set_lengths([4, 1])
    part.advance(1)
    part.get_layer_cache(3)[0][:] = 7
    assert cache.cache_seqlens.tolist() == cache.lengths.tolist() == [5, 2, 0]
    assert cache.k_cache[3, :2].eq(7).all() and cache.k_cache.sum() == 7 * 2 * 6 * 2 * 4
    cache.write_rows([0], cache, [1])
    assert cache.cache_seqlens.tolist() == cache.lengths.tolist() == [2, 2, 0]


@pytest.mark.parametrize("shape", [(1, 2, 9, 4, 5), (2, 2, 3, 4, 5), (1, 1, 3, 4, 5), (1, 2, 3, 8, 5), (1, 2, 3, 4, 6)])
def test_cache_prefill_refuses_what_does_not_fit(shape):
    """Broadcasting would take some wrong shapes without a word."""
    with pytest.raises(ValueError, match="does not fit"):
        KVCache(3, 2, 8, 4, 5, "cpu", torch.float32).prefill(KVCache(*shape, "cpu", torch.float32))


def test_sampling_follows_the_distribution():
    """A softmax over the wrong numbers still gives plausible text."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(40000, 4)

    def frequencies(**kwargs):
        ids = sample_next_token(logits, rng, **kwargs)
        assert ids.shape == (40000, 1) and ids.dtype == torch.int64
        return torch.bincount(ids[:, 0], minlength=4) / 40000

    assert torch.allclose(frequencies(), logits[0].softmax(0), atol=0.02)
    assert torch.allclose(frequencies(temperature=2.0), (logits[0] / 2).softmax(0), atol=0.02)
    top = torch.tensor([-math.inf, 1.0, 2.0, -math.inf])
    assert torch.allclose(frequencies(temperature=0.5, top_k=2), (top / 0.5).softmax(0), atol=0.02)
    assert torch.allclose(frequencies(top_k=99), logits[0].softmax(0), atol=0.02)
    assert torch.allclose(frequencies(top_k=0), logits[0].softmax(0), atol=0.02)
    assert frequencies(temperature=0.0).tolist() == frequencies(top_k=1).tolist() == [0, 0, 1, 0]
    with pytest.raises(AssertionError):
        sample_next_token(logits, rng, temperature=-0.1)


def row_of(**changes):
    return PromptRow(**{"prompt": [1], "max_tokens": 9} | changes)


def test_rows_are_sampled_as_each_wants_it():
    """A row that is drawn with its neighbour's temperature or top_k still gives plausible text."""
    logits, n = torch.tensor([0.0, 1.0, 2.0, -1.0]), 8000
    inf = math.inf
    wanted = {  # temperature, top_k -> what is likely
        (1.0, None): logits,
        (1.0, 0): logits,
        (2.0, 99): logits / 2,
        (0.5, 2): torch.tensor([-inf, 1.0, 2.0, -inf]) / 0.5,
        (0.7, 3): torch.tensor([0.0, 1.0, 2.0, -inf]) / 0.7,
        (1.5, 1): torch.tensor([-inf, -inf, 0.0, -inf]),
        (0.0, 50): torch.tensor([-inf, -inf, 0.0, -inf]),
        (1e-300, 3): torch.tensor([-inf, -inf, 0.0, -inf]),
    }
    kinds = list(wanted)
    rows = [row_of(temperature=kinds[i % 8][0], top_k=kinds[i % 8][1], seed=i) for i in range(8 * n)]
    tokens = torch.tensor(sample_rows(logits.expand(len(rows), 4), rows)).view(n, 8)
    for column, (kind, likely) in enumerate(wanted.items()):
        frequencies = torch.bincount(tokens[:, column], minlength=4) / n
        assert torch.allclose(frequencies, likely.softmax(0), atol=0.03), kind
        assert (frequencies[likely == -inf] == 0).all(), kind


def test_the_ends_of_the_dice():
    """A number that rounds to 1 points behind the last token, and 0 at one that is impossible."""

    class Dice:
        def __init__(self, number):
            self.random = lambda: number

    logits = torch.tensor([[-1000.0, 3.0, 2.0, 1.0, -1000.0]])
    for top_k in (None, 3):
        row = row_of(temperature=1.0, top_k=top_k)
        row.rng = Dice(0.0)
        assert sample_rows(logits, [row]) == [1]
    row = row_of(temperature=1.0, top_k=3)
    row.rng = Dice(1 - 1e-12)
    other = row_of(temperature=1.0, top_k=5)  # makes the table wider than row's own three
    assert sample_rows(logits.expand(2, 5), [row, other])[0] == 3


# The engine with a scripted model


def test_stops_without_a_superfluous_forward():
    """The original computed one more token than it returned: with one token per answer, twice the work."""
    model = ScriptedModel([*b"abcdef"])
    assert [column for column, _ in run(model, max_tokens=3)] == [[97], [98], [99]]
    assert model.heard == [[PROMPT], [[97]], [[98]]]
    model = ScriptedModel([*b"a", END, *b"bcd"])
    assert [column for column, _ in run(model, max_tokens=9)] == [[97], [END]]
    assert model.heard == [[PROMPT], [[97]]]
    model = ScriptedModel([*b"abc"])
    assert run(model, max_tokens=0) == [] and model.heard == []
    stream = Engine(model, AsciiTokenizer()).generate(PROMPT, max_tokens=3)
    next(stream)
    stream.close()
    assert len(model.heard) == 1


def test_generation_fills_the_context_and_no_more():
    """Without a limit the original wrote past the end of its cache and lost tokens silently."""
    model = ScriptedModel([*b"a"], sequence_len=10)
    assert len(run(model)) == 7
    assert run(model, prompt=[97] * 9) == [([97], [1])]
    with pytest.raises(UserError, match="prompt has 10 tokens and the model's context 10"):
        run(model, prompt=[97] * 10)
    assert len(run(model, prompt=[97] * 15, max_tokens=20)) == 20  # asked for: beyond the context


@pytest.mark.parametrize("arguments", [{"prompt": []}, {"num_samples": 0}, {"max_tokens": -1}])
def test_senseless_arguments(arguments):
    """An empty prompt would fail deep inside attention."""
    with pytest.raises(ValueError, match="at least one token"):
        run(ScriptedModel([97]), **arguments)


def test_prompt_is_read_once_for_all_samples():
    """Eight samples that each read the prompt cost eight times as much."""
    model = ScriptedModel(*[[*b"abc"]] * 4)
    run(model, num_samples=4, max_tokens=3)
    assert model.heard == [[PROMPT], [[97]] * 4, [[98]] * 4]
    assert model.caches[0].k_cache.shape[1:3] == (1, 3) and model.caches[1].k_cache.shape[1:3] == (4, 6)


@pytest.mark.parametrize("terminal", [END, BOS])
def test_completed_rows_wait_for_the_others(terminal):
    """Text after the end of an answer must not leak into it, and a slow row must not be cut off."""
    scripts = [[*b"aaa", terminal, *b"zzzz"], [*b"abbbb", terminal, *b"zz"]]
    engine = Engine(ScriptedModel(*scripts), AsciiTokenizer())
    results, masks = engine.generate_batch(PROMPT, num_samples=2, temperature=0, max_tokens=50)
    assert results == [PROMPT + [*b"aaa"], PROMPT + [*b"abbbb"]]
    assert masks == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1]]
    assert len(run(ScriptedModel(*scripts), num_samples=2, max_tokens=50)) == 6


def test_calculator_answers_in_the_models_place():
    """Spelling and arithmetic scores rest on these tokens; one off by one and every tool answer is garbage."""
    said = [PYTHON_START, *b"12*3", PYTHON_END, *b"????", *b"ok", END]
    model = ScriptedModel(said)
    pairs = [(column[0], mask[0]) for column, mask in run(model, max_tokens=50)]
    forced = [OUTPUT_START, *b"36", OUTPUT_END]
    expected = [(token, 1) for token in said[:6]] + [(token, 0) for token in forced]
    assert pairs == expected + [(token, 1) for token in [*b"ok", END]]
    assert [ids[0][0] for ids in model.heard[1:]] == [token for token, _ in pairs[:-1]]  # it hears what was forced
    results, masks = Engine(ScriptedModel(said), AsciiTokenizer()).generate_batch(PROMPT, temperature=0, max_tokens=50)
    assert results == [PROMPT + [token for token, _ in pairs[:-1]]]
    assert masks == [[0, 0, 0] + [mask for _, mask in pairs[:-1]]]


def test_forced_tokens_count_against_the_limit():
    """A long answer of the calculator must not push generation past the cache."""
    said = [PYTHON_START, *b"99999*99999", PYTHON_END]
    assert len(run(ScriptedModel(said), max_tokens=15)) == 15


@pytest.mark.parametrize(
    "said",
    [
        [PYTHON_START, PYTHON_END],  # empty
        [PYTHON_START, *b"1/0", PYTHON_END],  # failing
        [PYTHON_START, *b"import os", PYTHON_END],
        [*b"1+1", PYTHON_END],  # never opened
        [PYTHON_START, *b"1+1", END],  # never closed
    ],
)
def test_nothing_is_forced_without_a_result(said):
    """A calculator that answers a question nobody asked derails the text."""
    assert all(mask == [1] for _, mask in run(ScriptedModel([*said, *b"rest", END]), max_tokens=30))


def test_a_second_opening_begins_anew():
    """Otherwise the abandoned expression is glued to the front of the next."""
    said = [PYTHON_START, *b"5+", PYTHON_START, *b"1+1", PYTHON_END, *b"xxx", END]
    tokens = [column[0] for column, _ in run(ScriptedModel(said), max_tokens=50)]
    assert tokens == [*said[:8], OUTPUT_START, *b"2", OUTPUT_END, END]


def test_a_second_closing_answers_nothing():
    """The same result twice in a row reads as another question's answer."""
    said = [PYTHON_START, *b"1+1", PYTHON_END, *b"xxx", PYTHON_END, *b"yyy", END]
    tokens = [column[0] for column, _ in run(ScriptedModel(said), max_tokens=50)]
    assert tokens == [*said[:5], OUTPUT_START, *b"2", OUTPUT_END, PYTHON_END, *b"yyy", END]


def test_rows_use_the_calculator_independently():
    """Two samples that share a state answer each other's questions."""
    one = [PYTHON_START, *b"1+1", PYTHON_END, *b"xxx", END, *b"aaaaaa"]
    two = [*b"a", PYTHON_START, *b"2*4", PYTHON_END, *b"xxx", END, *b"aaaaa"]
    one[0] = two[0] = ord("a")  # both rows draw their first token from the same prompt
    one.insert(1, PYTHON_START)
    model = ScriptedModel(one, two)
    results, masks = Engine(model, AsciiTokenizer()).generate_batch(PROMPT, 2, temperature=0, max_tokens=50)
    for row, (expression, answer) in enumerate([(b"1+1", b"2"), (b"2*4", b"8")]):
        block = [PYTHON_START, *expression, PYTHON_END]
        assert results[row] == PROMPT + [*b"a", *block, OUTPUT_START, *answer, OUTPUT_END]
        assert masks[row] == [0, 0, 0, 1] + [1] * 5 + [0] * 3


# The engine with the real model


def small_gpt(**changes):
    torch.manual_seed(1)
    config = dict(sequence_len=16, vocab_size=134, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, window_pattern="SL")
    model = GPT(GPTConfig(**config | changes))
    model.init_weights()
    for parameter in model.parameters():  # with the starting weights attention does nothing
        if parameter.dim() == 2:
            parameter.data.normal_(std=0.3)
    return model.eval()


class TokenizerWithoutEnd(AsciiTokenizer):
    """No token of the model ends a text or calls the calculator, so all of them can be compared."""

    def encode_special(self, name):
        return -SPECIAL[name]

    def get_bos_token_id(self):
        return -BOS


@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 4}, {"n_kv_head": 1}, {"window_pattern": "L"}])
@pytest.mark.parametrize("prompt_length,max_tokens", [(1, 40), (5, 20), (16, 20), (30, 20)])
def test_greedy_equals_generate(changes, prompt_length, max_tokens):
    """An error in the cache, the positions or a window gives text that still looks like text.

    Windows are 8 and 16 tokens here, so the texts are shorter, as long, and longer than both.
    """
    model = small_gpt(**changes)
    prompt = torch.randint(0, 128, (prompt_length,), generator=torch.Generator().manual_seed(prompt_length)).tolist()
    expected = list(model.generate(prompt, max_tokens, temperature=0))
    engine = Engine(model, TokenizerWithoutEnd())
    columns = [column for column, _ in engine.generate(prompt, 2, max_tokens=max_tokens, temperature=0)]
    assert columns == [[token, token] for token in expected]
    assert len(set(expected)) > 3  # a model that repeats one token would prove little


def random_prompts(n):
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(1, 30, (n,), generator=generator).tolist()
    return [torch.randint(0, 128, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 4, "window_pattern": "L"}])
def test_many_prompts_get_the_answers_that_each_gets_alone(changes, batch_size):
    """A batch in which rows of different lengths disturb one another changes every score and looks healthy.

    Several texts end early and their rows are taken over; windows are 8 and 16 tokens.
    """
    model, prompts = small_gpt(**changes), random_prompts(17)
    model.lm_head.weight.data[END] *= 3
    engine = Engine(model, AsciiTokenizer())
    expected = {
        i: engine.generate_batch(prompt, max_tokens=40, temperature=0)[0][0][len(prompt) :]
        for i, prompt in enumerate(prompts)
    }
    finished = list(engine.generate_many(prompts, 40, batch_size=batch_size))
    assert dict(finished) == expected and len(finished) == len(prompts)
    assert len({len(tokens) for tokens in expected.values()}) > 4, "rows must end at different times"


def test_sampling_many_does_not_depend_on_the_batch():
    """An evaluation whose samples change with the batch size cannot be repeated on another machine."""
    engine, prompts = Engine(small_gpt(), AsciiTokenizer()), random_prompts(6)
    one, many = (dict(engine.generate_many(prompts, 12, 1.0, top_k=20, batch_size=size)) for size in (1, 4))
    assert one == many != dict(engine.generate_many(prompts, 12, 1.0, top_k=20, seed=43))


@pytest.mark.parametrize("seed", range(6))
def test_rows_come_and_go_without_disturbing_one_another(seed):
    """A row that moves into another's place with the wrong keys goes on with somebody else's text."""
    model, chance = small_gpt(), random.Random(seed)
    model.lm_head.weight.data[END] *= 2
    engine, prompts = Engine(model, AsciiTokenizer()), random_prompts(20)
    kinds = [(0.0, None), (1.0, 20), (0.7, None)]

    def new_row(i):
        temperature, top_k = kinds[i % 3]
        tokens = 1 + i * 7 % 30
        return row_of(prompt=prompts[i], max_tokens=tokens, temperature=temperature, top_k=top_k, seed=i, owner=i)

    def written_alone(i):
        batch, row = DecodeBatch(engine, 1, 70), new_row(i)
        batch.admit([row])
        while batch.rows:
            batch.step()
        return row.tokens

    alone = [written_alone(i) for i in range(20)]
    for i in range(0, 20, 3):  # the greedy ones
        tokens, _ = engine.generate_batch(prompts[i], max_tokens=1 + i * 7 % 30, temperature=0)
        assert tokens[0][len(prompts[i]) :] == alone[i]

    batch, waiting, finished, removed = DecodeBatch(engine, 5, 70), list(range(20)), {}, set()
    while waiting or batch.rows:
        if waiting and batch.free and chance.random() < 0.5:
            some = [waiting.pop() for _ in range(min(len(waiting), chance.randint(1, batch.free)))]
            batch.admit([new_row(i) for i in some])
        if batch.rows and chance.random() < 0.1:
            row = chance.choice(batch.rows)
            batch.remove(row)
            removed.add(row.owner)
            assert row.tokens == alone[row.owner][: len(row.tokens)]
        held = {row.owner: len(row.tokens) for row in batch.rows}
        stepped = batch.step()
        assert [row.owner for row in stepped if not row.completed and len(row.tokens) != held[row.owner] + 1] == []
        finished |= {row.owner: row.tokens for row in stepped if row.finished}
        assert len(batch.rows) + batch.free == 5
    assert finished.keys() | removed == set(range(20)) and not finished.keys() & removed
    assert all(tokens == alone[i] for i, tokens in finished.items()) and len(finished) > 10


def test_a_batch_takes_only_what_it_has_room_for():
    """A text that is longer than its cache would lose its last tokens, or write over another's."""
    batch = DecodeBatch(Engine(small_gpt(), AsciiTokenizer()), 2, 10)
    assert batch.step() == []
    with pytest.raises(ValueError, match="1 texts of up to 11 tokens do not fit into 2 rows of 10"):
        batch.admit([row_of(prompt=[1, 2], max_tokens=9)])
    batch.admit([row_of()])
    with pytest.raises(ValueError, match="do not fit into 1 rows"):
        batch.admit([row_of(), row_of()])


def test_a_step_costs_what_the_rows_cost_that_are_there():
    """One person who chats with a server of 32 places must not pay for 32."""
    model = small_gpt()
    batch, sizes, head = DecodeBatch(Engine(model, TokenizerWithoutEnd()), 8, 20), [], model.head
    model.head = lambda hidden: sizes.append(len(hidden)) or head(hidden)
    rows = [row_of() for _ in range(6)]
    batch.admit(rows)
    batch.step()
    for row in rows[:4]:
        batch.remove(row)
    batch.step()
    batch.step()
    assert sizes == [6, 2, 2]


def test_many_prompts_use_the_calculator():
    """An answer that is forced into the row of a neighbour, or that ends the text it belongs to."""
    model, script = small_gpt(), [*b"1+2"]
    engine, prompts = Engine(model, AsciiTokenizer()), random_prompts(5)
    said = iter([PYTHON_START, *script, PYTHON_END, *b"???", END])
    model.head = lambda hidden: torch.eye(134)[[next(said)] * len(hidden)].view(*hidden.shape[:-1], 134)
    answers = dict(engine.generate_many(prompts, 20, batch_size=5))
    expected = [PYTHON_START, *script, PYTHON_END, OUTPUT_START, *b"3", OUTPUT_END]
    assert answers == {i: expected for i in range(5)}


@pytest.mark.parametrize("arguments", [([[]], 5), ([[1]], 0), ([[1]], 5, 0.0, None, 42, 0)])
def test_senseless_arguments_for_many(arguments):
    """An empty prompt has no position to go on from; the error must not be one of tensor shapes."""
    with pytest.raises(ValueError, match="needed"):
        list(Engine(small_gpt(), AsciiTokenizer()).generate_many(*arguments))
    assert list(Engine(small_gpt(), AsciiTokenizer()).generate_many([], 5)) == []


def test_sampling_contracts():
    """Results that change from run to run, or samples that are all alike, make an evaluation worthless."""
    engine = Engine(small_gpt(), AsciiTokenizer())

    def sample(**kwargs):
        return engine.generate_batch(PROMPT, **{"num_samples": 6, "max_tokens": 8, "temperature": 1.0} | kwargs)[0]

    assert sample(seed=1) == sample(seed=1) != sample(seed=2)
    assert sample(seed=1, temperature=0) == sample(seed=2, temperature=0)
    assert len(sample()) == 6 and all(row[:3] == PROMPT and len(row) <= 3 + 8 for row in sample())
    first = [column for column, _ in engine.generate(PROMPT, num_samples=16, max_tokens=1)][0]
    assert len(set(first)) > 1
    assert sample(top_k=1, seed=3) == sample(temperature=0)


def test_sampling_leaves_training_undisturbed():
    """Tensors made in inference mode cannot be trained with; the global generator belongs to initialisation."""
    model = small_gpt().train()
    state = torch.get_rng_state()
    next(Engine(model, AsciiTokenizer()).generate(PROMPT, max_tokens=4))
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled() and model.training
    ids = torch.randint(0, 128, (2, 8))
    model(ids, ids).backward()
    assert model.lm_head.weight.grad.abs().sum() > 0
