# limit: 900 s
# The main job: an unmodified HVM guest makes a file system on a disk that vxd serves, and leaves no trace.
make_disk /disks/one.img 64
start_vxd
remember_resources
write_config alpha "vx.test=fs" "$(disk xvde /disks/one.img)"
step "creating the guest"
T0=$(date +%s)
check "xl create succeeds" create alpha
check "the guest's kernel finds the virtio disk" wait_console alpha "GUEST DISK vda" 300
step "disk found after $(($(date +%s) - T0)) s"
vxctl status | sed 's/^/| /'
check "the guest reads back equal checksums from a fresh ext4" wait_console alpha "GUEST CHECKSUMS vda 5 equal" 300
check "the guest is content" guest_says_nothing_bad alpha
check "the guest powers off and is gone" wait_gone alpha 120
no_trace_left
stop_vxd
