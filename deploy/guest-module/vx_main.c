// SPDX-License-Identifier: GPL-2.0-only
/*
 * A transport of virtio devices for PV and PVH guests of Xen: control by
 * Xenstore, memory by grants, notifications by an event channel per virtqueue.
 * Here: the module, its parameters, and the Xenbus driver.
 */
#include <linux/dma-mapping.h>
#include <linux/module.h>
#include <linux/random.h>
#include <linux/slab.h>
#include <linux/virtio_ids.h>
#include <xen/xen.h>

#include "virtio_xenbus.h"

struct workqueue_struct *vx_workqueue;

unsigned int vx_arena_pages = 2048;
module_param_named(arena_pages, vx_arena_pages, uint, 0444);
MODULE_PARM_DESC(arena_pages, "Pages granted for each virtqueue (2048)");

/*
 * With indirect descriptors a request takes one entry of the ring, whatever its
 * size, and costs an allocation and a copy more. Without them small requests are
 * cheaper, and few large ones fill a small ring; so disks with large rings (see
 * vx_is_roomy) do without in any case.
 */
bool vx_indirect = true;
module_param_named(indirect, vx_indirect, bool, 0444);
MODULE_PARM_DESC(indirect, "Use indirect descriptors where rings are small (Y)");

bool vx_writable_rings;
module_param_named(writable_rings, vx_writable_rings, bool, 0444);
MODULE_PARM_DESC(writable_rings,
		 "Trust backends that cannot map descriptor tables read-only (N)");

/* A backend names the device's type; which drivers that may bind is decided here. */
static ushort vx_types[16] = { VIRTIO_ID_NET, VIRTIO_ID_CONSOLE, VIRTIO_ID_RNG };
static int vx_type_count = 3;
module_param_array_named(types, vx_types, ushort, &vx_type_count, 0444);
MODULE_PARM_DESC(types, "Virtio device types allowed besides disks (1,3,4)");

/* The directory's kind was written by the toolstack, not by the backend. */
bool vx_is_allowed(const struct vx_device *vx, u32 device)
{
	int i;

	if (!strcmp(vx->xdev->devicetype, "virtio_disk"))
		return device == VIRTIO_ID_BLOCK;
	for (i = 0; i < vx_type_count; i++)
		if (vx_types[i] == device)
			return true;
	return false;
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
