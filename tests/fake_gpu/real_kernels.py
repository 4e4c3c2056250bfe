# SPDX-License-Identifier: Apache-2.0
"""Kernels of the fake GPU that compute: its tokens are real.

On the fake GPU (the C library in this folder) memory, copies, streams, events and graphs
are real, and kernels do nothing. Here each kernel gets a body. What vLLM's CUDA path launches
is queued on the stream it was launched on, as a host function; when the stream gets there, the
body computes on the CPU what the kernel would have computed on the GPU. The fake GPU's memory is
host memory, so a CPU tensor over the same address is all that a body needs.

Kernels come from three sources:

* **Operators.** A TorchDispatchMode sees each operator below autograd. The real CUDA operator
  still runs where it allocates the outputs and launches the (empty) kernel. The body calls the
  same operator on CPU tensors. Views, allocations and plain memory copies have no body: the
  first two launch nothing, and the third is done by the library.
* **vLLM's own operators**, which have no CPU version here: ``OPERATORS``, a few lines each.
* **Triton.** With TRITON_INTERPRET=1 a launch of a ``@triton.jit`` function is one of Triton's
  interpreter. It reads and writes through raw pointers, so its body is the interpreter itself.

While a stream is captured, the host function becomes a node of the graph and is kept for as
long as the process lives. Like a captured kernel it holds addresses and not tensors.

Products and reductions are computed in float64 and rounded. A request's tokens then do not
depend on what else was in the batch, so runs that batch differently can be compared exactly.

What this is not: a kernel is one step here, where a GPU's thread blocks could interleave with
those of another stream. An operator that reads back in the middle (``nonzero``) waits for its
stream and computes at once. Libraries that launch kernels without an operator (FlashInfer,
Inductor's code) are not seen; an operator that is seen and not known raises.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fake_gpu import FakeGpu

# ---------------------------------------------------------------- memory

_LOWEST, _HIGHEST = 1 << 16, 1 << 47
"""Addresses of a process on x86-64 Linux, less the page that is never mapped."""


@functools.cache
def _all_memory(dtype: torch.dtype) -> torch.Tensor:
    """The whole address space as one CPU tensor, of which every other is a view."""
    size = _HIGHEST - _LOWEST
    storage = torch._C._construct_storage_from_data_pointer(_LOWEST, torch.device("cpu"), size)
    empty = torch.empty(0, dtype=dtype, device="cpu")
    return empty.set_(storage, 0, (size // dtype.itemsize,), (1,))


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor over the memory of ``tensor``, which it does not keep alive."""
    if tensor.numel() == 0:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
    offset = (tensor.data_ptr() - _LOWEST) // tensor.dtype.itemsize
    return _all_memory(tensor.dtype).as_strided(tensor.size(), tensor.stride(), offset)


# ---------------------------------------------------------------- queueing

_device = threading.RLock()
"""One body runs at a time: Triton's interpreter keeps its state in globals."""
_bodies: dict[int, tuple[str, Callable[[], None]]] = {}
_ids = itertools.count(1)
errors: list[BaseException] = []
"""What bodies raised: on a stream there is nobody to raise it to. See ``raise_errors``."""


def _run(name: str, body: Callable[[], None]) -> None:
    if _declares:
        _cuda.fakecuda_name(name.encode())
    try:
        with _device, torch._C._DisableTorchDispatch(), torch.inference_mode():
            body()
    except BaseException as error:
        errors.append(error)


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _run_once(number: int) -> None:
    _run(*_bodies.pop(number))


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _run_in_graph(number: int) -> None:
    _run(*_bodies[number])


_cuda = ctypes.CDLL(None)
_cuda.fakecuda_name.argtypes = [ctypes.c_char_p]
_cuda.fakecuda_access.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_cuda.cudaLaunchHostFunc.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]


# ---------------------------------------------------------------- what bodies touch, for races.py

_declares = False


@contextmanager
def traced(path: Path) -> Iterator[None]:
    """Trace the block into ``path``, with every byte that bodies read and write."""
    global _declares
    gpu = FakeGpu()
    torch.cuda.synchronize()
    gpu.trace(path)
    _declares = True
    try:
        yield
    finally:
        torch.cuda.synchronize()
        _declares = False
        gpu.trace(None)


def _reads(*tensors: torch.Tensor) -> None:
    _touches(tensors, False)


def _writes(*tensors: torch.Tensor) -> None:
    _touches(tensors, True)


def _touches(tensors: Iterable[torch.Tensor], is_write: bool) -> None:
    if not _declares:
        return
    for tensor in tensors:
        if tensor.numel() == 0:
            continue
        # What is contiguous in the end is one interval, for each index of the dimensions before.
        inner, outer = 1, list(zip(tensor.shape, tensor.stride(), strict=True))
        outer = sorted((d for d in outer if d[0] > 1 and d[1]), key=lambda d: d[1])
        while outer and outer[0][1] == inner:
            inner *= outer.pop(0)[0]
        steps = [range(0, size * stride, stride) for size, stride in outer]
        for at in itertools.product(*steps):
            begin = tensor.data_ptr() + sum(at) * tensor.itemsize
            _cuda.fakecuda_access(begin, inner * tensor.itemsize, is_write)


def _touches_addresses(addresses: Any, itemsize: int, is_write: bool) -> None:
    if not _declares or not addresses.size:
        return
    ascending = np.unique(addresses)
    for run in np.split(ascending, np.flatnonzero(np.diff(ascending) != itemsize) + 1):
        _cuda.fakecuda_access(int(run[0]), len(run) * itemsize, is_write)


def launch(name: str, body: Callable[[], None]) -> None:
    """Queue ``body`` on the current stream, or make it a node of the graph in capture."""
    number = next(_ids)
    _bodies[number] = name, body
    run = _run_in_graph if torch.cuda.is_current_stream_capturing() else _run_once
    stream = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
    error = _cuda.cudaLaunchHostFunc(stream, ctypes.cast(run, ctypes.c_void_p), number)
    if error:
        raise RuntimeError(f"cudaLaunchHostFunc: error {error}")


def raise_errors() -> None:
    """Wait for the device and raise the first error of a body since this was last called."""
    torch.cuda.synchronize()
    if errors:
        first, count = errors[0], len(errors)
        errors.clear()
        raise RuntimeError(f"{count} kernels failed, the first with: {first!r}") from first


# ---------------------------------------------------------------- vLLM's own operators


def flash_attention(
    q, k, v, out, cu_seqlens_q, seqused_k, page_table, softmax_scale, is_causal,
    window_size_left, window_size_right, softcap, s_aux, scheduler_metadata=None,
    cu_seqlens_k=None, **unused,
) -> None:  # fmt: skip
    """FlashAttention, request by request: over a paged KV cache, or an encoder's.

    ``q`` and ``out`` are [tokens, heads, head size], ``k`` and ``v`` [blocks, block size, KV heads,
    head size], ``page_table`` [requests, blocks of a request]. Without one ``k`` and ``v`` are
    [tokens, KV heads, head size], and those of a request begin at ``cu_seqlens_k``.
    """
    assert softcap == 0 and s_aux is None, "attention sinks and soft caps are not computed"
    _reads(*_tensors((cu_seqlens_q, cu_seqlens_k, seqused_k, page_table, scheduler_metadata)))
    lengths = cu_seqlens_k.diff() if page_table is None else seqused_k
    for request, length in enumerate(lengths.tolist()):
        first, end = cu_seqlens_q[request].item(), cu_seqlens_q[request + 1].item()
        if first == end or length == 0:
            continue  # padding of a graph
        _writes(out[first:end])
        if page_table is None:
            begin = cu_seqlens_k[request].item()
            keys, values = (part[begin : begin + length] for part in (k, v))
            _reads(q[first:end], keys, values)
        else:
            blocks = page_table[request, : -(-length // k.shape[1])].long()
            _reads(q[first:end], *(cache[b] for cache in (k, v) for b in blocks.tolist()))
            keys, values = (cache[blocks].flatten(0, 1)[:length] for cache in (k, v))
        group = q.shape[1] // keys.shape[1]
        keys, values = (part.double().repeat_interleave(group, dim=1) for part in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q[first:end].double(), keys) * softmax_scale
        at = torch.arange(length - (end - first), length, device="cpu")[:, None]
        key_at = torch.arange(length, device="cpu")[None, :]
        hidden = key_at > at if is_causal else torch.zeros(1, 1, dtype=torch.bool, device="cpu")
        if window_size_left >= 0:
            hidden = hidden | (key_at < at - window_size_left)
        if window_size_right >= 0:
            hidden = hidden | (key_at > at + window_size_right)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        out[first:end] = torch.einsum("hqk,khd->qhd", weights, values).to(out.dtype)


def reshape_and_cache_flash(
    key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, **unused
) -> None:
    """Write each token's key and value to its slot of the KV cache; -1 is no slot."""
    assert kv_cache_dtype in ("auto", "float32", "bfloat16"), kv_cache_dtype
    tokens = slot_mapping.ge(0).nonzero().flatten()
    slots, block_size = slot_mapping[tokens], key_cache.shape[1]
    blocks, offsets = slots // block_size, slots % block_size
    at = list(zip(blocks.tolist(), offsets.tolist(), strict=True))
    _reads(key, value, slot_mapping)
    _writes(*(cache[slot] for cache in (key_cache, value_cache) for slot in at))
    key_cache[blocks, offsets] = key[tokens]
    value_cache[blocks, offsets] = value[tokens]


def rms_norm(result, input, weight, epsilon) -> None:
    """x / sqrt(mean(x²) + epsilon) over the last dimension, times ``weight``."""
    _reads(input, *([] if weight is None else [weight]))
    _writes(result)
    x = input.double()
    x = x * (x.pow(2).mean(dim=-1, keepdim=True) + epsilon).rsqrt()
    result.copy_(x if weight is None else x * weight)


def fused_add_rms_norm(input, residual, weight, epsilon) -> None:
    """``residual`` += ``input``, and its norm in the place of ``input``."""
    _writes(residual)
    residual.add_(input)
    rms_norm(input, residual, weight, epsilon)


def _attention_outputs(call: Callable[..., Any], q, out, **unused) -> list[torch.Tensor]:
    # Not the real operator: it refuses float32.
    nothing = torch.empty(0, device=q.device)
    return [torch.empty_like(q) if out is None else out, nothing, nothing, nothing]


def _attention_schedule(call: Callable[..., Any], qkv_dtype, **arguments) -> torch.Tensor:
    # Which thread block does what; there are none here.
    return call(qkv_dtype=torch.bfloat16, **arguments)


class _Operator(NamedTuple):
    """An operator with no CPU version: how its outputs come to be, and its body, if it launches
    anything. What it returns needs no body to say that it writes to it."""

    outputs: Callable[..., Any] = lambda call, **arguments: call(**arguments)
    body: Callable[..., None] | None = None


OPERATORS = {
    "_vllm_fa3_C::fwd": _Operator(_attention_outputs, flash_attention),
    "_vllm_fa3_C::get_scheduler_metadata": _Operator(_attention_schedule, lambda **_: None),
    "_C_cache_ops::reshape_and_cache_flash": _Operator(body=reshape_and_cache_flash),
    "_C::rms_norm": _Operator(body=rms_norm),
    "_C::fused_add_rms_norm": _Operator(body=fused_add_rms_norm),
    "_C::get_cuda_view_from_cpu_tensor": _Operator(),
}

# ---------------------------------------------------------------- PyTorch's operators


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


LAUNCH_NOTHING = _words(
    """empty empty_like empty_permuted empty_strided is_pinned lift_fresh new_empty
    new_empty_strided pin_memory _pin_memory record_stream resize_ set_ _local_scalar_dense"""
)
"""Besides views. ``_local_scalar_dense`` is a copy to the host."""
READ_BACK = _words(
    "bincount equal masked_select nonzero repeat_interleave _unique2 unique_consecutive unique_dim"
)
"""The host needs their results, as a rule for the shape of what they return."""
IN_FLOAT64 = _words(
    """addmm baddbmm bmm cumsum dot linalg_vector_norm _log_softmax logsumexp mean mm mv norm
    _softmax std sum var"""
)
"""Products and reductions, where the order of additions shows."""


class _Kind(NamedTuple):
    """What there is to know of an operator before its arguments."""

    name: str
    namespace: str
    is_view: bool
    is_composite: bool
    in_place: bool
    written: list[str]
    """The names of the arguments that are written to."""


@functools.cache
def _kind(func: torch._ops.OpOverload) -> _Kind:
    schema, (namespace, name) = func._schema, func._schema.name.split("::")
    returned = [r.alias_info for r in schema.returns]
    return _Kind(
        name,
        namespace,
        func.is_view or (bool(returned) and all(r and not r.is_write for r in returned)),
        torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"),
        name.endswith("_") and len(returned) == 1 and bool(returned[0] and returned[0].is_write),
        [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write],
    )


_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


class RealKernels(TorchDispatchMode):
    """Gives bodies to the kernels that this thread launches. One object a thread."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        kind = _kind(func)
        if kind.is_composite:
            with self:
                return func.decompose(*args, **kwargs)
        if kind.is_view or kind.name in LAUNCH_NOTHING:
            return func(*args, **kwargs)
        if not _on_gpu(args, kwargs):
            return func(*args, **kwargs)
        if kind.namespace == "vllm":  # Python, which calls operators in its turn
            with self:
                return func.redispatch(_CUDA, *args, **kwargs)
        if kind.namespace != "aten":
            return _own_operator(func, args, kwargs)
        if kind.name in ("copy_", "_to_copy") and _crosses(args, kwargs):
            with self:
                plain = _as_plain_copy(func, args, kwargs)
            return func(*plain, **kwargs) if plain else args[0]
        if kind.name in READ_BACK or (kind.name.startswith("index") and _has_mask(args)):
            return _read_back(func, args, kwargs)
        return _operator(func, kind, args, kwargs)


def _operator(func, kind: _Kind, args, kwargs) -> Any:
    """Launch an operator whose CPU version is its body."""
    result = args[0] if kind.in_place else func(*args, **kwargs)
    given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
    fresh = [
        (i, on_host(t))
        for i, t in enumerate(_tensors(result))
        if t.untyped_storage()._cdata not in given
    ]
    mutable = func._schema.is_mutable
    if not fresh and not mutable:
        return result  # a view after all
    host_args, host_kwargs = _on_host((args, kwargs))
    names = (argument.name for argument in func._schema.arguments)
    named = dict(zip(names, host_args, strict=False)) | host_kwargs
    written = list(_tensors([named.get(name) for name in kind.written]))
    in_float64 = kind.name in IN_FLOAT64 and not mutable

    def body() -> None:
        a, k = host_args, host_kwargs
        if (rows := _rows(kind.name, a)) is not None:
            _reads(*_tensors(a[1:]))
            _writes(*(a[0][row] for row in rows.flatten().tolist()))
        else:
            _reads(*_tensors((a, k)))
            _writes(*written, *(memory for _, memory in fresh))
        if in_float64:
            a, k = _map(_to_float64, a), _map(_to_float64, k)
        computed = list(_tensors(func(*a, **k)))
        for i, memory in fresh:
            memory.copy_(computed[i])

    launch(kind.name, body)
    return result


def _rows(operator: str, args: Sequence[Any]) -> torch.Tensor | None:
    """The indices of the rows that an operator writes to, where it writes to some."""
    if operator == "index_put_" and len(args[1]) == 1:
        return args[1][0] if args[1][0].dtype != torch.bool else None
    if operator in ("index_fill_", "index_copy_", "index_add_") and args[1] == 0:
        return args[2]
    return None


def _own_operator(func, args, kwargs) -> Any:
    """Launch an operator of vLLM's."""
    if func._schema.name not in OPERATORS:
        raise NotImplementedError(f"real_kernels.py does not know what {func} computes")
    operator = OPERATORS[func._schema.name]
    names = [argument.name for argument in func._schema.arguments]
    arguments = dict(zip(names, args, strict=False)) | kwargs
    outputs = operator.outputs(func, **arguments)
    if operator.body is not None:
        if "out" in arguments:
            arguments["out"] = outputs[0]
        body = functools.partial(operator.body, **_map(on_host, arguments))
        written = list(_tensors(_map(on_host, outputs)))

        def run() -> None:
            _writes(*written)
            body()

        launch(func._schema.name, run)
    return outputs


def _read_back(func, args, kwargs) -> Any:
    """Compute at once what the host waits for."""
    torch.cuda.current_stream().synchronize()
    host_args, host_kwargs = _on_host((args, kwargs))
    with _device:
        result = func(*host_args, **host_kwargs)
    return _map(lambda t: t.to("cuda"), result)


def _crosses(args, kwargs) -> bool:
    """Whether a copy is between the host and the device."""
    to = args[0].device if len(args) > 1 else kwargs.get("device") or args[0].device
    return torch.device(to).type != args[len(args) > 1].device.type


def _as_plain_copy(func, args, kwargs) -> tuple[torch.Tensor, ...]:
    """The arguments of a copy that the library can do, of plain memory, in the place of one
    that casts or reorders; none where nothing is left to do. Operators do the rest."""
    if len(args) == 1:
        dtype = kwargs.get("dtype") or args[0].dtype
        return (args[0].to(dtype).contiguous(),)
    to, source, *non_blocking = args
    source = source.to(to.dtype).expand_as(to).contiguous()
    if to.is_contiguous():
        return to, source, *non_blocking
    to.copy_(source.to(to.device, non_blocking=to.is_cuda and any(non_blocking)))
    return ()


# ---------------------------------------------------------------- arguments


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _map(change: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """``value`` with its tensors changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)([_map(change, item) for item in value])
    if isinstance(value, dict):
        return {name: _map(change, item) for name, item in value.items()}
    return value


def _on_gpu(args, kwargs) -> bool:
    device = kwargs.get("device")
    return (device is not None and torch.device(device).type == "cuda") or any(
        t.is_cuda for t in _tensors((args, kwargs))
    )


def _on_host(arguments: tuple[Any, dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    """Positional and keyword arguments for the CPU version of an operator."""
    # A scalar that is on the host is passed by value.
    args, kwargs = _map(lambda t: on_host(t) if t.is_cuda else t.clone(), arguments)
    if kwargs.get("device") is not None:
        kwargs["device"] = "cpu"
    for name in ("generator", "pin_memory"):
        kwargs.pop(name, None)
    return args, kwargs


def _to_float64(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _has_mask(args) -> bool:
    return len(args) > 1 and any(t.dtype == torch.bool for t in _tensors(args[1]))


# ---------------------------------------------------------------- Triton


def _launch_triton(self: Any, *args: Any, **kwargs: Any) -> None:
    """In the place of GridExecutor.__call__, which copies every tensor to the host and back."""
    from triton.runtime import interpreter

    spec = inspect.getfullargspec(self.fn)
    named = {n: v for n, v in kwargs.items() if n in spec.args or n in spec.kwonlyargs}
    given = inspect.getcallargs(self.fn, *args, **named)
    grid = self.grid(given) if callable(self.grid) else self.grid
    grid = (*grid, 1, 1)[:3]
    # Tensors become their addresses here.
    values = {
        name: value if name in self.constexprs else interpreter._implicit_cvt(value)
        for name, value in given.items()
    }

    def body() -> None:
        _speak_triton(self.fn)
        builder = interpreter.interpreter_builder
        builder.set_grid_dim(*grid)
        for program in itertools.product(*map(range, grid)):
            builder.set_grid_idx(*program)
            self.fn(**values)

    launch(self.fn.__name__, body)


class _CheckedAccess:
    """The interpreter's loads and stores, told to races.py.

    They would end the process at an address that is nobody's. A GPU would say so: "an illegal
    memory access was encountered".
    """

    def __init__(self, stock: Any) -> None:
        self._stock = stock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        _check_addresses(pointers[mask])
        _touches_addresses(pointers[mask], np.dtype(dtype).itemsize, False)
        return self._stock.load(pointers, mask, other, dtype)

    def store(self, pointers: Any, value: Any, mask: Any) -> Any:
        _check_addresses(pointers[mask])
        _touches_addresses(pointers[mask], value.dtype.itemsize, True)
        return self._stock.store(pointers, value, mask)


def _check_addresses(addresses: Any) -> None:
    base, size = ctypes.c_size_t(), ctypes.c_size_t()
    while addresses.size:
        first = int(addresses.min())
        if _cuda.cuMemGetAddressRange_v2(
            ctypes.byref(base), ctypes.byref(size), ctypes.c_size_t(first)
        ):
            raise IndexError(f"a kernel accesses {first:#x}, which is no memory of the device's")
        addresses = addresses[addresses >= base.value + size.value]


@functools.cache
def _speak_triton(function: Any) -> None:
    """Give ``triton.language`` the interpreter's meaning, for good: nothing else uses it here."""
    from triton.runtime import interpreter

    interpreter._patch_lang(function)


# ---------------------------------------------------------------- switching it on


def switch_on() -> None:
    """From here on kernels compute: in this thread, and in those that are started later.

    For the life of the process. Before vLLM builds its engine, and with TRITON_INTERPRET=1
    before Triton is imported.
    """
    from triton.runtime import interpreter
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
    from vllm.v1.sample.ops import topk_topp_sampler

    torch.cuda.init()
    # Its Triton kernel is not for the interpreter (a loop over rows calls methods of an int).
    topk_topp_sampler.HAS_TRITON = False
    interpreter.GridExecutor.__call__ = _launch_triton
    interpreter._interpreter = _CheckedAccess(interpreter._interpreter)
    # The bodies compute in any precision.
    FlashAttentionBackend.supported_dtypes = [torch.float32, torch.bfloat16]
    stock_run = threading.Thread.run

    def run(self: threading.Thread) -> None:
        with RealKernels():
            stock_run(self)

    threading.Thread.run = run
    RealKernels().__enter__()
