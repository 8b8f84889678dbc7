/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Virtio over Xenbus, the guest's side. PROTOCOL.md beside this file describes
 * nodes, states and the setup page.
 *
 * The backend is not trusted. It can write the arena's data cells, the used
 * rings and the in-flight areas at any time, and its nodes in Xenstore; what is
 * read from there is read once and checked. Descriptor tables and available
 * rings are granted read-only, so virtio_ring may follow its own descriptors.
 */
#ifndef VIRTIO_XENBUS_H
#define VIRTIO_XENBUS_H

#include <linux/bits.h>
#include <linux/completion.h>
#include <linux/dma-map-ops.h>
#include <linux/genalloc.h>
#include <linux/mutex.h>
#include <linux/spinlock.h>
#include <linux/types.h>
#include <linux/version.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>
#include <linux/workqueue.h>
#include <xen/grant_table.h>
#include <xen/xenbus.h>

#define VX_VERSION		1
#define VX_MAX_QUEUES		64
#define VX_MAX_RING		4096
#define VX_MAX_CONFIG		512
#define VX_MAX_DIRECTORIES	32
#define VX_MAX_PAGES		(VX_MAX_DIRECTORIES * VX_REFS_PER_PAGE)
#define VX_REFS_PER_PAGE	(PAGE_SIZE / sizeof(__le32))
#define VX_MAX_MAPPING		(256 * 1024)

#define VX_SETUP_MAGIC		0x31535856	/* "VXS1" */

struct vx_setup_queue {
	__le16 index;
	__le16 size;
	__le32 port;
	__le32 flags;
	__le32 reserved;
	__le64 desc;
	__le64 avail;
	__le64 used;
	__le32 inflight;
	__le32 inflight_bytes;
};

struct vx_setup {
	__le32 magic;
	__le16 version;
	__le16 queues;
	__le64 features;
	__le32 epoch;
	__le32 readonly;
	__le32 pages;
	__le32 directories;
	__le32 directory[VX_MAX_DIRECTORIES];
	u8 reserved[0x100 - 0xa0];
	struct vx_setup_queue queue[VX_MAX_QUEUES];
};

/* What the backend offers, see PROTOCOL.md. */
struct vx_offer {
	u32 device;
	u32 vendor;
	u64 features;
	u32 queues;
	u32 pages;
	u32 config_bytes;
	u32 epoch;
	/* It maps the pages that are granted read-only as such. */
	u32 readonly;
	/* So large a chain it leaves no byte unwritten that it may write. */
	u16 size[VX_MAX_QUEUES];
};

/* Cells are taken from two pools: units of 64 bytes, and pages. */
#define VX_SMALL_SHIFT	6
#define VX_SMALL_UNIT	BIT(VX_SMALL_SHIFT)
#define VX_SMALL_LIMIT	1024
/* Free cells of 64 to 1024 bytes, and of up to so many pages, are kept in lists. */
#define VX_SMALL_LISTS	5
#define VX_PAGE_LISTS	16
#define VX_LISTS	(VX_SMALL_LISTS + VX_PAGE_LISTS)
#define VX_LIST_DEPTH	252
/* Those of 64 bytes and of a page before that in slots. */
#define VX_SLOT_BITS	10
#define VX_SLOTS	BIT(VX_SLOT_BITS)

struct vx_list {
	/* Guards count and address; taken with interrupts off. */
	spinlock_t lock;
	u32 count;
	u32 address[VX_LIST_DEPTH];
} ____cacheline_aligned_in_smp;

/* A free cell of each size, or 0. Who exchanges it for 0 has it. */
struct vx_slot {
	u32 unit;
	u32 page;
};

/* What a unit of a cell stands for; the backend does not see it. */
struct vx_unit {
	phys_addr_t origin;
	/* Bytes of the mapping from here on; 0 when there is none. */
	u32 left;
	bool from_device;
};

/* Where a queue's ring lies: pages that the backend reads, and that it writes. */
struct vx_ring_place {
	u16 size;
	u32 driver_page;
	u32 driver_pages;
	u32 device_page;
	u32 device_pages;
	u32 inflight_offset;
};

/* Memory that the backend may reach: granted as a whole, addressed by offset. */
struct vx_arena {
	u32 pages;
	/* Pages 1 to this one are granted read-only. */
	u32 readonly;
	u32 directories;
	struct vx_ring_place ring[VX_MAX_QUEUES];
	struct page **page;
	void *base;
	grant_ref_t *ref;
	struct vx_unit *unit;
	/* What vx_unit_of takes off: unit[0] is the first small one. */
	u32 small_first;
	u32 page_first;
	struct vx_list *list;
	struct vx_slot *slot;
	struct gen_pool *small;
	struct gen_pool *large;
	size_t small_start;
	size_t small_end;
	struct page *directory[VX_MAX_DIRECTORIES];
	grant_ref_t directory_ref[VX_MAX_DIRECTORIES];
	struct page *setup;
	grant_ref_t setup_ref;
	grant_ref_t ref_head;
	bool granted;
};

struct vx_device;

struct vx_queue {
	struct vx_device *vx;
	struct virtqueue *vq;
	evtchn_port_t port;
	int irq;
	char name[32];
	u16 size;
	/* The pages of the ring, one behind the other. */
	void *ring;
	/* The used ring in there, which the backend writes. */
	struct vring_used *used;
	/* One of our own, which takes its place when the backend is gone. */
	struct vring_used *own_used;
	/* Used index at the last event that brought something. */
	u16 seen;
	/* When the backend is gone: position in the available ring, answers. */
	u16 taken;
	u16 answered;
	/* Per head of the split ring, written by the backend: is it in flight? */
	__le32 *inflight;
	unsigned long *lost;
};

/* Lives until the last reference to the virtio device is gone. */
struct vx_virtio {
	struct virtio_device vdev;
	struct vx_device *vx;
};

struct vx_device {
	struct xenbus_device *xdev;
	struct vx_virtio *virtio;
	struct vx_offer offer;
	struct vx_arena arena;
	struct vx_queue queue[VX_MAX_QUEUES];
	u32 sequence;
	u32 config_writes;
	u8 status;
	/* A cell for data from the device must begin as zeros. */
	bool blank;
	/* The backend has the arena mapped, as far as we know. */
	bool connected;
	/* The backend did not give the arena back: its pages are lost. */
	bool leaked;
	/* The backend is gone for good: requests are answered here, with errors. */
	bool gone;
	/* And all that it answered is consumed: nothing in cells counts any more. */
	bool withdrawn;
	struct work_struct fail_work;
	/* One at a time answers in the backend's place. */
	struct mutex fail_lock;
	/* The device is on its way out: nothing waits for the backend any more. */
	bool going;
	/* Serialises registration, removal, suspend and resume. */
	struct mutex lock;
	struct work_struct work;
	struct work_struct config_work;
	struct xenbus_watch config_watch;
	/* The frontend's own node that names the backend. */
	struct xenbus_watch backend_watch;
	/* Between freeze and restore: the otherend may be another already. */
	bool frozen;
	/* Guards config, config_bytes, generation and backend_status. */
	spinlock_t config_lock;
	u8 config[VX_MAX_CONFIG];
	u32 config_bytes;
	u32 generation;
	u8 backend_status;
};

static inline size_t vx_unit_bytes(const struct vx_arena *arena, u32 address)
{
	return address < arena->small_end ? VX_SMALL_UNIT : PAGE_SIZE;
}

/* Of an address from the small pool's start on. */
static inline struct vx_unit *vx_unit_of(struct vx_arena *arena, u32 address)
{
	if (address < arena->small_end)
		return &arena->unit[(address >> VX_SMALL_SHIFT) - arena->small_first];
	/* page_first is modulo 2^32: there may be more small units than pages before. */
	return &arena->unit[(u32)((address >> PAGE_SHIFT) - arena->page_first)];
}

void vx_note_rest(struct vx_unit *unit, size_t bytes);

/* Notes what a cell stands for. */
static inline void vx_note(struct vx_arena *arena, u32 address, phys_addr_t origin,
			   size_t size, bool from_device)
{
	struct vx_unit *unit = vx_unit_of(arena, address);
	size_t bytes = vx_unit_bytes(arena, address);

	unit->origin = origin;
	unit->left = size;
	unit->from_device = from_device;
	if (size > bytes)
		vx_note_rest(unit, bytes);
}

/* A cell stands for nothing any more. */
static inline void vx_forget(struct vx_arena *arena, u32 address, size_t size)
{
	struct vx_unit *unit = vx_unit_of(arena, address);
	size_t bytes = vx_unit_bytes(arena, address);
	size_t done = 0;

	do {
		unit++->left = 0;
		done += bytes;
	} while (unlikely(done < size));
}

static inline struct vx_device *vx_of(struct virtio_device *vdev)
{
	return container_of(vdev, struct vx_virtio, vdev)->vx;
}

/* vx_main.c */
extern struct workqueue_struct *vx_workqueue;
extern unsigned int vx_arena_pages;
extern bool vx_indirect;
extern bool vx_writable_rings;
bool vx_is_allowed(const struct vx_device *vx, u32 device);

/* vx_cells.c */
int vx_cells_create(struct vx_arena *arena);
void vx_cells_destroy(struct vx_arena *arena);
void *vx_take(struct vx_arena *arena, size_t size, phys_addr_t origin, u32 *address);
void vx_give(struct vx_arena *arena, u32 address, size_t size, phys_addr_t origin);

/* vx_dma.c */
extern const struct dma_map_ops vx_dma_ops;

/* vx_arena.c */
int vx_arena_create(struct vx_device *vx);
void vx_arena_grant(struct vx_device *vx);
void vx_arena_revoke(struct vx_device *vx);
void vx_arena_destroy(struct vx_device *vx);

/* vx_queue.c */
void vx_queue_entries(struct vx_device *vx, struct vx_setup *setup);
size_t vx_used_bytes(const struct vx_queue *queue);
size_t vx_inflight_bytes(const struct vx_queue *queue);
void vx_del_vqs(struct virtio_device *vdev);
void vx_synchronize_cbs(struct virtio_device *vdev);
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 11, 0)
int vx_find_vqs(struct virtio_device *vdev, unsigned int count,
		struct virtqueue *vqs[], struct virtqueue_info info[],
		struct irq_affinity *affinity);
#else
int vx_find_vqs(struct virtio_device *vdev, unsigned int count,
		struct virtqueue *vqs[], vq_callback_t *callbacks[],
		const char * const names[], const bool *ctx,
		struct irq_affinity *affinity);
#endif

/* vx_fail.c */
void vx_queue_fail_all(struct vx_device *vx);
void vx_fail_work(struct work_struct *work);

/* vx_config.c */
int vx_read_offer(struct vx_device *vx, struct vx_offer *offer);
int vx_read_config(struct vx_device *vx);
void vx_config_get(struct virtio_device *vdev, unsigned int offset, void *to,
		   unsigned int length);
void vx_config_set(struct virtio_device *vdev, unsigned int offset,
		   const void *from, unsigned int length);
u32 vx_config_generation(struct virtio_device *vdev);

/* vx_virtio.c */
extern const struct virtio_config_ops vx_config_ops;
extern const struct device_type vx_device_type;
enum xenbus_state vx_backend_state(struct vx_device *vx);
bool vx_wait(struct vx_device *vx, unsigned int seconds,
	     bool (*done)(struct vx_device *vx));
bool vx_is_released(struct vx_device *vx);
void vx_disconnect(struct vx_device *vx);

/* vx_life.c */
void vx_work(struct work_struct *work);
void vx_config_work(struct work_struct *work);
void vx_unregister(struct vx_device *vx, bool serves);
void vx_backend_watched(struct xenbus_watch *watch, const char *path,
			const char *token);

#endif
