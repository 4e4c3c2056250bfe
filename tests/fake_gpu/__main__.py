# SPDX-License-Identifier: Apache-2.0
"""Run a command on the fake GPU, as if this machine had one.

    VENV/bin/python tests/fake_gpu LIBRARY COMMAND...

``LIBRARY`` is what build.py wrote. The FAKECUDA_* variables of README.md are passed on.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from fake_gpu import environment

library, *command = sys.argv[1:]
variables = environment(Path(sys.prefix), Path(library))
variables |= {k: v for k, v in os.environ.items() if k.startswith("FAKECUDA_")}
os.execvpe(command[0], command, variables)
