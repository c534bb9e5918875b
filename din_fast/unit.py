"""The drop-in module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from din_fast import dispatch, functional, reference
from din_fast.spec import UnitSpec, check_widths, preset


class FusedActivationUnit(nn.Module):
    """DIN's activation unit in one pass; by default torch-rechub's ``ActivationUnit``, with its state_dict keys.

    Args:
        emb_dim: D, the size of an embedding.
        dims: widths of the hidden layers; default [36]. Copied.
        activation: ``dice``, ``relu``, ``leaky_relu``, ``prelu``, ``sigmoid``, ``silu``, ``tanh`` or ``identity``.
        use_softmax: normalise the scores over the valid positions.
        spec: another unit than torch-rechub's, see :func:`din_fast.preset`; together with dims, activation or
            use_softmax it raises.
        backend: ``auto``, ``native``, ``triton`` or ``reference``; see :func:`din_fast.activation_unit`.

    Attributes:
        last_backend: the backend that ran the last forward, or None before the first.

    Raises:
        ValueError: emb_dim or dims not positive, an unknown activation or backend, spec together with dims.
        TypeError: emb_dim or dims of another type.
    """

    last_backend: str | None

    def __init__(
        self,
        emb_dim: int,
        dims: Sequence[int] | None = None,
        activation: str | None = None,
        use_softmax: bool | None = None,
        *,
        spec: UnitSpec | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(emb_dim, int) or isinstance(emb_dim, bool):
            raise TypeError(f"emb_dim: expected an int, got {emb_dim!r}")
        if emb_dim < 1:
            raise ValueError(f"emb_dim: expected a positive size, got {emb_dim}")
        dispatch.check_name(backend)
        if spec is None:
            spec = preset(
                "rechub",
                None if dims is None else check_widths("dims", dims),
                activation,
                use_softmax,
            )
        elif not isinstance(spec, UnitSpec):
            raise TypeError(f"spec: expected a UnitSpec, got {type(spec).__name__}")
        elif dims is not None or activation is not None or use_softmax is not None:
            raise ValueError(
                "spec: it already holds dims, activation and use_softmax; expected one or the other, got both"
            )
        self.emb_dim = emb_dim
        self.spec = spec
        self.backend = backend
        self.last_backend = None
        self.attention = reference.MLP(emb_dim, spec)

    def forward(
        self, history: Tensor, target: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """history (B, L, D), target (B, D), mask (B, L) bool with True = valid, lengths (B,) -> (B, D).

        Several candidates for each history: target (B, M, D) -> (B, M, D); or history (1, L, D) and target (M, D) ->
        (M, D). With the pooling ``none`` the result is the weights, (B, L), (B, M, L) or (M, L).

        The argument order is torch-rechub's, history first. Mind it with targets of three dimensions, where nothing can
        tell them from a history: :func:`din_fast.activation_unit` is keyword-only. Errors as there.
        """
        parameters = self.attention.unit_parameters()
        result = functional.run(
            target, history, parameters, self.spec, mask, lengths, self.backend, "target", self.emb_dim
        )
        self.last_backend = result.backend
        return result.output(self.spec)

    def extra_repr(self) -> str:
        spec = self.spec
        rest = f", dropout={spec.dropout}" if spec.dropout else ""
        rest += f", batch_stats={spec.batch_stats}" if spec.batch_stats != "all" else ""
        return (
            f"emb_dim={self.emb_dim}, hidden_units={list(spec.hidden_units)}, activation={spec.activation}, "
            f"softmax={spec.softmax}, pooling={spec.pooling}{rest}, backend={self.backend}"
        )
