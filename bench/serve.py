"""Scoring many candidates for one user, whose history every framework has to expand: the case, its memory."""

from __future__ import annotations

from bench import memory
from bench.contenders import CANDIDATES, Case
from bench.contenders import shared_inputs as shared_inputs  # for those who know it by this module

SERVE = Case("rechub", 512, 1000, 64, (80, 40))
MODE = CANDIDATES


def megabytes(case: Case, provider: str) -> float:
    """By how much one forward of a case's candidates raises the peak of a fresh process; Linux only, else NaN."""
    return memory.megabytes(case, MODE, [provider], ["native"], threads=2)[provider]
