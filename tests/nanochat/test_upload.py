import hashlib
import io
import json
import logging
import re
import shutil
import socket
import subprocess
import sys
import time
import traceback
import types
from contextlib import redirect_stderr

import numpy as np
import pytest
import yaml
from huggingface_hub import parse_eval_result_entries, snapshot_download
from safetensors.numpy import save_file

from helpers import python_environment
from hub_stand_in import HubStandIn, Repository
from nanochat.dataset import check_hub_token
from nanochat.report import Report
from nanochat.runtime import UserError
from nanochat.stages import finish_stage
from nanochat.upload import (
    UPLOAD_MANIFEST,
    HubUpload,
    find_hub_token,
    may_be_uploaded,
    plan_upload,
    upload_to_hub,
)

TOKEN = "hf_writer"
SECRETS = (b"optimizer state", b"training text", b"notes of a person", b"hf_somebodys_token")


def write_weights(path, seed: int, kilobytes: int = 200):
    values = np.random.default_rng(seed).integers(0, 256, kilobytes * 1024, dtype=np.uint8)
    save_file({"weight": values}, path)


def write_export(folder, shards: int = 0):
    """What an export looks like: two large files when there are shards, else one."""
    folder.mkdir(parents=True)
    if shards:
        names = [f"model-{n:05d}-of-{shards:05d}.safetensors" for n in range(1, shards + 1)]
        for seed, name in enumerate(names):
            write_weights(folder / name, seed)
        index = {"metadata": {}, "weight_map": {f"layer.{n}": name for n, name in enumerate(names)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        write_weights(folder / "model.safetensors", seed=0)
    auto_map = {"AutoConfig": "configuration_nanochat.Config", "AutoModelForCausalLM": "modeling_nanochat.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "nanochat_gpt", "auto_map": auto_map}))
    for name in ("generation_config", "tokenizer", "tokenizer_config", "special_tokens_map"):
        (folder / f"{name}.json").write_text(json.dumps({"file": name}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    for name in ("configuration_nanochat.py", "modeling_nanochat.py"):
        (folder / name).write_text(f"# {name}\n")
    return folder


def write_checkpoint(folder, step: int = 10):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"model_{step:06d}.safetensors"
    write_weights(path, seed=step)
    meta = {"step": step, "fingerprint": "f" * 64, "files": {path.name: {"bytes": path.stat().st_size}}}
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta))
    return folder


def take_exam(base, exam: str, passed: int, total: int, source: str = "hub", answer: str = "It is 4.", **inputs):
    """Leave behind what an exam does: a stage's record and a number in metrics.json."""
    papers = [{"question": "What is 2+2?", "answer": answer, "passed": True}]
    results = {"task": exam, "passed": passed, "total": total, "papers": papers}
    inputs = {"source": source, "num_samples": 1, "temperature": 0.0} | inputs
    finish_stage(f"chat evaluation sft {exam}", inputs, results, folder=base)
    Report(base / "report").add_metrics("Chat evaluation sft", {exam: passed / total})


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A finished run with an export, and beside everything that is wanted something that must stay."""
    folder = tmp_path / "base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no login"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    no_pause = types.SimpleNamespace(sleep=lambda seconds: None, time=time.time, monotonic=time.monotonic)
    monkeypatch.setattr("huggingface_hub.utils._http.time", no_pause)
    write_export(folder / "export" / "d4")
    write_checkpoint(folder / "chatsft_checkpoints" / "d4")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.tiktoken").write_text("IQ== 0\n")
    (folder / "tokenizer" / "tokenizer_config.json").write_text("{}")
    report = folder / "report"
    report.mkdir()
    (report / "report.md").write_text("# report\n\n![loss](loss.png)\n![gone](gone.png)\n")
    (report / "report.html").write_text("<h1>report</h1>")
    for name in ("loss.png", "private.png"):
        (report / name).write_bytes(b"\x89PNG\r\n\x1a\n" + name.encode())
    Report(report).add_metrics("Base model training", {"Number of parameters": 7340296, "Total training time": "3m"})
    Report(report).add_metrics("Base model evaluation", {"val bpb": 1.5153})
    plant_decoys(folder)
    return folder


def plant_decoys(base):
    (base / "base_data").mkdir()
    (base / "base_data" / "shard_00000.parquet").write_bytes(SECRETS[1])
    for folder in ("export/d4", "chatsft_checkpoints/d4", "report", "tokenizer"):
        place = base / folder
        (place / "optim_000010_rank0.pt").write_bytes(SECRETS[0])
        (place / "model_000010.safetensors.tmp").write_bytes(SECRETS[0])
        (place / "shard_00000.parquet").write_bytes(SECRETS[1])
        (place / "notes.txt").write_bytes(SECRETS[2])
        for name in ("run.lock", "token", ".env", ".model.safetensors.x.tmp", "tokenizer.pkl", "train_log.jsonl"):
            (place / name).write_bytes(SECRETS[3])
        (place / "compile_cache").mkdir()
        (place / "compile_cache" / "config.json").write_bytes(SECRETS[2])
        (place / "more.parquet").symlink_to(base / "base_data" / "shard_00000.parquet")
    (base / "report" / "tokenizer-training.md").write_bytes(SECRETS[2])
    (base / "export" / "d4" / "README.md").write_bytes(SECRETS[2])


def plan_of(base, **options):
    options = {"checkpoint_dir": base / "chatsft_checkpoints" / "d4", "data_source": "fineweb-edu"} | options
    return plan_upload(base / "export" / "d4", **options)


@pytest.fixture
def hub(base, monkeypatch):
    with HubStandIn() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.address)
        yield running


def send(plan, repo="tiny", token=TOKEN, **options):
    return upload_to_hub(plan, repo, token, retry_seconds=(0, 0), **options)


def fetch(hub, repo, folder):
    path = snapshot_download(repo, endpoint=hub.address, token=TOKEN, local_dir=folder)
    shutil.rmtree(f"{path}/.cache")
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


EXPECTED = {
    "README.md", "chat_template.jinja", "config.json", "configuration_nanochat.py", "generation_config.json",
    "model.safetensors", "modeling_nanochat.py", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    "report/report.md", "report/report.html", "report/metrics.json", "report/loss.png",
    "checkpoint/model_000010.safetensors", "checkpoint/meta_000010.json", "checkpoint/tokenizer/tokenizer.tiktoken",
    "checkpoint/tokenizer/tokenizer_config.json", UPLOAD_MANIFEST,
}  # fmt: skip


# the plan


def test_plan_holds_the_list_and_nothing_else(base):
    """Optimizer state or data slips into the plan because it lies in a folder that is uploaded."""
    files = {file.path_in_repo: file for file in plan_of(base).files_for("ann/tiny")}
    assert set(files) == EXPECTED
    assert files["model.safetensors"].size == (base / "export/d4/model.safetensors").stat().st_size
    for file in files.values():
        assert not any(secret in file.read() for secret in SECRETS)


@pytest.mark.parametrize(
    "path",
    ["optim_000010_rank0.pt", "checkpoint/optim_000010_rank0.safetensors", "model.safetensors.tmp", "data/config.json",
     "report/../config.json", "run.lock", "train.parquet", "model.safetensors\n", "token", ".env", "setup.py",
     "report/notes.md", "report/.hidden.png", "checkpoint/train_log.jsonl", "tokenizer.pkl"],
)  # fmt: skip
def test_what_is_not_listed_has_no_place(path):
    """A name that merely resembles an allowed one is taken for it."""
    assert not may_be_uploaded(path)


def test_links_are_refused(base):
    """A link with a good name carries data or a token out."""
    target = base / "export/d4/config.json"
    for outside in (base / "base_data/shard_00000.parquet", base / "export/d4/token"):
        target.unlink()
        target.symlink_to(outside)
        with pytest.raises(UserError, match="config.json is a symbolic link"):
            plan_of(base)


@pytest.mark.parametrize(
    "name, message",
    [("config.json", "config.json is missing"), ("tokenizer.json", "tokenizer.json is missing"),
     ("model.safetensors", "model.safetensors is missing"), ("modeling_nanochat.py", "nanochat.py is missing")],
)  # fmt: skip
def test_missing_files_are_named(base, name, message):
    """A model goes up that nobody can load."""
    (base / "export/d4" / name).unlink()
    with pytest.raises(UserError, match=message):
        plan_of(base)


@pytest.mark.parametrize(
    "name, content",
    [("export/d4/model.safetensors", b"PK\x03\x04 a pickle"), ("export/d4/config.json", b"{"),
     ("report/loss.png", b"training text"), ("export/d4/modeling_nanochat.py", b"\xff\xfe"),
     ("chatsft_checkpoints/d4/meta_000010.json", b"")],
)  # fmt: skip
def test_files_are_what_their_names_say(base, name, content):
    """Another kind of file travels under an allowed name."""
    (base / name).write_bytes(content)
    with pytest.raises(UserError, match="damaged|no complete checkpoint"):
        plan_of(base)


def test_shards_come_from_the_index(base):
    """A shard of an older export goes along, or one of this export does not."""
    shutil.rmtree(base / "export/d4")
    folder = write_export(base / "export/d4", shards=2)
    write_weights(folder / "model-00003-of-00003.safetensors", 3)
    names = {file.path_in_repo for file in plan_of(base).files}
    assert {name for name in names if name.startswith("model")} == {
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
        "modeling_nanochat.py",
    }  # fmt: skip
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../token"}}))
    with pytest.raises(UserError, match="which is no file of an export"):
        plan_of(base)
    write_weights(folder / "model.safetensors", 4)
    with pytest.raises(UserError, match="two models"):
        plan_of(base)


def test_without_a_report_or_an_export(base):
    """A run that has nothing to upload ends in a traceback."""
    with pytest.raises(UserError, match="Export the model first"):
        plan_upload(base / "export/d9")
    (base / "report/report.md").unlink()
    with pytest.raises(UserError, match="report.md is missing"):
        plan_of(base)


def test_checkpoint_is_optional_and_the_last(base):
    """An older step is published, or a checkpoint that nobody asked for."""
    write_checkpoint(base / "chatsft_checkpoints/d4", step=20)
    assert {"checkpoint/model_000020.safetensors", "checkpoint/meta_000020.json"} == {
        file.path_in_repo for file in plan_of(base).files if re.match("checkpoint/m", file.path_in_repo)
    }
    assert not any("checkpoint" in file.path_in_repo for file in plan_of(base, checkpoint_dir=None).files)


def test_dry_run_uses_no_network(base, monkeypatch, capsys):
    """Looking at what would be uploaded already talks to the hub."""

    def blocked(*args, **kwargs):
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", blocked)
    monkeypatch.setattr(socket, "getaddrinfo", blocked)
    assert upload_to_hub(plan_of(base), "", TOKEN) is None
    assert upload_to_hub(plan_of(base), "ann/tiny", None) is None
    said = capsys.readouterr().out
    assert said.count("Dry run: nothing was sent") == 2 and "HF_TOKEN" in said and TOKEN not in said
    for path in EXPECTED:
        assert path in said
    total = sum(file.size for file in plan_of(base).files_for("ann/tiny"))
    assert f"{total:,}" in said and "stays here: " in said and "optim_000010_rank0.pt" in said


# the card and the results


def test_card(base):
    """The hub refuses the card, or it calls an offline exam by the name of a published one."""
    take_exam(base, "GSM8K", 50, 50, source="offline")
    take_exam(base, "ARC-Easy", 700, 2376)
    take_exam(base, "HumanEval", 9, 80)
    text = plan_of(base, weights_license="cc-by-4.0").card.text("ann/tiny")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "cc-by-4.0" and front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "text-generation" and front["language"] == ["en"]
    assert front["datasets"][0] == "karpathy/fineweb-edu-100b-shuffle"
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert "100.00%" in rows["GSM8K"] and "offline exam" in rows["GSM8K"]
    assert "29.46%" in rows["ARC-Easy"] and "all problems" in rows["ARC-Easy"]
    assert "9 of 80" in rows["HumanEval"] and "a part" in rows["HumanEval"]
    assert "1.5153" in rows["bits per byte"]
    assert 'from_pretrained("ann/tiny", trust_remote_code=True)' in text
    assert "- parameters: 7,340,296" in text and str(base) not in text
    assert "chatsft_checkpoints/d4" in text
    assert "checkpoint" not in plan_of(base, checkpoint_dir=None).card.text("ann/tiny")


def test_a_base_model_is_not_called_a_chat_model(base):
    """The card of a base model shows what the fine-tuned one scored."""
    Report(base / "report").add_metrics("SFT", {"Final validation bpb": 1.0179, "Number of conversations": 25804})
    take_exam(base, "GSM8K", 6, 1319)
    assert "fine-tuning to a chat model" in plan_of(base).card.text("ann/tiny")
    plan = plan_of(base, source="base")
    text = plan.card.text("ann/tiny")
    assert "fine-tuning" not in text and "GSM8K" not in text and "1.5153" in text
    assert not any(file.path_in_repo.startswith(".eval") for file in plan.files)


def test_own_files_stay_private(base):
    """The card publishes the path of somebody's documents."""
    text = plan_of(base, data_source=str(base / "base_data")).card.text("ann/tiny")
    assert "the uploader's own files" in text and "base_data" not in text and "datasets" not in text


def test_licence_is_checked(base):
    """A licence that the hub does not know makes it refuse the card after everything was sent."""
    with pytest.raises(UserError, match="weights_license"):
        plan_of(base, weights_license="MIT\nlicense: other")


@pytest.mark.parametrize("text", ["```\n# heading", "a ````` b\n`````\n---", "~~~", "\x1b[31mred\r\nnext", "x" * 5000])
def test_samples_cannot_leave_their_block(base, text):
    """A model that writes Markdown writes headings, or front matter, into its own card."""
    take_exam(base, "GSM8K", 1, 2, answer=text)
    lines = plan_of(base).card.text("ann/tiny").splitlines()
    start = next(number for number, line in enumerate(lines) if line.endswith("`text"))
    end = lines.index(lines[start].removesuffix("text"), start + 1)
    block, after = lines[start + 1 : end], lines[end + 1 :]
    assert block[0] == "User: What is 2+2?" and len("".join(block)) < 1600
    assert block[-1].split(" […]")[0][-3:] in text and "## How to load it" in after
    assert not any(c in "".join(lines) for c in "\x1b\r")


def test_eval_results_are_those_of_whole_published_exams(base):
    """An offline or partial exam ends up on a public leaderboard."""
    take_exam(base, "GSM8K", 6, 1319)
    take_exam(base, "MMLU", 10, 50)
    take_exam(base, "ARC-Easy", 594, 2376, source="offline")
    take_exam(base, "HumanEval", 16, 164, num_samples=5)
    take_exam(base, "SpellingBee", 250, 256)
    files = {file.path_in_repo: file for file in plan_of(base).files if file.path_in_repo.startswith(".eval")}
    assert list(files) == [".eval_results/gsm8k.yaml"]
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[".eval_results/gsm8k.yaml"].read()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 0.45)
    assert "6 of 1319 right" in entry.notes and re.fullmatch(r"\d{4}-\d\d-\d\d", entry.date)


def test_a_stale_record_lends_nothing(base):
    """An exam that was taken again in part is published with the numbers of an earlier, whole one."""
    take_exam(base, "GSM8K", 6, 1319)
    Report(base / "report").add_metrics("Chat evaluation sft", {"GSM8K": 0.5})
    plan = plan_of(base)
    assert not any(file.path_in_repo.startswith(".eval") for file in plan.files)
    assert "| GSM8K | 50.00% | number of problems not recorded |" in plan.card.text("ann/tiny")


# the upload


@pytest.mark.parametrize("chunk_bytes", [0, 50_000])
def test_round_trip(base, hub, tmp_path, chunk_bytes, capsys):
    """What comes down is not what went up, in one piece or in parts."""
    take_exam(base, "GSM8K", 6, 1319)
    hub.chunk_bytes = chunk_bytes
    plan = plan_of(base)
    assert send(plan) == f"{hub.address}/ann/tiny"
    assert hub.repositories["ann/tiny"].private
    assert bool(hub.parts) == bool(chunk_bytes)
    down = fetch(hub, "ann/tiny", tmp_path / "down")
    sent = {file.path_in_repo: file.read() for file in plan.files_for("ann/tiny")}
    assert down == sent | {".gitattributes": down[".gitattributes"]}
    assert set(sent) == EXPECTED | {".eval_results/gsm8k.yaml"}
    assert [message for _, _, message in hub.repositories["ann/tiny"].commits[1:]] == [
        "Upload of d4 by the nanochat speedrun"
    ]
    said = capsys.readouterr().out
    assert f"uploaded: {hub.address}/ann/tiny (private)" in said and "model.safetensors: " in said


def test_nothing_else_ever_leaves(base, hub):
    """Optimizer state, data or somebody's notes reach the hub in any request."""
    send(plan_of(base))
    arrived = hub.everything()
    assert b"modeling_nanochat.py" in arrived and b"# report" in arrived
    for secret in (*SECRETS, b"optim_0", b".parquet", b".lock", b"private.png", str(base).encode()):
        assert secret not in arrived


def test_the_token_goes_to_the_hub_alone(base, hub, capsys, caplog, tmp_path):
    """The token appears in output, a log, an error, a file, a body, or in a request to the storage."""
    caplog.set_level(logging.DEBUG)
    errors, spoken = [], io.StringIO()
    with redirect_stderr(spoken):
        send(plan_of(base))
        for token, repo in (("hf_wrong", "two"), ("hf_reader", "two"), ("hf_other", "ann/tiny"), (TOKEN, "a--b")):
            with pytest.raises(UserError) as caught:
                send(plan_of(base), repo, token=token)
            assert caught.value.__cause__ is None  # it would bring the request along
            chain, error = [], caught.value
            while error:
                chain += [repr(error), *traceback.format_exception(error), repr(vars(error))]
                error = error.__cause__ or error.__context__
            errors += chain
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    captured = capsys.readouterr()
    everywhere = "\n".join([*errors, captured.out, captured.err, caplog.text, spoken.getvalue()])
    logged = [repr(record.args) for record in caplog.records]
    for token in hub.users | {"hf_wrong": 0}:
        assert token not in everywhere and token not in str(logged)
        assert not any(token.encode() in content for content in written)
    for request in hub.requests:
        assert TOKEN.encode() not in request.body and TOKEN not in request.path
        if request.path.startswith("/storage") and not request.path.endswith("/verify"):
            assert "authorization" not in {name.lower() for name in request.headers}


def test_a_hub_that_repeats_the_token(base, hub, capsys):
    """A proxy that shows the request in its error page brings the token into the notebook."""
    hub.fail("GET", "/api/models/ann/tiny", 503)
    with pytest.raises(UserError, match=r"to repeat what it heard: Bearer \*\*\*") as caught:
        send(plan_of(base))
    assert TOKEN not in str(caught.value) and TOKEN not in capsys.readouterr().out


def test_a_leaked_token_is_not_published(base, hub):
    """A report that printed the environment publishes the token."""
    (base / "report/report.html").write_text(f"HF_TOKEN={TOKEN}")
    with pytest.raises(UserError, match="report/report.html contains your access token"):
        send(plan_of(base))
    assert not hub.requests


def test_second_version(base, hub, tmp_path):
    """A new version fails, sends all again, or leaves files of the old model beside the new one's."""
    send(plan_of(base))
    sent = hub.stored_bytes()
    send(plan_of(base))  # nothing changed: no commit
    assert hub.stored_bytes() == sent and len(hub.repositories["ann/tiny"].commits) == 2
    hub.repositories["ann/tiny"].edit("NOTES.md", b"put there by hand")
    shutil.rmtree(base / "export/d4")
    write_export(base / "export/d4", shards=2)
    send(plan_of(base))
    down = fetch(hub, "ann/tiny", tmp_path / "down")
    assert "model.safetensors" not in down and "model-00002-of-00002.safetensors" in down
    assert down["NOTES.md"] == b"put there by hand"
    new = sum((base / f"export/d4/model-0000{n}-of-00002.safetensors").stat().st_size for n in (1, 2))
    assert hub.stored_bytes() - sent <= new  # the checkpoint is there already
    assert len(hub.repositories["ann/tiny"].commits) == 4


def test_an_edited_card_stays(base, hub, capsys):
    """What somebody wrote into the model card on the hub is lost with the next upload."""
    send(plan_of(base))
    hub.repositories["ann/tiny"].edit("README.md", b"---\nlicense: mit\n---\nmy words")
    write_weights(base / "export/d4/model.safetensors", seed=5)
    send(plan_of(base))
    files = hub.repositories["ann/tiny"].files
    assert files["README.md"][0].endswith(b"my words")
    assert files["model.safetensors"][0] == (base / "export/d4/model.safetensors").read_bytes()
    assert "README.md was edited on the hub and stays" in capsys.readouterr().out


def test_somebody_elses_model_is_not_overwritten(base, hub):
    """Naming the wrong repository replaces another model."""
    send(plan_of(base), "ann/other")
    hub.repositories["ann/other"].edit(UPLOAD_MANIFEST, None)
    hub.repositories["ann/other"].edit("config.json", b'{"model_type": "llama"}')
    stored = hub.stored_bytes()
    with pytest.raises(UserError, match=r"ann/other holds another model: config.json would be overwritten"):
        send(plan_of(base), "other")
    assert hub.stored_bytes() == stored and len(hub.repositories["ann/other"].commits) == 4


def test_a_repository_made_on_the_web_page(base, hub):
    """A repository that exists with nothing but a card cannot be used."""
    repository = hub_repository(hub, "ann/tiny", private=False)
    repository.edit("README.md", b"---\nlicense: mit\n---\n")
    with pytest.raises(UserError, match="ann/tiny is public, and this upload is meant to be private"):
        send(plan_of(base), "ann/tiny")
    assert not hub.stored_bytes()
    send(plan_of(base), "ann/tiny", private=False)
    assert b"## Results" in repository.files["README.md"][0] and not repository.private


def hub_repository(hub, name: str, private: bool):
    repository = Repository(private)
    repository.commit("initial commit")
    hub.repositories[name] = repository
    return repository


@pytest.mark.parametrize("fault", ["connection", "storage", "second part"])
def test_going_on_after_an_interruption(base, hub, fault):
    """After a broken connection everything is sent again, or half a model is visible."""
    plan = plan_of(base)
    if fault == "second part":
        hub.chunk_bytes = 150_000
    second = hashlib.sha256((base / "chatsft_checkpoints/d4/model_000010.safetensors").read_bytes()).hexdigest()
    address = f"/storage/{second}" + ("/2" if fault == "second part" else "")
    if fault == "storage":
        hub.fail("PUT", address, 503)
    else:
        hub.drop("PUT", address)
    with pytest.raises(UserError, match=r"1 of 2 large files are stored. Run again to go on") as caught:
        send(plan)
    assert "checkpoint/model_000010.safetensors" in str(caught.value)
    assert set(hub.repositories["ann/tiny"].files) == {".gitattributes"}
    first = (base / "export/d4/model.safetensors").stat().st_size
    assert first <= hub.stored_bytes() < first + 200_000
    hub.faults.clear()
    before = hub.stored_bytes()
    send(plan)
    rest = (base / "chatsft_checkpoints/d4/model_000010.safetensors").stat().st_size
    pictures = (base / "report/loss.png").stat().st_size
    assert hub.stored_bytes() - before == rest + pictures
    assert EXPECTED <= set(hub.repositories["ann/tiny"].files)


def test_a_hiccup_is_waited_out(base, hub):
    """One bad answer from the hub ends the upload."""
    hub.fail("GET", "/api/whoami-v2", 503, times=1)
    hub.fail("POST", ".*/commit/.*", 500, times=2)
    hub.drop("PUT", "/storage/.*", times=1)
    send(plan_of(base))
    assert EXPECTED <= set(hub.repositories["ann/tiny"].files)


def test_commit_that_keeps_failing(base, hub):
    """An error at the very end is a traceback, or costs the upload of everything."""
    hub.fail("POST", ".*/commit/.*", 500)
    with pytest.raises(UserError, match=r"making the commit \(answer 500.*2 of 2 large files are stored"):
        send(plan_of(base))
    assert set(hub.repositories["ann/tiny"].files) == {".gitattributes"}
    hub.faults.clear()
    before = hub.stored_bytes()
    send(plan_of(base))
    assert hub.stored_bytes() == before


def test_commit_whose_answer_is_lost(base, hub):
    """The same commit is made twice, or fails because the files it deletes are gone."""
    send(plan_of(base))
    shutil.rmtree(base / "export/d4")
    write_export(base / "export/d4", shards=2)
    hub.answer_lost("POST", ".*/commit/.*")
    send(plan_of(base))
    assert len(hub.repositories["ann/tiny"].commits) == 3


def test_a_change_by_somebody_else_is_noticed(base, hub, monkeypatch):
    """Two uploads at once mix their files."""
    changes = HubUpload.changes

    def changes_then_commit(self):
        found = changes(self)
        hub.repositories["ann/tiny"].commit("somebody else")
        return found

    monkeypatch.setattr(HubUpload, "changes", changes_then_commit)
    with pytest.raises(UserError, match="somebody else changed ann/tiny"):
        send(plan_of(base))


def test_damage_on_arrival_is_noticed(base, hub, monkeypatch):
    """A file that the hub has in another form counts as uploaded."""
    commit = HubUpload.commit

    def commit_then_damage(self):
        revision = commit(self)
        name, files, message = hub.repositories["ann/tiny"].commits[-1]
        content = files["model.safetensors"][0]
        files["model.safetensors"] = (content[:-1] + b"x", True)
        return revision

    monkeypatch.setattr(HubUpload, "commit", commit_then_damage)
    with pytest.raises(UserError, match="model.safetensors did not arrive as it was sent"):
        send(plan_of(base))


@pytest.mark.parametrize(
    "token, repo, message",
    [("hf_wrong", "tiny", "does not accept the access token"), ("hf_reader", "tiny", "may not write to ann/tiny"),
     ("hf_other", "ann/tiny", "may not write to ann/tiny")],
)  # fmt: skip
def test_tokens_that_do_not_do(base, hub, token, repo, message):
    """A wrong token fails after the upload, or with a page of traceback."""
    with pytest.raises(UserError, match=message):
        send(plan_of(base), repo, token=token)
    assert not hub.repositories and not hub.stored_bytes()


def test_existing_repository_without_permission(base, hub):
    """Somebody else's repository that can be read is filled until the commit fails."""
    hub_repository(hub, "ann/tiny", private=False)
    with pytest.raises(UserError, match="may not write to ann/tiny"):
        send(plan_of(base), "ann/tiny", token="hf_other", private=False)
    assert not hub.stored_bytes()


@pytest.mark.parametrize("repo", ["a--b", "ann/tiny/more", "my model", "-x", "x.git", "https://huggingface.co/ann/x"])
def test_names_that_the_hub_does_not_take(base, hub, repo):
    """A bad name is found out by the hub, after the plan was approved."""
    with pytest.raises(UserError, match="is no name for a repository"):
        send(plan_of(base), repo)
    with pytest.raises(UserError, match="is no name for a repository"):
        upload_to_hub(plan_of(base), repo, None)
    assert not hub.requests


def test_no_hub_there(base, monkeypatch):
    """Without a network the notebook ends in a page of traceback."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="stopped while checking the access token"):
        send(plan_of(base))


def test_only_one_process_uploads(base, hub, monkeypatch):
    """Each of eight processes makes its own commit."""
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert send(plan_of(base)) is None and not hub.requests


# the client's other storage

UPLOADER = """
import sys
from nanochat.runtime import UserError
from nanochat.upload import plan_upload, upload_to_hub
export, checkpoint = sys.argv[1:]
try:
    upload_to_hub(plan_upload(export, checkpoint_dir=checkpoint), "tiny", "hf_writer", retry_seconds=())
except UserError as error:
    print("UserError:", error)
"""


def upload_with_xet(base, hub, tmp_path) -> str:
    """An upload by a new process, whose client uses Xet; what it printed. The files large enough for chunks."""
    places = {"HF_HOME": tmp_path / "home", "HF_XET_CACHE": tmp_path / "xet", "HF_HUB_DISABLE_PROGRESS_BARS": 1}
    environment = python_environment(HF_ENDPOINT=hub.address, OMP_NUM_THREADS=1, **places)
    folders = [str(base / "export/d4"), str(base / "chatsft_checkpoints/d4")]
    done = subprocess.run(
        [sys.executable, "-c", UPLOADER, *folders], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0 and TOKEN not in done.stdout + done.stderr, done.stderr
    written = [file for place in (places["HF_HOME"], places["HF_XET_CACHE"]) for file in place.rglob("*")]
    assert not any(TOKEN.encode() in file.read_bytes() for file in written if file.is_file())
    return done.stdout


def test_xet_storage(base, tmp_path, monkeypatch):
    """The way that the client takes by default fails, or an interruption costs what was stored before."""
    (base / "report/loss.png").write_bytes(b"\x89PNG\r\n\x1a\n" + np.random.default_rng(1).bytes(70_000))
    with HubStandIn(xet=True) as hub:
        hub.fail("POST", "/v1/xorbs/.*", 400, after=1)
        said = upload_with_xet(base, hub, tmp_path)
        assert "UserError: the upload to ann/tiny stopped while sending checkpoint/model_000010" in said
        assert "1 of 2 large files are stored" in said and set(hub.repositories["ann/tiny"].files) == {".gitattributes"}
        hub.faults.clear()
        before = hub.stored_bytes()
        said = upload_with_xet(base, hub, tmp_path)
        second = base / "chatsft_checkpoints/d4/model_000010.safetensors"
        rest = second.stat().st_size + (base / "report/loss.png").stat().st_size
        assert rest <= hub.stored_bytes() - before < rest + 1000  # what had arrived is not sent again
        assert f"uploaded: {hub.address}/ann/tiny (private)" in said
        assert not any(request.method == "PUT" for request in hub.requests)
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        down = fetch(hub, "ann/tiny", tmp_path / "down")
        assert down["model.safetensors"] == (base / "export/d4/model.safetensors").read_bytes()
        assert set(down) == EXPECTED | {".gitattributes"}
        assert not any(secret in hub.everything() for secret in SECRETS)


def test_hub_without_xet(base, hub, tmp_path):
    """A hub of one's own that has no Xet is refused with an error that nobody can act on."""
    said = upload_with_xet(base, hub, tmp_path)
    assert "UserError: " in said and "HF_HUB_DISABLE_XET=1" in said


# the token


def colab_drawer(monkeypatch, get):
    userdata = types.SimpleNamespace(get=get)
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(userdata=userdata))
    monkeypatch.setitem(sys.modules, "google", types.SimpleNamespace(colab=sys.modules["google.colab"]))


def test_where_the_token_comes_from(base, monkeypatch, tmp_path):
    """A stored login hides the secret of the notebook, or a refused secret ends the upload."""
    assert find_hub_token() is None
    (tmp_path / "no login").write_text("hf_stored\n")
    assert find_hub_token() == "hf_stored"
    monkeypatch.setenv("HF_TOKEN", "hf_environment\n")
    assert find_hub_token() == "hf_environment"
    colab_drawer(monkeypatch, lambda name: {"HF_TOKEN": "hf_colab"}[name])
    assert find_hub_token() == "hf_colab"

    def refused(name):
        raise RuntimeError("NotebookAccessError")

    colab_drawer(monkeypatch, refused)
    assert find_hub_token() == "hf_environment"


def test_marks_of_an_earlier_run_stay_at_home(base):
    """A stage that was skipped this time, whose old marks, of another model, reach the card and a leaderboard."""
    take_exam(base, "GSM8K", 132, 1319)
    report = Report(base / "report")
    report.add_metrics("Base model evaluation", {"val bpb": 1.5})

    def published():
        plan = plan_of(base)
        (numbers,) = [file for file in plan.files if file.path_in_repo == "report/metrics.json"]
        return plan.card.text("ann/tiny"), json.loads(numbers.read()), [file.path_in_repo for file in plan.files]

    card, metrics, paths = published()
    assert "132 of 1,319" in card and "Chat evaluation sft" in metrics and ".eval_results/gsm8k.yaml" in paths
    report.set_provenance({"parameters": {"skip": "chat_eval"}})
    card, metrics, paths = published()
    assert "GSM8K" not in card and "Chat evaluation sft" not in metrics and ".eval_results/gsm8k.yaml" not in paths
    assert "1.5000" in card and metrics["Base model evaluation"] == {"val bpb": 1.5} and metrics["schema"] == 1


def test_a_bad_token_is_found_before_the_training(monkeypatch):
    """An upload that fails after an hour for what could have been seen in a second; or a run refused for a bad line."""
    monkeypatch.setattr("nanochat.dataset.get_token", lambda: None)
    assert "there is no HF_TOKEN" in check_hub_token(None)
    with HubStandIn() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        assert check_hub_token(TOKEN) == ""
        with pytest.raises(UserError, match=r"is not accepted by the hub \(answer 401\)") as wrong:
            check_hub_token("hf_wrong")
        assert "hf_wrong" not in str(wrong.value)
    assert "cannot be reached" in check_hub_token(TOKEN)
