# takes: 250 s
# limit: 1800 s
# also on: trixie
# in the gate: turn 3
# processors: 6
# A guest's program writes rubbish to the configuration space, the BAR, the vectors and the queues of a function (guest/hostile-pci.c) from two vCPUs, beside a
# neighbour under verified I/O: vxd serves the neighbour and answers its operators, and the function works when a driver is bound to it again. Then
# the guest reboots.
make_disk /disks/victim.img 32
make_disk /disks/third.img 32
make_disk /disks/neighbour.img 32
printf '{"version": 1, "guests": [{"guest": "*", "transport": "pci"}]}\n' >/etc/vxd/profiles.json
start_vxd
remember_resources
pid=$(vxd_pid)
write_config beta "vx.bus=pci vx.test=crash vx.disks=2" "$(disk xvde /disks/boot-beta.img)" "$(disk xvdf /disks/neighbour.img)"
GUEST_VCPUS=2 GUEST_MEMORY=256
write_config alpha "vx.bus=pci vx.test=hostilepci vx.seeds=3 vx.rounds=300" "$(disk xvde /disks/boot-alpha.img)" \
  "$(disk xvdf /disks/victim.img)" "$(disk xvdg /disks/third.img)"
for name in alpha beta; do
  sed -i -e '/acpi_firmware/d' -e '/device_model_args_hvm/,/\]$/d' /root/$name.cfg
  echo 'boot = "c"' >>/root/$name.cfg
done
sed -i 's/^on_reboot.*/on_reboot = "restart"/' /root/alpha.cfg

step "a neighbour under verified I/O"
check "xl create succeeds" create beta
check "it does I/O" wait_console beta "GUEST ROUND 1" 400
step "the hostile guest"
check "xl create succeeds" create alpha
check "its disk works before" wait_console alpha "GUEST VERIFIED vdb" 400
rounds_more() { wait_until 200 has_rounds beta $(($(rounds_of beta) + $1)) || { tail -n 20 "$(console_of beta)"; return 1; }; }
has_ended() { test "$(grep -c 'GUEST HOSTILE END' "$(console_of alpha)")" -ge "$1"; }
# A driver that has broken its queues fifty times in ten minutes is left alone until an operator says otherwise; the guest's requests wait.
let_go_on() { test "$(device_state alpha/xvdf)" != quarantined || vxctl device restart alpha/xvdf; }
has_written() { test "$(grep -c 'GUEST HOSTILE 100 rounds' "$(console_of alpha)")" -ge "$1"; }
# It answers, whatever it finds.
doctor() { timeout 30 vxctl doctor >/tmp/doctor.out 2>&1; test $? -le 1 && test -s /tmp/doctor.out; }
# Behind the last turn it reboots, whether it has been looked at by then or not.
MAY_REBOOT=3
for turn in 1 2 3; do
  check "turn $turn: rubbish is written" wait_until 400 has_written $turn
  check "turn $turn: vxctl show answers" timeout 30 vxctl show alpha/xvdf
  check "turn $turn: vxctl doctor answers" doctor
  check "turn $turn: the neighbour goes on" rounds_more 1
  check "turn $turn: it ends" wait_until 400 has_ended $turn
  echo "| turn $turn: $(device_state alpha/xvdf)"
  check "turn $turn: a device in quarantine is let go on" let_go_on
  check "turn $turn: the function works with its driver again" wait_console alpha "GUEST REFORMED $turn" 400
  # Its state is the next turn's by now.
  check "turn $turn: and has served verified I/O" console_says alpha "GUEST VERIFIED vdb-after-$turn"
done
grep 'GUEST HOSTILE END\|GUEST VERIFIED' "$(console_of alpha)" | sed 's/^/| /'
vxctl show alpha/xvdf | sed 's/^/| /'
grep -c 'faulted' $VXD_LOG | sed 's/^/| faults that vxd noted: /'
check "the neighbour is content" guest_says_nothing_bad beta
check "vxd is the same process" equal "$(vxd_pid)" "$pid"

step "the guest reboots"
check "it says so" wait_console alpha "GUEST REBOOTS" 100
is_back() { console_says alpha "GUEST REBOOTED"; }
check "it boots from its disk again, as another domain" wait_until 500 is_back
xl domid alpha >/run/domid-alpha
check "its disk works" wait_console alpha "GUEST ROUND 1" 400
check "it ran into nothing" not grep -E "GUEST FAIL|Oops|BUG:" "$(console_of alpha)"
check "the neighbour goes on" rounds_more 1
check "vxd is the same process" equal "$(vxd_pid)" "$pid"
for name in alpha beta; do
  check "$name shuts down" xl shutdown $name
  check "$name powers off and is gone" wait_gone $name 200
done
no_trace_left
stop_vxd
