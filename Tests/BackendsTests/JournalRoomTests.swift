import DeviceHost
import Glibc
import TestSupport
import Testing
import Transport
import Virtqueue

@testable import Devices

/// Saved state takes up what its device's load needs, and a file system that is full is no end of the process.
@Suite struct JournalRoomTests {
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

  @Test func slotsWithoutMemoryAreNotTakenUntilThereIsSome() throws {
    let folder = TemporaryFolder()
    let (slots, chain) = (256, 256)
    let whole = (QueueJournal.bytes(slotCount: slots, chainLimit: chain) + 4095) & ~4095
    let first = (QueueJournal.bytesAtFirst(slotCount: slots, chainLimit: chain) + 4095) & ~4095
    #expect(first < whole / 8)
    let file = try Short(folder, length: first, mapped: whole)
    let storage = JournalStorage(memory: file.memory, slotCount: slots, chainLimit: chain, owner: file)
    var slab = OperationSlab(journal: storage.journal)
    var taken: [Int] = []
    while let slot = slab.take(at: 1) { taken.append(slot) }
    #expect(taken == Array(0..<QueueJournal.slotsAtFirst(slots)))
    // Each can be written to.
    for slot in taken {
      for index in 0..<chain { slab.buffers(slot)[index] = GuestBuffer(address: 1, length: 1) }
    }
    // What is given back is taken again, and more as soon as there is memory.
    slab.give(3)
    #expect(slab.take(at: 2) == 3)
    #expect(slab.take(at: 3) == nil)
    file.grow(to: whole)
    var count = taken.count
    while let slot = slab.take(at: 4) {
      slab.buffers(slot)[chain - 1] = GuestBuffer(address: 1, length: 1)
      count += 1
    }
    #expect(count == slots)
  }

  @Test func newStateOfAnIdleDeviceIsSmall() throws {
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
    // An older vxd's file, all of which has memory, is used as it is.
    let next = try DeviceState(path: path)
    #expect(next.layout == layout)
  }
}
