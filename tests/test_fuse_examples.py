"""The examples of ``fuse`` in their quick mode: the frameworks' own trainers, as they are and on din_fast."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import din_fast
from din_fast import functional
from din_fast.frameworks.common import Fused
from examples import fuse_all, fuse_training, training
from examples.fuse_training import Run, Trained

QUICK = {"torch_rechub": 2, "deepctr_torch": 1, "fuxictr": 1, "recbole": 1}  # units of each


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same sums in the same order, whatever the machine
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", QUICK)
def test_an_example_prints_both_and_what_ran(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(f"examples.fuse_{name}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["example"])  # RecBole reads it
    trained: list[Trained] = []
    steps: list[str] = []

    def counted(*arguments: Any) -> functional.Result:
        result = run(*arguments)
        steps.extend([result.backend] if torch.is_grad_enabled() else [])
        return result

    run = functional.run
    monkeypatch.setattr(functional, "run", counted)

    def train(given: Run) -> Trained:
        trained.append(module.train(given))
        return trained[-1]

    fuse_training.main(name, train, ["--quick", "--seed", "2"])
    printed = capsys.readouterr().out
    assert f"din_fast.fuse: {QUICK[name]} of {QUICK[name]} units fused" in printed
    found = re.findall(rf"^{name}, (.*): test AUC (\d\.\d+), (\d+\.\d+) s an epoch$", printed, re.MULTILINE)
    assert [line[0] for line in found] == ["as it is", "din_fast ran its units (native)"]
    original, fused = trained
    assert not [m for m in original.model.modules() if isinstance(m, Fused)]
    assert [m.last_backend for m in fused.model.modules() if isinstance(m, Fused)] == ["native"] * QUICK[name]
    assert set(steps) == {"native"} and len(steps) >= 5 * QUICK[name]  # training steps, not only the evaluation
    # A few steps on a few samples: the bar is for the whole training, the seeds are 0.02 and more apart here.
    assert abs(original.auc - fused.auc) < 0.01
    assert not list(tmp_path.rglob("*"))  # nothing is left behind


def trained_in_float64(fused: bool) -> Tensor:
    """The test predictions after a few steps of torch-rechub's trainer in float64."""
    module = importlib.import_module("examples.fuse_torch_rechub")
    data = fuse_training.clicks(quick=True)
    rows = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(3)).split(512)[:8]
    batches = [(batch.x, batch.label) for batch in (data.train.take(some) for some in rows)]
    fuse_training.seed_everything(3)
    model = module.build(data.vocabulary).double()
    if fused:
        din_fast.fuse(model, strict=True)
    trainer = module.CTRTrainer(model)
    trainer.criterion = lambda predicted, label: nn.functional.binary_cross_entropy(predicted, label.double())
    trainer.train_one_epoch(batches)
    assert training.backends(model) == ("native" if fused else "-")
    return torch.tensor(trainer.predict(model, [(data.test.x, data.test.label)]), dtype=torch.float64)


def test_in_float64_both_trainings_are_one() -> None:
    """torch-rechub's float32 trainings part after some steps, whatever the first difference: float64 is the proof."""
    original, fused = (trained_in_float64(fused) for fused in (False, True))
    torch.testing.assert_close(fused, original, rtol=0, atol=1e-8)
    assert original.std() > 1e-4  # it says something


def test_times_under_anomaly_detection_are_refused() -> None:
    with (
        torch.autograd.set_detect_anomaly(True, check_nan=False),
        pytest.raises(RuntimeError, match="anomaly detection is on"),
    ):
        fuse_training.seconds_of(lambda: None)
    assert fuse_training.seconds_of(lambda: None) >= 0


class Toy(nn.Module):
    """What a train function gives, fused or not."""


def table_of(fused: tuple[float, ...], original: tuple[float, ...] = (0.8, 0.8002, 0.8004)) -> pd.DataFrame:
    rows = [
        {"trained_by": "Framework, fit", "seed": seed, "fused": is_fused, "test_auc": auc}
        | {"seconds_per_epoch": 2.0 + seed if is_fused else 6.0 + seed, "epochs": 2, "threads": 1}
        | {"backend": "native" if is_fused else "-"}
        for is_fused, aucs in ((False, original), (True, fused))
        for seed, auc in zip((1, 2, 3), aucs, strict=True)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("fused", "within"),
    [
        ((0.8001, 0.8001, 0.8004), "yes"),
        ((0.8009, 0.8002, 0.8004), "yes"),
        ((0.8, 0.8002, 0.799), "NO"),
        ((0.8, float("nan"), 0.8004), "NO"),
    ],
)
def test_the_bar_is_a_thousandth_of_the_same_seed(fused: tuple[float, ...], within: str) -> None:
    (cells,) = fuse_all.lines(table_of(fused))
    assert dict(zip(fuse_all.HEADINGS, cells, strict=True))["within"] == within


def test_the_bar_is_the_original_s_spread_where_that_is_larger() -> None:
    original = (0.8, 0.805, 0.802)
    (cells,) = fuse_all.lines(table_of((0.804, 0.805, 0.802), original))
    assert cells == (
        "Framework, fit",
        "0.8000, 0.8050, 0.8020",
        "0.8040, 0.8050, 0.8020",
        "0.00400",
        "0.00500",
        "yes",
        "7.0",
        "3.0",
        "2.3",
    )
    (cells,) = fuse_all.lines(table_of((0.806, 0.805, 0.802), original))
    assert cells[5] == "NO"


def test_a_run_that_din_fast_did_not_make_is_refused() -> None:
    with pytest.raises(RuntimeError, match="0 units were fused"):
        fuse_all._row(lambda run: Trained(Toy(), 0.5, 1.0), Run(fused=True))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Run] = []

    def train(run: Run) -> Trained:
        asked.append(run)
        print("what a trainer prints")
        return Trained(Toy(), 0.8 + run.seed / 1000, 1.0)

    def row(train_it: fuse_training.Train, run: Run) -> dict[str, object]:
        """As ``_row``, for a model without units."""
        return original_row(train_it, Run(False, run.seed, run.epochs, run.quick)) | {"fused": run.fused}

    original_row = fuse_all._row
    monkeypatch.setattr(fuse_all, "_row", row)
    monkeypatch.setattr(fuse_all, "EXAMPLES", {"Framework, fit": train})
    fuse_all.main(["--epochs", "3", "--out", str(tmp_path)])
    assert [(run.seed, run.epochs) for run in asked] == [(seed, 3) for seed in (1, 1, 2, 2, 3, 3)]
    printed = capsys.readouterr().out
    assert "what a trainer prints" not in printed
    written = pd.read_csv(tmp_path / "auc.csv")
    assert len(written) == 6 and list(written["fused"]) == [False, True] * 3
    assert (tmp_path / "auc.md").read_text() == fuse_all.markdown(written) + "\n"
    assert fuse_all.markdown(written) in printed
    monkeypatch.setattr(fuse_all, "lines", lambda rows: [("x",) * 5 + ("NO",) + ("x",) * 3])
    with pytest.raises(SystemExit, match="1"):
        fuse_all.main(["--out", str(tmp_path)])


def test_the_table_that_is_kept_is_of_its_rows_and_within_the_bar() -> None:
    folder = Path(__file__).parent.parent / "results" / "fuse"
    rows = pd.read_csv(folder / "auc.csv")
    assert (folder / "auc.md").read_text() == fuse_all.markdown(rows) + "\n"
    assert set(rows["trained_by"]) == set(fuse_all.EXAMPLES)
    assert rows.groupby(["trained_by", "fused"])["seed"].nunique().eq(3).all()
    assert all(cells[fuse_all.HEADINGS.index("within")] == "yes" for cells in fuse_all.lines(rows))
    assert set(rows[rows["fused"]]["backend"]) == {"native"}
