# %% [markdown]
# ## The training text
#
# Pretraining reads parquet files: one column of text, documents in groups of about a thousand, one hundred megabytes
# a file. Whatever you name as the source (a public corpus, a folder of your own, a dataset on the hub, or nothing but
# this machine) becomes a `Corpus`: some files to train on and one that is never trained on.
#
# That last file is fixed. If it were simply the last file on the disk, fetching more data would change what the model
# is tested on, and no two validation curves could be compared. And every file is checked before training, because a
# file that is broken at its far end would otherwise announce itself in the middle of the night.

# %%
import concurrent.futures
import errno
import gzip
import hashlib
import json
import math
import os
import random
import re
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import requests
from filelock import FileLock
from huggingface_hub import get_token
from tqdm import tqdm

from nanochat.offline_corpus import (
    collect_offline_documents,
    offline_installation,
    offline_readme,
    split_offline_documents,
)
from nanochat.runtime import (
    UserError,
    atomic_path,
    get_base_dir,
    get_dist_info,
    print0,
    require_free_space,
    write_atomic,
)

# %% [markdown]
# ### `Corpus`
# All that later chapters need to know. The fingerprint changes when any file does, so that nothing trained on other
# text is mistaken for finished work.

# %%
CHARACTERS_PER_SHARD = 250_000_000
BYTES_PER_SHARD = 100_000_000  # the same text, compressed
ROW_GROUP_DOCUMENTS = 1024


@dataclass(frozen=True)
class Corpus:
    """Parquet files to train on, in order, and the one file that is only ever validated on. Spec section 4."""

    name: str
    train_files: tuple[str, ...]
    val_file: str
    text_column: str = "text"

    def fingerprint(self) -> str:
        """sha256 over the name, size and parquet footer of every file, and the text column."""
        digest = hashlib.sha256(self.text_column.encode())
        for path in (*self.train_files, self.val_file):
            with damage_named(path):
                digest.update(f"\n{os.path.basename(path)} {os.path.getsize(path)} ".encode())
                digest.update(parquet_footer(path))
        return digest.hexdigest()


# %% [markdown]
# ### Reading
# A parquet file ends with a footer that says where everything is, so a file that was cut off is recognised without
# reading it. What is wrong inside shows when it is decoded. Either way the person should hear which file it is.


# %%
@contextmanager
def damage_named(path):
    """Turn a failure to read `path` into a UserError that names it and says what to do."""
    try:
        yield
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).strip().split("\n")[0][:200].rstrip(".")
        if os.path.abspath(path).startswith(os.path.join(os.path.abspath(get_base_dir()), "")):
            remedy = "Delete it and run again: what is missing is fetched or built anew."
        else:
            remedy = "Replace it with a good copy, or take it out of the folder."
        raise UserError(f"{path} is damaged or incomplete ({reason}). {remedy}") from error


def parquet_footer(path) -> bytes:
    """The footer's bytes. Raises OSError when the file is not a complete parquet file."""
    with open(path, "rb") as file:
        start = file.read(4)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        end = file.read(8)
        length = int.from_bytes(end[:4], "little")
        if start != b"PAR1":
            raise OSError("it does not begin like a parquet file")
        if end[4:] != b"PAR1" or length + 12 > size:
            raise OSError(f"its end is missing after {size:,} bytes")
        file.seek(size - 8 - length)
        return file.read(length)


def read_row_group(path, index: int, text_column: str) -> list[str]:
    """The documents of one row group, without nulls and empty strings (so possibly none).

    Raises UserError naming the file when it cannot be decoded.
    """
    with damage_named(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
        texts = file.read_row_group(index, columns=[text_column]).column(0).to_pylist()
    return [text for text in texts if text]


def list_parquet_files(data_dir=None) -> list[str]:
    """Sorted paths of the complete parquet files in a folder (default: the default source's folder)."""
    folder = Path(data_dir or os.path.join(get_base_dir(), HUB_SHARDS["fineweb-edu"].folder))
    names = os.listdir(folder) if folder.is_dir() else []
    return [str(folder / name) for name in sorted(names) if name.endswith(".parquet") and not name.startswith(".")]


def parquets_iter_batched(split: str, start: int = 0, step: int = 1, corpus: Corpus | None = None):
    """Yield the documents of row groups start, start + step, ... of each file: one list of str for each row group.

    split: "train" or "val". Without a corpus: the default folder, whose last file is for validation.
    """
    if split not in ("train", "val"):
        raise UserError(f'split is {split!r}; it can be "train" or "val".')
    if corpus is None:
        *train_files, val_file = list_parquet_files() or [""]
        if not train_files:
            raise UserError("there is no data yet: prepare_corpus fetches some.")
        corpus = Corpus("base_data", tuple(train_files), val_file)
    for path in corpus.train_files if split == "train" else [corpus.val_file]:
        with damage_named(path):
            groups = pq.read_metadata(path).num_row_groups
        for index in range(start, groups, step):
            yield read_row_group(path, index, corpus.text_column)


def find_text_column(path, wanted: str = "") -> str:
    """The column to read: `wanted`, else "text", else the only one that holds strings. Raises UserError."""
    with damage_named(path):
        schema = pq.read_schema(path)
    strings = [field.name for field in schema if field.type in (pa.string(), pa.large_string())]
    name, columns = os.path.basename(path), ", ".join(schema.names)
    if wanted and wanted not in schema.names:
        raise UserError(f'{name} has no column "{wanted}" (it has: {columns}). Name the right one with text_column.')
    if wanted and wanted not in strings:
        raise UserError(
            f'the column "{wanted}" of {name} holds {schema.field(wanted).type}, not text. Name another one with '
            "text_column."
        )
    if wanted or "text" in strings:
        return wanted or "text"
    if len(strings) != 1:
        raise UserError(f'{name} has no column "text" (it has: {columns}). Name the right one with text_column.')
    return strings[0]


# %% [markdown]
# ### How much text a run needs
# A shard holds 250 million characters, a token covers about 4.7 of them, and packing throws away about a quarter of
# the tokens (the ends of documents that do not fit into a row). That makes 40 million trained tokens a shard, or 76
# steps of the original run, which took too few shards and began to repeat itself after step 1400 without saying so.

# %%
CHARACTERS_PER_TOKEN = 4.7
TOKENS_KEPT_BY_PACKING = 0.75


def shards_needed(tokens: int) -> int:
    """Training shards that `tokens` of training will read once. d12's 935,854,080 tokens need 24."""
    return max(1, math.ceil(tokens * CHARACTERS_PER_TOKEN / TOKENS_KEPT_BY_PACKING / CHARACTERS_PER_SHARD))


def epoch_sentence(characters: float, tokens: int, characters_per_token: float = CHARACTERS_PER_TOKEN) -> str:
    """Whether `characters` of training text are enough for `tokens` of training, as a sentence."""
    available = characters / characters_per_token * TOKENS_KEPT_BY_PACKING
    if available >= tokens:
        return f"That is enough for {tokens:,} tokens without reading anything twice."
    return (
        f"That is about {available / 1e6:,.1f} million tokens after packing, and {tokens / 1e6:,.1f} million will be "
        f"trained: a second epoch begins after {available / tokens:.0%} of the run; in all the text is read "
        f"{tokens / available:.1f} times."
    )


def file_characters(path, text_column: str) -> int:
    """About how many characters a file holds, from its footer alone."""
    with damage_named(path):
        metadata = pq.read_metadata(path)
        column = metadata.schema.to_arrow_schema().names.index(text_column)
        groups = (metadata.row_group(index).column(column) for index in range(metadata.num_row_groups))
        return sum(group.total_uncompressed_size for group in groups)


def training_characters(corpus: Corpus) -> int:
    """About how many characters the training files hold."""
    return sum(file_characters(path, corpus.text_column) for path in corpus.train_files)


def files_holding(corpus: Corpus, characters: int) -> tuple[str, ...]:
    """The first training files that together hold about this many characters, or all of them."""
    total, files = 0, []
    for path in corpus.train_files:
        files.append(path)
        total += file_characters(path, corpus.text_column)
        if total >= characters:
            break
    return tuple(files)


def plan_data(source: str, tokens: int, train_shards: int = -1, tokenizer_characters: int = 0) -> tuple[int, str]:
    """(train_shards for prepare_corpus, the sentence to show before it starts).

    tokens: the training horizon. train_shards: a positive number is kept, -1 lets the horizon and the text that the
    tokenizer learns from decide. The sentence says how much there is to download and whether the run will wrap into a
    second epoch; for text that has yet to be built or counted, `epoch_sentence` can say that afterwards.
    """
    if source in HUB_SHARDS:
        hub = HUB_SHARDS[source]
        if train_shards < 1:
            train_shards = max(shards_needed(tokens), math.ceil(tokenizer_characters / CHARACTERS_PER_SHARD))
        train_shards = min(train_shards, hub.last_shard)
        here = set(map(os.path.basename, list_parquet_files(os.path.join(get_base_dir(), hub.folder))))
        missing = sum(hub.shard_name(index) not in here for index in (*range(train_shards), hub.last_shard))
        download = f"{missing * BYTES_PER_SHARD / 1e9:.1f} GB to download" if missing else "all of them here already"
        return train_shards, (
            f"{source}: {train_shards} training shard{'s' * (train_shards != 1)} and the validation shard, {download}. "
            + epoch_sentence(train_shards * CHARACTERS_PER_SHARD, tokens)
        )
    if source == "offline":
        return -1, "offline: the documentation of the installed Python packages; nothing to download."
    if os.path.exists(os.path.expanduser(source)):
        return train_shards, f"{source}: your own files; nothing to download."
    train, val, directory = hub_repository_files(source)
    if train_shards < 1:
        reach = [sum(file["size"] for file in train[:count]) for count in range(1, len(train) + 1)]
        enough = max(tokens * CHARACTERS_PER_TOKEN / TOKENS_KEPT_BY_PACKING, tokenizer_characters)
        enough *= BYTES_PER_SHARD / CHARACTERS_PER_SHARD
        train_shards = next((count for count, size in enumerate(reach, 1) if size >= enough), len(train))
    chosen = train[:train_shards]
    size = sum(file["size"] for file in [*chosen, *val] if not (directory / file["local"]).exists())
    characters = sum(file["size"] for file in chosen) * CHARACTERS_PER_SHARD / BYTES_PER_SHARD
    return len(chosen), (
        f"{source}: {len(chosen)} training file{'s' * (len(chosen) != 1)} and one for validation, {size / 1e9:.1f} GB "
        "to download. " + epoch_sentence(characters, tokens)
    )


# %% [markdown]
# ### `ShardLedger`
# What is known of the files in a folder, in a small `manifest.json`: size, time of change, and the sha256 of the
# moment at which the file was known to be good. Hashing a hundred gigabytes before each run would be absurd, so the
# hash is taken again only when the time or the size has changed. Other people's files have no hash to compare with:
# the first time, they are decoded from beginning to end, up to a few gigabytes; larger collections are trusted until
# a read fails.

# %%
DECODED_AT_FIRST_SIGHT = 4_000_000_000  # bytes; about half a minute


def sha256_of_file(path) -> str:
    """The sha256 of a file's content, as hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


class ShardLedger:
    """`manifest.json` of a folder: {"files": {name: {size, mtime_ns, sha256, footer}}, ...}."""

    def __init__(self, folder):
        self.path = Path(folder) / "manifest.json"
        try:
            self.content = json.loads(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            self.content = {}
        self.files = self.content.setdefault("files", {})

    def save(self) -> None:
        write_atomic(self.path, json.dumps(self.content, indent=1) + "\n")

    def note(self, path, sha256: str) -> None:
        """Remember a file that is known to be good."""
        status = os.stat(path)
        footer = hashlib.sha256(parquet_footer(path)).hexdigest()
        self.files[os.path.basename(path)] = {
            "size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": sha256, "footer": footer
        }  # fmt: skip

    def is_unchanged(self, path) -> bool:
        """Whether size and time are those of the moment at which the file was noted."""
        known, status = self.files.get(os.path.basename(path)), os.stat(path)
        return known is not None and (known["size"], known["mtime_ns"]) == (status.st_size, status.st_mtime_ns)

    def check(self, path, text_column: str) -> None:
        """Raise UserError when the file is damaged; read all of it only when it is new or was touched."""
        with damage_named(path):
            footer = hashlib.sha256(parquet_footer(path)).hexdigest()
            pq.read_metadata(path)
            if self.is_unchanged(path):
                return
            known, sha256 = self.files.get(os.path.basename(path)), sha256_of_file(path)
            if known is None or known["sha256"] != sha256:
                # Our own files never change. In a folder of yours the footer tells a new file from a broken old one: no
                # rewriting leaves all sizes and offsets as they were.
                ours = self.path.parent == Path(path).parent
                if known is not None and (ours or known["footer"] == footer):
                    raise OSError("its content is not what it was when it was complete, the checksum differs")
                count_documents(path, text_column)
            self.note(path, sha256)


def count_documents(path, text_column: str) -> int:
    """Decode the whole file and count its documents that are not empty; says how many are. UserError when all are."""
    documents = usable = 0
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for index in range(file.num_row_groups):
            texts = file.read_row_group(index, columns=[text_column]).column(0)
            texts.validate(full=True)  # UTF-8 included
            documents += len(texts)
            usable += pc.sum(pc.greater(pc.binary_length(texts), 0)).as_py() or 0
    if usable == 0:
        raise UserError(f'{path} has no text: all {documents:,} values of column "{text_column}" are null or empty.')
    if usable < documents:
        missing = f"{documents - usable:,} of {documents:,} documents"
        print0(f"{os.path.basename(path)}: {missing} are null or empty and left out.")
    return usable


def check_shards(paths, ledger: ShardLedger, text_column: str = "") -> str:
    """Check every file and return the name of the text column. Raises UserError for the first that is damaged."""
    for path in paths:
        with damage_named(path):
            parquet_footer(path)
    columns = {find_text_column(path, text_column): path for path in paths}
    if len(columns) > 1:
        raise UserError(
            f"the files have different text columns ({', '.join(columns)}). Name one that all have with text_column."
        )
    column = next(iter(columns), text_column or "text")
    unread = [path for path in paths if not ledger.is_unchanged(path)]
    total = sum(map(os.path.getsize, unread))
    if total <= DECODED_AT_FIRST_SIGHT or any(os.path.basename(path) in ledger.files for path in unread):
        with tqdm(total=total, desc="checking data", unit="B", unit_scale=True, mininterval=1, delay=2,
                  file=sys.stdout) as bar:  # fmt: skip
            for path in paths:
                ledger.check(path, column)
                bar.update(os.path.getsize(path) if path in unread else 0)
        if unread:
            ledger.save()
    return column


# %% [markdown]
# ### Downloading
# A shard arrives under a name that ends in `.tmp` and gets its own only when its length, its footer and, where the
# server tells one, its checksum are right. What arrived stays when the connection breaks or you press stop, and the
# next attempt asks for the rest. Four files at a time, one bar for all of them.


# %%
@dataclass
class Download:
    """One file to fetch. size (bytes) is a guess until the server answers; sha256 may be empty."""

    url: str
    path: str
    size: int = BYTES_PER_SHARD
    sha256: str = ""
    received: int = 0


def hub_endpoint() -> str:
    """Address of the hub: `HF_ENDPOINT`, or the public one."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def hub_headers(url: str) -> dict[str, str]:
    """The access token, for the hub only, when there is one."""
    token = get_token() if url.startswith(hub_endpoint()) else None
    return {"Authorization": f"Bearer {token}"} if token else {}


def check_hub_token(token: str | None) -> str:
    """What to say before a run that will be uploaded at its end; "" when all is well. Raises UserError for a bad token.

    token: None for that of a stored login. A hub that cannot be reached now may be there when it is needed.
    """
    token = token or get_token()
    if not token:
        return "hub_repo is set and there is no HF_TOKEN: unless there is one at the end, nothing will be uploaded."
    address = f"{hub_endpoint()}/api/whoami-v2"
    try:
        answer = requests.get(address, headers={"Authorization": f"Bearer {token}"}, timeout=10)
        role = answer.json().get("auth", {}).get("accessToken", {}).get("role") if answer.ok else None
    except (requests.RequestException, ValueError, AttributeError):
        return "The hub cannot be reached now, so the access token for the upload was not checked."
    if answer.status_code in (401, 403) or role == "read":
        reason = "may only read" if role == "read" else f"is not accepted by the hub (answer {answer.status_code})"
        raise UserError(
            f"the access token {reason}. Put one with write permission, made at {hub_endpoint()}/settings/tokens, into "
            "Colab's secrets or the environment variable HF_TOKEN, or leave hub_repo empty."
        )
    return ""


def receive_file(item: Download, partial: str, stop: threading.Event) -> None:
    """Fetch what is missing of `partial`. Raises OSError when something was not as expected; the file stays."""
    have = os.path.getsize(partial) if os.path.exists(partial) else 0
    headers = {"Accept-Encoding": "identity", **hub_headers(item.url)}
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(item.url, headers=headers, stream=True, timeout=30) as response:
        if response.status_code == 416:  # longer than the file on the server: of no use
            os.remove(partial)
        response.raise_for_status()
        if not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            have = 0  # the server sends all of it
        length = int(response.headers.get("Content-Length", -1))
        first_answer = (response.history or [response])[0].headers  # the hub names the checksum before it redirects
        etag = first_answer.get("X-Linked-Etag", "").strip('"')
        item.sha256 = item.sha256 or (etag if re.fullmatch("[0-9a-f]{64}", etag) else "")
        item.size, item.received = (have + length if length >= 0 else item.size), have
        with open(partial, "ab" if have else "wb") as file:
            for chunk in response.iter_content(1 << 16):
                if stop.is_set():
                    raise InterruptedError("stopped")
                file.write(chunk)
                item.received += len(chunk)
            file.flush()
            os.fsync(file.fileno())
    if length >= 0 and item.received != item.size:
        raise OSError(f"{item.received:,} of {item.size:,} bytes arrived")


def download_file(item: Download, stop: threading.Event, retry_seconds=(2, 4, 8, 16)) -> str:
    """Fetch one file completely; returns its sha256. Raises UserError after the last attempt."""
    partial, name = item.path + ".tmp", os.path.basename(item.path)
    for pause in (*retry_seconds, None):
        try:
            receive_file(item, partial, stop)
            try:
                parquet_footer(partial)
                sha256 = sha256_of_file(partial)
                if item.sha256 and sha256 != item.sha256:
                    raise OSError("the checksum is not the one that the server names")
            except OSError:
                os.remove(partial)
                raise
            os.replace(partial, item.path)
            return sha256
        except OSError as error:  # all errors of requests are OSErrors
            if stop.is_set():
                raise
            if error.errno == errno.ENOSPC:
                raise UserError(f"no space left while downloading {name}. Free some space and run again.") from error
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status in (401, 403, 404, 410):
                raise UserError(
                    f"{item.url} answers {status}: it does not exist or needs permission (an access token in HF_TOKEN)."
                ) from error
            if pause is None:
                raise UserError(
                    f"{name} could not be downloaded in {len(retry_seconds) + 1} attempts ({error}). What has arrived "
                    "is kept: run again to go on."
                ) from error
            stop.wait(pause)


def download_files(items: list[Download], ledger: ShardLedger, workers: int = 4, retry_seconds=(2, 4, 8, 16)) -> None:
    """Fetch all files at once, `workers` at a time, and note them in the ledger. Ctrl-C keeps what has arrived."""
    if not items:
        return
    ledger.path.parent.mkdir(parents=True, exist_ok=True)
    require_free_space(sum(item.size for item in items), f"downloading {len(items)} files")
    stop, pool = threading.Event(), concurrent.futures.ThreadPoolExecutor(max(1, workers))
    pending = {pool.submit(download_file, item, stop, retry_seconds): item for item in items}
    with tqdm(total=0, desc=f"downloading {len(items)} files", unit="B", unit_scale=True, mininterval=1,
              file=sys.stdout) as bar:  # fmt: skip
        try:
            while pending:
                for future in concurrent.futures.wait(pending, 0.5, concurrent.futures.FIRST_COMPLETED).done:
                    ledger.note(pending.pop(future).path, future.result())
                    ledger.save()
                bar.total = sum(item.size for item in items)
                bar.update(sum(item.received for item in items) - bar.n)
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


# %% [markdown]
# ### Public corpora
# Two corpora that others have shuffled and cut into shards: pages of educational value (the one that the original
# model was trained on) and a newer mixture that reaches the same quality with a quarter less training.


# %%
@dataclass(frozen=True)
class HubShards:
    """A repository of numbered shards. The last one is for validation, however many are used. Spec section 4."""

    repository: str
    last_shard: int
    folder: str

    def shard_name(self, index: int) -> str:
        return f"shard_{index:05d}.parquet"


HUB_SHARDS = {
    "fineweb-edu": HubShards("karpathy/fineweb-edu-100b-shuffle", 1822, "base_data"),
    "climbmix": HubShards("karpathy/climbmix-400b-shuffle", 6542, "base_data_climbmix"),
}


def prepare_hub_shards(source: str, train_shards: int, text_column: str, workers: int) -> Corpus:
    """The first `train_shards` shards (-1: all) and the validation shard."""
    hub = HUB_SHARDS[source]
    folder = Path(get_base_dir()) / hub.folder
    count = hub.last_shard if train_shards < 1 else min(train_shards, hub.last_shard)
    ledger = ShardLedger(folder)
    paths = [str(folder / hub.shard_name(index)) for index in (*range(count), hub.last_shard)]
    check_shards([path for path in paths if os.path.exists(path)], ledger, text_column)
    url = f"{hub_endpoint()}/datasets/{hub.repository}/resolve/main"
    missing = [Download(f"{url}/{Path(path).name}", path) for path in paths if not os.path.exists(path)]
    download_files(missing, ledger, workers)
    return Corpus(source, tuple(paths[:-1]), paths[-1], check_shards(paths, ledger, text_column))


# %% [markdown]
# ### Any dataset on the hub
# `user/name`, or `user/name/folder` when the repository holds several datasets. The list of files is asked for once
# and kept, so a second run needs no network. Its own validation split is used when it has one.


# %%
def list_hub_files(repository: str, folder: str = "") -> list[dict]:
    """The parquet files of a dataset repository: [{url, local, size, sha256}]; local is the file's name on this disk.

    Looks into the hub's automatic parquet conversion when the repository itself has none. Raises UserError.
    """
    for revision in ("main", "refs%2Fconvert%2Fparquet"):
        where = f"{revision}/{quote(folder)}" if folder else revision
        page = f"{hub_endpoint()}/api/datasets/{repository}/tree/{where}?recursive=true"
        entries = []
        while page:
            try:
                answer = requests.get(page, headers=hub_headers(page), timeout=30)
                entries += answer.json() if answer.ok else []
            except OSError as error:
                raise UserError(
                    f"the list of files of {repository} could not be fetched from {hub_endpoint()} "
                    f'({type(error).__name__}). Check the connection, or use the source "offline".'
                ) from error
            if answer.status_code == 404 and revision != "main":
                break
            if not answer.ok:
                raise UserError(
                    f"{repository} is neither a folder on this machine nor a dataset that the hub lets you read "
                    f"(answer {answer.status_code}). Check the spelling; a private or gated one needs an access token "
                    "in HF_TOKEN."
                )
            page = answer.links.get("next", {}).get("url")
        files = [
            {
                "url": f"{hub_endpoint()}/datasets/{repository}/resolve/{revision}/{quote(entry['path'])}",
                "local": entry["path"].replace("/", "--"),
                "size": entry["size"],
                "sha256": entry.get("lfs", {}).get("oid", ""),
            }
            for entry in sorted(entries, key=lambda entry: entry["path"])
            if entry["type"] == "file" and entry["path"].endswith(".parquet")
        ]
        if files:
            return files
    raise UserError(f"the hub dataset {'/'.join([repository, folder]).rstrip('/')} has no parquet files.")


def hub_repository_files(source: str) -> tuple[list[dict], list[dict], Path]:
    """(training files, validation file, folder for them) of a hub dataset; one file alone is not split here."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.-]+)*", source) or source.startswith("."):
        raise UserError(
            f'the data source "{source}" is neither a folder here nor a name that is known. Use '
            f"{', '.join(HUB_SHARDS)}, offline, the path of a folder, or a hub dataset user/name."
        )
    owner, name, *inner = source.split("/")
    directory = Path(get_base_dir()) / "data" / source.replace("/", "--")
    ledger = ShardLedger(directory)
    if "listing" not in ledger.content:
        ledger.content["listing"] = list_hub_files(f"{owner}/{name}", "/".join(inner))
        ledger.save()
    splits = {"train": [], "validation": [], "test": []}
    for file in ledger.content["listing"]:
        words = set(re.split(r"[^a-z]+", file["local"].lower()))
        held_out = "validation" if words & {"validation", "valid", "val", "dev"} else "test" if "test" in words else ""
        splits[held_out or "train"].append(file)
    train, val = splits["train"], (splits["validation"] or splits["test"])[:1]
    if not train:
        raise UserError(f"the hub dataset {source} has no training files, only {len(val)} for validation or tests.")
    if not val and len(train) > 1:
        train, val = train[:-1], train[-1:]
    return train, val, directory


def prepare_hub_repository(source: str, train_shards: int, text_column: str, workers: int) -> Corpus:
    """The first `train_shards` training files (-1: all) of a hub dataset and its validation file."""
    train, val, directory = hub_repository_files(source)
    files = [*train[: train_shards if train_shards > 0 else None], *val]
    ledger = ShardLedger(directory)
    paths = [str(directory / file["local"]) for file in files]
    check_shards([path for path in paths if os.path.exists(path)], ledger, text_column)
    missing = [
        Download(file["url"], path, file["size"], file["sha256"])
        for file, path in zip(files, paths, strict=True)
        if not os.path.exists(path)
    ]
    download_files(missing, ledger, workers)
    column = check_shards(paths, ledger, text_column)
    if val:
        return Corpus(source, tuple(paths[:-1]), paths[-1], column)
    whole = Corpus(source, tuple(paths), "", column)
    texts = (text for batch in parquets_iter_batched("train", corpus=whole) for text in batch)
    split = build_once(directory / f"split-{column}", lambda folder: write_corpus(folder, held_out_by_hash(texts)))
    return corpus_of_folder(source, split)


# %% [markdown]
# ### Text into shards
# What is not parquet yet becomes parquet, in the layout of the public corpora. Whether a document is held out is
# decided by a hash of its words, so a text that occurs twice cannot land on both sides; the second copy is dropped
# anyway.


# %%
def write_shard(path, texts: list[str]) -> None:
    """One parquet file in the layout of spec section 4, with smaller row groups if it is small, so that each of several
    processes gets some. Pages carry checksums: damage is noticed while reading."""
    with atomic_path(path) as temporary:
        pq.write_table(
            pa.table({"text": pa.array(texts, pa.string())}), temporary,
            row_group_size=min(ROW_GROUP_DOCUMENTS, max(1, len(texts) // 16)), compression="zstd", compression_level=3,
            use_dictionary=False, write_statistics=False, write_page_checksum=True,
        )  # fmt: skip


def write_corpus(folder, documents, characters_per_shard: int = CHARACTERS_PER_SHARD) -> None:
    """Write shard_00000.parquet, ... of `documents`, an iterable of (text, whether it is held out).

    The last shard holds what is held out. Documents are shuffled within a shard, always in the same way.
    """
    shuffle, held_out, waiting, characters, shards = random.Random(0), [], [], 0, 0

    def close_shard(texts):
        shuffle.shuffle(texts)
        write_shard(Path(folder) / f"shard_{shards:05d}.parquet", texts)

    for text, is_held_out in documents:
        if is_held_out:
            held_out.append(text)
            continue
        waiting.append(text)
        characters += len(text)
        if characters >= characters_per_shard:
            close_shard(waiting)
            waiting, characters, shards = [], 0, shards + 1
    if not held_out and waiting:  # chance may leave one side of a small corpus empty
        held_out.append(waiting.pop())
    if not waiting and not shards and len(held_out) > 1:
        waiting.append(held_out.pop())
    if not held_out or not (waiting or shards):
        raise UserError("there are fewer than two documents, and one is needed for validation: add more text.")
    if waiting:
        close_shard(waiting)
        shards += 1
    close_shard(held_out)


def held_out_by_hash(texts):
    """Yield (text, held out) for each different text; a twentieth is held out."""
    seen = set()
    for text in texts:
        digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).digest()
        if digest not in seen:
            seen.add(digest)
            yield text, int.from_bytes(digest, "little") % 20 == 0


def build_once(folder: Path, build) -> Path:
    """Call build(folder) unless an earlier run has finished it and all its files are still there."""
    ledger = ShardLedger(folder)
    if not ledger.files or not all((folder / name).exists() for name in ledger.files):
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.iterdir():
            leftover.unlink()
        build(folder)
        ledger = ShardLedger(folder)
        for path in list_parquet_files(folder):
            ledger.note(path, sha256_of_file(path))
        ledger.save()  # last, so that its presence means that all is there
    return folder


def corpus_of_folder(name: str, folder: Path) -> Corpus:
    """The corpus in a folder that `build_once` has finished, checked."""
    *train_files, val_file = list_parquet_files(folder)
    column = check_shards([*train_files, val_file], ShardLedger(folder), "text")
    return Corpus(name, tuple(train_files), val_file, column)


# %% [markdown]
# ### Your own files
# A folder of parquet files is used where it lies: the last one, by name, is for validation. A folder of text files,
# however deeply nested, is turned into shards once; change a file and it is done again.

# %%
TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", ".org", ".tex")
TEXT_DOCUMENT_CHARACTERS = 10_000


def find_text_files(folder) -> list[Path]:
    """The text files (and their gzipped form) in a folder and its subfolders, sorted; hidden ones excepted."""
    found = []
    for path, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            if name.lower().removesuffix(".gz").endswith(TEXT_SUFFIXES) and not name.startswith("."):
                found.append(Path(path, name))
    return sorted(found)


def read_text_file(path: Path) -> str:
    """The text of a file: UTF-8, or the Western encoding of old Windows files when it is not. Raises UserError."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}). Repair it or take it out of the folder.") from error
    if b"\0" in data:
        raise UserError(f"{path} is not a text file (it has zero bytes). Take it out of the folder.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252", errors="replace")
    return text.replace("\r\n", "\n")


def cut_text(text: str, size: int = TEXT_DOCUMENT_CHARACTERS):
    """Yield pieces of at most `size` characters, cut at the last blank line before the limit, else a line or word."""
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            for separator in ("\n\n", "\n", " "):
                cut = text.rfind(separator, start + size // 4, end)
                if cut > 0:
                    end = cut + len(separator)
                    break
        if piece := text[start:end].strip():
            yield piece
        start = end


def prepare_own_files(source: str, train_shards: int, text_column: str) -> Corpus:
    """A corpus of a folder with parquet or text files, or of one text file."""
    path = Path(source).expanduser().resolve()
    parquet_files = list_parquet_files(path)
    files = parquet_files or (find_text_files(path) if path.is_dir() else [path])
    if not files:
        raise UserError(
            f"{source} has no files to train on. It should hold .parquet files, or text files "
            f"({', '.join(TEXT_SUFFIXES)})."
        )
    if path.suffix == ".parquet" or len(parquet_files) == 1:
        raise UserError(
            f"{source} has one parquet file only, and two are needed: the last one is kept for validation. Split it "
            "in two."
        )
    status = [(str(file), os.path.getsize(file), os.stat(file).st_mtime_ns) for file in map(Path, files)]
    identity = [str(path)] if parquet_files else [str(path), str(status)]
    identity = hashlib.sha256(repr(identity).encode()).hexdigest()[:12]
    directory = Path(get_base_dir()) / "data" / f"{path.stem}-{identity}"
    if parquet_files:
        *train_files, val_file = parquet_files
        train_files = train_files[: train_shards if train_shards > 0 else None]
        column = check_shards([*train_files, val_file], ShardLedger(directory), text_column)
        return Corpus(source, tuple(train_files), val_file, column)
    random.Random(0).shuffle(files)
    texts = (text for file in tqdm(files, desc="reading text", unit="file", mininterval=1, delay=2, file=sys.stdout)
             for text in cut_text(read_text_file(file)))  # fmt: skip
    return corpus_of_folder(source, build_once(directory, lambda folder: write_corpus(folder, held_out_by_hash(texts))))


# %% [markdown]
# ### `prepare_corpus`
# The one call of this chapter that the pipeline makes. When several processes start together, one does the work, and
# the others find it done.


# %%
def build_offline_shards(folder: Path) -> None:
    """Write the documentation of this installation into `folder`: training shards, a validation shard, README.txt."""
    training, validation = split_offline_documents(collect_offline_documents())
    documents = [(document.text, False) for document in training] + [(document.text, True) for document in validation]
    write_corpus(folder, documents, characters_per_shard=5_000_000)
    write_atomic(folder / "README.txt", offline_readme(training, validation))


def prepare_corpus(source: str, train_shards: int = -1, text_column: str = "", workers: int = 4) -> Corpus:
    """Download, build or find the text named by `source`, check it, and return it.

    source: "fineweb-edu", "climbmix", "offline", a folder of parquet or text files, or a hub dataset "user/name".
    train_shards: training files to use, -1 for all. text_column: "" means "text", or the only column of strings.
    workers: downloads at a time. Every process may call it. Raises UserError before any long work starts.
    """
    if train_shards == 0 or train_shards < -1:
        raise UserError(f"train_shards is {train_shards}; it can be a positive number, or -1 for all there are.")
    with FileLock(os.path.join(get_base_dir(), "data.lock")):
        if source in HUB_SHARDS:
            corpus = prepare_hub_shards(source, train_shards, text_column, workers)
        elif source == "offline":
            folder = Path(get_base_dir()) / "data" / f"offline-{offline_installation()}"
            corpus = corpus_of_folder(source, build_once(folder, build_offline_shards))
        elif os.path.exists(os.path.expanduser(source)):
            corpus = prepare_own_files(source, train_shards, text_column)
        else:
            corpus = prepare_hub_repository(source, train_shards, text_column, workers)
    world_size = get_dist_info()[3]
    for files in (corpus.train_files, [corpus.val_file]):
        groups = max(pq.read_metadata(path).num_row_groups for path in files)
        if groups < world_size:
            raise UserError(
                f"{os.path.basename(files[-1])} has {groups} row groups, and each of the {world_size} processes needs "
                f"one. Start at most {groups}, or write the file with smaller row groups."
            )
    return corpus
