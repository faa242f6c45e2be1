import base64
import hashlib
import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import regex
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.runtime import UserError
from nanochat.tokenizer import (
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    HuggingFaceTokenizer,
    RustBPETokenizer,
    describe_token_bytes,
    get_token_bytes,
    get_tokenizer,
    tokenizer_training_texts,
    train_tokenizer,
)

ENGLISH = [
    "The ferry left the harbour on Tuesday evening, and the lighthouse keeper waved until it was out of sight.",
    "It wasn't the first time; there were 1931 crossings, 27 of them in winter, and they'd never lost a bicycle.",
    "for i in range(10):\n    print(i, i * i)\n\nreturn the_result\n",
    "안녕하세요 여러분, 你好世界, naïve café 🙂",
] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return RustBPETokenizer.train_from_iterator(iter(ENGLISH), 400)


@pytest.fixture(scope="module")
def hf_tokenizer():
    return HuggingFaceTokenizer.train_from_iterator(iter(ENGLISH), 400)


@pytest.fixture
def saved(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    return tmp_path


def brute_force_bpe(texts, n_ranks):
    """The slowest possible trainer: count every pair anew before every merge. Spec section 5.4."""
    counts = Counter(chunk for text in texts for chunk in regex.findall(SPLIT_PATTERN, text))
    words = [(list(chunk.encode()), count) for chunk, count in counts.items()]
    tokens = [bytes([value]) for value in range(256)]
    while len(tokens) < n_ranks:
        pairs = Counter()
        for ids, count in words:
            for pair in zip(ids, ids[1:], strict=False):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for ids, _ in words:
            position = 0
            while position < len(ids) - 1:
                if (ids[position], ids[position + 1]) == best:
                    ids[position : position + 2] = [len(tokens)]
                position += 1
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="abc d1é\n'", max_size=40), min_size=1, max_size=5), st.integers(256, 290))
def test_training_equals_brute_force(texts, n_ranks):
    """A trainer that breaks ties differently would make the vocabulary depend on the version of a library."""
    expected = brute_force_bpe(texts, n_ranks)
    if len(expected) < n_ranks:
        with pytest.raises(UserError, match=f"at most {len(expected) + 9}"):
            RustBPETokenizer.train_from_iterator(iter(texts), n_ranks + 9)
    else:
        trained = RustBPETokenizer.train_from_iterator(iter(texts), n_ranks + 9)
        assert [trained.decode_single_token_bytes(rank) for rank in range(n_ranks)] == expected


def test_special_tokens_follow_the_merges(tokenizer):
    """Special ids anywhere else would not be those of the original (32,759 to 32,767 of 32,768)."""
    assert [tokenizer.encode_special(name) for name in SPECIAL_TOKENS] == list(range(391, 400))
    assert tokenizer.get_bos_token_id() == 391
    assert tokenizer.get_vocab_size() == 400
    assert tokenizer.get_special_tokens() == set(SPECIAL_TOKENS)
    assert tokenizer.id_to_token(391) == "<|bos|>"
    with pytest.raises(ValueError, match="not a special token"):
        tokenizer.encode_special("<|nobody|>")


def test_split_pattern_on_known_cases():
    """A slip in the pattern changes every token and is invisible until scores are compared."""
    cut = regex.findall(SPLIT_PATTERN, "It's 1234 o'CLOCK,  isn't\n\n it?!\r\n x  ")
    assert cut == ["It", "'s", " ", "12", "34", " o", "'CLOCK", ",", " ", " isn", "'t", "\n\n", " it", "?!\r\n",
                   " x", "  "]  # fmt: skip


text_with_special_tokens = st.lists(
    st.one_of(st.text(max_size=20), st.sampled_from(SPECIAL_TOKENS), st.sampled_from(["<|", "|>", "<|endoftext|>"])),
    max_size=6,
).map("".join)


@settings(max_examples=150, deadline=None)
@given(text=text_with_special_tokens)
def test_round_trip_of_any_text(tokenizer, hf_tokenizer, text):
    """Text that comes back changed, or a user who types <|assistant_start|> and becomes the assistant."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert max(ids, default=0) < 391


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=30))
def test_round_trip_hugging_face(hf_tokenizer, text):
    """The wrapper would lose or add spaces, as byte-level decoders do when they are set up wrongly."""
    assert hf_tokenizer.decode(hf_tokenizer.encode(text)) == text


def test_encode_forms(tokenizer, hf_tokenizer):
    """A batch that differs from its single texts, or a BOS that is forgotten in one of the two."""
    for any_tokenizer in (tokenizer, hf_tokenizer):
        bos, end = any_tokenizer.get_bos_token_id(), any_tokenizer.encode_special("<|output_end|>")
        single = [any_tokenizer.encode(text) for text in ENGLISH]
        assert any_tokenizer(ENGLISH) == single
        batch = any_tokenizer.encode(ENGLISH, prepend="<|bos|>", append=end, num_threads=2)
        assert batch == [[bos, *ids, end] for ids in single]
        assert any_tokenizer.encode("", prepend=bos) == [bos]
        with pytest.raises(ValueError, match="not int"):
            any_tokenizer.encode(3)


def test_hugging_face_wrapper(hf_tokenizer, tmp_path):
    """The generic class would not find BOS, hide special tokens, or lose them when saved."""
    assert hf_tokenizer.get_bos_token_id() == 0 and hf_tokenizer.id_to_token(0) == "<|bos|>"
    assert hf_tokenizer.get_special_tokens() == set(SPECIAL_TOKENS) and hf_tokenizer.get_vocab_size() == 400
    assert hf_tokenizer.decode([0, *hf_tokenizer.encode("hi")]) == "<|bos|>hi"
    hf_tokenizer.save(tmp_path)
    assert HuggingFaceTokenizer.from_directory(tmp_path).encode(ENGLISH) == hf_tokenizer.encode(ENGLISH)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer.json"):
        HuggingFaceTokenizer.from_directory(tmp_path)


def test_save_and_load(tokenizer, saved):
    """A tokenizer that comes back different makes every checkpoint speak another language."""
    again = RustBPETokenizer.from_directory(saved)
    assert again.encode(ENGLISH) == tokenizer.encode(ENGLISH)
    assert again.fingerprint() == tokenizer.fingerprint()
    assert again.special_ids == tokenizer.special_ids and again.get_vocab_size() == 400
    assert sorted(path.name for path in saved.iterdir()) == ["tokenizer.tiktoken", "tokenizer_config.json"]
    first_line = (saved / "tokenizer.tiktoken").read_text().splitlines()[0]
    assert first_line == base64.b64encode(b"\0").decode() + " 0"


def test_fingerprint_tells_tokenizers_apart(tokenizer):
    """A checkpoint would load with a tokenizer of the same size and other tokens."""
    other = RustBPETokenizer.train_from_iterator(iter(reversed(ENGLISH[1:])), 400)
    assert other.fingerprint() != tokenizer.fingerprint()
    same = RustBPETokenizer.train_from_iterator(iter(ENGLISH), 400)
    assert same.fingerprint() == tokenizer.fingerprint()


def replace_line(number, new):
    def damage(lines):
        lines[number - 1] = new(lines) if callable(new) else new

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (replace_line(300, lambda lines: lines[298]), r"tokenizer\.tiktoken, line 300: rank 298 where 299 belongs"),
        (lambda lines: lines.pop(299), r"tokenizer\.tiktoken, line 300: rank 300 where 299 belongs"),
        (replace_line(20, "!!! 19"), r"tokenizer\.tiktoken, line 20: .*not a base64 token"),
        (replace_line(20, "FA== nineteen"), r"tokenizer\.tiktoken, line 20: .*not a base64 token"),
        (replace_line(20, "FA=="), r"tokenizer\.tiktoken, line 20: .*not a base64 token"),
        (replace_line(20, "AA== 19"), r"tokenizer\.tiktoken, line 20: .*duplicate of rank 0"),
        (replace_line(20, "enp6eno= 19"), r"none of them is the single byte 19"),
        (replace_line(390, "enp6enp6 389"), r"sha256"),
        (lambda lines: lines.pop(), r"tokenizer\.tiktoken ends at line 390, but .* promises 391"),
        (lambda lines: lines.append("enp6enp6 391"), r"tokenizer\.tiktoken ends at line 392, but .* promises 391"),
    ],
)
def test_damaged_vocabulary(saved, damage, message):
    """A damaged vocabulary that loads without a word gives a model that talks nonsense."""
    path = saved / "tokenizer.tiktoken"
    lines = path.read_text().splitlines()
    damage(lines)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=message):
        RustBPETokenizer.from_directory(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 500}, "promises vocab_size 500"),
        ({"special_tokens": {"<|bos|>": 399, "<|user_start|>": 5}}, "promises vocab_size 400"),
        ({"special_tokens": None}, "lacks an entry or has a wrong one"),
        ({"pattern": None}, "lacks an entry or has a wrong one"),
        ({"pattern": "("}, "wrong pattern"),
        ({"bos_token": "<|nobody|>"}, "wrong pattern or bos_token"),
    ],
)
def test_damaged_config(saved, change, message):
    """A config that does not fit its vocabulary must not be believed."""
    path = saved / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (config | change).items() if value is not None}))
    with pytest.raises(UserError, match=message):
        RustBPETokenizer.from_directory(saved)


def test_missing_or_unreadable_files(saved, tmp_path, monkeypatch):
    """A traceback from json or pathlib where one sentence would do."""
    (saved / "tokenizer_config.json").write_text('{\n "pattern": "a",\n oops')
    with pytest.raises(UserError, match="line 3"):
        RustBPETokenizer.from_directory(saved)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    with pytest.raises(UserError, match="Train the tokenizer first"):
        get_tokenizer()


def test_token_bytes(tokenizer, saved, monkeypatch):
    """Lengths through a string count three bytes for half a character, and give special tokens a length."""
    token_bytes = get_token_bytes(tokenizer=tokenizer)
    assert token_bytes.dtype == torch.int32 and token_bytes.shape == (400,)
    assert token_bytes[:256].eq(1).all()  # also byte 0x80, which is no character on its own
    assert token_bytes[391:].eq(0).all()
    for text in ENGLISH:
        assert int(token_bytes[tokenizer.encode(text, prepend="<|bos|>")].sum()) == len(text.encode())
    summary = describe_token_bytes(token_bytes)
    lengths = [len(tokenizer.decode_single_token_bytes(rank)) for rank in range(391)]
    assert summary["num_special_tokens"] == 9
    assert (summary["token_bytes_min"], summary["token_bytes_max"]) == (1, max(lengths))
    assert summary["token_bytes_mean"] == pytest.approx(sum(lengths) / 391)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(saved / "base"))
    tokenizer.save(saved / "base" / "tokenizer")
    assert torch.equal(get_token_bytes(), token_bytes)


CONVERSATION = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2? <|assistant_start|>"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "I compute "},
                {"type": "python", "text": "2+2"},
                {"type": "python_output", "text": "4"},
                {"type": "text", "text": "four"},
            ],
        },
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
}


def test_render_conversation(tokenizer):
    """A wrong mask trains the model to speak for the user, or to invent what the calculator said."""
    before = json.dumps(CONVERSATION)
    ids, mask = tokenizer.render_conversation(CONVERSATION)
    expected = [
        (["<|bos|>", "<|user_start|>"], "Be brief.\n\n2+2? <|assistant_start|>", ["<|user_end|>"], 0),
        (["<|assistant_start|>"], "", [], 0),
        ([], "I compute ", [], 1),
        (["<|python_start|>"], "2+2", ["<|python_end|>"], 1),
        (["<|output_start|>"], "4", ["<|output_end|>"], 0),
        ([], "four", ["<|assistant_end|>"], 1),
        (["<|user_start|>"], "Sure?", ["<|user_end|>"], 0),
        (["<|assistant_start|>"], "", [], 0),
        ([], "Yes.", ["<|assistant_end|>"], 1),
    ]
    expected_ids, expected_mask = [], []
    for start, text, end, supervised in expected:
        piece = [*map(tokenizer.encode_special, start), *tokenizer.encode(text), *map(tokenizer.encode_special, end)]
        expected_ids += piece
        expected_mask += [supervised] * len(piece)
    assert (ids, mask) == (expected_ids, expected_mask)
    assert tokenizer.render_conversation(CONVERSATION, max_tokens=7) == (ids[:7], mask[:7])
    assert json.dumps(CONVERSATION) == before


def test_render_for_completion(tokenizer):
    """The prompt would contain the answer that the model is asked for."""
    ids = tokenizer.render_for_completion(CONVERSATION)
    shorter = {"messages": CONVERSATION["messages"][:-1]}
    assert ids == tokenizer.render_conversation(shorter)[0] + [tokenizer.encode_special("<|assistant_start|>")]
    with pytest.raises(ValueError, match="last message must be the assistant's"):
        tokenizer.render_for_completion(shorter)


def says(role, content="x"):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one"),
        ("hello", "at least one"),
        (["hello"], "message 1 is not a dict"),
        ([says("system")], "message 2 must exist"),
        ([says("system"), says("assistant")], "message 2 must exist"),
        ([says("system", 3), says("user")], r"message 1 \(system\) must have a string"),
        ([says("assistant")], "message 1 has the role 'assistant' where 'user' belongs"),
        ([says("system"), says("user"), says("user")], "message 3 has the role 'user' where 'assistant' belongs"),
        ([says("user"), says("assistant"), says("system")], "message 3 has the role 'system'"),
        ([says("user", ["x"])], r"message 1 \(user\) must have a string"),
        ([says("user"), says("assistant", None)], r"message 2 \(assistant\) must have a string or a list"),
        ([says("user"), says("assistant", ["x"])], "message 2, part 1 is not a dict"),
        ([says("user"), says("assistant", [{"type": "text", "text": 3}])], "message 2, part 1"),
        ([says("user"), says("assistant", [{"type": "image", "text": ""}])], "unknown type 'image'"),
    ],
)
def test_wrong_conversations(tokenizer, messages, message):
    """One bad row among a million must say which message is wrong, instead of failing somewhere inside."""
    with pytest.raises(ValueError, match=message):
        tokenizer.render_conversation({"messages": messages})


def test_visualize_tokenization(tokenizer):
    """Colours that do not follow the mask hide the very error that one looks for."""
    ids = tokenizer.encode("a", prepend="<|bos|>")
    shown = tokenizer.visualize_tokenization(ids, [0, 1], with_token_id=True)
    assert shown == "\033[91m<|bos|>\033[0m\033[90m(391)\033[0m|\033[92ma\033[0m\033[90m(97)\033[0m"


def write_parquet(path, texts, row_group_size=2, column="text"):
    pq.write_table(pa.table({column: texts, "other": [0] * len(texts)}), path, row_group_size=row_group_size)
    return str(path)


def test_training_texts_cap_and_limit(tmp_path):
    """The budget of characters would be exceeded, or a long document would dominate the vocabulary."""
    files = [
        write_parquet(tmp_path / "a.parquet", ["aaaaaaaaaa", "bb", "cccc"], column="body"),
        write_parquet(tmp_path / "b.parquet", ["dd", "ee", "ff"], column="body"),
    ]
    everything = list(tokenizer_training_texts(files, "body", max_chars=1000, doc_cap=5))
    assert everything == ["aaaaa", "bb", "cccc", "dd", "ee", "ff"]
    assert list(tokenizer_training_texts(files, "body", max_chars=11, doc_cap=5)) == everything[:4]
    assert list(tokenizer_training_texts(files, "body", max_chars=10, doc_cap=5)) == everything[:3]


def test_train_tokenizer_from_files(tokenizer, tmp_path):
    """Training from shards would differ from training on the same texts."""
    files = [
        write_parquet(tmp_path / "a.parquet", ENGLISH[:5], row_group_size=2),
        write_parquet(tmp_path / "b.parquet", ENGLISH[5:], row_group_size=3),
    ]
    assert train_tokenizer(files, "text", 400).fingerprint() == tokenizer.fingerprint()


def test_vocab_size_errors():
    """A vocabulary of another size than the model's embedding fails much later, inside a kernel."""
    with pytest.raises(UserError, match="at least 265"):
        RustBPETokenizer.train_from_iterator(iter(ENGLISH), 264)
    with pytest.raises(UserError, match="too small for vocab_size 9000"):
        RustBPETokenizer.train_from_iterator(iter(ENGLISH), 9000)
    assert RustBPETokenizer.train_from_iterator(iter(["abc"]), 265).encode("abc") == [97, 98, 99]


def test_published_encodings_keep_their_holes(monkeypatch, tmp_path):
    """cl100k_base has special ids beyond an unused one; its size and byte lengths would be wrong."""
    ranks = {bytes([value]): value for value in range(256)}
    encoding = tiktoken.Encoding(
        name="published", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    published = RustBPETokenizer.from_pretrained("published")
    assert published.get_bos_token_id() == 258 and published.get_vocab_size() == 259
    assert get_token_bytes(tokenizer=published).tolist() == [1] * 256 + [0] * 3
    published.save(tmp_path)
    assert RustBPETokenizer.from_directory(tmp_path).fingerprint() == published.fingerprint()
    content = (tmp_path / "tokenizer.tiktoken").read_bytes() + (tmp_path / "tokenizer_config.json").read_bytes()
    assert published.fingerprint() == hashlib.sha256(content).hexdigest()
