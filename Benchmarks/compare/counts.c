/*
 * QEMU TCG plugin: how many instructions each processor executes between aiorand's marks, by where they are.
 *
 *     -plugin counts.so,out=FILE
 *
 * Adds lines "PHASE PROCESSOR user|kernel|xen|copies COUNT" at the end of each phase. Copies are iterations of rep-prefixed string instructions, which
 * are no part of the others: under -icount QEMU executes each iteration as a block of its own and counts it as an instruction.
 */
#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What is used here of qemu-plugin.h, whose version is 1 in QEMU 7.2. */
typedef uint64_t qemu_plugin_id_t;
struct qemu_info;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
typedef void (*execution)(unsigned processor, void *data);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id, void (*translated)(qemu_plugin_id_t, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *tb, execution callback, int flags, void *data);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *insn, execution callback, int flags, void *data);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *tb);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *tb, size_t index);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *insn);
size_t qemu_plugin_insn_size(const struct qemu_plugin_insn *insn);
__attribute__((visibility("default"))) int qemu_plugin_version = 1;

enum { PROCESSORS = 8, PARTS = 4 };
enum part { USER, KERNEL, XEN, COPIES };
static const char *const part_name[PARTS] = {"user", "kernel", "xen", "copies"};
static uint64_t count[PROCESSORS][PARTS];
static bool on;
static int phase;
static FILE *out;

/* A block is one number: instructions, its part, and whether it ends with a repeated string instruction. */
static void executed(unsigned processor, void *data)
{
	uintptr_t block = (uintptr_t)data;
	uint64_t instructions = block >> 3;
	bool repeats = block & 4;

	if (!on || processor >= PROCESSORS)
		return;
	count[processor][block & 3] += instructions - repeats;
	count[processor][COPIES] += repeats;
}

static void begins(unsigned processor, void *data)
{
	memset(count, 0, sizeof(count));
	on = true;
}

static void ends(unsigned processor, void *data)
{
	int p, part;

	if (!on)
		return;
	on = false;
	for (p = 0; p < PROCESSORS; p++)
		for (part = 0; part < PARTS; part++)
			if (count[p][part])
				fprintf(out, "%d %d %s %" PRIu64 "\n", phase, p, part_name[part], count[p][part]);
	fflush(out);
	phase++;
}

/* 0xf2 or 0xf3 among the prefixes, then ins, outs, movs, cmps, stos, lods or scas. */
static bool is_repeated(const uint8_t *byte, size_t size)
{
	bool repeated = false;

	for (; size > 1; byte++, size--) {
		if (*byte == 0xf2 || *byte == 0xf3)
			repeated = true;
		else if (*byte != 0x66 && *byte != 0x67 && (*byte & 0xf0) != 0x40)
			return false;
	}
	return repeated && ((*byte >= 0xa4 && *byte <= 0xa7) || (*byte >= 0xaa && *byte <= 0xaf) || (*byte >= 0x6c && *byte <= 0x6f));
}

static enum part part_of(uint64_t address)
{
	if (address >> 31 == 0x1ffffffff)
		return KERNEL;
	return address >> 40 == 0xffff82 ? XEN : USER;
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
	size_t number = qemu_plugin_tb_n_insns(tb), index;
	bool repeats = false;

	for (index = 0; index < number; index++) {
		struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, index);
		const uint8_t *bytes = qemu_plugin_insn_data(insn);
		size_t size = qemu_plugin_insn_size(insn);

		if (size == 8 && !memcmp(bytes, "\x0f\x1f\x84\x00\x01\x50\x1a\x7a", 8))
			qemu_plugin_register_vcpu_insn_exec_cb(insn, begins, 0, NULL);
		if (size == 8 && !memcmp(bytes, "\x0f\x1f\x84\x00\x02\x50\x1a\x7a", 8))
			qemu_plugin_register_vcpu_insn_exec_cb(insn, ends, 0, NULL);
		repeats = is_repeated(bytes, size);
	}
	qemu_plugin_register_vcpu_tb_exec_cb(tb, executed, 0, (void *)(number << 3 | (repeats ? 4 : 0) | part_of(qemu_plugin_tb_vaddr(tb))));
}

__attribute__((visibility("default"))) int qemu_plugin_install(qemu_plugin_id_t id, const struct qemu_info *info, int count_of_words, char **word)
{
	int index;

	for (index = 0; index < count_of_words; index++)
		if (!strncmp(word[index], "out=", 4))
			out = fopen(word[index] + 4, "w");
	if (!out)
		return 1;
	qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
	return 0;
}
