# SPDX-License-Identifier: Apache-2.0
"""What is measured, as lists of steps: rates, contention and the synthetic duet.

A step is one split of the SMs, or the whole GPU. Steps are in an order such that
those done so far cover the range of splits evenly, wherever time runs out.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vllm_duet.calibration.device import Device, DeviceInfo, Lane, Lanes
from vllm_duet.calibration.measure import alone, beside, runs_for
from vllm_duet.calibration.work import (
    PRODUCTS,
    PagedAttention,
    Stream,
    Work,
    amounts,
    gemm,
    layer,
    predicted_ms,
    to_json,
)
from vllm_duet.roofline import GpuProfile

Record = dict[str, Any]

FITTED_ROWS = (1, 16, 64, 128, 256, 512, 2048, 8192)
"""Tokens of decode steps, of prefill chunks, and of a large prefill."""
HELD_OUT_ROWS = (32, 192, 1024)
"""Measured and never fitted: what a forecast of them is off by is the profile's error."""
MAX_SAMPLED_ROWS = 256
"""The lm_head sees a row of each request, not of each token."""

READ = Stream("read", 2**30)
COPY = Stream("copy", 2**30)
ATTENTION = PagedAttention(batch=64, context_len=2048)
FEW_LONG_CONTEXTS = PagedAttention(batch=8, context_len=8192)
HELD_OUT_ATTENTION = PagedAttention(batch=128, context_len=1024)

DUET_LAYERS = 4
CHUNK_TOKENS = 2048

PREPARE_S = 0.012
"""Assumption: checking, warming up and capturing one work."""
SPLIT_S = 0.05
"""Assumption: creating a split and its streams."""


@dataclass(frozen=True)
class Step:
    """One thing to run. ``flops``, ``bytes`` and ``gpu_ms`` are forecast for one round."""

    group: str
    name: str
    flops: float
    bytes: float
    gpu_ms: float
    setup_s: float
    run: Callable[[Device, int], list[Record]]

    def seconds(self, rounds: int) -> float:
        """How long it takes, roughly: two more launches warm up and check."""
        return self.setup_s + self.gpu_ms * (rounds + 2) / 1e3


def attempt(fields: Record, measure: Callable[..., Record], *arguments: Any) -> Record:
    """What ``measure`` returns beside ``fields``, or its error: the next may still work."""
    try:
        return fields | measure(*arguments)
    except Exception:
        return fields | {"error": traceback.format_exc(limit=8)}


def coarse_first(values: Sequence[int]) -> list[int]:
    """Both ends, the middle, the quarters, ...: every prefix covers the range."""
    ordered, pending = [*values[:1], *values[1:][-1:]], [(0, len(values) - 1)]
    for low, high in pending:  # Grows while it is walked: breadth first.
        middle = (low + high) // 2
        if low < middle:
            ordered.append(values[middle])
            pending += [(low, middle), (middle, high)]
    return ordered


def gemms(rows: Sequence[int]) -> list[Work]:
    """The products of SHAPE at each number of rows that they have in practice."""
    return [
        gemm(name, m)
        for name in PRODUCTS
        for m in rows
        if name != "lm_head" or m <= MAX_SAMPLED_ROWS
    ]


def compute(info: DeviceInfo, profile: GpuProfile, rows: Sequence[int] | None = None) -> list[Step]:
    """C(S): bf16 products alone on every group size that one split offers."""
    works = gemms(FITTED_ROWS + HELD_OUT_ROWS if rows is None else rows)
    return list(_each_alone("compute", info, profile, works))


def bandwidth(info: DeviceInfo, profile: GpuProfile) -> list[Step]:
    """B(S): plain reads and copies beyond the L2 cache, and paged decode attention."""
    works: list[Work] = [READ, COPY, ATTENTION, FEW_LONG_CONTEXTS, HELD_OUT_ATTENTION]
    return list(_each_alone("bandwidth", info, profile, works))


def contention(info: DeviceInfo, profile: GpuProfile) -> list[Step]:
    """How much a lane that wants bandwidth and a lane of products slow each other."""
    prefill = gemm("gate_up", CHUNK_TOKENS)
    pairs: list[tuple[Work, Work]] = [
        (ATTENTION, prefill),
        (READ, prefill),
        (gemm("gate_up", 64), prefill),
        (READ, READ),
    ]
    steps = []
    for sms in coarse_first(info.splits):

        def run(device: Device, rounds: int, sms: int = sms) -> list[Record]:
            with device.split(sms) as lanes:
                return [
                    _pair_record("contention", device, (d,), (p,), lanes, rounds, profile)
                    for d, p in pairs
                ]

        steps.append(
            _pair_step("contention", info, profile, sms, [((d,), (p,)) for d, p in pairs], run)
        )
    return steps


def duet(info: DeviceInfo, profile: GpuProfile) -> list[Step]:
    """The synthetic duet: layers of a decode step, captured, beside the products of a
    prefill chunk; against both in one batch, and one after the other.

    This bounds what splitting can give on the GPU: it has no prefill attention, no
    scheduling, and prompts that never run out.
    """
    decode = layer(ATTENTION.batch, ATTENTION) * DUET_LAYERS
    prefill = layer(CHUNK_TOKENS) * DUET_LAYERS
    mixed = layer(ATTENTION.batch + CHUNK_TOKENS, ATTENTION) * DUET_LAYERS

    def run_whole(device: Device, rounds: int) -> list[Record]:
        lane = device.whole()
        return [
            attempt(
                {"group": "duet", "lane": "whole", "num_sms": info.num_sms, "what": what},
                *(_alone_record, device, works, lane, rounds, profile),
            )
            for what, works in (("decode", decode), ("prefill", prefill), ("mixed", mixed))
        ]

    whole_ms = sum(predicted_ms(profile, w, info.num_sms) for w in (decode, prefill, mixed))
    flops, moved = amounts(decode + prefill + mixed)
    steps = [Step("duet", "whole GPU", flops, moved, whole_ms, 16 * PREPARE_S, run_whole)]
    for sms in coarse_first(info.splits):

        def run(device: Device, rounds: int, sms: int = sms) -> list[Record]:
            with device.split(sms) as lanes:
                return [
                    _pair_record(
                        "duet",
                        device,
                        decode,
                        prefill,
                        lanes,
                        rounds,
                        profile,
                        captured_prefill=False,
                    )
                ]

        steps.append(_pair_step("duet", info, profile, sms, [(decode, prefill)], run))
    return steps


def _each_alone(
    group: str, info: DeviceInfo, profile: GpuProfile, works: Sequence[Work]
) -> Iterator[Step]:
    def timed(device: Device, lane_name: str, lane: Lane, sms: int, rounds: int) -> list[Record]:
        return [
            attempt(
                {
                    "group": group,
                    "split": sms,
                    "lane": lane_name,
                    "num_sms": lane.num_sms,
                    "work": to_json(work),
                    "held_out": work == HELD_OUT_ATTENTION or work.rows in HELD_OUT_ROWS,
                },
                *(_alone_record, device, (work,), lane, rounds, profile),
            )
            for work in works
        ]

    def step(name: str, sizes: Sequence[int], run: Callable[[Device, int], list[Record]]) -> Step:
        flops, moved = amounts(works)
        return Step(
            group,
            name,
            len(sizes) * flops,
            len(sizes) * moved,
            sum(_launch_ms(profile, (work,), size) for work in works for size in sizes),
            SPLIT_S + len(works) * len(sizes) * PREPARE_S,
            run,
        )

    def whole(name: str) -> Step:
        return step(
            name,
            [info.num_sms],
            lambda device, rounds: timed(device, "whole", device.whole(), info.num_sms, rounds),
        )

    yield whole("whole GPU")
    for sms in coarse_first(info.splits):

        def run(device: Device, rounds: int, sms: int = sms) -> list[Record]:
            with device.split(sms) as lanes:
                return timed(device, "decode", lanes.decode, sms, rounds) + timed(
                    device, "prefill", lanes.prefill, sms, rounds
                )

        yield step(f"{sms} + {info.num_sms - sms} SMs", [sms, info.num_sms - sms], run)
    # A GPU that has grown warm, and slower, since then shows between the two.
    yield whole("whole GPU again")


def _alone_record(
    device: Device, works: Sequence[Work], lane: Lane, rounds: int, profile: GpuProfile
) -> Record:
    return asdict(alone(device, works, lane, rounds, profile))


def _launch_ms(profile: GpuProfile, works: Sequence[Work], num_sms: int) -> float:
    return runs_for(profile, works, num_sms) * predicted_ms(profile, works, num_sms)


def _pair_step(
    group: str,
    info: DeviceInfo,
    profile: GpuProfile,
    sms: int,
    pairs: Sequence[tuple[Sequence[Work], Sequence[Work]]],
    run: Callable[[Device, int], list[Record]],
) -> Step:
    rest = info.num_sms - sms
    ms = 0.0
    for decode, prefill in pairs:
        each = _launch_ms(profile, decode, sms), _launch_ms(profile, prefill, rest)
        # Alone first, then both for half as long again.
        ms += sum(each) + 1.5 * max(each)
    works = [work for pair in pairs for side in pair for work in side]
    flops, moved = amounts(works)
    setup_s = SPLIT_S + 2 * len(works) * PREPARE_S
    return Step(group, f"{sms} + {rest} SMs", flops, moved, ms, setup_s, run)


def _pair_record(
    group: str,
    device: Device,
    decode: Sequence[Work],
    prefill: Sequence[Work],
    lanes: Lanes,
    rounds: int,
    profile: GpuProfile,
    **options: bool,
) -> Record:
    def measure() -> Record:
        return asdict(beside(device, decode, prefill, lanes, rounds, profile, **options))

    return attempt(
        {
            "group": group,
            "decode_sms": lanes.decode.num_sms,
            "prefill_sms": lanes.prefill.num_sms,
            "separate_work_queues": lanes.separate_work_queues,
            "decode_works": [to_json(work) for work in decode],
            "prefill_works": [to_json(work) for work in prefill],
        },
        measure,
    )


def duet_summary(records: Sequence[Record]) -> Record | None:
    """What the duet gives at each split, against one batch and one after the other.

    ``weighted_speedup`` adds up both lanes' rates in units of their rate alone on the
    whole GPU (Eyerman and Eeckhout, IEEE Micro 2008): in turn it is 1. ``tbt_ms`` is of
    DUET_LAYERS layers. None where the whole GPU was not measured.
    """
    whole = {r["what"]: r["ms"] for r in records if r["group"] == "duet" and "what" in r}
    if set(whole) != {"decode", "prefill", "mixed"}:
        return None
    in_turn_ms = whole["decode"] + whole["prefill"]
    splits = [
        {
            "decode_sms": r["decode_sms"],
            "tbt_ms": r["decode"]["ms"],
            "max_tbt_ms": r["decode"]["max_ms"],
            "prefill_ms": r["prefill"]["ms"],
            "decode_tokens_per_s": 1e3 * ATTENTION.batch / r["decode"]["ms"],
            "prefill_tokens_per_s": 1e3 * CHUNK_TOKENS / r["prefill"]["ms"],
            "weighted_speedup": whole["decode"] / r["decode"]["ms"]
            + whole["prefill"] / r["prefill"]["ms"],
        }
        for r in sorted(
            (r for r in records if r["group"] == "duet" and "decode_sms" in r),
            key=lambda r: r["decode_sms"],
        )
    ]
    return {
        "layers": DUET_LAYERS,
        "in_turn": {"tbt_ms": in_turn_ms, "weighted_speedup": 1.0},
        "mixed": {"tbt_ms": whole["mixed"], "weighted_speedup": in_turn_ms / whole["mixed"]},
        "splits": splits,
    }
