# takes: 80 s
# limit: 1200 s
# in the gate: turn 0
# The counterpart of balloon: with invalidations ignored, a guest that balloons must lose data, or the other scenario proves nothing.
make_disk /disks/one.img 96
GUEST_MEMORY=240
start_vxd --test-ignore-invalidations
write_config alpha "vx.test=stale" "$(disk xvde /disks/one.img)"
check "xl create succeeds" create alpha
check "the guest does verified I/O" wait_console alpha "GUEST ROUND 2" 400
# How far the balloon gets beside the guest's I/O, and whether it hits memory that is used for the disk again, is chance: there are as many turns
# as it takes, and none waits for a size.
is_hurt() { console_says alpha 'CORRUPT\|I/O error\|hung task\|EXT4-fs error'; }
goes_on() { wait_until 100 has_rounds alpha $(($(rounds_of alpha) + 2)); }
turn=0 stands=no
until is_hurt || [ $stands = yes ] || [ $turn = 20 ]; do
  turn=$((turn + 1))
  for size in 150 240; do
    xl mem-set alpha $size
    is_hurt || goes_on >/dev/null || is_hurt || stands=yes
  done
done
echo "| turns: $turn, memory: $(memory_of alpha) MiB"
check "data is corrupt, or the guest stands still" sh -c "[ $stands = yes ] || grep -q -E 'CORRUPT|I/O error|hung task|EXT4-fs error' $(console_of alpha)"
grep -m 3 -E 'CORRUPT|I/O error|hung task|EXT4-fs error' "$(console_of alpha)" | sed 's/^/| /'
xl destroy alpha
check "the domain is gone all the same" wait_until 30 domain_gone alpha
stop_vxd
