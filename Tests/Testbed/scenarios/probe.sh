t0=$(date +%s)
write_config alpha "vx.test=describe_disks"
sed -i 's/^disk.*//' /root/alpha.cfg
check "create" create alpha
t1=$(date +%s)
i=0
while [ $i -lt 90 ]; do sleep 1; i=$((i+1)); grep -q "GUEST UP" $(console_of alpha) && break;  done
echo waited $i create took $((t1-t0))
check "upp" console_says alpha "GUEST UP"
xl list
wait_gone alpha 60
echo gone $(($(date +%s)-t0))
tail -50 $(console_of alpha)
cat /tmp/xl-alpha.out
