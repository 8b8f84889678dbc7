# takes: 57 s
# limit: 500 s
# in the gate: turn 3
# needs: xenbus
# processors: 5
# vxd in dom0 serves a PV and a PVH guest over Xenbus, beside its ioreq servers for HVM guests.
make_disk /disks/one.img 32
make_disk /disks/two.img 32
start_vxd
remember_resources
write_direct_config pv one "vx.test=fs" "$(disk xvda /disks/one.img)"
write_direct_config pvh two "vx.test=fs" "$(disk xvda /disks/two.img)"
for guest in one two; do check "$guest: xl create" create $guest; done
for guest in one two; do
  check "$guest: equal checksums" wait_console $guest "GUEST CHECKSUMS vda 5 equal" 200
  check "$guest: powers off and is gone" wait_gone $guest 60
  check "$guest is content" guest_says_nothing_bad $guest
done
no_trace_left
stop_vxd
