# takes: 90 s
# limit: 600 s
# needs: xenbus
# processors: 5
# A PV, a PVH and an HVM guest with Xen's default tsc_mode. All other guests have the native one, which is quicker: Xen intercepts RDTSC on
# processors without an invariant TSC, such as the emulated one.
start_vxd
remember_resources
GUEST_TSC=default
for type in pv pvh; do
  make_disk /disks/$type.img 32
  write_direct_config $type $type "vx.test=fs" "$(disk xvda /disks/$type.img)"
done
make_disk /disks/hvm.img 32
write_config hvm "vx.test=fs" "$(disk xvde /disks/hvm.img)"
for guest in pv pvh hvm; do
  check "$guest: the configuration asks for the default" grep -q '^tsc_mode = "default"' /root/$guest.cfg
  check "$guest: xl create" create $guest
  domain=$(xl domid $guest)
  xl debug-keys s
  check "$guest: Xen emulates its time stamp counter as it finds right" wait_until 5 sh -c "xl dmesg | grep -q 'dom$domain.*: mode=0'"
  check "$guest: equal checksums" wait_console $guest "GUEST CHECKSUMS vda 5 equal" 200
  check "$guest: it powers off and is gone" wait_gone $guest 60
  check "$guest is content" guest_says_nothing_bad $guest
done
no_trace_left
stop_vxd
