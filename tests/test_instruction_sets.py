"""The kernel without torch: csrc/tests/kernel_test.cpp on every instruction set, and what the object files hold.

AVX2 and portable also run on emulated processors that have nothing newer (QEMU), there with the library in Python too.
Where the processor has no AVX-512, that copy of the kernel runs on an emulated one (Bochs, tests/emulate_avx512.sh).
For arm64 all of it is compiled on x86-64 and run by QEMU; there the portable copy is the only one.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pytest
from torch.utils import cpp_extension

from setup import FLAGS, compiler, headers_in

ROOT = Path(__file__).resolve().parent.parent
SETS = ("avx512", "avx2", "portable")
LACKS_IT = 3  # kernel_test's exit status where the processor has no such instruction set
CROSS = "aarch64-linux-gnu-"  # how the names of the programs that compile for arm64 begin

# Processors for QEMU. What it cannot emulate of a Haswell is left out, for it warns of that at every thread.
PROCESSORS = {
    "haswell": "Haswell,-pcid,-x2apic,-tsc-deadline,-invpcid,-hle,-rtm",  # AVX2 and FMA, no AVX-512
    "nehalem": "Nehalem",  # SSE4.2, no AVX
}
ROOM = "32"  # QEMU reads 16 bytes for the operand of a scalar FMA, and all 32 of a masked load

x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets of x86-64")


def run(*command: str | Path, ok: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
    """Run a command in the root and assert on its exit status."""
    done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in ok, f"{command} ended with {done.returncode}:\n{done.stdout[-5000:]}{done.stderr[-5000:]}"
    return done


def link(command: Sequence[str], folder: Path, target: Path, *flags: str) -> None:
    """Make the program ``target`` of the object files in ``folder``."""
    run(*command, *flags, "-pthread", *sorted(folder.glob("*.o")), "-o", target)


def host_compiler() -> list[str]:
    return compiler() or ["g++"]


def build(base: Path, name: str, command: Sequence[str], *link_flags: str) -> Path:
    """A folder with avx512.o, avx2.o, portable.o and the program kernel_test, compiled with the flags of the library.

    One of pytest's workers compiles, the others wait for it.
    """
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    sources = [*(f"csrc/cpu/{name}.cpp" for name in SETS), "csrc/tests/kernel_test.cpp"]

    def compile_one(source: str) -> None:
        run(*command, *FLAGS, "-c", source, "-o", folder / f"{Path(source).stem}.o")

    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "kernel_test").exists():
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(compile_one, sources))
            link(command, folder, folder / "kernel_test", *link_flags)
    return folder


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.getbasetemp(), "kernel_test", host_compiler())


def skip_or_fail(missing: str) -> NoReturn:
    """What an emulated test needs is missing: skip it, or fail where DIN_FAST_REQUIRE_QEMU=1."""
    if os.environ.get("DIN_FAST_REQUIRE_QEMU") == "1":
        pytest.fail(missing)
    pytest.skip(missing)


@pytest.fixture(scope="session")
def arm64_compiler() -> str:
    """Its name, where it and QEMU are there."""
    if platform.machine() in ("aarch64", "arm64"):
        pytest.skip("this processor is an arm64 itself: test_against_the_naive_unit[portable] has run on it")
    missing = [tool for tool in (f"{CROSS}g++", f"{CROSS}objdump", "qemu-aarch64") if shutil.which(tool) is None]
    if missing:
        skip_or_fail(f"no {', '.join(missing)}; on Debian: apt-get install g++-aarch64-linux-gnu qemu-user")
    return f"{CROSS}g++"


@pytest.fixture(scope="session")
def built_for_arm64(tmp_path_factory: pytest.TempPathFactory, arm64_compiler: str) -> Path:
    """As ``built``, for arm64; the program is linked statically, so that QEMU needs nothing else."""
    return build(tmp_path_factory.getbasetemp(), "kernel_test_arm64", [arm64_compiler], "-static")


@pytest.fixture(scope="session")
def qemu() -> str:
    """QEMU for programs of x86-64."""
    found = shutil.which("qemu-x86_64")
    version = re.search(r"version (\d+)\.(\d+)", run(found, "--version").stdout) if found else None
    if found and version and tuple(map(int, version.groups())) >= (7, 2):
        return found
    skip_or_fail("no qemu-x86_64 of version 7.2 or newer, older ones have no AVX; on Debian: apt-get install qemu-user")


@pytest.mark.parametrize("name", SETS)
def test_against_the_naive_unit(built: Path, name: str) -> None:
    done = run(built / "kernel_test", name, ok=(0, LACKS_IT))
    if done.returncode == LACKS_IT:
        pytest.skip(done.stderr.strip())
    assert done.stdout.endswith(" passed, 0 failed\n")


@x86
@pytest.mark.parametrize(
    ("processor", "instruction", "status"),
    [
        ("haswell", "vpxor %ymm0, %ymm0, %ymm0", 0),
        ("haswell", "vpxord %zmm0, %zmm0, %zmm0", LACKS_IT),
        ("haswell", "vmovapd %ymm16, %ymm17", LACKS_IT),
        ("nehalem", "vxorps %xmm0, %xmm0, %xmm0", LACKS_IT),
    ],
)
def test_an_emulated_processor_refuses_what_it_lacks(
    qemu: str, tmp_path: Path, processor: str, instruction: str, status: int
) -> None:
    """So that a copy of the kernel which runs there has none of it on its way."""
    source, program = tmp_path / "one.cpp", tmp_path / "one"
    source.write_text(
        f"""#include <csignal>
#include <unistd.h>
int main() {{
  std::signal(SIGILL, [](int) {{ _exit({LACKS_IT}); }});
  __asm__ volatile("{instruction}");
}}
""",
        encoding="utf-8",
    )
    run(*host_compiler(), source, "-o", program)
    run(qemu, "-cpu", PROCESSORS[processor], program, ok=(status,))


@x86
@pytest.mark.slow
@pytest.mark.parametrize(
    ("processor", "name", "status"),
    [
        ("haswell", "avx512", LACKS_IT),
        ("haswell", "avx2", 0),
        ("haswell", "portable", 0),
        ("nehalem", "avx2", LACKS_IT),
        ("nehalem", "portable", 0),
    ],
)
def test_on_an_emulated_processor(built: Path, qemu: str, processor: str, name: str, status: int) -> None:
    done = run(qemu, "-cpu", PROCESSORS[processor], built / "kernel_test", name, ROOM, ok=(status,))
    assert done.stdout.endswith("" if status else " passed, 0 failed\n")


@x86
@pytest.mark.slow
def test_the_library_on_an_emulated_processor(qemu: str) -> None:
    """The library chooses AVX2 by itself, obeys DIN_FAST_CPU, and is right: a forward, and a training step."""
    code = """
import os
import torch
from din_fast.backends import native
from tests.truth import SPECS, Case, check_parity

torch.set_num_threads(1)
assert native.instruction_sets() == ["avx2", "portable"], native.instruction_sets()
assert native.instruction_set() == "avx2"
for name in native.instruction_sets():
    os.environ["DIN_FAST_CPU"] = name
    assert native.instruction_set() == name
    for training in (True, False):
        for dtype in (torch.float32, torch.float64):
            check_parity(Case(SPECS["fuxictr-two-layers"], (3, 33, 10), "both", training), "native", dtype)
os.environ["DIN_FAST_CPU"] = "avx512"
try:
    native.instruction_set()
except RuntimeError as error:
    print(error)
"""
    done = run(qemu, "-cpu", PROCESSORS["haswell"], sys.executable, "-c", code)
    assert "DIN_FAST_CPU: expected one of avx2,portable on this processor; got 'avx512'" in done.stdout


@x86
@pytest.mark.slow
def test_avx512_on_an_emulated_processor(built: Path, tmp_path: Path) -> None:
    if run(built / "kernel_test", "avx512", ok=(0, LACKS_IT)).returncode == 0:
        pytest.skip("this processor has AVX-512 itself: test_against_the_naive_unit[avx512] has run on it")
    if shutil.which("bochs") is None:
        pytest.skip("no AVX-512 in this processor and no emulator: tests/emulate_avx512.sh says what to install")
    link(host_compiler(), built, tmp_path / "kernel_test", "-static")
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


@pytest.mark.slow
@pytest.mark.parametrize(("name", "status"), [("avx512", LACKS_IT), ("avx2", LACKS_IT), ("portable", 0)])
def test_on_an_emulated_arm64(built_for_arm64: Path, name: str, status: int) -> None:
    """Cortex-A53: the first version of the architecture, without anything that came later."""
    with (built_for_arm64 / "kernel_test").open("rb") as file:
        assert file.read(20)[18:] == bytes((183, 0))  # e_machine: AArch64
    done = run("qemu-aarch64", "-cpu", "cortex-a53", built_for_arm64 / "kernel_test", name, ok=(status,))
    assert done.stdout.startswith("" if status else "portable | largest error ")
    assert done.stdout.endswith("" if status else " passed, 0 failed\n")


def innermost_loops(code: str) -> Iterator[list[str]]:
    """The instructions of every loop of arm64 code that has none inside, as objdump writes them."""
    index: dict[int, int] = {}  # by address
    instructions: list[str] = []
    latest = -1  # where the loop begins that begins last
    for address, text in re.findall(r"^ *([0-9a-f]+):\t(.*)$", code, re.MULTILINE):
        index[int(address, 16)] = len(instructions)
        instructions.append(text)
        jump = re.match(r"(?:b|b\.\w+|cbn?z|tbn?z)\t(?:.*, )?([0-9a-f]+) <", text)
        begin = index.get(int(jump[1], 16)) if jump else None
        if begin is not None and begin > latest:
            latest = begin
            yield instructions[begin:]


@pytest.mark.slow
def test_accumulators_stay_in_registers_on_arm64(built_for_arm64: Path) -> None:
    """In the microkernels: loops of many multiply-adds, which are fused, outside the activations."""
    code = run(f"{CROSS}objdump", "-d", "-j", ".text", "--no-show-raw-insn", built_for_arm64 / "portable.o").stdout
    functions = [f for f in code.split("\n\n") if not re.match(r"[0-9a-f]+ <.*(score|activat)", f.lstrip())]
    loops = [loop for function in functions for loop in innermost_loops(function)]
    products = [loop for loop in loops if sum(text.startswith("fmla\t") for text in loop) >= 16]
    assert len(products) > 10
    stored = re.compile(r"st[rp]\tq.*\[sp")
    assert not [text for loop in products for text in loop if stored.match(text)]


@pytest.mark.slow
def test_the_ops_compile_for_arm64(arm64_compiler: str) -> None:
    """csrc/ops.cpp, with torch's headers; there is no torch for arm64 here to link it with."""
    include = headers_in(cpp_extension.include_paths())
    run(arm64_compiler, *FLAGS, *include, "-Icsrc", "-fsyntax-only", "csrc/ops.cpp")
