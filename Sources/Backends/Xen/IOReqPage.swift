package import Synchronization

/// One trapped access, copied out of its slot.
package struct IOReq {
  /// What Xen wants done (xen: public/hvm/ioreq.h).
  package enum Kind: UInt8 {
    case portIO = 0  // IOREQ_TYPE_PIO
    case memory = 1  // IOREQ_TYPE_COPY
    case pciConfiguration = 2  // IOREQ_TYPE_PCI_CONFIG
    case timeOffset = 7  // IOREQ_TYPE_TIMEOFFSET
    case invalidate = 8  // IOREQ_TYPE_INVALIDATE
  }

  package var address: UInt64
  /// The value, or the guest address of a buffer when `dataIsPointer`.
  package var data: UInt64
  package var count: UInt32
  package var size: UInt32
  package var kind: Kind?
  package var dataIsPointer: Bool
  package var isRead: Bool
  /// Repeated accesses step down instead of up.
  package var stepsDown: Bool
}

/// The page that Xen and the ioreq server share: a slot of 32 bytes per vCPU (xen: public/hvm/ioreq.h, struct ioreq).
///
///     0 addr u64 | 8 data u64 | 16 count u32 | 20 size u32 | 24 vp_eport u32 | 28 pad u16 | 30 state and flags u8 | 31 type u8
package struct IOReqPage {
  package static let slotCount = 128
  package static let slotBytes = 32

  /// The state in the low four bits of byte 30.
  package enum State {
    package static let none: UInt8 = 0  // STATE_IOREQ_NONE
    package static let ready: UInt8 = 1  // STATE_IOREQ_READY
    package static let inProcess: UInt8 = 2  // STATE_IOREQ_INPROCESS
    package static let responseReady: UInt8 = 3  // STATE_IORESP_READY
    package static let mask: UInt8 = 0x0f
  }

  private let page: UnsafeMutableRawPointer

  package init(_ page: UnsafeMutableRawPointer) { self.page = page }

  private func slot(_ index: Int) -> UnsafeMutableRawPointer { page + index * Self.slotBytes }

  /// The byte that holds the state and, beside it, three flags.
  package func stateByte(_ index: Int) -> UnsafeMutablePointer<Atomic<UInt8>> {
    (slot(index) + 30).assumingMemoryBound(to: Atomic<UInt8>.self)
  }

  /// The guest's event channel port of a vCPU; 0 where there is no such vCPU.
  package func port(_ index: Int) -> UInt32 { slot(index).load(fromByteOffset: 24, as: UInt32.self) }

  /// Takes the request of a slot that is READY, and marks it INPROCESS.
  ///
  /// - Parameter begun: take also one that is INPROCESS: whoever took it is gone.
  /// - Returns: nil when there is none: the event was spurious.
  package func take(_ index: Int, begun: Bool = false) -> IOReq? {
    let state = stateByte(index)
    let byte = state.pointee.load(ordering: .acquiring)
    guard byte & State.mask == State.ready || begun && byte & State.mask == State.inProcess else { return nil }
    let start = slot(index)
    let request = IOReq(
      address: start.load(as: UInt64.self), data: start.load(fromByteOffset: 8, as: UInt64.self),
      count: start.load(fromByteOffset: 16, as: UInt32.self), size: start.load(fromByteOffset: 20, as: UInt32.self),
      kind: IOReq.Kind(rawValue: start.load(fromByteOffset: 31, as: UInt8.self)),
      dataIsPointer: byte & 0x10 != 0, isRead: byte & 0x20 != 0, stepsDown: byte & 0x40 != 0)
    state.pointee.store(byte & ~State.mask | State.inProcess, ordering: .relaxed)
    return request
  }

  /// Whether a slot has an access to a configuration space that is to be answered, begun or not.
  package func isOfConfiguration(_ index: Int) -> Bool {
    let state = stateByte(index).pointee.load(ordering: .acquiring) & State.mask
    guard state == State.ready || state == State.inProcess else { return false }
    return slot(index).load(fromByteOffset: 31, as: UInt8.self) == IOReq.Kind.pciConfiguration.rawValue
  }

  /// Whether a slot has an answer that its vCPU has not taken yet.
  package func isAnswered(_ index: Int) -> Bool {
    stateByte(index).pointee.load(ordering: .acquiring) & State.mask == State.responseReady
  }

  /// Answers a slot. The flags beside the state stay as they are.
  package func answer(_ index: Int, data: UInt64) {
    slot(index).storeBytes(of: data, toByteOffset: 8, as: UInt64.self)
    let state = stateByte(index)
    let byte = state.pointee.load(ordering: .relaxed)
    state.pointee.store(byte & ~State.mask | State.responseReady, ordering: .releasing)
  }
}
