// SPDX-License-Identifier: GPL-2.0-only
/*
 * The arena: pages that are granted to the backend once and kept. Behind page 0,
 * which is never used, come those that it may only read (descriptor tables and
 * available rings), those that the queues have it write (used rings and in-flight
 * areas), and the cells.
 */
#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>
#include <xen/page.h>

#include "virtio_xenbus.h"

#define VX_MIN_PAGES	64
/* Of the guest's memory and of its grants, at most so much for one device. */
#define VX_MEMORY_SHARE	8
#define VX_GRANT_SHARE	4
#define VX_REFS_PER_FRAME	512

/* Gives each queue that is offered its pages; returns the first page behind. */
static u32 vx_place_rings(struct vx_device *vx)
{
	struct vx_arena *arena = &vx->arena;
	u32 page = 1;
	u32 i;

	for (i = 0; i < vx->offer.queues; i++) {
		struct vx_ring_place *place = &arena->ring[i];

		place->size = rounddown_pow_of_two(min_t(u16, vx->offer.size[i], VX_MAX_RING));
		place->driver_page = page;
		place->driver_pages = PFN_UP(place->size * (sizeof(struct vring_desc) + 2) + 6);
		page += place->driver_pages;
	}
	arena->readonly = page - 1;
	for (i = 0; i < vx->offer.queues; i++) {
		struct vx_ring_place *place = &arena->ring[i];
		u32 used = 6 + place->size * sizeof(struct vring_used_elem);

		place->device_page = page;
		place->inflight_offset = ALIGN(used, SMP_CACHE_BYTES);
		place->device_pages = PFN_UP(place->inflight_offset + 4 * place->size);
		page += place->device_pages;
	}
	return page;
}

static int vx_arena_pages_create(struct vx_arena *arena, u32 pages)
{
	/* Too large a wish is answered with less, not by ending processes. */
	gfp_t gfp = GFP_KERNEL | __GFP_ZERO | __GFP_NOWARN | __GFP_RETRY_MAYFAIL;
	u32 directories = DIV_ROUND_UP(pages, VX_REFS_PER_PAGE);
	u32 i;

	arena->page = kvcalloc(pages, sizeof(*arena->page), GFP_KERNEL);
	arena->ref = kvcalloc(pages, sizeof(*arena->ref), GFP_KERNEL);
	if (!arena->page || !arena->ref)
		return -ENOMEM;
	for (i = 0; i < pages; i++) {
		arena->page[i] = alloc_page(gfp);
		if (!arena->page[i])
			return -ENOMEM;
		arena->pages = i + 1;
	}
	for (i = 0; i < directories; i++) {
		arena->directory[i] = alloc_page(gfp);
		if (!arena->directory[i])
			return -ENOMEM;
		arena->directories = i + 1;
	}
	arena->setup = alloc_page(gfp);
	if (!arena->setup)
		return -ENOMEM;
	arena->base = vmap(arena->page, pages, VM_MAP, PAGE_KERNEL);
	return arena->base ? vx_cells_create(arena) : -ENOMEM;
}

static int vx_arena_refs(struct vx_arena *arena)
{
	u32 count = arena->pages + arena->directories + 1;
	u32 i;

	if (gnttab_alloc_grant_references(count, &arena->ref_head))
		return -ENOSPC;
	for (i = 0; i < arena->pages; i++)
		arena->ref[i] = gnttab_claim_grant_reference(&arena->ref_head);
	for (i = 0; i < arena->directories; i++)
		arena->directory_ref[i] = gnttab_claim_grant_reference(&arena->ref_head);
	arena->setup_ref = gnttab_claim_grant_reference(&arena->ref_head);
	return 0;
}

/* Frees pages and tables; the grants are revoked, or were never given. */
static void vx_arena_free(struct vx_arena *arena)
{
	u32 i;

	vx_cells_destroy(arena);
	if (arena->base)
		vunmap(arena->base);
	for (i = 0; i < arena->pages; i++)
		if (arena->page[i])
			__free_page(arena->page[i]);
	for (i = 0; i < arena->directories; i++)
		__free_page(arena->directory[i]);
	if (arena->setup)
		__free_page(arena->setup);
	kvfree(arena->page);
	kvfree(arena->ref);
	memset(arena, 0, sizeof(*arena));
}

/*
 * As many pages as are wanted, or half of that, and so on, as there is room. How
 * many are wanted the backend says too: it must not take what others need.
 */
int vx_arena_create(struct vx_device *vx)
{
	unsigned long grants = (unsigned long)gnttab_max_grant_frames() * VX_REFS_PER_FRAME;
	u64 wanted = (u64)vx_arena_pages * vx->offer.queues;
	int err = -ENOMEM;
	u32 pages, first;

	wanted = min3(wanted, (u64)vx->offer.pages, (u64)VX_MAX_PAGES);
	wanted = min3(wanted, (u64)totalram_pages() / VX_MEMORY_SHARE,
		      (u64)grants / VX_GRANT_SHARE);
	for (pages = wanted; pages >= VX_MIN_PAGES; pages /= 2) {
		first = vx_place_rings(vx);
		if (first > pages / 2)
			return -ENOSPC;
		vx->arena.small_start = (size_t)first << PAGE_SHIFT;
		err = vx_arena_pages_create(&vx->arena, pages);
		if (!err)
			err = vx_arena_refs(&vx->arena);
		if (!err) {
			/* A backend of before read-only rings, if it is allowed. */
			if (!vx->offer.readonly)
				vx->arena.readonly = 0;
			return 0;
		}
		vx_arena_free(&vx->arena);
	}
	return err;
}

/* Gives the present backend access; the references stay the same for good. */
void vx_arena_grant(struct vx_device *vx)
{
	struct vx_arena *arena = &vx->arena;
	domid_t domain = vx->xdev->otherend_id;
	u32 i;

	for (i = 0; i < arena->directories; i++) {
		__le32 *entry = page_address(arena->directory[i]);
		u32 first = i * VX_REFS_PER_PAGE;
		u32 j;

		for (j = 0; j < VX_REFS_PER_PAGE && first + j < arena->pages; j++)
			entry[j] = cpu_to_le32(arena->ref[first + j]);
		gnttab_grant_foreign_access_ref(arena->directory_ref[i], domain,
						xen_page_to_gfn(arena->directory[i]), 1);
	}
	for (i = 0; i < arena->pages; i++)
		gnttab_grant_foreign_access_ref(arena->ref[i], domain,
						xen_page_to_gfn(arena->page[i]),
						i >= 1 && i <= arena->readonly);
	gnttab_grant_foreign_access_ref(arena->setup_ref, domain,
					xen_page_to_gfn(arena->setup), 1);
	arena->granted = true;
}

/* Whether the backend has let go of a page. */
static bool vx_end_grant(struct vx_device *vx, grant_ref_t ref)
{
	if (gnttab_end_foreign_access_ref(ref))
		return true;
	vx->leaked = true;
	return false;
}

/*
 * Ends the backend's access. What it still has mapped then is not used again.
 * The first page that it keeps tells enough: each makes the kernel log a line.
 */
void vx_arena_revoke(struct vx_device *vx)
{
	struct vx_arena *arena = &vx->arena;
	bool kept = false;
	u32 i;

	if (!arena->granted)
		return;
	arena->granted = false;
	kept |= !vx_end_grant(vx, arena->setup_ref);
	for (i = 0; i < arena->directories && !kept; i++)
		kept |= !vx_end_grant(vx, arena->directory_ref[i]);
	for (i = 0; i < arena->pages && !kept; i++)
		kept |= !vx_end_grant(vx, arena->ref[i]);
	if (kept)
		dev_err(&vx->xdev->dev,
			"the backend keeps pages mapped: %u pages are lost\n", arena->pages);
}

void vx_arena_destroy(struct vx_device *vx)
{
	struct vx_arena *arena = &vx->arena;
	u32 i;

	if (!arena->pages)
		return;
	vx_arena_revoke(vx);
	if (vx->leaked) {
		/* Neither pages nor references may serve anybody else. */
		memset(arena->page, 0, arena->pages * sizeof(*arena->page));
		arena->directories = 0;
		arena->setup = NULL;
		vx_arena_free(arena);
		vx->leaked = false;
		return;
	}
	for (i = 0; i < arena->pages; i++)
		gnttab_release_grant_reference(&arena->ref_head, arena->ref[i]);
	for (i = 0; i < arena->directories; i++)
		gnttab_release_grant_reference(&arena->ref_head, arena->directory_ref[i]);
	gnttab_release_grant_reference(&arena->ref_head, arena->setup_ref);
	gnttab_free_grant_references(arena->ref_head);
	vx_arena_free(arena);
}
