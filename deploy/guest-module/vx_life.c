// SPDX-License-Identifier: GPL-2.0-only
/*
 * The lives of a device: it is registered when the backend offers it, and ends
 * when the backend withdraws it, is gone, or wants a reset.
 */
#include <linux/slab.h>
#include <linux/virtio_ids.h>
#include <uapi/linux/virtio_config.h>

#include "virtio_xenbus.h"

/*
 * Whether cells for data must begin as zeros. Of network, console and entropy
 * devices the drivers look at no more than the used length says, which a device
 * must have written. A disk's reader gets the buffer whatever the status is, and
 * also when the device never had the request: one that cannot be mapped as a
 * whole is unmapped like one that was answered (virtqueue_add), and tried again.
 * So what the device promises to fill ("fills") is not enough for it.
 */
static bool vx_needs_blank(const struct vx_offer *offer)
{
	switch (offer->device) {
	case VIRTIO_ID_NET:
	case VIRTIO_ID_CONSOLE:
	case VIRTIO_ID_RNG:
		return false;
	default:
		return true;
	}
}

static void vx_release(struct device *dev)
{
	struct virtio_device *vdev = dev_to_virtio(dev);

	kfree(container_of(vdev, struct vx_virtio, vdev));
}

static void vx_register(struct vx_device *vx)
{
	struct vx_virtio *virtio;
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
	if (!vx_is_allowed(vx, vx->offer.device)) {
		xenbus_dev_error(vx->xdev, -EPERM, "a device of type %u is not allowed here",
				 vx->offer.device);
		return;
	}
	if (!vx->offer.readonly && !vx_writable_rings) {
		xenbus_dev_error(vx->xdev, -EPERM,
				 "the backend is too old: it wants to write to descriptor tables");
		return;
	}
	err = vx_arena_create(vx);
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
	vx->blank = vx_needs_blank(&vx->offer);
	vx->gone = false;
	vx->withdrawn = false;
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
void vx_unregister(struct vx_device *vx, bool serves)
{
	struct vx_virtio *virtio = vx->virtio;

	if (!virtio)
		return;
	if (!serves) {
		vx_disconnect(vx);
		/* What it still has mapped it may write, but no longer tell us. */
		vx_arena_revoke(vx);
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

void vx_work(struct work_struct *work)
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
void vx_config_work(struct work_struct *work)
{
	struct vx_device *vx = container_of(work, struct vx_device, config_work);

	mutex_lock(&vx->lock);
	if (vx->virtio && !vx->going && !vx_read_config(vx)) {
		if ((vx->backend_status & VIRTIO_CONFIG_S_NEEDS_RESET) && vx->connected) {
			/* No driver here resets its device: it is found anew instead. */
			dev_err_ratelimited(&vx->xdev->dev, "the backend wants a reset\n");
			vx_unregister(vx, false);
			xenbus_switch_state(vx->xdev, XenbusStateClosed);
			xenbus_switch_state(vx->xdev, XenbusStateInitialising);
		} else {
			virtio_config_changed(&vx->virtio->vdev);
		}
	}
	mutex_unlock(&vx->lock);
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

void vx_backend_watched(struct xenbus_watch *watch, const char *path,
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
