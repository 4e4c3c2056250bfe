# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl


@triton.jit
def copy_some(to, source, unused, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + offsets, mask=offsets < n)
    tl.store(to + offsets, values, mask=offsets < n)
