package import Transport
package import Xen

/// How a guest drives a virtio function on its PCI bus, written from the specifications (PCI 3.0; virtio 1.2, 4.1): finds it, sizes
/// and places its BAR, walks its capabilities, and sets MSI-X up. Afterwards it answers to the register numbers of virtio-mmio, so that
/// `SimulatedDriver` works with it.
///
/// One thread, one vCPU.
package final class PCIFunctionRegisters: RegisterAccess {
  /// How the function interrupts.
  package enum Interrupts: Sendable {
    /// A vector for the configuration and one for each queue.
    case messages
    /// The pin INTA.
    case pin
  }

  package enum Failure: Error, Equatable {
    case noFunction(UInt32)
    case noCapability(UInt32)
    case badBAR(UInt32)
  }

  private struct Structure {
    var offset: UInt64 = 0
    var length: UInt64 = 0
  }

  package let function: PCIAddress
  package private(set) var base: UInt64
  package private(set) var vectorCount = 0
  private let domain: SimulatedDomain
  private let vcpu: Int
  private let interrupts: Interrupts
  private var structures: [UInt32: Structure] = [:]
  private var notifyMultiplier: UInt64 = 0
  private var msixCapability = 0
  private var table: UInt64 = 0
  private var windowCapability = 0

  /// Finds and places the function, as firmware and a kernel's PCI core do.
  ///
  /// - Parameter base: where the BAR is to be.
  package init(
    domain: SimulatedDomain, function: PCIAddress, base: UInt64 = 0xf300_0000, vcpu: Int = 0,
    interrupts: Interrupts = .messages
  ) throws(Failure) {
    self.domain = domain
    self.function = function
    self.base = base
    self.vcpu = vcpu
    self.interrupts = interrupts
    let identity = UInt32(configuration(0, 4))
    guard identity & 0xffff == 0x1af4 else { throw .noFunction(identity) }
    setConfiguration(4, 2, 0)
    setConfiguration(0x10, 4, 0xffff_ffff)
    let mask = UInt32(configuration(0x10, 4))
    // A memory BAR of 32 bits whose size is a power of two.
    let size = ~(mask & ~0xf) &+ 1
    guard mask & 7 == 0, size >= 4096, size.nonzeroBitCount == 1 else { throw .badBAR(mask) }
    setConfiguration(0x10, 4, base)
    try findCapabilities()
    setConfiguration(4, 2, interrupts == .messages ? 0x406 : 0x6)
    if interrupts == .messages { setUpMessages() }
  }

  // MARK: The configuration space

  package func configuration(_ register: Int, _ size: Int) -> UInt64 {
    domain.configurationAccess(vcpu: vcpu, function, register: register, size: size) & (1 << (8 * UInt64(size)) - 1)
  }

  package func setConfiguration(_ register: Int, _ size: Int, _ value: UInt64) {
    _ = domain.configurationAccess(vcpu: vcpu, function, register: register, size: size, write: value)
  }

  private func findCapabilities() throws(Failure) {
    var place = Int(configuration(0x34, 1))
    var left = 48
    while place != 0, left > 0 {
      left -= 1
      switch configuration(place, 1) {
      case 0x11:
        msixCapability = place
        vectorCount = Int(configuration(place + 2, 2) & 0x7ff) + 1
        table = configuration(place + 4, 4) & ~7
      case 0x09:
        let type = UInt32(configuration(place + 3, 1))
        if type == 5 { windowCapability = place }
        if type == 2 { notifyMultiplier = configuration(place + 16, 4) }
        structures[type] = Structure(offset: configuration(place + 8, 4), length: configuration(place + 12, 4))
      default: break
      }
      place = Int(configuration(place + 1, 1))
    }
    for type: UInt32 in 1...5 where structures[type] == nil { throw .noCapability(type) }
  }

  /// Moves the BAR, as a kernel that scans the bus again does.
  package func move(to base: UInt64) {
    let command = configuration(4, 2)
    setConfiguration(4, 2, command & ~2)
    setConfiguration(0x10, 4, base)
    self.base = base
    setConfiguration(4, 2, command)
  }

  // MARK: MSI-X

  /// What a vector of this function sends.
  package func message(_ vector: Int) -> MSIMessage {
    MSIMessage(address: 0xfee0_1000, data: UInt32(function.device) << 8 | UInt32(0x20 + vector))
  }

  private func setUpMessages() {
    // With everything masked until the table is complete, as Linux does it.
    setConfiguration(msixCapability + 2, 2, 0xc000)
    for vector in 0..<vectorCount { set(vector, message(vector), isMasked: false) }
    setConfiguration(msixCapability + 2, 2, 0x8000)
  }

  package func set(_ vector: Int, _ message: MSIMessage, isMasked: Bool) {
    let entry = table + 16 * UInt64(vector)
    put(entry + 12, 4, 1)
    put(entry, 4, message.address & 0xffff_ffff)
    put(entry + 4, 4, message.address >> 32)
    put(entry + 8, 4, UInt64(message.data))
    put(entry + 12, 4, isMasked ? 1 : 0)
  }

  package func mask(_ vector: Int, _ isMasked: Bool) { put(table + 16 * UInt64(vector) + 12, 4, isMasked ? 1 : 0) }

  /// MSI-X on or off, with or without the mask of the whole function.
  package func control(enabled: Bool, masked: Bool) {
    setConfiguration(msixCapability + 2, 2, (enabled ? 0x8000 : 0) | (masked ? 0x4000 : 0))
  }

  /// Whether a vector waits for being unmasked.
  package func isPending(_ vector: Int) -> Bool {
    let pending = configuration(msixCapability + 8, 4) & ~7
    return get(pending + UInt64(vector / 32) * 4, 4) >> UInt64(vector % 32) & 1 == 1
  }

  // MARK: The BAR

  package func get(_ offset: UInt64, _ size: Int) -> UInt64 {
    let value = domain.access(vcpu: vcpu, address: base + offset, size: size)
    return size == 8 ? value : value & ((1 << (8 * UInt64(size))) - 1)
  }

  package func put(_ offset: UInt64, _ size: Int, _ value: UInt64) {
    _ = domain.access(vcpu: vcpu, address: base + offset, size: size, write: value)
  }

  /// The same by way of the configuration space, as firmware reads a BAR that it cannot map.
  package func getByWindow(_ offset: UInt64, _ size: Int) -> UInt64 {
    aim(offset, size)
    return configuration(windowCapability + 16, size)
  }

  package func putByWindow(_ offset: UInt64, _ size: Int, _ value: UInt64) {
    aim(offset, size)
    setConfiguration(windowCapability + 16, size, value)
  }

  private func aim(_ offset: UInt64, _ size: Int) {
    setConfiguration(windowCapability + 4, 1, 0)
    setConfiguration(windowCapability + 8, 4, offset)
    setConfiguration(windowCapability + 12, 4, UInt64(size))
  }

  // MARK: The register numbers of virtio-mmio

  /// Fields of the common structure that stand for a register, with their widths.
  private static func common(_ register: UInt64) -> (offset: UInt64, size: Int)? {
    switch register {
    case 0x010: (0x04, 4)
    case 0x014: (0x00, 4)
    case 0x020: (0x0c, 4)
    case 0x024: (0x08, 4)
    case 0x030: (0x16, 2)
    case 0x034, 0x038: (0x18, 2)
    case 0x044: (0x1c, 2)
    case 0x070: (0x14, 1)
    case 0x080, 0x084: (0x20 + register - 0x080, 4)
    case 0x090, 0x094: (0x28 + register - 0x090, 4)
    case 0x0a0, 0x0a4: (0x30 + register - 0x0a0, 4)
    case 0x0c0: (0x3a, 2)
    case 0x0fc: (0x15, 1)
    default: nil
    }
  }

  private func place(_ type: UInt32) -> UInt64 { structures[type]?.offset ?? 0 }

  package func read(_ offset: UInt64, width: Int) -> UInt64 {
    if offset >= 0x100 { return get(place(4) + offset - 0x100, width) }
    if let field = Self.common(offset) { return get(place(1) + field.offset, field.size) }
    switch offset {
    case 0x000: return 0x7472_6976
    case 0x004: return 2
    case 0x008: return configuration(2, 2) &- 0x1040
    // By messages there is nothing to read: their handlers look at their queues.
    case 0x060: return interrupts == .messages ? 3 : get(place(3), 1)
    default: return 0
    }
  }

  package func write(_ offset: UInt64, width: Int, _ value: UInt64) {
    if offset >= 0x100 { return put(place(4) + offset - 0x100, width, value) }
    if offset == 0x050 {
      put(place(1) + 0x16, 2, value)
      let doorbell = get(place(1) + 0x1e, 2)
      return put(place(2) + doorbell * notifyMultiplier, 2, value)
    }
    guard let field = Self.common(offset) else { return }
    // A vector for the queue before it is enabled.
    if offset == 0x044, interrupts == .messages {
      put(place(1) + 0x1a, 2, min(get(place(1) + 0x16, 2) + 1, UInt64(vectorCount - 1)))
    }
    put(place(1) + field.offset, field.size, value)
    if offset == 0x070, value == 0, interrupts == .messages { put(place(1) + 0x10, 2, 0) }
  }
}
