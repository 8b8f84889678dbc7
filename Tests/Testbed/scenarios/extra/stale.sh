# limit: 700 s
# The counterpart of balloon: with invalidations ignored, a guest that balloons must lose data, or the other scenario proves nothing.
make_disk /disks/one.img 96
memory() { xl list alpha | awk 'NR == 2 {print $3}'; }
# The balloon stops before what it is told: the guest is busy with its memory.
is_small() { test "$(memory)" -le 205; }
is_large() { test "$(memory)" -ge 225; }
rounds() { grep -c 'GUEST ROUND' "$(console_of alpha)"; }
more_rounds() { test "$(rounds)" -ge "$1"; }

balloon() { # TIMES : down and up again, with rounds of I/O at both sizes
  for turn in $(seq "$1"); do
    xl mem-set alpha 150 && wait_until 120 is_small || { echo "it has $(memory) MiB"; return 1; }
    wait_until 200 more_rounds $(($(rounds) + 1)) || return 1
    xl mem-set alpha 240 && wait_until 120 is_large || { echo "it has $(memory) MiB"; return 1; }
    wait_until 200 more_rounds $(($(rounds) + 2)) || return 1
    ! console_says alpha CORRUPT || return 0
  done
}

GUEST_MEMORY=240
start_vxd --test-ignore-invalidations
write_config alpha "vx.test=stale" "$(disk xvde /disks/one.img)"
check "xl create succeeds" create alpha
check "the guest does verified I/O" wait_console alpha "GUEST ROUND 2" 400
balloon 4 | sed 's/^/| /'
check "data is corrupt, or the guest stands still" sh -c "grep -q -E 'CORRUPT|I/O error|hung task|EXT4-fs error' $(console_of alpha)"
grep -m 3 -E 'CORRUPT|I/O error|hung task|EXT4-fs error' "$(console_of alpha)" | sed 's/^/| /'
xl destroy alpha
check "the domain is gone all the same" wait_until 30 domain_gone alpha
stop_vxd
