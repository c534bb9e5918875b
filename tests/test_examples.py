"""Each example at a tiny size: it runs, on the kernel, and finds what was planted."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.progress import Progress

from bench.marks import rewrite
from din_fast.data import Samples
from examples import amazon_electronics, auc, blog_din, ml100k, training
from examples.auc import MARKS, MODELS, Data, Settings

TINY = Settings(epochs=2, seeds=(1, 2), length=8, emb_dim=4, batch_size=256)


def test_every_sample_is_in_one_batch() -> None:
    batches = training.shuffled(21, 4, torch.Generator().manual_seed(0))
    assert [len(rows) for rows in batches] == [4] * 5  # a last batch of one is left out
    rows = torch.cat(training.shuffled(22, 4, torch.Generator().manual_seed(0)))
    assert sorted(rows.tolist()) == list(range(22)) != rows.tolist()


def test_blog_din(capsys: pytest.CaptureFixture[str]) -> None:
    blog_din.main(["--samples", "4000"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["reference", "-"], ["fused", "native"]]
    aucs = [float(row[3]) for row in rows]
    assert all(value > 0.7 for value in aucs)
    assert abs(aucs[0] - aucs[1]) < 0.01


def test_the_blog_s_units_share_their_checkpoint_and_their_columns() -> None:
    plain, fused = (blog_din.BlogDIN(unit).double().eval() for unit in blog_din.UNITS)
    fused.load_state_dict(plain.state_dict(), strict=True)
    x = {name: v.double() if v.is_floating_point() else v for name, v in blog_din.make(40, seed=1).x.items()}
    torch.testing.assert_close(fused(x), plain(x), rtol=0, atol=1e-12)
    assert training.backends(fused) == "native" and training.backends(plain) == "-"
    # A pad's embedding reaches nothing, and a sample's logit does not depend on the size of the batch.
    padded = {name: torch.nn.functional.pad(x[name], (0, 0, 0, 3)) for name in ("recent_ids", "recent_numbers")}
    torch.testing.assert_close(fused({**x, **padded}), fused(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(fused({name: v[:3] for name, v in x.items()}), fused(x)[:3], rtol=0, atol=1e-12)


def last_auc(printed: str) -> float:
    found = re.search(r"backend native: test AUC (\d\.\d+)", printed)
    assert found is not None, printed
    return float(found[1])


def test_amazon_electronics_on_a_log_made_there(capsys: pytest.CaptureFixture[str]) -> None:
    amazon_electronics.main(["--users", "400", "--epochs", "6"])
    printed = capsys.readouterr().out
    assert printed.startswith("no --csv was given: a log made here, 400 users")
    assert last_auc(printed) > 0.6


def test_amazon_electronics_reads_a_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.csv"
    amazon_electronics.write_log(path, users=60, seed=0)
    log = pd.read_csv(path)
    log[["user_id", "item_id", "time", "cate_id"]].to_csv(path, index=False)  # in another order
    amazon_electronics.main(["--csv", str(path), "--epochs", "1"])
    printed = capsys.readouterr().out
    assert f"{2 * (len(log) - 60 * 3)} training, 120 validation and 120 test samples" in printed
    assert 0 <= last_auc(printed) <= 1
    log.drop(columns="cate_id").to_csv(path, index=False)
    with pytest.raises(
        ValueError, match=r"csv: expected the columns user_id, item_id, cate_id, time; .* has no cate_id"
    ):
        amazon_electronics.main(["--csv", str(path)])


def tiny_data(folder: Path) -> Data:
    """A made log, with a profile that says nothing."""
    path = folder / "log.csv"
    amazon_electronics.write_log(path, users=80, seed=0)
    split = amazon_electronics.read(path)
    profile = ("age", "gender", "occupation")

    def with_profile(samples: Samples) -> Samples:
        return Samples(samples.x | {name: torch.ones_like(samples.x["user"]) for name in profile}, samples.label)

    train, validation, test = (with_profile(samples) for samples in (split.train, split.validation, split.test))
    return Data(train, validation, test, split.vocabulary | dict.fromkeys(profile, 2))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    with Progress(disable=True) as progress:
        return auc.run(TINY, tiny_data(tmp_path_factory.mktemp("log")), progress)


def test_auc_trains_every_model_with_every_seed(rows: pd.DataFrame) -> None:
    assert len(rows) == len(MODELS) * len(TINY.seeds) * TINY.epochs
    assert dict(rows.groupby("model")["backend"].unique().map(list)) == {
        name: ["native" if name.startswith("DIN") else "-"] for name in MODELS
    }
    assert rows["test_auc"].between(0, 1).all() and (rows["seconds"] > 0).all()
    assert rows.groupby(["model", "epoch"])["test_auc"].nunique().min() == 2  # the seeds differ
    sizes = [rows[rows["model"] == name]["parameters"].unique().item() for name in MODELS]
    assert sizes[0] == sizes[1] > sizes[2] == sizes[3]


def test_auc_reports_the_epoch_that_validation_chose() -> None:
    """The test AUC, were it looked at, would choose the others."""
    frame = pd.DataFrame(
        [
            {"model": name, "seed": seed, "epoch": epoch, "validation_auc": v + seed / 100, "test_auc": t + seed / 100}
            | {"seconds": epoch, "parameters": 1234, "threads": 2}
            for name in MODELS
            for seed in (1, 2)
            for epoch, v, t in ((1, 0.7, 0.6), (2, 0.5, 0.9), (3, 0.6, 0.8))
        ]
    )
    assert auc.best_epochs(frame) == dict.fromkeys(MODELS, 1)
    assert auc.lines(frame)[0] == ("DIN", "1,234", "0.6150", "0.6100-0.6200", "0.7150", "1", "1.0")
    assert len(auc.markdown(frame).splitlines()) == 2 + len(MODELS)


def test_auc_splits_ml_100k_by_time() -> None:
    """Its test is that of the demo, and the three parts are its training and its test together."""
    data = auc.load(TINY)
    demo = ml100k.build(ml100k.read(ml100k.find_folder()), length=TINY.length, held_out=TINY.held_out, seed=2022)
    assert torch.equal(data.test.x["item"], demo.test.x["item"])
    assert torch.equal(data.test.x["hist_item"], demo.test.x["hist_item"])
    assert len(data.train) + len(data.validation) == len(demo.train)
    assert 0.9 * len(data.test) < len(data.validation) <= len(data.test)  # some users have few clicks


def test_the_auc_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rows: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(auc, "Settings", lambda: TINY)
    monkeypatch.setattr(auc, "load", partial(lambda folder, settings: tiny_data(folder), tmp_path))
    monkeypatch.setattr(auc, "run", lambda settings, data, progress: rows)
    auc.main([])
    printed = capsys.readouterr().out
    written = pd.read_csv("results/auc/ml100k.csv")
    assert auc.markdown(written) in printed
    pd.testing.assert_frame_equal(written, rows, atol=1e-6)
    assert Path("results/auc/ml100k.png").stat().st_size > 10_000

    readme = Path("README.md")
    readme.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    for _ in range(2):  # the second time over its own table
        auc.main(["--readme"])
        assert readme.read_text() == f"before\n{MARKS[0]}\n{auc.markdown(written)}\n{MARKS[1]}\nafter\n"


@pytest.mark.parametrize("text", ["none", MARKS[0], f"{MARKS[1]} {MARKS[0]}", f"{MARKS[0]} {MARKS[1]} {MARKS[1]}"])
def test_a_readme_without_its_marks_is_left_alone(tmp_path: Path, text: str, rows: pd.DataFrame) -> None:
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"README.md: expected <!-- auc --> and after it <!-- /auc -->, once each"):
        rewrite(path, MARKS, auc.markdown(rows))
    assert path.read_text() == text
