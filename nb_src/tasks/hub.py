# %% [markdown]
# ## Task data from the hub
#
# The hub keeps a parquet copy of every public dataset. Its files, in the order of their names, hold the rows in the
# original order, and one permutation drawn with a fixed seed gives the order that everybody trains and evaluates in. So
# a table in memory is all that is needed of a dataset library.
#
# The offline tasks lie on the disk in the very same layout. From here on nobody can tell them apart.

# %%
import bisect
import itertools
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from huggingface_hub import HfApi

from nanochat.dataset import Download, ShardLedger, damage_named, download_files, hub_endpoint
from nanochat.runtime import UserError, download_file_with_lock, get_base_dir, print0, write_atomic
from tasks.common import Task, require_choice

# %% [markdown]
# ### `HubRows`
# Half a million conversations would be millions of Python objects. They stay in the table, and a row becomes a dict
# when somebody asks for it, which takes microseconds. That is also the moment to look whether it is what it should be.


# %%
def has_shape(value, shape) -> bool:
    """Whether a value is of this type; a shape is a type, [shape] for a list, or {key: shape} for a dict."""
    if isinstance(shape, list):
        return isinstance(value, list) and all(has_shape(item, shape[0]) for item in value)
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(has_shape(value.get(key), inner) for key, inner in shape.items())
    return isinstance(value, shape)


class HubRows:
    """The rows of some parquet files, as dicts.

    files: (path, its content as a table). order: (n,) int64, the row to show at each place; None for the files' order.
    shape: what each row has to be, for `has_shape`.
    """

    def __init__(self, files: list[tuple[str, pa.Table]], order: np.ndarray | None = None, shape: dict | None = None):
        self.files, self.order, self.shape = files, order, shape or {}
        self.ends = list(itertools.accumulate(table.num_rows for _, table in files))

    def __len__(self) -> int:
        return self.ends[-1]

    def locate(self, index: int) -> tuple[str, pa.Table, int]:
        """(path, table, row in the table) of the row at this place."""
        row = index if self.order is None else int(self.order[index])
        number = bisect.bisect_right(self.ends, row)
        return *self.files[number], row - (self.ends[number - 1] if number else 0)

    def __getitem__(self, index: int) -> dict:
        """Raises UserError that names the file and the row when a column has not the shape that was required."""
        if not 0 <= index < len(self):
            raise IndexError(f"there is no row {index} among {len(self):,}")
        _, table, row = self.locate(index)
        found = table.slice(row, 1).to_pylist()[0]
        for column, shape in self.shape.items():
            if not has_shape(found[column], shape):
                raise self.bad_row(index, f'the column "{column}" cannot be {found[column]!r:.80}')
        return found

    def bad_row(self, index: int, what: str) -> UserError:
        """An error to raise: the place of the row and what is wrong with it. Rows are counted from 1."""
        path, _, row = self.locate(index)
        return UserError(f"{path}, row {row + 1:,}: {what}. Delete the file to have it made or fetched again.")

    def require(self, shape: dict) -> "HubRows":
        """The same rows, each to be checked when it is read. Raises UserError when a file lacks one of the columns."""
        for path, table in self.files:
            for column in shape:
                if column not in table.column_names:
                    raise UserError(f'{path} has no column "{column}" (it has: {", ".join(table.column_names)}).')
        return HubRows(self.files, self.order, shape)

    def shuffled(self, seed: int = 42) -> "HubRows":
        """The same rows in the order that the `datasets` library would shuffle them into. Spec section 15.1."""
        order = np.random.default_rng(seed).permutation(len(self))
        return HubRows(self.files, order if self.order is None else self.order[order], self.shape)


# %% [markdown]
# ### What is on the disk
# A folder for each split, with numbered files and a `manifest.json` that is written when they are all there.


# %%
def read_split_manifest(folder: Path) -> dict | None:
    """The manifest of a folder, or None when there is none yet. Raises UserError when it is not one."""
    path = folder / "manifest.json"
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        manifest = None
    entry = {"name": str, "bytes": int, "rows": int}
    if not has_shape(manifest, {"files": [entry]}) or not manifest["files"]:
        raise UserError(f"{path} is not a list of the dataset's files. Delete it to have it made or fetched again.")
    return manifest


def missing_split_file(folder: Path) -> Path | None:
    """The first file that is not there or has another size than the manifest says; None when all is well."""
    manifest = read_split_manifest(folder)
    if manifest is None:
        return folder / "manifest.json"
    for file in manifest["files"]:
        path = folder / file["name"]
        if not path.is_file() or path.stat().st_size != file["bytes"]:
            return path
    return None


def read_split(folder: Path) -> HubRows:
    """All rows of a complete folder. Raises UserError that names the file when one is damaged, or there are no rows."""
    files = []
    for file in read_split_manifest(folder)["files"]:
        path = str(folder / file["name"])
        with damage_named(path), pq.ParquetFile(path, page_checksum_verification=True) as parquet:
            # one by one, because Arrow cannot read nested text of more than 2 GB at once
            groups = [parquet.read_row_group(number) for number in range(parquet.num_row_groups)]
            table = pa.concat_tables(groups) if groups else parquet.schema_arrow.empty_table()
            if table.num_rows != file["rows"]:
                raise OSError(f"{table.num_rows:,} rows instead of {file['rows']:,}")
        files.append((path, table))
    if not sum(table.num_rows for _, table in files):
        raise UserError(f"{files[0][0]} has no rows, and no other file of this split has any.")
    return HubRows(files)


# %% [markdown]
# ### Fetching a split
# `HF_ENDPOINT` and `HF_TOKEN` are honoured. Files come as the shards of the training text do: several at a time, with
# one bar, checked against the hub's checksum, and what has arrived stays when you press stop.


# %%
def list_hub_split(repo: str, subset: str, split: str) -> list[tuple[str, int, str]]:
    """(address, bytes, sha256) of each file of the hub's parquet copy, in the rows' order. Raises UserError."""
    revision = "refs/convert/parquet"
    try:
        info = HfApi(endpoint=hub_endpoint()).dataset_info(repo, revision=revision, files_metadata=True, timeout=30)
    except Exception as error:  # the errors of its HTTP library have no common base that is public
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403, 404):
            raise UserError(
                f"the hub does not give out the dataset {repo} (answer {status}): it does not exist, or you must "
                "accept its terms on its page and set an access token in HF_TOKEN."
            ) from error
        raise UserError(
            f"the list of files of {repo} could not be fetched from {hub_endpoint()} "
            f"({f'answer {status}' if status else type(error).__name__}). Check the connection, or use the offline "
            "tasks."
        ) from error
    files = {file.rfilename: file for file in info.siblings or []}
    names = sorted(name for name in files if re.fullmatch(rf"{re.escape(f'{subset}/{split}')}/\d+\.parquet", name))
    if not names:
        if any(name.startswith(f"{subset}/partial-{split}/") for name in files):
            raise UserError(f"the hub converted only a part of {repo} {subset}/{split}, so it cannot be used.")
        splits = sorted({name.rpartition("/")[0] for name in files if name.endswith(".parquet")})
        raise UserError(f"the dataset {repo} has no {subset}/{split} on the hub; it has: {', '.join(splits)}.")
    address = f"{hub_endpoint()}/datasets/{repo}/resolve/{info.sha or revision.replace('/', '%2F')}"
    return [
        (f"{address}/{name}", files[name].size or 0, files[name].lfs.sha256 if files[name].lfs else "")
        for name in names
    ]


def download_hub_split(repo: str, subset: str, split: str, folder: Path) -> None:
    """Bring `folder` to completeness, keeping what is there. Any number of processes may call it. Raises UserError."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{split}.lock")):
        if missing_split_file(folder) is None:
            return
        print0(f"Downloading {repo} {subset}/{split}")
        files = [
            Download(address, str(folder / f"{number:05d}.parquet"), size, sha256)
            for number, (address, size, sha256) in enumerate(list_hub_split(repo, subset, split))
        ]
        arriving = folder / "arriving"  # the downloader's notes, of no use once the manifest is there
        here = {file.path for file in files if os.path.exists(file.path) and os.path.getsize(file.path) == file.size}
        download_files([file for file in files if file.path not in here], ShardLedger(arriving))
        entries = []
        for path in (file.path for file in files):
            with damage_named(path):
                rows = pq.read_metadata(path).num_rows
            entries.append({"name": os.path.basename(path), "bytes": os.path.getsize(path), "rows": rows})
        total = sum(entry["rows"] for entry in entries)
        manifest = {"repo": repo, "subset": subset, "split": split, "files": entries, "rows": total}
        write_atomic(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")
        shutil.rmtree(arriving, ignore_errors=True)


# %% [markdown]
# ### `hub_rows`
# From a name to rows, whether they have to come from the hub, have come before, or were made here.


# %%
def hub_rows(repo: str, subset: str, split: str, data_dir: str | None = None) -> HubRows:
    """The rows of a dataset's split in their original order.

    data_dir: a folder that has them already; None keeps them under <base>/task_data and fetches what is missing.
    Raises UserError when they cannot be had, naming the file.
    """
    root = Path(data_dir or os.path.join(get_base_dir(), "task_data"))
    folder = root / repo.replace("/", "--") / subset / split
    if missing := missing_split_file(folder):
        if data_dir:
            raise UserError(
                f"{missing} is missing or incomplete. Have the offline tasks made again, or leave data_dir out to "
                f"fetch {repo} from the hub."
            )
        download_hub_split(repo, subset, split, folder)
    return read_split(folder)


def task_file(filename: str, url: str, data_dir: str | None = None) -> str:
    """The path of a single file: in data_dir, or else in the base directory, fetched from `url` when it is not there.

    Raises UserError when it cannot be had.
    """
    if data_dir:
        path = os.path.join(data_dir, filename)
        if not os.path.isfile(path):
            raise UserError(
                f"{path} is missing. Have the offline tasks made again, or leave data_dir out to fetch {url}."
            )
        return path
    try:
        return download_file_with_lock(url, filename)
    except OSError as error:  # all errors of requests are OSErrors
        status = getattr(getattr(error, "response", None), "status_code", None)
        raise UserError(
            f"{url} could not be fetched ({f'answer {status}' if status else type(error).__name__}). Check the "
            f"connection, or put the file at {os.path.join(get_base_dir(), filename)} yourself."
        ) from error


# %% [markdown]
# ### `HubTask`
# With that, a task of the hub is a name, a list of splits, the shape of a row, and a way to turn it into a
# conversation.


# %%
class HubTask(Task):
    """A split of a hub dataset, shuffled with seed 42. Raises UserError for an unknown subset or split.

    A kind of task sets `repo`, `splits` (the splits of each subset) and `row_shape` (for `HubRows.require`).
    """

    repo: str
    splits: dict[str, tuple[str, ...]]
    row_shape: dict

    def __init__(self, subset: str, split: str, data_dir: str | None = None, **view):
        super().__init__(**view)
        require_choice(type(self).__name__, "subset", subset, self.splits)
        require_choice(f"{type(self).__name__} {subset}", "split", split, self.splits[subset])
        self.rows = hub_rows(self.repo, subset, split, data_dir).require(self.row_shape).shuffled()

    def num_examples(self) -> int:
        return len(self.rows)
