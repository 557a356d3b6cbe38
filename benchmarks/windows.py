"""Attention within a window, block by block, beside one masked T x T, as transformers computes it on a CPU.

    python benchmarks/windows.py [--tokens 2048] [--window 128]

Forward and backward, medians of rounds in turn; outputs are checked to be equal first.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llm.components.attention.dot_product import DotProduct
from lit_llm.components.masks import AttentionMask, KernelMask

HEADS, HEAD_DIM = 4, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    q, k, v = (torch.randn(1, HEADS, chosen.tokens, HEAD_DIM, requires_grad=True) for _ in range(3))
    window = (chosen.window, chosen.window)
    for name, causal in (("causal", True), ("full", False)):
        near = AttentionMask(causal=causal, window=window)
        mask = near.rows(0, chosen.tokens, chosen.tokens, q.device)

        def masked(mask: Tensor | None = mask) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        kernel = KernelMask(near, (chosen.tokens, chosen.tokens), (q.dtype, q.device), scores=False, bias=False)

        def by_blocks(kernel: KernelMask = kernel) -> Tensor:
            return DotProduct()(q, k, v, kernel)

        assert torch.allclose(masked(), by_blocks(), atol=1e-5)
        seconds: dict[str, list[float]] = {"masked": [], "blocks": []}
        for _ in range(chosen.rounds):
            for which, compute in (("masked", masked), ("blocks", by_blocks)):
                begin = time.perf_counter()
                compute().sum().backward()
                seconds[which].append(time.perf_counter() - begin)
        masks, blocks = (statistics.median(seconds[which]) for which in ("masked", "blocks"))
        print(
            f"{name}, {chosen.tokens} tokens, window {chosen.window}: masked {1000 * masks:.1f} ms, "
            f"by blocks {1000 * blocks:.1f} ms, ratio {blocks / masks:.2f}"
        )


if __name__ == "__main__":
    main()
