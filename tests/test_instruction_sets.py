"""The kernel without torch: csrc/tests/kernel_test.cpp on every instruction set, and what the object files hold.

Where the processor has no AVX-512, that copy of the kernel runs on an emulated one (tests/emulate_avx512.sh).
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from setup import FLAGS, compiler

ROOT = Path(__file__).resolve().parent.parent
SETS = ("avx512", "avx2", "portable")
LACKS_IT = 3  # kernel_test's exit status where the processor has no such instruction set

x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets of x86-64")


def run(*command: str | Path, ok: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
    """Run a command in the root and assert on its exit status."""
    done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in ok, f"{command} ended with {done.returncode}:\n{done.stdout[-5000:]}{done.stderr[-5000:]}"
    return done


def link(folder: Path, target: Path, *flags: str) -> None:
    """Make the program ``target`` of the object files in ``folder``."""
    run(*(compiler() or ("g++",)), *flags, "-pthread", *sorted(folder.glob("*.o")), "-o", target)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with avx512.o, avx2.o, portable.o and the program kernel_test, compiled with the flags of the library.

    One of pytest's workers compiles, the others wait for it.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kernel_test"
    folder.mkdir(exist_ok=True)
    sources = [*(f"csrc/cpu/{name}.cpp" for name in SETS), "csrc/tests/kernel_test.cpp"]

    def compile_one(source: str) -> None:
        run(*(compiler() or ("g++",)), *FLAGS, "-c", source, "-o", folder / f"{Path(source).stem}.o")

    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "kernel_test").exists():
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(compile_one, sources))
            link(folder, folder / "kernel_test")
    return folder


@pytest.mark.parametrize("name", SETS)
def test_against_the_naive_unit(built: Path, name: str) -> None:
    done = run(built / "kernel_test", name, ok=(0, LACKS_IT))
    if done.returncode == LACKS_IT:
        pytest.skip(done.stderr.strip())
    assert done.stdout.endswith(" passed, 0 failed\n")


@x86
@pytest.mark.slow
def test_avx512_on_an_emulated_processor(built: Path, tmp_path: Path) -> None:
    if run(built / "kernel_test", "avx512", ok=(0, LACKS_IT)).returncode == 0:
        pytest.skip("this processor has AVX-512 itself: test_against_the_naive_unit[avx512] has run on it")
    if shutil.which("bochs") is None:
        pytest.skip("no AVX-512 in this processor and no emulator: tests/emulate_avx512.sh says what to install")
    link(built, tmp_path / "kernel_test", "-static")
    done = run("tests/emulate_avx512.sh", tmp_path / "kernel_test", "avx512")
    assert done.stdout.endswith(" passed, 0 failed\n")


@pytest.mark.parametrize("name", SETS)
def test_the_linker_cannot_mix_the_copies(built: Path, name: str) -> None:
    """A function that two files define is taken from either: the getter must be the only one that is not local."""
    symbols = [
        line.split()[:2]
        for line in run("nm", "-P", "--defined-only", "--extern-only", built / f"{name}.o").stdout.splitlines()
    ]
    data = "VDBRG"  # weak or not: nothing that is executed
    assert {symbol for symbol, kind in symbols if kind not in data} == {f"_ZN8din_fast{len(name)}{name}Ev"}


@x86
@pytest.mark.parametrize(
    ("name", "has", "has_not"), [("avx512", "zmm", ""), ("avx2", "ymm", "zmm"), ("portable", "xmm", "ymm zmm")]
)
def test_registers(built: Path, name: str, has: str, has_not: str) -> None:
    code = run("objdump", "-d", "--no-show-raw-insn", built / f"{name}.o").stdout
    assert f"%{has}" in code
    assert not [register for register in has_not.split() if f"%{register}" in code]
