/*
 * A backend of a Xenbus device (deploy/guest-module/PROTOCOL.md) that lies. It serves a disk of zeros well until the guest has made some
 * requests, does what its mode says for SECONDS from then on, and ends with state 6.
 *
 *     hostile-backend DOMAIN KIND ID MODE SECONDS
 *
 * Modes of the data path:   mute badid nothead longlen jump back nostatus storm stormidx scribble keep look honest
 * Modes of the control:     wrongtype oldrings garbage greedy flap reset
 */
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <xenevtchn.h>
#include <xengnttab.h>
#include <xenstore.h>

#define PAGE 4096
#define SECRET "vx-SECRET"

struct desc { uint64_t addr; uint32_t len; uint16_t flags, next; };
struct avail { uint16_t flags, idx, ring[]; };
struct used { uint16_t flags, idx; struct { uint32_t id, len; } ring[]; };

static struct xs_handle *xs;
static xengnttab_handle *gnt;
static xenevtchn_handle *evt;
static unsigned domain;
static const char *kind, *id, *mode;
static char front[128], back[128];
static double end;

static uint8_t *readonly_pages, *rest; /* rest: as if page 0 of the arena were there */
static uint32_t pages, ro;
static struct desc *desc;
static struct avail *avail;
static struct used *used;
static uint32_t *inflight;
static uint16_t size, taken;
static evtchn_port_t port;
static unsigned long requests, lies, seen_secrets;

static int is(const char *name) { return !strcmp(mode, name); }

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void put(const char *folder, const char *node, const char *value)
{
	char path[256];

	snprintf(path, sizeof(path), "%s/%s", folder, node);
	if (!xs_write(xs, XBT_NULL, path, value, strlen(value)))
		perror(path);
}

static char *get(const char *folder, const char *node)
{
	char path[256];
	unsigned length;

	snprintf(path, sizeof(path), "%s/%s", folder, node);
	return xs_read(xs, XBT_NULL, path, &length);
}

static int number(const char *folder, const char *node)
{
	char *text = get(folder, node);
	int value = text ? atoi(text) : 0;

	free(text);
	return value;
}

/* As a toolstack makes a device; the backend's domain is this one. */
static void create(void)
{
	struct xs_permissions f[2] = { { domain, XS_PERM_NONE }, { 0, XS_PERM_READ } };
	struct xs_permissions b[2] = { { 0, XS_PERM_NONE }, { domain, XS_PERM_READ } };
	char text[32];

	snprintf(front, sizeof(front), "/local/domain/%u/device/%s/%s", domain, kind, id);
	snprintf(back, sizeof(back), "/local/domain/0/backend/%s/%u/%s", kind, domain, id);
	xs_rm(xs, XBT_NULL, front);
	xs_rm(xs, XBT_NULL, back);
	xs_mkdir(xs, XBT_NULL, front);
	xs_mkdir(xs, XBT_NULL, back);
	xs_set_permissions(xs, XBT_NULL, front, f, 2);
	xs_set_permissions(xs, XBT_NULL, back, b, 2);
	put(back, "frontend", front);
	snprintf(text, sizeof(text), "%u", domain);
	put(back, "frontend-id", text);
	put(back, "online", "1");
	put(back, "state", "1");
	put(front, "backend", back);
	put(front, "backend-id", "0");
	put(front, "state", "1");
}

static void offer(unsigned device, const char *more)
{
	char text[2048], config[256] = "1 0 ";
	unsigned i;

	/* VERSION_1, ACCESS_PLATFORM, EVENT_IDX, INDIRECT_DESC; of a disk FLUSH, BLK_SIZE, SEG_MAX. */
	snprintf(text, sizeof(text), "version=1 device=%u vendor=0x1af4 features=0x330000244 queues=1 sizes=64 arena=512 config=60 epoch=%u %s",
		 device, (unsigned)(now() * 1000) % 1000000, more);
	put(back, "vx-offer", text);
	/* 32768 sectors, size_max, seg_max 126, geometry, blk_size 512. */
	strcat(config, "0080000000000000" "00000000" "7e000000" "00000000" "00020000");
	for (i = 24; i < 60; i++)
		strcat(config, "00");
	put(back, "vx-config", config);
	put(back, "state", "2");
}

static int wait_front(int wanted, double seconds)
{
	double limit = now() + seconds;

	while (now() < limit) {
		if (number(front, "state") == wanted)
			return 1;
		usleep(10000);
	}
	return 0;
}

static uint8_t *at(uint64_t address, uint64_t length)
{
	if (address < PAGE || length > (uint64_t)pages * PAGE || address + length > (uint64_t)pages * PAGE)
		return NULL;
	if (address + length <= (uint64_t)(ro + 1) * PAGE)
		return readonly_pages + address - PAGE;
	return address >= (uint64_t)(ro + 1) * PAGE ? rest + address : NULL;
}

static void connect_guest(void)
{
	unsigned sequence, reference;
	char *text = get(front, "vx-setup");
	uint32_t refs[32768], *page;
	uint8_t *setup;
	unsigned i, k;

	if (!text || sscanf(text, "%u %u", &sequence, &reference) != 2)
		die("vx-setup");
	setup = xengnttab_map_grant_ref(gnt, domain, reference, PROT_READ);
	if (!setup)
		die("setup page");
	ro = *(uint32_t *)(setup + 0x14);
	pages = *(uint32_t *)(setup + 0x18);
	for (i = 0; i * 1024 < pages; i++) {
		page = xengnttab_map_grant_ref(gnt, domain, *(uint32_t *)(setup + 0x20 + 4 * i), PROT_READ);
		if (!page)
			die("directory");
		for (k = 0; k < 1024 && i * 1024 + k < pages; k++)
			refs[i * 1024 + k] = page[k];
		xengnttab_unmap(gnt, page, 1);
	}
	printf("arena of %u pages, %u read-only\n", pages, ro);
	if (ro) {
		void *try = xengnttab_map_domain_grant_refs(gnt, ro, domain, refs + 1, PROT_READ | PROT_WRITE);

		printf("RINGS %s\n", try ? "WRITABLE" : "cannot be written");
		if (try)
			xengnttab_unmap(gnt, try, ro);
		readonly_pages = xengnttab_map_domain_grant_refs(gnt, ro, domain, refs + 1, PROT_READ);
		if (!readonly_pages)
			die("read-only pages");
	}
	rest = xengnttab_map_domain_grant_refs(gnt, pages - ro - 1, domain, refs + ro + 1, PROT_READ | PROT_WRITE);
	if (!rest)
		die("arena");
	rest -= (uint64_t)(ro + 1) * PAGE;
	size = *(uint16_t *)(setup + 0x102);
	desc = (void *)at(*(uint64_t *)(setup + 0x110), 16 * size);
	avail = (void *)at(*(uint64_t *)(setup + 0x118), 6 + 2 * size);
	used = (void *)at(*(uint64_t *)(setup + 0x120), 6 + 8 * size);
	inflight = (void *)at(*(uint32_t *)(setup + 0x128), 4 * size);
	if (!desc || !avail || !used || !inflight)
		die("rings");
	port = xenevtchn_bind_interdomain(evt, domain, *(uint32_t *)(setup + 0x104));
	if ((int)port < 0)
		die("event channel");
	xengnttab_unmap(gnt, setup, 1);
	free(text);
	put(back, "state", "4");
	xenevtchn_notify(evt, port);
}

static void disconnect_guest(void)
{
	xenevtchn_unbind(evt, port);
	xengnttab_unmap(gnt, rest + (uint64_t)(ro + 1) * PAGE, pages - ro - 1);
	if (ro)
		xengnttab_unmap(gnt, readonly_pages, ro);
	rest = NULL;
}

static void push(uint32_t head, uint32_t length)
{
	used->ring[used->idx % size].id = head;
	used->ring[used->idx % size].len = length;
	__sync_synchronize();
	used->idx++;
	__sync_synchronize();
}

/* Zeros into what the device may write, and a status of 0. */
static uint32_t answer_well(uint16_t head)
{
	struct desc *table = desc, *d;
	uint32_t entries = size, n = head, steps, total = 0;
	uint8_t *data;

	for (steps = 0; steps < 512 && n < entries; steps++) {
		d = &table[n];
		data = at(d->addr, d->len);
		if (!data)
			break;
		if (d->flags & 4) {
			table = (void *)data;
			entries = d->len / 16;
			n = 0;
			continue;
		}
		if (d->flags & 2) {
			size_t k;

			for (k = 0; is("look") && k + sizeof(SECRET) - 1 <= d->len; k++)
				if (!memcmp(data + k, SECRET, sizeof(SECRET) - 1))
					seen_secrets++;
			if (!is("nostatus") || requests < 60)
				memset(data, 0, d->len);
			total += d->len;
		}
		if (!(d->flags & 1))
			break;
		n = d->next;
	}
	return total;
}

static void serve_one(uint16_t head)
{
	/* Enough for the guest to find the disk, read its partitions, and begin its test. */
	int evil = requests++ >= 60;

	lies += is("mute") || evil;
	if (is("mute") || (evil && is("jump") && (used->idx += 30000)) || (evil && is("back") && used->idx--))
		return;
	if (evil && is("badid"))
		return push(0x12345678, 1);
	if (evil && is("nothead"))
		return push((head + 1 + size / 2) % size, 1);
	push(head, evil && is("longlen") ? answer_well(head) | 0xffffff00 : answer_well(head));
}

static void misbehave(unsigned *seed)
{
	unsigned i;

	if (is("stormidx"))
		used->idx++;
	if (is("storm") || is("stormidx") || is("scribble") || is("keep"))
		xenevtchn_notify(evt, port);
	if (!is("scribble") && !is("keep"))
		return;
	for (i = 0; i < 64; i++)
		((uint32_t *)used)[rand_r(seed) % (PAGE / 4)] = rand_r(seed);
	for (i = 0; i < size; i++)
		inflight[i] = rand_r(seed) & 3 ? rand_r(seed) : 0;
	for (i = 0; i < 4096; i++)
		((uint64_t *)(rest + (uint64_t)(ro + 2) * PAGE))[rand_r(seed) % ((pages - ro - 2) * (PAGE / 8))] = rand_r(seed);
}

static void serve(double seconds)
{
	struct pollfd wait = { .fd = xenevtchn_fd(evt), .events = POLLIN };
	unsigned long before, turns = 0;
	unsigned seed = 42;

	end = now() + 40;
	while (now() < end) {
		int busy = requests >= 60 && (is("storm") || is("stormidx") || is("scribble") || is("keep"));

		if (poll(&wait, 1, busy ? 0 : 20) > 0) {
			int pending = xenevtchn_pending(evt);

			if (pending >= 0)
				xenevtchn_unmask(evt, pending);
		}
		while (taken != avail->idx) {
			inflight[avail->ring[taken % size] % size] = 1;
			before = lies;
			serve_one(avail->ring[taken++ % size] % size);
			if (lies && !before)
				end = now() + seconds;
			if (!busy || !is("keep"))
				xenevtchn_notify(evt, port);
		}
		memcpy(&used->ring[size], &taken, 2);
		if (busy) {
			misbehave(&seed);
			/* The guest may have no request left that it could be lied to about. */
			if (!lies++)
				end = now() + seconds;
		}
		if ((!busy || ++turns % 64 == 0) && number(front, "state") == 5)
			break;
	}
}

static void garbage(void)
{
	static const char *offers[] = { "", " ", "=", "version=1", "version=99999999999999999999", "version=1 device=2 queues=0",
		"version=1 device=2 queues=65 sizes=1 arena=512", "version=1 device=2 queues=2 sizes=64 arena=512",
		"version=1 device=2 queues=1 sizes=0 arena=512 readonly=1", "version=1 device=2 queues=1 sizes=63 arena=4294967295 readonly=1",
		"version=1 device=2 queues=1 sizes=64,,,, arena=-1 config=99999 readonly=1",
		"version=1 device=2 features=0xffffffffffffffff queues=1 sizes=64 arena=512 config=60 readonly=1 epoch=1" };
	static const char *configs[] = { "", "1", "1 0", "x y z", "1 0 zz", "1 0 0", "4294967296 0 00", "1 999 00",
		"1 0 ffffffffffffffffffffffffffffffff00000000ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
		"1 0 ", "2 0 00800000000000000000000000000000000000000300000000000000000000000000000000000000" };
	char big[3000];
	unsigned round = 0;

	memset(big, 'f', sizeof(big) - 1);
	memcpy(big, "7 0 ", 4);
	big[sizeof(big) - 1] = 0;
	while (now() < end) {
		const char *config = configs[round / 12 % 11];

		put(back, "vx-offer", offers[round % 12]);
		put(back, "vx-config", round % 13 ? config : big);
		put(back, "state", round % 5 ? "2" : "1");
		put(back, "vx-ack", round % 2 ? "error \n\033[2J" : "99999999999 error x");
		round++;
		usleep(30000);
	}
}

/* As many queues as there may be, and as much memory. */
static const char *greedy(void)
{
	static char text[1024] = "readonly=1 queues=64 arena=32768 sizes=32768";
	unsigned i;

	for (i = 1; i < 64; i++)
		strcat(text, ",32768");
	return text;
}

static void flap(void)
{
	static const char *states[] = { "2", "4", "6", "5", "1", "77", "", "-1", "4", "2", "6", "3" };
	unsigned round = 0;

	while (now() < end) {
		if (round % 7 == 0)
			offer(2, "readonly=1");
		put(back, "state", states[round % 12]);
		put(back, "online", round % 3 ? "1" : "0");
		if (round % 4 == 0)
			put(back, "vx-config", "3 40 00800000000000000000");
		put(back, "vx-ack", "1 wait");
		round++;
		usleep(20000);
	}
}

int main(int argc, char **argv)
{
	if (argc != 6)
		return 2;
	setvbuf(stdout, NULL, _IOLBF, 0);
	domain = atoi(argv[1]);
	kind = argv[2];
	id = argv[3];
	mode = argv[4];
	xs = xs_open(0);
	gnt = xengnttab_open(NULL, 0);
	evt = xenevtchn_open(NULL, 0);
	if (!xs || !gnt || !evt)
		die("Xen");
	end = now() + atof(argv[5]);
	create();
	if (is("garbage")) {
		garbage();
	} else if (is("flap")) {
		flap();
	} else if (is("wrongtype") || is("oldrings") || is("greedy")) {
		offer(is("wrongtype") ? (strcmp(kind, "virtio") ? 3 : 18) : 2,
		      is("oldrings") ? "" : is("greedy") ? greedy() : "readonly=1");
		if (wait_front(3, end - now()))
			printf("TAKEN\n");
		else
			printf("not taken: %s\n", get(front, "state"));
	} else {
		offer(2, is("nostatus") ? "readonly=1 fills=999999999" : "readonly=1");
		if (!wait_front(3, 30)) {
			printf("the guest does not answer\n");
		} else {
			connect_guest();
			serve(atof(argv[5]));
			if (is("reset"))
				put(back, "vx-config", "9 40 00");
			printf("%lu requests, %lu lies, %lu secrets seen\n", requests, is("honest") ? 0 : lies, seen_secrets);
			if (is("keep")) {
				/* Says that it let go, and does not. */
				unsigned seed = 7;

				put(back, "state", "6");
				end = now() + 4;
				while (now() < end)
					misbehave(&seed);
			} else if (is("honest")) {
				put(back, "online", "0");
				put(back, "state", "5");
				lies = 0;
				serve(30);
			}
			disconnect_guest();
		}
	}
	put(back, "online", "0");
	put(back, "state", "6");
	wait_front(6, 20);
	printf("the frontend ends in state %d\n", number(front, "state"));
	xs_rm(xs, XBT_NULL, front);
	xs_rm(xs, XBT_NULL, back);
	return 0;
}
