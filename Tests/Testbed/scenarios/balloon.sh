# limit: 1200 s
# Memory taken from a guest and given back under verified I/O. `extra/stale` is its counterpart.
make_disk /disks/one.img 96
start_vxd
remember_resources
GUEST_MEMORY=240
write_config alpha "vx.test=balloon" "$(disk xvde /disks/one.img)"
check "xl create succeeds" create alpha
check "the guest does verified I/O" wait_console alpha "GUEST ROUND 2" 400
step "taking memory away and giving it back, twice"
check "the guest balloons down and up under I/O" balloon alpha 2 185
check "Xen told vxd of it" test "$(vxctl status --json | tr ',{}' '\n\n\n' | sed -n 's/.*"invalidations": *\([0-9]*\).*/\1/p' | head -n 1)" -gt 0
vxctl status --json | tr ',{}' '\n\n\n' | grep invalidations | sed 's/^/| /'
check "not a byte differs" not console_says alpha CORRUPT
check "the guest is content" guest_says_nothing_bad alpha
xl destroy alpha
check "the domain is gone" wait_until 30 domain_gone alpha
no_trace_left
stop_vxd
