# %% [markdown]
# ## The data of the challenge
#
# Documents, in an order that was fixed once. The first fifty thousand are for validation, the others for training. A
# tokenizer turns them into shards, and a manifest says how many of everything there should be, so that a folder can be
# checked by anyone who gets it.
#
# There are three ways to such a folder, and all end in the same layout: download what others have exported, export
# documents of your own, or, without a network, export the documentation that is installed on this machine. The last
# takes seconds and is what the notebooks do on a CPU unless told otherwise.

# %%
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import sentencepiece
from filelock import FileLock
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from tqdm import tqdm

from golf.golf_tokenizers import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    UNK_ID,
    TokenizerSpec,
    encodable_text,
    load_golf_tokenizer,
    make_tokenizer,
)
from golf.shards import SHARD_TOKENS, read_token_shard, shard_token_count, token_shard_files, write_token_shard
from nanochat.offline_corpus import collect_offline_documents, offline_installation, split_offline_documents
from nanochat.runtime import (
    UserError,
    atomic_path,
    get_base_dir,
    get_dist_info,
    print0,
    rank0_first,
    require_free_space,
    write_atomic,
)
from nanochat.stages import fingerprint_of

# %% [markdown]
# ### `GolfData`
# All that the training script needs to know: which files, which tokenizer, how many tokens it has.

# %%
DOCUMENTS_FILE = "docs_selected.jsonl"
SIDECAR_FILE = "docs_selected.source_manifest.json"
ORIGIN_FILE = "manifest.source.json"  # which repository a manifest was fetched from


def sha256_of_golf_file(path) -> str:
    """The sha256 of a file's content, as hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class GolfData:
    """One dataset of an export folder: shards in reading order, their tokenizer, and what the manifest says of them."""

    name: str
    folder: str
    tokenizer_path: str
    vocab_size: int
    train_files: tuple[str, ...]
    val_files: tuple[str, ...]
    stats: dict

    @property
    def dataset_path(self) -> str:
        """DATA_PATH of the training scripts."""
        return os.path.dirname(self.val_files[0])

    @property
    def documents_path(self) -> Path:
        """The text that the shards were made of; need not be there after a download."""
        return Path(self.folder) / DOCUMENTS_FILE

    def fingerprint(self) -> str:
        """Changes with the tokenizer, the validation shards, or the name, length or middle of a training shard."""
        inputs = {"tokenizer": sha256_of_golf_file(self.tokenizer_path)}
        for path in self.val_files:
            inputs[os.path.basename(path)] = sha256_of_golf_file(path)
        for path in self.train_files:  # gigabytes: a sample will do
            count = shard_token_count(path)
            sample = read_token_shard(path, max(0, count // 2 - 16384), min(count, 32768))
            inputs[os.path.basename(path)] = [count, hashlib.sha256(sample.tobytes()).hexdigest()]
        return fingerprint_of(inputs)


# %% [markdown]
# ### `open_golf_data`
# Believe the manifest and check the files: a validation stream that lacks a shard gives a score that nobody else can
# reproduce.


# %%
def read_golf_manifest(folder) -> dict:
    """`manifest.json` of an export folder. Raises UserError when it is missing or is none."""
    path = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        for dataset in manifest["datasets"]:
            counted = {f"{what}_{split}" for what in ("docs", "files", "tokens") for split in ("val", "train")}
            missing = counted - set(dataset["stats"])
            if missing or not re.fullmatch(r"[\w-]+", dataset["name"]):
                raise ValueError(f"{dataset['name']} lacks {', '.join(sorted(missing)) or 'a plain name'}")
            manifest_tokenizer_files(manifest, dataset)
        return manifest
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no manifest.json. Download or export the data into it first.") from error
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise UserError(f"{path} is no manifest of the challenge ({error!r}). Fetch or export it again.") from error


def manifest_tokenizer_files(manifest: dict, dataset: dict) -> list[str]:
    """The tokenizer files of a dataset, relative to the export folder; the one to load comes first."""
    entry = next(each for each in manifest["tokenizers"] if each["name"] == dataset["tokenizer_name"])
    names = [entry[key] for key in ("path", "model_path", "vocab_path") if entry.get(key)]
    if not names:
        raise ValueError(f"the tokenizer {entry['name']} has no file")
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{name} lies outside the folder")
    return names


def manifest_dataset(manifest: dict, variant: str) -> dict:
    """The manifest's entry for a variant (`sp1024`, `byte260`, ...). Raises UserError that lists those there are."""
    found = {dataset["name"].removeprefix("fineweb10B_"): dataset for dataset in manifest["datasets"]}
    if variant not in found:
        raise UserError(f'there is no dataset "{variant}" here, only {", ".join(found) or "none at all"}.')
    return found[variant]


def open_golf_data(folder, variant: str = "sp1024", train_shards: int = -1) -> GolfData:
    """The dataset of a variant in an export folder, checked. train_shards: how many to use, −1 for all that are here.

    Raises UserError for a damaged or missing file, and when tokenizer, shards and manifest do not fit together.
    """
    folder = Path(folder)
    manifest = read_golf_manifest(folder)
    dataset = manifest_dataset(manifest, variant)
    stats, path = dataset["stats"], folder / "datasets" / dataset["name"]
    val_files, train_files = token_shard_files(path, "val"), token_shard_files(path, "train")
    for split, files in (("val", val_files), ("train", train_files)):
        here = (len(files), sum(map(shard_token_count, files)))
        expected = (stats[f"files_{split}"], stats[f"tokens_{split}"])
        some_of_them = split == "train" and here[0] < expected[0]
        if here != expected and not some_of_them:
            raise UserError(
                f"{path} has {here[1]:,} {split} tokens in {here[0]} files, and the manifest says {expected[1]:,} in "
                f"{expected[0]}. Download or export the data again."
            )
    if train_shards > len(train_files):
        raise UserError(f"{path} has {len(train_files)} training shards and {train_shards} were asked for.")
    tokenizer_path = folder / manifest_tokenizer_files(manifest, dataset)[0]
    tokenizer = load_golf_tokenizer(tokenizer_path, dataset.get("vocab_size"))
    return GolfData(
        name=dataset["name"], folder=str(folder), vocab_size=tokenizer.vocab_size, stats=stats,
        tokenizer_path=str(tokenizer_path),
        train_files=tuple(map(str, train_files[: train_shards if train_shards > 0 else None])),
        val_files=tuple(map(str, val_files)),
    )  # fmt: skip


def open_golf_shards(data_path, tokenizer_path, vocab_size: int, train_shards: int = -1, training=True) -> GolfData:
    """The shards in a folder without a manifest, as DATA_PATH and TOKENIZER_PATH of the challenge name them.

    training: whether training shards must be there; an evaluation needs none. Raises UserError.
    """
    tokenizer = load_golf_tokenizer(tokenizer_path, vocab_size)
    files = {"val": token_shard_files(data_path, "val"), "train": ()}
    if training:
        files["train"] = token_shard_files(data_path, "train")[: train_shards if train_shards > 0 else None]
    stats = {f"files_{split}": len(paths) for split, paths in files.items()}
    stats |= {f"tokens_{split}": sum(map(shard_token_count, paths)) for split, paths in files.items()}
    return GolfData(
        name=Path(data_path).resolve().name, folder=str(Path(data_path).resolve().parent), stats=stats,
        tokenizer_path=str(tokenizer_path), vocab_size=tokenizer.vocab_size,
        train_files=tuple(map(str, files["train"])), val_files=tuple(map(str, files["val"])),
    )  # fmt: skip


# %% [markdown]
# ### Documents
# One JSON object a line, with the key `text`. A small file beside it says how many there are, how many of them are
# for validation, and what the checksum is.


# %%
def write_golf_documents(folder, documents: Iterable[str], docs_val: int, **origin) -> None:
    """Write `docs_selected.jsonl` and its sidecar; the first `docs_val` documents are for validation.

    origin: more to note in the sidecar, such as selection_seed. Raises UserError when one of the parts is empty.
    """
    path, count = Path(folder) / DOCUMENTS_FILE, 0
    (Path(folder) / SIDECAR_FILE).unlink(missing_ok=True)
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for text in documents:
            file.write(json.dumps({"text": encodable_text(text)}, ensure_ascii=False) + "\n")
            count += 1
        if not 0 < docs_val < count:
            raise UserError(
                f"of {count} documents {docs_val} would be for validation. Both parts need at least one: add text or "
                "change docs_val."
            )
    sidecar = {
        "num_docs": count, "docs_val": docs_val, "docs_train": count - docs_val, "docs_bytes": path.stat().st_size,
        "docs_sha256": sha256_of_golf_file(path), **origin,
    }  # fmt: skip
    write_atomic(Path(folder) / SIDECAR_FILE, json.dumps(sidecar, indent=2) + "\n")


def golf_documents(path):
    """Yield the text of each document of a `docs_selected.jsonl`. Raises UserError with file and line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = json.loads(line.decode("utf-8"))["text"]
                if not isinstance(text, str):
                    raise TypeError("the text is no string")
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f'{path}, line {number}: no JSON object with a string as "text" ({error!r}). Repair or remove it.'
                ) from error
            yield text


# %% [markdown]
# ### `export_shards`
# Documents run on from one shard into the next, and only where validation ends and training begins a new file is
# started early.


# %%
def positive_setting(name: str, default: int) -> int:
    """A whole number above 0 from the environment. Raises UserError."""
    value = os.environ.get(name) or str(default)
    if not value.isdecimal() or int(value) == 0:
        raise UserError(f"{name} is {value!r}; it has to be a whole number above 0.")
    return int(value)


def export_shards(documents_path, tokenizer, folder, num_val_docs: int, shard_tokens: int = SHARD_TOKENS) -> dict:
    """Write the shards of all documents; returns the counts for the manifest. Golf spec sections 1.1 and 1.3."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("fineweb_*.bin"):
        stale.unlink()
    batch_documents = positive_setting("MATCHED_FINEWEB_SP_BATCH_SIZE", 1024)
    threads = positive_setting("MATCHED_FINEWEB_TOKENIZER_THREADS", os.cpu_count() or 8)
    stats = {f"{what}_{part}": 0 for what in ("docs", "files", "tokens") for part in ("total", "val", "train")}
    shard, fill, split = np.empty(shard_tokens, dtype=np.uint16), 0, "val"

    def close_shard():
        nonlocal fill
        if fill:
            write_token_shard(folder / f"fineweb_{split}_{stats[f'files_{split}']:06d}.bin", shard[:fill])
            count("files", 1)
        fill = 0

    def count(what, amount):
        stats[f"{what}_{split}"] += amount
        stats[f"{what}_total"] += amount

    documents = golf_documents(documents_path)
    with tqdm(desc=folder.name, unit="doc", mininterval=1, delay=2, file=sys.stdout,
              disable=get_dist_info()[1] != 0) as bar:  # fmt: skip
        while texts := list(islice(documents, batch_documents)):
            for tokens in tokenizer.encode_batch(texts, threads):
                if stats["docs_total"] == num_val_docs:
                    close_shard()
                    split = "train"
                tokens = np.concatenate([np.array([BOS_ID], dtype=np.uint16), tokens])
                if int(tokens.max()) >= tokenizer.vocab_size:
                    raise UserError(f"token {tokens.max()} is not in a vocabulary of {tokenizer.vocab_size}.")
                count("docs", 1)
                count("tokens", len(tokens))
                while len(tokens):
                    part, tokens = tokens[: shard_tokens - fill], tokens[shard_tokens - fill :]
                    shard[fill : fill + len(part)] = part
                    fill += len(part)
                    if fill == shard_tokens:
                        close_shard()
            bar.update(len(texts))
    close_shard()
    return stats


# %% [markdown]
# ### `export_golf_data`
# Train each tokenizer, write its shards, and at the very end the manifest: where there is one, all is there.
#
# As in the challenge's exporter, tokenizers learn from the documents in their order, those for validation included.
# That lets a published tokenizer be trained again; a tokenizer is not counted and holds words, not sentences.


# %%
def read_sidecar(folder) -> dict | None:
    """The sidecar of the documents, None when there is none. Raises UserError."""
    path = Path(folder) / SIDECAR_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if content is not None and not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        return content
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}). Fetch it again or delete it.") from error


def export_golf_data(
    folder, specs: list[TokenizerSpec], num_val_docs: int | None = None, shard_tokens: int = SHARD_TOKENS,
    remote_repo_id: str | None = None, remote_root: str | None = None,
) -> dict:  # fmt: skip
    """Tokenizers, shards and `manifest.json` from the `docs_selected.jsonl` in `folder`; returns the manifest.

    num_val_docs: None takes the sidecar's, else 50,000. remote_*: where the documents came from. Golf spec section 1.3.
    Raises UserError, before any work when the documents are not those that the sidecar describes.
    """
    folder = Path(folder)
    documents, sidecar = folder / DOCUMENTS_FILE, read_sidecar(folder)
    if not documents.is_file():
        raise UserError(f"{folder} has no {DOCUMENTS_FILE}. Write or download the documents first.")
    if shard_tokens < 1:
        raise UserError(f"a shard of {shard_tokens} tokens cannot be written; the challenge has {SHARD_TOKENS:,}.")
    known = sidecar or {}
    sha256 = sha256_of_golf_file(documents)
    if known.get("docs_sha256") not in (None, sha256):
        raise UserError(f"{documents} is not the file that {SIDECAR_FILE} describes: the checksum differs. Fetch both.")
    with open(documents, "rb") as file:
        num_docs = sum(1 for _ in file)
    if known.get("num_docs") not in (None, num_docs):
        raise UserError(f"{documents} has {num_docs:,} documents and {SIDECAR_FILE} says {known['num_docs']:,}.")
    if num_val_docs is None:
        num_val_docs = known.get("docs_val", 50_000)
    if not 0 < num_val_docs < num_docs:
        raise UserError(
            f"{num_val_docs:,} of {num_docs:,} documents cannot be for validation: training needs some too, and "
            "validation at least one. Change num_val_docs."
        )
    for name in ("manifest.json", ORIGIN_FILE):
        (folder / name).unlink(missing_ok=True)
    tokenizers, datasets = [], []
    for spec in specs:
        texts = islice(golf_documents(documents), spec.tokenizer_train_docs)
        tokenizer = make_tokenizer(spec, texts, folder / "tokenizers")
        stats = export_shards(documents, tokenizer, folder / "datasets" / spec.dataset_name, num_val_docs, shard_tokens)
        if stats["docs_total"] != num_docs:
            raise UserError(f"{stats['docs_total']:,} of {num_docs:,} documents were exported. Is the file in use?")
        shared = {
            "vocab_size": tokenizer.vocab_size, "bos_id": BOS_ID, "eos_id": EOS_ID,
            "recommended_bigram_vocab_size": -(-tokenizer.vocab_size // 128) * 128 * 5,
        }  # fmt: skip
        path = f"tokenizers/{spec.file_name}"
        files = {"path": path, "pad_id": PAD_ID, "unk_id": UNK_ID}
        if spec.kind != "byte":
            files = {"model_path": path, "vocab_path": path.removesuffix(".model") + ".vocab"}
        tokenizers.append({"name": spec.name, "kind": spec.kind, **shared, "source_spec": spec.as_json(), **files})
        dataset_path = f"datasets/{spec.dataset_name}"
        datasets.append({
            "name": spec.dataset_name, "tokenizer_name": spec.name, "tokenizer_kind": spec.kind, "path": dataset_path,
            "train_glob": f"{dataset_path}/fineweb_train_*.bin", "val_glob": f"{dataset_path}/fineweb_val_*.bin",
            **shared, "stats": stats,
        })  # fmt: skip
    exported_specs = [spec.as_json() for spec in specs]
    docs_meta = {
        "remote_repo_id": remote_repo_id, "remote_root": remote_root, "num_docs": num_docs, "docs_sha256": sha256,
        "source_manifest": SIDECAR_FILE if sidecar else None,
    }  # fmt: skip
    manifest = {
        "version": "10B", "num_docs": num_docs, "num_val_docs": num_val_docs,
        "shuffle_seed": known.get("shuffle_seed"), "shard_size": shard_tokens, "append_eos": False,
        "docs_jsonl": DOCUMENTS_FILE, "docs_meta": docs_meta | ({"source_sidecar": sidecar} if sidecar else {}),
        "tokenizer_specs": exported_specs, "tokenizers": tokenizers, "datasets": datasets,
    }  # fmt: skip
    write_atomic(folder / "tokenizer_config.export.json", json.dumps({"tokenizers": exported_specs}, indent=2) + "\n")
    write_atomic(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    return manifest


# %% [markdown]
# ### Without a network
# The folder's name holds a fingerprint of what went in. Another version of a package is other text, so it gets another
# folder, and nothing that was trained on the old one is mistaken for being up to date.

# %%
OFFLINE_GOLF_CHARACTERS = 3_000_000
OFFLINE_GOLF_SHARD_TOKENS = 250_000  # several shards, as in the real thing


def golf_variant_spec(variant: str) -> TokenizerSpec:
    """The tokenizer of `sp1024`, `sp4096`, ..., or `byte260`. Raises UserError for any other name."""
    if variant == "byte260":
        return TokenizerSpec(kind="byte")
    if not re.fullmatch(r"sp[1-9]\d{2,4}", variant):
        raise UserError(f'the variant "{variant}" is not known. It can be sp and a size, as in sp1024, or byte260.')
    return TokenizerSpec(vocab_size=int(variant[2:]))


def offline_golf_inputs(variant: str, characters: int = OFFLINE_GOLF_CHARACTERS) -> dict:
    """All that the offline dataset depends on."""
    return {
        "installation": offline_installation(), "characters": characters, "shard_tokens": OFFLINE_GOLF_SHARD_TOKENS,
        "spec": golf_variant_spec(variant).as_json(), "sentencepiece": sentencepiece.__version__,
    }  # fmt: skip


def build_offline_golf_data(variant: str = "sp1024", characters: int = OFFLINE_GOLF_CHARACTERS) -> GolfData:
    """Tokenizer and shards from the documentation on this machine; built once, a few seconds. Raises UserError."""
    fingerprint = fingerprint_of(offline_golf_inputs(variant, characters))
    folder = Path(get_base_dir()) / "golf_data" / f"offline-{variant}-{fingerprint[:12]}"
    try:
        return open_golf_data(folder, variant)
    except UserError:  # not built yet, or damaged since
        training, validation = split_offline_documents(collect_offline_documents(characters))
        texts = [document.text for document in validation + training]
        write_golf_documents(folder, texts, len(validation), source="offline documentation", selection_seed=0)
        export_golf_data(folder, [golf_variant_spec(variant)], shard_tokens=OFFLINE_GOLF_SHARD_TOKENS)
        return open_golf_data(folder, variant)


# %% [markdown]
# ### `fetch_from_hub`
# The hub's client resumes what was interrupted. What it brought is checked here: a large file lies in its cache under
# its own checksum, and a shard must be as long as its header says. What fails is fetched afresh.


# %%
@dataclass(frozen=True)
class GolfRepository:
    """A dataset repository and the folder in it below which `manifest.json` lies."""

    repo_id: str
    remote_root: str = "datasets"

    def remote_path(self, name: str) -> str:
        return f"{self.remote_root}/{name}" if self.remote_root else name


GOLF_REPOSITORIES = {
    "sp1024": "willdepueoai/parameter-golf",
    "byte260": "willdepueoai/parameter-golf",
    "sp4096": "kevclark/parameter-golf",
    "sp8192": "kevclark/parameter-golf",
}


class SilentBar(tqdm):
    """No bar: the hub's client would draw one for each of a hundred files."""

    def __init__(self, *args, **options):
        options.pop("name", None)
        super().__init__(*args, **{**options, "disable": True})


def golf_repository(variant: str) -> GolfRepository:
    """Where a variant is published; MATCHED_FINEWEB_REPO_ID and ..._REMOTE_ROOT_PREFIX decide when set."""
    golf_variant_spec(variant)
    repo_id = os.environ.get("MATCHED_FINEWEB_REPO_ID") or GOLF_REPOSITORIES.get(variant, GOLF_REPOSITORIES["sp1024"])
    return GolfRepository(repo_id, os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets").strip("/"))


def fetch_from_hub(repository: GolfRepository, name: str, path, check=None, retry_seconds=(2, 4, 8, 16)) -> None:
    """Bring one file of a repository to `path`. check(path) raises UserError when it is not good.

    Raises UserError at once for what does not exist or is not allowed, and otherwise after the last attempt.
    """
    path, remote, fresh = Path(path), repository.remote_path(name), False
    cache = Path(get_base_dir()) / "golf_data" / "hub"
    endpoint = os.environ.get("HF_ENDPOINT") or None
    for pause in (*retry_seconds, None):
        try:
            cached = hf_hub_download(
                repository.repo_id, remote, repo_type="dataset", cache_dir=cache, endpoint=endpoint,
                force_download=fresh, tqdm_class=SilentBar,
            )  # fmt: skip
            cached = Path(cached).resolve(strict=True)
            if re.fullmatch("[0-9a-f]{64}", cached.name) and sha256_of_golf_file(cached) != cached.name:
                raise UserError("the checksum is not the one that the hub names")
            with atomic_path(path) as temporary:
                temporary.unlink()
                try:
                    os.link(cached, temporary)
                except OSError:  # another disk
                    shutil.copyfile(cached, temporary)
                if check:
                    check(temporary)
            return
        except (OSError, RuntimeError, HTTPError, UserError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status in (401, 403, 404):
                raise UserError(
                    f"{remote} of {repository.repo_id} answers {status}: it does not exist or needs permission (an "
                    "access token in HF_TOKEN). Check MATCHED_FINEWEB_REPO_ID and ..._REMOTE_ROOT_PREFIX."
                ) from error
            if isinstance(error, LocalEntryNotFoundError):  # the client has waited and tried again already
                raise UserError(
                    f"{remote} of {repository.repo_id} could not be fetched: the hub is out of reach. Check the "
                    'connection and run again, or use the source "offline".'
                ) from error
            if pause is None:
                reason = str(error).split("\n")[0].rstrip(".") or type(error).__name__
                raise UserError(
                    f"{remote} of {repository.repo_id} could not be fetched in {len(retry_seconds) + 1} attempts "
                    f'({reason}). What has arrived is kept: run again, or use the source "offline".'
                ) from error
            fresh = isinstance(error, UserError)  # what came was bad; otherwise go on from where it stopped
            time.sleep(pause)


# %% [markdown]
# ### `download_golf_data`
# The manifest first, because it knows how many shards there are. Two repositories have files of the same names and
# other content, so the folder remembers which one it was filled from and refuses to be mixed.


# %%
def check_tokenizer_file(path) -> None:
    """Raise UserError when a SentencePiece model does not load; it may still have a temporary name."""
    if ".model" in path.name:
        load_golf_tokenizer(path)


def fetch_golf_manifest(repository: GolfRepository, folder: Path, skip_manifest: bool, retry_seconds) -> dict:
    """The manifest in `folder`, fetched unless it is there. Raises UserError when it is another repository's."""
    path, note = folder / "manifest.json", folder / ORIGIN_FILE
    origin = {"repo_id": repository.repo_id, "remote_root": repository.remote_root}
    if path.exists() or note.exists():
        try:
            found = json.loads(note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {"repo_id": "an unknown place"}
        if found != origin:
            raise UserError(
                f"{folder} holds data from {found.get('repo_id')}, not from {repository.repo_id} "
                f'(folder "{repository.remote_root}"). Use another folder, or delete this one.'
            )
    if not path.exists():
        if skip_manifest:
            raise UserError(f"{path} is not there, and the number of shards stands in it. Leave out skip_manifest.")
        fetch_from_hub(repository, "manifest.json", path, None, retry_seconds)
        write_atomic(note, json.dumps(origin, indent=2) + "\n")
    return read_golf_manifest(folder)


def download_golf_data(
    variant: str = "sp1024", train_shards: int = 80, folder=None, skip_manifest: bool = False, with_docs: bool = False,
    retry_seconds=(2, 4, 8, 16),
) -> GolfData:  # fmt: skip
    """The validation stream and the first `train_shards` training shards of a variant, with the tokenizer.

    train_shards: −1 means 80, or all when there are fewer. folder: where to (default: one for each repository, in the
    base directory). skip_manifest: use the one that is there. with_docs: the documents too, which are larger than all
    shards together. Files that are good already are kept. Golf spec section 1.4.
    Raises UserError, for too many shards before anything large is fetched.
    """
    repository = golf_repository(variant)
    folder = Path(folder or Path(get_base_dir()) / "golf_data" / repository.repo_id.replace("/", "--"))
    manifest = fetch_golf_manifest(repository, folder, skip_manifest, retry_seconds)
    dataset = manifest_dataset(manifest, variant)
    stats = dataset["stats"]
    if train_shards == -1:
        train_shards = min(80, stats["files_train"])
    if not 0 < train_shards <= stats["files_train"]:
        raise UserError(
            f"{repository.repo_id} has {stats['files_train']} training shards of {variant}, and {train_shards} were "
            "asked for."
        )
    wanted = {name: check_tokenizer_file for name in manifest_tokenizer_files(manifest, dataset)}
    for split, count in (("val", stats["files_val"]), ("train", train_shards)):
        for index in range(count):
            wanted[f"datasets/{dataset['name']}/fineweb_{split}_{index:06d}.bin"] = shard_token_count
    if with_docs:
        wanted |= {DOCUMENTS_FILE: None, SIDECAR_FILE: None}
    missing = [name for name, check in wanted.items() if not is_good_file(folder / name, check)]
    missing_shards = sum(name.endswith(".bin") for name in missing)
    require_free_space(missing_shards * 2 * manifest.get("shard_size", SHARD_TOKENS), f"downloading {variant}")
    pool = ThreadPoolExecutor(4)
    jobs = [pool.submit(fetch_from_hub, repository, n, folder / n, wanted[n], retry_seconds) for n in missing]
    try:
        for job in tqdm(jobs, desc=f"downloading {variant}", unit="file", mininterval=1, file=sys.stdout,
                        disable=get_dist_info()[1] != 0):  # fmt: skip
            job.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if with_docs:
        known = (read_sidecar(folder) or {}).get("docs_sha256") or manifest.get("docs_meta", {}).get("docs_sha256")
        if known not in (None, sha256_of_golf_file(folder / DOCUMENTS_FILE)):
            (folder / DOCUMENTS_FILE).unlink()
            raise UserError(f"{DOCUMENTS_FILE} has another checksum than the manifest names. Run again to fetch it.")
    return open_golf_data(folder, variant, train_shards)


def is_good_file(path: Path, check) -> bool:
    """Whether a file is there and passes its check."""
    try:
        if path.exists() and check is not None:
            check(path)
        return path.exists()
    except UserError:
        return False


# %% [markdown]
# ### `prepare_golf_data`
# The one call that a notebook makes. When several processes start together, the first does the work, and the others
# find it done.


# %%
def prepare_golf_data(source: str = "offline", variant: str = "sp1024", train_shards: int = -1) -> GolfData:
    """The data named by `source`: "offline", "hub", or an export folder. Every rank calls it.

    train_shards: how many to use; −1 means all, and at most 80 from the hub. Raises UserError.
    """
    if train_shards == 0 or train_shards < -1:
        raise UserError(f"train_shards is {train_shards}; it can be a positive number, or -1 for all there are.")
    golf_variant_spec(variant)
    with rank0_first(), FileLock(os.path.join(get_base_dir(), "golf_data.lock")):
        if source == "offline":
            data = build_offline_golf_data(variant)
        elif source == "hub":
            data = download_golf_data(variant, train_shards)
        elif Path(source).expanduser().is_dir():
            data = open_golf_data(Path(source).expanduser(), variant)
        else:
            raise UserError(f'the source "{source}" is not known. Use offline, hub, or the path of an export folder.')
        if train_shards > 0:
            data = open_golf_data(data.folder, variant, train_shards)
    print0(
        f"{data.name}: {data.stats['tokens_train']:,} training tokens in {data.stats['files_train']} shards "
        f"({len(data.train_files)} here), {data.stats['tokens_val']:,} validation tokens, vocabulary {data.vocab_size}."
    )
    return data
