# %% [markdown]
# ## Auditing the score's denominator
#
# Bits per byte is a quotient, and the bits get all the attention. The bytes come from tables, and a wrong table makes
# a better score without a better model. A wrong validation set does the same, more quietly. None of that can be seen
# in a log.
#
# So before any model is trained, the bytes by the tables are compared with the bytes of the decoded text, document by
# document; the number of documents, targets and bytes with those of the frozen validation set; and the validation text
# with the training text, because a document that stands in both measures memory. What comes out is a table that says
# what was expected, what was found, and whether that is right.

# %%
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from golf.golf_data import GolfData, golf_documents, manifest_dataset, read_golf_manifest
from golf.golf_tokenizers import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    UNK_ID,
    ByteTables,
    ByteTokenizer,
    SentencePieceTokenizer,
    build_byte_tables,
    load_golf_tokenizer,
)
from golf.shards import TokenStream, read_token_shard

# %% [markdown]
# ### `AuditFinding`
# `look` is for what is no error and still ought to be known before two scores are compared.


# %%
@dataclass(frozen=True)
class AuditFinding:
    """verdict: "ok", "look" or "WRONG"."""

    check: str
    expected: str
    found: str
    verdict: str


AUDIT_HEADER = ("check", "expected", "found", "verdict")


def audit_rows(findings: list[AuditFinding]) -> list[tuple[str, str, str, str]]:
    """The findings as rows of a table, under AUDIT_HEADER."""
    return [(finding.check, finding.expected, finding.found, finding.verdict) for finding in findings]


# %% [markdown]
# ### `document_bytes`
# Two ways to count that share nothing but the tokens: sum up the tables, or have the tokenizer write out the text and
# encode it. Both leave out the begin of document, which is scored and has no bytes.


# %%
@dataclass(frozen=True)
class DocumentBytes:
    """One entry for each document. by_tables, by_text: bytes. spaces: those that the tables count in front of words."""

    by_tables: np.ndarray
    by_text: np.ndarray
    spaces: np.ndarray
    encodes_back: np.ndarray  # whether the text gives the same tokens again


def document_starts(tokens: np.ndarray) -> np.ndarray:
    """Where documents begin in a stream."""
    return np.flatnonzero(tokens == BOS_ID)


def document_bytes(
    tokens: np.ndarray, tokenizer: SentencePieceTokenizer | ByteTokenizer, tables: ByteTables, batch_documents=1024
) -> DocumentBytes:
    """The bytes of each document of a stream, (n,) tokens that begin with a document, counted in both ways."""
    base, space, boundary = (table.cpu().numpy() for table in tables)
    starts = document_starts(tokens)
    after_text = np.concatenate([[False], ~boundary[tokens[:-1]]])
    spaces = (space[tokens] & after_text).astype(np.int64)
    by_tables = np.add.reduceat(base[tokens].astype(np.int64) + spaces, starts)
    documents = np.split(tokens, starts[1:])
    by_text, encodes_back = [], []
    for i in range(0, len(documents), batch_documents):
        batch = [document[1:] for document in documents[i : i + batch_documents]]
        texts = tokenizer.decode_batch(batch)
        by_text += [len(text.encode("utf-8")) for text in texts]
        again = tokenizer.encode_batch(texts, threads=os.cpu_count() or 1)
        encodes_back += [np.array_equal(old, new) for old, new in zip(batch, again, strict=True)]
    return DocumentBytes(by_tables, np.array(by_text), np.add.reduceat(spaces, starts), np.array(encodes_back))


# %% [markdown]
# ### `training_overlap`
# Whole documents are compared by a hash of their tokens. For passages, validation documents are cut into blocks of 32
# tokens and looked for at every position of the training text. The hash of all windows of 32 tokens takes five steps,
# because two neighbouring windows of 16 make one of 32.

# %%
OVERLAP_BLOCK = 32
FILTER_BITS = 26  # a table of 64 MB


def window_hashes(tokens: np.ndarray) -> np.ndarray:
    """A 64-bit hash of tokens i to i + 31 for every i, (n − 31,) uint64."""
    factor = 0x9E3779B97F4A7C15  # any odd number
    values = np.random.default_rng(0).integers(0, 2**64, 2**16, dtype=np.uint64)  # a token's number is no random one
    hashes, width = values[tokens], 1
    while width < OVERLAP_BLOCK:
        hashes = hashes[:-width] * np.uint64(factor) + hashes[width:]
        factor, width = factor * factor % 2**64, 2 * width
    return hashes


@dataclass(frozen=True)
class TrainingOverlap:
    """What the validation text has in common with the training text; documents_* are numbers of documents."""

    documents_train: int
    documents_repeated: int
    documents_in_training: int
    blocks: int
    blocks_in_training: int


def training_overlap(val_tokens: np.ndarray, train_files) -> TrainingOverlap:
    """Look for validation documents, and their blocks of 32 tokens, in the training shards."""

    def digest(document):
        return hashlib.blake2b(document.tobytes(), digest_size=16).digest()

    documents = np.split(val_tokens, document_starts(val_tokens))[1:]
    digests = [digest(document) for document in documents if len(document) > 1]
    wanted, found, documents_train = set(digests), set(), 0
    starts = document_starts(val_tokens)
    ends = np.append(starts[1:], len(val_tokens))
    places = [np.arange(s + 1, e - OVERLAP_BLOCK + 1, OVERLAP_BLOCK) for s, e in zip(starts, ends, strict=True)]
    places = np.concatenate([np.empty(0, np.int64), *places])
    blocks = window_hashes(val_tokens)[places] if len(places) else np.empty(0, np.uint64)
    known, few_bits = np.unique(blocks), np.uint64(64 - FILTER_BITS)
    seen, may_be_known = np.zeros(len(known), dtype=bool), np.zeros(2**FILTER_BITS, dtype=bool)
    may_be_known[known >> few_bits] = True  # one look for most windows, in place of a search of twenty steps

    def look_at(tokens):
        nonlocal documents_train
        for document in np.split(tokens, document_starts(tokens))[1:]:
            documents_train += 1
            if (key := digest(document)) in wanted:
                found.add(key)
        if len(known):
            for i in range(0, len(tokens) - OVERLAP_BLOCK + 1, 2**22):
                hashes = window_hashes(tokens[i : i + 2**22 + OVERLAP_BLOCK - 1])
                hashes = hashes[may_be_known[hashes >> few_bits]]
                at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
                seen[at[known[at] == hashes]] = True

    unfinished = np.empty(0, np.uint16)  # a document may go on in the next shard
    for path in train_files:
        tokens = np.concatenate([unfinished, read_token_shard(path)])
        last = max(document_starts(tokens), default=len(tokens))
        look_at(tokens[:last])
        unfinished = tokens[last:]
    look_at(unfinished)
    return TrainingOverlap(
        documents_train=documents_train,
        documents_repeated=len(digests) - len(wanted),
        documents_in_training=sum(key in found for key in digests),
        blocks=len(blocks),
        blocks_in_training=int(seen[np.searchsorted(known, blocks)].sum()) if len(known) else 0,
    )


# %% [markdown]
# ### The frozen validation set
# Everybody's scores are about the same fifty thousand documents, the first of a selection that was shuffled once.
# Targets are those of the published logs, which cut the stream to a multiple of the sequence length.

# %%
FROZEN_DOCUMENTS = 50_000
FROZEN_SELECTION = (15_368_808, "84386dfa7b339a5d4831d5273c4a2028b78b60670d3a235633a8520545d19bc7")  # documents, sha256
# variant: (sequence length of the cut, targets, bytes by the tables)
FROZEN_STREAMS = {
    "sp1024": (4096, 62_021_632, 151_080_363),
    "sp4096": (2048, 45_508_608, 151_074_053),
    "sp8192": (2048, 40_540_160, 151_078_222),
    "byte260": (1, 151_130_645, 151_080_645),
}


def audit_frozen_set(variant: str, tokens: np.ndarray, tables: ByteTables) -> list[AuditFinding]:
    """Whether a validation stream is the one of the published scores. Golf spec section 1.5."""
    n_documents = len(document_starts(tokens))
    same_size = n_documents == FROZEN_DOCUMENTS
    findings = [
        AuditFinding(
            "documents of the frozen set", f"{FROZEN_DOCUMENTS:,}",
            f"{n_documents:,}" + ("" if same_size else ": no score here compares with a published one"),
            "ok" if same_size else "look",
        )
    ]  # fmt: skip
    if same_size and variant in FROZEN_STREAMS:
        length, targets, n_bytes = FROZEN_STREAMS[variant]
        # a byte stream is published with its first begin of document, which is no target
        cut = len(tokens) if variant == "byte260" else (len(tokens) - 1) // length * length
        counted = tables.stream_bytes(torch.from_numpy(tokens[: cut + 1].astype(np.int64)))
        for what, wanted, found in (("targets", targets, cut), ("bytes", n_bytes, counted)):
            findings.append(
                AuditFinding(
                    f"{what} of the frozen set, cut to a multiple of {length}", f"{wanted:,}",
                    f"{found:,}" + ("" if wanted == found else ": another export; compare with equal bytes only"),
                    "ok" if wanted == found else "look",
                )
            )  # fmt: skip
    return findings


def audit_selection(manifest: dict) -> AuditFinding:
    """Whether training and validation documents are those that everybody has, by the manifest of the shards."""
    count, sha256 = manifest.get("num_docs"), (manifest.get("docs_meta") or {}).get("docs_sha256")
    expected, found = (f"{n:,}, {str(digest)[:12]}" for n, digest in (FROZEN_SELECTION, (count or 0, sha256)))
    same = (count, sha256) == FROZEN_SELECTION
    return AuditFinding("documents of the selection, sha256", expected, found, "ok" if same else "look")


# %% [markdown]
# ### `audit_bpb`
# All of it, for one dataset. Give it the tables that your evaluation uses: those are the ones that count.


# %%
def audit_bpb(data: GolfData, tables: ByteTables | None = None, overlap_shards: int = 8) -> list[AuditFinding]:
    """The findings of all checks, in the order of importance for a score.

    tables: those to audit (None: the ones that `build_byte_tables` makes). overlap_shards: training shards to search.
    What a manifest would say is left out when the folder has none (`open_golf_shards`).
    Raises UserError when a file is damaged or holds tokens outside the vocabulary.
    """
    findings = []

    def add(check, expected, found, verdict):
        findings.append(AuditFinding(check, str(expected), str(found), verdict))

    tokenizer = load_golf_tokenizer(data.tokenizer_path, data.vocab_size)
    stream = TokenStream(data.val_files, data.vocab_size)
    tokens = stream.read(0, len(stream))
    right = build_byte_tables(tokenizer, data.vocab_size)
    if tables is not None:
        same = all(np.array_equal(a.cpu().numpy(), b.numpy()) for a, b in zip(tables, right, strict=True))
        add("the tables", "those of the tokenizer", "the same" if same else "others", "ok" if same else "WRONG")
    tables = right if tables is None else tables
    begins = int(tokens[0]) == BOS_ID
    add("the first token", BOS_ID, tokens[0], "ok" if begins else "WRONG")
    if not begins:
        return findings
    others = int(np.isin(tokens, [PAD_ID, EOS_ID, UNK_ID]).sum())
    add("padding, end of document or unknown in the stream", 0, f"{others:,}", "WRONG" if others else "ok")

    counted = document_bytes(tokens, tokenizer, tables)
    total, text_total, spaces = (int(each.sum()) for each in (counted.by_tables, counted.by_text, counted.spaces))
    different = np.flatnonzero(counted.by_tables != counted.by_text)
    found = f"{total:,}"
    if len(different):
        found += f" ({total / max(text_total, 1) - 1:+.2%}), others in {len(different):,} documents, first in number "
        found += f"{different[0]:,}" + (": each space is counted twice" if total == text_total + spaces else "")
    verdict = "WRONG" if len(different) else "ok"
    add("bytes by the tables = bytes of the decoded text", f"{text_total:,}", found, verdict)
    back, n_documents = int(counted.encodes_back.sum()), len(counted.encodes_back)
    # a few texts have two encodings; with another tokenizer's tokens hardly any text has the one that was found
    verdict = "ok" if back == n_documents else "look" if back > 0.9 * n_documents else "WRONG"
    add("documents that the tokenizer encodes to these tokens", f"{n_documents:,}", f"{back:,}", verdict)

    variant, stats = data.name.removeprefix("fineweb10B_"), data.stats
    has_manifest = (Path(data.folder) / "manifest.json").exists()
    if has_manifest:
        manifest = read_golf_manifest(data.folder)
        stats = manifest_dataset(manifest, variant)["stats"]
        add("validation documents of the manifest", f"{stats['docs_val']:,}", f"{n_documents:,}",
            "ok" if stats["docs_val"] == n_documents else "WRONG")  # fmt: skip
    if has_manifest and data.documents_path.exists():
        texts = zip(range(n_documents), golf_documents(data.documents_path), strict=False)
        raw = sum(len(text.encode("utf-8", "replace")) for _, text in texts)
        share = total / max(raw, 1) - 1
        add("bytes of the documents before normalisation", f"{raw:,}", f"{total:,} ({share:+.3%})",
            "ok" if abs(total - raw) <= 5e-5 * raw else "look")  # fmt: skip
    findings += audit_frozen_set(variant, tokens, tables)
    if has_manifest and n_documents == FROZEN_DOCUMENTS:
        findings.append(audit_selection(manifest))

    searched = data.train_files[:overlap_shards]
    overlap = training_overlap(tokens, searched)
    where = "" if len(searched) == stats["files_train"] else f", in {len(searched)} of {stats['files_train']} shards"
    if not where and has_manifest:
        add("training documents of the manifest", f"{stats['docs_train']:,}", f"{overlap.documents_train:,}",
            "ok" if stats["docs_train"] == overlap.documents_train else "WRONG")  # fmt: skip
    add("validation documents that occur twice", 0, overlap.documents_repeated,
        "look" if overlap.documents_repeated else "ok")  # fmt: skip
    add(f"validation documents that are training documents too{where}", 0, overlap.documents_in_training,
        "look" if overlap.documents_in_training else "ok")  # fmt: skip
    share = overlap.blocks_in_training / max(overlap.blocks, 1)
    add(f"validation blocks of {OVERLAP_BLOCK} tokens that stand in the training text{where}", "under 5%",
        f"{overlap.blocks_in_training:,} of {overlap.blocks:,} ({share:.1%})",
        "ok" if share < 0.05 else "look")  # fmt: skip
    return findings
