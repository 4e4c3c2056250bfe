# SPDX-License-Identifier: Apache-2.0
"""Questions about green contexts that a profile cannot answer, one function each.

Each returns a record with a ``verdict`` in words and the numbers behind it.
docs/gpu-facts.md has what is expected, and from which source. A graph has to go
before the context it was captured in, so no unit outlives its split here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from math import ceil
from statistics import median
from typing import Any

from vllm_duet.calibration.device import CalibrationError, Device, DeviceInfo, Lane, Lanes, Unit
from vllm_duet.calibration.experiments import (
    ATTENTION,
    CHUNK_TOKENS,
    PREPARE_S,
    SPLIT_S,
    Record,
    Step,
    attempt,
)
from vllm_duet.calibration.measure import alone
from vllm_duet.calibration.work import (
    Gemm,
    SmallKernel,
    SmIds,
    gemm,
    layer,
    predicted_ms,
)
from vllm_duet.roofline import GpuProfile

KERNELS = 256
LONG_QUEUE_MS = 30.0
DELAYED_US = 50.0
"""A launch counts as delayed from here on: several times a launch, far below a queue."""

Fact = Callable[[Device, int, GpuProfile], Record]


def facts(info: DeviceInfo, profile: GpuProfile) -> list[Step]:
    """All of them. None needs much of the GPU; the launch delay waits for long queues."""
    steps = []
    for fact, gpu_ms, prepared in (
        (captured_kernels_stay_in_their_group, 1.0, 5),
        (replay_against_launch, 4.0, 2),
        (launch_beside_a_long_queue, 4 * 2 * LONG_QUEUE_MS, 8),
        (memory_held, 10.0, 8 * 54),
        (changing_the_split, 2.0, 4),
        (group_sizes, 1.0, 2 * len(info.splits)),
        (persistent_kernels, 3 * 8 * 4.0, 24),
    ):

        def run(device: Device, rounds: int, fact: Fact = fact) -> list[Record]:
            fields = {"group": "facts", "fact": fact.__name__}
            return [attempt(fields, fact, device, rounds, profile)]

        setup_s = 4 * SPLIT_S + prepared * PREPARE_S
        steps.append(Step("facts", fact.__name__, 0.0, 0.0, gpu_ms, setup_s, run))
    return steps


def middle_split(info: DeviceInfo) -> int:
    """A split near the middle of what the GPU offers.

    Raises:
        CalibrationError: it offers none.
    """
    if not info.splits:
        raise CalibrationError(f"{info.name} offers no split of its {info.num_sms} SMs")
    return info.splits[len(info.splits) // 2]


def captured_kernels_stay_in_their_group(
    device: Device, rounds: int, profile: GpuProfile
) -> Record:
    """Which SMs a graph captured on the decode lane uses when replayed elsewhere."""
    with device.split(middle_split(device.info)) as lanes:
        decode, prefill = (_sms_of(device, lane, rounds) for lane in (lanes.decode, lanes.prefill))
        graph = device.prepare([SmIds()], lanes.decode)
        on_prefill, on_whole = (
            _sms_seen(device, graph, rounds, lane) for lane in (lanes.prefill, device.whole())
        )
        del graph
    if on_prefill <= decode and on_whole <= decode:
        verdict = "captured kernels stay in the group they were captured in"
    elif on_prefill <= prefill:
        verdict = "captured kernels run in the group the graph is launched in"
    else:
        verdict = "captured kernels are bound to neither group"
    if decode & prefill:
        verdict += f"; the groups share {len(decode & prefill)} SMs"
    return {
        "verdict": verdict,
        "decode_sm_ids": sorted(decode),
        "prefill_sm_ids": sorted(prefill),
        "replayed_on_prefill_sm_ids": sorted(on_prefill),
        "replayed_on_whole_sm_ids": sorted(on_whole),
    }


def _sms_of(device: Device, lane: Lane, rounds: int) -> frozenset[int]:
    """The SMs that kernels launched on ``lane`` run on."""
    return _sms_seen(device, device.prepare([SmIds()], lane, captured=False), rounds)


def _sms_seen(device: Device, unit: Unit, rounds: int, lane: Lane | None = None) -> frozenset[int]:
    """Every SM that ``rounds`` launches of an SmIds unit ran on; blocks need not fill them all."""
    found: frozenset[int] = frozenset()
    for _ in range(rounds):
        unit.launch(lane)
        found |= device.sm_ids(unit)
    return found


def replay_against_launch(device: Device, rounds: int, profile: GpuProfile) -> Record:
    """What a small kernel costs the CPU and the GPU, launched and replayed."""
    lane, found = device.whole(), {}
    for name, captured in (("launch", False), ("replay", True)):
        unit = device.prepare([SmallKernel()], lane, runs=KERNELS, captured=captured)
        unit.launch()
        cpu_us, gpu_us = [], []
        for _ in range(rounds):
            device.synchronize()
            start = device.mark(lane)
            begin_s = device.now_s()
            unit.launch()
            cpu_us.append(1e6 * (device.now_s() - begin_s) / KERNELS)
            end = device.mark(lane)
            device.synchronize()
            gpu_us.append(1e3 * device.elapsed_ms(start, end) / KERNELS)
        found[name] = {"cpu_us": median(cpu_us), "gpu_us": median(gpu_us)}
    launch, replay = found["launch"], found["replay"]
    return {
        "verdict": f"a small kernel takes {launch['gpu_us']:.2f} us launched one by one and"
        f" {replay['gpu_us']:.2f} us in a graph; the CPU pays {launch['cpu_us']:.2f} and"
        f" {replay['cpu_us']:.2f} us",
        "kernels": KERNELS,
        **found,
    }


def launch_beside_a_long_queue(device: Device, rounds: int, profile: GpuProfile) -> Record:
    """Launch to completion of a small graph on the decode lane, with the prefill lane idle
    and with a long queue of kernels on it; with and without queues of their own, and with
    decode at a higher stream priority."""
    settings = []
    for separate in (True, False):
        for priority in (0, -1):
            fields = {"separate_work_queues_asked": separate, "decode_priority": priority}
            arguments = (device, rounds, profile, separate, priority)
            settings.append(attempt(fields, _launch_delay, *arguments))
    worked = [s for s in settings if "error" not in s]
    if not worked:
        raise CalibrationError("no setting could be measured: " + settings[0]["error"])
    delayed = [s for s in worked if s["beside_us"] - s["idle_us"] > DELAYED_US]
    verdict = f"delayed under {len(delayed)} of {len(worked)} settings"
    cures = [s for s in worked if s not in delayed]
    if delayed and cures:
        best = cures[0]
        verdict += (
            f"; not with separate work queues {best['separate_work_queues']}"
            f" and decode priority {best['decode_priority']}"
        )
    return {"verdict": verdict, "settings": settings}


def _launch_delay(
    device: Device, rounds: int, profile: GpuProfile, separate: bool, priority: int
) -> Record:
    with device.split(
        middle_split(device.info), separate_work_queues=separate, decode_priority=priority
    ) as lanes:
        return _launch_delay_between(device, rounds, profile, lanes)


def _launch_delay_between(device: Device, rounds: int, profile: GpuProfile, lanes: Lanes) -> Record:
    small = device.prepare([SmallKernel()], lanes.decode, runs=8)
    product = [gemm("gate_up", CHUNK_TOKENS)]
    runs = ceil(LONG_QUEUE_MS / predicted_ms(profile, product, lanes.prefill.num_sms))
    queue = device.prepare(product, lanes.prefill, runs=runs, captured=False)
    small.launch()
    device.synchronize()

    def latency_us() -> tuple[float, Any]:
        begin_s = device.now_s()
        small.launch()
        done = device.mark(lanes.decode)
        device.wait(done)
        return 1e6 * (device.now_s() - begin_s), done

    idle = [latency_us()[0] for _ in range(rounds)]
    busy, ended_first = [], 0
    for _ in range(rounds):
        queue.launch()
        queue_end = device.mark(lanes.prefill)
        us, done = latency_us()
        device.synchronize()
        busy.append(us)
        ended_first += device.elapsed_ms(done, queue_end) <= 0
    return {
        "separate_work_queues": lanes.separate_work_queues,
        "idle_us": median(idle),
        "beside_us": median(busy),
        "max_beside_us": max(busy),
        "queue_ended_first": ended_first,
        "rounds": rounds,
    }


def memory_held(device: Device, rounds: int, profile: GpuProfile) -> Record:
    """Memory of a green context, and of a captured graph of nine layers."""
    splits = device.info.splits[:4]
    before = device.free_bytes()
    with ExitStack() as stack:
        for sms in splits:
            lanes = stack.enter_context(device.split(sms))
            for lane in (lanes.decode, lanes.prefill):
                # A context may only take its memory when it first has work.
                device.prepare([SmallKernel()], lane, captured=False)
        per_context = (before - device.free_bytes()) / (2 * max(len(splits), 1))
    works, count = layer(64, ATTENTION) * 9, 4
    with device.split(middle_split(device.info)) as lanes:
        held, free = [], [0, 0, 0]
        device.prepare(works, lanes.decode)  # cuBLAS has its workspaces from here on.
        free[0] = device.free_bytes()
        held.append([device.prepare(works, lanes.decode, captured=False) for _ in range(count)])
        free[1] = device.free_bytes()
        held.append([device.prepare(works, lanes.decode) for _ in range(count)])
        free[2] = device.free_bytes()
        # Both kinds hold the same buffers; the difference is the graphs.
        per_graph = ((free[1] - free[2]) - (free[0] - free[1])) / count
        held.clear()
    return {
        "verdict": f"{per_context / 2**20:.1f} MiB a green context,"
        f" {per_graph / 2**20:.2f} MiB a graph of {len(works)} operators",
        "bytes_per_green_context": per_context,
        "bytes_per_graph": per_graph,
        "operators_per_graph": len(works),
    }


def changing_the_split(device: Device, rounds: int, profile: GpuProfile) -> Record:
    """Creating and releasing a split, and going from one that exists to another."""
    create_ms, release_ms = [], []
    sizes = device.info.splits[:1] + device.info.splits[-1:]
    for i in range(rounds):
        begin_s = device.now_s()
        with device.split(sizes[i % len(sizes)]):
            created_s = device.now_s()
        create_ms.append(1e3 * (created_s - begin_s))
        release_ms.append(1e3 * (device.now_s() - created_s))
    with device.split(sizes[0]) as first, device.split(sizes[-1]) as second:
        same_us, other_us = _round_trips_us(device, 4 * rounds, first, second)
    return {
        "verdict": f"{median(create_ms):.2f} ms to create a split, {median(release_ms):.2f} to"
        f" release it; going to another that exists adds {other_us - same_us:.1f} us",
        "create_ms": median(create_ms),
        "max_create_ms": max(create_ms),
        "release_ms": median(release_ms),
        "same_split_us": same_us,
        "other_split_us": other_us,
    }


def _round_trips_us(
    device: Device, rounds: int, first: Lanes, second: Lanes
) -> tuple[float, float]:
    """Two small graphs one after the other: of one split, and of two."""
    lanes = (first.decode, second.decode)
    units = [device.prepare([SmallKernel()], lane, runs=8) for lane in lanes]

    def round_trip_us(order: tuple[int, int]) -> float:
        begin_s = device.now_s()
        for i in order:
            units[i].launch()
            device.wait(device.mark(lanes[i]))
        return 1e6 * (device.now_s() - begin_s)

    for unit in units:
        unit.launch()
    device.synchronize()
    same, other = (
        median(round_trip_us(order) for _ in range(rounds)) for order in ((0, 0), (0, 1))
    )
    return same, other


def group_sizes(device: Device, rounds: int, profile: GpuProfile) -> Record:
    """Whether each split gives the groups that were asked for, counted by their SM ids."""
    info, found, wrong = device.info, [], []
    for sms in info.splits:
        with device.split(sms) as lanes:
            both = lanes.decode, lanes.prefill
            lane_sms = [lane.num_sms for lane in both]
            counted = [len(_sms_of(device, lane, rounds)) for lane in both]
            found.append({"asked": sms, "said": lane_sms, "counted": counted})
            if counted != lane_sms:
                wrong.append(sms)
    return {
        "verdict": f"smallest {info.min_sms}, step {info.sm_granularity}:"
        f" {len(found) - len(wrong)} of {len(found)} splits are what was asked for",
        "min_sms": info.min_sms,
        "sm_granularity": info.sm_granularity,
        "splits": found,
    }


def persistent_kernels(device: Device, rounds: int, profile: GpuProfile) -> Record:
    """Products whose kernels size themselves by the device's SMs, in a group, against the
    same told how many SMs it has. FlashAttention 3 is not at hand here."""
    info, rows = device.info, []
    sizes = sorted({info.splits[0], middle_split(info), info.splits[-1]})
    for sms in sizes:
        with device.split(sms) as lanes:
            for lane in (lanes.decode, lanes.prefill):
                for kernel in ("cublas", "persistent"):
                    fields = {"kernel": kernel, "num_sms": lane.num_sms}

                    def both(lane: Lane = lane, kernel: Any = kernel) -> Record:
                        works = [
                            gemm("gate_up", CHUNK_TOKENS, kernel=kernel, sm_target=target)
                            for target in (None, lane.num_sms)
                        ]
                        default, told = (_ms(device, w, lane, rounds, profile) for w in works)
                        return {
                            "ms": default,
                            "with_sm_target_ms": told,
                            "gain": default / told - 1,
                        }

                    rows.append(attempt(fields, both))
    gains = {
        kernel: [row["gain"] for row in rows if row["kernel"] == kernel and "error" not in row]
        for kernel in ("cublas", "persistent")
    }
    said = [
        f"{kernel}: an SM-count target gives back {median(g):.1%}, at most {max(g):.1%}"
        for kernel, g in gains.items()
        if g
    ]
    if not said:
        raise CalibrationError("no kernel could be timed: " + rows[0]["error"])
    return {"verdict": "; ".join(said), "rows": rows}


def _ms(device: Device, work: Gemm, lane: Lane, rounds: int, profile: GpuProfile) -> float:
    return alone(device, (work,), lane, rounds, profile).ms
