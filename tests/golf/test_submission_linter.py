"""The linter against the published record, rebuilt from its facts, and against folders broken one way at a time."""

import hashlib
import json
from decimal import Decimal

import pytest
from published_record import BASELINE, BEFORE, CHANGES, README, log_of, script_of, write_published_record

from golf.packed_script import pack_script
from golf.seed_planner import SeedResult
from golf.submission_linter import (
    FINDING_HEADER,
    finding_rows,
    lint_submission,
    parse_training_log,
    printed_alike,
    shipped_code,
)
from nanochat.runtime import UserError

SETTINGS = BASELINE | CHANGES


@pytest.fixture
def record(tmp_path):
    return write_published_record(tmp_path)


def of_rule(findings, rule, severity=None):
    return [f.message for f in findings if f.rule == rule and severity in (None, f.severity)]


def clean(folder):
    """Make the record honest: one script for all logs, sizes of that script, a README that claims little."""
    shipped = (folder / "train_gpt.py").read_text()
    (folder / "train.log").write_text(log_of(shipped, 1337, SETTINGS, 47_759))
    claims = json.loads((folder / "submission.json").read_text()) | {"bytes_total": 15_820_684 + 47_759}
    (folder / "submission.json").write_text(json.dumps(claims))
    (folder / "README.md").write_text(f"script {hashlib.sha256(shipped.encode()).hexdigest()}\n")
    return folder


def edit(folder, name, old, new):
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new))


def test_the_published_record_counts_the_code_of_another_script(record):
    """The finding that this linter exists for: 47,642 claimed bytes are not those of the shipped 47,759."""
    findings = lint_submission(record)
    (code,) = of_rule(findings, "code-bytes", "error")
    assert "47,642 bytes of code, the shipped code has 47,759" in code and "embedded in train.log" in code
    totals = of_rule(findings, "bytes-total", "error")
    assert {total.split()[0] for total in totals} == {"train.log", "submission.json", "README.md"}
    for total in totals:
        assert "claims 15,868,326 bytes" in total and "15,868,443" in total
        assert "15,820,684 (model, train.log) + 47,642 (code: those of the script embedded in train.log" in total


def test_the_published_record_was_not_written_by_its_script(record):
    """A log of another script proves nothing about this one."""
    findings = lint_submission(record)
    (differs,) = of_rule(findings, "script-differs", "error")
    assert "train.log was written by another script (47,642 bytes" in differs and "47,759 bytes" in differs
    assert of_rule(findings, "mixed-scripts", "error")
    assert len(of_rule(findings, "script-hash", "warning")) == 3
    assert of_rule(findings, "one-seed", "note") == ["submission.json: the score is that of seed 1337 alone"]


def test_the_published_record_beats_a_number_from_nowhere(record):
    """1.21613611 stands in no log, and its margin and its baseline are those of another unit and another text."""
    findings = lint_submission(record)
    (unknown,) = of_rule(findings, "unknown-number")
    assert "1.21613611 occurs in no log" in unknown
    (margin,) = of_rule(findings, "margin-unit")
    assert "1.21111" in margin.replace("1.21113611", "1.21111") and "which is 0.00296 bits per byte here" in margin
    (baseline,) = of_rule(findings, "baseline-text")
    assert "1.2244" in baseline and "the gain is 0.0262" in baseline


def test_the_claim_against_the_logs_of_the_record_before(record):
    """With the earlier record's real logs the claim of a significant record does not hold."""
    previous = [SeedResult(i, float(nats), float(bpb)) for i, (nats, bpb) in enumerate(BEFORE)]
    (verdict,) = of_rule(lint_submission(record, previous=previous), "significance", "error")
    assert "does not clear" in verdict and "t = 1.89" in verdict and "p = 0.0996" in verdict


def test_an_honest_folder_has_neither_errors_nor_warnings(record):
    """A linter that always complains is not read."""
    findings = lint_submission(clean(record), run_import=True)
    assert {(f.severity, f.rule) for f in findings} == {("note", "paths"), ("note", "import"), ("note", "one-seed")}
    assert of_rule(findings, "import") == ["train_gpt.py imports from inside its folder"]
    assert all(len(row) == len(FINDING_HEADER) for row in finding_rows(findings))


@pytest.mark.parametrize(
    ("name", "old", "new", "rule"),
    [
        ("train.log", "val_bpb:1.20143417", "val_bpb:1.21143417", "bytes-per-token"),
        ("train.log", "val_bpb:1.1980", "val_bpb:1.2980", "bytes-per-token"),
        ("train.log", "final_int8_zlib_roundtrip_exact val_loss:2.02857127", "x val_loss:nan", "result"),
        ("train.log", "tokens:62021632", "tokens:63779840", "mixed-texts"),
        ("train.log", "\nseed:1337", "\nseed:1338", "seeds"),
        ("train.log", "int8+zlib: 15868443 bytes", "int8+zlib: 15868000 bytes", "bytes-total"),
        ("train.log", "int8+zlib: 15820684 bytes", "int8+zlib: 15990000 bytes", "size-limit"),
        ("submission.json", '"val_bpb": 1.20143417', '"val_bpb": 1.19143417', "val-bpb"),
        ("submission.json", '"val_loss": 2.02857127', '"val_loss": 2.02522281', "one-seed"),
        ("submission.json", '"bytes_code": 47759', '"bytes_code": 16600', "code-bytes"),
        ("submission.json", '"author"', '"auteur"', "json-keys"),
        ("submission.json", "{", "[", "json-keys"),
        ("README.md", "script ", "val_bpb:1.1955 ", "readme-score"),
        ("README.md", "script ", "Code size: 48,000 bytes ", "code-bytes"),
        ("README.md", "script ", "Serialized model int8+zlib: 15,000,000 bytes ", "model-bytes"),
        ("README.md", "script ", "Total submission size int8+zlib: `15,868,444 bytes` ", "bytes-total"),
    ],
)
def test_one_planted_fault_is_found(record, name, old, new, rule):
    """Each cross-check must fire on its own fault, in a folder that is otherwise right."""
    edit(clean(record), name, old, new)
    assert of_rule(lint_submission(record), rule, "error"), finding_rows(lint_submission(record))


def test_an_empty_json_lacks_everything(record):
    """The emptiest claim of all, and the only one that was never compared."""
    (clean(record) / "submission.json").write_text("{}")
    assert "lacks author, github_id, name, date, val_bpb" in of_rule(lint_submission(record), "json-keys", "error")[0]


def test_logs_without_a_seed_are_several_logs(record):
    """Three runs that do not say their seed counted as one, and the mean of all three called wrong."""
    clean(record)
    for path in record.glob("*.log"):
        edit(record, path.name, "\nseed:", "\nrandom:")
    claims = json.loads((record / "submission.json").read_text()) | {"val_loss": 2.02844619, "val_bpb": 1.20136009}
    (record / "submission.json").write_text(json.dumps(claims))
    findings = lint_submission(record)
    assert {(f.severity, f.rule) for f in findings} == {("note", "paths"), ("warning", "seeds")}
    edit(record, "submission.json", "1.20136009", "1.20136")
    edit(record, "submission.json", "2.02844619", "2.0283")
    assert "train.log 2.02857127" in of_rule(lint_submission(record), "val-loss", "error")[0]


def test_the_settings_of_the_readme_are_held_against_the_logs(record):
    """A README that tells of another sequence length, or of a warmdown that nobody can check."""
    findings = lint_submission(record)
    (silent,) = of_rule(findings, "readme-setting")
    assert "WARMDOWN_ITERS=3000" in silent and "TRAIN_SEQ_LEN" not in silent  # the logs print this one
    edit(clean(record), "README.md", "script ", "`SEED=1338 TRAIN_SEQ_LEN=2048`, MAX_WALLCLOCK_SECONDS=600. ")
    (told,) = of_rule(lint_submission(record), "readme-setting", "warning")
    assert told == "README.md: TRAIN_SEQ_LEN is 2048, the logs print 4096"


def test_weights_inside_the_script_are_weighed(record):
    """A script of sixteen megabytes beside logs that name no model."""
    for path in clean(record).glob("*.log"):
        path.unlink()
    (record / "train_gpt.py").write_text(f"weights = '{'a' * 16_000_000}'\n")
    (message,) = of_rule(lint_submission(record), "size-limit", "error")
    assert "0 bytes of model and 16,000,013 of code are 13 bytes over the limit" in message


def test_a_model_file_serves_where_the_logs_are_silent(record):
    """A total that could have been checked, because the model lies in the folder."""
    for path in clean(record).glob("*.log"):
        lines = path.read_text().split("\n")
        path.write_text("\n".join(line for line in lines if not line.startswith(("Serialized", "Total"))))
    (record / "final_model.golf").write_bytes(bytes(15_820_684))
    assert not {f.rule for f in lint_submission(record)} & {"model-unknown", "bytes-total"}
    edit(record, "submission.json", "15868443", "15868326")
    assert "15,868,443" in of_rule(lint_submission(record), "bytes-total", "error")[0]


def test_a_model_file_is_measured(record):
    """A model at hand that is not the one in the logs, or that leaves almost no room, must not pass."""
    (clean(record) / "final_model.golf").write_bytes(bytes(15_820_683))
    (message,) = of_rule(lint_submission(record), "model-bytes", "error")
    assert "final_model.golf: the model has 15,820,683 bytes" in message
    (record / "final_model.golf").write_bytes(bytes(15_910_000))
    (message,) = of_rule(lint_submission(record), "size-limit", "warning")
    assert "15,910,000 bytes of model and 47,759 of code are 42,241 bytes below the limit" in message


def test_later_keys_are_checked_seed_by_seed(record):
    """The second generation of submission.json: seeds, their results, the deviation with n - 1."""
    clean(record)
    rows = {
        "1337": {"val_loss": 2.0286, "val_bpb": 1.20143, "artifact_bytes": 15_868_443, "steps": 8394},
        "1338": {"val_bpb": 1.19945102, "artifact_bytes": 15_883_154, "steps": 9092},
        "1339": {"val_bpb": 1.20319508, "artifact_bytes": 15_887_250},
    }
    claims = json.loads((record / "submission.json").read_text()) | {
        "track": "10min_16mb", "val_bpb": 1.20136, "val_loss": 2.028446, "val_bpb_std": 0.00187313,
        "seeds": [1337, 1338, 1339], "seed_results": rows,
    }  # fmt: skip

    def errors_with(**changes):
        (record / "submission.json").write_text(json.dumps(claims | changes))
        return {f.rule for f in lint_submission(record) if f.severity != "note"}

    assert errors_with() == set()
    assert errors_with(val_bpb_std=0.00152940) == {"deviation"}  # the deviation with n
    assert errors_with(seeds=[1337, 1338], seed_results={}) == {"seeds"}
    assert errors_with(seeds=[1337, 1338, 1339, 1340]) == {"seeds"}
    for seed, change in (
        ("1337", {"val_bpb": 1.20144}),
        ("1338", {"steps": 9000}),
        ("1339", {"artifact_bytes": 15_887_133}),
    ):
        assert errors_with(seed_results=rows | {seed: rows[seed] | change}) == {"seed-results"}


@pytest.mark.parametrize(
    ("claim", "rule"),
    [
        ({"val_bpb": "0.9"}, "json-keys"),
        ({"val_loss": float("nan")}, "json-keys"),
        ({"bytes_total": "12"}, "json-keys"),
        ({"bytes_code": 1.5}, "json-keys"),
        ({"seed_results": {"7": {"val_bpb": 0.9}}}, "seeds"),
        ({"seed_results": {str(seed): {"val_bpb": "0.9"} for seed in (1337, 1338, 1339)}}, "seed-results"),
    ],
)
def test_claims_that_cannot_be_compared_do_not_pass(record, claim, rule):
    """A score in quotation marks, or of a seed without a log, is compared with nothing and would pass unread."""
    path = clean(record) / "submission.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | claim))
    assert of_rule(lint_submission(record), rule, "error")


def test_a_total_without_a_model_is_not_believed(record):
    """Logs that do not say how large the model is would let any total pass, also one above the limit."""
    for path in clean(record).glob("*.log"):
        lines = path.read_text().split("\n")
        path.write_text("\n".join(line for line in lines if not line.startswith(("Serialized", "Total"))))
    assert of_rule(lint_submission(record), "model-unknown", "warning")
    edit(record, "submission.json", '"bytes_total": 15868443', '"bytes_total": 16000001')
    assert "1 bytes over the limit" in of_rule(lint_submission(record), "size-limit", "error")[0]


def test_the_limits_of_time_are_held(record):
    """A record that trained for an hour; and the last step of one that was stopped by the clock is no offence."""
    clean(record)
    edit(record, "train_seed1338.log", "train_time:599903ms", "train_time:600038ms")
    assert not of_rule(lint_submission(record), "time-limit")
    edit(record, "train.log", "train_time:599921ms", "train_time:3600000ms")
    edit(record, "train_seed1339.log", "eval_time:2106ms", "eval_time:700000ms")
    assert [message.split(", against")[0] for message in of_rule(lint_submission(record), "time-limit", "error")] == [
        "train.log trained for 3,600 seconds", "train_seed1339.log scored for 700 seconds"
    ]  # fmt: skip
    elsewhere = record.rename(record.parent.with_name("track_non_record_16mb"))
    assert not of_rule(lint_submission(elsewhere), "time-limit")
    path = elsewhere / "submission.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"compliance": {"train_under_600s": True}}))
    assert ["train_under_600s" in message for message in of_rule(lint_submission(elsewhere), "time-limit")] == [True]


def test_the_early_validation_text_is_named(record):
    """Scores on the early text look like any other; only its number of targets tells."""
    clean(record)
    for name in ("train.log", "train_seed1338.log", "train_seed1339.log"):
        edit(record, name, "tokens:62021632", "tokens:63779840")
    assert len(of_rule(lint_submission(record), "validation-text", "warning")) == 3


def test_other_texts_are_found_without_their_number_of_targets(record):
    """Logs that do not say what they scored, of which one is of another text: its bytes per token tell."""
    for path in clean(record).glob("*.log"):
        path.write_text(path.read_text().replace("tokens:62021632", ""))
    assert not of_rule(lint_submission(record), "mixed-texts")
    text = (record / "train.log").read_text()
    for nats, bpb in (("2.0227", "1.1980"), ("2.3005", f"{2.3005 / 0.693147 / 2.43593:.4f}"), ("2.0286", "1.2014")):
        text = text.replace(f"val_bpb:{bpb}", f"val_bpb:{float(nats) / 0.693147 / 2.4423:.4f}")
    text = text.replace("val_bpb:1.20143417", f"val_bpb:{2.02857127 / 0.69314718 / 2.4423:.8f}")
    (record / "train.log").write_text(text)
    findings = lint_submission(record)
    assert of_rule(findings, "mixed-texts", "error") and not of_rule(findings, "bytes-per-token")


def test_a_score_of_nothing_is_no_score(tmp_path):
    """ZeroDivisionError over somebody's log of a failed run; a log that ends in .txt and stops while training."""
    (tmp_path / "train_gpt.py").write_text("pass\n")
    (tmp_path / "train.log").write_text("seed:1\nfinal val_loss:0.0000 val_bpb:0.0000\n")
    (tmp_path / "b.txt").write_text("step:9/20 train_loss:2.0 train_time:90ms\n")
    (tmp_path / "notes.txt").write_text("not a log\n")
    assert [message.split()[0] for message in of_rule(lint_submission(tmp_path), "result")] == ["b.txt", "train.log"]


def test_missing_files_links_and_damage_are_findings(tmp_path):
    """Somebody else's folder may hold anything; the linter reports and does not fall over."""
    with pytest.raises(UserError, match="not a folder"):
        lint_submission(tmp_path / "nowhere")
    folder = tmp_path / "empty"
    folder.mkdir()
    assert len(of_rule(lint_submission(folder), "files", "error")) == 4
    (folder / "README.md").write_bytes(b"\xff\xfe t = 1 9.9999.9 Code size: ,,, bytes")
    (folder / "train.log").write_bytes(
        b"\xff" * 50
        + b"\nworld_size:\xc2\xb2 max_wallclock_seconds:1.2.3\n"
        + b"step:1/2 val_loss:1.2.3 val_bpb:9 train_time:nanms\nx val_loss:inf val_bpb:nan\nseed:"
        + b"9" * 30
    )
    (folder / "submission.json").write_text('{"val_bpb": 1e999, "seeds": 3, "date": 5, "bytes_total": "x"}')
    (folder / "train_gpt.py").write_text("def broken(:\n")
    (folder / "other.txt").symlink_to("/etc/passwd")
    (folder / "gone.py").symlink_to("/nowhere/gone.py")
    findings = lint_submission(folder, run_import=True)
    assert of_rule(findings, "import", "error") and of_rule(findings, "json-keys") and of_rule(findings, "result")
    assert any("links: gone.py, other.txt" in message for message in of_rule(findings, "files"))
    (folder / "train_gpt.py").write_text(f"x = './{'a' * 5000}'\n")
    assert of_rule(lint_submission(folder), "paths", "note")
    (folder / "train.log").write_text("seed:1\nfinal val_loss:2.0 val_bpb:1.2 eval_time:1ms\n")
    (folder / "submission.json").write_text('{"val_bpb": NaN, "val_loss": Infinity, "seed_results": [1]}')
    assert of_rule(lint_submission(folder), "json-keys", "error")


def test_lines_of_later_records_are_read():
    """A parser of one format would find nothing in other people's logs and call them empty."""
    log = parse_training_log(
        b"world_size: 8\nseed: 42\n4550/20000 val_loss: 2.8122 val_bpb: 1.0887 train_time: 9.8m\n"
        b"stopping_early: wallclock_cap train_time: 588047ms step: 4550/20000\n"
        b"Serialized model: 135431033 bytes\nCode size: 16630 bytes\n"
        b"Serialized model quantized+brotli: 15975300 bytes\nTotal submission size quantized+brotli: 15991930 bytes\n"
        b"quantized_sliding_window val_loss:2.79701 val_bpb:1.08281 eval_time:121000ms\n"
        b"quantized_ttt val_loss:2.79180191 val_bpb:1.08079352 eval_time:366525ms\n"
    )
    assert (log.seed, log.steps, log.train_ms, log.settings["world_size"]) == (42, 4550, 588047, "8")
    assert log.sizes == {"code": 16630, "model": 15975300, "total": 15991930}
    assert log.result == (Decimal("2.79180191"), Decimal("1.08079352")) and log.evaluation_ms == 487_525
    assert log.validations == [(4550, Decimal("2.8122"), Decimal("1.0887"))] and log.script is None
    assert parse_training_log(b"script_sha256:" + b"ab" * 32).script_sha256 == "ab" * 32


def test_every_setting_of_a_line_is_read_and_the_last_counts():
    """The first setting after a heading, or an older run in the same file, would otherwise hide what took effect."""
    log = parse_training_log(
        b"embed_lr:0.05\nval_loader:shards pattern=x_*.bin tokens:99\nsettings: dim:8 layers:0,2 embed_lr:0.6"
    )
    assert log.settings.items() >= {"dim": "8", "layers": "0,2", "embed_lr": "0.6"}.items() and log.targets == 99


def test_the_embedded_script_comes_out_byte_for_byte():
    """One byte more or less and the hash names a script that never was."""
    script = script_of(BASELINE, 47_642).replace("# ", "", 1)
    log = parse_training_log(log_of(script, 1337, BASELINE, len(script)).encode())
    assert log.script == script.encode() and log.seed == 1337


def test_rounded_numbers_agree_and_others_do_not():
    """The heart of every comparison: the same number with fewer digits, and nothing else."""
    assert printed_alike(Decimal("2.0286"), Decimal("2.02857127")) and printed_alike(Decimal("1.08100"), 1.081)
    assert not printed_alike(Decimal("2.0285"), Decimal("2.02857127"))
    assert not printed_alike(47642, Decimal(47759)) and not printed_alike(Decimal("nan"), Decimal("nan"))


def test_every_python_file_counts_as_code(record):
    """Code moved into a second file would otherwise weigh nothing, and its own file would pass for a package."""
    edit(clean(record), "train_gpt.py", "import os\n", "import os\nimport helper\n")
    (record / "helper.py").write_text("x = 1\n")
    code = shipped_code(record)
    assert code.modules == ["helper.py"] and code.code_bytes == len(code.data) + len("x = 1\n")
    findings = lint_submission(record)
    assert of_rule(findings, "code-files", "warning") and not of_rule(findings, "requirements")


def test_a_packed_script_is_counted_packed_and_read_unpacked(record):
    """Who counts the source of a packed script is wrong by a factor; who does not unpack it sees no imports."""
    source = "import absent_package\nimport numpy\n" + "\n".join(f"x{i} = {i * i}" for i in range(999))
    packed = pack_script(source)
    (clean(record) / "train_gpt.py").write_bytes(packed)
    assert shipped_code(record).code_bytes == len(packed)
    inner = len(shipped_code(record).source.encode())
    edit(record, "submission.json", '"bytes_code": 47759', f'"bytes_code": {inner}')
    findings = lint_submission(record, run_import=True)
    assert any("the source before it was packed" in message for message in of_rule(findings, "code-bytes"))
    (requirement,) = of_rule(findings, "requirements", "error")
    assert "absent_package is imported, but neither declared nor in the folder" in requirement


def tried(folder, source, timeout=60.0):
    """(severity, message) of the import of a folder with only this script."""
    folder.mkdir(exist_ok=True)
    (folder / "train_gpt.py").write_text(source)
    findings = lint_submission(folder, run_import=True, timeout=timeout)
    return next((f.severity, f.message) for f in findings if f.rule == "import")


def test_the_import_is_tried_in_a_copy(tmp_path, monkeypatch):
    """A script that fails, hangs or writes at import must be found out, and must leave the folder as it was."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "colorsys.py").write_text("1 / 0\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "elsewhere"))  # modules of mine that nobody else has
    folder, guard = tmp_path / "2026-01-01_x", "\nif __name__ == '__main__':\n    1 / 0\n"
    assert tried(folder, "import colorsys\nopen('made', 'w').write('x')" + guard) == (
        "note",
        "train_gpt.py imports from inside its folder",
    )
    assert [path.name for path in folder.iterdir()] == ["train_gpt.py"]
    assert tried(folder, "1 / 0" + guard) == (
        "error",
        "train_gpt.py does not import: ZeroDivisionError: division by zero",
    )
    assert "did not end within 0.5 seconds" in tried(folder, "while True: pass" + guard, timeout=0.5)[1]
    assert "status 3" in tried(folder, "import sys; sys.exit(3)" + guard)[1]


@pytest.mark.parametrize("pack", [str, lambda source: pack_script(source).decode()])
def test_a_flat_script_is_not_trained_when_its_imports_are_tried(tmp_path, pack):
    """A script without a main guard trains when it is imported; only its import statements may run."""
    source = "import numpy as np\nfrom json import no_such_name\nwhile True:\n    print(np.ones(2))\n"
    severity, message = tried(tmp_path, pack(source))
    assert severity == "error" and "cannot import name 'no_such_name'" in message
    guarded = "try:\n    import no_such_attention\nexcept ImportError:\n    pass\nwhile True:\n    pass\n"
    assert tried(tmp_path, pack(guarded))[0] == "note"


def test_nothing_runs_unless_asked(tmp_path):
    """A linter that executes a stranger's folder by default is a trap."""
    (tmp_path / "train_gpt.py").write_text(
        f"open({str(tmp_path / 'made')!r}, 'w')\nif __name__ == '__main__':\n    0\n"
    )
    assert not of_rule(lint_submission(tmp_path), "import") and not (tmp_path / "made").exists()


def test_undeclared_and_absent_packages(record):
    """A package that only the author has, or a module of the author's repository, stops everybody else."""
    edit(
        clean(record),
        "train_gpt.py",
        "import os\n",
        "import os\nimport flash_attn_of_mine, pytest\nimport nanochat.x\n",
    )
    findings = lint_submission(record, run_import=True)
    assert len(of_rule(findings, "requirements", "error")) == 2  # nanochat lies beside this test, not beside the script
    assert of_rule(findings, "requirements", "warning") == ["pytest is imported, and stands in no requirements.txt"]
    assert "cannot be tried" in of_rule(findings, "import", "note")[0]
    (record / "requirements.txt").write_text("flash-attn-of-mine==1.0\npytest\nnanochat\n")
    assert not of_rule(lint_submission(record), "requirements")


def test_the_readme_of_the_published_record_is_the_one_with_the_claims():
    """The facts above are about this text; a change of the stand-in must be noticed."""
    assert all(number in README for number in ("47759", "15868326", "1.21613611", "t=9.06", "1.2162", "1.2244"))
