/* A guest's program that does to a virtio function on its PCI bus what no driver should: to its configuration space, its BAR, its vectors and its
 * queues, whose rings it fills with noise, while another process switches its decoding off and on. From a seed, which repeats what the first does.
 *
 * usage: hostile-pci FUNCTION SEED ROUNDS OTHER-BAR
 *   FUNCTION   as in /sys/bus/pci/devices; no driver may be bound to it
 *   OTHER-BAR  physical address of another function's BAR
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGES = 512, PAGE = 4096 };

static uint64_t state;
static int config;
static volatile uint8_t *bar, *memory;
/* Where each page of the program's memory is: what the device writes by noise must be nobody else's. */
static uint64_t frames[PAGES], other_bar, home;
static long accesses;

static uint64_t next(void) {
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return state * 0x2545f4914f6cdd1dULL;
}
static unsigned below(unsigned limit) { return (next() >> 33) % limit; }

static void fail(const char *what) {
  printf("GUEST FAIL hostile-pci: %s: %s\n", what, strerror(errno));
  exit(1);
}

/* A number that is small, near a border, in the free memory, or anything. */
static uint64_t number(void) {
  switch (below(6)) {
  case 0: return below(16);
  case 1: return 1ULL << below(64);
  case 2: return (1ULL << below(64)) - 1;
  case 3: return frames[below(PAGES - 1)] + (below(PAGE) & ~15u);
  case 4: return other_bar + below(0x5000);
  default: return next();
  }
}

static uint32_t config_read(int at, int size) {
  uint32_t value = 0;
  if (pread(config, &value, size, at) != size) return 0xffffffff;
  accesses++;
  return value;
}
static void config_write(int at, int size, uint32_t value) {
  if (pwrite(config, &value, size, at) == size) accesses++;
}

static void put(unsigned at, int size, uint64_t value) {
  accesses++;
  switch (size) {
  case 1: *(volatile uint8_t *)(bar + at) = value; break;
  case 2: *(volatile uint16_t *)(bar + at) = value; break;
  case 4: *(volatile uint32_t *)(bar + at) = value; break;
  default: *(volatile uint64_t *)(bar + at) = value;
  }
}
static uint64_t get(unsigned at, int size) {
  accesses++;
  switch (size) {
  case 1: return *(volatile uint8_t *)(bar + at);
  case 2: return *(volatile uint16_t *)(bar + at);
  case 4: return *(volatile uint32_t *)(bar + at);
  default: return *(volatile uint64_t *)(bar + at);
  }
}

/* Where rings and buffers may be: in the program's memory, or where there is none. */
static uint64_t harmless(void) {
  switch (below(8)) {
  case 0: return other_bar + below(0x4000);
  case 1: return 0xfee00000 + below(0x1000);
  case 2: return 0xfeff0000 + below(0x8000);
  case 3: return (1ULL << 40) + (next() & 0xffffffff);
  case 4: return UINT64_MAX - below(4096);
  default: return frames[3 + below(PAGES - 4)] + (below(PAGE) & ~15u);
  }
}

static void noise_in_rings(void) {
  for (int i = 0; i < 64; i++) {
    volatile uint8_t *descriptor = memory + 16 * i;
    *(volatile uint64_t *)descriptor = harmless();
    *(volatile uint32_t *)(descriptor + 8) = below(4) ? (uint32_t[]){16, 512, 4096, 1}[below(4)] : (uint32_t)next();
    *(volatile uint16_t *)(descriptor + 12) = (uint16_t[]){0, 1, 1, 2, 3, 4, 5, 7}[below(8)];
    *(volatile uint16_t *)(descriptor + 14) = below(10) ? below(64) : next();
    *(volatile uint16_t *)(memory + PAGE + 4 + 2 * i) = below(70);
  }
  *(volatile uint16_t *)(memory + PAGE + 2) += below(20) ? below(64) : (uint16_t)next();
  /* Headers of requests, and tables, where the descriptors point. */
  for (int i = 0; i < 256; i++) {
    volatile uint8_t *place = memory + 3 * PAGE + (below((PAGES - 4) * PAGE) & ~15u);
    *(volatile uint64_t *)place = (uint64_t[]){0, 1, 4, 8, 11, 13, 99, harmless()}[below(8)];
    *(volatile uint64_t *)(place + 8) = below(3) ? below(1000) : next();
  }
}

/* The initialization of virtio 1.2, 3.1.1, with mistakes here and there. */
static void initialize(void) {
  put(0x14, 1, 0);
  put(0x14, 1, 3);
  for (int half = 0; half < 2; half++) {
    put(0x08, 4, half);
    put(0x0c, 4, below(8) ? (half ? 1 : 0x30000000) : next());
  }
  put(0x14, 1, 11);
  for (int queue = 0; queue < 2; queue++) {
    put(0x16, 2, queue);
    put(0x18, 2, below(6) ? 64 : number());
    uint64_t places[] = {frames[0], frames[1], frames[2]};
    for (int area = 0; area < 3; area++) {
      uint64_t place = below(10) ? places[area] : harmless();
      put(0x20 + 8 * area, 4, place);
      put(0x24 + 8 * area, 4, place >> 32);
    }
    put(0x1a, 2, below(4) ? (uint64_t)queue + 1 : number());
    put(0x1c, 2, 1);
  }
  put(0x14, 1, 15);
}

static void common(void) {
  for (int i = below(40); i > 0; i--) {
    unsigned at = below(0x40);
    int size = 1 << below(4);
    /* Addresses of rings by the initialization alone. */
    if (at + size > 0x20 && at < 0x38) continue;
    if (below(2)) put(at & ~(size - 1), size, number()); else get(at & ~(size - 1), size);
  }
}

static void anywhere(void) {
  for (int i = below(60); i > 0; i--) {
    int size = 1 << below(4);
    unsigned at = below(0x4000) & ~(size - 1);
    /* Vectors have a function of their own. */
    if (below(2) && at >= 0x40 && (at < 0x2000 || at >= 0x3000)) put(at, size, number()); else get(at, size);
  }
}

/* Messages to vectors that no handler has, to addresses that no processor has, masked and unmasked. */
static void vectors(void) {
  for (int i = below(30); i > 0; i--) {
    unsigned entry = 0x2000 + 16 * below(8);
    put(entry + 12, 4, below(2));
    put(entry, 4, below(3) ? 0xfee00000 | below(4) << 12 : next() & 0xfffffffc);
    put(entry + 4, 4, below(3) ? 0 : next());
    /* Delivery mode fixed: another one would be the processor's reset or its NMI. */
    put(entry + 8, 4, (next() & 0xffff0000) | (0x40 + below(0x40)));
    put(entry + 12, 4, below(2));
    if (below(4) == 0) config_write(0x42, 2, below(4) << 14);
  }
}

static void notify(void) {
  for (int i = below(100); i > 0; i--) put(0x3000 + (below(2) ? 4 * below(2) : below(0x1000) & ~1u), 2, number());
}

static void configuration_space(void) {
  for (int i = below(60); i > 0; i--) {
    int size = 1 << below(3);
    int at = below(256) & ~(size - 1);
    /* Command and BAR are moved below, with a way back. */
    if (below(2) && at >= 0x14) config_write(at, size, number()); else config_read(at, size);
  }
}

/* A BAR over memory, over pages of Xen's, over interrupt controllers, over another function. */
static void move_bar(void) {
  uint64_t frame = frames[PAGES - 1];
  uint32_t places[] = {frame & ~0x3fffULL, 0x00000000, 0x000a0000, 0xfee00000, 0xfec00000, 0xfeff0000, 0xfc000000, 0xfffc0000,
                       other_bar, 0x80000000, 0xfbffc000, 0xfbfff000};
  volatile uint32_t *mark = (volatile uint32_t *)(memory + (PAGES - 1) * PAGE);
  uint32_t expected = 0x5a5a0000 + below(1000);
  *mark = expected;
  for (int i = 1 + below(6); i > 0; i--) {
    uint32_t place = below(4) ? places[below(sizeof places / sizeof *places)] : next();
    config_write(4, 2, below(4) ? 0x404 : 0x406);
    config_write(0x10, 4, place);
    config_write(4, 2, below(8) ? 0x406 : next() & 0x7ff);
    if (*mark != expected) {
      printf("GUEST FAIL memory at 0x%llx is not memory with the BAR at 0x%x\n", (long long)frame, place);
      exit(1);
    }
  }
  config_write(4, 2, 0x404);
  config_write(0x10, 4, home);
  config_write(4, 2, 0x406);
}

/* Switches decoding off and on from the other processor all the while. Before the memory is there: a page that is written behind a fork moves. */
static pid_t toggle_decoding(void) {
  pid_t child = fork();
  if (child < 0) fail("fork");
  if (child > 0) return child;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  for (;;) {
    config_write(4, 2, 0x404);
    config_write(4, 2, 0x406);
    usleep(300);
  }
}

int main(int count, char **arguments) {
  char path[256];
  if (count != 5) return 2;
  state = strtoull(arguments[2], NULL, 0) * 0x9e3779b97f4a7c15ULL | 1;
  long rounds = strtol(arguments[3], NULL, 0);
  other_bar = strtoull(arguments[4], NULL, 0);
  snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/config", arguments[1]);
  if ((config = open(path, O_RDWR)) < 0) fail(path);
  home = config_read(0x10, 4) & ~15u;
  config_write(4, 2, 0x406);
  pid_t other = toggle_decoding();
  memory = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE | MAP_LOCKED, -1, 0);
  if (memory == MAP_FAILED) fail("memory");
  int map = open("/proc/self/pagemap", O_RDONLY);
  if (map < 0) fail("/proc/self/pagemap");
  for (int page = 0; page < PAGES; page++) {
    uint64_t entry;
    if (pread(map, &entry, 8, ((uintptr_t)memory / PAGE + page) * 8) != 8 || !(entry >> 63) || !(entry << 9 >> 9)) fail("a page's place");
    frames[page] = (entry << 9 >> 9) * PAGE;
  }
  snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/resource0", arguments[1]);
  int resource = open(path, O_RDWR | O_SYNC);
  if (resource < 0) fail(path);
  bar = mmap(NULL, 0x4000, PROT_READ | PROT_WRITE, MAP_SHARED, resource, 0);
  if (bar == MAP_FAILED) fail("the BAR");
  void (*acts[])(void) = {initialize, initialize, noise_in_rings, noise_in_rings, common, anywhere, vectors, notify, notify,
                          configuration_space, move_bar};
  for (long round = 0; round < rounds; round++) {
    acts[below(sizeof acts / sizeof *acts)]();
    if (round % 100 == 99) printf("GUEST HOSTILE %ld rounds, %ld accesses\n", round + 1, accesses), fflush(stdout);
  }
  kill(other, SIGKILL);
  waitpid(other, NULL, 0);
  config_write(4, 2, 0x406);
  /* As it was found, but for what only a driver knows. */
  put(0x14, 1, 0);
  config_write(0x42, 2, 0);
  config_write(4, 2, 0);
  config_write(0x10, 4, home);
  printf("GUEST HOSTILE END %ld rounds, %ld accesses\n", rounds, accesses);
  return 0;
}
