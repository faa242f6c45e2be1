# %% [markdown]
# ## The largest batch that fits
#
# How many sequences a GPU can hold at once depends on its memory, the depth, the length, the precision and whoever
# else uses the card. Rather than a table for all of that, ask the GPU: run one real forward and backward pass at
# full size, and if it runs out of memory, halve and ask again. Nothing is lost by halving. A step has as many tokens
# as before, in twice as many passes, so what is learned is the same.
#
# It happens before the first step, with everything already in memory that will be there in the tenth. Running out
# after an hour would be a poor answer.

# %%
import gc

import torch
import torch.distributed as dist

from nanochat.gpt import GPTConfig
from nanochat.runtime import UserError, device_name_of, is_ddp_initialized, print0

# %% [markdown]
# ### `starting_device_batch`
# Each size that fails costs a compilation, so `device_batch_size = -1` starts from an estimate instead of the sky. A
# compiled layer keeps 12 numbers for each token and channel (`benchmarks/activation_memory.py` counts them); 14 leave
# room for the loss and for what lies unused between the tensors.

# %%
SAVED_PER_CHANNEL = 14  # numbers for the backward pass, for each layer, token and channel
BYTES_PER_PARAMETER = 16  # fp32 weight, gradient and two moments; tables in bf16 and Muon need less
BUSY_TOKENS = {"cuda": 65536, "cpu": 8192, "mps": 8192}  # no device is faster with more (chosen, not measured)


def starting_device_batch(
    config: GPTConfig,
    parameters: int,
    sequences: int,
    dtype: torch.dtype,
    device: torch.device,
    recompute: bool = False,
) -> int:
    """A device batch that probably fits: a power of two if `sequences` is one, always a divisor of it.

    parameters: their number. sequences: of config.sequence_len tokens, learned from in one step by each process.
    dtype: that of the activations.
    """
    limit = max(1, BUSY_TOKENS[device.type] // config.sequence_len)
    if device.type == "cuda":
        usable = 0.85 * torch.cuda.get_device_properties(device).total_memory - BYTES_PER_PARAMETER * parameters
        saved = SAVED_PER_CHANNEL * (1 if recompute else config.n_layer) + (2 * config.n_layer if recompute else 0)
        bytes_per_sequence = saved * config.n_embd * config.sequence_len * dtype.itemsize
        limit = min(limit, int(usable // bytes_per_sequence))
    return largest_divisor(sequences, limit)


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` up to `limit`, at least 1."""
    return next((candidate for candidate in range(min(limit, number), 0, -1) if number % candidate == 0), 1)


# %% [markdown]
# ### `fitting_device_batch`
# The processes of a group answer together: if one has no room, all halve, because they must make the same passes.


# %%
def fitting_device_batch(
    model, optimizer, batch_size: int, length: int, sequences: int, prepare, try_anywhere: bool = False
) -> int:
    """The largest device batch from `batch_size` downwards with which training fits into the memory.

    length: tokens in a sequence. sequences: that each process learns from in one step, a multiple of batch_size; the
    result divides it too. prepare(size): gets model and optimizer ready for batches of a size (compiles them); called
    for each size that is tried, the last time for the one returned. Weights and random state stay as they are,
    gradients end as None, and the optimizer's state is allocated. Every process must call it, with the same numbers.
    On a CPU and on Apple GPUs the first size is taken untried, unless try_anywhere: there a system out of memory kills
    the process instead of telling it. Raises UserError when not even one sequence fits.
    """
    device, first = model.get_device(), batch_size
    if device.type != "cuda" and not try_anywhere:
        prepare(batch_size)
        return batch_size
    optimizer.allocate_state()
    while not fits_everywhere(model, batch_size, length, prepare):
        release_memory(device)
        if batch_size == 1:
            raise UserError(
                f"even one sequence of {length} tokens does not fit into the memory of this {device_name_of(device)}. "
                "Shorten max_seq_len, lower depth, or turn on recompute."
            )
        batch_size = largest_divisor(sequences, batch_size // 2)
    if batch_size < first:
        print0(
            f"device_batch_size {first} does not fit into the memory of this {device_name_of(device)}; using "
            f"{batch_size} (accumulating {sequences // batch_size} passes): the same training, in smaller pieces."
        )
    return batch_size


# %% [markdown]
# ### One trial
# An error holds on to the frames it passed through, and those to the activations. So the error must be gone before
# anything can be freed: nothing is freed inside the `except`.


# %%
def fits_everywhere(model, batch_size: int, length: int, prepare) -> bool:
    """Whether one pass of this size fits into the memory of every process. Other errors are raised."""
    out_of_memory = torch.zeros((), device=model.get_device())  # made while there is room for it
    try:
        prepare(batch_size)
        one_pass(model, batch_size, length)
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        out_of_memory.fill_(1)
    model.zero_grad(set_to_none=True)
    if is_ddp_initialized():
        dist.all_reduce(out_of_memory, dist.ReduceOp.MAX)
    return not out_of_memory.item()


def one_pass(model, batch_size: int, length: int) -> None:
    """Forward and backward with random tokens, with gradients there from the start as in all passes but the first."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    generator = torch.Generator().manual_seed(0)
    shape = (2, batch_size, length)
    inputs, targets = torch.randint(model.config.vocab_size, shape, generator=generator).to(model.get_device())
    model(inputs, targets).backward()
    if inputs.is_cuda:
        torch.cuda.synchronize(inputs.device)  # errors of kernels that are still running belong to this trial


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error, of whichever library, says that there was no memory."""
    signs = ("out of memory", "can't allocate memory", "_status_alloc_failed")  # the last of cuBLAS and cuDNN
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(sign in str(error).lower() for sign in signs)


def release_memory(device: torch.device) -> None:
    """Give back what a failed trial left: garbage, and what the allocator keeps in reserve."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # the peak that is reported is that of the training
