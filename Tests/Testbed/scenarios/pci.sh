# takes: 100 s
# limit: 1100 s
# also on: trixie
# processors: 6
# Functions on a guest's PCI bus: an unmodified guest whose only disks are there, without an ACPI table, is booted from one by its firmware,
# finds them, a network device, a console and an entropy device with MSI-X, and vxd is killed while the boot loader reads and under verified I/O.
load_modules llc stp bridge tun
brctl addbr br0
ip addr add 10.9.0.1/24 dev br0
ip link set br0 up
make_disk /disks/first.img 48
make_disk /disks/second.img 48
# The boot loader reads slowly enough for vxd to be killed meanwhile.
printf '{"version": 1, "disks": [{"guest": "alpha", "device": "xvdg", "queues": 2, "threads": 2},
    {"guest": "alpha", "device": "xvde", "limits": {"readOps": 60}}],
  "guests": [{"guest": "*", "transport": "pci", "devices": [{"type": "network", "bridge": "br0", "queues": 2},
    {"type": "console", "log": {"path": "/var/log/alpha-console.log"}}, {"type": "entropy"}]}]}\n' >/etc/vxd/profiles.json
# What hvmloader and the firmware say.
xl set-parameters guest_loglvl=all
start_vxd
remember_resources
GUEST_VCPUS=2 GUEST_MEMORY=256
write_config alpha "vx.bus=pci vx.test=pci vx.disks=3" "$(disk xvde /disks/boot-alpha.img)" "$(disk xvdf /disks/first.img)" \
  "$(disk xvdg /disks/second.img)"
sed -i -e '/acpi_firmware/d' -e '/device_model_args_hvm/,/\]$/d' /root/alpha.cfg
echo 'boot = "c"' >>/root/alpha.cfg
kill_vxd() { # as a supervisor sees it: the process dies, and is started again
  kill -9 "$(vxd_pid)"
  wait "$(vxd_pid)" 2>/dev/null
  start_vxd
}

step "creating a guest whose only disks are on its PCI bus"
check "xl create succeeds" create alpha
has_read() { test "$(device_field alpha/xvde reads)" -ge "$1"; }
check "its firmware reads from the disk" wait_until 200 has_read 20
xl dmesg | grep 'pci dev\|virtio\|Booting' | sed 's/^/| /'
check "hvmloader placed the first disk's BAR" sh -c "xl dmesg | grep -q 'pci dev 10:0 bar 10'"
check "hvmloader gave it an interrupt" sh -c "xl dmesg | grep -q 'pci dev 10:0 INTA'"
check "SeaBIOS speaks virtio 1 with it" sh -c "xl dmesg | grep -q 'pci dev 00:10.0 using modern (1.0) virtio mode'"
step "kill -9 of vxd while the boot loader reads"
kill_vxd
check "the boot loader goes on" wait_until 200 has_read 20
check "the limit is lifted" vxctl limit alpha/xvde --read-ops 0
check "the guest boots from the disk" wait_console alpha "GUEST UP" 400

step "what the guest's kernel finds"
check "the guest's kernel finds the disks" wait_console alpha "GUEST RANDOM" 200
grep 'GUEST FUNCTION' "$(console_of alpha)" | sed 's/^/| /'
check "the first disk is function 10.0 with MSI-X" console_says alpha \
  "GUEST FUNCTION 0000:00:10.0 id=0x1042 class=0x010000 bar=.* driver=virtio-pci messages=2 "
check "the third disk has a vector for each queue" console_says alpha \
  "GUEST FUNCTION 0000:00:12.0 id=0x1042 class=0x010000 bar=.* driver=virtio-pci messages=3 "
check "each queue of two pairs, and the configuration of the network device, have a vector" console_says alpha \
  "GUEST FUNCTION 0000:00:1f.0 id=0x1041 class=0x020000 bar=.* driver=virtio-pci messages=5 "
check "the console is function 1e.0" console_says alpha "GUEST FUNCTION 0000:00:1e.0 id=0x1043 class=0x078000"
check "the entropy device is function 1d.0" console_says alpha "GUEST FUNCTION 0000:00:1d.0 id=0x1044 class=0x00ff00"
check "random numbers" console_says alpha "GUEST RANDOM 64"
check "what the guest writes to its console" wait_until 20 grep -q 'written to hvc1' /var/log/alpha-console.log
for size in 0 20000; do check "ping, $size bytes" ping -c 2 -W 5 -s $size 10.9.0.2; done
check "their capabilities are those of virtio 1.2" console_says alpha "capabilities=msix,virtio1,virtio3,virtio4,virtio2,virtio5"
check "equal checksums from a file system" wait_console alpha "GUEST CHECKSUMS vdb 5 equal" 400
check "fio verifies" wait_console alpha "GUEST VERIFIED vdb" 200
traps() { echo $(($(status_field accesses) - $(status_field invalidations))); }
counts() {
  echo "| accesses $(status_field accesses), of them invalidations $(status_field invalidations), strays $(status_field strays)"
  for device in xvde xvdf xvdg net0 console0 rng0; do echo "| $device: $(device_field alpha/$device notifications) notifications, $(device_field alpha/$device interrupts) interrupts"; done
}
check "the guest is ready to be counted" wait_console alpha "GUEST COUNTING" 200
before=$(traps)
counts
check "interrupts are counted" wait_console alpha "GUEST COUNTED" 200
after=$(traps)
counts
echo "| traps of a hundred requests: $((after - before))"
# Fewer where vxd, which polls for a moment before it sleeps, has seen a request before the guest notified it.
check "a hundred requests one by one cost at most a hundred traps and few more" test $((after - before)) -ge 1 -a $((after - before)) -le 140
check "the first disk is found again" wait_console alpha "GUEST RESCANNED" 200
grep 'GUEST COUNTED\|GUEST IRQ\|GUEST RESCANNED' "$(console_of alpha)" | sed 's/^/| /'
check "a hundred requests one by one cost at most a hundred interrupts and few more" sh -c \
  "grep -o 'COUNTED interrupts=[0-9]*' $(console_of alpha) | cut -d= -f2 | { read n; test \$n -ge 1 && test \$n -le 130; }"
check "its BAR has moved" sh -c "grep RESCANNED $(console_of alpha) | { read -r x y new z old; test \${new%,} != \$old; }"
check "removed and found again, the disk is served" wait_console alpha "GUEST VERIFIED vdb-again" 300
vxctl show alpha/xvde | sed 's/^/| /'
vxctl explain alpha | sed 's/^/| /'
check "vxctl explain finds no problem" vxctl explain alpha
check "vxctl explain shows where the disk is" sh -c "vxctl explain alpha | grep -q 'function 00:10.0; BAR 0xf'"

# A new daemon has the profile's limit again.
lift_limit() { wait_until 60 device_state_is alpha/xvde connected && vxctl limit alpha/xvde --read-ops 0; }
guest_goes_on() { lift_limit; wait_until 200 has_rounds alpha $(($(rounds_of alpha) + 1)) && ! console_says alpha FAIL; }
check "rounds of verified I/O on every disk" wait_console alpha "GUEST ROUND 1" 400
for turn in 1 2; do
  step "kill -9 of vxd, turn $turn"
  sleep $turn # not to wait for anything: to be at another place of the load each time
  kill_vxd
  check "the disks are served again" wait_until 60 device_state_is alpha/xvdg connected
  check "the guest goes on" guest_goes_on
done
check "the network is reached again" wait_until 30 ping -c 1 -W 1 10.9.0.2
check "one ioreq server is there: the old one" equal "$(status_field ioreqServers)" 1
step "vxd is ended in good order and started again"
stop_vxd
start_vxd
check "the guest goes on" guest_goes_on
check "the guest shuts down" xl shutdown alpha
grep 'GUEST IRQ' "$(console_of alpha)" | tail -n 20 | sed 's/^/| /'
check "the guest is content" guest_says_nothing_bad alpha
check "the guest powers off and is gone" wait_gone alpha 200
no_trace_left

step "a guest whose kernel is told not to use MSI, and whose QEMU has a device where one of the disks would be"
write_config beta "pci=nomsi vx.bus=pci vx.test=fs vx.disks=2" "$(disk xvde /disks/boot-beta.img)" "$(disk xvdf /disks/first.img)" \
  "$(disk xvdg /disks/second.img)"
sed -i -e '/acpi_firmware/d' -e '/device_model_args_hvm/,/\]$/d' /root/beta.cfg
echo 'boot = "c"' >>/root/beta.cfg
echo 'device_model_args_hvm = [ "-device", "e1000,romfile=,addr=0x12" ]' >>/root/beta.cfg
check "xl create succeeds" create beta
check "the disk in QEMU's place is refused" wait_until 60 device_state_is beta/xvdg failed
vxctl show beta/xvdg | grep QEMU | sed 's/^/| /'
has_scanned() { xl dmesg | grep -q 'pci dev 12:0 bar 10 size 0*20000:'; }
check "hvmloader has found QEMU's device there" wait_until 60 has_scanned
check "equal checksums with interrupts by pin" wait_console beta "GUEST CHECKSUMS vdb 5 equal" 400
grep 'GUEST INTERRUPTS' "$(console_of beta)" | tr ';' '\n' | sed 's/^/| /'
check "no message was sent" sh -c "grep 'GUEST INTERRUPTS' $(console_of beta) | grep -q -v -i msi"
check "the guest is content" guest_says_nothing_bad beta
check "the guest powers off and is gone" wait_gone beta 200
no_trace_left

step "a guest with devices of its profile alone: xl does not wait for them, so it is created paused"
write_config gamma "vx.bus=pci vx.test=bare"
sed -i -e '/acpi_firmware/d' /root/gamma.cfg
check "xl create -p" create gamma -p
for device in net0 console0 rng0; do check "$device is ready before the guest runs" wait_until 60 device_state_is gamma/$device ready; done
check "xl unpause" xl unpause gamma
check "the guest finds them and they work" wait_console gamma "GUEST RANDOM 64" 300
for function in 1f.0:0x1041 1e.0:0x1043 1d.0:0x1044; do
  check "function ${function%:*} is there" console_says gamma "GUEST FUNCTION 0000:00:${function%:*} id=${function#*:} .* driver=virtio-pci"
done
check "the guest is content" guest_says_nothing_bad gamma
check "the guest powers off and is gone" wait_gone gamma 200
no_trace_left
stop_vxd
