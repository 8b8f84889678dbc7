# takes: 250 s
# limit: 1200 s
# in the gate: turn 1
# also on: trixie
# needs: stock
# processors: 5
# A stock Debian guest's kernel unplugs the emulated storage and network devices of its bus, and leaves vxd's alone; and iPXE loads a kernel over
# vxd's network device.
. /stock-lib.sh
prepare_stock_guest
start_vxd
remember_resources

step "a guest with emulated devices, which its kernel unplugs"
# Of the class of vxd's disks, and of the class of its network device.
configure ', "-device", "lsi53c895a", "-device", "e1000,romfile="'
emulated() { xl qemu-monitor-command debian "info pci" | grep -c 'PCI device \(1000:0012\|8086:100e\)'; }
check "xl create succeeds" create debian
check "GRUB shows its menu" wait_menu
check "QEMU has an emulated controller and an emulated network device" equal "$(emulated)" 2
press 'u'
check "Debian is up" wait_guest "GUEST UP emulated" 200
check "its kernel unplugs network devices" wait_guest "GUEST UNPLUG unplug emulated NICs" 60
check "and disks" wait_guest "GUEST UNPLUG unplug emulated disks" 60
check "I/O is verified" wait_guest "GUEST VERIFIED emulated" 100
check "what is written is there" wait_guest "GUEST CHECKSUMS equal" 60
grep 'GUEST' "$(console_of debian)" | sed 's/^/| /'
check "they are gone from the bus" not says 'GUEST FUNCTION .*\(1000:0012\|8086:100e\)'
check "vxd's functions are there" has_functions 1
check "the guest is content" guest_says_nothing_bad debian
check "the guest powers off and is gone" wait_gone debian 100
no_trace_left

step "a guest that boots from the network"
configure
# dom0 has no users; and nobody is to wait for a second DHCP server (iPXE's option 176).
dnsmasq() {
  /net/lib/ld-linux-x86-64.so.2 --library-path /net/lib /net/dnsmasq --keep-in-foreground --user= --group= --log-facility=- --log-dhcp --port=0 \
    --interface=br0 --bind-interfaces --dhcp-range=10.9.0.2,10.9.0.2,255.255.255.0,1h --dhcp-leasefile=/tmp/leases \
    --dhcp-option=encap:175,176,1b --dhcp-boot=boot.ipxe --enable-tftp --tftp-root=/net/www --pid-file=/run/dnsmasq.pid >/var/log/xen/guest-dnsmasq.log 2>&1
}
dnsmasq &
httpd -f -v -h /net/www -p 10.9.0.1:80 >/var/log/xen/guest-httpd.log 2>&1 &
httpd=$!
check "xl create succeeds" create debian
check "GRUB shows its menu" wait_menu
press 'i'
served() { grep -q "$1" /var/log/xen/guest-dnsmasq.log || { cat /var/log/xen/guest-dnsmasq.log; return 1; }; }
check "iPXE gets an address over vxd's network device" wait_until 100 served 'DHCPACK(br0) 10.9.0.2'
check "and a script by TFTP" wait_until 60 served 'sent /net/www/boot.ipxe'
check "the kernel that it loads is up, and finds its devices" wait_guest "GUEST NETBOOTED" 200
grep -h 'DHCPACK\|dnsmasq-tftp\|response:' /var/log/xen/guest-dnsmasq.log /var/log/xen/guest-httpd.log | sed 's/^/| /'
check "it and its initial RAM disk came by HTTP" equal "$(grep -c 'response:200' /var/log/xen/guest-httpd.log)" 2
check "the guest is content" guest_says_nothing_bad debian
check "the guest powers off and is gone" wait_gone debian 100
kill "$(cat /run/dnsmasq.pid)" $httpd
no_trace_left
stop_vxd
