# limit: 1100 s
# processors: 6
# Four vCPUs and disks with four queues on threads of their own, split and packed, under fio with checksums.
insmod /modules/loop.ko max_loop=4
make_disk /disks/split.img 48
make_disk /disks/packed.img 48
losetup /dev/loop0 /disks/split.img
losetup /dev/loop1 /disks/packed.img
profiles '{"guest": "alpha", "queues": 4, "threads": 4}, {"guest": "alpha", "device": "xvdf", "packed": true, "threads": 2}'
start_vxd
remember_resources
GUEST_VCPUS=4 GUEST_CPUS="2-5" GUEST_MEMORY=256
write_config alpha "vx.test=queues vx.disks=2" "$(disk xvde /dev/loop0)" "$(disk xvdf /dev/loop1)"
step "creating a guest with four vCPUs"
check "xl create succeeds" create alpha
check "the guest's driver uses four queues" wait_console alpha "GUEST QUEUES vda 4 of 4" 400
for name in vda vdb; do
  check "$name: random writes and flushes verify" wait_console alpha "GUEST VERIFIED $name-writes" 400
  check "$name: mixed reads and writes verify" wait_console alpha "GUEST VERIFIED $name-mixed" 400
  check "$name: writes and discards verify" wait_console alpha "GUEST VERIFIED $name-discards" 400
done
check "the guest is done" wait_console alpha "GUEST DONE" 100
used_queues() { vxctl show "$1" --json | tr -d ' \n' | sed 's/.*"requestsByQueue":\[\([0-9,]*\)\].*/\1/' | tr ',' '\n' | grep -c -v '^0$'; }
check "every queue of the split disk was used" equal "$(used_queues alpha/xvde)" 4
check "every queue of the packed disk was used" equal "$(used_queues alpha/xvdf)" 4
check "the packed disk negotiated packed rings" sh -c "grep 'DISK vdb' $(console_of alpha) | sed 's/.*features=//' | cut -c35 | grep -q 1"
vxctl show alpha/xvdf | sed 's/^/| /'
check "the guest shuts down" xl shutdown alpha
check "the guest is content" guest_says_nothing_bad alpha
check "the guest powers off and is gone" wait_gone alpha 120
no_trace_left
stop_vxd
