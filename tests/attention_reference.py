"""What attention is, written as slowly as it is defined: every kernel is compared with it."""

import torch


def reference_attention(q, k, v, left, first_position=0):
    """Spec 1.3, one query at a time in float64. q (B, Tq, H, D) from first_position on; k, v (B, Tk, H_kv, D)."""
    q, k, v = q.double(), k.double(), v.double()
    share = q.size(2) // k.size(2)  # heads that read one key-value head
    k, v = (x.repeat_interleave(share, dim=2) for x in (k, v))
    rows = []
    for i in range(q.size(1)):
        position = first_position + i
        oldest = 0 if left < 0 else max(0, position - left)
        scores = torch.einsum("bhd,bkhd->bhk", q[:, i], k[:, oldest : position + 1]) / q.size(-1) ** 0.5
        rows.append(torch.einsum("bhk,bkhd->bhd", scores.softmax(-1), v[:, oldest : position + 1]))
    return torch.stack(rows, 1)


def random_qkv(seed, B, Tq, Tk, H, H_kv, D):
    generator = torch.Generator().manual_seed(seed)

    def draw(T, heads):
        return torch.randn(B, T, heads, D, generator=generator)

    return draw(Tq, H), draw(Tk, H_kv), draw(Tk, H_kv)
