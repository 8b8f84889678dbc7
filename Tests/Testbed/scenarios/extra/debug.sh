# limit: 500 s
# needs: xenbus
# processors: 5
check "driver" create_driver_domain pv
write_direct_config pv two "vx.test=xenbus" "$(driver_disk xvda /disks/a.img)"
check "create" create two
check "disk" wait_console two "GUEST DISK" 100
check "unbound" wait_console two "GUEST UNBOUND" 60
sleep 3
xenstore-ls -f | grep virtio_disk | sed 's/^/| /'
check "back" wait_console two "GUEST BACK" 60
xenstore-ls -f | grep virtio_disk | sed 's/^/| /'
cat $(console_of two) | tail -60 | sed 's/^/| /'
cat $(console_of driver) | tail -30 | sed 's/^/| /'
