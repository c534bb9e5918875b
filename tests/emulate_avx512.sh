#!/usr/bin/env bash
# Runs a statically linked x86-64 program on an emulated processor that has AVX-512 (Skylake-X: F, CD, DQ, BW, VL), for
# hosts that have not: boots Debian's kernel in the PC emulator Bochs, with the program in its initramfs.
#
#   tests/emulate_avx512.sh PROGRAM [ARGUMENT]...        (arguments without quotes)
#
# The program's output comes out when it has ended. Exit status: its own; 128 + N if signal N killed it; 125 if it could
# not be run, with the reason on stderr. The guest's clock says nothing about real time.
set -euo pipefail

packages="bochs bochs-term bochsbios vgabios isolinux syslinux-common xorriso cpio gcc libc6-dev"
fail() {
  echo "emulate_avx512.sh: $*" >&2
  exit 125
}

[ $# -ge 1 ] && [ -x "$1" ] || fail "usage: emulate_avx512.sh PROGRAM [ARGUMENT]..."
program=$1
shift

bios=/usr/share/bochs/BIOS-bochs-latest vga=/usr/share/vgabios/vgabios.bin
screen=/usr/lib/*/bochs/plugins/libbx_term_gui.so  # of bochs-term
isolinux=/usr/lib/ISOLINUX/isolinux.bin ldlinux=/usr/lib/syslinux/modules/bios/ldlinux.c32
missing=
for tool in bochs xorriso cpio gcc apt-get dpkg-deb; do command -v $tool >/dev/null || missing+=" $tool"; done
for file in $bios $vga $screen $isolinux $ldlinux; do [ -e $file ] || missing+=" $file"; done
[ -z "$missing" ] || fail "missing:$missing; on Debian: apt-get install --no-install-recommends $packages"

work=$(mktemp -d)
emulator=
cleanup() {
  [ -z "$emulator" ] || kill -9 "$emulator" 2>/dev/null || true
  rm -rf "$work"
}
trap cleanup EXIT
mkdir -p "$work"/{files/dev,disc}

# ---- the kernel, fetched once
cache=${XDG_CACHE_HOME:-$HOME/.cache}/din_fast_emulator
if [ ! -s "$cache/vmlinuz" ]; then
  package=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/^ *Depends: //p' | head -n 1)
  [ -n "$package" ] || fail "apt knows no linux-image-cloud-amd64; run apt-get update"
  (cd "$work" && apt-get -qq -o APT::Sandbox::User=root download "$package" >&2) || fail "could not download $package"
  mkdir -p "$cache"
  dpkg-deb --extract "$work/$package"_*.deb "$work/package" && mv "$work"/package/boot/vmlinuz-* "$cache/vmlinuz" ||
    fail "no kernel in $package"
fi

# ---- the first process: runs the program with its output on the second serial port, reports on the first
cat >"$work/init.c" <<'END'
#include <fcntl.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

static int port(const char *path) {
  int fd = open(path, O_RDWR | O_NOCTTY);
  struct termios t;
  tcgetattr(fd, &t);
  cfmakeraw(&t);
  t.c_cflag |= CLOCAL;
  cfsetspeed(&t, B115200);
  tcsetattr(fd, TCSANOW, &t);
  return fd;
}

int main(void) {
  char *arguments[] = {"program", ARGUMENTS NULL};
  mount("dev", "/dev", "devtmpfs", 0, "");
  while (open("/dev/null", O_RDWR) < 2) {}
  int report = port("/dev/ttyS0"), output = port("/dev/ttyS1"), status = 0;
  dprintf(report, "\nSTART\n");
  pid_t child = fork();
  if (child == 0) {
    dup2(output, 1);
    dup2(output, 2);
    execv("/program", arguments);
    perror("/program");
    _exit(127);
  }
  while (waitpid(child, &status, 0) != child) {}
  tcdrain(output);
  dprintf(report, "\nEXIT %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
  tcdrain(report);
  reboot(RB_POWER_OFF);
  for (;;) pause();
}
END
arguments=
for argument; do arguments+="\"$argument\","; done
gcc -O1 -static -D ARGUMENTS="$arguments" -o "$work/files/init" "$work/init.c" || fail "could not compile the first process; is libc6-dev there?"

# ---- the disc to boot from
cp "$program" "$work/files/program"
(cd "$work/files" && find . | cpio --quiet -o -H newc) >"$work/disc/initrd"
cp "$cache/vmlinuz" "$isolinux" "$ldlinux" "$work/disc/"
# Bochs 2.7 reports a wrong compacted XSAVE size, for which Linux turns off all of AVX: keep it to the standard format.
parameters="noxsaves clearcpuid=xsavec"
# What takes long and is not needed.
parameters+=" mitigations=off no_timer_check tsc=reliable random.trust_cpu=on audit=0 nowatchdog cryptomgr.notests"
parameters+=" initcall_blacklist=trace_eval_init"
cat >"$work/disc/isolinux.cfg" <<END
DEFAULT linux
PROMPT 0
TIMEOUT 0
LABEL linux
  KERNEL vmlinuz
  APPEND initrd=initrd rdinit=/init console=ttyS0,115200 8250.nr_uarts=4 quiet loglevel=1 $parameters
END
xorriso -as mkisofs -quiet -o "$work/disc.iso" -b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 \
  -boot-info-table "$work/disc" 2>"$work/xorriso.log" || fail "xorriso: $(cat "$work/xorriso.log")"

cat >"$work/bochsrc" <<END
display_library: term
romimage: file=$bios
vgaromimage: file=$vga
cpu: model=corei7_skylake_x, count=1, ips=20000000, reset_on_triple_fault=0
memory: guest=512, host=512
boot: cdrom
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path=disc.iso, status=inserted
com1: enabled=1, mode=file, dev=report
com2: enabled=1, mode=file, dev=output
clock: sync=none
vga: extension=none, update_freq=1
speaker: enabled=0
log: bochs.log
panic: action=fatal
error: action=ignore
END
echo c >"$work/go"  # Debian's Bochs stops in its debugger first: continue

# ---- run
cd "$work"
touch report output
TERM=linux bochs -q -f bochsrc -rc go </dev/null >/dev/null 2>bochs.err &
emulator=$!
disown  # no word of the shell's when it is killed
ended='^EXIT \([0-9]*\).*'
until grep -q "$ended" report; do
  running=1
  kill -0 "$emulator" 2>/dev/null || running=
  sleep 0.2
  if grep -q "$ended" report; then break; fi
  if [ -z "$running" ] || grep -q "Kernel panic" report; then
    tail -n 15 report output bochs.log bochs.err >&2
    fail "the emulated machine stopped before the program ended"
  fi
done
cat output
exit "$(sed -n "s/$ended/\1/p" report)"
