"""Builds the C++ kernel, where it can; everything else about the package is in pyproject.toml.

The kernel is one shared library without Python symbols, ``din_fast/libdin_fast.so``, against torch's stable ABI.
Beside it lies ``din_fast/_face``, a small pybind11 module that tells how the library was compiled; the package works
without it. ``din_fast/_build.json`` records what was built or left out, and why, for ``python -m din_fast.info``.

Environment variables:
    DIN_FAST_BUILD: ``auto`` (default) builds the kernel where it can and never fails the installation; ``none`` builds
        nothing; ``cpu`` fails where the kernel cannot be built; ``cuda`` fails until there are CUDA kernels.
    CXX: the C++ compiler; default: the first of g++, c++ and clang++ that is found.
    MAX_JOBS: how many files to compile at once; default: the number of processors.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.build import build
from setuptools.dist import Distribution

PACKAGE = "din_fast"
LIBRARY = "libdin_fast.so"
FACE = "_face" + sysconfig.get_config_var("EXT_SUFFIX")
RECORD = "_build.json"

MODES = ("auto", "none", "cpu", "cuda")
OLDEST_TORCH = (2, 11)
# Never -ffast-math, -Ofast or -march=native: they flush denormals of the whole process, lose NaN, and tie the file to
# one processor. The instruction sets are chosen inside the sources, file by file, so the same flags serve all of them.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
)
GET_IT = "pip install 'torch>=2.11' setuptools pybind11 && pip install --no-build-isolation ."


class CannotBuild(Exception):
    """Why the kernel cannot be built here, in plain words."""


def build_mode(environ: Mapping[str, str]) -> str:
    """The value of DIN_FAST_BUILD: auto, none or cpu.

    Raises:
        CannotBuild: an unknown value, or cuda.
    """
    mode = environ.get("DIN_FAST_BUILD") or "auto"
    if mode not in MODES:
        raise CannotBuild(f"DIN_FAST_BUILD: expected one of {', '.join(MODES)}; got {mode!r}")
    if mode == "cuda":
        raise CannotBuild("DIN_FAST_BUILD=cuda: there are no CUDA kernels yet; use cpu, auto or none")
    return mode


def jobs(environ: Mapping[str, str]) -> int:
    """How many files to compile at once."""
    text = environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not text.isdecimal() or int(text) < 1:
        raise CannotBuild(f"MAX_JOBS: expected a positive whole number, got {text!r}")
    return int(text)


def sources() -> list[str]:
    """The C++ files of the library, relative to the root so that no path of this machine gets into it."""
    return ["csrc/ops.cpp", *sorted(p.as_posix() for p in Path("csrc/cpu").glob("*.cpp"))]


def compiler() -> list[str] | None:
    """The command that runs the C++ compiler, or None where there is none."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    return [found] if found else None


@functools.lru_cache(maxsize=1)
def obstacle() -> str | None:
    """What is plainly missing for the kernel, found without importing torch, or None."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed where the build runs (pip's build isolation hides it)"
    version = importlib.metadata.version("torch")
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST_TORCH:
        return f"torch {version} is too old, {'.'.join(map(str, OLDEST_TORCH))} or newer is needed"
    if compiler() is None:
        return "no C++ compiler was found (g++, c++ or clang++, or the one that CXX names)"
    return None


def run_compiler(arguments: list[str]) -> None:
    """Run the compiler and show the command and what it says; raise CannotBuild where it fails."""
    command = [*(compiler() or ()), *arguments]
    print(shlex.join(command), flush=True)
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:
        raise CannotBuild(f"the C++ compiler does not run: {error}") from error
    print(done.stdout, end="", flush=True)
    if done.returncode != 0:
        told = [line for line in done.stdout.splitlines() if "error" in line] or ["no error message"]
        raise CannotBuild(f"the C++ compiler failed: {told[0]}")


def headers_in(paths: list[str]) -> list[str]:
    """The flags for folders of foreign headers.

    Headers put their own place into error messages; mapped away, the result is the same wherever torch lies.
    """
    return [flag for path in paths for flag in ("-isystem", path, f"-ffile-prefix-map={path}=include")]


def build_library(target: Path, objects: Path) -> None:
    """Compile the library's files side by side and link them, against torch but without Python."""
    try:
        from torch.utils import cpp_extension
    except (ImportError, OSError) as error:  # OSError: a library that torch itself needs
        raise CannotBuild(f"torch cannot be imported: {error}") from error
    include = headers_in(cpp_extension.include_paths())
    objects.mkdir(parents=True, exist_ok=True)
    compiled = {source: str(objects / f"{Path(source).stem}.o") for source in sources()}

    def compile_one(source: str) -> None:
        run_compiler([*FLAGS, *include, "-Icsrc", "-c", source, "-o", compiled[source]])

    with ThreadPoolExecutor(jobs(os.environ)) as pool:
        list(pool.map(compile_one, compiled))
    # A symbol that is missing shall fail here and not when a user loads the library.
    complete = ["-Wl,--no-undefined"] if sys.platform == "linux" else []
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    run_compiler(["-shared", *complete, *compiled.values(), *libraries, "-ltorch_cpu", "-o", str(target)])


def build_face(target: Path) -> None:
    """Compile the pybind11 module that tells how the library was compiled."""
    try:
        import pybind11
        from torch.utils import cpp_extension
    except ImportError as error:
        raise CannotBuild(f"pybind11 is not installed where the build runs ({error})") from error
    paths = [pybind11.get_include(), sysconfig.get_path("include"), *cpp_extension.include_paths()]
    include = headers_in(paths)
    link = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    told = f'-DDIN_FAST_FLAGS="{" ".join(FLAGS)}"'
    run_compiler([*FLAGS, told, *include, "-shared", *link, "csrc/face.cpp", "-o", str(target)])


class BuildNative(Command):
    """The step of ``build`` that makes the kernel, its face and the record of both."""

    description = "build the C++ kernel as DIN_FAST_BUILD says"
    user_options: list[tuple[str, str | None, str]] = []  # noqa: RUF012 - setuptools wants it on the class
    editable_mode = False
    build_lib: str
    build_temp: str

    def initialize_options(self) -> None:
        self.build_lib = self.build_temp = None  # type: ignore[assignment]

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"), ("build_temp", "build_temp"))

    def run(self) -> None:
        target = Path(PACKAGE) if self.editable_mode else Path(self.build_lib) / PACKAGE
        target.mkdir(parents=True, exist_ok=True)
        for name in (LIBRARY, FACE, RECORD):  # what an earlier build left would not match these sources
            (target / name).unlink(missing_ok=True)
        record = self._build(build_mode(os.environ), target)
        (target / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def _build(self, mode: str, target: Path) -> dict[str, object]:
        record: dict[str, object] = {"requested": mode, "built": False, "why_not": None}
        if mode == "none":
            return record | {"why_not": "DIN_FAST_BUILD=none"}
        try:
            missing = obstacle()
            if missing is not None:
                raise CannotBuild(missing)
            build_library(target / LIBRARY, Path(self.build_temp))
        except CannotBuild as reason:
            if mode == "cpu":
                raise SystemExit(
                    f"din_fast: DIN_FAST_BUILD=cpu cannot be met: {reason}.\nTo get it: {GET_IT}"
                ) from None
            print(f"din_fast: installed WITHOUT the C++ kernel: {reason}.\nTo get it: {GET_IT}", file=sys.stderr)
            return record | {"why_not": str(reason)}
        record |= {"built": True, "torch": importlib.metadata.version("torch"), "flags": " ".join(FLAGS)}
        try:
            build_face(target / FACE)
        except CannotBuild as reason:
            print(f"din_fast: installed without din_fast._face: {reason}.", file=sys.stderr)
            record["why_no_face"] = str(reason)
        return record

    def get_source_files(self) -> list[str]:
        return sorted(p.as_posix() for p in Path("csrc").rglob("*") if p.suffix in (".cpp", ".h"))

    def get_outputs(self) -> list[str]:
        return list(self.get_output_mapping()) if self.editable_mode else [f"{self.build_lib}/{PACKAGE}/{RECORD}"]

    def get_output_mapping(self) -> dict[str, str]:
        """Where an editable installation finds the files that lie among the sources."""
        if not self.editable_mode:
            return {}
        made = [name for name in (LIBRARY, FACE, RECORD) if (Path(PACKAGE) / name).exists()]
        return {f"{self.build_lib}/{PACKAGE}/{name}": f"{PACKAGE}/{name}" for name in made}


class NativeDistribution(Distribution):
    """Tells setuptools whether the wheel is for one platform or pure Python."""

    def has_ext_modules(self) -> bool:
        return build_mode(os.environ) != "none" and obstacle() is None


def main() -> None:
    try:
        build_mode(os.environ)
    except CannotBuild as error:
        raise SystemExit(f"din_fast: {error}") from None
    build.sub_commands.append(("build_native", None))
    setup(cmdclass={"build_native": BuildNative}, distclass=NativeDistribution, ext_modules=[])


if __name__ == "__main__":
    main()
