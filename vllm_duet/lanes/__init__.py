# SPDX-License-Identifier: Apache-2.0
"""Two lanes on one device: what runs where, and when its result may be taken."""

from vllm_duet.lanes.base import InFlight, LaneError, LanePair

__all__ = ["InFlight", "LaneError", "LanePair"]
