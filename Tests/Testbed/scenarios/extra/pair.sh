# takes: 110 s
# limit: 900 s
# in the gate: turn 2
# Two guests at once, each with two disks: a file with buffered I/O and a block device with direct I/O through the bounce buffers.
insmod /modules/loop.ko max_loop=4
make_disk /disks/a1.img 48
make_disk /disks/a2.img 32
make_disk /disks/b1.img 48
make_disk /disks/b2.img 32
losetup /dev/loop0 /disks/a2.img
losetup /dev/loop1 /disks/b2.img
start_vxd
remember_resources
write_config alpha "vx.test=fs vx.disks=2" "$(disk xvde /disks/a1.img)" "$(disk xvdf /dev/loop0)"
write_config beta "vx.test=fs vx.disks=2" "$(disk xvde /disks/b1.img)" "$(disk xvdf /dev/loop1)"
step "creating two guests"
check "xl creates the first guest" create alpha
check "xl creates the second guest" create beta
check "each guest has one ioreq server, however many disks" equal "$(status_field ioreqServers)" 2
check "the first disk of the first guest is in state 2 or later" test "$(xenstore-read backend/virtio_disk/1/51776/state)" -ge 2
for guest in alpha beta; do
  check "$guest reads back equal checksums from its file" wait_console $guest "GUEST CHECKSUMS vda 5 equal" 300
  check "$guest reads back equal checksums from its block device" wait_console $guest "GUEST CHECKSUMS vdb 5 equal" 300
  check "$guest is content" guest_says_nothing_bad $guest
done
for guest in alpha beta; do check "$guest powers off and is gone" wait_gone $guest 120; done
check "vxd used direct I/O on the block devices" grep -q "alpha/xvdf: device.ready: /dev/loop0, direct" $VXD_LOG
no_trace_left
stop_vxd
