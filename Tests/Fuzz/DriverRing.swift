import SimulatedXen
import Virtqueue

/// The driver's side of a split ring, for targets that fuzz what devices make of chains: chains of up to three descriptors, made from the
/// input, in a ring that is well formed. Checks what the device says that it used.
struct DriverRing {
  private static let size: UInt16 = 16
  private static let chains: UInt16 = 5

  let layout: QueueLayout
  private let memory: SimulatedMemory
  /// Where the chains' buffers are.
  private let buffers: UInt64
  private static let pieceBytes = 0x300
  private var offered: UInt16 = 0
  private var seen: UInt16 = 0
  /// Bytes that the device may write into each chain.
  private var writable = [UInt64](repeating: 0, count: Int(Self.chains))

  /// - Parameter area: 32 KiB of the guest's memory.
  init(_ memory: SimulatedMemory, area: UInt64) {
    self.memory = memory
    var layout = QueueLayout()
    layout.size = Self.size
    layout.descriptorArea = area
    layout.driverArea = area + 0x400
    layout.deviceArea = area + 0x800
    self.layout = layout
    buffers = area + 0x1000
    memory.pointer(area).initializeMemory(as: UInt8.self, repeating: 0, count: 0x1000)
  }

  var hasRoom: Bool { offered &- seen < Self.chains }

  /// A part of a chain.
  struct Piece {
    /// nil for a place of the ring's own.
    var address: UInt64?
    var length: UInt32
    var isWritable: Bool
    var bytes: [UInt8] = []
  }

  mutating func offer(_ pieces: [Piece]) {
    guard hasRoom, !pieces.isEmpty, pieces.count <= 3 else { return }
    let chain = offered % Self.chains
    var place = buffers + UInt64(chain) * 3 * UInt64(Self.pieceBytes)
    writable[Int(chain)] = pieces.reduce(0) { $0 + ($1.isWritable ? UInt64($1.length) : 0) }
    for (index, piece) in pieces.enumerated() {
      if piece.address == nil, !piece.bytes.isEmpty {
        memory.pointer(place).copyMemory(from: piece.bytes, byteCount: min(piece.bytes.count, Self.pieceBytes))
      }
      let descriptor = Int(chain) * 3 + index
      let flags = UInt16(index + 1 < pieces.count ? 1 : 0) | (piece.isWritable ? 2 : 0)
      memory.putDescriptor(
        at: layout.descriptorArea + UInt64(descriptor) * 16, piece.address ?? place, piece.length, flags,
        UInt16(descriptor + 1))
      place += UInt64(Self.pieceBytes)
    }
    let ring = memory.pointer(layout.driverArea)
    ring.storeBytes(of: chain * 3, toByteOffset: 4 + 2 * Int(offered % Self.size), as: UInt16.self)
    offered &+= 1
    ring.storeBytes(of: offered, toByteOffset: 2, as: UInt16.self)
  }

  /// Looks at what was used: in order, what was offered, and with no more bytes than there was room for.
  mutating func collect() {
    let ring = memory.pointer(layout.deviceArea)
    let used = ring.load(fromByteOffset: 2, as: UInt16.self)
    precondition(used &- seen <= offered &- seen, "more is used than was offered")
    while seen != used {
      let entry = 4 + 8 * Int(seen % Self.size)
      let chain = seen % Self.chains
      precondition(ring.load(fromByteOffset: entry, as: UInt32.self) == UInt32(chain * 3), "another chain is used")
      let length = ring.load(fromByteOffset: entry + 4, as: UInt32.self)
      precondition(UInt64(length) <= writable[Int(chain)], "more is written than there is room for")
      seen &+= 1
    }
  }
}

extension Input {
  /// Pieces of a chain: one to three, in places of the ring's own or anywhere.
  mutating func pieces() -> [DriverRing.Piece] {
    let shape = byte()
    return (0...Int(shape & 3) % 3).map { _ in
      let kind = byte()
      let length = kind & 0x40 != 0 ? UInt32(truncatingIfNeeded: number(bytes: 4)) : UInt32(kind & 0x3f) * 12
      let address = kind & 0x80 != 0 ? number(bytes: 8) : nil
      let bytes = address == nil ? (0..<min(Int(length), 64)).map { _ in byte() } : []
      return DriverRing.Piece(
        address: address, length: min(length, address == nil ? 0x300 : .max), isWritable: shape & 4 << (kind & 1) != 0,
        bytes: bytes)
    }
  }
}
