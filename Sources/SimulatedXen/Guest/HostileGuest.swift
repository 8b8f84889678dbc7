import Transport
import Virtqueue
package import Xen

/// A guest that does what no driver should: to its device's registers, to its rings, to the memory that they are in.
///
/// Everything follows from a seed, which repeats it. Several may act on one device at once, each as another vCPU.
package final class HostileGuest {
  /// xorshift64*: the same numbers for the same seed.
  private struct Numbers: RandomNumberGenerator {
    var state: UInt64

    mutating func next() -> UInt64 {
      state ^= state >> 12
      state ^= state << 25
      state ^= state >> 27
      return state &* 0x2545_f491_4f6c_dd1d
    }
  }

  private let domain: SimulatedDomain
  private let registers: any RegisterAccess
  /// The device as a function on the guest's PCI bus; nil for one in a slot.
  private let function: PCIFunctionRegisters?
  private let vcpu: Int
  private let base: UInt64
  /// Where the rings are: the same place for each of the vCPUs.
  private let area: UInt64
  private var random: Numbers
  /// What was done, for the message of a failure.
  package private(set) var actions: [String] = []

  /// - Parameter area: guest memory that is the hostile guest's to spoil, 1 MiB of it, 4 KiB aligned.
  package init(domain: SimulatedDomain, slot: DeviceSlot, vcpu: Int, area: UInt64, seed: UInt64) {
    self.domain = domain
    self.vcpu = vcpu
    self.area = area
    base = slot.base
    random = Numbers(state: seed &* 0x9e37_79b9_7f4a_7c15 | 1)
    registers = TrappedRegisters(domain: domain, base: slot.base, vcpu: vcpu)
    function = nil
  }

  /// - Parameter function: where the device is on the guest's PCI bus; `area` as above.
  package init(
    domain: SimulatedDomain, function: PCIFunctionRegisters, vcpu: Int, area: UInt64, seed: UInt64
  ) {
    self.domain = domain
    self.vcpu = vcpu
    self.area = area
    base = function.base
    random = Numbers(state: seed &* 0x9e37_79b9_7f4a_7c15 | 1)
    registers = function
    self.function = function
  }

  /// Does one thing.
  package func act() {
    let choices: [(String, () -> Void)] = [
      ("initialize", initialize), ("initialize", initialize), ("spoil a ring", spoilRing),
      ("plausible chains", plausibleChains), ("plausible chains", plausibleChains),
      ("plausible chains", plausibleChains), ("available index", jumpIndex), ("notify", notify), ("notify", notify),
      ("any register", anyRegister), ("read-only registers", readOnlyRegisters), ("configuration", configuration),
      ("reset storm", resetStorm), ("queue reset", queueReset), ("move the rings", moveRings), ("balloon", balloon),
      ("repeated access", repeatedAccess),
    ]
    let onPCI: [(String, () -> Void)] = [
      ("any access to the function", anyFunctionAccess), ("any access to the function", anyFunctionAccess),
      ("vectors", rewriteVectors), ("move the BAR", moveBAR), ("decoding", toggleDecoding),
    ]
    let all = function == nil ? choices : choices + onPCI
    let choice = all[below(all.count)]
    actions.append(choice.0)
    choice.1()
  }

  private func below(_ limit: Int) -> Int { Int.random(in: 0..<limit, using: &random) }
  private func coin() -> Bool { Bool.random(using: &random) }

  /// A number that is small, near a border, or anything.
  private func number() -> UInt64 {
    switch below(5) {
    case 0: return UInt64(below(16))
    case 1: return 1 << UInt64(below(64))
    case 2: return (1 << UInt64(below(64))) &- 1
    case 3: return area + UInt64(below(1 << 20))
    default: return random.next()
    }
  }

  // MARK: Registers

  /// Goes through the initialization, mostly as the specification wants it.
  private func initialize() {
    registers.write(0x070, 0)
    registers.write(0x070, 3)
    let features: UInt64 =
      1 << 32 | (coin() ? 1 << 28 : 0) | (coin() ? 1 << 29 : 0) | (coin() ? 1 << 34 : 0)
      | (coin() ? 1 << 35 : 0) | (coin() ? 1 << 40 : 0) | (below(8) == 0 ? random.next() : 0)
    for half in 0..<2 {
      registers.write(0x024, UInt32(half))
      registers.write(0x020, UInt32(truncatingIfNeeded: features >> UInt64(32 * half)))
    }
    registers.write(0x070, 11)
    for queue in 0..<2 { setUp(queue) }
    registers.write(0x070, 15)
  }

  private func setUp(_ queue: Int) {
    registers.write(0x030, UInt32(queue))
    registers.write(0x038, coin() ? 16 : UInt32(truncatingIfNeeded: number()))
    let ring = area + UInt64(queue) * 0x4000
    for (index, register) in [UInt64(0x080), 0x090, 0x0a0].enumerated() {
      let address = below(12) == 0 ? number() : ring + UInt64(index) * 0x1000
      registers.write(register, UInt32(truncatingIfNeeded: address))
      registers.write(register + 4, UInt32(truncatingIfNeeded: address >> 32))
    }
    registers.write(0x044, 1)
  }

  private func notify() { registers.write(0x050, coin() ? UInt32(below(2)) : UInt32(truncatingIfNeeded: number())) }

  private func anyRegister() {
    for _ in 0..<below(20) {
      let offset = UInt64(below(0x200))
      let width = [1, 2, 4, 8][below(4)]
      if coin() { registers.write(offset, width: width, number()) } else { _ = registers.read(offset, width: width) }
    }
  }

  private func readOnlyRegisters() {
    for offset in [UInt64(0x000), 0x004, 0x008, 0x00c, 0x010, 0x034, 0x060, 0x0fc] {
      let before = offset == 0x060 ? 0 : registers.read(offset, width: 4)
      registers.write(offset, width: 4, number())
      guard offset < 0x010 else { continue }
      precondition(registers.read(offset, width: 4) == before, "a read-only register changed")
    }
  }

  /// Every offset with every width, also across the end of the space and of the window.
  private func configuration() {
    for width in [1, 2, 4, 8] {
      for offset in stride(from: UInt64(0x0f8), to: 0x200, by: coin() ? 1 : 7) {
        _ = registers.read(offset, width: width)
      }
    }
    registers.write(0x100 + UInt64(below(80)), width: [1, 2, 4, 8][below(4)], number())
  }

  private func resetStorm() { for _ in 0..<below(30) { registers.write(0x070, UInt32(below(16))) } }

  private func queueReset() {
    registers.write(0x030, UInt32(below(3)))
    registers.write(coin() ? 0x0c0 : 0x044, UInt32(below(2)))
    if coin() { setUp(below(2)) }
  }

  /// Writes the rings' addresses while the device works with them.
  private func moveRings() {
    for register in [UInt64(0x080), 0x090, 0x0a0] { registers.write(register, UInt32(truncatingIfNeeded: number())) }
  }

  /// REP MOVS on the window, with buffers anywhere.
  private func repeatedAccess() {
    _ = domain.access(
      vcpu: vcpu, address: base + UInt64(below(0x200)), size: [1, 2, 4, 8][below(4)], write: coin() ? 0 : nil,
      count: UInt32(truncatingIfNeeded: number()), buffer: number(), stepsDown: coin())
  }

  // MARK: The function on the PCI bus

  private func anyFunctionAccess() {
    guard let function else { return }
    for _ in 0..<below(30) {
      let size = [1, 2, 4][below(3)]
      switch below(4) {
      case 0: _ = function.configuration(below(256), size)
      case 1: function.setConfiguration(below(256), size, number())
      case 2: _ = function.get(UInt64(below(0x5000)), size)
      default: function.put(UInt64(below(0x5000)), size, number())
      }
    }
    function.move(to: base)
  }

  /// Messages to anywhere, masked and unmasked, also of vectors that are not there, while the device interrupts by them.
  private func rewriteVectors() {
    guard let function else { return }
    for _ in 0..<below(20) {
      function.set(
        below(function.vectorCount + 1), MSIMessage(address: number(), data: UInt32(truncatingIfNeeded: number())),
        isMasked: coin())
      if below(4) == 0 { function.control(enabled: coin(), masked: coin()) }
    }
    function.control(enabled: true, masked: false)
  }

  private func moveBAR() {
    guard let function else { return }
    for _ in 0..<below(6) { function.move(to: coin() ? number() & 0xffff_c000 : base &+ UInt64(below(4)) << 14) }
    function.move(to: base)
  }

  private func toggleDecoding() {
    guard let function else { return }
    for _ in 0..<below(12) { function.setConfiguration(4, coin() ? 2 : 1, UInt64(below(8))) }
    function.setConfiguration(4, 2, 0x406)
  }

  // MARK: Memory

  private func put(_ value: UInt64, at address: UInt64) {
    domain.memory.pointer(address & ~7).storeBytes(of: value, as: UInt64.self)
  }

  private func spoilRing() {
    for _ in 0..<below(200) { put(number(), at: area + UInt64(below(0x8000))) }
  }

  /// Chains that get past the first checks, with mistakes here and there.
  private func plausibleChains() {
    let ring = area + UInt64(below(2)) * 0x4000
    let isPacked = coin()
    for index in 0..<16 {
      let target = below(6) == 0 ? number() : area + 0x8000 + UInt64(below(0x8_0000))
      let length = UInt32(truncatingIfNeeded: below(4) == 0 ? number() : UInt64([16, 512, 4096, 1, 32][below(5)]))
      let kind = UInt16([0, 1, 1, 2, 3, 4, 5, 7][below(8)])
      let place = ring + UInt64(index) * 16
      if isPacked {
        let lap: UInt16 = coin() ? 1 << 7 : 1 << 15
        domain.memory.putDescriptor(at: place, target, length, UInt16(below(20)), kind | lap)
      } else {
        domain.memory.putDescriptor(at: place, target, length, kind, UInt16(below(below(10) == 0 ? 65536 : 16)))
      }
      // A header, and an indirect table, in what the descriptors point to.
      let data = area + 0x8000 + UInt64(below(0x8_0000)) & ~15
      domain.memory.putDescriptor(
        at: data, UInt64([0, 1, 4, 8, 10, 11, 13, 14, 99][below(9)]),
        below(4) == 0 ? UInt32(truncatingIfNeeded: random.next()) : 8, kind,
        UInt16(below(16)))
    }
    if !isPacked {
      for slot in 0..<16 {
        domain.memory.pointer(ring + 0x1000).storeBytes(
          of: UInt16(below(17)), toByteOffset: 4 + 2 * slot, as: UInt16.self)
      }
      advance(ring, by: UInt16(below(16)))
    }
    registers.write(0x050, ring == area ? 0 : 1)
  }

  private func advance(_ ring: UInt64, by count: UInt16) {
    let start = domain.memory.pointer(ring + 0x1000)
    let index = start.load(fromByteOffset: 2, as: UInt16.self) &+ count
    start.storeBytes(of: index, toByteOffset: 2, as: UInt16.self)
  }

  private func jumpIndex() {
    advance(area + UInt64(below(2)) * 0x4000, by: UInt16(truncatingIfNeeded: number()))
    notify()
  }

  /// Gives pages back, rings among them, uses the device, and takes them again.
  private func balloon() {
    let first = Int(area >> 12) + below(128)
    let pages = first..<first + 1 + below(16)
    domain.memory.set(pages: pages, present: false)
    domain.sendInvalidate(vcpu: vcpu)
    notify()
    domain.memory.set(pages: pages, present: true)
    if coin() { domain.sendInvalidate(vcpu: vcpu) }
  }
}
