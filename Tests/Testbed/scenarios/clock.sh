# takes: 55 s
# limit: 300 s
# needs: xenbus
# processors: 5
# A PV guest with Xen's default tsc_mode. All other guests have the native one: Xen intercepts RDTSC on processors without an invariant TSC,
# such as the emulated one, and QEMU's emulation of SVM loses HVM and PVH guests by that intercept now and then. PV guests have none.
start_vxd
remember_resources
make_disk /disks/one.img 32
GUEST_TSC=default
write_direct_config pv one "vx.test=fs" "$(disk xvda /disks/one.img)"
check "the configuration asks for the default" grep -q '^tsc_mode = "default"' /root/one.cfg
check "xl create" create one
xl debug-keys s
check "Xen emulates its time stamp counter as it finds right" wait_until 5 sh -c "xl dmesg | grep -q 'dom$(xl domid one): mode=0'"
check "equal checksums" wait_console one "GUEST CHECKSUMS vda 5 equal" 200
check "it powers off and is gone" wait_gone one 60
check "it is content" guest_says_nothing_bad one
no_trace_left
stop_vxd
