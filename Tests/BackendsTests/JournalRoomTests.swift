import DeviceHost
import Glibc
import HostMemory
import TestSupport
import Testing
import Transport
import Virtqueue

@testable import Devices

/// Saved state takes up what its device's load needs, and a file system that is full is no end of the process.
@Suite struct JournalRoomTests {
  private static let kernelCanBeAsked: Bool = {
    guard let page = mmap(nil, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) else { return false }
    defer { munmap(page, 4096) }
    return populate(page, 4096) == .done
  }()

  /// A file that is mapped beyond its end: a store there is answered as one into a file system in memory that is full.
  private final class Short {
    let memory: UnsafeMutableRawPointer
    private let descriptor: Int32
    private let mapped: Int

    init(_ folder: TemporaryFolder, length: Int, mapped: Int) throws {
      let path = folder.file("journal", bytes: length)
      descriptor = open(path, O_RDWR | O_CLOEXEC)
      self.mapped = mapped
      let start = try #require(mmap(nil, mapped, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0))
      try #require(start != MAP_FAILED)
      memory = start
    }

    deinit {
      munmap(memory, mapped)
      close(descriptor)
    }

    func grow(to length: Int) { ftruncate(descriptor, off_t(length)) }
  }

  @Test(.enabled(if: Self.kernelCanBeAsked)) func slotsWithoutMemoryAreNotTakenUntilThereIsSome() throws {
    let folder = TemporaryFolder()
    let (slots, chain) = (256, 256)
    let whole = (QueueJournal.bytes(slotCount: slots, chainLimit: chain) + 4095) & ~4095
    let first = (QueueJournal.bytesAtFirst(slotCount: slots, chainLimit: chain) + 4095) & ~4095
    #expect(first < whole / 8)
    let file = try Short(folder, length: first, mapped: whole)
    let storage = JournalStorage(
      memory: file.memory, slotCount: slots, chainLimit: chain, slotsWithMemory: QueueJournal.slotGroup, owner: file)
    var slab = OperationSlab(journal: storage.journal)
    var taken: [Int] = []
    while let slot = slab.take(at: 1) { taken.append(slot) }
    let refusals = slab.refusals
    #expect(taken == Array(0..<QueueJournal.slotGroup) && refusals == 1)
    // Each can be written to.
    for slot in taken {
      for index in 0..<chain { slab.buffers(slot)[index] = GuestBuffer(address: 1, length: 1) }
    }
    // What is given back is taken again, and more as soon as there is memory.
    slab.give(3)
    let third = slab.take(at: 2)
    let none = slab.take(at: 3)
    #expect(third == 3 && none == nil)
    file.grow(to: whole)
    // It is not asked for again at once.
    let soon = slab.take(at: 4)
    let stillOne = slab.refusals
    #expect(soon == nil && stillOne == 1)
    var count = taken.count
    while let slot = slab.take(at: 2_000_000_000) {
      slab.buffers(slot)[chain - 1] = GuestBuffer(address: 1, length: 1)
      count += 1
    }
    #expect(count == slots)
  }

  /// What an earlier owner had lies above what has memory from the start, and is given back last: on top of what is free.
  @Test(.enabled(if: Self.kernelCanBeAsked), arguments: [17, 20, 40]) func slotsOfAnEarlierOwnerLeaveAQueueWithSome(
    adopted: Int
  ) throws {
    let folder = TemporaryFolder()
    let (slots, chain) = (64, 256)
    let whole = (QueueJournal.bytes(slotCount: slots, chainLimit: chain) + 4095) & ~4095
    let first = (QueueJournal.bytesAtFirst(slotCount: slots, chainLimit: chain) + 4095) & ~4095
    let file = try Short(folder, length: first, mapped: whole)
    let storage = JournalStorage(
      memory: file.memory, slotCount: slots, chainLimit: chain, slotsWithMemory: QueueJournal.slotGroup, owner: file)
    var slab = OperationSlab(journal: storage.journal)
    for slot in 0..<adopted {
      let isTaken = slab.take(slot, at: 1)
      #expect(isTaken)
    }
    for slot in 0..<adopted { slab.give(slot) }
    var taken: Set<Int> = []
    while let slot = slab.take(at: 1) { taken.insert(slot) }
    #expect(taken == Set(0..<QueueJournal.slotGroup))
    for slot in taken { slab.buffers(slot)[chain - 1] = GuestBuffer(address: 1, length: 1) }
  }

  @Test(.enabled(if: Self.kernelCanBeAsked, "before Linux 5.14 all of it is asked for at once"))
  func newStateOfAnIdleDeviceIsSmall() throws {
    let folder = TemporaryFolder()
    let layout = DeviceState.Layout(
      identity: DeviceIdentity(deviceID: 2, offeredFeatures: [], queueSizes: [256, 256]), slotCount: 256,
      chainLimit: 256)
    let path = folder.path + "/x.device"
    let state = try DeviceState(path: path, layout: layout, place: .xenbus)
    var status = stat()
    #expect(stat(path, &status) == 0)
    let used = Int(status.st_blocks) * 512
    #expect(used <= 256 << 10 && Int(status.st_size) > 2 << 20, "\(used) of \(status.st_size) bytes")
    // What an idle queue needs is there, and all of it can be had.
    for queue in 0..<2 {
      let journal = state.storage(queue).journal
      #expect(journal.back(0..<256))
      journal.buffers(255)[255] = GuestBuffer(address: 1, length: 1)
    }
    // The next process knows what has memory; an older vxd's file says nothing, and all of it has.
    #expect(try DeviceState(path: path).storage(0).journal.slotsWithMemory == QueueJournal.slotGroup)
    let descriptor = open(path, O_RDWR | O_CLOEXEC)
    defer { close(descriptor) }
    var none: UInt32 = 0
    #expect(pwrite(descriptor, &none, 4, 88) == 4)
    #expect(try DeviceState(path: path).storage(0).journal.slotsWithMemory == 256)
  }
}
