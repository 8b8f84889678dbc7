# takes: 220 s
# limit: 1800 s
# in the gate: turn 1
# also on: trixie
# needs: stock
# processors: 5
# A stock Debian 12 with its own kernels and GRUB, all of whose devices are vxd's on its PCI bus, and what a machine lives through: it boots with vxd
# killed in each stage, writes GRUB to its disk, reboots by that, executes another kernel, is destroyed under I/O and created again.
. /stock-lib.sh
# What the guest says shows whether it was to.
MAY_REBOOT=3 MAY_RESET=3
prepare_stock_guest
configure
start_vxd
remember_resources
boot_sectors() { # what is before the first partition
  echo 3 >/proc/sys/vm/drop_caches
  dd if=/dev/sda bs=512 count=2047 2>/dev/null | sha256sum
}
made=$(boot_sectors)

step "vxd dies before hvmloader's scan"
check "xl create succeeds" create debian -p
end_vxd
xl unpause debian
check "hvmloader begins to scan" wait_until 60 xen_says 'PCI-ISA link'
check "it waits for vxd" not xen_says 'pci dev 10:0'
start_vxd
check "it finds the disk when vxd is there" wait_until 60 xen_says 'pci dev 10:0 INTA'
step "vxd dies while SeaBIOS reads"
check "the disk is paused" vxctl pause debian/xvde
check "SeaBIOS speaks virtio 1 with it" wait_until 60 xen_says 'pci dev 00:10.0 using modern (1.0) virtio mode'
check "SeaBIOS reads its first sector" wait_until 60 xen_says 'Booting from Hard Disk'
check "it has not got it" not xen_says 'Booting from 0000:7c00'
kill_vxd
check "the next daemon serves it" wait_until 60 xen_says 'Booting from 0000:7c00'
step "vxd dies while GRUB reads"
check "GRUB shows its menu" wait_menu
before=$(reads)
check "the disk is slowed down" vxctl limit debian/xvde --read-ops 100
press '\r'
check "GRUB reads the kernel" soon 60 has_read $((before + 100))
kill_vxd
check "GRUB reads on" wait_until 60 has_read 100
check "no kernel runs yet" not says "Loading, please wait"
check "Debian is up" wait_guest "GUEST UP first" 200

step "what Debian finds"
check "lspci and its checks are done" wait_guest "GUEST INSTALLED" 200
grep 'GUEST' "$(console_of debian)" | grep -v 'GUEST VV' | sed 's/^/| /'
sed -n '/VV 00:1f/,/VV *.$/p' "$(console_of debian)" | sed 's/^/| /'
# Of lspci -vv, the lines of one function.
lines_of() { sed -n "/GUEST VV 00:$1 /,/GUEST VV .\{0,1\}\$/p" "$(console_of debian)"; }
shows() { # FUNCTION PATTERN...
  place=$1
  shift
  for pattern in "$@"; do lines_of "$place" | grep -q "$pattern" || { echo "no '$pattern' in:"; lines_of "$place"; return 1; }; done
}
for line in '10.0 2 SCSI storage controller: Red Hat, Inc. Virtio 1.0 block device' '11.0 2 SCSI storage controller: Red Hat, Inc. Virtio 1.0 block device' \
  '1d.0 2 Unclassified device \[00ff\]: Red Hat, Inc. Virtio 1.0 RNG' '1e.0 5 Communication controller: Red Hat, Inc. Virtio 1.0 console' \
  '1f.0 6 Ethernet controller: Red Hat, Inc. Virtio 1.0 network device'; do
  place=${line%% *} line=${line#* }
  check "lspci -vv shows ${line#* } at $place" shows "$place" "${line#* } (rev 01)" 'Control: I/O- Mem+ BusMaster+ .*DisINTx+' \
    'Status: Cap+ .*<TAbort- <MAbort- >SERR- <PERR-' 'Interrupt: pin A routed to IRQ' 'Region 0: Memory at f.* (32-bit, non-prefetchable) \[size=16K\]' \
    "MSI-X: Enable+ Count=${line%% *} Masked-" 'VirtIO: CommonCfg' 'VirtIO: ISR' 'VirtIO: DeviceCfg' 'VirtIO: Notify' 'multiplier=00000004' 'Kernel driver in use: virtio-pci'
done
check "each device, and each queue that notifies its driver, has a vector" says "GUEST VECTORS 15"
check "the network device has two pairs" says "GUEST NETWORK .*, 2 pairs"
check "random numbers" says "GUEST RANDOM 64"
check "what it writes to its console" wait_until 20 grep -q 'written to hvc1' /var/log/debian-console.log
check "verified I/O on the second disk" says "GUEST VERIFIED vdb"
check "grub-install and update-grub succeed" says "GUEST INSTALLED [2-9]"

step "reboot, and vxd dies while the kernel's drivers begin"
check "the GRUB that it has installed shows its menu" wait_menu
press '\r'
check "the initial RAM disk runs" soon 100 says 'Starting systemd-udevd' 2
kills=0
until says "GUEST UP installed" || [ $kills -ge 100 ] || [ -n "$(deaths)" ]; do
  kill_vxd
  kills=$((kills + 1))
  # Not to wait for anything: each time it is at another place.
  usleep $((kills * 100000))
done
echo "| $kills kills"
check "Debian is up, whenever vxd was killed" wait_guest "GUEST UP installed" 200
check "vxd died some times" test $kills -ge 3
check "what was written before the reboot is there" wait_guest "GUEST CHECKSUMS equal" 100
check "the network is reached" wait_until 30 ping -c 1 -W 1 10.9.0.2

step "kexec into another kernel, while frames come in all the time: none may land in its memory"
id=$(xl domid debian)
ping -i 0.002 10.9.0.255 >/dev/null 2>&1 &
frames=$!
check "it executes it" wait_guest "GUEST EXECUTES" 100
check "the other kernel is up" wait_guest "GUEST UP second" 200
grep 'GUEST UP' "$(console_of debian)" | sed 's/^/| /'
check "it is another one" equal "$(sed -n 's/GUEST UP [a-z]* \([^ ]*\).*/\1/p' "$(console_of debian)" | sort -u | wc -l)" 2
check "in the same domain" equal "$(xl domid debian)" "$id"
check "what the first one wrote is there" wait_guest "GUEST CHECKSUMS equal" 100 2
check "frames came until now" kill $frames
wait $frames 2>/dev/null
check "the network is reached" wait_until 30 ping -c 1 -W 1 10.9.0.2
check "verified I/O" wait_guest "GUEST ROUND 1" 100
kill_vxd
check "and beyond another death of vxd's" wait_guest "GUEST ROUND 3" 200
check "no function was unplugged" has_functions 3
vxctl explain debian | sed 's/^/| /'
check "vxctl explain finds no problem" vxctl explain debian
check "one ioreq server is there" equal "$(status_field ioreqServers)" 1
check "the guest is content" guest_says_nothing_bad debian

step "destroyed under its I/O, and created again"
check "xl destroy succeeds" xl destroy debian
check "the guest is gone" wait_gone debian 60
no_trace_left
check "GRUB's boot sectors are those that grub-install wrote" not equal "$(boot_sectors)" "$made"
check "xl create succeeds" create debian
check "GRUB shows its menu" wait_menu
press '\r'
check "Debian is up" wait_guest "GUEST UP last" 200
check "what was written before is there" wait_guest "GUEST CHECKSUMS equal" 100
check "verified I/O" wait_guest "GUEST VERIFIED last" 100
check "the guest is content" guest_says_nothing_bad debian
check "the guest powers off and is gone" wait_gone debian 100
no_trace_left
stop_vxd
