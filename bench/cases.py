"""What is measured: the shapes, which presets at which of them, and the work that a shape needs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

from bench import peers
from bench.contenders import CANDIDATES, FORWARD, TRAINING, Case

# batch, length, dim, hidden.
SHAPES: dict[str, tuple[int, int, int, tuple[int, ...]]] = {
    "s1": (512, 50, 8, (36,)),
    "s2": (1024, 100, 16, (36,)),
    "s3": (512, 100, 64, (80, 40)),
    "s4": (256, 200, 64, (64, 16)),
    "s5": (128, 1000, 32, (36,)),
}
# The dim and hidden layers that the frameworks' own configurations have.
CONFIGURATIONS: tuple[tuple[int, tuple[int, ...]], ...] = (
    (8, (256, 128)),
    (128, (512, 256)),
    (48, (256, 64)),
    (128, (80, 40)),
    (10, (256, 256, 256)),
)
SERVE = Case("fuxictr", 512, 1000, 64, (80, 40))  # one user
SWEEP = Case("fuxictr", 128, 100, 32, (80, 40))
SWEPT: dict[str, tuple[int, ...]] = {
    "batch": (128, 256, 512, 1024, 2048),
    "length": (100, 200, 400, 800, 1600),
    "dim": (8, 16, 32, 64, 128),
}
SWEPT_CANDIDATES = (16, 64, 256, 1024)
BOTH = (FORWARD, TRAINING)


@dataclass(frozen=True)
class Task:
    """A case and what is measured of it.

    Attributes:
        case: preset and shape.
        x_name: what the case is one of: ``shape``, ``configuration``, ``small batch``, ``serve``, ``threads``, or what
            a sweep varies: ``batch``, ``length``, ``dim``, ``candidates``.
        x_value: which one of them.
        modes: of :data:`bench.contenders.MODES`.
        memory: the modes whose memory is measured, too.
        rounds: turns of each contender.
        seeds: of the parity.
        brief: only the framework's eager unit, the compiled folded form and din_fast.
    """

    case: Case
    x_name: str
    x_value: str
    modes: tuple[str, ...] = BOTH
    memory: tuple[str, ...] = ()
    rounds: int = 7
    seeds: int = 8
    brief: bool = False


def at(preset: str, name: str, memory: tuple[str, ...] = ()) -> Task:
    """A preset at one of :data:`SHAPES`."""
    return Task(Case(preset, *SHAPES[name]), "shape", name, memory=memory)


def serving(case: Case, memory: bool = True) -> Task:
    """Many candidates over one history; a framework takes seconds a call."""
    modes = (CANDIDATES,)
    return Task(case, "serve", str(case.batch), modes, modes if memory else (), rounds=3, seeds=1)


def quick() -> list[Task]:
    """A few minutes."""
    shapes = [replace(at(preset, name), rounds=5, seeds=4) for preset in ("fuxictr", "rechub") for name in ("s3", "s5")]
    return [*shapes, serving(replace(SERVE, batch=64), memory=False)]


def full() -> list[Task]:
    """20 to 40 minutes: one preset at all shapes and configurations, the others at two shapes."""
    shapes = [at("fuxictr", name, memory=BOTH) for name in SHAPES]
    others = [at(preset, name) for preset in peers.PACKAGES if preset != "fuxictr" for name in ("s3", "s5")]
    configurations = [
        Task(Case("fuxictr", 512, 100, dim, hidden), "configuration", f"D {dim}, {list(hidden)}", rounds=3, seeds=2)
        for dim, hidden in CONFIGURATIONS
    ]
    small = Task(Case("fuxictr", 1, 50, 16, (36,)), "small batch", "1", (FORWARD,))
    return [*shapes, *others, *configurations, small, serving(SERVE)]


def sweep() -> list[Task]:
    """About seven minutes: one quantity of :data:`SWEPT` after the other, the rest as in :data:`SWEEP`."""
    tasks = []
    for name, values in SWEPT.items():
        for value in values:
            case = replace(SWEEP, **{name: value})  # type: ignore[arg-type]
            memory = () if name == "batch" else (TRAINING,)
            tasks.append(Task(case, name, str(value), memory=memory, rounds=3, seeds=2, brief=True))
    for count in SWEPT_CANDIDATES:
        case = replace(SERVE, batch=count)
        tasks.append(replace(serving(case), x_name="candidates", brief=True))
    return tasks


def scaling(threads: int) -> Task:
    """s3 with a number of threads, to be compared with other numbers."""
    return replace(at("fuxictr", "s3"), x_name="threads", x_value=str(threads), rounds=3, seeds=2, brief=True)


def only(tasks: Iterable[Task], modes: Iterable[str]) -> list[Task]:
    """The tasks with those of their modes that are asked for, if any."""
    asked = set(modes)
    chosen = []
    for task in tasks:
        kept, memory = (tuple(m for m in of if m in asked) for of in (task.modes, task.memory))
        if kept:
            chosen.append(replace(task, modes=kept, memory=memory))
    return chosen


def flops(case: Case, mode: str) -> int:
    """The operations of the folded form that nothing can avoid: multiplications and additions of matrix products.

    A forward has ``2 B L (D H1 + H1 H2 + ... + H_last + D)``: the layers, the score and the pooling of each position;
    and ``2 B D H1`` for the matrix of each candidate, ``A_k + A_p diag(q)``. A training step counts as three forwards.
    Activations, statistics and what a backward computes again are not counted.
    """
    widths = (case.dim, *case.hidden_units, 1)
    position = sum(a * b for a, b in pairwise(widths)) + case.dim
    matrix = case.dim * case.hidden_units[0] if case.hidden_units else case.dim
    forward = 2 * case.batch * (case.length * position + matrix)
    return 3 * forward if mode == TRAINING else forward


def traffic(case: Case) -> int:
    """The bytes that the passes of a training step of din_fast move, preset fuxictr, float32, in rows rounded up to 16:
    z of every layer is kept, as each has batch statistics, and what is written is read before.

    k is read by the first layer's statistics, the pooling, and the first and the last pass of the backward, and its
    gradient is written. z is written once, and read by the statistics of the layer above (of the last, by the forward),
    and by the two passes that end and begin at it. The gradient that a pass leaves to the next is written and read.
    """
    rows = case.batch * -(-case.length // 16) * 16
    below = case.hidden_units[:-1]
    return 4 * rows * (6 * case.dim + 5 * sum(case.hidden_units) + 3 * sum(below))


def moved_bytes(case: Case, mode: str) -> int:
    """The bytes that must go through memory, in float32: the history read and the output written once.

    In training the gradient of the history is written, too. The history of many candidates is one.
    """
    row = 4 * case.dim
    histories = 1 if mode == CANDIDATES else case.batch
    history = histories * case.length * row
    return history * (2 if mode == TRAINING else 1) + case.batch * row
