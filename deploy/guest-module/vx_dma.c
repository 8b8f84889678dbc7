// SPDX-License-Identifier: GPL-2.0-only
/*
 * DMA operations that copy a driver's buffers into cells of the arena and out
 * of them. A DMA address is an offset into the arena; page 0 is never used, so
 * 0 is no address. Where a cell's data goes is known here alone: nothing that
 * the backend can write says where to copy to, or how much.
 */
#include <linux/highmem.h>
#include <linux/mm.h>
#include <linux/virtio_ids.h>

#include "virtio_xenbus.h"

/* So small a buffer for the device holds a status rather than data. */
#define VX_STATUS_LIMIT	16
#define VX_STATUS_NONE	0xff

static noinline void vx_copy_pages(void *cell, phys_addr_t origin, size_t size,
				   bool to_cell)
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

static __always_inline void vx_copy(void *cell, phys_addr_t origin, size_t size,
				    bool to_cell)
{
	struct page *page = pfn_to_page(PHYS_PFN(origin));
	size_t offset = offset_in_page(origin);

	if (unlikely(offset + size > PAGE_SIZE))
		vx_copy_pages(cell, origin, size, to_cell);
	else if (to_cell)
		memcpy_from_page(cell, page, offset, size);
	else
		memcpy_to_page(page, offset, cell, size);
}

/* What a buffer becomes that no device answered any more. */
static void vx_void(phys_addr_t origin, size_t size)
{
	int value = size <= VX_STATUS_LIMIT ? VX_STATUS_NONE : 0;

	while (size) {
		size_t offset = offset_in_page(origin);
		size_t step = min_t(size_t, size, PAGE_SIZE - offset);
		void *start = kmap_local_page(pfn_to_page(PHYS_PFN(origin)));

		memset(start + offset, value, step);
		kunmap_local(start);
		origin += step;
		size -= step;
	}
}

/*
 * A cell for data from the device does not get the buffer's old contents: they
 * are nobody's business outside. What another request left in the cell the
 * backend has seen before, but a short answer must not show it to this request's
 * owner; so the cell becomes zeros, unless drivers look at no more than is said
 * to be written (vx->blank). A status that the device does not write must not
 * read as success, which is 0.
 */
static void vx_begin(struct vx_device *vx, void *cell, size_t size)
{
	if (size <= VX_STATUS_LIMIT)
		memset(cell, VX_STATUS_NONE, size);
	else if (vx->blank)
		memset(cell, 0, size);
}

static void vx_end(struct vx_device *vx, void *cell, phys_addr_t origin, size_t size)
{
	if (unlikely(READ_ONCE(vx->withdrawn)))
		vx_void(origin, size);
	else
		vx_copy(cell, origin, size, false);
}

static void *vx_alloc(struct device *dev, size_t size, dma_addr_t *address,
		      gfp_t gfp, unsigned long attrs)
{
	struct vx_device *vx = dev_get_drvdata(dev);
	u32 at;
	void *cell = vx_take(&vx->arena, PAGE_ALIGN(size), 0, &at);

	if (cell) {
		memset(cell, 0, PAGE_ALIGN(size));
		vx_note(&vx->arena, at, 0, PAGE_ALIGN(size), false);
		*address = at;
	}
	return cell;
}

static void vx_free(struct device *dev, size_t size, void *cell,
		    dma_addr_t address, unsigned long attrs)
{
	struct vx_device *vx = dev_get_drvdata(dev);

	vx_forget(&vx->arena, address, PAGE_ALIGN(size));
	vx_give(&vx->arena, address, PAGE_ALIGN(size), 0);
}

static dma_addr_t vx_map_page(struct device *dev, struct page *page,
			      unsigned long offset, size_t size,
			      enum dma_data_direction direction, unsigned long attrs)
{
	struct vx_device *vx = dev_get_drvdata(dev);
	struct vx_arena *arena = &vx->arena;
	phys_addr_t origin = page_to_phys(page) + offset;
	void *cell;
	u32 address;

	if (!size || size > (size_t)arena->pages << PAGE_SHIFT)
		return DMA_MAPPING_ERROR;
	cell = vx_take(arena, size, origin, &address);
	if (unlikely(!cell))
		return DMA_MAPPING_ERROR;
	vx_note(arena, address, origin, size, direction != DMA_TO_DEVICE);
	if (direction == DMA_FROM_DEVICE)
		vx_begin(vx, cell, size);
	else if (!(attrs & DMA_ATTR_SKIP_CPU_SYNC))
		vx_copy(cell, origin, size, true);
	return address;
}

/* The unit of a part of a mapping, if it is that. */
static inline struct vx_unit *vx_mapped(struct vx_device *vx, dma_addr_t address,
					size_t size)
{
	struct vx_arena *arena = &vx->arena;
	struct vx_unit *unit;

	if (address < arena->small_start || address >= (u64)arena->pages << PAGE_SHIFT)
		return NULL;
	unit = vx_unit_of(arena, address);
	if ((address & (vx_unit_bytes(arena, address) - 1)) + size > unit->left)
		return NULL;
	return unit;
}

static void vx_unmap_page(struct device *dev, dma_addr_t address, size_t size,
			  enum dma_data_direction direction, unsigned long attrs)
{
	struct vx_device *vx = dev_get_drvdata(dev);
	struct vx_arena *arena = &vx->arena;
	struct vx_unit *unit = vx_mapped(vx, address, size);
	bool from_device = direction != DMA_TO_DEVICE;
	phys_addr_t origin;

	/* With rings that the backend can write, this is what it can bring about. */
	if (unlikely(!unit || unit->left != size || unit->from_device != from_device)) {
		dev_err_once(dev, "a mapping is ended that is none\n");
		return;
	}
	origin = unit->origin;
	if (from_device && !(attrs & DMA_ATTR_SKIP_CPU_SYNC))
		vx_end(vx, arena->base + address, origin, size);
	vx_forget(arena, address, size);
	vx_give(arena, address, size, origin);
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
	struct vx_unit *unit = vx_mapped(vx, address, size);
	phys_addr_t origin;

	if (unlikely(!unit)) {
		dev_err_once(dev, "a mapping is synchronised that is none\n");
		return;
	}
	origin = unit->origin + (address & (vx_unit_bytes(arena, address) - 1));
	if (to_cell)
		vx_copy(arena->base + address, origin, size, true);
	else
		vx_end(vx, arena->base + address, origin, size);
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
