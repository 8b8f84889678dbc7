// SPDX-License-Identifier: GPL-2.0-only
/*
 * Cells of the arena: where a driver's buffers are copied to and from. Small
 * ones come from a pool with units of 64 bytes, large ones from a pool of
 * pages. Of the sizes that every request needs, free cells are kept in lists,
 * since a search through a pool's bitmap costs more than the copy of a header.
 */
#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/slab.h>

#include "virtio_xenbus.h"

size_t vx_unit_bytes(const struct vx_arena *arena, u32 address)
{
	return address < arena->small_end ? 1 << VX_SMALL_SHIFT : PAGE_SIZE;
}

/* Of an address from the small pool's start on. */
struct vx_unit *vx_unit_of(struct vx_arena *arena, u32 address)
{
	u32 small = (arena->small_end - arena->small_start) >> VX_SMALL_SHIFT;

	if (address < arena->small_end)
		return &arena->unit[(address - arena->small_start) >> VX_SMALL_SHIFT];
	return &arena->unit[small + ((address - arena->small_end) >> PAGE_SHIFT)];
}

/* Notes what a cell stands for. */
void vx_note(struct vx_arena *arena, u32 address, phys_addr_t origin, size_t size,
	     bool from_device)
{
	struct vx_unit *unit = vx_unit_of(arena, address);
	size_t bytes = vx_unit_bytes(arena, address);
	size_t done;

	for (done = 0; done < size; done += bytes, unit++) {
		unit->origin = origin + done;
		unit->left = size - done;
		unit->from_device = from_device;
	}
}

void vx_forget(struct vx_arena *arena, u32 address, size_t size)
{
	struct vx_unit *unit = vx_unit_of(arena, address);
	size_t bytes = vx_unit_bytes(arena, address);
	size_t done;

	for (done = 0; done < size; done += bytes, unit++)
		unit->left = 0;
}

static size_t vx_list_bytes(unsigned int index)
{
	return index < VX_LISTS - 1 ? 1 << (VX_SMALL_SHIFT + index) : PAGE_SIZE;
}

/* The list for a size, or VX_LISTS when there is none. */
static unsigned int vx_list_of(size_t size)
{
	if (size <= 1 << VX_SMALL_SHIFT)
		return 0;
	if (size <= VX_SMALL_LIMIT)
		return order_base_2(size) - VX_SMALL_SHIFT;
	return size <= PAGE_SIZE ? VX_LISTS - 1 : VX_LISTS;
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

/* What lists keep goes back to the pools: it may be what a larger cell lacks. */
static void vx_drain(struct vx_arena *arena)
{
	unsigned int index;
	u32 address;

	for (index = 0; index < VX_LISTS; index++)
		while (vx_pop(&arena->list[index], &address))
			vx_pool_give(arena, address, vx_list_bytes(index));
}

static bool vx_try(struct vx_arena *arena, size_t size, u32 *address)
{
	unsigned int index = vx_list_of(size);

	if (index < VX_LISTS - 1) {
		if (vx_pop(&arena->list[index], address) ||
		    vx_pool_take(arena, arena->small, vx_list_bytes(index), address))
			return true;
		index = VX_LISTS - 1;
	}
	if (index < VX_LISTS) {
		size = PAGE_SIZE;
		if (vx_pop(&arena->list[index], address))
			return true;
	}
	return vx_pool_take(arena, arena->large, size, address);
}

/* A cell, or NULL: virtio drivers try again when others have been given back. */
void *vx_take(struct vx_arena *arena, size_t size, u32 *address)
{
	if (!vx_try(arena, size, address)) {
		vx_drain(arena);
		if (!vx_try(arena, size, address))
			return NULL;
	}
	return arena->base + *address;
}

void vx_give(struct vx_arena *arena, u32 address, size_t size)
{
	unsigned int index = vx_list_of(size);

	/* A small cell may have come from the pages. */
	if (index < VX_LISTS - 1 && address >= arena->small_end)
		index = VX_LISTS - 1;
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
	if (!arena->unit || !arena->list)
		return -ENOMEM;
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
		size_t size = vx_unit_of(arena, address)->left;

		if (size) {
			vx_forget(arena, address, size);
			vx_give(arena, address, size);
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
}
