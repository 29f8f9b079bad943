"""float32 means float32, and setting it breaks nothing else."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import warnings
warnings.simplefilter("error")
import torch
from simmatch.precision import exact_float32
exact_float32()
assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # as torch.export does
    pass
"""


def test_no_tf32_and_cudnn_flags_still_work() -> None:
    """In a separate process, because the settings are those of a whole process."""
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=60)
