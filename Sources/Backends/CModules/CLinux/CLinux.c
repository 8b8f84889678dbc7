#define _GNU_SOURCE
#include "CLinux.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

int clinux_block_device_size(int fd, uint64_t *bytes) { return ioctl(fd, BLKGETSIZE64, bytes) == 0 ? 0 : errno; }

int clinux_block_device_blocks(int fd, uint32_t *logical, uint32_t *physical) {
  int size = 0;
  unsigned int physical_size = 0;
  if (ioctl(fd, BLKSSZGET, &size) != 0 || ioctl(fd, BLKPBSZGET, &physical_size) != 0) return errno;
  *logical = (uint32_t)size;
  *physical = physical_size;
  return 0;
}

int clinux_block_device_discard(int fd, uint64_t offset, uint64_t length) {
  uint64_t range[2] = {offset, length};
  return ioctl(fd, BLKDISCARD, range) == 0 ? 0 : errno;
}

int clinux_block_device_zero(int fd, uint64_t offset, uint64_t length) {
  uint64_t range[2] = {offset, length};
  return ioctl(fd, BLKZEROOUT, range) == 0 ? 0 : errno;
}

int clinux_block_device_secure_erase(int fd, uint64_t offset, uint64_t length) {
  uint64_t range[2] = {offset, length};
  return ioctl(fd, BLKSECDISCARD, range) == 0 ? 0 : errno;
}

int clinux_block_device_can_secure_erase(int fd) {
  /* A range that is no whole sector: EINVAL where the operation exists, EOPNOTSUPP where it does not. Nothing is erased. */
  uint64_t range[2] = {1, 1};
  return ioctl(fd, BLKSECDISCARD, range) != 0 && errno == EINVAL;
}

void clinux_next_option(int argc, char **argv, const char *letters, const struct option *table, struct clinux_option *found) {
  opterr = 0;
  optind = found->index;
  found->value = getopt_long(argc, argv, letters, table, NULL);
  found->argument = optarg;
  found->refused = optopt;
  found->index = optind;
}

int clinux_probe_aio(void) {
  unsigned long context = 0;
  if (syscall(SYS_io_setup, 1, &context) != 0) return errno;
  syscall(SYS_io_destroy, context);
  return 0;
}

unsigned int clinux_device_major(dev_t device) { return major(device); }
unsigned int clinux_device_minor(dev_t device) { return minor(device); }

int clinux_lock_description(int fd, int exclusive) {
  struct flock lock = {.l_type = exclusive ? F_WRLCK : F_RDLCK, .l_whence = SEEK_SET};
  return fcntl(fd, F_OFD_SETLK, &lock) == 0 ? 0 : errno;
}

int clinux_lock_holder(int fd) {
  struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
  if (fcntl(fd, F_OFD_GETLK, &lock) != 0 || lock.l_type == F_UNLCK) return 0;
  return lock.l_pid;
}

int clinux_peer_credentials(int fd, uint32_t *pid, uint32_t *uid, uint32_t *gid) {
  struct ucred credentials;
  socklen_t length = sizeof credentials;
  if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &length) != 0) return errno;
  *pid = (uint32_t)credentials.pid;
  *uid = credentials.uid;
  *gid = credentials.gid;
  return 0;
}

int clinux_memfd(const char *name) { return (int)syscall(SYS_memfd_create, name, 1u /* MFD_CLOEXEC */); }

void clinux_name_thread(const char *name) {
  char short_name[16] = {0};
  strncpy(short_name, name, sizeof short_name - 1);
  prctl(PR_SET_NAME, short_name);
}

void clinux_lower_thread(int steps) {
  // Of the main thread: the caller's own is that of whoever started it, which may have been lowered already. Any value may be right, also -1.
  errno = 0;
  int main_thread = getpriority(PRIO_PROCESS, (id_t)getpid());
  if (errno == 0) setpriority(PRIO_PROCESS, 0, main_thread + steps);
}

uint64_t clinux_thread_cpu_nanoseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

int clinux_fallocate(int fd, int mode, int64_t offset, int64_t length) {
  return fallocate(fd, mode, offset, length) == 0 ? 0 : errno;
}

int clinux_window_size(int fd, uint16_t *columns, uint16_t *rows) {
  struct winsize size;
  if (ioctl(fd, TIOCGWINSZ, &size) != 0) return errno;
  *columns = size.ws_col;
  *rows = size.ws_row;
  return 0;
}

int clinux_open_pty(char *name, uint32_t capacity) {
  int fd = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
  if (fd < 0) return -errno;
  if (grantpt(fd) == 0 && unlockpt(fd) == 0 && ptsname_r(fd, name, capacity) == 0) return fd;
  int failure = errno;
  close(fd);
  return -failure;
}

int clinux_direct_alignment(int fd, uint32_t *memory, uint32_t *offset) {
  // struct statx (linux/stat.h) by offsets: headers of glibc and of older kernels lack the fields.
  unsigned char status[256] = {0};
  const uint32_t dioalign = 0x2000;
  uint32_t mask;
  if (syscall(SYS_statx, fd, "", AT_EMPTY_PATH, dioalign, status) != 0) return errno;
  memcpy(&mask, status, sizeof mask);
  if ((mask & dioalign) == 0) return ENOTSUP;
  memcpy(memory, status + 0x98, sizeof *memory);
  memcpy(offset, status + 0x9c, sizeof *offset);
  return 0;
}

int clinux_o_path(void) { return O_PATH; }
int clinux_o_direct(void) { return O_DIRECT; }

int clinux_accept(int fd) { return accept4(fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK); }

int clinux_socket_cloexec(void) { return SOCK_CLOEXEC; }

int32_t clinux_thread_id(void) { return gettid(); }

int clinux_peer_groups(int fd, uint32_t *groups, uint32_t capacity) {
  socklen_t length = capacity * sizeof *groups;
  if (getsockopt(fd, SOL_SOCKET, SO_PEERGROUPS, groups, &length) != 0) return -errno;
  return (int)(length / sizeof *groups);
}

#define LABEL_BYTES 64

static _Thread_local char thread_label[LABEL_BYTES];

void clinux_label_thread(const char *label) {
  strncpy(thread_label, label, LABEL_BYTES - 1);
  thread_label[LABEL_BYTES - 1] = 0;
}

static const int deadly_signals[] = {SIGILL, SIGTRAP, SIGABRT, SIGBUS, SIGFPE, SIGSEGV};
enum { DEADLY = sizeof deadly_signals / sizeof *deadly_signals };
static struct sigaction earlier_actions[DEADLY];
static char *death_record;

// Only what may be called in a signal handler: two stores to a mapping that is there for as long as the process.
static void record_death(int signal, siginfo_t *info, void *context) {
  (void)context;
  memcpy(death_record + 4, thread_label, LABEL_BYTES);
  *(volatile int32_t *)death_record = signal;
  // What would have happened without this happens now: the instruction is tried again, or the signal is sent again that a process sent.
  for (int index = 0; index < DEADLY; index++)
    if (deadly_signals[index] == signal) sigaction(signal, &earlier_actions[index], NULL);
  if (info->si_code <= 0) raise(signal);
}

void clinux_record_death(void *record) {
  death_record = record;
  struct sigaction action = {.sa_sigaction = record_death, .sa_flags = SA_NODEFER | SA_SIGINFO};
  sigemptyset(&action.sa_mask);
  for (int index = 0; index < DEADLY; index++) sigaction(deadly_signals[index], &action, &earlier_actions[index]);
}

int clinux_timer_create(void) { return timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK); }

void clinux_timer_set(int timer, unsigned long long nanoseconds) {
  struct itimerspec time = {.it_value = {.tv_sec = nanoseconds / 1000000000, .tv_nsec = nanoseconds % 1000000000}};
  timerfd_settime(timer, TFD_TIMER_ABSTIME, &time, NULL);
}
