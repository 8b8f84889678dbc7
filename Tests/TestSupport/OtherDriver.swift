import EventLoop
package import SimulatedXen
package import Virtqueue

/// How another driver than Linux' sets its device up and uses it, as far as its public source says: which bits it takes, in which order and by
/// which accesses it writes registers, whether it waits for interrupts, how large its requests are. Written anew from those facts.
package struct OtherDriver: Sendable, CustomStringConvertible {
  /// One step of an initialization, by the register numbers of virtio-mmio.
  package enum Step: Sendable {
    /// Status is read, and written with more bits.
    case add(UInt32)
    /// Status is written as it is.
    case set(UInt32)
    /// The offered bits are read and those that it wants are written, both by halves, the upper one first or last.
    case features(upperFirst: Bool)
    /// FEATURES_OK must have stayed.
    case checkFeatures
    /// Fields of the configuration space are read in pieces of so many bytes; with the generation around them where it is asked for.
    case read(ClosedRange<UInt64>, width: Int, generation: Bool)
    /// A byte of the configuration space is written.
    case write(UInt64, UInt64)
    /// A queue is set up: with the size that the device offers, or less.
    case queue(Int, atMost: UInt16)
  }

  package let name: String
  package let wanted: FeatureBits
  package let steps: [Step]
  /// Looks at its queues instead of taking interrupts, and says so in the available ring.
  package var polls = false
  package var usesIndirect = false
  /// Bytes of a request's data, and of each of its segments.
  package var requestBytes = 4096
  package var segmentBytes = 4096
  /// Whether it exists for virtio-mmio.
  package var knowsMMIO = true
  /// On the PCI bus: whether it takes messages.
  package var takesMessages = false

  package var description: String { name }

  package enum Failure: Error, Equatable {
    case featuresRefused
    case queueIsInUse(Int)
    case queueTooSmall(Int, UInt16)
    case notReset(UInt32)
    case noAnswer
  }

  package init(_ name: String, wanted: FeatureBits, steps: [Step], _ change: (inout OtherDriver) -> Void = { _ in }) {
    self.name = name
    self.wanted = wanted
    self.steps = steps
    change(&self)
  }

  /// A device that it has set up.
  package final class Session {
    package let driver: OtherDriver
    package let registers: any RegisterAccess
    package private(set) var rings: [Int: SimulatedSplitRing] = [:]
    package private(set) var features: FeatureBits = []
    private let memory: SimulatedMemory
    private let area: UInt64
    private var place: UInt64

    /// - Parameter area: guest memory, 4 KiB aligned, for rings and requests.
    package init(_ driver: OtherDriver, _ registers: any RegisterAccess, _ memory: SimulatedMemory, area: UInt64) {
      self.driver = driver
      self.registers = registers
      self.memory = memory
      self.area = area
      place = area
    }

    /// Behind the rings.
    package var buffers: UInt64 { (place + 4095) & ~4095 }

    package func start() throws(Failure) {
      place = area
      rings = [:]
      for step in driver.steps { try perform(step) }
    }

    private func perform(_ step: Step) throws(Failure) {
      switch step {
      case .add(let bits): registers.write(0x070, registers.read(0x070) | bits)
      case .set(let value):
        registers.write(0x070, value)
        guard value != 0 || registers.read(0x070) == 0 else { throw .notReset(registers.read(0x070)) }
      case .features(let upperFirst): negotiate(upperFirst ? [1, 0] : [0, 1])
      case .checkFeatures: guard registers.read(0x070) & 8 != 0 else { throw .featuresRefused }
      case .read(let range, let width, let generation): read(range, width, generation)
      case .write(let offset, let value): registers.write(0x100 + offset, width: 1, value)
      case .queue(let index, let most): try setUp(index, most)
      }
    }

    private func negotiate(_ halves: [UInt64]) {
      var offered: UInt64 = 0
      for half in halves {
        registers.write(0x014, UInt32(half))
        offered |= UInt64(registers.read(0x010)) << (32 * half)
      }
      features = FeatureBits(rawValue: offered).intersection(driver.wanted.union(.version1))
      for half in halves {
        registers.write(0x024, UInt32(half))
        registers.write(0x020, UInt32(truncatingIfNeeded: features.rawValue >> (32 * half)))
      }
    }

    private func read(_ range: ClosedRange<UInt64>, _ width: Int, _ generation: Bool) {
      repeat {
        let before = registers.read(0x0fc)
        for offset in stride(from: range.lowerBound, through: range.upperBound, by: width) {
          _ = registers.read(0x100 + offset, width: width)
        }
        if !generation || registers.read(0x0fc) == before { return }
      } while true
    }

    private func setUp(_ index: Int, _ most: UInt16) throws(Failure) {
      registers.write(0x030, UInt32(index))
      guard registers.read(0x044) == 0 else { throw .queueIsInUse(index) }
      let maximum = UInt16(truncatingIfNeeded: registers.read(0x034))
      guard maximum >= 3 else { throw .queueTooSmall(index, maximum) }
      let ring = SimulatedSplitRing(
        memory: memory, area: (place + 4095) & ~4095, size: min(maximum, most), features: features)
      registers.write(0x038, UInt32(ring.size))
      for (register, address) in [
        (UInt64(0x080), ring.descriptorArea), (0x090, ring.driverArea), (0x0a0, ring.deviceArea),
      ] {
        registers.write(register, UInt32(truncatingIfNeeded: address))
        registers.write(register + 4, UInt32(truncatingIfNeeded: address >> 32))
      }
      // VIRTQ_AVAIL_F_NO_INTERRUPT
      if driver.polls { memory.pointer(ring.driverArea).storeBytes(of: 1, as: UInt16.self) }
      registers.write(0x044, 1)
      rings[index] = ring
      place = ring.end
    }

    package func notify(_ queue: Int) { registers.write(0x050, UInt32(queue)) }

    /// Waits for an answer as the driver does.
    ///
    /// - Parameter interrupt: waits for an interrupt; called by drivers that take them.
    package func answer(_ queue: Int, interrupt: () -> Bool) throws(Failure) -> (head: UInt16, length: UInt32) {
      guard let ring = rings[queue] else { throw .noAnswer }
      // A watchdog alone: for what never comes.
      let deadline = EventLoop.now() + 30_000_000_000
      while EventLoop.now() < deadline {
        if let used = ring.takeUsed() { return used }
        if driver.polls {
          yieldThread()
        } else if !ring.armInterrupt() {
          guard interrupt() else { throw .noAnswer }
        }
      }
      throw .noAnswer
    }

    // MARK: A disk

    /// One request of the driver's kind, waited for.
    ///
    /// - Returns: its status byte.
    package func request(type: UInt32, sector: UInt64, bytes: Int, interrupt: () -> Bool) throws(Failure) -> UInt8 {
      let (header, status, data) = (buffers, buffers + 64, buffers + 4096)
      let start = memory.pointer(header)
      start.storeBytes(of: type, as: UInt32.self)
      start.storeBytes(of: 0, toByteOffset: 4, as: UInt32.self)
      start.storeBytes(of: sector, toByteOffset: 8, as: UInt64.self)
      memory.pointer(status).storeBytes(of: 0xff, as: UInt8.self)
      var chain: [SimulatedDriver.Buffer] = [.init(header, 16, writable: false)]
      for offset in stride(from: 0, to: bytes, by: driver.segmentBytes) {
        let length = min(driver.segmentBytes, bytes - offset)
        chain.append(.init(data + UInt64(offset), UInt32(length), writable: type != 1))
      }
      chain.append(.init(status, 1, writable: true))
      let indirect = driver.usesIndirect && features.contains(.indirectDescriptors)
      guard let ring = rings[0], ring.add(chain, indirect: indirect) != nil else { throw .noAnswer }
      if ring.notificationIsWanted() { notify(0) }
      _ = try answer(0, interrupt: interrupt)
      return memory.pointer(status).load(as: UInt8.self)
    }

    /// Where the data of `request` is.
    package var data: UnsafeMutableRawPointer { memory.pointer(buffers + 4096) }

    /// Takes its device back: a reset by the status register, since nothing else is there on this bus.
    package func reset() throws(Failure) { try perform(.set(0)) }
  }
}
