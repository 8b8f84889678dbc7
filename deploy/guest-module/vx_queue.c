// SPDX-License-Identifier: GPL-2.0-only
/*
 * Virtqueues in the arena, and an event channel for each. A ring is two pieces of
 * the arena, mapped here one behind the other: the backend cannot write what
 * virtio_ring reads of its own descriptors.
 */
#include <linux/interrupt.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>
#include <xen/events.h>

#include "virtio_xenbus.h"

/*
 * Whether an event says something new: the used index went forward, and not past
 * what the driver made available. So a backend has no more events of this kind
 * than the driver has requests, whatever it writes.
 */
static bool vx_is_news(struct vx_queue *queue)
{
	const struct vring *ring = virtqueue_get_vring(queue->vq);
	u16 used = le16_to_cpu((__force __le16)READ_ONCE(queue->used->idx));
	u16 avail = le16_to_cpu((__force __le16)READ_ONCE(ring->avail->idx));

	if (used == queue->seen || (u16)(used - queue->seen) > queue->size ||
	    (u16)(avail - used) > queue->size)
		return false;
	queue->seen = used;
	return true;
}

static irqreturn_t vx_interrupt(int irq, void *data)
{
	struct vx_queue *queue = data;
	bool news = vx_is_news(queue) && !virtqueue_is_broken(queue->vq);

	/* The first event comes with the binding itself, and tells nothing. */
	vring_interrupt(irq, queue->vq);
	/* Xen delivers events that tell nothing less and less often. */
	xen_irq_lateeoi(irq, news ? 0 : XEN_EOI_FLAG_SPURIOUS);
	return IRQ_HANDLED;
}

static bool vx_notify(struct virtqueue *vq)
{
	struct vx_queue *queue = vq->priv;

	if (unlikely(READ_ONCE(queue->vx->gone)))
		queue_work(vx_workqueue, &queue->vx->fail_work);
	else
		notify_remote_via_irq(queue->irq);
	return true;
}

size_t vx_inflight_bytes(const struct vx_queue *queue)
{
	return queue->size * sizeof(*queue->inflight);
}

/* With the word behind it that says when the device wants notifications. */
size_t vx_used_bytes(const struct vx_queue *queue)
{
	return struct_size(queue->used, ring, queue->size) + sizeof(__virtio16);
}

static void vx_del_vq(struct vx_queue *queue)
{
	if (queue->irq > 0)
		unbind_from_irqhandler(queue->irq, queue);
	if (queue->vq)
		vring_del_virtqueue(queue->vq);
	if (queue->ring)
		vunmap(queue->ring);
	kvfree(queue->own_used);
	bitmap_free(queue->lost);
	memset(queue, 0, sizeof(*queue));
}

void vx_del_vqs(struct virtio_device *vdev)
{
	struct vx_device *vx = vx_of(vdev);
	int i;

	cancel_work_sync(&vx->fail_work);
	for (i = 0; i < VX_MAX_QUEUES; i++)
		vx_del_vq(&vx->queue[i]);
}

/* The pages of a ring, cleared, as virtio_ring lays it out with used ring aligned. */
static int vx_map_ring(struct vx_device *vx, struct vx_queue *queue, u32 index)
{
	const struct vx_ring_place *place = &vx->arena.ring[index];
	u32 count = place->driver_pages + place->device_pages;
	struct page **page = kmalloc_array(count, sizeof(*page), GFP_KERNEL);

	if (!page)
		return -ENOMEM;
	memcpy(page, vx->arena.page + place->driver_page,
	       place->driver_pages * sizeof(*page));
	memcpy(page + place->driver_pages, vx->arena.page + place->device_page,
	       place->device_pages * sizeof(*page));
	queue->ring = vmap(page, count, VM_MAP, PAGE_KERNEL);
	kfree(page);
	if (!queue->ring)
		return -ENOMEM;
	memset(queue->ring, 0, (size_t)count << PAGE_SHIFT);
	queue->size = place->size;
	queue->used = queue->ring + ((size_t)place->driver_pages << PAGE_SHIFT);
	queue->inflight = (void *)queue->used + place->inflight_offset;
	queue->own_used = kvzalloc(vx_used_bytes(queue), GFP_KERNEL);
	queue->lost = bitmap_zalloc(queue->size, GFP_KERNEL);
	return queue->own_used && queue->lost ? 0 : -ENOMEM;
}

static int vx_setup_vq(struct vx_device *vx, struct virtio_device *vdev, u32 index,
		       vq_callback_t *callback, const char *name, bool ctx)
{
	struct vx_queue *queue = &vx->queue[index];
	int err;

	queue->vx = vx;
	err = vx_map_ring(vx, queue, index);
	if (err)
		return err;
	queue->vq = vring_new_virtqueue(index, queue->size, PAGE_SIZE, vdev, true, ctx,
					queue->ring, vx_notify, callback, name);
	if (!queue->vq)
		return -ENOMEM;
	queue->vq->priv = queue;
	queue->vq->num_max = queue->size;
	err = xenbus_alloc_evtchn(vx->xdev, &queue->port);
	if (err)
		return err;
	snprintf(queue->name, sizeof(queue->name), "%s-%u", dev_name(&vdev->dev), index);
	queue->irq = bind_evtchn_to_irqhandler_lateeoi(queue->port, vx_interrupt, 0,
						       queue->name, queue);
	if (queue->irq < 0) {
		xenbus_free_evtchn(vx->xdev, queue->port);
		return queue->irq;
	}
	return 0;
}

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 11, 0)
int vx_find_vqs(struct virtio_device *vdev, unsigned int count,
		struct virtqueue *vqs[], struct virtqueue_info info[],
		struct irq_affinity *affinity)
#else
int vx_find_vqs(struct virtio_device *vdev, unsigned int count,
		struct virtqueue *vqs[], vq_callback_t *callbacks[],
		const char * const names[], const bool *ctx,
		struct irq_affinity *affinity)
#endif
{
	struct vx_device *vx = vx_of(vdev);
	unsigned int i;
	u32 index = 0;
	int err;

	for (i = 0; i < count; i++) {
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 11, 0)
		vq_callback_t *callback = info[i].callback;
		const char *name = info[i].name;
		bool has_ctx = info[i].ctx;
#else
		vq_callback_t *callback = callbacks[i];
		const char *name = names[i];
		bool has_ctx = ctx ? ctx[i] : false;
#endif
		vqs[i] = NULL;
		if (!name)
			continue;
		err = -ENOENT;
		if (index < vx->offer.queues)
			err = vx_setup_vq(vx, vdev, index, callback, name, has_ctx);
		if (err) {
			vx_del_vqs(vdev);
			return err;
		}
		vqs[i] = vx->queue[index++].vq;
	}
	return 0;
}

void vx_synchronize_cbs(struct virtio_device *vdev)
{
	struct vx_device *vx = vx_of(vdev);
	int i;

	for (i = 0; i < VX_MAX_QUEUES; i++)
		if (vx->queue[i].irq > 0)
			synchronize_irq(vx->queue[i].irq);
}

void vx_queue_entries(struct vx_device *vx, struct vx_setup *setup)
{
	struct vx_setup_queue *entry = setup->queue;
	u16 count = 0;
	u32 i;

	for (i = 0; i < VX_MAX_QUEUES; i++) {
		const struct vx_ring_place *place = &vx->arena.ring[i];
		struct vx_queue *queue = &vx->queue[i];
		u64 desc = (u64)place->driver_page << PAGE_SHIFT;
		u64 used = (u64)place->device_page << PAGE_SHIFT;

		if (!queue->vq)
			continue;
		entry->index = cpu_to_le16(i);
		entry->size = cpu_to_le16(queue->size);
		entry->port = cpu_to_le32(queue->port);
		entry->desc = cpu_to_le64(desc);
		entry->avail = cpu_to_le64(desc + queue->size * sizeof(struct vring_desc));
		entry->used = cpu_to_le64(used);
		entry->inflight = cpu_to_le32(used + place->inflight_offset);
		entry->inflight_bytes = cpu_to_le32(vx_inflight_bytes(queue));
		entry++;
		count++;
	}
	setup->queues = cpu_to_le16(count);
}
