# takes: 74 s
# limit: 800 s
# What an operator does with a running guest: attach and detach a disk, limits, pause, restart, explain; roles and metrics.
make_disk /disks/alpha.img 32
make_disk /disks/added.img 24
cat >/etc/vxd/profiles.json <<'JSON'
{"version": 1, "guests": [{"guest": "alpha", "spareDisks": 1}], "disks": [{"guest": "alpha", "device": "xvde", "restartLimit": 20}]}
JSON
run_vxd_unprivileged
start_vxd
check "vxd runs as a user of its own with two capabilities" sh -c \
  "grep -q '^Uid:.990' /proc/$(vxd_pid)/status && grep -q '^CapEff:.0000000000001002' /proc/$(vxd_pid)/status"
check "vxctl checks profiles" vxctl config check /etc/vxd/profiles.json
remember_resources
write_config alpha "vx.test=operate" "$(disk xvde /disks/alpha.img)"
step "a guest with a disk and a spare"
check "xl create succeeds" create alpha
check "the guest has the disk" wait_console alpha "GUEST FIRST vda 65536" 300
check "and an empty spare" wait_console alpha "GUEST SPARE vdb 0" 60

step "a disk is attached while the guest runs"
check "vxctl attach tells its way in a dry run" sh -c "vxctl attach alpha disk --image /disks/added.img --dry-run | grep -q 'would do: /disks/added.img is attached as alpha/spare0'"
check "a missing image is refused in words" sh -c "! vxctl attach alpha disk --image /disks/nothing.img 2>/tmp/attach.err && grep -q nothing.img /tmp/attach.err"
check "vxctl attach succeeds" vxctl attach alpha disk --image /disks/added.img
check "the guest's kernel sees its size" wait_console alpha "GUEST ATTACHED vdb 49152" 60
check "the guest uses it: a file system with equal checksums" wait_console alpha "GUEST CHECKSUMS vdb 5 equal" 200

step "what vxd holds of a guest is good for that guest alone"
# Of the guest: handles for its registers, memory and event channels. libxencall, for kernels before 4.11, keeps a file that is not tied.
handles() { handles_out=$(/bin/handles "$(vxd_pid)" "$1") && echo "$handles_out" && equal "$(echo "$handles_out" | grep -c "$2")" "$3"; }
alpha=$(xl domid alpha)
check "its own domain: two handles for hypercalls and the one of libxencall" handles "$alpha" "privcmd yes" 3
check "another domain: only the one of libxencall" handles $((alpha + 1)) "privcmd yes" 1
check "and no event channel" handles $((alpha + 1)) "evtchn yes" 0
check "but of its own" handles "$alpha" "evtchn yes" 1

step "limits, while fio runs"
check "fio runs without a limit" wait_console alpha "GUEST FREE" 100
vxctl limit alpha/xvde --write-ops 20
check "with 20 writes a second, 200 writes take about 10 s" wait_console alpha "GUEST LIMITED vda" 150
seconds=$(sed -n 's/.*GUEST LIMITED vda \([0-9]*\).*/\1/p' "$(console_of alpha)")
check "they took $seconds s" test "$seconds" -ge 8 -a "$seconds" -le 25
check "the waits are counted" sh -c "vxctl metrics | grep 'vxd_device_throttled_total' | grep -q -v ' 0$'"
vxctl limit alpha/xvde --write-ops 0

step "pause and restart under I/O"
check "the guest does verified I/O" wait_console alpha "GUEST ROUND 1" 100
check "pause" vxctl pause alpha/xvde
check "the device is paused" device_state_is alpha/xvde paused
check "resume" vxctl resume alpha/xvde
for turn in 1 2 3; do check "restart $turn" vxctl device restart alpha/xvde; done
check "the guest goes on" wait_until 100 has_rounds alpha $(($(rounds_of alpha) + 1))
check "explain finds nothing wrong" vxctl explain alpha
vxctl explain alpha | sed 's/^/| /'
check "top shows the devices" sh -c "vxctl top --count 1 | grep -q 'alpha/xvde'"

step "the disk is detached"
check "vxctl detach" vxctl detach alpha/spare0
check "the guest sees it go" wait_console alpha "GUEST DETACHED vdb" 60
check "vxd has closed the image" sh -c "! ls -l /proc/$(vxd_pid)/fd | grep -q added.img"
check "the guest shuts down" xl shutdown alpha
check "the guest is content" guest_says_nothing_bad alpha
check "the guest powers off and is gone" wait_gone alpha 120
no_trace_left
step "the end of vxd by its own verb"
check "vxctl shutdown" vxctl shutdown
check "vxd has ended" wait_until 20 not vxd_runs
