# limit: 1200 s
# Memory taken from a guest and given back under verified I/O. `extra/stale` is its counterpart.
make_disk /disks/one.img 96
memory() { xl list alpha | awk 'NR == 2 {print $3}'; }
# The balloon stops before what it is told: the guest is busy with its memory.
is_small() { test "$(memory)" -le 185; }
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

start_vxd
remember_resources
GUEST_MEMORY=240
write_config alpha "vx.test=balloon" "$(disk xvde /disks/one.img)"
check "xl create succeeds" create alpha
check "the guest does verified I/O" wait_console alpha "GUEST ROUND 2" 400
step "taking memory away and giving it back, twice"
check "the guest balloons down and up under I/O" balloon 2
check "Xen told vxd of it" test "$(vxctl status --json | tr ',{}' '\n\n\n' | sed -n 's/.*"invalidations": *\([0-9]*\).*/\1/p' | head -n 1)" -gt 0
vxctl status --json | tr ',{}' '\n\n\n' | grep invalidations | sed 's/^/| /'
check "not a byte differs" not console_says alpha CORRUPT
check "the guest is content" guest_says_nothing_bad alpha
xl destroy alpha
check "the domain is gone" wait_until 30 domain_gone alpha
no_trace_left
stop_vxd

