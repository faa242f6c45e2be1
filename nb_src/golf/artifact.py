# %% [markdown]
# ## The artifact
#
# One file that holds the whole model and says what it is: a reader with nothing but this file and the script can
# rebuild the model, without environment variables and without trusting the machine that wrote it. What belongs
# together lies together (all 6-bit codes, all scales, all controls), because a codec finds more in a long stream of one
# kind than in many short ones.
#
# The limit of 16,000,000 bytes is met by construction. Before training, a size model picks dimensions or bits; after
# training, the clip of the quantiser is moved until the compressed codes have exactly the room that is left.

# %%
import hashlib
import json
import math
import struct
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from golf.codecs import (
    CODEC_IDS,
    DENSE_MIN_ENTROPY,
    code_counts,
    codecs_to_try,
    compress_stream,
    decompress_stream,
    entropy_bits,
    gaussian_code_shares,
    huffman_bits,
    join_byte_planes,
    pack_6bit,
    split_byte_planes,
    unpack_6bit,
)
from golf.golf_gpt import role_of
from golf.golf_settings import ARTIFACT_LIMIT_BYTES
from golf.gptq import StorageRule, StoredTensor, largest_code, quantize_state
from nanochat.runtime import UserError, write_atomic
from nanochat.stages import named_leaves, plain_json

# %% [markdown]
# ### The layout
# 46 bytes that never change their place: magic, version, codec, the length of the compressed header, and the SHA-256
# of all that follows. Then the header (JSON), then the streams in the order in which the header lists them.

# %%
ARTIFACT_MAGIC = b"GOLFMODL"
ARTIFACT_VERSION = 1
ARTIFACT_PREAMBLE = struct.Struct("<8sBBI32s")
ARTIFACT_RESERVE_BYTES = 30_000  # left free by the solvers: GPTQ codes compress a little differently


def stream_kind(tensor: StoredTensor) -> str:
    """Which stream the values of a tensor belong to: int6, int8, float16, float32..."""
    return f"int{tensor.bits}_codes" if tensor.scales is not None else str(tensor.values.dtype).removeprefix("torch.")


def tensor_bytes(values: torch.Tensor) -> bytes:
    """The little-endian bytes of a tensor."""
    return values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# %% [markdown]
# ### `artifact_streams`
# Tensors of one role stand together, so that the codec sees one kind of matrix at a time.


# %%
def artifact_streams(tensors: dict[str, StoredTensor]) -> tuple[dict[str, bytes], list[dict]]:
    """kind → raw bytes, and one header entry for each tensor, in the order of `tensors`.

    An entry has name, shape, dtype (to restore), kind, offset (bytes into that stream), and for codes bits and
    scale_offset (bytes into the stream "scales").
    """
    parts, lengths, entries = defaultdict(list), defaultdict(int), {}

    def append(kind: str, data: bytes) -> int:
        offset = lengths[kind]
        parts[kind].append(data)
        lengths[kind] += len(data)
        return offset

    for name in sorted(tensors, key=lambda name: (role_of(name), name)):
        tensor, kind = tensors[name], stream_kind(tensors[name])
        entry = dict(
            name=name, shape=list(tensor.values.shape), dtype=str(tensor.dtype).removeprefix("torch."), kind=kind,
            offset=append(kind, tensor_bytes(tensor.values)),
        )  # fmt: skip
        if tensor.scales is not None:
            entry |= dict(bits=tensor.bits, scale_offset=append("scales", tensor_bytes(tensor.scales)))
        entries[name] = entry
    return {kind: b"".join(parts[kind]) for kind in sorted(parts)}, [entries[name] for name in tensors]


# %% [markdown]
# ### `pack_stream`
# One stream under one codec, in the shape that the codec likes best. The shapes that cannot win are not tried.


# %%
def pack_stream(kind: str, data: bytes, codec: str) -> tuple[str, bytes]:
    """(form, compressed): form is plain, planes2 (16-bit data by byte planes) or dense6 (6-bit packing)."""
    forms = {"plain": data}
    if kind in ("scales", "float16", "bfloat16"):
        forms["planes2"] = split_byte_planes(data, 2)
    if kind.startswith("int") and kind.endswith("_codes") and int(kind[3]) <= 6:
        codes = np.frombuffer(data, np.int8)
        if entropy_bits(code_counts(codes)) > DENSE_MIN_ENTROPY:
            forms["dense6"] = pack_6bit(codes)
    packed = {form: compress_stream(codec, raw) for form, raw in forms.items()}
    form = min(packed, key=lambda form: len(packed[form]))
    return form, packed[form]


def unpack_stream(form: str, data: bytes, raw_bytes: int, codec: str) -> bytes:
    """The inverse. Raises ValueError when it does not come to `raw_bytes`."""
    data = decompress_stream(codec, data)
    if form == "planes2":
        data = join_byte_planes(data)
    elif form == "dense6":
        data = unpack_6bit(data, raw_bytes).tobytes()
    elif form != "plain":
        raise ValueError(f"the form {form!r} is unknown")
    if len(data) != raw_bytes:
        raise ValueError(f"a stream has {len(data)} bytes instead of {raw_bytes}")
    return data


# %% [markdown]
# ### `encode_artifact`
# All codecs are tried on all streams and the one with the smallest sum wins. The same tensors always give the same
# bytes.


# %%
@dataclass(frozen=True)
class EncodedArtifact:
    """blob: the whole file. codec: its name. packed: bytes of every stream by kind. forms: by kind."""

    blob: bytes
    codec: str
    packed: dict[str, int]
    forms: dict[str, str]


def encode_artifact(tensors: dict[str, StoredTensor], config: dict, compressor: str = "auto") -> EncodedArtifact:
    """The file for these tensors. config: whatever is needed to rebuild and score the model, as JSON types.

    Raises UserError for a config that holds an absolute path: it would tie the file to one machine.
    Golf spec section 5.
    """
    for name, value in named_leaves(plain_json(config)).items():
        if isinstance(value, str) and (value.startswith(("/", "~", "\\\\")) or value[1:3] in (":\\", ":/")):
            raise UserError(f"the artifact's config holds a path of this machine, {name} = {value!r}. Leave it out.")
    raw, entries = artifact_streams(tensors)
    jobs = [(codec, kind) for codec in codecs_to_try(compressor) for kind in raw]
    with ThreadPoolExecutor() as pool:  # the codecs let go of the interpreter lock
        packed_jobs = dict(zip(jobs, pool.map(lambda job: pack_stream(job[1], raw[job[1]], job[0]), jobs), strict=True))
    trials = {codec: {kind: packed_jobs[codec, kind] for kind in raw} for codec in codecs_to_try(compressor)}
    codec = min(trials, key=lambda codec: sum(len(packed) for _, packed in trials[codec].values()))
    streams = trials[codec]
    header = dict(
        config=plain_json(config),
        tensors=entries,
        streams=[
            dict(kind=kind, form=form, bytes=len(packed), raw_bytes=len(raw[kind]))
            for kind, (form, packed) in streams.items()
        ],
    )
    text = json.dumps(header, separators=(",", ":"), sort_keys=True, allow_nan=False)
    head = compress_stream(codec, text.encode("utf-8"))
    body = head + b"".join(packed for _, packed in streams.values())
    preamble = ARTIFACT_PREAMBLE.pack(
        ARTIFACT_MAGIC, ARTIFACT_VERSION, CODEC_IDS[codec], len(head), hashlib.sha256(body).digest()
    )
    return EncodedArtifact(
        blob=preamble + body,
        codec=codec,
        packed={kind: len(packed) for kind, (_, packed) in streams.items()}
        | {"header": len(head) + ARTIFACT_PREAMBLE.size},
        forms={kind: form for kind, (form, _) in streams.items()},
    )


# %% [markdown]
# ### `decode_artifact`
# The order of the checks is the order of what can go wrong: not our file, a file of another version, half a file, a
# changed file. What passes the hash and still makes no sense was written wrongly, and says where.


# %%
def decode_artifact(blob: bytes, called: str = "the artifact") -> tuple[dict[str, StoredTensor], dict]:
    """(tensors in the order in which they were given, config). Raises UserError, starting with `called`."""
    if len(blob) < ARTIFACT_PREAMBLE.size:
        raise UserError(f"{called} has {len(blob)} bytes: it was not written to its end. Write it again.")
    magic, version, codec_id, head_bytes, digest = ARTIFACT_PREAMBLE.unpack_from(blob)
    body = blob[ARTIFACT_PREAMBLE.size :]
    names = {number: name for name, number in CODEC_IDS.items()}
    if magic != ARTIFACT_MAGIC:
        raise UserError(f"{called} is not a model of this notebook: it starts with {magic!r}, not {ARTIFACT_MAGIC!r}.")
    if version != ARTIFACT_VERSION:
        raise UserError(f"{called} has version {version} and this script reads {ARTIFACT_VERSION}. Use its own script.")
    if codec_id not in names:
        raise UserError(f"{called} names the codec {codec_id}, which is none of {names}.")
    if hashlib.sha256(body).digest() != digest:
        raise UserError(f"{called} is cut or changed: its {len(body):,} bytes do not have the hash that was noted.")
    try:
        header = json.loads(decompress_stream(names[codec_id], body[:head_bytes]))
        raw, end = {}, head_bytes
        for stream in header["streams"]:
            packed = body[end : end + stream["bytes"]]
            raw[stream["kind"]] = unpack_stream(stream["form"], packed, stream["raw_bytes"], names[codec_id])
            end += stream["bytes"]
        if end != len(body):
            raise ValueError(f"the streams end at byte {end} of {len(body)}")
        return read_tensors(header["tensors"], raw), header["config"]
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{called} was written wrongly: {error}. Write it again.") from None


def read_tensors(entries: list[dict], raw: dict[str, bytes]) -> dict[str, StoredTensor]:
    """The tensors of a header from its streams. Raises ValueError when an entry and the streams do not agree.

    Every byte of every stream must belong to exactly one tensor.
    """
    used = defaultdict(list)

    def take(kind: str, offset: int, dtype: torch.dtype, shape: list[int], name: str) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        if offset < 0 or offset + size > len(raw[kind]):
            raise ValueError(f"{name} lies outside of its stream {kind}")
        used[kind].append((offset, size))
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(bytearray(raw[kind][offset : offset + size]), dtype=dtype).reshape(shape)

    tensors = {}
    for entry in entries:
        name, kind, shape = entry["name"], entry["kind"], entry["shape"]
        if name in tensors:
            raise ValueError(f"{name} occurs twice")
        if "bits" in entry:
            values = take(kind, entry["offset"], torch.int8, shape, name)
            scales = take("scales", entry["scale_offset"], torch.float16, shape[:1], name)
            if values.numel() and int(values.abs().max()) > largest_code(entry["bits"]) or (values == -128).any():
                raise ValueError(f"{name} has codes that {entry['bits']} bits cannot hold")
            if not torch.isfinite(scales).all() or (scales <= 0).any():
                raise ValueError(f"{name} has scales that are not positive numbers")
            bits = entry["bits"]
        else:
            values, scales = take(kind, entry["offset"], getattr(torch, kind), shape, name), None
            bits = 8 * values.element_size()
        dtype = getattr(torch, entry["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{name} claims the dtype {entry['dtype']!r}")
        tensors[name] = StoredTensor(values, scales, bits, dtype)
    for kind, data in raw.items():
        end = 0
        for offset, size in sorted(used[kind]):
            if offset != end:
                raise ValueError(f"the stream {kind} has a gap or an overlap at byte {min(offset, end)}")
            end += size
        if end != len(data):
            raise ValueError(f"the stream {kind} has {len(data) - end} bytes that no tensor claims")
    return tensors


# %% [markdown]
# ### Who takes the room
# Codes are charged their entropy and the rest of a stream in proportion, so the rows of this table add up to the file.


# %%
def artifact_size_rows(tensors: dict[str, StoredTensor], encoded: EncodedArtifact) -> list[dict]:
    """One dict per role, largest first: role, tensors, parameters, bits, bytes, bits_per_weight. Bytes add up."""
    wanted, kinds = {}, defaultdict(float)
    for name, tensor in tensors.items():
        wanted[name] = {stream_kind(tensor): 1.0 + tensor.values.numel()}  # 1: an empty stream has bytes too
        if tensor.scales is not None:
            each = entropy_bits(code_counts(tensor.values.numpy())) if tensor.values.numel() else 0.0
            wanted[name] = {
                stream_kind(tensor): 1.0 + tensor.values.numel() * each,
                "scales": 1.0 + tensor.scales.numel(),
            }
        for kind, share in wanted[name].items():
            kinds[kind] += share
    rows = {}
    for name, tensor in tensors.items():
        role = role_of(name)
        row = rows.setdefault(role, dict(role=role, tensors=0, parameters=0, bits=tensor.bits, bytes=0.0))
        row["tensors"] += 1
        row["parameters"] += tensor.values.numel()
        row["bytes"] += sum(encoded.packed[kind] * share / kinds[kind] for kind, share in wanted[name].items())
    rows["header"] = dict(role="(header)", tensors=0, parameters=0, bits=0, bytes=float(encoded.packed["header"]))
    for row in rows.values():
        row["bits_per_weight"] = 8 * row["bytes"] / row["parameters"] if row["parameters"] else None
    return sorted(rows.values(), key=lambda row: -row["bytes"])


def require_artifact_fits(
    rows: list[dict], code_bytes: int, blob_bytes: int, limit_bytes: int = ARTIFACT_LIMIT_BYTES
) -> None:
    """Raise UserError when code and model together are over the limit: by how much, and because of whom."""
    over = code_bytes + blob_bytes - limit_bytes
    if over <= 0:
        return
    largest = ", ".join(
        f"{row['role']} {row['bytes']:,.0f} ({row['bits_per_weight']:.2f} bits each)"
        for row in rows[:3]
        if row["bits_per_weight"] is not None
    )
    raise UserError(
        f"the model ({blob_bytes:,} bytes) and the code ({code_bytes:,}) are {over:,} bytes over the limit of "
        f"{limit_bytes:,}. The largest parts: {largest}. Raise the clip (MATRIX_CLIP_SIGMAS), take fewer bits, or make "
        f"the model {over / blob_bytes:.1%} smaller."
    )


# %% [markdown]
# ### `write_artifact` and `read_artifact`
# The file is refused before it is written when it is too large: a run must not end with a model that may not be shown.


# %%
def write_artifact(
    path,
    tensors: dict[str, StoredTensor],
    config: dict,
    compressor: str = "auto",
    code_bytes: int = 0,
    limit_bytes: int = ARTIFACT_LIMIT_BYTES,
) -> tuple[EncodedArtifact, list[dict]]:
    """Write the file (fsync, then rename); returns what was written and `artifact_size_rows`. For rank 0 alone.

    code_bytes: UTF-8 bytes of the script that is counted with it. Raises UserError when both are over the limit.
    """
    encoded = encode_artifact(tensors, config, compressor)
    rows = artifact_size_rows(tensors, encoded)
    require_artifact_fits(rows, code_bytes, len(encoded.blob), limit_bytes)
    write_atomic(path, encoded.blob)
    return encoded, rows


def read_artifact(path) -> tuple[dict[str, torch.Tensor], dict]:
    """(state dict in the original dtypes, config) from the file alone. UserError when it is missing or damaged."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist. Write the artifact first.")
    tensors, config = decode_artifact(path.read_bytes(), str(path))
    return {name: tensor.restored() for name, tensor in tensors.items()}, config


# %% [markdown]
# ### Predicting the size
# Twice. Before training from shapes alone: rows of a trained matrix are close enough to Gaussian that their codes'
# distribution, and with it their size, is known from bits and clip. And from the plainly rounded codes of the trained
# model, by counting them. Both count as brotli does, in whole bits per symbol.

# %%
HEADER_BYTES_PER_TENSOR = 9  # compressed
HEADER_BYTES_BESIDES = 500  # preamble and config


def scale_bits(columns: int) -> float:
    """Compressed bits of one fp16 row scale: how far the spreads of `columns` Gaussian weights differ by chance.

    A spread measured from n weights is uncertain by 1/√(2n), and fp16 has about 1,400 steps per unit of its logarithm.
    Two bits more, because trained rows differ by more than chance and the two bytes are coded apart.
    """
    return min(16.0, 2 + math.log2(1400 * math.sqrt(math.pi * math.e / columns)))


def predicted_size(shapes: dict[str, tuple[int, ...]], rules: dict[str, StorageRule]) -> dict[str, float]:
    """role → bytes of a model with Gaussian rows under these rules, before it exists; "(header)" is one of them.

    For the smallest codec, which at these entropies is brotli. Golf spec section 4.6.
    """
    sizes = defaultdict(float)
    for name, shape in shapes.items():
        rule, numel = rules[name], math.prod(shape)
        if rule.bits > 8:
            sizes[role_of(name)] += numel * rule.bits / 8
        else:
            each = huffman_bits(gaussian_code_shares(rule.bits, rule.sigmas))
            sizes[role_of(name)] += (numel * each + shape[0] * scale_bits(shape[1])) / 8
    sizes["(header)"] = HEADER_BYTES_BESIDES + HEADER_BYTES_PER_TENSOR * len(shapes)
    return dict(sizes)


def counted_size(tensors: dict[str, StoredTensor]) -> float:
    """Predicted bytes of the file for these codes under brotli, from how often each code occurs in each matrix.

    Everything but the codes is small and is really compressed.
    """
    total = HEADER_BYTES_BESIDES + HEADER_BYTES_PER_TENSOR * len(tensors)
    for tensor in tensors.values():
        if tensor.scales is not None and tensor.values.numel():
            total += tensor.values.numel() * huffman_bits(code_counts(tensor.values.numpy())) / 8
    for kind, data in artifact_streams(tensors)[0].items():
        if not kind.endswith("_codes"):
            total += len(pack_stream(kind, data, "brotli")[1])
    return total


# %% [markdown]
# ### `solve_clip_sigmas`
# The clip k of the matrices is not a matter of taste. A small k is precise and large, a large k is coarse and small,
# so the right one is the smallest k whose codes still fit. It is found by bisection on log k with the real codec on
# plainly rounded codes. The Gaussian size model says where to begin and the rule of thumb (doubling k saves one bit)
# where to go next, so that two or three trials do instead of twelve.


# %%
def solve_clip_sigmas(
    state: dict[str, torch.Tensor],
    rules: dict[str, StorageRule],
    adjustable: list[str],
    target_bytes: int,
    config: dict,
    compressor: str = "auto",
    lowest: float = 2.5,
    highest: float = 64.0,
    tolerance: float = 0.001,
) -> tuple[float, list[dict]]:
    """(k, the trials as dicts of sigmas and bytes; the largest of them that fits is the one at k).

    adjustable: names of the matrices whose clip is moved; all others keep their rule.
    target_bytes: for the file; leave ARTIFACT_RESERVE_BYTES for what GPTQ changes.
    The file at k has at most target_bytes, and at least 1 − tolerance of them unless k is `lowest`.
    Raises UserError when even `highest` is too large. Golf spec section 4.6.
    """
    weights = sum(state[name].numel() for name in adjustable)
    if not weights:
        raise UserError("there is no matrix whose clip could be moved: all tensors are small enough to stay floats.")
    compressor = "brotli" if compressor == "auto" else compressor  # the best of all can only be smaller
    fixed = {name: tensor for name, tensor in state.items() if name not in adjustable}
    fixed_bytes = len(encode_artifact(quantize_state(fixed, rules)[0], config, compressor).blob)
    matrices = {name: state[name] for name in adjustable}
    shapes = {name: tuple(tensor.shape) for name, tensor in matrices.items()}

    def rules_at(sigmas: float) -> dict[str, StorageRule]:
        return {name: StorageRule(rules[name].bits, sigmas) for name in adjustable}

    low, high = lowest, highest
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        predicted = fixed_bytes + sum(predicted_size(shapes, rules_at(middle)).values())
        low, high = (middle, high) if predicted > target_bytes else (low, middle)
    trials, too_large, fits, sigmas = [], None, None, high
    while True:
        tensors, _ = quantize_state(matrices, rules_at(sigmas))
        size = fixed_bytes + len(encode_artifact(tensors, {}, compressor).blob)
        trials.append(dict(sigmas=sigmas, bytes=size))
        if size <= target_bytes:
            fits = sigmas
            if sigmas == lowest or size >= (1 - tolerance) * target_bytes:
                return sigmas, trials
        elif sigmas == highest:
            raise UserError(
                f"even with a clip of {highest:g} σ the model has {size:,} bytes, and there is room for "
                f"{max(target_bytes, 0):,}. Take fewer bits or a smaller model."
            )
        else:
            too_large = sigmas
        low, high = too_large or lowest, fits or highest
        if too_large and fits and high / low < 1 + tolerance / 10:
            return fits, trials
        excess_bits = 8 * (size - (1 - tolerance / 2) * target_bytes) / weights
        guess = sigmas * 2 ** max(-10.0, min(10.0, excess_bits))
        if too_large is None or fits is None:
            sigmas = min(max(guess, low), high) if len(trials) < 8 else low if too_large is None else high
        else:
            sigmas = guess if low < guess < high and len(trials) < 8 else math.sqrt(low * high)


# %% [markdown]
# ### `largest_that_fits`
# Before training: of all models that could be trained, the one with the most parameters whose predicted size leaves
# room. The candidates can differ in width, depth, bits or clip.


# %%
def largest_that_fits(
    candidates: list[tuple[str, dict[str, tuple[int, ...]], dict[str, StorageRule]]],
    code_bytes: int,
    limit_bytes: int = ARTIFACT_LIMIT_BYTES,
) -> tuple[str, list[dict]]:
    """The label of the candidate to train, and a row for each: label, parameters, bytes (predicted), fits.

    candidates: (label, shapes, rules) as for `predicted_size`. Among equally many parameters the more precise wins,
    by predicted bytes. Raises UserError when none fits.
    """
    room, rows = limit_bytes - code_bytes - ARTIFACT_RESERVE_BYTES, []
    for label, shapes, rules in candidates:
        size, parameters = sum(predicted_size(shapes, rules).values()), sum(map(math.prod, shapes.values()))
        rows.append(dict(label=label, parameters=parameters, bytes=size, fits=size <= room))
    fitting = [row for row in rows if row["fits"]]
    if not fitting:
        smallest = min(rows, key=lambda row: row["bytes"])
        raise UserError(
            f"no model fits into {limit_bytes:,} bytes with {code_bytes:,} bytes of code: the smallest, "
            f"{smallest['label']}, is predicted to have {smallest['bytes']:,.0f}, {smallest['bytes'] - room:,.0f} too "
            "many. Take fewer bits or a smaller vocabulary."
        )
    return max(fitting, key=lambda row: (row["parameters"], row["bytes"]))["label"], rows
