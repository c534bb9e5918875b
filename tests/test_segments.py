"""Layouts become segments without a copy, and what is not a layout is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from din_fast import segments

B, L, D = 3, 4, 5

VIEWS = {
    "contiguous": lambda: torch.randn(B, L, D),
    "one feature of (B, F, L, D)": lambda: torch.randn(B, 2, L, D)[:, 1],
    "all but the last of (B, L+1, D)": lambda: torch.randn(B, L + 1, D)[:, :-1],
    "transposed (L, B, D)": lambda: torch.randn(L, B, D).transpose(0, 1),
    "columns of (B, L, 2D)": lambda: torch.randn(B, L, 2 * D)[..., D:],
    "every second row": lambda: torch.randn(B, 2 * L, D)[:, ::2],
}


def prepare(history: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None) -> segments.Segments:
    return segments.prepare(torch.randn(history.shape[0], history.shape[2]), history, mask, lengths)[0]


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_with_contiguous_rows_is_taken_as_it_is(view: str) -> None:
    history = VIEWS[view]()
    taken = prepare(history).history
    assert taken.data_ptr() == history.data_ptr() and taken.stride() == history.stride()


def test_rows_that_are_not_contiguous_are_copied() -> None:
    history = torch.randn(B, D, L).transpose(1, 2)
    taken = prepare(history).history
    assert taken.stride(-1) == 1 and torch.equal(taken, history)


def test_a_dense_call_builds_no_index_tensor() -> None:
    found = prepare(torch.randn(B, L, D))
    assert (found.starts, found.lengths, found.candidate_offsets, found.mask) == (None, None, None, None)
    assert segments.valid_positions(found) is None


def test_one_history_expanded_is_one_user_of_several_candidates() -> None:
    history = torch.randn(1, L, D).expand(B, L, D)
    found, query, shape = segments.prepare(torch.randn(B, D), history, None, torch.tensor([2]).expand(B))
    assert found.history.shape == (1, L, D) and found.history.data_ptr() == history.data_ptr()
    assert found.candidate_offsets is not None and found.candidate_offsets.tolist() == [0, B]
    assert found.lengths is not None and found.lengths.tolist() == [2] and query.shape == (B, D) and shape is None


def test_one_history_under_different_masks_is_not_shared() -> None:
    history = torch.randn(1, L, D).expand(B, L, D)
    found = prepare(history, None, torch.tensor([1, 2, 3]))
    assert found.history.shape == (B, L, D) and found.candidate_offsets is None


def test_candidates_of_each_user_are_a_group() -> None:
    found, query, shape = segments.prepare(torch.randn(B, 7, D), torch.randn(B, L, D), None, None)
    assert found.candidate_offsets is not None and found.candidate_offsets.tolist() == [0, 7, 14, 21]
    assert query.shape == (3 * 7, D) and shape == (B, 7)
    assert segments.user_of_candidates(found, query).tolist() == [0] * 7 + [1] * 7 + [2] * 7


def test_one_candidate_each_is_no_group() -> None:
    found, query, shape = segments.prepare(torch.randn(B, 1, D), torch.randn(B, L, D), None, None)
    assert found.candidate_offsets is None and query.shape == (B, D) and shape == (B, 1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_mask_and_lengths_must_both_hold(dtype: torch.dtype) -> None:
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)
    lengths = torch.tensor([3, 0, 4], dtype=dtype)
    history = torch.randn(B, L, D)
    valid = segments.valid_positions(prepare(history, mask, lengths))
    assert valid is not None
    assert valid.tolist() == [[True, False, True, False], [False] * 4, [False, False, False, True]]
    only_lengths = segments.valid_positions(prepare(history, None, lengths))
    assert only_lengths is not None and only_lengths.sum(1).tolist() == [3, 0, 4]


@pytest.mark.parametrize("bad", [[-1, 2, 3], [1, 2, 5], [-3, 9, 0]])
def test_length_values_beyond_the_history_are_refused(bad: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"lengths: expected values from 0 to {L}, got {min(bad)} to {max(bad)}"):
        segments.check_length_values(torch.tensor(bad), L)


def test_length_values_of_an_empty_batch_pass() -> None:
    segments.check_length_values(torch.zeros(0, dtype=torch.int64), L)
    segments.check_length_values(None, L)
