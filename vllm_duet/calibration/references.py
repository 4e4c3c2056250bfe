# SPDX-License-Identifier: Apache-2.0
"""What the timed kernels must compute, in plain torch and 32 bits; any device."""

from __future__ import annotations

import torch

SAMPLED_ROWS = 64
"""Rows of a product that are computed a second time; all are looked at for NaN."""

SAMPLED_REQUESTS = 4


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """L2 norm of the difference over that of the reference; infinite where not finite."""
    result, reference = result.float(), reference.float()
    error = float((result - reference).norm() / reference.norm())
    return error if error == error else float("inf")


def gemm_error(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> float:
    """Of ``y`` [M, N] against ``x`` [M, K] times ``w`` [N, K] transposed."""
    if not bool(y.isfinite().all()):
        return float("inf")
    step = max(x.shape[0] // SAMPLED_ROWS, 1)
    sampled = x[::step].float()
    # In parts, since all of an lm_head in 32 bits would take gigabytes.
    reference = torch.cat([sampled @ part.float().T for part in w.split(16384)], dim=1)
    return relative_error(y[::step], reference)


def tile_sums(source: torch.Tensor, tile: int) -> torch.Tensor:
    """int32 sums, wrapping, of each ``tile`` elements of ``source`` [N] int32."""
    count = source.numel()
    padded = torch.nn.functional.pad(source, (0, -count % tile))
    sums = padded.view(-1, tile).sum(dim=1, dtype=torch.int64)
    return ((sums + 2**31) % 2**32 - 2**31).to(torch.int32)


def attention_error(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_table: torch.Tensor,
    context_len: int,
    output: torch.Tensor,
) -> float:
    """The worst of some requests; shapes as in triton_kernels.DecodeAttention."""
    if not bool(output.isfinite().all()):
        return float("inf")
    batch, heads, dim = query.shape
    group = heads // keys.shape[2]
    worst = 0.0
    for request in range(0, batch, max(batch // SAMPLED_REQUESTS, 1)):
        blocks = block_table[request].long()
        k, v = (
            cache[blocks].flatten(0, 1)[:context_len].float().repeat_interleave(group, dim=1)
            for cache in (keys, values)
        )
        scores = torch.einsum("hd,thd->ht", query[request].float(), k) * dim**-0.5
        expected = torch.einsum("ht,thd->hd", scores.softmax(dim=1), v)
        worst = max(worst, relative_error(output[request], expected))
    return worst
