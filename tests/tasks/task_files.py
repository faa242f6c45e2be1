"""Task data on the disk in the layout of the hub loader, as small as a test needs it."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def write_split(data_dir, repo: str, subset: str, split: str, *files: list[dict]) -> Path:
    """One parquet file for each list of rows, and the manifest; returns the folder."""
    folder = Path(data_dir) / repo.replace("/", "--") / subset / split
    folder.mkdir(parents=True)
    entries = []
    for number, rows in enumerate(files):
        path = folder / f"{number:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
        entries.append({"name": path.name, "bytes": path.stat().st_size, "rows": len(rows)})
    manifest = {"repo": repo, "subset": subset, "split": split, "files": entries}
    manifest["rows"] = sum(entry["rows"] for entry in entries)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def talk(*contents: str, roles=("user", "assistant")) -> list[dict]:
    """Messages with these contents, the roles taking turns."""
    return [{"role": roles[number % len(roles)], "content": text} for number, text in enumerate(contents)]
