# SPDX-License-Identifier: Apache-2.0
from vllm_duet.cli import main

main()
