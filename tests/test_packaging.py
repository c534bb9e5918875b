"""What is shipped, and what the installation does where the kernel cannot be built."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
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


def test_type_information_and_tiles_are_shipped(tree: Path) -> None:
    done = run("setup.py", "build", "--build-lib", "out", cwd=tree, DIN_FAST_BUILD="none")
    assert done.returncode == 0, done.stderr
    shipped = {p.relative_to(tree / "out").as_posix() for p in (tree / "out").rglob("*") if p.is_file()}
    modules = {p.relative_to(tree).as_posix() for p in (tree / "din_fast").rglob("*.py")}
    data = {"din_fast/py.typed", "din_fast/_build.json", "din_fast/backends/triton/tiles.json"}
    assert shipped == modules | data


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


@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
@pytest.mark.parametrize("compiler", ["no compiler", "CXX names none", "a compiler"])
@pytest.mark.parametrize("mode", ["auto", "none", "cpu", "cuda"])
def test_what_each_mode_installs(mode: str, compiler: str, editable: bool, tree: Path) -> None:
    stub = tree / "compiler"  # writes empty files: where they go is the subject here
    stub.write_text('#!/bin/sh\nfor a; do [ "$last" != -o ] || : >"$a"; last=$a; done\n', encoding="utf-8")
    stub.chmod(0o755)
    environ, obstacle = {
        "no compiler": ({"PATH": str(tree / "nothing")}, "no C++ compiler was found (g++, c++ or clang++, or the one"),
        "CXX names none": ({"CXX": "no-such-compiler"}, "the C++ compiler does not run: "),
        "a compiler": ({"CXX": str(stub)}, ""),
    }[compiler]
    (tree / "dist").mkdir()
    hook = "build_editable" if editable else "build_wheel"
    code = f"import setuptools.build_meta as backend; backend.{hook}('dist')"
    done = run("-c", code, cwd=tree, DIN_FAST_BUILD=mode, **environ)
    wheels = list(tree.glob("dist/*.whl"))

    if mode == "cuda" or (mode == "cpu" and obstacle):
        assert done.returncode != 0 and not wheels
        assert f"din_fast: DIN_FAST_BUILD={mode}" in done.stderr and "Traceback" not in done.stderr
        assert ("there are no CUDA kernels yet" if mode == "cuda" else obstacle) in done.stderr
        return

    assert done.returncode == 0, done.stderr
    site = tree
    if not editable:
        site = tree / "site"
        shutil.unpack_archive(wheels[0], site, "zip")
    built = mode != "none" and not obstacle
    record = json.loads((site / "din_fast" / "_build.json").read_text(encoding="utf-8"))
    assert (record["requested"], record["built"]) == (mode, built)
    libraries = {p.name.partition(".")[0] for p in (site / "din_fast").glob("*.so")}
    assert libraries == ({"libdin_fast", "_face"} if built else set())
    left_out = f"din_fast: installed WITHOUT the C++ kernel: {obstacle}"
    assert (left_out in done.stderr) == (mode == "auto" and not built)
    if mode == "none":
        assert wheels[0].name.endswith("-py3-none-any.whl")
    if not built:
        told = run("-c", "from din_fast.backends import native; print(native.why_not())", cwd=site)
        why = "DIN_FAST_BUILD=none" if mode == "none" else obstacle
        assert told.stdout.startswith(f"the C++ kernel was not built: {why}"), told.stderr


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", *BUILT))
    done = run("-c", "import setuptools.build_meta as backend; backend.build_sdist('..')", cwd=tree)
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder)
    return folder / archive.name.removesuffix(".tar.gz")


def test_sdist_holds_all_that_a_build_needs(sdist: Path) -> None:
    names = {p.relative_to(sdist).as_posix() for p in sdist.rglob("*")}
    csrc = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h")}
    assert {"csrc/ops.cpp", "csrc/unit.h"} <= csrc
    assert csrc | {"setup.py", "pyproject.toml", "LICENSE", "din_fast/py.typed"} <= names
    assert not [name for name in names if name.endswith((".so", "_build.json"))]


def test_sdist_holds_all_that_git_tracks(sdist: Path) -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a checkout of git")
    command = ["git", "-c", "safe.directory=*", "ls-files"]
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    left_out = (".ci/", ".gitignore", "results/")  # of use in the repository only
    expected = [name for name in tracked if not name.startswith(left_out) and (ROOT / name).exists()]
    assert len(expected) > 50
    assert [name for name in expected if not (sdist / name).exists()] == []


@pytest.mark.slow
def test_a_wheel_of_the_sdist_runs_the_kernel(sdist: Path, tmp_path: Path) -> None:
    pip = ("-m", "pip", "--disable-pip-version-check")
    offline = ("--no-index", "--no-deps")
    done = run(*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", ".", str(sdist), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("din_fast-*.whl")
    done = run(*pip, "install", *offline, "--target", "site", str(wheel), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    code = """
import pathlib, torch, din_fast
assert pathlib.Path(din_fast.__file__).parent == pathlib.Path.cwd() / "din_fast"
torch.manual_seed(0)
inputs = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
unit = din_fast.FusedActivationUnit(4, backend="native").double()
right = din_fast.FusedActivationUnit(4, backend="reference").double()
right.load_state_dict(unit.state_dict())
torch.testing.assert_close(unit(*inputs), right(*inputs), rtol=0, atol=1e-12)
print(unit.last_backend, din_fast.backends.native.facts()["requested"])
"""
    done = run("-c", code, cwd=tmp_path / "site")
    assert done.stdout.split() == ["native", "auto"], done.stderr
