# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels that calibration times, and their launchers.

No launcher allocates: a buffer from another stream's pool would be a race.
"""

# Triton's language has no types, and reads annotations as compile-time constants.
# mypy: ignore-errors

import torch
import triton
import triton.language as tl

TILE_ELEMENTS = 8192
QUERY_ROWS = 16
"""tl.dot multiplies at least 16 rows; a group of query heads is padded to them."""
KEYS_PER_STEP = 64
MAX_KV_SPLITS = 16
MAX_PROGRAMS = 2048
SM_IDS_TILE = 1024
SM_IDS_SPINS = 64


@triton.jit
def _copy(source, target, count, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    tl.store(target + at, tl.load(source + at, mask=at < count), mask=at < count)


@triton.jit
def _read(source, sums, count, TILE: tl.constexpr):
    program = tl.program_id(0)
    at = program.to(tl.int64) * TILE + tl.arange(0, TILE)
    tl.store(sums + program, tl.sum(tl.load(source + at, mask=at < count, other=0), axis=0))


@triton.jit
def _decode_attention(
    query,
    keys,
    values,
    block_table,
    context_len,
    scores_scale,
    partial,
    largest,
    total,
    keys_per_split,
    table_stride,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """One request, one KV head, one part of the context; online softmax."""
    request, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, dims = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM)
    heads = kv_head * GROUP + rows
    of_group = (rows < GROUP)[:, None]
    query_at = (request * KV_HEADS * GROUP + heads)[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(query + query_at, mask=of_group, other=0.0)
    running_max = tl.full([ROWS], float("-inf"), tl.float32)
    running_sum = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    first = part * keys_per_split
    last = tl.minimum(first + keys_per_split, context_len)
    for start in range(first, last, STEP):
        tokens = start + tl.arange(0, STEP)
        inside = tokens < last
        table_at = block_table + request * table_stride + tokens // BLOCK_TOKENS
        block = tl.load(table_at, mask=inside, other=0).to(tl.int64)
        row = (block * BLOCK_TOKENS + tokens % BLOCK_TOKENS) * KV_HEADS + kv_head
        at = row[:, None] * HEAD_DIM + dims[None, :]
        k = tl.load(keys + at, mask=inside[:, None], other=0.0)
        v = tl.load(values + at, mask=inside[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scores_scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, axis=1))
        weights = tl.exp(scores - new_max[:, None])
        decay = tl.exp(running_max - new_max)
        running_sum = running_sum * decay + tl.sum(weights, axis=1)
        output = output * decay[:, None] + tl.dot(weights.to(v.dtype), v)
        running_max = new_max
    slot = (request * KV_HEADS + kv_head) * tl.num_programs(2) + part
    tl.store(largest + slot * ROWS + rows, running_max)
    tl.store(total + slot * ROWS + rows, running_sum)
    tl.store(partial + (slot * ROWS + rows)[:, None] * HEAD_DIM + dims[None, :], output)


@triton.jit
def _combine(
    partial,
    largest,
    total,
    output,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Adds up the parts of one request's context for one query head."""
    request, head = tl.program_id(0), tl.program_id(1)
    kv_head, row = head // GROUP, head % GROUP
    parts, dims = tl.arange(0, PARTS), tl.arange(0, HEAD_DIM)
    slots = ((request * KV_HEADS + kv_head) * PARTS + parts) * ROWS + row
    maxima = tl.load(largest + slots)
    decay = tl.exp(maxima - tl.max(maxima, axis=0))
    pieces = tl.load(partial + slots[:, None] * HEAD_DIM + dims[None, :])
    result = tl.sum(pieces * decay[:, None], axis=0) / tl.sum(tl.load(total + slots) * decay)
    at = (request * KV_HEADS * GROUP + head) * HEAD_DIM + dims
    tl.store(output + at, result.to(output.dtype.element_ty))


@triton.jit
def _persistent_gemm(
    x,
    w,
    y,
    rows,
    fan_out,
    fan_in,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Each program takes every num_programs-th tile, down the columns of tiles."""
    tiles_m = tl.cdiv(rows, TILE_M)
    tiles = tiles_m * tl.cdiv(fan_out, TILE_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        m = (tile % tiles_m) * TILE_M + tl.arange(0, TILE_M)
        n = (tile // tiles_m) * TILE_N + tl.arange(0, TILE_N)
        k = tl.arange(0, TILE_K)
        x_at = x + m[:, None].to(tl.int64) * fan_in + k[None, :]
        w_at = w + n[None, :].to(tl.int64) * fan_in + k[:, None]
        sums = tl.zeros([TILE_M, TILE_N], tl.float32)
        for start in range(0, fan_in, TILE_K):
            depth = fan_in - start
            a = tl.load(x_at, mask=(m[:, None] < rows) & (k[None, :] < depth), other=0.0)
            b = tl.load(w_at, mask=(n[None, :] < fan_out) & (k[:, None] < depth), other=0.0)
            sums = tl.dot(a, b, sums)
            x_at += TILE_K
            w_at += TILE_K
        y_at = y + m[:, None].to(tl.int64) * fan_out + n[None, :]
        mask = (m[:, None] < rows) & (n[None, :] < fan_out)
        tl.store(y_at, sums.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _this_sm():
    return tl.inline_asm_elementwise(
        "mov.u32 $0, %smid;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _sm_ids(source, sums, found, TILE: tl.constexpr, SPINS: tl.constexpr):
    """Reads the same tile SPINS times, so that blocks are there long enough to spread."""
    program = tl.program_id(0)
    at = tl.arange(0, TILE)
    sums_here = tl.zeros([TILE], tl.int32)
    for _ in range(SPINS):
        sums_here += tl.load(source + at, volatile=True)
    tl.store(sums + program, tl.sum(sums_here, axis=0))
    tl.store(found + program, _this_sm())


def copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """``target`` [N] = ``source`` [N]."""
    count = source.numel()
    _copy[(triton.cdiv(count, TILE_ELEMENTS),)](source, target, count, TILE=TILE_ELEMENTS)


def read(source: torch.Tensor, sums: torch.Tensor) -> None:
    """``sums`` [ceil(N / TILE_ELEMENTS)] of the tiles of ``source`` [N], int32, wrapping."""
    _read[(sums.numel(),)](source, sums, source.numel(), TILE=TILE_ELEMENTS)


class DecodeAttention:
    """Attention of one new token a request over a paged KV cache, in two kernels.

    ``query`` and ``output`` [B, heads, D]; ``keys`` and ``values`` [blocks, block tokens,
    KV heads, D]; ``block_table`` [B, ceil(context_len / block tokens)] int32.
    """

    def __init__(self, keys, values, block_table, query, output, context_len: int) -> None:
        batch, heads, dim = query.shape
        _, block_tokens, kv_heads, _ = keys.shape
        # Enough programs for every SM of a large GPU, as flash-decoding divides them,
        # and no part without a key, whose softmax would be 0 / 0.
        steps, parts = triton.cdiv(context_len, KEYS_PER_STEP), MAX_KV_SPLITS
        while parts > 1 and (
            batch * kv_heads * parts > MAX_PROGRAMS
            or (parts - 1) * triton.cdiv(steps, parts) >= steps
        ):
            parts //= 2
        self.keys_per_split = triton.cdiv(steps, parts) * KEYS_PER_STEP
        self.inputs = (query, keys, values, block_table)
        self.output, self.context_len, self.parts = output, context_len, parts
        shape = (batch, kv_heads, parts, QUERY_ROWS)
        self.largest = torch.empty(shape, dtype=torch.float32, device=query.device)
        self.total = torch.empty_like(self.largest)
        self.partial = torch.empty((*shape, dim), dtype=torch.float32, device=query.device)
        self.sizes = dict(GROUP=heads // kv_heads, KV_HEADS=kv_heads, HEAD_DIM=dim)
        self.block_tokens = block_tokens

    def run(self) -> None:
        query, keys, values, table = self.inputs
        batch, heads, dim = query.shape
        _decode_attention[(batch, self.sizes["KV_HEADS"], self.parts)](
            query,
            keys,
            values,
            table,
            self.context_len,
            dim**-0.5,
            self.partial,
            self.largest,
            self.total,
            self.keys_per_split,
            table.stride(0),
            **self.sizes,
            BLOCK_TOKENS=self.block_tokens,
            ROWS=QUERY_ROWS,
            STEP=KEYS_PER_STEP,
        )
        _combine[(batch, heads)](
            self.partial,
            self.largest,
            self.total,
            self.output,
            **self.sizes,
            ROWS=QUERY_ROWS,
            PARTS=self.parts,
        )


def persistent_gemm(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, num_programs: int) -> None:
    """``y`` [M, N] = ``x`` [M, K] times ``w`` [N, K] transposed, on ``num_programs`` SMs."""
    (rows, fan_in), fan_out = x.shape, w.shape[0]
    tiles = dict(TILE_M=128, TILE_N=128, TILE_K=64)
    _persistent_gemm[(num_programs,)](
        x, w, y, rows, fan_out, fan_in, **tiles, num_warps=8, num_stages=3
    )


def sm_ids(source: torch.Tensor, sums: torch.Tensor, found: torch.Tensor) -> None:
    """``found`` [programs] the SM of each program; ``sums`` [programs] int32 keeps it busy."""
    _sm_ids[(found.numel(),)](source, sums, found, TILE=SM_IDS_TILE, SPINS=SM_IDS_SPINS)
