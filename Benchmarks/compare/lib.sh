# What both parts are written with; sourced in dom0 behind the testbed's own.
part=block

# Runs a PV or PVH guest to its end and shows what it measured.
guest() { # NAME TYPE DRIVER LINE
  run_guest "$1" "type = \"$2\"
kernel = \"/guest/vmlinux\"
ramdisk = \"/guest/compare.cpio\"
extra = \"console=hvc0 rdinit=/init loglevel=4 c.driver=$3 c.part=$part\"
$4"
}

# The same for an HVM guest, which boots from a disk.
hvm_guest() { # NAME LINES
  run_guest "$1" "type = \"hvm\"
vga = \"none\"
nographic = 1
vnc = 0
usb = 0
$2"
}

# QEMU's controller with the disk to boot from.
AHCI='device_model_args_hvm = [ "-drive", "if=none,id=boot,format=raw,file=/disks/boot.img",
  "-device", "ich9-ahci,id=ahci", "-device", "ide-hd,drive=boot,bus=ahci.0" ]'
boot_disk() { # PATH DRIVER DISK : one from which a guest boots that measures that disk
  mkdir -p "$(dirname "$1")"
  cp /guest/compare.img "$1"
  printf '%-480s' "console=hvc0 rdinit=/init loglevel=4 no_timer_check c.driver=$2 c.part=$part c.disk=$3" |
    dd of="$1" bs=1 seek="$(cat /guest/compare.img.offset)" conv=notrunc 2>/dev/null
}

# Nobody polls: xl is woken by the guest's end.
run_guest() { # NAME LINES
  cat >"/root/$1.cfg" <<CONFIG
name = "$1"
memory = 256
vcpus = 1
cpus = "1"
tsc_mode = "native"
on_poweroff = "destroy"
on_reboot = "destroy"
on_crash = "destroy"
$2
CONFIG
  step "$1"
  # Some have to be seen to while they come up: BESIDE does that.
  [ -z "${BESIDE:-}" ] || $BESIDE "$1" &
  check "$1: xl" xl create -F "/root/$1.cfg"
  wait_gone "$1" 30
  sed -n "s/^RESULT/| RESULT $1/p" "$(console_of "$1")"
  check "$1: it measured" sh -c "grep -q ^RESULT '$(console_of "$1")' && ! grep -E 'FAIL|Oops|BUG:|I/O error' '$(console_of "$1")'"
}

# A PVH driver domain on a processor of its own.
driver_domain() {
  DRIVER_MORE=/guest/driver-compare.cpio
  check "a driver domain" create_driver_domain pvh
  check "on its processor" xl vcpu-pin driver all 2
}
