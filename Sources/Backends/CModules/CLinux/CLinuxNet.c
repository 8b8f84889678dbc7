#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_arp.h>
#include <linux/if_tun.h>
#include <linux/sockios.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "CLinux.h"

static void set_name(struct ifreq *request, const char *name) {
  memset(request, 0, sizeof *request);
  strncpy(request->ifr_name, name, IFNAMSIZ - 1);
}

/* A request about an interface needs a socket, of whatever kind. */
static int on_socket(unsigned long number, void *request) {
  int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return errno;
  int result = ioctl(fd, number, request) == 0 ? 0 : errno;
  close(fd);
  return result;
}

int clinux_tap_attach(int fd, const char *name, int multiqueue) {
  struct ifreq request;
  set_name(&request, name);
  request.ifr_flags = (short)(IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (multiqueue ? IFF_MULTI_QUEUE : 0));
  return ioctl(fd, TUNSETIFF, &request) == 0 ? 0 : errno;
}

int clinux_tap_header(int fd, int bytes) {
  int little = 1;
  if (ioctl(fd, TUNSETVNETHDRSZ, &bytes) != 0) return errno;
  return ioctl(fd, TUNSETVNETLE, &little) == 0 ? 0 : errno;
}

int clinux_tap_offloads(int fd, unsigned int flags) { return ioctl(fd, TUNSETOFFLOAD, (unsigned long)flags) == 0 ? 0 : errno; }

int clinux_tap_persist(int fd, int on) { return ioctl(fd, TUNSETPERSIST, (unsigned long)on) == 0 ? 0 : errno; }

int clinux_tap_enable(int fd, int on) {
  struct ifreq request;
  memset(&request, 0, sizeof request);
  request.ifr_flags = on ? IFF_ATTACH_QUEUE : IFF_DETACH_QUEUE;
  return ioctl(fd, TUNSETQUEUE, &request) == 0 ? 0 : errno;
}

int clinux_interface_up(const char *name, int up) {
  struct ifreq request;
  set_name(&request, name);
  int result = on_socket(SIOCGIFFLAGS, &request);
  if (result != 0) return result;
  short flags = (short)(up ? request.ifr_flags | IFF_UP : request.ifr_flags & ~IFF_UP);
  if (flags == request.ifr_flags) return 0;
  request.ifr_flags = flags;
  return on_socket(SIOCSIFFLAGS, &request);
}

int clinux_interface_mtu(const char *name, int mtu) {
  struct ifreq request;
  set_name(&request, name);
  request.ifr_mtu = mtu;
  return on_socket(SIOCSIFMTU, &request);
}

int clinux_interface_address(const char *name, const unsigned char *address) {
  struct ifreq request;
  set_name(&request, name);
  request.ifr_hwaddr.sa_family = ARPHRD_ETHER;
  memcpy(request.ifr_hwaddr.sa_data, address, 6);
  return on_socket(SIOCSIFHWADDR, &request);
}

int clinux_bridge_add(const char *bridge, int interface) {
  struct ifreq request;
  set_name(&request, bridge);
  request.ifr_ifindex = interface;
  return on_socket(SIOCBRADDIF, &request);
}
