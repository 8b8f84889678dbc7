// SPDX-License-Identifier: GPL-2.0-only
/*
 * Cells of the arena: where a driver's buffers are copied to and from. They come
 * from two pools: units of 64 bytes for headers, status bytes and tables, and
 * pages. A search through a pool's bitmap costs more than the copy of a header, so
 * free cells are kept in front of the pools, by their size, in lists. In front of
 * these, cells of the two sizes that every request needs are kept in slots that
 * need no lock: a request's tag has its buffers at the same places each time, and
 * finds its cells in the same slots. Whatever is kept so goes back to the pools
 * before a cell is refused: what a pool could give is never missed.
 */
#include <linux/atomic.h>
#include <linux/hash.h>
#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/slab.h>

#include "virtio_xenbus.h"

/* Notes what the units of a cell behind its first one stand for. */
void vx_note_rest(struct vx_unit *unit, size_t bytes)
{
	const struct vx_unit *first = unit;
	size_t done;

	for (done = bytes; done < first->left; done += bytes) {
		unit++;
		unit->origin = first->origin + done;
		unit->left = first->left - done;
		unit->from_device = first->from_device;
	}
}

/* Lists: of 1, 2, 4, 8 and 16 small units, then of 1 to VX_PAGE_LISTS pages. */
static size_t vx_list_bytes(unsigned int index)
{
	if (index < VX_SMALL_LISTS)
		return VX_SMALL_UNIT << index;
	return (size_t)(index - VX_SMALL_LISTS + 1) << PAGE_SHIFT;
}

/* The list for a size, or VX_LISTS when there is none. */
static unsigned int vx_list_of(size_t size)
{
	if (size <= VX_SMALL_UNIT)
		return 0;
	if (size <= VX_SMALL_LIMIT)
		return order_base_2(size) - VX_SMALL_SHIFT;
	return min_t(size_t, VX_SMALL_LISTS - 1 + PFN_UP(size), VX_LISTS);
}

static struct gen_pool *vx_pool_of(struct vx_arena *arena, u32 address)
{
	return address < arena->small_end ? arena->small : arena->large;
}

static bool vx_pop(struct vx_list *list, u32 *address)
{
	unsigned long flags;
	bool found;

	spin_lock_irqsave(&list->lock, flags);
	found = list->count;
	if (found)
		*address = list->address[--list->count];
	spin_unlock_irqrestore(&list->lock, flags);
	return found;
}

static bool vx_push(struct vx_list *list, u32 address)
{
	unsigned long flags;
	bool fits;

	spin_lock_irqsave(&list->lock, flags);
	fits = list->count < VX_LIST_DEPTH;
	if (fits)
		list->address[list->count++] = address;
	spin_unlock_irqrestore(&list->lock, flags);
	return fits;
}

static bool vx_pool_take(struct vx_arena *arena, struct gen_pool *pool, size_t size,
			 u32 *address)
{
	unsigned long cell = gen_pool_alloc(pool, size);

	if (cell)
		*address = cell - (unsigned long)arena->base;
	return cell;
}

static void vx_pool_give(struct vx_arena *arena, u32 address, size_t size)
{
	gen_pool_free(vx_pool_of(arena, address), (unsigned long)arena->base + address, size);
}

/* What is kept goes back to the pools: it may be what a larger cell lacks. */
static void vx_drain(struct vx_arena *arena)
{
	unsigned int index;
	u32 address;

	for (index = 0; index < VX_SLOTS; index++) {
		struct vx_slot *slot = &arena->slot[index];

		if (READ_ONCE(slot->unit)) {
			address = xchg(&slot->unit, 0);
			if (address)
				vx_pool_give(arena, address, VX_SMALL_UNIT);
		}
		if (READ_ONCE(slot->page)) {
			address = xchg(&slot->page, 0);
			if (address)
				vx_pool_give(arena, address, PAGE_SIZE);
		}
	}
	for (index = 0; index < VX_LISTS; index++)
		while (vx_pop(&arena->list[index], &address))
			vx_pool_give(arena, address, vx_list_bytes(index));
}

static bool vx_try(struct vx_arena *arena, size_t size, u32 *address)
{
	unsigned int index = vx_list_of(size);

	if (index < VX_SMALL_LISTS) {
		if (vx_pop(&arena->list[index], address) ||
		    vx_pool_take(arena, arena->small, vx_list_bytes(index), address))
			return true;
		/* A small cell may come from the pages. */
		index = VX_SMALL_LISTS;
		size = PAGE_SIZE;
	}
	if (index < VX_LISTS && vx_pop(&arena->list[index], address))
		return true;
	return vx_pool_take(arena, arena->large, size, address);
}

static struct vx_slot *vx_slot_of(struct vx_arena *arena, phys_addr_t origin)
{
	return &arena->slot[hash_64(origin, VX_SLOT_BITS)];
}

/* A cell, or NULL: virtio drivers try again when others have been given back. */
void *vx_take(struct vx_arena *arena, size_t size, phys_addr_t origin, u32 *address)
{
	struct vx_slot *slot = vx_slot_of(arena, origin);

	*address = 0;
	if (size <= VX_SMALL_UNIT)
		*address = xchg(&slot->unit, 0);
	else if (size <= PAGE_SIZE && size > VX_SMALL_LIMIT)
		*address = xchg(&slot->page, 0);
	if (unlikely(!*address) && !vx_try(arena, size, address)) {
		vx_drain(arena);
		if (!vx_try(arena, size, address))
			return NULL;
	}
	return arena->base + *address;
}

void vx_give(struct vx_arena *arena, u32 address, size_t size, phys_addr_t origin)
{
	struct vx_slot *slot = vx_slot_of(arena, origin);
	unsigned int index;

	if (address >= arena->small_end) {
		if (size <= PAGE_SIZE && !cmpxchg(&slot->page, 0, address))
			return;
		/* A small cell may have come from the pages. */
		index = vx_list_of(max_t(size_t, size, PAGE_SIZE));
	} else {
		if (size <= VX_SMALL_UNIT && !cmpxchg(&slot->unit, 0, address))
			return;
		index = vx_list_of(size);
	}
	if (index < VX_LISTS) {
		if (vx_push(&arena->list[index], address))
			return;
		size = vx_list_bytes(index);
	}
	vx_pool_give(arena, address, size);
}

static struct gen_pool *vx_pool(struct vx_arena *arena, int shift, size_t from, size_t to)
{
	struct gen_pool *pool = gen_pool_create(shift, -1);

	if (pool && gen_pool_add_virt(pool, (unsigned long)arena->base + from, from,
				      to - from, -1)) {
		gen_pool_destroy(pool);
		pool = NULL;
	}
	return pool;
}

/* From the end of the rings on; an eighth is for headers, status bytes and tables. */
int vx_cells_create(struct vx_arena *arena)
{
	u32 rest = arena->pages - (arena->small_start >> PAGE_SHIFT);
	u32 small = max(rest / 8, 4U);
	unsigned int index;

	arena->small_end = arena->small_start + ((size_t)small << PAGE_SHIFT);
	arena->unit = kvcalloc(((size_t)small << (PAGE_SHIFT - VX_SMALL_SHIFT)) + rest - small,
			       sizeof(*arena->unit), GFP_KERNEL);
	arena->list = kvcalloc(VX_LISTS, sizeof(*arena->list), GFP_KERNEL);
	arena->slot = kvcalloc(VX_SLOTS, sizeof(*arena->slot), GFP_KERNEL);
	if (!arena->unit || !arena->list || !arena->slot)
		return -ENOMEM;
	arena->small_first = arena->small_start >> VX_SMALL_SHIFT;
	arena->page_first = (arena->small_end >> PAGE_SHIFT) -
			    (small << (PAGE_SHIFT - VX_SMALL_SHIFT));
	for (index = 0; index < VX_LISTS; index++)
		spin_lock_init(&arena->list[index].lock);
	arena->small = vx_pool(arena, VX_SMALL_SHIFT, arena->small_start, arena->small_end);
	arena->large = vx_pool(arena, PAGE_SHIFT, arena->small_end,
			       (size_t)arena->pages << PAGE_SHIFT);
	return arena->small && arena->large ? 0 : -ENOMEM;
}

/* Not every driver takes back the buffers that its device still has. */
static void vx_reclaim(struct vx_arena *arena)
{
	u64 end = (u64)arena->pages << PAGE_SHIFT;
	u64 address = arena->small_start;

	while (address < end) {
		struct vx_unit *unit = vx_unit_of(arena, address);
		size_t size = unit->left;

		if (size) {
			vx_forget(arena, address, size);
			vx_give(arena, address, size, unit->origin);
		}
		address += ALIGN(max(size, (size_t)1), vx_unit_bytes(arena, address));
	}
}

/* A pool with a cell outside would stop the kernel. */
void vx_cells_destroy(struct vx_arena *arena)
{
	if (arena->small && arena->large) {
		vx_reclaim(arena);
		vx_drain(arena);
	}
	if (arena->small)
		gen_pool_destroy(arena->small);
	if (arena->large)
		gen_pool_destroy(arena->large);
	kvfree(arena->unit);
	kvfree(arena->list);
	kvfree(arena->slot);
}
