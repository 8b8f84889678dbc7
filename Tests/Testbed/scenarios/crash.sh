# limit: 1100 s
# processors: 6
# vxd is killed under verified I/O, five times, and ended and started again as an upgrade does: the guest sees a pause.
insmod /modules/loop.ko max_loop=4
make_disk /disks/split.img 48
make_disk /disks/packed.img 48
losetup /dev/loop0 /disks/split.img
profiles '{"guest": "alpha", "device": "xvdf", "packed": true, "queues": 2, "threads": 2}'
start_vxd
remember_resources
GUEST_VCPUS=2 GUEST_CPUS="2-5" GUEST_MEMORY=256
write_config alpha "vx.test=crash vx.disks=2" "$(disk xvde /dev/loop0)" "$(disk xvdf /disks/packed.img)"
step "creating a guest with two disks under load"
check "xl create succeeds" create alpha
check "the guest does I/O" wait_console alpha "GUEST ROUND 1" 400

kill_vxd() { # as a supervisor sees it: the process dies, and is started again
  kill -9 "$(vxd_pid)"
  wait "$(vxd_pid)" 2>/dev/null
  start_vxd
}
guest_goes_on() { wait_until 200 has_rounds alpha $(($(rounds_of alpha) + 1)) && ! console_says alpha FAIL; }

for turn in 1 2 3 4 5; do
  step "kill -9 of vxd, turn $turn"
  sleep $turn # not to wait for anything: to be at another place of the load each time
  kill_vxd
  check "both disks are served again" wait_until 60 device_state_is alpha/xvdf connected
  check "the guest goes on" guest_goes_on
  check "one ioreq server is there: the old one" equal "$(status_field ioreqServers)" 1
done
check "vxd took up what it was doing" grep -q "going on where an earlier vxd was stopped, with 2 devices" $VXD_LOG

step "vxd is killed and stays away for a while"
kill -9 "$(vxd_pid)"
wait "$(vxd_pid)" 2>/dev/null
sleep 10 # the guest waits meanwhile
check "the guest still runs" xl list alpha
start_vxd
check "it goes on" guest_goes_on

step "vxd is ended in good order and started again"
stop_vxd
start_vxd
check "the guest goes on" guest_goes_on
vxctl status | sed 's/^/| /'
vxctl show alpha/xvdf | sed 's/^/| /'
check "the guest shuts down" xl shutdown alpha
check "the guest is content" guest_says_nothing_bad alpha
check "the guest powers off and is gone" wait_gone alpha 200
no_trace_left
check "no saved state is left" equal "$(ls /run/vxd/state | wc -l)" 0
stop_vxd
