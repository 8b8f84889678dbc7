// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the backend says in Xenstore: its offer, and the configuration space,
 * which is read from a copy here. Nothing waits for the backend.
 */
#include <linux/kernel.h>
#include <linux/slab.h>
#include <linux/string.h>

#include "virtio_xenbus.h"

static char *vx_read_backend(struct vx_device *vx, const char *node)
{
	return xenbus_read(XBT_NIL, vx->xdev->otherend, node, NULL);
}

static int vx_parse_sizes(struct vx_offer *offer, char *text)
{
	char *word;
	u32 i;

	for (i = 0; i < offer->queues; i++) {
		word = strsep(&text, ",");
		if (!word || kstrtou16(word, 0, &offer->size[i]) || !offer->size[i] ||
		    offer->size[i] > 32768)
			return -EINVAL;
	}
	return 0;
}

/*
 * Words of the form key=value; those with an unknown key are for others. A
 * version that is not known here is not an offer.
 */
int vx_read_offer(struct vx_device *vx, struct vx_offer *offer)
{
	char *text = vx_read_backend(vx, "vx-offer");
	char *rest = text;
	char *sizes = NULL;
	u32 version = 0;
	char *word;
	int err = 0;

	if (IS_ERR(text))
		return PTR_ERR(text);
	memset(offer, 0, sizeof(*offer));
	while (!err && (word = strsep(&rest, " "))) {
		char *value = strchr(word, '=');

		if (!value)
			continue;
		*value++ = 0;
		if (!strcmp(word, "version"))
			err = kstrtou32(value, 0, &version);
		else if (!strcmp(word, "device"))
			err = kstrtou32(value, 0, &offer->device);
		else if (!strcmp(word, "vendor"))
			err = kstrtou32(value, 0, &offer->vendor);
		else if (!strcmp(word, "features"))
			err = kstrtou64(value, 0, &offer->features);
		else if (!strcmp(word, "queues"))
			err = kstrtou32(value, 0, &offer->queues);
		else if (!strcmp(word, "sizes"))
			sizes = value;
		else if (!strcmp(word, "arena"))
			err = kstrtou32(value, 0, &offer->pages);
		else if (!strcmp(word, "config"))
			err = kstrtou32(value, 0, &offer->config_bytes);
		else if (!strcmp(word, "epoch"))
			err = kstrtou32(value, 0, &offer->epoch);
		else if (!strcmp(word, "readonly"))
			err = kstrtou32(value, 0, &offer->readonly);
	}
	if (!err && version != VX_VERSION)
		err = -EPROTONOSUPPORT;
	if (!err && (!offer->device || !offer->queues || offer->queues > VX_MAX_QUEUES ||
		     !offer->pages || offer->config_bytes > VX_MAX_CONFIG || !sizes))
		err = -EINVAL;
	if (!err)
		err = vx_parse_sizes(offer, sizes);
	kfree(text);
	return err;
}

/* "GENERATION STATUS CONFIGURATION", the latter two in hexadecimal digits. */
int vx_read_config(struct vx_device *vx)
{
	char *text = vx_read_backend(vx, "vx-config");
	char *rest = text;
	u32 generation;
	u8 config[VX_MAX_CONFIG];
	size_t bytes;
	char *word;
	u8 status;
	int err;

	if (IS_ERR(text))
		return PTR_ERR(text);
	err = -EINVAL;
	word = strsep(&rest, " ");
	if (!word || !rest || kstrtou32(word, 10, &generation))
		goto out;
	word = strsep(&rest, " ");
	if (!word || !rest || kstrtou8(word, 16, &status))
		goto out;
	bytes = strlen(rest) / 2;
	if (bytes > VX_MAX_CONFIG || hex2bin(config, rest, bytes))
		goto out;
	spin_lock_irq(&vx->config_lock);
	memcpy(vx->config, config, bytes);
	vx->config_bytes = bytes;
	vx->generation = generation;
	vx->backend_status = status;
	spin_unlock_irq(&vx->config_lock);
	err = 0;
out:
	kfree(text);
	return err;
}

void vx_config_get(struct virtio_device *vdev, unsigned int offset, void *to,
		   unsigned int length)
{
	struct vx_device *vx = vx_of(vdev);
	unsigned long flags;

	memset(to, 0, length);
	spin_lock_irqsave(&vx->config_lock, flags);
	if (offset < vx->config_bytes)
		memcpy(to, vx->config + offset, min(length, vx->config_bytes - offset));
	spin_unlock_irqrestore(&vx->config_lock, flags);
}

/*
 * The copy changes at once, so that the driver reads back what it wrote; the
 * backend hears of it, and its next vx-config is what counts.
 */
void vx_config_set(struct virtio_device *vdev, unsigned int offset,
		   const void *from, unsigned int length)
{
	struct vx_device *vx = vx_of(vdev);
	char text[17];
	int err;

	if (length > 8 || offset > VX_MAX_CONFIG - length)
		return;
	spin_lock_irq(&vx->config_lock);
	if (offset + length <= vx->config_bytes)
		memcpy(vx->config + offset, from, length);
	spin_unlock_irq(&vx->config_lock);
	*bin2hex(text, from, length) = 0;
	err = xenbus_printf(XBT_NIL, vx->xdev->nodename, "vx-cfgw", "%u %u %s",
			    ++vx->config_writes, offset, text);
	if (err)
		dev_warn(&vx->xdev->dev, "a configuration write is lost: %d\n", err);
}

u32 vx_config_generation(struct virtio_device *vdev)
{
	return READ_ONCE(vx_of(vdev)->generation);
}
