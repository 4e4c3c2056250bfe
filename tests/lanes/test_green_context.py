# SPDX-License-Identifier: Apache-2.0
"""Green contexts on a fake driver, and that driver against NVIDIA's bindings."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from lanes.fake_driver import ENUMS, CUresult, FakeDriver, TypesBefore13_1

from vllm_duet.lanes import green_context
from vllm_duet.lanes.green_context import (
    DriverCallError,
    GreenContextError,
    SmLimits,
    SmSplit,
    sm_limits,
)

FUNCTIONS = sorted(name for name in vars(FakeDriver) if re.match("cu[A-Z]", name))
TAKES_BACK = {
    "cuCtxPopCurrent",
    "cuDevicePrimaryCtxRelease",
    "cuGreenCtxDestroy",
    "cuStreamDestroy",
}


@pytest.fixture(autouse=True)
def _without_torch(monkeypatch: pytest.MonkeyPatch):
    """torch's CPU build makes no ExternalStream."""

    def stream(handle: int, device: int) -> Any:
        return SimpleNamespace(cuda_stream=handle, device_index=device)

    monkeypatch.setattr(green_context, "_external_stream", stream)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeDriver], FakeDriver]:
    def use(cuda: FakeDriver) -> FakeDriver:
        monkeypatch.setattr(green_context, "_driver", lambda: cuda)
        return cuda

    return use


@pytest.fixture
def h100(use: Callable[[FakeDriver], FakeDriver]) -> FakeDriver:
    """132 SMs, 120 of them in 15 groups of 8."""
    return use(FakeDriver(132, 8, 8, grouped_sms=120))


def live(cuda: FakeDriver) -> list[Any]:
    return [context for context in cuda.contexts.values() if not context.destroyed]


# What a device offers


@pytest.mark.parametrize(
    ("cuda", "limits"),
    [
        (FakeDriver(132, 8, 8, grouped_sms=120), SmLimits(132, 8, 8, 120)),
        (FakeDriver(108, 4, 2), SmLimits(108, 4, 2, 108)),
        (FakeDriver(80, 2, 2), SmLimits(80, 2, 2, 80)),
        (FakeDriver(16, 8, 8), SmLimits(16, 8, 8, 16)),  # a MIG slice
        (FakeDriver(8, 8, 8), SmLimits(8, 8, 8, 8)),
    ],
)
def test_limits_are_what_the_driver_makes(use: Any, cuda: FakeDriver, limits: SmLimits):
    use(cuda)
    assert sm_limits() == limits
    assert not cuda.alive


@st.composite
def devices(draw: st.DrawFn) -> FakeDriver:
    granularity = draw(st.sampled_from([1, 2, 8]))
    min_sms = granularity * draw(st.integers(1, 3))
    num_sms = draw(st.integers(min_sms, 160))
    grouped_sms = draw(st.integers(min_sms, num_sms))
    no_group = draw(
        st.sampled_from(
            [
                CUresult.CUDA_SUCCESS,  # with no group in it
                CUresult.CUDA_ERROR_INVALID_VALUE,
                CUresult.CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION,
            ]
        )
    )
    return FakeDriver(
        num_sms, min_sms, granularity, grouped_sms=grouped_sms, no_group=no_group, num_devices=2
    )


def by_hand(cuda: FakeDriver) -> list[int]:
    """The splits of a device, one by one from what it is made of."""
    return [
        decode_sms
        for decode_sms in range(cuda.min_sms, cuda.grouped_sms + 1)
        if decode_sms % cuda.granularity == 0 and cuda.num_sms - decode_sms >= cuda.min_sms
    ]


@given(cuda=devices())
def test_every_split_on_offer_is_made_of_all_sms_and_shares_none(cuda: FakeDriver):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(green_context, "_driver", lambda: cuda)
        splits = sm_limits().splits()
        assert list(splits) == by_hand(cuda)
        for decode_sms in splits:
            with SmSplit.create(decode_sms) as split:
                assert split.decode.num_sms == decode_sms
                assert split.prefill.num_sms == cuda.num_sms - decode_sms
                decode, prefill = (context.sm_ids for context in live(cuda))
                assert len(decode) == decode_sms
                assert not decode & prefill
                assert decode | prefill == set(range(cuda.num_sms))
            assert not cuda.alive


@given(cuda=devices(), decode_sms=st.integers(-8, 200))
def test_no_other_split_is_made(cuda: FakeDriver, decode_sms: int):
    splits = by_hand(cuda)
    assume(splits and decode_sms not in splits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(green_context, "_driver", lambda: cuda)
        with pytest.raises(GreenContextError) as refused:
            SmSplit.create(decode_sms)
    *_, nearest = str(refused.value).split("nearest it can give is ")
    named = [int(n) for n in re.findall(r"\d+", nearest)]
    below = [n for n in splits if n < decode_sms][-1:]
    above = [n for n in splits if n > decode_sms][:1]
    assert named == below + above
    assert not cuda.contexts


def test_limits_by_hand_go_as_far_as_the_device():
    assert SmLimits(num_sms=30, min_sms=8, granularity=8).splits() == (8, 16)
    assert SmLimits(num_sms=12, min_sms=8, granularity=8).splits() == ()


# Streams


def test_a_stream_a_priority(h100: FakeDriver):
    with SmSplit.create(16) as split:
        decode, urgent = split.decode.stream(), split.decode.stream(-1)
        assert split.decode.stream() is decode
        assert split.decode.stream(priority=-1) is urgent
        prefill = split.prefill.stream()
        made = [h100.streams[stream.cuda_stream] for stream in (decode, urgent, prefill)]
        assert len(h100.streams) == 3
        assert [stream.priority for stream in made] == [0, -1, 0]
        assert [len(stream.context.sm_ids) for stream in made] == [16, 16, 116]


def test_groups_have_contexts_of_their_own_on_the_device_asked_for(use: Any):
    cuda = use(FakeDriver(num_devices=2))
    with SmSplit.create(16, device=1) as split:
        assert split.decode.stream().device_index == 1
        contexts = [int(cuda.cuCtxFromGreenCtx(green)[1]) for green in cuda.contexts]
        assert [split.decode.context, split.prefill.context] == contexts


def test_a_stream_that_torch_cannot_use_goes_with_the_split(
    h100: FakeDriver, monkeypatch: pytest.MonkeyPatch
):
    def cpu_build(handle: int, device: int) -> Any:
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(green_context, "_external_stream", cpu_build)
    with pytest.raises(AssertionError), SmSplit.create(16) as split:
        split.decode.stream()
    assert h100.streams
    assert not h100.alive


# Work queues


def test_work_queues_are_kept_apart(h100: FakeDriver):
    with SmSplit.create(16) as split:
        assert split.separate_work_queues
        for context in live(h100):
            assert context.work_queues.sharingScope == 1
            assert context.work_queues.wqConcurrencyLimit == 4  # of 8


@pytest.mark.parametrize(
    "cuda",
    [
        FakeDriver(resource_types=TypesBefore13_1),
        FakeDriver(version=12080, no_resource=CUresult.CUDA_ERROR_INVALID_RESOURCE_TYPE),
        FakeDriver(version=12080, no_resource=CUresult.CUDA_ERROR_INVALID_VALUE),
        FakeDriver(version=13010, no_resource=CUresult.CUDA_ERROR_NOT_SUPPORTED),
    ],
)
def test_without_work_queues_there_is_a_split_that_says_so(use: Any, cuda: FakeDriver):
    use(cuda)
    with SmSplit.create(16) as split:
        assert not split.separate_work_queues
        assert [context.work_queues for context in live(cuda)] == [None, None]


def test_work_queues_are_left_shared_when_told(h100: FakeDriver):
    with SmSplit.create(16, separate_work_queues=False) as split:
        assert not split.separate_work_queues
        assert [context.work_queues for context in live(h100)] == [None, None]


# Release


def test_streams_are_waited_for_and_go_before_their_contexts(h100: FakeDriver):
    split = SmSplit.create(16)
    split.decode.stream()
    split.prefill.stream()
    split.decode.stream(-1)
    del h100.calls[:]
    split.release()
    released = [name for name, _ in h100.calls if name.startswith(("cuStream", "cuGreen"))]
    assert released == ["cuStreamSynchronize", "cuStreamDestroy"] * 3 + ["cuGreenCtxDestroy"] * 2
    assert not h100.alive


def test_release_again_does_nothing(h100: FakeDriver):
    split = SmSplit.create(16)
    split.release()
    done = list(h100.calls)
    split.release()
    assert h100.calls == done


@pytest.mark.parametrize(
    "use_it",
    [
        lambda split: split.decode.stream(),
        lambda split: split.prefill.stream(5),
        lambda split: split.decode.context,
        lambda split: split.__enter__(),
    ],
)
def test_no_use_after_release(h100: FakeDriver, use_it: Callable[[SmSplit], object]):
    split = SmSplit.create(16)
    split.decode.stream()
    split.release()
    with pytest.raises(GreenContextError, match=r"^This SM split has been released\.$"):
        use_it(split)
    assert not h100.alive


def test_leaving_the_block_releases_whatever_happened(h100: FakeDriver):
    with pytest.raises(ZeroDivisionError), SmSplit.create(16) as split:
        split.decode.stream()
        raise ZeroDivisionError
    assert not h100.alive


# Failures


def live_and_die(splits: list[SmSplit]) -> None:
    splits.append(SmSplit.create(16))
    splits[0].decode.stream()
    splits[0].prefill.stream(-1)
    splits[0].release()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_nothing_stays_behind_when_a_call_fails(use: Any, function: str):
    for number in count(1):
        cuda = use(FakeDriver())
        cuda.failures[function, number] = CUresult.CUDA_ERROR_UNKNOWN
        splits: list[SmSplit] = []
        try:
            live_and_die(splits)
        except DriverCallError as error:
            assert (error.function, error.result) == (function, "CUDA_ERROR_UNKNOWN")
        else:
            assert number > 1, f"{function} is never called"
            assert not cuda.alive
            break
        for split in splits:
            split.release()
        # What cannot be taken back is all that stays.
        assert len(cuda.alive) == (function in TAKES_BACK), f"call {number}"


def test_the_first_failure_is_the_one_to_hear_of(h100: FakeDriver):
    h100.failures = {
        ("cuCtxFromGreenCtx", 2): CUresult.CUDA_ERROR_OUT_OF_MEMORY,
        ("cuGreenCtxDestroy", 1): CUresult.CUDA_ERROR_UNKNOWN,
        ("cuCtxPopCurrent", 1): CUresult.CUDA_ERROR_UNKNOWN,
    }
    with pytest.raises(DriverCallError, match="cuCtxFromGreenCtx failed: CUDA_ERROR_OUT_OF_MEM"):
        SmSplit.create(16)


def test_a_kernel_that_crashed_is_heard_of_at_the_release(h100: FakeDriver):
    split = SmSplit.create(16)
    split.decode.stream()
    for later in ("cuStreamSynchronize", "cuStreamDestroy", "cuGreenCtxDestroy"):
        h100.failures[later, 1] = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    h100.failures["cuCtxPopCurrent", 2] = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(DriverCallError, match="cuStreamSynchronize failed: CUDA_ERROR_ILLEGAL_AD"):
        split.release()


class Rounding(FakeDriver):
    """Its contexts hold more than was described, ``by_sms``."""

    by_sms = 8

    def cuGreenCtxGetDevResource(self, context: Any, kind: int) -> Any:
        (resource,) = super().cuGreenCtxGetDevResource(context, kind)
        resource.sm.ids = frozenset(range(len(resource.sm.ids) + self.by_sms))
        return (resource,)


@pytest.mark.parametrize("by_sms", [-8, 8])
def test_a_driver_that_makes_other_groups_is_not_believed(use: Any, by_sms: int):
    cuda = use(Rounding())
    cuda.by_sms = by_sms
    said = (
        f"The driver made groups of {16 + by_sms} and {116 + by_sms} SMs on device 0,"
        " where 16 and 116 of 132 were planned."
    )
    with pytest.raises(GreenContextError) as refused:
        SmSplit.create(16)
    assert str(refused.value) == said
    assert not cuda.alive


class Overlapping(FakeDriver):
    """Its remainders are whole devices."""

    def cuDevSmResourceSplitByCount(self, *arguments: Any) -> Any:
        groups, made, remainder = super().cuDevSmResourceSplitByCount(*arguments)
        remainder.sm.ids |= groups[0].sm.ids
        return groups, made, remainder


def test_groups_that_share_sms_are_refused(use: Any):
    cuda = use(Overlapping())
    with pytest.raises(GreenContextError, match=r"groups of 16 and 132 SMs .* 16 and 116 of 132"):
        SmSplit.create(16)
    assert not cuda.alive


@pytest.mark.parametrize(
    ("cuda", "decode_sms", "said"),
    [
        (
            FakeDriver(version=12040),
            16,
            "The NVIDIA driver is one of CUDA 12.4,"
            " and green contexts with streams need CUDA 12.5.",
        ),
        (
            FakeDriver(without=["cuGreenCtxCreate"]),
            16,
            "The NVIDIA driver has no cuGreenCtxCreate, which green contexts need:"
            " install a driver of CUDA 12.5 or newer.",
        ),
        (
            FakeDriver(
                without=["cuDevSmResourceSplitByCount"], no_function='Function "{}" not found'
            ),
            16,
            "The NVIDIA driver has no cuDevSmResourceSplitByCount, which green contexts need:"
            " install a driver of CUDA 12.5 or newer.",
        ),
        (FakeDriver(num_devices=0), 16, "The CUDA driver's cuInit failed: CUDA_ERROR_NO_DEVICE."),
        (FakeDriver(12), 8, "Device 0 has 12 SMs, too few for two groups of 8 or more."),
        (FakeDriver(6), 2, "The driver makes no groups of the 6 SMs of device 0."),
        (
            FakeDriver(),
            13,
            "Device 0 cannot give 13 of its 132 SMs to decode: the nearest it can give is 8 or 16.",
        ),
        (
            FakeDriver(),
            4,
            "Device 0 cannot give 4 of its 132 SMs to decode: the nearest it can give is 8.",
        ),
        (
            FakeDriver(),
            128,
            "Device 0 cannot give 128 of its 132 SMs to decode: the nearest it can give is 120.",
        ),
    ],
)
def test_what_stands_in_the_way_is_said(use: Any, cuda: FakeDriver, decode_sms: int, said: str):
    use(cuda)
    with pytest.raises(GreenContextError) as refused:
        SmSplit.create(decode_sms)
    assert str(refused.value) == said
    assert not cuda.alive


def test_a_device_that_is_not_there_is_said(h100: FakeDriver):
    with pytest.raises(GreenContextError, match="cuDeviceGet failed: CUDA_ERROR_INVALID_DEVICE"):
        sm_limits(device=1)


def test_missing_bindings_are_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(GreenContextError, match=r"pip install 'vllm-duet\[cuda\]'"):
        sm_limits()


def test_torch_is_imported_for_a_stream_and_not_before():
    code = "import sys, vllm_duet.lanes.green_context; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# The fake driver against the real bindings


@pytest.fixture
def bindings() -> Any:
    return pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_bindings_have_the_function_with_these_arguments(bindings: Any, function: str):
    real = inspect.signature(getattr(bindings, function)).parameters
    fake = inspect.signature(getattr(FakeDriver, function)).parameters
    assert len(fake) - 1 == len(real)  # self


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_bindings_return_as_many_values(h100: FakeDriver, bindings: Any, function: str):
    documentation = getattr(bindings, function).__doc__ + "\n\n"
    [(indent, returns)] = re.findall(r"^( *)Returns\n *-+\n(.+?)\n\n", documentation, re.M | re.S)
    values = re.findall(rf"^{indent}(\S.*)", returns, re.M)
    assert values[0] == "CUresult"
    live_and_die([])
    assert h100.returned[function] == {len(values)}


@pytest.mark.parametrize("fake", ENUMS, ids=lambda enum: enum.__name__)
def test_the_bindings_have_the_enum_with_these_values(bindings: Any, fake: Any):
    real = getattr(bindings, fake.__name__)
    for member in fake:
        assert getattr(real, member.name).value == member.value
        assert bool(getattr(real, member.name)) == bool(member)


def test_the_bindings_have_the_fields(bindings: Any):
    resource = bindings.CUdevResource()
    assert resource.sm.smCount == 0
    balanced = bindings.CUdevWorkqueueConfigScope.CU_WORKQUEUE_SCOPE_GREEN_CTX_BALANCED
    resource.type = bindings.CUdevResourceType.CU_DEV_RESOURCE_TYPE_WORKQUEUE_CONFIG
    config = resource.wqConfig
    config.sharingScope = balanced
    config.wqConcurrencyLimit = 3
    assert (resource.wqConfig.sharingScope, resource.wqConfig.wqConcurrencyLimit) == (balanced, 3)
    assert int(bindings.CUcontext(7)) == int(bindings.CUstream(7)) == 7


def test_the_bindings_without_a_driver_are_understood(bindings: Any):
    try:
        bindings.cuDriverGetVersion()
    except RuntimeError:
        with pytest.raises(GreenContextError, match=r"its library libcuda was not found\.$"):
            sm_limits()
    else:
        pytest.skip("there is an NVIDIA driver here")


# On a GPU


def test_a_gpu_is_split(monkeypatch: pytest.MonkeyPatch):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    monkeypatch.undo()  # torch's own streams
    limits = sm_limits()
    assert limits.num_sms == torch.cuda.get_device_properties(0).multi_processor_count
    numbers = torch.arange(4096, device="cuda", dtype=torch.float64)
    torch.cuda.synchronize()
    for decode_sms in limits.splits():
        with SmSplit.create(decode_sms) as split:
            assert split.decode.num_sms == decode_sms
            assert split.decode.num_sms + split.prefill.num_sms == limits.num_sms
            sums = []
            for group in (split.decode, split.prefill):
                with torch.cuda.stream(group.stream()):
                    sums.append(numbers.sum())
                group.stream().synchronize()
            assert [float(total) for total in sums] == [4096 * 4095 / 2] * 2
