# limit: 900 s
# Trouble that stays where it is: entries with something wrong, an image that two want, a guest's second disk that works.
make_disk /disks/good.img 48
make_disk /disks/shared.img 32
printf 'too small' >/disks/small.img
start_vxd
remember_resources
mkdir -p /disks/folder
write_config alpha "vx.test=fs vx.disks=1" "$(disk xvde /disks/good.img)" "$(disk xvdf /disks/small.img)"
step "a guest whose second image is too small"
T0=$(date +%s)
check "xl create does not fail for it" create alpha
check "and does not hang" test $(($(date +%s) - T0)) -lt 60
check "the entry's error node names the key and the reason" \
  sh -c "xenstore-read backend/virtio_disk/1/51792/error | grep -q \"params: '/disks/small.img' has 9 bytes\""
check "vxctl says the same" sh -c "vxctl show alpha/xvdf | grep -q 'has 9 bytes'"
check "the first disk is ready" wait_until 10 device_state_is alpha/xvde ready
vxctl status | sed 's/^/| /'
step "correcting the entry of the running guest"
truncate -s 32M /disks/fixed.img
xenstore-write backend/virtio_disk/1/51792/params /disks/fixed.img
check "vxd follows and the disk becomes ready" wait_until 10 device_state_is alpha/xvdf ready
check "the error node is gone" not xenstore-exists backend/virtio_disk/1/51792/error
check "the guest reads back equal checksums from its good disk" wait_console alpha "GUEST CHECKSUMS vda 5 equal" 300
check "the guest is content" guest_says_nothing_bad alpha
check "the guest powers off and is gone" wait_gone alpha 120

step "two guests that want the same image"
write_config beta "vx.test=load" "$(disk xvde /disks/shared.img)"
write_config gamma "vx.test=load" "$(disk xvde /disks/shared.img)"
check "xl creates the first" create beta
check "xl creates the second" create gamma
check "the second is refused with the name of the first" sh -c "vxctl show gamma/xvde | grep -q 'in use by beta/xvde'"
check "vxctl doctor points at it" sh -c "vxctl doctor | grep -q 'BAD gamma/xvde'"
xl destroy gamma
xl destroy beta
check "both are gone" wait_until 30 domain_gone beta

step "bad requests on the control socket"
check "an unknown guest is named" sh -c "vxctl list nobody 2>&1 | grep -q \"there is no guest 'nobody'\""
no_trace_left
stop_vxd
