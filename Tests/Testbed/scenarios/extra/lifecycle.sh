# takes: 108 s
# limit: 900 s
# in the gate: turn 2
# also on: arm64
# The ends of guests: destroyed under I/O, shut down by the toolstack; a guest that waits for vxd; a lower domain number.
make_disk /disks/one.img 64
make_disk /disks/two.img 64

step "a guest that is created before vxd runs"
number_domains random
write_config alpha "vx.test=load" "$(disk xvde /disks/one.img)"
create alpha &
CREATING=$!
wait_until 10 xenstore-exists backend/virtio_disk
start_vxd
check "vxd adopts the guest that waits for it, and xl create succeeds" wait $CREATING
check "the adopted guest does I/O" wait_console alpha "GUEST ROUND 2" 300
remember_later_threads=$(threads_of_vxd)

step "destroying it under I/O"
check "xl destroy succeeds under I/O" xl destroy alpha
check "the domain is gone, no zombie is left" wait_until 20 domain_gone alpha
check "xl did not have to wait in vain for the backend" not grep -i "timed out\|unable to remove" /tmp/xl-alpha.out
check "no ioreq server is left" wait_until 10 equal_now ioreqServers 0
check "no guest page is mapped" equal "$(mappings_of_vxd)" 0
remember_resources
check "threads of the guest are gone" test "$THREADS" -lt "$remember_later_threads"

step "the same guest again, shut down by the toolstack; then one with a lower domain number"
check "xl creates it again" create alpha
EARLIER=$(xl domid alpha)
check "it does I/O again" wait_console alpha "GUEST ROUND 2" 300
check "xl shutdown is accepted" xl shutdown alpha
check "the guest ends and is gone" wait_gone alpha 120
# As after a wrap of the numbers.
number_domains xen
write_config gamma "vx.test=fs" "$(disk xvde /disks/two.img)"
check "xl creates another guest" create gamma
check "its number, $(xl domid gamma), is lower than the one before, $EARLIER" test "$(xl domid gamma)" -lt "$EARLIER"
check "it reads back equal checksums" wait_console gamma "GUEST CHECKSUMS vda 5 equal" 300
check "it powers off and is gone" wait_gone gamma 120
no_trace_left
stop_vxd
