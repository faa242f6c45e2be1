import pytest
from matplotlib.figure import Figure

from nanochat.core_report import (
    GPT2_CORE,
    ORIGINAL_D12_CENTERED,
    ORIGINAL_D12_CORE,
    core_csv,
    core_table,
    plot_core,
    write_core_csv,
)


def outcome_of(centered: dict) -> dict:
    return {
        "results": {label: 0.5 for label in centered},
        "centered_results": dict(centered),
        "correct": {label: 5 for label in centered},
        "questions": {label: 10 for label in centered},
        "seconds": {label: 1.25 for label in centered},
        "core_metric": sum(centered.values()) / len(centered),
    }


def test_the_reference_is_consistent():
    """A digit lost in copying a table would show as a mean that is not the published one."""
    assert len(ORIGINAL_D12_CENTERED) == 22
    assert sum(ORIGINAL_D12_CENTERED.values()) / 22 == pytest.approx(ORIGINAL_D12_CORE, abs=5e-5)


def test_csv_format():
    """Files of the original and of this project must be readable by the same script."""
    outcome = outcome_of({"copa": 0.2, "boolq": -0.2345678})
    assert core_csv(outcome) == (
        "Task                               , Accuracy  , Centered  \n"
        "copa                               , 0.500000  , 0.200000  \n"
        "boolq                              , 0.500000  , -0.234568 \n"
        "CORE                               ,           , -0.017284 \n"
    )


def test_csv_place(tmp_path, monkeypatch):
    """A slash in a hub path must not become a folder; ranks above 0 must not write."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    path = write_core_csv(outcome_of({"copa": 0.2}), "openai-community/gpt2")
    assert path == str(tmp_path / "base_eval" / "openai-community-gpt2.csv")
    assert (tmp_path / "base_eval" / "openai-community-gpt2.csv").read_text() == core_csv(outcome_of({"copa": 0.2}))
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    write_core_csv(outcome_of({"copa": 0.2}), "other")
    assert [file.name for file in (tmp_path / "base_eval").iterdir()] == ["openai-community-gpt2.csv"]


def test_table():
    """The mean over other tasks must not stand beside the original's mean over 22."""
    rows, header = core_table(outcome_of({"copa": 0.25, "own_task": 0.75}))
    assert header == ("task", "questions", "accuracy", "centered", "original d12", "seconds")
    assert rows == [
        ("copa", 10, 0.5, 0.25, 0.2, "1.2"),
        ("own_task", 10, 0.5, 0.75, None, "1.2"),
        ("CORE", 20, None, 0.5, None, "2.5"),
    ]
    assert core_table(outcome_of(ORIGINAL_D12_CENTERED))[0][-1][4] == ORIGINAL_D12_CORE
    rows, header = core_table(outcome_of({"own_task": 0.75}))
    assert all(len(row) == len(header) == 5 for row in rows) and "original d12" not in header


@pytest.mark.parametrize("centered", [ORIGINAL_D12_CENTERED, {"own_task": 0.1, "other": -0.2}, {"copa": 0.0}])
def test_picture(centered):
    """Every task and every neighbour is drawn with its own number, and no neighbour beside a mean of other tasks."""
    figure = plot_core(outcome_of(centered), "d4")
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    top, *below = figure.axes
    assert sorted(label.get_text() for label in top.get_yticklabels()) == sorted(centered)
    widths = {label.get_text(): bar.get_width() for label, bar in zip(top.get_yticklabels(), top.patches, strict=True)}
    assert widths == pytest.approx(dict(centered))
    assert len(below) == (len(centered) == 22)
    if below:
        names = [label.get_text() for label in below[0].get_yticklabels()]
        assert set(names) == {*GPT2_CORE, "original d12", "d4"}
