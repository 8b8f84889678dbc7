// SPDX-License-Identifier: GPL-2.0-only
/*
 * The virtio device's transport operations: connecting to the backend and letting
 * go of it, status and features, suspend and resume.
 */
#include <linux/delay.h>
#include <linux/jiffies.h>
#include <linux/pm.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/virtio_ids.h>
#include <uapi/linux/virtio_config.h>

#include "virtio_xenbus.h"

/* How long the backend may take to connect, and to let go. */
#define VX_CONNECT_SECONDS	30
#define VX_RELEASE_SECONDS	60

/*
 * The rings are split ones that are reset together; a backend that offers more
 * would have virtio_ring lay them out in other ways than are set up here.
 */
#define VX_WITHHELD	(BIT_ULL(VIRTIO_F_RING_PACKED) | BIT_ULL(VIRTIO_F_IN_ORDER) | \
			 BIT_ULL(VIRTIO_F_SR_IOV) | BIT_ULL(VIRTIO_F_RING_RESET) | \
			 BIT_ULL(VX_F_NOTIFICATION_DATA))
#define VX_F_NOTIFICATION_DATA	38

#define VX_DIRECT_RING	1024

enum xenbus_state vx_backend_state(struct vx_device *vx)
{
	return xenbus_read_driver_state(vx->xdev->otherend);
}

/* Waits for the backend, step by step: a watch may be what we are called from. */
bool vx_wait(struct vx_device *vx, unsigned int seconds,
	     bool (*done)(struct vx_device *vx))
{
	unsigned long end = jiffies + seconds * HZ;
	unsigned int pause = 1;

	while (!done(vx)) {
		if (time_after(jiffies, end))
			return false;
		msleep(pause);
		pause = min(pause * 2, 100U);
	}
	return true;
}

static bool vx_is_offered(struct vx_device *vx)
{
	return vx->going || vx_backend_state(vx) == XenbusStateInitWait;
}

bool vx_is_released(struct vx_device *vx)
{
	enum xenbus_state state = vx_backend_state(vx);

	/* Unknown: the backend's directory is gone, and so is the backend. */
	return state == XenbusStateClosed || state == XenbusStateUnknown ||
	       state == XenbusStateInitWait;
}

/* Whether the backend's word on the present setup is this one. */
static bool vx_is_acked(struct vx_device *vx, const char *wanted)
{
	char *text = xenbus_read(XBT_NIL, vx->xdev->otherend, "vx-ack", NULL);
	unsigned int sequence;
	char word[8];
	bool acked;

	if (IS_ERR(text))
		return false;
	acked = sscanf(text, "%u %7s", &sequence, word) == 2 &&
		sequence == vx->sequence && !strcmp(word, wanted);
	if (acked && !strcmp(word, "error"))
		dev_err_ratelimited(&vx->xdev->dev, "the backend refuses: %*pE\n",
				    (int)strnlen(text, 256), text);
	kfree(text);
	return acked;
}

static bool vx_is_answered(struct vx_device *vx)
{
	enum xenbus_state state = vx_backend_state(vx);

	return vx->going || state == XenbusStateConnected || state == XenbusStateClosing ||
	       state == XenbusStateClosed || state == XenbusStateUnknown ||
	       vx_is_acked(vx, "error");
}

/* Whether the device that is offered is still the one that the driver took. */
static bool vx_is_same(const struct vx_device *vx, const struct vx_offer *offer)
{
	u32 i;

	if (offer->device != vx->offer.device || offer->queues != vx->offer.queues ||
	    offer->readonly != vx->offer.readonly ||
	    offer->pages < vx->arena.pages ||
	    (vx->virtio->vdev.features & ~offer->features))
		return false;
	for (i = 0; i < offer->queues; i++)
		if (offer->size[i] < vx->arena.ring[i].size)
			return false;
	return true;
}

static int vx_connect(struct vx_device *vx)
{
	struct vx_setup *setup = page_address(vx->arena.setup);
	struct vx_offer offer;
	u32 i;
	int err;

	if (!vx_wait(vx, VX_CONNECT_SECONDS, vx_is_offered) || vx->going)
		return -ETIMEDOUT;
	/* The device may have been offered anew since the driver looked. */
	err = vx_read_offer(vx, &offer);
	if (err)
		return err;
	if (!vx_is_same(vx, &offer))
		return -EPROTO;
	vx->offer.epoch = offer.epoch;
	memset(setup, 0, sizeof(*setup));
	setup->magic = cpu_to_le32(VX_SETUP_MAGIC);
	setup->version = cpu_to_le16(VX_VERSION);
	setup->features = cpu_to_le64(vx->virtio->vdev.features);
	setup->epoch = cpu_to_le32(vx->offer.epoch);
	setup->readonly = cpu_to_le32(vx->arena.readonly);
	setup->pages = cpu_to_le32(vx->arena.pages);
	setup->directories = cpu_to_le32(vx->arena.directories);
	for (i = 0; i < vx->arena.directories; i++)
		setup->directory[i] = cpu_to_le32(vx->arena.directory_ref[i]);
	vx_queue_entries(vx, setup);
	/* The page is whole before its number is told. */
	virt_wmb();
	vx->sequence++;
	vx->connected = true;
	err = xenbus_printf(XBT_NIL, vx->xdev->nodename, "vx-setup", "%u %u",
			    vx->sequence, vx->arena.setup_ref);
	if (!err)
		err = xenbus_switch_state(vx->xdev, XenbusStateInitialised);
	if (err)
		return err;
	/* A backend that has no room now says so, and goes on trying. */
	while (!vx_wait(vx, VX_CONNECT_SECONDS, vx_is_answered))
		if (!vx_is_acked(vx, "wait"))
			return -ETIMEDOUT;
	if (vx->going || vx_backend_state(vx) != XenbusStateConnected)
		return -ENOTCONN;
	return xenbus_switch_state(vx->xdev, XenbusStateConnected);
}

/* Takes the arena back. Behind this nobody but us reads or writes it. */
void vx_disconnect(struct vx_device *vx)
{
	if (!vx->connected)
		return;
	xenbus_switch_state(vx->xdev, XenbusStateClosing);
	if (!vx_wait(vx, VX_RELEASE_SECONDS, vx_is_released))
		dev_err(&vx->xdev->dev, "the backend does not let go\n");
	vx->connected = false;
}

static u8 vx_get_status(struct virtio_device *vdev)
{
	return vx_of(vdev)->status;
}

static void vx_set_status(struct virtio_device *vdev, u8 status)
{
	struct vx_device *vx = vx_of(vdev);
	bool starts = (status & ~vx->status) & VIRTIO_CONFIG_S_DRIVER_OK;
	int err;

	vx->status = status;
	if (!starts)
		return;
	err = vx_connect(vx);
	if (!err)
		return;
	dev_err(&vx->xdev->dev, "the backend does not connect: %d\n", err);
	virtio_break_device(vdev);
}

static void vx_reset(struct virtio_device *vdev)
{
	struct vx_device *vx = vx_of(vdev);

	vx->status = 0;
	if (!vx->connected)
		return;
	vx_disconnect(vx);
	xenbus_switch_state(vx->xdev, XenbusStateClosed);
	/* The way to the next life, unless the device itself is on its way out. */
	if (!vx->going)
		xenbus_switch_state(vx->xdev, XenbusStateInitialising);
}

static u64 vx_get_features(struct virtio_device *vdev)
{
	return vx_of(vdev)->offer.features & ~VX_WITHHELD;
}

/*
 * Whether the rings of a disk have room for the descriptors of its requests
 * themselves. An indirect table costs an allocation, a cell and a copy more, for
 * the device another look; but without one a large request takes many entries. A
 * ring of this size holds more of those than the arena has data for, nearly.
 */
static bool vx_is_roomy(const struct vx_device *vx)
{
	u32 i;

	if (vx->offer.device != VIRTIO_ID_BLOCK)
		return false;
	for (i = 0; i < vx->offer.queues; i++)
		if (vx->arena.ring[i].size < VX_DIRECT_RING)
			return false;
	return true;
}

static int vx_finalize_features(struct virtio_device *vdev)
{
	vring_transport_features(vdev);
	if (!vx_indirect || vx_is_roomy(vx_of(vdev)))
		__virtio_clear_bit(vdev, VIRTIO_RING_F_INDIRECT_DESC);
	if (!__virtio_test_bit(vdev, VIRTIO_F_VERSION_1) ||
	    !__virtio_test_bit(vdev, VIRTIO_F_ACCESS_PLATFORM)) {
		dev_err(&vdev->dev, "the driver takes no addresses of the arena\n");
		return -EINVAL;
	}
	return 0;
}

static const char *vx_bus_name(struct virtio_device *vdev)
{
	return vx_of(vdev)->xdev->nodename;
}

const struct virtio_config_ops vx_config_ops = {
	.get = vx_config_get,
	.set = vx_config_set,
	.generation = vx_config_generation,
	.get_status = vx_get_status,
	.set_status = vx_set_status,
	.reset = vx_reset,
	.find_vqs = vx_find_vqs,
	.del_vqs = vx_del_vqs,
	.synchronize_cbs = vx_synchronize_cbs,
	.get_features = vx_get_features,
	.finalize_features = vx_finalize_features,
	.bus_name = vx_bus_name,
};

/* Suspend: of the virtio device, since Xenbus says nothing of a cancelled one. */

static int vx_freeze(struct device *dev)
{
	struct virtio_device *vdev = dev_to_virtio(dev);
	struct vx_device *vx = vx_of(vdev);
	int err;

	mutex_lock(&vx->lock);
	WRITE_ONCE(vx->frozen, true);
	err = virtio_device_freeze(vdev);
	if (!err)
		vx_arena_revoke(vx);
	else
		WRITE_ONCE(vx->frozen, false);
	mutex_unlock(&vx->lock);
	return err;
}

static int vx_restore(struct device *dev)
{
	struct virtio_device *vdev = dev_to_virtio(dev);
	struct vx_device *vx = vx_of(vdev);
	struct vx_offer offer;
	int err = -ETIMEDOUT;

	mutex_lock(&vx->lock);
	/* Another host, perhaps: another backend, with an offer of its own. */
	if (!vx_wait(vx, VX_CONNECT_SECONDS, vx_is_offered))
		goto out;
	err = vx_read_offer(vx, &offer);
	if (!err)
		err = vx_read_config(vx);
	if (err)
		goto out;
	if (!vx_is_same(vx, &offer)) {
		err = -EINVAL;
		goto out;
	}
	vx->offer = offer;
	vx_arena_grant(vx);
	err = virtio_device_restore(vdev);
out:
	WRITE_ONCE(vx->frozen, false);
	mutex_unlock(&vx->lock);
	if (err)
		dev_err(dev, "the device does not come back: %d\n", err);
	return err;
}

static const struct dev_pm_ops vx_pm_ops = {
	.freeze = vx_freeze,
	.thaw = vx_restore,
	.restore = vx_restore,
};

const struct device_type vx_device_type = {
	.name = "virtio_xenbus",
	.pm = &vx_pm_ops,
};
