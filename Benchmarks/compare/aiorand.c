/*
 * Random requests with O_DIRECT by Linux's native AIO: what `make compare` measures with.
 *
 *     aiorand DEVICE DEPTH REQUESTS read|write BYTES
 *
 * Prints "RESULT depth=D op=OP bytes=B requests=N ns=T". Buffers are written before, and as many requests as the depth eight times over, at least
 * 128, are made before the clock starts: neither the zero page nor a peer's first grants are measured. In front of what is measured and
 * behind it stands an instruction that does nothing and that the plugin beside this file knows.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <libaio.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

/* nopl with a displacement of our own. */
#define MARK_BEGIN __asm__ volatile(".byte 0x0f,0x1f,0x84,0x00,0x01,0x50,0x1a,0x7a" ::: "memory")
#define MARK_END __asm__ volatile(".byte 0x0f,0x1f,0x84,0x00,0x02,0x50,0x1a,0x7a" ::: "memory")
#define DEPTH_MAX 128

static int device, depth, writes;
static size_t bytes;
static uint64_t places;
static char *buffer;
static io_context_t context;
static struct iocb block[DEPTH_MAX];
static uint32_t seed = 1;

static void fail(const char *what)
{
	printf("FAIL %s\n", what);
	exit(1);
}

static void prepare(struct iocb *at)
{
	char *data = buffer + bytes * (at - block);
	long long offset;

	seed = seed * 1103515245u + 12345;
	offset = (seed >> 4) % places * bytes;
	if (writes)
		io_prep_pwrite(at, device, data, bytes, offset);
	else
		io_prep_pread(at, device, data, bytes, offset);
}

static void run(long count)
{
	struct iocb *list[DEPTH_MAX];
	struct io_event event[DEPTH_MAX];
	long begun = 0, done = 0;
	int ready, i;

	for (ready = 0; ready < depth && begun < count; ready++, begun++)
		prepare(list[ready] = &block[ready]);
	while (done < count) {
		if (ready && io_submit(context, ready, list) != ready)
			fail("io_submit");
		ready = 0;
		int answers = io_getevents(context, 1, DEPTH_MAX, event, NULL);
		if (answers < 1)
			fail("io_getevents");
		for (i = 0; i < answers; i++, done++) {
			if (event[i].res != bytes)
				fail("a request");
			if (begun == count)
				continue;
			prepare(list[ready++] = event[i].obj);
			begun++;
		}
	}
}

int main(int argc, char **argv)
{
	struct timespec from, to;
	uint64_t size = 0;
	long count;

	if (argc != 6)
		fail("usage: aiorand DEVICE DEPTH REQUESTS read|write BYTES");
	depth = atoi(argv[2]);
	count = atol(argv[3]);
	writes = !strcmp(argv[4], "write");
	bytes = strtoul(argv[5], NULL, 10);
	device = open(argv[1], O_RDWR | O_DIRECT);
	if (depth < 1 || depth > DEPTH_MAX || count < 1 || bytes < 512)
		fail("a number");
	if (device < 0 || ioctl(device, BLKGETSIZE64, &size) || size < bytes)
		fail("the device");
	places = size / bytes;
	if (io_setup(depth, &context) || posix_memalign((void **)&buffer, 4096, bytes * depth))
		fail("memory");
	memset(buffer, 0x5a, bytes * depth);
	run(depth * 8 < 128 ? 128 : depth * 8);
	clock_gettime(CLOCK_MONOTONIC, &from);
	MARK_BEGIN;
	run(count);
	MARK_END;
	clock_gettime(CLOCK_MONOTONIC, &to);
	printf("RESULT depth=%d op=%s bytes=%zu requests=%ld ns=%lld\n", depth, argv[4], bytes, count,
	       (to.tv_sec - from.tv_sec) * 1000000000LL + to.tv_nsec - from.tv_nsec);
	return 0;
}
