import ast
import json
import re
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers import PYTHON, small_corpus, write_parquet
from nanochat.dataset import Corpus
from nanochat.runtime import UserError
from tasks import offline_tasks
from tasks.offline_problems import (
    TESTED_FUNCTIONS,
    offline_function_lessons,
    offline_function_tests,
    offline_identity_conversations,
    offline_word_problems,
)
from tasks.offline_tasks import (
    EASY_QUESTIONS,
    HARD_QUESTIONS,
    OFFLINE_SIZES,
    OPPOSITES,
    SEQUENCES,
    WORD_CATEGORIES,
    OfflineMaterial,
    add_document,
    offline_questions,
    opening_of,
    prepare_offline_tasks,
    prose_sentences,
    read_material,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def data_dir(corpus, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(tmp_path_factory.mktemp("base")))
        return Path(prepare_offline_tasks(corpus))


def rows_of(data_dir, repo, subset, split):
    return pq.read_table(data_dir / repo / subset / split / "00000.parquet").to_pylist()


def content_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_schemas_are_those_of_the_hub(data_dir):
    """A column that is named or nested otherwise than on the hub needs a second way of loading."""
    text, texts = pa.string(), pa.list_(pa.string())
    mmlu = {"question": text, "subject": text, "choices": texts, "answer": pa.int64()}
    arc = {"id": text, "question": text, "choices": pa.struct({"text": texts, "label": texts}), "answerKey": text}
    expected = {
        "HuggingFaceTB--smol-smoltalk/default": (
            ("train", "test"),
            {"messages": pa.list_(pa.struct({"content": text, "role": text})), "source": text},
        ),
        "cais--mmlu/all": (("auxiliary_train", "validation", "dev", "test"), mmlu),
        "cais--mmlu/auxiliary_train": (("train",), {"train": pa.struct(mmlu)}),
        "allenai--ai2_arc/ARC-Easy": (("train", "validation", "test"), arc),
        "allenai--ai2_arc/ARC-Challenge": (("train", "validation", "test"), arc),
        "openai--gsm8k/main": (("train", "test"), {"question": text, "answer": text}),
        "openai--openai_humaneval/openai_humaneval": (
            ("test",),
            dict.fromkeys(("task_id", "prompt", "canonical_solution", "test", "entry_point"), text),
        ),
    }
    found = {path.parent.relative_to(data_dir).as_posix() for path in data_dir.rglob("manifest.json")}
    assert found == {f"{folder}/{split}" for folder, (splits, _) in expected.items() for split in splits}
    for folder, (splits, columns) in expected.items():
        for split in splits:
            schema = pq.read_schema(data_dir / folder / split / "00000.parquet")
            assert schema.equals(pa.schema(columns)), folder


def test_manifests_describe_their_files(data_dir):
    """A manifest with other sizes or counts than the files makes the loader download or refuse them."""
    for path in data_dir.rglob("manifest.json"):
        manifest = json.loads(path.read_text())
        assert [manifest["repo"].replace("/", "--"), manifest["subset"], manifest["split"]] == list(path.parts[-4:-1])
        (file,) = manifest["files"]
        parquet = path.with_name(file["name"])
        assert file["bytes"] == parquet.stat().st_size
        assert file["rows"] == manifest["rows"] == pq.read_metadata(parquet).num_rows > 0


def test_the_readers_of_the_tasks_accept_every_row(data_dir):
    """A row that its task rejects would stop fine-tuning in the middle of an epoch."""
    from tasks.arc import ARC
    from tasks.customjson import CustomJSON
    from tasks.gsm8k import GSM8K
    from tasks.mmlu import MMLU
    from tasks.smoltalk import SmolTalk

    folder = str(data_dir)
    tasks = [SmolTalk(split, data_dir=folder) for split in ("train", "test")]
    tasks += [MMLU("auxiliary_train", "train", data_dir=folder), MMLU("all", "test", data_dir=folder)]
    tasks += [ARC(f"ARC-{level}", split, data_dir=folder) for level in ("Easy", "Challenge")
              for split in ("train", "validation", "test")]  # fmt: skip
    tasks += [GSM8K("main", split, data_dir=folder) for split in ("train", "test")]
    tasks.append(CustomJSON(str(data_dir / "identity_conversations.jsonl")))
    for task in tasks:
        for i in range(len(task)):
            messages = task[i]["messages"]
            roles = [message["role"] for message in messages if message["role"] != "system"]
            assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
    references = [row["answer"] for row in rows_of(data_dir, "openai--gsm8k", "main", "test")]
    gsm8k = GSM8K("main", "test", data_dir=folder)
    assert all(gsm8k.evaluate(gsm8k[i], gsm8k.rows[i]["answer"]) for i in range(len(references)))


def test_same_corpus_same_bytes(corpus, data_dir, tmp_path, monkeypatch):
    """Files that differ from run to run make results that nobody can repeat."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert content_of(Path(prepare_offline_tasks(corpus))) == content_of(data_dir)


def test_no_test_question_is_in_training(data_dir):
    """A question that was trained on tests memory, and its score says nothing."""
    trained = {row["question"] for row in rows_of(data_dir, "cais--mmlu", "all", "auxiliary_train")}
    for level in ("ARC-Easy", "ARC-Challenge"):
        trained |= {row["question"] for row in rows_of(data_dir, "allenai--ai2_arc", level, "train")}
    for split in ("validation", "dev", "test"):
        for row in rows_of(data_dir, "cais--mmlu", "all", split):
            assert row["question"] not in trained
    for level in ("ARC-Easy", "ARC-Challenge"):
        for split in ("validation", "test"):
            for row in rows_of(data_dir, "allenai--ai2_arc", level, split):
                assert row["question"] not in trained
    opened = {
        opening_of(row["messages"]) for row in rows_of(data_dir, "HuggingFaceTB--smol-smoltalk", "default", "train")
    }
    problems = {row["question"] for row in rows_of(data_dir, "openai--gsm8k", "main", "train")}
    for row in rows_of(data_dir, "HuggingFaceTB--smol-smoltalk", "default", "test"):
        assert opening_of(row["messages"]) not in opened
    for row in rows_of(data_dir, "openai--gsm8k", "main", "test"):
        assert row["question"] not in problems
    for row in rows_of(data_dir, "openai--openai_humaneval", "openai_humaneval", "test"):
        assert row["prompt"] not in opened
        assert not any(row["entry_point"] + "(" in opening for opening in opened)


def test_held_out_sentences_are_new(corpus):
    """A sentence that stands in both splits would be trained on and then asked about."""
    sentences = read_material(corpus, "val").sentences
    held_out = read_material(corpus, "val", OfflineMaterial(sentences=sentences[:3]))
    assert held_out.sentences == sentences[3:]
    assert not {sentence for pair in held_out.pairs for sentence in pair} & set(sentences[:3])


def test_multiple_choice_is_well_formed_and_balanced(data_dir):
    """Two equal choices, or a place that is right more often than the others, change what guessing scores."""
    for row in rows_of(data_dir, "cais--mmlu", "all", "auxiliary_train"):
        assert len(set(row["choices"])) == 4 and 0 <= row["answer"] < 4
    labels = set()
    for level in ("ARC-Easy", "ARC-Challenge"):
        rows = rows_of(data_dir, "allenai--ai2_arc", level, "test")
        places = [row["choices"]["label"].index(row["answerKey"]) for row in rows]
        assert len(rows) == OFFLINE_SIZES[level]["test"]
        assert max(map(places.count, range(4))) - min(map(places.count, range(4))) <= 1
        labels |= {tuple(row["choices"]["label"]) for row in rows}
        assert all(len(set(row["choices"]["text"])) == 4 for row in rows)
    assert labels == {tuple("ABCD"), tuple("1234")}


def test_answers_that_can_be_computed_are_right(corpus):
    """A wrong key teaches nonsense and caps every score below one."""
    material = read_material(corpus, "train")
    values = dict(zip(SEQUENCES["number"], range(1, 16), strict=True))
    questions = offline_questions("check", EASY_QUESTIONS | HARD_QUESTIONS, 1500, material, set())
    checked = set()
    for question in questions:
        right, choices = question.choices[question.answer], question.choices
        text = question.question
        if question.subject == "arithmetic":
            a, sign, b = re.fullmatch(r"What is (\d+) (\w+) (\d+)\?", text).groups()
            assert int(right) == {"plus": int(a) + int(b), "minus": int(a) - int(b), "times": int(a) * int(b)}[sign]
        elif question.subject == "number_comparison":
            assert int(right) == (max if "largest" in text else min)(map(int, choices))
        elif question.subject == "alphabet":
            assert right == min(choices)
        elif question.subject == "categories":
            (name,) = [name for name in WORD_CATEGORIES if name in text]
            assert [choice for choice in choices if choice in WORD_CATEGORIES[name].split()] == [right]
        elif question.subject == "opposites":
            word = text.split('"')[1]
            assert {f"{word} {right}", f"{right} {word}"} & set(OPPOSITES.split(", "))
        elif question.subject == "sequences" and "number" in text:
            assert values[right] - values[text.split('"')[1]] == (1 if "after" in text else -1)
        elif question.subject == "word_recall":
            sentence = text.split('"')[1].lower()
            assert [choice for choice in choices if re.search(rf"\b{choice}\b", sentence)] == [right]
        elif question.subject == "missing_word":
            assert any(text.split('"')[1].replace("___", right) == sentence for sentence in material.sentences)
        else:
            continue
        checked.add(question.subject)
    assert len(checked) == 8


def test_no_word_belongs_to_two_categories():
    """A word in two lists makes a question with two right answers."""
    words = " ".join(WORD_CATEGORIES.values()).split()
    assert len(words) == len(set(words))
    opposites = re.findall("[a-z]+", OPPOSITES)
    assert len(opposites) == len(set(opposites))


def test_word_problems_add_up():
    """A step that the calculator would contradict, or a final number that no step reached, teaches wrong sums."""
    rows = offline_word_problems(1500)
    assert len({row["question"] for row in rows}) == 1500
    for row in rows:
        *steps, last = row["answer"].split("\n")
        assert 1 <= len(steps) <= 3
        for step in steps:
            (text, call, value, after) = re.fullmatch(r".*?([\d*/+-]+) = <<([^=>]+)=(\d+)>>(\d+).*", step).groups()
            left, sign, right = re.fullmatch(r"(\d+)([-+*/])(\d+)", call).groups()
            results = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}
            result = int(left) / int(right) if sign == "/" else results[sign]
            assert text == call and float(value) == result and value == after
        assert last == f"#### {value}"


def test_solutions_pass_their_checks_and_only_they():
    """A test that its own solution fails can never be passed; one that any function passes measures nothing."""
    program = []
    for row in offline_function_tests():
        solution = row["prompt"] + row["canonical_solution"]
        ast.parse(solution)
        program += [solution, row["test"], f"check({row['entry_point']})"]
        program.append("try:\n    check(lambda *arguments: arguments[0])\nexcept Exception:\n    pass\n")
        program.append(f"else:\n    raise SystemExit('{row['entry_point']}')")
    subprocess.run([PYTHON, "-I", "-c", "\n".join(program)], check=True, timeout=30)


def test_lessons_are_valid_and_not_the_test():
    """A tested function among the lessons would be a leak; a lesson that is no Python teaches errors."""
    names = {function.name for function in TESTED_FUNCTIONS}
    purposes = {function.purpose for function in TESTED_FUNCTIONS}
    assert len(names) == len(purposes) == 24
    for request, reply in offline_function_lessons():
        code = re.fullmatch(r"```python\n(.*)\n```", reply, flags=re.DOTALL)[1]
        (function,) = ast.parse(code).body
        assert function.name not in names and function.name in request
        assert not any(purpose in request for purpose in purposes)


def test_identity_file_is_messages_line_by_line(data_dir):
    """A line that is not an array of alternating messages stops the whole file from loading."""
    lines = (data_dir / "identity_conversations.jsonl").read_text().splitlines()
    conversations = list(map(json.loads, lines))
    assert conversations == offline_identity_conversations() and len(lines) >= 200
    assert len(set(lines)) == len(lines)
    for conversation in conversations:
        roles = [message["role"] for message in conversation]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert "nanochat" in json.dumps(conversation) or len(roles) >= 2


def test_word_list_is_clean_and_sorted(data_dir):
    """A word with a capital, an accent or a blank breaks the spelling task's line per letter."""
    text = (data_dir / "words_alpha.txt").read_text()
    words = text.split("\n")[:-1]
    assert words == sorted(set(words)) and len(words) > 100
    assert all(re.fullmatch("[a-z]{3,10}", word) for word in words)


def test_prose_sentences_keeps_english_only():
    """Signatures, tables and lists in the questions would make them nonsense."""
    sentence = "Return the largest of the values in the array."
    assert prose_sentences(f"{sentence} This is `None` if\nthe array has no values.") == [
        sentence, "This is None if the array has no values."
    ]  # fmt: skip
    assert prose_sentences("Too short.") == [None]
    assert prose_sentences("Call foo_bar(x) to get the value of the array in x.") == [None]
    assert prose_sentences(f"{sentence}\n    {sentence}") == []
    assert prose_sentences("Name      Size of the object in the table of all.") == []


def test_entries_need_a_documented_name():
    """A heading taken for a name, or a story taken for documentation, gives questions without an answer."""
    sentence = "Return the largest of the values in the array."
    material = OfflineMaterial()
    add_document(material, f"numpy.core\n\nargmax\n\n{sentence}\n\nSee also\n\nThis is not about the name above it.")
    add_document(material, f"It was late in the evening of the day.\n\nargmax\n\n{sentence}")
    assert material.entries == [("numpy.core", "argmax", sentence)]


def test_finished_work_is_kept_and_damage_is_repaired(corpus, tmp_path, monkeypatch):
    """Building twice costs seconds at every start; trusting a broken folder costs the run."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(offline_tasks, "OFFLINE_SIZES", {name: dict.fromkeys(splits, 8)
                                                         for name, splits in OFFLINE_SIZES.items()})  # fmt: skip
    folder = Path(prepare_offline_tasks(corpus))
    before = content_of(folder)
    with monkeypatch.context() as patch:
        patch.setattr(offline_tasks, "build_offline_tasks", lambda *_: pytest.fail("built again"))
        prepare_offline_tasks(corpus)
    (folder / "words_alpha.txt").unlink()
    prepare_offline_tasks(corpus)
    assert content_of(folder) == before
    other = Corpus("other", corpus.train_files[1:] + corpus.train_files[:1], corpus.val_file)
    prepare_offline_tasks(other)
    assert content_of(folder)["complete.json"] != before["complete.json"]


def test_killed_build_leaves_nothing_that_looks_finished(corpus, tmp_path, monkeypatch):
    """Half of the files under the final name would be taken for all of them."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))

    def half_of_it(_, folder):
        (folder / "words_alpha.txt").write_text("half\n")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(offline_tasks, "build_offline_tasks", half_of_it)
        prepare_offline_tasks(corpus)
    assert not (tmp_path / "offline_tasks").exists()
    assert (Path(prepare_offline_tasks(corpus)) / "words_alpha.txt").read_text() != "half\n"


def test_text_without_sentences_is_refused(tmp_path, monkeypatch):
    """Without the sentence, a corpus of another language ends in an error of the random generator."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    files = [write_parquet(tmp_path / f"{name}.parquet", ["das ist kein englischer Text"] * 9) for name in "ab"]
    with pytest.raises(UserError, match="the train text of mine has only 0 plain English sentences"):
        prepare_offline_tasks(Corpus("mine", (files[0],), files[1]))
    assert not (tmp_path / "offline_tasks").exists()
