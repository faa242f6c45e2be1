# %% [markdown]
# ## Kernels from the hub
#
# FlashAttention is CUDA code that takes hours to compile. The `kernels` package fetches it compiled, in the build that
# fits this PyTorch, CUDA and processor.
#
# What it fetches runs with all the rights you have, so three things are fixed here and not left to a name: a short
# list says which repositories may run at all, each at one commit, so nothing changes under you when somebody pushes;
# the files must match the digests that the build lists; and a kernel that wants to load further kernels is refused.
# Whether it also computes the right thing is decided in the next chapter.

# %%
import os
from pathlib import Path

import torch

from nanochat.attention import AttentionBackend, sdpa_with_kvcache
from nanochat.runtime import get_base_dir, print0

# %% [markdown]
# ### `HUB_KERNELS`
# The whole list. Both are builds for PyTorch's stable ABI, which newer versions of PyTorch can load too.

# %%
HUB_KERNELS = {  # repository -> the one commit of it that may run
    "kernels-community/flash-attn3": "7cb368cf8278b583132eb72cbf312d54586df2e2",  # sm80 and sm90a, torch >= 2.9, x86
    "kernels-community/flash-attn2": "81fb77c12b2ad5d69380669b46739d5868614502",  # sm80 and later
}
HUB_PATIENCE_SECONDS = 10  # the client would ask six times, which takes 23 s when nobody answers


# %% [markdown]
# ### `fetch_hub_kernel`
# What was downloaded before is used without asking anybody, so a machine that is cut off later keeps its kernel.


# %% tags=["folded"]
def check_digests(folder: Path) -> bool:
    """Whether the build lists digests of its files. Raises when they are not those of the files in the folder."""
    from kernels import Metadata
    from kernels._rust import Digest

    expected = Metadata.read_from_file(folder / "metadata.json").digest
    if expected is not None:
        expected.validate(Digest.hash_variant(expected.algorithm, folder))
    return expected is not None


def fetch_hub_kernel(repository: str) -> Path:
    """The folder of the build for this machine, downloaded into the base directory if it is not there already.

    Raises what the hub's client raises: unreachable, unknown revision, no build that fits, wrong digests.
    """
    os.environ.setdefault("KERNELS_CACHE", os.path.join(get_base_dir(), "kernels"))  # is read by the import
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import disable_progress_bars
    from kernels import install_kernel

    disable_progress_bars()
    revision, kept = HUB_KERNELS[repository], None
    try:
        folder = install_kernel(repository, revision=revision, local_files_only=True, trust_remote_code=[repository])
        if check_digests(folder):
            return folder
        kept = folder  # whether all of it is there, only the hub knows
    except Exception:  # nothing there, or a download that was interrupted: the hub's answer is the one to report
        pass
    try:
        HfApi().kernel_info(repository, revision=revision, timeout=HUB_PATIENCE_SECONDS)
    except HfHubHTTPError:  # it answered: no
        raise
    except Exception:
        if kept is None:
            raise
        return kept
    print0(f"Downloading {repository}")
    folder = install_kernel(repository, revision=revision)  # asks, too, whether the hub still trusts the publisher
    check_digests(folder)
    return folder


# %% [markdown]
# ### `load_hub_kernel`
# `LOCAL_KERNELS=repository=folder` in the environment, which is the package's own switch, loads a kernel that you built
# or carried here yourself.


# %% tags=["folded"]
def load_hub_kernel(repository: str):
    """(module, where it came from in words) of a repository on the list. Raises an exception that says why not."""
    if repository not in HUB_KERNELS:
        raise ValueError(f"{repository} is not on the list of kernels that may run")
    entries = os.environ.get("LOCAL_KERNELS", "").split(":")
    local = dict(entry.split("=", 1) for entry in entries if "=" in entry)
    if repository in local:
        folder, origin = Path(local[repository]), f"the local folder {local[repository]}"
    else:
        folder, origin = fetch_hub_kernel(repository), f"{repository} at {HUB_KERNELS[repository][:7]}"
    from kernels import get_local_kernel
    from kernels.resolver import resolve_local_kernel

    build = resolve_local_kernel(folder, backend=None)
    if build.metadata.kernel_depends:
        raise ValueError(f"it wants to load {build.metadata.kernel_depends[0].repo_id}, which is not on the list")
    module = get_local_kernel(build.variant_path)
    for function in ("flash_attn_func", "flash_attn_with_kvcache"):
        if not callable(getattr(module, function, None)):
            raise ValueError(f"the kernel from {origin} has no {function}")
    return module, origin


# %% [markdown]
# ### `load_hub_flash3` and `load_hub_flash2`
# The two versions agree on the names that are used here. One difference remains: some builds of FlashAttention-3 return
# more than the output.


# %% tags=["folded"]
def hub_flash_backend(repository: str, title: str, dtype: torch.dtype) -> AttentionBackend:
    """FlashAttention from the hub behind the two calls of an attention backend."""
    if dtype not in (torch.bfloat16, torch.float16):  # said before anything is downloaded
        raise ValueError(f"it computes in bf16 and fp16, not in {str(dtype).removeprefix('torch.')}")
    module, origin = load_hub_kernel(repository)

    def first(result):
        return result[0] if isinstance(result, (tuple, list)) else result

    def train(q, k, v, window_size):
        return first(module.flash_attn_func(q, k, v, causal=True, window_size=window_size))

    def cached(q, k_cache, v_cache, k, v, positions, window_size, bounds=None):
        if q.dtype != k_cache.dtype:  # FlashAttention has one dtype for all
            return sdpa_with_kvcache(q, k_cache, v_cache, k, v, positions, window_size, bounds)
        held = positions if k is not None else positions + q.size(1)  # it counts the cache before k and v are written
        return first(
            module.flash_attn_with_kvcache(
                q, k_cache, v_cache, k=k, v=v, cache_seqlens=held.int(), causal=True, window_size=window_size
            )
        )

    return AttentionBackend(f"{title} from {origin}", train, cached)


def load_hub_flash3(device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """FlashAttention-3 (Shah et al., 2024) from the hub."""
    return hub_flash_backend("kernels-community/flash-attn3", "FlashAttention-3", dtype)


def load_hub_flash2(device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """FlashAttention-2 (Dao, 2023) from the hub."""
    return hub_flash_backend("kernels-community/flash-attn2", "FlashAttention-2", dtype)
