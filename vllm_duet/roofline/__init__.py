# SPDX-License-Identifier: Apache-2.0
"""The attention-aware roofline: how long one step takes on S of a GPU's SMs, and why.

NumPy, and Numba for what a scheduler waits for. Nothing in this folder may import torch or vLLM.

    roofline = Roofline(ModelShape.from_hf_config(config), GpuProfile.load("h100-sxm"))
    roofline.predict(Batch(query_lens=[2048, 1], context_lens=[0, 900]), num_sms=132).ms
"""

from vllm_duet.roofline.correction import StepTimeCorrection
from vllm_duet.roofline.hardware import GpuProfile, ProfileError
from vllm_duet.roofline.hf_config import UnsupportedArchitectureError
from vllm_duet.roofline.layer_shapes import ExpertShape, LatentShape
from vllm_duet.roofline.model_shape import ModelShape
from vllm_duet.roofline.operators import Operator
from vllm_duet.roofline.predictor import (
    NO_ANCHORS,
    AnchorFactors,
    Batch,
    BatchSummary,
    LaneFactor,
    OperatorTime,
    PairPrediction,
    Prediction,
    Roofline,
)

__all__ = [
    "NO_ANCHORS",
    "AnchorFactors",
    "Batch",
    "BatchSummary",
    "ExpertShape",
    "GpuProfile",
    "LaneFactor",
    "LatentShape",
    "ModelShape",
    "Operator",
    "OperatorTime",
    "PairPrediction",
    "Prediction",
    "ProfileError",
    "Roofline",
    "StepTimeCorrection",
    "UnsupportedArchitectureError",
]
