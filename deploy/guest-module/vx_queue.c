// SPDX-License-Identifier: GPL-2.0-only
/*
 * Virtqueues in the arena, an event channel for each, and what happens to the
 * requests under way when the backend is gone for good.
 */
#include <linux/interrupt.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>
#include <xen/events.h>

#include "virtio_xenbus.h"

static irqreturn_t vx_interrupt(int irq, void *data)
{
	struct vx_queue *queue = data;

	/* An event may be spurious: the first comes with the binding itself. */
	vring_interrupt(irq, queue->vq);
	return IRQ_HANDLED;
}

bool vx_notify(struct virtqueue *vq)
{
	struct vx_queue *queue = vq->priv;

	if (unlikely(READ_ONCE(queue->vx->gone)))
		queue_work(vx_workqueue, &queue->vx->fail_work);
	else
		notify_remote_via_irq(queue->irq);
	return true;
}

static size_t vx_inflight_bytes(const struct vx_queue *queue)
{
	return queue->size * sizeof(*queue->inflight);
}

static void vx_del_vq(struct vx_device *vx, struct vx_queue *queue)
{
	if (!queue->vq)
		return;
	if (queue->irq > 0)
		unbind_from_irqhandler(queue->irq, queue);
	vring_del_virtqueue(queue->vq);
	if (queue->inflight)
		dma_free_coherent(&vx->xdev->dev, vx_inflight_bytes(queue),
				  queue->inflight, queue->inflight_address);
	memset(queue, 0, sizeof(*queue));
}

void vx_del_vqs(struct virtio_device *vdev)
{
	struct vx_device *vx = vx_of(vdev);
	int i;

	cancel_work_sync(&vx->fail_work);
	for (i = 0; i < VX_MAX_QUEUES; i++)
		vx_del_vq(vx, &vx->queue[i]);
}

static int vx_setup_vq(struct vx_device *vx, struct virtio_device *vdev, u32 index,
		       vq_callback_t *callback, const char *name, bool ctx)
{
	struct vx_queue *queue = &vx->queue[index];
	int err;

	queue->vq = vring_create_virtqueue(index, vx->offer.size[index], SMP_CACHE_BYTES,
					   vdev, true, true, ctx, vx_notify, callback, name);
	if (!queue->vq)
		return -ENOMEM;
	queue->vq->priv = queue;
	queue->vx = vx;
	queue->size = virtqueue_get_vring_size(queue->vq);
	queue->inflight = dma_alloc_coherent(&vx->xdev->dev, vx_inflight_bytes(queue),
					     &queue->inflight_address, GFP_KERNEL);
	if (!queue->inflight)
		return -ENOMEM;
	err = xenbus_alloc_evtchn(vx->xdev, &queue->port);
	if (err)
		return err;
	snprintf(queue->name, sizeof(queue->name), "%s-%u", dev_name(&vdev->dev), index);
	queue->irq = bind_evtchn_to_irqhandler(queue->port, vx_interrupt, 0,
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
		struct vx_queue *queue = &vx->queue[i];

		if (!queue->vq)
			continue;
		entry->index = cpu_to_le16(i);
		entry->size = cpu_to_le16(queue->size);
		entry->port = cpu_to_le32(queue->port);
		entry->desc = cpu_to_le64(virtqueue_get_desc_addr(queue->vq));
		entry->avail = cpu_to_le64(virtqueue_get_avail_addr(queue->vq));
		entry->used = cpu_to_le64(virtqueue_get_used_addr(queue->vq));
		entry->inflight = cpu_to_le32(queue->inflight_address);
		entry->inflight_bytes = cpu_to_le32(vx_inflight_bytes(queue));
		entry++;
		count++;
	}
	setup->queues = cpu_to_le16(count);
}

/* The memory of the last descriptor of a chain, if the device may write it. */
static void *vx_last_buffer(struct vx_device *vx, const struct vring *ring, u16 head)
{
	size_t bytes = (size_t)vx->arena.pages << PAGE_SHIFT;
	const struct vring_desc *table = ring->desc;
	u32 entries = ring->num;
	u32 at = head;
	u32 steps;
	u64 address;

	for (steps = 0; steps <= entries; steps++) {
		const struct vring_desc *desc = &table[at];
		u16 flags = le16_to_cpu((__force __le16)desc->flags);

		address = le64_to_cpu((__force __le64)desc->addr);
		if (flags & VRING_DESC_F_INDIRECT) {
			u32 length = le32_to_cpu((__force __le32)desc->len);

			if (address >= bytes || length > bytes - address || length < sizeof(*desc))
				return NULL;
			table = vx->arena.base + address;
			entries = length / sizeof(*desc);
			at = 0;
			continue;
		}
		if (flags & VRING_DESC_F_NEXT) {
			at = le16_to_cpu((__force __le16)desc->next);
			if (at >= entries)
				return NULL;
			continue;
		}
		if (!(flags & VRING_DESC_F_WRITE) || address >= bytes)
			return NULL;
		address += le32_to_cpu((__force __le32)desc->len) - 1;
		return address < bytes ? vx->arena.base + address : NULL;
	}
	return NULL;
}

static void vx_fail_chain(struct vx_device *vx, const struct vring *ring, u16 head)
{
	u16 at = le16_to_cpu((__force __le16)ring->used->idx);
	u32 written = 0;
	u8 *status;

	if (vx->offer.device == VIRTIO_ID_BLOCK) {
		status = vx_last_buffer(vx, ring, head);
		if (status) {
			*status = VIRTIO_BLK_S_IOERR;
			written = 1;
		}
	}
	ring->used->ring[at % ring->num].id = (__force __virtio32)cpu_to_le32(head);
	ring->used->ring[at % ring->num].len = (__force __virtio32)cpu_to_le32(written);
	virt_wmb();
	ring->used->idx = (__force __virtio16)cpu_to_le16(at + 1);
}

/*
 * Answers what the backend had, and what it had not yet taken, with an error.
 *
 * A head's in-flight word is 1 while the backend has it; before its answer is
 * published it becomes 0x10000 + the answer's position, and 0 afterwards.
 */
static void vx_fail_queue(struct vx_device *vx, struct vx_queue *queue)
{
	const struct vring *ring = virtqueue_get_vring(queue->vq);
	u16 taken = le16_to_cpu((__force __le16)ring->used->idx);
	u16 used = taken;
	u16 avail;
	u32 head;

	for (head = 0; head < ring->num; head++) {
		u32 word = le32_to_cpu(READ_ONCE(queue->inflight[head]));

		if (word >= 0x10000 && (u16)(used - (u16)word - 1) < 0x8000)
			word = 0;
		if (word) {
			vx_fail_chain(vx, ring, head);
			taken++;
		}
	}
	memset(queue->inflight, 0, vx_inflight_bytes(queue));
	/* The driver is to notify us of what it adds from now on. */
	ring->used->flags = 0;
	do {
		avail = le16_to_cpu((__force __le16)READ_ONCE(ring->avail->idx));
		if ((u16)(avail - taken) > ring->num)
			break;
		for (; taken != avail; taken++) {
			virt_rmb();
			head = le16_to_cpu((__force __le16)ring->avail->ring[taken % ring->num]);
			if (head < ring->num)
				vx_fail_chain(vx, ring, head);
		}
		vring_avail_event(ring) = (__force __virtio16)cpu_to_le16(avail);
		virt_mb();
	} while (le16_to_cpu((__force __le16)READ_ONCE(ring->avail->idx)) != avail);
	/* In the handler's own context: drivers lock against interrupts. */
	disable_irq(queue->irq);
	local_irq_disable();
	vring_interrupt(queue->irq, queue->vq);
	local_irq_enable();
	enable_irq(queue->irq);
}

/*
 * The backend is gone and will not come back to these rings. Drivers know no
 * other end of a request than an answer, and would wait for ever; so until the
 * device is unregistered, requests are answered here.
 */
void vx_queue_fail_all(struct vx_device *vx)
{
	int i;

	WRITE_ONCE(vx->gone, true);
	/* Who adds a request sees this, or the request is seen below. */
	smp_mb();
	mutex_lock(&vx->fail_lock);
	for (i = 0; i < VX_MAX_QUEUES; i++)
		if (vx->queue[i].vq && vx->queue[i].irq > 0)
			vx_fail_queue(vx, &vx->queue[i]);
	mutex_unlock(&vx->fail_lock);
}

void vx_fail_work(struct work_struct *work)
{
	vx_queue_fail_all(container_of(work, struct vx_device, fail_work));
}
