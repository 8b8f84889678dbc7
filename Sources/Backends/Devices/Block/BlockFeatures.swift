package import Virtqueue

/// Feature bits of a block device (virtio 1.2, 5.2.3).
extension FeatureBits {
  package static let blockSizeMaximum = FeatureBits(rawValue: 1 << 1)  // VIRTIO_BLK_F_SIZE_MAX
  package static let blockSegmentsMaximum = FeatureBits(rawValue: 1 << 2)  // VIRTIO_BLK_F_SEG_MAX
  package static let blockReadOnly = FeatureBits(rawValue: 1 << 5)  // VIRTIO_BLK_F_RO
  package static let blockSize = FeatureBits(rawValue: 1 << 6)  // VIRTIO_BLK_F_BLK_SIZE
  package static let blockFlush = FeatureBits(rawValue: 1 << 9)  // VIRTIO_BLK_F_FLUSH
  package static let blockTopology = FeatureBits(rawValue: 1 << 10)  // VIRTIO_BLK_F_TOPOLOGY
  package static let blockConfigureWriteback = FeatureBits(rawValue: 1 << 11)  // VIRTIO_BLK_F_CONFIG_WCE
  package static let blockQueues = FeatureBits(rawValue: 1 << 12)  // VIRTIO_BLK_F_MQ
  package static let blockDiscard = FeatureBits(rawValue: 1 << 13)  // VIRTIO_BLK_F_DISCARD
  package static let blockWriteZeroes = FeatureBits(rawValue: 1 << 14)  // VIRTIO_BLK_F_WRITE_ZEROES
  package static let blockLifetime = FeatureBits(rawValue: 1 << 15)  // VIRTIO_BLK_F_LIFETIME
  package static let blockSecureErase = FeatureBits(rawValue: 1 << 16)  // VIRTIO_BLK_F_SECURE_ERASE
}

/// The configuration space of a block device (virtio 1.2, 5.2.4) and its limits.
package enum BlockConfiguration {
  package static let sectorSize: UInt64 = 512
  /// Data segments in a request at most. With header and status the chain still fits a queue of 256.
  package static let segmentsMaximum = 254
  /// Ranges in one discard or write-zeroes request at most.
  package static let rangesMaximum = 16
  /// Sectors in one such range at most: 1 GiB, so that one request does not hold the engine's worker for long.
  package static let rangeSectorsMaximum: UInt32 = 1 << 21

  /// Where the field `writeback` is, which a driver with CONFIG_WCE may write.
  package static let writebackOffset = 32

  /// What the device offers for a store and its settings.
  package static func features(
    _ geometry: BlockGeometry, queues: Int = 1, cache: BlockCacheMode = .writeback
  ) -> FeatureBits {
    var features: FeatureBits = [
      .version1, .indirectDescriptors, .eventIndex, .ringReset, .blockSegmentsMaximum, .blockSize, .blockFlush,
      .blockTopology,
    ]
    if queues > 1 { features.insert(.blockQueues) }
    if cache == .writeback { features.insert(.blockConfigureWriteback) }
    if geometry.lifetime != nil { features.insert(.blockLifetime) }
    if geometry.readOnly {
      features.insert(.blockReadOnly)
    } else {
      if geometry.canWriteZeroes { features.insert(.blockWriteZeroes) }
      if geometry.canDiscard { features.insert(.blockDiscard) }
      if geometry.canSecureErase { features.insert(.blockSecureErase) }
    }
    return features
  }

  /// Whether a driver chose to switch the cache without being able to flush it: it gets write-through (virtio 1.2, 5.2.5.2).
  package static func isHeldToWriteThrough(_ features: FeatureBits) -> Bool {
    features.contains(.blockConfigureWriteback) && !features.contains(.blockFlush)
  }

  /// The field `blk_size` of a configuration space; nil where it is none that a store can have.
  package static func logicalBlock(of bytes: [UInt8]) -> UInt32? {
    guard bytes.count >= 24 else { return nil }
    let size = bytes[20..<24].reversed().reduce(UInt32(0)) { $0 << 8 | UInt32($1) }
    return size.nonzeroBitCount == 1 && (512...4096).contains(size) ? size : nil
  }

  /// Writes the field `capacity` of a configuration space.
  package static func set(capacity: UInt64, in bytes: inout [UInt8]) {
    for index in 0..<8 { bytes[index] = UInt8(truncatingIfNeeded: (capacity / sectorSize) >> UInt64(8 * index)) }
  }

  /// The 72 bytes up to the end of the secure-erase fields.
  package static func bytes(
    _ geometry: BlockGeometry, queues: Int = 1, cache: BlockCacheMode = .writeback, queueSize: UInt16 = 256
  ) -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: 72)
    func put(_ value: UInt64, at offset: Int, width: Int) {
      for index in 0..<width { bytes[offset + index] = UInt8(truncatingIfNeeded: value >> UInt64(8 * index)) }
    }
    let blocks = max(1, geometry.physicalBlock / geometry.logicalBlock)
    let granularity = geometry.discardGranularity > 0 ? geometry.discardGranularity : 4096
    let alignment = min(max(UInt64(geometry.physicalBlock), granularity) / sectorSize, UInt64(rangeSectorsMaximum))
    // With header and status the chain has to fit the queue, also as an indirect one (virtio 1.2, 2.7.5.3.1).
    let segments = max(1, min(segmentsMaximum, Int(queueSize) - 2))
    set(capacity: geometry.capacity, in: &bytes)
    put(UInt64(segments), at: 12, width: 4)
    put(UInt64(geometry.logicalBlock), at: 20, width: 4)
    put(UInt64(blocks.trailingZeroBitCount), at: 24, width: 1)
    put(UInt64(blocks), at: 26, width: 2)  // min_io_size
    put(min(geometry.optimalSize / UInt64(geometry.logicalBlock), 0xffff_ffff), at: 28, width: 4)  // opt_io_size
    put(cache == .writethrough ? 0 : 1, at: writebackOffset, width: 1)
    put(UInt64(queues), at: 34, width: 2)
    put(UInt64(rangeSectorsMaximum), at: 36, width: 4)
    put(UInt64(rangesMaximum), at: 40, width: 4)
    put(alignment, at: 44, width: 4)
    put(UInt64(rangeSectorsMaximum), at: 48, width: 4)
    put(UInt64(rangesMaximum), at: 52, width: 4)
    put(geometry.canUnmapZeroes ? 1 : 0, at: 56, width: 1)  // write_zeroes_may_unmap
    put(UInt64(rangeSectorsMaximum), at: 60, width: 4)
    put(UInt64(rangesMaximum), at: 64, width: 4)
    put(alignment, at: 68, width: 4)
    return bytes
  }
}
