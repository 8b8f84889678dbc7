// SPDX-License-Identifier: GPL-2.0-only
/*
 * A transport of virtio devices for PV and PVH guests of Xen: control by
 * Xenstore, memory by grants, notifications by an event channel per virtqueue.
 */
#include <linux/delay.h>
#include <linux/dma-mapping.h>
#include <linux/jiffies.h>
#include <linux/module.h>
#include <linux/pm.h>
#include <linux/random.h>
#include <linux/slab.h>
#include <uapi/linux/virtio_config.h>
#include <linux/virtio_ring.h>
#include <xen/events.h>
#include <xen/xen.h>

#include "virtio_xenbus.h"

/* How long the backend may take to connect, and to let go. */
#define VX_CONNECT_SECONDS	30
#define VX_RELEASE_SECONDS	60

struct workqueue_struct *vx_workqueue;

static unsigned int arena_pages = 2048;
module_param(arena_pages, uint, 0444);
MODULE_PARM_DESC(arena_pages, "Pages granted for each virtqueue (2048)");

enum xenbus_state vx_backend_state(struct vx_device *vx)
{
	return xenbus_read_driver_state(vx->xdev->otherend);
}

/* Waits for the backend, step by step: a watch may be what we are called from. */
static bool vx_wait(struct vx_device *vx, unsigned int seconds,
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

static bool vx_is_released(struct vx_device *vx)
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
		dev_err(&vx->xdev->dev, "the backend refuses: %s\n", text);
	kfree(text);
	return acked;
}

static bool vx_is_answered(struct vx_device *vx)
{
	enum xenbus_state state = vx_backend_state(vx);

	return vx->going || state == XenbusStateConnected || state == XenbusStateClosing ||
	       state == XenbusStateClosed || state == XenbusStateUnknown || vx_is_acked(vx, "error");
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
	vx->offer.epoch = offer.epoch;
	memset(setup, 0, sizeof(*setup));
	setup->magic = cpu_to_le32(VX_SETUP_MAGIC);
	setup->version = cpu_to_le16(VX_VERSION);
	setup->features = cpu_to_le64(vx->virtio->vdev.features);
	setup->epoch = cpu_to_le32(vx->offer.epoch);
	setup->pages = cpu_to_le32(vx->arena.pages);
	setup->directories = cpu_to_le32(vx->arena.directories);
	for (i = 0; i < vx->arena.directories; i++)
		setup->directory[i] = cpu_to_le32(vx->arena.directory_ref[i]);
	vx_queue_entries(vx, setup);
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
static void vx_disconnect(struct vx_device *vx)
{
	if (!vx->connected)
		return;
	xenbus_switch_state(vx->xdev, XenbusStateClosing);
	if (!vx_wait(vx, VX_RELEASE_SECONDS, vx_is_released))
		dev_err(&vx->xdev->dev, "the backend does not let go\n");
	vx->connected = false;
}

/* virtio_config_ops */

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
	return vx_of(vdev)->offer.features;
}

static int vx_finalize_features(struct virtio_device *vdev)
{
	vring_transport_features(vdev);
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

static const struct virtio_config_ops vx_config_ops = {
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
	if (offer.device != vx->offer.device || offer.queues != vx->offer.queues ||
	    (vdev->features & ~offer.features)) {
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

static const struct device_type vx_device_type = {
	.name = "virtio_xenbus",
	.pm = &vx_pm_ops,
};

/* Registration */

static void vx_release(struct device *dev)
{
	struct virtio_device *vdev = dev_to_virtio(dev);

	kfree(container_of(vdev, struct vx_virtio, vdev));
}

static void vx_register(struct vx_device *vx)
{
	struct vx_virtio *virtio;
	u32 pages;
	int err;

	err = vx_read_offer(vx, &vx->offer);
	if (err == -ENOENT)
		return;	/* served by another transport */
	if (!err)
		err = vx_read_config(vx);
	if (err) {
		xenbus_dev_error(vx->xdev, err, "the backend's offer cannot be used");
		return;
	}
	pages = min3(arena_pages * vx->offer.queues, vx->offer.pages, (u32)VX_MAX_PAGES);
	err = vx_arena_create(vx, pages);
	if (err) {
		xenbus_dev_error(vx->xdev, err, "no memory or grants for the arena");
		return;
	}
	vx_arena_grant(vx);
	virtio = kzalloc(sizeof(*virtio), GFP_KERNEL);
	if (!virtio) {
		vx_arena_destroy(vx);
		return;
	}
	virtio->vx = vx;
	virtio->vdev.id.device = vx->offer.device;
	virtio->vdev.id.vendor = vx->offer.vendor;
	virtio->vdev.config = &vx_config_ops;
	virtio->vdev.dev.parent = &vx->xdev->dev;
	virtio->vdev.dev.type = &vx_device_type;
	virtio->vdev.dev.release = vx_release;
	vx->status = 0;
	vx->gone = false;
	vx->virtio = virtio;
	err = register_virtio_device(&virtio->vdev);
	if (err) {
		xenbus_dev_error(vx->xdev, err, "registering the virtio device");
		vx->virtio = NULL;
		put_device(&virtio->vdev.dev);
		vx_arena_destroy(vx);
	}
}

/*
 * Ends the device. A backend that still serves ends the driver's requests; of
 * one that does not, they end with an error.
 */
static void vx_unregister(struct vx_device *vx, bool serves)
{
	struct vx_virtio *virtio = vx->virtio;

	if (!virtio)
		return;
	if (!serves) {
		vx_disconnect(vx);
		vx_queue_fail_all(vx);
	}
	unregister_virtio_device(&virtio->vdev);
	vx->virtio = NULL;
	vx_arena_destroy(vx);
}

static bool vx_is_online(struct vx_device *vx)
{
	return xenbus_read_unsigned(vx->xdev->otherend, "online", 0);
}

static void vx_work(struct work_struct *work)
{
	struct vx_device *vx = container_of(work, struct vx_device, work);
	enum xenbus_state state;

	mutex_lock(&vx->lock);
	if (vx->going)
		goto out;
	state = vx_backend_state(vx);
	switch (state) {
	case XenbusStateInitWait:
		if (!vx->virtio)
			vx_register(vx);
		break;
	case XenbusStateClosing:
	case XenbusStateClosed:
		if (vx_is_online(vx)) {
			/* It withdrew without being asked: there may be another. */
			if (state == XenbusStateClosed && vx->connected) {
				vx_unregister(vx, false);
				xenbus_switch_state(vx->xdev, XenbusStateInitialising);
			}
			break;
		}
		vx->going = true;
		vx_unregister(vx, state == XenbusStateClosing);
		xenbus_frontend_closed(vx->xdev);
		break;
	case XenbusStateUnknown:
		/* Its domain is gone. What dom0 puts in its place has a name of its own. */
		vx_unregister(vx, false);
		break;
	default:
		break;
	}
out:
	mutex_unlock(&vx->lock);
}

/* The backend published its configuration space anew, or its end. */
static void vx_config_work(struct work_struct *work)
{
	struct vx_device *vx = container_of(work, struct vx_device, config_work);

	mutex_lock(&vx->lock);
	if (vx->virtio && !vx->going && !vx_read_config(vx)) {
		if ((vx->backend_status & VIRTIO_CONFIG_S_NEEDS_RESET) && vx->connected) {
			/* No driver here resets its device: it is found anew instead. */
			dev_err(&vx->xdev->dev, "the backend wants a reset\n");
			vx_unregister(vx, false);
			xenbus_switch_state(vx->xdev, XenbusStateClosed);
			xenbus_switch_state(vx->xdev, XenbusStateInitialising);
		} else {
			virtio_config_changed(&vx->virtio->vdev);
		}
	}
	mutex_unlock(&vx->lock);
}

static void vx_config_watched(struct xenbus_watch *watch, const char *path,
			      const char *token)
{
	struct vx_device *vx = container_of(watch, struct vx_device, config_watch);

	queue_work(vx_workqueue, &vx->config_work);
}

static void vx_watch_config(struct vx_device *vx)
{
	int err = xenbus_watch_pathfmt(vx->xdev, &vx->config_watch, NULL, vx_config_watched,
				       "%s/vx-config", vx->xdev->otherend);

	if (err)
		dev_warn(&vx->xdev->dev, "no watch on the configuration: %d\n", err);
}

static void vx_unwatch(struct xenbus_watch *watch)
{
	if (!watch->node)
		return;
	unregister_xenbus_watch(watch);
	kfree(watch->node);
	watch->node = NULL;
}

/*
 * A driver domain that was started again has another number: dom0 then writes
 * the frontend's backend node anew. Xenbus itself looks at it when a driver is
 * bound, so bind it again; not from here, which unbinding would wait for.
 */
struct vx_reprobe {
	struct work_struct work;
	struct xenbus_device *xdev;
};

static bool vx_has_moved(struct xenbus_device *xdev)
{
	char *backend = xenbus_read(XBT_NIL, xdev->nodename, "backend", NULL);
	bool moved;

	if (IS_ERR(backend))
		return false;
	moved = !xdev->otherend || strcmp(backend, xdev->otherend);
	kfree(backend);
	return moved;
}

static void vx_reprobe_work(struct work_struct *work)
{
	struct vx_reprobe *reprobe = container_of(work, struct vx_reprobe, work);
	struct xenbus_device *xdev = reprobe->xdev;

	if (vx_has_moved(xdev) && device_reprobe(&xdev->dev))
		dev_err(&xdev->dev, "the new backend cannot be bound\n");
	put_device(&xdev->dev);
	kfree(reprobe);
}

static void vx_backend_watched(struct xenbus_watch *watch, const char *path,
			       const char *token)
{
	struct vx_device *vx = container_of(watch, struct vx_device, backend_watch);
	struct vx_reprobe *reprobe;

	if (READ_ONCE(vx->frozen) || READ_ONCE(vx->going) || !vx_has_moved(vx->xdev))
		return;
	reprobe = kzalloc(sizeof(*reprobe), GFP_KERNEL);
	if (!reprobe)
		return;
	INIT_WORK(&reprobe->work, vx_reprobe_work);
	reprobe->xdev = vx->xdev;
	get_device(&vx->xdev->dev);
	queue_work(vx_workqueue, &reprobe->work);
}

/* xenbus_driver */

static int vx_probe(struct xenbus_device *xdev, const struct xenbus_device_id *id)
{
	struct vx_device *vx = kzalloc(sizeof(*vx), GFP_KERNEL);
	int err;

	if (!vx)
		return -ENOMEM;
	vx->xdev = xdev;
	/* Not what an earlier instance of the module may have ended with. */
	vx->sequence = get_random_u32() >> 8;
	mutex_init(&vx->lock);
	mutex_init(&vx->fail_lock);
	INIT_WORK(&vx->fail_work, vx_fail_work);
	spin_lock_init(&vx->config_lock);
	INIT_WORK(&vx->work, vx_work);
	INIT_WORK(&vx->config_work, vx_config_work);
	dev_set_drvdata(&xdev->dev, vx);
	set_dma_ops(&xdev->dev, &vx_dma_ops);
	err = dma_coerce_mask_and_coherent(&xdev->dev, DMA_BIT_MASK(64));
	if (err) {
		kfree(vx);
		return err;
	}
	vx_watch_config(vx);
	if (xenbus_watch_pathfmt(xdev, &vx->backend_watch, NULL, vx_backend_watched,
				 "%s/backend", xdev->nodename))
		dev_warn(&xdev->dev, "no watch on the backend's name\n");
	/* Registering here would do I/O on the thread that delivers watches. */
	queue_work(vx_workqueue, &vx->work);
	return 0;
}

static void vx_remove(struct xenbus_device *xdev)
{
	struct vx_device *vx = dev_get_drvdata(&xdev->dev);
	bool exists = xenbus_exists(XBT_NIL, xdev->nodename, "state") > 0;
	bool serves = exists && vx_backend_state(vx) != XenbusStateUnknown;

	WRITE_ONCE(vx->going, true);
	vx_unwatch(&vx->backend_watch);
	vx_unwatch(&vx->config_watch);
	/* A registration under way may wait for a backend that is gone. */
	if (!serves && vx->virtio && vx->connected) {
		vx_wait(vx, 5, vx_is_released);
		vx_queue_fail_all(vx);
	}
	cancel_work_sync(&vx->work);
	cancel_work_sync(&vx->config_work);
	mutex_lock(&vx->lock);
	vx_unregister(vx, serves);
	mutex_unlock(&vx->lock);
	set_dma_ops(&xdev->dev, NULL);
	if (exists)
		xenbus_switch_state(xdev, XenbusStateInitialising);
	dev_set_drvdata(&xdev->dev, NULL);
	kfree(vx);
}

static void vx_otherend_changed(struct xenbus_device *xdev, enum xenbus_state state)
{
	struct vx_device *vx = dev_get_drvdata(&xdev->dev);

	if (vx)
		queue_work(vx_workqueue, &vx->work);
}

/* The parent resumes first; the virtio device does the rest. */
static int vx_resume(struct xenbus_device *xdev)
{
	struct vx_device *vx = dev_get_drvdata(&xdev->dev);

	vx_unwatch(&vx->config_watch);
	vx_watch_config(vx);
	return 0;
}

static const struct xenbus_device_id vx_ids[] = {
	{ "virtio_disk" },
	{ "virtio" },
	{ "" }
};

static struct xenbus_driver vx_driver = {
	.name = "virtio_xenbus",
	.ids = vx_ids,
	.probe = vx_probe,
	.remove = vx_remove,
	.resume = vx_resume,
	.otherend_changed = vx_otherend_changed,
	.allow_rebind = true,
	.not_essential = true,
};

static int __init vx_init(void)
{
	int err;

	if (!xen_domain())
		return -ENODEV;
	vx_workqueue = alloc_workqueue("virtio_xenbus", WQ_UNBOUND, 0);
	if (!vx_workqueue)
		return -ENOMEM;
	err = xenbus_register_frontend(&vx_driver);
	if (err)
		destroy_workqueue(vx_workqueue);
	return err;
}
module_init(vx_init);

static void __exit vx_exit(void)
{
	xenbus_unregister_driver(&vx_driver);
	destroy_workqueue(vx_workqueue);
}
module_exit(vx_exit);

MODULE_DESCRIPTION("Virtio devices over Xenbus");
MODULE_LICENSE("GPL");
MODULE_VERSION("1.0");
/* Xenbus waits half a minute for devices whose drivers are not there yet. */
MODULE_SOFTDEP("pre: virtio_blk virtio_net virtio_console");
MODULE_ALIAS("xen:virtio_disk");
MODULE_ALIAS("xen:virtio");
