/// What a PCI function has beside the registers that every transport has: its configuration space, its MSI-X table, and who
/// interrupts by which vector.
package struct PCIRegisters: Equatable, Sendable {
  /// Bytes of `encoded`.
  package static let bytes = 1280
  private static let vectorsOffset = 64
  private static let tableOffset = 192

  package internal(set) var function: PCIFunction
  var table: MSIXTable
  var configurationVector = PCILayout.noVector
  var queueVectors: [UInt16]

  package init(_ identity: DeviceIdentity) {
    let vectors = Self.vectors(identity)
    function = PCIFunction(deviceID: identity.deviceID, vectors: vectors)
    table = MSIXTable(count: vectors)
    queueVectors = Array(repeating: PCILayout.noVector, count: identity.queueSizes.count)
  }

  /// One for the configuration, and one for each queue.
  static func vectors(_ identity: DeviceIdentity) -> Int {
    min(identity.queueSizes.count + 1, PCILayout.maximumVectors)
  }

  /// A vector as it is assigned: one that is not there reads as none (virtio 1.2, 4.1.5.1.2.1).
  func assignable(_ vector: UInt16) -> UInt16 {
    Int(vector) < table.entries.count ? vector : PCILayout.noVector
  }

  mutating func clearVectors() {
    configurationVector = PCILayout.noVector
    for index in queueVectors.indices { queueVectors[index] = PCILayout.noVector }
  }

  // MARK: Saving

  /// For a later process: the function's words, the vectors, the table. What is pending is not kept: the next process interrupts every
  /// queue.
  package func encode(to memory: UnsafeMutableRawPointer) {
    for (index, word) in function.saved.enumerated() {
      memory.storeBytes(of: word, toByteOffset: 4 * index, as: UInt32.self)
    }
    memory.storeBytes(of: configurationVector, toByteOffset: 32, as: UInt16.self)
    for (index, vector) in queueVectors.prefix(64).enumerated() {
      memory.storeBytes(of: vector, toByteOffset: Self.vectorsOffset + 2 * index, as: UInt16.self)
    }
    for index in 0..<4 * table.entries.count {
      memory.storeBytes(of: table.word(index), toByteOffset: Self.tableOffset + 4 * index, as: UInt32.self)
    }
  }

  package init(_ identity: DeviceIdentity, decoding memory: UnsafeRawPointer) {
    self.init(identity)
    function.restore((0..<8).map { memory.load(fromByteOffset: 4 * $0, as: UInt32.self) })
    configurationVector = assignable(memory.load(fromByteOffset: 32, as: UInt16.self))
    for index in queueVectors.indices.prefix(64) {
      queueVectors[index] = assignable(memory.load(fromByteOffset: Self.vectorsOffset + 2 * index, as: UInt16.self))
    }
    for index in 0..<4 * table.entries.count {
      table.set(word: index, memory.load(fromByteOffset: Self.tableOffset + 4 * index, as: UInt32.self))
    }
  }
}
