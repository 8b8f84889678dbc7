# limit: 400 s
for i in 1 2 3 4 5 6; do
  write_config alpha "vx.test=describe_disks earlyprintk=xen"
  sed -i 's/^disk.*//' /root/alpha.cfg
  rm -f /var/log/xen/guest-alpha.log
  t0=$(date +%s)
  create alpha
  up_or_dead() { console_says alpha "GUEST UP" || ! xl list alpha; }
  wait_until 60 up_or_dead
  check "try $i after $(($(date +%s) - t0)) s" console_says alpha "GUEST UP"
  xl dmesg | grep -A3 "Triple" | tail -3
  xl destroy alpha
done
