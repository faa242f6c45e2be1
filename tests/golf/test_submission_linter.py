"""The linter against the published record, rebuilt from its facts, and against folders broken one way at a time."""

import json
import sys
from decimal import Decimal

import pytest
from published_record import BASELINE, BEFORE, CHANGES, README, log_of, script_of, write_published_record

from golf.seed_planner import SeedResult
from golf.submission_linter import (
    findings_table,
    lint_submission,
    parse_training_log,
    printed_alike,
    shipped_code,
    try_import,
)
from nanochat.runtime import UserError

confined = pytest.mark.skipif(sys.platform != "linux", reason="scripts are locked in by Linux")


@pytest.fixture
def record(tmp_path):
    return write_published_record(tmp_path)


def lint(folder, **options):
    return lint_submission(folder, **{"run_import": False, **options})


def of_rule(findings, rule, severity=None):
    return [f for f in findings if f.rule == rule and severity in (None, f.severity)]


def clean(folder):
    """Make the record honest: one script for all logs, sizes of that script, a README that claims little."""
    shipped = (folder / "train_gpt.py").read_text()
    (folder / "train.log").write_text(log_of(shipped, 1337, BASELINE | CHANGES, 47_759))
    claims = json.loads((folder / "submission.json").read_text()) | {"bytes_total": 15_820_684 + 47_759}
    (folder / "submission.json").write_text(json.dumps(claims))
    hashed = shipped_code(folder).sha256
    stated = " ".join(f"{name}={value}" for name, value in (BASELINE | CHANGES).items())
    (folder / "README.md").write_text(f"script {hashed}, {stated}\n- seed 1338: `1.19945102`\n")
    return folder


def edit(folder, name, old, new):
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new))


def test_the_published_record_counts_the_code_of_another_script(record):
    """The finding that this linter exists for: 47,642 claimed bytes are not those of the shipped 47,759."""
    findings = lint(record)
    (code,) = of_rule(findings, "code-bytes", "error")
    assert (code.claimed, code.found) == (47_642, 47_759)
    assert "embedded in train.log" in code.message and "47,642" in code.message and "47,759" in code.message
    totals = of_rule(findings, "bytes-total", "error")
    assert {total.message.split()[0] for total in totals} == {"submission.json", "README.md"}
    for total in totals:
        assert (total.claimed, total.found) == (15_868_326, 15_868_443)
        assert "15,820,684" in total.message and "does not go with this total" in total.message


def test_the_published_record_was_not_written_by_its_script(record):
    """A log of another script proves nothing about this one; its settings are printed nowhere."""
    findings = lint(record)
    (differs,) = of_rule(findings, "script-differs", "error")
    assert "train.log" in differs.message and "47,642" in differs.message
    (silent,) = of_rule(findings, "unauditable", "error")
    assert "WARMDOWN_ITERS (800 there, 3000 in the shipped script)" in silent.message
    assert "TRAIN_SEQ_LEN" not in silent.message  # that one is printed
    (overridden,) = of_rule(findings, "overridden")
    assert "TRAIN_BATCH_TOKENS (524288 there, 393216 in the log)" in overridden.message
    assert of_rule(findings, "mixed-scripts", "error")
    assert len(of_rule(findings, "script-hash")) == 3


def test_the_published_record_beats_a_number_from_nowhere(record):
    """1.21613611 stands in no log; its rounding, margin, baseline and t are wrong too."""
    findings = lint(record)
    unknown = {finding.claimed for finding in of_rule(findings, "unknown-number", "warning")}
    assert unknown == {Decimal("1.21613611")}
    (rounding,) = of_rule(findings, "rounding")
    assert rounding.claimed == Decimal("1.2162") and "1.2161" in rounding.message
    (margin,) = of_rule(findings, "margin-unit")
    assert margin.claimed == Decimal("1.21113611") and round(margin.found, 5) == 0.00296
    (baseline,) = of_rule(findings, "baseline-text")
    assert baseline.claimed == Decimal("1.2244") and "0.0262" in baseline.message
    (test,) = of_rule(findings, "t-test")
    assert test.claimed == Decimal("9.06") and round(test.found, 2) == 9.04
    (throughput,) = of_rule(findings, "throughput")
    assert (throughput.claimed, throughput.found) == (8394, 9092)
    (cost,) = of_rule(findings, "step-time")
    assert round(cost.found, 1) == 2.2
    assert len(of_rule(findings, "one-seed", "note")) == 2


def test_the_claim_against_the_logs_of_the_record_before(record):
    """With the earlier record's real logs the claim of a significant record does not hold."""
    previous = [SeedResult(i, float(nats), float(bpb)) for i, (nats, bpb) in enumerate(BEFORE)]
    (verdict,) = of_rule(lint(record, previous=previous), "significance")
    assert verdict.severity == "error" and round(verdict.found, 3) == 0.100 and "does not clear" in verdict.message


def test_an_honest_folder_has_no_errors_or_warnings_but_the_machines_scatter(record):
    """A linter that always complains is not read."""
    findings = lint(clean(record))
    assert [f.rule for f in findings if f.severity != "note"] == ["throughput"]
    assert findings_table(findings).endswith("0 errors, 1 warnings, 2 notes")


@pytest.mark.parametrize(
    ("name", "old", "new", "rule"),
    [
        ("train.log", "val_bpb:1.20143417", "val_bpb:1.21143417", "bytes-per-token"),
        ("train.log", "val_bpb:1.1980", "val_bpb:1.2980", "bytes-per-token"),
        ("train.log", "final_int8_zlib_roundtrip_exact val_loss:2.02857127", "x val_loss:nan", "loss"),
        ("train.log", "tokens:62021632", "tokens:63779840", "mixed-texts"),
        ("train.log", "step_avg:71.47ms", "step_avg:61.47ms", "step-time"),
        ("train.log", "train_time:599921ms step:8394", "train_time:640000ms step:8394", "train-time"),
        ("train.log", "eval_time:2106ms", "eval_time:602106ms", "eval-time"),
        ("train.log", "max_wallclock_seconds:600.000", "max_wallclock_seconds:0.000", "time-cap"),
        ("train.log", "\nseed:1337", "\nseed:1338", "seeds"),
        ("train.log", "int8+zlib: 15868443 bytes", "int8+zlib: 15868000 bytes", "size-sum"),
        ("train.log", "int8+zlib: 15820684 bytes", "int8+zlib: 15990000 bytes", "size-limit"),
        ("train.log", "step:8394/20000 val_loss", "step:94/20000 val_loss", "step-order"),
        ("submission.json", '"val_bpb": 1.20143417', '"val_bpb": 1.19143417', "val-bpb"),
        ("submission.json", '"val_loss": 2.02857127', '"val_loss": 2.02522281', "one-seed"),
        ("submission.json", '"bytes_code": 47759', '"bytes_code": 16600', "code-bytes"),
        ("submission.json", '"author"', '"auteur"', "json-keys"),
        ("submission.json", "{", "[", "json-keys"),
        ("README.md", "1338: `1.19945102`", "1338: `1.20319508`", "seeds"),
        ("README.md", "script ", "val_bpb:1.1955 ", "val-bpb"),
        ("README.md", "script ", "Code size: 48,000 bytes ", "code-bytes"),
        ("README.md", "script ", "Serialized model int8+zlib: 15,000,000 bytes ", "model-bytes"),
        ("README.md", "script ", "stopped at 8395/20000 ", "steps"),
        ("README.md", "script ", "t = 3.00 p = 0.001 against 1.20300000 ", "t-test"),
    ],
)
def test_one_planted_fault_is_found(record, name, old, new, rule):
    """Each cross-check must fire on its own fault, in a folder that is otherwise right."""
    edit(clean(record), name, old, new)
    assert of_rule(lint(record), rule, "error"), findings_table(lint(record))


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
        return {f.rule for f in lint(record) if f.severity != "note"} - {"throughput"}

    assert errors_with() == set()
    assert errors_with(val_bpb_std=0.00152940) == {"deviation"}  # the deviation with n
    assert errors_with(val_bpb_std=0.0001) == {"deviation"}
    assert errors_with(seeds=[1337, 1338], seed_results={}) == {"seeds"}
    assert errors_with(seeds=[1337, 1338, 1339, 1340]) == {"seeds"}
    assert errors_with(track="non_record_16mb") == {"track"}
    for seed, change, rule in (
        ("1337", {"val_bpb": 1.20144}, "val-bpb"),
        ("1338", {"steps": 9000}, "steps"),
        ("1339", {"artifact_bytes": 15_887_133}, "bytes-total"),
    ):
        assert errors_with(seed_results=rows | {seed: rows[seed] | change}) == {rule}
    assert errors_with(seed_results=[1]) == {"json-keys"}


def test_missing_files_links_and_damage_are_findings(tmp_path):
    """Somebody else's folder may hold anything; the linter reports and does not fall over."""
    with pytest.raises(UserError, match="not a folder"):
        lint(tmp_path / "nowhere")
    folder = tmp_path / "empty"
    folder.mkdir()
    assert len(of_rule(lint(folder), "files", "error")) == 4
    (folder / "README.md").write_bytes(b"\xff\xfe t = 1 9.9999.9")
    (folder / "train.log").write_bytes(
        b"\xff" * 50
        + b"\nworld_size:\xc2\xb2 max_wallclock_seconds:1.2.3\n"
        + b"step:1/2 val_loss:1.2.3 val_bpb:9\nx val_loss:inf val_bpb:nan\nseed:"
        + b"9" * 30
    )
    (folder / "submission.json").write_text('{"val_bpb": 1e999, "seeds": 3, "date": 5, "bytes_total": "x"}')
    (folder / "train_gpt.py").write_text("def broken(:\n")
    (folder / "other.py").symlink_to("/etc/passwd")
    findings = lint(folder, run_import=True)
    assert of_rule(findings, "import", "error") and of_rule(findings, "json-keys") and of_rule(findings, "loss")
    assert any("link" in finding.message for finding in of_rule(findings, "files"))


def test_lines_of_later_records_are_read():
    """A parser of one format would find nothing in other people's logs and call them empty."""
    log = parse_training_log(
        "world_size: 8\nseed: 42\n4550/20000 val_loss: 2.8122 val_bpb: 1.0887 train_time: 9.8m\n"
        "stopping_early: wallclock_cap train_time: 588047ms step: 4550/20000\n"
        "Serialized model: 135431033 bytes\nCode size: 16630 bytes\n"
        "Serialized model quantized+brotli: 15975300 bytes\nTotal submission size quantized+brotli: 15991930 bytes\n"
        "quantized_sliding_window val_loss:2.79701 val_bpb:1.08281 eval_time:121000ms\n"
        "quantized_ttt val_loss:2.79180191 val_bpb:1.08079352 eval_time:366525ms\n"
    )
    assert (log.seed, log.steps, log.train_ms, log.settings["world_size"]) == (42, 4550, 588047, "8")
    assert (log.code_bytes, log.model_bytes, log.total_bytes) == (16630, 15975300, 15991930)
    assert log.result == ("quantized_ttt", Decimal("2.79180191"), Decimal("1.08079352"), 366525)
    assert log.validations == [(4550, Decimal("2.8122"), Decimal("1.0887"))] and log.script is None
    log = parse_training_log(
        "final_quant_zlib_roundtrip code_bytes:100 model_compressed_bytes:200 total_artifact_bytes:300\n"
        "script_sha256:" + "ab" * 32
    )
    assert (log.code_bytes, log.model_bytes, log.total_bytes, log.script_sha256) == (100, 200, 300, "ab" * 32)


@pytest.mark.parametrize("lead", ["", "logs/run.txt\nW0319 something: from torchrun\n"])
def test_the_embedded_script_comes_out_byte_for_byte(lead):
    """One byte more or less and the hash names a script that never was."""
    script = script_of(BASELINE, 47_642).replace("# ", "", 1)
    log = parse_training_log(lead + log_of(script, 1337, BASELINE, len(script)))
    assert log.script == script.encode() and log.seed == 1337


def test_rounded_numbers_agree_and_others_do_not():
    """The heart of every comparison: the same number with fewer digits, and nothing else."""
    assert printed_alike(Decimal("2.0286"), Decimal("2.02857127")) and printed_alike(Decimal("1.08100"), 1.081)
    assert not printed_alike(Decimal("2.0285"), Decimal("2.02857127")) and not printed_alike(
        Decimal(47642), Decimal(47759)
    )
    assert not printed_alike(Decimal("nan"), Decimal("nan"))


def test_local_modules_count_as_code(record):
    """Code moved into a second file would otherwise weigh nothing."""
    edit(clean(record), "train_gpt.py", "import os\n", "import os\nimport helper\n")
    (record / "helper.py").write_text("import deeper\n")
    (record / "deeper").mkdir()
    (record / "deeper" / "__init__.py").write_text("import requests\n")
    code = shipped_code(record)
    assert code.local_files == ["deeper/__init__.py", "helper.py"]
    assert code.code_bytes == len(code.data) + len("import deeper\n") + len("import requests\n")
    assert of_rule(lint(record), "code-files")


@confined
def test_the_import_is_tried_in_a_locked_process(tmp_path):
    """A stranger's script must not read files, reach the network, start processes or run for ever here."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    folder = tmp_path / "2026-01-01_x"
    folder.mkdir()
    guard = "\nif __name__ == '__main__':\n    pass\n"

    def outcome(source, **options):
        (folder / "train_gpt.py").write_text(source + guard)
        return try_import(folder, **options)

    assert outcome("import json\nopen('made', 'w').write('x')")[:2] == ("done", "the whole script, locked in")
    assert not (folder / "made").exists() and not (folder / "__pycache__").exists()
    for attempt in (
        f"open({str(secret)!r})",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        "import socket; socket.socket()",
        "import os; os.fork()",
        "import subprocess; subprocess.run(['true'])",
        f"import os; os.kill({__import__('os').getpid()}, 0)",
        "1 / 0",
        "import sys; sys.exit(3)",
    ):
        assert outcome(attempt)[0] == "failed", attempt
    assert outcome("import os; os._exit(0)")[0] == "failed"
    assert outcome("while True: pass", timeout=1.5)[0] == "timeout"
    assert outcome("import nanochat.runtime")[::2] == ("missing", "nanochat")
    assert outcome("import not_there_at_all")[::2] == ("missing", "not_there_at_all")


@confined
def test_a_flat_script_is_not_trained_when_its_imports_are_tried(tmp_path):
    """A script without a main guard trains when it is imported; its imports, torch too, must work all the same."""
    (tmp_path / "train_gpt.py").write_text(
        "import torch\nimport torch.nn.functional as F\n"
        "try:\n    import no_such_attention\nexcept ImportError:\n    pass\n"
        "while True:\n    print(torch.ones(2))\n"
    )
    outcome, message, _ = try_import(tmp_path)
    assert (outcome, message) == ("done", "its import statements alone (it has no main guard), locked in")


@confined
def test_undeclared_and_absent_packages(record):
    """A package that only the author has installed stops everybody else."""
    edit(clean(record), "train_gpt.py", "import os\n", "import os\nimport flash_attn_of_mine\n")
    findings = lint(record, run_import=True)
    assert of_rule(findings, "requirements", "warning") and of_rule(findings, "import", "error")
    (record / "requirements.txt").write_text("flash-attn-of-mine==1.0\n")
    findings = lint(record, run_import=True)
    assert not of_rule(findings, "requirements") and of_rule(findings, "import", "note")


def test_the_readme_of_the_published_record_is_the_one_with_the_claims():
    """The facts above are about this text; a change of the stand-in must be noticed."""
    assert all(number in README for number in ("47759", "15868326", "1.21613611", "t=9.06", "1.2162", "1.2244"))
