# limit: 3000 s
# needs: xenbus
# needs: compare
# processors: 2
# dom0 processors: 1
# Benchmarks/compare: what requests and packets of an HVM guest cost over virtio-pci and virtio-mmio, and a PVH guest's over Xenbus, all by vxd in dom0,
# one after the other. See block.sh. dom0 looks at the guest's traps while the guest waits, and at nothing while it measures. A third processor would
# stand still now and then (ARCHITECTURE.md, pitfalls).
. /compare/lib.sh
part=hvm

insmod /modules/brd.ko rd_nr=1 rd_size=65536 && dd if=/dev/zero of=/dev/ram0 bs=1M count=64 2>/dev/null
load_modules llc stp bridge tun
brctl addbr br0
ip addr add 10.7.0.1/24 dev br0
ip link set br0 up
iperf3 -s -D >/dev/null 2>&1
packets serve &
printf '{"version": 1, "guests": [{"guest": "vxd-pci-hvm", "transport": "pci", "devices": [{"type": "network", "bridge": "br0"}]},
  {"guest": "vxd-mmio-hvm", "devices": [{"type": "network", "bridge": "br0"}]}]}\n' >/etc/vxd/profiles.json
start_vxd

# Over Xenbus a network device is plugged into a guest that runs.
attach() { # NAME
  until xl domid "$1" >/dev/null 2>&1; do usleep 100000; done
  vxctl attach "$1" network --backend 0 --options '{"bridge": "br0"}' >/tmp/attach.out 2>&1 || sed 's/^/| /' /tmp/attach.out
}

# Requests of a disk, accesses of the guest that vxd has answered, its notifications, and the interrupts that it got.
readings() {
  echo "$(device_field "$1" reads) $(($(status_field accesses) - $(status_field invalidations)))" \
    "$(device_field "$1" notifications) $(device_field "$1" interrupts)"
}
look() { # NAME DISK
  until console_says "$1" COUNTING; do usleep 500000; done
  # shellcheck disable=SC2046
  set -- "$1" "$2" $(readings "$1/$2")
  until console_says "$1" COUNTED; do usleep 500000; done
  # shellcheck disable=SC2046
  set -- "$@" $(readings "$1/$2")
  echo "| TRAPS $1 requests=$(($7 - $3)) accesses=$(($8 - $4)) notifications=$(($9 - $5)) interrupts=$((${10} - $6))"
}
look_pci() { look "$1" xvdf; }
look_mmio() { look "$1" xvde; }

boot_disk /disks/boot.img pci vdb
BESIDE=look_pci hvm_guest vxd-pci-hvm "boot = \"c\"
disk = [ $(disk xvde /disks/boot.img), $(disk xvdf /dev/ram0) ]"
boot_disk /disks/boot.img mmio vda
BESIDE=look_mmio hvm_guest vxd-mmio-hvm "acpi_firmware = \"/etc/vxd/slots.aml\"
$AHCI
disk = [ $(disk xvde /dev/ram0) ]"
# Nothing traps to vxd there, so there is nothing to look at.
BESIDE=attach guest vxd-xenbus-pvh pvh virtio "disk = [ $(disk xvda /dev/ram0) ]"
stop_vxd
