// SPDX-License-Identifier: GPL-2.0-only
/*
 * The arena: pages that are granted to the backend once and kept, and the DMA
 * operations that copy a driver's buffers into them. A DMA address is an offset
 * into the arena; page 0 is never used, so 0 is no address.
 */
#include <linux/highmem.h>
#include <linux/mm.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>
#include <xen/page.h>

#include "virtio_xenbus.h"

#define VX_SMALL_SHIFT	6
#define VX_SMALL_LIMIT	1024
#define VX_MIN_PAGES	64

static size_t vx_unit(const struct vx_arena *arena, dma_addr_t address)
{
	return address < arena->small_end ? 1 << VX_SMALL_SHIFT : PAGE_SIZE;
}

/* Each small cell and each page has an origin. */
static phys_addr_t *vx_origin(struct vx_arena *arena, dma_addr_t address)
{
	if (address < arena->small_end)
		return &arena->origin[address >> VX_SMALL_SHIFT];
	return &arena->origin[(arena->small_end >> VX_SMALL_SHIFT) +
			      ((address - arena->small_end) >> PAGE_SHIFT)];
}

static void *vx_take(struct vx_arena *arena, size_t size, dma_addr_t *address)
{
	void *cell = NULL;

	if (size <= VX_SMALL_LIMIT)
		cell = gen_pool_dma_alloc(arena->small, size, address);
	if (!cell)
		cell = gen_pool_dma_alloc(arena->large, size, address);
	return cell;
}

static void vx_give(struct vx_arena *arena, dma_addr_t address, size_t size)
{
	struct gen_pool *pool = address < arena->small_end ? arena->small : arena->large;

	gen_pool_free(pool, (unsigned long)arena->base + address, size);
}

static void vx_copy(void *cell, phys_addr_t origin, size_t size, bool to_cell)
{
	while (size) {
		size_t offset = offset_in_page(origin);
		size_t step = min_t(size_t, size, PAGE_SIZE - offset);
		struct page *page = pfn_to_page(PHYS_PFN(origin));

		if (to_cell)
			memcpy_from_page(cell, page, offset, step);
		else
			memcpy_to_page(page, offset, cell, step);
		cell += step;
		origin += step;
		size -= step;
	}
}

static void *vx_alloc(struct device *dev, size_t size, dma_addr_t *address,
		      gfp_t gfp, unsigned long attrs)
{
	struct vx_device *vx = dev_get_drvdata(dev);
	void *cell = gen_pool_dma_alloc(vx->arena.large, PAGE_ALIGN(size), address);

	if (cell)
		memset(cell, 0, PAGE_ALIGN(size));
	return cell;
}

static void vx_free(struct device *dev, size_t size, void *cell,
		    dma_addr_t address, unsigned long attrs)
{
	struct vx_device *vx = dev_get_drvdata(dev);

	gen_pool_free(vx->arena.large, (unsigned long)cell, PAGE_ALIGN(size));
}

static dma_addr_t vx_map_page(struct device *dev, struct page *page,
			      unsigned long offset, size_t size,
			      enum dma_data_direction direction, unsigned long attrs)
{
	struct vx_device *vx = dev_get_drvdata(dev);
	phys_addr_t origin = page_to_phys(page) + offset;
	dma_addr_t address;
	void *cell = vx_take(&vx->arena, size, &address);
	size_t unit, done;

	if (!cell)
		return DMA_MAPPING_ERROR;
	unit = vx_unit(&vx->arena, address);
	for (done = 0; done < size; done += unit)
		*vx_origin(&vx->arena, address + done) = origin + done;
	/*
	 * Also for data from the device: what a short answer leaves untouched
	 * must stay what it was, not become what another request left here.
	 */
	if (!(attrs & DMA_ATTR_SKIP_CPU_SYNC) || direction != DMA_TO_DEVICE)
		vx_copy(cell, origin, size, true);
	return address;
}

static void vx_unmap_page(struct device *dev, dma_addr_t address, size_t size,
			  enum dma_data_direction direction, unsigned long attrs)
{
	struct vx_device *vx = dev_get_drvdata(dev);

	if (direction != DMA_TO_DEVICE && !(attrs & DMA_ATTR_SKIP_CPU_SYNC))
		vx_copy(vx->arena.base + address, *vx_origin(&vx->arena, address),
			size, false);
	vx_give(&vx->arena, address, size);
}

static void vx_unmap_sg(struct device *dev, struct scatterlist *list, int count,
			enum dma_data_direction direction, unsigned long attrs)
{
	struct scatterlist *entry;
	int index;

	for_each_sg(list, entry, count, index)
		vx_unmap_page(dev, sg_dma_address(entry), sg_dma_len(entry),
			      direction, attrs);
}

static int vx_map_sg(struct device *dev, struct scatterlist *list, int count,
		     enum dma_data_direction direction, unsigned long attrs)
{
	struct scatterlist *entry;
	int index;

	for_each_sg(list, entry, count, index) {
		dma_addr_t address = vx_map_page(dev, sg_page(entry), entry->offset,
						 entry->length, direction, attrs);

		if (address == DMA_MAPPING_ERROR) {
			vx_unmap_sg(dev, list, index, direction,
				    attrs | DMA_ATTR_SKIP_CPU_SYNC);
			return -ENOMEM;
		}
		sg_dma_address(entry) = address;
		sg_dma_len(entry) = entry->length;
	}
	return count;
}

/* A part of a mapping, which may begin within a cell. */
static void vx_sync(struct device *dev, dma_addr_t address, size_t size, bool to_cell)
{
	struct vx_device *vx = dev_get_drvdata(dev);
	struct vx_arena *arena = &vx->arena;
	size_t within = address & (vx_unit(arena, address) - 1);

	vx_copy(arena->base + address, *vx_origin(arena, address) + within, size, to_cell);
}

static void vx_sync_for_cpu(struct device *dev, dma_addr_t address, size_t size,
			    enum dma_data_direction direction)
{
	if (direction != DMA_TO_DEVICE)
		vx_sync(dev, address, size, false);
}

static void vx_sync_for_device(struct device *dev, dma_addr_t address, size_t size,
			       enum dma_data_direction direction)
{
	if (direction != DMA_FROM_DEVICE)
		vx_sync(dev, address, size, true);
}

static void vx_sync_sg_for_cpu(struct device *dev, struct scatterlist *list, int count,
			       enum dma_data_direction direction)
{
	struct scatterlist *entry;
	int index;

	for_each_sg(list, entry, count, index)
		vx_sync_for_cpu(dev, sg_dma_address(entry), sg_dma_len(entry), direction);
}

static void vx_sync_sg_for_device(struct device *dev, struct scatterlist *list, int count,
				  enum dma_data_direction direction)
{
	struct scatterlist *entry;
	int index;

	for_each_sg(list, entry, count, index)
		vx_sync_for_device(dev, sg_dma_address(entry), sg_dma_len(entry), direction);
}

static int vx_dma_supported(struct device *dev, u64 mask)
{
	return 1;
}

static size_t vx_max_mapping_size(struct device *dev)
{
	struct vx_device *vx = dev_get_drvdata(dev);

	return min_t(size_t, VX_MAX_MAPPING, (vx->arena.pages / 16) << PAGE_SHIFT);
}

const struct dma_map_ops vx_dma_ops = {
	.alloc = vx_alloc,
	.free = vx_free,
	.map_page = vx_map_page,
	.unmap_page = vx_unmap_page,
	.map_sg = vx_map_sg,
	.unmap_sg = vx_unmap_sg,
	.sync_single_for_cpu = vx_sync_for_cpu,
	.sync_single_for_device = vx_sync_for_device,
	.sync_sg_for_cpu = vx_sync_sg_for_cpu,
	.sync_sg_for_device = vx_sync_sg_for_device,
	.dma_supported = vx_dma_supported,
	.max_mapping_size = vx_max_mapping_size,
};

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

static int vx_arena_pages(struct vx_arena *arena, u32 pages)
{
	u32 directories = DIV_ROUND_UP(pages, VX_REFS_PER_PAGE);
	u32 i;

	arena->page = kvcalloc(pages, sizeof(*arena->page), GFP_KERNEL);
	arena->ref = kvcalloc(pages, sizeof(*arena->ref), GFP_KERNEL);
	if (!arena->page || !arena->ref)
		return -ENOMEM;
	for (i = 0; i < pages; i++) {
		arena->page[i] = alloc_page(GFP_KERNEL | __GFP_ZERO | __GFP_NOWARN);
		if (!arena->page[i])
			return -ENOMEM;
		arena->pages = i + 1;
	}
	for (i = 0; i < directories; i++) {
		arena->directory[i] = alloc_page(GFP_KERNEL | __GFP_ZERO);
		if (!arena->directory[i])
			return -ENOMEM;
		arena->directories = i + 1;
	}
	arena->setup = alloc_page(GFP_KERNEL | __GFP_ZERO);
	if (!arena->setup)
		return -ENOMEM;
	arena->base = vmap(arena->page, pages, VM_MAP, PAGE_KERNEL);
	if (!arena->base)
		return -ENOMEM;
	/* Page 0 stays unused; an eighth is for headers, status bytes and tables. */
	arena->small_end = (1 + max(pages / 8, 4U)) << PAGE_SHIFT;
	arena->origin = kvcalloc((arena->small_end >> VX_SMALL_SHIFT) + pages,
				 sizeof(*arena->origin), GFP_KERNEL);
	if (!arena->origin)
		return -ENOMEM;
	arena->small = vx_pool(arena, VX_SMALL_SHIFT, PAGE_SIZE, arena->small_end);
	arena->large = vx_pool(arena, PAGE_SHIFT, arena->small_end,
			       (size_t)pages << PAGE_SHIFT);
	return arena->small && arena->large ? 0 : -ENOMEM;
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

	if (arena->small)
		gen_pool_destroy(arena->small);
	if (arena->large)
		gen_pool_destroy(arena->large);
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
	kvfree(arena->origin);
	memset(arena, 0, sizeof(*arena));
}

/* As many pages as are wanted, or half of that, and so on, as there is room. */
int vx_arena_create(struct vx_device *vx, u32 pages)
{
	int err = -ENOMEM;

	for (; pages >= VX_MIN_PAGES; pages /= 2) {
		err = vx_arena_pages(&vx->arena, pages);
		if (!err)
			err = vx_arena_refs(&vx->arena);
		if (!err)
			return 0;
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
						xen_page_to_gfn(arena->page[i]), 0);
	gnttab_grant_foreign_access_ref(arena->setup_ref, domain,
					xen_page_to_gfn(arena->setup), 1);
	arena->granted = true;
}

/* Whether the backend has let go of a page. */
static bool vx_end(struct vx_device *vx, grant_ref_t ref)
{
	if (gnttab_end_foreign_access_ref(ref))
		return true;
	vx->leaked = true;
	return false;
}

/* Ends the backend's access. What it still has mapped then is not used again. */
void vx_arena_revoke(struct vx_device *vx)
{
	struct vx_arena *arena = &vx->arena;
	u32 i;

	if (!arena->granted)
		return;
	arena->granted = false;
	vx_end(vx, arena->setup_ref);
	for (i = 0; i < arena->directories; i++)
		vx_end(vx, arena->directory_ref[i]);
	for (i = 0; i < arena->pages; i++)
		vx_end(vx, arena->ref[i]);
	if (vx->leaked)
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
		memset(arena, 0, sizeof(*arena));
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
