"""Registration with torch.library, and nothing else: fake kernels and autograd of the ops that a backend defines.

A backend ``name`` has five ops, native two more, on segments (:mod:`din_fast.segments`) and folded parameters
(:mod:`din_fast.fold`):

``{name}_moments``           mean and M2 of a hidden layer's z over all rows, and z itself where it is kept
``{name}_forward``           pooled vectors and weights of the positions
``{name}_backward_moments``  one pass of the backward down to a layer with batch statistics: the sums that they need
``{name}_backward``          the last pass, down to the inputs
``{name}_infer``             evaluation without gradient, from the raw parameters
``native_train``             moments and forward in one op, from the raw parameters
``native_train_backward``    all passes of the backward in one op, to the raw parameters

Arguments of the first four, beside the segments:

weights    A_q, A_k, A_p (H1, D), b1; (W, b) of each further hidden layer; the score's weight (H,) and bias (1,), or,
           with a PReLU on the score, bias and slope (2,)
affine     six a hidden layer, (H,) or empty: center, norm_scale, norm_shift, gate_scale, gate_shift, slope
response   one a hidden layer, (2, 4, H) float64, or empty where the layer has no batch statistics
kept       one a hidden layer: z in the backend's own layout, or empty where it is computed again
sums       one a hidden layer, (5, H) float64, or empty while unknown: dn (z - center), dn, dx (z - center), dx, d slope
local      what one pass of the backward leaves to the next: d score, and dz of a layer without its statistics' answer
(Lists hold tensors only: torch.library gives no gradient to a list with a None in it. Absent is empty.)

scores     weights of the positions (candidates, L); with a PReLU on the score, the scores before it, 0 where masked
pooled     (candidates, D); (candidates, 0) where the pooling is `none`
seed       int64, 0-d: of the dropout; which activation is dropped depends on it and on where it is alone
           (:func:`din_fast.reference.dropout_factors`), so each pass finds it again
pads_are_input  whether padded positions are rows of the batch statistics; else they take no part in anything

values, candidate_matrix, window_offsets: not built yet; anything but None raises
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from din_fast.backends import native, triton
from din_fast.distributed import add_up
from din_fast.fold import AFFINES, FIELDS, NUMBERS, SUMS
from din_fast.spec import POOLINGS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Groups = Sequence["ProcessGroup | None"]
PANEL_ROWS = 16  # kept rows of a candidate are rounded up to this, csrc/unit.h


# A context in which ops are called past their autograd kernels: see `call`, which checks what may be traced.
below_autograd = torch._C._AutoDispatchBelowAutograd


def op(backend: str, name: str) -> Any:
    """The op ``{backend}_{name}``, ready to call."""
    return getattr(torch.ops.din_fast, f"{backend}_{name}").default


def call(backend: str, name: str, *arguments: Any) -> list[Tensor]:
    """Call an op where no gradient goes through it.

    The autograd kernel of an op is Python, and going through it costs more than a small batch takes; torch.compile has
    to see it.
    """
    return (_run if torch.compiler.is_compiling() else _below_autograd)(backend, name, *arguments)


def _below_autograd(backend: str, name: str, *arguments: Any) -> list[Tensor]:
    with below_autograd():
        return _run(backend, name, *arguments)


def _run(backend: str, name: str, *arguments: Any) -> list[Tensor]:
    """The op; lengths that it finds out of range are a ValueError, as every other bad value."""
    try:
        result: list[Tensor] = op(backend, name)(*arguments)
    except RuntimeError as error:
        line = str(error).partition("\n")[0]  # torch puts the place in the C++ source in front of what is wrong
        start = line.find("lengths: ")
        if start < 0:
            raise
        raise ValueError(line[start:]) from None
    return result


def kept_rows(backend: str, history: Tensor, starts: Tensor | None, lengths: Tensor | None, query: Tensor) -> int:
    """Rows of the buffers that a backend keeps something of every position in."""
    if backend == "native":
        return panel_rows(query.shape[0], history, starts, lengths)
    return history.shape[0] if starts is not None else query.shape[0] * history.shape[1]


def panel_rows(candidates: int, history: Tensor, starts: Tensor | None, lengths: Tensor | None) -> int:
    """Rows that the panels of all candidates hold together."""
    if starts is None:
        return candidates * ((history.shape[1] + PANEL_ROWS - 1) // PANEL_ROWS * PANEL_ROWS)
    assert lengths is not None
    return int(((lengths + PANEL_ROWS - 1) // PANEL_ROWS * PANEL_ROWS).sum())


def _units(weights: Sequence[Tensor]) -> list[int]:
    return [int(b.shape[0]) for b in weights[3:-2:2]]


def _fake_moments(backend: str, *arguments: Any) -> list[Tensor]:
    history, starts, lengths, _, _, query, weights, _, _, _, layer, keep, *_ = arguments
    units = _units(weights)[layer]
    keep = keep and (layer > 0 or backend == "native")  # on a GPU z of the first layer is made again
    size = kept_rows(backend, history, starts, lengths, query) * units if keep else 0
    count = history.new_empty((), dtype=torch.float64)
    return [count, *(history.new_empty(n, dtype=_wide(history)) for n in (units, units, size))]


def _fake_forward(backend: str, *arguments: Any) -> list[Tensor]:
    history, starts, lengths, _, _, query, weights, _, _, kept = arguments[:10]
    size = 0
    if backend == "triton":  # z of the layers after the first, where the moments have not kept it
        units = _units(weights)
        missing = (n for i, n in enumerate(units) if i and not (i < len(kept) and kept[i].numel()))
        size = kept_rows(backend, history, starts, lengths, query) * sum(missing)
    return [*_fake_results(backend, "forward", arguments), history.new_empty(size, dtype=_wide(history))]


def _fake_infer(backend: str, *arguments: Any) -> list[Tensor]:
    return _fake_results(backend, "infer", arguments)


def _fake_results(backend: str, name: str, arguments: Sequence[Any]) -> list[Tensor]:
    """Pooled vectors and scores."""
    history, starts, query = arguments[0], arguments[1], arguments[5]
    shape = history.shape[:-1] if starts is not None else (query.shape[0], history.shape[1])
    pooling = arguments[[a.name for a in op(backend, name)._schema.arguments].index("pooling")]
    pooled = query.shape if POOLINGS[pooling] != "none" else (query.shape[0], 0)
    return [history.new_empty(pooled), history.new_empty(shape, dtype=_wide(history))]


def _wide(history: Tensor) -> torch.dtype:
    """What half types are widened to, within an op and in all that it gives but the pooled vectors."""
    return torch.promote_types(history.dtype, torch.float32)


def _fake_backward_pass(
    backend: str,
    common: Sequence[Any],
    from_layer: int,
    to: int,
    need_history: bool,
    need_query: bool,
    need_weights: bool,
) -> list[Tensor]:
    _, _, history, starts, lengths, _, _, query, weights, _, _, _, _, sums, local, *_ = common
    units = _units(weights)
    layers, wide = len(units), _wide(history)

    def empty(*shape: int, dtype: torch.dtype = wide) -> Tensor:
        return history.new_empty(shape, dtype=dtype)

    out = [empty(0) for _ in range(2 + len(weights) + layers + 2)]
    rows = kept_rows(backend, history, starts, lengths, query)
    first_sum = 2 + len(weights)
    if not local:
        out[-2] = empty(rows)
        if need_weights:
            out[first_sum - 2] = empty(units[-1])
            out[first_sum - 1] = empty(*weights[-1].shape)
    if backend == "native":
        if 0 <= to < layers - 1:
            out[-1] = empty(rows * units[to])
    elif to >= 0:  # the lowest layer but the first
        reached = max(to, 1)
        if reached < (from_layer if local else layers):
            out[-1] = empty(rows * units[reached])
    for i in range(from_layer, max(to, 0) - 1, -1):
        if sums[i].numel() == 0 and (backend == "native" or i == to or need_weights):
            out[first_sum + i] = empty(SUMS, units[i], dtype=torch.float64)
        if i != to and need_weights:
            if i:
                out[2 + 2 * i + 2] = empty(*weights[2 * i + 2].shape)
            out[2 + 2 * i + 3] = empty(units[i])
    if to < 0:
        if need_weights:
            for i in range(3):
                out[2 + i] = empty(*weights[i].shape)
        if need_query:
            out[1] = history.new_empty(query.shape)
        if need_history:
            out[0] = history.new_empty(history.shape)
    return out


def _fake_backward_moments(backend: str, *arguments: Any) -> list[Tensor]:
    from_layer, layer, need_weights = arguments[18:21]
    return _fake_backward_pass(backend, arguments[:18], from_layer, layer, False, False, need_weights)


def _fake_backward(backend: str, *arguments: Any) -> list[Tensor]:
    from_layer, need_history, need_query, need_weights = arguments[18:22]
    return _fake_backward_pass(backend, arguments[:18], from_layer, -1, need_history, need_query, need_weights)


def _fake_train(*arguments: Any) -> list[Tensor]:
    history, starts, lengths, _, _, query, parameters, _, _, modes = arguments[:10]
    keep_bytes = arguments[-1]
    wide, layers = _wide(history), max(len(parameters) // FIELDS, 1)
    units = [parameters[FIELDS * i].shape[0] for i in range(layers)]
    rows = kept_rows("native", history, starts, lengths, query)
    kept = []
    for i, n in enumerate(units):
        size = rows * n if 2 in modes[2 * i : 2 * i + 2] else 0
        keep = size * wide.itemsize <= keep_bytes
        keep_bytes -= size * wide.itemsize if keep else 0
        kept.append(history.new_empty(size if keep else 0, dtype=wide))
    numbers = 3 * units[0] * query.shape[1] + units[-1] + NUMBERS * sum(units)
    return [
        *_fake_results("native", "train", arguments),
        history.new_empty(numbers, dtype=wide),
        history.new_empty(sum(1 + 8 * n for n in units), dtype=torch.float64),
        *kept,
    ]


def _fake_train_backward(*arguments: Any) -> list[Tensor]:
    history, query, parameters = arguments[2], arguments[7], arguments[8]
    need_history, need_query, need_weights = arguments[-3:]
    wide = _wide(history)
    out = [history.new_empty(t.shape if need else 0) for t, need in ((history, need_history), (query, need_query))]
    # Of a norm: no gradient of its running statistics. Without a hidden layer there are only the Linear's.
    hidden = FIELDS * (len(parameters) // FIELDS)
    for i, t in enumerate(parameters):
        wanted = need_weights and t is not None and not (i < hidden and i % FIELDS in (4, 5, 8, 9))
        out.append(history.new_empty(t.shape if wanted else 0, dtype=wide))
    return out


@cache
def _train_function() -> type[torch.autograd.Function]:
    """``native_train`` with its gradient: of history, query and the raw parameters."""

    class Train(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, numbers: tuple[Any, ...], keep_bytes: int, state: list[Tensor], *tensors: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            pooled, scores, *left = call("native", "train", *tensors[:6], list(tensors[6:]), *numbers, keep_bytes)
            state.extend(left[:2])
            ctx.numbers, ctx.parameters = numbers, len(tensors) - 6
            ctx.save_for_backward(*tensors, scores, *left)
            ctx.set_materialize_grads(False)
            return pooled, scores

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            first = 3  # arguments before the tensors
            last = 6 + ctx.parameters
            saved = ctx.saved_tensors
            out: list[Any] = [None] * (first + last)
            if grads[0] is None and grads[1] is None:
                return tuple(out)
            needs = ctx.needs_input_grad[first:]
            segments, parameters, (scores, numbers, statistics, *kept) = saved[:6], saved[6:last], saved[last:]
            arguments = (*grads, *segments, list(parameters), *ctx.numbers, scores, numbers, statistics, kept)
            wanted = needs[0], needs[5], any(needs[6:])
            # Where a gradient of the gradient is wanted: the op's own error.
            run = _run if torch.is_grad_enabled() else call
            found = run("native", "train_backward", *arguments, *wanted)
            for at, t in zip((0, 5, *range(6, last)), found, strict=True):
                if needs[at]:
                    out[first + at] = t
            return tuple(out)

    return Train


def train(numbers: tuple[Any, ...], keep_bytes: int, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op ``native_train`` on the segments and the parameters: pooled, scores, numbers, statistics."""
    state: list[Tensor] = []
    pooled, scores = _train_function().apply(numbers, keep_bytes, state, *tensors)
    return pooled, scores, *state


@cache
def _forward_function(backend: str) -> type[torch.autograd.Function]:
    """``forward`` with its gradient.

    ``torch.library.register_autograd`` would do, but flattening lists of tensors through pytree costs it more than a
    small batch takes: here the lists are flattened by hand.
    """

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, counts: list[int], rest: tuple[Any, ...], groups: Groups, *tensors: Tensor | None
        ) -> tuple[Tensor, ...]:
            lists = _split(tensors[6:], counts)
            pooled, scores, kept = _below_autograd(backend, "forward", *tensors[:6], *lists, *rest)
            ctx.counts, ctx.rest, ctx.groups = counts, rest, groups
            ctx.save_for_backward(*tensors, scores, kept)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(kept)
            return pooled, scores, kept

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            *tensors, scores, new_kept = ctx.saved_tensors
            first = 3  # arguments before the tensors
            out: list[Any] = [None] * (first + len(tensors))
            if grads[0] is None and grads[1] is None:
                return tuple(out)
            weights, affine, response, kept = _split(tensors[6:], ctx.counts)
            kept = _with_new(kept, new_kept, _units(weights))
            needs = ctx.needs_input_grad[first:]
            first_weight = 6
            first_affine = first_weight + len(weights)
            need_weights = any(needs[first_weight : first_affine + len(affine)])
            need_history, need_query = needs[0], needs[5]
            arguments = (grads[0], grads[1], *tensors[:6], weights, affine, response, kept, scores)
            d_history, d_query, d_weights, sums = _all_passes(
                backend, arguments, ctx.rest, ctx.groups, need_history, need_query, need_weights
            )
            out[first] = d_history if need_history else None
            out[first + 5] = d_query if need_query else None
            if need_weights:
                out[first + first_weight : first + first_affine] = d_weights
                for i in range(len(response)):
                    # The center is a constant, the others have their sum.
                    for j, row in enumerate(sums[i].to(weights[0].dtype).unbind(), start=AFFINES * i + 1):
                        out[first + first_affine + j] = row if affine[j].numel() else None
            return tuple(out)

    return Forward


def _forward_with_autograd(backend: str, groups: Groups, *arguments: Any) -> list[Tensor]:
    """The Autograd kernel of ``forward``."""
    segments, lists, rest = arguments[:6], arguments[6:10], arguments[10:]
    flat = (t for x in lists for t in x)
    return list(_forward_function(backend).apply([len(x) for x in lists], rest, groups, *segments, *flat))


def forward(backend: str, groups: Groups, *arguments: Any) -> list[Tensor]:
    """The op ``forward``; ``groups`` are the processes that share the statistics of each layer, None for this one."""
    if torch.compiler.is_compiling() and all(group is None for group in groups):  # no op can take groups
        return _run(backend, "forward", *arguments)
    return _forward_with_autograd(backend, groups, *arguments)


def _split(tensors: Sequence[Any], counts: list[int]) -> list[list[Any]]:
    lists, start = [], 0
    for count in counts:
        lists.append(list(tensors[start : start + count]))
        start += count
    return lists


def _with_new(kept: list[Tensor], new: Tensor, units: list[int]) -> list[Tensor]:
    """What the moments have kept, and what forward has besides: z of the other layers but the first, side by side."""
    if new.numel() == 0:
        return kept
    kept = kept + [new.new_empty(0)] * (len(units) - len(kept))
    missing = [i for i in range(1, len(units)) if kept[i].numel() == 0]
    rows = new.numel() // sum(units[i] for i in missing)
    parts = dict(zip(missing, new.split([rows * units[i] for i in missing]), strict=True))
    return [parts.get(i, t) for i, t in enumerate(kept)]


def _all_passes(
    backend: str,
    arguments: tuple[Any, ...],
    rest: tuple[Any, ...],
    groups: Groups,
    need_history: bool,
    need_query: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, list[Tensor | None], list[Tensor]]:
    """The passes of the backward: one for each layer with batch statistics, from the last, and one to the inputs.

    The sums that are given back are this process's, as every gradient of a parameter is; those that go into the next
    pass are of all processes that share the statistics.
    """
    weights, response = arguments[8], arguments[10]
    layers = len(response)
    reserved, numbers = rest[:3], rest[3:]
    sums = [arguments[2].new_empty(0, dtype=torch.float64)] * layers
    mine = list(sums)
    local: list[Tensor] = []
    d_weights: list[Tensor | None] = [None] * len(weights)
    first_sum, top = 2 + len(weights), layers - 1

    def run(name: str, *more: Any) -> list[Tensor]:
        # Where a gradient of the gradient is wanted: the op's own error.
        go = _run if torch.is_grad_enabled() else call
        return go(backend, name, *arguments, sums, local, *reserved, top, *more, *numbers)

    def take(out: list[Tensor]) -> None:
        for i, t in enumerate(out[2:first_sum]):
            if t.numel():
                d_weights[i] = t
        for i, t in enumerate(out[first_sum:-2]):
            if t.numel():
                mine[i], sums[i] = t, add_up(t, groups[i] if groups else None)

    for layer in range(layers - 1, -1, -1):
        if response[layer].numel() == 0:
            continue
        out = run("backward_moments", layer, need_weights)
        take(out)
        # A backend that keeps d z of another layer gives none where the pass before has given it already.
        local = [local[0], out[-1] if out[-1].numel() else local[1]] if local else out[-2:]
        top = layer
    out = run("backward", need_history, need_query, need_weights)
    take(out)
    return out[0], out[1], d_weights, mine


def _no_setup(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _no_gradient(what: str) -> Any:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"din_fast: {what}")

    return backward


def register(backend: str) -> None:
    """Fake kernels and autograd for the ops that a backend has defined."""
    names: dict[str, tuple[Callable[..., Any], str]] = {
        "moments": (_fake_moments, "the moments have no gradient of their own; forward's backward holds it"),
        "backward_moments": (_fake_backward_moments, "the gradient of a gradient is not implemented"),
        "backward": (_fake_backward, "the gradient of a gradient is not implemented"),
        "infer": (_fake_infer, "infer is for calls without gradient; use forward"),
    }
    torch.library.register_fake(f"din_fast::{backend}_forward", partial(_fake_forward, backend))
    torch.library.impl(f"din_fast::{backend}_forward", "Autograd")(partial(_forward_with_autograd, backend, ()))
    for name, (fake, message) in names.items():
        torch.library.register_fake(f"din_fast::{backend}_{name}", partial(fake, backend))
        torch.library.register_autograd(f"din_fast::{backend}_{name}", _no_gradient(message), setup_context=_no_setup)


# The schemas, as csrc/ops.cpp has them for the native backend.
_SEGMENTS = "Tensor history, Tensor? starts, Tensor? lengths, Tensor? candidate_offsets, Tensor? mask, Tensor query"
_ABSENT = "Tensor? values, Tensor? candidate_matrix, Tensor? window_offsets"
_LISTS = "Tensor[] weights, Tensor[] affine, Tensor[] response, Tensor[] kept"
_SCORE = "int score_activation, bool softmax, int empty, int pooling"
_NUMBERS = f"int activation, float dice_eps, bool pads_are_input, {_SCORE}, float dropout, Tensor? seed"
_PASS = f"{_LISTS}, Tensor scores, Tensor[] sums, Tensor[] local, {_ABSENT}, int from_layer"
_GRADIENTS = "Tensor? grad_pooled, Tensor? grad_scores"
SCHEMAS = {
    "moments": f"({_SEGMENTS}, Tensor[] weights, Tensor[] affine, Tensor[] kept, Tensor? candidate_matrix, int layer, "
    "bool keep, int activation, float dice_eps, bool pads_are_input, float dropout, Tensor? seed) -> Tensor[]",
    "forward": f"({_SEGMENTS}, {_LISTS}, {_ABSENT}, {_NUMBERS}) -> Tensor[]",
    "backward_moments": f"({_GRADIENTS}, {_SEGMENTS}, {_PASS}, int layer, bool need_weights, {_NUMBERS}) -> Tensor[]",
    "backward": f"({_GRADIENTS}, {_SEGMENTS}, {_PASS}, bool need_history, bool need_query, bool need_weights, "
    f"{_NUMBERS}) -> Tensor[]",
    "infer": f"({_SEGMENTS}, Tensor?[] parameters, int[] blocks, float[] eps, int activation, float dice_eps, "
    f"{_SCORE}, float score_factor) -> Tensor[]",
}
_library = torch.library.Library("din_fast", "FRAGMENT")


def _triton_op(name: str) -> Callable[..., list[Tensor]]:
    """The implementation of a Triton op, by the names of its arguments; Triton is imported at the first call."""
    names = [a.name for a in op("triton", name)._schema.arguments]

    def run(*arguments: Any) -> list[Tensor]:
        from din_fast.backends.triton import entry

        result: list[Tensor] = getattr(entry, name)(dict(zip(names, arguments, strict=True)))
        return result

    return run


if native.why_not() is None:
    register("native")
    for _name, _fake in (("train", _fake_train), ("train_backward", _fake_train_backward)):
        _message = "the gradient of a gradient is not implemented" if _fake is _fake_train_backward else "use ops.train"
        torch.library.register_fake(f"din_fast::native_{_name}", _fake)
        torch.library.register_autograd(f"din_fast::native_{_name}", _no_gradient(_message), setup_context=_no_setup)
if triton.version() is not None:
    for _name, _schema in SCHEMAS.items():
        _library.define(f"triton_{_name}{_schema}")
        for _key in ("CUDA", "CPU"):  # on the CPU in Triton's interpreter; dispatch.py sees to that
            _library.impl(f"triton_{_name}", _triton_op(_name), _key)
    register("triton")
