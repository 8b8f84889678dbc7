#define _GNU_SOURCE
#include "CLinuxRing.h"

#include <errno.h>
#include <linux/io_uring.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

_Static_assert(sizeof(struct clinux_submission) == sizeof(struct io_uring_sqe), "size of a submission");
_Static_assert(offsetof(struct clinux_submission, operation_flags) == offsetof(struct io_uring_sqe, rw_flags), "flags");
_Static_assert(offsetof(struct clinux_submission, user_data) == offsetof(struct io_uring_sqe, user_data), "user data");
_Static_assert(offsetof(struct clinux_submission, buffer) == offsetof(struct io_uring_sqe, buf_index), "buffer");
_Static_assert(sizeof(struct clinux_completion) == sizeof(struct io_uring_cqe), "size of a completion");
_Static_assert(
  clinux_ring_readv == IORING_OP_READV && clinux_ring_writev == IORING_OP_WRITEV && clinux_ring_fsync == IORING_OP_FSYNC &&
    clinux_ring_read_fixed == IORING_OP_READ_FIXED && clinux_ring_write_fixed == IORING_OP_WRITE_FIXED &&
    clinux_ring_read == IORING_OP_READ && clinux_ring_write == IORING_OP_WRITE,
  "opcodes");
_Static_assert(
  clinux_ring_fixed_file == IOSQE_FIXED_FILE && clinux_ring_async == IOSQE_ASYNC && clinux_ring_datasync == IORING_FSYNC_DATASYNC,
  "flags of a submission");

static int setup(uint32_t entries, struct io_uring_params *parameters) {
  return (int)syscall(SYS_io_uring_setup, entries, parameters);
}

// NODROP: no completion is lost. NATIVE_WORKERS: what the kernel works on in threads of its own ends with this process.
static const uint32_t needed = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_SUBMIT_STABLE | IORING_FEAT_NATIVE_WORKERS;

static int open_ring(uint32_t entries, struct io_uring_params *parameters) {
  // The thread enters the kernel anyway before it sleeps: it need not be interrupted for a completion (Linux 5.19).
  memset(parameters, 0, sizeof *parameters);
  parameters->flags = IORING_SETUP_CLAMP | IORING_SETUP_SUBMIT_ALL | IORING_SETUP_COOP_TASKRUN;
  int fd = setup(entries, parameters);
  if (fd < 0 && errno == EINVAL) {
    memset(parameters, 0, sizeof *parameters);
    parameters->flags = IORING_SETUP_CLAMP;
    fd = setup(entries, parameters);
  }
  if (fd < 0) return -errno;
  if ((parameters->features & needed) != needed || parameters->sq_entries < entries) {
    close(fd);
    return -ENOTSUP;
  }
  return fd;
}

int clinux_ring_open(struct clinux_ring *ring, uint32_t entries) {
  struct io_uring_params parameters;
  memset(ring, 0, sizeof *ring);
  ring->fd = -1;
  int fd = open_ring(entries, &parameters);
  if (fd < 0) return -fd;
  uint64_t submissions = parameters.sq_off.array + parameters.sq_entries * sizeof(uint32_t);
  uint64_t completions = parameters.cq_off.cqes + parameters.cq_entries * sizeof(struct io_uring_cqe);
  ring->rings_bytes = submissions > completions ? submissions : completions;
  char *rings = mmap(NULL, ring->rings_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, IORING_OFF_SQ_RING);
  void *entries_start = mmap(
    NULL, parameters.sq_entries * sizeof(struct io_uring_sqe), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, IORING_OFF_SQES);
  if (rings == MAP_FAILED || entries_start == MAP_FAILED) {
    int failure = errno;
    if (rings != MAP_FAILED) munmap(rings, ring->rings_bytes);
    if (entries_start != MAP_FAILED) munmap(entries_start, parameters.sq_entries * sizeof(struct io_uring_sqe));
    close(fd);
    return failure;
  }
  ring->fd = fd;
  ring->entries = parameters.sq_entries;
  ring->rings = rings;
  ring->submissions = entries_start;
  ring->submission_head = (uint32_t *)(rings + parameters.sq_off.head);
  ring->submission_tail = (uint32_t *)(rings + parameters.sq_off.tail);
  ring->submission_mask = *(uint32_t *)(rings + parameters.sq_off.ring_mask);
  ring->submission_order = (uint32_t *)(rings + parameters.sq_off.array);
  ring->completion_head = (uint32_t *)(rings + parameters.cq_off.head);
  ring->completion_tail = (uint32_t *)(rings + parameters.cq_off.tail);
  ring->completion_mask = *(uint32_t *)(rings + parameters.cq_off.ring_mask);
  ring->completions = (struct clinux_completion *)(rings + parameters.cq_off.cqes);
  return 0;
}

void clinux_ring_close(struct clinux_ring *ring) {
  if (ring->fd < 0) return;
  munmap(ring->submissions, ring->entries * sizeof(struct io_uring_sqe));
  munmap(ring->rings, ring->rings_bytes);
  close(ring->fd);
  ring->fd = -1;
}

int clinux_ring_enter(int fd, uint32_t submit, uint32_t wait) {
  long result = syscall(SYS_io_uring_enter, fd, submit, wait, wait > 0 ? IORING_ENTER_GETEVENTS : 0, NULL, 0);
  return result < 0 ? -errno : (int)result;
}

static int register_with(int fd, unsigned int operation, const void *argument, uint32_t count) {
  return syscall(SYS_io_uring_register, fd, operation, argument, count) < 0 ? errno : 0;
}

int clinux_ring_register_files(int fd, const int *files, uint32_t count) {
  return register_with(fd, IORING_REGISTER_FILES, files, count);
}

int clinux_ring_register_memory(int fd, void *start, uint64_t bytes) {
  struct iovec piece = {.iov_base = start, .iov_len = bytes};
  return register_with(fd, IORING_REGISTER_BUFFERS, &piece, 1);
}

void clinux_ring_unregister(int fd, int has_memory) {
  if (has_memory) register_with(fd, IORING_UNREGISTER_BUFFERS, NULL, 0);
  register_with(fd, IORING_UNREGISTER_FILES, NULL, 0);
}

int clinux_probe_ring(void) {
  struct io_uring_params parameters;
  int fd = open_ring(1, &parameters);
  if (fd < 0) return -fd;
  close(fd);
  return 0;
}
