# SPDX-License-Identifier: Apache-2.0
import os

# The engine core runs in the test's own process, so tests can step it.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
