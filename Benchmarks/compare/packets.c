/*
 * Small UDP packets, as fast as they go: what `make compare` measures beside TCP.
 *
 *     packets serve                  on port 7000, for ever
 *     packets send ADDRESS COUNT     to the server, which counts what arrives
 *     packets receive ADDRESS COUNT  from the server
 *
 * Both print "packets=ARRIVED sent=COUNT ns=T": what arrived, and the time from the first to the last of it by the receiver's clock. Each packet has
 * 64 bytes of data. Packets that find no room on their way are lost, as they are anywhere.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

enum { PORT = 7000, BYTES = 64, QUIET_MS = 500 };
enum kind { DATA, COUNT_THESE, SEND_THESE, RESULT };
struct packet {
	uint32_t kind, count;
	uint64_t ns;
	char rest[BYTES - 16];
};

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static void give(int at, const struct packet *packet, const struct sockaddr_in *to)
{
	while (sendto(at, packet, BYTES, 0, (const struct sockaddr *)to, sizeof(*to)) < 0)
		if (errno != ENOBUFS && errno != EAGAIN && errno != ECONNREFUSED)
			fail("sendto");
}

/* True when a packet came before the time was over. */
static int take(int at, struct packet *packet, struct sockaddr_in *from, int ms)
{
	struct pollfd wait = {.fd = at, .events = POLLIN};
	socklen_t length = sizeof(*from);

	if (recvfrom(at, packet, BYTES, MSG_DONTWAIT, (struct sockaddr *)from, &length) == BYTES)
		return 1;
	if (poll(&wait, 1, ms) < 1)
		return 0;
	length = sizeof(*from);
	return recvfrom(at, packet, BYTES, 0, (struct sockaddr *)from, &length) == BYTES;
}

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000ull + time.tv_nsec;
}

/* Until all have come, or none for a while. */
static struct packet count_packets(int at, uint32_t count)
{
	struct packet packet, result = {.kind = RESULT};
	struct sockaddr_in from;
	uint64_t first = 0;

	while (result.count < count && take(at, &packet, &from, QUIET_MS)) {
		if (packet.kind != DATA)
			continue;
		result.ns = now();
		if (!result.count++)
			first = result.ns;
	}
	result.ns -= first;
	return result;
}

static void send_packets(int at, uint32_t count, const struct sockaddr_in *to)
{
	struct packet packet = {.kind = DATA};

	while (count--)
		give(at, &packet, to);
}

static void serve(int at)
{
	struct sockaddr_in from;
	struct packet order;

	for (;;) {
		if (!take(at, &order, &from, -1))
			continue;
		if (order.kind == COUNT_THESE) {
			struct packet result = count_packets(at, order.count);

			give(at, &result, &from);
		} else if (order.kind == SEND_THESE) {
			send_packets(at, order.count, &from);
		}
	}
}

int main(int argc, char **argv)
{
	struct sockaddr_in server = {.sin_family = AF_INET, .sin_port = htons(PORT)}, from;
	int at = socket(AF_INET, SOCK_DGRAM, 0);
	struct packet order = {0}, result;

	if (at < 0)
		fail("socket");
	if (argc == 2 && !strcmp(argv[1], "serve")) {
		if (bind(at, (struct sockaddr *)&server, sizeof(server)))
			fail("bind");
		serve(at);
	}
	if (argc != 4 || !inet_aton(argv[2], &server.sin_addr))
		return fprintf(stderr, "usage: packets serve | send ADDRESS COUNT | receive ADDRESS COUNT\n"), 2;
	order.count = strtoul(argv[3], NULL, 10);
	order.kind = strcmp(argv[1], "send") ? SEND_THESE : COUNT_THESE;
	give(at, &order, &server);
	if (order.kind == SEND_THESE) {
		result = count_packets(at, order.count);
	} else {
		send_packets(at, order.count, &server);
		do {
			if (!take(at, &result, &from, 5000))
				fail("no answer");
		} while (result.kind != RESULT);
	}
	printf("packets=%u sent=%u ns=%llu\n", result.count, order.count, (unsigned long long)result.ns);
	return 0;
}
