import Devices
import EventLoop
import SimulatedXen
import TestSupport
import Transport
import Virtqueue

/// A block queue under any requests: chains made from the input in a well-formed ring, on a store of 64 KiB of memory.
enum BlockTarget {
  // Touched by libFuzzer's one thread.
  nonisolated(unsafe) private static let fixture = QueueFixture(size: 16, memoryBytes: 1 << 18, bucketShift: 14)

  static let run: @Sendable (UnsafeBufferPointer<UInt8>) -> Void = { bytes in
    var input = Input(bytes)
    let failures = input.byte()
    let choice = input.byte()
    // Into the guest's memory itself, as buffered I/O goes, or by bounce buffers.
    let engine = MemoryEngine(failures: failures, isDirect: choice & 0x40 != 0)
    var settings = BlockPumpSettings()
    settings.bounceBytes = 1 << 16
    settings.pollsWhenIdle = false
    settings.cache = BlockCacheMode.allCases[Int(choice) % 3]
    settings.errors.retryPause = 0
    settings.errors.onError = [.report, .retry(milliseconds: 0), .hold][Int(input.byte()) % 3]
    do {
      var pump = try BlockPump(
        engine: engine, source: fixture.pool, counters: QueueCounters(), settings: settings,
        storage: JournalStorage(slotCount: 8, chainLimit: 32))
      try pump.activate(
        layout: fixture.layout, maximumSize: 16, features: [.indirectDescriptors, .blockFlush], source: fixture.pool)
      fixture.publish([], index: 0)
      try serve(&pump, &input)
      pump.deactivate()
      pump.drain()
      precondition(pump.busyCount == 0)
    } catch {
      precondition(error is DeviceFault || error is VirtqueueFault)
    }
  }

  private static func serve(_ pump: inout BlockPump, _ input: inout Input) throws {
    let memory = fixture.domain.memory
    let signals = NoSignals()
    var heads: [UInt16] = []
    for index in 0..<16 where !input.isEmpty {
      let shape = input.byte()
      let place = 0x20000 + UInt64(index) * 0x400
      let type = UInt64(input.byte() % 18)
      memory.pointer(place).storeBytes(of: type, as: UInt64.self)
      memory.pointer(place + 8).storeBytes(of: input.number(bytes: shape & 1 == 0 ? 1 : 8), as: UInt64.self)
      for word in 0..<4 {
        memory.pointer(place + 64 + UInt64(word) * 8).storeBytes(of: input.number(bytes: 2), as: UInt64.self)
      }
      // One to three descriptors in a table: header, data, status; sizes and directions from the input.
      let table = place + 256
      let count = UInt64(shape >> 1 & 3) + 1
      for entry in 0..<count {
        let kind = input.byte()
        let address = kind & 0x80 != 0 ? input.number(bytes: 8) : entry == 0 ? place : place + 64 + UInt64(kind & 0x3f)
        let length = entry == 0 ? 16 : input.number(bytes: kind & 0x40 != 0 ? 4 : 2)
        let flags = UInt16(entry + 1 < count ? 1 : 0) | (entry > 0 && kind & 1 != 0 ? 2 : 0)
        memory.putDescriptor(
          at: table + entry * 16, address, UInt32(truncatingIfNeeded: length), flags, UInt16(entry + 1))
      }
      fixture.descriptor(index, table, UInt32(count * 16), flags: 4)
      heads.append(UInt16(index))
    }
    fixture.publish(heads)
    for _ in 0..<8 {
      if case .more = try pump.run(signals: signals) { continue }
      if pump.heldResult != 0 { pump.resume() }
    }
  }

  private final class NoSignals: TransportSignals {
    func interruptForUsedBuffers() {}
    func interruptForConfiguration() {}
    func needReset() {}
  }
}

/// A store in memory that fails now and then, as the input says.
private final class MemoryEngine: BlockEngine {
  private var failures: UInt8
  private var bytes = [UInt8](repeating: 0, count: 1 << 16)
  private var done: [EngineCompletion] = []

  init(failures: UInt8, isDirect: Bool) {
    (self.failures, reachesGuestMemory, movesDataInSubmit) = (failures, isDirect, isDirect)
  }

  let geometry = BlockGeometry(
    capacity: 1 << 16, canDiscard: true, canSecureErase: true,
    lifetime: BlockLifetime(preEndOfLife: 1, typicalA: 2, typicalB: 3))
  let reachesGuestMemory: Bool
  let movesDataInSubmit: Bool
  let memoryAlignment = 1
  private var time: UInt64 = 1
  var now: UInt64 {
    time += 1
    return time
  }
  let readiness: Int32 = -1
  func acknowledgeReadiness() {}
  func waitForCompletion() {}
  func abandon() {}
  func close() {}

  func submit(_ requests: UnsafeMutablePointer<EngineRequest>, count: Int) {
    for index in 0..<count { done.append(EngineCompletion(tag: requests[index].tag, result: perform(requests[index]))) }
  }

  private func perform(_ request: EngineRequest) -> Int {
    defer { failures = failures << 1 | failures >> 7 }
    if failures & 1 != 0 { return failures & 2 != 0 ? -5 : -28 }
    let start = Int(request.offset)
    switch request.operation {
    case .flush: return 0
    case .discard, .writeZeroes, .secureErase:
      precondition(request.offset + request.length <= 1 << 16, "the device let a range beyond the end through")
      for index in start..<start + Int(request.length) { bytes[index] = 0 }
      return 0
    case .read, .write:
      var position = start
      for vector in 0..<request.vectorCount {
        let piece = request.vectors[vector]
        precondition(position + piece.length <= 1 << 16, "the device let a transfer beyond the end through")
        guard let memory = piece.start else { return -14 }
        bytes.withUnsafeMutableBytes { store in
          guard let base = store.baseAddress else { return }
          if request.operation == .read {
            memory.copyMemory(from: base + position, byteCount: piece.length)
          } else {
            (base + position).copyMemory(from: memory, byteCount: piece.length)
          }
        }
        position += piece.length
      }
      return position - start
    }
  }

  func reap(into completions: UnsafeMutablePointer<EngineCompletion>, capacity: Int) -> Int {
    let count = min(capacity, done.count)
    for index in 0..<count { completions[index] = done[index] }
    done.removeFirst(count)
    return count
  }
}
