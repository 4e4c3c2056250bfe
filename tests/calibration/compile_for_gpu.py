# SPDX-License-Identifier: Apache-2.0
"""Compiles every Triton kernel for a GPU that need not be there, and prints JSON.

Run with TRITON_INTERPRET=0, in a process of its own: kernels are interpreted or
compiled from their import on.
"""

import inspect
import json
import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from vllm_duet.calibration import triton_kernels as kernels
from vllm_duet.calibration.work import KV_BLOCK_TOKENS, SHAPE

HEADS = dict(
    GROUP=SHAPE.num_heads // SHAPE.num_kv_heads,
    KV_HEADS=SHAPE.num_kv_heads,
    HEAD_DIM=SHAPE.head_dim,
    ROWS=kernels.QUERY_ROWS,
)
TYPES = {
    **dict.fromkeys(("query", "keys", "values", "x", "w", "y"), "*bf16"),
    **dict.fromkeys(("partial", "largest", "total"), "*fp32"),
    **dict.fromkeys(("source", "target", "sums", "found", "block_table"), "*i32"),
    "scores_scale": "fp32",
}
KERNELS = {
    kernels._copy: dict(TILE=kernels.TILE_ELEMENTS),
    kernels._read: dict(TILE=kernels.TILE_ELEMENTS),
    kernels._decode_attention: HEADS
    | dict(BLOCK_TOKENS=KV_BLOCK_TOKENS, STEP=kernels.KEYS_PER_STEP),
    kernels._combine: HEADS | dict(PARTS=kernels.MAX_KV_SPLITS),
    kernels._persistent_gemm: dict(TILE_M=128, TILE_N=128, TILE_K=64),
    kernels._sm_ids: dict(TILE=kernels.SM_IDS_TILE, SPINS=kernels.SM_IDS_SPINS),
}


def compiled(kernel, constants, capability: int):
    names = list(inspect.signature(kernel.fn).parameters)
    types = {"output": "*bf16", **TYPES}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    # As at a launch: what calibration passes, pointers and sizes, divides by 16.
    aligned = [n for n in names if n not in constants and signature[n] != "fp32"]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    large = dict(num_warps=8, num_stages=3) if kernel is kernels._persistent_gemm else {}
    return compile(source, target=GPUTarget("cuda", capability, 32), options=large)


found = {}
for kernel, constants in KERNELS.items():
    result = compiled(kernel, constants, int(sys.argv[1]))
    found[kernel.fn.__name__] = {
        "cubin_bytes": len(result.asm["cubin"]),
        "shared_bytes": result.metadata.shared,
        "ptx": result.asm["ptx"],
    }
print(json.dumps(found))
