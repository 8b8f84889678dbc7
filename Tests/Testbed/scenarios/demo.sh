# takes: 173 s
# limit: 900 s
# needs: xenbus
# processors: 5
# `make demo`: the main job, told step by step.
show() { echo "STEP \$ $*"; "$@" 2>&1 | sed 's/^/| /'; }

step "dom0 is up: $(xl info | sed -n 's/^xen_version *: /Xen /p'), $(xl info | sed -n 's/^release *: /Linux /p')"
make_disk /disks/web1.img 64
start_vxd
step "vxd runs (pid $(vxd_pid)) and watches Xenstore"
remember_resources
write_config web1 "vx.test=fs" "$(disk xvde /disks/web1.img)"
step "xl create web1.cfg, with: $(grep '^disk' /root/web1.cfg)"
check "xl create succeeded: vxd brought the backend to state InitWait, which xl waits for" create web1
show vxctl status
step "web1 boots (BIOS, boot loader, Debian's kernel: about a minute)"
check "the guest's virtio_mmio and virtio_blk modules found the disk" wait_console web1 "GUEST DISK vda" 300
check "the guest made an ext4 file system on /dev/vda" wait_console web1 "GUEST FILESYSTEM vda" 300
show vxctl list
check "the guest wrote files, synced, and read them back with equal checksums" \
  wait_console web1 "GUEST CHECKSUMS vda 5 equal" 300
show vxctl show web1/xvde
check "the guest powered off" wait_gone web1 120
no_trace_left
show vxctl status
stop_vxd

step "second act: a driver domain, an ordinary PVH guest without any right over others, with vxd in it"
check "the driver domain is up, its privcmd locked" create_driver_domain pvh
write_direct_config pvh web2 "vx.test=fs" "$(driver_disk xvda /disks/a.img)"
step "xl create web2.cfg, with: $(grep '^disk' /root/web2.cfg)"
check "xl create succeeded" create web2
check "the guest's stock virtio_blk found the disk, over Xenbus" wait_console web2 "GUEST DISK vda" 200
check "the guest made an ext4 file system on /dev/vda" wait_console web2 "GUEST FILESYSTEM vda" 200
in_driver vxctl list | sed 's/^/| /'
check "the guest wrote files, synced, and read them back with equal checksums" \
  wait_console web2 "GUEST CHECKSUMS vda 5 equal" 300
check "the guest powered off" wait_gone web2 120
check "the driver domain holds nothing of it" sh -c ". /testbed-lib.sh; in_driver resources | grep -q 'mappings 0'"
xl destroy driver
