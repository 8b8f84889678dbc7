# takes: 60 s
# limit: 500 s
# in the gate: turn 0
# also on: arm64
# A second disk on the same image is refused, and the guest boots with the first: its kernel looks for the other one too.
start_vxd
remember_resources
make_disk /disks/a.img 48
write_config alpha "vx.test=load vx.disks=1" "$(disk xvde /disks/a.img)" "$(disk xvdf /disks/a.img)"
step "creating a guest with two disks on one image"
check "xl create succeeds" create alpha
check "the guest works with the first" wait_console alpha "GUEST ROUND 1" 300
check "which is connected" device_state_is alpha/xvde connected
check "the second is refused" device_state_is alpha/xvdf failed
vxctl list | sed 's/^/| /'
check "its entry says why" sh -c "xenstore-ls /local/domain/0/backend/virtio_disk | grep -q 'error = .*in use by alpha/xvde'"
check "the guest's kernel is well" guest_says_nothing_bad alpha
check "it goes on" wait_until 60 has_rounds alpha $(($(rounds_of alpha) + 2))
check "xl destroy" xl destroy alpha
check "the guest is gone" wait_gone alpha 60
wait_until 20 equal_now guests 0
no_trace_left
stop_vxd
