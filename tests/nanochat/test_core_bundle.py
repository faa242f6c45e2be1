import json
import stat
import zipfile

import core_bundles
import pytest

from nanochat import core_bundle
from nanochat.core_bundle import load_core_tasks, prepare_core_bundle, unpack_core_bundle
from nanochat.runtime import UserError

ITEM = {"query": "q", "choices": ["a", "b"], "gold": 1}


@pytest.fixture
def bundle(tmp_path):
    return core_bundles.write_core_bundle(tmp_path / "bundle")


def replace_in(path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def message_of(call, *args) -> str:
    with pytest.raises(UserError) as raised:
        call(*args)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_tasks_are_read_as_written(bundle):
    """A default that is not applied, or a column that is mixed up, changes scores without any error."""
    tasks = load_core_tasks(bundle)
    assert [(t.label, t.task_type, t.num_fewshot, t.delimiter, t.baseline) for t in tasks] == [
        ("choices0", "multiple_choice", 0, " ", 25.0),
        ("choices3", "multiple_choice", 3, "\nAnswer: ", 25.0),
        ("schema0", "schema", 0, " ", 50.0),
        ("schema3", "schema", 3, " ", 50.0),
        ("writing0", "language_modeling", 0, " ", 0.0),
        ("writing3", "language_modeling", 3, "\nAnswer: ", 0.0),
    ]
    assert tasks[0].examples == core_bundles.choice_questions()
    assert tasks[4].examples == core_bundles.writing_questions()
    assert tasks[0].place(2) == f"{bundle}/eval_data/some/choices0.jsonl, line 3"


def test_lines_are_counted_as_an_editor_does(bundle):
    """An empty line or a Unicode line separator inside a text must not shift the line that a message names."""
    path = bundle / "eval_data" / "some" / "choices0.jsonl"
    strange = json.dumps(ITEM | {"query": "a\u2028b\x0bc\x85d"}, ensure_ascii=False)
    path.write_text(f"{strange}\r\n\n{json.dumps(ITEM | {'choices': [3, 2.5]})}", encoding="utf-8")
    task = load_core_tasks(bundle)[0]
    assert task.line_numbers == [1, 3]
    assert task.examples == [ITEM | {"query": "a\u2028b\x0bc\x85d"}, ITEM | {"choices": ["3", "2.5"]}]


@pytest.mark.parametrize(
    "line, expected",
    [
        ('{"query": "q"', "not JSON (Expecting ',' delimiter at column 14)"),
        ("[1]", "not a JSON object: [1]"),
        ("[" * 100_000, ""),
        (json.dumps({"query": "q", "gold": 0}), 'a multiple_choice question without "choices"'),
        (json.dumps(ITEM | {"choices": ["a"]}), '"choices" must be a list of at least two texts'),
        (json.dumps(ITEM | {"choices": ["a", None]}), '"choices" must be text, not None'),
        (json.dumps(ITEM | {"query": ["q"]}), "\"query\" must be text, not ['q']"),
        (json.dumps(ITEM | {"gold": 2}), '"gold" is 2; it must be 0 to 1, one of the options'),
        (json.dumps(ITEM | {"gold": -1}), '"gold" is -1; it must be 0 to 1, one of the options'),
        (json.dumps(ITEM | {"gold": True}), '"gold" is True'),
        (json.dumps(ITEM | {"gold": "b"}), "\"gold\" is 'b'"),
    ],
)
def test_a_wrong_line_is_named(bundle, line, expected):
    """A KeyError after half an hour, or a gold of -1 that silently means the last choice."""
    path = bundle / "eval_data" / "some" / "choices0.jsonl"
    path.write_text(json.dumps(ITEM) + "\n\n" + line + "\n", encoding="utf-8")
    assert message_of(load_core_tasks, bundle).startswith(f"{path}, line 3: {expected}")


def test_bytes_that_are_not_text(bundle):
    """Broken encoding is a wrong line too."""
    path = bundle / "eval_data" / "some" / "choices0.jsonl"
    path.write_bytes(b'{"query": "\xff"}\n')
    assert message_of(load_core_tasks, bundle).startswith(f"{path}, line 1: ")


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ("icl_tasks:", "tasks:", "core.yaml has no list icl_tasks with at least one task in it"),
        ("  - 0\n", "  - [\n", "core.yaml, line 7: not YAML"),
        ("multiple_choice", "multiple choice", "core.yaml, line 2: choices0 has the icl_task_type 'multiple choice'"),
        ("multiple_choice", "[schema]", "core.yaml, line 2: choices0 has the icl_task_type ['schema']"),
        ("- label: choices0\n  ", "- ", "core.yaml, line 2: a task without label"),
        ("- label: choices0\n", "- 7\n- label: choices0\n", "core.yaml, line 2: a task without dataset_uri"),
        ("label: choices3", "label: choices0", "core.yaml, line 7: the label choices0 is there twice"),
        ("some/choices0.jsonl", "some/gone.jsonl", "core.yaml, line 2: there is no "),
        ("some/choices0.jsonl", "../core.yaml", "core.yaml, line 2: dataset_uri '../core.yaml' leads out of "),
        ("some/choices0.jsonl", "/etc/hostname", "core.yaml, line 2: dataset_uri '/etc/hostname' leads out of "),
        ("num_fewshot:\n  - 0", "num_fewshot: 0", "core.yaml, line 2: choices0 needs num_fewshot, a list"),
        ("  - 0", "  - -1", "core.yaml, line 2: choices0 needs num_fewshot, a list"),
        ("  - 3", "  - 8", "choices3.jsonl has 8 examples, too few for choices3: each is asked after 8 others"),
        ('"\\nAnswer: "', "5", "core.yaml, line 7: choices3 has the continuation_delimiter 5; it must be text"),
    ],
)
def test_a_wrong_core_yaml(bundle, old, new, expected):
    """Whoever edits the list of tasks must be told which line to look at."""
    replace_in(bundle / "core.yaml", old, new)
    assert expected in message_of(load_core_tasks, bundle)


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ("choices0,any,25", "other,any,25", "eval_meta_data.csv has no row for choices0"),
        ("choices0,any,25", "choices0,any,x", "eval_meta_data.csv, line 2: the random baseline of choices0 is 'x'"),
        ("choices0,any,25", "choices0,any,100", "eval_meta_data.csv, line 2: the random baseline of choices0 is '100'"),
        ("choices0,any,25", "choices0,any,nan", "eval_meta_data.csv, line 2: the random baseline of choices0 is 'nan'"),
        ('choices3,any,25,"a, b"', "choices3", "eval_meta_data.csv, line 3: the random baseline of choices3 is ''"),
        ("Random baseline", "Baseline", "eval_meta_data.csv, line 1: there is no column 'Random baseline'"),
    ],
)
def test_a_wrong_table_of_baselines(bundle, old, new, expected):
    """A baseline that is missing or read wrongly moves CORE without an error."""
    replace_in(bundle / "eval_meta_data.csv", old, new)
    assert expected in message_of(load_core_tasks, bundle)


@pytest.mark.parametrize("name", ["core.yaml", "eval_meta_data.csv", "eval_data/some/schema3.jsonl"])
def test_a_missing_file_is_named(bundle, name):
    """Before anything is evaluated, and by prepare_core_bundle already."""
    (bundle / name).unlink()
    for call in (load_core_tasks, prepare_core_bundle):
        assert f"there is no {bundle / name}" in message_of(call, bundle)


def test_a_task_without_examples(bundle):
    """An empty file would divide by zero at the end of its task."""
    path = bundle / "eval_data" / "some" / "choices0.jsonl"
    path.write_text("\n \n")
    assert message_of(load_core_tasks, bundle).startswith(f"{path} has no examples in it")


# The archive


def zip_of(folder, path, *extra) -> None:
    """The folder as an archive, with more entries (ZipInfo or name, content) after it."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, f"eval_bundle/{file.relative_to(folder)}")
        for name, content in extra:
            archive.writestr(name, content)


def everything_in(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def base(tmp_path, monkeypatch):
    folder = tmp_path / "base"
    folder.mkdir()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    monkeypatch.setattr(core_bundle, "CORE_BUNDLE_URL", "http://127.0.0.1:9/eval_bundle.zip")  # nobody answers there
    return folder


def test_prepare_unpacks_once_and_repairs(bundle, base):
    """A bundle that lost a file is made whole again from the archive; one that is whole is left alone."""
    zip_of(bundle, base / "eval_bundle.zip", ("__MACOSX/._x", "junk"), ("eval_bundle/empty/", ""))
    target = base / "eval_bundle"
    assert prepare_core_bundle() == str(target)
    assert everything_in(target) == everything_in(bundle)
    (target / "note").write_text("mine")
    prepare_core_bundle()
    assert (target / "note").exists()
    (target / "eval_data" / "some" / "schema0.jsonl").unlink()
    prepare_core_bundle()
    assert everything_in(target) == everything_in(bundle)
    assert [task.label for task in load_core_tasks(target)] == [task[0] for task in core_bundles.SMALL_TASKS]
    assert {path.name for path in base.iterdir()} == {"eval_bundle", "eval_bundle.zip", "eval_bundle.lock"}


def test_prepare_without_network(base):
    """A stack of retries and sockets is not an answer to a missing network."""
    message = message_of(prepare_core_bundle)
    assert "could not be downloaded from http://127.0.0.1:9/eval_bundle.zip (ConnectionError)" in message
    assert str(base / "eval_bundle") in message


def link_entry(name: str, kind: int) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.create_system, entry.external_attr = 3, (kind | 0o777) << 16
    return entry


@pytest.mark.parametrize(
    "entry, problem",
    [
        ("eval_bundle/../../evil", "leads out of the folder"),
        ("../evil", "leads out of the folder"),
        ("/tmp/evil", "has an absolute or malformed path"),
        ("eval_bundle\\..\\evil", "has an absolute or malformed path"),
        ("C:evil", "has an absolute or malformed path"),
        (link_entry("eval_bundle/link", stat.S_IFLNK), "is a link or a device"),
        (link_entry("eval_bundle/pipe", stat.S_IFIFO), "is a link or a device"),
    ],
)
def test_entries_that_would_escape(bundle, tmp_path, entry, problem):
    """An archive must not be able to write anywhere but into its own folder."""
    zip_of(bundle, tmp_path / "x.zip", (entry, "/etc/passwd"))
    before = everything_in(tmp_path)
    message = message_of(unpack_core_bundle, tmp_path / "x.zip", tmp_path / "target")
    assert message.startswith(f"{tmp_path / 'x.zip'}: the entry ") and problem in message
    assert everything_in(tmp_path) == before


def test_archives_that_are_too_much(bundle, tmp_path, monkeypatch):
    """A megabyte of zeros takes a kilobyte in an archive: the table of contents is believed, and then enforced."""
    zip_of(bundle, tmp_path / "x.zip", ("eval_bundle/zeros", bytes(1 << 20)))
    monkeypatch.setattr(core_bundle, "CORE_BUNDLE_MAX_BYTES", 1 << 20)
    message = message_of(unpack_core_bundle, tmp_path / "x.zip", tmp_path / "target")
    assert "would unpack to" in message and "at most 1,048,576" in message
    monkeypatch.undo()
    monkeypatch.setattr(core_bundle, "CORE_BUNDLE_MAX_ENTRIES", 5)
    assert "a bundle has at most 5" in message_of(unpack_core_bundle, tmp_path / "x.zip", tmp_path / "target")


def test_an_entry_larger_than_it_says(bundle, tmp_path):
    """A table of contents that lies about a size must not get more bytes onto the disk than it names."""
    path = tmp_path / "x.zip"
    zip_of(bundle, path, ("eval_bundle/zeros", bytes(1 << 20)))
    data = bytearray(path.read_bytes())
    real = (1 << 20).to_bytes(4, "little")
    assert data.count(real) == 2  # in the entry's own header and in the table of contents
    path.write_bytes(data.replace(real, (1000).to_bytes(4, "little")))
    assert f"{path} cannot be unpacked" in message_of(unpack_core_bundle, path, tmp_path / "target")
    assert everything_in(tmp_path) == everything_in(tmp_path) - {"target"}


def test_damaged_archives(bundle, tmp_path):
    """Half a download, flipped bits, no archive at all, one without a bundle, one without its list, one file twice."""
    path, target = tmp_path / "x.zip", tmp_path / "target"
    zip_of(bundle, path)
    good = path.read_bytes()
    damaged = bytearray(good)
    damaged[60:70] = bytes(10)
    for data in (good[: len(good) // 2], bytes(damaged), b"", b"<html>not found</html>"):
        path.write_bytes(data)
        assert f"{path} cannot be unpacked (" in message_of(unpack_core_bundle, path, target)
    zip_of(bundle / "eval_data" / "some", path)
    assert f"{path} holds an incomplete bundle: there is no eval_bundle/core.yaml" in message_of(
        unpack_core_bundle, path, target
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("something/else", "")
    assert "has no folder eval_bundle" in message_of(unpack_core_bundle, path, target)
    zip_of(bundle, path, ("eval_bundle/Core.yaml", ""))
    assert "the same file twice" in message_of(unpack_core_bundle, path, target)
    zip_of(bundle, path, ("eval_bundle/core.yaml/below", ""))
    assert f"{path} cannot be unpacked (" in message_of(unpack_core_bundle, path, target)
    assert everything_in(tmp_path) - everything_in(tmp_path / "bundle") >= {"x.zip"} and not target.exists()
    assert {entry.name for entry in tmp_path.iterdir()} == {"x.zip", "bundle"}
