package import Virtqueue

/// Feature bits of a block device (virtio 1.2, 5.2.3).
extension FeatureBits {
  package static let blockSegmentsMaximum = FeatureBits(rawValue: 1 << 2)  // VIRTIO_BLK_F_SEG_MAX
  package static let blockReadOnly = FeatureBits(rawValue: 1 << 5)  // VIRTIO_BLK_F_RO
  package static let blockSize = FeatureBits(rawValue: 1 << 6)  // VIRTIO_BLK_F_BLK_SIZE
  package static let blockFlush = FeatureBits(rawValue: 1 << 9)  // VIRTIO_BLK_F_FLUSH
  package static let blockTopology = FeatureBits(rawValue: 1 << 10)  // VIRTIO_BLK_F_TOPOLOGY
  package static let blockDiscard = FeatureBits(rawValue: 1 << 13)  // VIRTIO_BLK_F_DISCARD
  package static let blockWriteZeroes = FeatureBits(rawValue: 1 << 14)  // VIRTIO_BLK_F_WRITE_ZEROES
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

  /// What the device offers for a store.
  package static func features(_ geometry: BlockGeometry) -> FeatureBits {
    var features: FeatureBits = [
      .version1, .indirectDescriptors, .eventIndex, .blockSegmentsMaximum, .blockSize, .blockFlush, .blockTopology,
    ]
    if geometry.readOnly {
      features.insert(.blockReadOnly)
    } else {
      features.insert(.blockWriteZeroes)
      if geometry.canDiscard { features.insert(.blockDiscard) }
    }
    return features
  }

  /// The 60 bytes up to the end of the write-zeroes fields.
  package static func bytes(_ geometry: BlockGeometry) -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: 60)
    func put(_ value: UInt64, at offset: Int, width: Int) {
      for index in 0..<width { bytes[offset + index] = UInt8(truncatingIfNeeded: value >> UInt64(8 * index)) }
    }
    let exponent = max(1, geometry.physicalBlock / geometry.logicalBlock).trailingZeroBitCount
    put(geometry.capacity / sectorSize, at: 0, width: 8)
    put(UInt64(segmentsMaximum), at: 12, width: 4)
    put(UInt64(geometry.logicalBlock), at: 20, width: 4)
    put(UInt64(exponent), at: 24, width: 1)
    put(UInt64(max(1, geometry.physicalBlock / geometry.logicalBlock)), at: 26, width: 2)  // min_io_size
    put(0, at: 28, width: 4)  // opt_io_size: none to prefer
    put(1, at: 32, width: 1)  // writeback: durable on flush
    put(1, at: 34, width: 2)  // num_queues
    put(UInt64(rangeSectorsMaximum), at: 36, width: 4)
    put(UInt64(rangesMaximum), at: 40, width: 4)
    put(UInt64(max(geometry.physicalBlock, 4096)) / sectorSize, at: 44, width: 4)
    put(UInt64(rangeSectorsMaximum), at: 48, width: 4)
    put(UInt64(rangesMaximum), at: 52, width: 4)
    put(1, at: 56, width: 1)  // write_zeroes_may_unmap
    return bytes
  }
}
