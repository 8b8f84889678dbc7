/// All that a driver can break in a virtqueue. The device stops serving and asks for a reset.
package enum VirtqueueFault: Error, Equatable {
  /// The available index is further ahead than the queue is long (virtio 1.2, 2.7.6).
  case availableIndexJumped(pending: UInt16)
  /// A head names no descriptor of the table.
  case headOutOfRange(UInt16)
  /// A head that the device still works on was made available again.
  case headInUse(UInt16)
  /// The driver made slots of a packed ring available that the device still has.
  case ringOverrun
  /// A `next` field names no descriptor of its table.
  case nextOutOfRange(UInt16)
  /// The chain is longer than the device's limit, or loops.
  case chainTooLong
  /// A device-readable descriptor behind a device-writable one (virtio 1.2, 2.7.4.2).
  case readableAfterWritable
  /// An indirect table whose length is 0, no multiple of 16, or beyond the limit (virtio 1.2, 2.7.5.3).
  case badIndirectTable(length: UInt32)
  /// An indirect descriptor within an indirect table, or one combined with NEXT.
  case nestedIndirect
  /// An indirect descriptor although the feature was not negotiated.
  case indirectNotNegotiated
  /// A buffer whose address plus length leaves the address space.
  case bufferOverflow
  /// Memory that holds a ring or an indirect table is not mapped.
  case ringUnmapped
  /// The queue's size or addresses are not what the specification allows (virtio 1.2, 2.7).
  case badLayout
  /// A request that is too short for what its device needs to answer it.
  case requestTooShort

  /// One line for the operator.
  package var message: String {
    switch self {
    case .availableIndexJumped(let pending): "the available index is \(pending) ahead, more than the queue's size"
    case .headOutOfRange(let head): "the available ring names descriptor \(head), which does not exist"
    case .headInUse(let head): "descriptor \(head) was made available while the device still works on it"
    case .ringOverrun: "slots of the ring were made available while the device still works on them"
    case .nextOutOfRange(let next): "a descriptor's next field names \(next), which does not exist"
    case .chainTooLong: "a descriptor chain is too long or loops"
    case .readableAfterWritable: "a readable descriptor follows a writable one in a chain"
    case .badIndirectTable(let length): "an indirect table of \(length) bytes"
    case .nestedIndirect: "an indirect descriptor inside an indirect table or with a next field"
    case .indirectNotNegotiated: "an indirect descriptor without the feature"
    case .bufferOverflow: "a buffer's address plus its length overflows"
    case .ringUnmapped: "ring memory is not mapped in the guest"
    case .badLayout: "the queue's size or addresses are not allowed"
    case .requestTooShort: "a request without a whole header or without room for its status"
    }
  }
}
