# limit: 900 s
# needs: xenbus
# An unprivileged driver domain serves PV and PVH guests over Xenbus.
step "a driver domain, an ordinary PVH guest"
check "it comes up with vxd" create_driver_domain
in_driver vxctl status | sed 's/^/| /'
BEFORE=$(in_driver resources)
step "a PVH guest with a disk from it"
write_direct_config pvh one "vx.test=fs vx.disks=1" "$(driver_disk xvda /disks/a.img)"
check "xl create" create one
in_driver vxctl status | sed 's/^/| /'
check "the guest's virtio_blk finds the disk" wait_console one "GUEST DISK vda" 120
check "equal checksums" wait_console one "GUEST CHECKSUMS vda 5 equal" 120
in_driver vxctl show domain-2/xvda | sed 's/^/| /'
check "the guest is content" guest_says_nothing_bad one
check "the guest powers off and is gone" wait_gone one 60
check "nothing is left in the driver domain" equal "$(in_driver resources)" "$BEFORE"
