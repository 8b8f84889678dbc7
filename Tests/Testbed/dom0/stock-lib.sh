# What scenarios with a stock Debian guest share ("# needs: stock"): its disk is /dev/sda in dom0, and GRUB's menu is on its first serial port.

# What GRUB says comes by a pipe, and keys go by another: pipes outlive the guest's emulators.
SERIAL=/var/log/xen/guest-serial.log
prepare_stock_guest() {
  load_modules llc stp bridge tun crct10dif_common crct10dif_generic crc-t10dif crc64 crc64_rocksoft_generic crc64-rocksoft t10-pi scsi_common scsi_mod libata libahci ahci sd_mod
  check "the guest's disk is there" wait_until 20 test -b /dev/sda
  brctl addbr br0
  ip addr add 10.9.0.1/24 dev br0
  ip link set br0 up
  make_disk /disks/second.img 48
  printf '{"version": 1, "guests": [{"guest": "*", "transport": "pci", "devices": [{"type": "network", "bridge": "br0", "queues": 2},
    {"type": "console", "log": {"path": "/var/log/debian-console.log"}}, {"type": "entropy"}]}]}\n' >/etc/vxd/profiles.json
  # What hvmloader and the firmware say.
  xl set-parameters guest_loglvl=all
  mkfifo /run/serial.in /run/serial.out
  cat 0<>/run/serial.out >$SERIAL &
}

configure() { # [EMULATOR'S ARGUMENTS] : nothing of an emulator's but what is said here and a serial port
  cat >/root/debian.cfg <<CONFIG
name = "debian"
type = "hvm"
memory = 384
vcpus = 2
tsc_mode = "native"
boot = "c"
vga = "none"
nographic = 1
vnc = 0
usb = 0
device_model_args_hvm = [ "-chardev", "pipe,id=grub,path=/run/serial", "-serial", "chardev:grub"${1:-} ]
on_poweroff = "destroy"
on_reboot = "restart"
on_crash = "destroy"
disk = [ $(disk xvde /dev/sda), $(disk xvdf /disks/second.img) ]
CONFIG
}

MENUS=0
wait_menu() { # the next menu of GRUB's
  MENUS=$((MENUS + 1))
  wait_until 200 has_menus $MENUS || { tail -c 1000 $SERIAL; return 1; }
}
has_menus() { test "$(grep -c 'GNU GRUB' $SERIAL)" -ge "$1"; }
press() { printf "$1" >/run/serial.in; }

# For what does not last long.
soon() { POLL=100000 wait_until "$@"; }
# Through reboots, which wait_console takes for an end.
wait_guest() { # PATTERN SECONDS [TIMES]
  wait_until "$2" says "$1" "${3:-1}" || { tail -n 30 "$(console_of debian)"; return 1; }
}
says() { test "$(grep -c "$1" "$(console_of debian)")" -ge "${2:-1}"; }
xen_says() { xl dmesg | grep -q "$1"; }
reads() { device_field debian/xvde reads; }
has_read() { test "$(reads)" -ge "$1"; }

end_vxd() { # at once
  kill -9 "$(vxd_pid)"
  wait "$(vxd_pid)" 2>/dev/null
}
kill_vxd() { # as a supervisor sees it: the process dies, and is started again
  end_vxd
  start_vxd
}

# All five functions, in each life so far.
has_functions() { # LIVES
  for function in 10.0:1042 11.0:1042 1d.0:1044 1e.0:1043 1f.0:1041; do
    equal "$(grep -c "GUEST FUNCTION 00:${function%:*} .*1af4:${function#*:}" "$(console_of debian)")" "$1" || return 1
  done
}
