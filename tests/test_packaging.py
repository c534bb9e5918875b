"""What is shipped, and what the installation does where the kernel cannot be built."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

import din_fast

ROOT = Path(__file__).resolve().parent.parent
BUILT = ("*.so", "_build.json", "__pycache__")


def run(*arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, with no setting of the caller's shell that the build or the package reads."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("DIN_FAST_") and k not in ("CXX", "MAX_JOBS")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=inherited | environ, capture_output=True, text=True, check=False
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the build reads, without anything that was built before."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tree)
    for name in ("din_fast", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns(*BUILT))
    return tree


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    """setup.py as a module; it sets up nothing when imported."""
    spec = importlib.util.spec_from_file_location("din_fast_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_version() -> None:
    told = run("setup.py", "--version", cwd=ROOT)
    assert told.stdout.split()[-1] == din_fast.__version__, told.stderr
    assert f"## [{din_fast.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_type_information_is_shipped(tree: Path) -> None:
    done = run("setup.py", "build", "--build-lib", "out", cwd=tree, DIN_FAST_BUILD="none")
    assert done.returncode == 0, done.stderr
    shipped = {p.relative_to(tree / "out").as_posix() for p in (tree / "out").rglob("*") if p.is_file()}
    modules = {p.relative_to(tree).as_posix() for p in (tree / "din_fast").rglob("*.py")}
    assert shipped == modules | {"din_fast/py.typed", "din_fast/_build.json"}


def test_import_needs_no_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import din_fast; print(din_fast.__version__)"
    done = run("-c", code, cwd=ROOT)
    assert done.stdout.split() == [din_fast.__version__], done.stderr


def test_without_the_library_auto_falls_back_and_native_raises(tree: Path) -> None:
    code = """
import pathlib, warnings, torch, din_fast
assert pathlib.Path(din_fast.__file__).parent == pathlib.Path.cwd() / "din_fast"
inputs = torch.rand(2, 3, 4), torch.rand(2, 4)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    unit = din_fast.FusedActivationUnit(4)
    unit(*inputs), unit(*inputs)
print(unit.last_backend, [str(w.message) for w in told if "din_fast" in str(w.message)])
try:
    din_fast.FusedActivationUnit(4, backend="native")(*inputs)
except RuntimeError as error:
    print(error)
"""
    done = run("-c", code, cwd=tree)
    assert done.returncode == 0, done.stderr
    fell_back, raised = done.stdout.splitlines()
    assert fell_back.startswith("reference [") and fell_back.count("was not built") == 1  # one warning for two calls
    assert raised.startswith("backend 'native' cannot run: the C++ kernel was not built")


def test_a_library_that_does_not_load_is_told_with_both_versions(tree: Path) -> None:
    (tree / "din_fast" / "libdin_fast.so").write_text("no library at all", encoding="utf-8")
    record = {"requested": "auto", "built": True, "why_not": None, "torch": "2.99.0", "flags": ""}
    (tree / "din_fast" / "_build.json").write_text(json.dumps(record), encoding="utf-8")
    done = run("-c", "from din_fast.backends import native; print(native.why_not())", cwd=tree)
    assert "did not load: it was built for torch 2.99.0, this is torch " in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("gpu", "DIN_FAST_BUILD: expected one of auto, none, cpu, cuda; got 'gpu'"),
        ("cuda", "DIN_FAST_BUILD=cuda: there are no CUDA kernels yet; use cpu, auto or none"),
    ],
)
def test_what_cannot_be_asked_for_fails_in_one_line(mode: str, message: str) -> None:
    done = run("setup.py", "--version", cwd=ROOT, DIN_FAST_BUILD=mode)
    assert done.returncode != 0
    assert done.stderr.splitlines() == [f"din_fast: {message}"]


@pytest.mark.parametrize("text", ["two", "0", "-1", "1.5"])
def test_max_jobs_is_a_positive_number(setup_py: ModuleType, text: str) -> None:
    with pytest.raises(setup_py.CannotBuild, match=f"MAX_JOBS: expected a positive whole number, got '{text}'"):
        setup_py.jobs({"MAX_JOBS": text})


def test_jobs(setup_py: ModuleType) -> None:
    assert setup_py.jobs({"MAX_JOBS": "3"}) == 3
    assert setup_py.jobs({}) == os.cpu_count()


def test_no_flag_changes_what_floats_mean(setup_py: ModuleType) -> None:
    forbidden = {"-ffast-math", "-Ofast", "-march=native", "-mtune=native", "-ffinite-math-only"}
    assert not forbidden & set(setup_py.FLAGS)


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_auto_without_a_working_compiler_installs_pure_python_and_says_so(tree: Path, compiler: str) -> None:
    stale = tree / "out" / "din_fast" / "libdin_fast.so"
    stale.parent.mkdir(parents=True)
    stale.write_text("of an earlier build", encoding="utf-8")
    done = run("setup.py", "build", "--build-lib", "out", cwd=tree, CXX=compiler)
    assert done.returncode == 0, done.stderr
    assert "din_fast: installed WITHOUT the C++ kernel: the C++ compiler " in done.stderr
    assert "pip install --no-build-isolation ." in done.stderr
    assert not stale.exists()
    record = json.loads((tree / "out" / "din_fast" / "_build.json").read_text(encoding="utf-8"))
    assert record["built"] is False and record["why_not"] in done.stderr


def test_cpu_without_a_working_compiler_fails(tree: Path) -> None:
    done = run("setup.py", "build", "--build-lib", "out", cwd=tree, CXX="false", DIN_FAST_BUILD="cpu")
    assert done.returncode != 0
    assert "din_fast: DIN_FAST_BUILD=cpu cannot be met: the C++ compiler failed" in done.stderr
    assert "Traceback" not in done.stderr


def test_sdist_holds_all_that_a_build_needs(tree: Path) -> None:
    done = run("-c", "import setuptools.build_meta as backend; backend.build_sdist('dist')", cwd=tree)
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    csrc = {p.relative_to(tree).as_posix() for p in (tree / "csrc").rglob("*") if p.is_file()}
    assert {"csrc/ops.cpp", "csrc/unit.h"} <= csrc
    assert csrc | {"setup.py", "pyproject.toml", "LICENSE", "din_fast/py.typed"} <= names
    assert not [name for name in names if name.endswith((".so", "_build.json"))]
