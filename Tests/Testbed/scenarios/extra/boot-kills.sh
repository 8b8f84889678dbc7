# takes: 130 s
# limit: 1800 s
# in the gate: turn 2
# processors: 5
# vxd is killed again and again at random moments while a guest boots from a disk on its PCI bus, by hvmloader, SeaBIOS, the boot loader and
# the kernel: it boots each time.
make_disk /disks/second.img 32
printf '{"version": 1, "guests": [{"guest": "*", "transport": "pci"}]}\n' >/etc/vxd/profiles.json
start_vxd
remember_resources
GUEST_MEMORY=256
kill_vxd() { # as a supervisor sees it: the process dies, and is started again
  kill -9 "$(vxd_pid)"
  wait "$(vxd_pid)" 2>/dev/null
  start_vxd
}
random=$((DELAY * 7919 + 12345))
next() { # LIMIT : sets `number`
  random=$(((random * 1103515245 + 12345) % 2147483648))
  number=$((random / 65536 % $1))
}
# Until the guest is up, or has died, or a limit: what is not up by then will not be.
kill_while_it_boots() { # NAME
  kills=0
  until console_says "$1" "GUEST UP" || [ $kills -ge 200 ] || [ -n "$(deaths)" ]; do
    next 3000
    usleep $((number * 1000))
    kill_vxd >/dev/null
    kills=$((kills + 1))
  done
  echo "| $kills kills"
  console_says "$1" "GUEST UP" && [ $kills -ge 5 ]
}
for boot in 1 2 3; do
  step "boot $boot"
  write_config alpha "vx.bus=pci vx.test=fs vx.disks=2" "$(disk xvde /disks/boot-alpha.img)" "$(disk xvdf /disks/second.img)"
  sed -i -e '/acpi_firmware/d' -e '/device_model_args_hvm/,/\]$/d' /root/alpha.cfg
  echo 'boot = "c"' >>/root/alpha.cfg
  check "xl create succeeds" create alpha
  check "the guest boots from the disk, whenever vxd is killed" kill_while_it_boots alpha
  check "equal checksums from a file system" wait_console alpha "GUEST CHECKSUMS vdb 5 equal" 400
  check "the guest is content" guest_says_nothing_bad alpha
  check "the guest powers off and is gone" wait_gone alpha 200
  no_trace_left
done
stop_vxd
