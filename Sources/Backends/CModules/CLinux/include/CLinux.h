// What Swift cannot import of Linux' headers: ioctl numbers, variadic calls, structures of the kernel's interface.
#pragma once
#include "CLinuxRing.h"

#include <getopt.h>
#include <linux/falloc.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <sys/stat.h>

/// Size of a block device in bytes; 0 or an errno.
int clinux_block_device_size(int fd, uint64_t *bytes);
/// Logical and physical block size of a block device in bytes; 0 or an errno.
int clinux_block_device_blocks(int fd, uint32_t *logical, uint32_t *physical);
/// Discards or zeroes a range of a block device; 0 or an errno.
int clinux_block_device_discard(int fd, uint64_t offset, uint64_t length);
int clinux_block_device_zero(int fd, uint64_t offset, uint64_t length);
/// Erases a range so that no copy is left; 0 or an errno.
int clinux_block_device_secure_erase(int fd, uint64_t offset, uint64_t length);
/// Whether the device can; asks without erasing anything.
int clinux_block_device_can_secure_erase(int fd);
/// Alignment that direct I/O on a file needs, of memory and of places on the file, in bytes, as statx says it (Linux 6.1); 0 or an errno.
/// Both are 0 where the file cannot be used so, and ENOTSUP is for a kernel or file system that does not say.
int clinux_direct_alignment(int fd, uint32_t *memory, uint32_t *offset);
/// The two halves of a device number.
unsigned int clinux_device_major(dev_t device);
unsigned int clinux_device_minor(dev_t device);
/// Locks a whole file through its open file description (F_OFD_SETLK); 0 or an errno.
int clinux_lock_description(int fd, int exclusive);
/// The process that holds a conflicting lock on the file: its pid, -1 for a lock of an open file description (which has no
/// pid), 0 when there is none.
int clinux_lock_holder(int fd);
/// Credentials of a Unix socket's peer; 0 or an errno.
int clinux_peer_credentials(int fd, uint32_t *pid, uint32_t *uid, uint32_t *gid);
/// Calls of the kernel that glibc has no name for in all versions.
int clinux_memfd(const char *name);
/// Names the calling thread, 15 characters at most.
void clinux_name_thread(const char *name);
/// Sets the calling thread's nice value to that of the process's main thread and so many steps more: less weight beside other threads. Where
/// the kernel refuses, nothing happens.
void clinux_lower_thread(int steps);
/// Says for whom the calling thread works, 63 characters at most: for the record of its death.
void clinux_label_thread(const char *label);
/// Where the death of this process by a fault is recorded: the signal (4 bytes), and the label of the thread that had it (64 bytes with
/// their end). The process still dies of it. Called once.
void clinux_record_death(void *record);
/// CPU time of the calling thread in nanoseconds.
uint64_t clinux_thread_cpu_nanoseconds(void);

/// fallocate with Linux' modes; 0 or an errno.
int clinux_fallocate(int fd, int mode, int64_t offset, int64_t length);
/// Accepts a connection, non-blocking and closed on exec; the descriptor or -1.
int clinux_accept(int fd);
/// A new pty: its master, and the path of its other side; a negated errno on failure.
int clinux_open_pty(char *name, uint32_t capacity);
/// The size of the terminal behind a descriptor; 0 or an errno.
int clinux_window_size(int fd, uint16_t *columns, uint16_t *rows);
/// What getopt_long found: the option's value (or '?' for one that is unknown, ':' for one without its value, -1 at the end), its argument,
/// the option that was refused, and the place in argv. Zeros begin a command line.
struct clinux_option {
  int value;
  char *argument;
  int refused;
  int index;
};
/// The next option by getopt_long, which keeps its state in global variables: one command line at a time, from one thread.
void clinux_next_option(int argc, char **argv, const char *letters, const struct option *table, struct clinux_option *found);
/// Whether the kernel makes an aio context now: 0, or an errno (EAGAIN: fs.aio-max-nr is used up; ENOSYS: it has no aio at all).
int clinux_probe_aio(void);
/// The flag SOCK_CLOEXEC, an enumerator in glibc.
int clinux_socket_cloexec(void);
/// The flag O_DIRECT, which only GNU's headers show.
int clinux_o_direct(void);
/// The flag O_PATH, likewise.
int clinux_o_path(void);
/// A timer's descriptor (CLOCK_MONOTONIC), non-blocking; -1 with errno.
int clinux_timer_create(void);
/// Makes it readable at a time in nanoseconds.
void clinux_timer_set(int timer, unsigned long long nanoseconds);

/// Tells the processor that it waits for memory to change: it leaves its other thread, which may be who changes it, more of the core.
static inline void clinux_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static inline int clinux_is_block_device(mode_t mode) { return S_ISBLK(mode); }
static inline int clinux_is_regular(mode_t mode) { return S_ISREG(mode); }
static inline int clinux_is_directory(mode_t mode) { return S_ISDIR(mode); }
/// The kernel's number of the calling thread.
int32_t clinux_thread_id(void);
/// Supplementary groups of a Unix socket's peer (SO_PEERGROUPS): how many were stored, or a negated errno.
int clinux_peer_groups(int fd, uint32_t *groups, uint32_t capacity);

// Network interfaces; all of these return 0 or an errno.

/// Makes a descriptor of /dev/net/tun a queue of a tap, which is created when there is none of that name.
int clinux_tap_attach(int fd, const char *name, int multiqueue);
/// Bytes of the virtio-net header before each packet, in little-endian order.
int clinux_tap_header(int fd, int bytes);
/// TUN_F_*: what the reader of the tap can take.
int clinux_tap_offloads(int fd, unsigned int flags);
/// Whether the interface outlives its descriptors.
int clinux_tap_persist(int fd, int on);
/// Whether the queue takes part.
int clinux_tap_enable(int fd, int on);
int clinux_interface_up(const char *name, int up);
int clinux_interface_mtu(const char *name, int mtu);
int clinux_interface_address(const char *name, const unsigned char *address);
int clinux_bridge_add(const char *bridge, int interface);
