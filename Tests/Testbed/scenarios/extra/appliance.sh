# takes: 60 s
# limit: 300 s
# needs: xenbus appliance
# processors: 5
# exploration
now() { cut -d' ' -f1 /proc/uptime; }
step "create at $(now)"
cp /usr/lib/vxd-appliance/vxd-appliance.cfg /root/storage.cfg
check "create" create storage
step "created at $(now)"
answers() { vxctl status --domain storage; }
POLL=100000
check "serves" wait_until 60 console_says storage "listening on"
step "listening at $(now)"
time vxctl status --domain storage 2>&1 | sed 's/^/| /'
vxctl list --domain storage 2>&1 | sed 's/^/| /'
time vxctl metrics --domain storage 2>&1 | tail -n 30 | sed 's/^/| /'
cat $(console_of storage) | sed 's/^/| /'
xl list | sed 's/^/| /'
xenstore-ls /local/domain/$(xl domid storage) | sed 's/^/| /'
xl destroy storage
