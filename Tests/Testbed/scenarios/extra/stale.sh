# takes: 80 s
# limit: 1200 s
# The counterpart of balloon: with invalidations ignored, a guest that balloons must lose data, or the other scenario proves nothing.
make_disk /disks/one.img 96
GUEST_MEMORY=240
start_vxd --test-ignore-invalidations
write_config alpha "vx.test=stale" "$(disk xvde /disks/one.img)"
check "xl create succeeds" create alpha
check "the guest does verified I/O" wait_console alpha "GUEST ROUND 2" 400
# Whether a turn hits memory that is mapped, and used again for the disk, is chance: there are as many turns as it takes.
balloon alpha 20 205 | sed 's/^/| /'
check "data is corrupt, or the guest stands still" sh -c "grep -q -E 'CORRUPT|I/O error|hung task|EXT4-fs error' $(console_of alpha)"
grep -m 3 -E 'CORRUPT|I/O error|hung task|EXT4-fs error' "$(console_of alpha)" | sed 's/^/| /'
xl destroy alpha
check "the domain is gone all the same" wait_until 30 domain_gone alpha
stop_vxd
