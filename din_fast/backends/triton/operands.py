"""The arguments of an op -> what the kernels take: padded, transposed, in tables; nothing is read from the device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from din_fast.backends.triton import DTYPES, tiling, tuned
from din_fast.backends.triton.arithmetic import PARAMETERS
from din_fast.fold import AFFINES
from din_fast.segments import Segments, check_segments
from din_fast.spec import KERNEL_ACTIVATIONS

OPTIONS = {"enable_fp_fusion": True}  # of every launch: a multiplication and an addition are one instruction
HALF = (torch.bfloat16, torch.float16)


def float32_precision() -> str:
    """How float32 products are made, as torch's own are: ``tf32`` or ``ieee``.

    Only the new settings are read: torch raises when the old ones (allow_tf32) are read after a new one was set.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" and torch.version.hip is None else "ieee"


def on_device(t: Tensor) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device: make it the tensor's."""
    return torch.cuda.device(t.device) if t.device.type == "cuda" else nullcontext()


def device_limits(device: torch.device) -> tiling.Limits:
    if device.type != "cuda":
        return tiling.Limits()
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:  # torch does not tell the memory there; all such GPUs have at least that
        return tiling.Limits(64 << 10, properties.gcnArchName.partition(":")[0])
    shared = getattr(properties, "shared_memory_per_block_optin", tiling.Limits().shared_memory)
    return tiling.Limits(shared, "sm_{}{}".format(*torch.cuda.get_device_capability(device)))


def has_matrix_unit(device: torch.device) -> bool:
    """Whether Triton uses the device's matrix unit: on NVIDIA GPUs from sm_80."""
    return device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


@triton.jit
def _square_kernel(x_ptr, y_ptr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.dot(x, x))


@cache
def _bfloat16_is_right() -> bool:
    """Triton's interpreter takes bfloat16 for 16-bit integers in products; our tests mend it."""
    x = torch.eye(16, dtype=torch.bfloat16) * 1.5
    y = torch.empty(16, 16)
    _square_kernel[(1,)](x, y)
    return torch.equal(y, x.float() @ x.float())


class Call:
    """One call: segments, folded weights and tables of parameters, ready for any kernel.

    Attributes:
        plan: the tiles. layers: how many. units: their widths. rows: in (rows, .) buffers.
        segments, query, first: the arguments that every kernel begins with.
        tables: (PARAMETERS, width) float32 of each layer; weights: each further layer's, transposed, (inputs, width),
            in the history's dtype.
        flags: compile-time constants that every kernel takes.
    """

    def __init__(
        self,
        segments: Segments,
        query: Tensor,
        weights: Sequence[Tensor],
        affine: Sequence[Tensor],
        activation: int,
        dice_eps: float,
        dropout: float,
        seed: Tensor | None,
    ) -> None:
        history, starts, lengths, candidate_offsets, mask = segments
        self.history, self.query, self.mask = history, query, mask
        self.starts, self.lengths, self.candidate_offsets = starts, lengths, candidate_offsets
        self.raw_weights, self.affine = weights, affine
        self.units = [int(b.shape[0]) for b in weights[3:-2:2]]
        self.layers = len(self.units)
        self.activation, self.eps = activation, dice_eps
        if history.dtype not in DTYPES:
            raise TypeError(f"history: expected float32, bfloat16 or float16, got {history.dtype}")
        if history.dtype == torch.bfloat16 and history.device.type == "cpu" and not _bfloat16_is_right():
            raise TypeError(
                "history: expected float32 or float16 in Triton's interpreter, whose bfloat16 is wrong; got bfloat16"
            )
        check_segments(segments, query, check_values_wanted(history.device))
        ragged = starts is not None
        self.dim = history.shape[-1]
        self.candidates = query.shape[0]
        self.users = history.shape[0] if starts is None else starts.shape[0]
        self.length = 0 if ragged else history.shape[1]
        self.rows = history.shape[0] if ragged else self.candidates * self.length
        half = history.dtype in HALF
        self.precision = "ieee" if half else float32_precision()
        self.row_dice = KERNEL_ACTIVATIONS[activation] == "dice_row"
        mean_length = tiling.ceil_div(history.shape[0], max(self.users, 1)) if ragged else self.length
        self.shape = tiling.Shape(
            self.candidates,
            max(mean_length, 1),
            self.dim,
            tuple(self.units),
            half,
            self.precision == "tf32",
            has_matrix_unit(history.device),
            ragged,
            self.row_dice,
            candidate_offsets is not None,
        )
        self.plan = tuned.plan(self.shape, device_limits(history.device), history.device)
        self.none = weights[-1]  # stands for a pointer that is not read
        self.bias = weights[-1].float().contiguous()  # and, behind it, the slope of a PReLU on the score
        self.random = self._random(dropout, seed)
        # A_q q + b1 of every candidate, and the matrices with the hidden units side by side.
        hp = self.padded_units(0)
        c = torch.addmm(weights[3].float(), query.float(), weights[0].float().t())
        self.c = _pad(c, hp)
        self.a_k, self.a_p = (_pad(weights[i].float().t(), hp) for i in (1, 2))
        self.tables = [self._table(i) for i in range(self.layers)]
        self.weights = [self._weight(i) for i in range(1, self.layers)]
        users = self.none if candidate_offsets is None else _user_of(candidate_offsets, self.candidates)
        self.segments = (
            history,
            self.none if starts is None else starts,
            self.none if lengths is None else lengths,
            self.none if mask is None else mask.view(torch.uint8),
            users,
            self.candidates,
            self.length,
            self.rows,
            0 if ragged else history.stride(0),
            history.stride(-2),
        )
        self.first = (query, query.stride(0), self.c, self.a_k, self.a_p, hp, self.dim, *self.random)
        self.flags: dict[str, Any] = {
            "RAGGED": ragged,
            "LENGTHS": lengths is not None and not ragged,
            "GROUPS": candidate_offsets is not None,
            "MASK": mask is not None,
        }
        self.unit_flags: dict[str, Any] = {
            "ACT": activation,
            "NORM": affine[1].numel() > 0,
            "PREC": self.precision,
            "FAST": half and history.device.type == "cuda" and torch.version.hip is None,
            "DROPOUT": dropout > 0.0,
        }

    def _random(self, dropout: float, seed: Tensor | None) -> tuple[Any, ...]:
        """Seed, bound and factor of the dropout, as arithmetic.py takes them; the seed stays on the device."""
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: expected a probability from 0 to below 1, got {dropout}")
        if dropout == 0.0:
            return self.none, 0, 1.0
        if seed is None or seed.dtype != torch.int64 or seed.dim() or seed.device != self.history.device:
            found = None if seed is None else f"{seed.dtype} of shape {tuple(seed.shape)} on {seed.device}"
            raise ValueError(f"seed: expected int64 of shape () on {self.history.device}, got {found}")
        return seed, int(dropout * 2**32), 1 / (1 - dropout)

    def padded_units(self, layer: int) -> int:
        return sum(self.plan.pieces[layer - 1]) if layer else tiling.padded(self.units[0])

    def _table(self, layer: int, answer: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The layer's parameters by row, as din_fast/backends/triton/arithmetic.py names them."""
        center, norm_scale, norm_shift, gate_scale, gate_shift, slope = (
            t.float() for t in self.affine[AFFINES * layer : AFFINES * (layer + 1)]
        )
        bias = self.raw_weights[2 * layer + 3].float()
        zero = torch.zeros_like(bias)
        score = self.raw_weights[-2].float() if layer == self.layers - 1 else zero
        e0, e1 = (zero, zero) if answer is None else answer
        rows = [bias, center, norm_scale, norm_shift, gate_scale, gate_shift, slope, score, e0, e1]
        assert len(rows) == PARAMETERS
        return _pad(torch.stack([r if r.numel() else zero for r in rows]), self.padded_units(layer))

    def with_answer(self, layer: int, response: Tensor, sums: Tensor) -> None:
        """Put into a layer's table how its batch statistics answer: dz -= e0 + e1 (z - center)."""
        e = (response * sums[:4].unsqueeze(0)).sum(1).float()
        self.tables[layer] = self._table(layer, (e[0], e[1]))

    def _weight(self, layer: int) -> Tensor:
        w = self.raw_weights[2 * layer + 2].t().to(self.history.dtype)
        rows, columns = self.padded_units(layer - 1), self.padded_units(layer)
        return F.pad(w, (0, columns - w.shape[1], 0, rows - w.shape[0])).contiguous()

    def network(self, kept: dict[int, Tensor]) -> tuple[Any, ...]:
        """Tables, weights and widths of the layers, the eps of Dice, and the z of the second and third layer."""
        none = self.none

        def layer(i: int) -> tuple[Any, ...]:
            return (self.weights[i - 1], self.tables[i], self.units[i]) if i < self.layers else (none, none, 1)

        z = tuple(kept.get(i, none) for i in (1, 2))
        third = self.padded_units(2) if self.layers > 2 else 16
        return (self.tables[0], self.units[0], *layer(1), *layer(2), third, self.eps, *z)

    @property
    def second(self) -> tuple[int, int]:
        """The second layer's width in pieces; any where there is none."""
        return self.plan.pieces[0] if self.plan.pieces else (16, 0)

    def tile_flags(self, tile: tiling.Tile) -> dict[str, Any]:
        return {
            "BC": tile.candidates,
            "LP": tile.positions,
            "BH": tile.units,
            "BD": tile.columns,
            "WIDE": tile.wide,
            "num_warps": tile.warps,
            "num_stages": 1,
            **OPTIONS,
        }

    def blocks(self, tile: tiling.Tile) -> int:
        return tiling.ceil_div(self.candidates, tile.candidates)

    def empty_rows(self, columns: int, pads_are_input: bool) -> Tensor:
        """(rows, columns); zeros where there are rows that no kernel goes through."""
        left_out = self.starts is not None or (
            not pads_are_input and (self.mask is not None or self.lengths is not None)
        )
        t = self.empty(self.rows, columns)
        return t.zero_() if left_out else t

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.history.device)


def _pad(t: Tensor, columns: int) -> Tensor:
    return F.pad(t, (0, columns - t.shape[-1])).contiguous()


def _user_of(offsets: Tensor, candidates: int) -> Tensor:
    """(C,) the user of each candidate, from (users + 1,) offsets."""
    c = torch.arange(candidates, device=offsets.device)
    return (torch.searchsorted(offsets, c, right=True) - 1).clamp(0, offsets.shape[0] - 2)


def check_values_wanted(device: torch.device) -> bool:
    """Whether lengths, starts and offsets are read: always where that costs no synchronisation."""
    return device.type == "cpu" or os.environ.get("DIN_FAST_CHECK", "0") not in ("", "0")
