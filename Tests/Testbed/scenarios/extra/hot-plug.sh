# takes: 90 s
# limit: 700 s
# needs: xenbus
# in the gate: turn 3
# also on: arm64
# A guest that boots without a device, and an unprivileged driver domain with vxd: disks come and go over Xenbus while the guest runs.
step "a driver domain"
check "it comes up with vxd" create_driver_domain pvh
check "its privcmd is locked: it has no rights over guests" console_says driver "privcmd N\|privcmd none"
BEFORE=$(in_driver resources)
echo "| $BEFORE"
step "a guest without a disk"
write_direct_config pvh one "vx.test=xenbus"
check "xl creates it" create one
check "it is up" wait_console one "GUEST UP" 200
check "a disk is plugged in: the guest takes it" vxctl attach one disk --backend driver --image /disks/a.img --device xvda
check "its stock virtio_blk finds it, on a ring with event index and without indirect descriptors" \
  wait_console one "GUEST DISK vda .*features=............................01" 100
in_driver vxctl list | sed 's/^/| /'
check "the driver can be unbound and bound under I/O" wait_console one "GUEST BACK unbind" 200
check "and unloaded and loaded" wait_console one "GUEST BACK rmmod" 200
check "verified rounds" rounds_more one 1

step "a second disk, a block device of the driver domain's"
check "the guest takes it" vxctl attach one disk --backend driver --image /dev/loop0 --device xvdb
check "it is at work" wait_until 100 last_round_has one vdb
check "kill -9 of vxd under verified I/O on both" in_driver "kill_vxd; start_vxd"
check "verified rounds go on" rounds_more one 2
check "with both" last_round_has one vdb
check "the guest saw no error" not grep -E "GUEST (ERRORS|CORRUPT|FAIL)|Oops|BUG:|hung task" "$(console_of one)"

step "a disk is taken away under I/O"
check "vxctl detach" sh -c "vxctl detach one/xvdb --xenbus --deadline 60 | grep -q 'detached$'"
rounds_more one 2
check "it is gone from the guest" not last_round_has one vdb
check "and its entries" not xenstore-exists "/libxl/$(xl domid one)/device/virtio_disk/51728"
check "the other goes on" rounds_more one 1
check "no data was wrong" not grep -E "GUEST (ERRORS vda|CORRUPT|FAIL)|Oops|BUG:|hung task" "$(console_of one)"

step "the guest is destroyed under I/O"
check "xl destroy" xl destroy one
check "no zombie" wait_gone one 30
check "nothing is left in the driver domain" wait_until 60 sh -c ". /testbed-lib.sh; [ \"\$(in_driver resources)\" = '$BEFORE' ]"
check "xl destroy of the driver domain" xl destroy driver
check "it is gone" wait_gone driver 30
