import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import nanochat.gpt as gpt_chapter
from nanochat.gpt import ChunkedCrossEntropy, chunk_losses_and_gradient

pytestmark = pytest.mark.usefixtures("one_thread")


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations create while they are alive; `peak` is the most at once."""

    def __init__(self):
        super().__init__()
        self.storages, self.known, self.peak = {}, set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        for tensor in inputs:  # what was there before is not counted
            if tensor.untyped_storage().data_ptr() not in self.storages:
                self.known.add(tensor.untyped_storage().data_ptr())
        result = function(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, torch.utils._pytree.tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.known:
                self.storages[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.storages = {at: held for at, held in self.storages.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return result


def plain_loss(x, weight, targets):
    logits = (x @ weight.to(x.dtype).T).float()
    return F.cross_entropy(15 * torch.tanh(logits / 15), targets)


def chunked_loss(x, weight, targets):
    return ChunkedCrossEntropy.apply(x, weight, targets, 15.0, chunk_losses_and_gradient)


def peak_and_gradients(loss_of, x, weight, targets):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    with PeakBytes() as memory:
        loss_of(x, weight, targets).backward()
    return memory.peak, (x.grad, weight.grad)


def test_the_count_is_right():
    """A count that misses tensors, or never forgets any: the next test would mean nothing."""
    x = torch.ones(100)
    with PeakBytes() as memory:
        y = x + 1  # 400 bytes
        y = (y + 1).view(10, 10)  # 800 for a moment, then 400
        y += 1
        z = x[:50].view(5, 10) + y[:5]  # 600
        del y
        z = torch.cat([z, z])  # 600, then 400
        x.add_(1)
    assert memory.peak == 800 and z.shape == (10, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_needs_a_quarter_of_the_memory_of_all_logits(dtype, monkeypatch):
    """Logits that come back in full, in some dtype or for some moment: the largest tensor of the whole step."""
    # 8192 rows, 32768 tokens, width 768 and chunks of 512 rows, with every number divided by 16: the same shares
    monkeypatch.setattr(gpt_chapter, "LOSS_CHUNK_ROWS", gpt_chapter.LOSS_CHUNK_ROWS // 16)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 48, generator=generator).to(dtype)
    weight = torch.randn(2048, 48, generator=generator)
    targets = torch.randint(2048, (512,), generator=generator)
    plain_peak, expected = peak_and_gradients(plain_loss, x, weight, targets)
    peak, actual = peak_and_gradients(chunked_loss, x, weight, targets)
    assert plain_peak >= 3 * 512 * 2048 * 4, "logits, their cap and their logarithms of probability"
    assert peak < 0.25 * plain_peak
    for one, other in zip(actual, expected, strict=True):
        limit = 1e-5 if dtype == torch.float32 else 2e-2
        assert (one - other).norm() <= limit * other.norm()
