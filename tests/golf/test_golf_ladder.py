from dataclasses import asdict
from functools import partial

import pytest
import torch
from test_golf_scoring import byte_tables, golf_model, recurrent_model
from test_golf_ttt import SMALL, documents_stream

from golf.golf_ladder import LADDER_LABELS, score_ladder
from golf.golf_scoring import score_banded, score_stream
from golf.golf_ttt import TTTSettings

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("make", [golf_model, recurrent_model])
def test_every_way_scores_by_its_name(make):
    """Two ways that are exchanged, or one that starts from what another has learned, give a table nobody can check."""
    model, stream, tables, call = make(), documents_stream(), byte_tables(), partial(make(), reduction="none")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    scoring = dict(length=16, stride=4, ttt=asdict(TTTSettings(**SMALL)))
    rows = dict(score_ladder(model, model, scoring, stream, tables, 3, None, list(LADDER_LABELS)))
    assert list(rows) == list(LADDER_LABELS) and len({row["val_bpb"] for row in rows.values()}) == len(rows)
    for way, sums in (
        ("blocks", score_stream(call, stream, tables, 16)),
        ("banded", score_banded(call, stream, tables, 16, 4)),
        ("sliding", score_stream(call, stream, tables, 16, 4)),
    ):
        assert rows[way]["val_bpb"] == pytest.approx(sums.val_bpb, rel=1e-6)
        assert rows[way]["val_loss"] == pytest.approx(sums.val_loss, rel=1e-6)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_no_more_documents_at_once_than_windows(monkeypatch):
    """A GPU that scores 3 windows at a time would be asked to train on 64 documents."""
    seen = []

    def recorded(model, stream, tables, settings, device):
        seen.append(settings.ttt_batch_size)
        return score_stream(partial(model, reduction="none"), stream, tables, 16)

    monkeypatch.setattr("golf.golf_ladder.score_with_lora_ttt", recorded)
    for windows, documents in ((3, 1), (12, 6), (900, 64)):
        ttt = TTTSettings(**SMALL | dict(ttt_eval_seq_len=32, ttt_batch_size=64))
        scoring = dict(length=16, stride=4, ttt=asdict(ttt))
        stream, model = documents_stream(), golf_model()
        list(score_ladder(model, model, scoring, stream, byte_tables(), windows, None, ["lora"]))
        assert seen.pop() == documents
