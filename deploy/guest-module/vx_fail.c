// SPDX-License-Identifier: GPL-2.0-only
/*
 * What happens to the requests under way when the backend is gone for good.
 * Drivers know no other end of a request than an answer, and would wait for
 * ever; so they are answered here, with errors.
 *
 * The backend may still be there and lie, with pages mapped that it was told to
 * give back. So each queue gets a used ring of its own memory first, and from
 * there on nothing is read that the backend can write.
 */
#include <linux/interrupt.h>
#include <linux/virtio_blk.h>

#include "virtio_xenbus.h"

/* In the handler's own context: drivers lock against interrupts. */
static void vx_call_back(struct vx_queue *queue)
{
	disable_irq(queue->irq);
	local_irq_disable();
	vring_interrupt(queue->irq, queue->vq);
	local_irq_enable();
	enable_irq(queue->irq);
}

/*
 * Copies what the backend answered, and notes which heads it had taken: a head's
 * in-flight word is 1 while the backend has it; before its answer is published it
 * becomes 0x10000 + the answer's position, and 0 afterwards. Lies here choose
 * which requests are answered first, and no more.
 */
static void vx_take_over(struct vx_queue *queue)
{
	struct vring *ring = (struct vring *)virtqueue_get_vring(queue->vq);
	struct vring_used *own = queue->own_used;
	u16 avail, used;
	u32 head;

	if (ring->used == own)
		return;
	used = le16_to_cpu((__force __le16)READ_ONCE(queue->used->idx));
	/* The elements that this index covers, not older ones. */
	virt_rmb();
	memcpy(own, queue->used, vx_used_bytes(queue));
	own->idx = (__force __virtio16)cpu_to_le16(used);
	/* The driver is to notify us of what it adds from now on. */
	own->flags = 0;
	avail = le16_to_cpu((__force __le16)READ_ONCE(ring->avail->idx));
	*(__virtio16 *)&own->ring[queue->size] = (__force __virtio16)cpu_to_le16(avail);
	queue->answered = used;
	queue->taken = used;
	for (head = 0; head < queue->size; head++) {
		u32 word = le32_to_cpu(READ_ONCE(queue->inflight[head]));

		if (word >= 0x10000 && (u16)(used - (u16)word - 1) < 0x8000)
			word = 0;
		if (word) {
			__set_bit(head, queue->lost);
			queue->taken++;
		}
	}
	/* Whoever sees this ring sees what is in it. */
	smp_wmb();
	WRITE_ONCE(ring->used, own);
}

/* A length of 0: drivers look at the status, which says that it never came. */
static void vx_answer(struct vx_queue *queue, u16 head)
{
	struct vring_used *own = queue->own_used;
	u16 at = queue->answered % queue->size;

	own->ring[at].id = (__force __virtio32)cpu_to_le32(head);
	own->ring[at].len = 0;
	/* The element before the index that shows it. */
	smp_wmb();
	queue->answered++;
	WRITE_ONCE(own->idx, (__force __virtio16)cpu_to_le16(queue->answered));
}

/* What the backend had taken, and what it had not. */
static void vx_answer_known(struct vx_queue *queue)
{
	const struct vring *ring = virtqueue_get_vring(queue->vq);
	u32 rounds = queue->size;
	u32 head;
	u16 avail;

	for_each_set_bit(head, queue->lost, queue->size)
		vx_answer(queue, head);
	bitmap_zero(queue->lost, queue->size);
	/* A driver adds no more than fit; whatever it adds later it notifies of. */
	do {
		avail = le16_to_cpu((__force __le16)READ_ONCE(ring->avail->idx));
		if ((u16)(avail - queue->taken) > queue->size)
			queue->taken = avail;
		/* Entries that the driver wrote before this index. */
		smp_rmb();
		for (; queue->taken != avail; queue->taken++) {
			u16 at = queue->taken % queue->size;

			head = le16_to_cpu((__force __le16)READ_ONCE(ring->avail->ring[at]));
			vx_answer(queue, head);
		}
		WRITE_ONCE(vring_avail_event(ring), (__force __virtio16)cpu_to_le16(avail));
		/* Either the driver sees this, or its new index is seen here. */
		smp_mb();
	} while (le16_to_cpu((__force __le16)READ_ONCE(ring->avail->idx)) != avail && --rounds);
	vx_call_back(queue);
}

/*
 * When the backend lied about what it had, some requests are left, and a disk's
 * removal would wait for them. virtio_ring knows them: it takes an answer to a
 * head that is one, and breaks the queue at any other. So each is tried.
 */
static void vx_answer_rest(struct vx_queue *queue)
{
	u32 head;

	if (queue->vq->num_free == queue->size)
		return;
	dev_warn(&queue->vx->xdev->dev, "%s: the backend's rings do not add up\n", queue->name);
	/* For split rings: the position of the answer that is wanted next. */
	queue->answered = virtqueue_enable_cb_prepare(queue->vq);
	for (head = 0; head < queue->size && queue->vq->num_free != queue->size; head++) {
		u16 at = queue->answered;

		if (virtqueue_is_broken(queue->vq))
			__virtio_unbreak_device(queue->vq->vdev);
		vx_answer(queue, head);
		vx_call_back(queue);
		if (virtqueue_is_broken(queue->vq))
			queue->answered = at;
	}
	WRITE_ONCE(queue->own_used->idx, (__force __virtio16)cpu_to_le16(queue->answered));
}

/*
 * The backend is gone and will not come back to these rings. Until the device is
 * unregistered requests end here: those that come later by the broken queues, and
 * those that were on their way by a notification (vx_fail_work).
 */
void vx_queue_fail_all(struct vx_device *vx)
{
	bool is_disk = vx->offer.device == VIRTIO_ID_BLOCK;
	struct virtio_device *vdev = &vx->virtio->vdev;
	struct vx_queue *queue;
	int i;

	WRITE_ONCE(vx->gone, true);
	/* Who adds a request sees this, or the request is seen below. */
	smp_mb();
	mutex_lock(&vx->fail_lock);
	for (i = 0; i < VX_MAX_QUEUES; i++) {
		queue = &vx->queue[i];
		if (queue->irq > 0)
			vx_take_over(queue);
	}
	__virtio_unbreak_device(vdev);
	/* Requests that are answered are consumed; of the others no byte counts. */
	for (i = 0; i < VX_MAX_QUEUES; i++) {
		queue = &vx->queue[i];
		if (queue->irq > 0)
			vx_call_back(queue);
	}
	if (is_disk)
		WRITE_ONCE(vx->withdrawn, true);
	for (i = 0; i < VX_MAX_QUEUES; i++) {
		queue = &vx->queue[i];
		if (queue->irq <= 0)
			continue;
		vx_answer_known(queue);
		if (is_disk)
			vx_answer_rest(queue);
	}
	virtio_break_device(vdev);
	mutex_unlock(&vx->fail_lock);
}

void vx_fail_work(struct work_struct *work)
{
	vx_queue_fail_all(container_of(work, struct vx_device, fail_work));
}
