// The kernel's io_uring as its interface has it (linux/io_uring.h): three system calls, two rings in shared memory. No library is needed.
#pragma once
#include <stdint.h>

/// A submission (struct io_uring_sqe), as far as it is used here.
struct clinux_submission {
  uint8_t opcode;
  uint8_t flags;
  uint16_t priority;
  int32_t file;
  uint64_t offset;
  uint64_t address;
  uint32_t length;
  /// RWF_* of reads and writes, IORING_FSYNC_* of a flush.
  uint32_t operation_flags;
  uint64_t user_data;
  uint16_t buffer;
  uint16_t personality;
  uint32_t unused[5];
};

/// A completion (struct io_uring_cqe).
struct clinux_completion {
  uint64_t user_data;
  int32_t result;
  uint32_t flags;
};

/// A ring with what of it is shared with the kernel. Heads and tails count without end; a place is the count and the mask.
struct clinux_ring {
  int fd;
  uint32_t entries;
  uint32_t submission_mask;
  uint32_t completion_mask;
  uint32_t *submission_head;
  uint32_t *submission_tail;
  uint32_t *submission_order;
  struct clinux_submission *submissions;
  uint32_t *completion_head;
  uint32_t *completion_tail;
  struct clinux_completion *completions;
  void *rings;
  uint64_t rings_bytes;
};

/// Opcodes and flags of submissions (linux/io_uring.h).
enum {
  clinux_ring_readv = 1,
  clinux_ring_writev = 2,
  clinux_ring_fsync = 3,
  clinux_ring_read_fixed = 4,
  clinux_ring_write_fixed = 5,
  clinux_ring_read = 22,
  clinux_ring_write = 23,
  clinux_ring_fixed_file = 1 << 0,
  clinux_ring_async = 1 << 4,
  clinux_ring_datasync = 1 << 0,
};

/// Makes a ring for so many submissions at a time; 0 or an errno. ENOTSUP is for a kernel before 5.12, whose workers do not end with their
/// process.
int clinux_ring_open(struct clinux_ring *ring, uint32_t entries);
/// Gives back a ring. Nothing may be under way.
void clinux_ring_close(struct clinux_ring *ring);
/// Hands `submit` submissions to the kernel, and waits until `wait` completions are there; how many were taken, or a negated errno.
int clinux_ring_enter(int fd, uint32_t submit, uint32_t wait);
/// Registers open files, which are then named by their places in the list; 0 or an errno.
int clinux_ring_register_files(int fd, const int *files, uint32_t count);
/// Registers a piece of memory as buffer 0, which pins its pages; 0 or an errno.
int clinux_ring_register_memory(int fd, void *start, uint64_t bytes);
/// Gives back what is registered; returns when the kernel holds none of it any more.
void clinux_ring_unregister(int fd, int has_memory);
/// Whether the kernel makes a ring now: 0 or an errno, as `clinux_ring_open`.
int clinux_probe_ring(void);
