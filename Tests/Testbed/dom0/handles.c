/*
 * What a process's open files of Xen's devices let it do to a domain, asked of the kernel by way of copies of them (pidfd_getfd).
 *
 *     handles PID DOMAIN
 *
 * One line each: "privcmd yes|no" for a device model call, "evtchn yes|no" for an event channel. The calls name the domain and change
 * nothing: a device model call without buffers, and a port that no domain has.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* linux: include/uapi/xen/privcmd.h and evtchn.h, of which libxen-dev has no copy. */
struct dm_op { uint16_t dom, num; const void *buffers; };
#define PRIVCMD_DM_OP _IOC(_IOC_NONE, 'P', 5, sizeof(struct dm_op))
struct bind { uint32_t domain, port; };
#define EVTCHN_BIND_INTERDOMAIN _IOC(_IOC_NONE, 'E', 1, sizeof(struct bind))

int main(int argc, char **argv)
{
	char folder[64], path[512], target[512];
	struct dirent *entry;
	if (argc != 3)
		return 2;
	int domain = atoi(argv[2]), process = syscall(SYS_pidfd_open, atoi(argv[1]), 0);
	snprintf(folder, sizeof folder, "/proc/%d/fd", atoi(argv[1]));
	DIR *files = opendir(folder);
	if (process < 0 || !files) {
		perror("handles");
		return 1;
	}
	while ((entry = readdir(files))) {
		snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
		ssize_t length = readlink(path, target, sizeof target - 1);
		if (length < 0)
			continue;
		target[length] = 0;
		int privcmd = !strcmp(target, "/dev/xen/privcmd"), evtchn = !strcmp(target, "/dev/xen/evtchn");
		if (!privcmd && !evtchn)
			continue;
		int copy = syscall(SYS_pidfd_getfd, process, atoi(entry->d_name), 0);
		if (copy < 0) {
			perror("handles: pidfd_getfd");
			return 1;
		}
		if (privcmd) {
			struct dm_op call = { .dom = domain };
			printf("privcmd %s\n", ioctl(copy, PRIVCMD_DM_OP, &call) < 0 && errno == EPERM ? "no" : "yes");
		} else {
			struct bind call = { .domain = domain, .port = 0x1fffe };
			printf("evtchn %s\n", ioctl(copy, EVTCHN_BIND_INTERDOMAIN, &call) < 0 && errno == EACCES ? "no" : "yes");
		}
		close(copy);
	}
	return 0;
}
