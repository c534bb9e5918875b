"""The units of other frameworks: which there are, and how a module is found to be one.

A framework that the user has not imported is never imported: no module of a model can be of its classes then.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator

from torch import nn

from din_fast.frameworks.common import Fused

Recogniser = Callable[[nn.Module], "type[Fused] | str | None"]

# The host's module that has the unit, and ours that fuses it.
HOSTS = {
    "torch_rechub.models.ranking.din": "din_fast.frameworks.torch_rechub",
    "deepctr_torch.layers.sequence": "din_fast.frameworks.deepctr_torch",
    "fuxictr.pytorch.layers.attentions.target_attention": "din_fast.frameworks.fuxictr",
    "model_zoo.LongCTR.DIEN.DIEN": "din_fast.frameworks.fuxictr_dien",
    "recbole.model.layers": "din_fast.frameworks.recbole",
    "tzrec.modules.sequence": "din_fast.frameworks.tzrec",
}
_registered: list[Recogniser] = []


def register(recogniser: Recogniser) -> Recogniser:
    """Let :func:`din_fast.fuse` know units of your own; usable as a decorator.

    Args:
        recogniser: asked for every module of a model, before the built-in ones. It gives the class that fuses the
            module, a subclass of :class:`din_fast.frameworks.common.Fused` and of the module's class; or a str, why a
            unit that it knows has to be left; or None for a module that it does not know.

    Returns:
        The recogniser.

    Raises:
        TypeError: it cannot be called.

    An example, for a unit that takes a target (B, D), a history (B, L, D) and a mask (B, L)::

        from din_fast.frameworks.common import Fused, check_children, live, read, run


        class FusedMyAttention(Fused, MyAttention):
            framework = "in-house"
            host = MyAttention

            @staticmethod
            def plan(unit):
                check_children(unit)  # no hooks on what is not called any more
                return read(unit.mlp, unit.dim, softmax=True)  # Linear, ReLU, Linear, ReLU, Linear

            def forward(self, target, history, mask):
                plan = live(self)
                if plan is None:  # somebody has changed the MLP since
                    return super().forward(target, history, mask)
                return run(self, plan, target, history, mask)


        @din_fast.register
        def recognise(module):
            return FusedMyAttention if type(module) is MyAttention else None
    """
    if not callable(recogniser):
        raise TypeError(f"recogniser: expected a callable, got {type(recogniser).__name__}")
    _registered.append(recogniser)
    return recogniser


def recognise(module: nn.Module) -> type[Fused] | str | None:
    """The class that fuses a module, or why it is left, or None where it is no unit that anybody knows."""
    for recogniser in (*_registered, *_built_in()):
        found = recogniser(module)
        if found is not None:
            return found
    return None


def _built_in() -> Iterator[Recogniser]:
    for host, ours in HOSTS.items():
        if host in sys.modules:
            yield importlib.import_module(ours).recognise
