"""Tests of the Triton kernels on a CPU, in Triton's interpreter: a run of its own, with TRITON_INTERPRET=1 set."""

from __future__ import annotations

import os

collect_ignore_glob: list[str] = []

if os.environ.get("TRITON_INTERPRET") == "1":
    import torch

    from tests.interpreter import honest

    honest.install()
    # torch.empty is NaN: what a kernel leaves unwritten shows.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
else:
    collect_ignore_glob.append("test_*.py")
