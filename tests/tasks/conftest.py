import pytest


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    """A base directory of its own, one process, and nothing that asks for a proxy or another hub."""
    folder = tmp_path / "base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return folder
