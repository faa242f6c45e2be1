# %% [markdown]
# ## Codecs
#
# A weight rounded to 6 bits does not have to cost 6 bits. The codes pile up around zero, and a codec that gives the
# frequent ones short names stores them in what their distribution is worth: its entropy. This chapter measures how
# close each codec comes, and keeps the closest.
#
# The surprise is in the table at the end: packing four 6-bit codes tightly into three bytes *loses*. One code per byte
# looks wasteful, but it leaves the codec whole symbols to count, and packing destroys them.

# %%
import heapq
import lzma
import math
import zlib

import brotli
import numpy as np

from nanochat.runtime import UserError

# %% [markdown]
# ### `compress_stream`
# The strongest setting of each: the file is written once. The number of a codec is its byte in the artifact.

# %%
CODEC_IDS = {"zlib": 1, "lzma": 2, "brotli": 3}


def compress_stream(codec: str, data: bytes) -> bytes:
    """`data` under zlib 9, lzma 9e or brotli 11."""
    if codec == "zlib":
        return zlib.compress(data, 9)
    if codec == "lzma":
        return lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
    if codec == "brotli":
        return brotli.compress(data, quality=11)
    raise UserError(f"the codec {codec!r} is unknown; it can be {', '.join(CODEC_IDS)}.")


def decompress_stream(codec: str, data: bytes) -> bytes:
    """The inverse. Raises ValueError when `data` is not whole."""
    try:
        return {"zlib": zlib.decompress, "lzma": lzma.decompress, "brotli": brotli.decompress}[codec](data)
    except (zlib.error, lzma.LZMAError, EOFError, brotli.error) as error:
        raise ValueError(f"the {codec} stream cannot be read ({error})") from None


def codecs_to_try(compressor: str) -> list[str]:
    """The codecs that the setting COMPRESSOR stands for: one, or all for "auto"."""
    if compressor != "auto" and compressor not in CODEC_IDS:
        raise UserError(f"COMPRESSOR is {compressor!r}; it can be auto, {', '.join(CODEC_IDS)}.")
    return list(CODEC_IDS) if compressor == "auto" else [compressor]


# %% [markdown]
# ### Dense packing
# Four codes of 6 bits in three bytes. It wins only when the codes fill their range so evenly that there is nothing to
# gain from counting them, above about 5.9 bits of entropy.

# %%
DENSE_MIN_ENTROPY = 5.9


def pack_6bit(codes: np.ndarray) -> bytes:
    """int8 codes of −32..31, any shape, as 3 bytes for 4 of them; the last group is filled up with zeros."""
    values = np.asarray(codes).astype(np.int16).ravel() + 32
    if values.size and (values.min() < 0 or values.max() > 63):
        raise ValueError("codes outside −32..31 do not fit into 6 bits")
    a, b, c, d = np.pad(values, (0, -values.size % 4), constant_values=32).astype(np.uint8).reshape(-1, 4).T
    return np.stack([a << 2 | b >> 4, b << 4 | c >> 2, c << 6 | d], axis=1).tobytes()


def unpack_6bit(data: bytes, count: int) -> np.ndarray:
    """The first `count` codes (int8). Raises ValueError when `data` has another length than they need."""
    if len(data) != 3 * (-(-count // 4)):
        raise ValueError(f"{len(data)} bytes cannot hold {count} codes of 6 bits")
    a, b, c = np.frombuffer(data, np.uint8).reshape(-1, 3).T
    values = np.stack([a >> 2, (a & 3) << 4 | b >> 4, (b & 15) << 2 | c >> 6, c & 63], axis=1).ravel()
    return (values[:count].astype(np.int16) - 32).astype(np.int8)


# %% [markdown]
# ### Byte planes
# One byte of each fp16 number holds its sign and exponent and resembles that of its neighbours; the other is noise.
# Sorted apart, one half compresses.

# %%
BYTE_PLANES_MAGIC = b"BSHF"


def split_byte_planes(data: bytes, stride: int) -> bytes:
    """Magic, one byte of stride, then every stride-th byte from 0, from 1, and so on."""
    return b"".join([BYTE_PLANES_MAGIC, bytes([stride]), *(data[start::stride] for start in range(stride))])


def join_byte_planes(data: bytes) -> bytes:
    """The inverse. Raises ValueError for data that `split_byte_planes` did not write."""
    if data[:4] != BYTE_PLANES_MAGIC or len(data) < 5 or data[4] == 0:
        raise ValueError("byte planes without their magic")
    stride, planes = data[4], np.frombuffer(data, np.uint8)[5:]
    joined, end = np.empty_like(planes), 0
    for start in range(stride):
        size = len(joined[start::stride])
        joined[start::stride], end = planes[end : end + size], end + size
    return joined.tobytes()


# %% [markdown]
# ### How many bits a code is worth
# Entropy is the floor for any codec that looks at one symbol at a time. brotli names symbols with whole bits (a
# Huffman code), which costs it about one percent more, and that too can be computed: the sum of all merged weights
# while the tree is built. It tells the size of the file before a byte of it is compressed.


# %%
def entropy_bits(counts) -> float:
    """Bits per symbol, from the counts or probabilities of the symbols."""
    shares = np.asarray(counts, np.float64)
    shares = shares[shares > 0] / shares.sum()
    return float(-(shares * np.log2(shares)).sum())


def huffman_bits(counts) -> float:
    """Bits per symbol of the best prefix code; follows brotli within 1 % where entropy is above 2 bits."""
    heap = [float(count) for count in counts if count > 0]
    total, merged = sum(heap), 0.0
    heapq.heapify(heap)
    while len(heap) > 1:
        pair = heapq.heappop(heap) + heapq.heappop(heap)
        merged += pair
        heapq.heappush(heap, pair)
    return merged / total


def code_counts(codes: np.ndarray) -> np.ndarray:
    """How often each of −128..127 occurs in int8 codes: (256,) int64."""
    return np.bincount(np.ascontiguousarray(codes, np.int8).view(np.uint8).ravel(), minlength=256)


def gaussian_code_shares(bits: int, sigmas: float) -> list[float]:
    """Probabilities of the codes −q..q when a Gaussian is rounded with step sigmas·σ/q; the tails go to the ends."""
    q = 2 ** (bits - 1) - 1
    edges = [(code + 0.5) * sigmas / q for code in range(-q, q)]
    below = [0.0, *(0.5 * math.erfc(-edge / math.sqrt(2)) for edge in edges), 1.0]
    return [high - low for low, high in zip(below, below[1:], strict=False)]


# %% [markdown]
# ### `codec_table`
# Gaussian rows, rounded with a clip of k standard deviations: what each codec needs per weight, and what the rounding
# does to the weights. Clipping at 2.5 σ is at the top, the published 12.85 near the bottom: three fifths of the bits
# for twice the error. Doubling k costs a bit of precision and saves a bit of size.

# %%
CODEC_TABLE_CASES = ((6, 2.5), (6, 4.0), (6, 6.0), (6, 12.85), (8, 20.0))


def codec_table(cases=CODEC_TABLE_CASES, rows: int = 256, columns: int = 1024, seed: int = 0) -> list[dict]:
    """One dict for each (bits, k): bits, k, entropy, the bits per weight of every codec, dense, relative_error.

    dense: 6-bit packing + zlib, None for other widths. Golf spec section 4.6.
    """
    weight = np.random.default_rng(seed).standard_normal((rows, columns))
    table = []
    for bits, k in cases:
        q = 2 ** (bits - 1) - 1
        scale = k * np.sqrt(np.square(weight).mean(axis=1, keepdims=True)) / q
        codes = np.clip(np.rint(weight / scale), -q, q).astype(np.int8)
        row = dict(bits=bits, k=k, entropy=entropy_bits(code_counts(codes)))
        for codec in CODEC_IDS:
            row[codec] = 8 * len(compress_stream(codec, codes.tobytes())) / codes.size
        row["dense"] = 8 * len(compress_stream("zlib", pack_6bit(codes))) / codes.size if bits == 6 else None
        row["relative_error"] = float(np.linalg.norm(weight - codes * scale) / np.linalg.norm(weight))
        table.append(row)
    return table


CODEC_HEADER = ("bits", "k", "entropy", *CODEC_IDS, "dense 6-bit + zlib", "relative error")


def codec_rows(table: list[dict]) -> list[tuple]:
    """The table as rows under CODEC_HEADER: bits per weight under each codec."""
    return [tuple(row.values()) for row in table]
