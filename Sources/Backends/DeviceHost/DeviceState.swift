import Devices
package import EventLoop
import Glibc
import HostMemory
import Synchronization
package import Transport
package import Virtqueue

/// Why a file of saved state cannot be used.
package enum StateFault: Error {
  case host(Errno)
  /// It was written by another version of vxd.
  case version(UInt32)
  case damaged(String)

  package var message: String {
    switch self {
    case .host(let errno): "the saved state cannot be read: \(errno)"
    case .version(let version):
      "the saved state has version \(version), and this vxd knows version \(DeviceState.version): the guest must reset the device"
    case .damaged(let what): "the saved state is damaged (\(what)): the guest must reset the device"
    }
  }
}

/// What of a device must survive the process: registers and queue journals, in a file that is mapped (in the runtime directory: memory
/// that ends with the host). The file is written as the guest goes on, so it is right whenever the process dies.
///
///     0     magic, version, length, device number, queues, slots and chain limit of each journal
///     64    offered features, base of the slot, index of the slot, its shared interrupt (Arm)
///     88    slots of each journal that had memory for their buffers when the file was made; 0 for all
///     96    queue sizes (64 x u16)
///     256   which of the two copies of the registers is valid
///     320   two copies: status, selectors, features, epoch, configuration space (128 bytes at most), queues (64 x 32 bytes)
///     4864  what the device's type must remember of its driver's choices (3328 bytes, `notes`)
///     8192  the journals, each page aligned (`QueueJournal`)
///     behind them, of a PCI function only: a page with two copies of its own registers, and at 4092 which of them is valid
package final class DeviceState: PCITransportState, @unchecked Sendable {
  // Invariant behind @unchecked Sendable: the mapping never changes; the registers' part is written by the ioreq thread alone, each
  // journal by its data thread (or by the ioreq thread while that thread does not exist).

  package static let version: UInt32 = 1
  /// Of files whose registers are those of a Xenbus device: an older vxd must not take them for virtio-mmio's.
  private static let xenbusVersion: UInt32 = 2
  /// Of files of PCI functions.
  private static let pciVersion: UInt32 = 3
  private static let magic: UInt64 = 0x4554_4154_5344_5856  // "VXDSTATE"
  private static let registersOffset = 320
  private static let copyBytes = 64 + 128 + 64 * 32
  private static let slotsOffset = 88
  private static let notesOffset = 4864
  private static let journalsOffset = 8192
  private static let queueLimit = 64

  /// What a new file is made for.
  package struct Layout: Equatable, Sendable {
    package var identity: DeviceIdentity
    /// Requests and buffers of a chain in each journal.
    package var slotCount: Int
    package var chainLimit: Int

    package init(identity: DeviceIdentity, slotCount: Int, chainLimit: Int) {
      self.identity = identity
      self.slotCount = slotCount
      self.chainLimit = chainLimit
    }
  }

  package let layout: Layout
  package let place: DevicePlace
  private let memory: UnsafeMutableRawPointer
  private let length: Int

  private static func journalBytes(_ layout: Layout) -> Int {
    (QueueJournal.bytes(slotCount: layout.slotCount, chainLimit: layout.chainLimit) + 4095) & ~4095
  }

  private static func bytes(_ layout: Layout, _ place: DevicePlace) -> Int {
    journalsOffset + layout.identity.queueSizes.count * journalBytes(layout) + functionBytes(place)
  }

  /// Of the page of a PCI function.
  private static func functionBytes(_ place: DevicePlace) -> Int {
    switch place {
    case .pci: 4096
    case .mmio, .xenbus: 0
    }
  }

  private static func version(of place: DevicePlace) -> UInt32 {
    switch place {
    case .mmio: version
    case .xenbus: xenbusVersion
    case .pci: pciVersion
    }
  }

  /// Makes a file, complete before it has its name.
  package init(path: String, layout: Layout, place: DevicePlace) throws(Errno) {
    self.layout = layout
    self.place = place
    let queues = layout.identity.queueSizes.count
    length = Self.bytes(layout, place)
    let temporary = path + ".new"
    unlink(temporary)
    let descriptor = OwnedDescriptor(
      adopting: try retrying { open(temporary, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0o600) })
    do throws(Errno) {
      memory = try Self.makeRoom(descriptor.raw, layout, length)
    } catch {
      unlink(temporary)
      throw error
    }
    memory.storeBytes(of: Self.magic, as: UInt64.self)
    for (index, value) in [
      Self.version(of: place),
      UInt32(clamping: length >> 12), layout.identity.deviceID,
      UInt32(queues), UInt32(layout.slotCount),
      UInt32(layout.chainLimit),
    ].enumerated() {
      memory.storeBytes(of: value, toByteOffset: 8 + 4 * index, as: UInt32.self)
    }
    memory.storeBytes(of: layout.identity.offeredFeatures.rawValue, toByteOffset: 64, as: UInt64.self)
    switch place {
    case .mmio(let base, let index, let sharedInterrupt):
      memory.storeBytes(of: base, toByteOffset: 72, as: UInt64.self)
      memory.storeBytes(of: UInt32(truncatingIfNeeded: index), toByteOffset: 80, as: UInt32.self)
      memory.storeBytes(of: sharedInterrupt, toByteOffset: 84, as: UInt32.self)
    case .pci(let device): memory.storeBytes(of: UInt32(device), toByteOffset: 80, as: UInt32.self)
    case .xenbus: break
    }
    for (index, size) in layout.identity.queueSizes.enumerated() {
      memory.storeBytes(of: size, toByteOffset: 96 + 2 * index, as: UInt16.self)
    }
    guard rename(temporary, path) == 0 else {
      // What is mapped is given back as the object ends.
      let failure = Errno.last
      unlink(temporary)
      throw failure
    }
  }

  /// State that ends with the process: it outlives backends.
  package init(layout: Layout, place: DevicePlace) throws(Errno) {
    self.layout = layout
    self.place = place
    length = Self.bytes(layout, place)
    let start = mmap(nil, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    guard let start, start != MAP_FAILED else { throw Errno.last }
    memory = start
  }

  /// Opens what an earlier process left.
  package init(path: String) throws(StateFault) {
    let raw = open(path, O_RDWR | O_CLOEXEC)
    guard raw >= 0 else { throw .host(Errno.last) }
    let descriptor = OwnedDescriptor(adopting: raw)
    var status = stat()
    guard fstat(raw, &status) == 0 else { throw .host(Errno.last) }
    let length = Int(status.st_size)
    guard length >= 12 else { throw .damaged("it has \(length) bytes") }
    let mapped: UnsafeMutableRawPointer
    do throws(Errno) { mapped = try Self.map(descriptor.raw, max(length, 4096)) } catch { throw .host(error) }
    // The first page is there, and zero behind the file's end.
    var fault: StateFault?
    var found: (Layout, DevicePlace)?
    do throws(StateFault) { found = try Self.examine(mapped, length) } catch { fault = error }
    guard let found else {
      munmap(mapped, max(length, 4096))
      throw fault ?? .damaged("it is empty")
    }
    memory = mapped
    self.length = max(length, 4096)
    (layout, place) = found
  }

  deinit { munmap(memory, length) }

  /// Sizes and maps a new file. What may be stored to at once has memory from now on; a file system in memory that is full later would answer
  /// a store with SIGBUS. Kernels that cannot be asked for the rest when it is needed (before Linux 5.14) are asked for all of it now.
  private static func makeRoom(_ descriptor: Int32, _ layout: Layout, _ length: Int) throws(Errno)
    -> UnsafeMutableRawPointer
  {
    func allocate(_ start: Int, _ end: Int) throws(Errno) {
      let result = posix_fallocate(descriptor, off_t(start), off_t(end - start))
      guard result == 0 else { throw Errno(result) }
    }
    try allocate(length - 4096, length)
    try allocate(0, journalsOffset)
    let mapped = try map(descriptor, length)
    let queues = layout.identity.queueSizes.count
    do throws(Errno) {
      guard populate(mapped, 4096) != .unknown else {
        try allocate(0, length)
        return mapped
      }
      mapped.storeBytes(of: UInt32(QueueJournal.slotGroup), toByteOffset: slotsOffset, as: UInt32.self)
      let first = QueueJournal.bytesAtFirst(slotCount: layout.slotCount, chainLimit: layout.chainLimit)
      for queue in 0..<queues {
        let start = journalsOffset + queue * journalBytes(layout)
        try allocate(start, start + first)
      }
    } catch {
      munmap(mapped, length)
      throw error
    }
    return mapped
  }

  private static func map(_ descriptor: Int32, _ length: Int) throws(Errno) -> UnsafeMutableRawPointer {
    guard let start = mmap(nil, length, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0), start != MAP_FAILED else {
      throw Errno.last
    }
    // The pages around a request's are those of requests that are mostly not there: nothing is read or mapped ahead.
    madvise(start, length, Int32(MADV_RANDOM))
    return start
  }

  private static func examine(_ memory: UnsafeMutableRawPointer, _ length: Int) throws(StateFault) -> (
    Layout, DevicePlace
  ) {
    func word(_ offset: Int) -> UInt32 { memory.load(fromByteOffset: offset, as: UInt32.self) }
    guard memory.load(as: UInt64.self) == magic else {
      throw .damaged("it does not start with the header of such a file")
    }
    guard [version, xenbusVersion, pciVersion].contains(word(8)) else { throw .version(word(8)) }
    let (queues, slots, chains) = (Int(word(20)), Int(word(24)), Int(word(28)))
    guard (1...queueLimit).contains(queues), (1...32768).contains(slots), (1...32768).contains(chains) else {
      throw .damaged("\(queues) queues of \(slots) slots")
    }
    let sizes = (0..<queues).map { memory.load(fromByteOffset: 96 + 2 * $0, as: UInt16.self) }
    let layout = Layout(
      identity: DeviceIdentity(
        deviceID: word(16), offeredFeatures: FeatureBits(rawValue: memory.load(fromByteOffset: 64, as: UInt64.self)),
        queueSizes: sizes), slotCount: slots, chainLimit: chains)
    let place: DevicePlace =
      switch word(8) {
      case xenbusVersion: .xenbus
      case pciVersion: .pci(device: UInt8(truncatingIfNeeded: word(80) & 31))
      default:
        .mmio(
          base: memory.load(fromByteOffset: 72, as: UInt64.self), index: Int(word(80)), sharedInterrupt: word(84))
      }
    guard length == bytes(layout, place), word(256) <= 1 else { throw .damaged("it has \(length) bytes") }
    return (layout, place)
  }

  // MARK: Queues

  private var slotsWithMemory: Int? {
    let count = memory.load(fromByteOffset: Self.slotsOffset, as: UInt32.self)
    return count == 0 ? nil : Int(count)
  }

  /// The journal of a queue.
  package func storage(_ queue: Int) -> JournalStorage {
    JournalStorage(
      memory: memory + Self.journalsOffset + queue * Self.journalBytes(layout), slotCount: layout.slotCount,
      chainLimit: layout.chainLimit, slotsWithMemory: slotsWithMemory, owner: self)
  }

  package func endQueue(_ queue: Int) {
    guard layout.identity.queueSizes.indices.contains(queue) else { return }
    storage(queue).journal.end()
  }

  package var savedConfiguration: [UInt8] { saved.configuration }

  package func forgetDriver() {
    // The last word is the operator's, see `NetBackend.save`.
    UnsafeMutableRawBufferPointer(rebasing: notes.dropLast(8)).initializeMemory(as: UInt8.self, repeating: 0)
  }

  /// Room for what a device's type must remember of its driver's choices; all zero when the device is new. Written by the device's
  /// first data thread alone.
  package var notes: UnsafeMutableRawBufferPointer {
    UnsafeMutableRawBufferPointer(start: memory + Self.notesOffset, count: Self.journalsOffset - Self.notesOffset)
  }

  // MARK: Registers

  private var valid: UnsafeMutablePointer<Atomic<UInt32>> {
    (memory + 256).assumingMemoryBound(to: Atomic<UInt32>.self)
  }

  package func save(_ registers: DriverState, _ status: DeviceStatus, configuration: [UInt8]) {
    let next = 1 - (valid.pointee.load(ordering: .relaxed) & 1)
    let copy = memory + Self.registersOffset + Int(next) * Self.copyBytes
    for (index, value) in [
      status.rawValue, registers.deviceFeaturesSelect, registers.driverFeaturesSelect, registers.queueSelect,
      UInt32(truncatingIfNeeded: registers.driverFeatures), UInt32(truncatingIfNeeded: registers.driverFeatures >> 32),
      UInt32(min(configuration.count, 128)), registers.epoch, registers.generation,
    ].enumerated() {
      copy.storeBytes(of: value, toByteOffset: 4 * index, as: UInt32.self)
    }
    for (index, byte) in configuration.prefix(128).enumerated() {
      copy.storeBytes(of: byte, toByteOffset: 64 + index, as: UInt8.self)
    }
    for (index, layout) in registers.queues.prefix(Self.queueLimit).enumerated() {
      let queue = copy + 192 + 32 * index
      queue.storeBytes(of: layout.size, as: UInt16.self)
      queue.storeBytes(of: registers.ready[index] ? 1 : 0, toByteOffset: 2, as: UInt8.self)
      queue.storeBytes(of: layout.descriptorArea, toByteOffset: 8, as: UInt64.self)
      queue.storeBytes(of: layout.driverArea, toByteOffset: 16, as: UInt64.self)
      queue.storeBytes(of: layout.deviceArea, toByteOffset: 24, as: UInt64.self)
    }
    valid.pointee.store(next, ordering: .releasing)
  }

  /// What was saved last.
  package var saved: (registers: DriverState, status: DeviceStatus, configuration: [UInt8]) {
    let copy = memory + Self.registersOffset + Int(valid.pointee.load(ordering: .acquiring) & 1) * Self.copyBytes
    func word(_ index: Int) -> UInt32 { copy.load(fromByteOffset: 4 * index, as: UInt32.self) }
    var registers = DriverState()
    registers.deviceFeaturesSelect = word(1)
    registers.driverFeaturesSelect = word(2)
    registers.queueSelect = word(3)
    registers.epoch = word(7)
    registers.generation = word(8)
    registers.driverFeatures = UInt64(word(5)) << 32 | UInt64(word(4))
    let configuration = (0..<Int(min(word(6), 128))).map { copy.load(fromByteOffset: 64 + $0, as: UInt8.self) }
    for index in layout.identity.queueSizes.indices {
      let queue = copy + 192 + 32 * index
      var layout = QueueLayout()
      layout.size = queue.load(as: UInt16.self)
      layout.descriptorArea = queue.load(fromByteOffset: 8, as: UInt64.self)
      layout.driverArea = queue.load(fromByteOffset: 16, as: UInt64.self)
      layout.deviceArea = queue.load(fromByteOffset: 24, as: UInt64.self)
      registers.queues.append(layout)
      registers.ready.append(queue.load(fromByteOffset: 2, as: UInt8.self) == 1)
    }
    return (registers, DeviceStatus(rawValue: word(0) & 0xff), configuration)
  }

  // MARK: Registers of a PCI function

  /// The page of the function; nil where the device is none.
  private var functionPage: UnsafeMutableRawPointer? {
    let bytes = Self.functionBytes(place)
    return bytes == 0 ? nil : memory + length - bytes
  }

  private func validFunction(_ page: UnsafeMutableRawPointer) -> UnsafeMutablePointer<Atomic<UInt32>> {
    (page + 4092).assumingMemoryBound(to: Atomic<UInt32>.self)
  }

  package func save(_ registers: PCIRegisters) {
    guard let page = functionPage else { return }
    let valid = validFunction(page)
    let next = 1 - (valid.pointee.load(ordering: .relaxed) & 1)
    registers.encode(to: page + Int(next) * PCIRegisters.bytes)
    valid.pointee.store(next, ordering: .releasing)
  }

  /// What was saved last of a PCI function.
  package var savedFunction: PCIRegisters {
    guard let page = functionPage else { return PCIRegisters(layout.identity) }
    let copy = Int(validFunction(page).pointee.load(ordering: .acquiring) & 1)
    return PCIRegisters(layout.identity, decoding: page + copy * PCIRegisters.bytes)
  }
}
